"""Two kinds of SAE over all of their features, in views that can disagree, with intervals."""

import numpy as np
import pandas as pd
from scipy import stats

VIEWS = ("overall", "within frequency bins", "at equal L0", "at equal nmse")


def compare(scores: pd.DataFrame, measures: list[str], by: str = "table", setting: str = "k", at=None, bins: int = 6,
            least: int = 5, draws: int = 300, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
    """Two kinds of SAE over all their features: the second value of column `by` less the first, in four views.

    `scores`: one row a feature; columns `by`, seed, frequency, the `measures`, and for the last two views l0, nmse (of
    the SAE) and `setting`, which tells apart the SAEs of a kind and seed. Views: overall, at setting `at` (the middle
    one when None); within `bins` equal bins of log frequency there, bins in which every SAE has at least `least`
    features, weighted by the features of both kinds in them; at equal L0 and at equal nmse: mean scores interpolated
    along each kind's front in log L0 or log nmse, averaged over the stretch `over` that all fronts cover. Intervals:
    Student's t over the differences of the seeds, which saw the same batches, with the spread of these or that of a
    bootstrap (`draws`) over the features within each SAE, whichever is larger. Columns: measure, view, a column a kind,
    difference, low, high, says, over, and verdict, one for all views of a measure; nan and "not comparable" where there
    are fewer than two seeds or nothing in common. Raises ValueError unless there are two kinds that share seeds.
    """
    kinds = list(scores[by].drop_duplicates())
    if len(kinds) != 2:
        raise ValueError(f"a comparison needs two kinds of SAE in column {by!r}, got {kinds}")
    scores = scores.assign(**{setting: 0}) if setting not in scores else scores
    settings = sorted(scores[setting].unique())
    at = settings[(len(settings) - 1) // 2] if at is None else at
    seeds = sorted(set.intersection(*(set(part["seed"]) for _, part in scores.groupby([by, setting]))))
    if not seeds or at not in settings:
        raise ValueError(f"no seed has SAEs of both kinds at every {setting}, or none at {at}: it takes {settings}")
    random = np.random.default_rng(seed)
    cells = {key: part for key, part in scores.groupby([by, setting, "seed"])}
    logs = np.log10(scores.loc[scores[setting] == at, "frequency"])
    edges = np.linspace(logs.min(), logs.max(), bins + 1)[1:-1]

    def means(kind, which, edges=()):
        """(draws + 1, seeds, bins, measures), the features as they are first."""
        return np.stack([_resampled(cells[kind, which, one], measures, edges, draws, random) for one in seeds], 1)

    views = dict.fromkeys(VIEWS)  # view: what it covers, and for each kind (draws + 1, seeds, measures)
    overall = {(kind, which): means(kind, which)[:, :, 0] for kind in kinds for which in settings}
    views[VIEWS[0]] = f"{setting} {at}", [overall[kind, at] for kind in kinds]
    counts = np.stack([np.bincount(np.digitize(np.log10(cells[kind, at, one]["frequency"]), edges), minlength=bins)
                       for kind in kinds for one in seeds])
    common = counts.min(0) >= least
    if common.any():
        weights = counts.sum(0)[common] / counts[:, common].sum()
        binned = [means(kind, at, edges)[:, :, common] for kind in kinds]
        views[VIEWS[1]] = f"{common.sum()} of {bins} bins", [np.einsum("dsbm,b->dsm", side, weights) for side in binned]
    for view, column in zip(VIEWS[2:], ("l0", "nmse")):
        if column in scores and len(settings) > 1:
            xs = [np.log([[cells[kind, which, one][column].iloc[0] for which in settings] for one in seeds])
                  for kind in kinds]
            views[view] = _along([np.stack([overall[kind, which] for which in settings], 2) for kind in kinds], xs, column)
    found = pd.concat([_view_rows(views[view], view, kinds, measures, level) for view in VIEWS], ignore_index=True)
    found["order"] = found["measure"].map(measures.index)
    found = found.sort_values("order", kind="stable", ignore_index=True).drop(columns="order")
    return found.assign(verdict=f"{kinds[1]}: " + found["measure"].map(
        {measure: _verdict(rows) for measure, rows in found.groupby("measure")}))


def _view_rows(view: tuple | None, name: str, kinds: list, measures: list[str], level: float) -> pd.DataFrame:
    """The rows of one view of `compare`, all measures."""
    over, sides = view or ("", [np.full((2, 1, len(measures)), np.nan)] * 2)
    gap, seeds = sides[1] - sides[0], sides[0].shape[1]
    half = np.full(len(measures), np.nan)
    if seeds > 1:
        drawn = np.where(np.isfinite(gap[1:]), gap[1:], gap[0])  # a small bin can be drawn empty
        variance = np.maximum(gap[0].var(0, ddof=1), drawn.var(0, ddof=1).mean(0))
        half = stats.t.ppf((1 + level) / 2, seeds - 1) * np.sqrt(variance / seeds)
    difference = gap[0].mean(0)
    low, high = difference - half, difference + half
    says = np.select([np.isnan(half), low > 0, high < 0], ["not comparable", "higher", "lower"], "not resolved")
    return pd.DataFrame({"measure": measures, "view": name, kinds[0]: sides[0][0].mean(0), kinds[1]: sides[1][0].mean(0),
                         "difference": difference, "low": low, "high": high, "says": says, "over": over})


def _verdict(rows: pd.DataFrame) -> str:
    """What the views of a measure say together; those that could not be compared are left out."""
    told = {row.view: row.says for row in rows.itertuples() if row.says != "not comparable"}
    if len(set(told.values())) > 1:
        return "views disagree: " + ", ".join(f"{says} {view}" for view, says in told.items())
    if not told:
        return "not comparable"
    return f"{next(iter(told.values()))} {'in every view' if len(told) == len(VIEWS) else ', '.join(told)}"


def _resampled(part: pd.DataFrame, measures: list[str], edges, draws: int, random) -> np.ndarray:
    """Means (draws + 1, bins, measures) over features drawn with replacement; the first is over all as they are.

    Weights from a multinomial in place of drawn indices: one product gives all means.
    """
    values = part[measures].to_numpy(float)
    bins = np.eye(len(edges) + 1)[np.digitize(np.log10(part["frequency"]), edges)]
    known = np.isfinite(values)
    columns = np.stack([np.where(known, values, 0), known])[:, :, None]  # what is summed, and how many
    columns = (bins[:, :, None] * columns).reshape(2, len(part), -1)
    weights = random.multinomial(len(part), np.full(len(part), 1 / len(part)), size=draws + 1).astype(float)
    weights[0] = 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((weights @ columns[0]) / (weights @ columns[1])).reshape(draws + 1, len(edges) + 1, len(measures))


def _along(fronts: list[np.ndarray], xs: list[np.ndarray], column: str, points: int = 17) -> tuple | None:
    """What stretch of `column` all fronts cover, and the means (draws, seeds, measures) over it of each kind's fronts.

    Fronts (draws, seeds, settings, measures) at the logs xs (seeds, settings). None where they cover none.
    """
    low, high = max(x.min(1).max() for x in xs), min(x.max(1).min() for x in xs)
    if not low < high:
        return None
    grid, found = np.linspace(low, high, points), []
    for front, x in zip(fronts, xs):
        shares = np.stack([[np.interp(grid, one[order], unit).mean() for unit in np.eye(len(one))[:, order]]
                           for one in x for order in [np.argsort(one)]])
        found.append(np.einsum("st,dstm->dsm", shares, front))
    return f"{column} {np.exp(low):.3g} to {np.exp(high):.3g}", found
