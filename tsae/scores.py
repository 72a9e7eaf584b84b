"""Automatic scores of every feature, from its codes on held-out text: how local, how token-bound, how explicable it is.

One `Text` (see tsae.heldout) is prepared once and shared by all SAEs; one pass of an SAE gives its codes, a sparse (m,
n) matrix; everything else is sparse arithmetic on the two. What is fitted (predictions, explanations) is fitted on one
half of the documents and scored on the other. `scored` puts all of it side by side, one row a live feature;
`reliability` says how far to trust it.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csc_array, csr_array
from scipy.stats import spearmanr

from tsae.features import effective_number
from tsae.heldout import LEVELS, Text, half
from tsae.sae import SAE

FIRST = ["feature", "explanation", "complexity_1", "complexity_3", "tokens_firing", "told_firing", "detection", "fuzzing",
         "firings", "frequency", "peak_code"]  # of the columns of `scored`, the ones to look at first
WEIGHTS = dict(peak="its strongest firings", drawn="as many firings drawn evenly", firing="all its firings",
               mass="its firings weighted by their codes")
MEANINGS = {  # what each column of `scored` (and of quality.dictionary) says, in a few words
    "firings": "positions where it fires", "modal_token": "the token with most of its activation",
    **{f"r2_{n}": f"how well the last {n} tokens predict its code (R², held-out)" for n in (1, 2, 3, 4)},
    **{f"auc_{n}": f"how well the last {n} tokens tell its firings from silence (AUC, held-out)" for n in (1, 2, 3, 4)},
    "complexity_1": "share of its code that the token leaves unexplained",
    "complexity_3": "share of its code that the last three tokens leave unexplained",
    **{f"tokens_{name}": f"effective number of tokens over {over}" for name, over in WEIGHTS.items()},
    **{f"modal_share_{name}": f"share of the commonest token in {over}" for name, over in WEIGHTS.items()},
    **{f"bits_{name}": f"bits that firing and token share, {over}" for name, over in WEIGHTS.items()},
    **{f"told_{name}": f"share of its firing that the token tells, {over}" for name, over in WEIGHTS.items()},
    "rule": "the kind of rule that finds its firings best", "explanation": "the rule itself",
    "detection": "the rule's balanced accuracy over the whole text (0.5 is chance)",
    "detection_mass": "the same, firings weighted by their codes",
    "precision": "share of the rule's hits where it fires", "recall": "share of its firings that the rule finds",
    "rule_f1": "precision and recall of the rule in one", "fuzzing": "the rule's balanced accuracy close to its firings",
    "nearest_feature": "the feature with the most similar decoder row", "nearest_cosine": "cosine to that row",
    "token_share": "share of its decoder row in the leading directions of the unigrams"}


@torch.no_grad()
def encoded(sae: SAE, x: torch.Tensor, t: torch.Tensor, batch: int = 4096) -> csc_array:
    """The codes (m, n) float32, in units of the SAE's scale, of raw activations x (m, d) with tokens t (m,)."""
    data, features, counts = [], [], []
    for a, tokens in zip(x.split(batch), t.split(batch)):
        if sae.activation == "topk":  # never builds the dense codes
            values, support = sae.selected(a / sae.scale, tokens)
            index, lengths = support.index, torch.full((len(a),), sae.k)
        else:
            codes = sae.encode(a, tokens)
            index, lengths = codes.nonzero()[:, 1], (codes != 0).sum(-1)
            values = codes[codes != 0]
        data.append(values.flatten().cpu()), features.append(index.flatten().cpu()), counts.append(lengths.cpu())
    ends = np.r_[0, torch.cat(counts).numpy().cumsum()]
    codes = csr_array((torch.cat(data).numpy(), torch.cat(features).numpy(), ends), shape=(len(x), sae.n)).tocsc()
    codes.eliminate_zeros(), codes.sort_indices()
    return codes


def firings(codes: csc_array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position p, feature j (ascending) and code v > 0 of every firing, each (nnz,)."""
    return (codes.indices.astype(np.int64), np.repeat(np.arange(codes.shape[1]), np.diff(codes.indptr)),
            codes.data.astype(np.float64))


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


def token_statistics(codes: csc_array, text: Text, top: int = 20, seed: int = 0) -> pd.DataFrame:
    """Over how many tokens each feature fires, and how much a firing says of the token, its firings weighted in four
    ways.

    peak: the `top` largest codes; drawn: `top` firings drawn evenly, the fair partner of the peak, as `top` firings
    cannot show more than `top` tokens; firing: all alike; mass: by their code. Columns tokens_*: effective number of
    tokens, exp of the entropy; modal_share_*: share of the commonest; bits_*: mutual information of firing and token in
    bits, with the tokens of firings so weighted and the rate of firing as it is, less the bias of few firings (Miller
    and Madow); told_*: bits over the entropy of firing, 1 where the token tells all. modal_token is by mass.
    """
    (m, n), (p, j, v) = codes.shape, firings(codes)
    tokens, token = np.unique(text.t, return_inverse=True)
    fired, size = np.diff(codes.indptr), np.bincount(token)
    drawn = _within(j, np.random.default_rng(seed).integers(2**32, size=len(p), dtype=np.uint32))
    weights = dict(peak=_first(strongest(codes), j, codes.indptr, top), drawn=_first(drawn, j, codes.indptr, top),
                   firing=np.ones(len(p)), mass=v)
    count, found, share = csr_array((weights["firing"], (j, token[p])), shape=(n, len(tokens))), {}, fired / m
    count.sum_duplicates()
    feature, rest = np.repeat(np.arange(n), np.diff(count.indptr)), np.maximum(m - fired, 1)
    silent = (size[count.indices] - count.data) / rest[feature]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -_plogp(share) - _plogp(1 - share)
        rate, idle = np.log2(np.maximum(share, 1e-300)), np.log2(np.maximum(1 - share, 1e-300))
        elsewhere = (1 - np.bincount(feature, silent, n)) * (1 - share) * -idle
        for name, weight in weights.items():
            table = csr_array((weight, (j, token[p])), shape=count.shape)
            table.sum_duplicates()
            total = np.maximum(table.sum(axis=1), 1e-300)
            q = table.data / total[feature] * share[feature]
            r = silent * (1 - share[feature])
            bits = np.bincount(feature, _plogp(q) + _plogp(r) - _plogp(q + r)
                               - q * rate[feature] - r * idle[feature], n) + elsewhere
            effective = total**2 / np.maximum(np.bincount(j, weight**2, n), 1e-300)
            kinds = np.bincount(feature, table.data > 0, n)
            bits = np.clip(bits - share * np.maximum(kinds - 1, 0) / (2 * np.log(2) * effective), 0, entropy)
            some = csr_array((table.data, table.indices, table.indptr), shape=table.shape, copy=True)
            some.eliminate_zeros()
            found |= {f"tokens_{name}": effective_number(some), f"bits_{name}": bits, f"told_{name}": bits / entropy,
                      f"modal_share_{name}": table.max(axis=1).toarray().ravel() / total}
    return pd.DataFrame(found | dict(modal_token=tokens[table.argmax(axis=1)]))


def strongest(codes: csc_array) -> np.ndarray:
    """The order (nnz,) of firings by feature, then strongest first (by float32 codes), then by position."""
    return _within(firings(codes)[1], ~codes.data.astype(np.float32).view(np.uint32))


def _within(group: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The order by group, then by key (uint32), then as they came: numpy sorts single numbers many times as fast as pairs."""
    return np.argsort((group.astype(np.uint64) << np.uint64(32)) | key, kind="stable")


def _first(order: np.ndarray, j: np.ndarray, ends: np.ndarray, top: int) -> np.ndarray:
    """1.0 (nnz,) at the first `top` of each feature's firings in an order that keeps features together."""
    chosen = np.zeros(len(order))
    chosen[order] = np.arange(len(order)) - ends[j] < top
    return chosen


def _plogp(p: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log2(np.where(p > 0, p, 1)), 0.0)


def spread(codes: csc_array, mask: np.ndarray, each: int) -> np.ndarray:
    """Up to `each` firings (indices into `firings`) of every feature in a mask (m,), evenly over the ranks of its
    codes."""
    order = strongest(codes)
    order = order[mask[codes.indices[order]]]
    feature = firings(codes)[1][order]
    count = np.bincount(feature, minlength=codes.shape[1])
    place, many = np.arange(len(order)) - (count.cumsum() - count)[feature], count[feature]
    return order[(2 * (place + 1) * each + many) // (2 * many) > (2 * place * each + many) // (2 * many)]


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
        order = np.flatnonzero(good)[_within(feature[good], ~gain[good].astype(np.float32).view(np.uint32))]
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
    near, of = _neighbours(spread(codes, held, examples), p, j, text, reach)
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


def scored(codes: csc_array, text: Text) -> pd.DataFrame:
    """Every score, one row a live feature: feature, firings, frequency (share of positions), peak_code (in units of the
    SAE's scale), and the columns of `ladder`, `token_statistics` and `explained`."""
    fired = np.diff(codes.indptr)
    first = pd.DataFrame(dict(feature=np.arange(len(fired)), firings=fired, frequency=fired / codes.shape[0],
                              peak_code=codes.max(axis=0).toarray().ravel()))
    table = pd.concat([first, ladder(codes, text), token_statistics(codes, text), explained(codes, text)], axis=1)
    return table[[*FIRST, *table.columns.drop(FIRST)]][fired > 0].reset_index(drop=True)


def reliability(codes: csc_array, text: Text, score: Callable[[csc_array, Text], pd.DataFrame] = scored, seed: int = 1,
                least: int = 20) -> pd.DataFrame:
    """Test and retest: each score computed on two disjoint halves of the documents; columns score, spearman, features.

    Spearman's rank correlation over the features that fire at least `least` times in both. A half has half of the text:
    with all of it scores are better than this (Spearman and Brown: 2 r / (1 + r)), given as `corrected`.
    """
    rows = []
    first = half(text.document, seed)
    tables = [score(codes[mask], text.take(mask)).set_index("feature") for mask in (first, ~first)]
    tables = [table[table["firings"] >= least] for table in tables]
    both = tables[0].index.intersection(tables[1].index)
    for name in tables[0].select_dtypes("number").columns.drop("modal_token", errors="ignore"):
        pair = pd.concat([table.loc[both, name] for table in tables], axis=1).dropna().to_numpy()
        flat = len(pair) < 3 or (np.ptp(pair, axis=0) == 0).any()
        rho = np.nan if flat else spearmanr(*pair.T).statistic
        rows.append(dict(score=name, spearman=rho, corrected=2 * rho / (1 + rho), features=len(pair)))
    return pd.DataFrame(rows)
