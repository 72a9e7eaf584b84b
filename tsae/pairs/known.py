"""What is known without features, fitted to the training pairs: where each baseline starts.

Every function takes pairs.prepare.Data and gives a baseline.Baseline in units of its scale, whose
rows are what the context says beyond the mean activation. Training may then move it: `learned`.
"""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tsae.baseline import (
    Affine,
    Baseline,
    Earlier,
    Factored,
    Grams,
    Hashed,
    Needs,
    Tokens,
    conditional_mean,
)
from tsae.pairs.prepare import Data

PRIOR = 4.0  # an n-gram's mean is shrunk as if it was seen so often without an effect
POOL = 2**26  # numbers that the sums of candidate n-grams may take: the commonest are candidates
RIDGE = 1e-3  # of a regression, as a share of the inputs' mean square


def token_means(data: Data, learned: bool = True) -> Tokens:
    """The shrunk mean of each token: the token table's usual start, or frozen."""
    known = Tokens(len(data.stats["mean"]), len(data.unigrams), learned)
    return _filled(data, known, W_lookup=_deviations(data))


def shuffled_means(data: Data, seed: int = 0, learned: bool = True) -> Tokens:
    """The same rows dealt to other tokens among those seen: a table that knows nothing."""
    rows, seen = _deviations(data), (data.stats["count"] > 0).nonzero().squeeze(1)
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
    rows[seen] = rows[seen[order.to(seen.device)]]
    return _filled(data, Tokens(rows.shape[1], len(rows), learned), W_lookup=rows)


def embedding_map(data: Data, embedding: Tensor, learned: bool = True) -> Factored:
    """The best linear map of the token's `embedding` (V, e): least squares over positions."""
    weight = (data.stats["count"] / data.stats["count"].sum()).double()
    left = embedding.to(weight.device, torch.float64)
    left = left - weight @ left
    left /= (weight @ left.square().mean(1)).sqrt()
    rows = _deviations(data, prior=1e-9).double()  # weighed by count: nothing to shrink
    right = _solved(left.T @ (weight[:, None] * left), left.T @ (weight[:, None] * rows))
    known = Factored(rows.shape[1], len(left), left.shape[1], left_learned=False, learned=learned)
    return _filled(data, known, left=left, right=right)


def low_rank(data: Data, rank: int, learned: bool = True) -> Factored:
    """The token means in their first `rank` directions, a table of V x rank and a map."""
    rows = _deviations(data)
    weight = data.stats["count"] / data.stats["count"].sum()
    right = _first(rows.T @ (weight[:, None] * rows), rank)
    known = Factored(rows.shape[1], len(rows), rank, learned=learned)
    return _filled(data, known, left=rows @ right.T, right=right)


def grams(data: Data, rows: list[int], learned: bool = True, least: int = 4) -> Grams:
    """Token means, and corrections for the n-grams that pay for a row: rows[0] bigrams, and so on.

    An n-gram pays by the energy that its mean explains beyond its shorter suffix, less what chance
    would give: |sum|^2 / count - the mean square of a position. Seen `least` times or more. The
    data must hold Contexts of len(rows) + 1 tokens.
    """
    _check(data, Needs(len(rows) + 1))
    known = Grams(len(data.stats["mean"]), len(data.unigrams), [0] * len(rows), learned)
    known = _filled(data, known, W_lookup=_deviations(data))
    width = known.W_lookup.shape[1]
    for order, most in enumerate(rows, 2):
        keys, counts = _candidates(data, known, order, least, max(4 * most, POOL // width))
        sums, square = torch.zeros(len(keys), width), 0.0
        with torch.no_grad():
            for x, t in tqdm(data.parts(), f"{order}-grams", leave=False):
                rest = ((x - data.stats["mean"]) / data.stats["scale"] - known(t)).cpu()
                square += rest.square().sum().item()
                which, found = _place(keys, known.key(t.ids[:, :order].cpu()))
                sums.index_add_(0, which[found], rest[found])
        usual = square / int(data.stats["count"].sum())
        gain = torch.linalg.vector_norm(sums, dim=1) ** 2 / counts - usual
        paying = gain.argsort(descending=True)[:most]
        paying = paying[gain[paying] > 0].sort().values
        means = sums[paying] / (counts[paying, None] + PRIOR)
        known = _extended(data, known, order, keys[paying], means)
    return known


def hashed(data: Data, rows: int, longest: int = 3, heads: int = 2, strings: list[str] = (),
           learned: bool = True) -> Hashed:
    """Token means, and `rows` rows at zero that n-grams up to `longest` tokens share by their hash.

    `strings`: the text of the V tokens; tokens alike but for case and outer space count as one.
    """
    known = Hashed(len(data.stats["mean"]), len(data.unigrams), rows, longest, heads, learned)
    table = torch.zeros(known.W_lookup.shape)
    table[:len(data.unigrams)] = _deviations(data)
    first = {}
    canonical = torch.tensor([first.setdefault(text.strip().lower() or text, i)
                              for i, text in enumerate(strings)], dtype=torch.long)
    values = dict(canonical=canonical) if len(strings) else {}
    return _filled(data, known, W_lookup=table, **values)


def layer_map(data: Data, layer: int, rank: int = 0, learned: bool = True) -> Affine:
    """The best affine map of the activation at another layer: least squares over positions.

    `rank` > 0: in its first directions only. The data must hold Contexts with that layer.
    ValueError for the layer of the data itself, which explains all of it.
    """
    _check(data, Needs(layers=(layer,)))
    if layer == data.identity.get("layer"):
        raise ValueError(f"layer {layer} is that of the data: give an earlier one")
    scale = data.stats["scale"].item()
    first = next(data.parts())[1].layers[layer]
    limit = 10 * first.norm(dim=-1).median().item()
    known = Affine(len(data.stats["mean"]), layer, first.shape[1], scale, 0, limit, learned)
    known = known.to(first.device)
    seen, count = torch.zeros(first.shape[1], dtype=torch.float64, device=first.device), 0
    inner, outer = 0.0, 0.0
    for x, t in tqdm(data.parts(), f"layer {layer}", leave=False):
        u = known.seen(t.layers[layer]).double()
        z = ((x - data.stats["mean"]) / data.stats["scale"]).double()
        seen, count = seen + u.sum(0), count + len(u)
        inner, outer = inner + u.T @ u, outer + u.T @ z
    mean = seen / count
    left = _solved(inner / count - mean[:, None] * mean, outer / count)
    found = dict(left=left, centre=mean.float() * scale)
    if rank:
        right = _first(left.T @ (inner / count - mean[:, None] * mean) @ left, rank)
        known = Affine(right.shape[1], layer, first.shape[1], scale, rank, limit, learned)
        found |= dict(left=left.float() @ right.T, right=right)
    return _filled(data, known, **found)


def principal(data: Data, layer: int, rank: int) -> Affine:
    """The first `rank` principal directions of the activation itself, at its own `layer`: frozen.

    The data must hold Contexts with that layer.
    """
    _check(data, Needs(layers=(layer,)))
    mean, covariance = data.stats["mean"], 0.0
    for x, _ in tqdm(data.parts(), "directions", leave=False):
        covariance = covariance + (x - mean).T.double() @ (x - mean).double()
    right = _first(covariance, rank)
    scale = data.stats["scale"].item()
    known = Affine(len(mean), layer, len(mean), scale, rank, learned=False)
    return _filled(data, known, left=right.T, right=right, centre=mean)


def earlier(data: Data, sae, layer: int) -> Earlier:
    """The reconstruction of a trained SAE of `layer`. The data must hold Contexts with that layer.

    The SAE that learns beside it sees what the first one left.
    """
    _check(data, Needs(layers=(layer,)) | sae.baseline.needs)
    known = Earlier(len(data.stats["mean"]), layer, data.stats["scale"].item(), sae)
    known = known.to(data.unigrams.device)
    sums = sum(known(t).sum(0) for _, t in data.parts())
    known.mean = sums / int(data.stats["count"].sum())
    return known


def needs_of(*baselines: Baseline) -> Needs:
    """What pairs must hold so that SAEs with all of these baselines can be trained on them."""
    needs = Needs()
    for each in baselines:
        needs = needs | each.needs
    return needs


def _deviations(data: Data, prior: float = PRIOR) -> Tensor:
    """The shrunk token means (V, d) less the overall mean, in units of the scale."""
    return (conditional_mean(data.stats, prior) - data.stats["mean"]) / data.stats["scale"]


def _check(data: Data, needs: Needs) -> None:
    """Raises ValueError where the contexts of the data lack what a fit looks at."""
    if data.needs | needs != data.needs:
        raise ValueError(f"this baseline needs {needs}, and the data were prepared with "
                         f"{data.needs}: pass needs={needs} to prepare")


@torch.no_grad()
def _filled(data: Data, known: Baseline, **values: Tensor) -> Baseline:
    """`known` with these values, on the device of the data; its `mean` is that of its tokens."""
    known = known.to(data.unigrams.device)
    for name, value in values.items():
        getattr(known, name).copy_(value)
    if (rows := known.token_rows()) is not None:
        known.mean = data.stats["count"] / data.stats["count"].sum() @ rows
    return known


def _solved(inner: Tensor, outer: Tensor) -> Tensor:
    """Least squares with a small ridge: inner (e, e), outer (e, d), float64 -> (e, d)."""
    ridge = RIDGE * inner.diagonal().mean() * torch.eye(len(inner)).to(inner)
    return torch.linalg.solve(inner + ridge, outer)


def _first(covariance: Tensor, rank: int) -> Tensor:
    """Its `rank` first eigenvectors (rank, d), largest first. ValueError for too many."""
    if not 1 <= rank <= len(covariance):
        raise ValueError(f"{rank} directions of {len(covariance)} were asked for: expected 1 or "
                         f"more, and {len(covariance)} at most")
    return torch.linalg.eigh(covariance.double()).eigenvectors.flip(1)[:, :rank].T.float()


def _candidates(data: Data, known: Grams, order: int, least: int,
                most: int) -> tuple[Tensor, Tensor]:
    """Keys (c,) ascending and counts (c,) of n-grams seen `least` times, the `most` commonest."""
    seen = []
    for _, t in data.parts():
        ids = t.ids[:, :order].cpu()
        seen.append(known.key(ids[(ids >= 0).all(1)]).numpy())
    keys, counts = np.unique(np.concatenate(seen), return_counts=True)
    common = np.flatnonzero(counts >= least)
    common = np.sort(common[np.argsort(-counts[common], kind="stable")[:most]])
    return torch.from_numpy(keys[common]), torch.from_numpy(counts[common]).float()


def _place(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where in keys (c,) each wanted (b,) stands, and whether it does."""
    if not len(keys):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    return place, keys[place] == wanted


def _extended(data: Data, known: Grams, order: int, keys: Tensor, means: Tensor) -> Grams:
    """`known` with rows for the n-grams of an order, which had none."""
    config = dict(known.config)
    rows = [len(keys) if n == order else old for n, old in enumerate(config["rows"], 2)]
    larger = Grams(config["d_model"], config["vocabulary"], rows, config["learned"])
    table = torch.cat([known.W_lookup.detach(), means.to(known.W_lookup.device)])
    keys = torch.cat([known.keys, keys.to(known.keys.device)])
    return _filled(data, larger, W_lookup=table, keys=keys)
