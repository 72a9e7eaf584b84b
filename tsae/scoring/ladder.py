"""The locality ladder: how well the last n tokens predict each feature."""

import numpy as np
import pandas as pd
from scipy.sparse import csc_array, csr_array

from tsae.codes import firings
from tsae.scoring.heldout import LEVELS, Text


def ladder(codes: csc_array, text: Text, prior: float = 2.0, negatives: int = 4096, seed: int = 0) -> pd.DataFrame:
    """How well the last n = 1 .. 4 tokens predict each feature, fitted on one half of the text and scored on the other.

    The prediction of a suffix is the mean code of the fit half where the text ends so, shrunk towards the prediction of
    the suffix one token shorter as if that had been seen `prior` times: an unseen suffix falls back to the longest one
    seen, an unseen token predicts silence. (Of priors 1, 2, 4 and 8, 2 predicts the embedded model's SAEs best at n >
    1. Shrinking tokens towards the feature's mean instead would change R2 by about its firing frequency times the share
    of unseen tokens.) Columns, one row a feature: r2_n = 1 - SSE / SST, as it comes, below 0 too; auc_n: chance that a
    firing has a larger predicted probability of firing than a silent position, against `negatives` random positions (0:
    all); complexity_n = 1 - r2_n in [0, 1] for n = 1, 3. nan for features silent there.
    """
    n, held, levels = codes.shape[1], ~text.fit, text.ids[:LEVELS]
    p, j, v = firings(codes)
    sample = np.flatnonzero(held)
    if 0 < negatives < len(sample):
        sample = np.sort(np.random.default_rng(seed).choice(sample, negatives, replace=False))
    fits = text.fit[p]
    known = csr_array((np.ones(fits.sum()), (levels[0][p[fits]], j[fits])), shape=(levels[0].max() + 1, n))
    known.data[:] = 1
    asked, fired = known[levels[0][sample]], codes[sample].tocsr().astype(bool)
    asked = (asked - asked.multiply(fired)).tocoo()  # silent positions at which something is predicted
    asked_row, asked_feature = asked.coords[0][asked.data > 0], asked.coords[1][asked.data > 0]
    silent = len(sample) - np.asarray(fired.sum(axis=0)).ravel()
    asked_ends = np.r_[0, np.bincount(asked_feature, minlength=n).cumsum()]
    zeros = silent - np.diff(asked_ends)
    p, j, v = np.r_[p, sample[asked_row]], np.r_[j, asked_feature], np.r_[v, np.zeros(len(asked_row))]
    order = np.argsort(j * (int(levels[-1].max()) + 1) + levels[-1][p])
    p, j, v = p[order], j[order], v[order]
    fitted, tested = text.fit[p] & (v > 0), held[p] & (v > 0)
    counted = np.bincount(j[tested], minlength=n)
    squares = np.bincount(j[tested], v[tested]**2, n)
    spread = np.where(counted > 0, squares - np.bincount(j[tested], v[tested], n)**2 / held.sum(), np.nan)

    code, chance, steps, found = np.zeros(len(p)), np.zeros(len(p)), [], {}
    for level, ids in enumerate(levels):
        seen = np.bincount(ids[text.fit], minlength=ids.max() + 1)
        group = ids[p]
        new = np.r_[True, (j[1:] != j[:-1]) | (group[1:] != group[:-1])][:len(p)]
        run, total = np.cumsum(new) - 1, seen[group] + prior
        shorter = prior * code[new] / total[new]
        code = (np.bincount(run, v * fitted)[run] + prior * code) / total
        chance = (np.bincount(run, fitted)[run] + prior * chance) / total
        parent = np.zeros(len(seen), np.int64)
        parent[ids] = levels[max(0, level - 1)]
        steps.append((j[new], group[new], code[new]**2 - shorter**2, (prior / (seen + prior))**2, parent))
        squared = _squared(steps, np.bincount(ids[held], minlength=len(seen)), n)
        error = squares - 2 * np.bincount(j[tested], v[tested] * code[tested], n) + squared
        with np.errstate(divide="ignore", invalid="ignore"):
            found[f"r2_{level + 1}"] = 1 - error / spread
            below = _below(chance, j, tested, v == 0, asked_ends, zeros)
            found[f"auc_{level + 1}"] = below / (counted * silent)
    for level in (1, 3):
        found[f"complexity_{level}"] = np.clip(1 - found[f"r2_{level}"], 0, 1)
    return pd.DataFrame(found)


def _squared(steps: list, weights: np.ndarray, n: int) -> np.ndarray:
    """Sum over positions of the squared prediction, (n,), without building it: G_n = a G_(n-1) + what is new in level
    n.

    So the sum over a level's groups is that over its parents, weighted by a^2, plus a term where level n saw firings.
    """
    total = np.zeros(n)
    for feature, group, step, shrunk, parent in reversed(steps):
        total += np.bincount(feature, weights[group] * step, n)
        weights = np.bincount(parent, weights * shrunk)
    return total


def _below(chance, j, tested, asked, ends, zeros) -> np.ndarray:
    """Per feature, pairs (firing, silent position) in which the firing has the larger chance; ties count half."""
    def key(which):
        return (j[which].astype(np.uint64) << np.uint64(32)) | chance[which].astype(np.float32).view(np.uint32)

    silent, fired = np.sort(key(asked)), np.sort(key(tested))  # sorted ones are searched for many times as fast
    feature, some = (fired >> np.uint64(32)).astype(np.int64), fired.astype(np.uint32) > 0
    low, high = np.searchsorted(silent, fired), np.searchsorted(silent, fired, side="right")
    pairs = low - ends[feature] + (high - low) / 2 + np.where(some, zeros[feature], zeros[feature] / 2)
    return np.bincount(feature, pairs, len(zeros))
