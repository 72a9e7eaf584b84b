"""Oracles: planted features that must be found where they were put, and naive loops."""

import copy

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


def test_a_bar_for_each_feature_equals_a_naive_loop():
    generator, random = torch.Generator().manual_seed(4), np.random.default_rng(4)
    sae = SAE(4, 16, "topk", 3).start(torch.zeros(4), seed=4).eval()
    x = torch.randn(60, 4, generator=generator)
    bars = random.random(16)
    bars[5] = np.inf
    response = features.respond(sae, x, torch.zeros(60, dtype=torch.long), [0.4, bars])
    codes = sae.encode(x).detach().numpy()
    for feature in range(16):
        for bar, above in zip((0.4, bars[feature]), response.above):
            assert above[feature] == sum(codes[i, feature] > bar for i in range(60))
    assert response.above[0, 5] > 0 and response.above[1, 5] == 0 and response.above[1].sum() > 20


def test_mean_codes_equal_a_naive_loop(planted):
    x, t = text(torch.Generator().manual_seed(3), 400)
    found, codes = features.mean_codes(encoded(planted, x, t)), planted.encode(x).detach().numpy()
    for feature in range(4):
        fired = [code for code in codes[:, feature] if code > 0]
        assert found[feature] == (pytest.approx(np.mean(fired), rel=1e-6) if fired else np.inf)
    assert (features.scan(planted, x, t).mean == found).all() and np.isinf(found[3])


def bars_of(scanned: features.Scan) -> list:
    """The bars of notebook 02: absolute, any firing, half of a feature's mean on text, its mean."""
    return [1.5, 0.0, scanned.mean / 2, scanned.mean]


def test_a_feature_of_one_token_answers_to_no_other(planted):
    """On text feature 0 is strong on token 3 and now and then weak on token 7; feature 3 is silent there."""
    t = torch.tensor([3] * 8 + [7] * 2 + [1] * 10)
    x = torch.zeros(20, 4)
    x[:8, 0], x[8:10, 0] = 2.0, 0.25
    scanned = features.scan(planted, x, t)
    strong, weak = torch.tensor([[2.0, 0, 0, 9.0]]), torch.tensor([[0.25, 0, 0, 9.0]])
    for alone, token, answers in ((strong, 3, [1, 1, 1, 1]), (weak, 7, [0, 1, 0, 0])):
        last = torch.tensor([token])
        response = features.respond(planted, alone, last, bars_of(scanned))
        assert response.above[:, 0].tolist() == answers and response.above[:, 3].tolist() == [1, 1, 0, 0]
        for which, answer in enumerate(answers):  # feature 3 is not live: it counts at no bar
            found = features.overlap(response, scanned, last.numpy(), t.numpy(), which)
            assert (found["live"], found["answering"]) == (1, answer)


def test_own_bars_do_not_depend_on_the_size_of_codes(planted):
    """The same SAE with feature 2's encoder row 4 times as long and its decoder row a quarter."""
    x, t = text(torch.Generator().manual_seed(3), 400)
    larger = copy.deepcopy(planted)
    with torch.no_grad():
        larger.W_enc[2] *= 4
        larger.W_dec[2] /= 4
    assert torch.equal(larger(x, t), planted(x, t))
    first, second = (features.respond(sae, x[:50], t[:50], bars_of(features.scan(sae, x, t))).above
                     for sae in (planted, larger))
    assert (first[1:] == second[1:]).all() and 0 < first[3, 2] < first[2, 2] < first[1, 2]
    assert first[0, 2] == 0 < second[0, 2], "no code of a feature that draws from [0, 1] is above 1.5"


def test_overlap_equals_a_naive_loop():
    generator, random = torch.Generator().manual_seed(5), np.random.default_rng(5)
    sae = SAE(4, 32, "topk", 2).start(torch.zeros(4), seed=5).eval()
    x, alone = torch.randn(25, 4, generator=generator), torch.randn(30, 4, generator=generator)
    t, last = random.integers(0, 5, 25), random.integers(0, 5, 30)
    scanned = features.scan(sae, x, torch.from_numpy(t))
    response = features.respond(sae, alone, torch.from_numpy(last), bars_of(scanned))
    for which in range(4):
        live, same, shared = 0, [], []
        for feature in range(32):
            seen = [t[position] for position in scanned.best[feature] if position >= 0][:10]
            live += bool(seen)
            if seen and response.above[which, feature] > 0:
                inputs = [last[i] for i in response.best[feature] if i >= 0]
                same.append(inputs[0] == seen[0])
                shared.append(bool(set(inputs) & set(seen)))
        found = features.overlap(response, scanned, last, t, which)
        assert found == dict(live=live, answering=len(same) / live, top_is_top=np.mean(same), any_shared=np.mean(shared))
        assert 0 < np.mean(same) < np.mean(shared) < 1 and live < 32


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
