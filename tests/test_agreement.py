"""Oracles: textbook agreement, naive loops, and studies simulated with a known answer."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from tsae.study import agreement

NONE = np.nan
CANONICAL = np.array([[1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],  # Krippendorff 2011, example C
                      [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
                      [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
                      [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE]])


@pytest.mark.parametrize("metric,value", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_textbook(metric, value):
    assert round(agreement.alpha(CANONICAL, metric), 3) == value


def test_interval_alpha_equals_a_naive_loop():
    generator = np.random.default_rng(0)
    ratings = generator.integers(1, 11, (4, 30)).astype(float)
    ratings[generator.random(ratings.shape) < 0.3] = np.nan
    units = [unit for unit in (column[~np.isnan(column)] for column in ratings.T) if len(unit) > 1]
    every = np.concatenate(units)
    within = sum((a - b) ** 2 / (len(unit) - 1) for unit in units for a in unit for b in unit) / len(every)
    overall = sum((a - b) ** 2 for a in every for b in every) / (len(every) * (len(every) - 1))
    assert agreement.alpha(ratings, "interval") == pytest.approx(1 - within / overall)
    assert agreement.alpha(np.tile(ratings[:1], (2, 1))) == pytest.approx(1), "a scorer agrees with a copy"
    assert np.isnan(agreement.alpha(np.full((2, 5), 3.0))), "nothing to tell apart"


def test_kappa_equals_the_table_of_counts():
    generator = np.random.default_rng(0)
    a = generator.integers(1, 11, 60)
    b = np.clip(a + generator.integers(-3, 4, 60), 1, 10)
    seen, weights = np.zeros((10, 10)), np.subtract.outer(np.arange(10), np.arange(10)) ** 2
    for i, j in zip(a, b):
        seen[i - 1, j - 1] += 1 / 60
    expected = 1 - (weights * seen).sum() / (weights * np.outer(seen.sum(1), seen.sum(0))).sum()
    assert agreement.kappa(a, b) == pytest.approx(expected)
    assert agreement.kappa([*a, np.nan, 3], [*b, 4, np.nan]) == pytest.approx(expected), "what one left out is left out"
    assert agreement.kappa([1, 1, 2, 2], [1, 2, 1, 2]) == 0 and agreement.kappa([1, 2], [2, 1]) == -1
    assert np.isnan(agreement.kappa([3, 3], [3, 3])) and np.isnan(agreement.kappa([np.nan], [1]))


# comparison

def ratings(generator, effect: float, scorers: int = 3, n: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Crossed random effects: features, the scorers' strictness, each scorer's own liking for a source, and noise."""
    first = np.arange(2 * n) < n
    given = (5 + effect * first + generator.normal(0, 1, 2 * n) + generator.normal(0, 2, (scorers, 1))
             + generator.normal(0, 0.2, (scorers, 1)) * first + generator.normal(0, 0.7, (scorers, 2 * n)))
    given[generator.random(given.shape) < 0.1] = np.nan
    return given, first


def test_the_difference_is_least_squares_with_a_level_for_each_scorer():
    given, first = ratings(np.random.default_rng(0), 1.0)
    scorer, feature = np.nonzero(~np.isnan(given))
    design = np.column_stack([first[feature], *(scorer == s for s in range(3))]).astype(float)
    expected = np.linalg.lstsq(design, given[scorer, feature], rcond=None)[0][0]
    assert agreement.contrast(given, first, draws=10)["difference"] == pytest.approx(expected)
    strict = given + np.array([[0], [50], [-50]])
    assert agreement.contrast(strict, first, draws=200) == pytest.approx(agreement.contrast(given, first, draws=200))


def test_p_is_uniform_where_there_is_no_difference_and_the_interval_covers():
    generator, p, covered = np.random.default_rng(0), [], []
    for _ in range(200):
        given, first = ratings(generator, 0.0, scorers=2)
        found = agreement.contrast(given, first, draws=299, seed=int(generator.integers(1 << 30)))
        p.append(found["p"])
        covered.append(found["low"] <= 0 <= found["high"])
    assert 0.9 <= np.mean(covered) <= 0.99
    assert np.abs(np.quantile(p, [0.1, 0.25, 0.5, 0.75, 0.9]) - [0.1, 0.25, 0.5, 0.75, 0.9]).max() < 0.1
    assert np.mean(np.array(p) <= 0.05) < 0.1


def test_p_equals_all_permutations_and_stays_within_strata():
    given, first = np.array([[1.0, 2, 4, 3, 6, 8]]), np.array([0, 0, 1, 0, 1, 1], bool)
    sums = np.array([2 * given[0, list(labels)].sum() - 24 for labels in product([False, True], repeat=6)
                     if sum(labels) == 3])
    exact = (np.abs(sums) >= abs(2 * 18 - 24)).mean()
    assert agreement.contrast(given, first, draws=5000)["p"] == pytest.approx(exact, abs=0.02)
    paired = agreement.contrast(given, first, np.array([0, 1, 0, 2, 1, 2]), draws=5000)
    assert paired["p"] == pytest.approx(2 / 8, abs=0.02), "three pairs have eight labellings, two as extreme"
    assert np.isnan(agreement.contrast(np.array([[1.0, 2, 3]]), np.array([1, 0, 0], bool))["low"])


@pytest.mark.parametrize("strata", [np.zeros(9), np.array([2, 0, 1, 1, 0, 2, 2, 0, 0])], ids=["one", "three"])
def test_labels_are_permuted_as_a_loop_over_draws_and_strata_does_it(strata):
    first = np.array([1, 0, 0, 1, 1, 0, 1, 0, 0], bool)
    label = agreement._relabelled(np.random.default_rng(3), first, strata, 40)
    lots = np.random.default_rng(3).random((40, 9))
    for row, lot in zip(label, lots):
        for stratum in set(strata):
            places = [i for i in range(9) if strata[i] == stratum]
            shuffled = sorted(places, key=lambda i: lot[i])
            assert [row[i] for i in places] == [first[i] for i in shuffled]
    assert len({tuple(row) for row in label.tolist()}) > 5


def test_sources_that_no_scorer_saw_both_of_are_not_compared():
    given = np.array([[1.0, 2, 1, np.nan, np.nan, np.nan], [np.nan, np.nan, np.nan, 8, 9, 9]])
    found = agreement.contrast(given, np.array([1, 1, 1, 0, 0, 0], bool), draws=50)
    assert found.pop("p") > 0.5 and np.isnan(list(found.values())).all()


def table(scorer: str, features: int, complexity, repeats: int = 0) -> pd.DataFrame:
    """Scores as `form.load` gives them: two sources, two seeds, the first `repeats` features twice."""
    keys = list(product(("tall", "small"), (0, 1), range(features)))
    rows = pd.DataFrame([*keys, *keys[:repeats]], columns=agreement.KEY)
    generator = np.random.default_rng(len(scorer))
    return rows.assign(scorer=scorer, interpretability=generator.integers(1, 11, len(rows)),
                       complexity=complexity(rows), repeat=rows.duplicated(agreement.KEY))


def test_analysis_finds_what_was_planted():
    def levels(rows):
        return 2 + rows["feature"] % 3 + 3 * (rows["source"] == "tall")

    ada, robert = (table(scorer, 10, levels, repeats=10) for scorer in ("ada", "robert"))
    robert["complexity"] += 2  # the more lenient of the two
    scores = pd.concat([ada, robert], ignore_index=True)
    found = agreement.analyse(scores, draws=500)
    comparison = found["comparison"].set_index("scale")
    assert list(comparison["source"]) == ["small"] * 2 and list(comparison["against"]) == ["tall"] * 2
    assert comparison.loc["complexity", "difference"] == pytest.approx(-3)
    assert comparison.loc["complexity", "high"] < -2 and comparison.loc["complexity", "p"] < 0.01
    assert comparison.loc["interpretability", "low"] < 0 < comparison.loc["interpretability", "high"]
    repeats = found["repeats"].set_index(["scale", "scorer"])
    assert set(repeats.index.levels[1]) == {"ada", "robert", "all"} and repeats.loc[("complexity", "all"), "repeats"] == 20
    assert (repeats.loc["complexity", "same"] == 1).all() and (repeats.loc["interpretability", "kappa"] < 0.7).all()
    agreed = found["agreement"].set_index(["scale", "measure"])["value"]
    wide = scores[~scores["repeat"]].pivot(index=agreement.KEY, columns="scorer", values="complexity")
    assert agreed["complexity", "weighted kappa"] == pytest.approx(agreement.kappa(wide["ada"], wide["robert"]))
    assert agreed["complexity", "alpha, interval"] == pytest.approx(agreement.alpha(wide.to_numpy(float).T, "interval"))
    assert agreed["complexity", "alpha, ordinal"] > 0.3 > abs(agreed["interpretability", "alpha, ordinal"])
    assert found["means"]["count"].eq(20).all() and len(found["means"]) == 8
    binned = scores.merge(scores[agreement.KEY].drop_duplicates().assign(bin=lambda table: table["feature"] % 3))
    kept = agreement.analyse(binned, draws=500)["comparison"].set_index("scale")
    assert kept["difference"].to_numpy() == pytest.approx(comparison["difference"].to_numpy())
    with pytest.raises(ValueError, match="no scores"):
        agreement.analyse(scores[:0])


def test_one_scorer_half_way_can_be_analysed():
    scores = table("ada", 5, lambda rows: 5).assign(interpretability=5)
    found = agreement.analyse(scores.sample(12, random_state=0), draws=50)
    assert found["comparison"]["difference"].eq(0).all() and found["comparison"]["p"].eq(1).all()
    assert found["agreement"]["value"].isna().all()


# power

def test_the_flattest_distribution_has_the_mean_and_the_largest_entropy():
    k = np.arange(1, 11)
    assert agreement.flattest(5.5) == pytest.approx(np.full(10, 0.1))
    for mean in (1.5, 6.9, 7.2):
        chances = agreement.flattest(mean)
        assert chances.sum() == pytest.approx(1) and chances @ k == pytest.approx(mean)
        aside = chances + 1e-4 * np.array([1, -1, -1, 1, 0, 0, 0, 0, 0, 0])  # keeps the sum and the mean
        assert -(aside * np.log(aside)).sum() < -(chances * np.log(chances)).sum()


def test_power_grows_with_features_and_scorers_and_agrees_with_the_normal_formula():
    means = agreement.PAPER["interpretability"]["tokenized"], agreement.PAPER["interpretability"]["baseline"]
    grid = [20, 60, 180, 400, 550, 700, 900]
    curve, three = (agreement.power(means, grid, scorers, simulations=300, draws=199) for scorers in (1, 3))
    for each in (curve, three):
        steps = np.diff(each["power"])
        assert (steps > -2 * each["error"].to_numpy()[:-1]).all() and each["error"].between(0, 0.03).all()
    variance = sum(agreement.flattest(mean) @ (np.arange(1, 11) - mean) ** 2 for mean in means)
    expected = variance * (1.96 + 0.8416) ** 2 / (means[0] - means[1]) ** 2
    assert agreement.enough(curve) == pytest.approx(expected, rel=0.15) and agreement.enough(three) < agreement.enough(curve)
    assert curve.equals(agreement.power(means, grid, simulations=300, draws=199))


def test_power_without_a_difference_is_the_level_and_the_papers_is_seen_with_few():
    assert agreement.power((5.0, 5.0), [10, 40], simulations=400)["power"].between(0.02, 0.085).all()
    means = agreement.PAPER["complexity"]["tokenized"], agreement.PAPER["complexity"]["baseline"]
    curve = agreement.power(means, [3, 4, 5, 6, 8, 10])
    assert curve["power"].iloc[0] == 0, "20 labellings of three and three cannot reach 5 % on both sides"
    assert 4 <= agreement.enough(curve) <= 7 and curve["power"].iloc[-1] > 0.98


def test_enough_is_where_the_curve_stays_at_the_target():
    def curve(*power):
        return pd.DataFrame(dict(features=np.arange(1, len(power) + 1) * 10, power=power))

    assert agreement.enough(curve(0.2, 0.9, 0.7, 0.8, 0.9)) == 40 and agreement.enough(curve(0.2, 0.6, 1.0)) == 25
    assert agreement.enough(curve(0.9, 1.0)) == 10 and np.isnan(agreement.enough(curve(0.9, 0.7)))
