"""Sparse codes (m, n) of an SAE on m positions: the one encoder of scores, features and browser.

Firings are the positive entries, by feature and then by position, as csc arrays hold them.
Functions that order or choose firings give indices into that sequence.
"""

import numpy as np
import torch
from scipy.sparse import csc_array, csr_array

from tsae.sae import SAE


@torch.no_grad()
def encoded(sae: SAE, x: torch.Tensor, t: torch.Tensor, batch: int = 4096) -> csc_array:
    """The codes (m, n) float32, in units of the SAE's scale, of x (m, d) raw with tokens t (m,)."""
    values, features, counts = [], [], []
    for a, tokens in zip(x.split(batch), t.split(batch)):
        if sae.activation == "topk":  # never builds the dense codes
            active, support = sae.selected(a / sae.scale, sae.baseline(tokens))
            index, per_position = support.index, torch.full((len(a),), sae.k)
        else:
            codes = sae.encode(a, tokens)
            index, per_position = codes.nonzero()[:, 1], (codes != 0).sum(-1)
            active = codes[codes != 0]
        values.append(active.flatten().cpu())
        features.append(index.flatten().cpu())
        counts.append(per_position.cpu())
    ends = np.r_[0, torch.cat(counts).numpy().cumsum()]
    rows = torch.cat(values).numpy(), torch.cat(features).numpy(), ends
    codes = csr_array(rows, shape=(len(x), sae.n)).tocsc()
    codes.eliminate_zeros()
    codes.sort_indices()
    return codes


def firings(codes: csc_array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position p, feature j (ascending) and code v > 0 of every firing, each (nnz,)."""
    feature = np.repeat(np.arange(codes.shape[1]), np.diff(codes.indptr))
    return codes.indices.astype(np.int64), feature, codes.data.astype(np.float64)


def ordered_within(group: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The order (nnz,) by group, then by key (uint32), then as they came.

    Both go into one 64-bit number: numpy sorts single numbers many times as fast as pairs.
    """
    return np.argsort((group.astype(np.uint64) << np.uint64(32)) | key, kind="stable")


def sortable(values: np.ndarray) -> np.ndarray:
    """Floats that are not below 0 as uint32: as such, their bits (float32) have their order."""
    return values.astype(np.float32).view(np.uint32)


def by_strength(codes: csc_array) -> np.ndarray:
    """The order (nnz,) of firings: by feature, strongest first (in float32), then by position."""
    return ordered_within(firings(codes)[1], ~sortable(codes.data))


def strongest(codes: csc_array, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (n, top) of each feature's largest codes, strongest first, and these codes.

    Where fewer fired, positions are -1 and codes 0.
    """
    order, feature = by_strength(codes), firings(codes)[1]
    place = np.arange(len(order)) - codes.indptr[feature]  # features stay together in this order
    kept = place < top
    position = np.full((codes.shape[1], top), -1)
    code = np.zeros((codes.shape[1], top), np.float32)
    position[feature[kept], place[kept]] = codes.indices[order[kept]]
    code[feature[kept], place[kept]] = codes.data[order[kept]]
    return position, code


def first_of_each(order: np.ndarray, feature: np.ndarray, starts: np.ndarray,
                  top: int) -> np.ndarray:
    """1.0 (nnz,) at the first `top` firings of each feature in an `order` by feature."""
    chosen = np.zeros(len(order))
    chosen[order] = np.arange(len(order)) - starts[feature] < top
    return chosen


def evenly(codes: csc_array, mask: np.ndarray, each: int) -> np.ndarray:
    """Up to `each` firings of every feature where mask (m,) is True, evenly over ranks of code."""
    order = by_strength(codes)
    order = order[mask[codes.indices[order]]]
    feature = firings(codes)[1][order]
    count = np.bincount(feature, minlength=codes.shape[1])
    place, many = np.arange(len(order)) - (count.cumsum() - count)[feature], count[feature]
    # Rank i of `many` is kept where i * each / many, rounded, goes up with the next rank.
    before = (2 * place * each + many) // (2 * many)
    after = (2 * (place + 1) * each + many) // (2 * many)
    return order[after > before]
