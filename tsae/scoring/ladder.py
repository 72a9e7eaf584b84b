"""The locality ladder: how well the last n tokens predict each feature."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csc_array, csr_array

from tsae.codes import firings, sortable
from tsae.scoring.heldout import LEVELS, Text


def ladder(codes: csc_array, text: Text, prior: float = 2.0, negatives: int = 4096,
           seed: int = 0, levels: int = LEVELS) -> pd.DataFrame:
    """Codes (m, n) predicted from the last 1 .. `levels` (at most 4) tokens: fitted on one half,
    tested on the other.

    A suffix predicts the mean code where the fit half ends so, shrunk towards what the suffix one
    token shorter predicts, as if that had been seen `prior` times. So an unseen suffix falls back
    to the longest one seen; an unseen token predicts silence. (Of priors 1, 2, 4 and 8, 2 predicts
    the embedded model's SAEs best at n > 1.)

    One row a feature, nan where it is silent in the test half. r2_n: 1 - SSE / SST, may be below
    0; auc_n: chance that a firing has a larger predicted probability of firing than a silent
    position, of `negatives` random ones (0: all); complexity_n: 1 - r2_n in [0, 1], for n = 1, 3.
    """
    sample = np.flatnonzero(~text.fit)
    if 0 < negatives < len(sample):
        sample = np.sort(np.random.default_rng(seed).choice(sample, negatives, replace=False))
    points = _points(codes, text, sample)
    code = chance = np.zeros(len(points.code))
    rungs, found = [], {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for level in range(levels):
            code, chance, rung = _climb(points, text, level, prior, code, chance)
            rungs.append(rung)
            found[f"r2_{level + 1}"] = _r2(points, text, code, rungs)
            found[f"auc_{level + 1}"] = _auc(points, chance)
    for n in [n for n in (1, 3) if n <= levels]:
        found[f"complexity_{n}"] = np.clip(1 - found[f"r2_{n}"], 0, 1)
    return pd.DataFrame(found)


class Points(NamedTuple):
    """The P pairs of position and feature at which predictions are built: all firings, and alarms.

    An alarm is a silent sampled position whose token fires the feature in the fit half. Pairs are
    sorted by feature, then by longest suffix, so that each suffix of a feature is one run.
    """

    position: np.ndarray  # (P,)
    feature: np.ndarray  # (P,)
    code: np.ndarray  # (P,); 0 at alarms
    fit: np.ndarray  # (P,) bool: firings of the fit half
    tested: np.ndarray  # (P,) bool: firings of the test half
    calm: np.ndarray  # (n,): each feature's silent sampled positions that are no alarms


class Rung(NamedTuple):
    """How squares of predictions by suffixes of one length come from those one token shorter."""

    parent: np.ndarray  # (groups,): the shorter suffix
    shrunk: np.ndarray  # (groups,): the square of the factor on its prediction
    feature: np.ndarray  # (G,)
    group: np.ndarray  # (G,): suffixes at which the feature has points
    added: np.ndarray  # (G,): the square of the prediction there, less the shrunk one


def _points(codes: csc_array, text: Text, sample: np.ndarray) -> Points:
    """The points of codes (m, n) with silent positions from a sample of the test half."""
    p, j, v = firings(codes)
    fits, token, longest = text.fit[p], text.ids[0], text.ids[LEVELS - 1]
    known = csr_array((np.ones(fits.sum()), (token[p[fits]], j[fits])),
                      shape=(token.max() + 1, codes.shape[1]))
    known.data[:] = 1  # whether the feature fires at the token, not how often
    expected, fired = known[token[sample]], codes[sample].tocsr().astype(bool)
    alarms = (expected - expected.multiply(fired)).tocoo()
    row, feature = (index[alarms.data > 0] for index in alarms.coords)
    silent = len(sample) - np.asarray(fired.sum(axis=0)).ravel()
    calm = silent - np.bincount(feature, minlength=codes.shape[1])
    p, j, v = np.r_[p, sample[row]], np.r_[j, feature], np.r_[v, np.zeros(len(row))]
    order = np.argsort(j * (int(longest.max()) + 1) + longest[p])
    p, j, v = p[order], j[order], v[order]
    return Points(p, j, v, text.fit[p], ~text.fit[p] & (v > 0), calm)


def _climb(points: Points, text: Text, level: int, prior: float, code: np.ndarray,
           chance: np.ndarray) -> tuple[np.ndarray, np.ndarray, Rung]:
    """Code and chance of firing (P,) as predicted by one token more than those that are given."""
    ids, shorter = text.ids[level], text.ids[max(0, level - 1)]
    feature, group, groups = points.feature, ids[points.position], int(ids.max()) + 1
    new = (feature[1:] != feature[:-1]) | (group[1:] != group[:-1])
    new = np.r_[True, new][:len(group)]
    seen = np.bincount(ids[text.fit], minlength=groups)
    run, total = np.cumsum(new) - 1, seen[group] + prior
    longer = (np.bincount(run, points.code * points.fit)[run] + prior * code) / total
    likelier = (np.bincount(run, points.fit)[run] + prior * chance) / total
    added = longer[new]**2 - (prior * code[new] / total[new])**2
    parent = np.zeros(groups, np.int64)
    parent[ids] = shorter
    rung = Rung(parent, (prior / (seen + prior))**2, feature[new], group[new], added)
    return longer, likelier, rung


def _r2(points: Points, text: Text, code: np.ndarray, rungs: list[Rung]) -> np.ndarray:
    """1 - SSE / SST (n,) of predicted codes (P,) over the whole test half."""
    n, feature, y = len(points.calm), points.feature[points.tested], points.code[points.tested]
    squares = np.bincount(feature, y**2, n)
    sst = squares - np.bincount(feature, y, n)**2 / (~text.fit).sum()
    weights = np.bincount(text.ids[len(rungs) - 1][~text.fit], minlength=len(rungs[-1].parent))
    sse = squares - 2 * np.bincount(feature, y * code[points.tested], n)
    return np.where(squares > 0, 1 - (sse + _squared(rungs, weights, n)) / sst, np.nan)


def _squared(rungs: list[Rung], weights: np.ndarray, n: int) -> np.ndarray:
    """The sum (n,) of squared predictions of suffixes, each with its weight (groups,).

    They are never built: each suffix has n. Where a feature has no point, its prediction is that
    of the shorter suffix times a, with a = prior / (seen + prior). So the sum is one over shorter
    suffixes, each weighted by the a^2 of those that extend it, plus what is `added` at points.
    """
    total = np.zeros(n)
    for rung in reversed(rungs):
        total += np.bincount(rung.feature, weights[rung.group] * rung.added, n)
        weights = np.bincount(rung.parent, weights * rung.shrunk)
    return total


def _auc(points: Points, chance: np.ndarray) -> np.ndarray:
    """How often (n,) a firing has a larger chance (P,) than a silent position; ties count half.

    Feature and chance go into one 64-bit number, the bits of the float (see `sortable`) below. Two
    searches in the sorted alarms then find, for the firings of all features at once, how many
    alarms lie below and how many tie. Calm positions all have chance 0: their number is enough.
    """
    def keys(which: np.ndarray) -> np.ndarray:  # sorted ones are searched for many times as fast
        feature = points.feature[which].astype(np.uint64)
        return np.sort((feature << np.uint64(32)) | sortable(chance[which]))

    silent, n = points.code == 0, len(points.calm)
    alarms, firing = keys(silent), keys(points.tested)
    many = np.bincount(points.feature[silent], minlength=n)
    feature, some = (firing >> np.uint64(32)).astype(np.int64), firing.astype(np.uint32) > 0
    low, high = np.searchsorted(alarms, firing), np.searchsorted(alarms, firing, side="right")
    calm, first = points.calm[feature], (many.cumsum() - many)[feature]
    pairs = low - first + (high - low) / 2 + np.where(some, calm, calm / 2)
    fired = np.bincount(feature, minlength=n)
    return np.bincount(feature, pairs, n) / (fired * (points.calm + many))
