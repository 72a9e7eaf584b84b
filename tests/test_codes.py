"""Oracles: the model's own dense codes, and naive loops over each feature's firings."""

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array

from tsae import codes as sparse
from tsae.sae import SAE


def dense_codes(seed: int = 0, m: int = 90, n: int = 7) -> np.ndarray:
    """Codes (m, n) with many ties, one feature that never fires and one that always does."""
    random = np.random.default_rng(seed)
    dense = random.integers(1, 5, (m, n)) / 4 * (random.random((m, n)) < random.uniform(0.1, 0.9, n))
    dense[:, 2], dense[:, 3] = 0, random.random(m) + 0.1
    return dense.astype(np.float32)


def firings_of(dense: np.ndarray) -> list[tuple[int, int, float]]:
    """(feature, position, code) of every firing, by feature and then by position."""
    return [(j, p, float(dense[p, j])) for j in range(dense.shape[1]) for p in range(len(dense)) if dense[p, j] > 0]


def strongest_first(dense: np.ndarray) -> list[int]:
    """Indices into the firings: by feature, the largest code first, then by position."""
    its = firings_of(dense)
    return sorted(range(len(its)), key=lambda i: (its[i][0], -its[i][2], its[i][1]))


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_the_sparse_encoder_equals_the_models_own(activation):
    torch.manual_seed(0)
    sae = SAE(12, 20, activation, k=3, scale=0.5)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in ("W_enc", "b_enc", "b_dec"):
                parameter.copy_(torch.randn_like(parameter))
    x, t = torch.randn(53, 12), torch.randint(0, 5, (53,))
    found = sparse.encoded(sae, x, t, batch=10)
    with torch.no_grad():
        expected = torch.cat([sae.encode(a, b) for a, b in zip(x.split(10), t.split(10))]).numpy()
    assert found.shape == (53, 20) and found.dtype == np.float32 and found.has_sorted_indices
    assert np.allclose(found.toarray(), expected, atol=1e-6) and found.nnz == (expected != 0).sum() > 0


def test_firings_come_by_feature_and_then_by_position():
    dense = dense_codes()
    p, j, v = sparse.firings(csc_array(dense))
    assert list(zip(j.tolist(), p.tolist(), v.tolist())) == firings_of(dense)


def test_orders_equal_a_sort_of_tuples():
    dense, random = dense_codes(), np.random.default_rng(1)
    assert sparse.by_strength(csc_array(dense)).tolist() == strongest_first(dense)
    group, key = random.integers(0, 4, 200), random.integers(0, 9, 200).astype(np.uint32)
    expected = sorted(range(200), key=lambda i: (group[i], key[i], i))
    assert sparse.ordered_within(group, key).tolist() == expected


def test_bits_of_floats_have_their_order():
    values = np.r_[0, np.float32(1e-45), np.random.default_rng(2).exponential(1, 500), 3e38].astype(np.float32)
    assert np.array_equal(np.argsort(sparse.sortable(values), kind="stable"), np.argsort(values, kind="stable"))


@pytest.mark.parametrize("top", [1, 4, 200])
def test_the_strongest_equal_a_sort_with_ties_by_position(top):
    dense = dense_codes()
    codes, its, order = csc_array(dense), firings_of(dense), strongest_first(dense)
    position, code = sparse.strongest(codes, top)
    chosen = sparse.first_of_each(sparse.by_strength(codes), sparse.firings(codes)[1], codes.indptr, top)
    for j in range(dense.shape[1]):
        best = [i for i in order if its[i][0] == j][:top]
        rest = top - len(best)
        assert position[j].tolist() == [its[i][1] for i in best] + [-1] * rest
        assert code[j].tolist() == [its[i][2] for i in best] + [0.0] * rest
        assert [i for i in np.flatnonzero(chosen) if its[i][0] == j] == sorted(best)


@pytest.mark.parametrize("each", [1, 4, 10**6])
def test_even_choices_are_even_over_ranks(each):
    dense = dense_codes()
    mask = np.random.default_rng(3).random(len(dense)) < 0.6
    codes, its = csc_array(dense), firings_of(dense)
    found = sparse.evenly(codes, mask, each).tolist()
    for j in range(dense.shape[1]):
        mine = [i for i in strongest_first(dense) if its[i][0] == j and mask[its[i][1]]]
        ranks = [mine.index(i) for i in found if its[i][0] == j]
        assert len(ranks) == min(each, len(mine)) and ranks == sorted(ranks)
        if len(mine) > each:
            middles = (np.arange(each) + 0.5) * len(mine) / each
            assert np.abs(np.array(ranks) + 0.5 - middles).max() <= 0.5 + 1e-9
