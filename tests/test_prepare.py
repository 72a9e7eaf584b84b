"""Oracle: the same pairs collected by hand, stored and streamed."""

import pytest
import torch
from conftest import ROWS, tiny_network

from tsae import train
from tsae.lm import LM
from tsae.pairs import extract, shards
from tsae.pairs import prepare as prepared
from tsae.pairs.extract import activations
from tsae.pairs.prepare import prepare
from tsae.pairs.shards import Memory


def collect(rows, layer):
    """All pairs in memory."""
    parts = list(activations(rows, layer.residuals, layer.keep))
    return torch.cat([x for x, _ in parts]), torch.cat([t for _, t in parts])


def test_stored_and_streamed_data_are_the_same_pairs(data, tiny_gpt2, tmp_path):
    stored, lm, rows = data, tiny_gpt2, ROWS
    folder = tmp_path / "activations"
    streamed = prepare(lm.layer(1), rows, batch=16, buffer=32, store_gb=2e-6, folder=folder, sample_rows=5)
    for ours, sampled in ((stored, 8), (streamed, 5)):
        x, t = collect(rows[:sampled], lm.layer(1))
        wanted = Memory(x.bfloat16(), t).statistics(257)
        assert all(torch.equal(ours.stats[name], value) for name, value in wanted.items())
        assert torch.equal(ours.unigrams, lm.unigrams(1))
        first, again, other = (next(ours.source(seed))[1] for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
    other_weights = LM(tiny_network("gpt2", seed=1), lm.tokenizer, lm.name)
    for model, tokens, layer in ((lm, rows, 2), (lm, rows + 1, 1), (other_weights, rows, 1)):
        assert prepare(model.layer(layer), tokens, batch=16, folder=folder).identity != stored.identity
    renamed = prepare(LM(lm.model, lm.tokenizer, "elsewhere").layer(1), rows, batch=16, folder=folder)
    assert renamed.identity == stored.identity  # where a model lies is not what it is


def test_streaming_starts_without_room_for_a_store(tiny_gpt2, tmp_path):
    rows = torch.randint(1, 257, (150, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows[:64] = 0  # a pass over special tokens only
    data = prepare(tiny_gpt2.layer(1), rows, batch=16, buffer=64, store_gb=0, folder=tmp_path)
    x, t = collect(rows, tiny_gpt2.layer(1))
    wanted = Memory(x.bfloat16(), t).statistics(257)
    assert torch.equal(data.stats["count"], wanted["count"]) and not list(tmp_path.glob("*.x"))
    assert all(torch.allclose(data.stats[name], value, rtol=1e-6) for name, value in wanted.items())
    assert next(data.source(0))[0].shape == (16, 16) and not [path for path in tmp_path.iterdir() if path.is_dir()]
    with pytest.raises(ValueError, match="special tokens only"):
        prepare(tiny_gpt2.layer(1), rows[:64], store_gb=0, folder=tmp_path)


@pytest.mark.parametrize("store_gb", [0, 1])
def test_statistics_are_worked_out_once(store_gb, tiny_gpt2, tmp_path, monkeypatch, capsys):
    calls, statistics = [], extract.statistics
    for module in (prepared, shards):
        monkeypatch.setattr(module, "statistics", lambda *a: calls.append(1) or statistics(*a))
    rows = torch.randint(1, 257, (8, 12), dtype=torch.int32)

    def stats(rows=rows):
        found = prepare(tiny_gpt2.layer(1), rows, batch=16, store_gb=store_gb, folder=tmp_path).stats
        return {name: value.clone() for name, value in found.items()}  # they are maps of the files that are damaged below

    first, again = stats(), stats()
    assert len(calls) == 1 and all(torch.equal(again[name], value) for name, value in first.items())
    stats(rows.flip(0))
    assert len(calls) == 2
    for kind in ("statistics", "unigrams"):
        for path in tmp_path.glob(f"{kind}-*"):
            raw = bytearray(path.read_bytes())
            raw[-5] ^= 1
            path.write_bytes(raw)
    assert all(torch.equal(stats()[name], value) for name, value in first.items()) and len(calls) == 3
    assert capsys.readouterr().err.count("its checksum differs") == 2


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_start_leaves_no_mean_error_to_the_features(data, tiny_gpt2, recipe):
    lm, rows = tiny_gpt2, ROWS
    x, t = collect(rows, lm.layer(1))
    for lookup in ("none", "frozen", "learned"):
        sae = train.build(data.stats, data.unigrams, train.RECIPES[recipe], "topk", 32, 2, lookup, 0)
        error = x.bfloat16().float() - sae.decode(torch.zeros(len(x), 32), t)  # activations are kept in bfloat16
        assert error.mean(0).abs().max() < 1e-4 and sae.scale == pytest.approx((x - x.mean(0)).std().item(), rel=0.01)
        if lookup != "none":
            scaled = train.RECIPES[recipe]["table_scale"] * data.unigrams
            assert torch.allclose(sae.W_lookup * sae.scale, scaled, atol=1e-5)
