"""What a feature does: taken out of the language model and doubled in it, at its own firings."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csc_array
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from tsae.codes import evenly, firings
from tsae.sae import SAE
from tsae.scoring.heldout import Text


def cached_residuals(lm, rows: Tensor, layer: int, most_gb: float = 1.0) -> Tensor | None:
    """Residuals (N, T, d) float32 of rows (N, T), in main memory; None if over `most_gb`."""
    if rows.numel() * lm.d_model * 4 > most_gb * 1e9:
        return None
    return torch.cat([lm.residuals(part, [layer])[layer].cpu() for part in rows.split(64)])


@dataclass(frozen=True)
class Patching:
    """Patched runs of a model in contexts, where `feature` has `code` at rows[row, column]."""

    lm: object  # a tsae.lm.LM; not imported here, as that loads nnsight
    sae: SAE
    layer: int
    rows: Tensor
    before: int  # this and the residuals as in `effects`
    residuals: Tensor | None

    def batches(self, contexts: pd.DataFrame, most: int) -> Iterator[tuple[pd.DataFrame, int]]:
        """At most `most` contexts whose rows have one length, and the last column of these rows."""
        most = max(1, min(most, 2**26 // (24 * self.lm.vocabulary)))  # logits: 8 columns x 3 copies
        # Rounding up to a multiple of 8 makes fewer batches: later columns change nothing before.
        last = np.minimum(contexts["column"] // 8 * 8 + 7, self.rows.shape[1] - 1)
        if self.before:
            last = np.minimum(contexts["column"], self.before)
        for end, group in contexts.groupby(last):
            for first in range(0, len(group), most):
                yield group[first:first + most], end

    def outcomes(self, some: pd.DataFrame, end: int) -> tuple[Tensor, ...]:
        """Log-probabilities of the next token, each (b, V): clean, ablated and boosted."""
        row, column = torch.tensor(some[["row", "column"]].to_numpy()).T
        columns = torch.arange(end + 1)[None]
        if self.before:  # only BOS, and the tokens up to the firing
            columns = column[:, None] + columns - end
            columns[:, 0] = 0
            column = torch.full_like(column, end)
        tokens = self.rows[row[:, None], columns]  # (b, end + 1)
        if self.residuals is None or self.before:
            x = self.lm.residuals(tokens, [self.layer])[self.layer]
        else:
            x = self.residuals[row[:, None], columns].to(self.lm.device)
        code = torch.tensor(some["code"].to_numpy(), device=x.device)[:, None]
        direction = self.sae.W_dec[torch.tensor(some["feature"].to_numpy(), device=x.device)]
        step = code * direction * self.sae.scale
        steps = torch.cat([torch.zeros_like(step), -step, step])
        logits = self.lm.next_token_logits(tokens.repeat(3, 1), self.layer, lambda a: a + steps,
                                           x.repeat(3, 1, 1), column.repeat(3))
        return logits.log_softmax(-1).cpu().chunk(3)


@torch.no_grad()
def effects(lm, sae: SAE, layer: int, codes: csc_array, text: Text, rows: Tensor,
            contexts: int = 2, before: int = 0, top: int = 8, batch: int = 128,
            residuals: Tensor | None = None) -> pd.DataFrame:
    """How the next token's distribution changes when each live feature is ablated or boosted.

    Each feature is patched at `contexts` of its firings, evenly over the ranks of its codes (m, n).
    Code x decoder row is subtracted from the residual of that one position at `layer`, or added
    again. The model reads the row up to there; with `before` > 0 only BOS and the last `before`
    tokens, which is faster and loses what the feature reads further back. `rows` (N, T) are the
    text's tokens, `residuals` theirs if they are at hand (not used with `before`).

    Columns: feature, contexts; kl_ablate, kl_boost: KL(clean || patched) in nats, means over the
    contexts; promoted, suppressed: the `top` tokens whose probability differs most between boosted
    and ablated; direct_promoted, direct_suppressed: the same by direct logit attribution, decoder
    row x unembedding; direct_agreement: correlation over the vocabulary of that attribution with
    the change in log-probability, which is noise where the kl is close to 0.
    """
    patching, readers = Patching(lm, sae, layer, rows, before, residuals), unembedding(lm)
    position, feature, code = firings(codes)
    picked = evenly(codes, np.ones(codes.shape[0], bool), contexts)
    picked = picked[np.argsort(feature[picked], kind="stable")]
    position = position[picked]
    chosen = pd.DataFrame(dict(row=text.row[position], column=text.column[position],
                               feature=feature[picked], code=code[picked].astype(np.float32)))
    live = np.unique(chosen["feature"])
    most = max(1, 2**25 // lm.vocabulary)  # features at once, for each of which there are V sums
    parts = [_effects_of(some, chosen[chosen["feature"].isin(some)], patching, readers, top, batch)
             for some in tqdm(np.split(live, range(most, len(live), most)), "effects", leave=False)]
    return pd.concat(parts, ignore_index=True)


def _effects_of(live: np.ndarray, contexts: pd.DataFrame, patching: Patching,
                readers: Tensor, top: int, batch: int) -> pd.DataFrame:
    """The rows of `effects` for the features `live` (f,), from all their contexts."""
    lm, count = patching.lm, torch.tensor(contexts.groupby("feature").size().to_numpy())
    kl, (moved, log_moved) = torch.zeros(2, len(live)), torch.zeros(2, len(live), lm.vocabulary)
    for some, end in patching.batches(contexts, batch):
        clean, ablated, boosted = patching.outcomes(some, end)
        to = torch.from_numpy(np.searchsorted(live, some["feature"]))
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


def _largest(change: Tensor, top: int, lm) -> list[str]:
    """The `top` tokens of the largest values in each row of (f, V), as text."""
    return [", ".join(repr(lm.tokenizer.decode([i])) for i in ids)
            for ids in change.topk(top, dim=-1).indices.tolist()]


@torch.no_grad()
def unembedding(lm) -> Tensor:
    """What each token's logit reads of the residual stream: (V, d) float32.

    The final norm's gain is multiplied in. The mean over tokens is taken out, as probabilities do
    not depend on it; so is the mean over coordinates where the norm takes that out of the stream.
    """
    readers = lm.model.get_output_embeddings().weight.float().cpu()
    inner = {id(module) for block in lm.blocks for module in block._module.modules()}
    norms = [m for m in lm.model.modules() if "Norm" in type(m).__name__ and id(m) not in inner]
    if norms:
        signs = torch.ones(lm.d_model).to(next(lm.model.parameters()))
        signs[::2] = -1.0  # mean 0 and rms 1: the norm gives gain x signs + bias
        gain = (norms[-1](signs) - norms[-1](-signs)) / 2 * signs
        readers = readers * gain.float().cpu()
    readers = readers - readers.mean(0)
    return readers - readers.mean(-1, keepdim=True) if lm.centred else readers
