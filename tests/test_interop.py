"""What `SAE` computes, against the arithmetic that SAELens documents, in float64 numpy on the files themselves."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import test_formats
import torch
from safetensors.torch import load_file, save_file

from tsae import interop
from tsae.interop import check_model, from_pretrained, push, save_dictionary_learning, save_saelens, save_sparsify
from tsae.sae import ACTIVATIONS, SAE

D, N, V, K = 6, 20, 11, 3
X, T = 5 * torch.randn(64, D, generator=torch.Generator().manual_seed(1)), torch.arange(64) % V
CENTRED = X - X.mean(1, keepdim=True)
FILES = ["cfg.json", "sae_weights.safetensors", "lookup.safetensors"]
NAMES = dict(hook_name="blocks.8.hook_resid_pre", model_name="gpt2-small")
RES_JB = dict(model_name="gpt2-small", hook_point="blocks.8.hook_resid_pre", hook_point_layer=8, d_in=D, d_sae=N,
              hook_point_head_index=None, context_size=128, normalize_activations=None, l1_coefficient=8e-05)
V5_NAMES = dict(model_name="gpt2", hook_name="blocks.10.hook_resid_post", prepend_bos=False, context_size=64)
V5 = dict(V5_NAMES, architecture="standard", d_in=D, d_sae=N, activation_fn_str="relu", finetuning_scaling_factor=False)


def trained(activation: str, table: bool = False, **settings) -> SAE:
    """An SAE with every weight and bias random, as if trained; scale 3.7."""
    torch.manual_seed(ACTIVATIONS.index(activation))
    sae = SAE(D, N, activation, K, V, "frozen" if table else "none", scale=3.7, **settings)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    if activation == "batchtopk":
        sae.threshold.fill_(0.6)
    return sae.eval()


def by_hand(folder: Path, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes (b, n) and reconstruction (b, d) in float64, from cfg.json and the tensors in SAELens's orientation."""
    cfg = json.loads((folder / "cfg.json").read_text())
    w = {name: t.double().numpy() for name, t in load_file(folder / "sae_weights.safetensors").items()}
    k = cfg.get("k", cfg.get("activation_fn_kwargs", {}).get("k"))
    z = x.double().numpy() - w["b_dec"] * cfg.get("apply_b_dec_to_input", True)
    norm = np.linalg.norm(w["W_dec"], axis=1) if cfg.get("rescale_acts_by_decoder_norm") else 1.0
    if "b_gate" in w:
        codes = (z @ w["W_enc"] + w["b_gate"] > 0) * np.maximum(z @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0)
    else:
        pre = (z @ w["W_enc"] + w["b_enc"]) * norm
        codes = np.maximum(pre, 0) * (pre > w.get("threshold", -np.inf))
        if k:
            codes *= pre >= np.sort(pre, axis=1)[:, [-k]]
    return codes, (codes / norm) @ w["W_dec"] + w["b_dec"]


def as_told(folder: Path, told: str, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The same for an SAE with a table, by the two lines that its metadata tells the reader to run."""
    *_, first, second = told.splitlines()
    library = SimpleNamespace(encode=lambda x: by_hand(folder, x)[0], decode=lambda codes: decoded(folder, codes))
    names = dict(sae=library, x=x, t=T, W_lookup=load_file(folder / "lookup.safetensors")["W_lookup"])
    exec(f"{first.strip()}\n{second.strip()}", names)
    return names["codes"], names["x_hat"].numpy()


def decoded(folder: Path, codes: np.ndarray) -> torch.Tensor:
    w = load_file(folder / "sae_weights.safetensors")
    return torch.tensor(codes) @ w["W_dec"].double() + w["b_dec"].double()


def edit(folder: Path, cfg: dict | None, changes: dict, weights: Callable[[dict], dict] | None) -> Path:
    """Rewrite an exported folder: another cfg, changed keys, changed tensors."""
    (folder / "cfg.json").write_text(json.dumps((cfg or json.loads((folder / "cfg.json").read_text())) | changes))
    if weights:
        tensors = weights(load_file(folder / "sae_weights.safetensors"))
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def agree(got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-5, atol=2e-5)
    assert expected.any()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("sees", ["", "full", "rest"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_exported_sae_computes_the_same_there_and_after_coming_back(activation, sees, centred, tmp_path):
    """On x (b, d) as the SAE was trained on it, and where that was centred, on x with its mean, as TransformerLens 4 has it."""
    sae = trained(activation, bool(sees), encoder_sees=sees or "full")
    x = CENTRED if centred else X
    folder = save_saelens(sae, tmp_path / "out", centred=centred, context_size=64, **NAMES)
    back, about = from_pretrained(tmp_path, "out")
    for given in (x, X) if centred else (x,):
        if sees:
            codes, x_hat = as_told(folder, about["lookup"], given)
        else:
            codes, x_hat = by_hand(folder, given)
        agree(sae.encode(x, T), codes)
        agree(sae(x, T), x_hat)
        agree(back.encode(x if sees == "rest" else given, T), codes)
    agree(back.decode(back.encode(x, T), T), x_hat)
    assert (back.lookup, back.encoder_sees) == ("learned" if sees else "none", sees or "full")
    assert (back.scale, back.training) == (1.0, False)
    assert about.items() >= dict(NAMES, layer=8, context_size=64, prepend_bos=True, model_from_pretrained_kwargs={}).items()
    assert about["sae_lens_version"] >= "6" and "model_class_name" not in about
    assert about["centred"] == (None if centred and sees != "rest" else centred)
    assert {file.name for file in folder.iterdir()} == {*(FILES if sees else FILES[:2]), "README.md"}


def test_a_centred_export_is_not_that_of_an_uncentred_one(tmp_path):
    """The mean of b_dec, and of the rows of W_enc, count: an oracle that sees a wrong sign or a missing term."""
    sae = trained("relu")
    folder = save_saelens(sae, tmp_path, centred=True, **NAMES)
    w = load_file(folder / "sae_weights.safetensors")
    assert w["W_enc"].mean(0).abs().max() < 1e-6 < 0.01 < sae.W_enc.mean(1).abs().min() and not w["b_enc"].equal(sae.b_enc)
    save_saelens(sae, tmp_path, centred=False, **NAMES)
    with pytest.raises(AssertionError):
        agree(sae.encode(CENTRED), by_hand(tmp_path, X)[0])


def test_an_export_that_does_not_say_whether_x_was_centred_is_told_of(tmp_path, capsys):
    save_saelens(trained("relu"), tmp_path / "silent", centred=False, **NAMES)
    assert not capsys.readouterr().err
    save_saelens(trained("relu"), tmp_path / "told", **NAMES)
    assert "pass centred=lm.centred" in capsys.readouterr().err
    assert load_file(tmp_path / "told" / FILES[1])["W_enc"].equal(load_file(tmp_path / "silent" / FILES[1])["W_enc"])


@pytest.mark.parametrize("sees", ["", "full", "rest"])
@pytest.mark.parametrize("save, activation", [(save_sparsify, "topk"), *((save_dictionary_learning, a) for a in ACTIVATIONS)])
def test_an_sae_comes_back_from_the_other_libraries(save, activation, sees, tmp_path):
    sae = trained(activation, bool(sees), encoder_sees=sees or "full")
    folder = save(sae, tmp_path, centred=True, **NAMES)
    back, about = from_pretrained(folder)
    agree(back.encode(CENTRED, T), sae.encode(CENTRED, T).detach().numpy())
    agree(back(CENTRED, T), sae(CENTRED, T).detach().numpy())
    assert (back.activation, back.encoder_sees, back.lookup != "none") == (activation, sees or "full", bool(sees))
    assert (about["layer"], about["model_name"], about["context_size"]) == (8, "gpt2-small", 128)
    assert "topk" not in activation or back.k == K
    if save is save_dictionary_learning:
        kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
        state = torch.load(folder / "ae.pt", weights_only=True)
        shift = load_file(folder / FILES[2])["W_lookup"][T] if sees == "rest" else 0
        agree(sae.encode(CENTRED, T), test_formats.by_hand(kind, state, CENTRED - shift)[0])


def test_what_the_other_libraries_cannot_hold_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="sparsify has topk SAEs only, this one is relu: use save_saelens"):
        save_sparsify(trained("relu"), tmp_path, centred=True, **NAMES)
    first = dict(NAMES, hook_name="blocks.0.hook_resid_pre", centred=False)
    for save in (save_sparsify, save_dictionary_learning):
        with pytest.raises(ValueError, match="goes into the first block.*use save_saelens"):
            save(trained("topk"), tmp_path, **first)
    for save in (save_saelens, save_dictionary_learning):
        with pytest.raises(ValueError, match="never trained"):
            save(SAE(D, N, "batchtopk", K), tmp_path, centred=False, **NAMES)
    with pytest.raises(ValueError, match="only the residual stream"):
        save_saelens(trained("topk"), tmp_path, hook_name="blocks.8.hook_mlp_out", model_name="gpt2", centred=False)
    with pytest.raises(ValueError, match=r"`frequency` must be the share of tokens, 0 to 1, of each of 20.*\(3,\)"):
        save_saelens(trained("topk"), tmp_path, frequency=torch.ones(3), centred=False, **NAMES)
    assert not list(tmp_path.iterdir())


def test_the_hub_finds_its_card_and_the_frequencies(tmp_path):
    frequency = torch.linspace(0, 1, N)
    folder = save_saelens(trained("relu", table=True), tmp_path, centred=True, frequency=frequency, **NAMES)
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "saelens" and "sparse-autoencoder" in card.data.tags
    assert "x_hat = sae.decode(codes) + W_lookup[t]" in card.text
    found = load_file(folder / "sparsity.safetensors")
    assert found.keys() == {"sparsity"} and found["sparsity"][0] == -10
    np.testing.assert_allclose(10 ** found["sparsity"].numpy(), frequency.numpy(), atol=1e-6)


def test_a_second_export_leaves_nothing_of_the_first(tmp_path, monkeypatch):
    save_saelens(trained("relu", table=True), tmp_path, centred=True, frequency=torch.zeros(N), **NAMES)
    save_saelens(trained("relu"), tmp_path, hook_name="transformer.h.2", model_name="gpt2", centred=False)
    sae, about = from_pretrained(tmp_path)
    assert (sae.lookup, about["layer"], about["hook_name"]) == ("none", 3, "transformer.h.2")
    assert not (tmp_path / "sparsity.safetensors").exists()
    monkeypatch.setattr(interop, "save_file", lambda w, file: 1 / 0 if "W_lookup" in w else save_file(w, file))
    with pytest.raises(ZeroDivisionError):  # cut short at the table: no weights, neither old nor new
        save_saelens(trained("topk", table=True), tmp_path, centred=True, **NAMES)
    with pytest.raises(FileNotFoundError, match="no SAE in.*cfg.json and sae_weights.safetensors"):
        from_pretrained(tmp_path)


def test_a_preactivation_on_the_threshold_keeps_its_state(tmp_path):
    x = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    batchtopk = SAE(4, 4, "batchtopk", 2)
    batchtopk.W_enc.data.copy_(torch.eye(4))
    for threshold, expected in ((2.0, [[0.0, 2.0, 3.0, 0.0]]), (0.0, [[1.0, 2.0, 3.0, 0.0]])):  # here 2 >= 2 fires
        batchtopk.threshold.fill_(threshold)
        assert batchtopk.eval().encode(x).tolist() == expected
        assert by_hand(save_saelens(batchtopk, tmp_path, centred=False, **NAMES), x)[0].tolist() == expected
    thresholds = torch.cat([torch.linspace(0.01, 60, 3000), torch.tensor([-1.0, 0.0])])
    folder = save_saelens(SAE(1, len(thresholds), "jumprelu"), tmp_path, centred=False, **NAMES)
    edit(folder, None, {}, lambda w: w | {"threshold": thresholds, "b_enc": thresholds})
    assert not from_pretrained(folder)[0].encode(torch.zeros(1, 1)).any()  # there threshold > threshold never fires
    edit(folder, None, {}, lambda w: w | {"b_enc": thresholds + 1e-5 * (1 + thresholds.abs())})
    codes = from_pretrained(folder)[0].encode(torch.zeros(1, 1))[0]
    assert (codes > 0).tolist() == [True] * 3000 + [False, True]


@pytest.mark.parametrize("activation, cfg, changes, weights", [
    ("relu", RES_JB, {}, lambda w: w | {"scaling_factor": torch.ones(N)}),
    ("relu", V5, {"normalize_activations": False, "apply_b_dec_to_input": False}, None),
    ("topk", V5, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, None),
    ("topk", None, {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}, None),
    ("jumprelu", None, {"apply_b_dec_to_input": False}, lambda w: w | {"threshold": w["threshold"] - 0.5}),
    ("jumprelu", V5, {"architecture": "jumprelu", "normalize_activations": True}, None),
    ("gated", None, {"apply_b_dec_to_input": False, "normalize_activations": "expected_average_only_in"}, None),
    ("relu", None, {"dtype": "bfloat16"}, lambda w: {name: t.bfloat16() for name, t in w.items()}),
    ("gated", None, {"dtype": "float64"}, lambda w: {name: t.double() for name, t in w.items()}),
])
def test_old_files_and_folds_agree_with_the_documented_arithmetic(tmp_path, activation, cfg, changes, weights):
    folder = edit(save_saelens(trained(activation), tmp_path, centred=False, **NAMES), cfg, changes, weights)
    sae, about = from_pretrained(folder)
    codes, reconstruction = by_hand(folder, X)
    agree(sae.encode(X), codes)
    agree(sae(X), reconstruction)
    expected = dict(V5_NAMES, layer=11) if cfg is V5 else dict(NAMES, layer=8, prepend_bos=True, context_size=128)
    assert about.items() >= expected.items() and sae.W_enc.dtype == torch.float32


@pytest.mark.parametrize("value, said", [("none", False), (None, False), (False, False), (True, True),
                                         ("expected_average_only_in", True), ("covariance_whitening", True)])
def test_a_normalisation_that_may_not_be_folded_is_told_of(value, said, tmp_path, capsys):
    folder = edit(save_saelens(trained("relu"), tmp_path, centred=False, **NAMES), V5, {"normalize_activations": value}, None)
    from_pretrained(folder)
    assert ("taken for those that SAELens writes when training ends" in capsys.readouterr().err) == said


@pytest.mark.parametrize("activation, cfg, changes, weights, words", [
    ("relu", None, {"architecture": "matching_pursuit"}, None, "matching_pursuit.*supported: standard, topk"),
    ("relu", V5, {"activation_fn_str": "tanh-relu"}, None, "tanh-relu.*supported: relu, topk"),
    ("relu", None, {"normalize_activations": "layer_norm"}, None, "normalize_activations 'layer_norm'; supp"),
    ("relu", None, {"reshape_activations": "hook_z"}, None, "reshape_activations 'hook_z'; supported: none"),
    ("relu", V5, {"hook_point_head_index": 3}, None, "hook_head_index 3; supported: None"),
    ("relu", None, {}, lambda w: w | {"scaling_factor": torch.full((N,), 1.5)}, "finetuned `scaling_factor`"),
    ("topk", None, {"k": N + 1}, None, "k 21; expected a whole number from 1 to 20"),
    ("topk", V5, {"activation_fn_str": "topk"}, None, "k None; expected a whole number"),
    ("gated", None, {}, lambda w: {name: w[name] for name in w if name != "r_mag"}, "holds.*expected.*r_mag"),
    ("relu", None, {}, lambda w: w | {"W_enc": w["W_enc"].T}, r"W_enc has shape \(20, 6\), expected \(6, 20\)"),
    ("relu", None, {}, lambda w: w | {"b_enc": w["b_enc"] * float("nan")}, "b_enc holds NaN"),
])
def test_what_an_sae_cannot_do_is_refused_by_name(tmp_path, activation, cfg, changes, weights, words):
    folder = edit(save_saelens(trained(activation), tmp_path, centred=False, **NAMES), cfg, changes, weights)
    with pytest.raises(ValueError, match=rf"(cfg\.json|sae_weights\.safetensors|configuration in).*{words}"):
        from_pretrained(folder)


@pytest.mark.parametrize("cfg, changes, words", [
    (V5, {"hook_name": "blocks.3.attn.hook_z"}, "'blocks.3.attn.hook_z'"), (V5, {"hook_name": "hook_embed"}, "'hook_embed'"),
    (RES_JB, {"hook_point": "blocks.3.hook_mlp_out"}, "'blocks.3.hook_mlp_out'")])
def test_a_hook_elsewhere_is_refused(cfg, changes, words, tmp_path):
    folder = edit(save_saelens(trained("relu"), tmp_path, centred=False, **NAMES), cfg, changes, None)
    with pytest.raises(ValueError, match=f"the SAE in .* cannot be used: the hook is {words}; only the residual stream"):
        from_pretrained(folder)


def test_a_file_may_say_nothing_of_its_hook_and_something_of_centring(tmp_path):
    folder = edit(save_saelens(trained("relu"), tmp_path, centred=False, **NAMES), V5, {"hook_name": None}, None)
    assert from_pretrained(folder)[1].items() >= dict(layer=-1, centred=None).items()
    for said in (True, False):
        edit(folder, V5, {"model_from_pretrained_kwargs": {"center_writing_weights": said}}, None)
        assert from_pretrained(folder)[1]["centred"] is said


@pytest.mark.parametrize("model, centred, name, here, words", [
    ("gpt2-small", None, "openai-community/gpt2", True, ""), ("gpt2", True, "models/GPT2/", True, ""),
    (None, None, "gpt2", True, ""), ("meta-llama/Llama-3.1-8B", False, "Meta-Llama-3.1-8B", False, ""),
    ("pythia-160m", False, "EleutherAI/pythia-160m-deduped", False, "model pythia-160m, the one at hand is Eleu.*-deduped"),
    ("gpt2", False, "gpt2", True, "activations as they are over coordinates, those of gpt2 come less it"),
    ("gpt2", True, "gpt2", False, "activations less their mean over coordinates, those of gpt2 come as they are")])
def test_another_model_is_told_of(model, centred, name, here, words, capsys):
    assert check_model(dict(model_name=model, centred=centred), SimpleNamespace(name=name, centred=here)) is None
    said = capsys.readouterr().err
    assert len(said.splitlines()) == bool(words) and re.search(words, said)


@pytest.mark.parametrize("name", FILES)
def test_damaged_and_missing_files_are_named(tmp_path, name):
    folder = save_saelens(trained("relu", table=True), tmp_path, centred=False, **NAMES)
    (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"{name} is (not valid JSON|truncated or damaged)"):
        from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in" if name == FILES[2] else f"no SAE in.*{name}"):
        from_pretrained(folder)


def test_our_own_format_is_recognised(tmp_path):
    sae = trained("gated", table=True)
    back, about = from_pretrained(sae.save(tmp_path / "own"))
    assert back.config == sae.config and about == {"layer": -1}
    assert all(tensor.equal(sae.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_a_hub_id_fetches_one_folder_and_a_failure_says_what_was_sought(tmp_path, monkeypatch):
    save_saelens(trained("relu"), tmp_path / "blocks.8.hook_resid_pre", centred=False, **NAMES)
    asked = []
    hub = {"owner/name": str(tmp_path)}
    monkeypatch.setattr(interop.huggingface_hub, "snapshot_download",
                        lambda name, allow_patterns: asked.extend(allow_patterns) or hub[name])
    assert from_pretrained("owner/name", "blocks.8.hook_resid_pre")[1]["layer"] == 8
    inside = {*FILES, "ae.pt", "sae.safetensors", "config.json", "weights.safetensors"}
    assert set(asked) == {f"blocks.8.hook_resid_pre/{name}" for name in inside} | {"config.json"}
    with pytest.raises(FileNotFoundError, match="no/such is no folder here.*layer.3/cfg.json.*check the names"):
        from_pretrained("no/such", "layer.3")


@pytest.mark.parametrize("there", [False, True])
def test_an_sae_is_pushed_and_comes_back(there, tmp_path, monkeypatch):
    """Into a folder named for its hook; a README.md that is there stays."""
    sae, made = trained("topk", table=True, encoder_sees="rest"), {}
    monkeypatch.setattr(interop.huggingface_hub, "create_repo", lambda repo, **how: made.update(how, repo=repo))
    monkeypatch.setattr(interop.huggingface_hub, "file_exists", lambda repo, name: there)
    monkeypatch.setattr(interop.huggingface_hub, "upload_folder",
                        lambda repo_id, folder_path, commit_message: shutil.copytree(folder_path, tmp_path / repo_id))
    assert push(sae, "me/saes", centred=True, private=True, **NAMES) == "https://huggingface.co/me/saes"
    assert made == dict(repo="me/saes", private=True, exist_ok=True)
    monkeypatch.setattr(interop.huggingface_hub, "snapshot_download", lambda name, **how: str(tmp_path / name))
    back, about = from_pretrained("me/saes", "blocks.8.hook_resid_pre")
    agree(back(CENTRED, T), sae(CENTRED, T).detach().numpy())
    assert about["layer"] == 8 and (tmp_path / "me/saes/README.md").is_file() != there
    assert not (tmp_path / "me/saes/blocks.8.hook_resid_pre/README.md").exists()


def test_nothing_is_made_on_the_hub_for_what_cannot_be_exported(monkeypatch):
    monkeypatch.setattr(interop.huggingface_hub, "create_repo", lambda *given, **how: pytest.fail("a repository was made"))
    with pytest.raises(ValueError, match="never trained"):
        push(SAE(D, N, "batchtopk", K), "me/saes", centred=False, **NAMES)
