"""Oracles: features planted in a synthetic stream must land where they belong on every score."""

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array
from scipy.stats import spearmanr
from streams import BIGRAM, PLACE, SKIP, TOKEN, TOPIC, noisy, planted, stream

from tsae.codes import encoded
from tsae.sae import SAE
from tsae.scoring import heldout, ladder, scores


def test_planted_features_land_where_they_belong():
    codes, text = planted()
    found = scores.scored(codes, text).set_index("feature")
    assert list(found.index) == [TOKEN, BIGRAM, SKIP, TOPIC, PLACE], "the feature that never fires is not listed"
    one, two, skip, topic, place = (found.loc[i] for i in (TOKEN, BIGRAM, SKIP, TOPIC, PLACE))
    assert one.complexity_1 < 0.02 and one.auc_1 > 0.999
    assert two.complexity_1 > 0.85 and two.r2_2 > 0.97 and two.auc_2 > 0.99 > two.auc_1
    assert skip.complexity_1 > 0.85 and skip.r2_2 < 0.2 and skip.r2_3 > 0.8 and skip.complexity_3 < 0.2
    assert all(abs(topic[f"r2_{n}"]) < 0.35 for n in (1, 2, 3))
    assert topic.complexity_1 > 0.99 and topic.complexity_3 > 0.9
    assert place.complexity_1 > 0.99 and place.complexity_3 > 0.9
    for weighting in ("peak", "drawn", "firing", "mass"):
        for feature in (one, two, skip):
            assert feature[f"tokens_{weighting}"] == pytest.approx(1) and feature[f"modal_share_{weighting}"] == 1
        assert one[f"told_{weighting}"] == pytest.approx(1, abs=0.01) and 0.3 < two[f"told_{weighting}"] < 0.8
        assert topic[f"tokens_{weighting}"] > (6 if weighting in ("peak", "drawn") else 9.5)
    assert topic.told_firing < 0.01 and place.tokens_firing > 9.5
    assert one.explanation == "the token: 'a'" and two.explanation == "the last 2 tokens: 'bc'"
    assert skip.explanation == "the token and the second before: 'd' _ 'e'"
    assert place.explanation == "the column: columns 16-23"
    for feature in (one, two, skip, place):
        assert feature.detection == feature.fuzzing == feature.rule_f1 == feature.detection_mass == 1
    assert topic.detection < 0.65 and topic.fuzzing < 0.6


def test_a_real_sae_gives_the_planted_codes():
    rows, keep, codes, tokenizer = stream(1, 40)
    text = heldout.prepare(rows, keep, tokenizer)
    x = torch.zeros(len(codes), 12)
    x[:, :6] = torch.from_numpy(codes)
    t = torch.from_numpy(text.t)
    for activation in ("relu", "topk"):
        sae = SAE(12, 6, activation, k=6, scale=0.5)
        with torch.no_grad():
            sae.W_enc.copy_(torch.eye(6, 12))
            sae.W_dec.copy_(torch.eye(6, 12))
        ours = encoded(sae, x, t, batch=100)
        assert ours.shape == codes.shape and np.allclose(ours.toarray(), codes / 0.5) and ours.nnz == (codes > 0).sum()
        assert ours.dtype == np.float32 and np.allclose(ours.toarray(), sae.encode(x, t).detach().numpy())
    found = scores.scored(ours, text).set_index("feature")
    assert found.complexity_1[TOKEN] < 0.05 and found.explanation[BIGRAM] == "the last 2 tokens: 'bc'"


def test_reliability_tells_a_score_from_noise():
    rows, keep, _, tokenizer = stream(2, 200)
    text, random = heldout.prepare(rows, keep, tokenizer), np.random.default_rng(0)
    rates = random.uniform(0.05, 0.9, 40)
    a = text.t == text.t.min()
    codes = csc_array((random.random((len(a), 40)) < np.where(a[:, None], rates, 0.05)).astype(np.float32))

    def score(codes, text):
        table = scores.scored(codes, text)
        return table.assign(noise=random.random(len(table)), flat=1.0)

    found = scores.reliability(codes, text, score).set_index("score")
    assert found.spearman["complexity_1"] > 0.9 and abs(found.spearman["noise"]) < 0.5
    assert np.isnan(found.spearman["flat"])
    first = heldout.half(text.document, 1)
    parts = [ladder.ladder(codes[mask], text.take(mask))["r2_1"] for mask in (first, ~first)]
    assert found.spearman["r2_1"] == pytest.approx(spearmanr(*parts).statistic)
    assert found.corrected["r2_1"] == pytest.approx(2 * found.spearman["r2_1"] / (1 + found.spearman["r2_1"]))


def test_no_firing_at_all_is_no_error():
    codes, text = noisy()
    assert scores.scored(csc_array(codes.shape, dtype=np.float32), text).empty
    assert scores.scored(codes, text)["feature"].tolist() == [0, 2, 3, 4, 5, 6], "feature 1 never fires"


def test_every_score_says_what_it_means():
    codes, text = planted()
    found = scores.scored(codes, text)
    assert list(found.columns[:len(scores.FIRST)]) == scores.FIRST
    told = set(scores.MEANINGS) | {"feature", "frequency", "peak_code"}  # the browser itself says the last two
    assert set(found.columns) <= told and {"nearest_cosine", "token_share"} <= told
