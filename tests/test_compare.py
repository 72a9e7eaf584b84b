"""Oracles: comparisons whose answer is planted, and loops over seeds, bins and fronts."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tsae import evaluate
from tsae.scoring import compare


def sweep(score, seeds=(0, 1, 2), settings=(4, 8, 16), n=200, gain=1.0) -> pd.DataFrame:
    """Features of planted SAEs: score(kind, log10 frequency, k, noise); the second kind has `gain` x the first's
    nmse."""
    random, parts = np.random.default_rng(0), []
    for kind in (0, 1):
        for k in settings:
            for seed in seeds:
                often = random.random(n) < 0.3 + 0.4 * kind  # more of the second's features fire often
                logs = np.where(often, -1.4, -3.6) + random.uniform(-0.2, 0.2, n)
                found = score(kind, logs, k, random.normal(0, 0.1, n))
                parts.append(pd.DataFrame(dict(table=["without", "with"][kind], seed=seed, k=k, frequency=10**logs,
                                               l0=float(k), nmse=gain**kind / k, score=found)))
    return pd.concat(parts, ignore_index=True)


def test_views_agree_on_a_true_difference():
    found = compare.compare(sweep(lambda kind, logs, k, noise: 0.3 * kind + noise), ["score"], draws=300)
    assert found["view"].tolist() == list(compare.VIEWS) and (found["says"] == "higher").all()
    assert found["difference"].tolist() == pytest.approx([0.3] * 4, abs=0.03)
    assert (found["low"] < 0.31).all() and (found["high"] > 0.29).all() and (found["low"] > 0.2).all()
    assert set(found["verdict"]) == {"with: higher in every view"}
    none = compare.compare(sweep(lambda kind, logs, k, noise: noise), ["score"], draws=300)
    assert (none["difference"].abs() < 0.03).all()


def test_views_disagree_where_frequency_or_error_explains_it_all():
    by_frequency = sweep(lambda kind, logs, k, noise: (logs > -2) + noise)
    by_frequency = compare.compare(by_frequency, ["score"], draws=300).set_index("view")
    assert by_frequency.says["overall"] == "higher" and by_frequency.says["within frequency bins"] == "not resolved"
    assert by_frequency.verdict["overall"].startswith("with: views disagree: higher overall")
    # The score depends on the error alone: the second kind has half the first's at the same k.
    by_error = sweep(lambda kind, logs, k, noise: np.log(0.5**kind / k) + noise / 10, gain=0.5)
    by_error = compare.compare(by_error, ["score"], at=8, draws=300).set_index("view")
    assert by_error.difference["overall"] == pytest.approx(np.log(0.5), abs=0.02)
    assert by_error.difference["at equal L0"] == pytest.approx(np.log(0.5), abs=0.02)
    assert by_error.difference["at equal nmse"] == pytest.approx(0, abs=0.02)
    assert "views disagree" in by_error.verdict.iloc[0]


def test_intervals_equal_those_of_a_naive_loop():
    table = sweep(lambda kind, logs, k, noise: noise + 0.2 * kind, settings=(8,))
    table["score"] += table["seed"] * np.where(table["table"] == "with", 0.05, -0.02)
    table.loc[::17, "score"] = np.nan
    found = compare.compare(table, ["score"]).set_index("view")
    assert found.says["at equal L0"] == "not comparable" and np.isnan(found.low["at equal L0"])
    means = table.groupby(["seed", "table"])["score"].mean().unstack()
    value, low, high = evaluate.interval(means["with"] - means["without"])
    assert (found.difference["overall"], found.low["overall"], found.high["overall"]) == pytest.approx((value, low, high))
    assert found.says["overall"] == ("higher" if low > 0 else "not resolved")


def test_an_interval_is_never_narrower_than_the_features_of_one_seed_allow():
    table = sweep(lambda kind, logs, k, noise: noise, seeds=(0, 1, 2), settings=(8,))
    again = table[table["seed"] == 0]  # three seeds that agree by accident
    table = pd.concat([again.assign(seed=seed) for seed in (0, 1, 2)])
    found = compare.compare(table, ["score"], draws=2000).set_index("view")
    variance = again.groupby("table")["score"].agg(lambda values: values.var(ddof=0) / len(values)).sum()
    half = stats.t.ppf(0.975, 2) * (variance / 3) ** 0.5
    assert found.high["overall"] - found.difference["overall"] == pytest.approx(half, rel=0.1)


def test_seeds_that_differ_by_themselves_seldom_look_like_kinds_that_differ():
    random, called = np.random.default_rng(0), 0
    for _ in range(60):
        table = sweep(lambda kind, logs, k, noise: noise + random.normal(0, 0.05), settings=(8,), n=100)
        called += compare.compare(table, ["score"], draws=50).set_index("view").says["overall"] != "not resolved"
    assert called <= 9, "3 of 60 are expected at 95 %; 10 or more come once in 2000 times"


def test_bins_are_those_of_a_loop():
    table = sweep(lambda kind, logs, k, noise: kind * logs + noise, settings=(8,))
    found = compare.compare(table, ["score"], bins=12, least=20, draws=10).set_index("view")
    logs = np.log10(table["frequency"])
    which = np.digitize(logs, np.linspace(logs.min(), logs.max(), 13)[1:-1])
    cells = table.groupby(["table", which, "seed"])["score"]
    means = cells.mean().groupby(level=[0, 1]).mean().unstack(0)
    counts = cells.size().unstack(level=[0, 2], fill_value=0)
    common = counts.min(axis=1) >= 20
    assert common.any() and not common.all()
    gaps, weights = (means["with"] - means["without"])[common], counts.sum(axis=1)[common]
    assert found.difference["within frequency bins"] == pytest.approx((gaps * weights).sum() / weights.sum())
    assert found.over["within frequency bins"] == f"{common.sum()} of 12 bins"


def test_a_small_bin_that_is_drawn_empty_spoils_no_interval():
    table = sweep(lambda kind, logs, k, noise: 0.3 * kind + noise, settings=(8,))
    rare = table["frequency"] < 1e-3
    few = table[rare].groupby(["table", "seed"]).head(5)  # all are left out in one draw of 150
    found = compare.compare(pd.concat([table[~rare], few]), ["score"], bins=2, draws=1000).set_index("view")
    assert found.over["within frequency bins"] == "2 of 2 bins" and found.says["within frequency bins"] == "higher"


def test_one_seed_gives_no_interval():
    found = compare.compare(sweep(lambda kind, logs, k, noise: 0.3 * kind + noise, seeds=(0,)), ["score"], draws=10)
    assert (found["says"] == "not comparable").all() and found["difference"].notna().all()


def test_a_comparison_of_one_kind_is_refused():
    table = sweep(lambda kind, logs, k, noise: noise)
    with pytest.raises(ValueError, match="two kinds"):
        compare.compare(table[table["table"] == "with"], ["score"])
    with pytest.raises(ValueError, match="no seed"):
        compare.compare(table[(table["table"] == "with") ^ (table["seed"] == 1)], ["score"])


def test_fronts_are_those_of_a_loop_over_seeds():
    random = np.random.default_rng(4)
    table = sweep(lambda kind, logs, k, noise: noise + 0.2 * kind + 1 / k)
    one = table.groupby(["table", "seed", "k"], sort=False)
    table["l0"] *= one["l0"].transform(lambda values: 1 + 0.5 * random.random())
    table["nmse"] *= one["nmse"].transform(lambda values: 1 + 0.2 * random.random())
    found = compare.compare(table, ["score"], draws=10).set_index("view")
    points = one[["score", "l0", "nmse"]].mean().reset_index()
    for view, column in (("at equal L0", "l0"), ("at equal nmse", "nmse")):
        points["x"] = np.log(points[column])
        fronts = [part.sort_values("x") for _, part in points.groupby(["table", "seed"])]
        low, high = max(part["x"].min() for part in fronts), min(part["x"].max() for part in fronts)
        grid = np.linspace(low, high, 17)
        means = {}
        for part in fronts:
            means.setdefault(part["table"].iloc[0], []).append(np.interp(grid, part["x"], part["score"]).mean())
        assert found.loc[view, ["without", "with"]].tolist() == pytest.approx(
            [np.mean(means["without"]), np.mean(means["with"])])
        assert found.over[view] == f"{column} {np.exp(low):.3g} to {np.exp(high):.3g}"


def test_resampled_means_are_those_of_features_drawn_one_by_one():
    random = np.random.default_rng(2)
    cell = pd.DataFrame(dict(frequency=10**random.uniform(-4, -1, 12), a=random.normal(size=12), b=random.normal(size=12)))
    cell.loc[::5, "a"] = np.nan
    both = pd.concat([cell.assign(kind=kind, seed=0, k=8) for kind in ("first", "second")])
    found = compare.Cells(both, ["a", "b"], "kind", "k", 4, 7).means("first", 8, [-3, -2])[:, 0]
    times = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=5)
    times[0] = 1  # the first: as they are
    which = np.digitize(np.log10(cell["frequency"]), [-3, -2])
    for d in range(5):
        drawn = cell.loc[np.repeat(np.arange(12), times[d])].groupby(np.repeat(which, times[d])).mean()
        expected = drawn.reindex(range(3))[["a", "b"]].to_numpy()
        assert np.allclose(found[d], expected, equal_nan=True)


def test_fronts_without_a_common_stretch_are_not_compared():
    table = sweep(lambda kind, logs, k, noise: 0.3 * kind + noise)
    table["l0"] += 100 * (table["table"] == "with")
    found = compare.compare(table, ["score"], draws=50).set_index("view")
    assert found.says["at equal L0"] == "not comparable" and found.over["at equal L0"] == ""
    assert found.verdict.iloc[0] == "with: higher overall, within frequency bins, at equal nmse"
