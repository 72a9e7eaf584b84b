"""Over how many tokens each feature fires, and how much a firing says of the token."""

import numpy as np
import pandas as pd
from scipy.sparse import csc_array, csr_array

from tsae.codes import by_strength, firings, first_of_each, ordered_within
from tsae.scoring.heldout import Text

WEIGHTS = dict(peak="its strongest firings", drawn="as many firings drawn evenly", firing="all its firings",
               mass="its firings weighted by their codes")


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
    drawn = ordered_within(j, np.random.default_rng(seed).integers(2**32, size=len(p), dtype=np.uint32))
    weights = dict(peak=first_of_each(by_strength(codes), j, codes.indptr, top), drawn=first_of_each(drawn, j, codes.indptr, top),
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


def effective_number(weights: csr_array) -> np.ndarray:
    """exp of the entropy of each row's weights: 1 when one column has it all, c when c columns share it. 0 if empty."""
    total = weights.sum(axis=1)
    logs = weights.copy()
    logs.data = weights.data * np.log(weights.data)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, np.exp(np.log(total) - logs.sum(axis=1) / total), 0.0)


def _plogp(p: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log2(np.where(p > 0, p, 1)), 0.0)
