"""Over how many tokens each feature fires, and how much a firing says of the token."""

import numpy as np
import pandas as pd
import torch
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
    pairs, shape = (j, token[p]), (n, len(tokens))
    count = csr_array((np.ones(len(p)), pairs), shape=shape)  # firings by feature and token
    fired = np.diff(codes.indptr)
    rate, found = fired / m, {}
    silences = np.repeat(np.maximum(m - fired, 1), np.diff(count.indptr))
    silent = (np.bincount(token)[count.indices] - count.data) / silences  # P(token | silent)
    entropy = -_plogp(rate) - _plogp(1 - rate)
    ways = dict(peak=peak, drawn=drawn, firing=np.ones(len(p)), mass=v)
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, weight in ways.items():
            table = csr_array((weight, pairs), shape=shape)
            total = np.maximum(table.sum(axis=1), 1e-300)
            bits = _information(table, silent, rate)
            table.eliminate_zeros()  # tokens whose firings have no weight
            effective = total**2 / np.maximum(np.bincount(j, weight**2, n), 1e-300)  # firings
            bias = rate * np.maximum(np.diff(table.indptr) - 1, 0) / (2 * np.log(2) * effective)
            bits = np.clip(bits - bias, 0, entropy)
            found |= {f"tokens_{name}": effective_number(table), f"bits_{name}": bits,
                      f"told_{name}": bits / entropy,
                      f"modal_share_{name}": table.max(axis=1).toarray().ravel() / total}
    return pd.DataFrame(found | dict(modal_token=tokens[table.argmax(axis=1)]))  # the last is mass


def single_token_features(codes: csc_array, t: np.ndarray, directions: torch.Tensor,
                          means: torch.Tensor, least: int = 50) -> pd.DataFrame:
    """What those features are for that have over half of their activation mass on one token.

    One row for each of them with `least` firings in codes (m, n), with tokens t (m,); their decoder
    rows are `directions` (n, d), the tokens' mean activations `means` (V, d). Columns: feature;
    token; mass, the token's share of it; fires, the share of the token's positions at which it
    does; along, the cosine of its decoder row to the token's mean, less the mean over positions.
    """
    p, j, v = firings(codes)
    mass, count = (csr_array((weight, (j, t[p])), shape=(codes.shape[1], len(means)))
                   for weight in (v, np.ones(len(p))))
    fired, token = np.diff(codes.indptr), mass.argmax(axis=1)
    share = mass.max(axis=1).toarray().ravel() / np.maximum(mass.sum(axis=1), 1e-300)
    feature = np.flatnonzero((fired >= least) & (share > 0.5))
    token, seen = token[feature], np.bincount(t, minlength=len(means))
    here = count[feature, token] / seen[token]
    own = means - torch.from_numpy(seen / len(t)).to(means) @ means
    along = torch.cosine_similarity(directions[feature], own[token], dim=1)
    return pd.DataFrame(dict(feature=feature, token=token, mass=share[feature], fires=here,
                             along=along.detach().cpu().numpy()))


def effective_number(weights: csr_array) -> np.ndarray:
    """exp of the entropy of each row's weights > 0: c if c columns share alike, 0 if none."""
    total, logs = weights.sum(axis=1), weights.copy()
    logs.data = weights.data * np.log(weights.data)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, np.exp(np.log(total) - logs.sum(axis=1) / total), 0.0)


def _information(table: csr_array, silent: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """Mutual information (n,) in bits of the token and of firing, at the rate (n,).

    Rows of table (n, V) give P(token | fires), `silent` P(token | silent) at the same entries.
    Tokens without firings have no entry. Each of them adds -P(token, silent) log P(silent): all of
    these are one term, `elsewhere`.
    """
    n, feature = len(rate), np.repeat(np.arange(len(rate)), np.diff(table.indptr))
    total = np.maximum(table.sum(axis=1), 1e-300)
    on, off = np.log2(np.maximum(rate, 1e-300)), np.log2(np.maximum(1 - rate, 1e-300))
    q, r = table.data / total[feature] * rate[feature], silent * (1 - rate[feature])
    bits = _plogp(q) + _plogp(r) - _plogp(q + r) - q * on[feature] - r * off[feature]
    elsewhere = (1 - np.bincount(feature, silent, n)) * (1 - rate) * -off
    return np.bincount(feature, bits, n) + elsewhere


def _plogp(p: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log2(np.where(p > 0, p, 1)), 0.0)
