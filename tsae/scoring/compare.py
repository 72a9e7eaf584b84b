"""Two kinds of SAE over all of their features, in views that can disagree, with intervals.

A cell is one SAE: kind, setting (such as k), seed. A side is a view of one kind: mean scores
(draws + 1, seeds, measures), first of the features as they are, then drawn with replacement.
"""

import numpy as np
import pandas as pd
from scipy import stats

VIEWS = ("overall", "within frequency bins", "at equal L0", "at equal nmse")
View = tuple[str, list[np.ndarray]]  # over what, and the two sides


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
    variance is that between seeds, or of a bootstrap (`draws`) over each SAE's features if larger.

    Columns: measure, view, one a kind, difference, low, high, says, over (what is covered), verdict
    (of all views of a measure). nan and "not comparable" where there are fewer than two seeds or
    nothing in common. Raises ValueError unless two kinds share seeds.
    """
    scores = scores.assign(**{setting: 0}) if setting not in scores else scores
    cells = Cells(scores, measures, by, setting, draws, seed)
    at = cells.settings[(len(cells.settings) - 1) // 2] if at is None else at
    if not cells.seeds or at not in cells.settings:
        raise ValueError(f"no seed has SAEs of both kinds at every {setting}, or none at {at}: "
                         f"it takes {cells.settings}")
    logs = np.log10(scores.loc[scores[setting] == at, "frequency"])
    edges = np.linspace(logs.min(), logs.max(), bins + 1)[1:-1]
    fronts = [np.stack([cells.means(kind, each)[:, :, 0] for each in cells.settings], 2)
              for kind in cells.kinds]
    views = [(f"{setting} {at}", [front[:, :, cells.settings.index(at)] for front in fronts]),
             cells.within_bins(at, edges, least),
             cells.at_equal("l0", fronts), cells.at_equal("nmse", fronts)]
    found = pd.concat([_view_rows(view, name, cells, level) for name, view in zip(VIEWS, views)])
    found = found.set_index("measure").loc[measures].reset_index()
    verdicts = {measure: _verdict(rows) for measure, rows in found.groupby("measure")}
    return found.assign(verdict=f"{cells.kinds[1]}: " + found["measure"].map(verdicts))


class Cells:
    """The features of each (kind, setting, seed), and what two of the views say of them."""

    def __init__(self, scores, measures, by, setting, draws, seed):
        kinds, self.settings = list(scores[by].drop_duplicates()), sorted(scores[setting].unique())
        if len(kinds) != 2:
            raise ValueError(f"a comparison needs two kinds of SAE in column {by!r}, got {kinds}")
        seeds = (set(part["seed"]) for _, part in scores.groupby([by, setting]))
        self.kinds, self.seeds = kinds, sorted(set.intersection(*seeds))  # seeds that all have
        self.features = dict(list(scores.groupby([by, setting, "seed"])))
        self.measures, self.draws, self.random = measures, draws, np.random.default_rng(seed)

    def means(self, kind, setting, edges=()) -> np.ndarray:
        """Mean scores (draws + 1, seeds, bins, measures); edges part bins of log10 frequency."""
        means = []
        for cell in (self.features[kind, setting, seed] for seed in self.seeds):
            values, n = cell[self.measures].to_numpy(float), len(cell)
            bins = np.eye(len(edges) + 1)[np.digitize(np.log10(cell["frequency"]), edges)]
            known = np.isfinite(values)
            summed = np.stack([np.where(known, values, 0), known])[:, :, None]  # and how many
            summed = (bins[:, :, None] * summed).reshape(2, n, -1)
            weights = self.random.multinomial(n, np.full(n, 1 / n), self.draws + 1).astype(float)
            weights[0] = 1  # first the features as they are, then how often each was drawn
            with np.errstate(invalid="ignore", divide="ignore"):
                means.append((weights @ summed[0]) / (weights @ summed[1]))
        return np.stack(means, 1).reshape(self.draws + 1, len(self.seeds), len(edges) + 1, -1)

    def within_bins(self, at, edges: np.ndarray, least: int) -> View | None:
        """Bin by bin, weighted by the features of both kinds; None where no bin is full enough."""
        which = [np.digitize(np.log10(self.features[kind, at, seed]["frequency"]), edges)
                 for kind in self.kinds for seed in self.seeds]
        counts = np.stack([np.bincount(each, minlength=len(edges) + 1) for each in which])
        common = counts.min(0) >= least
        if not common.any():
            return None
        weights = counts.sum(0)[common] / counts[:, common].sum()
        sides = [np.einsum("dsbm,b->dsm", self.means(kind, at, edges)[:, :, common], weights)
                 for kind in self.kinds]
        return f"{common.sum()} of {len(common)} bins", sides

    def at_equal(self, column: str, fronts: list[np.ndarray]) -> View | None:
        """Means of fronts (draws + 1, seeds, settings, measures) where all cover log `column`."""
        if column not in next(iter(self.features.values())) or len(self.settings) < 2:
            return None
        logs = [np.log([[self.features[kind, setting, seed][column].iloc[0]
                         for setting in self.settings] for seed in self.seeds])
                for kind in self.kinds]  # each (seeds, settings)
        low, high = max(x.min(1).max() for x in logs), min(x.max(1).min() for x in logs)
        if not low < high:
            return None
        grid = np.linspace(low, high, 17)
        weights = [np.stack([_weights(grid, one) for one in x]) for x in logs]
        sides = [np.einsum("st,dstm->dsm", *both) for both in zip(weights, fronts)]
        return f"{column} {np.exp(low):.3g} to {np.exp(high):.3g}", sides


def _weights(grid: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Weights (n,) of values at x (n,) in the mean over `grid` of the line through them."""
    order = np.argsort(x)  # the mean is linear in the values: a weight is that of a unit vector
    return np.stack([np.interp(grid, x[order], unit).mean() for unit in np.eye(len(x))[:, order]])


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
