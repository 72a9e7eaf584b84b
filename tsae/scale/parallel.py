"""Training over several processes: what the ranks tell each other, and when they wait.

Every rank has its share of each batch. Without a process group all is one rank, nothing is sent.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tsae.kernels import largest
from tsae.scale import checkpoints

BUCKET = 16 << 20  # gradients sent at once, in entries: few messages, no copy of all of them
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them
MEET = timedelta(minutes=5)  # all ranks are taken to be started within so long
WAIT = timedelta(hours=24)  # rank 0 may make a store for so long; a dead rank shows at once


def together() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if together() else 1


def rank() -> int:
    return dist.get_rank() if together() else 0


def main() -> bool:
    """True on the rank that writes what all ranks have."""
    return rank() == 0


@contextmanager
def start(device: str = "auto") -> Iterator[str]:
    """Inside, this process is a rank of the group that torchrun's environment describes, if any.

    Yields the device. Raises ValueError where that environment has gaps or the machine has fewer
    GPUs than ranks, ConnectionError when not all ranks meet, or another one has ended.
    """
    cuda = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    if not _launched():
        yield device
        return
    if cuda:
        device = _own_gpu()
    _meet("cpu:gloo,cuda:nccl" if cuda else "gloo")
    failed = True
    try:
        yield device
        failed = False
    except RuntimeError as error:
        if "peer" not in str(error):
            raise
        raise ConnectionError(f"rank {rank()} lost the connection to another one, whose message "
                              "says why") from None
    finally:
        if not (cuda and failed):  # nccl might wait for ever; torchrun ends this process
            dist.destroy_process_group()


def _launched() -> bool:
    """Whether torchrun started this process. Raises ValueError where its environment has gaps."""
    missing = [name for name in NAMES if name not in os.environ]
    if missing and ("RANK" in os.environ or "WORLD_SIZE" in os.environ):
        raise ValueError(f"the environment names a rank but not {', '.join(missing)}: start the "
                         "command with torchrun")
    return not missing


def _own_gpu() -> str:
    """This rank's GPU, made the current one."""
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(f"rank {os.environ['RANK']} is number {local} on a machine with {gpus} "
                         "GPUs: give torchrun a smaller --nproc-per-node")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _meet(backend: str) -> None:
    """Join the process group; raises ConnectionError when not all ranks do."""
    # The first optimiser imports this; after the group is made, gloo would abort at the end.
    importlib.import_module("torch._dynamo")
    try:
        dist.init_process_group(backend, timeout=MEET)
    except RuntimeError as error:
        own, every, _, host, port = (os.environ[name] for name in NAMES)
        raise ConnectionError(
            f"rank {own} did not meet all {every} ranks at {host}:{port} within {MEET} ({error}): "
            "see what the others say, and start all of them again") from None
    dist.distributed_c10d._set_pg_timeout(WAIT)
    # The first message of nccl goes through this store.
    dist.distributed_c10d._get_default_store().set_timeout(WAIT)


@contextmanager
def one_first() -> Iterator[None]:
    """Inside, rank 0 of every machine goes alone, then the others: they find what it made."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        any_rank(0)
    yield
    if first:
        any_rank(0)


def any_rank(asked: int, device: torch.device | str = "cpu") -> int:
    """The largest `asked` of any rank, told to all; all wait here for the last."""
    if not together():
        return asked
    value = torch.tensor(int(asked), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def gathered(x: torch.Tensor) -> torch.Tensor:
    """x (b, ...) of all ranks, one after the other: (world * b, ...)."""
    if not together():
        return x
    out = x.new_empty(world() * len(x), *x.shape[1:])
    dist.all_gather_single(out, x.contiguous())
    return out


class Ranks:
    """train.Alone for the ranks of a process group: what they tell each other at every step."""

    @property
    def world(self) -> int:
        return world()

    @staticmethod
    def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
        """The smallest of the k * world largest among the values (m,) of all ranks."""
        best = largest(values, k * world())
        best = best.float() if best.dtype == torch.bfloat16 else best
        return largest(gathered(best), k * world()).min()

    @staticmethod
    def average(line: dict[str, float]) -> dict[str, float]:
        """Each value averaged over ranks."""
        if not together():
            return line
        values = torch.tensor(list(line.values()), dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(line, (values / world()).tolist()))

    @staticmethod
    @torch.no_grad()
    def share(sae: nn.Module, fired: torch.Tensor,
              loss: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Replace gradients by their mean over ranks, bit for bit the same on all.

        Returns `fired` (n,) of any rank, and the largest `loss` of any. Sparse gradients stay
        sparse; a rank without one counts as zeros. Parameters in `sae.sharded` are this rank's
        own: their gradients hold the whole batch, and `fired` is theirs.
        """
        loss = loss.detach().float()
        if not together():
            return fired, loss.item()
        own = getattr(sae, "sharded", ())
        common = [p for name, p in sae.named_parameters() if p.requires_grad and name not in own]
        for name in own:
            getattr(sae, name).grad /= world()
        kinds, loss, fired = _agreed(common, loss, fired, fired_is_own=bool(own))
        for p, kind in zip(common, kinds):
            if kind >= SPARSE:
                p.grad = _mean_rows(p, kind - SPARSE)
        dense = [p for p, kind in zip(common, kinds) if kind == DENSE]
        for bucket in in_groups(dense, torch.numel, BUCKET):
            _mean(bucket)
        return fired, loss


DENSE, SPARSE = 1, 2  # kinds of gradient: 0 is none, SPARSE + r a sparse one with r rows


def _agreed(parameters: list[nn.Parameter], loss: torch.Tensor, fired: torch.Tensor,
            fired_is_own: bool) -> tuple[list[int], float, torch.Tensor]:
    """Of any rank: the kinds of the gradients, the largest loss, what fired. One message."""
    kinds = []
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
            kinds.append(SPARSE + p.grad._nnz())
        else:
            kinds.append(0 if p.grad is None else DENSE)
    # Floats that are not below 0 have the order of their bits: the largest loss is found too.
    message = torch.cat([torch.tensor(kinds, dtype=torch.int32, device=fired.device),
                         loss.view(1).view(torch.int32), fired.int()])
    dist.all_reduce(message[:len(kinds) + 1] if fired_is_own else message, dist.ReduceOp.MAX)
    kinds, loss, fired = message.split([len(kinds), 1, len(fired)])
    return kinds.tolist(), loss.view(torch.float32).item(), fired.bool()


def in_groups(items: list, size: Callable[..., float], most: float) -> Iterator[list]:
    """Items in their order, as many together as `most` holds; a larger one goes alone."""
    group: list = []
    for item in items:
        if group and sum(map(size, [*group, item])) > most:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _mean(parameters: list[nn.Parameter]) -> None:
    """The mean of dense gradients over ranks, as one message."""
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    flat = torch.cat(parts) if len(parts) > 1 else parts[0]
    dist.all_reduce(flat)
    flat /= world()
    for p, part in zip(parameters, flat.split([len(part) for part in parts])):
        p.grad = part.view_as(p)


def _mean_rows(p: nn.Parameter, rows: int) -> torch.Tensor:
    """The sparse mean of sparse gradients of p (V, d) with at most `rows` rows on any rank."""
    index = torch.full((rows,), -1, device=p.device)
    values = torch.zeros(rows, *p.shape[1:], dtype=p.dtype, device=p.device)
    if p.grad is not None:
        index[:p.grad._nnz()] = p.grad.indices()[0]
        values[:p.grad._nnz()] = p.grad.values() / world()
    index, values = gathered(index), gathered(values)
    filled = index >= 0
    return torch.sparse_coo_tensor(index[filled].unsqueeze(0), values[filled], p.shape,
                                   check_invariants=False).coalesce()


def save(folder: Path, step: int, state: checkpoints.State, sharded: bool = False) -> None:
    """checkpoints.save for all ranks: rank 0 writes, or each in a folder of its own (`sharded`).

    All wait for the last one. No rank is ever two checkpoints ahead of another: of the two that
    each keeps, one is whole on all.
    """
    if sharded or main():
        checkpoints.save(_place(folder, sharded), step, state)
    any_rank(0)


def newest(folder: Path, sharded: bool = False) -> checkpoints.State | None:
    """The newest state that is whole on all ranks, or None; a rank's newer shards are deleted.

    Raises ValueError where it has another number of shards, or ranks find different things.
    """
    shards = {int(path.name.rpartition("-")[2]) for path in folder.glob("rank*-of-*")}
    if shards - {world() if sharded else 0}:
        there = " or ".join(map(str, sorted(shards)))
        raise ValueError(f"the checkpoints in {folder} are of an SAE in {there} shards: go on with "
                         "as many ranks, or choose another folder")
    place = _place(folder, sharded)
    step, state = checkpoints.last(place)
    while (low := -any_rank(-step)) != any_rank(step):
        if not sharded:
            raise ValueError(f"the ranks find different checkpoints in {folder}: it must be on a "
                             "disk that all share")
        step, state = checkpoints.last(place, low)
    if sharded:
        checkpoints.drop(place, step)
    return state


def _place(folder: Path, sharded: bool) -> Path:
    return folder / f"rank{rank()}-of-{world()}" if sharded else folder
