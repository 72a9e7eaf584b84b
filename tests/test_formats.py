"""Folders of other libraries, made here as those libraries write them, against their own arithmetic in float64 numpy."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tsae import formats
from tsae.interop import from_pretrained

D, N, K = 6, 20, 3
SHAPES = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "encoder.weight": (N, D), "encoder.bias": (N,),
          "decoder.weight": (D, N), "decoder.bias": (D,), "bias": (D,), "decoder_bias": (D,), "threshold": (N,),
          "r_mag": (N,), "gate_bias": (N,), "mag_bias": (N,)}
LINEAR, PLAIN = "encoder.weight encoder.bias decoder.weight", "W_enc b_enc W_dec b_dec"
CLASSES = {"AutoEncoder": f"{LINEAR} bias", "AutoEncoderNew": f"{LINEAR} decoder.bias", "AutoEncoderTopK": f"{LINEAR} b_dec",
           "BatchTopKSAE": f"{LINEAR} b_dec", "MatryoshkaBatchTopKSAE": PLAIN, "JumpReluAutoEncoder": f"{PLAIN} threshold",
           "GatedAutoEncoder": "encoder.weight decoder.weight decoder_bias r_mag gate_bias mag_bias"}
X = 5 * torch.randn(64, D, generator=torch.Generator().manual_seed(1))


def random_tensors(names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(names))
    return {name: torch.randn(SHAPES[name], generator=generator) for name in names.split()}


def trained(folder: Path, kind: str, trainer: dict | None = None, **weights) -> Path:
    """A dictionary_learning folder of this class, with every weight random; changed as asked for."""
    state = random_tensors(CLASSES[kind])
    if "TopK" in kind:
        state |= {"k": torch.tensor(K).int(), "threshold": torch.tensor(0.6)}
    if "Matryoshka" in kind:
        state["group_sizes"] = torch.tensor([5, N - 5])
    given = {"dict_class": kind, "activation_dim": D, "dict_size": N, "k": K, "layer": 3,
             "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3"} | (trainer or {})
    folder.mkdir(parents=True, exist_ok=True)
    config = {"trainer": given, "buffer": {"d_submodule": D, "io": given.pop("io", "out"), "ctx_len": 64}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state | weights, folder / "ae.pt")
    return folder


def sparsified(folder: Path, **changes) -> Path:
    """A sparsify folder, in that of its run."""
    folder.mkdir(parents=True)
    (folder.parent / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m", "ctx_len": 2048}))
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K,
           "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))
    save_file(random_tensors("encoder.weight encoder.bias W_dec b_dec"), folder / "sae.safetensors")
    return folder


def top(pre: np.ndarray) -> np.ndarray:
    return pre * (pre >= np.sort(pre, axis=1)[:, [-K]])


def by_hand(kind: str, state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes (b, n) and reconstruction (b, d) by the forward pass of dictionary_learning's class."""
    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    W_enc, W_dec = (w[a] if a in w else w[b].T for a, b in (("W_enc", "encoder.weight"), ("W_dec", "decoder.weight")))
    b_dec = next(w[name] for name in ("b_dec", "bias", "decoder.bias", "decoder_bias") if name in w)
    z = x.double().numpy() - b_dec * (kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"))
    if kind == "GatedAutoEncoder":
        codes = (z @ W_enc + w["gate_bias"] > 0) * np.maximum(np.exp(w["r_mag"]) * (z @ W_enc) + w["mag_bias"], 0)
    else:
        codes = np.maximum(z @ W_enc + next(w[name] for name in ("b_enc", "encoder.bias") if name in w), 0)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        codes = codes * (codes > w["threshold"])
    if kind == "AutoEncoderTopK":
        codes = top(codes)
    x_hat = codes @ W_dec + b_dec
    return codes * (np.linalg.norm(W_dec, axis=1) if kind == "AutoEncoder" else 1), x_hat


def agree(got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-5, atol=5e-5)
    assert expected.any()


@pytest.mark.parametrize("hook, layer", [
    ("blocks.8.hook_resid_pre", 8), ("blocks.8.hook_in", 8), ("blocks.8.hook_resid_post", 9), ("blocks.0.hook_out", 1),
    ("model.layers.12", 13), ("transformer.h.0", 1), ("gpt_neox.layers.3", 4), ("layers.10", 11), ("h.5", 6),
    ("model.decoder.layers.2", 3), ("transformer.blocks.7", 8), ("resid_post_layer_12", 13)])
def test_a_hook_says_which_residual_stream_it_reads(hook, layer):
    assert formats.layer_of(hook) == layer


@pytest.mark.parametrize("hook", [
    "blocks.8.hook_resid_mid", "blocks.8.hook_mlp_out", "blocks.8.hook_attn_out", "blocks.8.attn.hook_z", "hook_embed",
    "blocks.8.ln1.hook_normalized", "layers.3.mlp", "layers.3.attention", "embed_tokens", "model.layers.3.self_attn",
    "mlp_out_layer_3", "vision_tower.encoder.layers.3", "3", ""])
def test_other_places_are_refused_with_those_that_can_be_read(hook):
    with pytest.raises(ValueError, match=r"only the residual stream.*hook_resid_pre.*model\.layers\.N"):
        formats.layer_of(hook)


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning_is_read_by_its_own_arithmetic(kind, tmp_path):
    folder = trained(tmp_path, kind)
    sae, about = from_pretrained(tmp_path)
    codes, x_hat = by_hand(kind, torch.load(folder / "ae.pt", weights_only=True), X)
    agree(sae.encode(X), codes)
    agree(sae(X), x_hat)
    assert about == dict(hook_name="resid_post_layer_3", layer=4, model_name="EleutherAI/pythia-70m-deduped", context_size=64,
                         centred=False)
    assert not sae.training and ("TopK" not in kind or sae.k == K)


@pytest.mark.parametrize("threshold, expected", [(-1.0, [[1.0, 2.0]]), (0.0, [[1.0, 2.0]]), (1.0, [[0.0, 2.0]])])
def test_a_code_on_the_threshold_of_dictionary_learning_is_silent(threshold, expected, tmp_path):
    eye = torch.eye(2)
    trained(tmp_path, "BatchTopKSAE", dict(k=1), threshold=torch.tensor(threshold), b_dec=torch.zeros(2),
            **{"encoder.weight": eye, "encoder.bias": torch.zeros(2), "decoder.weight": eye})
    assert from_pretrained(tmp_path)[0].encode(torch.tensor([[1.0, 2.0]])).tolist() == expected


def test_a_hook_that_is_not_named_is_not_guessed(tmp_path):
    assert from_pretrained(trained(tmp_path, "AutoEncoder", {"submodule_name": None}))[1]["layer"] == -1


@pytest.mark.parametrize("trainer, words", [
    ({"submodule_name": "mlp_out_layer_3"}, "the SAE in .* cannot be used: the hook is 'mlp_out_layer_3'; only the residual"),
    ({"io": "in"}, "the hook is 'resid_post_layer_3, in'; only the residual"),
    ({"dict_class": "CrossCoder"}, r"config\.json has dict_class 'CrossCoder'; supported: AutoEncoderNew, AutoEncoder,"),
    ({"k": None}, "has k None; expected a whole number from 1 to 20"), ({"k": N + 1}, "has k 21; expected"),
    ({"dict_class": "AutoEncoder"}, r"ae\.pt holds the tensors .*, expected .*'bias'")])
def test_what_cannot_be_used_of_dictionary_learning_is_refused(trainer, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        from_pretrained(trained(tmp_path, "AutoEncoderTopK", trainer))


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


@pytest.mark.parametrize("content", ["code", "module", "list", "truncated", "other"])
def test_a_pickle_of_more_than_tensors_is_refused_unread(content, tmp_path):
    file, made = trained(tmp_path / "ae", "AutoEncoder") / "ae.pt", tmp_path / "made"
    if content == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif content == "other":
        file.write_bytes(pickle.dumps({"bias": Trap(made)}, protocol=2))
    else:
        torch.save({"code": {"bias": Trap(made)}, "module": torch.nn.Linear(2, 2), "list": [torch.ones(2)]}[content], file)
    with pytest.raises(ValueError, match=r"ae\.pt is truncated or damaged, or holds more.*state_dict") as error:
        from_pretrained(tmp_path / "ae")
    assert not made.exists() and "weights_only=False" not in str(error.value)


@pytest.mark.parametrize("changes", [{}, {"num_latents": 0}, {"signed": False, "activation": "topk"}])
def test_sparsify_is_read_by_its_own_arithmetic(changes, tmp_path):
    sae, about = from_pretrained(tmp_path, sparsified(tmp_path / "layers.10", **changes).name)
    w = {name: tensor.double().numpy() for name, tensor in random_tensors("encoder.weight encoder.bias W_dec b_dec").items()}
    codes = top(np.maximum((X.double().numpy() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0))
    agree(sae.encode(X), codes)
    agree(sae(X), codes @ w["W_dec"] + w["b_dec"])
    said = dict(layer=11, hook_name="layers.10", model_name="EleutherAI/pythia-160m", context_size=2048, centred=False)
    assert about.items() >= said.items()


@pytest.mark.parametrize("name, changes, words", [
    ("layers.1", {"transcode": True}, "has transcode True; supported: False"),
    ("layers.1", {"skip_connection": True}, "has skip_connection True; supported: False"),
    ("layers.1", {"signed": True}, "has signed True; supported: False"),
    ("layers.1", {"activation": "groupmax"}, "has activation 'groupmax'; supported: topk"),
    ("layers.1", {"k": None}, "has k None; expected"),
    ("layers.1.mlp", {}, r"the hook is 'layers\.1\.mlp'; only the residual")])
def test_what_cannot_be_used_of_sparsify_is_refused(name, changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        from_pretrained(sparsified(tmp_path / name, **changes))
