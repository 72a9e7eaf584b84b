"""Oracles: features planted in a synthetic stream that must land where they belong on every score, and naive loops."""

import re
from collections import Counter, defaultdict
from math import log2

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer
from scipy.sparse import csc_array
from scipy.stats import spearmanr

from tsae import features, heldout, scores
from tsae.sae import SAE

TOKEN, BIGRAM, SKIP, TOPIC, PLACE, DEAD = range(6)


def stream(seed: int = 0, N: int = 320, T: int = 64, letters: str = "abcdefghij"):
    """Rows of random letters (each a document) and their planted codes (m, 6)."""
    random, tokenizer = np.random.default_rng(seed), byte_tokenizer()
    ids = np.array(tokenizer.encode(letters))
    rows = np.c_[np.zeros((N, 1), int), random.choice(ids, (N, T - 1))]
    letter = dict(zip(letters, ids))
    shifted = [np.pad(rows, ((0, 0), (by, 0)))[:, :T] for by in range(3)]
    topical = (random.random((N, 1)) < 0.4) & (random.random((N, T)) < 0.3)
    place = np.tile((np.arange(T) >= 16) & (np.arange(T) < 24), (N, 1))
    fires = np.stack([rows == letter["a"], (shifted[1] == letter["b"]) & (rows == letter["c"]),
                      (shifted[2] == letter["d"]) & (rows == letter["e"]), topical, place, place & False], -1)
    codes = fires * random.uniform(0.9, 1.1, fires.shape).astype(np.float32)
    rows = torch.from_numpy(rows).int()
    keep = rows != 0
    return rows, keep, codes[keep.numpy()].astype(np.float32), tokenizer


@pytest.fixture(scope="module")
def planted():
    rows, keep, codes, tokenizer = stream()
    return rows, keep, csc_array(codes), heldout.prepare(rows, keep, tokenizer)


def noisy(seed: int = 3, n: int = 7):
    """A small text with inner document ends and arbitrary codes, for the loops."""
    random, tokenizer = np.random.default_rng(seed), byte_tokenizer()
    ids = np.array(tokenizer.encode("abc\n"))
    rows = np.c_[np.zeros((30, 1), int), random.choice(ids, (30, 15), p=[0.5, 0.3, 0.15, 0.05])]
    rows[random.random(rows.shape) < 0.05] = 0
    rows = torch.from_numpy(rows).int()
    keep = rows != 0
    text = heldout.prepare(rows, keep, tokenizer)
    chance = 0.1 + 0.4 * (text.t == ids[1])[:, None]
    codes = random.exponential(1, (len(text.t), n)) * (random.random((len(text.t), n)) < chance)
    codes[:, 0] = np.round(codes[:, 0])  # ties
    codes[:, 1] = 0
    return rows, keep, csc_array(codes.astype(np.float32)), text


def test_planted_features_land_where_they_belong(planted):
    _, _, codes, text = planted
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
            sae.W_enc.copy_(torch.eye(6, 12)), sae.W_dec.copy_(torch.eye(6, 12))
        ours = scores.encoded(sae, x, t, batch=100)
        assert ours.shape == codes.shape and np.allclose(ours.toarray(), codes / 0.5) and ours.nnz == (codes > 0).sum()
        assert ours.dtype == np.float32 and np.allclose(ours.toarray(), sae.encode(x, t).detach().numpy())
    found = scores.scored(ours, text).set_index("feature")
    assert found.complexity_1[TOKEN] < 0.05 and found.explanation[BIGRAM] == "the last 2 tokens: 'bc'"


def naive_suffix(text, p: int, n: int) -> tuple:
    """The last n tokens of a position; the start of its document counts as one, nothing before it."""
    told = []
    for at in range(p, p - n, -1):
        told.append(text.t[at])
        if at == 0 or text.row[at - 1] != text.row[at] or text.column[at - 1] != text.column[at] - 1:
            told.append("start")
            break
    return tuple(told[:n])


def test_suffix_groups_equal_tuples():
    _, _, _, text = noisy()
    for n in range(1, 5):
        names = [naive_suffix(text, p, n) for p in range(len(text.t))]
        pairs = set(zip(names, text.ids[n - 1].tolist()))
        assert len(pairs) == len(set(names)) == len({group for _, group in pairs})
        nested = sorted(zip(text.ids[n - 1].tolist(), text.ids[0].tolist()))
        assert [token for _, token in nested] == sorted(token for _, token in nested), "nested"
    for rule, offset in ((4, 1), (5, 2)):
        names = [(naive_suffix(text, p, offset + 1) + ("start",))[offset] for p in range(len(text.t))]
        names = list(zip(names, text.t if rule == 5 else names))
        assert len(set(zip(names, text.ids[rule]))) == len(set(names)) == len(set(text.ids[rule]))


def test_documents_are_split_whole_and_in_half():
    _, _, _, text = noisy()
    assert 0.4 < text.fit.mean() < 0.6
    for document in np.unique(text.document):
        assert len(np.unique(text.fit[text.document == document])) == 1
    assert len(np.unique(text.document)) > 20 and len(np.unique(text.document)) != len(np.unique(text.row))


def test_attributes_know_the_text():
    lines = ["See `foo_bar` now. Then go", "", "Parameters", "----------", "x1 : int (or None)", "Returns",
             "    fooBar", ">>> a.b"]
    tokenizer = byte_tokenizer()
    rows = torch.tensor([[0, *tokenizer.encode("\n".join(lines))]])
    text = heldout.prepare(rows, rows != 0, tokenizer)
    said = "".join(text.word(int(i)) for i in text.t)
    assert said == "\n".join(lines)

    def marked(name: str) -> str:
        return "".join(letter if on else "·" for letter, on in zip(said, text.ids[text.names.index(name)])).strip("·")

    assert marked("inside backticks").rstrip("`") == "foo_bar" and marked("inside brackets") == "or None"
    assert marked("in a parameter list").startswith("----") and marked("in a parameter list").endswith("or None)")
    assert marked("in code") == ">>> a.b" and marked("in camelCase") == "fooBar" and marked("in a dotted name") == "b"
    assert marked("in indentation") == "    " and marked("a number") == "1" and marked("in snake_case") == "foo_bar"
    assert re.sub("·+", " ", marked("first of a sentence")) == "S T P"
    occurrence = {name: text.ids[text.names.index(name)].astype(bool) for name in heldout.OCCURRENCES}
    for i, token in enumerate(text.t):
        before = int((text.t[:i] == token).sum())
        assert [bool(flag[i]) for flag in occurrence.values()] == [before == 0, before == 1, before > 1]


@pytest.mark.parametrize("prior", [1.0, 3.0])
def test_the_ladder_equals_a_naive_loop(prior):
    _, _, codes, text = noisy()
    dense, fit = codes.toarray().astype(float), text.fit
    found = scores.ladder(codes, text, prior, negatives=0)
    predicted = np.zeros((2, len(text.t), codes.shape[1]))
    for n in range(1, 5):
        names = [naive_suffix(text, p, n) for p in range(len(text.t))]
        sums, seen = defaultdict(lambda: np.zeros((2, codes.shape[1]))), Counter()
        for p in np.flatnonzero(fit):
            sums[names[p]] += np.stack([dense[p], dense[p] > 0])
            seen[names[p]] += 1
        predicted = np.stack([(sums[name] + prior * predicted[:, p]) / (seen[name] + prior)
                              for p, name in enumerate(names)], axis=1)
        for j in range(codes.shape[1]):
            y, (code, chance) = dense[~fit, j], predicted[:, ~fit, j]
            if not (y > 0).any():
                assert np.isnan(found[f"r2_{n}"][j]) and np.isnan(found[f"auc_{n}"][j])
                continue
            assert found[f"r2_{n}"][j] == pytest.approx(1 - ((y - code)**2).sum() / ((y - y.mean())**2).sum())
            gap = np.round(chance[y > 0][:, None] - chance[y == 0], 12)
            assert found[f"auc_{n}"][j] == pytest.approx(((gap > 0) + (gap == 0) / 2).mean(), abs=1e-6)
    assert np.allclose(found["complexity_3"].dropna(), np.clip(1 - found["r2_3"].dropna(), 0, 1))


def test_auc_from_a_sample_is_close(planted):
    _, _, codes, text = planted
    whole, part = scores.ladder(codes, text, negatives=0), scores.ladder(codes, text, negatives=2000)
    assert np.allclose(whole["r2_2"].dropna(), part["r2_2"].dropna())
    assert np.nanmax(np.abs(whole["auc_2"] - part["auc_2"])) < 0.03


def test_token_statistics_equal_a_naive_loop():
    _, _, codes, text = noisy()
    dense, t, m = codes.toarray().astype(float), text.t, len(text.t)
    found = scores.token_statistics(codes, text, top=20)
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


def test_token_statistics_agree_with_a_scan(planted):
    """The same numbers as features.token_statistics, which reads activations instead of codes."""
    rows, keep, codes, text = planted
    sae = SAE(6, 6, "relu")
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(6))
    t = torch.from_numpy(text.t)
    old = features.token_statistics(features.scan(sae, torch.from_numpy(codes.toarray()), t, 257), text.t)
    new = scores.token_statistics(codes, text).loc[old["feature"]].reset_index(drop=True)
    for name in ("tokens_peak", "tokens_firing", "tokens_mass", "modal_token"):
        assert np.allclose(old[name], new[name])
    assert np.allclose(old["modal_share"], new["modal_share_mass"])


def test_explanations_equal_a_naive_search():
    _, _, codes, text = noisy()
    dense, fit, held = codes.toarray() > 0, text.fit, ~text.fit
    found = scores.explained(codes, text, size=3, examples=10**6, reach=2)
    for j in (0, 2, 3, 4):
        y, options = dense[:, j], []
        for rule, ids in enumerate(text.ids):
            gains = {}
            for group in np.unique(ids[fit]):
                inside = fit & (ids == group)
                gain = (inside & y).sum() / (fit & y).sum() - (inside & ~y).sum() / (fit & ~y).sum()
                if (inside & y).sum() > 1 and gain > 0:
                    gains[group] = gain
            groups = sorted(gains, key=lambda group: -gains[group])[:3]
            says = np.isin(ids, groups)
            f1 = 2 * (fit & y & says).sum() / ((fit & y).sum() + (fit & says).sum()) - 0.001 * len(groups)
            options.append((sum(gains[group] for group in groups), f1, rule, says))
        near_best = [option for option in options if option[0] >= max(options, key=lambda o: o[0])[0] - 0.02]
        _, _, rule, says = max(near_best, key=lambda option: (option[1], -option[2]))
        recall, apart = says[held & y].mean(), 1 - says[held & ~y].mean()
        assert found["rule"][j] == text.names[rule]
        assert found["recall"][j] == pytest.approx(recall)
        assert found["detection"][j] == pytest.approx((recall + apart) / 2)
        assert found["precision"][j] == pytest.approx(y[held & says].mean())
        mass = codes.toarray()[:, j] * held
        assert found["detection_mass"][j] == pytest.approx(((mass * says).sum() / mass.sum() + apart) / 2)
        beside = [says[q] for p in np.flatnonzero(held & y) for q in range(max(0, p - 2), min(len(y), p + 3))
                  if text.row[q] == text.row[p] and abs(text.column[q] - text.column[p]) <= 2 and not y[q]]
        assert found["fuzzing"][j] == pytest.approx((recall + 1 - np.mean(beside)) / 2)
    assert np.isnan(found["detection"][1]) and found["explanation"][1] == "none"


def test_spread_is_even_over_ranks(planted):
    _, _, codes, text = planted
    for each in (1, 4, 10**6):
        chosen = scores.spread(codes, text.fit, each)
        p, j, v = scores.firings(codes)
        for feature in range(6):
            mine = np.sort(v[(j == feature) & text.fit[p]])[::-1]
            its = np.sort(v[chosen[j[chosen] == feature]])[::-1]
            assert len(its) == min(each, len(mine)) and text.fit[p[chosen]].all()
            if each == 4 and len(mine) > 4:
                ranks = np.searchsorted(-mine, -its) / len(mine)
                assert np.allclose(ranks, [1 / 8, 3 / 8, 5 / 8, 7 / 8], atol=1.5 / len(mine))


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
    parts = [scores.ladder(codes[mask], text.take(mask))["r2_1"] for mask in (first, ~first)]
    assert found.spearman["r2_1"] == pytest.approx(spearmanr(*parts).statistic)
    assert found.corrected["r2_1"] == pytest.approx(2 * found.spearman["r2_1"] / (1 + found.spearman["r2_1"]))


def test_no_firing_at_all_is_no_error():
    _, _, codes, text = noisy()
    assert scores.scored(csc_array(codes.shape, dtype=np.float32), text).empty
    assert isinstance(scores.scored(codes, text), pd.DataFrame)


def test_every_score_says_what_it_means(planted):
    _, _, codes, text = planted
    found = scores.scored(codes, text)
    assert list(found.columns[:len(scores.FIRST)]) == scores.FIRST
    told = set(scores.MEANINGS) | {"feature", "frequency", "peak_code"}  # the browser itself says the last two
    assert set(found.columns) <= told and {"nearest_cosine", "token_share"} <= told
