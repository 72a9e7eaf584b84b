"""What each feature answers to: unigrams and n-grams fed alone, and tokens and contexts in real text."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_array, csr_array
from tqdm import tqdm

from tsae.sae import SAE


@dataclass
class Response:
    """Codes of m isolated inputs (unigrams `[BOS, t]` or longer), reduced to one row a feature.

    above (len(thresholds), n): inputs with a code above each threshold; best (n, top): the inputs with the largest codes,
    strongest first, -1 where fewer fired; peak (n,): the largest code.
    """

    above: np.ndarray
    best: np.ndarray
    peak: np.ndarray


@torch.no_grad()
def respond(sae: SAE, x: torch.Tensor, t: torch.Tensor, thresholds: list[float], top: int = 10,
            batch: int = 4096) -> Response:
    """Feed m isolated inputs, activations x (m, d) raw with last tokens t (m,); thresholds in units of the SAE's scale."""
    above = torch.zeros(len(thresholds), sae.n, dtype=torch.long)
    values, index = torch.zeros(sae.n, 0), torch.zeros(sae.n, 0, dtype=torch.long)
    for first in range(0, len(x), batch):
        codes = sae.encode(x[first:first + batch], t[first:first + batch]).cpu()
        above += torch.stack([(codes > threshold).sum(0) for threshold in thresholds])
        values, index = _merge(values, index, codes, first, top)
    return Response(above.numpy(), torch.where(values > 0, index, -1).numpy(), values[:, 0].numpy())


def _merge(values: torch.Tensor, index: torch.Tensor, codes: torch.Tensor, first: int, top: int):
    """The `top` largest of those held (n, top) and of codes (b, n) of inputs first .. first + b - 1."""
    new, at = codes.T.topk(min(top, len(codes)), dim=1)
    values, index = torch.cat([values, new], 1), torch.cat([index, at + first], 1)
    values, order = values.topk(min(top, values.shape[1]), dim=1)
    return values, index.gather(1, order)


@dataclass
class Scan:
    """Every feature's firings on real text: n features, V tokens, m positions.

    count, mass (n, V) sparse: firings and summed codes per token; best (n, top): positions of the largest codes,
    strongest first, -1 where fewer fired; best_code (n, top): those codes.
    """

    count: csr_array
    mass: csr_array
    best: np.ndarray
    best_code: np.ndarray
    positions: int


@torch.no_grad()
def scan(sae: SAE, x: torch.Tensor, t: torch.Tensor, vocabulary: int, top: int = 20, batch: int = 4096) -> Scan:
    """One pass of real activations x (m, d) raw with tokens t (m,) through the encoder."""
    count = mass = csr_array((sae.n, vocabulary))
    values, index = torch.zeros(sae.n, 0), torch.zeros(sae.n, 0, dtype=torch.long)
    for first in tqdm(range(0, len(x), batch), "scanning features", leave=False):
        tokens = t[first:first + batch]
        codes = sae.encode(x[first:first + batch], tokens).cpu()
        at, feature = codes.nonzero(as_tuple=True)
        where = (feature.numpy(), tokens.cpu()[at].numpy())
        mass = mass + coo_array((codes[at, feature].double().numpy(), where), mass.shape).tocsr()
        count = count + coo_array((np.ones(len(at)), where), count.shape).tocsr()
        values, index = _merge(values, index, codes, first, top)
    return Scan(count, mass, torch.where(values > 0, index, -1).numpy(), values.numpy(), len(x))


def effective_number(weights: csr_array) -> np.ndarray:
    """exp of the entropy of each row's weights: 1 when one column has it all, c when c columns share it. 0 if empty."""
    total = weights.sum(axis=1)
    logs = weights.copy()
    logs.data = weights.data * np.log(weights.data)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, np.exp(np.log(total) - logs.sum(axis=1) / total), 0.0)


def token_statistics(scanned: Scan, t: np.ndarray) -> pd.DataFrame:
    """One row a live feature: how often it fires, and over how many tokens, weighted in three ways.

    frequency: share of positions; tokens_peak: effective number of tokens over its `top` largest codes; tokens_firing:
    over all firings alike; tokens_mass: firings weighted by their code; modal_token, modal_share: by mass. A single-token
    feature has 1 effective token. `t` (m,) are the token ids of the scan.
    """
    firings = scanned.count.sum(axis=1)
    live = np.flatnonzero(firings)
    best = scanned.best[live]
    rows, columns = np.nonzero(best >= 0)
    peak = coo_array((np.ones(len(rows)), (rows, t[best[rows, columns]])), (len(live), scanned.mass.shape[1])).tocsr()
    mass = scanned.mass[live]
    modal = mass.argmax(axis=1)
    return pd.DataFrame(dict(
        feature=live, frequency=firings[live] / scanned.positions, peak_code=scanned.best_code[live, 0],
        tokens_peak=effective_number(peak), tokens_firing=effective_number(scanned.count[live]),
        tokens_mass=effective_number(mass), modal_token=modal,
        modal_share=mass.max(axis=1).toarray().ravel() / mass.sum(axis=1)))


def overlap(response: Response, scanned: Scan, last_tokens: np.ndarray, t: np.ndarray, threshold: int = 0,
            top: int = 10) -> dict[str, float]:
    """Claim 5: shares of live features that isolated inputs activate, and whether real text agrees.

    answering: of live features, those with some input above thresholds[threshold]; top_is_top: of these, those whose
    strongest input ends in the token of their strongest position in text; any_shared: whose `top` strongest inputs and
    `top` strongest positions share a last token. `last_tokens` (m,) belong to the inputs, `t` to the scan.
    """
    live = scanned.best[:, 0] >= 0
    answering = live & (response.above[threshold] > 0)
    same, shared = [], []
    for feature in np.flatnonzero(answering):
        inputs = last_tokens[response.best[feature][response.best[feature] >= 0]][:top]
        seen = t[scanned.best[feature][scanned.best[feature] >= 0]][:top]
        same.append(inputs[0] == seen[0])
        shared.append(np.isin(inputs, seen).any())
    return dict(live=int(live.sum()), answering=answering.sum() / max(1, live.sum()),
                top_is_top=float(np.mean(same)) if same else float("nan"),
                any_shared=float(np.mean(shared)) if shared else float("nan"))


def grams(rows: torch.Tensor, keep: torch.Tensor, n: int, most: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The distinct n-grams (m, n) of token rows (N, T) and their counts (m,), most frequent first.

    Only n-grams whose positions are all in `keep` (N, T). `most` > 0: only that many.
    """
    windows = rows.unfold(1, n, 1)[keep.unfold(1, n, 1).all(-1)]
    distinct, counts = _unique_rows(windows.numpy())
    order = np.argsort(-counts, kind="stable")[:most or None]
    return distinct[order], counts[order]


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ordered = rows[np.lexsort(rows.T[::-1])]
    starts = np.flatnonzero(np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)]) if len(ordered) else np.array([], int)
    return ordered[starts], np.diff(np.r_[starts, len(ordered)])


def where(keep: torch.Tensor) -> np.ndarray:
    """(m, 2) row and column of every kept position of (N, T), in the order in which pairs are collected."""
    return keep.nonzero().numpy()


def contexts(scanned: Scan, feature: int, rows: torch.Tensor, places: np.ndarray, tokenizer, examples: int = 5,
             before: int = 12, after: int = 4) -> pd.DataFrame:
    """A feature's strongest contexts as text: columns code, before, token, after. `places` from `where`."""
    found = []
    for position, code in zip(scanned.best[feature][:examples], scanned.best_code[feature]):
        if position < 0:
            break
        row, column = places[position]
        text = rows[row].tolist()
        parts = text[max(1, column - before):column], [text[column]], text[column + 1:column + 1 + after]
        found.append(dict(zip(("before", "token", "after"), map(tokenizer.decode, parts)), code=float(code)))
    return pd.DataFrame(found, columns=["code", "before", "token", "after"])
