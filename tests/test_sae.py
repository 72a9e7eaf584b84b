"""Oracle: the equations written out over positions, features and coordinates, and autograd of that form, in float64."""

import json
import os
from functools import partial

import pytest
import torch
from safetensors import SafetensorError
from torch.nn.functional import cosine_similarity

from tsae import kernels
from tsae import sae as module
from tsae.sae import ACTIVATIONS, SAE

B, D, N, K, V = 9, 6, 10, 3, 5
X = 3 * torch.randn(B, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0, 1, 3, 3, 0, 1, 1, 3, 0])  # 2 and 4 do not occur
TABLED = [(a, lookup) for a in ACTIVATIONS for lookup in ("none", "learned")]


def random_sae(activation, lookup="learned", k=K, seed=0, **settings):
    """Every parameter random, in float64; scale is not 1."""
    torch.manual_seed(seed)
    sae = SAE(D, N, activation, k, V, lookup, **({"scale": 1.7} | settings)).double()
    with torch.no_grad():
        for p in sae.parameters():
            p.normal_()
    return sae


def naive_pre(sae, x, t):
    """W_enc (a_t - b_dec) + b_enc, one sum at a time: a list of B lists of N numbers."""
    W, b, b_dec = sae.W_enc.tolist(), sae.b_enc.tolist(), sae.b_dec.tolist()
    pre = []
    for a, token in zip(x.tolist(), t.tolist()):
        row = sae.W_lookup[token].tolist() if sae.lookup != "none" and sae.encoder_sees == "rest" else [0.0] * D
        seen = [a[j] / sae.scale - b_dec[j] - row[j] for j in range(D)]
        pre.append([sum(W[i][j] * seen[j] for j in range(D)) + b[i] for i in range(N)])
    return pre


@torch.no_grad()
def naive_codes(sae, pre):
    """act(.) of equation 1, feature by feature."""
    values = sorted(p for row in pre for p in row)
    rules = {
        "relu": lambda p, i, row: max(0.0, p),
        "topk": lambda p, i, row: max(0.0, p) if p in sorted(row)[-sae.k:] else 0.0,
        "batchtopk": lambda p, i, row: max(0.0, p) if p >= (
            max(0.0, values[-sae.k * len(pre)]) if sae.training else sae.threshold) else 0.0,
        "jumprelu": lambda p, i, row: p if p > sae.log_threshold[i].exp() else 0.0,
        "gated": lambda p, i, row: max(0.0, sae.r_mag[i].exp() * (p - sae.b_enc[i]) + sae.b_mag[i]) if p > 0 else 0.0,
    }
    return torch.tensor([[rules[sae.activation](p, i, row) for i, p in enumerate(row)] for row in pre], dtype=X.dtype)


def naive_decode(sae, codes, t):
    """Equation 2."""
    rows = []
    for f, token in zip(codes, t):
        a_hat = sae.b_dec.clone() if sae.lookup == "none" else sae.b_dec + sae.W_lookup[token]
        for i in range(N):
            a_hat = a_hat + f[i] * sae.W_dec[i]
        rows.append(a_hat * sae.scale)
    return torch.stack(rows)


@pytest.fixture(params=[0.0, 1.0], ids=["dense", "pairs"])
def few(request, monkeypatch):
    """Both ways to compute codes that are not topk: 0.0 as if never few enough for pairs, 1.0 as if always."""
    monkeypatch.setattr(kernels, "FEW", request.param)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("encoder_sees", ["full", "rest"])
@pytest.mark.parametrize("activation, lookup", TABLED)
def test_equations_1_and_2_are_the_loops(activation, lookup, encoder_sees, training):
    sae = random_sae(activation, lookup, encoder_sees=encoder_sees).train(training)
    if activation == "batchtopk":
        sae.threshold.fill_(0.8)
    codes = naive_codes(sae, naive_pre(sae, X, T))
    assert 0.1 < (codes > 0).double().mean() < 0.9
    assert torch.allclose(sae.encode(X, T), codes) and torch.allclose(sae.decode(codes, T), naive_decode(sae, codes, T))
    assert torch.allclose(sae(X, T), naive_decode(sae, codes, T))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_codes_are_never_negative(activation):
    sae = random_sae(activation, k=N)  # even the negative ones are among the k
    assert (sae.preactivations(X, T) < 0).any() and sae.encode(X, T).min() == 0
    sae.b_enc.data -= 100
    assert not sae.encode(X, T).any() and torch.allclose(sae(X, T), (sae.b_dec + sae.W_lookup[T]) * sae.scale)


def test_batchtopk_keeps_k_a_position_on_average():
    sae = random_sae("batchtopk", "none")
    for x in (X, 2 * X):
        assert (sae.encode(x) > 0).sum() == K * B
    assert sae.eval().encode(X[:1]).count_nonzero() == K, "nothing learned yet: the threshold of the batch"
    sae.threshold.fill_(0.8)
    assert torch.allclose(sae.encode(X[:1]), sae.encode(X)[:1])  # in use, neighbours do not matter


@pytest.mark.usefixtures("few")
def test_training_follows_the_mean_of_the_least_values_kept():
    sae, wanted = random_sae("batchtopk", "none"), None
    for x in (X, 2 * X, 0.5 * X):
        codes = sae.encode(x)
        least = codes[codes > 0].min().item()
        wanted = least if wanted is None else 0.9 * wanted + 0.1 * least
        sae.loss(x)
        assert sae.threshold.item() == pytest.approx(wanted)
    assert sae.eval().loss(3 * X)["loss"] > 0 and sae.threshold.item() == pytest.approx(wanted)


USES = dict(encode=SAE.encode, forward=SAE.forward, reconstructed=SAE.reconstructed, preactivations=SAE.preactivations,
            table_alone=lambda sae, x, t: sae.table_alone(t))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seen", [-1.0, 0.8])  # of batchtopk: nothing yet, and a threshold
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_the_loss_in_training_changes_an_sae(activation, seen, training):
    sae = random_sae(activation).train(training)
    if activation == "batchtopk":
        sae.threshold.fill_(seen)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    for name, use in USES.items():
        answers = []
        for _ in range(2):
            with torch.no_grad():
                answers.append(use(sae, X, T))
            use(sae, 2 * X, T)  # another batch in between
        first, again = ([torch.as_tensor(part) for part in (answer if isinstance(answer, tuple) else (answer,))]
                        for answer in answers)
        assert all(torch.equal(a, b) for a, b in zip(first, again)), name
        assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items()), name
    sae.loss(X, T)
    moved = [key for key, value in sae.state_dict().items() if not torch.equal(value, before[key])]
    assert moved == (["threshold"] if training and activation == "batchtopk" else [])


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_reconstructed_is_equation_2_of_the_codes(activation):
    sae = random_sae(activation)
    codes = naive_codes(sae, naive_pre(sae, X, T))
    a_hat, count, fired = sae.reconstructed(X, T)
    assert torch.allclose(a_hat, naive_decode(sae, codes, T)) and not a_hat.requires_grad
    assert count == (codes > 0).sum() and torch.equal(fired, (codes > 0).any(0))


@pytest.mark.usefixtures("few")
def test_the_kth_largest_value_may_come_from_a_larger_batch():
    """Ranks that share a batch hand in a function that sees the values of all: here it answers for all of them."""
    sae, asked = random_sae("batchtopk"), []

    def kth(values, k):
        asked.append((len(values), k))
        return torch.tensor(5.0, dtype=X.dtype)
    codes = sae.loss(X, T, kth=kth)["codes"]
    assert codes[codes > 0].min() >= 5 and sae.threshold == 5 and asked[0] == (B * N, K * B)
    assert torch.allclose(codes.sum(), sae.preactivations(X, T).clamp_min(0).mul(sae.preactivations(X, T) >= 5).sum())


@pytest.mark.parametrize("encoder_sees", ["full", "rest"])
@pytest.mark.parametrize("lookup", ["none", "learned"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_sparse_codes_have_the_gradients_of_the_dense_computation(activation, lookup, encoder_sees):
    sae = random_sae(activation, lookup, encoder_sees=encoder_sees)
    x, t = torch.randn(1030, D, dtype=X.dtype, requires_grad=True), torch.randint(V, (1030,))  # over a chunk of 1024
    dense = ((x - sae.decode(sae.encode(x, t), t)) / sae.scale).square().sum(-1).mean()
    wanted = torch.autograd.grad(dense, [x, *sae.parameters()])
    for a, b in zip(torch.autograd.grad(sae.loss(x, t)["loss"], [x, *sae.parameters()]), wanted):
        assert b.to_dense().any() and torch.allclose(a.to_dense(), b.to_dense())
    through_forward = ((x - sae(x, t)) / sae.scale).square().sum(-1).mean()
    assert torch.allclose(torch.autograd.grad(through_forward, sae.W_enc)[0], wanted[1])


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("aux_lookup", [True, False])
@pytest.mark.parametrize("activation, lookup", TABLED)
def test_loss_terms_by_hand(activation, lookup, aux_lookup):
    sae = random_sae(activation, lookup, aux_lookup=aux_lookup)
    pre = naive_pre(sae, X, T)
    codes, norms = naive_codes(sae, pre), sae.W_dec.norm(dim=1)
    a_hat = naive_decode(sae, codes, T)
    expected = ((X - a_hat).square().sum() / sae.scale**2 / B).item()
    gates = torch.tensor(pre, dtype=X.dtype).clamp_min(0)
    penalty = {"relu": codes @ norms, "gated": gates @ norms, "jumprelu": (codes > 0).double().sum(1)}
    expected += 0.3 * penalty[activation].mean().item() if activation in penalty else 0.0
    if activation == "gated":
        a_gate = naive_decode(sae, gates, T)
        if lookup != "none" and not aux_lookup:
            a_gate = a_gate - sae.W_lookup[T] * sae.scale
        expected += ((X - a_gate).square().sum() / sae.scale**2 / B).item()
    out = sae.loss(X, T, sparsity=0.3)
    assert out["loss"].item() == pytest.approx(expected) and torch.allclose(out["z_hat"] * sae.scale, a_hat)
    assert torch.equal(out["fired"], (codes > 0).any(0)) and not out["z_hat"].requires_grad
    assert (out["codes"] > 0).sum() == (codes > 0).sum() and not out["codes"].requires_grad


@pytest.mark.parametrize("lookup, encoder_sees", [("none", "full"), ("learned", "full"), ("learned", "rest")])
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "topk"])
def test_few_codes_give_the_gradients_that_many_do(activation, lookup, encoder_sees, monkeypatch):
    x, grads = X.clone().requires_grad_(), []
    for share in (0.0, 1.0):
        monkeypatch.setattr(kernels, "FEW", share)
        sae = random_sae(activation, lookup, encoder_sees=encoder_sees, bandwidth=1.5)
        if activation == "jumprelu":
            sae.log_threshold.data.abs_()
        out = sae.loss(x, T, sparsity=0.3)
        assert out["codes"].ndim == (2 if share == 0.0 else 1)
        grads.append(torch.autograd.grad(out["loss"], [x, *sae.parameters()]))
    names = ["x", *dict(sae.named_parameters())]
    for name, dense, pairs in zip(names, *grads):
        assert dense.to_dense().any() and torch.allclose(dense.to_dense(), pairs.to_dense()), name


def test_thresholds_near_zero_leave_their_window_whole(monkeypatch):
    """Below half a bandwidth the window reaches below zero, where no pair is: all codes must be computed."""
    monkeypatch.setattr(kernels, "FEW", 1.0)
    sae = random_sae("jumprelu", "none", bandwidth=1.5)
    sae.log_threshold.data.abs_()[0] = -2.0
    assert sae.loss(X)["codes"].ndim == 2
    sae.log_threshold.data[0] = 0.0
    assert sae.loss(X)["codes"].ndim == 1


def test_gated_codes_have_the_derivatives_of_finite_differences():
    g = torch.Generator().manual_seed(0)
    pre, *rest = (torch.randn(shape, generator=g, dtype=X.dtype).requires_grad_() for shape in ((B, N), N, N, N))
    codes, gates = kernels.Gated.apply(pre, *rest, None)
    assert (codes > 0).any() and ((gates > 0) & (codes == 0)).any() and (gates == 0).any()
    assert torch.autograd.gradcheck(kernels.Gated.apply, (pre, *rest, None))


@pytest.mark.usefixtures("few")
def test_the_gated_auxiliary_error_leaves_the_decoder_alone():
    sae = random_sae("gated", "none")
    sae.W_enc.data.zero_()  # the only ways left to b_dec and W_dec are the two reconstructions
    sae.loss(X)["loss"].backward()
    with torch.no_grad():
        error = (X - sae(X)) / sae.scale
        assert torch.allclose(sae.b_dec.grad, -2 * error.mean(0))
        assert torch.allclose(sae.W_dec.grad, -2 / B * sae.encode(X).T @ error)
    assert sae.b_enc.grad.any()  # the gate learns from nothing else


@pytest.mark.usefixtures("few")
def test_jumprelu_thresholds_get_the_straight_through_gradient():
    """Rajamanoharan et al. 2024, equations 11 and 12: K is a box of width 1 over (pre - theta) / bandwidth."""
    sae = random_sae("jumprelu", bandwidth=1.5)
    sae.log_threshold.data.abs_()  # beyond half a bandwidth
    sae.loss(X, T, sparsity=0.3)["loss"].backward()
    with torch.no_grad():
        pre, theta = torch.tensor(naive_pre(sae, X, T)), sae.log_threshold.exp()
        error = (X - sae(X, T)) / sae.scale
        expected = torch.zeros(N, dtype=X.dtype)
        for b in range(B):
            for i in range(N):
                if abs(pre[b, i] - theta[i]) < 1.5 / 2:
                    by_code = -2 * error[b] @ sae.W_dec[i] * (-theta[i] / 1.5)
                    expected[i] += theta[i] * (by_code + 0.3 * (-1 / 1.5)) / B  # theta: from d theta / d log theta
    assert (expected != 0).sum() > N / 3 and torch.allclose(sae.log_threshold.grad, expected)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("dead", [[4], [0, 7], [0, 2, 3, 5, 7, 9]])  # D / 2 = 3: fewer, and more
def test_auxk_by_hand(dead, activation):
    sae = random_sae(activation)
    mask = torch.zeros(N, dtype=torch.bool).index_fill_(0, torch.tensor(dead), True)
    pre, error = naive_pre(sae, X, T), ((X - sae(X, T)) / sae.scale).detach()
    expected = 0.0
    for b in range(B):
        rest = error[b].clone()
        for i in sorted(dead, key=lambda i: -pre[b][i])[:3]:
            rest -= max(0.0, pre[b][i]) * sae.W_dec[i].detach()
        expected += min(1, len(dead) / 3) * rest.square().sum().item() / B
    plain, with_aux = sae.loss(X, T), sae.loss(X, T, dead=mask, aux_weight=0.25)
    assert (with_aux["loss"] - plain["loss"]).item() == pytest.approx(0.25 * expected)
    parameters = dict(sae.named_parameters())
    ours = torch.autograd.grad(with_aux["loss"] - plain["loss"], list(parameters.values()))
    for name, g in zip(parameters, ours):  # the dead learn from it; the living, b_dec and the table do not
        touched = g.to_dense().abs().reshape(len(g), -1).amax(1) > 1e-12
        assert torch.equal(touched, mask) if name in ("W_enc", "b_enc", "W_dec") else not touched.any()


def test_the_gradient_of_the_table_is_sparse():
    sae = random_sae("topk")
    sae.loss(X, T)["loss"].backward()
    g, error = sae.W_lookup.grad, ((X - sae(X, T)) / sae.scale).detach()
    assert g.is_sparse and set(g.coalesce().indices()[0].tolist()) == set(T.tolist())
    for token in range(V):
        assert torch.allclose(g.to_dense()[token], -2 / B * error[T == token].sum(0))
    frozen = random_sae("topk", "frozen")
    frozen.loss(X, T)["loss"].backward()
    assert frozen.W_lookup.grad is None and frozen.b_dec.grad.any()


def test_start_is_a_function_of_its_arguments():
    mean, table, state = torch.randn(64), torch.randn(V, 64), torch.get_rng_state()
    start = partial(SAE(64, 512, "relu", vocabulary=V, lookup="learned", scale=2.0).start, mean, table, table_scale=0.5)
    sae = start(encoder_scale=0.25, seed=3)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(512)) and torch.equal(sae.W_enc, 0.25 * sae.W_dec)
    assert cosine_similarity(sae.W_dec[::2], sae.W_dec[1::2]).abs().mean() < 0.2  # random directions, not one
    assert torch.allclose(sae.decode(torch.zeros(B, 512), T), mean + 0.5 * table[T], atol=1e-6)
    W = sae.W_dec.detach().clone()
    assert torch.equal(start(seed=3).W_dec, W) and not torch.equal(start(seed=4).W_dec, W)
    kaiming = start(encoder="kaiming").W_enc
    assert kaiming.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.03)
    assert cosine_similarity(kaiming, sae.W_dec).abs().mean() < 0.2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("lookup", ["none", "frozen", "learned"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_save_and_load_are_bit_equal(activation, lookup, tmp_path):
    sae = random_sae(activation, lookup, encoder_sees="rest", bandwidth=0.1).float()
    sae.loss(X.float(), T)  # batchtopk has a threshold now
    loaded = SAE.load(sae.save(tmp_path / "a" / "b"))
    assert loaded.config == sae.config and loaded.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in sae.state_dict().items())
    assert torch.equal(loaded(X.float(), T), sae.eval()(X.float(), T)) and not loaded.training
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "weights.safetensors"]


def test_a_damaged_folder_gets_a_sentence(tmp_path):
    sae = random_sae("relu").float()
    with pytest.raises(FileNotFoundError, match="not a saved SAE.*weights.safetensors"):
        SAE.load(tmp_path)
    weights, config = sae.save(tmp_path) / "weights.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    for damage in (lambda: weights.write_bytes(whole[:-100]), lambda: config.write_text("{"),
                   lambda: config.write_text("[1]"), lambda: config.write_text('{"colour": 1}'),
                   lambda: config.write_text(json.dumps(sae.config | {"n": N + 1})),
                   lambda: config.write_text(json.dumps(sae.config | {"lookup": "none"}))):
        sae.save(tmp_path)
        damage()
        with pytest.raises(ValueError, match=f"(?s){tmp_path} is damaged.*save it again"):
            SAE.load(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="not a saved SAE"):
        SAE.load(tmp_path)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    sae = random_sae("topk").float()
    sae.b_enc.data[2] = float("nan")
    with pytest.raises(ValueError, match=f"b_enc of the SAE in {tmp_path} have NaN.*smaller rate"):
        SAE.load(sae.save(tmp_path))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "topk"])
def test_an_empty_batch_has_gradients(activation):
    x = torch.zeros(0, D, requires_grad=True)
    sae = random_sae(activation, "none").float()
    sae(x).sum().backward()
    assert not sae.W_enc.grad.any()


@pytest.mark.parametrize("use", [SAE.forward, SAE.loss, lambda sae, x, t=None: sae.decode(sae.encode(x, t), t)])
def test_a_table_needs_token_ids_that_it_has(use):
    use(random_sae("topk", "none"), X)  # without a table they are ignored
    use(random_sae("topk", "none"), X, T + 1000)
    sae = random_sae("topk")
    with pytest.raises(ValueError, match="pass the token ids"):
        use(sae, X)
    for wrong in (V, -1):
        with pytest.raises(ValueError, match="rows 0 to 4.*tokenizer"):
            use(sae, X, T.clone().index_fill_(0, torch.tensor(2), wrong))


@pytest.mark.parametrize("settings, sentence", [
    (dict(activation="tanh"), "relu.*gated"), (dict(lookup="maybe"), "frozen"), (dict(encoder_sees="half"), "rest"),
    (dict(k=N + 1), "between 1 and.*10"), (dict(k=0, activation="batchtopk"), "between 1 and"),
    (dict(lookup="learned"), "vocabulary"), (dict(scale=0.0), "positive"), (dict(scale=float("nan")), "positive")])
def test_wrong_settings_get_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SAE(D, N, **({"k": K} | settings))


def test_a_table_of_another_shape_gets_a_sentence():
    for shape in ((V + 1, D), (V, D - 1), (D, V)):
        with pytest.raises(ValueError, match=r"one row per token.*\(5, 6\)"):
            SAE(D, N, "relu", vocabulary=V, lookup="learned").start(torch.zeros(D), torch.zeros(shape))


def test_a_save_that_is_cut_short_leaves_no_mixture(tmp_path, monkeypatch):
    small, large = SAE(D, N, k=K), SAE(D, 2 * N, k=K)
    small.save(tmp_path)

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(OSError, match="could not be saved in.*No space left.*free some space"):
            large.save(tmp_path)
    assert SAE.load(tmp_path).n == N and len(list(tmp_path.iterdir())) == 2
    replace, synced = os.replace, []
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if b.suffix == ".json" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        large.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a saved SAE"):  # neither the old weights nor the new
        SAE.load(tmp_path)
    assert len(synced) == 2
