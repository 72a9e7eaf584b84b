"""The sparse autoencoder with a lookup table: one class, which needs only the kernels beside it.

    f(a_t)  = act(W_enc (a_t - b_dec) + b_enc)                    equation 1
    a_hat_t = W_dec^T f(a_t) + b_dec + W_lookup[t]                equation 2

(Dooms and Wilhelm, arXiv 2502.17332.) `a_t` is the activation at a position whose token is `t`.
Without a table the last term is missing and `t` is ignored: training and evaluation treat both
alike. A feature or token has a row: W_enc (n, d), W_dec (n, d), W_lookup (V, d). Table, biases and
codes are in units of `scale`, the rms entry of the activations less their mean; x is always raw.
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
from torch.nn.functional import embedding, mse_loss, relu, threshold

from tsae import kernels
from tsae.kernels import Support, kth_largest, preactivations, select_top, sum_rows, total

# A new activation: name it here, make its parameters in SAE.__init__ and give it a case in SAE.act,
# for all pre-activations (b, n) and for those of a support's pairs (m,) (see kernels.per_code).
# If its codes or gradients need pre-activations below 0, let SAE._bound return None for it.
ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu", "gated")
LOOKUPS, SEES = ("none", "frozen", "learned"), ("full", "rest")
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
KthLargest = Callable[[Tensor, int], Tensor]  # values (m,), k -> the k-th largest, a scalar


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
    encoder_sees  "full": the activation (the paper); "rest": the activation minus its table row
    aux_lookup  gated only: whether the auxiliary reconstruction adds the table (the authors': no)
    bandwidth   jumprelu only: width of the window in which thresholds receive a gradient
    """

    def __init__(self, d_model: int, n: int, activation: str = "topk", k: int = 32,
                 vocabulary: int = 0, lookup: str = "none", encoder_sees: str = "full",
                 scale: float = 1.0, aux_lookup: bool = True, bandwidth: float = 0.5):
        super().__init__()
        if activation not in ACTIVATIONS or lookup not in LOOKUPS or encoder_sees not in SEES:
            raise ValueError(f"got activation {activation!r}, lookup {lookup!r}, encoder_sees "
                             f"{encoder_sees!r}; expected one of {ACTIVATIONS}, {LOOKUPS}, {SEES}")
        if "topk" in activation and not 1 <= k <= n:
            raise ValueError(f"k is {k}: it must lie between 1 and the number of features n = {n}")
        if lookup != "none" and vocabulary < 1:
            raise ValueError(f"a {lookup} lookup needs `vocabulary`, the number of token ids")
        if not scale > 0:
            raise ValueError(f"scale is {scale}: the rms entry of the activations must be positive")
        self._configure(dict(d_model=d_model, n=n, activation=activation, k=k,
                             vocabulary=vocabulary, lookup=lookup, encoder_sees=encoder_sees,
                             scale=float(scale), aux_lookup=aux_lookup, bandwidth=bandwidth))
        self.W_enc, self.b_enc = nn.Parameter(torch.zeros(n, d_model)), nn.Parameter(torch.zeros(n))
        self.W_dec = nn.Parameter(torch.zeros(n, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        if lookup != "none":
            self.W_lookup = nn.Parameter(torch.zeros(vocabulary, d_model), lookup == "learned")
        if activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((n,), 2.0).log())
        if activation == "batchtopk":
            self.register_buffer("threshold", torch.tensor(-1.0))  # below 0: no batch seen yet
        if activation == "gated":
            self.r_mag, self.b_mag = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))

    def _configure(self, config: dict) -> None:
        """Keep the arguments of __init__: as attributes, and for `save` as `config`."""
        self.config = config
        self.d_model, self.n, self.k = config["d_model"], config["n"], config["k"]
        self.activation, self.bandwidth = config["activation"], config["bandwidth"]
        self.vocabulary, self.lookup = config["vocabulary"], config["lookup"]
        self.encoder_sees, self.aux_lookup = config["encoder_sees"], config["aux_lookup"]
        self.scale = config["scale"]

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

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every decoder row unit norm."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8)

    def baseline(self, t: Tensor | None) -> Tensor | float:
        """What the decoder adds for a token: W_lookup[t] (b, d) in units of `scale`; no table: 0.0.

        Another function of the token would go here, and its start into baseline.py.
        """
        if self.lookup == "none":
            return 0.0
        if t is None:
            raise ValueError("this SAE has a lookup table: pass the token ids `t` beside x")
        if t.numel() and not 0 <= int(t.min()) <= int(t.max()) < self.vocabulary:
            raise ValueError(f"token ids run from {int(t.min())} to {int(t.max())}, the table has "
                             f"rows 0 to {self.vocabulary - 1}: is it of another tokenizer?")
        return embedding(t.long(), self.W_lookup, sparse=True)

    def encoder_input(self, z: Tensor, t: Tensor | None) -> Tensor:
        """What the encoder sees of z (b, d) in units of `scale`: all, or less its baseline."""
        return z - self.baseline(t) if self.encoder_sees == "rest" else z

    def preactivations(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """W_enc (a_t - b_dec) + b_enc (b, n) of raw x (b, d)."""
        z = self.encoder_input(x / self.scale, t)
        return preactivations(z, self.b_dec, self.W_enc, self.b_enc)

    def encode(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Equation 1: codes (b, n), never negative, of raw x (b, d). Training: see `_active`."""
        return self.act(self.preactivations(x, t)).codes

    def decode(self, codes: Tensor, t: Tensor | None = None) -> Tensor:
        """Equation 2: raw a_hat (b, d) from codes (b, n), tokens t (b,). Training: `_rebuilt`."""
        return (codes @ self.W_dec + self.b_dec + self.baseline(t)) * self.scale

    def table_alone(self, t: Tensor) -> Tensor:
        """Equation 2 without features: b_dec + W_lookup[t], raw (b, d), of token ids t (b,)."""
        return (self.b_dec + self.baseline(t)).expand(len(t), -1) * self.scale

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """The reconstruction (b, d) of raw x (b, d); topk never builds the dense codes."""
        if self.activation != "topk":
            return self.decode(self.encode(x, t), t)
        return self._rebuilt(self._active(x / self.scale, t), t) * self.scale

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

    def selected(self, z: Tensor, t: Tensor | None) -> tuple[Tensor, Support]:
        """topk: codes (b, k) of z (b, d) in units of `scale`, and their features."""
        return select_top(self.encoder_input(z, t), self.b_dec, self.W_enc, self.b_enc, self.k)

    def _active(self, z: Tensor, t: Tensor | None, kth: KthLargest = kth_largest) -> Active:
        """Equation 1 on z (b, d) in units of `scale`; of the active features only, if few."""
        if self.activation == "topk":
            return Active(*self.selected(z, t))
        pre, support = kernels.select_above(self.encoder_input(z, t), self.b_dec, self.W_enc,
                                            self.b_enc, self._bound(len(z), kth))
        return self.act(pre, support, kth)

    def _rebuilt(self, active: Active, t: Tensor | None) -> Tensor:
        """Equation 2 in units of `scale` (b, d)."""
        return sum_rows(active.codes, active.support, self.W_dec) + self.b_dec + self.baseline(t)

    @torch.no_grad()
    def reconstructed(self, x: Tensor, t: Tensor | None = None) -> tuple[Tensor, int, Tensor]:
        """Raw x (b, d) reconstructed (b, d), the number of codes above 0, what fires (n,) bool."""
        active = self._active(x / self.scale, t)
        a_hat = self._rebuilt(active, t) * self.scale
        return a_hat, int((active.codes > 0).sum()), active.fired()

    def loss(self, x: Tensor, t: Tensor | None = None, sparsity: float = 0.0,
             dead: Tensor | None = None, aux_weight: float = 1 / 32,
             kth: KthLargest = kth_largest) -> dict[str, Tensor]:
        """Squared error summed over d_model, averaged over the batch, in units of scale^2, plus:

        relu, gated: sparsity x sum of codes x decoder norms; jumprelu: sparsity x L0; gated: the
        error of its gates; topk, batchtopk: AuxK over the features marked in `dead` (n,) bool.
        Returns loss, z_hat (b, d) in units of `scale`, fired (n,) bool, and codes: (b, k) for topk,
        else (b, n), or (m,) where they are few. `kth` finds the k-th largest value of a batch that
        ranks share. In training mode this moves batchtopk's threshold; nothing else does.
        """
        z = x / self.scale
        active = self._active(z, t, kth)
        if self.training and active.least is not None and len(z):
            moved = 0.9 * self.threshold + 0.1 * active.least  # a running mean
            self.threshold.copy_(active.least if self.threshold < 0 else moved)
        z_hat = self._rebuilt(active, t)
        loss = mse_loss(z_hat, z, reduction="sum") / len(z) + sparsity * active.penalty
        if active.gates is not None:  # trains the gates, not the decoder
            row = self.baseline(t).detach() if self.aux_lookup and self.lookup != "none" else 0.0
            rebuilt = sum_rows(active.gates, active.support, self.W_dec.detach())
            z_gate = rebuilt + self.b_dec.detach() + row
            loss = loss + mse_loss(z_gate, z, reduction="sum") / len(z)
        if aux_weight and "topk" in self.activation and dead is not None and dead.any():
            loss = loss + aux_weight * self.auxk(z, t, (z - z_hat).detach(), dead)
        codes, fired = active.codes.detach(), active.fired()
        return dict(loss=loss, z_hat=z_hat.detach(), fired=fired, codes=codes)

    def auxk(self, z: Tensor, t: Tensor | None, error: Tensor, dead: Tensor) -> Tensor:
        """AuxK (Gao et al. 2024): ||error - e_hat||^2, e_hat from the strongest dead features.

        The d_model / 2 strongest at each position; weighed less while fewer are dead. z and error
        (b, d) in units of `scale`, t (b,), dead (n,) bool.
        """
        W, bias, rows = self.W_enc[dead], self.b_enc[dead], self.W_dec[dead]
        half = max(1, self.d_model // 2)
        k = min(half, len(W))
        z, centre = self.encoder_input(z, t).detach(), self.b_dec.detach()
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
                with open(draft, "rb") as file:
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
            sae.load_state_dict(load_file(folder / WEIGHTS))
        except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"the SAE in {folder} is damaged or of another version ({error}): "
                             "save it again") from None
        wrong = [name for name, p in sae.named_parameters() if not torch.isfinite(p).all()]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} of the SAE in {folder} have NaN or infinite "
                             "values: train it again with a smaller rate")
        return sae.eval()
