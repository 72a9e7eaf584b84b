"""The sparse autoencoder with a lookup table: one class, that needs nothing else of this package but its kernels.

    f(a_t)  = act(W_enc (a_t - b_dec) + b_enc)                    equation 1
    a_hat_t = W_dec^T f(a_t) + b_dec + W_lookup[t]                equation 2

`a_t` is the activation at a position whose token is `t`. Without a table the last term is missing and `t` is ignored, so
that training, sweeps and evaluation treat both kinds alike. Rows are things: W_enc (n, d), W_dec (n, d), W_lookup (V, d).
All weights live in units of `scale` (the rms entry of the centred activations); `encode` takes and `decode` returns raw
activations, codes are in units of `scale`. Equations: Dooms and Wilhelm, arXiv 2502.17332.
"""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import embedding, mse_loss, relu, threshold

from tsae.kernels import (
    Bound,
    Support,
    kth_largest,
    kth_of_rows,
    preactivations,
    select_above,
    select_top,
    sum_rows,
    total,
)

ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu", "gated")
LOOKUPS = ("none", "frozen", "learned")
KthLargest = Callable[[torch.Tensor, int], torch.Tensor]  # values (m,), k -> the k-th largest, a scalar


def where_positive(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x where y > 0, else 0. In one vectorised pass, which masks and torch.where take several times as long for."""
    return torch.ops.aten.threshold_backward(x, y, 0.0)


def threshold_at(x: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """x where it is `least` or more, else 0."""
    return threshold(x, torch.nextafter(least, least.new_tensor(-math.inf)).item(), 0.0)


def at(p: torch.Tensor, support: Support | None) -> torch.Tensor:
    """Of p (n,), one value a feature: those of the pairs of `support`, or all."""
    return p if support is None else p[support.index]


class _JumpReLU(torch.autograd.Function):
    """Codes and mean L0 of pre (b, n), or of the pairs of a support, with thresholds theta (n,), which a step gives no
    gradient: inside a window of width `bandwidth` around them it is taken to be 1 / bandwidth (Rajamanoharan et al. 2024,
    equations 11 and 12)."""

    @staticmethod
    def forward(ctx, pre, log_theta, bandwidth, support):
        theta = log_theta.exp()
        above = pre - at(theta, support)
        codes = where_positive(pre, above)  # theta is positive: what is above it needs no ReLU
        ctx.save_for_backward(codes, above.abs_().neg_().add_(bandwidth / 2), theta)
        ctx.bandwidth, ctx.support, ctx.b = bandwidth, support, len(pre) if support is None else support.b
        return codes, torch.count_nonzero(codes) / ctx.b

    @staticmethod
    def backward(ctx, g, g_l0):
        codes, inside, theta = ctx.saved_tensors
        pull = where_positive(torch.addcmul(g_l0 / ctx.b, g, at(theta, ctx.support)), inside)
        return where_positive(g, codes), -total(pull, ctx.support) * theta / ctx.bandwidth, None, None


class _Gated(torch.autograd.Function):
    """Codes and gates of pre = W x + b_enc (b, n), or of the pairs of a support: the magnitudes share W, scaled by
    exp(r_mag) (Rajamanoharan et al. 2024b). The derivative by hand takes half of the passes over (b, n)."""

    @staticmethod
    def forward(ctx, pre, b_enc, r_mag, b_mag, support):
        gain, gates = r_mag.exp(), relu(pre)
        magnitudes = torch.addcmul(at(b_mag - b_enc * gain, support), pre, at(gain, support)).relu_()
        codes = where_positive(magnitudes, gates)
        ctx.save_for_backward(codes, gates, b_enc, gain)
        ctx.support = support
        return codes, gates

    @staticmethod
    def backward(ctx, g, g_gates):
        codes, gates, b_enc, gain = ctx.saved_tensors
        g = where_positive(g, codes)
        g_b = total(g, ctx.support)
        g_pre = torch.addcmul(where_positive(g_gates, gates), g, at(gain, ctx.support))
        return g_pre, -g_b * gain, (total(g * gates, ctx.support) - g_b * b_enc) * gain, g_b, None


def _fired(codes: torch.Tensor, support: Support | None) -> torch.Tensor:
    """(n,) bool: the features with a code above 0."""
    return (codes.amax(0) if support is None else total(codes, support)) > 0


class SAE(nn.Module):
    """A sparse autoencoder over activations of width `d_model` with `n` features, with or without a lookup table.

    activation  relu | topk | batchtopk | jumprelu | gated; `k` is used by topk and batchtopk
    vocabulary  rows V of the table, used when `lookup` is frozen or learned
    encoder_sees  "full": the activation (the paper); "rest": the activation minus its row of the table
    aux_lookup  gated only: whether the auxiliary reconstruction adds the table (the authors' code leaves it out)
    bandwidth   jumprelu only: width of the window in which thresholds receive a gradient, in units of `scale`
    """

    def __init__(self, d_model: int, n: int, activation: str = "topk", k: int = 32, vocabulary: int = 0,
                 lookup: str = "none", encoder_sees: str = "full", scale: float = 1.0, aux_lookup: bool = True,
                 bandwidth: float = 0.5):
        super().__init__()
        if activation not in ACTIVATIONS or lookup not in LOOKUPS or encoder_sees not in ("full", "rest"):
            raise ValueError(f"got activation {activation!r}, lookup {lookup!r}, encoder_sees {encoder_sees!r}; expected "
                             f"one of {ACTIVATIONS}, one of {LOOKUPS}, and 'full' or 'rest'")
        if "topk" in activation and not 1 <= k <= n:
            raise ValueError(f"k is {k}: it must lie between 1 and the number of features n = {n}")
        if lookup != "none" and vocabulary < 1:
            raise ValueError(f"a {lookup} lookup needs `vocabulary`, the number of token ids of the language model")
        if not scale > 0:
            raise ValueError(f"scale is {scale}: it must be positive (the rms entry of the centred activations)")
        self.config = dict(d_model=d_model, n=n, activation=activation, k=k, vocabulary=vocabulary, lookup=lookup,
                           encoder_sees=encoder_sees, scale=float(scale), aux_lookup=aux_lookup, bandwidth=bandwidth)
        self.__dict__.update(self.config)
        self.W_enc, self.b_enc = nn.Parameter(torch.zeros(n, d_model)), nn.Parameter(torch.zeros(n))
        self.W_dec, self.b_dec = nn.Parameter(torch.zeros(n, d_model)), nn.Parameter(torch.zeros(d_model))
        if lookup != "none":
            self.W_lookup = nn.Parameter(torch.zeros(vocabulary, d_model), requires_grad=lookup == "learned")
        if activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((n,), 2.0).log())
        if activation == "batchtopk":
            self.register_buffer("threshold", torch.tensor(-1.0))  # below 0: no batch seen yet
        if activation == "gated":
            self.r_mag, self.b_mag = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))

    @torch.no_grad()
    def start(self, mean: torch.Tensor, table: torch.Tensor | None = None, table_scale: float = 1.0,
              encoder_scale: float = 1.0, encoder: str = "transpose", seed: int = 0) -> "SAE":
        """Initialise in place and return self. `mean` (d,): mean activation left over by the table; `table` (V, d): raw.

        The decoder's rows are random directions; the encoder is `encoder_scale` x W_dec ("transpose") or Kaiming-normal.
        """
        generator = torch.Generator().manual_seed(seed)
        self.W_dec.copy_(torch.randn(self.W_dec.shape, generator=generator))
        self.normalise()
        if encoder == "kaiming":
            self.W_enc.copy_(nn.init.kaiming_normal_(torch.empty(self.W_enc.shape), generator=generator))
        elif encoder == "transpose":
            self.W_enc.copy_(self.W_dec * encoder_scale)
            if self.activation == "jumprelu":
                self.log_threshold.fill_(math.log(2.0 * encoder_scale))
        else:
            raise ValueError(f'encoder is {encoder!r}: expected "transpose" or "kaiming"')
        self.b_dec.copy_(mean / self.scale)
        if self.lookup != "none" and table is not None:
            if table.shape != self.W_lookup.shape:
                raise ValueError(f"the start of the table has shape {tuple(table.shape)}, expected one row per token and "
                                 f"one column per coordinate: {tuple(self.W_lookup.shape)}")
            self.W_lookup.copy_(table * (table_scale / self.scale))
        return self

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every decoder row unit norm."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8)

    def row(self, t: torch.Tensor | None) -> torch.Tensor | float:
        """W_lookup[t] (b, d) in units of `scale`, or 0.0 without a table."""
        if self.lookup == "none":
            return 0.0
        if t is None:
            raise ValueError("this SAE has a lookup table: pass the token ids `t` of the positions beside x")
        if t.numel() and not 0 <= int(t.min()) <= int(t.max()) < self.vocabulary:
            raise ValueError(f"token ids run from {int(t.min())} to {int(t.max())}, the lookup table has rows 0 to "
                             f"{self.vocabulary - 1}: was it trained with another tokenizer?")
        return embedding(t.long(), self.W_lookup, sparse=True)

    def encoder_input(self, z: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        """What the encoder sees of z (b, d), in units of `scale`: all, or with encoder_sees="rest" less the token's row."""
        return z - self.row(t) if self.encoder_sees == "rest" else z

    def preactivations(self, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        """W_enc (a_t - b_dec) + b_enc, (b, n)."""
        return preactivations(self.encoder_input(x / self.scale, t), self.b_dec, self.W_enc, self.b_enc)

    def encode(self, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        """Equation 1: codes (b, n), never negative, of raw activations x (b, d)."""
        pre = self.preactivations(x, t)
        if self.activation == "topk":
            values, index = pre.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, index, relu(values))
        return self._codes(pre, None)[0]

    def decode(self, codes: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        """Equation 2: reconstructed raw activations (b, d) from codes (b, n) and token ids t (b,)."""
        return (codes @ self.W_dec + self.b_dec + self.row(t)) * self.scale

    def table_alone(self, t: torch.Tensor) -> torch.Tensor:
        """Equation 2 without features: b_dec + W_lookup[t], raw (b, d), for token ids t (b,)."""
        return (self.b_dec + self.row(t)).expand(len(t), -1) * self.scale

    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        """The reconstruction of raw activations x (b, d); topk never builds the dense codes."""
        if self.activation != "topk":
            return self.decode(self.encode(x, t), t)
        return (sum_rows(*self.selected(x / self.scale, t), self.W_dec) + self.b_dec + self.row(t)) * self.scale

    def selected(self, z: torch.Tensor, t: torch.Tensor | None) -> tuple[torch.Tensor, Support]:
        """Top-k codes (b, k) of activations z (b, d) in units of `scale`, and their features."""
        return select_top(self.encoder_input(z, t), self.b_dec, self.W_enc, self.b_enc, self.k)

    def _bound(self, b: int, kth: KthLargest) -> Bound | None:
        """For `select_above`: what a pre-activation must reach to matter, to codes or to gradients; None: all matter."""
        if self.b_enc.is_cuda:
            return None
        if self.activation == "batchtopk":
            return partial(self._least, b=b, kth=kth)
        if self.activation == "jumprelu":
            bound = self.log_threshold.detach().exp() - self.bandwidth / 2
            return bound if (bound > 0).all() else None
        return self.b_enc.new_zeros(())

    def _codes(self, pre: torch.Tensor, support: Support | None, kth: KthLargest = kth_largest, learn: bool = False) -> tuple:
        """Codes, the mean of what `sparsity` weighs, and gated's gates, of pre-activations: all (b, n), or those of the
        pairs of `support`, of which codes and gates then are, too."""
        if self.activation == "batchtopk":
            return self._kept(pre, len(pre) if support is None else support.b, kth, learn), 0.0, None
        if self.activation == "jumprelu":
            return *_JumpReLU.apply(pre, self.log_threshold, self.bandwidth, support), None
        if self.activation == "gated":
            codes, gates = _Gated.apply(pre, self.b_enc, self.r_mag, self.b_mag, support)
            return codes, self._weighed(gates, support), gates
        codes = relu(pre)
        return codes, self._weighed(codes, support), None

    def _weighed(self, codes: torch.Tensor, support: Support | None) -> torch.Tensor:
        """The mean over positions of the sum of codes x decoder norms."""
        norms = self.W_dec.norm(dim=-1)
        return (codes @ norms).mean() if support is None else total(codes, support) @ norms / support.b

    def _least(self, values: torch.Tensor, b: int, kth: KthLargest) -> torch.Tensor:
        """batchtopk: the least value kept. The k * b-th of a training batch; in use, a running mean of what that was."""
        if b and (self.training or self.threshold < 0):
            return kth(values, self.k * b).clamp_min(0)
        return self.threshold

    def _kept(self, values: torch.Tensor, b: int, kth: KthLargest, learn: bool) -> torch.Tensor:
        """batchtopk: the values that are kept, 0 for the others; `learn` moves the running mean."""
        least = self._least(values.detach().flatten(), b, kth)
        if learn and b:
            self.threshold.copy_(least if self.threshold < 0 else 0.9 * self.threshold + 0.1 * least)
        return threshold_at(values, least)

    def loss(self, x: torch.Tensor, t: torch.Tensor | None = None, sparsity: float = 0.0,
             dead: torch.Tensor | None = None, aux_weight: float = 1 / 32,
             kth: KthLargest = kth_largest) -> dict[str, torch.Tensor]:
        """Squared error summed over d_model, averaged over the batch, in units of scale^2, plus the architecture's terms.

        relu, gated: sparsity x sum of codes x decoder norms; jumprelu: sparsity x L0; gated: the auxiliary error; topk and
        batchtopk: AuxK over the features marked in `dead` (n,) bool. Returns loss, z_hat (b, d) in units of `scale`,
        fired (n,) bool, and codes: (b, k) for topk; else (b, n), or (m,) where they are few (see select_above).
        """
        z = x / self.scale
        codes, support, penalty, gates = self._active(z, t, kth, learn=self.training)
        z_hat = sum_rows(codes, support, self.W_dec) + self.b_dec + self.row(t)
        loss = mse_loss(z_hat, z, reduction="sum") / len(z) + sparsity * penalty
        if gates is not None:
            row = self.row(t).detach() if self.aux_lookup and self.lookup != "none" else 0.0
            z_gate = sum_rows(gates, support, self.W_dec.detach()) + self.b_dec.detach() + row  # trains gates, not decoder
            loss = loss + mse_loss(z_gate, z, reduction="sum") / len(z)
        if aux_weight and "topk" in self.activation and dead is not None and dead.any():
            loss = loss + aux_weight * self.auxk(z, t, (z - z_hat).detach(), dead)
        return dict(loss=loss, z_hat=z_hat.detach(), fired=_fired(codes.detach(), support), codes=codes.detach())

    def _active(self, z: torch.Tensor, t: torch.Tensor | None, kth: KthLargest = kth_largest, learn: bool = False) -> tuple:
        """Codes of z (b, d) in units of `scale`, their Support, and penalty and gates as in `_codes`."""
        if self.activation == "topk":
            return *self.selected(z, t), 0.0, None
        pre, support = select_above(self.encoder_input(z, t), self.b_dec, self.W_enc, self.b_enc, self._bound(len(z), kth))
        codes, penalty, gates = self._codes(pre, support, kth, learn)
        return codes, support, penalty, gates

    @torch.no_grad()
    def reconstructed(self, x: torch.Tensor, t: torch.Tensor | None = None) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Of raw x (b, d): the reconstruction (b, d), how many codes are above 0, and which features fire (n,) bool."""
        codes, support, _, _ = self._active(x / self.scale, t)
        a_hat = (sum_rows(codes, support, self.W_dec) + self.b_dec + self.row(t)) * self.scale
        return a_hat, int((codes > 0).sum()), _fired(codes, support)

    def auxk(self, z: torch.Tensor, t: torch.Tensor | None, error: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        """AuxK (Gao et al. 2024): how far the d_model / 2 strongest dead features are from explaining `error` (b, d).

        z (b, d), t (b,), dead (n,) bool; activations in units of `scale`.
        """
        W, bias, rows = self.W_enc[dead], self.b_enc[dead], self.W_dec[dead]
        k = min(max(1, self.d_model // 2), len(W))
        z = self.encoder_input(z, t).detach()
        if len(W) <= 16 * k:  # so few that whole rows of codes cost less than sorting the pairs
            pre = preactivations(z, self.b_dec.detach(), W, bias)
            codes = relu(pre) * (pre >= kth_of_rows(pre.detach(), k))
            explained = sum_rows(codes, None, rows)
        else:
            explained = sum_rows(*select_top(z, self.b_dec.detach(), W, bias, k), rows)
        return min(1.0, len(W) / max(1, self.d_model // 2)) * mse_loss(explained, error, reduction="sum") / len(z)

    def save(self, folder: str | Path) -> Path:
        """Write `config.json` and `weights.safetensors`; the weights appear last, whole or not at all.

        Raises OSError with a sentence when the disk is full or read-only: what was saved there before stays.
        """
        folder = Path(folder)
        written = {name: folder / f".{os.getpid()}-{name}" for name in ("config.json", "weights.safetensors")}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            written["config.json"].write_text(json.dumps(self.config, indent=2) + "\n")
            save_file(self.state_dict(), written["weights.safetensors"])
            for temporary in written.values():
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
            (folder / "weights.safetensors").unlink(missing_ok=True)  # never beside the config of another SAE
            for name, temporary in written.items():
                os.replace(temporary, folder / name)
        except (OSError, SafetensorError) as error:
            raise OSError(f"the SAE could not be saved in {folder} ({error}): free some space there or choose another "
                          "folder") from error
        finally:
            for temporary in written.values():
                temporary.unlink(missing_ok=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "SAE":
        """Rebuild an SAE, its table included, without its language model. Raises ValueError for a damaged folder."""
        folder = Path(folder)
        if not (folder / "weights.safetensors").is_file() or not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is not a saved SAE: it needs config.json and weights.safetensors")
        try:
            sae = cls(**json.loads((folder / "config.json").read_text()))
            sae.load_state_dict(load_file(folder / "weights.safetensors"))
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, TypeError, RuntimeError) as error:
            raise ValueError(f"the SAE in {folder} is damaged or of another version ({error}): save it again") from None
        wrong = [name for name, p in sae.named_parameters() if not torch.isfinite(p).all()]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} of the SAE in {folder} have NaN or infinite values: train it again with a "
                             "smaller rate")
        return sae.eval()
