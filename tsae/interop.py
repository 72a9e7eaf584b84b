"""SAELens folders in and out: published dictionaries become an `SAE`, an `SAE` becomes a folder that SAELens 6 reads.

cfg.json and sae_weights.safetensors stand for pre = (x - b_dec) W_enc + b_enc, x_hat = act(pre) W_dec + b_dec on raw
activations x (b, d): no `scale`, and W_enc is (d, n). Differences are folded into the weights, so that codes are the
same numbers on both sides. SAELens has no lookup table: W_lookup (V, d), raw units, lies beside in lookup.safetensors,
and x_hat + W_lookup[t] is this package's reconstruction.
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
                 "jumprelu": {"b_enc": "b_enc", "log_threshold": "threshold"},
                 "gated": {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}}
# The second and third normalisation are folded when training ends, and do nothing in use: unless a folder was saved before.
SUPPORTED = {"architecture": tuple(ARCHITECTURES), "activation_fn": ("relu", "topk"), "reshape_activations": ("none",),
             "normalize_activations": ("none", "expected_average_only_in", "covariance_whitening")}
RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}


def _fetch(path: str, folder: str) -> Path:
    """The local folder of the SAE; where `path` is no folder here it is taken for a hub id and downloaded."""
    place = path
    if not Path(path).is_dir():
        wanted = [Path(folder, name).as_posix() for name in (CONFIG, WEIGHTS, TABLE)]
        try:
            place = huggingface_hub.snapshot_download(path, allow_patterns=wanted)
        except Exception as error:  # no network, no such name, no permission: the client's errors have no common family
            raise FileNotFoundError(f"{path} is no folder here, and fetching {wanted[0]} and {wanted[1]} from the "
                                    f"Hugging Face hub failed ({error}): check the names and the network") from error
    for name in (CONFIG, WEIGHTS):
        if not Path(place, folder, name).is_file():
            raise FileNotFoundError(f"there is no {name} in {Path(place, folder)}: name the folder that holds the SAE")
    return Path(place, folder)


def _config(file: Path) -> tuple[dict, dict]:
    """A cfg.json of any version in the keys of version 6, and its metadata. ValueError for what an `SAE` cannot do."""
    cfg = {RENAMED.get(key, key): value for key, value in store.read_json(file).items() if value is not None}
    nested = cfg.pop("metadata", None)
    if not isinstance(nested, dict):  # before version 6 all keys lay flat, and these were the rule
        nested = cfg = {"architecture": "standard", "prepend_bos": True} | cfg
    cfg = {"activation_fn": "relu", "normalize_activations": "none", "k": 100,
           "reshape_activations": "hook_z" if "hook_z" in str(nested.get("hook_name")) else "none"} | cfg
    if cfg["activation_fn"] == "topk":
        cfg |= {"architecture": "topk", "k": (cfg.get("activation_fn_kwargs") or {}).get("k")}
    if isinstance(cfg["normalize_activations"], bool):
        cfg["normalize_activations"] = SUPPORTED["normalize_activations"][cfg["normalize_activations"]]
    for key, supported in SUPPORTED.items():
        if cfg.get(key) not in supported:
            raise ValueError(f"{file} has {key} {cfg.get(key)!r}; supported: {', '.join(supported)}")
    if (how := cfg["normalize_activations"]) != "none":
        tqdm.write(f"{file} has normalize_activations {how!r}: its weights are taken for those that SAELens writes when "
                   "training ends, with the normalisation folded into them. If they were saved before (SAELens keeps "
                   "the factor of some published SAEs elsewhere), scale x first: compare the error with the published "
                   "one", file=sys.stderr)
    d, n, k = sizes = [cfg.get(key) for key in ("d_in", "d_sae", "k")]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or cfg["architecture"] == "topk" and k > n:
        raise ValueError(f"{file} has d_in {d!r}, d_sae {n!r}, k {k!r}; expected whole numbers from 1, k at most d_sae")
    layer = re.search(r"\.(\d+)(\.|$)", str(nested.get("hook_name")))
    return cfg, nested | {"layer": int(layer[1]) if layer else -1}


def _tensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of a file as float32. Raises ValueError for a wrong name or shape (-1: any length), NaN, damage."""
    try:
        found = {name: tensor.float() for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): download or write it again") from None
    scaling = found.pop("scaling_factor", torch.ones(()))
    if not scaling.allclose(torch.ones_like(scaling)):
        raise ValueError(f"{file} has a finetuned `scaling_factor`; supported: one of all ones, or none")
    if found.keys() != shapes.keys():
        raise ValueError(f"{file} holds the tensors {sorted(found)}, expected {sorted(shapes)}")
    for name, shape in shapes.items():
        if found[name].ndim != len(shape) or any(a != b != -1 for a, b in zip(found[name].shape, shape)):
            raise ValueError(f"{file}: {name} has shape {tuple(found[name].shape)}, expected {shape}")
        if not found[name].isfinite().all():
            raise ValueError(f"{file}: {name} holds NaN or infinite values: download or write it again")
    return found


def load_saelens(path: str, folder: str = "") -> tuple[SAE, dict]:
    """An SAE from a SAELens folder, and its metadata: hook_name, layer (-1: unknown), model_name, context_size, ...

    `path` is a local folder or a hub id such as "jbloom/GPT2-Small-SAEs-Reformatted", `folder` a folder inside it. The
    SAE takes the raw x (b, d) that SAELens takes, in float32; it has scale 1, a table if the folder has, and is in eval
    mode. x is mean-centred over d where metadata["model_from_pretrained_kwargs"] asks for center_writing_weights; the
    RES-JB files need it and do not say so. FileNotFoundError; ValueError for damage and what an SAE cannot do.
    """
    place = _fetch(path, folder)
    cfg, metadata = _config(place / CONFIG)
    d, n, vectors = cfg["d_in"], cfg["d_sae"], ARCHITECTURES[cfg["architecture"]]
    shapes = {"W_enc": (d, n), "W_dec": (n, d), "b_dec": (d,)} | dict.fromkeys(vectors.values(), (n,))
    found = _tensors(place / WEIGHTS, shapes)
    state = {"W_enc": found["W_enc"].T, "W_dec": found["W_dec"], "b_dec": found["b_dec"]}
    state |= {here: found[there] for here, there in vectors.items()}
    if not cfg.get("apply_b_dec_to_input", True):
        shift = state["W_enc"] @ state["b_dec"]  # (n,): an SAE always subtracts b_dec, this puts it back
        state["b_enc"] = state["b_enc"] + shift
        if "b_mag" in state:
            state["b_mag"] = state["b_mag"] + shift * state["r_mag"].exp()
    if cfg["architecture"] == "topk" and cfg.get("rescale_acts_by_decoder_norm"):
        norm = state["W_dec"].norm(dim=-1, keepdim=True).clamp_min(1e-8)  # (n, 1)
        state |= {"W_enc": state["W_enc"] * norm, "b_enc": state["b_enc"] * norm[:, 0], "W_dec": state["W_dec"] / norm}
    if "log_threshold" in state:
        theta = state["log_threshold"].clamp_min(0)  # codes are never negative, so a threshold below 0 acts as 0
        log = theta.log()
        # Rounding must not put exp(log) below theta: a pre-activation that equals its threshold stays silent.
        state["log_threshold"] = torch.where(log.exp() < theta, log + 2**-22 * log.abs().clamp_min(1), log)
    if (place / TABLE).is_file():
        state |= _tensors(place / TABLE, {"W_lookup": (-1, d)})
    elif "lookup" in metadata:
        raise FileNotFoundError(f"there is no {TABLE} in {place}, but its {CONFIG} tells of a table: copy it there too")
    sae = SAE(d, n, {"standard": "relu"}.get(cfg["architecture"], cfg["architecture"]), cfg["k"],
              vocabulary=len(state.get("W_lookup", ())), lookup="learned" if "W_lookup" in state else "none")
    sae.load_state_dict(state)
    return sae.eval(), metadata


@torch.no_grad()
def save_saelens(sae: SAE, folder: str | Path, *, hook_name: str, model_name: str, context_size: int = 128,
                 centred: bool = True) -> Path:
    """Write an SAE as a SAELens 6 folder with the same codes, and return the folder; the weights appear last.

    `hook_name` and `model_name` are TransformerLens's ("blocks.8.hook_resid_pre", "gpt2-small"), `context_size` is in
    tokens; `centred`: x was mean-centred over d (TransformerLens passes over it where a model has no LayerNorm).
    Raises ValueError for an encoder that sees the rest after its row, and for a batchtopk that was never trained.
    """
    own = {name: tensor.cpu().float() for name, tensor in sae.state_dict().items()}
    if "W_lookup" in own and sae.encoder_sees == "rest":
        raise ValueError("SAELens cannot express encoder_sees='rest', where the encoder sees the activation minus its "
                         "token's row: keep it with `SAE.save`, or train with encoder_sees='full'")
    if sae.activation == "batchtopk":
        if own["threshold"] < 0:
            raise ValueError("this batchtopk SAE was never trained: it has no threshold yet that SAELens could apply")
        # Here a pre-activation equal to the threshold fires, there it does not: hand over the next float below.
        own["threshold"] = torch.nextafter(own["threshold"], torch.zeros(())).repeat(sae.n)
    if sae.activation == "jumprelu":
        own["threshold"] = own["log_threshold"].exp()
    architecture = {"relu": "standard", "batchtopk": "jumprelu"}.get(sae.activation, sae.activation)
    tensors = {there: own[there if there in own else here] for here, there in ARCHITECTURES[architecture].items()}
    tensors |= {name: own[name] * sae.scale for name in ("W_dec", "b_dec")}
    tensors |= {"W_enc": (own["W_enc"].T / sae.scale).contiguous()}
    metadata = {"sae_lens_version": "6.0.0",  # without it SAELens takes the file for an old one and drops the metadata
                "model_name": model_name, "model_class_name": "HookedTransformer", "hook_name": hook_name,
                "context_size": context_size, "prepend_bos": True,
                "model_from_pretrained_kwargs": {"center_writing_weights": centred}}
    cfg = {"architecture": architecture, "d_in": sae.d_model, "d_sae": sae.n, "dtype": "float32", "metadata": metadata,
           "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    files = {WEIGHTS: tensors}
    if "W_lookup" in own:
        metadata["lookup"] = f"SAELens's reconstruction lacks W_lookup[t], raw units, the row of token t in {TABLE}"
        files = {TABLE: {"W_lookup": own["W_lookup"] * sae.scale}} | files
    for name in (WEIGHTS, TABLE):  # an earlier export must never mix with this one, even if this is cut short
        Path(folder, name).unlink(missing_ok=True)
    store.write_json(Path(folder, CONFIG), cfg)
    for name, content in files.items():
        with store.replacing(Path(folder, name)) as temporary:
            save_file(content, temporary)
    return Path(folder)
