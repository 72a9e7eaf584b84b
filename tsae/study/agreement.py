"""What the scores of a blind study say.

How far scorers agree, how far sources differ, and how many features it takes to see a difference.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import optimize, stats

SCALES = {"interpretability": {"1-4": "no pattern", "5-7": "a noisy pattern",
                               "8-10": "a clear pattern"},
          "complexity": {"1-3": "unigrams", "4-6": "simple patterns", "7-10": "complex semantics"}}
# Table 1 of the paper, means of ten features.
PAPER = {"interpretability": {"RES-JB": 7.7, "tokenized": 7.2, "baseline": 6.8},
         "complexity": {"RES-JB": 3.5, "tokenized": 6.9, "baseline": 1.5}}
KEY = ["source", "seed", "feature"]


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights, of two scorers (features,); nan where there is none.

    Features that one of them left out (nan) do not count.
    """
    both = np.array([a, b], float)
    a, b = both[:, ~np.isnan(both).any(0)]
    if not len(a):
        return float("nan")
    chance = a.var() + b.var() + (a.mean() - b.mean()) ** 2  # mean of (a_i - b_j)^2 over all i, j
    return float(1 - ((a - b) ** 2).mean() / chance) if chance > 0 else float("nan")


def alpha(ratings: np.ndarray, metric: str = "ordinal") -> float:
    """Krippendorff's alpha of ratings (scorers, features), which are nan where missing.

    The metric of differences is nominal, ordinal or interval.
    """
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(0)  # (features, values)
    counts = counts[counts.sum(1) > 1]
    weights = counts / (counts.sum(1, keepdims=True) - 1)
    coincidences = weights.T @ counts - np.diag(weights.sum(0))  # (values, values)
    n = coincidences.sum(0)
    place = n.cumsum() - n / 2 if metric == "ordinal" else values
    nominal = metric == "nominal"
    apart = place[:, None] != place if nominal else (place[:, None] - place) ** 2
    chance = n @ apart @ n
    if not chance > 0:
        return float("nan")
    return float(1 - (n.sum() - 1) * (coincidences * apart).sum() / chance)


def _gap(a: np.ndarray, b: np.ndarray, ratings: np.ndarray,
         weight: np.ndarray | float = 1.0) -> np.ndarray:
    """Difference (draws,) of sources a and b: least squares with a level for each scorer.

    Strict and lenient scorers thus do not pass for a difference, whatever is missing. a and b
    (draws, features) weigh the features of each source, `weight` (draws, scorers) the scorers.
    """
    given, values = ~np.isnan(ratings).T, np.nan_to_num(ratings).T  # (features, scorers)
    n_a, n_b = a @ given, b @ given  # (draws, scorers)
    h = weight * n_a * n_b / np.maximum(n_a + n_b, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = a @ values / np.maximum(n_a, 1) - b @ values / np.maximum(n_b, 1)
        return (h * gap).sum(1) / h.sum(1)


def contrast(ratings: np.ndarray, first: np.ndarray, strata: np.ndarray | None = None,
             draws: int = 2000, seed: int = 0, level: float = 0.95) -> dict[str, float]:
    """Mean of the features `first` less that of the others, as difference, low, high and p.

    ratings (scorers, features), nan where missing; first (features,) bool. p permutes the labels of
    features, within `strata` (features,), whole numbers. Interval and p speak of these SAEs only.
    The interval speaks of other scorers as far as there are several, p never does.
    """
    generator, first = np.random.default_rng(seed), np.asarray(first, bool)
    strata = np.zeros(len(first)) if strata is None else strata
    difference = float(_gap(first[None] * 1.0, ~first[None] * 1.0, ratings)[0])
    label = _relabelled(generator, first, strata, draws)
    below = np.abs(_gap(label, 1 - label, ratings)) < abs(difference) - 1e-9
    p = (1 + (~below).sum()) / (draws + 1)  # a nan is not below: it counts against
    low = high = np.nan
    if min(first.sum(), (~first).sum()) > 1 and not np.isnan(difference):
        low, high = _interval(generator, ratings, first, draws, level)
    return dict(difference=difference, low=float(low), high=float(high), p=float(p))


def _relabelled(generator: np.random.Generator, first: np.ndarray, strata: np.ndarray,
                draws: int) -> np.ndarray:
    """`first` (features,) permuted within strata, for all draws at once, (draws, features).

    Strata are whole numbers, so that a random number in [0, 1) added to them orders features by
    stratum, and at random within each. The labels in this order are given out to the places of the
    features ordered by stratum alone: so labels change places, but never their stratum.
    """
    label = np.empty((draws, len(first)))
    home = np.argsort(strata, kind="stable")
    label[:, home] = first[np.argsort(strata + generator.random(label.shape), axis=1)]
    return label


def _interval(generator: np.random.Generator, ratings: np.ndarray, first: np.ndarray, draws: int,
              level: float) -> np.ndarray:
    """Low and high end: a bootstrap of scorers and features at once (crossed random effects).

    It errs on the wide side. Its tails are widened for few features: as normal quantiles are to
    those of Student's t.
    """
    drawn = np.zeros((draws, len(first)))
    for side in (first, ~first):
        n = side.sum()
        drawn[:, side] = generator.multinomial(n, np.full(n, 1 / n), draws)
    scorers = len(ratings)
    weight = generator.multinomial(scorers, np.full(scorers, 1 / scorers), draws)
    gaps = _gap(drawn * first, drawn * ~first, ratings, weight)
    few = int(min(first.sum(), (~first).sum()))
    tail = stats.norm.cdf(stats.t.ppf((1 - level) / 2, few - 1) * np.sqrt(few / (few - 1)))
    return np.nanquantile(gaps, [tail, 1 - tail])


def analyse(scores: pd.DataFrame, draws: int = 2000, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Four tables of what `form.load` gave: agreement, repeats, comparison, means.

    They are about scorers among each other, each scorer's repeats, the difference of sources, and
    means. With a column `bin` (merged from `form.sample`) the comparison permutes within bins.
    """
    if scores.empty:
        raise ValueError("there are no scores to analyse")
    once, again = scores[~scores["repeat"]], scores[scores["repeat"]]
    pairs = again.merge(once, on=["scorer", *KEY])
    bins = once.drop_duplicates(KEY).set_index(KEY).get("bin")
    agreement, repeats, comparison = [], [], []
    for scale in SCALES:
        wide = once.pivot(index=KEY, columns="scorer", values=scale)
        strata = None if bins is None else pd.factorize(bins.reindex(wide.index))[0]
        agreement += [dict(scale=scale) | row for row in _agreement(wide)]
        repeats += [dict(scale=scale) | row for row in _repeats(pairs, scale)]
        comparison += [dict(scale=scale) | row for row in _comparison(wide, strata, draws, seed)]
    means = once.melt(["source", "scorer"], list(SCALES), "scale")
    means = means.groupby(["scale", "source", "scorer"])["value"].agg(["mean", "std", "count"])
    return dict(agreement=pd.DataFrame(agreement), repeats=pd.DataFrame(repeats),
                comparison=pd.DataFrame(comparison), means=means.reset_index())


def _agreement(wide: pd.DataFrame) -> list[dict]:
    """Kappa of every two scorers, and alpha of all; `wide` has a column a scorer."""
    rows = []
    for a, b in combinations(wide, 2):
        both = int(wide[[a, b]].notna().all(axis=1).sum())
        rows.append(dict(measure="weighted kappa", scorers=f"{a}, {b}", features=both,
                         value=kappa(wide[a], wide[b])))
    several = int((wide.notna().sum(axis=1) > 1).sum())
    for metric in ("ordinal", "interval"):
        rows.append(dict(measure=f"alpha, {metric}", scorers="all",
                         value=alpha(wide.to_numpy(float).T, metric), features=several))
    return rows


def _repeats(pairs: pd.DataFrame, scale: str) -> list[dict]:
    """How each scorer's second scores (`<scale>_x`) compare with the first (`<scale>_y`)."""
    groups = list(pairs.groupby("scorer"))
    if len(groups) > 1:
        groups.append(("all", pairs))
    rows = []
    for scorer, pair in groups:
        a, b = pair[f"{scale}_x"].to_numpy(float), pair[f"{scale}_y"].to_numpy(float)
        rows.append(dict(scorer=scorer, repeats=len(a), same=(a == b).mean(),
                         mean_change=np.abs(a - b).mean(), kappa=kappa(a, b)))
    return rows


def _comparison(wide: pd.DataFrame, strata: np.ndarray | None, draws: int,
                seed: int) -> list[dict]:
    """The `contrast` of every two sources."""
    ratings, source = wide.to_numpy(float).T, wide.index.get_level_values("source")
    rows = []
    for one, other in combinations(sorted(set(source)), 2):
        among = np.isin(source, [one, other])
        within = None if strata is None else strata[among]
        found = contrast(ratings[:, among], source[among] == one, within, draws, seed)
        rows.append(dict(source=one, against=other, features=int(among.sum())) | found)
    return rows


def flattest(mean: float) -> np.ndarray:
    """Chances (10,) of the scores 1 to 10 of largest entropy with this mean.

    The paper gives means and nothing else: this adds nothing else.
    """
    score = np.arange(1, 11)

    def chances(slope: float) -> np.ndarray:
        weights = np.exp(slope * (score - 5.5))
        return weights / weights.sum()

    return chances(optimize.brentq(lambda slope: chances(slope) @ score - mean, -30, 30))


def power(means: tuple[float, float], features: list[int] | None = None, scorers: int = 1,
          agreement: float = 0.6, level: float = 0.05, simulations: int = 500, draws: int = 499,
          seed: int = 0) -> pd.DataFrame:
    """Chance that the p of `contrast` finds two sources of these means different.

    One row a number of features a source, with the chance's Monte Carlo error. Scores spread as
    `flattest` of their mean. All scorers are equally strict.
    """
    generator = np.random.default_rng(seed)
    grid = features if features else np.geomspace(3, 1000, 30).round().astype(int)
    grid = np.unique(grid)
    size = simulations, grid[-1], scorers
    given = [_simulated(generator, mean, size, agreement) for mean in means]
    rows = []
    for n in grid:  # the first n of the same features: fewer are part of more
        scores = np.concatenate([side[:, :n] for side in given], 1)
        signs = np.repeat([[1.0, -1.0]], n, axis=1).repeat(draws, 0)
        signs = generator.permuted(signs, axis=1)
        seen = np.abs(scores[:, :n].sum(1) - scores[:, n:].sum(1))
        p = (1 + (np.abs(scores @ signs.T) >= seen[:, None] - 1e-9).sum(1)) / (draws + 1)
        found = (p <= level).mean()
        error = np.sqrt(found * (1 - found) / simulations)
        rows.append(dict(features=int(n), power=found, error=error))
    return pd.DataFrame(rows)


def _simulated(generator: np.random.Generator, mean: float, size: tuple[int, int, int],
               agreement: float) -> np.ndarray:
    """Scores (simulations, features), each the mean over scorers, with `size` for all three.

    Behind scores stand normal ones; between scorers, these correlate by `agreement`.
    """
    shared = np.sqrt(agreement) * generator.normal(size=(*size[:2], 1))
    behind = shared + np.sqrt(1 - agreement) * generator.normal(size=size)
    steps = stats.norm.ppf(flattest(mean).cumsum()[:-1])
    return 1.0 + np.searchsorted(steps, behind).mean(-1)


def enough(curve: pd.DataFrame, target: float = 0.8) -> float:
    """Features a source from which on the power stays at the target; nan if it never does.

    Between two points of the curve, on the straight line.
    """
    curve = curve.sort_values("features", ignore_index=True)
    below = np.flatnonzero(curve["power"] < target)
    start = below[-1] + 1 if len(below) else 0
    if start == len(curve):
        return float("nan")
    around = curve.iloc[max(start - 1, 0):start + 1]
    return float(np.ceil(np.interp(target, around["power"], around["features"])))
