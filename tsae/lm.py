"""Any Hugging Face causal language model: residual activations, unigrams, patched cross-entropy. Only nnsight user here.

The residual stream at layer L is the input of block L (resid_pre), for L in 0 .. n_layers - 1. In models with LayerNorm
the mean over d_model is taken out: every reader of the stream subtracts it anyway, so the model computes the same, and
reconstruction errors become comparable with those on centred weights. RMSNorm models are left as they are.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from nnsight import NNsight
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from tsae.text import bos_id

VERSION = 1  # of residuals: raise it when the same model and tokens give something else


@dataclass(frozen=True)
class Layer:
    """The residual stream at one layer, as functions: what pairs (x, t) are made from.

    residuals(tokens (b, T)) -> x (b, T, d) float32; keep(tokens) -> (b, T) bool, the positions that count; unigrams() ->
    A([BOS, t])[1] for all V token ids (V, d); identity: what names these numbers, for things that are kept.
    """

    number: int
    residuals: Callable[[torch.Tensor], torch.Tensor]
    keep: Callable[[torch.Tensor], torch.Tensor]
    unigrams: Callable[[], torch.Tensor]
    d_model: int
    vocabulary: int
    device: torch.device
    identity: dict


Patch = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LM:
    """A causal LM and its tokenizer. `centred` tells whether residuals have zero mean over d_model."""

    def __init__(self, model: nn.Module, tokenizer, name: str = ""):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        config = model.config.get_text_config()
        self.n_layers, self.d_model = config.num_hidden_layers, config.hidden_size
        self.max_context = getattr(config, "max_position_embeddings", None) or 10**9
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.bos, self.special = bos_id(tokenizer), torch.tensor(sorted(set(tokenizer.all_special_ids)))
        lists = (name for name, module in model.named_modules()
                 if isinstance(module, nn.ModuleList) and len(module) == self.n_layers)
        path = next(lists, None)
        if path is None:
            raise ValueError(f"{name or type(model).__name__} has no list of {self.n_layers} blocks to read: only "
                             "decoder-only transformers of the usual build are supported")
        self.centred = any(isinstance(module, nn.LayerNorm) for module in model.get_submodule(path)[0].modules())
        self.traced = NNsight(model)
        self.blocks = self.traced.get(path)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def layer_number(self, wanted: int) -> int:
        """`wanted` where the model has that layer; -1 is two thirds of the way up, the paper's 8 of 12."""
        number = round(self.n_layers * 2 / 3) if wanted == -1 else wanted
        self._checked(torch.zeros(1, 1, dtype=torch.int32), [number])
        return number

    def layer(self, wanted: int) -> Layer:
        """The residual stream at one layer; `wanted` as in layer_number."""
        number = self.layer_number(wanted)
        return Layer(number, lambda tokens: self.residuals(tokens, [number])[number], self.keep,
                     lambda: self.unigrams(number), self.d_model, self.vocabulary, self.device,
                     dict(layer=number, weights=self.fingerprint, residuals=VERSION))

    def keep(self, tokens: torch.Tensor) -> torch.Tensor:
        """True (b, T) at the positions that count: not position 0, not a special token."""
        kept = ~torch.isin(tokens, self.special.to(tokens))
        kept[:, 0] = False
        return kept

    @torch.no_grad()
    def residuals(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """{layer: activations (b, T, d) float32} of token ids (b, T), in one pass that stops after the last layer."""
        tokens, saved = self._checked(tokens, layers), {}
        with self.traced.trace(input_ids=tokens, use_cache=False) as tracer:
            for layer in sorted(set(layers)):
                saved[layer] = self.blocks[layer].input.save()
            tracer.stop()
        return {layer: self._centre(x.float()) for layer, x in saved.items()}

    @property
    def ordinary(self) -> torch.Tensor:
        """The ids (m,) of the tokenizer's tokens that are not special: no BOS, no rows that only pad the embedding."""
        ids = torch.arange(min(self.vocabulary, len(self.tokenizer)))
        return ids[~torch.isin(ids, self.special)].to(self.device)

    def last(self, grams: torch.Tensor, layers: Sequence[int], batch: int = 4096) -> dict[int, torch.Tensor]:
        """Residuals at the last token of `[BOS, *gram]`: {layer: (b, d)} for token ids (b, n)."""
        rows = torch.cat([torch.full((len(grams), 1), self.bos).to(grams), grams], dim=1)
        parts = [{layer: x[:, -1].clone() for layer, x in self.residuals(part, layers).items()}
                 for part in _progress(rows.split(batch), "n-grams")]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}

    def unigrams(self, layer: int) -> torch.Tensor:
        """A([BOS, t])[1] for every token id t: (V, d) float32."""
        return self.last(torch.arange(self.vocabulary, dtype=torch.int32).unsqueeze(1), [layer])[layer]

    @torch.no_grad()
    def nats(self, tokens: torch.Tensor, layer: int = 0, patch: Patch | None = None,
             residuals: torch.Tensor | None = None) -> torch.Tensor:
        """Cross-entropy in nats, one value (m,) for each kept position of tokens (b, T) that has a next token.

        `patch(x, t) -> x_hat` replaces the residuals x (m', d) with tokens t (m',) of all kept positions at `layer`. Given
        the `residuals` (b, T, d) there, the blocks below are skipped.
        """
        tokens, kept = self._checked(tokens, [layer]), self.keep(tokens).to(self.device)
        with self.traced.trace(input_ids=tokens, use_cache=False):
            if residuals is not None:
                for below in range(layer):
                    self.blocks[below].skip(residuals.to(self.model.dtype))
            if patch is not None:
                x = self.blocks[layer].input
                mended = self._centre(x.float())
                mended[kept] = patch(mended[kept], tokens[kept])
                self.blocks[layer].input = mended.to(x.dtype)
            logits = self.traced.output.logits.save()
        logits = logits[:, :-1].float()  # by hand: no copy of the logits of counted positions, and none of their softmax
        nats = logits.logsumexp(-1) - logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return nats[kept[:, :-1]]

    def mean_nats(self, rows: torch.Tensor, layer: int = 0, patch: Patch | None = None) -> float:
        """`nats` averaged over all counted positions of rows (N, T)."""
        return torch.cat([self.nats(part, layer, patch) for part in _progress(self._split(rows), "cross-entropy")]
                         ).mean().item()

    def tail(self, rows: torch.Tensor, layer: int) -> Callable[[Patch | None], float]:
        """The function patch -> mean_nats(rows (N, T), layer, patch) that runs only the blocks from `layer` on.

        The residuals of the rows are computed once and held, (N, T, d) float32.
        """
        held = [(part, self.residuals(part, [layer])[layer]) for part in _progress(self._split(rows), "activations")]
        return lambda patch: torch.cat([self.nats(part, layer, patch, x) for part, x in held]).mean().item()

    def _split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        most = 2**22 if self.device.type == "cpu" else 2**28  # logits at once: larger ones are fresh pages every time
        return rows.split(max(1, min(64, most // (rows.shape[1] * self.vocabulary))))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the model's weights and what else its residuals depend on, as hex."""
        state = hashlib.sha256(f"{self.bos} {self.special.tolist()} {self.model.dtype} {self.model.config}".encode())
        for weight in self.model.state_dict().values():
            state.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return state.hexdigest()

    def _centre(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x.clone()

    def _checked(self, tokens: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        wrong = [layer for layer in layers if not 0 <= layer < self.n_layers]
        if wrong or not layers:
            raise ValueError(f"layer {', '.join(map(str, wrong)) or '(none)'} was asked for: {self.name or 'the model'} "
                             f"has layers 0 to {self.n_layers - 1} (the input of each block)")
        if tokens.shape[1] > self.max_context:
            raise ValueError(f"rows of {tokens.shape[1]} tokens were given: {self.name or 'the model'} reads at most "
                             f"{self.max_context}; choose a smaller `context`")
        return tokens.to(self.device, torch.long)

    @torch.no_grad()
    def next_token_logits(self, tokens: torch.Tensor, layer: int = 0,
                          patch: Callable[[torch.Tensor], torch.Tensor] | None = None,
                          residuals: torch.Tensor | None = None, at: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (b, V) float32 of what follows one token of each of the rows (b, T): the last, or that in column `at` (b,).

        `patch(x) -> x_hat` replaces the residuals x (b, d) there at `layer`. Given the `residuals` (b, T, d) at that layer,
        the blocks below are skipped.
        """
        tokens, length = self._checked(tokens, [layer]), tokens.shape[1]
        at = torch.full((len(tokens),), length - 1) if at is None else at
        first, which = int(at.min()), (torch.arange(len(tokens), device=self.device), at.to(self.device))
        with self.traced.trace(input_ids=tokens, use_cache=False, logits_to_keep=length - first):
            if residuals is not None:
                for below in range(layer):
                    self.blocks[below].skip(residuals.to(self.model.dtype))
            if patch is not None:
                x = self.blocks[layer].input
                mended = self._centre(x.float())
                mended[which] = patch(mended[which])
                self.blocks[layer].input = mended.to(x.dtype)
            logits = self.traced.output.logits.save()
        return logits[which[0], which[1] - first].float()



def _progress(parts: Sequence, label: str) -> Iterator:
    return tqdm(parts, label, leave=False, disable=len(parts) < 20)


def load(model: str, bos_token: str = "", device: str = "auto", dtype: str = "float32",
         trust_remote_code: bool = False) -> LM:
    """Load a causal LM with its tokenizer from a local folder or the Hugging Face hub.

    `bos_token` names the token that starts every row where the tokenizer declares none. Raises ValueError otherwise.
    """
    folder = Path(model).expanduser()
    if model.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {model}")
    path = str(folder) if folder.is_dir() else model
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        network = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), use_safetensors=True,
                                                       trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub client and transformers raise many types for "not there", "no network", "damaged"
        raise ValueError(f"the model {path!r} could not be loaded as a causal LM with its tokenizer "
                         f"({type(error).__name__}: {str(error).splitlines()[0]}): give a folder in Hugging Face format "
                         "with safetensors weights, or a hub name that this machine can reach") from error
    if bos_token:
        if bos_token not in tokenizer.get_vocab():
            raise ValueError(f"`bos_token` is {bos_token!r}, which is no token of {path}")
        tokenizer.bos_token = bos_token
    return LM(network.to(device), tokenizer, model)
