"""What `SAE` computes, against the arithmetic that SAELens documents, in float64 numpy on the files themselves."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tsae import interop
from tsae.interop import load_saelens, save_saelens
from tsae.sae import ACTIVATIONS, SAE

D, N, V, K = 6, 20, 11, 3
X, T = 5 * torch.randn(64, D, generator=torch.Generator().manual_seed(1)), torch.arange(64) % V
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


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_exported_sae_computes_the_same_there_and_after_coming_back(tmp_path, activation, table):
    sae = trained(activation, table)
    folder = save_saelens(sae, tmp_path / "out", **NAMES, context_size=64)
    codes, reconstruction = by_hand(folder, X)
    if table:
        reconstruction += load_file(folder / "lookup.safetensors")["W_lookup"][T].numpy()
    back, metadata = load_saelens(str(tmp_path), "out")
    assert (back.lookup, back.scale, back.training) == ("learned" if table else "none", 1.0, False)
    for each in (sae, back):
        agree(each.encode(X, T), codes)
        agree(each.decode(each.encode(X, T), T), reconstruction)
    assert metadata.items() >= dict(NAMES, layer=8, context_size=64, prepend_bos=True).items()
    assert metadata["sae_lens_version"] >= "6" and metadata["model_from_pretrained_kwargs"]["center_writing_weights"]
    assert {file.name for file in folder.iterdir()} == set(FILES if table else FILES[:2])


def test_a_second_export_leaves_nothing_of_the_first(tmp_path, monkeypatch):
    save_saelens(trained("relu", table=True), tmp_path, **NAMES)
    save_saelens(trained("relu"), tmp_path, hook_name="hook_embed", model_name="gpt2", centred=False)
    sae, metadata = load_saelens(str(tmp_path))
    assert (sae.lookup, metadata["layer"], metadata["hook_name"]) == ("none", -1, "hook_embed")
    assert not metadata["model_from_pretrained_kwargs"]["center_writing_weights"]
    monkeypatch.setattr(interop, "save_file", lambda w, file: 1 / 0 if "W_lookup" in w else save_file(w, file))
    with pytest.raises(ZeroDivisionError):  # cut short at the table: no weights, neither old nor new
        save_saelens(trained("topk", table=True), tmp_path, **NAMES)
    with pytest.raises(FileNotFoundError, match="no sae_weights.safetensors in"):
        load_saelens(str(tmp_path))


def test_a_preactivation_on_the_threshold_keeps_its_state(tmp_path):
    x = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    batchtopk = SAE(4, 4, "batchtopk", 2)
    batchtopk.W_enc.data.copy_(torch.eye(4))
    for threshold, expected in ((2.0, [[0.0, 2.0, 3.0, 0.0]]), (0.0, [[1.0, 2.0, 3.0, 0.0]])):  # here 2 >= 2 fires
        batchtopk.threshold.fill_(threshold)
        assert batchtopk.eval().encode(x).tolist() == expected
        assert by_hand(save_saelens(batchtopk, tmp_path, **NAMES), x)[0].tolist() == expected
    thresholds = torch.cat([torch.linspace(0.01, 60, 3000), torch.tensor([-1.0, 0.0])])
    folder = save_saelens(SAE(1, len(thresholds), "jumprelu"), tmp_path, **NAMES)
    edit(folder, None, {}, lambda w: w | {"threshold": thresholds, "b_enc": thresholds})
    assert not load_saelens(str(folder))[0].encode(torch.zeros(1, 1)).any()  # there threshold > threshold never fires
    edit(folder, None, {}, lambda w: w | {"b_enc": thresholds + 1e-5 * (1 + thresholds.abs())})
    codes = load_saelens(str(folder))[0].encode(torch.zeros(1, 1))[0]
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
    folder = edit(save_saelens(trained(activation), tmp_path, **NAMES), cfg, changes, weights)
    sae, metadata = load_saelens(str(folder))
    codes, reconstruction = by_hand(folder, X)
    agree(sae.encode(X), codes)
    agree(sae(X), reconstruction)
    expected = dict(V5_NAMES, layer=10) if cfg is V5 else dict(NAMES, layer=8, prepend_bos=True, context_size=128)
    assert metadata.items() >= expected.items() and sae.W_enc.dtype == torch.float32


@pytest.mark.parametrize("value, said", [("none", False), (None, False), (False, False), (True, True),
                                         ("expected_average_only_in", True), ("covariance_whitening", True)])
def test_a_normalisation_that_may_not_be_folded_is_told_of(value, said, tmp_path, capsys):
    folder = edit(save_saelens(trained("relu"), tmp_path, **NAMES), V5, {"normalize_activations": value}, None)
    load_saelens(str(folder))
    assert ("taken for those that SAELens writes when training ends" in capsys.readouterr().err) == said


@pytest.mark.parametrize("activation, cfg, changes, weights, words", [
    ("relu", None, {"architecture": "matching_pursuit"}, None, "matching_pursuit.*supported: standard, topk"),
    ("relu", V5, {"activation_fn_str": "tanh-relu"}, None, "tanh-relu.*supported: relu, topk"),
    ("relu", None, {"normalize_activations": "layer_norm"}, None, "normalize_activations 'layer_norm'; supp"),
    ("relu", None, {"reshape_activations": "hook_z"}, None, "reshape_activations 'hook_z'; supported: none"),
    ("relu", V5, {"hook_name": "blocks.3.attn.hook_z"}, None, "reshape_activations 'hook_z'; supported: none"),
    ("relu", None, {}, lambda w: w | {"scaling_factor": torch.full((N,), 1.5)}, "finetuned `scaling_factor`"),
    ("topk", None, {"k": N + 1}, None, "k 21; expected whole numbers"),
    ("topk", V5, {"activation_fn_str": "topk"}, None, "k None; expected whole numbers"),
    ("relu", None, {"d_sae": None}, None, "d_sae None.*expected whole numbers"),
    ("gated", None, {}, lambda w: {name: w[name] for name in w if name != "r_mag"}, "holds.*expected.*r_mag"),
    ("relu", None, {}, lambda w: w | {"W_enc": w["W_enc"].T}, r"W_enc has shape \(20, 6\), expected \(6, 20\)"),
    ("relu", None, {}, lambda w: w | {"b_enc": w["b_enc"] * float("nan")}, "b_enc holds NaN"),
])
def test_what_an_sae_cannot_do_is_refused_by_name(tmp_path, activation, cfg, changes, weights, words):
    folder = edit(save_saelens(trained(activation), tmp_path, **NAMES), cfg, changes, weights)
    with pytest.raises(ValueError, match=rf"(cfg\.json|sae_weights\.safetensors).*{words}"):
        load_saelens(str(folder))


@pytest.mark.parametrize("name", FILES)
def test_damaged_and_missing_files_are_named(tmp_path, name):
    folder = save_saelens(trained("relu", table=True), tmp_path, **NAMES)
    (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"{name} is (not valid JSON|truncated or damaged)"):
        load_saelens(str(folder))
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in"):
        load_saelens(str(folder))


def test_what_saelens_cannot_express_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="cannot express encoder_sees='rest'"):
        save_saelens(trained("topk", table=True, encoder_sees="rest"), tmp_path, **NAMES)
    with pytest.raises(ValueError, match="never trained"):
        save_saelens(SAE(D, N, "batchtopk", K), tmp_path, **NAMES)
    assert not list(tmp_path.iterdir())


def test_a_hub_id_fetches_one_folder_and_a_failure_says_what_was_sought(tmp_path, monkeypatch):
    save_saelens(trained("relu"), tmp_path / "blocks.8.hook_resid_pre", **NAMES)
    hub = {("owner/name", *(f"blocks.8.hook_resid_pre/{file}" for file in FILES)): str(tmp_path)}
    monkeypatch.setattr(interop.huggingface_hub, "snapshot_download",
                        lambda name, allow_patterns: hub[name, *allow_patterns])
    assert load_saelens("owner/name", "blocks.8.hook_resid_pre")[1]["layer"] == 8
    with pytest.raises(FileNotFoundError, match="no/such is no folder here.*layer.3/cfg.json.*check the names"):
        load_saelens("no/such", "layer.3")
