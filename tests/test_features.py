"""Oracles: planted features that must be found where they were put, and naive loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer
from scipy.sparse import csr_array

from tsae import features
from tsae.sae import SAE

VOCABULARY = 12


@pytest.fixture
def planted() -> SAE:
    """Four features over width 4: each reads one coordinate of the activation, and fires above 0."""
    sae = SAE(4, 4, "relu")
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4)), sae.W_dec.copy_(torch.eye(4))
    return sae


def text(generator: torch.Generator, m: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Feature 0 fires on token 3 only, feature 1 on tokens 4 and 5 alike, feature 2 anywhere, feature 3 never."""
    t = torch.randint(0, VOCABULARY, (m,), generator=generator)
    x = torch.zeros(m, 4)
    x[:, 0], x[:, 1] = 2.0 * (t == 3), 1.0 * ((t == 4) | (t == 5))
    x[:, 2] = torch.rand(m, generator=generator) * (torch.rand(m, generator=generator) < 0.3)
    x[:, 3] = -1.0
    return x, t


def test_planted_features_land_where_they_belong(planted):
    x, t = text(torch.Generator().manual_seed(0))
    scanned = features.scan(planted, x, t, VOCABULARY, top=20, batch=64)
    stats = features.token_statistics(scanned, t.numpy()).set_index("feature")
    assert list(stats.index) == [0, 1, 2], "the feature that never fires is not listed"
    assert stats["tokens_mass"][0] == pytest.approx(1) and stats["modal_token"][0] == 3 and stats["modal_share"][0] == 1
    assert 1.8 < stats["tokens_mass"][1] <= 2.0001 and stats["modal_token"][1] in (4, 5)
    assert stats["tokens_mass"][2] > 8 and stats["tokens_firing"][2] > 8
    assert stats["frequency"][0] == pytest.approx((t == 3).float().mean().item())
    assert stats["peak_code"][2] == pytest.approx(x[:, 2].max().item())


def test_scan_equals_a_naive_loop(planted):
    x, t = text(torch.Generator().manual_seed(1), 130)
    scanned = features.scan(planted, x, t, VOCABULARY, top=5, batch=32)
    count, mass = np.zeros((4, VOCABULARY)), np.zeros((4, VOCABULARY))
    for codes, token in zip(planted.encode(x).detach().numpy(), t.numpy()):
        count[:, token] += codes > 0
        mass[:, token] += codes
    assert np.array_equal(scanned.count.toarray(), count) and np.allclose(scanned.mass.toarray(), mass)
    strongest = np.sort(x[:, 2].numpy())[::-1][:5]
    assert np.allclose(scanned.best_code[2], strongest) and np.allclose(x[scanned.best[2], 2].numpy(), strongest)
    assert (scanned.best[3] == -1).all()


def test_effective_number_is_one_for_one_token_and_c_for_c_equal_ones():
    weights = csr_array(np.array([[0, 7.0, 0, 0], [2, 2, 2, 0], [0, 0, 0, 0], [0.5, 0.25, 0.25, 0]]))
    expected = [1, 3, 0, np.exp(0.5 * np.log(2) + 0.5 * np.log(4))]
    assert np.allclose(features.effective_number(weights), expected)


def test_respond_counts_inputs_over_each_threshold(planted):
    x = torch.tensor([[0.5, 3, 0, -1], [1.5, 0, 0, -1], [2.5, 1, 0, -1.0]])
    response = features.respond(planted, x, torch.arange(3), [0.0, 1.0, 2.0], top=2, batch=2)
    assert response.above.tolist() == [[3, 2, 0, 0], [2, 1, 0, 0], [1, 1, 0, 0]]
    assert response.best.tolist() == [[2, 1], [0, 2], [-1, -1], [-1, -1]]
    assert response.peak.tolist() == [2.5, 3.0, 0.0, 0.0]


def test_overlap_of_isolated_inputs_with_text(planted):
    x, t = text(torch.Generator().manual_seed(2))
    scanned = features.scan(planted, x, t, VOCABULARY)
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
    scanned = features.scan(planted, x, rows[0, 1:], 257)
    shown = features.contexts(scanned, 0, rows, places, tokenizer, before=2, after=9)
    assert shown.to_dict("records") == [dict(code=2.0, before="bc", token="X", after="def")]
