"""The order in which pairs (x, t) are trained on.

Sources are endless. `state()` says where one is; after `restore(state)` it goes on bit for bit.
"""

import hashlib
import math
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from tsae.pairs.extract import NO_POSITION, Pair, activations
from tsae.pairs.shards import Memory, Store


def permuted(i: torch.Tensor, n: int, seed: int, epoch: int) -> torch.Tensor:
    """Where the permutation of 0 .. n - 1 named by (seed, epoch) takes i (b,) int64.

    A Feistel network: no table, no state. A number is two digits in base ceil(sqrt(n)). A round
    takes (left, right) to (right, (left + hash(right)) mod base): that can be undone whatever the
    hash, so the rounds permute. What is beyond n - 1 goes through them again until it is below n.
    """
    base, out, beyond = math.isqrt(n - 1) + 1, i.clone(), torch.ones_like(i, dtype=torch.bool)
    keys = struct.unpack("<8I", hashlib.sha256(f"{seed} {epoch}".encode()).digest())
    while beyond.any():
        left, right = out[beyond] // base, out[beyond] % base
        for key in keys:
            left, right = right, (left + _hashed(right + key)) % base
        out[beyond] = left * base + right
        beyond = out >= n
    return out


def _hashed(v: torch.Tensor) -> torch.Tensor:
    """A hash of 32 bits; its multiplier has 27, so no product leaves int64."""
    for _ in range(2):
        v = v & 0xFFFFFFFF
        v = (v ^ (v >> 16)) * 0x45D9F3B
    v = v & 0xFFFFFFFF
    return v ^ (v >> 16)


class _Source:
    """An endless iterator of batches; rank r of `world` gets rows r::world of each.

    `given` counts the batches handed out; `settings` are what the order depends on.
    """

    def __init__(self, batch: int, rank: int, world: int, **settings: int):
        if batch < 1 or world < 1 or batch % world or not 0 <= rank < world:
            raise ValueError(f"a batch of {batch} pairs cannot be dealt to rank {rank} of {world}: "
                             "`batch` must be a multiple of `world`, and `rank` below it")
        self.batch, self.rank, self.world, self.given = batch, rank, world, 0
        self.settings = dict(settings, batch=batch)

    def __iter__(self):
        return self

    def _check(self, state: dict) -> None:
        lacking = sorted(self.state().keys() - state.keys())
        if lacking:
            raise ValueError(f"the state lacks {', '.join(lacking)}: it is not one of a "
                             f"{type(self).__name__}")
        for name, value in self.settings.items():
            if int(state[name]) != value:
                raise ValueError(
                    f"the state was saved with {name} {int(state[name])}, and this source has "
                    f"{value}: restore it into a source of the same data and settings")


class Shuffled(_Source):
    """Batches x (batch, d) float32, t (batch,) int64 of `pairs`, in a fresh permutation each epoch.

    Batches are always full and run on from one epoch into the next. With `prefetch` a thread works
    out the next batch while the last one is used: the order and `state` are the same.
    """

    def __init__(self, pairs: Store | Memory, batch: int, seed: int, prefetch: bool = False,
                 rank: int = 0, world: int = 1):
        super().__init__(batch, rank, world, seed=seed, pairs=len(pairs))
        self.pairs, self.seed = pairs, seed
        self._thread = ThreadPoolExecutor(1) if prefetch else None
        self._ahead: Future | None = None

    def __next__(self) -> Pair:
        ahead, self._ahead = self._ahead, None
        pair = ahead.result() if ahead else self._numbered(self.given)
        self.given += 1
        if self._thread:
            self._ahead = self._thread.submit(self._numbered, self.given)
        return pair

    def _numbered(self, number: int) -> Pair:
        """Batch `number`, a function of nothing else."""
        place = number * self.batch + torch.arange(self.rank, self.batch, self.world)
        n = len(self.pairs)
        epoch, i = place // n, place % n
        parts = [permuted(i[epoch == e], n, self.seed, e) for e in epoch.unique().tolist()]
        return self.pairs.gather(torch.cat(parts))

    def state(self) -> dict[str, int]:
        """The batches handed out, and what the order depends on. It is the same on all ranks."""
        return dict(self.settings, given=self.given)

    def restore(self, state: dict[str, int]) -> None:
        """Go on as after `state`. Raises ValueError for another seed, batch or number of pairs."""
        self._check(state)
        self.given, self._ahead = int(state["given"]), None


class Streamed(_Source):
    """Batches x (batch, d) float32, t (batch,) int64 from the language model, over bounded memory.

    Rows (N, T) are visited in a fresh permutation each epoch. A buffer of `buffer` pairs mixes
    their positions; half of it is replaced at a time. Its x is of `dtype`: bfloat16 takes half the
    memory and rounds to 3 digits, as a Store does. Every rank runs the language model on all rows.
    residuals, keep: see `activations`. Raises ValueError for an epoch without a position.
    """

    def __init__(self, rows: torch.Tensor, residuals: Callable, keep: Callable, batch: int,
                 buffer: int, seed: int, batch_rows: int = 64, dtype: torch.dtype = torch.bfloat16,
                 rank: int = 0, world: int = 1):
        super().__init__(batch, rank, world, seed=seed, buffer=buffer, rows=len(rows),
                         context=rows.shape[1], batch_rows=batch_rows)
        self.rows, self.residuals, self.keep, self.dtype = rows, residuals, keep, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self._new_epoch()
        self.x, self.t = torch.empty(0, 0, dtype=dtype), torch.empty(0, dtype=rows.dtype)
        self.used, self.ready = 0, 0  # pairs of the buffer given, and still to give before a refill

    def _new_epoch(self) -> None:
        self.order = torch.randperm(len(self.rows), generator=self.generator)
        self.row, self.positions = 0, 0  # rows visited in this epoch, and positions kept of them

    def __next__(self) -> Pair:
        if not self.ready:
            self.x, self.t = self.x[self.used:].clone(), self.t[self.used:].clone()
            self.used = 0  # the clones let go of what was given
            before = self.state()
            try:
                self._fill()
            except BaseException:  # an interrupt too: no row that was under way may be missed
                self.restore(before)
                raise
        mine = slice(self.used + self.rank, self.used + self.batch, self.world)
        self.used += self.batch
        self.ready -= self.batch
        self.given += 1
        return self.x[mine].float(), self.t[mine].long()

    def _fill(self) -> None:
        """One pass or more, until the buffer is full; then it is mixed."""
        parts, size = [(self.x, self.t)], len(self.t)
        while len(parts) == 1 or size < max(self.settings["buffer"], 2 * self.batch):
            parts.append(self._pass())
            size += len(parts[-1][1])
        self.x, self.t = _joined(parts, torch.randperm(size, generator=self.generator))
        self.ready = size // 2 // self.batch * self.batch

    def _pass(self) -> Pair:
        """The pairs of the next rows."""
        if self.row == len(self.order):
            if not self.positions:
                raise ValueError(NO_POSITION)
            self._new_epoch()
        which = self.order[self.row:self.row + self.settings["batch_rows"]]
        x, t = next(activations(self.rows, self.residuals, self.keep, len(which), which))
        self.row += len(which)
        self.positions += len(t)
        return x.to(self.dtype), t

    def state(self) -> dict[str, int | torch.Tensor]:
        """All that the next batches depend on, the buffer too. It is the same on all ranks."""
        return dict(self.settings, given=self.given, row=self.row, positions=self.positions,
                    ready=self.ready, order=self.order, generator=self.generator.get_state(),
                    x=self.x[self.used:], t=self.t[self.used:])

    def restore(self, state: dict[str, int | torch.Tensor]) -> None:
        """Go on as after `state`, without a pass. Raises ValueError for one of other settings."""
        self._check(state)
        if state["x"].dtype != self.dtype:
            raise ValueError(
                f"the state was saved with a buffer of {state['x'].dtype}, and this source has "
                f"{self.dtype}: restore it into a source of the same settings")
        self.generator.set_state(state["generator"].cpu())
        self.order, self.x, self.t = state["order"].cpu(), state["x"], state["t"]
        self.given, self.row, self.positions, self.ready = (
            int(state[name]) for name in ("given", "row", "positions", "ready"))
        self.used = 0


def _joined(parts: list[Pair], order: torch.Tensor) -> Pair:
    """cat(parts)[order] without the cat: scattering each part to its places saves a copy."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    x, t = parts[-1]
    x, t, places = x.new_empty(len(order), x.shape[1]), t.new_empty(len(order)), places.to(x.device)
    for (part_x, part_t), place in zip(parts, places.split([len(t) for _, t in parts])):
        if len(part_t):  # an empty buffer has no width yet
            x[place] = part_x.to(x.device)
            t[place] = part_t.to(x.device)
    return x, t
