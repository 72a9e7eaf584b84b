"""What the folders of SAELens, dictionary_learning and sparsify hold: their kinds, names and hooks.

All compute x_hat = act((x - b_dec) W_enc + b_enc) W_dec + b_dec on raw x (b, d), some with a
difference, which `read_saelens` and its like fold into the weights.
"""

import re
import sys
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from tsae import store

CONFIG, WEIGHTS, TABLE = "cfg.json", "sae_weights.safetensors", "lookup.safetensors"
# The kinds of SAE of each library: the activation, and the tensors as {name here: name there}.
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LINEAR = PLAIN | {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
THRESHOLD = {"threshold": "threshold"}
SAELENS = {
    "standard": ("relu", PLAIN),
    "topk": ("topk", PLAIN),
    "jumprelu": ("jumprelu", PLAIN | THRESHOLD),
    "gated": ("gated", PLAIN | {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"})}
DICTIONARIES = {  # dictionary_learning; of two with one activation, the first is written
    "AutoEncoderNew": ("relu", LINEAR | {"b_dec": "decoder.bias"}),
    "AutoEncoder": ("relu", LINEAR | {"b_dec": "bias"}),
    "AutoEncoderTopK": ("topk", LINEAR),
    "BatchTopKSAE": ("batchtopk", LINEAR | THRESHOLD),
    "MatryoshkaBatchTopKSAE": ("batchtopk", PLAIN | THRESHOLD),
    "JumpReluAutoEncoder": ("jumprelu", PLAIN | THRESHOLD),
    "GatedAutoEncoder": ("gated", LINEAR | {"b_enc": "gate_bias", "b_dec": "decoder_bias",
                                            "r_mag": "r_mag", "b_mag": "mag_bias"})}
SPARSIFY = LINEAR | {"W_dec": "W_dec"}
TURNED = ("W_enc", "decoder.weight")  # (d, n) in their files, (n, d) here
UNSHIFTED = ("AutoEncoderNew", "JumpReluAutoEncoder")  # these do not subtract b_dec from x
# SAELens folds the second and third normalisation into the weights when training ends.
SUPPORTED = {"architecture": tuple(SAELENS), "activation_fn": ("relu", "topk"),
             "reshape_activations": ("none",), "hook_head_index": (None,),
             "normalize_activations": ("none", "expected_average_only_in", "covariance_whitening")}
RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index",
           "activation_fn_str": "activation_fn"}
# Names of the residual stream at block N. Its layer here is N where that is the block's input, and
# N + 1 where it is the output, which is what a hook on a Hugging Face module reads.
HOOKS = {r"blocks\.(\d+)\.hook_(?:resid_pre|in)": 0,
         r"blocks\.(\d+)\.hook_(?:resid_post|out)": 1,
         r"resid_post_layer_(\d+)": 1,  # dictionary_learning
         r"(?:(?:model|transformer|gpt_neox|decoder|language_model|backbone)\.)*"
         r"(?:layers|h|blocks)\.(\d+)": 1}


def layer_of(hook: str) -> int:
    """The layer that a hook reads, by what its library calls it. ValueError for other places."""
    for pattern, further in HOOKS.items():
        if found := re.fullmatch(pattern, hook):
            return int(found[1]) + further
    raise ValueError(
        f"the hook is {hook!r}; only the residual stream between blocks can be read: "
        "blocks.N.hook_resid_pre, blocks.N.hook_resid_post, or what a block returns, by its name "
        "in Hugging Face (model.layers.N, transformer.h.N, gpt_neox.layers.N, layers.N)")


def _pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a .pt file, which is a pickle: nothing but tensors is let in."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError):  # what they say advises unsafe loading
        found = None
    if isinstance(found, dict) and all(isinstance(each, Tensor) for each in found.values()):
        return found
    raise ValueError(f"{file} is truncated or damaged, or holds more than a dict of tensors, which "
                     "could run code here: get it again, or have its owner save it with "
                     "torch.save(ae.state_dict(), ...)")


def tensors(file: Path, names: dict[str, str], spare: tuple[str, ...] = (), **shapes: tuple,
             ) -> dict[str, Tensor]:
    """A file's tensors as float32, named and turned as here; `names` are {name here: name there}.

    `spare` are left out. `shapes` are those that n and d do not tell (-1: any length). ValueError
    for a wrong name or shape, NaN, damage.
    """
    try:
        found = _pickled(file) if file.suffix == ".pt" else load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): get it again") from None
    found = {name: tensor.float() for name, tensor in found.items() if name not in spare}
    scaling = found.pop("scaling_factor", torch.ones(()))
    if not scaling.allclose(torch.ones_like(scaling)):
        raise ValueError(f"{file} has a finetuned `scaling_factor`; supported: all ones, or none")
    if found.keys() != set(names.values()):
        raise ValueError(f"{file} holds the tensors {sorted(found)}, "
                         f"expected {sorted(names.values())}")
    n, d = (found[names[bias]].numel() if bias in names else 0 for bias in ("b_enc", "b_dec"))
    shapes = dict.fromkeys(names, (n,)) | {"W_enc": (n, d), "W_dec": (n, d), "b_dec": (d,)} | shapes
    for here, there in names.items():
        sizes, shape = tuple(found[there].shape), shapes[here][::-1 if there in TURNED else 1]
        if len(sizes) != len(shape) or any(a != b != -1 for a, b in zip(sizes, shape)):
            raise ValueError(f"{file}: {there} has shape {sizes}, expected {shape}")
        if not found[there].isfinite().all():
            raise ValueError(f"{file}: {there} holds NaN or infinite values: get it again")
    return {here: found[there].T if there in TURNED else found[there]
            for here, there in names.items()}


def named(own: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors as they are called and turned in a file; `names` are {name here: name there}."""
    return {there: (own[here].T if there in TURNED else own[here]).contiguous()
            for here, there in names.items()}


def shift(state: dict[str, Tensor], amount: Tensor) -> None:
    """Add `amount` (n,) to what W_enc gives."""
    state["b_enc"] = state["b_enc"] + amount
    if "b_mag" in state:
        state["b_mag"] = state["b_mag"] + amount * state["r_mag"].exp()


def _unit_rows(state: dict[str, Tensor]) -> None:
    """Give decoder rows norm 1, and codes the norm they had."""
    norm = state["W_dec"].norm(dim=-1, keepdim=True).clamp_min(1e-8)  # (n, 1)
    state |= {"W_enc": state["W_enc"] * norm, "b_enc": state["b_enc"] * norm[:, 0],
              "W_dec": state["W_dec"] / norm}


def _config(file: Path) -> tuple[dict, dict]:
    """A SAELens cfg.json of any version in the keys of version 6, and its metadata.

    ValueError for what an `SAE` cannot do; a line on stderr where weights may lack a factor.
    """
    cfg = {RENAMED.get(key, key): value for key, value in store.read_json(file).items()
           if value is not None}
    metadata = cfg.pop("metadata", None)
    if not isinstance(metadata, dict):  # before version 6: all keys lay flat, these were the rule
        metadata = cfg = {"architecture": "standard", "prepend_bos": True} | cfg
    cfg = {"activation_fn": "relu", "normalize_activations": "none", "k": 100,
           "reshape_activations": "none",
           "hook_head_index": metadata.get("hook_head_index")} | cfg
    if cfg["activation_fn"] == "topk":
        cfg |= {"architecture": "topk", "k": (cfg.get("activation_fn_kwargs") or {}).get("k")}
    if isinstance(normalised := cfg["normalize_activations"], bool):
        cfg["normalize_activations"] = "expected_average_only_in" if normalised else "none"
    for key, supported in SUPPORTED.items():
        if (value := cfg.get(key)) not in supported:
            raise ValueError(f"{file} has {key} {value!r}; supported: "
                             f"{', '.join(map(str, supported))}")
    if (how := cfg["normalize_activations"]) != "none":
        tqdm.write(f"{file} has normalize_activations {how!r}: its weights are taken for those "
                   "that SAELens writes when training ends, with the factor folded in. If it is "
                   "kept elsewhere, scale x first: compare your error with the published one",
                   file=sys.stderr)
    return cfg, metadata


def read_saelens(place: Path) -> tuple[str, dict, object, dict]:
    """The activation, weights and k of a SAELens folder, and what it says about them."""
    cfg, about = _config(place / CONFIG)
    activation, names = SAELENS[cfg["architecture"]]
    state = tensors(place / WEIGHTS, names)
    if not cfg.get("apply_b_dec_to_input", True):  # an SAE subtracts b_dec: put it back
        shift(state, state["W_enc"] @ state["b_dec"])
    if activation == "topk" and cfg.get("rescale_acts_by_decoder_norm"):
        _unit_rows(state)
    model = about.get("model_from_pretrained_kwargs") or {}
    return activation, state, cfg["k"], {"centred": model.get("center_writing_weights")} | about


def read_dictionary(place: Path) -> tuple[str, dict, object, dict]:
    """The same of a folder of dictionary_learning."""
    about = store.read_json(file := place / "config.json")
    trainer, buffer = (about.pop(key, None) or {} for key in ("trainer", "buffer"))
    if (kind := trainer.get("dict_class")) not in DICTIONARIES:
        raise ValueError(f"{file} has dict_class {kind!r}; supported: {', '.join(DICTIONARIES)}")
    activation, names = DICTIONARIES[kind]
    spare = {"k", "group_sizes", "threshold"} - names.keys()
    state = tensors(place / "ae.pt", names, tuple(spare),
                    **{"threshold": ()} if activation == "batchtopk" else {})
    if kind in UNSHIFTED:
        shift(state, state["W_enc"] @ state["b_dec"])
    if kind == "AutoEncoder":  # the library does so whenever it loads one
        _unit_rows(state)
    if activation == "batchtopk":  # there a code must lie above the threshold, here it may equal it
        state["threshold"] = state["threshold"].clamp_min(0).nextafter(torch.tensor(torch.inf))
    hook = trainer.get("submodule_name")
    if hook and buffer.get("io", "out") != "out":
        hook = f"{hook}, {buffer['io']}"
    said = {"hook_name": hook, "model_name": trainer.get("lm_name"), "centred": False,
            "context_size": buffer.get("ctx_len")}
    return activation, state, trainer.get("k"), said | about


def read_sparsify(place: Path) -> tuple[str, dict, object, dict]:
    """The same of a folder of sparsify: its name is the hook; the run's config.json lies above."""
    about = store.read_json(file := place / CONFIG)
    for key, supported in {"activation": "topk", "transcode": False, "skip_connection": False,
                           "signed": False}.items():
        if (value := about.get(key, supported)) != supported:
            raise ValueError(f"{file} has {key} {value!r}; supported: {supported}")
    run = place.resolve().parent / "config.json"
    run = store.read_json(run) if run.is_file() else {}
    said = {"hook_name": place.resolve().name, "model_name": run.get("model"), "centred": False,
            "context_size": run.get("ctx_len")}
    return "topk", tensors(place / "sae.safetensors", SPARSIFY), about.get("k"), said | about
