"""The lookup table, token by token."""

import numpy as np
import pandas as pd
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tsae.baseline import token_ids
from tsae.evaluate import squared_errors
from tsae.sae import SAE
from tsae.scoring.dictionary import nearest_other, nearest_rows
from tsae.scoring.heldout import Text


@torch.no_grad()
def by_token(sae: SAE, unigrams: Tensor, x: Tensor, t: Tensor, count: np.ndarray | None = None,
             batch: int = 4096) -> pd.DataFrame:
    """The quality of the table, one row a token that occurs in the pairs x (m, d) raw, t (m,).

    Columns: token; count: how often it occurs, or its entry in `count` (V,), say of the training
    text; cosine_unigram, ratio_unigram: of the token's row to its unigram residual, raw (V, d), as
    cosine and as ratio of norms; cosine_mean, ratio_mean: of what the table predicts alone (row +
    b_dec) to the token's mean activation here, the best that any table could predict; nmse_table,
    nmse: errors of the table alone and of the whole SAE; nearest_token, nearest_cosine: the most
    similar row of another of these tokens. ValueError without a table, or for a single token.
    """
    if (table := sae.baseline.token_rows()) is None:
        raise ValueError("this SAE has no lookup table whose quality could be told")
    ids, which, seen = torch.unique(token_ids(t).cpu(), return_inverse=True, return_counts=True)
    mean, errors = torch.zeros(len(ids), sae.d_model), torch.zeros(2, len(ids))
    for a, tokens, to in zip(x.split(batch), t.split(batch), which.split(batch)):
        mean.index_add_(0, to, a.float().cpu())
        for total, a_hat in zip(errors, (sae.table_alone(tokens), sae(a, tokens))):
            total.index_add_(0, to, squared_errors(a, a_hat).float().cpu())
    mean, errors = mean / seen.float().unsqueeze(-1), errors / seen.float()
    rows = table[ids.to(x.device)].cpu() * sae.scale
    alone = rows + sae.b_dec.detach().cpu() * sae.scale
    counts = seen.numpy() if count is None else np.asarray(count)[ids.numpy()]
    found = dict(token=ids.numpy(), count=counts)
    for name, ours, theirs in (("unigram", rows, unigrams.cpu()[ids]), ("mean", alone, mean)):
        found[f"cosine_{name}"] = cosine_similarity(ours, theirs, dim=-1).numpy()
        found[f"ratio_{name}"] = (ours.norm(dim=-1) / theirs.norm(dim=-1)).numpy()
    cosine, nearest = nearest_other(normalize(rows, dim=-1))
    return pd.DataFrame(found | dict(nmse_table=errors[0].numpy(), nmse=errors[1].numpy(),
                                     nearest_token=ids.numpy()[nearest], nearest_cosine=cosine))


def by_count(quality: pd.DataFrame, base: float = 4.0) -> pd.DataFrame:
    """Means of `by_token` over tokens in bins of count: 0, and [base^i, base^(i + 1)).

    Columns: low and high, the first and last count of the bin; tokens, how many; the scores.
    """
    count = quality["count"].to_numpy()
    power = np.floor(np.log(np.maximum(count, 1) + 0.5) / np.log(base))  # 0.5 guards base^i
    bins = np.where(count == 0, -1, power).astype(int)
    means = quality.drop(columns=["token", "nearest_token", "count"]).groupby(bins).mean()
    i, tokens = means.index.to_numpy(), quality.groupby(bins).size()
    means.insert(0, "low", np.where(i < 0, 0, base**np.maximum(i, 0)).astype(int))
    means.insert(1, "high", np.where(i < 0, 0, base**np.maximum(i + 1, 0) - 1).astype(int))
    means.insert(2, "tokens", tokens)
    return means.reset_index(drop=True)


def movement(sae: SAE, start: Tensor, count: Tensor) -> pd.DataFrame:
    """Where training took each row of the table from its `start` (V, d) raw, a row a token.

    Of the tokens with a `count` (V,) above 0. Columns: token, count; moved: norm of the step over
    that of the start less the mean start; toward_token, toward_cosine: the token whose own start,
    less the mean, points most like the step. ValueError without a table.
    """
    if (table := sae.baseline.token_rows()) is None:
        raise ValueError("this SAE has no lookup table that could have moved")
    ids = (count > 0).nonzero().squeeze(1)
    share = (count[ids] / count[ids].sum()).to(start.dtype)
    own = start[ids] - share @ start[ids]
    step = table[ids] * sae.scale - start[ids]
    step = step - share @ step  # what all rows share is b_dec's to carry
    cosine, nearest = nearest_rows(normalize(step, dim=1), normalize(own, dim=1), 1)
    moved = step.norm(dim=1) / own.norm(dim=1).clamp_min(1e-9)
    return pd.DataFrame(dict(token=ids.cpu().numpy(), count=count[ids].cpu().numpy(),
                             moved=moved.cpu().numpy(), toward_cosine=cosine[:, 0].numpy(),
                             toward_token=ids.cpu()[nearest[:, 0]].numpy()))


@torch.no_grad()
def known_by(sae: SAE, x: Tensor, t: Tensor, text: Text, batch: int = 4096,
             ridge: float = 1e-3) -> pd.DataFrame:
    """What table and features know of each attribute of a text, at its m positions.

    Linear probes (ridge regression on the fit half) of what the table adds, of what the features
    add and of both side by side; x (m, d) raw, t (m,). Columns: attribute; share of positions where
    it holds; features, and with a table also table and both: AUC on the other half.
    """
    rows, rest = [], []
    for a, known in zip(x.split(batch), t.split(batch)):
        row = sae.baseline(known)
        rows.append(row.cpu() if isinstance(row, Tensor) else torch.zeros(len(a), 0))
        rest.append((sae.reconstructed(a, known)[0] / sae.scale - sae.b_dec - row).cpu())
    table, features = torch.cat(rows), torch.cat(rest)
    seen = dict(features=features)
    if table.shape[1]:
        seen = dict(table=table, features=features, both=torch.cat([table, features], 1))
    flags, fit = text.ids[text.attributes].T.astype(bool), torch.from_numpy(text.fit)
    wanted = torch.from_numpy(flags).double()
    found = dict(attribute=[text.names[rule] for rule in text.attributes], share=flags.mean(0))
    for name, part in seen.items():
        part = torch.cat([part, torch.ones(len(part), 1)], 1).double()
        inner = part[fit].T @ part[fit]
        inner += ridge * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
        guess = part[~fit] @ torch.linalg.solve(inner, part[fit].T @ wanted[fit])
        found[name] = [auc(*pair) for pair in zip(guess.T.numpy(), flags[~text.fit].T)]
    return pd.DataFrame(found)


def auc(value: np.ndarray, flag: np.ndarray) -> float:
    """The chance that a value (m,) where flag (m,) holds is above one where it does not."""
    if flag.all() or not flag.any():
        return float("nan")
    above = mannwhitneyu(value[flag], value[~flag], method="asymptotic").statistic
    return above / (flag.sum() * (~flag).sum())


def kinship(rows: Tensor, strings: list[str], count: Tensor, seed: int = 0) -> pd.DataFrame:
    """Whether tokens that are one word have rows (V, d) that align: mean cosine by relation.

    Relations: the same text but for case ("the", "The"), but for a leading space ("the", " the"),
    and as many random pairs of the tokens that occur in either. Columns relation, cosine, pairs.
    Rows are taken less their mean, weighted by `count` (V,); tokens of count 0 do not take part.
    """
    seen = {strings[i]: i for i in (count > 0).nonzero().squeeze(1).tolist()}
    centred = normalize(rows - (count / count.sum()).to(rows.dtype) @ rows, dim=1).cpu()
    pairs = {"case": [(i, seen[text.capitalize()]) for text, i in seen.items()
                      if text != text.capitalize() and text.capitalize() in seen],
             "leading space": [(i, seen[f" {text}"]) for text, i in seen.items()
                               if f" {text}" in seen]}
    taking_part = sorted({i for both in pairs.values() for pair in both for i in pair})
    if taking_part:
        drawn = np.random.default_rng(seed).choice(taking_part, (len(taking_part), 2))
        pairs["random"] = drawn[drawn[:, 0] != drawn[:, 1]].tolist()
    found = [(name, torch.tensor(both).T) for name, both in pairs.items() if both]
    return pd.DataFrame([dict(relation=name, pairs=one.numel(),
                              cosine=(centred[one] * centred[other]).sum(1).mean().item())
                         for name, (one, other) in found])
