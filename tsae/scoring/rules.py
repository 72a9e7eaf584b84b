"""The best simple rule for each feature, found on one half of the text, judged on the other."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csc_array

from tsae.codes import evenly, firings, ordered_within, sortable
from tsae.scoring.heldout import Text


def explained(codes: csc_array, text: Text, size: int = 10, examples: int = 50,
              reach: int = 8) -> pd.DataFrame:
    """The best simple explanation of each feature of codes (m, n), and how well it does.

    It is up to `size` groups of one rule, as "the token: 'a', 'b'", found on the fit half. After
    Bills et al. 2023 and Paulo et al. 2024, with a rule in the place of a language model.

    Columns rule, explanation; on the held-out half, nan for features that are silent there,
    detection: balanced accuracy, firings against all silent positions (0.5 is chance);
    detection_mass: the same, firings weighted by their code; precision, recall, rule_f1; fuzzing:
    balanced accuracy, firings against the silent positions at most `reach` tokens from `examples`
    of them, evenly over the ranks of codes.
    """
    chosen = _choose(_search(codes, text, size))
    found = _judge(codes, text, chosen)
    feature, near = _beside(codes, text, examples, reach)
    n, hits = codes.shape[1], _covered(chosen, text, feature, near)
    with np.errstate(invalid="ignore"):
        apart = 1 - np.bincount(feature, hits, n) / np.bincount(feature, minlength=n)
    found["fuzzing"] = (found["recall"] + apart) / 2
    groups = [[] for _ in range(n)]
    for one, group in zip(chosen.feature.tolist(), chosen.group.tolist()):
        groups[one].append(group)
    told = list(zip(chosen.rule.tolist(), groups))
    found["rule"] = [text.names[rule] if its else "none" for rule, its in told]
    found["explanation"] = [_sentence(text, rule, its) for rule, its in told]
    return pd.DataFrame(found)


class Offer(NamedTuple):
    """One rule's best groups for each feature, and what they are worth in the fit half."""

    feature: np.ndarray  # (K,), ascending
    group: np.ndarray  # (K,), those that add most first
    tested: np.ndarray  # (K,): positions of the group in the held-out half
    gain: np.ndarray  # (n,): share of firings covered less share of silent positions covered
    f1: np.ndarray  # (n,): F1 less 0.001 a group


class Explanations(NamedTuple):
    """Each feature's rule, and its groups of that rule, as in `Offer`."""

    rule: np.ndarray  # (n,)
    feature: np.ndarray  # (K,)
    group: np.ndarray
    tested: np.ndarray


def _search(codes: csc_array, text: Text, size: int) -> list[Offer]:
    """What each rule offers to explain the firings of the fit half."""
    p, j, _ = firings(codes)
    p, j = p[text.fit[p]], j[text.fit[p]]
    fired = np.bincount(j, minlength=codes.shape[1])
    return [_offer(ids, text.fit, j, ids[p], fired, size) for ids in text.ids]


def _offer(ids: np.ndarray, fit: np.ndarray, feature: np.ndarray, group: np.ndarray,
           fired: np.ndarray, size: int) -> Offer:
    """One rule's best groups, from its ids (m,) and the feature and group of each firing.

    A group that fired once does not count: with that firing left out it would be unknown.
    """
    n, groups = len(fired), int(ids.max()) + 1  # n x groups can pass int32
    seen = np.bincount(ids[fit], minlength=groups)
    key, count = _counted(feature * groups + group, n * groups)
    feature, group = key // groups, key % groups
    silent = np.maximum(fit.sum() - fired, 1)[feature]
    gain = count / fired[feature] - (seen[group] - count) / silent
    good = np.flatnonzero((count > 1) & (gain > 0))
    place = np.arange(len(good)) - np.searchsorted(feature[good], np.arange(n))[feature[good]]
    best = good[ordered_within(feature[good], ~sortable(gain[good]))[place < size]]  # largest first
    feature, group, count, gain = feature[best], group[best], count[best], gain[best]
    either = np.maximum(fired + np.bincount(feature, seen[group], n), 1)
    f1 = 2 * np.bincount(feature, count, n) / either - 0.001 * np.bincount(feature, minlength=n)
    tested = np.bincount(ids[~fit], minlength=groups)[group]
    return Offer(feature, group, tested, np.bincount(feature, gain, n), f1)


def _choose(offers: list[Offer]) -> Explanations:
    """Each feature's rule: of those within 0.02 of the largest gain the one with the largest F1.

    A token detects its bigrams almost as well as they do, but is less often right.
    """
    gain, f1 = (np.stack([getattr(offer, name) for offer in offers]) for name in ("gain", "f1"))
    rule = np.argmax(np.where(gain >= gain.max(axis=0) - 0.02, f1, -1), axis=0)
    mine = [np.stack(offer[:3])[:, rule[offer.feature] == i] for i, offer in enumerate(offers)]
    return Explanations(rule, *np.concatenate(mine, axis=1))


def _covered(chosen: Explanations, text: Text, feature: np.ndarray,
             position: np.ndarray) -> np.ndarray:
    """Whether each feature's explanation holds at each position, (q,) bool, of q pairs."""
    most = int(text.ids.max(initial=0)) + 1
    keys = np.sort(chosen.feature * most + chosen.group)
    return _isin(feature * most + text.ids[chosen.rule[feature], position], keys)


def _judge(codes: csc_array, text: Text, chosen: Explanations) -> dict[str, np.ndarray]:
    """The scores (n,) of explanations on the whole held-out half."""
    n, (p, j, v) = codes.shape[1], firings(codes)
    tests = ~text.fit[p]
    p, j, v = p[tests], j[tests], v[tests]
    hit = _covered(chosen, text, j, p)
    fired, right = np.bincount(j, minlength=n), np.bincount(j, hit, n)
    says = np.bincount(chosen.feature, chosen.tested, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = right / fired
        by_mass = np.bincount(j, hit * v, n) / np.bincount(j, v, n)
        apart = 1 - (says - right) / ((~text.fit).sum() - fired)
        return dict(detection=(recall + apart) / 2, detection_mass=(by_mass + apart) / 2,
                    precision=right / says, recall=recall,
                    rule_f1=2 * right / np.where(fired > 0, fired + says, np.nan))


def _beside(codes: csc_array, text: Text, examples: int,
            reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, and silent positions at most `reach` tokens from `examples` of their firings."""
    m, (p, j, _) = codes.shape[0], firings(codes)
    chosen, steps = evenly(codes, ~text.fit, examples), np.r_[-reach:0, 1:reach + 1]
    near = (p[chosen, None] + steps).ravel()
    inside = (near >= 0) & (near < m)
    near, which = near[inside], np.repeat(chosen, len(steps))[inside]
    close = text.row[near] == text.row[p[which]]
    close &= np.abs(text.column[near] - text.column[p[which]]) <= reach
    near, feature = near[close], j[which[close]]
    silent = ~_isin(feature * m + near, j * m + p)
    return feature[silent], near[silent]


def _counted(keys: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of keys in [0, most), in order, and how often each occurs."""
    if most > 1 << 23:
        return np.unique(keys, return_counts=True)
    count = np.bincount(keys)  # small enough to count without sorting
    distinct = np.flatnonzero(count)
    return distinct, count[distinct]


def _isin(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values (q,), >= 0, are among ordered ones. Searches for sorted ones are faster."""
    order, found = np.argsort(values), np.empty(len(values), bool)
    values, ended = values[order], np.r_[ordered, -1]  # what is larger than all finds -1
    found[order] = ended[np.searchsorted(ordered, values)] == values
    return found


def _sentence(text: Text, rule: int, groups: list[int]) -> str:
    """A rule and its groups in words."""
    told = [text.describe(rule, group) for group in groups]
    if not told:
        return "none"
    if rule in text.attributes:
        return " or ".join(told)
    return f"{text.names[rule]}: {', '.join(told)}"
