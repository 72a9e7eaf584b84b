"""Oracles: planted features that must be found where they were put, and naive loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer
from scipy.sparse import csc_array

from tsae import features
from tsae.codes import encoded
from tsae.sae import SAE

VOCABULARY = 12


@pytest.fixture
def planted() -> SAE:
    """Four features over width 4: each reads one coordinate of the activation, and fires above 0."""
    sae = SAE(4, 4, "relu")
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    return sae


def text(generator: torch.Generator, m: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Feature 0 fires on token 3 only, feature 1 on tokens 4 and 5 alike, feature 2 anywhere, feature 3 never."""
    t = torch.randint(0, VOCABULARY, (m,), generator=generator)
    x = torch.zeros(m, 4)
    x[:, 0], x[:, 1] = 2.0 * (t == 3), 1.0 * ((t == 4) | (t == 5))
    x[:, 2] = torch.rand(m, generator=generator) * (torch.rand(m, generator=generator) < 0.3)
    x[:, 3] = -1.0
    return x, t


def test_scan_equals_a_naive_loop(planted):
    x, t = text(torch.Generator().manual_seed(1), 130)
    scanned = features.scan(planted, x, t, top=5)
    codes = planted.encode(x).detach().numpy()
    for feature in range(4):
        fired = [position for position in range(130) if codes[position, feature] > 0]
        best = sorted(fired, key=lambda position: -codes[position, feature])[:5]  # stable: ties by position
        assert scanned.best[feature].tolist() == best + [-1] * (5 - len(best))
        assert np.allclose(scanned.best_code[feature], [codes[position, feature] for position in best] + [0] * (5 - len(best)))
    assert (scanned.best[3] == -1).all() and (t[scanned.best[0]] == 3).all()


def test_a_bar_of_its_own_for_each_feature(planted):
    """Feature 0 is strong on token 3 and weak on token 7: fed alone, token 7 drives it above 0 only."""
    x, t = text(torch.Generator().manual_seed(3), 400)
    mean = features.mean_codes(encoded(planted, x, t))
    codes = planted.encode(x).detach().numpy()
    for feature in range(4):
        fired = codes[codes[:, feature] > 0, feature]
        assert mean[feature] == (pytest.approx(fired.mean(), rel=1e-5) if len(fired) else np.inf)
    alone, last = torch.tensor([[1.99, 0, 0, -1], [0.5, 0, 0, -1.0], [1.01, 0, 0, -1.0]]), torch.tensor([3, 7, 8])
    response = features.respond(planted, alone, last, [0.0, mean / 2, mean])
    assert response.above[:, 0].tolist() == [3, 2, 0] and response.above[:, 3].tolist() == [0, 0, 0]


def test_own_bars_do_not_depend_on_the_size_of_codes(planted):
    x, t = text(torch.Generator().manual_seed(3), 400)
    larger = SAE(4, 4, "relu")
    with torch.no_grad():
        larger.W_enc.copy_(3 * torch.eye(4))
        larger.W_dec.copy_(torch.eye(4))

    def answers(sae: SAE) -> list:
        mean = features.mean_codes(encoded(sae, x, t))
        return features.respond(sae, x[:50], t[:50], [1.5, 0.0, mean / 2, mean]).above.tolist()

    absolute, *own = answers(planted)
    other, *same = answers(larger)
    assert own == same and absolute != other


def test_respond_counts_inputs_over_each_threshold(planted):
    x = torch.tensor([[0.5, 3, 0, -1], [1.5, 0, 0, -1], [2.5, 1, 0, -1.0]])
    response = features.respond(planted, x, torch.arange(3), [0.0, 1.0, 2.0], top=2)
    assert response.above.tolist() == [[3, 2, 0, 0], [2, 1, 0, 0], [1, 1, 0, 0]]
    assert response.best.tolist() == [[2, 1], [0, 2], [-1, -1], [-1, -1]]


def test_overlap_of_isolated_inputs_with_text(planted):
    x, t = text(torch.Generator().manual_seed(2))
    scanned = features.scan(planted, x, t)
    isolated = torch.zeros(VOCABULARY, 4)
    isolated[3, 0] = 1.0  # feature 0: its own token
    isolated[9, 1] = isolated[4, 1] = 1.0  # feature 1: strongest at a wrong token, then a right one
    isolated[9, 1] = 2.0
    ids = torch.arange(VOCABULARY)
    found = features.overlap(features.respond(planted, isolated, ids, [0.5]), scanned, ids.numpy(), t.numpy())
    assert found == dict(live=3, answering=pytest.approx(2 / 3), top_is_top=0.5, any_shared=1.0)


def test_grams_equal_a_counter():
    rows = torch.randint(0, 3, (6, 9), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    keep = torch.ones_like(rows, dtype=torch.bool)
    keep[:, 0], keep[2, 4] = False, False
    for n in (1, 2, 3):
        expected = pd.Series([tuple(row[i:i + n].tolist()) for row, kept in zip(rows, keep) for i in range(10 - n)
                              if kept[i:i + n].all()]).value_counts()
        found, counts = features.grams(rows, keep, n)
        assert {tuple(gram): count for gram, count in zip(found.tolist(), counts)} == expected.to_dict()
        assert (np.diff(counts) <= 0).all() and len(features.grams(rows, keep, n, most=2)[0]) == 2


def test_contexts_show_the_activating_token(planted):
    tokenizer = byte_tokenizer()
    rows = torch.tensor([[0, *tokenizer.encode("abcXdef")]])
    places = features.where(rows != 0)
    x = torch.zeros(7, 4)
    x[3, 0] = 2.0
    scanned = features.scan(planted, x, rows[0, 1:])
    shown = features.contexts(scanned, 0, rows, places, tokenizer, before=2, after=9)
    assert shown.to_dict("records") == [dict(code=2.0, before="bc", token="X", after="def")]


def test_the_share_of_single_token_features_by_a_loop():
    random = np.random.default_rng(0)
    dense = random.random((400, 6)) * (random.random((400, 6)) < 0.3)
    t = random.integers(0, 5, 400)
    dense[:, 1] *= t == 3  # about one token
    dense[:, 2] *= np.where(t == 2, 1, 0.05)  # mostly
    dense[:, 3] *= random.random(400) < 0.05  # too rare to be judged
    dense[:, 4] = 0
    judged = [j for j in range(6) if (dense[:, j] > 0).sum() >= 20]
    about_one = [max(dense[t == token, j].sum() for token in range(5)) > dense[:, j].sum() / 2 for j in judged]
    assert judged == [0, 1, 2, 5] and about_one == [False, True, True, False]
    assert features.single_token(csc_array(dense), t, least=20) == 0.5
    assert np.isnan(features.single_token(csc_array(dense), t, least=500))
