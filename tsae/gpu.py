"""Triton kernels for the sums over k rows a position of a top-k SAE step, as plain functions of tensors (no autograd).

    sum_rows           sum_j values[b, j] W[index[b, j]]     (b, d)
    sampled_products   x[b] . W[index[b, j]]                 (b, k)
    transpose_product  C^T x for sparse codes C              (n, d)
    select_top         the k largest of W x + bias           (b, k) twice

Inputs are float32, bfloat16 or float16; sums are kept in float32 and taken in a fixed order, without atomics: the same
call gives the same bits. Block sizes are fixed, not tuned at run time, which would change that order. Indices are not
checked: one outside 0 .. n - 1 reads foreign memory. Without Triton the module still imports; `available` says so.
"""

import os
from collections.abc import Callable

import torch

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in Python, on CPU tensors too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 8  # rows of W that a program reads at once
COLUMNS = 256  # and how many of their coordinates
CHUNK = 128  # entries of one feature that a program adds up; what is over goes to other programs

if triton is not None:

    @triton.jit
    def _sum_segments(rows, weights, W, first, last, out, partial, tail, d, TAIL: tl.constexpr, E: tl.constexpr,
                      D: tl.constexpr):
        """out[s] = sum of weights[e] W[rows[e]] over e in [first[s], last[s]) and partial in [tail[s], tail[s+1])."""
        s = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * D + tl.arange(0, D)
        inside = column < d
        total = tl.zeros([E, D], tl.float32)
        lo, hi = tl.load(first + s), tl.load(last + s)
        for start in range(lo, hi, E):
            e = start + tl.arange(0, E)
            row = tl.load(rows + e, mask=e < hi, other=0).to(tl.int64)
            weight = tl.load(weights + e, mask=e < hi, other=0).to(tl.float32)
            mask = (e < hi)[:, None] & inside[None, :]
            w = tl.load(W + row[:, None] * d + column[None, :], mask=mask, other=0).to(tl.float32)
            total += weight[:, None] * w
        if TAIL:
            lo, hi = tl.load(tail + s), tl.load(tail + s + 1)
            for start in range(lo, hi, E):
                e = start + tl.arange(0, E)
                mask = (e < hi)[:, None] & inside[None, :]
                total += tl.load(partial + e[:, None] * d + column[None, :], mask=mask, other=0)
        tl.store(out + s * d + column, tl.sum(total, 0), mask=inside)

    @triton.jit
    def _products(x, W, index, out, k, d, E: tl.constexpr, D: tl.constexpr):
        """out[b, j] = x[b] . W[index[b, j]] for E of the j."""
        b = tl.program_id(0).to(tl.int64)
        j = tl.program_id(1) * E + tl.arange(0, E)
        row = tl.load(index + b * k + j, mask=j < k, other=0).to(tl.int64)
        total = tl.zeros([E, D], tl.float32)
        for start in range(0, d, D):
            column = start + tl.arange(0, D)
            mask = (j < k)[:, None] & (column < d)[None, :]
            w = tl.load(W + row[:, None] * d + column[None, :], mask=mask, other=0).to(tl.float32)
            total += w * tl.load(x + b * d + column, mask=column < d, other=0).to(tl.float32)[None, :]
        tl.store(out + b * k + j, tl.sum(total, 1), mask=j < k)


def available() -> bool:
    """Whether the kernels can run here: Triton is installed, and there is a CUDA device or TRITON_INTERPRET=1."""
    return triton is not None and (INTERPRETED or torch.cuda.is_available())


def takes(x: torch.Tensor) -> bool:
    """Whether the kernels can run on this tensor: its device and its dtype."""
    return triton is not None and (x.is_cuda or INTERPRETED) and x.dtype in DTYPES


def _lent(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, contiguous. Raises RuntimeError without Triton, ValueError for a tensor it cannot read."""
    if triton is None:
        raise RuntimeError("these kernels need Triton, which is not installed: `pip install triton` (on Linux), or "
                           "use the functions of torch")
    for tensor in tensors:
        if not (tensor.is_cuda or INTERPRETED) or tensor.dtype not in (*DTYPES, torch.int32, torch.int64):
            raise ValueError(f"got {tensor.dtype} on {tensor.device}: the kernels read float32, bfloat16, float16 and "
                             "indices of int32 or int64, on a GPU")
    return [tensor.contiguous() for tensor in tensors]


def _width(d: int) -> int:
    """Columns a program works on: a power of two, no larger than a row asks for."""
    return min(COLUMNS, max(16, triton.next_power_of_2(d)))


def _sums(rows, weights, W, first, last, dtype, partial=None, tail=None) -> torch.Tensor:
    """Launch `_sum_segments`: (len(first), d) of `dtype`."""
    d = W.shape[1]
    out = torch.empty(len(first), d, dtype=dtype, device=W.device)
    if out.numel():
        with torch.cuda.device_of(W):
            _sum_segments[len(first), triton.cdiv(d, _width(d))](
                rows, weights, W, first, last, out, partial, tail, d, TAIL=tail is not None, E=ROWS, D=_width(d))
    return out


@torch.no_grad()
def sum_rows(values: torch.Tensor, index: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """sum_j values[b, j] W[index[b, j]] as (b, d), from values and index (b, k), W (n, d); in the wider dtype."""
    values, index, W = _lent(values, index, W)
    b, k = index.shape
    edge = torch.arange(b + 1, device=W.device) * k
    return _sums(index, values, W, edge[:-1], edge[1:], torch.promote_types(values.dtype, W.dtype))


@torch.no_grad()
def sampled_products(x: torch.Tensor, W: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[b] . W[index[b, j]] as (b, k) float32, from x (b, d), W (n, d), index (b, k)."""
    x, W, index = _lent(x, W, index)
    (b, k), d = index.shape, W.shape[1]
    out = torch.empty(b, k, dtype=torch.float32, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            _products[b, triton.cdiv(k, ROWS)](x, W, index, out, k, d, E=ROWS, D=_width(d))
    return out


@torch.no_grad()
def transpose_product(index: torch.Tensor, values: torch.Tensor, x: torch.Tensor, n: int,
                      order: torch.Tensor | None = None) -> torch.Tensor:
    """C^T x (n, d) for sparse codes C (b, n) given as index and values, both (b, k), and x (b, d); in the wider dtype.

    Entries are sorted by feature, stably, so that every row of the result is a sum in a fixed order. A feature of more
    than CHUNK entries is cut up: chunks after its first are added up apart, and their sums then join the first's.
    `order` (b * k,) is that sort, `index.flatten().argsort(stable=True)`, for a caller who has it already.
    """
    index, values, x = _lent(index, values, x)
    features = index.flatten().to(torch.int32)
    features, order = features.sort(stable=True) if order is None else (features[order], order)
    rows, weights = order // max(1, index.shape[1]), values.flatten()[order]
    edge = torch.searchsorted(features, torch.arange(n + 1, dtype=torch.int32, device=x.device))
    first, last = edge[:-1], edge[1:]  # the entries of a feature
    tail = torch.zeros_like(edge)  # its further chunks are tail[i] .. tail[i + 1] - 1
    tail[1:] = ((last - first) // CHUNK).cumsum(0)  # the last of them empty when CHUNK divides the number
    chunk = torch.arange(len(order) // CHUNK, device=x.device)  # a bound: how many there are, only the GPU knows
    owner = torch.searchsorted(tail[1:], chunk, right=True).clamp_max(n - 1)
    start = first[owner] + CHUNK * (1 + chunk - tail[owner])  # past its owner's end for a chunk that does not exist
    partial = _sums(rows, weights, x, start, torch.minimum(start + CHUNK, last[owner]), torch.float32)
    dtype = torch.promote_types(values.dtype, x.dtype)
    return _sums(rows, weights, x, first, torch.minimum(first + CHUNK, last), dtype, partial, tail)


@torch.no_grad()
def select_top(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor, k: int, precision: torch.dtype = torch.bfloat16,
               spare: int = 8, budget_bytes: int = 2**28, products: Callable = sampled_products,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of W x + bias at every position: values (b, k) float32 and index (b, k) int64, in no order.

    Takes x (b, d), W (n, d), bias (n,). Candidates are the k + `spare` largest of a product in `precision`, made for as
    many positions at once as `budget_bytes` hold; `products` computes theirs in float32, and of those the k largest are
    kept. A feature is missed only where rounding puts more than `spare` others before it.
    """
    n, wide = len(W), min(len(W), k + spare)
    cast_W, cast_bias = W.to(precision).T, bias.to(precision)
    held = max(1, min(len(x), budget_bytes // (n * precision.itemsize)))
    pre = torch.empty(held, n, dtype=precision, device=x.device)
    index = torch.empty(len(x), wide, dtype=torch.int64, device=x.device)
    for part, chosen in zip(x.split(held), index.split(held)):
        torch.addmm(cast_bias, part.to(precision), cast_W, out=pre[:len(part)])
        torch.topk(pre[:len(part)], wide, sorted=False, out=(pre.new_empty(len(part), wide), chosen))
    values = products(x, W, index) + bias.float()[index]
    values, kept = values.topk(k, sorted=False)
    return values, index.gather(1, kept)
