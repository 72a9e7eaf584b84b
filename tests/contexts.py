"""Contexts with planted content, and one small baseline of every kind, for the tests of baselines and training."""

import torch

from tsae import baseline
from tsae.baseline import Context, Needs
from tsae.pairs.order import Shuffled
from tsae.pairs.shards import InContext, Memory
from tsae.sae import SAE

D, WIDTH, V, LAYER, BELOW, SCALE = 12, 8, 7, 5, 2, 1.5
NEEDS = Needs(3, (BELOW, LAYER))
KINDS = ("tokens", "frozen", "grams", "hashed", "embedding", "low rank", "affine", "directions", "earlier")


def rows(N: int = 40, T: int = 30, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(1, V, (N, T), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    tokens[:, 0] = 0  # BOS
    return tokens


def known(m: int = 1000, seed: int = 0) -> tuple[torch.Tensor, Context]:
    """x (m, D), and a Context with three ids, a layer below of width WIDTH, and x itself."""
    g = torch.Generator().manual_seed(seed)
    tokens = rows(-(-m // 29), seed=seed)
    keep = tokens != 0
    ids = Needs(3).context(tokens, {}).ids[keep][:m]
    below, U = torch.randn(m, WIDTH, generator=g), torch.randn(V, D, generator=g)
    x = U[ids[:, 0]] + below @ torch.randn(WIDTH, D, generator=g) + 0.1 * torch.randn(m, D, generator=g)
    return x, Context(ids, {BELOW: below, LAYER: x})


def source(m: int = 1000, batch: int = 50, seed: int = 0, cls=Shuffled, **more) -> Shuffled:
    x, context = known(m)
    t = context.ids[:, 0]
    pairs = InContext(Memory(x, t), NEEDS, context.ids, {BELOW: Memory(context.layers[BELOW], t)})
    return cls(pairs, batch, seed, **more)


def made(kind: str, seed: int = 0, dtype=torch.float32) -> baseline.Baseline:
    """A baseline with random values: of a table's rows, of maps, of a smaller SAE."""
    g = torch.Generator().manual_seed(seed)
    if kind in ("tokens", "frozen"):
        found = baseline.Tokens(D, V, kind == "tokens")
    elif kind == "grams":
        found = baseline.Grams(D, V, [3, 2])
        found.keys.copy_(torch.tensor([2 + 1 * V, 3 + 3 * V, 5 + 1 * V, 2 + 1 * V + 4 * V**2, 5 + 1 * V + 2 * V**2]))
        found.keys[:3] = found.keys[:3].sort().values
        found.keys[3:] = found.keys[3:].sort().values
    elif kind == "hashed":
        found = baseline.Hashed(D, V, 5, grams=3, heads=2)
        found.canonical[4] = 3
    elif kind in ("embedding", "low rank"):
        found = baseline.Factored(D, V, 3, left_learned=kind == "low rank")
    elif kind == "affine":
        found = baseline.Affine(D, BELOW, WIDTH, SCALE, rank=2, limit=4.0)
    elif kind == "directions":
        found = baseline.Affine(D, LAYER, D, SCALE, rank=3, learned=False)
    else:
        sae = SAE(D, 10, "topk", 2, V, "learned", scale=2.0).start(torch.zeros(D), seed=seed)
        sae.baseline.W_lookup.data.normal_(generator=g)
        return baseline.Earlier(D, LAYER, SCALE, sae.eval()).to(dtype)
    with torch.no_grad():
        for p in [*found.parameters(), *([found.centre] if kind in ("affine", "directions") else [])]:
            p.normal_(generator=g)
    return found.to(dtype)
