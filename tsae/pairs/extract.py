"""Pairs (x, t) from a language model's passes: residual activations x (b, d), the ids of their tokens t (b,)."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


NO_POSITION = "the rows hold special tokens only: there is no position to train on"


def activations(rows: torch.Tensor, residuals: Callable, keep: Callable, batch_rows: int = 64,
                order: torch.Tensor | None = None) -> Iterator[Pair]:
    """Pairs x (m, d) float32, t (m,) of the positions `keep` marks, in the `order` of rows (N, T), a pass at a time.

    Raises ValueError that names row, position and token when an activation is NaN or infinite.
    """
    order = torch.arange(len(rows)) if order is None else order
    for which in order.split(batch_rows):
        tokens = rows[which]
        x, kept = residuals(tokens), keep(tokens)
        if not torch.isfinite(x).all():
            row, position = (~torch.isfinite(x)).any(-1).nonzero()[0].tolist()
            raise ValueError(f"the language model gives NaN or infinite activations at row {int(which[row])} of the "
                             f"tokens, position {position}, token id {int(tokens[row, position])}: load it in float32, "
                             "or leave that document out")
        yield x[kept.to(x.device)], tokens[kept].to(x.device)


def estimate(pairs: int, d_model: int, dtype: torch.dtype = torch.bfloat16, copies: int = 1) -> int:
    """Bytes of so many pairs, each `d_model` entries of `dtype` and a 4-byte token id.

    A Store takes that on disk, a Memory in memory; `collect` (float32) and a Streamed (its `buffer`, and what one pass
    of the language model adds) need 2 `copies` while they put their pairs together.
    """
    return copies * pairs * (d_model * dtype.itemsize + 4)


class Moments:
    """What a start needs of pairs x (m, d), t (m,), added part by part: mean (d,), scale (rms entry of the centred x),
    count (V,) and sum (V, d) a token.

    No pair is kept; sums are float64, results float32, count int64.
    """

    def __init__(self, vocabulary: int):
        self.vocabulary, self.pairs, self.squares, self.count, self.total = vocabulary, 0, 0.0, None, None

    def add(self, x: torch.Tensor, t: torch.Tensor) -> None:
        """Raises ValueError for an id outside the vocabulary."""
        if self.total is None:
            self.count = torch.zeros(self.vocabulary, dtype=torch.long, device=x.device)
            self.total = torch.zeros(self.vocabulary, x.shape[1], dtype=torch.float64, device=x.device)
        for a, tokens in zip(x.split(8192), t.split(8192)):
            if not len(tokens):
                continue
            a, tokens = a.double(), tokens.to(x.device, torch.long)
            if tokens.max() >= self.vocabulary:
                raise ValueError(f"token id {int(tokens.max())} is outside the vocabulary of {self.vocabulary}: these "
                                 "activations belong to another language model")
            self.count += torch.bincount(tokens, minlength=self.vocabulary)
            self.total.index_add_(0, tokens, a)
            self.squares, self.pairs = self.squares + a.square().sum().item(), self.pairs + len(tokens)

    def result(self) -> dict[str, torch.Tensor]:
        """Raises ValueError where there was no pair, or an activation was NaN or infinite."""
        if not self.pairs:
            raise ValueError(NO_POSITION)
        if not math.isfinite(self.squares):
            raise ValueError("NaN or infinite activations are among them: choose another layer, or load the model as float32")
        mean = self.total.sum(0) / self.pairs
        scale = (self.squares / self.pairs - mean.square().sum()).div(len(mean)).clamp(min=0).sqrt()
        return dict(mean=mean.float(), scale=scale.float(), count=self.count, sum=self.total.float())


def statistics(parts: Iterable[Pair], vocabulary: int) -> dict[str, torch.Tensor]:
    """The `Moments` of parts (x, t), in one pass."""
    moments = Moments(vocabulary)
    for part in parts:
        moments.add(*part)
    return moments.result()
