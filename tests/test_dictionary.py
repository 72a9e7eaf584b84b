"""Oracles: double loops, planted directions, and pairs counted one by one."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer
from scipy.sparse import csc_array

from tsae.sae import SAE
from tsae.scoring import dictionary, heldout


def by_loops(a, b, top, sign):
    """For each row of a its `top` (product, row of b), the first of equals first."""
    found = []
    for i, one in enumerate(a):
        products = [((one * other).sum().item(), j) for j, other in enumerate(b) if a is not b or i != j]
        found.append(sorted(products, key=lambda pair: (-sign * pair[0], pair[1]))[:top])
    return found


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_nearest_rows_equal_a_double_loop(sign, chunk):
    random = torch.Generator().manual_seed(0)
    a = torch.randint(-1, 2, (11, 4), generator=random).float()  # many ties, and exact products
    a[5] = a[2]
    for b in (a, torch.randint(-1, 2, (7, 4), generator=random).float()):
        for top in (1, 3, 20):
            expected = by_loops(a, b, top, sign)
            value, index = dictionary.nearest_rows(a, b, top, sign, chunk)
            assert value.shape == index.shape == (11, min(top, len(b) - (a is b)))
            assert value.tolist() == [[product for product, _ in row] for row in expected]
            assert torch.equal((a[:, None] * b[index]).sum(-1), value)
            assert all(len(set(row)) == len(row) for row in index.tolist())
            if a is b:
                assert not (index == torch.arange(11)[:, None]).any(), "never itself"
            if top == 1:
                assert index[:, 0].tolist() == [row[0][1] for row in expected], "the first of equals"


def test_one_row_has_no_nearest_other():
    with pytest.raises(ValueError, match="one row was given, two are needed"):
        dictionary.nearest_other(torch.ones(1, 4))
    with pytest.raises(ValueError, match="one row was given, two are needed"):
        dictionary.dictionary(SAE(4, 1, "relu"), torch.eye(4))
    value, index = dictionary.nearest_other(torch.eye(4)[[0, 0, 1]])
    assert value.tolist() == [1, 1, 0] and index.tolist() == [1, 0, 0]


@torch.no_grad()
def test_duplicates_and_token_directions_are_found():
    sae, random = SAE(16, 6, "relu"), torch.Generator().manual_seed(0)
    sae.start(torch.zeros(16), seed=0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=random))[0].T
    unigrams = torch.randn(300, 4, generator=random) @ basis[:4] * 5 + 0.1 * torch.randn(300, 16, generator=random) + 3
    sae.W_dec[0], sae.W_dec[1], sae.W_dec[2] = basis[0], basis[8], 0.5**0.5 * (basis[1] + basis[9])
    sae.W_dec[3] = sae.W_dec[5] + 0.01
    sae.normalise()
    found = dictionary.dictionary(sae, unigrams)
    assert found["token_share"][:3].tolist() == pytest.approx([1, 0, 0.5], abs=0.02)
    cosines = sae.W_dec @ sae.W_dec.T - 9 * torch.eye(6)
    assert np.allclose(found["nearest_cosine"], cosines.max(-1).values, atol=1e-6)
    assert found["nearest_feature"].tolist() == cosines.argmax(-1).tolist()
    assert found["nearest_cosine"][3] > 0.9 and found["nearest_feature"][3] == 5 and found["nearest_feature"][5] == 3
    assert dictionary.dictionary(sae, unigrams, rank=16)["token_share"].tolist() == pytest.approx([1] * 6)


def test_split_tokens_counts_the_owners():
    table = pd.DataFrame(dict(modal_token=[7, 7, 7, 8, 9], modal_share_mass=[0.9, 0.6, 0.1, 1.0, 0.2]))
    assert dictionary.split_tokens(table).tolist() == [2, 2, 0, 1, 0]


def test_probes_equal_loops_and_see_absorption():
    random, tokenizer = np.random.default_rng(0), byte_tokenizer()
    rows = np.c_[np.zeros((60, 1), int), random.choice(tokenizer.encode("aB1 ."), (60, 40))]
    rows = torch.from_numpy(rows).int()
    text = heldout.prepare(rows, rows != 0, tokenizer)
    m = len(text.t)
    number, digit = text.ids[text.names.index("a number")].astype(bool), random.random(m) < 0.1
    dense = random.exponential(1, (m, 5)) * (random.random((m, 5)) < 0.1)
    dense[:, 1] = np.round(2 * dense[:, 1])  # ties
    dense[:, 2] = number & ~digit  # the general feature, with holes
    dense[:, 3] = number & digit  # the specialist that stands in for it
    codes = csc_array(dense.astype(np.float32))
    found = dictionary.probes(codes, text, rare=0.3).set_index("attribute")
    assert set(found.index) == set(heldout.OF_TOKEN) | set(heldout.OF_TEXT) | set(heldout.OCCURRENCES)
    one = found.loc["a number"]
    assert one.f1_feature == one.auc_feature == 2 and one.absorbed == 1 and one.beside == 0 and one.specialists == 1
    tested, y = ~text.fit, number & ~text.fit
    assert one.f1 == pytest.approx(2 * (dense[y, 2] > 0).sum() / ((dense[tested, 2] > 0).sum() + y.sum()))
    assert one.share == pytest.approx(number.mean())


def test_auc_and_f1_are_those_of_pairs_and_places():
    random = np.random.default_rng(1)
    dense = random.exponential(1, (90, 6)) * (random.random((90, 6)) < 0.3)
    dense[:, 1] = np.round(2 * dense[:, 1])  # ties
    dense[:, 2] = 0
    dense[:, 3] = 1 + random.random(90)  # never silent
    flags = random.random((90, 4)) < [0.1, 0.5, 0, 1]
    auc, f1, *_ = dictionary._probed(csc_array(dense.astype(np.float32)), flags)
    for j in range(6):
        for a in range(4):
            inside, outside = dense[flags[:, a], j], dense[~flags[:, a], j]
            gap = inside[:, None] - outside
            assert auc[j, a] == pytest.approx(((gap > 0) + (gap == 0) / 2).mean() if gap.size else 0.5)
            hits, missed, wrong = (inside > 0).sum(), (inside == 0).sum(), (outside > 0).sum()
            assert f1[j, a] == pytest.approx(2 * hits / max(2 * hits + missed + wrong, 1))


def test_origins_of_planted_features():
    """One is an earlier row again, one the sum of two, one fires inside an earlier feature only, one is new; by loops."""
    random, m, d = np.random.default_rng(0), 2000, 32
    rows = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))[0]
    earlier = rows[:6]
    wanted = dict(again=0.9 * rows[2] + 0.3 * rows[20], composed=rows[0] + rows[5] + 0.5 * rows[21],
                  split=rows[22], new=rows[23])
    new = torch.stack([*wanted.values(), rows[24]])
    old_fires = random.random((m, 6)) < [0.05, 0.05, 0.05, 0.3, 0.05, 0.95]
    fires = random.random((m, 5)) < 0.1
    fires[:, 2] &= old_fires[:, 3]
    fires[:, 4] = False
    codes, old = (csc_array(each * random.uniform(1, 2, each.shape)) for each in (fires, old_fires))
    found = dictionary.origins(new, codes, 3 * earlier, old)
    assert found["feature"].tolist() == [0, 1, 2, 3], "the last never fires"
    assert found["origin"].tolist() == list(wanted)
    assert found["nearest"][0] == 2 and found["within"][2] == 3 and found["inside"][2] == pytest.approx(1)
    unit = new[:4] / new[:4].norm(dim=1, keepdim=True)

    def within(one, pair):  # the share of its squared norm in the plane of two rows
        return (torch.linalg.lstsq(pair.T, one)[0] @ pair).square().sum().item()

    for i, row in found.iterrows():
        assert row["cosine"] == pytest.approx(max((unit[i] @ each).item() for each in earlier), abs=1e-6)
        best = max(within(unit[i], earlier[[row["nearest"], j]]) for j in range(6) if j != row["nearest"])
        assert row["pair"] == pytest.approx(best, abs=1e-5)
        share = [(fires[:, i] & old_fires[:, j]).sum() / fires[:, i].sum() for j in range(6)]
        rate = old_fires.mean(0)
        assert row["inside"] == pytest.approx(max((s - r) / (1 - r) for s, r in zip(share, rate)))
