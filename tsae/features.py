"""What each feature answers to: unigrams and n-grams fed alone, and contexts in real text."""

import html
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML
from scipy.sparse import csc_array

from tsae.codes import encoded, firings, strongest
from tsae.sae import SAE


@dataclass
class Response:
    """Codes of m isolated inputs (unigrams `[BOS, t]` or longer), reduced to one row a feature.

    above (len(thresholds), n): how many have a code above each threshold; best (n, top): the inputs
    with the largest codes, strongest first, -1 where fewer fired.
    """

    above: np.ndarray
    best: np.ndarray


def respond(sae: SAE, x: torch.Tensor, t: torch.Tensor, thresholds: list[float | np.ndarray],
            top: int = 10) -> Response:
    """Feed m isolated inputs: activations x (m, d) raw with last tokens t (m,).

    Thresholds are in units of the SAE's scale: one for all features, or one for each (n,).
    """
    codes = encoded(sae, x, t)
    feature = np.repeat(np.arange(sae.n), np.diff(codes.indptr))
    bars = [np.broadcast_to(threshold, sae.n)[feature] for threshold in thresholds]
    above = [np.bincount(feature[codes.data > bar], minlength=sae.n) for bar in bars]
    return Response(np.stack(above), strongest(codes, top)[0])


def mean_codes(codes: csc_array) -> np.ndarray:
    """Each feature's mean code over its firings (n,); inf for a feature that never fires."""
    _, feature, code = firings(codes)
    counts = np.diff(codes.indptr)
    sums = np.bincount(feature, code, codes.shape[1])
    return np.where(counts, sums / np.maximum(counts, 1), np.inf)


@dataclass
class Scan:
    """Every feature's strongest firings on real text, and its mean code there.

    best (n, top): positions of the largest codes, strongest first, -1 where fewer fired; best_code
    (n, top): those codes; mean (n,): over all its firings, inf where there is none, so that nothing
    is above it.
    """

    best: np.ndarray
    best_code: np.ndarray
    mean: np.ndarray


def scan(sae: SAE, x: torch.Tensor, t: torch.Tensor, top: int = 20) -> Scan:
    """One pass of real activations x (m, d) raw with tokens t (m,) through the encoder."""
    codes = encoded(sae, x, t)
    return Scan(*strongest(codes, top), mean_codes(codes))


def single_token(codes: csc_array, t: np.ndarray, least: int = 50) -> float:
    """The share of features with over half of their activation mass on one token.

    Of the features with `least` firings or more in codes (m, n) with tokens t (m,); nan if none.
    """
    position, feature, code = firings(codes)
    pairs, which = np.unique(feature * (t.max() + 1) + t[position], return_inverse=True)
    mass, most = np.bincount(which, code), np.zeros(codes.shape[1])
    np.maximum.at(most, pairs // (t.max() + 1), mass)
    enough = np.diff(codes.indptr) >= least
    whole = np.bincount(feature, code, codes.shape[1])
    return float(np.mean(most[enough] > whole[enough] / 2)) if enough.any() else float("nan")


@torch.no_grad()
def top(lm, sae: SAE, layer: int, text: str, features: int = 3,
        frequency: np.ndarray | None = None, most: float = 0.05) -> pd.DataFrame:
    """The strongest features at each token of a text: columns position, token, feature, code.

    `lm`: a tsae.lm.LM. Codes are in units of the SAE's scale; position 1 is the first after BOS.
    Special tokens and sinks have no features. With `frequency` (n,), the share of positions at
    which each feature fires, those that fire at more than `most` say little and are left out; the
    frequency is a column.
    """
    row = torch.tensor([[lm.bos, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    needs = sae.baseline.needs
    found = lm.residuals(row, [layer, *needs.layers])
    known = needs.context(row.to(lm.device), found)
    kept = lm.keep(row.to(lm.device), found[layer], sae.limit or math.inf)
    codes = sae.encode(found[layer][0, 1:], known[0, 1:]) * kept[0, 1:, None]
    if frequency is not None:
        codes[:, torch.from_numpy(np.asarray(frequency) > most).to(codes.device)] = 0
    values, index = codes.topk(min(features, sae.n), dim=1)
    position, rank = (values > 0).cpu().nonzero(as_tuple=True)
    words = [lm.tokenizer.decode([i]) for i in row[0, 1:].tolist()]
    feature, code = index.cpu()[position, rank], values.cpu()[position, rank]
    table = pd.DataFrame(dict(position=position + 1, token=[words[i] for i in position],
                              feature=feature, code=code))
    return table if frequency is None else table.assign(frequency=frequency[table["feature"]])


def show(tokens: list[str], codes: np.ndarray) -> HTML:
    """A text with its tokens shaded by a feature's codes (m,): the strongest is darkest."""
    codes = np.asarray(codes, float)
    if len(tokens) != len(codes):
        raise ValueError(f"{len(tokens)} tokens and {len(codes)} codes were given to show: "
                         "expected one code a token")
    shade = codes / max(codes.max(initial=0), 1e-9)
    spans = [f'<span style="background:rgba(217,84,30,{share:.2f})" title="{code:.2f}">'
             f"{html.escape(word)}</span>" for word, share, code in zip(tokens, shade, codes)]
    return HTML(f'<div style="white-space:pre-wrap;line-height:1.7">{"".join(spans)}</div>')


def overlap(response: Response, scanned: Scan, last_tokens: np.ndarray, t: np.ndarray,
            which: int = 0, top: int = 10) -> dict[str, float]:
    """Claim 5: shares of live features that isolated inputs activate, and whether real text agrees.

    answering: of live features, those with some input above thresholds[which]; top_is_top: of
    these, those whose strongest input ends in the token of their strongest position in text;
    any_shared: whose `top` strongest inputs and `top` strongest positions share a last token.
    `last_tokens` (m,) belong to the inputs, `t` to the scan.
    """
    live = scanned.best[:, 0] >= 0
    answering = live & (response.above[which] > 0)
    alone, real = response.best[answering, :top], scanned.best[answering, :top]
    alone = np.where(alone >= 0, last_tokens[alone], -1)
    real = np.where(real >= 0, t[real], -2)  # no token: never the same as none alone
    same = alone[:, 0] == real[:, 0]
    shared = (alone[:, :, None] == real[:, None, :]).any((1, 2))
    return dict(live=int(live.sum()), answering=answering.sum() / max(1, live.sum()),
                top_is_top=float(np.mean(same)) if len(same) else float("nan"),
                any_shared=float(np.mean(shared)) if len(same) else float("nan"))


def grams(rows: torch.Tensor, keep: torch.Tensor, n: int,
          most: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The distinct n-grams (m, n) of token rows (N, T) and their counts (m,), most frequent first.

    Only n-grams whose positions are all in `keep` (N, T). `most` > 0: only that many.
    """
    windows = rows.unfold(1, n, 1)[keep.unfold(1, n, 1).all(-1)]
    distinct, counts = _unique_rows(windows.numpy())
    order = np.argsort(-counts, kind="stable")[:most or None]
    return distinct[order], counts[order]


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique(rows, axis=0, return_counts=True), several times as fast for a few columns."""
    ordered = rows[np.lexsort(rows.T[::-1])]
    new = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)][:len(ordered)]
    starts = np.flatnonzero(new)
    return ordered[starts], np.diff(np.r_[starts, len(ordered)])


def where(keep: torch.Tensor) -> np.ndarray:
    """(m, 2) row and column of every kept position of (N, T), in the order of the pairs."""
    return keep.nonzero().numpy()


def contexts(scanned: Scan, feature: int, rows: torch.Tensor, places: np.ndarray, tokenizer,
             examples: int = 5, before: int = 12, after: int = 4) -> pd.DataFrame:
    """A feature's strongest contexts as text: columns code, before, token, after.

    `rows` (N, T) are the tokens of the scan, `places` (m, 2) from `where`.
    """
    found = []
    for position, code in zip(scanned.best[feature][:examples], scanned.best_code[feature]):
        if position < 0:
            break
        row, column = places[position]
        tokens = rows[row].tolist()
        first, end = max(1, column - before), column + 1 + after
        found.append(dict(code=float(code), before=tokenizer.decode(tokens[first:column]),
                          token=tokenizer.decode(tokens[column:column + 1]),
                          after=tokenizer.decode(tokens[column + 1:end])))
    return pd.DataFrame(found, columns=["code", "before", "token", "after"])
