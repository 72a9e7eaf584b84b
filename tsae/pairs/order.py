"""Endless sources of pairs (x, t) to train on; after `restore(state())` they go on bit for bit."""

import hashlib
import math
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from tsae.baseline import Context, Needs, mixed
from tsae.pairs.extract import NO_POSITION, Pair, activations
from tsae.pairs.shards import InContext, Pairs, Some


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
            left, right = right, (left + mixed(right + key)) % base
        out[beyond] = left * base + right
        beyond = out >= n
    return out


class _Source:
    """An endless iterator of batches, `given` so far; rank r of `world` gets its rows r::world."""

    def __init__(self, batch: int, rank: int, world: int, **settings: int):
        if batch < 1 or world < 1 or batch % world or not 0 <= rank < world:
            raise ValueError(f"a batch of {batch} pairs cannot be dealt to rank {rank} of {world}: "
                             "`batch` must be a multiple of `world`, and `rank` below it")
        self.batch, self.rank, self.world, self.given = batch, rank, world, 0
        self.settings = dict(settings, batch=batch)

    def __iter__(self):
        return self

    def _check(self, state: dict) -> None:
        if lacking := ", ".join(sorted(self.state().keys() - state.keys())):
            raise ValueError(f"the state lacks {lacking}: it is not one of a {type(self).__name__}")
        for name, value in self.settings.items():
            if int(state[name]) != value:
                raise ValueError(f"the state was saved with {name} {int(state[name])}, and this "
                                 f"source has {value}: use one of the same data and settings")


class Shuffled(_Source):
    """Batches x (batch, d) float32, t (batch,) int64 of `pairs`, in a fresh permutation each epoch.

    Batches are full and run on into the next epoch. `prefetch`: a thread works out the next one.
    """

    def __init__(self, pairs: Pairs | Some | InContext, batch: int, seed: int,
                 prefetch: bool = False, rank: int = 0, world: int = 1):
        super().__init__(batch, rank, world, seed=seed, pairs=len(pairs))
        self.pairs, self.seed = pairs, seed
        self._thread, self._ahead = ThreadPoolExecutor(1) if prefetch else None, None

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

    Rows (N, T) are visited in a fresh permutation each epoch. `buffer` pairs are mixed, and half of
    them replaced at a time; their x is of `dtype`: bfloat16 rounds to 3 digits, as a Store does.
    Every rank runs the language model on all rows. residuals, keep, limit, needs, layers: see
    `activations`; with `needs` beyond the token, t is a Context.
    """

    def __init__(self, rows: torch.Tensor, residuals: Callable, keep: Callable, batch: int,
                 buffer: int, seed: int, batch_rows: int = 64, dtype: torch.dtype = torch.bfloat16,
                 rank: int = 0, world: int = 1, limit: float = math.inf, needs: Needs = Needs(),
                 layers: dict[int, Callable] | None = None):
        super().__init__(batch, rank, world, seed=seed, buffer=buffer, rows=len(rows),
                         context=rows.shape[1], batch_rows=batch_rows, grams=needs.grams)
        self.rows, self.residuals, self.keep, self.dtype = rows, residuals, keep, dtype
        self.limit, self.needs, self.layers = limit, needs, layers
        self.generator = torch.Generator().manual_seed(seed)
        self._new_epoch()
        # the buffer: x, t, and what else a Context holds
        self.held = [torch.empty(0, 0, dtype=dtype), torch.empty(0, dtype=rows.dtype),
                     *(torch.empty(0, 0, dtype=dtype) for _ in needs.layers)]
        self.used, self.ready = 0, 0  # pairs of the buffer given, and still to give before a refill

    def _new_epoch(self) -> None:
        self.order = torch.randperm(len(self.rows), generator=self.generator)
        self.row, self.positions = 0, 0  # rows visited in this epoch, and positions kept of them

    def __next__(self) -> Pair:
        if not self.ready:
            self.held = [part[self.used:].clone() for part in self.held]
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
        x, *known = (part[mine] for part in self.held)
        return x.float(), self.needs.joined(known)

    def _fill(self) -> None:
        """Passes over the next rows, one or more until the buffer is full; then it is mixed."""
        parts, size = [self.held], len(self.held[0])
        while len(parts) == 1 or size < max(self.settings["buffer"], 2 * self.batch):
            if self.row == len(self.order):
                if not self.positions:
                    raise ValueError(NO_POSITION)
                self._new_epoch()
            which = self.order[self.row:self.row + self.settings["batch_rows"]]
            x, t = next(activations(self.rows, self.residuals, self.keep, len(which), which,
                                    self.limit, self.needs, self.layers))
            ids, *others = t.parts if isinstance(t, Context) else [t]
            new = [x.to(self.dtype), ids.to(self.rows.dtype), *(y.to(self.dtype) for y in others)]
            parts.append(new)
            self.row += len(which)
            self.positions += len(t)
            size += len(t)
        self.held = [part.new_empty(size, *part.shape[1:]) for part in new]
        # part by part to its places, as torch.cat(parts)[order] would cost a copy
        places = torch.randperm(size, generator=self.generator).argsort().to(x.device)
        for part, place in zip(parts, places.split([len(x) for x, *_ in parts])):
            for own, values in zip(self.held, part):
                if len(values):  # an empty buffer has no width yet
                    own[place] = values.to(own.device)
        self.ready = size // 2 // self.batch * self.batch

    def state(self) -> dict[str, int | torch.Tensor]:
        """All that the next batches depend on, the buffer too. It is the same on all ranks."""
        held = {name: part[self.used:] for name, part in zip(self._names(), self.held)}
        return dict(self.settings, given=self.given, row=self.row, positions=self.positions,
                    ready=self.ready, order=self.order, generator=self.generator.get_state(),
                    **held)

    def _names(self) -> list[str]:
        return ["x", "t", *(f"layer{n}" for n in self.needs.layers)]

    def restore(self, state: dict[str, int | torch.Tensor]) -> None:
        """Go on as after `state`, without a pass. Raises ValueError for one of other settings."""
        self._check(state)
        if state["x"].dtype != self.dtype:
            raise ValueError(f"the state was saved with a buffer of {state['x'].dtype}, and this "
                             f"source has {self.dtype}: use one of the same settings")
        self.generator.set_state(state["generator"].cpu())
        self.order, self.used = state["order"].cpu(), 0
        self.held = [state[name] for name in self._names()]
        self.given, self.row, self.positions, self.ready = (
            int(state[name]) for name in ("given", "row", "positions", "ready"))
