"""A planted dictionary with a planted table, for the tests that train."""

import torch

from tsae.pairs.order import Shuffled
from tsae.pairs.shards import Memory
from tsae.sae import SAE

D, N, V = 40, 8, 32


def planted(m=6000, seed=0):
    """x = 4 u[t] + a sum of two of N directions, all orthogonal; returns x (m, D), t (m,), u (V, D)."""
    g = torch.Generator().manual_seed(seed)
    u, directions = torch.nn.init.orthogonal_(torch.empty(V + N, D), generator=g).split([V, N])
    t, which = torch.randint(V, (m,), generator=g), torch.randint(N, (m, 2), generator=g)
    size = 1 + torch.rand(m, 2, 1, generator=g)
    return 4 * u[t] + (size * directions[which]).sum(1), t, u


def mixed(x, t, batch, seed=0):
    return Shuffled(Memory(x, t), batch, seed)


def started(lookup="learned", activation="topk", seed=0, **settings):
    sae = SAE(D, N, activation, 2, V, lookup, **settings)
    return sae.start(torch.zeros(D), torch.zeros(V, D), seed=seed)
