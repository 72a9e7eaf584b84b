"""How decoder rows lie, and signs of splitting and absorption."""

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csc_array
from torch import Tensor
from torch.nn.functional import normalize

from tsae.codes import firings, sortable
from tsae.sae import SAE
from tsae.scoring.heldout import Text


@torch.no_grad()
def nearest_rows(a: Tensor, b: Tensor, top: int, sign: int = 1,
                 chunk: int = 1024) -> tuple[Tensor, Tensor]:  # `chunk` rows of a at once
    """For each row of a (n, d): the `top` rows of b (m, d) with the largest sign * <a, b>.

    Returns <a, b> and rows of b, each (n, top) or narrower where b has fewer rows, in main memory.
    Where a is b, no row is its own neighbour. Of equals `top` 1 takes the first; topk need not.
    """
    top = min(top, len(b) - (a is b))
    values, indices = [], []
    for first in range(0, len(a), chunk):
        product = (sign * a[first:first + chunk]) @ b.T
        if a is b:
            product[:, first:].fill_diagonal_(-torch.inf)
        value, index = product.max(1, keepdim=True) if top == 1 else product.topk(top, dim=1)
        values.append(sign * value.float().cpu())
        indices.append(index.cpu())
    return torch.cat(values), torch.cat(indices)


def nearest_other(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each of rows (n, d) of unit norm: cosine and index, each (n,), of the nearest other."""
    if len(rows) == 1:
        raise ValueError("one row was given, two are needed to find a nearest one")
    cosine, nearest = nearest_rows(rows, rows, 1)
    return cosine[:, 0].numpy(), nearest[:, 0].numpy()


@torch.no_grad()
def dictionary(sae: SAE, unigrams: Tensor, rank: int = 0) -> pd.DataFrame:
    """How each decoder row lies: columns feature, nearest_feature, nearest_cosine, token_share.

    A nearest_cosine above 0.9 is a near-duplicate, a sign of splitting. token_share: the share of
    the row's squared norm within the `rank` directions in which the raw `unigrams` (m, d) vary
    most. Rank 0 is d / 4 (a random row's share is 1/4): many tokens span the whole space.
    """
    W = normalize(sae.W_dec.float(), dim=-1)
    covariance = torch.cov(unigrams.float().to(W.device).T)
    rank = rank or max(1, sae.d_model // 4)
    share = (W @ torch.linalg.eigh(covariance).eigenvectors[:, -rank:]).square().sum(-1)
    cosine, nearest = nearest_other(W)
    return pd.DataFrame(dict(feature=np.arange(sae.n), nearest_feature=nearest,
                             nearest_cosine=cosine, token_share=share.cpu().numpy()))


@torch.no_grad()
def origins(rows: Tensor, codes: csc_array, earlier_rows: Tensor,
            earlier_codes: csc_array) -> pd.DataFrame:
    """What features are to those of an earlier SAE, on the same m positions.

    Decoder rows (n, d) and (n', d), codes (m, n) and (m, n'). Columns: feature; cosine, nearest: of
    the earlier row that is most like its own; pair: the share of its squared norm within the two
    earlier rows that span it best (the nearest, then what helps it most); inside, within: how far
    its firings lie inside those of one earlier feature (1: all; 0: as by chance), and which;
    origin: "again" where one row has half of its squared norm, else "composed" where two have, else
    "split" where inside is over a half, else "new". Features that never fire are left out.
    """
    live = np.flatnonzero(np.diff(codes.indptr))
    own, basis = (normalize(W.float().cpu(), dim=1) for W in (rows[live], earlier_rows))
    value, index = nearest_rows(own, basis, 1)
    cosine, nearest = value[:, 0], index[:, 0]
    rest, pair = own - cosine[:, None] * basis[nearest], torch.empty_like(cosine)
    for part in torch.arange(len(live)).split(1024):
        overlap = (basis[nearest[part]] @ basis.T).square()
        gain = (rest[part] @ basis.T).square() / (1 - overlap).clamp_min(1e-4)
        gain[overlap > 0.99] = 0  # the nearest itself, and rows like it
        pair[part] = cosine[part].square() + gain.max(1).values
    fires, before = ((part > 0).astype(float) for part in (codes[:, live], earlier_codes))
    share = (fires.T @ before).toarray() / np.diff(codes.indptr)[live, None]
    rate = np.diff(earlier_codes.indptr) / codes.shape[0]
    inside = (share - rate) / np.maximum(1 - rate, 1e-9)
    found = pd.DataFrame(dict(feature=live, cosine=cosine.numpy(), nearest=nearest.numpy(),
                              pair=pair.numpy(), inside=inside.max(1), within=inside.argmax(1)))
    half = [found["cosine"] >= 0.5**0.5, found["pair"] >= 0.5, found["inside"] >= 0.5]
    return found.assign(origin=np.select(half, ["again", "composed", "split"], "new"))


def split_tokens(scores: pd.DataFrame, share: float = 0.5) -> pd.Series:
    """For each row of scores: how many features own its modal token, or 0 if it does not itself."""
    owners = scores["modal_share_mass"] >= share  # more than one of a token: a sign of splitting
    counts = scores["modal_token"][owners].value_counts()
    return scores["modal_token"].map(counts).where(owners, 0).fillna(0).astype(int)


def probes(codes: csc_array, text: Text, precise: float = 0.9, rare: float = 0.2,
           least: int = 5) -> pd.DataFrame:
    """Sparse probing of attributes that need no labels: each one's best single feature.

    It is chosen on the fit half and scored on the other. Columns: attribute; share of positions
    where it holds; auc, auc_feature: by the code, silence last; f1, f1_feature: by firing;
    specialists: how many other features fire at least `least` times, in at least `precise` of these
    where the attribute holds, and at less than `rare` of its places. absorbed, beside: the share of
    its places with a specialist firing, where f1_feature is silent and where it fires. Absorbed
    well above beside is a sign of absorption (Chanin et al. 2024).
    """
    flags = text.ids[text.attributes].T.astype(bool)
    fit_auc, fit_f1, hits, fired, true = _probed(codes[text.fit], flags[text.fit])
    auc, f1, *_ = _probed(codes[~text.fit], flags[~text.fit])
    rows = []
    for a, rule in enumerate(text.attributes):
        by_auc, by_f1 = int(np.argmax(fit_auc[:, a])), int(np.argmax(fit_f1[:, a]))
        special = (hits[:, a] >= precise * fired) & (hits[:, a] < rare * true[a]) & (fired >= least)
        special[by_f1] = False
        where = ~text.fit & flags[:, a]
        some = codes[:, np.flatnonzero(special)].astype(bool).sum(axis=1)[where] > 0
        silent = codes[:, [by_f1]].toarray().ravel()[where] == 0
        absorbed, beside = (p.mean() if len(p) else np.nan for p in (some[silent], some[~silent]))
        rows.append(dict(attribute=text.names[rule], share=flags[:, a].mean(), auc=auc[by_auc, a],
                         auc_feature=by_auc, f1=f1[by_f1, a], f1_feature=by_f1,
                         specialists=int(special.sum()), absorbed=absorbed, beside=beside))
    return pd.DataFrame(rows)


def _probed(codes: csc_array, flags: np.ndarray) -> tuple[np.ndarray, ...]:
    """AUC, F1 and hits (n, a) of codes (m, n) for flags (m, a); places of each, (n,) and (a,)."""
    hits = codes.astype(bool).T @ flags.astype(np.float64)
    fired, true = np.diff(codes.indptr), flags.sum(axis=0)
    f1 = 2 * hits / np.maximum(fired[:, None] + true, 1)
    return _auc(codes, flags), f1, hits, fired, true


def _auc(codes: csc_array, flags: np.ndarray) -> np.ndarray:
    """AUC (n, a) of each feature's codes (m, n) for each flag (m, a); 0.5 where a flag is constant.

    It follows from the sum of the ranks of a feature's codes over the places where the flag holds
    (Mann and Whitney). All silent places share one rank, so that rank of code - rank of silence is
    as sparse as the codes: one sparse product gives every rank sum without its constant part.
    """
    m, (_, j, v) = codes.shape[0], firings(codes)
    keys = (j.astype(np.uint64) << np.uint64(32)) | sortable(v)  # by feature, then by code
    _, which, ties = np.unique(keys, return_inverse=True, return_counts=True)
    rank = (ties.cumsum() - (ties - 1) / 2)[which] - codes.indptr[j]  # among its feature's firings
    silent = m - np.diff(codes.indptr)
    silence = (silent + 1) / 2  # the rank that silent places share
    above = (silent[j] + rank - silence[j], codes.indices, codes.indptr)
    true = flags.sum(axis=0)
    total = csc_array(above, shape=codes.shape).T @ flags.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = (total + np.outer(silence, true) - true * (true + 1) / 2) / (true * (m - true))
    return np.nan_to_num(auc, nan=0.5)
