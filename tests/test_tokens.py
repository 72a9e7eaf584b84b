"""Oracles: a naive loop over features and tokens."""

from math import log2

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array, csr_array
from streams import noisy

from tsae.scoring import tokens


def test_token_statistics_equal_a_naive_loop():
    codes, text = noisy()
    dense, t, m = codes.toarray().astype(float), text.t, len(text.t)
    found = tokens.token_statistics(codes, text, top=20)
    for j in (0, 2, 3):
        y = dense[:, j]
        top = np.argsort(-y, kind="stable")[:20]
        for name, weight in (("firing", 1.0 * (y > 0)), ("mass", y), ("peak", np.isin(np.arange(m), top) * 1.0)):
            share = {token: weight[t == token].sum() / weight.sum() for token in set(t.tolist())}
            effective = np.exp(-sum(w * np.log(w) for w in share.values() if w))
            assert found[f"tokens_{name}"][j] == pytest.approx(effective)
            assert found[f"modal_share_{name}"][j] == pytest.approx(max(share.values()))
            rate = (y > 0).mean()
            joint = {(fires, token): (rate * share[token] if fires else ((y == 0) & (t == token)).sum() / m)
                     for token in share for fires in (0, 1)}
            of = {token: joint[0, token] + joint[1, token] for token in share}
            bits = sum(p * log2(p / (of[token] * (rate if fires else 1 - rate)))
                       for (fires, token), p in joint.items() if p)
            kinds, number = sum(w > 0 for w in share.values()), weight.sum()**2 / (weight**2).sum()
            bits = max(0, bits - rate * (kinds - 1) / (2 * np.log(2) * number))
            entropy = -rate * log2(rate) - (1 - rate) * log2(1 - rate)
            assert found[f"bits_{name}"][j] == pytest.approx(bits, abs=1e-9)
            assert found[f"told_{name}"][j] == pytest.approx(bits / entropy, abs=1e-9)
    assert found["modal_token"][2] == max(set(t.tolist()), key=lambda token: dense[t == token, 2].sum())
    assert found["tokens_firing"][1] == 0 and (found["tokens_drawn"] <= 4).all()


def test_effective_number_is_one_for_one_token_and_c_for_c_equal_ones():
    weights = csr_array(np.array([[3.0, 0, 0, 0], [2, 2, 0, 2], [0, 0, 0, 0], [0.5, 1, 0.25, 0.25]]))
    share = np.array([0.5, 1, 0.25, 0.25]) / 2
    assert np.allclose(tokens.effective_number(weights), [1, 3, 0, np.exp(-(share * np.log(share)).sum())])


def test_what_single_token_features_are_for_is_that_of_a_loop():
    random = np.random.default_rng(3)
    t = random.integers(0, 5, 400)
    dense = np.where(random.random((400, 6)) < 0.3, random.random((400, 6)), 0.0)
    dense[:, 1] = np.where((t == 2) & (random.random(400) < 0.5), 1.0, 0.0)  # at half of the token 2
    dense[:, 3] = np.where(t == 4, 2.0, 0.0)
    dense[0, 3] = 0.1  # once elsewhere
    dense[5:, 5] = 0.0  # too rare
    directions, means = torch.randn(6, 8), torch.randn(5, 8)
    found = tokens.single_token_features(csc_array(dense.astype(np.float32)), t, directions, means, least=10)
    assert found["feature"].tolist() == [1, 3] and found["token"].tolist() == [2, 4]
    overall = sum(means[i] for i in t.tolist()) / len(t)
    for row in found.itertuples():
        codes, here = dense[:, row.feature], t == row.token
        assert row.mass == pytest.approx(codes[here].sum() / codes.sum(), rel=1e-5)
        assert row.fires == pytest.approx((codes[here] > 0).mean())
        along = torch.cosine_similarity(directions[row.feature], means[row.token] - overall, dim=0)
        assert row.along == pytest.approx(along.item(), abs=1e-5)
