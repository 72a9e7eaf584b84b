"""Oracles: naive loops over suffixes, and dense predictions in place of the two tricks."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from streams import naive_suffix, noisy, planted

from tsae.scoring import ladder


@pytest.mark.parametrize("prior", [1.0, 3.0])
def test_the_ladder_equals_a_naive_loop(prior):
    codes, text = noisy()
    dense, fit = codes.toarray().astype(float), text.fit
    found = ladder.ladder(codes, text, prior, negatives=0)
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


def test_squares_of_predictions_equal_the_dense_ones():
    """`_squared` and `_climb` against predictions that are built for every position."""
    codes, text = noisy()
    dense, test = codes.toarray().astype(float), ~text.fit
    points = ladder._points(codes, text, np.flatnonzero(test))
    code, chance, rungs = np.zeros(len(points.code)), np.zeros(len(points.code)), []
    predicted = np.zeros(dense.shape)
    for level in range(4):
        code, chance, rung = ladder._climb(points, text, level, 2.0, code, chance)
        rungs.append(rung)
        for group in np.unique(text.ids[level]):
            its = text.ids[level] == group
            total = dense[its & text.fit].sum(axis=0) + 2 * predicted[its][0]
            predicted[its] = total / ((its & text.fit).sum() + 2)
        assert np.allclose(code, predicted[points.position, points.feature])
        weights = np.bincount(text.ids[level][test], minlength=len(rung.parent))
        assert np.allclose(ladder._squared(rungs, weights, 7), (predicted[test]**2).sum(axis=0))


def test_the_auc_equals_a_count_of_pairs():
    """`_auc`, with ties, against every pair of a firing and a silent position."""
    codes, text = noisy()
    sample = np.flatnonzero(~text.fit)[::2]
    points = ladder._points(codes, text, sample)
    chance = np.random.default_rng(0).integers(0, 4, len(points.code)) / 4  # many ties, some 0
    with np.errstate(invalid="ignore"):
        found = ladder._auc(points, chance)
    assert np.isnan(found[1])
    for j in (0, 2, 3):
        its = points.feature == j
        fired = chance[its & points.tested]
        silent = np.r_[chance[its & (points.code == 0)], np.zeros(points.calm[j])]
        assert len(silent) == (codes[sample][:, [j]].toarray() == 0).sum()
        gap = fired[:, None] - silent
        assert found[j] == pytest.approx(((gap > 0) + (gap == 0) / 2).mean())


def test_auc_from_a_sample_is_close():
    codes, text = planted()
    whole, part = ladder.ladder(codes, text, negatives=0), ladder.ladder(codes, text, negatives=2000)
    assert np.allclose(whole["r2_2"].dropna(), part["r2_2"].dropna())
    assert np.nanmax(np.abs(whole["auc_2"] - part["auc_2"])) < 0.03


def test_fewer_levels_are_the_first_of_all():
    codes, text = noisy()
    one, all_of_them = ladder.ladder(codes, text, levels=1), ladder.ladder(codes, text)
    assert list(one) == ["r2_1", "auc_1", "complexity_1"]
    assert one.equals(all_of_them[list(one)])
