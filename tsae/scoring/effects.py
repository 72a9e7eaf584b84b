"""What a feature does: taken out of the language model and doubled in it, at its own firings."""

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csc_array
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from tsae.codes import evenly, firings
from tsae.sae import SAE
from tsae.scoring.heldout import Text


def residuals(lm, rows: torch.Tensor, layer: int, most_gb: float = 1.0) -> torch.Tensor | None:
    """Residuals (N, T, d) float32 of token rows (N, T) for `effects` of several SAEs, in main memory; None over `most_gb`."""
    if rows.numel() * lm.d_model * 4 > most_gb * 1e9:
        return None
    return torch.cat([lm.residuals(part, [layer])[layer].cpu() for part in rows.split(64)])


def effects(lm, sae: SAE, layer: int, codes: csc_array, text: Text, rows: torch.Tensor, contexts: int = 2,
            before: int = 0, top: int = 8, batch: int = 128, residuals: torch.Tensor | None = None) -> pd.DataFrame:
    """The change in the next-token distribution when each live feature is ablated or boosted at its own firings.

    `contexts` firings of each feature, evenly over the ranks of its codes (m, n), each at the end of its row up to there
    (`before` > 0: of BOS and the last `before` tokens, faster; what a feature reads further back is then lost): code x
    decoder row is subtracted from, or once more added to, the residual of that one position at `layer`. One pass gives
    the clean, ablated and boosted distributions of a batch. `rows` (N, T) are the text's tokens, `residuals` theirs
    where these were computed before (not with `before`). Columns: feature,
    contexts; kl_ablate, kl_boost: KL(clean || patched) in nats, means over contexts; promoted, suppressed: the `top`
    tokens whose probability differs most between boosted and ablated; direct_promoted, direct_suppressed: by direct
    logit attribution, the decoder row times the unembedding; direct_agreement: correlation over the vocabulary of that
    attribution with the change in log-probability, noise where the kl is next to nothing.
    """
    position, feature, code = firings(codes)
    picked = evenly(codes, np.ones(codes.shape[0], bool), contexts)
    picked = picked[np.argsort(feature[picked], kind="stable")]
    position, feature, code = position[picked], feature[picked], torch.from_numpy(code[picked]).float()
    readers, each, parts = unembedding(lm), max(1, 2**25 // lm.vocabulary), []
    live = np.unique(feature)
    for some in tqdm(np.split(live, range(each, len(live), each)), "effects", leave=False):
        which = np.flatnonzero(np.isin(feature, some))
        parts.append(_effects(lm, sae, layer, rows, text.row[position[which]], text.column[position[which]], some,
                              np.searchsorted(some, feature[which]), code[which], before, top, batch, readers, residuals))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def _effects(lm, sae, layer, rows, row, column, live, of, code, before, top, batch, readers, residuals) -> pd.DataFrame:
    """`effects` of the features `live` (f,): context i is at row[i], column[i], of feature live[of[i]]."""
    kl, moved = torch.zeros(2, len(live)), torch.zeros(2, len(live), lm.vocabulary)
    batch = max(1, min(batch, 2**26 // (24 * lm.vocabulary)))  # logits at once: 8 columns of three copies of each row
    # Rows of one length go together; what comes after a position changes nothing there, so that lengths can be rounded up.
    last = np.minimum(column, before) if before else np.minimum(column | 7, rows.shape[1] - 1)
    for end in np.unique(last):
        for part in np.split(group := np.flatnonzero(last == end), range(batch, len(group), batch)):
            at, columns = column[part], np.arange(end + 1)[None]
            if before:
                columns = np.c_[np.zeros((len(part), 1), int), at[:, None] + columns[:, 1:] - end]
                at = np.full(len(part), end)
            where = torch.from_numpy(row[part, None]), torch.from_numpy(columns)
            tokens = rows[where]
            x = lm.residuals(tokens, [layer])[layer] if residuals is None or before else residuals[where].to(lm.device)
            rows_of = sae.W_dec[torch.from_numpy(live[of[part]]).to(x.device)]
            step = code[part, None].to(x.device) * rows_of * sae.scale
            steps = torch.cat([torch.zeros_like(step), -step, step])
            logs = lm.next_token_logits(tokens.repeat(3, 1), layer, lambda a, steps=steps: a + steps, x.repeat(3, 1, 1),
                                        torch.from_numpy(at).repeat(3))
            clean, ablated, boosted = logs.log_softmax(-1).cpu().chunk(3)
            to = torch.from_numpy(of[part])
            for i, patched in enumerate((ablated, boosted)):
                kl[i].index_add_(0, to, (clean.exp() * (clean - patched)).sum(-1))
            moved[0].index_add_(0, to, boosted.exp() - ablated.exp())
            moved[1].index_add_(0, to, boosted - ablated)
    count = torch.from_numpy(np.bincount(of, minlength=len(live)))
    direct = sae.W_dec[torch.from_numpy(live)].cpu() @ readers.T
    agreement = cosine_similarity(moved[1] - moved[1].mean(-1, keepdim=True), direct, dim=-1)
    found = dict(feature=live, contexts=count.numpy(), kl_ablate=(kl[0] / count).numpy(),
                 kl_boost=(kl[1] / count).numpy())
    for name, by in (("", moved[0]), ("direct_", direct)):
        for sign, kind in ((1, "promoted"), (-1, "suppressed")):
            found[name + kind] = [", ".join(repr(lm.tokenizer.decode([i])) for i in ids)
                                  for ids in (sign * by).topk(top, dim=-1).indices.tolist()]
    return pd.DataFrame(found | dict(direct_agreement=agreement.numpy()))


@torch.no_grad()
def unembedding(lm) -> torch.Tensor:
    """What each token's logit reads of the residual stream: (V, d) float32, the gain of the final norm folded in.

    Less its mean over tokens, to which probabilities are blind, and over coordinates where the norm takes that out.
    """
    readers = lm.model.get_output_embeddings().weight.float().cpu()
    blocks = {id(module) for block in lm.blocks for module in block._module.modules()}
    norms = [module for module in lm.model.modules() if "Norm" in type(module).__name__ and id(module) not in blocks]
    if norms:
        signs = torch.ones(lm.d_model).to(next(lm.model.parameters()))
        signs[::2] = -1.0  # mean 0 and rms 1: what comes out is gain x signs + bias
        readers = readers * ((norms[-1](signs) - norms[-1](-signs)) / 2 * signs).float().cpu()
    readers = readers - readers.mean(0)
    return readers - readers.mean(-1, keepdim=True) if lm.centred else readers
