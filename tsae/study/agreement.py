"""What the scores of a blind study say: agreement, differences of sources, and how many features it takes."""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import optimize, stats

SCALES = {"interpretability": {"1-4": "no pattern", "5-7": "a noisy pattern", "8-10": "a clear pattern"},
          "complexity": {"1-3": "unigrams", "4-6": "simple patterns", "7-10": "complex semantics"}}
PAPER = {"interpretability": {"RES-JB": 7.7, "tokenized": 7.2, "baseline": 6.8},  # Table 1, means of ten features
         "complexity": {"RES-JB": 3.5, "tokenized": 6.9, "baseline": 1.5}}
KEY = ["source", "seed", "feature"]


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights of two scorers (features,); what one left out (nan) is left out."""
    a, b = (both := np.array([a, b], float))[:, ~np.isnan(both).any(0)]
    chance = a.var() + b.var() + (a.mean() - b.mean()) ** 2 if len(a) else 0.0  # mean of (a_i - b_j)^2 over all i, j
    return float(1 - ((a - b) ** 2).mean() / chance) if chance > 0 else float("nan")


def alpha(ratings: np.ndarray, metric: str = "ordinal") -> float:
    """Krippendorff's alpha of ratings (scorers, features), nan where missing; metric nominal, ordinal or interval."""
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(0)  # (features, values)
    counts = counts[counts.sum(1) > 1]
    weights = counts / (counts.sum(1, keepdims=True) - 1)
    o = weights.T @ counts - np.diag(weights.sum(0))  # coincidences
    n = o.sum(0)
    at = n.cumsum() - n / 2 if metric == "ordinal" else values
    d = (at[:, None] != at) if metric == "nominal" else (at[:, None] - at) ** 2
    chance = n @ d @ n
    return float(1 - (n.sum() - 1) * (o * d).sum() / chance) if chance > 0 else float("nan")


def _gap(a: np.ndarray, b: np.ndarray, ratings: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """Difference of two sources, least squares with a level for each scorer: features weigh a and b (draws, features),
    scorers `weight` (draws, scorers). Strict and lenient scorers do not pass for a difference, whatever is missing."""
    held, values = ~np.isnan(ratings).T, np.nan_to_num(ratings).T
    n_a, n_b = a @ held, b @ held  # (draws, scorers)
    h = weight * n_a * n_b / np.maximum(n_a + n_b, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (h * (a @ values / np.maximum(n_a, 1) - b @ values / np.maximum(n_b, 1))).sum(1) / h.sum(1)


def contrast(ratings: np.ndarray, first: np.ndarray, strata: np.ndarray | None = None, draws: int = 2000, seed: int = 0,
            level: float = 0.95) -> dict[str, float]:
    """Mean of the features `first` (bool, (features,)) less that of the others, in ratings (scorers, features).

    The interval is a bootstrap of scorers and features at once (crossed random effects; it errs on the wide side), its
    tails widened for few features. p permutes the labels of features, within strata. Both speak of these SAEs only; of
    other scorers the interval speaks as far as there are several, p never.
    """
    generator, first, (s, m) = np.random.default_rng(seed), np.asarray(first, bool), ratings.shape
    seen, few = float(_gap(first[None] * 1.0, ~first[None] * 1.0, ratings)[0]), int(min(first.sum(), (~first).sum()))
    label, home = np.empty((draws, m)), np.argsort(strata := np.zeros(m) if strata is None else strata, kind="stable")
    label[:, home] = first[np.argsort(strata + generator.random((draws, m)), axis=1)]
    p = (1 + (~(np.abs(_gap(label, 1 - label, ratings)) < abs(seen) - 1e-9)).sum()) / (draws + 1)  # nan counts against
    if few < 2 or np.isnan(seen):
        return dict(difference=seen, low=np.nan, high=np.nan, p=float(p))
    drawn = np.zeros((draws, m))
    for side in (first, ~first):
        drawn[:, side] = generator.multinomial(n := side.sum(), np.full(n, 1 / n), draws)
    gaps = _gap(drawn * first, drawn * ~first, ratings, generator.multinomial(s, np.full(s, 1 / s), draws))
    tail = stats.norm.cdf(stats.t.ppf((1 - level) / 2, few - 1) * np.sqrt(few / (few - 1)))
    low, high = np.nanquantile(gaps, [tail, 1 - tail])
    return dict(difference=seen, low=float(low), high=float(high), p=float(p))


def analyse(scores: pd.DataFrame, draws: int = 2000, seed: int = 0) -> dict[str, pd.DataFrame]:
    """What `load` gave: agreement of scorers, of each with their own repeats, means, and comparison of sources.

    A column `bin` (merged from `sample`) keeps the permutations of the comparison within bins of frequency.
    """
    if scores.empty:
        raise ValueError("there are no scores to analyse")
    once, again, agreement, repeats, comparison = scores[~scores["repeat"]], scores[scores["repeat"]], [], [], []
    for scale in SCALES:
        wide = once.pivot(index=KEY, columns="scorer", values=scale)
        ratings, source = wide.to_numpy(float).T, wide.index.get_level_values("source")
        bins = once.drop_duplicates(KEY).set_index(KEY)["bin"].reindex(wide.index) if "bin" in once else source == ""
        strata = pd.factorize(bins)[0]
        for a, b in combinations(wide, 2):
            both = int(wide[[a, b]].notna().all(axis=1).sum())
            agreement.append(dict(scale=scale, measure="weighted kappa", scorers=f"{a}, {b}", features=both,
                                  value=kappa(wide[a], wide[b])))
        agreement += [dict(scale=scale, measure=f"alpha, {metric}", scorers="all", value=alpha(ratings, metric),
                           features=int((wide.notna().sum(axis=1) > 1).sum())) for metric in ("ordinal", "interval")]
        pairs = again.merge(once, on=["scorer", *KEY])
        for scorer, pair in [*pairs.groupby("scorer"), *([("all", pairs)] if pairs["scorer"].nunique() > 1 else [])]:
            a, b = pair[f"{scale}_x"].to_numpy(float), pair[f"{scale}_y"].to_numpy(float)
            repeats.append(dict(scale=scale, scorer=scorer, repeats=len(a), same=(a == b).mean(),
                                mean_change=np.abs(a - b).mean(), kappa=kappa(a, b)))
        for one, other in combinations(sorted(set(source)), 2):
            of = np.isin(source, [one, other])
            found = contrast(ratings[:, of], source[of] == one, strata[of], draws, seed)
            comparison.append(dict(scale=scale, source=one, against=other, features=int(of.sum())) | found)
    means = once.melt(["source", "scorer"], list(SCALES), "scale").groupby(["scale", "source", "scorer"])["value"]
    return dict(agreement=pd.DataFrame(agreement), repeats=pd.DataFrame(repeats), comparison=pd.DataFrame(comparison),
                means=means.agg(["mean", "std", "count"]).reset_index())


def flattest(mean: float) -> np.ndarray:
    """Chances of the scores 1 to 10 of largest entropy with this mean: what the paper gives, and nothing else."""
    def chances(slope: float) -> np.ndarray:
        weights = np.exp(slope * (np.arange(1, 11) - 5.5))
        return weights / weights.sum()

    return chances(optimize.brentq(lambda slope: chances(slope) @ np.arange(1, 11) - mean, -30, 30))


def power(means: tuple[float, float], features: list[int] | None = None, scorers: int = 1, agreement: float = 0.6,
          level: float = 0.05, simulations: int = 500, draws: int = 499, seed: int = 0) -> pd.DataFrame:
    """Chance, and its Monte Carlo error, that the p of `contrast` finds two sources of these means different.

    By features a source. Scores spread as `flattest` of their mean; scorers correlate by `agreement` (of normal scores
    behind theirs) and are all equally strict.
    """
    generator = np.random.default_rng(seed)
    grid = np.unique(features if features else np.geomspace(3, 1000, 30).round().astype(int))
    given, rows = [], []
    for mean in means:
        shape = simulations, grid[-1]
        behind = (np.sqrt(agreement) * generator.normal(size=(*shape, 1))
                  + np.sqrt(1 - agreement) * generator.normal(size=(*shape, scorers)))
        steps = stats.norm.ppf(flattest(mean).cumsum()[:-1])
        given.append(1.0 + np.searchsorted(steps, behind).mean(-1))
    for n in grid:  # the first n of the same features: fewer are part of more
        scores = np.concatenate([side[:, :n] for side in given], 1)
        signs = generator.permuted(np.repeat([[1.0, -1.0]], n, axis=1).repeat(draws, 0), axis=1)
        seen = np.abs(scores[:, :n].sum(1) - scores[:, n:].sum(1))
        p = (1 + (np.abs(scores @ signs.T) >= seen[:, None] - 1e-9).sum(1)) / (draws + 1)
        found = (p <= level).mean()
        rows.append(dict(features=int(n), power=found, error=np.sqrt(found * (1 - found) / simulations)))
    return pd.DataFrame(rows)


def enough(curve: pd.DataFrame, target: float = 0.8) -> float:
    """Features a source from which on the power stays at the target, between two points of its curve; nan if none."""
    curve = curve.sort_values("features", ignore_index=True)
    after = curve.index[curve["power"] < target].max() + 1 if (curve["power"] < target).any() else 0
    around = curve.iloc[max(after - 1, 0):after + 1]
    crossing = np.interp(target, around["power"], around["features"])
    return float(np.ceil(crossing)) if after < len(curve) else float("nan")
