"""Pairs (x, t) in random order over bounded memory, and one visible training loop."""

import ctypes
import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from tsae import store
from tsae.sae import SAE

Pair = tuple[torch.Tensor, torch.Tensor]


def activations(rows: torch.Tensor, residuals: Callable, keep: Callable, batch_rows: int = 64,
                order: torch.Tensor | None = None) -> Iterator[Pair]:
    """Pairs x (m, d) float32, t (m,) of the positions that `keep` marks, in the `order` of rows (N, T), a pass at a time.

    Raises ValueError that names the row when an activation is NaN or infinite.
    """
    order = torch.arange(len(rows)) if order is None else order
    for which in order.split(batch_rows):
        tokens = rows[which]
        x, kept = residuals(tokens), keep(tokens)
        if not torch.isfinite(x).all():
            row = int(which[(~torch.isfinite(x)).flatten(1).any(1).cpu()][0])
            raise ValueError(f"the language model gives NaN or infinite activations at row {row} of the tokens: load it "
                             "in float32, or leave that document out")
        yield x[kept.to(x.device)], tokens[kept].to(x.device)


def collect(rows: torch.Tensor, residuals: Callable, keep: Callable, batch_rows: int = 64) -> Pair:
    """All pairs of `activations` in memory: x (m, d), t (m,)."""
    parts = list(tqdm(activations(rows, residuals, keep, batch_rows), "activations", -(-len(rows) // batch_rows),
                      leave=False))
    return torch.cat([x for x, _ in parts]), torch.cat([t for _, t in parts])


def pairs(rows: torch.Tensor, residuals: Callable, keep: Callable, batch: int = 4096, buffer: int = 131072,
          seed: int = 0, epochs: int | None = None) -> Iterator[Pair]:
    """Batches x (batch, d), t (batch,) in random order, streamed over bounded memory.

    Rows are visited in a fresh permutation each epoch; a buffer of `buffer` pairs mixes their positions, and half of it
    is replaced at a time; memory holds it twice while it is shuffled. `epochs=None` goes on for ever. The order is a
    function of `seed` alone. Raises ValueError when an epoch has no position to give.
    """
    generator = torch.Generator().manual_seed(seed)
    held: list[Pair] = []
    epoch = 0
    while epochs is None or epoch < epochs:
        given = 0
        for pair in activations(rows, residuals, keep, order=torch.randperm(len(rows), generator=generator)):
            given += len(pair[1])
            held.append(pair)
            if sum(len(t) for _, t in held) >= max(buffer, 2 * batch):
                x, t = _shuffled(held, generator)
                used = len(t) // 2 // batch * batch
                held = [(x[used:].clone(), t[used:].clone())]
                yield from zip(x[:used].split(batch), t[:used].split(batch))
        if not given:
            raise ValueError("the rows hold special tokens only: there is no position to train on")
        epoch += 1
    if held:
        x, t = _shuffled(held, generator)
        yield from zip(x.split(batch), t.split(batch))


def _shuffled(held: list[Pair], generator: torch.Generator) -> Pair:
    x, t = torch.cat([x for x, _ in held]), torch.cat([t for _, t in held])
    order = torch.randperm(len(t), generator=generator).to(x.device)
    return x[order], t[order]


def held_pairs(x: torch.Tensor, t: torch.Tensor, batch: int = 4096, seed: int = 0) -> Iterator[Pair]:
    """The same from activations in memory, shuffled over all of them, for ever: a fresh permutation each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(t), generator=generator).to(x.device).split(batch):
            yield x[index], t[index]


def statistics(x: torch.Tensor, t: torch.Tensor, vocabulary: int) -> dict[str, torch.Tensor]:
    """What a start needs, from pairs: mean (d,), scale (rms entry of the centred x), count (V,) and sum (V, d) a token."""
    mean = x.mean(0)
    return dict(mean=mean, scale=(x - mean).square().mean().sqrt(), count=torch.bincount(t, minlength=vocabulary),
                sum=torch.zeros(vocabulary, x.shape[1], device=x.device).index_add_(0, t.long(), x))


def conditional_mean(stats: dict[str, torch.Tensor], prior: float = 4.0) -> torch.Tensor:
    """E[a | t] (V, d), shrunk towards the overall mean as if that had been seen `prior` times with every token."""
    return (stats["sum"] + prior * stats["mean"]) / (stats["count"].unsqueeze(-1) + prior)


def left_over(stats: dict[str, torch.Tensor], table: torch.Tensor) -> torch.Tensor:
    """Mean of a_t - table[t] over the pairs of `stats`: where b_dec starts beside a table. Shape (d,)."""
    share = stats["count"] / stats["count"].sum()
    return stats["mean"] - share @ table


class RowAdam(torch.optim.Optimizer):
    """Adam for tables with sparse gradients: only rows of the batch move, each with its own step count.

    A row's first step is then lr in every coordinate, as for any parameter. Dense Adam would move a long-unseen row by
    about 32 x lr over the steps after its first hit, whatever the error, and pass over the whole table at every step.
    """

    def __init__(self, params: Iterable, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.coalesce()
                rows, g = g.indices()[0], g.values()
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), steps=p.new_zeros(len(p), 1))
                steps = state["steps"][rows] + 1
                m = torch.lerp(state["m"][rows], g, 1 - beta1)
                v = torch.lerp(state["v"][rows], g * g, 1 - beta2)
                state["steps"][rows], state["m"][rows], state["v"][rows] = steps, m, v
                p[rows] -= lr * (m / (1 - beta1**steps)) / ((v / (1 - beta2**steps)).sqrt() + group["eps"])


@contextmanager
def quick_products(on: bool) -> Iterator[None]:
    """Inside, float32 matrix products may take bfloat16 (CPU) or tf32 (GPU) inputs, and the CPU keeps freed memory.

    Fresh pages for every large tensor of a step cost as much as its arithmetic: glibc is asked not to give them back,
    from the first use to the end of the process.
    """
    backends = [(torch.backends.mkldnn.matmul, "bf16"), (torch.backends.cuda.matmul, "tf32")] if on else []
    before = [backend.fp32_precision for backend, _ in backends]
    if on and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 32 << 20), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    try:
        for backend, precision in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for (backend, _), precision in zip(backends, before):
            backend.fp32_precision = precision


def learning_rate(progress: float, schedule: str, last: float) -> float:
    """Share of the peak rate at `progress` in [0, 1]: cosine to `last`, or constant and linear to `last` over the last 20 %."""
    if schedule == "cosine":
        return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "decay":
        return last + (1 - last) * min(1.0, (1 - progress) / 0.2)
    raise ValueError(f'schedule is {schedule!r}: expected "cosine" or "decay"')


def fit(sae: SAE, source: Iterator[Pair], tokens: int, lr: float = 1e-3, table_lr: float = 1e-2, schedule: str = "decay",
        last_lr: float = 0.0, sparsity: float = 0.0, sparsity_warmup: float = 0.05, dead_after_tokens: int = 200_000,
        aux_weight: float = 1 / 32, quick: bool = False, check: Callable[[SAE], dict] | None = None, checks: int = 0,
        log_every_tokens: int = 50_000, label: str = "training") -> pd.DataFrame:
    """Train `sae` in place on `tokens` pairs from `source`; returns its history, one row a log line.

    Adam on everything but the table, RowAdam with `table_lr` (units of the SAE's scale) on the table; both follow
    `schedule`. `sparsity` rises linearly over the first `sparsity_warmup` of training. A feature is dead when it has not
    fired for `dead_after_tokens`; `quick` is for `quick_products`. `check(sae) -> dict` adds columns at `checks`
    points, spaced evenly in log tokens (fewer where one batch crosses several).
    Raises FloatingPointError when the loss is not finite, ValueError when the source ends early.
    """
    table = [p for name, p in sae.named_parameters() if name == "W_lookup" and p.requires_grad]
    rest = [p for name, p in sae.named_parameters() if name != "W_lookup"]
    groups = [(torch.optim.Adam(rest, lr=lr, fused=True), lr)]
    if table:
        groups.append((RowAdam(table, table_lr), table_lr))
    silent = torch.zeros(sae.n, dtype=torch.long, device=sae.b_enc.device)  # tokens since each feature last fired
    seen, history, logged = 0, [], 0
    due = [tokens * 100 ** (i / checks - 1) for i in range(1, checks + 1)]
    progress = tqdm(total=tokens, desc=label, unit="tok", unit_scale=True, leave=False)
    sae.train()
    while seen < tokens:
        x, t = next(source, (None, None))
        if x is None:
            raise ValueError(f"{tokens} tokens of training were asked for, the activations ended after {seen}: give more "
                             "text, or train on fewer")
        for optimiser, peak in groups:
            optimiser.param_groups[0]["lr"] = peak * learning_rate(seen / tokens, schedule, last_lr)
            optimiser.zero_grad()
        weight = sparsity * min(1.0, (seen + 1) / max(1.0, sparsity_warmup * tokens))
        with quick_products(quick):
            out = sae.loss(x, t, weight, silent >= dead_after_tokens, aux_weight)
            if not torch.isfinite(out["loss"]):
                raise FloatingPointError(f"the loss is {out['loss'].item()} after {seen} tokens: lower `lr`, or check the "
                                         "activations for outliers")
            out["loss"].backward()
        for optimiser, _ in groups:
            optimiser.step()
        sae.normalise()
        seen += len(t)
        silent = torch.where(out["fired"], 0, silent + len(t))
        progress.update(len(t))
        checking = bool(due) and seen >= min(due[0], tokens)
        if checking or seen - logged >= log_every_tokens or seen >= tokens:
            logged = seen
            error = (x - out["x_hat"]).square().sum(-1) / x.square().sum(-1)
            history.append(dict(tokens=seen, loss=out["loss"].item(), nmse=error.mean().item(), l0=out["l0"].item(),
                                dead=(silent >= dead_after_tokens).float().mean().item()))
            if checking:
                due = [point for point in due if point > seen]
            if checking and check:
                history[-1] |= check(sae.eval())
                sae.train()
            progress.set_postfix(nmse=f"{history[-1]['nmse']:.3f}", dead=f"{history[-1]['dead']:.0%}")
    progress.close()
    sae.eval()
    return pd.DataFrame(history)


@dataclass
class Data:
    """What a training run is given: the activations of one layer, and what its start needs from them.

    source(seed): an endless iterator of pairs; stats: see `statistics`; unigrams (V, d) raw; identity: what names the data.
    """

    source: Callable[[int], Iterator[Pair]]
    stats: dict[str, torch.Tensor]
    unigrams: torch.Tensor
    identity: dict


def prepare(lm, rows: torch.Tensor, layer: int, batch: int = 4096, buffer: int = 131072, memory_gb: float = 4.0,
            sample_rows: int = 20_000) -> Data:
    """Activations of `lm` (see lm.LM) at `layer` over rows (N, T): held in memory when they fit, else streamed.

    When streamed, `stats` come from the first `sample_rows` rows. `buffer` is the mixing buffer of `pairs`, in tokens.
    """
    layer = lm.layer(layer)
    row_bytes = rows.shape[1] * lm.d_model * 4
    fits = 3 * len(rows) * row_bytes < memory_gb * 1e9  # the pairs, and twice more while they are put together
    sample_rows = min(sample_rows, max(1, int(memory_gb * 1e9 / (3 * row_bytes))))
    x, t = collect(rows if fits else rows[:sample_rows], lm.at(layer), lm.keep)
    stats, unigrams = statistics(x, t, lm.vocabulary), lm.unigrams(layer)
    identity = dict(model=lm.name, layer=layer, batch=batch, rows=_digest(rows), weights=_digest(unigrams),
                    buffer=0 if fits else buffer, sample_rows=0 if fits else sample_rows,
                    code=store.key(**{name: store.digest(Path(__file__).with_name(name)) for name in RUN_CODE}))
    if fits:
        return Data(lambda seed: held_pairs(x, t, batch, seed), stats, unigrams, identity)
    return Data(lambda seed: pairs(rows, lm.at(layer), lm.keep, batch, buffer, seed), stats, unigrams, identity)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()


RUN_CODE = ("sae.py", "train.py", "lm.py")  # a change in one of these makes every trained SAE out of date

# How a run starts and learns. "text" and "code" are the paper's two recipes: see the settings table of the README. Rates
# are in units of the activation scale; table_lr 0 is the common rate. Without a table the encoder starts at W_dec.
_CODE = dict(start="unigram", table_scale=0.5, encoder="transpose", encoder_scale=0.5, encoder_sees="full",
             table_lr=1e-2, schedule="cosine", last_lr=0.3, aux_weight=0.0, aux_lookup=False)
RECIPES = {
    "code": _CODE,
    "text": _CODE | dict(table_scale=1.0, encoder="kaiming", table_lr=0.0, last_lr=0.0),
    "ours": _CODE | dict(table_lr=3e-2, schedule="decay", last_lr=0.0, aux_weight=0.25, aux_lookup=True),
}


def trained(folder: Path, data: Data, *, activation: str, n: int, k: int, lookup: str, seed: int, tokens: int,
            lr: float = 1e-3, sparsity: float = 0.0, recipe: str = "ours", dead_after_tokens: int = 200_000, quick: bool = True,
            check: Callable[[SAE], dict] | None = None, checks: int = 0, **changes) -> tuple[SAE, pd.DataFrame]:
    """An SAE trained on `data` and its history; taken from `folder` when these very settings were trained before.

    `recipe` names an entry of RECIPES, `changes` overrides parts of it (the ablations), `quick` is for `quick_products`.
    Raises ValueError for an unknown recipe or change.
    """
    if recipe not in RECIPES or not set(changes) <= set(RECIPES["ours"]):
        raise ValueError(f"got recipe {recipe!r} with changes of {sorted(changes)}: the recipes are {', '.join(RECIPES)}, "
                         f"and they consist of {', '.join(RECIPES['ours'])}")
    how = RECIPES[recipe] | changes
    settings = dict(activation=activation, n=n, k=k, lookup=lookup, sparsity=sparsity, seed=seed, tokens=tokens,
                    lr=lr, quick=quick, checks=checks, dead_after_tokens=dead_after_tokens, **how, **data.identity)
    place = folder / store.key(**settings)
    if (place / "history.csv").is_file():  # written last: the rest is whole
        return SAE.load(place).to(data.unigrams.device), pd.read_csv(place / "history.csv")
    sae = build(data, activation, n, k, lookup, seed, how)
    history = fit(sae, data.source(seed), tokens, lr, how["table_lr"] or lr, how["schedule"], how["last_lr"], sparsity,
                  dead_after_tokens=dead_after_tokens, aux_weight=how["aux_weight"], quick=quick, check=check,
                  checks=checks, label=f"{activation} {'+ table ' if lookup != 'none' else ''}seed {seed}")
    sae.save(place)
    store.write_json(place / "settings.json", settings)
    store.write_table(place / "history.csv", history)
    return sae, history


def build(data: Data, activation: str, n: int, k: int, lookup: str, seed: int, how: dict) -> SAE:
    """An SAE at its start, as `how` (an entry of RECIPES) says."""
    vocabulary, d_model = data.unigrams.shape
    sae = SAE(d_model, n, activation, k, vocabulary, lookup, how["encoder_sees"], data.stats["scale"].item(),
              how["aux_lookup"]).to(data.unigrams.device)
    if lookup == "none":
        return sae.start(data.stats["mean"], seed=seed)
    table = start_table(data, **how)
    return sae.start(left_over(data.stats, table), table, 1.0, how["encoder_scale"], how["encoder"], seed)


def start_table(data: Data, start: str, table_scale: float, **_) -> torch.Tensor:
    """Where the table of a recipe starts, raw (V, d): unigram residuals or shrunk conditional means, scaled."""
    return table_scale * dict(unigram=data.unigrams, mean=conditional_mean(data.stats))[start]
