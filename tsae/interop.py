"""SAEs of SAELens, dictionary_learning and sparsify in and out, and the Hugging Face hub.

Codes are the same numbers on both sides; where the encoder sees the rest, on x - W_lookup[t]. What
an `SAE` computes and the others do not is folded into the weights: `scale`, and the centring
x - mean(x), which is linear. None of the others has a lookup table: W_lookup (V, d), in raw units,
lies beside in a file of its own.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tsae import formats, store
from tsae import sae as native
from tsae.formats import CONFIG, DICTIONARIES, SAELENS, SPARSIFY, TABLE, UNSHIFTED, WEIGHTS
from tsae.sae import LOOKUPS, SAE

SPARSITY, CARD = "sparsity.safetensors", "README.md"
ALIASES = {"gpt2-small": "gpt2", "mistral-7b": "mistral-7b-v0.1"}  # TransformerLens's names
# What reads a folder that holds these files. None: `SAE.load`.
READERS = {(CONFIG, WEIGHTS): formats.read_saelens,
           ("config.json", "ae.pt"): formats.read_dictionary,
           (CONFIG, "sae.safetensors"): formats.read_sparsify,
           (native.CONFIG, native.WEIGHTS): None}


def check_model(about: dict, lm) -> None:
    """A line on stderr where an SAE was trained on another model, or on x centred otherwise.

    `about` is what `from_pretrained` returns, `lm` a tsae.lm.LM (its name and `centred`).
    """
    def short(name: str) -> str:
        name = name.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
        return ALIASES.get(name, name)

    theirs, centred = about.get("model_name"), about.get("centred")
    if theirs and short(theirs) != short(lm.name):
        tqdm.write(f"this SAE was trained on the model {theirs}, the one at hand is {lm.name}: "
                   "if they differ, load that one", file=sys.stderr)
    if centred not in (None, lm.centred):
        tqdm.write("this SAE was trained on activations "
                   f"{'less their mean' if centred else 'as they are'} over coordinates, those of "
                   f"{lm.name} come {'as they are' if centred else 'less it'}: its codes differ "
                   "from those published", file=sys.stderr)


def _fetch(path: str | Path, folder: str) -> tuple[Path, Callable | None]:
    """The local folder of an SAE, and its reader. A `path` that is no folder here is downloaded."""
    if not Path(path).is_dir():
        names = dict.fromkeys(name for files in READERS for name in (*files, TABLE))
        wanted = [Path(folder, name).as_posix() for name in names] + ["config.json"]
        try:
            path = huggingface_hub.snapshot_download(str(path), allow_patterns=wanted)
        except Exception as error:  # the hub client's errors have no common family
            raise FileNotFoundError(
                f"{path} is no folder here, and fetching {', '.join(wanted)} from the Hugging Face "
                f"hub failed ({error}): check the names and the network") from error
    place = Path(path, folder)
    for files, reader in READERS.items():
        if all((place / name).is_file() for name in files):
            return place, reader
    expected = ", or ".join(" and ".join(files) for files in READERS)
    raise FileNotFoundError(f"there is no SAE in {place}: expected {expected}")


def from_pretrained(path: str | Path, id: str = "") -> tuple[SAE, dict]:
    """An SAE in the format of SAELens, dictionary_learning, sparsify or `SAE.save`, and about it.

    `path` is a local folder or a hub id such as "jbloom/GPT2-Small-SAEs-Reformatted", `id` a folder
    inside it. The SAE is in eval mode and takes the raw x (b, d), float32. About it: hook_name,
    model_name, ...; layer (-1: not said); centred, whether x must be mean-centred over d (None: not
    said, or either will do; the RES-JB files need it and do not say so). See `check_model`.
    Raises FileNotFoundError; ValueError for damage, or what is not supported.
    """
    place, reader = _fetch(path, id)
    if reader is None:
        return SAE.load(place), {"layer": -1}
    activation, state, k, about = reader(place)
    n, d = state["W_enc"].shape
    if "topk" not in activation:
        k = 1  # not used
    if not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(f"the configuration in {place} has k {k!r}; expected a whole number from "
                         f"1 to {n}, the number of features")
    try:
        layer = formats.layer_of(hook) if (hook := about.get("hook_name")) else -1
    except ValueError as error:
        raise ValueError(f"the SAE in {place} cannot be used: {error}") from None
    if (place / TABLE).is_file():
        state |= formats.tensors(place / TABLE, {"W_lookup": "W_lookup"}, W_lookup=(-1, d))
    elif "lookup" in about:
        raise FileNotFoundError(f"no {TABLE} in {place}, but the SAE was saved with one: copy it")
    if activation == "jumprelu":  # below 0 a threshold acts as 0, since codes are never negative
        threshold = state.pop("threshold")
        log = threshold.clamp_min(0).log()
        # Rounding must not put exp(log) below it: a pre-activation on its threshold stays silent.
        above = log + 2**-22 * log.abs().clamp_min(1)
        state["log_threshold"] = torch.where(log.exp() < threshold, above, log)
    sae = SAE(d, n, activation, k, vocabulary=len(state.get("W_lookup", ())),
              lookup="learned" if "W_lookup" in state else "none",
              encoder_sees=about.get("encoder_sees", "full"))
    if "W_lookup" in state:
        state["baseline.W_lookup"] = state.pop("W_lookup")
    sae.load_state_dict(state)
    return sae.eval().requires_grad_(False), about | {"layer": layer}


@torch.no_grad()
def _exported(sae: SAE, hook_name: str, centred: bool | None) -> tuple[dict[str, Tensor], dict]:
    """The weights in raw units, the centring folded in, and what a reader must know beside them.

    Where the encoder sees the rest, centring stays outside: W_enc (x - mean(x) - row) is linear in
    x - row only where the row's mean is 0.
    """
    formats.layer_of(hook_name)  # ValueError for what could not be read back
    if sae.lookup not in (*LOOKUPS, "tokens"):
        raise ValueError(f"this SAE has a baseline of the kind {sae.lookup!r}: other libraries' "
                         "formats have room for a token table only; keep it with SAE.save")
    own = {name.removeprefix("baseline."): tensor.detach().cpu().float()
           for name, tensor in sae.state_dict().items()}
    own["W_enc"] = own["W_enc"] / sae.scale
    own |= {name: own[name] * sae.scale for name in ("W_dec", "b_dec", "W_lookup") if name in own}
    if sae.activation == "jumprelu":
        own["threshold"] = own["log_threshold"].exp()
    if sae.activation == "batchtopk":
        if own["threshold"] < 0:
            raise ValueError("this batchtopk SAE was never trained: it has no threshold to export")
        # Here a pre-activation on the threshold fires, there it does not: go one float below.
        own["threshold"] = torch.nextafter(own["threshold"], torch.zeros(()))
    about, rest = {"centred": centred}, "W_lookup" in own and sae.encoder_sees == "rest"
    if centred is None:
        tqdm.write("whether x was mean-centred is not known, so that the export takes x as the SAE "
                   "got it: pass centred=lm.centred", file=sys.stderr)
    elif centred and not rest:  # W (x - mean(x) - b) = (W - mean(W)) (x - b) - mean(b) sum(W)
        W = own["W_enc"]
        formats.shift(own, -own["b_dec"].mean() * W.sum(1))
        own["W_enc"] = W - W.mean(1, keepdim=True)
        about["centred"] = None  # either will do
    if "W_lookup" in own:
        seen = "x - x.mean(-1, keepdim=True)" if rest and centred else "x"
        seen += " - W_lookup[t]" if rest else ""
        about |= {"encoder_sees": sae.encoder_sees, "lookup": (
            f"W_lookup (V, d) in {TABLE}, raw units, has a row for each token id t, which the "
            f"library does not add by itself:\n    codes = sae.encode({seen})\n"
            "    x_hat = sae.decode(codes) + W_lookup[t]")}
    return own, about


def _write(folder: str | Path, name: str, config: dict, own: dict, files: dict) -> Path:
    """Write a configuration, the table, then `files` {name: tensors}, the weights last."""
    folder = Path(folder)
    if "W_lookup" in own:
        files = {TABLE: {"W_lookup": own["W_lookup"]}} | files
    for old in (*files, TABLE, SPARSITY):  # no earlier export mixes in, even if this is cut short
        (folder / old).unlink(missing_ok=True)
    store.write_json(folder / name, config)
    for name, tensors in files.items():
        with store.replacing(folder / name) as temporary:
            (torch.save if name.endswith(".pt") else save_file)(tensors, temporary)
    return folder


def save_saelens(sae: SAE, folder: str | Path, *, hook_name: str, model_name: str,
                 context_size: int = 128, centred: bool | None = None,
                 frequency: Tensor | None = None) -> Path:
    """Write an SAE as a SAELens 6 folder with the same codes, and return the folder.

    Where the encoder sees the rest, they are the same on x - W_lookup[t]: metadata["lookup"].

    `hook_name` and `model_name` are TransformerLens's ("blocks.8.hook_resid_pre", "gpt2-small").
    `context_size` is in tokens. `centred`: pass lm.centred. Where x was centred, the export gives
    the same codes on x centred or not, and reconstructs the centred x. `frequency` (n,): the share
    of tokens on which each feature fires; without it there is no sparsity.safetensors.
    With a table, metadata["lookup"] says how to use it. ValueError for a batchtopk never trained.
    """
    own, about = _exported(sae, hook_name, centred)
    kind = {"relu": "standard", "batchtopk": "jumprelu"}.get(sae.activation, sae.activation)
    if kind == "jumprelu":
        own["threshold"] = own["threshold"].expand(sae.n)
    about |= {"sae_lens_version": "6.0.0",  # without it SAELens takes the file for an old one
              "model_name": model_name, "hook_name": hook_name, "context_size": context_size,
              "prepend_bos": True, "model_from_pretrained_kwargs": {}}
    cfg = {"architecture": kind, "d_in": sae.d_model, "d_sae": sae.n, "dtype": "float32",
           "apply_b_dec_to_input": True, "normalize_activations": "none",
           "reshape_activations": "none", "metadata": about}
    if kind == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    files = {WEIGHTS: formats.named(own, SAELENS[kind][1])}
    if frequency is not None:
        if frequency.shape != (sae.n,) or not ((frequency >= 0) & (frequency <= 1)).all():
            raise ValueError(f"`frequency` must be the share of tokens, 0 to 1, of each of {sae.n} "
                             f"features; it has shape {tuple(frequency.shape)}")
        files = {SPARSITY: {"sparsity": (frequency.cpu().float() + 1e-10).log10()}} | files
    store.write_text(Path(folder, CARD), _card(about))
    return _write(folder, CONFIG, cfg, own, files)


def _card(about: dict) -> str:
    """The README.md by which the Hugging Face hub knows what a repository holds."""
    return f"""---
library_name: saelens
tags:
- saelens
- sparse-autoencoder
- mechanistic-interpretability
---

# Sparse autoencoder of {about["model_name"]}, {about["hook_name"]}

Load it with SAELens, `SAE.from_pretrained("<repository>", "<folder>")`, or with tsae,
`interop.from_pretrained("<repository>", "<folder>")`.

{about.get("lookup", "")}
""".rstrip() + "\n"


def push(sae: SAE, repo: str, id: str = "", *, hook_name: str, private: bool = False,
         **export) -> str:
    """Upload what `save_saelens` writes to a Hugging Face repository, and return its address.

    The SAE lies in the folder `id` there, `hook_name` if none is given. The README.md is written
    where there is none. `export`: see save_saelens. Needs `hf auth login`.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = save_saelens(sae, Path(place, id or hook_name), hook_name=hook_name, **export)
        (folder / CARD).rename(Path(place, CARD))
        huggingface_hub.create_repo(repo, private=private, exist_ok=True)
        if huggingface_hub.file_exists(repo, CARD):
            Path(place, CARD).unlink()
        huggingface_hub.upload_folder(repo_id=repo, folder_path=place,
                                      commit_message=f"SAE of {hook_name}")
    return f"https://huggingface.co/{repo}"


def _block(hook_name: str) -> int:
    """The block whose output a hook reads."""
    if not (layer := formats.layer_of(hook_name)):
        raise ValueError(f"{hook_name} is what goes into the first block; dictionary_learning and "
                         "sparsify name only what comes out of one: use save_saelens")
    return layer - 1


def save_dictionary_learning(sae: SAE, folder: str | Path, *, hook_name: str, model_name: str,
                             context_size: int = 128, centred: bool | None = None) -> Path:
    """Write an SAE for dictionary_learning's `load_dictionary`; arguments as in save_saelens.

    A relu SAE becomes an AutoEncoderNew: AutoEncoder changes codes when it is loaded.
    """
    block = _block(hook_name)
    own, about = _exported(sae, hook_name, centred)
    kind, names = next((kind, names) for kind, (activation, names) in DICTIONARIES.items()
                       if activation == sae.activation)
    if kind in UNSHIFTED:
        formats.shift(own, -own["W_enc"] @ own["b_dec"])
    tensors = formats.named(own, names)
    if "topk" in sae.activation:
        tensors = {"threshold": torch.tensor(-1.0), "k": torch.tensor(sae.k).int()} | tensors
    about |= {"trainer": {"dict_class": kind, "activation_dim": sae.d_model, "dict_size": sae.n,
                          "k": sae.k, "layer": block, "lm_name": model_name,
                          "submodule_name": f"resid_post_layer_{block}"},
              "buffer": {"d_submodule": sae.d_model, "io": "out", "ctx_len": context_size}}
    return _write(folder, "config.json", about, own, {"ae.pt": tensors})


def save_sparsify(sae: SAE, folder: str | Path, *, hook_name: str, model_name: str,
                  context_size: int = 128, centred: bool | None = None) -> Path:
    """Write a topk SAE for sparsify: the folder layers.N in `folder`, which is returned."""
    if sae.activation != "topk":
        raise ValueError(f"sparsify has topk SAEs only, this one is {sae.activation}: use "
                         "save_saelens or save_dictionary_learning")
    own, about = _exported(sae, hook_name, centred)
    about |= {"d_in": sae.d_model, "num_latents": sae.n, "k": sae.k, "activation": "topk",
              "normalize_decoder": False, "transcode": False, "skip_connection": False}
    place = Path(folder, f"layers.{_block(hook_name)}")
    store.write_json(Path(folder, "config.json"), {"model": model_name, "ctx_len": context_size})
    return _write(place, CONFIG, about, own, {"sae.safetensors": formats.named(own, SPARSIFY)})
