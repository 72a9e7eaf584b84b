"""Training over several processes with torch.distributed: what the ranks tell each other, and when they wait.

Every rank has its share of each batch, and `share` replaces gradients by their mean over ranks. Without a process group
all of this is one rank, and nothing is exchanged.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tsae.kernels import largest
from tsae.scale import checkpoints

BUCKET = 16 << 20  # gradients sent at once, in entries: few messages, and no second copy of all of them
MEET = timedelta(minutes=5)  # that all ranks are started within so long is taken for granted
WAIT = timedelta(hours=24)  # rank 0 may work on a store of activations for so long; that a rank died is noticed at once


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
    """Inside, this process is a rank of the group that torchrun's environment describes, if it does; yields the device.

    Raises ValueError where that environment has gaps or the machine has fewer GPUs than ranks, ConnectionError when not
    all ranks meet, or another one has ended.
    """
    cuda = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    device = "cuda" if device == "auto" and cuda else "cpu" if device == "auto" else device
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        yield device
        return
    if missing:
        raise ValueError(f"the environment names a rank but not {', '.join(missing)}: start the command with torchrun")
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        if local >= torch.cuda.device_count():
            raise ValueError(f"rank {os.environ['RANK']} is number {local} on a machine with "
                             f"{torch.cuda.device_count()} GPUs: give torchrun a smaller --nproc-per-node")
        torch.cuda.set_device(local)
    # The first optimiser imports this; if a group exists by then, it is held to the end, where gloo's threads abort.
    importlib.import_module("torch._dynamo")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=MEET)
    except RuntimeError as error:
        raise ConnectionError(f"rank {os.environ['RANK']} did not meet all {os.environ['WORLD_SIZE']} ranks at "
                              f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {MEET} ({error}): see what "
                              "the others say, and start all of them again") from None
    dist.distributed_c10d._set_pg_timeout(WAIT)
    dist.distributed_c10d._get_default_store().set_timeout(WAIT)  # nccl's ranks meet there at their first message
    failed = True
    try:
        yield f"cuda:{local}" if cuda else device
        failed = False
    except RuntimeError as error:
        if "peer" not in str(error):
            raise
        raise ConnectionError(f"rank {rank()} lost the connection to another one, whose message says why") from None
    finally:
        if not (cuda and failed):  # nccl might wait for the others for ever; torchrun ends this process
            dist.destroy_process_group()


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
    """The largest `asked` of any rank, on every rank: true on all when it is on one. All wait here for the last."""
    if not together():
        return asked
    value = torch.tensor(int(asked), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


class Ranks:
    """train.Alone for the ranks of a process group: what they tell each other at every step."""

    @property
    def world(self) -> int:
        return world()

    @staticmethod
    def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
        return kth_largest(values, k)

    @staticmethod
    def share(sae: nn.Module, fired: torch.Tensor, loss: torch.Tensor) -> tuple[torch.Tensor, float]:
        return share(sae, fired, loss)

    @staticmethod
    def average(line: dict[str, float]) -> dict[str, float]:
        return average(line)


def average(line: dict[str, float]) -> dict[str, float]:
    """Each value averaged over ranks."""
    if not together():
        return line
    values = torch.tensor(list(line.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(line, (values / world()).tolist()))


def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The smallest of the k * world largest among the values (m,) of all ranks: kernels.kth_largest for shares."""
    best = largest(values, k * world())
    return largest(gathered(best.float() if best.dtype == torch.bfloat16 else best), k * world()).min()


def gathered(x: torch.Tensor) -> torch.Tensor:
    """x (b, ...) of all ranks, one after the other: (world * b, ...)."""
    if not together():
        return x
    out = x.new_empty(world() * len(x), *x.shape[1:])
    dist.all_gather_single(out, x.contiguous())
    return out


@torch.no_grad()
def share(module: nn.Module, fired: torch.Tensor, loss: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Replace gradients by their mean over ranks, bit for bit the same on all; returns `fired` (n,) bool of any rank, and the
    largest `loss` of any, in float32.

    A sparse gradient stays sparse. A rank without a gradient counts as zeros. Parameters in `module.sharded` are this
    rank's own: so are their gradients, which have the whole batch in them, and `fired`.
    """
    loss = loss.detach().float()
    if not together():
        return fired, loss.item()
    own = getattr(module, "sharded", ())
    common = []
    for name, p in module.named_parameters():
        if p.requires_grad and name not in own:
            common.append(p)
        elif p.grad is not None:
            p.grad /= world()
    for p in common:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
    # What the gradients are on any rank, in the same message as `fired`: 0 none, 1 dense, 2 + rows sparse. The bits of floats
    # that are not below 0 have their order.
    kinds = [0 if p.grad is None else 2 + p.grad._nnz() if p.grad.is_sparse else 1 for p in common]
    told = torch.cat([torch.tensor(kinds, dtype=torch.int32, device=fired.device), loss.view(1).view(torch.int32),
                      fired.int()])
    dist.all_reduce(told[:len(kinds) + 1] if own else told, dist.ReduceOp.MAX)
    bucket, size = [], 0
    for p, kind in zip(common, told[:len(kinds)].tolist()):
        if kind >= 2:
            p.grad = _mean_rows(p, kind - 2)
        elif kind:
            if bucket and size + p.numel() > BUCKET:
                _mean(bucket)
                bucket, size = [], 0
            bucket, size = [*bucket, p], size + p.numel()
    if bucket:
        _mean(bucket)
    return told[len(kinds) + 1:].bool(), told[len(kinds)].view(torch.float32).item()


def _mean(parameters: list[nn.Parameter]) -> None:
    """Dense gradients, as one message."""
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    flat = torch.cat(parts) if len(parts) > 1 else parts[0]
    dist.all_reduce(flat)
    flat /= world()
    for p, part in zip(parameters, flat.split([len(part) for part in parts])):
        p.grad = part.view_as(p)


def _mean_rows(p: nn.Parameter, rows: int) -> torch.Tensor:
    """The sparse mean of sparse gradients of p (V, d) that have at most `rows` rows on any rank."""
    index = torch.full((rows,), -1, device=p.device)
    values = torch.zeros(rows, *p.shape[1:], dtype=p.dtype, device=p.device)
    if p.grad is not None:
        index[:p.grad._nnz()], values[:p.grad._nnz()] = p.grad.indices()[0], p.grad.values() / world()
    index, values = gathered(index), gathered(values)
    return torch.sparse_coo_tensor(index[index >= 0].unsqueeze(0), values[index >= 0], p.shape,
                                   check_invariants=False).coalesce()


def save(folder: Path, step: int, state: checkpoints.State, sharded: bool = False) -> None:
    """checkpoints.save for all ranks: rank 0 writes, or where the state is `sharded` each rank in a folder of its own.

    All wait for the last one to be done, so that no rank is ever two checkpoints ahead of another: of the two that each
    keeps, one is whole on all.
    """
    if sharded or main():
        checkpoints.save(_place(folder, sharded), step, state)
    any_rank(0)


def newest(folder: Path, sharded: bool = False) -> checkpoints.State | None:
    """The newest state that is whole on all ranks, or None; a rank's newer shards are deleted.

    Raises ValueError where the folder is of another number of shards, or the ranks do not find the same in it.
    """
    shards = {int(path.name.rpartition("-")[2]) for path in folder.glob("rank*-of-*")}
    if shards - {world() if sharded else 0}:
        raise ValueError(f"the checkpoints in {folder} are of an SAE in {' or '.join(map(str, sorted(shards)))} shards: "
                         "go on with as many ranks, or choose another folder")
    place = _place(folder, sharded)
    step, state = checkpoints.last(place)
    while (low := -any_rank(-step)) != any_rank(step):
        if not sharded:
            raise ValueError(f"the ranks find different checkpoints in {folder}: it must be on a disk that all share")
        step, state = checkpoints.last(place, low)
    if sharded:
        checkpoints.drop(place, step)
    return state


def _place(folder: Path, sharded: bool) -> Path:
    return folder / f"rank{rank()}-of-{world()}" if sharded else folder
