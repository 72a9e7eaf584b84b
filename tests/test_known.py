"""Oracle: planted effects of n-grams, maps and layers that the fits must find, and loops over positions."""

from collections import defaultdict

import pytest
import torch
from contexts import BELOW, LAYER, WIDTH, D, V, rows

from tsae.baseline import Context, Needs, conditional_mean
from tsae.pairs import known as fits
from tsae.pairs.extract import statistics
from tsae.pairs.order import Shuffled
from tsae.pairs.prepare import Data
from tsae.pairs.shards import InContext, Memory
from tsae.sae import SAE
from tsae.scale.sweep import sweep, trained
from tsae.train import RECIPES, build

M = 5800


def data_of(x: torch.Tensor, ids: torch.Tensor, below: torch.Tensor | None = None, batch: int = 50) -> Data:
    """Data of pairs in memory, whose contexts hold three ids, x itself and a layer below."""
    needs = Needs(3, (LAYER,) if below is None else (BELOW, LAYER))
    layers = {} if below is None else {BELOW: Memory(below, ids[:, 0])}
    pairs = InContext(Memory(x, ids[:, 0]), needs, ids, layers)
    return Data(lambda seed: Shuffled(pairs, batch, seed), statistics([(x, ids[:, 0])], V), torch.zeros(V, x.shape[1]),
                dict(batch=batch, made="here"), lambda: (pairs.gather(part) for part in torch.arange(len(x)).split(700)), needs)


def stream(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """ids (M, 3) of random text, the effect of each token on x (M, D), and the generator after them."""
    tokens = rows(M // 29, seed=seed)
    ids = Needs(3).context(tokens, {}).ids[tokens != 0]
    g = torch.Generator().manual_seed(seed)
    return ids, torch.randn(V, D, generator=g)[ids[:, 0]], g


def test_token_means_are_those_of_the_table_that_training_starts_from():
    ids, x, g = stream()
    x = x + torch.randn(M, D, generator=g)
    data = data_of(x, ids)
    found = fits.token_means(data)
    assert torch.allclose(found.W_lookup * data.stats["scale"] + data.stats["mean"], conditional_mean(data.stats), atol=1e-5)
    dealt = fits.shuffled_means(data, seed=1)
    seen = data.stats["count"] > 0
    assert torch.equal(dealt.W_lookup[seen].sort(0).values, found.W_lookup[seen].sort(0).values)  # the same rows
    assert not torch.equal(dealt.W_lookup, found.W_lookup) and not fits.token_means(data, False).W_lookup.requires_grad


def test_ngrams_that_pay_get_the_row_that_a_loop_gives_them():
    ids, x, g = stream()
    planted = {(2, 3): 3.0, (5, 1): -2.0, (4, 2, 6): 4.0}  # newest first: what they add to every coordinate
    for gram, effect in planted.items():
        x = x + effect * (ids[:, :len(gram)] == torch.tensor(gram)).all(1)[:, None]
    x = x + 0.3 * torch.randn(M, D, generator=g)
    data = data_of(x, ids)
    found = fits.grams(data, [2, 1])
    assert found.config["rows"] == [2, 1]
    assert sorted(found.keys[:2].tolist()) == sorted([2 + 3 * V, 5 + 1 * V]) and found.keys[2] == 4 + 2 * V + 6 * V**2
    z = (x - data.stats["mean"]) / data.stats["scale"]
    token = fits.token_means(data).W_lookup
    rest = z - token[ids[:, 0]]
    for gram in ((2, 3), (5, 1)):
        where = (ids[:, :2] == torch.tensor(gram)).all(1)
        row = found.W_lookup[V + found.keys[:2].tolist().index(gram[0] + gram[1] * V)]
        assert torch.allclose(row, rest[where].sum(0) / (where.sum() + fits.PRIOR), atol=1e-4)
    where = (ids == torch.tensor((4, 2, 6))).all(1)
    longest = rest[where].sum(0) / (where.sum() + fits.PRIOR)  # no bigram with a row is its suffix
    assert torch.allclose(found.W_lookup[-1], longest, atol=1e-4)
    explained = 1 - (z - found(Context(ids))).square().sum() / z.square().sum()
    alone = 1 - rest.square().sum() / z.square().sum()
    assert explained > alone + 0.03


def test_ngrams_that_explain_no_more_than_chance_get_no_row():
    """On noise the gain of about half of the bigrams is below 0."""
    ids, x, g = stream()
    noise = x + torch.randn(M, D, generator=g)
    data = data_of(noise, ids)
    every = len(ids[:, :2].unique(dim=0)) - 6  # but for those that begin a row
    found = fits.grams(data, [every, 0])
    assert 0 < found.config["rows"][0] < 0.5 * every
    rows_of_grams = found.W_lookup[V:].detach().norm(dim=1)
    assert rows_of_grams.max() < 0.5 * found.W_lookup[:V].detach().norm(dim=1).mean()


def test_a_map_of_the_embedding_is_least_squares_over_positions():
    ids, _, g = stream()
    E, A = torch.randn(V, 4, generator=g), torch.randn(4, D, generator=g)
    x = E[ids[:, 0]] @ A + 1.0
    data = data_of(x, ids)
    exact = fits.embedding_map(data, E)
    assert torch.allclose(exact(ids[:, 0]) * data.stats["scale"] + data.stats["mean"], x, atol=0.02)
    x = x + torch.randn(V, D, generator=g)[ids[:, 0]] + torch.randn(M, D, generator=g)
    data = data_of(x, ids)
    found = fits.embedding_map(data, E)
    assert not found.left.requires_grad and found.right.requires_grad
    z = ((x - data.stats["mean"]) / data.stats["scale"]).double()
    design = torch.cat([E[ids[:, 0]], torch.ones(M, 1)], 1).double()
    best = design @ torch.linalg.lstsq(design, z).solution
    assert torch.allclose(found(ids[:, 0]).double(), best, atol=0.02)


def test_a_table_of_low_rank_keeps_the_first_directions():
    ids, x, g = stream()
    x = x + 0.1 * torch.randn(M, D, generator=g)
    data = data_of(x, ids)
    whole, errors = fits.token_means(data).W_lookup, []
    weight = data.stats["count"] / M
    for rank in (1, 3, D):
        found = fits.low_rank(data, rank)
        assert found.left.shape == (V, rank) and found.token_rows().shape == (V, D)
        errors.append((weight @ (found.token_rows() - whole).square().sum(1)).item())
    U, S, _ = torch.linalg.svd(weight.sqrt()[:, None] * whole.detach())
    assert errors == pytest.approx([S[rank:].square().sum().item() for rank in (1, 3, D)], abs=1e-4)  # Eckart and Young
    with pytest.raises(ValueError, match="13 directions of 12"):
        fits.low_rank(data, D + 1)


def test_the_map_of_a_layer_is_the_planted_one_and_its_sinks_do_not_count():
    ids, _, g = stream()
    below, A = torch.randn(M, WIDTH, generator=g) + 0.5, torch.randn(WIDTH, D, generator=g)
    x = below @ A + 2.0
    sinks = below.clone()
    sinks[::500] *= 1000
    data = data_of(x, ids, sinks)
    found = fits.layer_map(data, BELOW)
    a_hat = found(Context(ids, {BELOW: below})) * data.stats["scale"] + data.stats["mean"]
    error = (a_hat - x)[torch.arange(M) % 500 != 0].square().mean() / x.var()
    assert error < 0.05
    clean = data_of(x, ids, below)
    whole, first = fits.layer_map(clean, BELOW), fits.layer_map(clean, BELOW, rank=2)
    context = Context(ids, {BELOW: below})
    z = (x - clean.stats["mean"]) / clean.stats["scale"]
    assert torch.allclose(whole(context), z, atol=0.02) and first.left.shape == (WIDTH, 2)
    left = (z - first(context).detach()).square().sum(1).mean()
    assert left == pytest.approx(torch.linalg.svdvals(z - z.mean(0))[2:].square().sum().item() / M, rel=0.02)


def test_principal_directions_are_those_of_an_svd():
    ids, x, g = stream()
    x = x + torch.randn(M, D, generator=g)
    data = data_of(x, ids)
    found = fits.principal(data, LAYER, 3)
    z = (x - data.stats["mean"]) / data.stats["scale"]
    _, _, directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    best = (z - z.mean(0)) @ directions[:3].T @ directions[:3]
    assert torch.allclose(found(Context(ids, {LAYER: x})), best, atol=1e-3)
    assert not any(p.requires_grad for p in found.parameters())


def test_b_dec_starts_at_what_the_baseline_leaves():
    ids, x, g = stream()
    data = data_of(x + torch.randn(M, D, generator=g) + 5.0, ids)
    sae = SAE(D, 10, k=2, scale=data.stats["scale"].item()).start(data.stats["mean"])
    for known in (fits.token_means(data), fits.shuffled_means(data), fits.low_rank(data, 3), fits.earlier(data, sae, LAYER)):
        begun = build(data.stats, data.unigrams, RECIPES["ours"], "topk", 8, 2, "none", 0, known)
        rest = torch.cat([x - begun.table_alone(t) for x, t in data.parts()]).mean(0)
        assert rest.norm() < 0.1 * data.stats["mean"].norm()
        assert begun.baseline is not known  # a copy: the fit is not moved by training


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_second_sae_finds_the_second_generation(seed, tmp_path):
    """Strong features first; an SAE trained beside the first one's reconstruction finds the weak ones."""
    g = torch.Generator().manual_seed(seed)
    wide, each = 64, 16
    directions = torch.nn.functional.normalize(torch.randn(2 * each, wide, generator=g), dim=1)
    m = 20_000
    fires = torch.rand(m, 2 * each, generator=g) < 2 / each
    codes = fires * (1 + torch.rand(m, 2 * each, generator=g))
    codes[:, each:] *= 0.35  # the second generation
    x, t = codes @ directions, torch.ones(m, dtype=torch.long)
    ids = t[:, None].repeat(1, 3)
    data = data_of(x, ids, batch=200)
    job = dict(activation="topk", n=each, k=4, tokens=200_000, lr=1e-2, dead_after_tokens=20_000, seed=seed)
    first, _ = trained(tmp_path, data, lookup="none", **job)
    second, _ = trained(tmp_path, data, known=fits.earlier(data, first, LAYER), **job | dict(n=24))

    def found(sae: SAE, which: slice) -> float:
        """The share of planted directions that a decoder row matches."""
        return (directions[which] @ sae.W_dec.T).amax(1).gt(0.9).float().mean().item()

    assert found(first, slice(0, each)) >= 0.9 and found(first, slice(each, None)) < 0.3
    assert found(second, slice(each, None)) >= 0.9


def test_a_fit_says_what_the_data_lack():
    ids, x, _ = stream()
    data = data_of(x, ids)
    bare = Data(data.source, data.stats, data.unigrams, data.identity, data.parts)
    with pytest.raises(ValueError, match=r"needs Needs\(grams=3, layers=\(\)\), and the data were prepared with"):
        fits.grams(bare, [5, 5])
    for fit in (lambda: fits.layer_map(bare, BELOW), lambda: fits.principal(bare, LAYER, 2), lambda: fits.layer_map(data, 9)):
        with pytest.raises(ValueError, match="pass needs=Needs"):
            fit()


def test_a_sweep_tells_baselines_apart_and_finds_them_again(tmp_path):
    counts = defaultdict(int)
    ids, x, g = stream()
    data = data_of(x + torch.randn(M, D, generator=g), ids)
    known = [fits.token_means(data), fits.token_means(data, learned=False), fits.shuffled_means(data), fits.grams(data, [3])]
    jobs = [dict(activation="topk", n=6, k=2, tokens=500, seed=0, known=each) for each in known]
    places = sweep(tmp_path, data, jobs)
    assert len(set(places)) == 4 and sweep(tmp_path, data, jobs) == places
    for place, each in zip(places, known):
        sae = SAE.load(place)
        counts[sae.lookup] += 1
        assert sae.baseline.config == each.config
    assert counts == dict(tokens=3, grams=1)
