"""The order in which pairs (x, t) are trained on: endless sources that stop and go on exactly where they were."""

import hashlib
import math
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future

import torch

from tsae.pairs.extract import NO_POSITION, Pair, activations
from tsae.pairs.shards import Memory, Store


def permuted(i: torch.Tensor, n: int, seed: int, epoch: int) -> torch.Tensor:
    """Where the permutation of 0 .. n - 1 named by (seed, epoch) takes i (b,) int64: it needs no table, has no state.

    Eight rounds of a balanced Feistel network on pairs of digits in base ceil(sqrt(n)); the few numbers that it takes
    beyond n - 1 go through it again until they are back.
    """
    base, out, beyond = math.isqrt(n - 1) + 1, i.clone(), torch.ones_like(i, dtype=torch.bool)
    keys = struct.unpack("<8I", hashlib.sha256(f"{seed} {epoch}".encode()).digest())
    while beyond.any():
        left, right = out[beyond] // base, out[beyond] % base
        for key in keys:
            left, right = right, (left + _mixed(right + key)) % base
        out[beyond] = left * base + right
        beyond = out >= n
    return out


def _mixed(v: torch.Tensor) -> torch.Tensor:
    """A hash of 32 bits; its multiplier has 27, so no product leaves int64."""
    for _ in range(2):
        v = v & 0xFFFFFFFF
        v = (v ^ (v >> 16)) * 0x45D9F3B
    v = v & 0xFFFFFFFF
    return v ^ (v >> 16)


class _Source:
    """An endless iterator of batches. `given` counts those handed out; rank r of `world` gets rows r::world of each."""

    def __init__(self, batch: int, rank: int, world: int, **own: int):
        if batch < 1 or world < 1 or batch % world or not 0 <= rank < world:
            raise ValueError(f"a batch of {batch} pairs cannot be dealt to rank {rank} of {world}: `batch` must be a "
                             "multiple of `world`, and `rank` below it")
        self.batch, self.rank, self.world, self.given, self.own = batch, rank, world, 0, dict(own, batch=batch)

    def __iter__(self):
        return self

    def _agreed(self, state: dict) -> dict:
        lacking = sorted(self.state().keys() - state.keys())
        if lacking:
            raise ValueError(f"the state lacks {', '.join(lacking)}: it is not one of a {type(self).__name__}")
        for name, value in self.own.items():
            if int(state[name]) != value:
                raise ValueError(f"the state was saved with {name} {int(state[name])}, and this source has {value}: "
                                 "restore it into a source of the same data and settings")
        return state


class Shuffled(_Source):
    """Batches x (batch, d) float32, t (batch,) int64 of all pairs that are `held`, in a fresh permutation each epoch.

    Batches are always full and run on from one epoch into the next. With `prefetch` a thread works out the next batch
    while the last one is used: the order and `state` are the same.
    """

    def __init__(self, held: Store | Memory, batch: int, seed: int, prefetch: bool = False, rank: int = 0,
                 world: int = 1):
        super().__init__(batch, rank, world, seed=seed, pairs=len(held))
        self.held, self.seed, self.prefetch, self._ahead = held, seed, prefetch, None

    def __next__(self) -> Pair:
        ahead, self._ahead = self._ahead, None
        pair = ahead.result() if ahead else self._at(self.given)
        self.given += 1
        self._ahead = _later(self._at, self.given) if self.prefetch else None
        return pair

    def _at(self, number: int) -> Pair:
        """Batch `number`, a function of nothing else."""
        position = number * self.batch + torch.arange(self.rank, self.batch, self.world)
        epoch, i = position // len(self.held), position % len(self.held)
        parts = [permuted(i[epoch == e], len(self.held), self.seed, e) for e in epoch.unique().tolist()]
        return self.held.gather(torch.cat(parts))

    def state(self) -> dict[str, int]:
        """The batches handed out, and what the order depends on. It is the same on all ranks."""
        return dict(self.own, given=self.given)

    def restore(self, state: dict[str, int]) -> None:
        """Go on as after `state`. Raises ValueError for one of another seed, batch or number of pairs."""
        self.given, self._ahead = int(self._agreed(state)["given"]), None


def _later(work: Callable, *arguments: object) -> Future:
    """What `work` returns or raises, worked out by a thread of its own."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run).start()  # no daemon: torch aborts the process where one is cut off at the exit
    return future


class Streamed(_Source):
    """Batches x (batch, d) float32, t (batch,) int64 straight from the language model, over bounded memory.

    Rows (N, T) are visited in a fresh permutation each epoch; a buffer of `buffer` pairs mixes their positions, and
    half of it is replaced at a time. It is kept in `dtype`: bfloat16 takes half of the memory and rounds x to 3 digits,
    as a Store does. Every rank runs the language model on all rows. Raises ValueError for an epoch without a position.
    """

    def __init__(self, rows: torch.Tensor, residuals: Callable, keep: Callable, batch: int, buffer: int, seed: int,
                 batch_rows: int = 64, dtype: torch.dtype = torch.bfloat16, rank: int = 0, world: int = 1):
        super().__init__(batch, rank, world, seed=seed, buffer=buffer, rows=len(rows), context=rows.shape[1],
                         batch_rows=batch_rows)
        self.rows, self.residuals, self.keep, self.dtype = rows, residuals, keep, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.order, self.row, self.positions = torch.randperm(len(rows), generator=self.generator), 0, 0
        self.x, self.t = torch.empty(0, 0, dtype=dtype), torch.empty(0, dtype=rows.dtype)
        self.at, self.ready = 0, 0  # the next pair of the buffer to give, and how many to give before it is refilled

    def __next__(self) -> Pair:
        if not self.ready:
            self.x, self.t, self.at = self.x[self.at:].clone(), self.t[self.at:].clone(), 0  # lets go of what was given
            before = self.state()
            try:
                self._fill()
            except BaseException:  # an interrupt too: `state` must not miss the rows that were under way
                self.restore(before)
                raise
        mine = slice(self.at + self.rank, self.at + self.batch, self.world)
        self.at, self.ready, self.given = self.at + self.batch, self.ready - self.batch, self.given + 1
        return self.x[mine].float(), self.t[mine].long()

    def _fill(self) -> None:
        parts, held = [(self.x, self.t)], len(self.t)
        while len(parts) == 1 or held < max(self.own["buffer"], 2 * self.batch):
            if self.row == len(self.order):
                if not self.positions:
                    raise ValueError(NO_POSITION)
                self.order, self.row, self.positions = torch.randperm(len(self.rows), generator=self.generator), 0, 0
            which = self.order[self.row:self.row + self.own["batch_rows"]]
            (x, t), = activations(self.rows, self.residuals, self.keep, len(which), which)
            parts.append((x.to(self.dtype), t))
            self.row, self.positions, held = self.row + len(which), self.positions + len(t), held + len(t)
        place = torch.empty(held, dtype=torch.long)
        place[torch.randperm(held, generator=self.generator)] = torch.arange(held)
        place = place.to(x.device)
        self.x, self.t = x.new_empty(held, x.shape[1], dtype=self.dtype), t.new_empty(held)
        for (x, t), where in zip(parts, place.split([len(t) for _, t in parts])):
            if len(t):
                self.x[where], self.t[where] = x.to(self.x.device), t.to(self.x.device)
        self.ready = held // 2 // self.batch * self.batch

    def state(self) -> dict[str, int | torch.Tensor]:
        """All that the next batches depend on: integers and tensors, the buffer's among them. The same on all ranks."""
        return dict(self.own, given=self.given, row=self.row, positions=self.positions, ready=self.ready,
                    order=self.order, generator=self.generator.get_state(), x=self.x[self.at:], t=self.t[self.at:])

    def restore(self, state: dict[str, int | torch.Tensor]) -> None:
        """Go on as after `state`, without a pass of the language model over what it holds.

        Raises ValueError for a state of other settings.
        """
        if self._agreed(state)["x"].dtype != self.dtype:
            raise ValueError(f"the state was saved with a buffer of {state['x'].dtype}, and this source has "
                             f"{self.dtype}: restore it into a source of the same settings")
        self.generator.set_state(state["generator"].cpu())
        self.order, self.x, self.t, self.at = state["order"].cpu(), state["x"], state["t"], 0
        self.given, self.row, self.positions, self.ready = (int(state[name]) for name in
                                                            ("given", "row", "positions", "ready"))
