"""Oracle: loops over positions, written from the docstrings; planted rows that training finds."""

import json

import pytest
import torch
from contexts import BELOW, KINDS, LAYER, NEEDS, SCALE, D, V, known, made, source

from tsae import baseline, train
from tsae.baseline import Context, Needs
from tsae.sae import ACTIVATIONS, SAE
from tsae.scale import passes

X, T = known(600)


def naive(found: baseline.Baseline, ids: list[int], layers: dict[int, torch.Tensor]) -> torch.Tensor:
    """The row of one position, from what the class says."""
    config = found.config
    if found.kind == "tokens":
        return found.W_lookup[ids[0]]
    if found.kind == "grams":
        row, first = found.W_lookup[ids[0]].clone(), 0
        for n, many in enumerate(config["rows"], 2):
            keys = found.keys[first:first + many].tolist()
            wanted = sum(id * V**i for i, id in enumerate(ids[:n]))
            if min(ids[:n]) >= 0 and wanted in keys:
                row += found.W_lookup[V + first + keys.index(wanted)]
            first += many
        return row
    if found.kind == "factored":
        return found.left[ids[0]] @ found.right
    if found.kind == "affine":
        x = layers[config["layer"]]
        x = x * min(1.0, config["limit"] / x.norm().item())
        return (x - found.centre) / SCALE @ found.left @ found.right
    return found.sae(layers[LAYER][None], torch.tensor(ids[:1]))[0] / SCALE


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hashed"])
def test_rows_are_what_the_docstring_says(kind):
    found = made(kind)
    rows = found(T)
    for i in range(len(T)):
        layers = {n: x[i] for n, x in T.layers.items()}
        assert torch.allclose(rows[i], naive(found, T.ids[i].tolist(), layers), atol=1e-5), i
    if kind == "grams":  # a row with each number of corrections was looked at, also where the row starts
        corrections = (found.index(T.ids) >= V).sum(1)
        assert set(corrections.tolist()) >= {0, 1, 2} and (T.ids == -1).any()
    if kind == "affine":
        assert (T.layers[BELOW].norm(dim=1) > 4).any() and (T.layers[BELOW].norm(dim=1) < 4).any()


def test_hashed_rows_are_shared_by_equal_grams_of_canonical_ids_only():
    found = made("hashed")
    index = found.index(T.ids)
    assert index.shape == (len(T), 1 + 2 * 2) and torch.equal(index[:, 0], T.ids[:, 0])
    assert V <= index[:, 1:].min() and index[:, 1:].max() < V + 5
    assert torch.allclose(found(T), found.W_lookup[index].sum(1), atol=1e-6)
    ids = torch.where(T.ids == 4, 3, T.ids)  # 3 and 4 are one canonical token
    assert torch.equal(found.index(ids)[:, 1:], index[:, 1:])
    large = baseline.Hashed(D, 1000, 1 << 20, grams=3, heads=2)
    many = torch.randint(1000, (20_000, 3), generator=torch.Generator().manual_seed(0))
    places = large.index(many)[:, 1:]
    for grams, columns in ((many[:, :2], places[:, :2]), (many, places[:, 2:])):
        distinct = len(grams.unique(dim=0))
        for column in columns.T:  # as evenly as chance would: so many balls into 2^20 boxes
            lost = distinct - len(column.unique())
            assert 0.7 < lost / (distinct**2 / 2**21) < 1.3
    assert (places[:, 0] != places[:, 1]).float().mean() > 0.99  # the heads differ


def test_a_context_is_built_indexed_and_split_as_one():
    tokens = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 4]], dtype=torch.int32)
    x = torch.arange(8.0).view(2, 4, 1)
    context = Needs(3, (1,)).context(tokens, {1: x, 2: x})
    assert context.ids[0].tolist() == [[0, -1, -1], [5, 0, -1], [6, 5, 0], [7, 6, 5]]
    kept = context[tokens > 0]
    assert kept.ids[:, 0].tolist() == [5, 6, 7, 8, 9, 4] and kept.layers[1].flatten().tolist() == [1, 2, 3, 5, 6, 7]
    assert set(kept.layers) == {1} and [len(part) for part in kept.split(4)] == [4, 2]
    assert torch.equal(torch.cat([part.layers[1] for part in kept.split(4)]), kept.layers[1])
    assert torch.equal(Needs(3, (1,)).joined(kept.parts).ids, kept.ids)
    assert Needs().context(tokens, {}) is tokens and not Needs().more
    assert Needs(2, (3,)) | Needs(1, (1, 3)) == Needs(2, (1, 3))
    assert torch.equal(baseline.token_ids(kept), tokens[tokens > 0].long()) and baseline.token_ids(tokens) is tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sees", ["full", "rest"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_baseline_goes_with_every_activation(activation, sees, kind, tmp_path):
    """Trained, saved, loaded: what equation 2 says, and everything that learns has moved."""
    sae = SAE(D, 20, activation, 3, encoder_sees=sees, scale=SCALE, baseline=made(kind)).start(X.mean(0), seed=1)
    assert sae.lookup == sae.baseline.kind
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    train.fit(sae, source(), 1500, lr=1e-2, sparsity=0.01)
    for name, p in sae.named_parameters():
        moves = not (kind in ("frozen", "directions", "earlier") or (kind, name) == ("embedding", "baseline.left"))
        moved = not torch.equal(p, before[name])
        assert moved == (moves or not name.startswith("baseline.")), name
    codes, row = sae.encode(X, T), sae.baseline(T)
    z = X / SCALE - (row if sees == "rest" else 0)
    assert torch.allclose(codes, sae.act((z - sae.b_dec) @ sae.W_enc.T + sae.b_enc).codes, atol=1e-4)
    whole = (codes @ sae.W_dec + sae.b_dec + row) * SCALE
    for a_hat in (sae(X, T), sae.decode(codes, T), sae.reconstructed(X, T)[0]):
        assert torch.allclose(a_hat, whole, atol=1e-4)
    assert torch.allclose(sae.table_alone(T), (sae.b_dec + row) * SCALE)
    again = SAE.load(sae.save(tmp_path))
    assert torch.equal(again(X, T), sae(X, T)) and not any(p.requires_grad for p in again.parameters())
    learned = {name: p.requires_grad for name, p in sae.named_parameters()}
    assert {name: p.requires_grad for name, p in again.learn().named_parameters()} == learned


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_any_baseline_goes_on_bit_for_bit(kind, tmp_path):
    def begun(seed):
        sae = SAE(D, 20, "topk", 3, encoder_sees="rest", scale=SCALE, baseline=made(kind, seed)).start(X.mean(0), seed=seed)
        return train.Run(sae, 600, lr=1e-2, dead_after_tokens=100, log_every_tokens=150)

    class Cut(type(source())):
        def __next__(self):
            if self.given == 5:
                raise RuntimeError("power cut")
            return super().__next__()

    whole = begun(0)
    history = passes.fit_all([whole], source())[0]
    with pytest.raises(RuntimeError, match="power cut"):
        passes.fit_all([begun(0)], source(cls=Cut), folder=tmp_path, checkpoint_every_s=0)
    again = begun(7)
    assert passes.fit_all([again], source(), folder=tmp_path, checkpoint_every_s=0)[0].equals(history)
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, again.sae.state_dict()[name]), name


def test_what_a_baseline_is_not_told_gets_a_sentence(tmp_path):
    ids = T.ids[:, 0]
    for kind, given, said in (("grams", ids, "looks at the last 3 tokens, and got 1"), ("affine", ids, "activation of layer 2"),
                              ("earlier", Context(T.ids), "activation of layer 5"), ("grams", None, "pass the token ids"),
                              ("hashed", Context(T.ids + V), "token ids run from")):
        with pytest.raises(ValueError, match=said):
            made(kind)(given)
    for kind in ("tokens", "grams", "affine"):
        for activation in ("topk", "relu"):
            sae = SAE(D, 6, activation, k=2, baseline=made(kind)).eval()
            for use in (sae.encode, sae, sae.reconstructed, sae.loss, lambda x, t, s=sae: s.decode(torch.zeros(len(x), 6), t)):
                if use == sae.encode and sae.encoder_sees == "full":
                    continue  # it reads no context
                with pytest.raises(ValueError, match=f"{len(X)} activations were given with 1 tokens"):
                    use(X, T[:1])
    for rows, vocabulary in (([], 10), ([5] * 4, 49152)):
        with pytest.raises(ValueError, match="n-grams up to"):
            baseline.Grams(D, vocabulary, rows)
    with pytest.raises(ValueError, match="heads=0"):
        baseline.Hashed(D, V, 5, heads=0)
    with pytest.raises(ValueError, match="lookup 'learned'.*expected one of"):
        SAE(D, 4, k=2, vocabulary=V, lookup="learned", baseline=made("grams"))
    sae = SAE(D, 4, k=2, baseline=made("grams"))
    config = sae.save(tmp_path) / "config.json"
    config.write_text(json.dumps(sae.config | dict(baseline=dict(kind="magic", d_model=D))))
    with pytest.raises(ValueError, match="the baseline is 'magic': expected one of none, tokens, grams"):
        SAE.load(tmp_path)
    loaded = SAE.load(SAE(D, 4, k=2).save(tmp_path / "plain"))
    with pytest.raises(ValueError, match=r"no parameter of the topk SAE .* learns.*sae.learn\(\)"):
        train.Run(loaded, 100)


def test_an_sae_saved_with_a_table_of_its_own_is_still_read(tmp_path):
    """Before there were other baselines, the table was called W_lookup."""
    from safetensors.torch import load_file, save_file
    sae = SAE(D, 6, k=2, vocabulary=V, lookup="learned").start(torch.zeros(D), torch.randn(V, D))
    weights = sae.save(tmp_path) / "weights.safetensors"
    state = load_file(weights)
    state["W_lookup"] = state.pop("baseline.W_lookup")
    save_file(state, weights)
    config = {name: value for name, value in sae.config.items() if name != "baseline"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(SAE.load(tmp_path).W_lookup, sae.W_lookup)


def test_needs_go_through_a_stack_of_saes():
    inner = SAE(D, 6, k=2, scale=SCALE, baseline=made("grams")).eval()
    outer = SAE(D, 6, k=2, scale=SCALE, baseline=baseline.Earlier(D, LAYER, SCALE, inner)).start(torch.zeros(D))
    assert outer.baseline.needs == Needs(3, (LAYER,)) and NEEDS | outer.baseline.needs == NEEDS
    assert torch.allclose(outer.baseline(T), inner(X, T) / SCALE)
