"""How decoder rows lie, and signs of splitting and absorption."""

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csc_array
from torch.nn.functional import normalize

from tsae.codes import firings
from tsae.sae import SAE
from tsae.scoring.heldout import Text


@torch.no_grad()
def nearest_rows(a: torch.Tensor, b: torch.Tensor, top: int, sign: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """For every row of a (n, d) the `top` rows of b (m, d) of largest sign * <a, b>; never itself.

    Returns <a, b> and the rows' indices, each (n, top), in main memory. Rows of unit norm give cosines.
    """
    top, chunk = min(top, len(b) - (a is b)), max(1, 2**24 // len(b))
    values, indices = [], []
    for first in range(0, len(a), chunk):
        product = (sign * a[first:first + chunk]) @ b.T
        if a is b:
            own = torch.arange(len(product), device=product.device)
            product[own, own + first] = -torch.inf
        value, index = product.topk(top, dim=1)
        values.append(sign * value.float().cpu())
        indices.append(index.cpu())
    return torch.cat(values), torch.cat(indices)


@torch.no_grad()
def dictionary(sae: SAE, unigrams: torch.Tensor, rank: int = 0) -> pd.DataFrame:
    """How each decoder row lies: columns feature, nearest_feature, nearest_cosine, token_share.

    nearest: the other row with the largest cosine; above 0.9 it is a near-duplicate, a sign of splitting. token_share:
    the squared norm within the `rank` directions in which `unigrams` (m, d), raw, vary most; rank 0 is d / 4, so that a
    random row has a share of 1/4 (with more tokens than dimensions their full span is everything).
    """
    rank = rank or max(1, sae.d_model // 4)
    W = normalize(sae.W_dec.float(), dim=-1)
    directions = torch.linalg.eigh(torch.cov(unigrams.float().to(W.device).T)).eigenvectors[:, -rank:]
    cosine, nearest = nearest_rows(W, W, 1)
    return pd.DataFrame(dict(feature=np.arange(sae.n), nearest_feature=nearest[:, 0].numpy(),
                             nearest_cosine=cosine[:, 0].numpy(),
                             token_share=(W @ directions).square().sum(-1).cpu().numpy()))


def split_tokens(scores: pd.DataFrame, share: float = 0.5) -> pd.Series:
    """For each row of scores: how many features have this modal token with at least `share` of their mass, 0 if it has
    not.

    More than 1 is a sign of splitting: several features for one token.
    """
    owners = scores["modal_share_mass"] >= share
    counts = scores["modal_token"][owners].value_counts()
    return scores["modal_token"].map(counts).where(owners, 0).fillna(0).astype(int)


def probes(codes: csc_array, text: Text, precise: float = 0.9, rare: float = 0.2, least: int = 5) -> pd.DataFrame:
    """Sparse probing of what the text knows without labels: one row an attribute, its best single feature.

    Chosen on the fit half, scored on the other. Columns: attribute, share of positions; auc and its feature (by the
    code's rank, silence last); f1 and its feature (by firing); specialists: features that fire in at least `precise` of
    their firings where the attribute holds, and at less than `rare` of those places; absorbed: share of those places
    where the best feature by F1 is silent and a specialist fires, of all where it is silent; beside: the same where it
    fires. Absorbed well above beside is a sign of absorption (Chanin et al. 2024). Features with under `least` firings
    are no specialists.
    """
    flags = text.ids[text.attributes].T.astype(bool)
    auc, hits, fired, true = _probed(codes[text.fit], flags[text.fit])
    auc_held, hits_held, fired_held, true_held = _probed(codes[~text.fit], flags[~text.fit])
    f1 = 2 * hits / np.maximum(fired[:, None] + true, 1)
    f1_held = 2 * hits_held / np.maximum(fired_held[:, None] + true_held, 1)
    binary, rows = codes.astype(bool), []
    for a, rule in enumerate(text.attributes):
        by_auc, by_f1 = int(np.argmax(auc[:, a])), int(np.argmax(f1[:, a]))
        specific = (hits[:, a] >= precise * fired) & (hits[:, a] < rare * true[a]) & (fired >= least)
        specific[by_f1] = False
        where = ~text.fit & flags[:, a]
        some = np.asarray(binary[:, np.flatnonzero(specific)].sum(axis=1)).ravel()[where] > 0
        silent = codes[:, [by_f1]].toarray().ravel()[where] == 0
        rows.append(dict(attribute=text.names[rule], share=flags[:, a].mean(), auc=auc_held[by_auc, a],
                         auc_feature=by_auc, f1=f1_held[by_f1, a], f1_feature=by_f1, specialists=int(specific.sum()),
                         absorbed=some[silent].mean() if silent.any() else np.nan,
                         beside=some[~silent].mean() if (~silent).any() else np.nan))
    return pd.DataFrame(rows)


def _probed(codes: csc_array, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """AUC (n, a) of codes (m, n) for flags (m, a); firings where they hold (n, a), firings (n,), places where they hold
    (a,).

    AUC by rank sums: the ranks of a feature's firings, less that of its silence, are as sparse as its codes.
    """
    m, (_, j, v) = codes.shape[0], firings(codes)
    keys = (j.astype(np.uint64) << np.uint64(32)) | v.astype(np.float32).view(np.uint32)
    _, which, ties = np.unique(keys, return_inverse=True, return_counts=True)
    fired = np.diff(codes.indptr)
    rank = (ties.cumsum() - (ties - 1) / 2)[which] - codes.indptr[j]  # among the feature's own firings, ties shared
    above = csc_array(((m - fired)[j] + rank - (m - fired[j] + 1) / 2, codes.indices, codes.indptr), shape=codes.shape)
    true = flags.sum(axis=0)
    total = above.T @ flags.astype(np.float64) + np.outer((m - fired + 1) / 2, true)
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = (total - true * (true + 1) / 2) / (true * (m - true))
    return np.nan_to_num(auc, nan=0.5), codes.astype(bool).T @ flags.astype(np.float64), fired, true
