"""Nulls hold what they should (numbers, mean and covariance) and nothing else; no verdict comes out on them."""

import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer, tiny_network

from tsae import claims, evaluate, train
from tsae import lm as lms
from tsae.codes import encoded
from tsae.pairs.prepare import held_out, prepare
from tsae.scale.sweep import sweep, trained
from tsae.scoring import heldout, nulls
from tsae.scoring.ladder import ladder

ROWS = torch.randint(1, 200, (400, 24), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_permuted_weights_are_the_same_numbers_elsewhere(family):
    lm = lms.LM(tiny_network(family), byte_tokenizer(), family)
    before = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    other, again = nulls.permuted(lm), nulls.permuted(lm)
    assert other.fingerprint == again.fingerprint != lm.fingerprint != nulls.permuted(lm, 1).fingerprint
    for name, weight in other.model.named_parameters():
        assert torch.equal(weight.flatten().sort().values, before[name].flatten().sort().values)
        assert torch.equal(before[name], dict(lm.model.named_parameters())[name]), "the lent model is as it was"
    tied = lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight
    assert tied == (other.model.get_input_embeddings().weight is other.model.get_output_embeddings().weight)
    assert not torch.allclose(lm.residuals(ROWS[:2], [2])[2], other.residuals(ROWS[:2], [2])[2], atol=1e-3)


@pytest.fixture
def null(tiny):
    real = tiny.layer(2)
    x = real.residuals(ROWS)[tiny.keep(ROWS)]
    return nulls.gaussian(real, x), x


def test_gaussian_activations_have_the_mean_and_covariance_and_no_token(null):
    layer, x = null
    drawn = layer.residuals(ROWS)
    assert torch.equal(drawn[:3], layer.residuals(ROWS[:3])) and not torch.equal(drawn[0], drawn[1])
    flat, m = drawn.flatten(0, 1), drawn.shape[0] * drawn.shape[1]
    spread = x.var(0).sqrt()
    assert ((flat.mean(0) - x.mean(0)).abs() < 5 * spread / m**0.5).all()
    off = (torch.cov(flat.T) - torch.cov(x.T)).abs() / torch.outer(spread, spread).clamp_min(1e-12)
    assert off.max() < 6 * (2 / m) ** 0.5
    t = ROWS.flatten().long()
    means = torch.zeros(200, flat.shape[1]).index_add_(0, t, flat) / torch.bincount(t, minlength=200)[:, None].clamp_min(1)
    between = (means[t] - flat.mean(0)).square().sum() / (flat - flat.mean(0)).square().sum()
    assert between.item() == pytest.approx(199 / m, rel=0.15), "what chance gives so many means"


def test_on_gaussian_activations_no_criterion_comes_out(null, tmp_path):
    """The table gains nothing, and features are not more complex than those of an SAE that was never trained."""
    layer, _ = null
    data = prepare(layer, ROWS[:320], 256, folder=tmp_path / "store", outliers=0)
    x, t, kept = held_out(layer, ROWS[320:], data.limit, folder=tmp_path / "store")
    on = heldout.prepare(ROWS[320:], kept, byte_tokenizer())
    rows = []
    for seed in (0, 1, 2):
        for lookup in ("none", "learned"):
            job = dict(activation="topk", n=48, k=4, seed=seed, lookup=lookup, tokens=20_000, lr=3e-3)
            sweep(tmp_path / "saes", data, [job])
            sae, _ = trained(tmp_path / "saes", data, **job)
            start = train.build(data.stats, data.unigrams, train.RECIPES["ours"], "topk", 48, 4, lookup, seed).eval()
            complexity = [ladder(encoded(each, x, t), on)["complexity_1"].mean() for each in (sae, start)]
            rows.append(dict(seed=seed, lookup=lookup, nmse=evaluate.reconstruction(sae, x, t)["nmse"],
                             above=complexity[0] - complexity[1]))
    wide = pd.DataFrame(rows).pivot(index="seed", columns="lookup")
    gain = 1 - wide["nmse", "learned"] / wide["nmse", "none"]
    print("GAIN", gain.tolist(), wide["above", "learned"].tolist())
    lines = {line.id: line for line in claims.read().itertuples()}
    assert claims.verdict(lines["6a"], *evaluate.interval(gain)) == claims.NOT, "the token says nothing here"
    assert claims.verdict(lines["8b"], *evaluate.interval(wide["above", "learned"])) == claims.NOT
