"""SAELens folders in and out: a published dictionary becomes an `SAE`, an `SAE` becomes a folder.

cfg.json and sae_weights.safetensors stand for x_hat = act((x - b_dec) W_enc + b_enc) W_dec + b_dec
on raw activations x (b, d). There is no `scale`, and W_enc is (d, n). The differences are folded
into the weights, so that codes are the same numbers on both sides. SAELens has no lookup table:
W_lookup (V, d), in raw units, lies beside in a file of its own, and x_hat + W_lookup[t] is ours.
"""

import re
import sys
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from tsae import store
from tsae.sae import SAE

CONFIG, WEIGHTS, TABLE = "cfg.json", "sae_weights.safetensors", "lookup.safetensors"
# An architecture of SAELens, and its tensors of length n as {name here: name there}.
ARCHITECTURES = {"standard": {"b_enc": "b_enc"}, "topk": {"b_enc": "b_enc"},
                 "jumprelu": {"b_enc": "b_enc", "threshold": "threshold"},
                 "gated": {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}}
# SAELens folds the second and third normalisation into the weights when training ends.
SUPPORTED = {"architecture": tuple(ARCHITECTURES), "activation_fn": ("relu", "topk"),
             "reshape_activations": ("none",),
             "normalize_activations": ("none", "expected_average_only_in", "covariance_whitening")}
RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index",
           "activation_fn_str": "activation_fn"}


def _fetch(path: str, folder: str) -> Path:
    """The local folder of the SAE. A `path` that is no folder here is a hub id: downloaded."""
    if not Path(path).is_dir():
        wanted = [Path(folder, name).as_posix() for name in (CONFIG, WEIGHTS, TABLE)]
        try:
            path = huggingface_hub.snapshot_download(path, allow_patterns=wanted)
        except Exception as error:  # the hub client's errors have no common family
            raise FileNotFoundError(
                f"{path} is no folder here, and fetching {wanted[0]} and {wanted[1]} from the "
                f"Hugging Face hub failed ({error}): check the names and the network") from error
    place = Path(path, folder)
    for name in (CONFIG, WEIGHTS):
        if not (place / name).is_file():
            raise FileNotFoundError(f"there is no {name} in {place}: name the folder of an SAE")
    return place


def _config(file: Path) -> tuple[dict, dict]:
    """A cfg.json of any version in the keys of version 6, and its metadata.

    ValueError for what an `SAE` cannot do; a line on stderr where weights may lack a factor.
    """
    cfg = {RENAMED.get(key, key): value for key, value in store.read_json(file).items()
           if value is not None}
    metadata = cfg.pop("metadata", None)
    if not isinstance(metadata, dict):  # before version 6: all keys lay flat, these were the rule
        metadata = cfg = {"architecture": "standard", "prepend_bos": True} | cfg
    hook = str(metadata.get("hook_name"))
    cfg = {"activation_fn": "relu", "normalize_activations": "none", "k": 100,
           "reshape_activations": "hook_z" if "hook_z" in hook else "none"} | cfg
    if cfg["activation_fn"] == "topk":
        cfg |= {"architecture": "topk", "k": (cfg.get("activation_fn_kwargs") or {}).get("k")}
    if isinstance(normalised := cfg["normalize_activations"], bool):
        cfg["normalize_activations"] = "expected_average_only_in" if normalised else "none"
    for key, supported in SUPPORTED.items():
        if (value := cfg.get(key)) not in supported:
            raise ValueError(f"{file} has {key} {value!r}; supported: {', '.join(supported)}")
    if (how := cfg["normalize_activations"]) != "none":
        tqdm.write(f"{file} has normalize_activations {how!r}: its weights are taken for those "
                   "that SAELens writes when training ends, with the factor folded in. If it is "
                   "kept elsewhere, scale x first: compare your error with the published one",
                   file=sys.stderr)
    d, n, k = sizes = [cfg.get(key) for key in ("d_in", "d_sae", "k")]
    whole = all(isinstance(size, int) and size > 0 for size in sizes)
    if not whole or cfg["architecture"] == "topk" and k > n:
        raise ValueError(f"{file} has d_in {d!r}, d_sae {n!r}, k {k!r}; "
                         "expected whole numbers from 1, k at most d_sae")
    layer = re.search(r"\.(\d+)(\.|$)", hook)
    return cfg, metadata | {"layer": int(layer[1]) if layer else -1}


def _tensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A file's tensors as float32. ValueError for a wrong name or shape (-1: any), NaN, damage."""
    try:
        found = {name: tensor.float() for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): get it again") from None
    scaling = found.pop("scaling_factor", torch.ones(()))
    if not scaling.allclose(torch.ones_like(scaling)):
        raise ValueError(f"{file} has a finetuned `scaling_factor`; supported: all ones, or none")
    if found.keys() != shapes.keys():
        raise ValueError(f"{file} holds the tensors {sorted(found)}, expected {sorted(shapes)}")
    for name, shape in shapes.items():
        sizes = tuple(found[name].shape)
        if len(sizes) != len(shape) or any(a != b != -1 for a, b in zip(sizes, shape)):
            raise ValueError(f"{file}: {name} has shape {sizes}, expected {shape}")
        if not found[name].isfinite().all():
            raise ValueError(f"{file}: {name} holds NaN or infinite values: get it again")
    return found


def load_saelens(path: str, folder: str = "") -> tuple[SAE, dict]:
    """An SAE from a SAELens folder, and its metadata: hook_name, layer (-1: unknown), ...

    `path` is a local folder or a hub id such as "jbloom/GPT2-Small-SAEs-Reformatted", `folder` a
    folder inside it. The SAE is in eval mode and takes the raw x (b, d), float32, mean-centred over
    d where metadata["model_from_pretrained_kwargs"] asks for center_writing_weights; the RES-JB
    files need it and do not say so. Raises FileNotFoundError; ValueError for damage, or no support.
    """
    place = _fetch(path, folder)
    cfg, metadata = _config(place / CONFIG)
    d, n, architecture = cfg["d_in"], cfg["d_sae"], cfg["architecture"]
    names = ARCHITECTURES[architecture]
    shapes = {"W_enc": (d, n), "W_dec": (n, d), "b_dec": (d,)} | dict.fromkeys(names.values(), (n,))
    found = _tensors(place / WEIGHTS, shapes)
    state = {"W_enc": found["W_enc"].T, "W_dec": found["W_dec"], "b_dec": found["b_dec"]}
    state |= {here: found[there] for here, there in names.items()}
    _fold(state, cfg)
    if (place / TABLE).is_file():
        state |= _tensors(place / TABLE, {"W_lookup": (-1, d)})
    elif "lookup" in metadata:
        raise FileNotFoundError(f"no {TABLE} in {place}, but its {CONFIG} tells of one: copy it")
    activation = "relu" if architecture == "standard" else architecture
    sae = SAE(d, n, activation, cfg["k"], vocabulary=len(state.get("W_lookup", ())),
              lookup="learned" if "W_lookup" in state else "none")
    sae.load_state_dict(state)
    return sae.eval(), metadata


def _fold(state: dict, cfg: dict) -> None:
    """Put into the weights what this kind of SAELens file computes, and an `SAE` does not."""
    if not cfg.get("apply_b_dec_to_input", True):  # an SAE subtracts b_dec: put it back
        shift = state["W_enc"] @ state["b_dec"]  # (n,)
        state["b_enc"] = state["b_enc"] + shift
        if "b_mag" in state:
            state["b_mag"] = state["b_mag"] + shift * state["r_mag"].exp()
    if cfg["architecture"] == "topk" and cfg.get("rescale_acts_by_decoder_norm"):
        norm = state["W_dec"].norm(dim=-1, keepdim=True).clamp_min(1e-8)  # (n, 1)
        state |= {"W_enc": state["W_enc"] * norm, "b_enc": state["b_enc"] * norm[:, 0],
                  "W_dec": state["W_dec"] / norm}
    if "threshold" in state:  # below 0 it acts as 0, since codes are never negative
        threshold = state.pop("threshold")
        log = threshold.clamp_min(0).log()
        # Rounding must not put exp(log) below it: a pre-activation on its threshold stays silent.
        above = log + 2**-22 * log.abs().clamp_min(1)
        state["log_threshold"] = torch.where(log.exp() < threshold, above, log)


@torch.no_grad()
def save_saelens(sae: SAE, folder: str | Path, *, hook_name: str, model_name: str,
                 context_size: int = 128, centred: bool = True) -> Path:
    """Write an SAE as a SAELens 6 folder with the same codes, and return the folder.

    `hook_name` and `model_name` are TransformerLens's ("blocks.8.hook_resid_pre", "gpt2-small").
    `context_size` is in tokens. `centred`: x was mean-centred over d (only LayerNorm models are).
    ValueError for encoder_sees="rest", and for a batchtopk never trained.
    """
    own = {name: tensor.cpu().float() for name, tensor in sae.state_dict().items()}
    if "W_lookup" in own and sae.encoder_sees == "rest":
        raise ValueError("SAELens cannot express encoder_sees='rest': keep it with `SAE.save`, or "
                         "train with encoder_sees='full'")
    architecture = {"relu": "standard", "batchtopk": "jumprelu"}.get(sae.activation, sae.activation)
    if architecture == "jumprelu":
        own["threshold"] = _threshold(sae, own)
    tensors = {there: own[here] for here, there in ARCHITECTURES[architecture].items()}
    tensors |= {name: own[name] * sae.scale for name in ("W_dec", "b_dec")}
    tensors["W_enc"] = (own["W_enc"].T / sae.scale).contiguous()
    metadata = {"sae_lens_version": "6.0.0",  # without it SAELens takes the file for an old one
                "model_name": model_name, "model_class_name": "HookedTransformer",
                "hook_name": hook_name, "context_size": context_size, "prepend_bos": True,
                "model_from_pretrained_kwargs": {"center_writing_weights": centred}}
    cfg = {"architecture": architecture, "d_in": sae.d_model, "d_sae": sae.n, "dtype": "float32",
           "apply_b_dec_to_input": True, "normalize_activations": "none",
           "reshape_activations": "none", "metadata": metadata}
    if architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    files = {WEIGHTS: tensors}
    if "W_lookup" in own:  # before the weights, which appear last
        metadata["lookup"] = ("SAELens's reconstruction lacks W_lookup[t], raw units, "
                              f"the row of token t in {TABLE}")
        files = {TABLE: {"W_lookup": own["W_lookup"] * sae.scale}} | files
    folder = Path(folder)
    for name in (WEIGHTS, TABLE):  # an earlier export never mixes with this one, even if cut short
        (folder / name).unlink(missing_ok=True)
    store.write_json(folder / CONFIG, cfg)
    for name, tensors in files.items():
        with store.replacing(folder / name) as temporary:
            save_file(tensors, temporary)
    return folder


def _threshold(sae: SAE, own: dict) -> torch.Tensor:
    """The threshold (n,) above which SAELens's jumprelu fires, in units of `scale`."""
    if sae.activation == "jumprelu":
        return own["log_threshold"].exp()
    if own["threshold"] < 0:
        raise ValueError("this batchtopk SAE was never trained: it has no threshold yet to export")
    # Here a pre-activation equal to the threshold fires, there it does not: go one float below.
    return torch.nextafter(own["threshold"], torch.zeros(())).repeat(sae.n)
