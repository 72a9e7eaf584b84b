"""Pairs (x, t) from a language model: residual activations x (m, d), ids of their tokens t (m,)."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from tsae.baseline import Context, Needs

Pair = tuple[torch.Tensor, torch.Tensor | Context]
NO_POSITION = "the rows hold special tokens only: there is no position to train on"


def activations(rows: torch.Tensor, residuals: Callable, keep: Callable, batch_rows: int = 64,
                order: torch.Tensor | None = None, limit: float = math.inf,
                needs: Needs = Needs(),
                layers: dict[int, Callable] | None = None) -> Iterator[Pair]:
    """Pairs x (m, d) float32, t (m,) of the positions that are kept, one pass at a time.

    A pass takes `batch_rows` of the token rows (N, T), in `order`. residuals(tokens (b, T)) ->
    (b, T, d); keep(tokens (b, T)) -> (b, T) bool. Sinks are left out: an x with a norm over
    `limit`. ValueError for a NaN or infinite activation. Where `needs` has more than the token, t
    is the Context it asks for; `layers` has the `residuals` of other layers in it.
    """
    order = torch.arange(len(rows)) if order is None else order
    for which in order.split(batch_rows):
        tokens = rows[which]
        x, kept = residuals(tokens), keep(tokens)
        finite = torch.isfinite(x)
        if not finite.all():
            row, position = (~finite).any(-1).nonzero()[0].tolist()
            raise ValueError(f"NaN or infinite activations at row {int(which[row])} of the tokens, "
                             f"position {position}, token id {int(tokens[row, position])}: load "
                             "the language model in float32, or leave that document out")
        kept = kept.to(x.device) & (x.norm(dim=-1) <= limit)
        tokens = tokens.to(x.device)
        others = {n: layers[n](tokens) if layers and n in layers else x for n in needs.layers}
        yield x[kept], needs.context(tokens, others)[kept]


class Moments:
    """What the start of an SAE needs of pairs x (m, d), t (m,), which are added part by part.

    mean (d,), scale (the rms entry of the centred x), and for each token count (V,) and sum (V, d).
    Sums are float64, results float32, count int64. ValueError for no pair, NaN, foreign ids.
    """

    def __init__(self, vocabulary: int):
        self.vocabulary, self.seen, self.squares = vocabulary, 0, 0.0
        self.count = self.sum = None

    def add(self, x: torch.Tensor, t: torch.Tensor) -> None:
        if self.sum is None:
            self.count = torch.zeros(self.vocabulary, dtype=torch.long, device=x.device)
            self.sum = x.new_zeros(self.vocabulary, x.shape[1], dtype=torch.float64)
        for a, tokens in zip(x.split(8192), t.split(8192)):  # a float64 copy of all would be large
            a, tokens = a.double(), tokens.to(x.device, torch.long)
            if (tokens >= self.vocabulary).any():
                raise ValueError(f"token id {int(tokens.max())} is outside the vocabulary of "
                                 f"{self.vocabulary}: these activations are of another model")
            self.count += torch.bincount(tokens, minlength=self.vocabulary)
            self.sum.index_add_(0, tokens, a)
            self.squares += a.square().sum().item()
            self.seen += len(tokens)

    def result(self) -> dict[str, torch.Tensor]:
        if not self.seen:
            raise ValueError(NO_POSITION)
        if not math.isfinite(self.squares):
            raise ValueError("NaN or infinite activations: choose another layer, or load float32")
        mean = self.sum.sum(0) / self.seen
        scale = (self.squares / self.seen - mean.square().sum()).div(len(mean)).clamp(min=0).sqrt()
        return dict(mean=mean.float(), scale=scale.float(), count=self.count, sum=self.sum.float())


def statistics(parts: Iterable[Pair], vocabulary: int) -> dict[str, torch.Tensor]:
    """The `Moments` of parts (x, t), in one pass."""
    moments = Moments(vocabulary)
    for x, t in parts:
        moments.add(x, t)
    return moments.result()
