"""Training: one visible loop for one SAE or for many on one pass, that goes on bit for bit where it was stopped."""

import hashlib
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from tsae import checkpoints, parallel, store
from tsae.activations import Shuffled, Store, Streamed, activations, statistics
from tsae.kernels import quick_products
from tsae.sae import SAE

Pair = tuple[torch.Tensor, torch.Tensor]


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

    ROWS = 256

    def __init__(self, params: Iterable, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), steps=p.new_zeros(len(p), 1))
                grad = p.grad.coalesce()
                # A few rows at a time: what is held of them stays in the caches from the first line to the last.
                for rows, g in zip(grad.indices()[0].split(self.ROWS), grad.values().split(self.ROWS)):
                    steps = state["steps"].index_select(0, rows).add_(1)
                    m = state["m"].index_select(0, rows).lerp_(g, 1 - beta1)
                    v = state["v"].index_select(0, rows).mul_(beta2).addcmul_(g, g, value=1 - beta2)
                    for name, held in (("steps", steps), ("m", m), ("v", v)):
                        state[name].index_copy_(0, rows, held)
                    step = m.div_(1 - beta1**steps).div_(v.div_(1 - beta2**steps).sqrt_().add_(group["eps"]))
                    p.index_add_(0, rows, step, alpha=-lr)


def learning_rate(progress: float, schedule: str, last: float) -> float:
    """Share of the peak rate at `progress` in [0, 1]: cosine to `last`, or constant and linear to `last` over the last 20 %."""
    if schedule == "cosine":
        return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "decay":
        return last + (1 - last) * min(1.0, (1 - progress) / 0.2)
    raise ValueError(f'schedule is {schedule!r}: expected "cosine" or "decay"')


SPIKE = 10.0  # times the usual loss: more is no batch to learn from


class Run:
    """One SAE in training: its optimisers, its dead counters, its history, and where it stands.

    Adam on everything but the table, RowAdam with `table_lr` (units of the SAE's scale) on the table; both follow
    `schedule` over `tokens`. `sparsity` rises linearly over the first `sparsity_warmup` of training. A feature is dead when
    it has not fired for `dead_after_tokens`. `check(sae) -> dict` adds columns to the history at `checks` points, spaced
    evenly in log tokens (fewer where one batch crosses several). `seed` only names the SAE where something goes wrong.
    """

    def __init__(self, sae: SAE, tokens: int, lr: float = 1e-3, table_lr: float = 1e-2, schedule: str = "decay",
                 last_lr: float = 0.0, sparsity: float = 0.0, sparsity_warmup: float = 0.05,
                 dead_after_tokens: int = 200_000, aux_weight: float = 1 / 32, check: Callable[[SAE], dict] | None = None,
                 checks: int = 0, log_every_tokens: int = 50_000, seed: int | None = None):
        learning_rate(0.0, schedule, last_lr)  # an unknown schedule is refused here
        self.settings = sae.config | dict(
            tokens=tokens, lr=lr, table_lr=table_lr, schedule=schedule, last_lr=last_lr, sparsity=sparsity,
            sparsity_warmup=sparsity_warmup, dead_after_tokens=dead_after_tokens, aux_weight=aux_weight, checks=checks,
            log_every_tokens=log_every_tokens, seed=seed)
        self.name = f"{sae.activation} SAE (n {sae.n}, k {sae.k}, lookup {sae.lookup}" + (
            ")" if seed is None else f", seed {seed})")
        self.sae, self.tokens, self.schedule, self.last_lr = sae.train(), tokens, schedule, last_lr
        sae.kth_largest = parallel.kth_largest  # batchtopk: over the shares of all ranks
        self.sparsity, self.warmup_tokens = sparsity, max(1.0, sparsity_warmup * tokens)
        self.dead_after_tokens, self.aux_weight = dead_after_tokens, aux_weight
        self.check, self.log_every_tokens = check, log_every_tokens
        table = [p for name, p in sae.named_parameters() if name == "W_lookup" and p.requires_grad]
        rest = [p for name, p in sae.named_parameters() if name != "W_lookup"]
        self.optimisers = [(torch.optim.Adam(rest, lr=lr, fused=True), lr)]
        if table:
            self.optimisers.append((RowAdam(table, table_lr), table_lr))
        self.silent = torch.zeros(sae.n, dtype=torch.long, device=sae.b_enc.device)  # tokens since a feature last fired
        self.seen, self.logged, self.history, self.usual = 0, 0, [], None  # usual: a running mean of the loss
        self.due = [tokens * 100 ** (i / checks - 1) for i in range(1, checks + 1)]

    def step(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """One optimiser step on a batch x (b, d) raw, t (b,); returns what SAE.loss returns. Raises FloatingPointError."""
        for optimiser, peak in self.optimisers:
            optimiser.param_groups[0]["lr"] = peak * learning_rate(self.seen / self.tokens, self.schedule, self.last_lr)
            optimiser.zero_grad()
        weight = self.sparsity * min(1.0, (self.seen + 1) / self.warmup_tokens)
        out = self.sae.loss(x, t, weight, self.silent >= self.dead_after_tokens, self.aux_weight)
        if not torch.isfinite(out["loss"] + self.sae.b_enc.detach().sum()):  # a NaN bias need not show in the loss
            if torch.isfinite(out["loss"]):
                self.all_finite()
            raise FloatingPointError(f"the loss of the {self.name} is {out['loss'].item()} after {self.seen} tokens: lower "
                                     "`lr`, or check the activations for outliers")
        torch.autograd.backward(out["loss"])  # nnsight replaces Tensor.backward by one that reads source code, in no thread
        fired, loss = parallel.share(self.sae, out["fired"], out["loss"])
        self._soften(loss)
        for optimiser, _ in self.optimisers:
            optimiser.step()
        self.sae.normalise()
        tokens = len(t) * parallel.world()
        self.seen += tokens
        self.silent = torch.where(fired, 0, self.silent + tokens)
        return out

    def _soften(self, loss: float) -> None:
        """Scale the gradients of a batch whose loss is more than SPIKE times the usual one down to that.

        One such batch would be remembered in Adam's second moments for thousands of steps, in which nothing moves.
        """
        if self.usual and loss > (most := SPIKE * self.usual):
            warnings.warn(f"the loss of the {self.name} jumps to {loss:.3g} after {self.seen} tokens, {loss / self.usual:.0f} "
                          "times the usual: the step counts as one of a tenfold loss. If it comes again, look at the "
                          "activations there, or lower `lr`", RuntimeWarning, stacklevel=2)
            for p in self.sae.parameters():
                if p.grad is not None:
                    p.grad *= most / loss
            loss = most
        self.usual = loss if self.usual is None else 0.99 * self.usual + 0.01 * loss

    def all_finite(self) -> None:
        """Raises FloatingPointError that names the parameters with NaN or infinite values, if any has."""
        wrong = [name for name, p in self.sae.named_parameters() if not torch.isfinite(p).all()]
        if wrong:
            raise FloatingPointError(f"{', '.join(wrong)} of the {self.name} have NaN or infinite values after {self.seen} "
                                     "tokens: lower `lr`, or check the activations for outliers")

    def log(self, x: torch.Tensor, out: dict[str, torch.Tensor]) -> bool:
        """Add a line to the history where one is due after the step on x (b, d) that gave `out`; whether it lacks a check."""
        checking = bool(self.due) and self.seen >= min(self.due[0], self.tokens)
        if not (checking or self.seen - self.logged >= self.log_every_tokens or self.seen >= self.tokens):
            return False
        self.logged = self.seen
        z = x / self.sae.scale
        line = dict(loss=out["loss"].item(), l0=(out["codes"] > 0).sum().item() / len(x),
                    nmse=((z - out["z_hat"]).square().sum(-1) / z.square().sum(-1)).mean().item())
        line["dead"] = (self.silent >= self.dead_after_tokens).float().mean().item()
        self.history.append(dict(tokens=self.seen) | parallel.average(line))
        if checking:
            self.due = [point for point in self.due if point > self.seen]
        return checking and self.check is not None

    def look(self) -> None:
        """Add the columns of `check` to the newest line."""
        self.history[-1] |= self.check(self.sae.eval())
        self.sae.train()

    def state(self) -> checkpoints.State:
        """Everything that the rest of the run depends on, and its settings, but for `check`."""
        optimisers = {str(i): {str(j): state for j, state in optimiser.state_dict()["state"].items()}
                      for i, (optimiser, _) in enumerate(self.optimisers)}
        return dict(settings=self.settings, sae=self.sae.state_dict(), optimisers=optimisers, silent=self.silent,
                    seen=self.seen, logged=self.logged, due=self.due, history=self.history, usual=self.usual)

    def restore(self, state: checkpoints.State) -> None:
        """Go on as after `state`, of which no memory is shared: its tensors may be maps of a file."""
        self.sae.load_state_dict(state["sae"])
        for i, (optimiser, _) in enumerate(self.optimisers):
            held = {int(j): moments for j, moments in _cloned(state["optimisers"][str(i)]).items()}
            optimiser.load_state_dict(optimiser.state_dict() | dict(state=held))
        self.silent = _cloned(state["silent"]).to(self.silent.device)
        self.seen, self.logged, self.due, self.history, self.usual = (
            state[name] for name in ("seen", "logged", "due", "history", "usual"))


def _cloned(value):
    if isinstance(value, dict):
        return {name: _cloned(held) for name, held in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def _restore(runs: list[Run], source: Iterator[Pair], quick: bool, folder: Path, sharded: bool) -> None:
    """Bring runs and source to where the newest checkpoint in `folder` is, if there is one.

    Raises ValueError that names the settings in which it is not one of these runs.
    """
    held = parallel.newest(folder, sharded)
    if not held:
        return
    if len(held["runs"]) != len(runs):
        raise ValueError(f"the checkpoint in {folder} is of {len(held['runs'])} SAEs, and {len(runs)} are to be trained: go on "
                         "with the same ones, or choose another folder")
    for i, run in enumerate(runs):
        there = held["runs"][str(i)].get("settings", {}) | dict(quick=held.get("quick"))
        differ = [f"{name} {there.get(name)!r} (asked for: {value!r})" for name, value in
                  (run.settings | dict(quick=quick)).items() if there.get(name) != value]
        if differ:
            raise ValueError(f"the checkpoint in {folder} is of an SAE with {', '.join(differ)}: go on with its settings, or "
                             "choose another folder")
    source.restore(_cloned(held["source"]))
    for i, run in enumerate(runs):
        run.restore(held["runs"][str(i)])


def fit_all(runs: list[Run], source: Iterator[Pair], quick: bool = False, folder: Path | None = None,
            checkpoint_every_s: float = 60.0, label: str = "training") -> list[pd.DataFrame]:
    """Train many SAEs in place on one pass over `source`; returns their histories, one row a log line.

    Small SAEs are trained side by side, one thread each. In a process group (see `parallel`) every rank makes the same
    call, with a `source` of its share of each batch. With `folder`, a checkpoint is written there every
    `checkpoint_every_s` seconds and on Ctrl-C or SIGTERM; the same call then goes on from the newest whole one, bit for bit
    (`source` must have state() and restore()). `quick`: the steps, and nothing else, run inside `quick_products`. Raises
    ValueError when the source ends early or the checkpoint is of other settings, FloatingPointError when a loss or a
    parameter is not finite; a checkpoint never holds such a one.
    """
    tokens = runs[0].tokens
    if any(run.tokens != tokens for run in runs):
        raise ValueError(f"runs on one pass need one length, got {sorted({run.tokens for run in runs})} tokens")
    sharded = any(hasattr(run.sae, "sharded") for run in runs)
    if folder:
        _restore(runs, source, quick, folder, sharded)
    quiet = {} if parallel.main() else dict(disable=True)  # one bar is enough
    saved, threads = time.monotonic(), torch.get_num_threads()
    with (checkpoints.stoppable() as stop, _side_by_side(runs) as each,
          tqdm(total=tokens, initial=runs[0].seen, desc=label, unit="tok", unit_scale=True, leave=False,
               **quiet) as progress):
        while runs[0].seen < tokens:
            with _threads(threads) if isinstance(source, Streamed) else nullcontext():  # a stream runs the language model
                x, t = next(source, (None, None))
            if x is None:
                raise ValueError(f"{tokens} tokens of training were asked for, the activations ended after "
                                 f"{runs[0].seen}: give more text, or train on fewer")
            x, t = x.to(runs[0].silent.device), t.to(runs[0].silent.device)
            with quick_products(quick):
                checking = [run for run, out in zip(runs, each(Run.step, runs, repeat(x), repeat(t))) if run.log(x, out)]
            with _threads(threads):
                for run in checking:
                    run.look()
            progress.update(runs[0].seen - progress.n)
            due = bool(folder) and time.monotonic() - saved >= checkpoint_every_s
            asked = parallel.any_rank(stop.signal or due, runs[0].silent.device)  # 1: a checkpoint; more: a signal
            if folder and asked:
                for run in runs:
                    run.all_finite()
                parallel.save(folder, runs[0].seen, dict(
                    quick=quick, source=source.state(), runs={str(i): run.state() for i, run in enumerate(runs)}), sharded)
                saved = time.monotonic()
            if asked > 1:
                checkpoints.Stop(asked).leave()
    for run in runs:
        run.all_finite()
        run.sae.eval()
    return [pd.DataFrame(run.history) for run in runs]


def fit(sae: SAE, source: Iterator[Pair], tokens: int, quick: bool = False, folder: Path | None = None,
        checkpoint_every_s: float = 60.0, label: str = "training", **how) -> pd.DataFrame:
    """Train one SAE in place on `tokens` pairs: `how` as in Run, the rest as in fit_all. Returns its history."""
    return fit_all([Run(sae, tokens, **how)], source, quick, folder, checkpoint_every_s, label)[0]


SMALL = 1 << 20  # weights of an encoder below which one thread a run beats all threads for each in turn


@contextmanager
def _side_by_side(runs: list[Run]) -> Iterator[Callable]:
    """A `map` for the steps of runs: threads where the runs are small and on a CPU, else one after the other."""
    cores = 1 if parallel.together() else torch.get_num_threads()  # ranks must meet over the runs in one order
    if len(runs) == 1 or cores == 1 or any(run.sae.W_enc.is_cuda or run.sae.W_enc.numel() > SMALL for run in runs):
        yield map
        return
    with (_threads(1),  # here too: OpenMP's idle threads would spin on the cores that the runs need
          ThreadPoolExecutor(min(cores, len(runs)), initializer=torch.set_num_threads, initargs=(1,)) as pool):
        yield pool.map


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Data:
    """What a training run is given: the activations of one layer, and what its start needs from them.

    source(seed): an endless iterator of pairs with state() and restore(); stats: see `statistics`; unigrams (V, d) raw;
    identity: what names the data.
    """

    source: Callable[[int], Iterator[Pair]]
    stats: dict[str, torch.Tensor]
    unigrams: torch.Tensor
    identity: dict


def prepare(lm, rows: torch.Tensor, layer: int, batch: int = 4096, buffer: int = 131072, store_gb: float = 20.0,
            folder: Path = store.CACHE / "activations", sample_rows: int = 20_000) -> Data:
    """Activations of `lm` (see lm.LM) at `layer` over token rows (N, T): from a store in `folder`, made once, or streamed.

    A store that would need more than `store_gb` is not made: the language model then runs during training, pairs are mixed
    in a buffer of `buffer` tokens, and `stats` come from one pass over the first `sample_rows` rows, of which nothing is
    kept. Unigrams and `stats` are kept in `folder`.
    """
    layer, stored = lm.layer(layer), fits(lm, rows, store_gb)
    if stored:
        held = _stored(lm, rows, layer, store_gb, folder)
        identity, own, measure = held.identity, dict(buffer=0), held.statistics
    else:
        sample = rows[:sample_rows]
        identity, measure = _identity(lm, sample, layer), partial(_sampled, lm, sample, layer)
        own = dict(buffer=buffer, sample=identity["rows"])
    key = store.key(vocabulary=lm.vocabulary, **identity)
    unigrams = _cached(folder / f"unigrams-{key}.safetensors", lambda: dict(x=lm.unigrams(layer)))["x"]
    stats = _cached(folder / f"statistics-{key}.safetensors", lambda: measure(lm.vocabulary))
    stats = {name: value.to(lm.device) for name, value in stats.items()}
    identity = identity | own | dict(batch=batch, rows=_digest(rows))
    dealt = dict(rank=parallel.rank(), world=parallel.world())
    if stored:
        ahead = lm.device.type == "cuda"  # reads while the GPU works
        return Data(lambda seed: Shuffled(held, batch, seed, ahead, **dealt), stats, unigrams.to(lm.device), identity)
    return Data(lambda seed: Streamed(rows, lm.at(layer), lm.keep, batch, buffer, seed, **dealt), stats,
                unigrams.to(lm.device), identity)


def held_out(lm, rows: torch.Tensor, layer: int, store_gb: float = 20.0, folder: Path = store.CACHE / "activations") -> Pair:
    """All pairs of token rows (N, T) in memory, x (m, d) float32, t (m,) int64, in their order; from a store, made once."""
    held = _stored(lm, rows, lm.layer(layer), store_gb, folder)
    return tuple(tensor.to(lm.device) for tensor in held.gather(torch.arange(len(held))))


def fits(lm, rows: torch.Tensor, store_gb: float) -> bool:
    """Whether `prepare` stores the activations of token rows (N, T), and does not stream them."""
    return len(rows) * rows.shape[1] * (2 * lm.d_model + 4) < store_gb * 1e9


def _identity(lm, rows: torch.Tensor, layer: int) -> dict:
    code = {name: store.digest(Path(__file__).with_name(name)) for name in ("lm.py", "activations.py")}
    return dict(layer=layer, weights=lm.fingerprint, rows=_digest(rows), code=store.key(**code))


def _sampled(lm, rows: torch.Tensor, layer: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Statistics straight from the language model, of activations rounded as a store and a stream round them."""
    parts = tqdm(activations(rows, lm.at(layer), lm.keep), "statistics", -(-len(rows) // 64), leave=False)
    return statistics(((x.bfloat16(), t) for x, t in parts), vocabulary)


def _stored(lm, rows: torch.Tensor, layer: int, store_gb: float, folder: Path) -> Store:
    identity = _identity(lm, rows, layer)
    return Store.make(folder / store.key(**identity), rows, lm.at(layer), lm.keep, lm.d_model, identity, max_gb=store_gb)


def _cached(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    if (held := store.read_tensors(path)) is None:
        store.write_tensors(path, make())
        held = store.read_tensors(path)
    return held


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()


# How a run starts and learns. "text" and "code" are the paper's two recipes: see the settings table of the README. Rates
# are in units of the activation scale; table_lr 0 is the common rate. Without a table the encoder starts at W_dec.
_CODE = dict(start="unigram", table_scale=0.5, encoder="transpose", encoder_scale=0.5, encoder_sees="full",
             table_lr=1e-2, schedule="cosine", last_lr=0.3, aux_weight=0.0, aux_lookup=False)
RECIPES = {
    "code": _CODE,
    "text": _CODE | dict(table_scale=1.0, encoder="kaiming", table_lr=0.0, last_lr=0.0),
    "ours": _CODE | dict(table_lr=3e-2, schedule="decay", last_lr=0.0, aux_weight=0.25, aux_lookup=True),
}


RUN_CODE = ("sae.py", "kernels.py", "train.py")  # a change in one of these makes every trained SAE out of date


def sweep(folder: Path, data: Data, jobs: list[dict], memory_gb: float = 4.0, checkpoint_every_s: float = 60.0) -> list[Path]:
    """Train the SAEs of `jobs` that are not in `folder` yet; returns where each lies, in order.

    A job holds the arguments of `trained`. SAEs of one seed see the same batches in one pass, as many at a time as
    `memory_gb` allows; a pass that was interrupted is gone on with first, as it was planned, whatever `memory_gb` is now.
    Raises ValueError for a job that cannot fit, or for an unknown recipe or change.
    """
    jobs = [_Job(folder, data, **job) for job in jobs]
    known = {job.place.name: job for job in jobs}
    begun = [[known[name] for name in names] for place, names in _planned(folder)
             if known.keys() >= set(names) and not all(known[name].done for name in names) and any(place.glob("[0-9]*"))]
    taken = {job.place for group in begun for job in group}
    missing = [job for job in known.values() if not job.done and job.place not in taken]
    for group in begun + list(_groups(missing, memory_gb)):
        names = [job.place.name for job in group]
        unfinished = folder / "unfinished" / store.key(places=names)
        store.write_json(unfinished / PLAN, dict(places=names))
        saes = [job.build(data) for job in group]
        runs = [job.run(sae) for job, sae in zip(group, saes)]
        label = f"{len(group)} SAEs" if len(group) > 1 else f"{saes[0].activation} {'+ table ' * (saes[0].lookup != 'none')}"
        histories = fit_all(runs, data.source(group[0].seed), group[0].quick, unfinished, checkpoint_every_s,
                            f"{label} seed {group[0].seed}")
        for job, sae, history in zip(group, saes, histories):
            if not job.done:
                job.keep(sae, history)
        shutil.rmtree(unfinished, ignore_errors=True)
    for place, names in _planned(folder):  # what passes of another plan left
        if all(name in known and known[name].done for name in names):
            shutil.rmtree(place, ignore_errors=True)
    return [job.place for job in jobs]


PLAN = "jobs.json"  # in the folder of an unfinished pass: which SAEs it trains, in their order


def _planned(folder: Path) -> list[tuple[Path, list[str]]]:
    """The folders of unfinished passes, and the names of the SAEs that each was to train."""
    found = []
    for plan in sorted((folder / "unfinished").glob(f"*/{PLAN}")):
        try:
            found.append((plan.parent, [str(name) for name in store.read_json(plan)["places"]]))
        except (ValueError, KeyError, TypeError):  # damaged: nobody knows what its pass was
            shutil.rmtree(plan.parent, ignore_errors=True)
    return found


def trained(folder: Path, data: Data, **job) -> tuple[SAE, pd.DataFrame]:
    """An SAE trained on `data` and its history; taken from `folder` when these very settings were trained before.

    activation, n, k, lookup, seed, tokens: as in SAE and Run; lr 1e-3, sparsity 0, dead_after_tokens 200000, quick True
    (see quick_products), check None, checks 0; recipe "ours", an entry of RECIPES, of which any other argument overrides a
    part (the ablations).
    """
    place = sweep(folder, data, [job])[0]
    return SAE.load(place).to(data.unigrams.device), pd.read_csv(place / "history.csv")


class _Job:
    """One SAE of a sweep: its settings and its place in the folder."""

    def __init__(self, folder: Path, data: Data, *, activation: str, n: int, k: int, lookup: str, seed: int, tokens: int,
                 lr: float = 1e-3, sparsity: float = 0.0, recipe: str = "ours", dead_after_tokens: int = 200_000,
                 quick: bool = True, check: Callable[[SAE], dict] | None = None, checks: int = 0, **changes):
        if recipe not in RECIPES or not set(changes) <= set(RECIPES["ours"]):
            raise ValueError(f"got recipe {recipe!r} with changes of {sorted(changes)}: the recipes are "
                             f"{', '.join(RECIPES)}, and they consist of {', '.join(RECIPES['ours'])}")
        self.how, self.seed, self.tokens, self.quick, self.check = RECIPES[recipe] | changes, seed, tokens, quick, check
        self.settings = dict(activation=activation, n=n, k=k, lookup=lookup, sparsity=sparsity, seed=seed, tokens=tokens,
                             lr=lr, quick=quick, checks=checks, dead_after_tokens=dead_after_tokens)
        code = {name: store.digest(Path(__file__).with_name(name)) for name in RUN_CODE}
        self.named = self.settings | self.how | data.identity | dict(trainer=store.key(**code))
        self.place = folder / store.key(**self.named)
        vocabulary, d_model = data.unigrams.shape
        self.bytes = needed_bytes(d_model, n, activation, k, 0 if lookup == "none" else vocabulary, data.identity["batch"])

    @property
    def done(self) -> bool:
        return (self.place / "history.csv").is_file()  # written last: the rest is whole

    def build(self, data: Data) -> SAE:
        return build(data, *(self.settings[name] for name in ("activation", "n", "k", "lookup", "seed")), self.how)

    def run(self, sae: SAE) -> Run:
        own = ("tokens", "lr", "sparsity", "checks", "dead_after_tokens", "seed")
        return Run(sae, check=self.check, table_lr=self.how["table_lr"] or self.settings["lr"],
                   **{name: self.settings[name] for name in own},
                   **{name: self.how[name] for name in ("schedule", "last_lr", "aux_weight")})

    def keep(self, sae: SAE, history: pd.DataFrame) -> None:
        sae.save(self.place)
        store.write_json(self.place / "settings.json", self.named)
        store.write_table(self.place / "history.csv", history)


def needed_bytes(d_model: int, n: int, activation: str, k: int, vocabulary: int, batch: int) -> int:
    """What training one SAE takes at its peak: weights, gradients, Adam's moments, and what a step holds beside them."""
    weights = 4 * (2 * n * d_model) + 3 * vocabulary * d_model
    step = 8 * batch * d_model + (8 * batch * k if activation == "topk" else 7 * batch * n)
    return 4 * (weights + step)


def _groups(jobs: list[_Job], memory_gb: float) -> Iterator[list[_Job]]:
    """Jobs that can share a pass, as many together as fit."""
    passes: dict[tuple, list[_Job]] = {}
    for job in jobs:
        if job.bytes > memory_gb * 1e9:
            raise ValueError(f"training this SAE takes about {job.bytes / 1e9:.1f} GB, and `memory_gb` is {memory_gb:g}: raise "
                             f"it, or choose fewer features or a smaller batch ({job.settings})")
        passes.setdefault((job.seed, job.tokens, job.quick), []).append(job)
    for group in passes.values():
        while group:
            taken = 1
            while taken < len(group) and sum(job.bytes for job in group[:taken + 1]) <= memory_gb * 1e9:
                taken += 1
            yield group[:taken]
            group = group[taken:]


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
