"""One topk SAE whose features are dealt to the ranks: for dictionaries that outgrow a device."""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss, pad

from tsae.kernels import Support, kth_largest, select_top, sum_rows
from tsae.sae import SAE, Known, KthLargest, Row
from tsae.scale.parallel import any_rank, gathered, main, rank, together, world


class Sharded(SAE):
    """A topk SAE of which each rank holds whole.n / world features, and all b_dec and the table.

    Every rank brings its share of the batch, as in data-parallel training, and meets all shares
    with its features. Trained by scale.passes it learns what the whole SAE would; for anything else
    but `self(x, t)` take `whole()`.
    """

    sharded = ("W_enc", "b_enc", "W_dec")

    def __init__(self, whole: SAE):
        if whole.activation != "topk" or whole.n % world():
            raise ValueError(f"a {whole.activation} SAE of {whole.n} features cannot be dealt to "
                             f"{world()} ranks: it must be a topk SAE, and its number of features "
                             "a multiple of the ranks")
        nn.Module.__init__(self)
        self._configure(whole.config | dict(n=whole.n // world()))
        self.baseline = copy.deepcopy(whole.baseline)
        for name, p in whole.named_parameters(recurse=False):
            mine = p.detach().chunk(world())[rank()] if name in self.sharded else p.detach()
            setattr(self, name, nn.Parameter(mine.clone(), requires_grad=p.requires_grad))

    def whole(self) -> SAE | None:
        """The ordinary SAE, in rank 0's main memory; None on the others. All ranks must call it."""
        whole = None
        if main():
            whole = SAE(**self.config | dict(n=self.n * world())).to(self.b_dec.dtype).eval()
        for name, value in self.state_dict().items():
            value = value.cpu()
            if together() and name in self.sharded:
                parts = list(whole.state_dict()[name].chunk(world())) if main() else None
                dist.gather(value, parts)
            elif main():
                whole.state_dict()[name].copy_(value)
        return whole

    def save(self, folder: str | Path) -> Path:
        """Save the whole SAE, from rank 0. All ranks must call it."""
        whole = self.whole()
        if main():
            whole.save(folder)
        any_rank(0)
        return Path(folder)

    def encode(self, *_):
        raise NotImplementedError("a sharded SAE has no codes of its own: take its whole()")

    decode = encode

    def forward(self, x: torch.Tensor, t: Known = None) -> torch.Tensor:
        """The reconstruction of this rank's x (b, d). All ranks call it, with as many rows each."""
        row = self._row(x, t)
        codes, support = self.selected(x / self.scale, row)
        rebuilt = _Sum.apply(sum_rows(codes, support, self.W_dec))
        return (rebuilt + self.b_dec + row) * self.scale

    def selected(self, z: torch.Tensor, row: Row) -> tuple[torch.Tensor, Support]:
        """Codes (world * b, k) of this rank's features for all ranks' z (b, d).

        They are 0.0 where other ranks' features are stronger.
        """
        return self._selected(_Gather.apply(self.encoder_input(z, row)))

    def _selected(self, z: torch.Tensor) -> tuple[torch.Tensor, Support]:
        codes, support = select_top(z, self.b_dec, self.W_enc, self.b_enc, min(self.k, self.n))
        return codes * _among_largest(codes.detach(), self.k), support

    def loss(self, x: torch.Tensor, t: Known = None, sparsity: float = 0.0,
             dead: torch.Tensor | None = None, aux_weight: float = 1 / 32,
             kth: KthLargest = kth_largest) -> dict[str, torch.Tensor]:
        """SAE.loss of this rank's share of the batch; fired (n,) and codes: its own features'."""
        z, row = x / self.scale, self._row(x, t)
        seen = _Gather.apply(self.encoder_input(z, row))
        codes, support = self._selected(seen)
        parts = [sum_rows(codes, support, self.W_dec)]
        auxk = aux_weight and dead is not None
        dead_of_ranks = gathered(dead.sum().view(1)).tolist() if auxk else [0]
        if any(dead_of_ranks):
            parts.append(self._explained(seen.detach(), dead, dead_of_ranks))
        rebuilt, *explained = _Sum.apply(torch.stack(parts, 1)).unbind(1)
        z_hat = rebuilt + self.b_dec + row
        loss = mse_loss(z_hat, z, reduction="sum") / len(z)
        if explained:
            weight = aux_weight * min(1.0, sum(dead_of_ranks) / max(1, self.d_model // 2))
            error = (z - z_hat).detach()
            loss = loss + weight * mse_loss(explained[0], error, reduction="sum") / len(z)
        fired = torch.zeros(self.n, dtype=torch.bool, device=x.device)
        fired.index_fill_(0, support.index[codes > 0], True)
        return dict(loss=loss, z_hat=z_hat.detach(), fired=fired, codes=codes.detach())

    def _explained(self, z: torch.Tensor, dead: torch.Tensor,
                   dead_of_ranks: list[int]) -> torch.Tensor:
        """This rank's part of the sum of the d_model / 2 strongest dead features of all ranks.

        z (world * b, d) in, (world * b, d) out.
        """
        k = min(max(1, self.d_model // 2), sum(dead_of_ranks))
        W, bias, rows = self.W_enc[dead], self.b_enc[dead], self.W_dec[dead]
        columns, own = min(k, max(dead_of_ranks)), min(k, len(W))
        if not own:  # the others need an answer all the same
            _among_largest(z.new_zeros(len(z), columns), k)
            return torch.zeros_like(z)
        codes, support = select_top(z, self.b_dec.detach(), W, bias, own)
        kept = _among_largest(pad(codes.detach(), (0, columns - own)), k)[:, :own]
        return sum_rows(codes * kept, support, rows)


def _among_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """1.0 at the k largest of all ranks' values (world * b, c) at each position, else 0.0.

    Exactly k are. Each rank decides for the b positions that it brought: it is sent the others'
    values there, and answers.
    """
    sent = _exchanged(values.view(world(), -1, values.shape[1]))  # (whose features, b, c)
    flat = sent.transpose(0, 1).flatten(1)
    largest = flat.topk(min(k, flat.shape[1]), sorted=False).indices
    kept = torch.zeros_like(flat).scatter_(1, largest, 1.0)
    return _exchanged(kept.view(sent.shape[1], world(), -1).transpose(0, 1)).view(values.shape)


def _exchanged(x: torch.Tensor) -> torch.Tensor:
    """x[r] goes to rank r; from (world, ...) to (world, ...)."""
    if not together():
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


def _summed(x: torch.Tensor) -> torch.Tensor:
    """This rank's rows (b, ...) of the sum over ranks of x (world * b, ...)."""
    if not together():
        return x
    out = x.new_empty(len(x) // world(), *x.shape[1:])
    dist.reduce_scatter_single(out, x.contiguous())
    return out


class _Gather(torch.autograd.Function):
    """`gathered`, whose derivative is `_summed`."""

    @staticmethod
    def forward(ctx, x):
        return gathered(x)

    @staticmethod
    def backward(ctx, g):
        return _summed(g)


class _Sum(torch.autograd.Function):
    """`_summed`, whose derivative is `gathered`."""

    @staticmethod
    def forward(ctx, x):
        return _summed(x)

    @staticmethod
    def backward(ctx, g):
        return gathered(g)
