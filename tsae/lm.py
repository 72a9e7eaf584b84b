"""Any Hugging Face causal language model: residual activations, unigrams, patched cross-entropy.

The residual stream at layer L is the input of block L (resid_pre), for L in 0 .. n_layers - 1. In
most models with LayerNorm every reader of the stream subtracts its mean over d_model. Where a
forward pass shows that, we take the mean out: the model computes the same, and errors compare with
those on centred weights. Others are left as they are. This is the only file that knows nnsight.

Some positions become attention sinks: their norm is a hundred times the usual, and they say nothing
of the text. Where a function takes a `limit`, positions with a larger norm do not count.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature

import pandas as pd
import torch
from nnsight import NNsight
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from tsae import fetch
from tsae.baseline import Context, Needs
from tsae.text import bos_id

VERSION = 1  # of residuals: raise it when the same model and tokens give something else
DTYPES = ("auto", "float32", "bfloat16", "float16")
# x (m, d), tokens (m,) or their Context -> x_hat (m, d)
Patch = Callable[[torch.Tensor, torch.Tensor | Context], torch.Tensor]
Steer = tuple[int, torch.Tensor, float]  # layer, direction (d,) raw, strength


@dataclass(frozen=True)
class Layer:
    """The residual stream at one layer, as functions: what pairs (x, t) are made from.

    residuals(tokens (b, T)) -> x (b, T, d) float32; keep(tokens) -> (b, T) bool, positions that
    count; unigrams() -> A([BOS, t])[1] of all ids (V, d); identity: what names these numbers;
    other(number): the Layer of that number.
    """

    number: int
    residuals: Callable[[torch.Tensor], torch.Tensor]
    keep: Callable[[torch.Tensor], torch.Tensor]
    unigrams: Callable[[], torch.Tensor]
    d_model: int
    vocabulary: int
    device: torch.device
    identity: dict
    other: Callable[[int], "Layer"] | None = None


@dataclass(frozen=True)
class Tail:
    """The blocks from `layer` on, over rows whose residuals there are kept: see LM.tail.

    parts: (tokens (b, T), x (b, T, d), what a patch knows) each.
    """

    lm: "LM"
    layer: int
    limit: float
    parts: list[tuple]

    def __call__(self, patch: Patch | None) -> float:
        """Mean nats with `patch` (None: the model as it is)."""
        return self.each(patch).mean().item()

    def each(self, patch: Patch | None) -> torch.Tensor:
        """Nats (m,) at every kept position that has a next token, in the order of `kept`."""
        return torch.cat([self.lm.nats(tokens, self.layer, patch, x, self.limit, known)
                          for tokens, x, known in self.parts])

    @property
    def kept(self) -> torch.Tensor:
        """Which positions of the rows have nats: (N, T) bool, the last of a row never."""
        kept = torch.cat([self.lm.keep(tokens.to(x.device), x, self.limit)
                          for tokens, x, _ in self.parts])
        kept[:, -1] = False
        return kept


class LM:
    """A causal LM and its tokenizer. `centred`: residuals have zero mean over d_model."""

    def __init__(self, model: nn.Module, tokenizer, name: str = ""):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name = name or type(model).__name__
        config = model.config.get_text_config(decoder=True)
        self.n_layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers
        self.d_model = config.hidden_size
        self.max_context = getattr(config, "max_position_embeddings", None) or 10**9
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.bos = bos_id(tokenizer)
        self.special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        path = next((path for path, module in model.named_modules()
                     if isinstance(module, nn.ModuleList) and len(module) == self.n_layers), None)
        if path is None:
            raise ValueError(f"{self.name} has no list of {self.n_layers} blocks to read: only "
                             "decoder-only transformers of the usual build are supported")
        if (largest := max(tokenizer.get_vocab().values())) >= self.vocabulary:
            raise ValueError(f"the tokenizer gives ids up to {largest}, the embedding of "
                             f"{self.name} has {self.vocabulary} rows: take this model's tokenizer")
        self.traced = NNsight(model)
        self.blocks, self.modules = self.traced.get(path), model.get_submodule(path)
        self.centred = False
        self._look(self.modules[0])

    @torch.no_grad()
    def _look(self, block: nn.Module) -> None:
        """Small forward passes tell whether the model is causal (else ValueError), what its blocks
        return, and, where they have LayerNorm, whether centring is free.
        """
        returned = []
        handle = block.register_forward_hook(lambda *given: returned.append(given[-1]))
        tokens = torch.arange(12).view(2, 6) % self.vocabulary
        tokens[1, :5] = tokens[0, :5]  # rows that differ in their last token
        tokens = tokens.to(self.device)
        logs = self.model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
        handle.remove()
        near = max(1e-4, 30 * torch.finfo(self.model.dtype).eps)  # nats
        if not torch.allclose(logs[0, :5], logs[1, :5], rtol=0, atol=near):
            raise ValueError(f"{self.name} sees later tokens: a causal language model was expected")
        kind = type(returned[0])  # others beside the stream are for caches and weights of attention
        self.wrapped = (kind, len(returned[0])) if kind in (tuple, list) else None
        if any(isinstance(module, nn.LayerNorm) for module in block.modules()):
            with self.traced.trace(input_ids=tokens, use_cache=False):
                for each in self.blocks:
                    x = each.input
                    each.input = x - x.mean(-1, keepdim=True)
                centred = self.traced.output.logits.save()
            centred = centred.float().log_softmax(-1)
            self.centred = torch.allclose(centred, logs, rtol=0, atol=near)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> str:
        """The dtype of the weights, as "float32"."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def ordinary(self) -> torch.Tensor:
        """The ids (m,) of ordinary tokens: no special one, no row that only pads the embedding."""
        ids = torch.arange(min(self.vocabulary, len(self.tokenizer)))
        return ids[~torch.isin(ids, self.special)].to(self.device)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the model's weights and what else its residuals depend on, as hex."""
        about = f"{self.bos} {self.special.tolist()} {self.model.dtype} {self.model.config}"
        state = hashlib.sha256(about.encode())
        for weight in self.model.state_dict().values():
            state.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return state.hexdigest()

    def layer_number(self, wanted: int) -> int:
        """`wanted`, if the model has it; -1 is two thirds of the way up, the paper's 8 of 12."""
        number = round(self.n_layers * 2 / 3) if wanted == -1 else wanted
        self._check_layers([number])
        return number

    def layer(self, wanted: int) -> Layer:
        """The residual stream at one layer; `wanted` as in layer_number."""
        number = self.layer_number(wanted)
        return Layer(number, lambda tokens: self.residuals(tokens, [number])[number], self.keep,
                     lambda: self.unigrams(number), self.d_model, self.vocabulary, self.device,
                     dict(layer=number, weights=self.fingerprint, residuals=VERSION), self.layer)

    def keep(self, tokens: torch.Tensor, x: torch.Tensor | None = None,
             limit: float = math.inf) -> torch.Tensor:
        """True (b, T) at the positions that count: not position 0, not a special token.

        Given the residuals x (b, T, d), not a sink either: a norm over `limit`.
        """
        kept = ~torch.isin(tokens, self.special.to(tokens))
        kept[:, 0] = False
        return kept if x is None else kept & (x.norm(dim=-1) <= limit)

    @cached_property
    @torch.no_grad()
    def takes_positions(self) -> bool:
        """Whether the model can be told at which positions tokens stand. Forward passes show it.

        With ALiBi or without attention positions change nothing, though some take the argument.
        """
        if "position_ids" not in signature(self.model.forward).parameters:
            return False
        tokens = torch.arange(8, device=self.device)[None] % self.vocabulary
        usual = torch.arange(8, device=self.device)[None]
        told = [dict(position_ids=at, attention_mask=torch.ones_like(tokens))
                for at in (usual, usual + (usual > 3))]
        plain, same, moved = (self.model(input_ids=tokens, use_cache=False, **how).logits.float()
                              for how in ({}, *told))
        return torch.allclose(plain, same, atol=1e-3) and not torch.equal(same, moved)

    @torch.no_grad()
    def residuals(self, tokens: torch.Tensor, layers: Sequence[int],
                  positions: torch.Tensor | None = None) -> dict[int, torch.Tensor]:
        """{layer: x (b, T, d) float32} of token ids (b, T), in a pass up to the last layer.

        `positions` (b, T): where the tokens stand, if not at 0 .. T - 1. Raises ValueError for a
        model that cannot be told.
        """
        tokens, saved, told = self._checked(tokens, layers), {}, {}
        if positions is not None:
            if not self.takes_positions:
                raise ValueError(f"{self.name} cannot be told at which positions tokens stand: "
                                 "leave `positions` out")
            # With a mask: without one, a jump of the positions is read as the start of a new text.
            told = dict(position_ids=positions.to(tokens), attention_mask=torch.ones_like(tokens))
        with self.traced.trace(input_ids=tokens, use_cache=False, **told) as tracer:
            for layer in sorted(set(layers)):
                saved[layer] = self.blocks[layer].input.save()
            tracer.stop()
        return {layer: self._centre(x.float()) for layer, x in saved.items()}

    def last(self, grams: torch.Tensor, layers: Sequence[int], batch: int = 4096,
             ends: torch.Tensor | None = None) -> dict[int, torch.Tensor]:
        """Residuals at the last token of `[BOS, *gram]`: {layer: (b, d)} for token ids (b, n).

        `ends` (b,): the position of each gram's last token, where it is not n; BOS stays at 0.
        """
        rows = torch.cat([torch.full((len(grams), 1), self.bos).to(grams), grams], dim=1)
        places = [None] * -(-len(rows) // batch)
        if ends is not None:
            back = torch.arange(grams.shape[1] - 1, -1, -1)
            places = torch.cat([0 * ends[:, None], ends[:, None] - back], dim=1).split(batch)
        parts = [{layer: x[:, -1].clone() for layer, x in self.residuals(part, layers, at).items()}
                 for part, at in _progress(list(zip(rows.split(batch), places)), "n-grams")]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}

    def unigrams(self, layer: int) -> torch.Tensor:
        """A([BOS, t])[1] for every token id t: (V, d) float32."""
        ids = torch.arange(self.vocabulary, dtype=torch.int32)
        return self.last(ids.unsqueeze(1), [layer])[layer]

    def _logits(self, tokens: torch.Tensor, layer: int, residuals: torch.Tensor | None, where,
                patch: Callable[[torch.Tensor], torch.Tensor] | None,
                columns: int = 0) -> torch.Tensor:
        """Logits of the last `columns` (0: all) of tokens (b, T), the stream patched at `layer`.

        `patch(x) -> x_hat` replaces the residuals x (m, d) at the positions `where`, any index of
        (b, T). Given the `residuals` (b, T, d) at that layer, the blocks below are skipped.
        """
        extra, whole = dict(logits_to_keep=columns) if columns else {}, None
        if residuals is not None:  # in the shape that a block returns
            whole = residuals.to(self.model.dtype)
            if self.wrapped:
                kind, parts = self.wrapped
                whole = kind([whole, *[None] * (parts - 1)])
        with self.traced.trace(input_ids=tokens, use_cache=False, **extra):
            if residuals is not None:
                for below in range(layer):
                    self.blocks[below].skip(whole)
            if patch is not None:
                x = self.blocks[layer].input
                patched = self._centre(x.float())
                patched[where] = patch(patched[where])
                self.blocks[layer].input = patched.to(x.dtype)
            logits = self.traced.output.logits.save()
        return logits

    @torch.no_grad()
    def nats(self, tokens: torch.Tensor, layer: int = 0, patch: Patch | None = None,
             residuals: torch.Tensor | None = None, limit: float = math.inf,
             known: torch.Tensor | Context | None = None) -> torch.Tensor:
        """Cross-entropy in nats (m,) at each kept position of tokens (b, T) that has a next token.

        `patch(x, t) -> x_hat` replaces the residuals x (m', d) with tokens t (m',) of all kept
        positions at `layer`. Given the `residuals` (b, T, d) there, the blocks below are skipped,
        and positions with a norm over `limit` are neither patched nor counted. `known`: what patch
        gets in place of the tokens, of all (b, T) positions (baseline.Needs.context).
        """
        tokens = self._checked(tokens, [layer])
        kept = self.keep(tokens, residuals, limit)
        known = tokens if known is None else known
        replace = (lambda x: patch(x, known[kept])) if patch else None
        logits = self._logits(tokens, layer, residuals, kept, replace)[:, :-1].float()
        # By hand: cross_entropy would copy the logits, and keep their softmax.
        of_next = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return (logits.logsumexp(-1) - of_next)[kept[:, :-1]]

    @torch.no_grad()
    def next_token_logits(self, tokens: torch.Tensor, layer: int = 0,
                          patch: Callable[[torch.Tensor], torch.Tensor] | None = None,
                          residuals: torch.Tensor | None = None,
                          column: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (b, V) float32 of what follows one token of each of the rows (b, T).

        It is the last token, or that in `column` (b,). `patch(x) -> x_hat` replaces the residuals
        x (b, d) there at `layer`; `residuals` as in `nats`.
        """
        tokens = self._checked(tokens, [layer])
        b, T = tokens.shape
        column = torch.full((b,), T - 1) if column is None else column
        row, first = torch.arange(b, device=self.device), int(column.min())
        column = column.to(self.device)
        logits = self._logits(tokens, layer, residuals, (row, column), patch, columns=T - first)
        return logits[row, column - first].float()

    def tail(self, rows: torch.Tensor, layer: int, limit: float = math.inf,
             needs: Needs = Needs()) -> "Tail":
        """The function patch -> mean `nats` over rows (N, T), that runs the blocks from `layer` on.

        The residuals of the rows are computed once and kept in memory, (N, T, d) float32. Positions
        with a norm over `limit` are neither patched nor counted. A patch gets what `needs` asks
        for.
        """
        self._check_needs(needs, layer)
        parts = []
        for part in _progress(self._split(rows), "activations"):
            found = self.residuals(part, [layer, *needs.layers])
            known = needs.context(part.to(self.device), found)
            parts.append((part, found[layer], known))
        return Tail(self, layer, limit, parts)

    @contextmanager
    def edited(self, layer: int, edit: Patch, limit: float = math.inf,
               needs: Needs = Needs()) -> Iterator[None]:
        """Inside, the model runs on edit(x (m, d), t) in place of the residuals x at `layer`.

        Of the positions that count: see `keep`. t holds what `needs` asks for. It must run on whole
        rows, with use_cache=False: ValueError otherwise.
        """
        self._check_needs(needs, layer)
        tokens, seen = torch.zeros(0), {}

        def begin(module, arguments, named):
            nonlocal tokens
            cache = named.get("past_key_values")
            if cache is not None and cache.get_seq_length():
                raise ValueError("an edited model runs on whole rows: pass use_cache=False")
            tokens = named["input_ids"] if "input_ids" in named else arguments[0]
            if (tokens[:, 0] != self.bos).any():  # so does a model that keeps its state elsewhere
                raise ValueError("an edited model runs on whole rows: BOS first, use_cache=False")

        def note(number: int):
            def read(module, arguments, named):
                seen[number] = self._centre(_stream(arguments, named).float())
            return read

        def change(module, arguments, named):
            stream = _stream(arguments, named)
            x = self._centre(stream.float())
            kept = self.keep(tokens, x, limit)
            known = needs.context(tokens, seen | {layer: x})
            x[kept] = edit(x[kept], known[kept])
            new = torch.where(kept.unsqueeze(-1), x.to(stream.dtype), stream)
            if arguments:
                return (new, *arguments[1:]), named
            return arguments, named | dict(hidden_states=new)

        hooks = [(self.model, begin), *((self.modules[n], note(n)) for n in needs.layers),
                 (self.modules[layer], change)]
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True)
                   for module, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def generate(self, prompt: str, tokens: int = 30, steer: Sequence[Steer] = (),
                 temperature: float = 0.0, seed: int = 0) -> str:
        """`prompt` and `tokens` more, the likeliest ones or sampled at a `temperature`.

        `steer`: [(layer, direction (d,) raw, strength)], added to the residuals of all positions
        but BOS; sae.direction(feature) is a feature's. Raises ValueError for more tokens than the
        model reads, and for a temperature below 0.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}: expected 0 (the likeliest token) or "
                             "more")
        row, generator = self._prompt(prompt), torch.Generator().manual_seed(seed)
        if row.shape[1] + tokens > self.max_context + 1:
            raise ValueError(f"a prompt of {row.shape[1]} tokens and {tokens} more were asked for: "
                             f"{self.name} reads at most {self.max_context}")
        with self.steered(steer):
            for _ in _progress(range(tokens), "tokens"):
                logits = self.model(input_ids=row, use_cache=False).logits[0, -1].float().cpu()
                if temperature:
                    chance = (logits / temperature).softmax(-1)
                    new = torch.multinomial(chance, 1, generator=generator)
                else:
                    new = logits.argmax(keepdim=True)
                row = torch.cat([row, new.to(row)[None]], 1)
        return self.tokenizer.decode(row[0, 1:])

    def next_tokens(self, prompt: str, steer: Sequence[Steer] = (), top: int = 10) -> pd.DataFrame:
        """What steering does to the token after `prompt`: token, before, after (probabilities).

        The `top` tokens that change most come first. `steer` as in `generate`.
        """
        row = self._prompt(prompt)
        with torch.no_grad():
            before = self.model(input_ids=row, use_cache=False).logits[0, -1].float().softmax(-1)
            with self.steered(steer):
                after = self.model(input_ids=row, use_cache=False).logits[0, -1].float().softmax(-1)
        ids = (after - before).abs().topk(top).indices
        words = [self.tokenizer.decode([i]) for i in ids.tolist()]
        return pd.DataFrame(dict(token=words, before=before[ids].cpu(), after=after[ids].cpu()))

    @contextmanager
    def steered(self, steer: Sequence[Steer]) -> Iterator[None]:
        """Inside, the model runs with `steer` (see `generate`)."""
        with ExitStack() as stack:
            for layer, direction, strength in steer:
                if direction.shape != (self.d_model,):
                    raise ValueError(f"a direction of shape {tuple(direction.shape)} was given to "
                                     f"steer by: expected ({self.d_model},), as sae.direction")
                if not torch.isfinite(direction * strength).all():
                    raise ValueError("a direction with NaN or infinite entries was given to steer "
                                     "by: give finite numbers, and a finite strength")
                push = strength * direction.to(self.device)
                stack.enter_context(self.edited(layer, lambda x, t, push=push: x + push))
            yield

    def _prompt(self, prompt: str) -> torch.Tensor:
        """BOS and the tokens of a prompt (1, T)."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return self._checked(torch.tensor([[self.bos, *ids]]), [0])

    def _split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows in parts: on a CPU, more logits at once would be fresh pages every time."""
        most = 2**22 if self.device.type == "cpu" else 2**28
        return rows.split(max(4, min(64, most // (rows.shape[1] * self.vocabulary))))

    def _centre(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x.clone()

    def _check_layers(self, layers: Sequence[int]) -> None:
        wrong = [layer for layer in layers if not 0 <= layer < self.n_layers]
        if wrong or not layers:
            asked = ", ".join(map(str, wrong)) or "(none)"
            raise ValueError(f"layer {asked} was asked for: {self.name} has layers 0 to "
                             f"{self.n_layers - 1} (the input of each block)")

    def _check_needs(self, needs: Needs, layer: int) -> None:
        self._check_layers([layer, *needs.layers])
        if above := [n for n in needs.layers if n > layer]:
            raise ValueError(f"what stands at layer {layer} cannot depend on layer {above[0]}")

    def _checked(self, tokens: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        self._check_layers(layers)
        if tokens.shape[1] > self.max_context:
            raise ValueError(f"rows of {tokens.shape[1]} tokens were given: {self.name} reads at "
                             f"most {self.max_context}; choose a smaller `context`")
        return tokens.to(self.device, torch.long)


def _stream(arguments: tuple, named: dict) -> torch.Tensor:
    """The residuals among the arguments of a block."""
    return arguments[0] if arguments else named["hidden_states"]


def _progress(parts: Sequence, label: str) -> Iterator:
    return iter(parts) if len(parts) < 20 else tqdm(parts, label, leave=False)


def native_bfloat16(device: str) -> bool:
    """Whether the processor, or the GPU, multiplies bfloat16 itself."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def load(model: str, bos_token: str = "", device: str = "auto", dtype: str = "float32",
         trust_remote_code: bool = False) -> LM:
    """Load a causal LM with its tokenizer; `model` as in fetch.model.

    `bos_token` names the token that starts every row where the tokenizer declares none. `dtype`
    auto is bfloat16 where the hardware multiplies it, else float32. Raises FileNotFoundError or
    ValueError for what cannot be loaded so.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"the device {device!r} was asked for, and torch has none of that name "
                         "here: give cpu, or auto for a GPU where there is one") from None
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "bfloat16" if native_bfloat16(device) else "float32"
    path = fetch.model(model)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        network, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # many types stand for "not there", "no network", "damaged"
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(
            f"the model {path!r} could not be loaded as a causal LM with its tokenizer ({said}): "
            "give a folder in Hugging Face format with safetensors weights, or a hub name that "
            "this machine can reach") from error
    lacking = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if lacking:
        raise ValueError(f"the checkpoint of {path} has no fitting weights for "
                         f"{', '.join(lacking[:5])} ({len(lacking)} in all), which would be random "
                         "numbers: take a whole checkpoint of this architecture")
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"{path} holds no tokenizer that reads text: copy the tokenizer files of "
                         "the model there too")
    if bos_token:
        if bos_token not in tokenizer.get_vocab():
            raise ValueError(f"`bos_token` is {bos_token!r}, which is no token of {path}")
        tokenizer.bos_token = bos_token
    return LM(network.to(device), tokenizer, model)
