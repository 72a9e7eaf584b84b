"""Oracle: transformers with a plain torch hook, one pass a context."""

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from scipy.sparse import csc_array
from torch.nn.functional import kl_div

from tsae.codes import evenly, firings
from tsae.sae import SAE
from tsae.scoring import effects, heldout

TOKENS = torch.randint(1, 257, (6, 12), generator=torch.Generator().manual_seed(1))
TOKENS[:, 0] = 0


def unpatched_blocks(lm):
    return lm.model.get_submodule(next(name for name, module in lm.model.named_modules()
                                       if isinstance(module, torch.nn.ModuleList) and len(module) == 3))


@torch.no_grad()
def hooked(lm, tokens, layer, change) -> torch.Tensor:
    """Next-token logits with a change to the residual of the last position, by a plain torch hook."""
    def hook(_, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[:, -1] = x[:, -1] - (x[:, -1].mean(-1, keepdim=True) if lm.centred else 0) + change
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | dict(hidden_states=x))
    handle = unpatched_blocks(lm)[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return lm.model(tokens).logits[:, -1]
    finally:
        handle.remove()


def test_next_token_logits_are_those_of_the_model(tiny):
    change = torch.randn(6, 16)
    with torch.no_grad():
        clean = tiny.model(TOKENS).logits[:, -1]
    assert torch.allclose(tiny.next_token_logits(TOKENS), clean, atol=1e-4)
    expected = hooked(tiny, TOKENS, 1, change)
    assert not torch.allclose(expected, clean, atol=1e-2)
    assert torch.allclose(tiny.next_token_logits(TOKENS, 1, lambda x: x + change), expected, atol=1e-4)
    residuals = tiny.residuals(TOKENS, [1])[1]
    assert torch.allclose(tiny.next_token_logits(TOKENS, 1, lambda x: x + change, residuals), expected, atol=1e-4)
    columns = torch.tensor([3, 9, 3, 5, 8, 4])
    expected = torch.cat([hooked(tiny, row[None, :column + 1], 1, step) for row, column, step in zip(TOKENS, columns, change)])
    found = tiny.next_token_logits(TOKENS, 1, lambda x: x + change, residuals, columns)
    assert torch.allclose(found, expected, atol=1e-4), "what comes after a column changes nothing there"


def test_the_unembedding_is_what_logits_read(tiny):
    """Behind the final norm, logits less their mean are the readers' products with the normalised stream."""
    norm = [module for module in tiny.model.modules() if "Norm" in type(module).__name__][-1]
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.rand(parameter.shape))
        h = torch.randn(5, 16)
        h = h - h.mean(-1, keepdim=True) if tiny.centred else h
        weight = tiny.model.get_output_embeddings().weight
        logits = (norm(h) - norm(torch.zeros_like(h))) @ weight.T  # less the bias
        expected = (logits - logits.mean(-1, keepdim=True)) * h.square().mean(-1, keepdim=True).sqrt()
        assert torch.allclose(h @ effects.unembedding(tiny).T, expected, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("before, shared", [(6, False), (0, False), (0, True)])
def test_effects_equal_one_hooked_pass_each(tiny_gpt2, before, shared):
    lm, sae = tiny_gpt2, SAE(16, 9, "relu", scale=0.7)
    sae.start(torch.zeros(16), seed=0)
    rows = TOKENS.int()
    keep = lm.keep(rows)
    text = heldout.prepare(rows, keep, byte_tokenizer())
    random = np.random.default_rng(0)
    dense = random.exponential(5, (len(text.t), 9)) * (random.random((len(text.t), 9)) < 0.1).astype(np.float32)
    dense = dense.astype(np.float32)
    dense[:, 4] = 0
    codes = csc_array(dense)
    cache = effects.cached_residuals(lm, rows, 2) if shared else None
    found = effects.effects(lm, sae, 2, codes, text, rows, 2, before, top=3, batch=2, residuals=cache).set_index("feature")
    assert list(found.index) == [0, 1, 2, 3, 5, 6, 7, 8] and (found["contexts"] <= 2).all()
    p, j, v = firings(codes)
    chosen = evenly(codes, np.ones(len(text.t), bool), 2)
    readers = effects.unembedding(lm)
    for feature in found.index:
        kl, moved, change = [], 0, 0
        for i in chosen[j[chosen] == feature]:
            row, column = text.row[p[i]], text.column[p[i]]
            first = max(1, column - before + 1) if before else 1
            tokens = torch.cat([TOKENS[row, :1], TOKENS[row, first:column + 1]])[None]
            step = float(v[i]) * sae.W_dec[feature] * 0.7
            clean, ablated, boosted = (hooked(lm, tokens, 2, sign * step).log_softmax(-1)[0] for sign in (0, -1, 1))
            kl.append([kl_div(after, clean, log_target=True, reduction="sum").item() for after in (ablated, boosted)])
            moved, change = moved + boosted.exp() - ablated.exp(), change + boosted - ablated
        ours = found.loc[feature, ["kl_ablate", "kl_boost"]].astype(float)
        assert np.allclose(ours, np.mean(kl, 0), rtol=1e-3, atol=1e-6)
        for name, by in (("", moved), ("direct_", readers @ sae.W_dec[feature])):
            order = by.argsort(descending=True).tolist()
            for kind, ids in (("promoted", order[:3]), ("suppressed", order[:-4:-1])):
                assert found.loc[feature, name + kind] == ", ".join(repr(lm.tokenizer.decode([i])) for i in ids)
        expected = np.corrcoef(change.numpy(), (readers @ sae.W_dec[feature]).numpy())[0, 1]
        assert found["direct_agreement"][feature] == pytest.approx(expected, abs=1e-3)


def test_residuals_are_cached_where_they_fit(tiny_gpt2):
    rows = TOKENS.int()
    assert torch.equal(effects.cached_residuals(tiny_gpt2, rows, 2), tiny_gpt2.residuals(rows, [2])[2])
    assert effects.cached_residuals(tiny_gpt2, rows, 2, most_gb=1e-6) is None
