"""What a training run is given: the activations of one layer, stored or streamed, and statistics.

A `layer` is an lm.Layer, or anything with its members.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from tsae import store
from tsae.pairs.extract import Pair, activations, statistics
from tsae.pairs.order import Shuffled, Streamed
from tsae.pairs.shards import VERSION as STORE_VERSION
from tsae.pairs.shards import Store

VERSION = 1  # of what is kept: raise it when the same rows and layer give other statistics or pairs
PLACE = store.CACHE / "activations"


@dataclass
class Data:
    """The activations of one layer, and what the start of an SAE needs from them.

    source(seed): an endless iterator of pairs with state() and restore(); stats: see
    extract.Moments; unigrams (V, d) raw; identity: what names the data.
    """

    source: Callable[[int], Iterator[Pair]]
    stats: dict[str, torch.Tensor]
    unigrams: torch.Tensor
    identity: dict


def prepare(layer, rows: torch.Tensor, batch: int = 4096, buffer: int = 131072,
            store_gb: float = 20.0, folder: Path = PLACE, sample_rows: int = 20_000,
            rank: int = 0, world: int = 1) -> Data:
    """Activations at `layer` over token rows (N, T), from a store made once or streamed.

    A store that would need more than `store_gb` is not made: the language model then runs during
    training, pairs are mixed in a buffer of `buffer` tokens, and `stats` come from one pass over
    the first `sample_rows` rows, of which nothing is kept. Unigrams and `stats` are kept in
    `folder`. Rank `rank` of `world` gets its share of every batch.
    """
    if stored := fits(layer.d_model, rows, store_gb):
        pairs = _stored(layer, rows, store_gb, folder)
        identity, own = pairs.identity, dict(buffer=0)
    else:
        identity = _identity(layer, rows[:sample_rows])
        own = dict(buffer=buffer, sample=identity["rows"])

    def measured() -> dict[str, torch.Tensor]:
        if stored:
            return pairs.statistics(layer.vocabulary)
        return _sampled(layer, rows[:sample_rows])

    key = store.key(vocabulary=layer.vocabulary, **identity)
    unigrams = _kept(folder / f"unigrams-{key}.safetensors", lambda: dict(x=layer.unigrams()))["x"]
    stats = _kept(folder / f"statistics-{key}.safetensors", measured)

    def source(seed: int) -> Iterator[Pair]:
        if stored:
            ahead = layer.device.type == "cuda"  # reads while the GPU works
            return Shuffled(pairs, batch, seed, ahead, rank, world)
        return Streamed(rows, layer.residuals, layer.keep, batch, buffer, seed, rank=rank,
                        world=world)

    return Data(source, {name: value.to(layer.device) for name, value in stats.items()},
                unigrams.to(layer.device), identity | own | dict(batch=batch, rows=_digest(rows)))


def held_out(layer, rows: torch.Tensor, store_gb: float = 20.0, folder: Path = PLACE) -> Pair:
    """All pairs of token rows (N, T) in order, from a store: x (m, d) float32, t (m,) int64."""
    pairs = _stored(layer, rows, store_gb, folder)
    x, t = pairs.gather(torch.arange(len(pairs)))
    return x.to(layer.device), t.to(layer.device)


def fits(d_model: int, rows: torch.Tensor, store_gb: float) -> bool:
    """Whether `prepare` stores the activations of token rows (N, T), and does not stream them."""
    return rows.numel() * (2 * d_model + 4) < store_gb * 1e9


def _identity(layer, rows: torch.Tensor) -> dict:
    return layer.identity | dict(rows=_digest(rows), store=STORE_VERSION, statistics=VERSION)


def _sampled(layer, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics straight from the language model, of activations rounded as in a store."""
    parts = tqdm(activations(rows, layer.residuals, layer.keep), "statistics", -(-len(rows) // 64),
                 leave=False)
    return statistics(((x.bfloat16(), t) for x, t in parts), layer.vocabulary)


def _stored(layer, rows: torch.Tensor, store_gb: float, folder: Path) -> Store:
    identity = _identity(layer, rows)
    return Store.make(folder / store.key(**identity), rows, layer.residuals, layer.keep,
                      layer.d_model, identity, max_gb=store_gb)


def _kept(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What lies at `path`, made where it is missing or damaged."""
    if (tensors := store.read_tensors(path)) is None:
        store.write_tensors(path, make())
        tensors = store.read_tensors(path)
    return tensors


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
