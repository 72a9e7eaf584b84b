"""SAEs by their settings: found where they were trained before, the others trained together.

As many go into one pass as memory allows. What names an SAE is its settings, its data and
`train.VERSION`; it lies in a folder of that name.
"""

import ctypes
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from filelock import FileLock

from tsae import store, train
from tsae.baseline import Baseline
from tsae.pairs.prepare import Data
from tsae.sae import SAE
from tsae.scale import parallel
from tsae.scale.passes import SMALL, fit_all

PLAN = "jobs.json"  # in the folder of an unfinished pass: which SAEs it trains, in their order


def keep_memory() -> None:
    """Ask glibc to keep freed memory to the end of the process; elsewhere nothing happens.

    Fresh pages for every large tensor of a step cost as much as its arithmetic. The command and the
    notebooks that train call it once.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks get no maps of their own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not given back


def _give_back() -> None:
    """Give back memory that `keep_memory` kept: over many SAEs of many sizes it would add up."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def sweep(folder: Path, data: Data, jobs: list[dict], memory_gb: float = 4.0,
          checkpoint_every_s: float = 60.0) -> list[Path]:
    """Train the SAEs of `jobs` that are not in `folder` yet; returns where each lies, in order.

    A job holds the arguments of `trained`. SAEs of one seed see the same batches in one pass, as
    many at a time as `memory_gb` allows; those that differ in their length only share their steps
    until the rate of the shorter begins to fall. Large SAEs are not trained beside small ones. A
    pass that was interrupted goes on first, as it was planned, whatever `memory_gb` is now. Raises
    ValueError for a job that cannot fit, or for an unknown recipe or change.
    """
    folder = Path(folder)
    jobs = [_Job(folder, data, **job) for job in jobs]
    known = {job.place.name: job for job in jobs}
    begun = _begun(folder, known)
    taken = {job.place for group in begun for job in group}
    new = [job for job in known.values() if not job.done and job.place not in taken]
    _refuse_large(new, memory_gb)
    for group in begun:
        _pass(folder, data, group, checkpoint_every_s)
    missing = [job for job in known.values() if not job.done]
    for group in _groups(missing, memory_gb):
        _pass(folder, data, group, checkpoint_every_s)
    for place, names in _planned(folder):  # what passes of another plan left
        if all(name in known and known[name].done for name in names):
            shutil.rmtree(place, ignore_errors=True)
    if parallel.main() and (new or begun or not (folder / "index.csv").is_file()):
        _index(folder)
    return [job.place for job in jobs]


def trained(folder: Path, data: Data, **job) -> tuple[SAE, pd.DataFrame]:
    """An SAE trained on `data` and its history; from `folder` when it was trained before.

    activation, n, k, lookup, seed, tokens: as in SAE and Run; lr 1e-3, sparsity 0,
    dead_after_tokens 200000, quick True (see quick_products), check None, checks 0; known None, a
    Baseline in place of the table, where it starts (`lookup` is then "none"); recipe "ours", an
    entry of RECIPES, of which any other argument overrides a part (the ablations).
    """
    place = sweep(folder, data, [job])[0]
    _give_back()
    return SAE.load(place).to(data.unigrams.device), pd.read_csv(place / "history.csv")


class _Job:
    """One SAE of a sweep: its settings and its place in the folder."""

    def __init__(self, folder: Path, data: Data, *, activation: str, n: int, k: int, seed: int,
                 tokens: int, lookup: str = "none", known: Baseline | None = None,
                 lr: float = 1e-3, sparsity: float = 0.0, recipe: str = "ours",
                 dead_after_tokens: int = 200_000, quick: bool = True,
                 check: Callable[[SAE], dict] | None = None, checks: int = 0, **changes):
        parts = train.RECIPES["ours"]
        if recipe not in train.RECIPES or not set(changes) <= set(parts):
            raise ValueError(
                f"got recipe {recipe!r} with changes of {sorted(changes)}: the recipes are "
                f"{', '.join(train.RECIPES)}, and they consist of {', '.join(parts)}")
        self.recipe, self.seed, self.tokens = train.RECIPES[recipe] | changes, seed, tokens
        self.quick, self.check, self.lr, self.known = quick, check, lr, known
        self.shape = dict(activation=activation, n=n, k=k, lookup=lookup, seed=seed)
        self.length = dict(tokens=tokens, sparsity=sparsity, dead_after_tokens=dead_after_tokens,
                           checks=checks, seed=seed)
        self.settings = self.shape | self.length | dict(lr=lr, quick=quick)
        self.named = self.settings | self.recipe | data.identity | dict(trained=train.VERSION)
        if lookup != "none" or known is not None:
            del self.named["plain_scale"]  # it is of SAEs without a table
        vocabulary, d_model = data.unigrams.shape
        self.large = n * d_model > SMALL
        rows = 0 if lookup == "none" else vocabulary
        if known is not None:
            self.named |= dict(known=known.config, known_state=store.content(known.state_dict()))
            rows = sum(p.numel() for p in known.parameters()) // d_model
        self.place = folder / store.key(**self.named)
        steady = self.recipe["schedule"] == "decay"  # under others the rates differ from the start
        branches = steady and not (sparsity or checks or parallel.together())  # see Run.branch
        self.stem = store.key(**self.named | dict(tokens=0)) if branches else self.place.name
        self.bytes = needed_bytes(d_model, n, activation, k, rows, data.identity["batch"])

    @property
    def done(self) -> bool:
        return (self.place / "history.csv").is_file()  # written last: the rest is whole

    def run(self, data: Data) -> train.Run:
        """The SAE at its start, to be trained."""
        sae = train.build(data.stats, data.unigrams, self.recipe, **self.shape, known=self.known)
        return train.Run(sae, check=self.check, exchange=parallel.Ranks(), **self.length,
                         **train.learning(self.recipe, self.lr))

    def keep(self, sae: SAE, history: pd.DataFrame) -> None:
        sae.save(self.place)
        store.write_json(self.place / "settings.json", self.named)
        store.write_table(self.place / "history.csv", history)


def _index(folder: Path) -> None:
    """Write folder/index.csv, by which store.find looks up SAEs.

    A row an SAE: name, settings (`lookup` is the kind of its baseline where one was given,
    `recipe` the name of a recipe that fits), the end of its history.
    """
    with FileLock(folder / ".lock"):  # another notebook may train others of the same run
        if rows := _rows(folder):
            store.write_table(folder / "index.csv", pd.DataFrame(rows))


def _rows(folder: Path) -> list[dict]:
    rows = []
    for history in sorted(folder.glob("*/history.csv")):
        settings, last = store.read_json(history.parent / "settings.json"), pd.read_csv(history)
        if known := settings.pop("known", {}):
            settings["lookup"] = known["kind"]
        recipe = next((name for name, parts in train.RECIPES.items()
                       if parts.items() <= (parts | settings).items()), "other")
        own = dict(name=history.parent.name, recipe=recipe)
        rows.append(own | settings | dict(last.iloc[-1][["l0", "nmse", "dead"]]))
    return rows


def _pass(folder: Path, data: Data, group: list[_Job], checkpoint_every_s: float) -> None:
    """Train the SAEs of a group on one pass, and keep each."""
    names = [job.place.name for job in group]
    unfinished = folder / "unfinished" / store.key(places=names)
    store.write_json(unfinished / PLAN, dict(places=names))
    longest = [job for job in group if job.tokens == max(job.tokens for job in group)]
    runs, first = [job.run(data) for job in longest], group[0]
    table = "+ table " * (first.shape["lookup"] != "none" or first.known is not None)
    label = f"{len(group)} SAEs" if len(group) > 1 else f"{first.shape['activation']} {table}"
    branches = {(i, job.tokens): job for i, whole in enumerate(longest) for job in group
                if job.stem == whole.stem and job is not whole}

    def keep(i: int, run: train.Run) -> None:
        if not (job := branches[i, run.tokens]).done:
            job.keep(run.sae, run.finish())

    histories = fit_all(runs, data.source(first.seed), first.quick, unfinished, checkpoint_every_s,
                        f"{label} seed {first.seed}", list(branches), keep)
    for job, run, history in zip(longest, runs, histories):
        if not job.done:
            job.keep(run.sae, history)
    shutil.rmtree(unfinished, ignore_errors=True)


def _begun(folder: Path, known: dict[str, _Job]) -> list[list[_Job]]:
    """The groups of jobs that an interrupted pass was to train, where it left a checkpoint."""
    groups = []
    for place, names in _planned(folder):
        ours = known.keys() >= set(names) and not all(known[name].done for name in names)
        if ours and any(place.glob("[0-9]*")):
            groups.append([known[name] for name in names])
    return groups


def _planned(folder: Path) -> list[tuple[Path, list[str]]]:
    """The folders of unfinished passes, and the names of the SAEs that each was to train."""
    found = []
    for plan in sorted((folder / "unfinished").glob(f"*/{PLAN}")):
        try:
            found.append((plan.parent, [str(name) for name in store.read_json(plan)["places"]]))
        except (ValueError, KeyError, TypeError):  # damaged: nobody knows what its pass was
            shutil.rmtree(plan.parent, ignore_errors=True)
    return found


def needed_bytes(d_model: int, n: int, activation: str, k: int, rows: int, batch: int) -> int:
    """Peak memory of training an SAE: weights, gradients, Adam's moments, a step's own tensors.

    `rows` are those of the table, or what the baseline's parameters come to.
    """
    weights = 4 * (2 * n * d_model) + 3 * rows * d_model
    step = 8 * batch * d_model + (8 * batch * k if activation == "topk" else 7 * batch * n)
    return 4 * (weights + step)


def _refuse_large(jobs: list[_Job], memory_gb: float) -> None:
    for job in jobs:
        if job.bytes > memory_gb * 1e9:
            raise ValueError(
                f"training this SAE takes about {job.bytes / 1e9:.1f} GB, and `memory_gb` is "
                f"{memory_gb:g}: raise it, or choose fewer features or a smaller batch "
                f"({job.settings})")


def _groups(jobs: list[_Job], memory_gb: float) -> Iterator[list[_Job]]:
    """Jobs that can share a pass, as many together as fit: large ones apart from small ones."""
    stems: dict[str, list[_Job]] = {}
    for job in jobs:
        stems.setdefault(job.stem, []).append(job)
    passes: dict[tuple, list[list[_Job]]] = {}
    for stem in stems.values():
        fits = _chain_bytes(stem) <= memory_gb * 1e9
        for chain in [stem] if fits else [[job] for job in stem]:
            longest = max(job.tokens for job in chain)
            same = chain[0].seed, longest, chain[0].quick, chain[0].large
            passes.setdefault(same, []).append(chain)
    for same_batches in passes.values():
        for together in parallel.in_groups(same_batches, _chain_bytes, memory_gb * 1e9):
            yield [job for chain in together for job in chain]


def _chain_bytes(chain: list[_Job]) -> int:
    """Peak memory of jobs that differ in their length only: the longest, and its branches.

    A branch lives over the last 20 % of its training: as many live together as such spans overlap.
    """
    shorter = sorted(job.tokens for job in chain)[:-1]
    together = [sum(0.8 * tokens < end <= tokens for tokens in shorter) for end in shorter]
    return chain[0].bytes * (1 + max(together, default=0))
