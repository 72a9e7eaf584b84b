"""Two kinds of SAE over all of their features, in views that can disagree, with intervals.

A cell is one SAE: its features, one a row of the scores, told by kind, setting (such as k) and
seed. A side is what a view says of one kind: mean scores (draws + 1, seeds, measures), first of the
features as they are, then of features drawn with replacement.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

VIEWS = ("overall", "within frequency bins", "at equal L0", "at equal nmse")
View = tuple[str, list[np.ndarray]]  # over what, and the two sides


@dataclass(frozen=True)
class Cells:
    """The features of each (kind, setting, seed), and how their means are taken."""

    features: dict[tuple, pd.DataFrame]
    kinds: list
    settings: list
    seeds: list
    measures: list[str]
    draws: int
    random: np.random.Generator

    def means(self, kind, setting, edges=()) -> np.ndarray:
        """Mean scores (draws + 1, seeds, bins, measures); edges part bins of log10 frequency."""
        return np.stack([_resampled(self.features[kind, setting, seed], self.measures, edges,
                                    self.draws, self.random) for seed in self.seeds], 1)


def compare(scores: pd.DataFrame, measures: list[str], by: str = "table", setting: str = "k",
            at=None, bins: int = 6, least: int = 5, draws: int = 300, seed: int = 0,
            level: float = 0.95) -> pd.DataFrame:
    """The second kind of SAE, by column `by`, less the first, over all features, in four views.

    `scores` has one row a feature; columns `by`, seed, frequency, the `measures`, and for the last
    two views l0, nmse (of the SAE) and `setting`. The views:
    - overall: all features, at setting `at` (the middle one when None).
    - within frequency bins: there, in `bins` equal bins of log frequency, weighted by the features
      of both kinds in them; only bins in which every SAE has at least `least` features.
    - at equal L0, at equal nmse: mean scores interpolated along each kind's settings in log L0 or
      log nmse, averaged over the stretch that all SAEs' fronts cover.
    Intervals are Student's t over the differences of the seeds, which saw the same batches. Their
    variance is that between seeds, or that of a bootstrap (`draws`) over the features of each SAE,
    whichever is larger.

    Columns: measure, view, a column a kind, difference, low, high, says, over (what is covered),
    and verdict, one for all views of a measure. nan and "not comparable" where there are fewer than
    two seeds or nothing in common. Raises ValueError unless two kinds share seeds.
    """
    scores = scores.assign(**{setting: 0}) if setting not in scores else scores
    cells = _cells(scores, measures, by, setting, draws, seed)
    settings = cells.settings
    at = settings[(len(settings) - 1) // 2] if at is None else at
    if not cells.seeds or at not in settings:
        raise ValueError(f"no seed has SAEs of both kinds at every {setting}, or none at {at}: "
                         f"it takes {settings}")
    logs = np.log10(scores.loc[scores[setting] == at, "frequency"])
    edges = np.linspace(logs.min(), logs.max(), bins + 1)[1:-1]
    means = {(kind, each): cells.means(kind, each)[:, :, 0]
             for kind in cells.kinds for each in settings}
    views = [(f"{setting} {at}", [means[kind, at] for kind in cells.kinds]),
             _within_bins(cells, at, edges, least),
             _at_equal(cells, means, "l0"), _at_equal(cells, means, "nmse")]
    found = pd.concat([_view_rows(view, name, cells, level) for name, view in zip(VIEWS, views)])
    order = found["measure"].map(measures.index).argsort(kind="stable")
    found = found.iloc[order].reset_index(drop=True)
    verdicts = {measure: _verdict(rows) for measure, rows in found.groupby("measure")}
    return found.assign(verdict=f"{cells.kinds[1]}: " + found["measure"].map(verdicts))


def _cells(scores: pd.DataFrame, measures: list[str], by: str, setting: str, draws: int,
           seed: int) -> Cells:
    """The cells of the seeds that every kind and setting has."""
    kinds = list(scores[by].drop_duplicates())
    if len(kinds) != 2:
        raise ValueError(f"a comparison needs two kinds of SAE in column {by!r}, got {kinds}")
    seeds = set.intersection(*(set(part["seed"]) for _, part in scores.groupby([by, setting])))
    features = {key: part for key, part in scores.groupby([by, setting, "seed"])}
    return Cells(features, kinds, sorted(scores[setting].unique()), sorted(seeds), measures, draws,
                 np.random.default_rng(seed))


def _within_bins(cells: Cells, at, edges: np.ndarray, least: int) -> View | None:
    """Bin by bin, weighted by the features of both kinds; None where no bin is full enough."""
    bins = len(edges) + 1
    logs = [np.log10(cells.features[kind, at, seed]["frequency"])
            for kind in cells.kinds for seed in cells.seeds]
    counts = np.stack([np.bincount(np.digitize(each, edges), minlength=bins) for each in logs])
    common = counts.min(0) >= least
    if not common.any():
        return None
    weights = counts.sum(0)[common] / counts[:, common].sum()
    sides = [np.einsum("dsbm,b->dsm", cells.means(kind, at, edges)[:, :, common], weights)
             for kind in cells.kinds]
    return f"{common.sum()} of {bins} bins", sides


def _at_equal(cells: Cells, means: dict[tuple, np.ndarray], column: str,
              points: int = 17) -> View | None:
    """Averages over the stretch of log `column` that all fronts cover; None if there is none."""
    if column not in next(iter(cells.features.values())) or len(cells.settings) < 2:
        return None
    logs = [np.log([[cells.features[kind, setting, seed][column].iloc[0]
                     for setting in cells.settings] for seed in cells.seeds])
            for kind in cells.kinds]  # each (seeds, settings)
    low, high = max(x.min(1).max() for x in logs), min(x.max(1).min() for x in logs)
    if not low < high:
        return None
    grid, sides = np.linspace(low, high, points), []
    for kind, x in zip(cells.kinds, logs):
        front = np.stack([means[kind, setting] for setting in cells.settings], 2)
        weights = np.stack([_weights(grid, one) for one in x])
        sides.append(np.einsum("st,dstm->dsm", weights, front))
    return f"{column} {np.exp(low):.3g} to {np.exp(high):.3g}", sides


def _weights(grid: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Weights (n,) with which values at x (n,) give the mean over `grid` of the line through them.

    That mean is linear in the values, so a weight is the mean for a unit vector. It serves all
    draws and measures at once.
    """
    order = np.argsort(x)
    return np.stack([np.interp(grid, x[order], unit).mean() for unit in np.eye(len(x))[:, order]])


def _resampled(cell: pd.DataFrame, measures: list[str], edges, draws: int,
               random: np.random.Generator) -> np.ndarray:
    """Means (draws + 1, bins, measures) of a cell: first as it is, then drawn with replacement.

    How often each feature is drawn is a multinomial: one product of these weights gives all means.
    """
    values = cell[measures].to_numpy(float)
    bins = np.eye(len(edges) + 1)[np.digitize(np.log10(cell["frequency"]), edges)]
    known = np.isfinite(values)
    summed = np.stack([np.where(known, values, 0), known])[:, :, None]  # values, and their number
    summed = (bins[:, :, None] * summed).reshape(2, len(cell), -1)
    even = np.full(len(cell), 1 / len(cell))
    weights = random.multinomial(len(cell), even, size=draws + 1).astype(float)
    weights[0] = 1
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ summed[0]) / (weights @ summed[1])
    return means.reshape(draws + 1, len(edges) + 1, len(measures))


def _view_rows(view: View | None, name: str, cells: Cells, level: float) -> pd.DataFrame:
    """The rows of one view in the result of `compare`: all measures."""
    measures, (first, second) = cells.measures, cells.kinds
    over, sides = view or ("", [np.full((2, 1, len(measures)), np.nan)] * 2)
    gap, seeds = sides[1] - sides[0], sides[0].shape[1]
    half = np.full(len(measures), np.nan)
    if seeds > 1:
        drawn = np.where(np.isfinite(gap[1:]), gap[1:], gap[0])  # a small bin can be drawn empty
        variance = np.maximum(gap[0].var(0, ddof=1), drawn.var(0, ddof=1).mean(0))
        half = stats.t.ppf((1 + level) / 2, seeds - 1) * np.sqrt(variance / seeds)
    difference = gap[0].mean(0)
    low, high = difference - half, difference + half
    says = np.select([np.isnan(half), low > 0, high < 0], ["not comparable", "higher", "lower"],
                     "not resolved")
    return pd.DataFrame({"measure": measures, "view": name, first: sides[0][0].mean(0),
                         second: sides[1][0].mean(0), "difference": difference, "low": low,
                         "high": high, "says": says, "over": over})


def _verdict(rows: pd.DataFrame) -> str:
    """What the views of a measure say together; those that are not comparable have no voice."""
    said = {row.view: row.says for row in rows.itertuples() if row.says != "not comparable"}
    if len(set(said.values())) > 1:
        return "views disagree: " + ", ".join(f"{says} {view}" for view, says in said.items())
    if not said:
        return "not comparable"
    every = "in every view" if len(said) == len(VIEWS) else ", ".join(said)
    return f"{next(iter(said.values()))} {every}"
