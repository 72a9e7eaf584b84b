"""What the pages show of an SAE: its features, their contexts and tokens, and the text's tokens."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csc_array
from torch.nn.functional import normalize

from tsae.baseline import token_ids
from tsae.codes import by_strength, encoded, firings, ordered_within
from tsae.sae import SAE
from tsae.scoring.dictionary import nearest_rows

BINS = 30  # of a histogram of codes, of equal width from 0 to the feature's largest code
LISTED, NEAREST = 8, 6  # tokens in a list of a feature or features of a token; nearest rows


@dataclass
class Material:
    """Held-out text and what belongs to its language model, the same for all SAEs shown."""
    x: torch.Tensor  # (m, d) raw activations of m positions
    t: torch.Tensor  # (m,) their tokens
    rows: torch.Tensor  # (N, T) the token rows they come from
    places: np.ndarray  # (m, 2) their row and column in these, from features.where
    strings: list[str]  # the V tokens as text
    unigrams: torch.Tensor | None = None  # (V, d) the activations of [BOS, t]
    unembedding: torch.Tensor | None = None  # (V, d) scores next tokens; has the final norm's gain

    def __post_init__(self):
        tokens, known = self.rows.cpu().numpy()[tuple(self.places.T)], len(self.strings)
        own = token_ids(self.t).cpu().numpy()
        if len(self.x) != len(self.t) or not np.array_equal(tokens, own):
            raise ValueError("x, t and places do not belong together: rows[places] must be t "
                             "(see features.where)")
        if (np.diff(self.places @ [self.rows.shape[1], 1]) <= 0).any():
            raise ValueError("the places are not in reading order: take them from features.where")
        if (largest := int(self.rows.max())) >= known:
            raise ValueError(f"the text holds token {largest}, there are strings for {known}")
        for name, table in dict(unigrams=self.unigrams, unembedding=self.unembedding).items():
            if table is not None and len(table) != known:
                raise ValueError(f"{name} has {len(table)} rows, with strings for {known} tokens")


@dataclass
class Pages:
    """What is shown of one SAE."""
    name: str
    n: int  # its features, of which some are live
    scores: pd.DataFrame  # a row for each live feature
    features: list[dict]  # one for each of these rows
    tokens: dict[int, dict]  # one for each token of the text
    directions: torch.Tensor  # (live, d) the decoder's rows, of unit norm


def gather(sae: SAE, name: str, material: Material, scores: pd.DataFrame | None = None,
           contexts_each: int = 8, seed: int = 0) -> Pages:
    """One pass over the text, and everything that is shown of an SAE.

    `scores` has a column "feature" and any others: numbers, text, or token ids where the name ends
    in `_token`. Contexts are `contexts_each` of the strongest, of those nearest to the median code,
    and of random ones; a row of text stands in each list once. Codes are in the SAE's scale.
    """
    if sae.vocabulary and sae.vocabulary != len(material.strings):
        raise ValueError(f"the table of {name!r} has {sae.vocabulary} rows, there are strings for "
                         f"{len(material.strings)} tokens")
    codes = encoded(sae, material.x, material.t)
    live = np.flatnonzero(np.diff(codes.indptr))
    if not len(live):
        raise ValueError(f"no feature of {name!r} fires on this text: there is nothing to show")
    codes = codes[:, live]  # from here on features are numbered 0 .. len(live) - 1, and all fire
    peak = np.maximum.reduceat(codes.data, codes.indptr[:-1])
    mass = np.add.reduceat(codes.data, codes.indptr[:-1], dtype=np.float64)
    t = token_ids(material.t).cpu().numpy().astype(np.int64)
    directions = sae.W_dec.detach()[torch.as_tensor(live, device=sae.W_dec.device)].float()
    pairs = _by_token(codes, t)
    best = _heaviest(pairs, "feature")
    share = short(best["mass"] / mass[best["feature"]])  # of the feature's mass
    shown = dict(peak=short(peak).tolist(), histogram=_histograms(codes, peak).tolist(),
                 contexts=_contexts(codes, material.places, contexts_each, seed),
                 tokens=_lists(best["feature"], len(live), best["token"].tolist(), share.tolist()),
                 **_related(sae, directions, material))
    features = [dict(zip(shown, row)) for row in zip(*shown.values())]
    tokens = _features_of_tokens(pairs, t, live)
    if (table := sae.baseline.token_rows()) is not None:
        describe_rows(tokens, table.float() * sae.scale, "row")
    count = np.diff(codes.indptr)
    table = pd.DataFrame(dict(feature=live, frequency=count / len(t), peak_code=peak,
                              mean_code=mass / count))
    table = table if scores is None else _joined(table, scores)
    return Pages(name, sae.n, table, features, tokens, normalize(directions, dim=1))


def short(values: np.ndarray) -> np.ndarray:
    """Float64 with four significant digits."""
    values = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = 10.0 ** np.clip(3 - np.floor(np.log10(np.abs(values))), 0, 15)
        return np.where(np.isfinite(values) & (values != 0), np.round(values * unit) / unit, values)


def leading(order: np.ndarray, group: np.ndarray, most: int) -> np.ndarray:
    """The first `most` entries of each group, of an order that has one group after the other."""
    ordered = group[order]
    return order[np.arange(len(order)) - np.searchsorted(ordered, ordered) < most]


def _lists(group: np.ndarray, n: int, *columns: list) -> list[list[tuple]]:
    """The rows of `columns`, in one list for each of n groups. `group` ascends."""
    rows, ends = list(zip(*columns)), np.searchsorted(group, np.arange(n + 1))
    return [rows[first:end] for first, end in pairwise(ends.tolist())]


def _joined(table: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns of `scores`, which replace its own of the same name."""
    if "feature" not in scores or scores["feature"].duplicated().any():
        raise ValueError('the scores need a column "feature" that names every feature once')
    ours = [name for name in table if name == "feature" or name not in scores]
    columns = list(dict.fromkeys([*table, *scores]))
    return table[ours].merge(scores, on="feature", how="left")[columns]


def _histograms(codes: csc_array, peak: np.ndarray) -> np.ndarray:
    """How many of each feature's codes fall into each bin, (live, BINS)."""
    feature = firings(codes)[1]
    bins = np.minimum(BINS * (codes.data / peak[feature]), BINS - 1).astype(np.int64)  # in float32
    return np.bincount(feature * BINS + bins, minlength=BINS * len(peak)).reshape(-1, BINS)


def _contexts(codes: csc_array, places: np.ndarray, each: int, seed: int) -> list[dict[str, list]]:
    """For each feature {kind: [(row, column, columns and codes of its firings in that row)]}."""
    position, feature, code = firings(codes)
    row, column = places[position].T
    in_row = feature * (int(row.max()) + 1) + row  # ascends: firings are in reading order
    top = by_strength(codes)
    rank = np.empty(len(top), np.int64)
    rank[top] = np.arange(len(top)) - codes.indptr[feature]  # 0 is the feature's strongest
    from_middle = abs(2 * rank - np.diff(codes.indptr)[feature] + 1).astype(np.uint32)
    lot = np.random.default_rng(seed).permutation(len(top)).astype(np.uint32)
    orders = dict(top=top, middle=ordered_within(feature, from_middle),
                  random=ordered_within(feature, lot))
    columns, shown, found = column.tolist(), short(code).tolist(), {}
    for kind, order in orders.items():
        firsts = order[np.sort(np.unique(in_row[order], return_index=True)[1])]  # one a row
        chosen = leading(firsts, feature, each)
        spans = list(zip(np.searchsorted(in_row, in_row[chosen]).tolist(),
                         np.searchsorted(in_row, in_row[chosen], side="right").tolist()))
        found[kind] = _lists(feature[chosen], codes.shape[1], row[chosen].tolist(),
                             column[chosen].tolist(), [columns[a:b] for a, b in spans],
                             [shown[a:b] for a, b in spans])
    return [dict(zip(found, kinds)) for kinds in zip(*found.values())]


def _by_token(codes: csc_array, t: np.ndarray) -> pd.DataFrame:
    """For each feature and token on which it fires: sum (mass) and number (fired) of its codes."""
    position, feature, code = firings(codes)
    above = int(t.max()) + 1
    pair, entry = np.unique(feature * above + t[position], return_inverse=True)
    feature, token = np.divmod(pair, above)
    return pd.DataFrame(dict(feature=feature, token=token, mass=np.bincount(entry, code),
                             fired=np.bincount(entry)))


def _heaviest(pairs: pd.DataFrame, by: str) -> pd.DataFrame:
    """The LISTED rows with the largest mass of each feature, or of each token: `by` says which."""
    group = pairs[by].to_numpy()
    return pairs.iloc[leading(np.lexsort((-pairs["mass"], group)), group, LISTED)]


def _features_of_tokens(pairs: pd.DataFrame, t: np.ndarray, live: np.ndarray) -> dict[int, dict]:
    """{token: dict(features=[(feature, share of positions, mean code)], l0=firings a position)}."""
    seen, occurs = np.unique(t, return_counts=True)
    best = _heaviest(pairs, "token")
    place = np.searchsorted(seen, best["token"])
    features = _lists(place, len(seen), live[best["feature"]].tolist(),
                      short(best["fired"] / occurs[place]).tolist(),
                      short(best["mass"] / best["fired"]).tolist())
    fired = np.bincount(pairs["token"], pairs["fired"], minlength=seen[-1] + 1)[seen]
    return {token: dict(features=found, l0=l0)
            for token, found, l0 in zip(seen.tolist(), features, short(fired / occurs).tolist())}


def matches(a: torch.Tensor, b: torch.Tensor, top: int, sign: int = 1) -> list[list[tuple]]:
    """For every row of a, [(row of b, <a, b>)] of the `top` from `nearest_rows`."""
    value, index = nearest_rows(a, b, top, sign)
    return [list(zip(*row)) for row in zip(index.tolist(), short(value.numpy()).tolist())]


def _centred(table: torch.Tensor) -> torch.Tensor:
    return normalize(table - table.mean(0), dim=1)


def _related(sae: SAE, directions: torch.Tensor, material: Material) -> dict[str, list]:
    """Tokens that each direction (live, d) promotes, suppresses, is near to: [(token, product)]."""
    lists, unit = {}, normalize(directions, dim=1)
    if material.unembedding is not None:
        logits = (material.unembedding - material.unembedding.mean(0)).to(directions) * sae.scale
        lists["promoted"] = matches(directions, logits, LISTED)
        lists["suppressed"] = matches(directions, logits, LISTED, -1)
    if material.unigrams is not None:
        lists["unigrams"] = matches(unit, _centred(material.unigrams).to(unit), NEAREST)
    if (table := sae.baseline.token_rows()) is not None:
        lists["rows"] = matches(unit, _centred(table).float(), NEAREST)
    return lists


def describe_rows(tokens: dict[int, dict], table: torch.Tensor, name: str) -> None:
    """Add to each token's dict its row of `table` (V, d): norm, rank by it, nearest other rows."""
    ids = list(tokens)
    rows = table[torch.tensor(ids, device=table.device)]
    norm, unit = rows.norm(dim=1).cpu().numpy(), _centred(rows)
    rank = short(norm.argsort().argsort() / max(1, len(ids) - 1)).tolist()
    for token, size, place, near in zip(ids, short(norm).tolist(), rank,
                                        matches(unit, unit, NEAREST)):
        tokens[token][name] = [size, place, [(ids[i], cosine) for i, cosine in near]]
