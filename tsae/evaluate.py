"""How well an SAE reconstructs: pure functions, that change nothing they are given."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit

from tsae.baseline import Baseline, Context, token_ids
from tsae.sae import SAE


def squared_errors(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """||x - x_hat||^2 / ||x||^2 at each position: (b,) from (b, d)."""
    return (x - x_hat).square().sum(-1) / x.square().sum(-1)


def nmse(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """Equation 4, squared as in the authors' code: the mean over positions of `squared_errors`."""
    return squared_errors(x, x_hat).mean().item()


def fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """Fraction of variance unexplained: squared error over that of always predicting the mean."""
    return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


def ce_added(patched: float, clean: float) -> float:
    """Equation 3: (CE_patched - CE_clean) / CE_clean."""
    return (patched - clean) / clean


def ce_recovered(patched: float, clean: float, ablated: float) -> float:
    """Share of the damage of ablation that the reconstruction avoids: 1 is clean, 0 is ablated."""
    return (ablated - patched) / (ablated - clean)


def interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) over independent runs, by Student's t; (value, nan, nan) for one."""
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        return values.mean(), float("nan"), float("nan")
    half = stdtrit(len(values) - 1, (1 + level) / 2) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), values.mean() - half, values.mean() + half


def summarise(table: pd.DataFrame, by: list[str], metrics: list[str]) -> pd.DataFrame:
    """Over the runs (seeds) of each group: columns `by`, metric, value, low, high, runs."""
    rows = []
    for names, group in table.groupby(by, sort=False, dropna=False):
        for metric in metrics:
            values = group[metric].dropna()
            if len(values):
                mean, low, high = interval(values)
                found = dict(metric=metric, value=mean, low=low, high=high, runs=len(values))
                rows.append(dict(zip(by, names)) | found)
    return pd.DataFrame(rows)


def by_document(values: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Sums of values (m,) over the documents (m,) of their positions: (D,), in ascending order."""
    return np.bincount(np.unique(document, return_inverse=True)[1], values)


def resampled(statistic: Callable, *sums: np.ndarray, draws: int = 2000, seed: int = 0,
              level: float = 0.95) -> tuple[float, float, float]:
    """(value, low, high) of statistic(*totals), from sums (S, D) over S seeds and D documents.

    Seeds and documents are resampled together; the same draw serves all arguments. Few seeds vary
    too little when resampled, so that the interval is never narrower than Student's t over seeds.
    One seed has no interval.
    """
    seeds, documents = sums[0].shape
    each = [statistic(*totals) for totals in zip(*(part.sum(1) for part in sums))]
    mean, least, most = interval(each, level)
    value = statistic(*(part.sum() for part in sums))
    if seeds < 2:
        return value, float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    of_seed = generator.multinomial(seeds, [1 / seeds] * seeds, draws)
    of_document = generator.multinomial(documents, [1 / documents] * documents, draws)
    drawn = statistic(*(((of_seed @ part) * of_document).sum(1) for part in sums))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return value, min(low, value - (mean - least)), max(high, value + (most - mean))


def lowest(table: pd.DataFrame, value: str, place: list[str], unit: str, draws: int = 1000,
           seed: int = 0) -> dict:
    """The lowest mean of a column over places (their columns), with its 95 % interval.

    The interval is of that place's mean, over units (a column, such as rows of text) drawn anew.
    The place is chosen once, from all units. Returns its columns, value, low, high, runs.
    """
    means = table.groupby(place)[value].mean()
    where = np.atleast_1d(means.idxmin())
    here = table[(table[place] == where).all(axis=1)]
    sums = here.groupby(unit)[value].agg(["sum", "count"]).to_numpy()
    units, generator = len(sums), np.random.default_rng(seed)
    drawn = generator.multinomial(units, [1 / units] * units, draws) @ sums
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return dict(zip(place, where)) | dict(value=means.min(), low=low, high=high, runs=units)


def tokens_to_reach(tokens: Iterable[float], values: Iterable[float], target: float) -> float:
    """Tokens at which a falling curve reaches `target`, log-linear between points; nan if never."""
    tokens, values = np.asarray(list(tokens), float), np.asarray(list(values), float)
    below = np.flatnonzero(values <= target)
    if len(below) == 0:
        return float("nan")
    i = below[0]
    if i == 0:
        return tokens[0]
    share = (values[i - 1] - target) / (values[i - 1] - values[i])
    return float(np.exp(np.log(tokens[i - 1]) + share * np.log(tokens[i] / tokens[i - 1])))


def l0_at_equal(l0: Iterable[float], errors: Iterable[float], error: float) -> float:
    """The L0 at which a front, log-log linear between points, has this error; nan outside of it."""
    errors, l0 = np.array(sorted(zip(np.log(list(errors)), np.log(list(l0))))).T
    return float(np.exp(np.interp(np.log(error), errors, l0, left=np.nan, right=np.nan)))


def error_at_equal(l0: Iterable[float], errors: Iterable[float], wanted: float) -> float:
    """The error of a front, log-log linear between points, at this L0; flat beyond its ends."""
    l0, errors = np.array(sorted(zip(np.log(list(l0)), np.log(list(errors))))).T
    return float(np.exp(np.interp(np.log(wanted), l0, errors)))


def bootstrap(statistic: Callable[[np.ndarray], float], groups: list[np.ndarray], draws: int = 1000,
              seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """(estimate, low, high) of the mean over groups (seeds) of a statistic over members (features).

    Both groups and members are resampled.
    """
    generator = np.random.default_rng(seed)
    groups = [np.asarray(group) for group in groups if len(group)]
    if not groups:
        return float("nan"), float("nan"), float("nan")

    def resampled(group: np.ndarray) -> float:
        return statistic(generator.choice(group, len(group)))

    drawn = []
    for _ in range(draws):
        picked = generator.integers(len(groups), size=len(groups))
        drawn.append(np.mean([resampled(groups[i]) for i in picked]))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean([statistic(group) for group in groups])), low, high


@torch.no_grad()
def reconstruction(sae: SAE, x: torch.Tensor, t: torch.Tensor,
                   batch: int = 1024) -> dict[str, float]:
    """nmse, fvu, l0 and the share of features that never fire (dead) on x (m, d) raw, t (m,).

    With a table also lookup_nmse, the error of the table alone (b_dec + W_lookup[t]), and
    lookup_share, the variance that it explains over what the whole SAE explains.
    """
    errors, lookup_errors, squared, lookup_squared, firings = [], [], 0.0, 0.0, 0
    fired = torch.zeros(sae.n, dtype=torch.bool, device=x.device)
    for a, tokens in zip(x.split(batch), t.split(batch)):
        a_hat, count, firing = sae.reconstructed(a, tokens)
        alone = sae.table_alone(tokens)
        errors.append(squared_errors(a, a_hat))
        lookup_errors.append(squared_errors(a, alone))
        squared = squared + (a - a_hat).square().sum()
        lookup_squared = lookup_squared + (a - alone).square().sum()
        firings, fired = firings + count, fired | firing
    variance = (x - x.mean(0)).square().sum()
    result = dict(nmse=torch.cat(errors).mean().item(), fvu=(squared / variance).item(),
                  l0=(torch.tensor(firings) / len(x)).item(), dead=1 - fired.float().mean().item())
    if sae.lookup != "none":
        share = (1 - lookup_squared / variance) / (1 - squared / variance)
        result |= dict(lookup_nmse=torch.cat(lookup_errors).mean().item(),
                       lookup_share=share.item())
    return result


@torch.no_grad()
def explained(known: Baseline, stats: dict[str, torch.Tensor], x: torch.Tensor,
              t: torch.Tensor | Context, batch: int = 4096) -> float:
    """The share of the variance of x (m, d) raw that a fitted baseline explains alone.

    `stats` are those that it was fitted with: its rows are about their mean, in their scale.
    """
    left = sum((a - stats["mean"] - known(context) * stats["scale"]).square().sum()
               for a, context in zip(x.split(batch), t.split(batch)))
    return 1 - (left / (x - x.mean(0)).square().sum()).item()


@torch.no_grad()
def token_read(sae: SAE, x: torch.Tensor, t: torch.Tensor | Context, batch: int = 4096) -> float:
    """How much of what the encoder reads is the token, on x (m, d) raw, t (m,).

    It is the share of the pre-activations' variance, summed over features, between tokens.

    What m positions would show by chance is taken off (analysis of variance), so that an encoder
    that sees nothing of the token has 0, or a little less.
    """
    ids, which, counts = token_ids(t).unique(return_inverse=True, return_counts=True)
    sums = x.new_zeros(len(ids), x.shape[1], dtype=torch.float64)
    scatter = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for a, known, of in zip(x.split(batch), t.split(batch), which.split(batch)):
        row = sae.baseline(known) if sae.encoder_sees == "rest" else 0.0
        seen = sae.encoder_input(a / sae.scale, row).double()
        sums.index_add_(0, of, seen)
        scatter += seen.T @ seen
    middle = len(x) * torch.outer(sums.sum(0) / len(x), sums.sum(0) / len(x))
    between = (sums / counts[:, None]).T @ sums - middle
    total = scatter - middle
    chance = (len(ids) - 1) / max(1, len(x) - len(ids)) * (scatter - between - middle)
    reads = sae.W_enc.double().T @ sae.W_enc.double()  # a pre-activation is linear in what is seen
    return ((reads * (between - chance)).sum() / (reads * total).sum()).item()


@torch.no_grad()
def silent(saes: list[SAE], pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
           batch: int = 4096) -> tuple[list[float], int]:
    """The share of features of each SAE that never fire over `pairs` x (m, d) raw, t (m,), which
    are read once, and the number of positions in them.
    """
    fired, positions = [torch.zeros(sae.n, dtype=torch.bool) for sae in saes], 0
    for x, t in pairs:
        positions += len(t)
        for a, tokens in zip(x.split(batch), t.split(batch)):
            for seen, sae in zip(fired, saes):
                seen |= sae.reconstructed(a, tokens)[2].cpu()
    return [1 - seen.float().mean().item() for seen in fired], positions


def table_drift(sae: SAE, start: torch.Tensor, seen: torch.Tensor) -> dict[str, float]:
    """Cosine and norm ratio of the table to its `start` (V, d) raw, means over the ids `seen`."""
    table, start = sae.W_lookup.detach()[seen] * sae.scale, start[seen]
    return dict(table_cosine=torch.cosine_similarity(table, start, dim=-1).mean().item(),
                table_norm_ratio=(table.norm(dim=-1) / start.norm(dim=-1)).mean().item())


def ablations(tail: Callable, mean: torch.Tensor) -> dict[str, float]:
    """Nats over `tail` (lm.LM.tail): clean, and with activations set to zero and to their mean."""
    return dict(ce_clean=tail(None), ce_zero=tail(lambda x, t: torch.zeros_like(x)),
                ce_mean=tail(lambda x, t: mean.expand_as(x)))


def cross_entropy(sae: SAE, tail: Callable, baseline: dict[str, float]) -> dict[str, float]:
    """ce_added and ce_recovered of the patched reconstruction; `baseline` from `ablations`."""
    patched = tail(sae)
    return dict(ce_added=ce_added(patched, baseline["ce_clean"]),
                ce_recovered=ce_recovered(patched, baseline["ce_clean"], baseline["ce_mean"]))
