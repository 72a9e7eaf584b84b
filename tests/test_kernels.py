"""Oracle: sorted rows, naive sums, torch's gradcheck in float64, and autograd of the dense computation."""

import pytest
import torch

from tsae import kernels

B, D, N, K = 37, 20, 48, 5


def problem(dtype=torch.float64, b=B, n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = dict(x=(b, D), centre=(D,), W=(n, D), bias=(n,))
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes.values()]


KINDS = {"random": lambda v: v, "ties": lambda v: (v * 3).round(), "negative": lambda v: -v.abs(), "zeros": torch.zeros_like,
         "wide": lambda v: v * torch.exp(20 * v)}


def naive_largest(row, k):
    """The k largest numbers of a list, largest first, zeros where there are fewer; and their places, later ones of ties."""
    order = sorted(range(len(row)), key=lambda place: (row[place], place), reverse=True)[:k]
    return sorted([row[place] for place in order] + [0.0] * (k - len(row)), reverse=True), order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.float64])
@pytest.mark.parametrize("m, k", [(5, 5), (64, 1), (1024, 8), (1000, 3), (4096, 32), (12288, 32), (12288, 384), (97, 2)])
def test_top_is_the_head_of_a_sort(m, k, dtype, kind):
    v = torch.randn(2, m, generator=torch.Generator().manual_seed(m))
    v = (KINDS[kind](v).clamp(-30, 30) * (1000 if dtype == torch.int16 else 1)).to(dtype)
    chosen = kernels.top(v, k)
    for row, places in zip(v.tolist(), chosen.tolist()):
        assert len(set(places)) == k and sorted((row[place] for place in places), reverse=True) == naive_largest(row, k)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_of_ties_the_later_places_are_taken(dtype):
    """In a row that is not cut. Small numbers on both sides of zero, so that most are tied."""
    v = torch.randint(-3, 4, (9, 60), generator=torch.Generator().manual_seed(0)).to(dtype)
    for row, places in zip(v.tolist(), kernels.top(v, 11).tolist()):
        assert sorted(places) == sorted(naive_largest(row, 11)[1])


def test_rows_too_long_for_16_bit_places_are_selected_otherwise():
    v = torch.arange(2**16 + 2, dtype=torch.int32).remainder(2**15).to(torch.int16).unsqueeze(0)
    chosen = kernels.top(v, 2**13)  # not cut: m <= 16 k
    assert torch.equal(v[0, chosen[0]].sort().values, v[0].sort().values[-2**13:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m, k", [(1, 1), (50, 1), (50, 49), (50, 50), (50, 53), (4096, 300)])
def test_the_largest_are_the_head_of_a_sort(m, k, dtype, kind):
    """Of rows, and of their values together. bfloat16 below zero is promised to stay below zero, and no more."""
    v = KINDS[kind](torch.randn(3, m, generator=torch.Generator().manual_seed(m))).to(dtype)
    before, blind = v.clone(), dtype == torch.bfloat16
    for given in (v, v.flatten()):
        found, kth = kernels.largest(given, k), kernels.kth_largest(given, k)
        assert found.dtype == dtype and found.shape == (*given.shape[:-1], k) and kth.shape == given.shape[:-1]
        for row, ours, least in zip(given.view(-1, given.shape[-1]), found.view(-1, k), kth.view(-1)):
            wanted = torch.tensor(naive_largest(row.tolist(), k)[0], dtype=dtype)
            ours = ours.sort(descending=True).values
            if blind:
                wanted, ours, least = wanted.clamp_min(0), ours.clamp_min(0), least.clamp_min(0)
            assert torch.equal(ours, wanted) and least == wanted[-1]
    assert torch.equal(v, before), "what it was lent is as it was"


def test_a_nan_is_the_largest():
    v = torch.tensor([[1.0, float("nan"), 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert kernels.kth_largest(v[0], 2).isnan() and kernels.kth_largest(v[1], 2) == 3
    assert kernels.kth_largest(v, 2).tolist() == [3, 3]


def bound_at(share):
    return lambda pre: kernels.kth_largest(pre, int(share * len(pre)))


@pytest.fixture
def as_pairs(monkeypatch):
    """No share of active features is too large for pairs."""
    monkeypatch.setattr(kernels, "FEW", 1)


BOUNDS = {"of the batch": bound_at(0.1), "of the batch, below zero": bound_at(0.9), "a scalar": torch.tensor(3.0),
          "zero": torch.zeros(()), "a feature": torch.arange(N) / 8}


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_select_above_is_the_naive_preactivations_that_reach_the_bound(bound, as_pairs, monkeypatch):
    x, centre, W, bias = (tensor.detach() for tensor in problem())
    pre = torch.stack([torch.stack([(x[b] - centre) @ W[i] + bias[i] for i in range(N)]) for b in range(B)])
    least = (bound(pre.flatten()) if callable(bound) else bound).expand(N).double()
    wanted = [(b, i) for b in range(B) for i in range(N) if pre[b, i] > 0 and pre[b, i] >= least[i] - 1e-9]
    assert 0.02 < len(wanted) / (B * N) < 0.6
    values, support = kernels.select_above(x, centre, W, bias, bound)
    assert list(zip(support.positions.tolist(), support.index.tolist())) == wanted
    assert torch.allclose(values, torch.stack([pre[pair] for pair in wanted]))
    monkeypatch.setattr(kernels, "FEW", 0.01)
    every, none = kernels.select_above(x, centre, W, bias, bound)
    assert none is None and torch.allclose(every, pre)


@pytest.mark.parametrize("few", [0, 1])
def test_select_above_has_the_derivatives_of_finite_differences(few, monkeypatch):
    monkeypatch.setattr(kernels, "FEW", few)

    def rebuilt(x, centre, W, bias, decoder):
        values, support = kernels.select_above(x, centre, W, bias, bound_at(0.2))
        assert (support is None) == (few == 0)
        return kernels.sum_rows(values, support, decoder), kernels.total(values, support)

    decoder = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rebuilt, (*problem(b=4), decoder))


def test_nothing_above_the_bound_is_zero_everywhere():
    x, centre, W, bias = problem(torch.float32)
    for quick in (False, True):
        with kernels.quick_products(quick):
            values, support = kernels.select_above(x, centre, W, bias, torch.tensor(1e9))
            out = kernels.sum_rows(values, support, W)
        assert len(values) == 0 and out.shape == (B, D) and not out.any()
        assert not kernels.total(values, support).any() and not torch.autograd.grad(out.sum(), W)[0].any()


@pytest.mark.parametrize("bound", [bound_at(0.02), torch.tensor(9.0), torch.linspace(5, 12, 512)],
                         ids=["of the batch", "a scalar", "a feature"])
def test_quick_products_reach_a_bound_within_a_rounding_of_bfloat16(bound, as_pairs):
    x, centre, W, bias = problem(torch.float32, b=700, n=512)
    exact, wanted = kernels.select_above(x, centre, W, bias, bound)
    with kernels.quick_products(True):
        quick, support = kernels.select_above(x, centre, W, bias, bound)
        g_quick = torch.autograd.grad(quick.square().sum(), [x, centre, W, bias])
    pre = (x - centre) @ W.T + bias
    assert torch.allclose(quick, pre[support.positions, support.index], atol=1e-4)
    least = (bound(pre.detach().flatten()) if callable(bound) else bound).expand(512)
    assert (quick > 0.98 * least[support.index] - 0.02).all() and len(exact) / 1.01 < len(quick) < 1.1 * len(exact)
    among = set(zip(support.positions.tolist(), support.index.tolist()))
    missed = [(value, i) for (b, i), value in zip(zip(wanted.positions.tolist(), wanted.index.tolist()), exact.tolist())
              if (b, i) not in among]
    assert len(missed) < 0.01 * len(exact) and all(value < 1.02 * least[i] + 0.02 for value, i in missed)
    dense = pre * torch.zeros_like(pre).index_put((support.positions, support.index), torch.tensor(1.0))
    for ours, theirs in zip(g_quick, torch.autograd.grad(dense.square().sum(), [x, centre, W, bias])):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-2)


def test_what_bfloat16_rounds_to_a_step_below_the_bound_is_kept(as_pairs):
    """3.0114 from terms that are each rounded to 1; the bound 3.01 is rounded up, a step above 3."""
    x, W, bound = torch.full((1, 3), 1.0038), torch.ones(2, 3), torch.tensor([3.01, 3.05])
    with kernels.quick_products(True):
        values, support = kernels.select_above(x, torch.zeros(3), W, torch.zeros(2), bound)
    assert support.index.tolist() == [0] and values.item() == pytest.approx(3.0114)


def test_a_bound_of_minus_zero_is_zero(as_pairs):
    x, centre, W, bias = problem(torch.float32)
    with kernels.quick_products(True):
        found = [len(kernels.select_above(x, centre, W, bias, torch.tensor(zero))[0]) for zero in (0.0, -0.0)]
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("bound", [torch.zeros(()), bound_at(0.1)])
def test_a_nan_reaches_every_bound(bound, as_pairs):
    x, centre, W, bias = problem(torch.float32)
    bias.data[7] = float("nan")
    assert kernels.select_above(x, centre, W, bias, bound)[0].isnan().any()


def test_more_than_there_are_get_a_sentence():
    with pytest.raises(ValueError, match="7 largest of 5.*smaller k"):
        kernels.top(torch.randn(2, 5), 7)


def test_rows_combined_are_the_product_with_a_vector():
    _, _, W, bias = problem()
    assert torch.allclose(kernels.combined(bias, W), bias @ W)


def test_select_top_is_the_head_of_the_naive_preactivations():
    x, centre, W, bias = (tensor.detach() for tensor in problem())
    bias = bias - 8
    values, support = kernels.select_top(x, centre, W, bias, K)
    for b in range(B):
        pre = [(((x[b] - centre) @ W[i] + bias[i]).item(), i) for i in range(N)]
        wanted = {i: max(0.0, value) for value, i in sorted(pre)[-K:]}
        assert dict(zip(support.index[b].tolist(), values[b].tolist())) == pytest.approx(wanted)
    assert (values == 0).any() and (values > 0).any()


def test_derivatives_are_those_of_finite_differences():
    def rebuilt(x, centre, W, bias, decoder):
        return kernels.sum_rows(*kernels.select_top(x, centre, W, bias, K), decoder)

    decoder = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rebuilt, (*problem(b=4), decoder))


@pytest.mark.parametrize("n", [N, 2**16 + 2])  # beyond 16 bits the pairs are sorted otherwise
@pytest.mark.parametrize("ragged", [False, True])
def test_products_are_the_naive_sums(n, ragged):
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(n - 1, generator=g)[:K] for _ in range(B)])
    index[::2, 0] = n - 1  # a feature that many share
    x, W, values = (torch.randn(shape, generator=g) for shape in ((B, D), (n, D), (B, K)))
    dense, products = torch.zeros(B, n).scatter_(1, index, values), (x @ W.T).gather(1, index)
    support = kernels.Support(index, n)
    if ragged:  # the first positions have none, the others all but the last
        some = torch.arange(B * K)[3 * K:-1]
        values, products = values.flatten()[some], products.flatten()[some]
        support = kernels.Support(index.flatten()[some], n, some // K, B)
        dense[:3], dense[-1, index[-1, -1]] = 0, 0
    assert torch.allclose(kernels.transpose_product(support, values, x), dense.T @ x, atol=1e-5)
    assert torch.allclose(kernels.sampled_products(support, x, W), products, atol=1e-5)
    assert torch.allclose(kernels.sum_rows(values, support, W), dense @ W, atol=1e-5)
    assert torch.allclose(kernels.total(values, support), dense.sum(0), atol=1e-5)


def test_quick_products_choose_by_bfloat16_and_give_float32_values():
    x, centre, W, bias = problem(torch.float32, b=700, n=512)
    exact, support = kernels.select_top(x, centre, W, bias, 8)
    with kernels.quick_products(True):
        quick, chosen = kernels.select_top(x, centre, W, bias, 8)
        g_quick = torch.autograd.grad(quick.sum(), [x, centre, W, bias])
    pre = (x - centre) @ W.T + bias
    assert torch.allclose(quick, pre.gather(1, chosen.index).relu(), atol=1e-4)
    bar = exact.min(-1).values
    assert (quick.min(-1).values > bar - 0.02 * bar.abs() - 0.02).all()  # what was missed was missed by a rounding
    assert (torch.isin(chosen.index, support.index)).float().mean() > 0.98
    codes = pre * torch.zeros_like(pre).scatter_(1, chosen.index, 1.0)
    for ours, dense in zip(g_quick, torch.autograd.grad(codes.relu().sum(), [x, centre, W, bias])):
        assert torch.allclose(ours, dense, atol=1e-3)


def test_quick_products_leave_everything_as_it_was():
    before = torch.backends.cuda.matmul.fp32_precision, kernels._quick
    with pytest.raises(KeyError), kernels.quick_products(True):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32" and kernels._quick
        raise KeyError
    with kernels.quick_products(False):
        assert (torch.backends.cuda.matmul.fp32_precision, kernels._quick) == before
    assert (torch.backends.cuda.matmul.fp32_precision, kernels._quick) == before


def test_dense_products_have_the_derivatives_of_finite_differences():
    x, centre, W, bias = problem(b=3, n=6)
    codes = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernels.preactivations, (x, centre, W, bias))
    assert torch.autograd.gradcheck(kernels.sum_rows, (codes, None, W))
    assert torch.allclose(kernels.preactivations(x, centre, W, bias), (x - centre) @ W.T + bias)
    assert torch.allclose(kernels.sum_rows(codes, None, W), codes @ W)


def test_quick_dense_products_are_rounded_and_no_more():
    x, centre, W, bias = problem(torch.float32, b=300, n=200)
    exact = kernels.preactivations(x, centre, W, bias)
    with kernels.quick_products(True):
        quick = kernels.preactivations(x, centre, W, bias)
    assert quick.dtype == torch.float32 and not torch.equal(quick, exact)
    assert (quick - exact).abs().max() < 2**-7 * ((x - centre).norm(dim=1).max() * W.norm(dim=1).max())


@pytest.mark.parametrize("select", [lambda *given: kernels.select_top(*given, 8),
                                    lambda *given: kernels.select_above(*given, bound_at(0.02))], ids=["top", "above"])
def test_results_are_the_same_bits_every_time(select, as_pairs):
    x, centre, W, bias = problem(torch.float32, b=3000, n=512)
    with kernels.quick_products(True):
        first, again = ([values, *torch.autograd.grad(kernels.sum_rows(values, support, W).square().sum(), [centre, W, bias])]
                        for values, support in (select(x, centre, W, bias) for _ in range(2)))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
