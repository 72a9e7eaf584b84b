"""The products of a step that touch the rows of active features only, and their derivatives: all but the encoder's, while
few features are active.

    select_top    the k largest of W (x - centre) + bias at every position, and which they are
    select_above  those that reach a bound, while these are few; else all of them
    sum_rows      sum_j values[b, j] W[index[b, j]]: the decoder

On a GPU with Triton they run the kernels of `tsae.gpu`, elsewhere the library calls below, chosen by measurement. Gathers run
in the order of the features, so that each row of W is read once and every sum has one fixed order: results are the same
bits in every run on one machine.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial

import numpy as np
import torch
from torch.nn.functional import embedding_bag, pad, relu

from tsae import gpu

CHUNK = 4 << 20  # pre-activations held at once on a CPU: they stay in its caches between the product and the selection
_quick = False
FEW = 1 / 24  # share of active features up to which products over pairs beat dense ones (measured: between 1/40 and 1/16)
Bound = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def quick_products(on: bool) -> Iterator[None]:
    """Inside, the products of this module take bfloat16 (CPU) or tf32 (GPU) inputs.

    Top-k is then chosen from bfloat16 pre-activations; the chosen values are computed in float32.
    """
    global _quick
    before, was = torch.backends.cuda.matmul.fp32_precision, _quick
    try:
        if on:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        _quick = on
        yield
    finally:
        _quick = was
        torch.backends.cuda.matmul.fp32_precision = before


class Support:
    """Which of n features are active where: pairs of a position and a feature, also in the order of their features.

    index (b, k), k features at every position; or (m,) with `rows` (m,), ascending: the position of each, of b.
    """

    def __init__(self, index: torch.Tensor, n: int, rows: torch.Tensor | None = None, b: int = 0):
        self.index, self.n, self.rows, self.b = index, n, rows, b or len(index)

    @cached_property
    def order(self) -> torch.Tensor:
        """(m,) where the pair that comes next stands in index.flatten()."""
        features = self.index.flatten()
        if self.n <= 2**16 and not features.is_cuda:  # numpy sorts 16 bits by radix
            return torch.from_numpy(np.argsort(features.numpy().astype(np.uint16), kind="stable"))
        return features.sort(stable=True).indices

    @cached_property
    def feature(self) -> torch.Tensor:
        return self.index.flatten()[self.order]

    @cached_property
    def position(self) -> torch.Tensor:
        return self.order // self.index.shape[1] if self.rows is None else self.rows[self.order]

    @cached_property
    def starts(self) -> torch.Tensor:
        """(n + 1,) where the pairs of each feature start."""
        if self.index.is_cuda:  # there bincount would wait for the GPU
            return torch.searchsorted(self.feature, torch.arange(self.n + 1, device=self.index.device))
        return _starts(self.index.flatten(), self.n)

    @cached_property
    def row_starts(self) -> torch.Tensor:
        """(b + 1,) where the pairs of each position start in `index` (m,)."""
        return _starts(self.rows, self.b)


def _starts(groups: torch.Tensor, n: int) -> torch.Tensor:
    ends = torch.bincount(groups, minlength=n).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def transpose_product(support: Support | None, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """C^T x (n, d) for the codes C (b, n) that have `values` on their support, or are `values`, and x (b, d)."""
    if support is None:
        return product(values.T, x)
    if support.rows is None and gpu.takes(x):
        return gpu.transpose_product(support.index, values, x, support.n, support.order)
    return embedding_bag(support.position, x, support.starts, mode="sum", include_last_offset=True,
                         per_sample_weights=values.flatten()[support.order])


def sampled_products(support: Support | None, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """x[b] . W[index[b, j]] as (b, k) or (m,), from x (b, d) and W (n, d); all of them (b, n) without a support."""
    if support is None:
        return product(x, W.T)
    if support.rows is None and gpu.takes(x):
        return gpu.sampled_products(x, W, support.index)
    # A bag per feature whose members are the rows of x: the gradient of the bags' weights is what is wanted.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        W, x, support.position, support.starts[:-1], support.feature, 0)
    return torch.empty_like(products).index_copy_(0, support.order, products).view(support.index.shape)


def top(v: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (b, k) of the k largest entries of each row of v (b, m), in no order.

    The k largest lie in the k columns with the largest maxima when a row is cut into columns: selecting these first
    spares most of the work. Raises ValueError where there are fewer than k.
    """
    m = v.shape[1]
    if k > m:
        raise ValueError(f"the {k} largest of {m} entries were asked for: choose a smaller k")
    groups = 1 << int(math.log2(m / k)) // 2 if m > 16 * k else 1
    if groups == 1 or m % groups:
        return _head(v, k)
    cut = v.view(len(v), groups, m // groups)
    columns = _head(cut.amax(1), k)
    inside = _head(cut.gather(2, columns.unsqueeze(1).expand(-1, groups, -1)).view(len(v), -1), k)
    return inside // k * (m // groups) + columns.gather(1, inside % k)


def _head(v: torch.Tensor, k: int) -> torch.Tensor:
    m = v.shape[1]
    if v.is_cuda or v.dtype not in (torch.int16, torch.float32) or v.dtype == torch.int16 and m > 2**16:
        return v.topk(k, dim=-1, sorted=False).indices
    # Value and place in one number: numpy partitions these many times as fast as torch selects, and no two are equal.
    if v.dtype == torch.int16:
        keys = (v.int() << 16) | torch.arange(m, dtype=torch.int32)
    else:
        bits = v.view(torch.int32)
        keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | torch.arange(m)  # as numbers, in the order of the floats
    keys = keys.numpy()
    keys.partition(m - k, axis=1)
    return torch.from_numpy(keys[:, m - k:] & (0xFFFF if v.dtype == torch.int16 else 0xFFFFFFFF)).long()


def largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of `values` (m,) in no order, filled up with zeros where there are fewer.

    On a CPU, bfloat16 values below 0 are in no order either.
    """
    rest = len(values) - k
    if rest < 0:
        return pad(values, (0, -rest))
    if values.is_cuda:
        return values.topk(k, sorted=False).values
    keys = (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy().copy()
    keys.partition(rest)
    return torch.from_numpy(keys[rest:]).view(values.dtype)


def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest of `values` (m,), as a scalar; 0 where there are fewer."""
    return largest(values, k).min()


def kth_of_rows(v: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest entry (b, 1) of each row of v (b, m) float32: where only a bound is wanted, numpy partitions seven
    times as fast as torch selects."""
    if v.is_cuda:
        return v.topk(k, sorted=False).values.amin(1, keepdim=True)
    at = v.shape[1] - k
    return torch.from_numpy(np.partition(v.numpy(), at, axis=1)[:, at:at + 1].copy())


def _top(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor, k: int) -> tuple[Support, torch.Tensor | None]:
    """The k largest W x + bias at every position, and their values where they are exact (not `quick_products`)."""
    if gpu.takes(x):
        values, index = gpu.select_top(x, W, bias, k, torch.bfloat16 if _quick else torch.float32)
        return Support(index, len(W)), values
    rows = max(64, 1 << (CHUNK // len(W)).bit_length() - 1)
    product = _bfloat16_product(W, bias, rows) if _quick else partial(_affine, W, bias)
    chosen = []
    for part in x.split(rows):
        pre = product(part)
        # As 16-bit integers, bfloat16 values above zero keep their order and those below stay below: all that ReLU needs.
        index = top(pre.view(torch.int16) if _quick else pre, k)
        chosen.append((index, None if _quick else pre.gather(1, index)))
    support = Support(torch.cat([index for index, _ in chosen]), len(W))
    return support, None if _quick else torch.cat([values for _, values in chosen])


def _onednn(x: torch.Tensor) -> bool:
    """Whether float32 products go to oneDNN: on processors of AMD it is twice as fast as MKL, which torch prefers."""
    return not x.is_cuda and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _affine(W: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """W x + bias (b, n)."""
    if _onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return torch.addmm(bias, x, W.T)


@cache
def _has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _bfloat16_product(W: torch.Tensor, bias: torch.Tensor, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """x (rows, d) -> W x + bias (rows, n) in bfloat16, with W brought once into the layout that oneDNN multiplies fastest."""
    W, bias = W.bfloat16(), bias.bfloat16()
    if W.is_cuda or not _has_bfloat16():
        return lambda x: torch.addmm(bias, x.bfloat16(), W.T)
    packed = torch.ops.mkldnn._reorder_linear_weight(W, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, bias, "none", [], "")


def _above(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor, bound: Bound | None,
           few: float) -> tuple[Support | None, torch.Tensor | None]:
    """The pairs whose W x + bias reach `bound`, and their values where they are exact (not `quick_products`).

    No support, and all of W x + bias, where these are more than a share `few` of all, on a GPU and without a bound.
    """
    if x.is_cuda or bound is None or len(x) == 0:
        return None, sampled_products(None, x, W).add_(bias)
    pre = _bfloat16_product(W, bias, len(x))(x) if _quick else _affine(W, bias, x)
    least = bound(pre.flatten()) if callable(bound) else bound
    if _quick:  # a step of bfloat16 lower, for what was rounded down
        bits = least.bfloat16().view(torch.int16).clamp_min(0)
        reach = pre.view(torch.int16).numpy() > (bits - 2).clamp_min(0).numpy()
    else:
        reach = (pre <= 0).logical_or_(pre < least).logical_not_().numpy()  # NaN reaches any bound: it must show
    if np.count_nonzero(reach) > few * pre.numel():
        return None, pre.float() if _quick else pre
    pairs = torch.from_numpy(np.flatnonzero(reach))  # several times as fast as torch.nonzero
    return Support(pairs % len(W), len(W), pairs // len(W), len(x)), None if _quick else pre.flatten()[pairs]


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, centre, W, bias, choose):
        inside = x - centre
        support, values = choose(inside, W, bias)
        values = sampled_products(support, inside, W) + bias[support.index] if values is None else values
        ctx.save_for_backward(inside, W)
        ctx.support = support
        return values, support

    @staticmethod
    def backward(ctx, g, _):
        (inside, W), support = ctx.saved_tensors, ctx.support
        g_bias = total(g, support)
        g_x = sum_rows(g, support, W) if ctx.needs_input_grad[0] else None
        g_centre = -combined(g_bias, W) if ctx.needs_input_grad[1] else None
        return g_x, g_centre, transpose_product(support, g, inside), g_bias, None


def combined(weights: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """sum_i weights[i] W[i] (d,): on a CPU this way reads W more than twice as fast as a product with a vector does."""
    if W.is_cuda:
        return weights @ W
    every = torch.arange(len(W)).unsqueeze(0)
    return embedding_bag(every, W, per_sample_weights=weights.unsqueeze(0), mode="sum").squeeze(0)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, support):
        ctx.support = support
        ordered = values.flatten()[support.order]
        return torch.segment_reduce(ordered, "sum", offsets=support.starts, initial=0.0)

    @staticmethod
    def backward(ctx, g):
        return g[ctx.support.index], None


def total(values: torch.Tensor, support: Support | None) -> torch.Tensor:
    """(n,) the sum of each feature's values: those of the pairs of `support`, or (b, n) without one."""
    return values.sum(0) if support is None else _Total.apply(values, support)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, support, W):
        ctx.save_for_backward(values, W)
        ctx.support = support
        if support is None:
            return product(values, W)
        if support.rows is None and gpu.takes(W):
            return gpu.sum_rows(values, support.index, W)
        if support.rows is None:
            return embedding_bag(support.index, W, per_sample_weights=values, mode="sum")
        return embedding_bag(support.index, W, support.row_starts, per_sample_weights=values, mode="sum",
                             include_last_offset=True)

    @staticmethod
    def backward(ctx, g):
        values, W = ctx.saved_tensors
        return sampled_products(ctx.support, g, W), None, (
            transpose_product(ctx.support, values, g) if ctx.needs_input_grad[2] else None)


def select_top(x: torch.Tensor, centre: torch.Tensor, W: torch.Tensor, bias: torch.Tensor,
               k: int) -> tuple[torch.Tensor, Support]:
    """The k largest of W (x - centre) + bias at each position through a ReLU: values (b, k) and their Support.

    x (b, d), centre (d,), W (n, d), bias (n,), all float32.
    """
    values, support = _Select.apply(x, centre, W, bias, partial(_top, k=k))
    return relu(values), support


def select_above(x: torch.Tensor, centre: torch.Tensor, W: torch.Tensor, bias: torch.Tensor, bound: Bound | None,
                 few: float | None = None) -> tuple[torch.Tensor, Support | None]:
    """Every positive W (x - centre) + bias that reaches a bound: values (m,) and their Support.

    bound: (n,) or a scalar, none below 0, or a function that gives a scalar for all pre-activations (b * n,). Inside
    `quick_products` these are rounded to bfloat16: values up to a rounding below the bound, or below 0, are in the answer.
    Where more than a share `few` (FEW) reach it, without a bound (None), and on a GPU: all values (b, n), and None.
    """
    return _Select.apply(x, centre, W, bias, partial(_above, bound=bound, few=FEW if few is None else few))


def preactivations(x: torch.Tensor, centre: torch.Tensor, W: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """W (x - centre) + bias (b, n) at every position; the gradient of `centre` costs no product over the batch."""
    return select_above(x, centre, W, bias, None)[0]


def sum_rows(values: torch.Tensor, support: Support | None, W: torch.Tensor) -> torch.Tensor:
    """sum_j values[b, j] W[index[b, j]] (b, d), over the pairs of each position b; values (b, n) W without a support."""
    return _SumRows.apply(values, support, W)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, float32 in and out; inside `quick_products` on a CPU from inputs rounded to bfloat16."""
    if _quick and not a.is_cuda and _has_bfloat16():  # oneDNN's own conversion of float32 takes twice as long
        return (a.bfloat16() @ b.bfloat16()).float()
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "") if _onednn(a) and a.shape[1] else a @ b
