"""Pairs (x, t) from a language model: residual activations x (m, d), ids of their tokens t (m,)."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

Pair = tuple[torch.Tensor, torch.Tensor]

NO_POSITION = "the rows hold special tokens only: there is no position to train on"


def activations(rows: torch.Tensor, residuals: Callable, keep: Callable, batch_rows: int = 64,
                order: torch.Tensor | None = None) -> Iterator[Pair]:
    """Pairs x (m, d) float32, t (m,) of the positions that are kept, one pass at a time.

    A pass takes `batch_rows` of the token rows (N, T), in the `order` (N',) int64 that is given.
    residuals(tokens (b, T)) -> (b, T, d); keep(tokens (b, T)) -> (b, T) bool. Raises ValueError where
    an activation is NaN or infinite; it names the row, the position and the token.
    """
    order = torch.arange(len(rows)) if order is None else order
    for which in order.split(batch_rows):
        tokens = rows[which]
        x, kept = residuals(tokens), keep(tokens)
        _check_finite(x, tokens, which)
        yield x[kept.to(x.device)], tokens[kept].to(x.device)


def _check_finite(x: torch.Tensor, tokens: torch.Tensor, which: torch.Tensor) -> None:
    if not torch.isfinite(x).all():
        row, position = (~torch.isfinite(x)).any(-1).nonzero()[0].tolist()
        raise ValueError("the language model gives NaN or infinite activations at row "
                         f"{int(which[row])} of the tokens, position {position}, token id "
                         f"{int(tokens[row, position])}: load it in float32, or leave that document "
                         "out")


class Moments:
    """What the start of an SAE needs to know of pairs, summed in float64 so that none is kept.

    `add` takes pairs part by part. `result` gives mean (d,), scale () (the rms entry of the centred
    activations), and for each token of the vocabulary its count (V,) int64 and sum (V, d); float32.
    """

    def __init__(self, vocabulary: int):
        self.vocabulary, self.seen, self.squares = vocabulary, 0, 0.0
        self.count: torch.Tensor | None = None
        self.sum: torch.Tensor | None = None

    def add(self, x: torch.Tensor, t: torch.Tensor) -> None:
        """Add pairs x (m, d), t (m,). Raises ValueError for an id outside the vocabulary."""
        if self.sum is None:
            V, d = self.vocabulary, x.shape[1]
            self.count = torch.zeros(V, dtype=torch.long, device=x.device)
            self.sum = torch.zeros(V, d, dtype=torch.float64, device=x.device)
        for a, tokens in zip(x.split(8192), t.split(8192)):  # a float64 copy of all would be large
            if len(tokens):
                self._add(a.double(), tokens.to(x.device, torch.long))

    def _add(self, a: torch.Tensor, tokens: torch.Tensor) -> None:
        if tokens.max() >= self.vocabulary:
            raise ValueError(f"token id {int(tokens.max())} is outside the vocabulary of "
                             f"{self.vocabulary}: these activations belong to another language "
                             "model")
        self.count += torch.bincount(tokens, minlength=self.vocabulary)
        self.sum.index_add_(0, tokens, a)
        self.squares += a.square().sum().item()
        self.seen += len(tokens)

    def result(self) -> dict[str, torch.Tensor]:
        """Raises ValueError where there was no pair, or an activation was NaN or infinite."""
        if not self.seen:
            raise ValueError(NO_POSITION)
        if not math.isfinite(self.squares):
            raise ValueError("NaN or infinite activations are among them: choose another layer, or "
                             "load the model as float32")
        mean = self.sum.sum(0) / self.seen
        variance = (self.squares / self.seen - mean.square().sum()).div(len(mean)).clamp(min=0)
        return dict(mean=mean.float(), scale=variance.sqrt().float(), count=self.count,
                    sum=self.sum.float())


def statistics(parts: Iterable[Pair], vocabulary: int) -> dict[str, torch.Tensor]:
    """The `Moments` of parts (x, t), in one pass."""
    moments = Moments(vocabulary)
    for x, t in parts:
        moments.add(x, t)
    return moments.result()
