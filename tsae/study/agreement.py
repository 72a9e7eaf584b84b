"""How far blind scorers agree, how far sources differ, and how many features it takes to see it."""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import optimize, stats

SCALES = {"interpretability": {"1-4": "no pattern", "5-7": "a noisy pattern",
                               "8-10": "a clear pattern"},
          "complexity": {"1-3": "unigrams", "4-6": "simple patterns", "7-10": "complex semantics"}}
PAPER = {"interpretability": {"RES-JB": 7.7, "tokenized": 7.2, "baseline": 6.8},  # its Table 1
         "complexity": {"RES-JB": 3.5, "tokenized": 6.9, "baseline": 1.5}}
KEY = ["source", "seed", "feature"]


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa, quadratic weights, of two scorers (features,) where neither is nan; or nan."""
    both = np.array([a, b], float)
    a, b = both[:, ~np.isnan(both).any(0)]
    if not len(a):
        return float("nan")
    chance = a.var() + b.var() + (a.mean() - b.mean()) ** 2  # mean of (a_i - b_j)^2 over all i, j
    return float(1 - ((a - b) ** 2).mean() / chance) if chance > 0 else float("nan")


def alpha(ratings: np.ndarray, metric: str = "ordinal") -> float:
    """Krippendorff's alpha (nominal, ordinal, interval) of ratings (scorers, features) or nan."""
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(0)  # (features, values)
    counts = counts[counts.sum(1) > 1]
    weights = counts / (counts.sum(1, keepdims=True) - 1)
    coincidences = weights.T @ counts - np.diag(weights.sum(0))  # (values, values)
    n = coincidences.sum(0)
    place = n.cumsum() - n / 2 if metric == "ordinal" else values
    apart = place[:, None] != place if metric == "nominal" else (place[:, None] - place) ** 2
    seen, chance = (n.sum() - 1) * (coincidences * apart).sum(), n @ apart @ n
    return float(1 - seen / chance) if chance > 0 else float("nan")


def _gap(a: np.ndarray, b: np.ndarray, ratings: np.ndarray,
         weight: np.ndarray | float = 1.0) -> np.ndarray:
    """Difference (draws,) of sources a and b by least squares, with a level for each scorer.

    a and b (draws, features) weigh each source's features, `weight` (draws, scorers) the scorers.
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

    ratings (scorers, features), nan where missing; first (features,) bool. p permutes labels within
    `strata` (features,), whole numbers. The interval is about other scorers too, never other SAEs.
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

    Strata are whole numbers: with a random number in [0, 1) added they order features by stratum,
    and at random within each. Labels in this order go to the places of the features ordered by
    stratum alone: so they change places, but never their stratum.
    """
    label = np.empty((draws, len(first)))
    home = np.argsort(strata, kind="stable")
    label[:, home] = first[np.argsort(strata + generator.random(label.shape), axis=1)]
    return label


def _interval(generator: np.random.Generator, ratings: np.ndarray, first: np.ndarray, draws: int,
              level: float) -> np.ndarray:
    """Low and high end by a bootstrap of scorers and features at once: if wrong, then too wide."""
    drawn = np.zeros((draws, len(first)))
    for side in (first, ~first):
        n = side.sum()
        drawn[:, side] = generator.multinomial(n, np.full(n, 1 / n), draws)
    n = len(ratings)
    weight = generator.multinomial(n, np.full(n, 1 / n), draws)
    gaps = _gap(drawn * first, drawn * ~first, ratings, weight)
    few = int(min(first.sum(), (~first).sum()))  # the fewer, the wider: Student's t, not the normal
    tail = stats.norm.cdf(stats.t.ppf((1 - level) / 2, few - 1) * np.sqrt(few / (few - 1)))
    return np.nanquantile(gaps, [tail, 1 - tail])


def analyse(scores: pd.DataFrame, draws: int = 2000, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Tables of what `form.load` gave: agreement, repeats, comparison (of sources) and means.

    With a column `bin` (merged from `form.sample`) the comparison permutes within bins.
    """
    if scores.empty:
        raise ValueError("there are no scores to analyse")
    once = scores[~scores["repeat"]]
    pairs = scores[scores["repeat"]].merge(once, on=["scorer", *KEY])  # second score _x, first _y
    groups = list(pairs.groupby("scorer"))
    groups += [("all", pairs)] if len(groups) > 1 else []
    bins = once.drop_duplicates(KEY).set_index(KEY).get("bin")
    agreement, repeats, comparison = [], [], []
    for scale in SCALES:
        wide = once.pivot(index=KEY, columns="scorer", values=scale)
        agreement += [dict(scale=scale) | row for row in _agreement(wide)]
        for scorer, pair in groups:
            a, b = pair[f"{scale}_x"].to_numpy(float), pair[f"{scale}_y"].to_numpy(float)
            repeats.append(dict(scale=scale, scorer=scorer, repeats=len(a), same=(a == b).mean(),
                                mean_change=np.abs(a - b).mean(), kappa=kappa(a, b)))
        ratings, source = wide.to_numpy(float).T, wide.index.get_level_values("source")
        strata = np.zeros(len(wide)) if bins is None else pd.factorize(bins.reindex(wide.index))[0]
        for one, other in combinations(sorted(set(source)), 2):
            two = np.isin(source, [one, other])
            found = contrast(ratings[:, two], source[two] == one, strata[two], draws, seed)
            comparison.append(dict(scale=scale, source=one, against=other,
                                   features=int(two.sum())) | found)
    means = once.melt(["source", "scorer"], list(SCALES), "scale")
    means = means.groupby(["scale", "source", "scorer"])["value"].agg(["mean", "std", "count"])
    return dict(agreement=pd.DataFrame(agreement), repeats=pd.DataFrame(repeats),
                comparison=pd.DataFrame(comparison), means=means.reset_index())


def _agreement(wide: pd.DataFrame) -> list[dict]:
    """Kappa of every two scorers, and alpha of all; `wide` has a column a scorer."""
    rows = []
    for a, b in combinations(wide, 2):
        rows.append(dict(measure="weighted kappa", scorers=f"{a}, {b}",
                         features=len(wide[[a, b]].dropna()), value=kappa(wide[a], wide[b])))
    ratings, several = wide.to_numpy(float).T, len(wide.dropna(thresh=2))
    for metric in ("ordinal", "interval"):
        rows.append(dict(measure=f"alpha, {metric}", scorers="all", value=alpha(ratings, metric),
                         features=several))
    return rows


def flattest(mean: float) -> np.ndarray:
    """Chances (10,) of the scores 1 to 10, of largest entropy with this mean: they add no more."""
    score = np.arange(1, 11)

    def chances(slope: float) -> np.ndarray:
        weights = np.exp(slope * (score - 5.5))
        return weights / weights.sum()

    return chances(optimize.brentq(lambda slope: chances(slope) @ score - mean, -30, 30))


def power(means: tuple[float, float], features: list[int] | None = None, scorers: int = 1,
          agreement: float = 0.6, level: float = 0.05, simulations: int = 500, draws: int = 499,
          seed: int = 0) -> pd.DataFrame:
    """Chance that `contrast` finds two sources of these means different, by features a source.

    `error` is of Monte Carlo. Scores spread as `flattest` of the mean; scorers are equally strict.
    """
    generator = np.random.default_rng(seed)
    grid = np.unique(features or np.geomspace(3, 1000, 30).round().astype(int))
    size, given, rows = (simulations, grid[-1], scorers), [], []
    for mean in means:  # behind scores stand normal ones, which correlate by `agreement`
        shared = np.sqrt(agreement) * generator.normal(size=(*size[:2], 1))
        behind = shared + np.sqrt(1 - agreement) * generator.normal(size=size)
        steps = stats.norm.ppf(flattest(mean).cumsum()[:-1])
        given.append(1.0 + np.searchsorted(steps, behind).mean(-1))  # of features, over scorers
    for n in grid:  # the first n of the same features: fewer are part of more
        scores = np.concatenate([side[:, :n] for side in given], 1)
        signs = generator.permuted(np.repeat([[1.0, -1.0]], n, 1).repeat(draws, 0), axis=1)
        seen = np.abs(scores[:, :n].sum(1) - scores[:, n:].sum(1))
        p = (1 + (np.abs(scores @ signs.T) >= seen[:, None] - 1e-9).sum(1)) / (draws + 1)
        rows.append(dict(features=int(n), power=(p <= level).mean()))
    curve = pd.DataFrame(rows)
    return curve.assign(error=np.sqrt(curve["power"] * (1 - curve["power"]) / simulations))


def enough(curve: pd.DataFrame, target: float = 0.8) -> float:
    """Features a source (interpolated) from which on the power stays at the target, or nan."""
    curve = curve.sort_values("features", ignore_index=True)
    below = np.flatnonzero(curve["power"] < target)
    start = below[-1] + 1 if len(below) else 0
    if start == len(curve):
        return float("nan")
    around = curve.iloc[max(start - 1, 0):start + 1]
    return float(np.ceil(np.interp(target, around["power"], around["features"])))
