"""What people do with an SAE once they have it: every snippet runs, and does what a forward pass by hand does."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer, tiny_network
from families import random_network

from tsae import baseline, features, store
from tsae.lm import LM
from tsae.pairs import known as fits
from tsae.sae import SAE
from tsae.scale.sweep import sweep, trained

TEXT = "hello there"


def test_text_goes_on_where_eos_is_another_token():
    """Llama's way: the model's own `generate` would hide BOS there."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "a"
    lm = LM(tiny_network("llama"), tokenizer, "llama")
    row = ids(lm)
    for _ in range(3):
        with torch.no_grad():
            row = torch.cat([row, lm.model(input_ids=row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert lm.generate(TEXT, tokens=3) == tokenizer.decode(row[0, 1:])
    with pytest.raises(ValueError, match="a prompt of 12 tokens and 40 more.*llama reads at most 32"):
        lm.generate(TEXT, tokens=40)
    assert len(ids(lm)[0]) + 21 == lm.max_context + 1 and lm.generate(TEXT, tokens=21)
    with pytest.raises(ValueError, match="temperature is -1"):
        lm.generate(TEXT, temperature=-1)
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        lm.generate(TEXT, 3, steer=[(1, torch.full((lm.d_model,), torch.nan), 1.0)])


@pytest.fixture
def sae() -> SAE:
    g = torch.Generator().manual_seed(0)
    made = SAE(16, 30, "topk", 4, 257, "learned", scale=0.7).start(torch.zeros(16), torch.randn(257, 16, generator=g))
    return made.eval().requires_grad_(False)


def ids(lm: LM) -> torch.Tensor:
    return torch.tensor([[lm.bos, *lm.tokenizer(TEXT)["input_ids"]]])


def logits(lm: LM) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(input_ids=ids(lm), use_cache=False).logits[0]


def test_the_strongest_features_of_a_sentence(tiny, sae):
    found = features.top(tiny, sae, 1, TEXT, features=2)
    codes = sae.encode(tiny.residuals(ids(tiny), [1])[1][0, 1:], ids(tiny)[0, 1:])
    for position, rows in found.groupby("position"):
        best = codes[position - 1].topk(2)
        assert rows["feature"].tolist() == best.indices[best.values > 0].tolist()
        assert rows["code"].tolist() == pytest.approx(best.values[best.values > 0].tolist())
    assert found["token"].iloc[0] == "h" and set(found["position"]) <= set(range(1, len(TEXT) + 1))


def test_features_that_fire_often_are_left_out(tiny, sae):
    every = features.top(tiny, sae, 1, TEXT, features=3)
    frequency = np.zeros(sae.n)
    frequency[every["feature"].iloc[0]] = 0.2
    rare = features.top(tiny, sae, 1, TEXT, 3, frequency)
    assert every["feature"].iloc[0] not in set(rare["feature"]) and len(rare) and (rare["frequency"] == 0).all()
    assert len(features.top(tiny, sae, 1, TEXT, 3, np.ones(sae.n))) == 0


def test_special_tokens_and_sinks_have_no_features(tiny, sae):
    x = tiny.residuals(ids(tiny), [1])[1][0, 1:]
    limited = SAE.__new__(SAE)
    limited.__dict__.update(sae.__dict__)
    limited.limit = x.norm(dim=-1).median().item()
    found = features.top(tiny, limited, 1, TEXT, features=30)
    below = 1 + (x.norm(dim=-1) <= limited.limit).nonzero().squeeze(1)
    assert set(found["position"]) == set(below.tolist()) and 0 < len(below) < len(x)
    special = features.top(tiny, sae, 1, tiny.tokenizer.decode([tiny.bos]) + "a")
    assert set(special["position"]) == {2}


def test_a_shown_text_is_escaped_and_shaded():
    shown = features.show(["<b>", " x", "y"], [0, 1, 2]).data
    assert "&lt;b&gt;" in shown and "<b>" not in shown
    assert [shade in shown for shade in ("30,0.00)", "30,0.50)", "30,1.00)")] == [True] * 3
    with pytest.raises(ValueError, match="2 tokens and 3 codes"):
        features.show(["a", "b"], [1, 2, 3])


def test_the_model_runs_on_the_reconstruction(tiny, sae):
    """As LM.nats does it through nnsight; outside of the block the model is what it was."""
    clean = logits(tiny)
    with sae.attached(tiny, 1):
        patched = logits(tiny)
    nats = tiny.nats(ids(tiny), 1, sae)
    logs, tokens = patched[:-1].log_softmax(-1), ids(tiny)[0, 1:]
    assert torch.allclose(-logs[1:].gather(1, tokens[1:, None]).squeeze(1), nats, atol=1e-4)
    assert (patched - clean).abs().max() > 0.01 and torch.equal(logits(tiny), clean)
    with sae.attached(tiny, 1, error=True):
        assert torch.allclose(logits(tiny), clean, atol=1e-4)  # what it leaves is added back
    with sae.attached(tiny, 1, change=lambda codes: codes * 0, error=True):
        off = logits(tiny)
    x = tiny.residuals(ids(tiny), [1])[1]
    codes = sae.encode(x[0, 1:], ids(tiny)[0, 1:])
    taken = x[0, 1:] - codes @ sae.W_dec * sae.scale
    expected = tiny.nats(ids(tiny), 1, lambda x, t: taken[-len(x):])
    logs = off[:-1].log_softmax(-1)
    assert torch.allclose(-logs[1:].gather(1, tokens[1:, None]).squeeze(1), expected, atol=1e-4)


def test_sinks_stay_as_they_are(tiny_gpt2, sae):
    """The SAE knows which norm it never saw."""
    x = tiny_gpt2.residuals(ids(tiny_gpt2), [1])[1]
    limit = x[0, 1:].norm(dim=1).median().item()
    seeing = SAE(**sae.config | dict(limit=limit)).eval()
    seeing.load_state_dict(sae.state_dict())
    with torch.no_grad(), seeing.attached(tiny_gpt2, 1):
        found = logits(tiny_gpt2)
    nats = tiny_gpt2.nats(ids(tiny_gpt2), 1, sae, x, limit)
    kept = tiny_gpt2.keep(ids(tiny_gpt2), x, limit)[0, :-1]
    logs, following = found[:-1].log_softmax(-1), ids(tiny_gpt2)[0, 1:]
    assert torch.allclose(-logs.gather(1, following[:, None]).squeeze(1)[kept], nats, atol=1e-4) and 0 < kept.sum() < 10


def test_steering_adds_a_direction_everywhere_but_at_bos(tiny, sae):
    push = 3.0 * sae.direction(5)
    assert torch.allclose(push, 3.0 * sae.W_dec[5] * sae.scale)
    with tiny.steered([(1, sae.direction(5), 3.0)]):
        steered = logits(tiny)
    nats = tiny.nats(ids(tiny), 1, lambda x, t: x + push)
    logs, tokens = steered[:-1].log_softmax(-1), ids(tiny)[0, 1:]
    assert torch.allclose(-logs[1:].gather(1, tokens[1:, None]).squeeze(1), nats, atol=1e-4)
    changed = tiny.next_tokens(TEXT, [(1, sae.direction(5), 3.0)], top=4)
    before, after = logits(tiny)[-1].softmax(-1), steered[-1].softmax(-1)
    assert changed["after"].tolist() == pytest.approx(after[(after - before).abs().topk(4).indices].tolist(), abs=1e-5)
    assert list(changed) == ["token", "before", "after"] and len(changed) == 4


def test_text_goes_on_as_the_model_would_write_it(tiny, sae):
    row = ids(tiny)
    for _ in range(5):
        with torch.no_grad():
            row = torch.cat([row, tiny.model(input_ids=row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert tiny.generate(TEXT, tokens=5) == tiny.tokenizer.decode(row[0, 1:])
    plain = tiny.generate(TEXT, tokens=8, temperature=2.0)
    pushed = [tiny.generate(TEXT, tokens=8, temperature=2.0, steer=[(1, sae.direction(j), 50.0)]) for j in range(4)]
    assert any(each != plain for each in pushed)
    sampled = [tiny.generate(TEXT, tokens=8, temperature=3.0, seed=seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_baseline_of_ngrams_and_layers_is_attached_too(tiny_gpt2, sae):
    """What it needs is found on the way: the last tokens, and the activation of the layer below."""
    g = torch.Generator().manual_seed(1)
    below = baseline.Affine(16, 0, 16, 0.7)
    below.left.data.normal_(generator=g)
    known = baseline.Grams(16, 257, [257])
    known.W_lookup.data.normal_(generator=g)
    known.keys.copy_(torch.arange(257) + 257 * tiny_gpt2.tokenizer("e")["input_ids"][0])
    for each in (below, known):
        other = SAE(16, 30, k=4, scale=0.7, baseline=each).start(torch.zeros(16)).requires_grad_(False)
        tail = tiny_gpt2.tail(ids(tiny_gpt2), 1, needs=each.needs)
        with other.attached(tiny_gpt2, 1):
            logs = logits(tiny_gpt2)[:-1].log_softmax(-1)
        tokens = ids(tiny_gpt2)[0, 1:]
        assert -logs[1:].gather(1, tokens[1:, None]).mean() == pytest.approx(tail(other), abs=1e-4)
        assert len(features.top(tiny_gpt2, other, 1, TEXT))


def test_what_cannot_be_done_gets_a_sentence(tiny_gpt2, sae):
    with pytest.raises(ValueError, match="feature 30 was asked for, there are 0 to 29"):
        sae.direction(30)
    with pytest.raises(ValueError, match=r"direction of shape \(4,\).*expected \(16,\)"):
        tiny_gpt2.generate(TEXT, 3, steer=[(1, torch.zeros(4), 1.0)])
    with pytest.raises(ValueError, match="layer 7 was asked for"):
        tiny_gpt2.generate(TEXT, 3, steer=[(7, sae.direction(0), 1.0)])
    with pytest.raises(ValueError, match="use_cache=False"), sae.attached(tiny_gpt2, 1):
        tiny_gpt2.model.generate(ids(tiny_gpt2), max_new_tokens=3, use_cache=True, pad_token_id=0)
    recurrent = LM(random_network("mamba2"), byte_tokenizer(), "mamba2")
    with pytest.raises(ValueError, match="BOS first, use_cache=False"), recurrent.edited(1, lambda x, t: x):
        recurrent.model.generate(ids(recurrent), max_new_tokens=3, use_cache=True, pad_token_id=0)
    above = SAE(16, 30, k=4, baseline=baseline.Affine(16, 2, 16, 1.0))
    with pytest.raises(ValueError, match="layer 1 cannot depend on layer 2"), above.attached(tiny_gpt2, 1):
        pass


def test_a_trained_sae_is_found_by_its_settings(data, tmp_path):
    jobs = [dict(activation="topk", n=8, k=k, lookup=lookup, seed=0, tokens=100)
            for k in (2, 3) for lookup in ("none", "learned")]
    known = fits.token_means(data)
    given = jobs[0] | dict(lookup="none", known=known)
    places = sweep(tmp_path / "saes", data, [*jobs, given, jobs[0] | dict(table_scale=0.5)])
    assert store.find(tmp_path, k=3, lookup="learned") == places[3]
    assert store.find(tmp_path, lookup="tokens") == places[4], "one with a baseline of its own is not one without"
    assert store.find(tmp_path, k=2, lookup="none", recipe="ours") == places[0]
    table = pd.read_csv(tmp_path / "saes" / "index.csv")
    assert len(table) == 6 and {"name", "recipe", "k", "lookup", "seed", "nmse", "l0", "dead"} <= set(table)
    _, history = trained(tmp_path / "saes", data, **jobs[3])
    assert table.set_index("name").loc[places[3].name, "nmse"] == pytest.approx(history["nmse"].iloc[-1], rel=1e-4)
    with pytest.raises(ValueError, match="2 SAEs .* they differ in .*lookup"):
        store.find(tmp_path, k=3)
    with pytest.raises(ValueError, match="0 SAEs"):
        store.find(tmp_path, k=5)
    with pytest.raises(ValueError, match="no setting colour: they have name"):
        store.find(tmp_path, colour=1)
    with pytest.raises(FileNotFoundError, match="no SAE was trained"):
        store.find(tmp_path / "elsewhere", k=2)


def test_the_snippets_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    """On the embedded model: one after the other, as a user would paste them."""
    pages = [(store.ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "data/results/README.md")]
    blocks = [part.partition("```")[0] for page in pages for part in page.split("```python\n")[1:]]
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    first, second = {}, {}
    exec(compile(blocks[0], "README.md", "exec"), first)
    exec(compile(blocks[1], "data/results/README.md", "exec"), second)
    assert store.find("my-saes", lookup="learned", k=8).resolve().is_relative_to(tmp_path)
    assert (tmp_path / "my-sae").is_dir() and first["sae"].lookup == "learned" and first["codes"].any()
    assert second["known"].config["rows"][0] > 0 and second["sae"].lookup == "grams" and len(second["history"])
