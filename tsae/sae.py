"""The sparse autoencoder with a lookup table: one class, which needs only kernels and baseline.

    f(a_t)  = act(W_enc (a_t - b_dec) + b_enc)                    equation 1
    a_hat_t = W_dec^T f(a_t) + b_dec + W_lookup[t]                equation 2

(Dooms and Wilhelm, arXiv 2502.17332.) `a_t` is the activation at a position whose token is `t`.
Without a table the last term is missing and `t` is ignored: training and evaluation treat both
alike. Other baselines take the table's place: then `t` is the baseline.Context that they need.
A feature or token has a row: W_enc (n, d), W_dec (n, d), W_lookup (V, d). Table, biases and codes
are in units of `scale`, the rms entry of the activations less their mean; x is always raw.
"""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss, relu, threshold

from tsae import kernels
from tsae.baseline import Baseline, Context, Tokens, made
from tsae.kernels import Support, kth_largest, preactivations, select_top, sum_rows, total

# A new activation: name it here, make its parameters in SAE.__init__ and give it a case in SAE.act,
# for all pre-activations (b, n) and for those of a support's pairs (m,) (see kernels.per_code).
# If its codes or gradients need pre-activations below 0, let SAE._bound return None for it.
ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu", "gated")
LOOKUPS, SEES = ("none", "frozen", "learned"), ("full", "rest")
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
KthLargest = Callable[[Tensor, int], Tensor]  # values (m,), k -> the k-th largest, a scalar
Known = Tensor | Context | None  # `t`: token ids (b,), or what the baseline needs
Row = Tensor | float  # of the baseline (b, d); 0.0 without one


class Active(NamedTuple):
    """The codes of a batch, and what the loss needs beside them."""

    codes: Tensor  # all (b, n), or those of a support's pairs, (b, k) or (m,)
    support: Support | None = None
    penalty: Tensor | float = 0.0  # what `sparsity` weighs, averaged over the batch
    gates: Tensor | None = None  # gated: the codes of the gate, in the shape of `codes`
    least: Tensor | None = None  # batchtopk: the least value kept

    def fired(self) -> Tensor:
        """(n,) bool: the features with a code above 0."""
        codes = self.codes.detach()
        return (codes.amax(0) if self.support is None else total(codes, self.support)) > 0


class SAE(nn.Module):
    """A sparse autoencoder of `n` features over activations of width `d_model`.

    activation  relu | topk | batchtopk | jumprelu | gated; `k` is used by topk and batchtopk
    vocabulary  rows V of the table, used when `lookup` is frozen or learned
    baseline    another one than the table, with the values it starts from; `lookup` is its kind
    encoder_sees  "full": the activation (the paper); "rest": the activation minus its table row
    aux_lookup  gated only: whether the auxiliary reconstruction adds the table (the authors': no)
    bandwidth   jumprelu only: width of the window in which thresholds receive a gradient
    limit       activations over this norm are sinks, left out of its training; None: none were
    """

    def __init__(self, d_model: int, n: int, activation: str = "topk", k: int = 32,
                 vocabulary: int = 0, lookup: str = "none", encoder_sees: str = "full",
                 scale: float = 1.0, aux_lookup: bool = True, bandwidth: float = 0.5,
                 baseline: Baseline | dict | None = None, limit: float | None = None):
        super().__init__()
        if isinstance(baseline, dict):  # of a saved SAE
            baseline = made(baseline, SAE)
        lookups = LOOKUPS if baseline is None else ("none", baseline.kind)
        if activation not in ACTIVATIONS or lookup not in lookups or encoder_sees not in SEES:
            raise ValueError(f"got activation {activation!r}, lookup {lookup!r}, encoder_sees "
                             f"{encoder_sees!r}; expected one of {ACTIVATIONS}, {lookups}, {SEES}")
        if "topk" in activation and not 1 <= k <= n:
            raise ValueError(f"k is {k}: it must lie between 1 and the number of features n = {n}")
        if baseline is not None:
            lookup, vocabulary = baseline.kind, baseline.config.get("vocabulary", 0)
        elif lookup != "none" and vocabulary < 1:
            raise ValueError(f"a {lookup} lookup needs `vocabulary`, the number of token ids")
        if not scale > 0:
            raise ValueError(f"scale is {scale}: the rms entry of the activations must be positive")
        self._configure(dict(d_model=d_model, n=n, activation=activation, k=k,
                             vocabulary=vocabulary, lookup=lookup, encoder_sees=encoder_sees,
                             scale=float(scale), aux_lookup=aux_lookup, bandwidth=bandwidth,
                             baseline=baseline and baseline.config, limit=limit))
        self.W_enc, self.b_enc = nn.Parameter(torch.zeros(n, d_model)), nn.Parameter(torch.zeros(n))
        self.W_dec = nn.Parameter(torch.zeros(n, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        if baseline is None and lookup != "none":
            baseline = Tokens(d_model, vocabulary, lookup == "learned")
        self.baseline = Baseline(d_model) if baseline is None else baseline
        if activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((n,), 2.0).log())
        if activation == "batchtopk":
            self.register_buffer("threshold", torch.tensor(-1.0))  # below 0: no batch seen yet
        if activation == "gated":
            self.r_mag, self.b_mag = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))
        self.learned = {name for name, p in self.named_parameters() if p.requires_grad}

    def _configure(self, config: dict) -> None:
        """Keep the arguments of __init__: as attributes, and for `save` as `config`."""
        self.config = config
        self.d_model, self.n, self.k = config["d_model"], config["n"], config["k"]
        self.activation, self.bandwidth = config["activation"], config["bandwidth"]
        self.vocabulary, self.lookup = config["vocabulary"], config["lookup"]
        self.encoder_sees, self.aux_lookup = config["encoder_sees"], config["aux_lookup"]
        self.scale, self.limit = config["scale"], config["limit"]

    @property
    def W_lookup(self) -> nn.Parameter:
        """The rows of the table: (V, d), or (V + n-grams, d), in units of `scale`."""
        return self.baseline.W_lookup

    @torch.no_grad()
    def start(self, mean: Tensor, table: Tensor | None = None, table_scale: float = 1.0,
              encoder_scale: float = 1.0, encoder: str = "transpose", seed: int = 0) -> "SAE":
        """Initialise in place and return self.

        `mean` (d,): the mean activation less its table row; `table` (V, d): raw. Decoder rows are
        random directions; the encoder is `encoder_scale` x W_dec ("transpose") or Kaiming-normal.
        """
        generator = torch.Generator().manual_seed(seed)
        self.W_dec.copy_(torch.randn(self.W_dec.shape, generator=generator))
        self.normalise()
        if encoder == "kaiming":
            empty = torch.empty(self.W_enc.shape)
            self.W_enc.copy_(nn.init.kaiming_normal_(empty, generator=generator))
        elif encoder == "transpose":
            self.W_enc.copy_(self.W_dec * encoder_scale)
            if self.activation == "jumprelu":
                self.log_threshold.fill_(math.log(2.0 * encoder_scale))
        else:
            raise ValueError(f'encoder is {encoder!r}: expected "transpose" or "kaiming"')
        self.b_dec.copy_(mean / self.scale)
        if self.lookup != "none" and table is not None:
            if table.shape != self.W_lookup.shape:
                raise ValueError(f"the table has shape {tuple(table.shape)}, expected one row per "
                                 f"token, one column per coordinate: {tuple(self.W_lookup.shape)}")
            self.W_lookup.copy_(table * (table_scale / self.scale))
        return self

    def direction(self, feature: int) -> Tensor:
        """What one unit of a feature's code adds to the activation: raw (d,)."""
        if not 0 <= feature < self.n:
            raise ValueError(f"feature {feature} was asked for, there are 0 to {self.n - 1}")
        return self.W_dec[feature].detach() * self.scale

    def attached(self, lm, layer: int, change: Callable[[Tensor], Tensor] | None = None,
                 error: bool = False):
        """`with sae.attached(lm, layer):` runs a language model (lm.LM) on the reconstruction.

        change(codes (m, n)) -> codes edits features on the way; `error` adds back what the SAE
        does not reconstruct, so that only the change is felt. BOS, special tokens and sinks stay.
        """
        if self.b_dec.device != lm.device:
            raise ValueError(f"the SAE is on {self.b_dec.device}, the language model on "
                             f"{lm.device}: attach sae.to(lm.device)")

        @torch.no_grad()
        def edit(x: Tensor, t: Tensor | Context) -> Tensor:
            codes = self.encode(x, t)
            a_hat = self.decode(codes if change is None else change(codes.clone()), t)
            return a_hat + (x - self.decode(codes, t)) if error else a_hat

        return lm.edited(layer, edit, self.limit or math.inf, self.baseline.needs)

    def learn(self) -> "SAE":
        """Let a loaded SAE be trained on: its parameters get gradients again; returns self."""
        for name, p in self.named_parameters():
            p.requires_grad_(name in self.learned)
        return self

    def _row(self, x: Tensor, t: Known) -> Row:
        """The baseline's rows for x (b, ...). Raises ValueError for contexts of other positions."""
        if self.lookup != "none" and t is not None and len(t) != len(x):
            raise ValueError(f"{len(x)} activations were given with {len(t)} tokens: expected one "
                             "token an activation")
        return self.baseline(t)

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every decoder row unit norm."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8)

    def encoder_input(self, z: Tensor, row: Row) -> Tensor:
        """What the encoder sees of z (b, d) in units of `scale`: all, or less the baseline's."""
        return z - row if self.encoder_sees == "rest" else z

    def preactivations(self, x: Tensor, t: Known = None) -> Tensor:
        """W_enc (a_t - b_dec) + b_enc (b, n) of raw x (b, d)."""
        z = x / self.scale
        if self.encoder_sees == "rest":
            z = self.encoder_input(z, self._row(x, t))
        return preactivations(z, self.b_dec, self.W_enc, self.b_enc)

    def encode(self, x: Tensor, t: Known = None) -> Tensor:
        """Equation 1: codes (b, n), never negative, of raw x (b, d). Training: see `_active`."""
        return self.act(self.preactivations(x, t)).codes

    def decode(self, codes: Tensor, t: Known = None) -> Tensor:
        """Equation 2: raw a_hat (b, d) from codes (b, n), tokens t (b,). Training: `_rebuilt`."""
        return (codes @ self.W_dec + self.b_dec + self._row(codes, t)) * self.scale

    def table_alone(self, t: Tensor | Context) -> Tensor:
        """Equation 2 without features: b_dec + W_lookup[t], raw (b, d), of token ids t (b,)."""
        return (self.b_dec + self.baseline(t)).expand(len(t), -1) * self.scale

    def forward(self, x: Tensor, t: Known = None) -> Tensor:
        """The reconstruction (b, d) of raw x (b, d); topk never builds the dense codes."""
        if self.activation != "topk":
            return self.decode(self.encode(x, t), t)
        z, row = x / self.scale, self._row(x, t)
        return self._rebuilt(self._active(z, row), row) * self.scale

    def act(self, pre: Tensor, support: Support | None = None,
            kth: KthLargest = kth_largest) -> Active:
        """act of equation 1, on all pre-activations (b, n) or those of the pairs of a support."""
        if self.activation == "topk":  # `selected` finds the same ones without dense codes
            values, index = pre.topk(self.k, dim=-1, sorted=False)
            return Active(torch.zeros_like(pre).scatter(-1, index, relu(values)))
        if self.activation == "batchtopk":
            b = len(pre) if support is None else support.b
            least = self._least(pre.detach().flatten(), b, kth)  # of exact values: see _bound
            just_below = torch.nextafter(least, least.new_tensor(-math.inf)).item()
            return Active(threshold(pre, just_below, 0.0), support, least=least)
        if self.activation == "jumprelu":
            codes, l0 = kernels.JumpReLU.apply(pre, self.log_threshold, self.bandwidth, support)
            return Active(codes, support, l0)
        if self.activation == "gated":
            codes, gates = kernels.Gated.apply(pre, self.b_enc, self.r_mag, self.b_mag, support)
            return Active(codes, support, self._weighed(gates, support), gates)
        codes = relu(pre)
        return Active(codes, support, self._weighed(codes, support))

    def _weighed(self, codes: Tensor, support: Support | None) -> Tensor:
        """The mean over positions of the sum of codes x decoder norms."""
        norms = self.W_dec.norm(dim=-1)
        if support is None:
            return (codes @ norms).mean()
        return total(codes, support) @ norms / support.b

    def _least(self, values: Tensor, b: int, kth: KthLargest) -> Tensor:
        """batchtopk: the least value kept: the (k * b)-th; in eval mode a running mean of that."""
        if b and (self.training or self.threshold < 0):
            return kth(values, self.k * b).clamp_min(0)
        return self.threshold

    def _bound(self, b: int, kth: KthLargest) -> kernels.Bound | None:
        """The least pre-activation that codes or gradients depend on; None: all matter."""
        if self.b_enc.is_cuda:
            return None
        if self.activation == "batchtopk":
            return partial(self._least, b=b, kth=kth)
        if self.activation == "jumprelu":
            bound = self.log_threshold.detach().exp() - self.bandwidth / 2
            return bound if (bound > 0).all() else None
        return self.b_enc.new_zeros(())

    def selected(self, z: Tensor, row: Row) -> tuple[Tensor, Support]:
        """topk: codes (b, k) of z (b, d) in units of `scale`, and their features."""
        return select_top(self.encoder_input(z, row), self.b_dec, self.W_enc, self.b_enc, self.k)

    def _active(self, z: Tensor, row: Row, kth: KthLargest = kth_largest) -> Active:
        """Equation 1 on z (b, d) in units of `scale`; of the active features only, if few."""
        if self.activation == "topk":
            return Active(*self.selected(z, row))
        pre, support = kernels.select_above(self.encoder_input(z, row), self.b_dec, self.W_enc,
                                            self.b_enc, self._bound(len(z), kth))
        return self.act(pre, support, kth)

    def _rebuilt(self, active: Active, row: Row) -> Tensor:
        """Equation 2 in units of `scale` (b, d)."""
        return sum_rows(active.codes, active.support, self.W_dec) + self.b_dec + row

    @torch.no_grad()
    def reconstructed(self, x: Tensor, t: Known = None) -> tuple[Tensor, int, Tensor]:
        """Raw x (b, d) reconstructed (b, d), the number of codes above 0, what fires (n,) bool."""
        row = self._row(x, t)
        active = self._active(x / self.scale, row)
        a_hat = self._rebuilt(active, row) * self.scale
        return a_hat, int((active.codes > 0).sum()), active.fired()

    def loss(self, x: Tensor, t: Known = None, sparsity: float = 0.0,
             dead: Tensor | None = None, aux_weight: float = 1 / 32,
             kth: KthLargest = kth_largest) -> dict[str, Tensor]:
        """Squared error summed over d_model, averaged over the batch, in units of scale^2, plus:

        relu, gated: sparsity x sum of codes x decoder norms; jumprelu: sparsity x L0; gated: the
        error of its gates; topk, batchtopk: AuxK over the features marked in `dead` (n,) bool.
        Returns loss, z_hat (b, d) in units of `scale`, fired (n,) bool, and codes: (b, k) for topk,
        else (b, n), or (m,) where they are few. `kth` finds the k-th largest value of a batch that
        ranks share. In training mode this moves batchtopk's threshold; nothing else does.
        """
        z, row = x / self.scale, self._row(x, t)
        active = self._active(z, row, kth)
        if self.training and active.least is not None and len(z):
            moved = 0.9 * self.threshold + 0.1 * active.least  # a running mean
            self.threshold.copy_(active.least if self.threshold < 0 else moved)
        z_hat = self._rebuilt(active, row)
        loss = mse_loss(z_hat, z, reduction="sum") / len(z) + sparsity * active.penalty
        if active.gates is not None:  # trains the gates, not the decoder
            rebuilt = sum_rows(active.gates, active.support, self.W_dec.detach())
            z_gate = rebuilt + self.b_dec.detach()
            if self.aux_lookup and isinstance(row, Tensor):
                z_gate = z_gate + row.detach()
            loss = loss + mse_loss(z_gate, z, reduction="sum") / len(z)
        if aux_weight and "topk" in self.activation and dead is not None and dead.any():
            loss = loss + aux_weight * self.auxk(z, row, (z - z_hat).detach(), dead)
        codes, fired = active.codes.detach(), active.fired()
        return dict(loss=loss, z_hat=z_hat.detach(), fired=fired, codes=codes)

    def auxk(self, z: Tensor, row: Row, error: Tensor, dead: Tensor) -> Tensor:
        """AuxK (Gao et al. 2024): ||error - e_hat||^2, e_hat from the strongest dead features.

        The d_model / 2 strongest at each position; weighed less while fewer are dead. z and error
        (b, d) in units of `scale`, dead (n,) bool.
        """
        W, bias, rows = self.W_enc[dead], self.b_enc[dead], self.W_dec[dead]
        half = max(1, self.d_model // 2)
        k = min(half, len(W))
        z, centre = self.encoder_input(z, row).detach(), self.b_dec.detach()
        if len(W) <= 16 * k:  # so few that whole rows of codes cost less than sorting the pairs
            pre = preactivations(z, centre, W, bias)
            codes = relu(pre) * (pre >= kth_largest(pre.detach(), k).unsqueeze(1))
            explained = sum_rows(codes, None, rows)
        else:
            explained = sum_rows(*select_top(z, centre, W, bias, k), rows)
        return min(1.0, len(W) / half) * mse_loss(explained, error, reduction="sum") / len(z)

    def save(self, folder: str | Path) -> Path:
        """Write config.json, then weights.safetensors, each whole. Raises OSError (disk full)."""
        folder = Path(folder)
        paths = folder / CONFIG, folder / WEIGHTS
        drafts = [path.with_name(f".{os.getpid()}-{path.name}") for path in paths]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            drafts[0].write_text(json.dumps(self.config, indent=2) + "\n")
            save_file(self.state_dict(), drafts[1])
            for draft in drafts:
                with open(draft, "rb+") as file:  # Windows syncs only what can be written
                    os.fsync(file.fileno())
            paths[1].unlink(missing_ok=True)  # never beside the config of another SAE
            for draft, path in zip(drafts, paths):
                os.replace(draft, path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"the SAE could not be saved in {folder} ({error}): free some space "
                          "there or choose another folder") from error
        finally:
            for draft in drafts:
                draft.unlink(missing_ok=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "SAE":
        """Rebuild a saved SAE, in eval mode. Raises ValueError for a damaged folder."""
        folder = Path(folder)
        if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} is not a saved SAE: it needs {CONFIG} and {WEIGHTS}")
        try:
            sae = cls(**json.loads((folder / CONFIG).read_text()))
            state = load_file(folder / WEIGHTS)
            if "W_lookup" in state:  # saved before there were other baselines
                state["baseline.W_lookup"] = state.pop("W_lookup")
            sae.load_state_dict(state)
        except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"the SAE in {folder} is damaged or of another version ({error}): "
                             "save it again") from None
        wrong = [name for name, p in sae.named_parameters() if not torch.isfinite(p).all()]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} of the SAE in {folder} have NaN or infinite "
                             "values: train it again with a smaller rate")
        return sae.eval().requires_grad_(False)
