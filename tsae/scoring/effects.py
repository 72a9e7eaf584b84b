"""What a feature does: taken out of the language model and doubled in it, at its own firings."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csc_array
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from tsae.codes import evenly, firings
from tsae.lm import LM
from tsae.sae import SAE
from tsae.scoring.heldout import Text


def cached_residuals(lm: LM, rows: torch.Tensor, layer: int,
                     most_gb: float = 1.0) -> torch.Tensor | None:
    """Residuals (N, T, d) float32 of token rows (N, T), for `effects` of several SAEs.

    They lie in main memory. None where they would take more than `most_gb`.
    """
    if rows.numel() * lm.d_model * 4 > most_gb * 1e9:
        return None
    return torch.cat([lm.residuals(part, [layer])[layer].cpu() for part in rows.split(64)])


@dataclass(frozen=True)
class Patching:
    """Runs of a model with features of an SAE taken out or doubled; fields as in `effects`.

    Contexts are rows of a table, one a firing: `feature` has `code` at rows[row, column].
    """

    lm: LM
    sae: SAE
    layer: int
    rows: torch.Tensor
    before: int
    residuals: torch.Tensor | None

    def batches(self, contexts: pd.DataFrame, most: int) -> Iterator[tuple[pd.DataFrame, int]]:
        """At most `most` contexts that run together, and the last column of their rows.

        Rows of one batch have one length. Lengths are rounded up to multiples of 8, for fewer
        batches: what comes after a position changes nothing there.
        """
        most = max(1, min(most, 2**26 // (24 * self.lm.vocabulary)))  # logits: 8 columns x 3 copies
        last = np.minimum(contexts["column"] // 8 * 8 + 7, self.rows.shape[1] - 1)
        if self.before:
            last = np.minimum(contexts["column"], self.before)
        for end, group in contexts.groupby(last):
            for first in range(0, len(group), most):
                yield group[first:first + most], end

    def inputs(self, some: pd.DataFrame,
               end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (b, end + 1), their residuals (b, end + 1, d), and the column (b,) to patch."""
        row, column = torch.tensor(some[["row", "column"]].to_numpy()).T
        columns = torch.arange(end + 1)[None]
        if self.before:  # BOS, and the tokens up to the firing
            columns = column[:, None] + columns - end
            columns[:, 0] = 0
            column = torch.full_like(column, end)
        tokens = self.rows[row[:, None], columns]
        if self.residuals is None or self.before:
            x = self.lm.residuals(tokens, [self.layer])[self.layer]
        else:
            x = self.residuals[row[:, None], columns].to(self.lm.device)
        return tokens, x, column

    def outcomes(self, some: pd.DataFrame, end: int) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of the next token, each (b, V): clean, ablated and boosted."""
        tokens, x, column = self.inputs(some, end)
        code = torch.tensor(some["code"].to_numpy(), device=x.device)[:, None]
        direction = self.sae.W_dec[torch.tensor(some["feature"].to_numpy(), device=x.device)]
        step = code * direction * self.sae.scale
        steps = torch.cat([torch.zeros_like(step), -step, step])
        logits = self.lm.next_token_logits(tokens.repeat(3, 1), self.layer, lambda a: a + steps,
                                           x.repeat(3, 1, 1), column.repeat(3))
        return logits.log_softmax(-1).cpu().chunk(3)


@torch.no_grad()
def effects(lm: LM, sae: SAE, layer: int, codes: csc_array, text: Text, rows: torch.Tensor,
            contexts: int = 2, before: int = 0, top: int = 8, batch: int = 128,
            residuals: torch.Tensor | None = None) -> pd.DataFrame:
    """How the next token's distribution changes when each live feature is ablated or boosted.

    Each feature is patched at `contexts` of its firings, evenly over the ranks of its codes (m, n).
    Code x decoder row is subtracted from the residual of that one position at `layer`, or added to
    it once more. The model reads the position's row up to there; with `before` > 0 only BOS and the
    last `before` tokens, which is faster and loses what the feature reads further back. `rows`
    (N, T) are the text's tokens, `residuals` theirs if they are at hand (not used with `before`).

    Columns: feature, contexts; kl_ablate, kl_boost: KL(clean || patched) in nats, means over the
    contexts; promoted, suppressed: the `top` tokens whose probability differs most between boosted
    and ablated; direct_promoted, direct_suppressed: the same by direct logit attribution, decoder
    row x unembedding; direct_agreement: correlation over the vocabulary of that attribution with
    the change in log-probability. It is noise where the kl is close to 0.
    """
    patching, readers = Patching(lm, sae, layer, rows, before, residuals), unembedding(lm)
    chosen = _contexts(codes, text, contexts)
    live, parts = np.unique(chosen["feature"]), []
    most = max(1, 2**25 // lm.vocabulary)  # features at once, for each of which there are V sums
    for some in tqdm(np.split(live, range(most, len(live), most)), "effects", leave=False):
        own = chosen[chosen["feature"].isin(some)]
        parts.append(_effects_of(some, own, patching, readers, top, batch))
    return pd.concat(parts, ignore_index=True)


def _contexts(codes: csc_array, text: Text, each: int) -> pd.DataFrame:
    """Up to `each` firings of every feature, by feature: columns row, column, feature, code."""
    position, feature, code = firings(codes)
    picked = evenly(codes, np.ones(codes.shape[0], bool), each)
    picked = picked[np.argsort(feature[picked], kind="stable")]
    position = position[picked]
    return pd.DataFrame(dict(row=text.row[position], column=text.column[position],
                             feature=feature[picked], code=code[picked].astype(np.float32)))


def _effects_of(live: np.ndarray, contexts: pd.DataFrame, patching: Patching,
                readers: torch.Tensor, top: int, batch: int) -> pd.DataFrame:
    """The rows of `effects` for the features `live` (f,), from all their contexts."""
    lm, count = patching.lm, torch.zeros(len(live), dtype=torch.long)
    kl, (moved, log_moved) = torch.zeros(2, len(live)), torch.zeros(2, len(live), lm.vocabulary)
    for some, end in patching.batches(contexts, batch):
        clean, ablated, boosted = patching.outcomes(some, end)
        to = torch.from_numpy(np.searchsorted(live, some["feature"]))
        count += torch.bincount(to, minlength=len(live))
        for total, patched in zip(kl, (ablated, boosted)):
            total.index_add_(0, to, (clean.exp() * (clean - patched)).sum(-1))
        moved.index_add_(0, to, boosted.exp() - ablated.exp())
        log_moved.index_add_(0, to, boosted - ablated)
    direct = patching.sae.W_dec[torch.from_numpy(live)].cpu() @ readers.T
    agreement = cosine_similarity(log_moved - log_moved.mean(-1, keepdim=True), direct, dim=-1)
    return pd.DataFrame(dict(
        feature=live, contexts=count.numpy(), kl_ablate=(kl[0] / count).numpy(),
        kl_boost=(kl[1] / count).numpy(), promoted=_largest(moved, top, lm),
        suppressed=_largest(-moved, top, lm), direct_promoted=_largest(direct, top, lm),
        direct_suppressed=_largest(-direct, top, lm), direct_agreement=agreement.numpy()))


def _largest(change: torch.Tensor, top: int, lm: LM) -> list[str]:
    """The `top` tokens of the largest values in each row of (f, V), as text."""
    return [", ".join(repr(lm.tokenizer.decode([i])) for i in ids)
            for ids in change.topk(top, dim=-1).indices.tolist()]


@torch.no_grad()
def unembedding(lm: LM) -> torch.Tensor:
    """What each token's logit reads of the residual stream: (V, d) float32.

    The final norm's gain is multiplied in. The mean over tokens is taken out, as probabilities do
    not depend on it; so is the mean over coordinates where the norm takes that out of the stream.
    """
    readers = lm.model.get_output_embeddings().weight.float().cpu()
    inner = {id(module) for block in lm.blocks for module in block._module.modules()}
    norms = [module for module in lm.model.modules()
             if "Norm" in type(module).__name__ and id(module) not in inner]
    if norms:
        signs = torch.ones(lm.d_model).to(next(lm.model.parameters()))
        signs[::2] = -1.0  # mean 0 and rms 1: the norm gives gain x signs + bias
        gain = (norms[-1](signs) - norms[-1](-signs)) / 2 * signs
        readers = readers * gain.float().cpu()
    readers = readers - readers.mean(0)
    return readers - readers.mean(-1, keepdim=True) if lm.centred else readers
