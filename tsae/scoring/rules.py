"""The best simple explanation of each feature: a rule found on one half of the text, judged on the other."""

import numpy as np
import pandas as pd
from scipy.sparse import csc_array

from tsae.codes import evenly, firings, ordered_within
from tsae.scoring.heldout import Text


def explained(codes: csc_array, text: Text, size: int = 10, examples: int = 50, reach: int = 8) -> pd.DataFrame:
    """The best simple explanation of each feature, found on one half of the text, and how well it does on the other.

    An explanation is up to `size` groups of one of the text's rules ("the token in ..."): those that add most to the
    share of firings covered less the share of silent positions covered. A group that fired once in the fit half does
    not count: with that firing left out it would be unknown. Of the rules that come within 0.02 of the best the one
    with the largest F1 is taken, less 0.001 a group, then the first: a token detects its bigrams almost as well as they
    do, but is less often right. After Bills et al. 2023 and Paulo et al. 2024, with a rule in the place of a language
    model. Columns: rule, explanation; detection: balanced accuracy on the held-out half, firings against silent
    positions, all of them (0.5 is chance); detection_mass: the same with firings weighted by their code; precision,
    recall and rule_f1 there; fuzzing: balanced accuracy in the contexts of firings, `examples` of them evenly over the
    ranks of the codes, against the silent positions at most `reach` tokens away. nan for features silent in the
    held-out half.
    """
    (m, n), (p, j, v) = codes.shape, firings(codes)
    fit, held = text.fit, ~text.fit
    fits, tests = fit[p], held[p]
    fired = np.bincount(j[fits], minlength=n)
    gains, f1, kept = np.zeros((len(text.names), n)), np.zeros((len(text.names), n)), []
    for rule, ids in enumerate(text.ids):
        seen = np.bincount(ids[fit], minlength=ids.max() + 1)
        feature, group, count = _counted(j[fits], ids[p[fits]], n, len(seen))
        gain = count / fired[feature] - (seen[group] - count) / np.maximum(fit.sum() - fired, 1)[feature]
        good = (count > 1) & (gain > 0)
        order = np.flatnonzero(good)[ordered_within(feature[good], ~gain[good].astype(np.float32).view(np.uint32))]
        ends = np.searchsorted(feature[order], np.arange(n))
        order = order[np.arange(len(order)) - ends[feature[order]] < size]
        kept.append((feature[order], group[order]))
        gains[rule] = np.bincount(feature[order], gain[order], n)
        both = fired + np.bincount(feature[order], seen[group[order]], n)
        f1[rule] = (2 * np.bincount(feature[order], count[order], n) / np.maximum(both, 1)
                    - 0.001 * np.bincount(feature[order], minlength=n))
    best = np.argmax(np.where(gains >= gains.max(axis=0) - 0.02, f1, -1), axis=0)
    mine = [best[feature] == rule for rule, (feature, _) in enumerate(kept)]
    feature = np.concatenate([kept[rule][0][which] for rule, which in enumerate(mine)])
    group = np.concatenate([kept[rule][1][which] for rule, which in enumerate(mine)])
    most = int(text.ids.max(initial=0)) + 1
    keys = np.sort(feature * most + group)

    def covered(position, of):
        return _isin(of * most + text.ids[best[of], position], keys)

    hit = covered(p[tests], j[tests])
    total, right = np.bincount(j[tests], minlength=n), np.bincount(j[tests], hit, n)
    sizes = [np.bincount(ids[held], minlength=ids.max() + 1) for ids in text.ids]
    size_of = np.concatenate([sizes[rule][kept[rule][1][which]] for rule, which in enumerate(mine)])
    all_covered = np.bincount(feature, size_of, n)
    near, of = _neighbours(evenly(codes, held, examples), p, j, text, reach)
    silent = ~_isin(of * m + near, j * m + p)
    near, of = near[silent], of[silent]
    with np.errstate(divide="ignore", invalid="ignore"):
        recall, precision = right / total, right / all_covered
        by_mass = np.bincount(j[tests], hit * v[tests], n) / np.bincount(j[tests], v[tests], n)
        apart = 1 - (all_covered - right) / (held.sum() - total)
        beside = 1 - np.bincount(of, covered(near, of), n) / np.bincount(of, minlength=n)
        found = dict(detection=(recall + apart) / 2, detection_mass=(by_mass + apart) / 2, precision=precision,
                     recall=recall, rule_f1=2 * right / np.where(total > 0, total + all_covered, np.nan),
                     fuzzing=(recall + beside) / 2)
    groups = [[] for _ in range(n)]
    for rule, which in enumerate(mine):
        for one, its in zip(kept[rule][0][which].tolist(), kept[rule][1][which].tolist()):
            groups[one].append(its)
    names = [text.names[rule] if its else "none" for rule, its in zip(best, groups)]
    told = [_sentence(text, rule, its) for rule, its in zip(best.tolist(), groups)]
    return pd.DataFrame(found | dict(rule=names, explanation=told))


def _counted(feature: np.ndarray, group: np.ndarray, n: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (feature, group) pairs and how often each occurs."""
    key = feature * groups + group
    if n * groups <= 1 << 23:  # small enough to count without sorting
        count = np.bincount(key, minlength=n * groups)
        key = np.flatnonzero(count)
        count = count[key]
    else:
        key, count = np.unique(key, return_counts=True)
    return key // groups, key % groups, count


def _isin(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values are among ordered ones."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    order = np.argsort(values)
    values, found = values[order], np.empty(len(values), bool)
    found[order] = ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    return found


def _neighbours(which: np.ndarray, p: np.ndarray, j: np.ndarray, text: Text,
                reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions at most `reach` tokens from chosen firings, in their rows, and the features whose firings they are."""
    steps = np.r_[-reach:0, 1:reach + 1]
    near, of = (p[which, None] + steps).ravel(), np.repeat(j[which], len(steps))
    inside = (near >= 0) & (near < len(text.t))
    near, of, at = near[inside], of[inside], np.repeat(p[which], len(steps))[inside]
    close = (text.row[near] == text.row[at]) & (np.abs(text.column[near] - text.column[at]) <= reach)
    return near[close], of[close]


def _sentence(text: Text, rule: int, groups: list[int]) -> str:
    told = [text.describe(rule, group) for group in groups]
    if not told:
        return "none"
    return " or ".join(told) if rule in text.attributes else f"{text.names[rule]}: {', '.join(told)}"
