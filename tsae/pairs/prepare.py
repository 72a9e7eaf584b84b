"""What a training run is given: the activations of one layer, stored or streamed, and statistics.

A `layer` is an lm.Layer, or anything with its members.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from tsae import store
from tsae.baseline import Context, Needs
from tsae.pairs.extract import NO_POSITION, Pair, activations, statistics
from tsae.pairs.order import Shuffled, Streamed
from tsae.pairs.shards import VERSION as STORE_VERSION
from tsae.pairs.shards import InContext, Pairs, Some, Store, norms, within

VERSION = 2  # of what is kept: raise it when the same rows and layer give other statistics or pairs
PLACE = store.CACHE / "activations"
MEDIAN_OF = 65536  # the first positions, whose median norm says what a sink is


@dataclass
class Data:
    """The activations of one layer, and what the start of an SAE needs from them.

    source(seed): an endless iterator of pairs with state() and restore(); stats: see
    extract.Moments, and `limit`, the norm over which an activation is a sink and left out, and
    `sinks`, how many were; unigrams (V, d) raw, sinks too; identity: what names the data; parts():
    its pairs once, in order, sinks left out (streamed: of the sample of `prepare`); needs: what
    their contexts hold.
    """

    source: Callable[[int], Iterator[Pair]]
    stats: dict[str, torch.Tensor]
    unigrams: torch.Tensor
    identity: dict
    parts: Callable[[], Iterator[Pair]] | None = None
    needs: Needs = Needs()

    @property
    def limit(self) -> float:
        return self.stats["limit"].item()

    def lone(self, ids: torch.Tensor) -> torch.Tensor:
        """Those of the token ids (m,) that are no sink when they stand alone after BOS."""
        return ids[self.unigrams[ids].norm(dim=-1) <= self.limit]

    def sinks(self, ids: torch.Tensor) -> dict[str, int]:
        """How many were left out: of the training positions (streamed: of the sample of `prepare`),
        and of ids (m,) that stand alone.
        """
        return dict(positions=int(self.stats["sinks"]), unigrams=len(ids) - len(self.lone(ids)))


def prepare(layer, rows: torch.Tensor, batch: int = 4096, buffer: int = 131072,
            store_gb: float = 20.0, folder: Path = PLACE, sample_rows: int = 20_000,
            rank: int = 0, world: int = 1, outliers: float = 10.0,
            needs: Needs = Needs()) -> Data:
    """Activations at `layer` over token rows (N, T), from a store made once or streamed.

    Sinks are left out: norms over `outliers` times the median of the first 65536 (0: none is). A
    store that would need more than `store_gb` is not made: the language model then runs during
    training, pairs are mixed in a buffer of `buffer` tokens, and `stats` come from one pass over
    the first `sample_rows` rows, of which nothing is kept. Unigrams and `stats` are kept in
    `folder`. Rank `rank` of `world` gets its share of every batch. t of the pairs is a Context of
    what `needs` asks for, where that is more than the token.
    """
    if not (outliers == 0 or outliers > 1):
        raise ValueError(f"outliers is {outliers}: a multiple of the median norm over 1 was "
                         "expected, or 0 to leave nothing out")
    if above := [n for n in needs.layers if n > layer.number]:
        raise ValueError(f"a baseline of layer {layer.number} cannot look at layer {above[0]}, "
                         "which comes after it: give an earlier one")
    if stored := fits(layer.d_model, rows, store_gb):
        pairs = _stored(layer, rows, store_gb, folder)
        identity, own = pairs.identity, dict(buffer=0)
    else:
        pairs, identity = None, _identity(layer, rows[:sample_rows])
        own = dict(buffer=buffer, sample=identity["rows"])
    key = store.key(vocabulary=layer.vocabulary, **layer.identity)
    unigrams = _kept(folder / f"unigrams-{key}.safetensors", lambda: dict(x=layer.unigrams()))["x"]
    own |= dict(outliers=outliers)
    key = store.key(vocabulary=layer.vocabulary, outliers=outliers, **identity)
    stats = _kept(folder / f"statistics-{key}.safetensors",
                  lambda: _measured(layer, rows[:sample_rows], pairs, outliers))
    left_out = stats.pop("left_out")
    if stored:
        pairs = _without(left_out, _in_context(layer, rows, pairs, needs, store_gb, folder))
    layers = {n: layer.other(n).residuals for n in needs.layers if n != layer.number}
    limit = stats["limit"].item()

    def source(seed: int) -> Iterator[Pair]:
        if stored:
            ahead = layer.device.type == "cuda"  # reads while the GPU works
            return Shuffled(pairs, batch, seed, ahead, rank, world)
        return Streamed(rows, layer.residuals, layer.keep, batch, buffer, seed, rank=rank,
                        world=world, limit=limit, needs=needs, layers=layers)

    def parts() -> Iterator[Pair]:
        if not stored:
            return activations(rows[:sample_rows], layer.residuals, layer.keep, limit=limit,
                               needs=needs, layers=layers)
        gathered = map(pairs.gather, torch.arange(len(pairs)).split(8192))
        return ((x.to(layer.device), t.to(layer.device)) for x, t in gathered)

    return Data(source, {name: value.to(layer.device) for name, value in stats.items()},
                unigrams.to(layer.device), identity | own | dict(batch=batch, rows=_digest(rows)),
                parts, needs)


def _without(left_out: torch.Tensor, pairs: Pairs | InContext) -> Pairs | InContext | Some:
    """`pairs` but for those at left_out (m,)."""
    if not len(left_out):
        return pairs
    kept = torch.ones(len(pairs), dtype=torch.bool)
    kept[left_out] = False
    return Some(pairs, kept.nonzero().squeeze(1))


def _in_context(layer, rows: torch.Tensor, pairs: Pairs, needs: Needs, store_gb: float,
                folder: Path) -> Pairs | InContext:
    """Stored `pairs` with what `needs` asks for beside them, if it is more than the token."""
    if not needs.more:
        return pairs
    layers = {n: _stored(layer.other(n), rows, store_gb, folder)
              for n in needs.layers if n != layer.number}
    found = [Needs(needs.grams, ()).context(part, {}) for part in rows.split(4096)]
    ids = [known.ids if isinstance(known, Context) else known.unsqueeze(-1) for known in found]
    kept = [layer.keep(part).cpu() for part in rows.split(4096)]
    ids = torch.cat([part[where].int() for part, where in zip(ids, kept)])
    return InContext(pairs, needs, ids, layers)


def _measured(layer, rows: torch.Tensor, pairs: Pairs | None,
              outliers: float) -> dict[str, torch.Tensor]:
    """`stats` of Data, and `left_out`, the places of sinks in stored `pairs`; None: of `rows`."""
    limit = torch.tensor(math.inf)
    if outliers:
        limit = outliers * _median_norm(pairs.parts if pairs else _rounded(layer, rows))
    if pairs:
        left_out = (~pairs.below(limit)).nonzero().squeeze(1)
        stats = pairs.statistics(layer.vocabulary, limit)
        return stats | dict(limit=limit, left_out=left_out, sinks=torch.tensor(len(left_out)))
    seen = 0

    def counted() -> Iterator[Pair]:
        nonlocal seen
        for x, t in _rounded(layer, rows):
            seen += len(t)
            yield within(x, t, limit)

    stats = statistics(counted(), layer.vocabulary)
    sinks = seen - stats["count"].sum().cpu()
    return stats | dict(limit=limit, left_out=torch.zeros(0, dtype=torch.long), sinks=sinks)


def _median_norm(parts: Iterable[Pair]) -> torch.Tensor:
    first, size = [], 0
    for x, _ in parts:
        first.append(norms(x[:MEDIAN_OF - size]).cpu())
        size += len(first[-1])
        if size == MEDIAN_OF:
            break
    if not size:
        raise ValueError(NO_POSITION)
    return torch.cat(first).median()


def _rounded(layer, rows: torch.Tensor) -> Iterator[Pair]:
    """Pairs straight from the language model, rounded as in a store."""
    parts = tqdm(activations(rows, layer.residuals, layer.keep), "statistics", -(-len(rows) // 64),
                 leave=False)
    return ((x.bfloat16(), t) for x, t in parts)


def held_out(layer, rows: torch.Tensor, limit: float = math.inf, store_gb: float = 20.0,
             folder: Path = PLACE, needs: Needs = Needs()
             ) -> tuple[torch.Tensor, torch.Tensor | Context, torch.Tensor]:
    """The pairs of token rows (N, T) in order, from a store, without sinks: norms over `limit`.

    Returns x (m, d) float32, t (m,) int64 (or its Context, as in `prepare`), and kept (N, T) bool,
    where in the rows they stand.
    """
    pairs = _stored(layer, rows, store_gb, folder)
    below, kept = pairs.below(limit), layer.keep(rows).cpu()
    pairs = _in_context(layer, rows, pairs, needs, store_gb, folder)
    x, t = pairs.gather(below.nonzero().squeeze(1))
    kept[kept.clone()] = below
    return x.to(layer.device), t.to(layer.device), kept


def fits(d_model: int, rows: torch.Tensor, store_gb: float) -> bool:
    """Whether `prepare` stores the activations of token rows (N, T), and does not stream them."""
    return rows.numel() * (2 * d_model + 4) < store_gb * 1e9


def _identity(layer, rows: torch.Tensor) -> dict:
    return layer.identity | dict(rows=_digest(rows), store=STORE_VERSION, statistics=VERSION)


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
