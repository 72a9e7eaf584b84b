"""Oracles: a naive search over rules and groups."""

import numpy as np
import pytest
from streams import noisy

from tsae.scoring import rules


def test_explanations_equal_a_naive_search():
    codes, text = noisy()
    dense, fit, test = codes.toarray() > 0, text.fit, ~text.fit
    found = rules.explained(codes, text, size=3, examples=10**6, reach=2)
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
        recall, apart = says[test & y].mean(), 1 - says[test & ~y].mean()
        assert found["rule"][j] == text.names[rule]
        assert found["recall"][j] == pytest.approx(recall)
        assert found["detection"][j] == pytest.approx((recall + apart) / 2)
        assert found["precision"][j] == pytest.approx(y[test & says].mean())
        mass = codes.toarray()[:, j] * test
        assert found["detection_mass"][j] == pytest.approx(((mass * says).sum() / mass.sum() + apart) / 2)
        beside = [says[q] for p in np.flatnonzero(test & y) for q in range(max(0, p - 2), min(len(y), p + 3))
                  if text.row[q] == text.row[p] and abs(text.column[q] - text.column[p]) <= 2 and not y[q]]
        assert found["fuzzing"][j] == pytest.approx((recall + 1 - np.mean(beside)) / 2)
    assert np.isnan(found["detection"][1]) and found["explanation"][1] == "none"


def test_many_features_times_many_groups_do_not_overflow():
    """n x groups above 2^31 with ids in int32: the same groups as for few features."""
    random = np.random.default_rng(0)
    ids = np.r_[random.integers(0, 40, 2000), 49_999].astype(np.int32)
    fit, feature = random.random(2001) < 0.5, np.repeat(np.arange(3), 300)
    group = ids[random.choice(np.flatnonzero(fit), 900)]
    few, many = (rules._offer(ids, fit, feature, group, np.bincount(feature, minlength=n), 5) for n in (3, 90_000))
    assert len(few.feature) and all(np.array_equal(few[i], many[i]) for i in range(3))
    assert np.array_equal(few.gain, many.gain[:3]) and not many.gain[3:].any()


def test_counting_and_looking_up_equal_numpy():
    random = np.random.default_rng(0)
    keys = random.integers(0, 50, 200)
    for most in (50, 1 << 24):  # counted without and with sorting
        distinct, count = rules._counted(keys, most)
        assert distinct.tolist() == sorted(set(keys.tolist()))
        assert count.tolist() == [(keys == key).sum() for key in distinct]
    for ordered in (np.array([], int), np.array([0]), np.unique(random.integers(0, 60, 20))):
        assert np.array_equal(rules._isin(keys, ordered), np.isin(keys, ordered))
