"""Oracle: the same pairs collected by hand, stored and streamed."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROWS, tiny_network

from tsae import baseline, evaluate, train
from tsae.baseline import Context, Needs
from tsae.lm import LM
from tsae.pairs import extract, shards
from tsae.pairs import prepare as prepared
from tsae.pairs.extract import activations
from tsae.pairs.prepare import held_out, prepare
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
            own = baseline.conditional_mean(data.stats) if recipe == "ours" else data.unigrams
            assert torch.allclose(sae.W_lookup * sae.scale, train.RECIPES[recipe]["table_scale"] * own, atol=1e-5)


def planted(share: float) -> SimpleNamespace:
    """A layer whose stream is a vector a token and a few directions, with a `share` of positions at 300 times the norm."""
    random = torch.Generator().manual_seed(0)
    own, directions = torch.randn(40, 16, generator=random), torch.randn(24, 16, generator=random)
    sink = torch.randn(16, generator=random)
    sink *= 300 * 5 / sink.norm()

    def residuals(tokens: torch.Tensor) -> torch.Tensor:
        noise = torch.Generator().manual_seed(int(tokens.sum()))
        codes = torch.rand(*tokens.shape, 24, generator=noise)
        x = own[tokens.long()] + ((codes > 0.9) * codes * 3) @ directions + torch.randn(*tokens.shape, 16, generator=noise)
        return torch.where(torch.rand(*tokens.shape, 1, generator=noise) < share, sink, x)

    return SimpleNamespace(residuals=residuals, keep=lambda tokens: tokens > 0, unigrams=lambda: own, d_model=16,
                           vocabulary=40, device=torch.device("cpu"), identity=dict(planted=share))


def error_of(activation: str, share: float, outliers: float, folder, store_gb: float = 1) -> float:
    """The nmse of a small SAE on held-out positions that are no sinks."""
    rows = torch.randint(1, 40, (500, 40), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    data = prepare(planted(share), rows[:480], 64, 4096, store_gb, folder, outliers=outliers)
    sae = train.build(data.stats, data.unigrams, train.RECIPES["ours"], activation, 64, 4, "learned", 0)
    train.fit(sae, data.source(0), 40_000, sparsity=0.02, **train.learning(train.RECIPES["ours"], 3e-3))
    x, t, _ = held_out(planted(share), rows[480:], 1000 if share else torch.inf, folder=folder)
    return evaluate.nmse(x, sae(x, t))


@pytest.mark.filterwarnings("ignore:the loss of the")
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_massive_activations_do_no_harm(activation, tmp_path):
    clean = error_of(activation, 0, 10, tmp_path)
    for share in (0.0005, 0.01):
        assert error_of(activation, share, 10, tmp_path) < 1.25 * clean
    if activation in ("relu", "topk"):
        assert error_of(activation, 0.01, 10, tmp_path, store_gb=0) < 1.25 * clean, "streamed"
        assert error_of(activation, 0.01, 0, tmp_path) > 1.3 * clean, "what is planted does harm if it is left in"


def test_sinks_are_counted_and_found_in_their_rows(tmp_path):
    layer, rows = planted(0.02), torch.randint(1, 40, (64, 40), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    rows[:, 0] = 0  # left out by `keep`
    x = layer.residuals(rows)
    sinks = (x.norm(dim=-1) > 1000) & (rows > 0)
    for store_gb in (1, 0):
        data = prepare(layer, rows, 64, 1024, store_gb, tmp_path)
        assert data.stats["sinks"] == sinks.sum() > 20 and data.stats["count"].sum() == ((rows > 0) & ~sinks).sum()
        assert data.limit == pytest.approx(10 * x[rows > 0].norm(dim=-1).median().item(), rel=0.01)
        assert all(next(source)[0].norm(dim=-1).max() < 1000 for source in [data.source(0)] for _ in range(40))
    found, t, kept = held_out(layer, rows, data.limit, folder=tmp_path)
    assert torch.equal(kept, (rows > 0) & ~sinks) and torch.equal(t, rows[kept].long())
    assert torch.equal(found, x[kept].bfloat16().float())
    data.unigrams[[3, 7]] *= 1000  # of [BOS, t] alone
    assert data.lone(torch.tensor([2, 3, 7, 9])).tolist() == [2, 9]
    assert data.sinks(torch.arange(40)) == dict(positions=int(sinks.sum()), unigrams=2)
    start = baseline.start_table(data.stats, data.unigrams, dict(start="unigram", table_scale=0.5))
    mean = baseline.conditional_mean(data.stats)
    assert torch.equal(start[[3, 7]], 0.5 * mean[[3, 7]]) and torch.equal(start[4], 0.5 * data.unigrams[4])
    for outliers in (-1, 0.5):
        with pytest.raises(ValueError, match=f"outliers is {outliers}: a multiple of the median norm over 1 was expected"):
            prepare(layer, rows, outliers=outliers, folder=tmp_path)


@pytest.mark.parametrize("store_gb", [0, 1])
def test_contexts_belong_to_their_positions(store_gb, tiny_gpt2, tmp_path):
    """Stored and streamed: x, the last ids and the layer below are those of one position, sinks left out."""
    lm, rows, needs = tiny_gpt2, ROWS, Needs(3, (0, 1))
    with pytest.raises(ValueError, match="a baseline of layer 0 cannot look at layer 1, which comes after it"):
        prepare(lm.layer(0), rows, batch=16, folder=tmp_path, needs=needs)
    whole, kept = lm.residuals(rows, [0, 1]), lm.keep(rows)
    norms = whole[1][kept].bfloat16().float().norm(dim=-1)
    outliers = (norms.quantile(0.9) / norms.median()).item()  # a tenth of the positions counts as sinks
    data = prepare(lm.layer(1), rows, batch=16, buffer=64, store_gb=store_gb, folder=tmp_path, outliers=outliers, needs=needs)
    wanted = {}
    for row, column in kept.nonzero().tolist():
        x = whole[1][row, column].bfloat16().float()
        if x.norm() <= data.limit:
            ids = [rows[row, column - back].item() if column >= back else -1 for back in range(3)]
            wanted[tuple(x.tolist())] = (ids, whole[0][row, column])
    assert 0 < len(wanted) < int(kept.sum())
    seen = set()
    for _, (x, t) in zip(range(30), data.source(0)):
        for i, key in enumerate(map(tuple, x.tolist())):
            ids, below = wanted[key]
            assert t.ids[i].tolist() == ids and torch.equal(t.layers[1][i], x[i])
            assert torch.allclose(t.layers[0][i], below, rtol=0.01, atol=0.01)
            seen.add(key)
    assert seen == set(wanted)
    parts = list(data.parts())
    assert sum(len(t) for _, t in parts) == len(wanted) and all(isinstance(t, Context) for _, t in parts)
    x, t, where = held_out(lm.layer(1), rows, data.limit, folder=tmp_path, needs=needs)
    assert torch.equal(t.ids, needs.context(rows, {0: whole[0], 1: whole[1]})[where].ids) and torch.equal(t.layers[1], x)
    plain = prepare(lm.layer(1), rows, batch=16, store_gb=store_gb, folder=tmp_path, outliers=outliers, buffer=64)
    assert plain.identity == data.identity and torch.equal(next(plain.source(3))[0], next(data.source(3))[0])


def test_a_stream_with_contexts_goes_on_bit_for_bit(tiny_gpt2, tmp_path):
    needs = Needs(2, (0,))
    data = prepare(tiny_gpt2.layer(1), ROWS, batch=16, buffer=64, store_gb=0, folder=tmp_path, needs=needs)
    source = data.source(0)
    for _ in range(5):
        next(source)
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in source.state().items()}
    wanted = [next(source) for _ in range(8)]
    again = data.source(7)
    again.settings["seed"] = 0
    again.restore(state)
    for (x, t), (y, s) in zip(wanted, again):
        assert torch.equal(x, y) and torch.equal(t.ids, s.ids) and torch.equal(t.layers[0], s.layers[0])
