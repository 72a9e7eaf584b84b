"""Triton kernels for a top-k SAE's step: sums over k rows a position, without derivatives.

    sum_rows           sum_j values[b, j] W[index[b, j]]     (b, d)
    sampled_products   x[b] . W[index[b, j]]                 (b, k)
    transpose_product  C^T x for sparse codes C              (n, d)
    select_top         the k largest of W x + bias           (b, k) twice

Inputs are float32, bfloat16 or float16, sums are float32. They are taken in a fixed order, without
atomics and with fixed block sizes: the same call gives the same bits. Indices are not checked: one
outside 0 .. n - 1 reads foreign memory. Without Triton the module imports; `available` says so.
"""

import os

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in Python, on CPU tensors too
DTYPES, INDICES = (torch.float32, torch.bfloat16, torch.float16), (torch.int32, torch.int64)
ROWS = 8  # rows of W that a program reads at once
COLUMNS = 256  # and how many of their coordinates
CHUNK = 128  # entries of one feature that a program adds up; what is over goes to other programs

if triton is not None:

    @triton.jit
    def _sum_segments(rows, weights, W, first, last, out, partial, tail, d, TAIL: tl.constexpr,
                      E: tl.constexpr, D: tl.constexpr):
        """out[s] = sum of weights[e] W[rows[e]] from first[s] to last[s], and of the tail."""
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
            a = tl.load(x + b * d + column, mask=column < d, other=0).to(tl.float32)
            total += w * a[None, :]
        tl.store(out + b * k + j, tl.sum(total, 1), mask=j < k)


def available() -> bool:
    """Whether the kernels can run here: with Triton, and a CUDA device or TRITON_INTERPRET=1."""
    return triton is not None and (INTERPRETED or torch.cuda.is_available())


def takes(x: Tensor) -> bool:
    """Whether the kernels can run on this tensor."""
    return triton is not None and (x.is_cuda or INTERPRETED) and x.dtype in DTYPES


def _lent(*tensors: Tensor) -> list[Tensor]:
    """The tensors, contiguous. RuntimeError without Triton, ValueError for what it cannot read."""
    if triton is None:
        raise RuntimeError("these kernels need Triton, which is not installed: `pip install triton`"
                           " (on Linux), or use the functions of torch")
    for tensor in tensors:
        if not (tensor.is_cuda or INTERPRETED) or tensor.dtype not in (*DTYPES, *INDICES):
            raise ValueError(f"got {tensor.dtype} on {tensor.device}: the kernels read float32, "
                             "bfloat16, float16 and indices of int32 or int64, on a GPU")
    return [tensor.contiguous() for tensor in tensors]


def _width(d: int) -> int:
    """Columns a program works on: a power of two, no larger than a row asks for."""
    return min(COLUMNS, max(16, triton.next_power_of_2(d)))


def _sums(rows, weights, W, first, last, dtype, partial=None, tail=None) -> Tensor:
    """Launch `_sum_segments`: (len(first), d) of `dtype`."""
    d = W.shape[1]
    out = torch.empty(len(first), d, dtype=dtype, device=W.device)
    if out.numel():
        with torch.cuda.device_of(W):
            _sum_segments[len(first), triton.cdiv(d, _width(d))](
                rows, weights, W, first, last, out, partial, tail, d,
                TAIL=tail is not None, E=ROWS, D=_width(d))
    return out


@torch.no_grad()
def sum_rows(values: Tensor, index: Tensor, W: Tensor) -> Tensor:
    """sum_j values[b, j] W[index[b, j]] (b, d) in the wider dtype; values, index (b, k)."""
    values, index, W = _lent(values, index, W)
    b, k = index.shape
    edge = torch.arange(b + 1, device=W.device) * k
    return _sums(index, values, W, edge[:-1], edge[1:], torch.promote_types(values.dtype, W.dtype))


@torch.no_grad()
def sampled_products(x: Tensor, W: Tensor, index: Tensor) -> Tensor:
    """x[b] . W[index[b, j]] as (b, k) float32, from x (b, d), W (n, d), index (b, k)."""
    x, W, index = _lent(x, W, index)
    (b, k), d = index.shape, W.shape[1]
    out = torch.empty(b, k, dtype=torch.float32, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            _products[b, triton.cdiv(k, ROWS)](x, W, index, out, k, d, E=ROWS, D=_width(d))
    return out


@torch.no_grad()
def transpose_product(index: Tensor, values: Tensor, x: Tensor, n: int, order: Tensor) -> Tensor:
    """C^T x (n, d) in the wider dtype, for codes C (b, n) as values and index (b, k), and x (b, d).

    `order` (b * k,), `index.flatten().argsort(stable=True)`, sorts entries by feature: each row is
    a sum in a fixed order. A feature of more than CHUNK entries is cut up: chunks after its first
    are added up apart, and their sums then join the first's.
    """
    index, values, x = _lent(index, values, x)
    features = index.flatten().to(torch.int32)[order]
    rows, weights = order // max(1, index.shape[1]), values.flatten()[order]
    edge = torch.searchsorted(features, torch.arange(n + 1, dtype=torch.int32, device=x.device))
    first, last = edge[:-1], edge[1:]  # the entries of a feature
    tail = torch.zeros_like(edge)  # its further chunks: tail[i] .. tail[i + 1] - 1
    tail[1:] = ((last - first) // CHUNK).cumsum(0)
    chunk = torch.arange(len(order) // CHUNK, device=x.device)  # a bound: the GPU knows how many
    owner = torch.searchsorted(tail[1:], chunk, right=True).clamp_max(n - 1)
    start = first[owner] + CHUNK * (1 + chunk - tail[owner])  # past the end where there is no chunk
    end, first_end = torch.minimum(start + CHUNK, last[owner]), torch.minimum(first + CHUNK, last)
    partial = _sums(rows, weights, x, start, end, torch.float32)
    dtype = torch.promote_types(values.dtype, x.dtype)
    return _sums(rows, weights, x, first, first_end, dtype, partial, tail)


@torch.no_grad()
def select_top(x: Tensor, W: Tensor, bias: Tensor, k: int, precision: torch.dtype = torch.bfloat16,
               spare: int = 8, budget_bytes: int = 2**28) -> tuple[Tensor, Tensor]:
    """The k largest of W x + bias at every position: values (b, k) float32, index (b, k) int64.

    In no order, from x (b, d), W (n, d), bias (n,). The k + `spare` largest of a product in
    `precision` are candidates, found for as many positions at once as `budget_bytes` hold. Of their
    float32 values the k largest are kept: a feature is missed only where rounding puts more than
    `spare` others before it.
    """
    n, wide = len(W), min(len(W), k + spare)
    cast_W, cast_bias = W.to(precision).T, bias.to(precision)
    at_once = max(1, min(len(x), budget_bytes // (n * precision.itemsize)))
    pre = torch.empty(at_once, n, dtype=precision, device=x.device)
    index = torch.empty(len(x), wide, dtype=torch.int64, device=x.device)
    for part, chosen in zip(x.split(at_once), index.split(at_once)):
        torch.addmm(cast_bias, part.to(precision), cast_W, out=pre[:len(part)])
        rounded = pre.new_empty(len(part), wide)
        torch.topk(pre[:len(part)], wide, sorted=False, out=(rounded, chosen))
    values = sampled_products(x, W, index) + bias.float()[index]
    values, kept = values.topk(k, sorted=False)
    return values, index.gather(1, kept)
