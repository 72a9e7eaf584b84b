"""The lookup table, token by token."""

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cosine_similarity, normalize

from tsae.evaluate import squared_errors
from tsae.sae import SAE
from tsae.scoring.dictionary import nearest_rows


@torch.no_grad()
def by_token(sae: SAE, unigrams: torch.Tensor, x: torch.Tensor, t: torch.Tensor, count: np.ndarray | None = None,
          batch: int = 4096) -> pd.DataFrame:
    """The lookup, one row a token that occurs in the pairs x (m, d) raw, t (m,).

    count: how often it occurs, or `count` (V,), say of the training text; cosine_unigram, ratio_unigram: of its row to
    its unigram residual (V, d), raw, ratio of norms; cosine_mean, ratio_mean: of what the table predicts alone (row +
    b_dec) to the token's mean activation in these pairs, the best that any table could predict; nmse_table, nmse: error
    of the table alone and of the whole SAE; nearest_token, nearest_cosine: the most similar other row of a token that
    occurs.
    """
    if sae.lookup == "none":
        raise ValueError("this SAE has no lookup table whose quality could be told")
    ids, which = torch.unique(t.cpu(), return_inverse=True)
    mean, errors, seen = torch.zeros(len(ids), sae.d_model), torch.zeros(2, len(ids)), torch.bincount(which).float()
    for a, tokens, to in zip(x.split(batch), t.split(batch), which.split(batch)):
        mean.index_add_(0, to, a.float().cpu())
        for i, a_hat in enumerate((sae.table_alone(tokens), sae(a, tokens))):
            errors[i].index_add_(0, to, squared_errors(a, a_hat).float().cpu())
    mean, errors = mean / seen.unsqueeze(-1), (errors / seen).numpy()
    rows, alone = sae.W_lookup[ids.to(x.device)].cpu() * sae.scale, sae.table_alone(ids.to(x.device)).cpu()
    found = dict(token=ids.numpy(), count=seen.long().numpy() if count is None else np.asarray(count)[ids.numpy()])
    for name, ours, theirs in (("unigram", rows, unigrams.cpu()[ids]), ("mean", alone, mean)):
        found[f"cosine_{name}"] = cosine_similarity(ours, theirs, dim=-1).numpy()
        found[f"ratio_{name}"] = (ours.norm(dim=-1) / theirs.norm(dim=-1)).numpy()
    unit = normalize(rows, dim=-1)
    cosine, nearest = nearest_rows(unit, unit, 1)
    return pd.DataFrame(found | dict(nmse_table=errors[0], nmse=errors[1], nearest_token=ids[nearest[:, 0]].numpy(),
                                     nearest_cosine=cosine[:, 0].numpy()))


def by_count(quality: pd.DataFrame, base: float = 4.0) -> pd.DataFrame:
    """Means of a table's quality over tokens in bins of count, 0 and [base^i, base^(i+1)): columns low, high, tokens, and
    scores."""
    count = quality["count"].to_numpy()
    bins = np.where(count == 0, -1, np.floor(np.log(np.maximum(count, 1) + 0.5) / np.log(base))).astype(int)
    means = quality.drop(columns=["token", "nearest_token", "count"]).groupby(bins).mean()
    i, tokens = means.index.to_numpy(), quality.groupby(bins).size()
    means.insert(0, "low", np.where(i < 0, 0, base**np.maximum(i, 0)).astype(int))
    means.insert(1, "high", np.where(i < 0, 0, base**np.maximum(i + 1, 0) - 1).astype(int))
    means.insert(2, "tokens", tokens)
    return means.reset_index(drop=True)
