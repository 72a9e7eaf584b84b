"""The products of an SAE's step that read the rows of active features only, and their derivatives.

    select_top    the k largest of W (x - centre) + bias at every position, and which they are
    select_above  those that reach a bound, where these are few; else all of them
    sum_rows      sum_j values[b, j] W[index[b, j]]: the decoder
    JumpReLU, Gated  the activations whose derivatives are written by hand

Only the encoder's product is dense. GPUs run the Triton kernels of `tsae.gpu`, CPUs library calls,
chosen by measurement. Gathers run in the order of the features: each row of W is read once, and
every sum has a fixed order, so that a machine gives the same bits in every run.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad, relu

from tsae import gpu

AT_ONCE = 4 << 20  # pre-activations that a CPU computes between selections: they stay in its caches
FEW = 1 / 24  # share of active features up to which pairs beat dense products (measured)
_quick = False  # see quick_products
Bound = Tensor | Callable[[Tensor], Tensor]


@contextmanager
def quick_products(on: bool) -> Iterator[None]:
    """Inside, the products of this module take bfloat16 (CPU) or tf32 (GPU) inputs.

    Top-k is then chosen from bfloat16 pre-activations; the chosen values are computed in float32.
    """
    global _quick
    matmul = torch.backends.cuda.matmul
    before = _quick, matmul.fp32_precision
    try:
        _quick, matmul.fp32_precision = on, "tf32" if on else matmul.fp32_precision
        yield
    finally:
        _quick, matmul.fp32_precision = before


class Support:
    """Which features are active where: pairs of a position and one of n features.

    Either `index` (b, k) has the k features of every position. Or `index` (m,) has the feature and
    `positions` (m,), ascending, the position of each pair, out of b positions.
    """

    def __init__(self, index: Tensor, n: int, positions: Tensor | None = None, b: int = 0):
        self.index, self.n, self.positions, self.b = index, n, positions, b or len(index)

    @cached_property
    def order(self) -> Tensor:
        """(m,) the pairs by feature, then by position, as places in index.flatten()."""
        features = self.index.flatten()
        if self.n <= 2**16 and not features.is_cuda:  # numpy sorts 16 bits by radix
            return torch.from_numpy(np.argsort(features.numpy().astype(np.uint16), kind="stable"))
        return features.sort(stable=True).indices

    @cached_property
    def ordered_features(self) -> Tensor:
        return self.index.flatten()[self.order]

    @cached_property
    def ordered_positions(self) -> Tensor:
        if self.positions is None:
            return self.order // self.index.shape[1]
        return self.positions[self.order]

    @cached_property
    def feature_starts(self) -> Tensor:
        """(n + 1,) where the pairs of each feature start in `order`."""
        if self.index.is_cuda:  # there bincount would wait for the GPU
            edges = torch.arange(self.n + 1, device=self.index.device)
            return torch.searchsorted(self.ordered_features, edges)
        return _starts(self.index.flatten(), self.n)

    @cached_property
    def position_starts(self) -> Tensor:
        """(b + 1,) where the pairs of each position start in `index` (m,)."""
        return _starts(self.positions, self.b)


def _starts(groups: Tensor, n: int) -> Tensor:
    ends = torch.bincount(groups, minlength=n).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


# Selection by partition. numpy moves the k largest numbers of a row to its end many times as fast
# as torch selects them, but loses their places. *Place keys* keep them: integers with a value in
# the upper half of their bits and its place in the lower. As integers the bits of floats above 0
# have their order; below 0 all bits but the sign are flipped. Keys differ: later places win ties.

def _partitioned(numbers: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row (..., m), in no order. Reorders the rows it is given."""
    start = numbers.shape[-1] - k
    numbers.partition(start, axis=-1)
    return numbers[..., start:]


def _sortable(v: Tensor) -> Tensor:
    """bfloat16 as int16, for numpy: in order above 0, the rest stays below. ReLU needs no more."""
    return v.view(torch.int16) if v.dtype == torch.bfloat16 else v


def largest(values: Tensor, k: int) -> Tensor:
    """The k largest (..., k) of each row of `values` (..., m), in no order.

    Zeros fill up rows with fewer than k. bfloat16 on a CPU: those below 0 are in no order either.
    """
    if values.shape[-1] < k:
        return pad(values, (0, k - values.shape[-1]))
    if values.is_cuda:
        return values.topk(k, sorted=False).values
    return torch.from_numpy(_partitioned(_sortable(values).numpy().copy(), k)).view(values.dtype)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest (...,) of each row of `values` (..., m), where zeros fill up as above.

    NaN among the k largest of values (m,) gives NaN; in rows it only counts as large (faster).
    """
    if values.ndim == 1 or values.is_cuda or values.shape[-1] < k:
        return largest(values, k).amin(-1)
    first = _partitioned(_sortable(values).numpy().copy(), k)[..., 0]
    return torch.from_numpy(first.copy()).view(values.dtype)


def top(v: Tensor, k: int) -> Tensor:
    """Indices (b, k) of the k largest entries of each row of v (b, m), in no order.

    Cut a row into equal groups, one below the other: its k largest lie in the k columns with the
    largest maxima. Selecting these first spares most of the work. Raises ValueError where m < k.
    """
    m = v.shape[1]
    if k > m:
        raise ValueError(f"the {k} largest of {m} entries were asked for: choose a smaller k")
    groups = 2 ** (int(math.log2(m / k)) // 2) if m > 16 * k else 1  # about the root of m / k
    if groups == 1 or m % groups:
        return _places(v, k)
    cut = v.view(len(v), groups, m // groups)
    columns = _places(cut.amax(1), k)  # (b, k)
    left = cut.gather(2, columns.unsqueeze(1).expand(-1, groups, -1))  # (b, groups, k)
    chosen = _places(left.view(len(v), -1), k)
    return chosen // k * (m // groups) + columns.gather(1, chosen % k)


def _places(v: Tensor, k: int) -> Tensor:
    """`top` without the cut: by place keys, where value and place fit into 32 or 64 bits."""
    half, m = 8 * v.itemsize, v.shape[1]
    fits = v.dtype == torch.float32 or v.dtype == torch.int16 and m <= 2**16
    if v.is_cuda or not fits:
        return v.topk(k, dim=-1, sorted=False).indices
    if v.dtype == torch.float32:
        bits = v.view(torch.int32)
        v = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    wide = torch.int32 if half == 16 else torch.int64
    keys = ((v.to(wide) << half) | torch.arange(m, dtype=wide)).numpy()
    return torch.from_numpy(_partitioned(keys, k) & ((1 << half) - 1)).long()


def _onednn(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies x as `dtype`: on AMD twice as fast as MKL, which torch prefers."""
    if x.is_cuda or not torch.backends.mkldnn.is_available():
        return False
    return (dtype == torch.float32
            or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, float32 in and out; inside `quick_products` on a CPU from inputs rounded to bfloat16."""
    if _quick and _onednn(a, torch.bfloat16):  # oneDNN's own conversion takes twice as long
        return (a.bfloat16() @ b.bfloat16()).float()
    if _onednn(a, a.dtype) and a.shape[1]:
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return a @ b


def _affine(W: Tensor, bias: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """A function: x (rows, d) -> W x + bias (rows, n), in bfloat16 inside `quick_products`."""
    dtype = torch.bfloat16 if _quick else W.dtype
    W, bias = W.to(dtype), bias.to(dtype)
    if not _onednn(W, dtype):
        return lambda x: torch.addmm(bias, x.to(dtype), W.T)
    if _quick:  # into the layout that oneDNN multiplies fastest
        W = torch.ops.mkldnn._reorder_linear_weight(W, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), W, bias, "none", [], "")


def combined(weights: Tensor, W: Tensor) -> Tensor:
    """sum_i weights[i] W[i] (d,): on a CPU a bag reads W twice as fast as a product does."""
    if W.is_cuda:
        return weights @ W
    every = torch.arange(len(W)).unsqueeze(0)
    return embedding_bag(every, W, per_sample_weights=weights.unsqueeze(0), mode="sum").squeeze(0)


def sampled_products(support: Support | None, x: Tensor, W: Tensor) -> Tensor:
    """x (b, d) times W[feature] (n, d) for every pair, (b, k) or (m,); without a support, x W^T."""
    if support is None:
        return product(x, W.T)
    if support.positions is None and gpu.takes(x):
        return gpu.sampled_products(x, W, support.index)
    # These are the gradients of an embedding_bag's weights: features are bags, positions members.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        W, x, support.ordered_positions, support.feature_starts[:-1], support.ordered_features, 0)
    return torch.empty_like(products).index_copy_(0, support.order, products).view_as(support.index)


def transpose_product(support: Support | None, values: Tensor, x: Tensor) -> Tensor:
    """C^T x (n, d), from x (b, d) and codes C (b, n): `values` at the pairs, or all of them."""
    if support is None:
        return product(values.T, x)
    if support.positions is None and gpu.takes(x):
        return gpu.transpose_product(support.index, values, x, support.n, support.order)
    return embedding_bag(support.ordered_positions, x, support.feature_starts, mode="sum",
                         include_last_offset=True,
                         per_sample_weights=values.flatten()[support.order])


def _top(x: Tensor, W: Tensor, bias: Tensor, k: int) -> tuple[Support, Tensor | None]:
    """The pairs of the k largest W x + bias at every position, and their values as in `_Select`."""
    if gpu.takes(x):
        values, index = gpu.select_top(x, W, bias, k, torch.bfloat16 if _quick else torch.float32)
        return Support(index, len(W)), values
    rows = max(64, 2 ** int(math.log2(max(1, AT_ONCE // len(W)))))
    affine = _affine(W, bias, rows)
    indices, values = [], []
    for part in x.split(rows):
        pre = affine(part)
        indices.append(top(_sortable(pre), k))
        if not _quick:
            values.append(pre.gather(1, indices[-1]))
    return Support(torch.cat(indices), len(W)), torch.cat(values) if values else None


def _above(x: Tensor, W: Tensor, bias: Tensor,
           bound: Bound | None) -> tuple[Support | None, Tensor | None]:
    """Pairs whose W x + bias reach `bound`, and their values as in `_Select`; or None and all."""
    if x.is_cuda or bound is None or len(x) == 0:
        return None, sampled_products(None, x, W).add_(bias)
    pre = _affine(W, bias, len(x))(x)
    reach = _reaches(pre, bound(pre.flatten()) if callable(bound) else bound)
    if np.count_nonzero(reach) > FEW * pre.numel():
        return None, pre.float() if _quick else pre
    pairs = torch.from_numpy(np.flatnonzero(reach))  # several times as fast as torch.nonzero
    support = Support(pairs % len(W), len(W), pairs // len(W), len(x))
    return support, None if _quick else pre.flatten()[pairs]


def _reaches(pre: Tensor, least: Tensor) -> np.ndarray:
    """(b, n) bool: where pre is above 0 and not below `least`. NaN counts: it must show."""
    if pre.dtype == torch.bfloat16:  # one step of bfloat16 lower, for what was rounded down
        two_below = (_sortable(least.bfloat16()).clamp_min(0) - 2).clamp_min(0)
        return _sortable(pre).numpy() > two_below.numpy()  # numpy: four times as fast as torch
    return (pre <= 0).logical_or_(pre < least).logical_not_().numpy()


class _Select(torch.autograd.Function):
    """W (x - centre) + bias at the pairs that `choose` picks; it gives no values if rounded."""

    @staticmethod
    def forward(ctx, x, centre, W, bias, choose):
        inside = x - centre
        support, values = choose(inside, W, bias)
        if values is None:
            values = sampled_products(support, inside, W) + bias[support.index]
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


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, support):
        ctx.support = support
        ordered = values.flatten()[support.order]
        return torch.segment_reduce(ordered, "sum", offsets=support.feature_starts, initial=0.0)

    @staticmethod
    def backward(ctx, g):
        return g[ctx.support.index], None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, support, W):
        ctx.save_for_backward(values, W)
        ctx.support = support
        if support is None:
            return product(values, W)
        if support.positions is not None:
            return embedding_bag(support.index, W, support.position_starts, mode="sum",
                                 include_last_offset=True, per_sample_weights=values)
        if gpu.takes(W):
            return gpu.sum_rows(values, support.index, W)
        return embedding_bag(support.index, W, per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx, g):
        (values, W), support = ctx.saved_tensors, ctx.support
        g_W = transpose_product(support, values, g) if ctx.needs_input_grad[2] else None
        return sampled_products(support, g, W), None, g_W


def select_top(x: Tensor, centre: Tensor, W: Tensor, bias: Tensor,
               k: int) -> tuple[Tensor, Support]:
    """ReLU of the k largest W (x - centre) + bias at each position: values (b, k), their Support.

    x (b, d), centre (d,), W (n, d), bias (n,), all float32.
    """
    values, support = _Select.apply(x, centre, W, bias, partial(_top, k=k))
    return relu(values), support


def select_above(x: Tensor, centre: Tensor, W: Tensor, bias: Tensor,
                 bound: Bound | None) -> tuple[Tensor, Support | None]:
    """Every positive W (x - centre) + bias that reaches a bound: values (m,) and their Support.

    bound: (n,) or a scalar, none below 0; or a function from all pre-activations (b * n,) to a
    scalar. Inside `quick_products` these are rounded to bfloat16: values up to a rounding below the
    bound, or below 0, come along. Gives all values (b, n) and None where a share over FEW reaches
    the bound, where it is None, and on a GPU.
    """
    return _Select.apply(x, centre, W, bias, partial(_above, bound=bound))


def preactivations(x: Tensor, centre: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """W (x - centre) + bias (b, n), all; `centre` gets its gradient without a product over b."""
    return select_above(x, centre, W, bias, None)[0]


def sum_rows(values: Tensor, support: Support | None, W: Tensor) -> Tensor:
    """sum_j values[b, j] W[index[b, j]] (b, d); without a support: values (b, n) times W."""
    return _SumRows.apply(values, support, W)


def total(values: Tensor, support: Support | None) -> Tensor:
    """(n,) the sum of each feature's values: those of the support's pairs; without one, (b, n)."""
    return values.sum(0) if support is None else _Total.apply(values, support)


def where_positive(x: Tensor, y: Tensor) -> Tensor:
    """x where y > 0, else 0: in one pass, several times as fast as a mask or torch.where."""
    return torch.ops.aten.threshold_backward(x, y, 0.0)


def per_code(p: Tensor, support: Support | None) -> Tensor:
    """p (n,), one value a feature, as codes need it: at the pairs of a support, or as it is."""
    return p if support is None else p[support.index]


class JumpReLU(torch.autograd.Function):
    """Codes of pre (b, n) or (m,) over thresholds theta (n,), and their mean L0.

    A step has no gradient: in a window of `bandwidth` around theta it is taken to be 1 / bandwidth
    (Rajamanoharan et al. 2024, equations 11 and 12).
    """

    @staticmethod
    def forward(ctx, pre, log_theta, bandwidth, support):
        theta = log_theta.exp()
        above = pre - per_code(theta, support)
        codes = where_positive(pre, above)  # theta is positive: what is above it needs no ReLU
        inside = above.abs_().neg_().add_(bandwidth / 2)  # above 0 in the window
        ctx.save_for_backward(codes, inside, theta)
        ctx.bandwidth, ctx.support = bandwidth, support
        ctx.b = len(pre) if support is None else support.b
        return codes, torch.count_nonzero(codes) / ctx.b

    @staticmethod
    def backward(ctx, g, g_l0):
        codes, inside, theta = ctx.saved_tensors
        pull = torch.addcmul(g_l0 / ctx.b, g, per_code(theta, ctx.support))
        pull = total(where_positive(pull, inside), ctx.support)
        return where_positive(g, codes), -pull * theta / ctx.bandwidth, None, None


class Gated(torch.autograd.Function):
    """Codes and gates of pre = W x + b_enc, (b, n) or (m,) (Rajamanoharan et al. 2024b).

    The magnitudes share W, scaled by exp(r_mag). The derivative by hand takes half of the passes.
    """

    @staticmethod
    def forward(ctx, pre, b_enc, r_mag, b_mag, support):
        gain, gates = r_mag.exp(), relu(pre)
        shift = per_code(b_mag - b_enc * gain, support)
        codes = torch.addcmul(shift, pre, per_code(gain, support)).relu_()
        codes = where_positive(codes, gates)
        ctx.save_for_backward(codes, gates, b_enc, gain)
        ctx.support = support
        return codes, gates

    @staticmethod
    def backward(ctx, g, g_gates):
        codes, gates, b_enc, gain = ctx.saved_tensors
        g = where_positive(g, codes)
        g_b = total(g, ctx.support)
        g_pre = torch.addcmul(where_positive(g_gates, gates), g, per_code(gain, ctx.support))
        g_r = (total(g * gates, ctx.support) - g_b * b_enc) * gain
        return g_pre, -g_b * gain, g_r, g_b, None
