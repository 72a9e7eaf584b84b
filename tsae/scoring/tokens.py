"""Over how many tokens each feature fires, and how much a firing says of the token."""

import numpy as np
import pandas as pd
from scipy.sparse import csc_array, csr_array

from tsae.codes import by_strength, firings, first_of_each, ordered_within
from tsae.scoring.heldout import Text

WEIGHTS = dict(peak="its strongest firings", drawn="as many firings drawn evenly",
               firing="all its firings", mass="its firings weighted by their codes")


def token_statistics(codes: csc_array, text: Text, top: int = 20, seed: int = 0) -> pd.DataFrame:
    """Over how many tokens each feature fires, and how much a firing says of the token.

    Firings are weighted in four ways. peak: the `top` largest codes; drawn: `top` firings drawn
    evenly, the fair partner of the peak, as `top` firings cannot show more than `top` tokens;
    firing: all alike; mass: by their code.

    Columns tokens_*: effective number of tokens; modal_share_*: share of the commonest; bits_*:
    mutual information of firing and token, less the bias of few firings (Miller and Madow);
    told_*: bits over the entropy of firing, 1 where the token tells all; modal_token: the
    commonest by mass.
    """
    (m, n), (p, j, v) = codes.shape, firings(codes)
    tokens, token = np.unique(text.t, return_inverse=True)
    random = np.random.default_rng(seed).integers(2**32, size=len(p), dtype=np.uint32)
    peak, drawn = (first_of_each(order, j, codes.indptr, top)
                   for order in (by_strength(codes), ordered_within(j, random)))
    rate, alike, found = np.diff(codes.indptr) / m, np.ones(len(p)), {}
    entropy, count = -_plogp(rate) - _plogp(1 - rate), _by_token(codes, token, alike)
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, weight in dict(peak=peak, drawn=drawn, firing=alike, mass=v).items():
            table = _by_token(codes, token, weight)
            total = np.maximum(table.sum(axis=1), 1e-300)
            bits = _information(table, count, np.bincount(token), rate)
            table.eliminate_zeros()  # tokens whose firings have no weight
            effective = total**2 / np.maximum(np.bincount(j, weight**2, n), 1e-300)  # firings
            bias = rate * np.maximum(np.diff(table.indptr) - 1, 0) / (2 * np.log(2) * effective)
            bits = np.clip(bits - bias, 0, entropy)
            found |= {f"tokens_{name}": effective_number(table), f"bits_{name}": bits,
                      f"told_{name}": bits / entropy,
                      f"modal_share_{name}": table.max(axis=1).toarray().ravel() / total}
    return pd.DataFrame(found | dict(modal_token=tokens[table.argmax(axis=1)]))  # the last is mass


def _by_token(codes: csc_array, token: np.ndarray, weight: np.ndarray) -> csr_array:
    """Weights (nnz,) of firings summed by feature and token: (n, V), for tokens (m,) below V."""
    position, feature, _ = firings(codes)
    shape = codes.shape[1], token.max(initial=0) + 1
    return csr_array((weight, (feature, token[position])), shape=shape)


def effective_number(weights: csr_array) -> np.ndarray:
    """exp of the entropy of each row's weights: c if c columns share alike, 0 if none has any."""
    total, logs = weights.sum(axis=1), weights.copy()
    logs.data = weights.data * np.log(weights.data)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, np.exp(np.log(total) - logs.sum(axis=1) / total), 0.0)


def _information(table: csr_array, count: csr_array, size: np.ndarray,
                 rate: np.ndarray) -> np.ndarray:
    """Mutual information (n,) in bits of the token and of firing, at the rate (n,).

    Rows of table (n, V) give P(token | fires); count (n, V) and size (V,), how often the feature
    fires at the token and how often that occurs, give P(token | silent). Both have entries where
    there are firings only: each other token adds -P(token, silent) log P(silent), all in one term.
    """
    n, m, feature = len(rate), size.sum(), np.repeat(np.arange(len(rate)), np.diff(table.indptr))
    total, fired = np.maximum(table.sum(axis=1), 1e-300), count.sum(axis=1)
    silent = (size[count.indices] - count.data) / np.maximum(m - fired, 1)[feature]
    on, off = np.log2(np.maximum(rate, 1e-300)), np.log2(np.maximum(1 - rate, 1e-300))
    q, r = table.data / total[feature] * rate[feature], silent * (1 - rate[feature])
    bits = _plogp(q) + _plogp(r) - _plogp(q + r) - q * on[feature] - r * off[feature]
    return np.bincount(feature, bits, n) + (1 - np.bincount(feature, silent, n)) * (1 - rate) * -off


def _plogp(p: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log2(np.where(p > 0, p, 1)), 0.0)
