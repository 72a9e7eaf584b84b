"""How decoder rows lie, and signs of splitting and absorption."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csc_array
from torch.nn.functional import normalize

from tsae.codes import firings, sortable
from tsae.sae import SAE
from tsae.scoring.heldout import Text


@torch.no_grad()
def nearest_rows(a: torch.Tensor, b: torch.Tensor, top: int, sign: int = 1,
                 chunk: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of a (n, d): the `top` rows of b (m, d) with the largest sign * <a, b>.

    Where a is b, a row is never its own neighbour. Returns <a, b> and the rows of b, each (n, top),
    in main memory; fewer columns where b has fewer rows. Rows of unit norm give cosines. With
    `top` 1 the first of equals is taken. `chunk` rows of a are multiplied at once.
    """
    top = min(top, len(b) - (a is b))
    values, indices = [], []
    for first in range(0, len(a), chunk):
        product = (sign * a[first:first + chunk]) @ b.T
        if a is b:
            own = torch.arange(len(product), device=product.device)
            product[own, own + first] = -torch.inf
        # max is defined among equals, topk is not
        value, index = product.max(1, keepdim=True) if top == 1 else product.topk(top, dim=1)
        values.append(sign * value.float().cpu())
        indices.append(index.cpu())
    return torch.cat(values), torch.cat(indices)


@torch.no_grad()
def dictionary(sae: SAE, unigrams: torch.Tensor, rank: int = 0) -> pd.DataFrame:
    """How each decoder row lies: columns feature, nearest_feature, nearest_cosine, token_share.

    nearest: the other row with the largest cosine; above 0.9 it is a near-duplicate, a sign of
    splitting. token_share: the share of the row's squared norm within the `rank` directions in
    which the raw `unigrams` (m, d) vary most. Rank 0 stands for d / 4, where a random row has a
    share of 1/4: the full span of many tokens would be the whole space.
    """
    rank = rank or max(1, sae.d_model // 4)
    W = normalize(sae.W_dec.float(), dim=-1)
    covariance = torch.cov(unigrams.float().to(W.device).T)
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -rank:]
    cosine, nearest = nearest_rows(W, W, 1)
    share = (W @ directions).square().sum(-1)
    return pd.DataFrame(dict(feature=np.arange(sae.n), nearest_feature=nearest[:, 0].numpy(),
                             nearest_cosine=cosine[:, 0].numpy(), token_share=share.cpu().numpy()))


def split_tokens(scores: pd.DataFrame, share: float = 0.5) -> pd.Series:
    """For each feature (row of scores): how many features own its modal token; 0 if it does not.

    A feature owns its modal token if that has at least `share` of its mass. More than 1 owner is a
    sign of splitting.
    """
    owners = scores["modal_share_mass"] >= share
    counts = scores["modal_token"][owners].value_counts()
    return scores["modal_token"].map(counts).where(owners, 0).fillna(0).astype(int)


def probes(codes: csc_array, text: Text, precise: float = 0.9, rare: float = 0.2,
           least: int = 5) -> pd.DataFrame:
    """Sparse probing of attributes that need no labels: each one's best single feature.

    The feature is chosen on the fit half and scored on the other. Columns: attribute; share of
    positions where it holds; auc and auc_feature, by the code, silence last; f1 and f1_feature, by
    firing; specialists: how many other features fire at least `least` times, in at least `precise`
    of these where the attribute holds, and at less than `rare` of its places. absorbed: of the
    places where f1_feature is silent, the share where a specialist fires; beside: the same where it
    fires. Absorbed well above beside is a sign of absorption (Chanin et al. 2024).
    """
    flags = text.ids[text.attributes].T.astype(bool)
    fitted, tested = (_probed(codes[part], flags[part]) for part in (text.fit, ~text.fit))
    rows = []
    for a, rule in enumerate(text.attributes):
        by_auc, by_f1 = int(np.argmax(fitted.auc[:, a])), int(np.argmax(fitted.f1[:, a]))
        hits, fired = fitted.hits[:, a], fitted.fired
        special = (hits >= precise * fired) & (hits < rare * fitted.true[a]) & (fired >= least)
        special[by_f1] = False
        absorbed, beside = _absorption(codes, by_f1, special, ~text.fit & flags[:, a])
        rows.append(dict(attribute=text.names[rule], share=flags[:, a].mean(),
                         auc=tested.auc[by_auc, a], auc_feature=by_auc, f1=tested.f1[by_f1, a],
                         f1_feature=by_f1, specialists=int(special.sum()), absorbed=absorbed,
                         beside=beside))
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Probed:
    """How n features tell a attributes: auc (n, a), and counts of places."""

    auc: np.ndarray
    hits: np.ndarray  # (n, a) where the feature fires and the attribute holds
    fired: np.ndarray  # (n,) where the feature fires
    true: np.ndarray  # (a,) where the attribute holds

    @property
    def f1(self) -> np.ndarray:
        return 2 * self.hits / np.maximum(self.fired[:, None] + self.true, 1)


def _probed(codes: csc_array, flags: np.ndarray) -> Probed:
    """Codes (m, n) against flags (m, a), at the same m places."""
    hits = codes.astype(bool).T @ flags.astype(np.float64)
    return Probed(_auc(codes, flags), hits, np.diff(codes.indptr), flags.sum(axis=0))


def _auc(codes: csc_array, flags: np.ndarray) -> np.ndarray:
    """AUC (n, a) of each feature's codes (m, n) for each flag (m, a); 0.5 where a flag is constant.

    It follows from the sum of the ranks of a feature's codes over the places where the flag holds
    (Mann and Whitney). All silent places share one rank, so that rank of code - rank of silence is
    as sparse as the codes: one sparse product gives every rank sum without its constant part.
    """
    m, (_, j, v), fired = codes.shape[0], firings(codes), np.diff(codes.indptr)
    keys = (j.astype(np.uint64) << np.uint64(32)) | sortable(v)  # by feature, then by code
    _, which, ties = np.unique(keys, return_inverse=True, return_counts=True)
    rank = (ties.cumsum() - (ties - 1) / 2)[which] - codes.indptr[j]  # among its feature's firings
    silent = m - fired
    silence = (silent + 1) / 2  # the rank that silent places share
    above = (silent[j] + rank - silence[j], codes.indices, codes.indptr)
    true = flags.sum(axis=0)
    total = csc_array(above, shape=codes.shape).T @ flags.astype(np.float64)
    total = total + np.outer(silence, true)
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = (total - true * (true + 1) / 2) / (true * (m - true))
    return np.nan_to_num(auc, nan=0.5)


def _absorption(codes: csc_array, best: int, special: np.ndarray,
                where: np.ndarray) -> tuple[float, float]:
    """How often one of the features `special` (n,) fires, over places `where` (m,).

    First the share of the places where feature `best` is silent, then of those where it fires.
    """
    some = np.asarray(codes[:, np.flatnonzero(special)].astype(bool).sum(axis=1)).ravel()[where] > 0
    silent = codes[:, [best]].toarray().ravel()[where] == 0
    return (some[silent].mean() if silent.any() else np.nan,
            some[~silent].mean() if (~silent).any() else np.nan)
