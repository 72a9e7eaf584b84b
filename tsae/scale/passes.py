"""Many SAEs on one pass over the activations, that goes on bit for bit where it was stopped.

The step is `train.Run.step`, the loop that of `train.fit` with what scale needs around it: SAEs
side by side on the cores, ranks that share a batch, checkpoints.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import repeat
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from tsae.kernels import quick_products
from tsae.pairs.order import Streamed
from tsae.scale import checkpoints, parallel
from tsae.train import Pair, Run

Branch = tuple[int, int]  # a shorter training: the number of its run, and its length in tokens
SMALL = 1 << 20  # weights of an encoder up to which a thread a run beats all threads in turn


def fit_all(runs: list[Run], source: Iterator[Pair], quick: bool = False,
            folder: Path | None = None, checkpoint_every_s: float = 60.0, label: str = "training",
            shorter: Sequence[Branch] = (),
            keep: Callable[[int, Run], None] = lambda i, run: None) -> list[pd.DataFrame]:
    """Train many SAEs in place on one pass over `source`; returns their histories.

    Small SAEs are trained side by side, a thread each. In a process group every rank makes the same
    call, with runs whose `exchange` is parallel.Ranks() and a `source` of its share of each batch.
    With `folder`, a checkpoint is written there every `checkpoint_every_s` seconds (less often
    where that would take over 5 % of the time), and on Ctrl-C or SIGTERM; the same call then goes
    on from the newest whole one, bit for bit (`source` must have state() and restore()). `quick`:
    steps run inside `kernels.quick_products`.

    `shorter` has shorter trainings of the runs. Such a one is the same until its rate begins to
    fall: there it branches off, and `keep` gets the run's number and the branch when that ends
    (after an interruption perhaps once more).

    Raises ValueError when the source ends early or the checkpoint is of other settings,
    FloatingPointError when a loss or a parameter is not finite (a checkpoint never holds one).
    """
    first, threads = runs[0], torch.get_num_threads()
    if any(run.tokens != first.tokens for run in runs):
        lengths = sorted({run.tokens for run in runs})
        raise ValueError(f"runs on one pass need one length, got {lengths} tokens")
    branches: dict[Branch, Run] = {}
    if folder:
        _restore(runs, branches, source, quick, folder)
    if not branches.keys() <= set(shorter):
        raise ValueError(f"the checkpoint in {folder} has shorter trainings {list(branches)} that "
                         "were not asked for: go on with its settings, or choose another folder")
    waiting = [branch for branch in shorter if first.seen < branch[1] and branch not in branches]
    saved, pause = time.monotonic(), checkpoint_every_s
    with checkpoints.stoppable() as stop, _side_by_side(runs) as each, _bar(first, label) as bar:
        for x, t in first.until_done(_on_all_threads(source, threads)):
            waiting = _branch_off(runs, branches, waiting, len(t) * first.exchange.world)
            together = [*runs, *branches.values()]
            with quick_products(quick):
                outs = list(each(Run.step, together, repeat(x), repeat(t)))
            with _threads(threads):
                for run, out in zip(together, outs):
                    if run.due():
                        run.history.append(run.line(x, out))
            del outs, out  # the next step may need the memory
            for i, tokens in [branch for branch, run in branches.items() if run.seen >= run.tokens]:
                keep(i, branches.pop((i, tokens)))
            bar.update(first.seen - bar.n)
            wanted = bool(folder) and time.monotonic() - saved >= pause
            asked = parallel.any_rank(stop.signal or wanted, x.device)  # over 1: a signal
            if folder and asked:
                begun = time.monotonic()
                _save(runs, branches, source, quick, folder)
                saved = time.monotonic()
                pause = checkpoint_every_s and max(checkpoint_every_s, 20 * (saved - begun))
            if asked > 1:
                checkpoints.Stop(asked).leave()
    return [run.finish() for run in runs]


def _branch_off(runs: list[Run], branches: dict[Branch, Run], waiting: list[Branch],
                batch: int) -> list[Branch]:
    """Add the branches whose rate differs at the next step of `batch` tokens, or whose last it is.

    Returns those that still wait.
    """
    later = []
    for i, tokens in waiting:
        same = runs[i].rate(tokens) == runs[i].rate(runs[i].tokens)
        if same and runs[i].seen + batch < tokens:
            later.append((i, tokens))
        else:
            branches[i, tokens] = runs[i].branch(tokens)
    return later


def _bar(run: Run, label: str) -> tqdm:
    quiet = {} if parallel.main() else dict(disable=True)  # one bar is enough
    return tqdm(total=run.tokens, initial=run.seen, desc=label, unit="tok", unit_scale=True,
                leave=False, **quiet)


def _on_all_threads(source: Iterator[Pair], threads: int) -> Iterator[Pair]:
    """`source`; one that runs the language model as it goes does so on all threads."""
    while True:
        with _threads(threads) if isinstance(source, Streamed) else nullcontext():
            pair = next(source, None)
        if pair is None:
            return
        yield pair


@contextmanager
def _side_by_side(runs: list[Run]) -> Iterator[Callable]:
    """A `map` for the steps of runs: threads where they are small and on a CPU, else in turn."""
    # Ranks meet over the runs in one order.
    cores = 1 if parallel.together() else torch.get_num_threads()
    large = any(run.sae.W_enc.is_cuda or run.sae.W_enc.numel() > SMALL for run in runs)
    if len(runs) == 1 or cores == 1 or large:
        yield map
        return
    # One thread here too: OpenMP's idle threads would spin on the cores that the runs need.
    with (_threads(1), ThreadPoolExecutor(min(cores, len(runs)), initializer=torch.set_num_threads,
                                          initargs=(1,)) as pool):
        yield pool.map


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _save(runs: list[Run], branches: dict[Branch, Run], source: Iterator[Pair], quick: bool,
          folder: Path) -> None:
    together = [*runs, *branches.values()]
    for run in together:
        run.refuse_nan_weights()
    state = dict(quick=quick, source=source.state(), branches=[list(branch) for branch in branches],
                 runs={str(i): _state(run) for i, run in enumerate(together)})
    parallel.save(folder, runs[0].seen, state, _sharded(runs))


def _sharded(runs: list[Run]) -> bool:
    return any(hasattr(run.sae, "sharded") for run in runs)


PLAIN = ("seen", "logged", "checks_left", "history", "usual_loss")  # a Run's state but for tensors


def _state(run: Run) -> checkpoints.State:
    """Everything that the rest of a run depends on, and its settings, but for its `check`."""
    optimisers = {}
    for i, (optimiser, _) in enumerate(run.optimisers):
        moments = optimiser.state_dict()["state"]
        optimisers[str(i)] = {str(j): values for j, values in moments.items()}
    return dict(settings=run.settings, sae=run.sae.state_dict(), optimisers=optimisers,
                silent=run.silent) | {name: getattr(run, name) for name in PLAIN}


def _go_on(run: Run, state: checkpoints.State) -> None:
    """Go on as after `state`, of which no memory is shared: its tensors may be maps of a file."""
    run.sae.load_state_dict(state["sae"])
    for i, (optimiser, _) in enumerate(run.optimisers):
        moments = {int(j): value for j, value in _cloned(state["optimisers"][str(i)]).items()}
        optimiser.load_state_dict(optimiser.state_dict() | dict(state=moments))
    run.silent = _cloned(state["silent"]).to(run.silent.device)
    for name in PLAIN:
        setattr(run, name, state[name])


def _cloned(value):
    if isinstance(value, dict):
        return {name: _cloned(inner) for name, inner in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def _restore(runs: list[Run], branches: dict[Branch, Run], source: Iterator[Pair], quick: bool,
             folder: Path) -> None:
    """Bring runs and source to where the newest checkpoint in `folder` is, if there is one.

    `branches` get those that it has.

    Raises ValueError that names the settings in which it is not one of these runs.
    """
    state = parallel.newest(folder, _sharded(runs))
    if not state:
        return
    begun = [tuple(branch) for branch in state.get("branches", [])]
    if (trained := len(state["runs"]) - len(begun)) != len(runs):
        raise ValueError(f"the checkpoint in {folder} is of {trained} SAEs, and "
                         f"{len(runs)} are to be trained: go on with the same ones, or choose "
                         "another folder")
    branches.update({(i, tokens): runs[i].branch(tokens) for i, tokens in begun})
    for i, run in enumerate([*runs, *branches.values()]):
        there = state["runs"][str(i)].get("settings", {}) | dict(quick=state.get("quick"))
        differ = [f"{name} {there.get(name)!r} (asked for: {value!r})"
                  for name, value in (run.settings | dict(quick=quick)).items()
                  if there.get(name) != value]
        if differ:
            raise ValueError(f"the checkpoint in {folder} is of an SAE with {', '.join(differ)}: "
                             "go on with its settings, or choose another folder")
    source.restore(_cloned(state["source"]))
    for i, run in enumerate([*runs, *branches.values()]):
        _go_on(run, state["runs"][str(i)])
