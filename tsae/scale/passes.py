"""Many SAEs on one pass over the activations, that goes on bit for bit where it was stopped.

The step is `train.Run.step`, the loop that of `train.fit` with what scale needs around it: SAEs
side by side on the cores, ranks that share a batch, checkpoints.
"""

import time
from collections.abc import Callable, Iterator
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

SMALL = 1 << 20  # weights of an encoder up to which a thread a run beats all threads in turn


def fit_all(runs: list[Run], source: Iterator[Pair], quick: bool = False,
            folder: Path | None = None, checkpoint_every_s: float = 60.0,
            label: str = "training") -> list[pd.DataFrame]:
    """Train many SAEs in place on one pass over `source`; returns their histories.

    Small SAEs are trained side by side, a thread each. In a process group every rank makes the same
    call, with runs whose `exchange` is parallel.Ranks() and a `source` of its share of each batch.
    With `folder`, a checkpoint is written there every `checkpoint_every_s` seconds and on Ctrl-C or
    SIGTERM; the same call then goes on from the newest whole one, bit for bit (`source` must have
    state() and restore()). `quick`: steps run inside `kernels.quick_products`. Raises ValueError
    when the source ends early or the checkpoint is of other settings, FloatingPointError when a
    loss or a parameter is not finite; a checkpoint never holds such a one.
    """
    first, threads = runs[0], torch.get_num_threads()
    if any(run.tokens != first.tokens for run in runs):
        lengths = sorted({run.tokens for run in runs})
        raise ValueError(f"runs on one pass need one length, got {lengths} tokens")
    if folder:
        _restore(runs, source, quick, folder)
    saved = time.monotonic()
    with checkpoints.stoppable() as stop, _side_by_side(runs) as each, _bar(first, label) as bar:
        for x, t in first.until_done(_on_all_threads(source, threads)):
            with quick_products(quick):
                outs = list(each(Run.step, runs, repeat(x), repeat(t)))
            with _threads(threads):
                for run, out in zip(runs, outs):
                    if run.due():
                        run.history.append(run.line(x, out))
            del outs, out  # the next step may need the memory
            bar.update(first.seen - bar.n)
            wanted = bool(folder) and time.monotonic() - saved >= checkpoint_every_s
            asked = parallel.any_rank(stop.signal or wanted, x.device)  # over 1: a signal
            if folder and asked:
                _save(runs, source, quick, folder)
                saved = time.monotonic()
            if asked > 1:
                checkpoints.Stop(asked).leave()
    return [run.finish() for run in runs]


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


def _save(runs: list[Run], source: Iterator[Pair], quick: bool, folder: Path) -> None:
    for run in runs:
        run.refuse_nan_weights()
    state = dict(quick=quick, source=source.state(),
                 runs={str(i): _state(run) for i, run in enumerate(runs)})
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


def _restore(runs: list[Run], source: Iterator[Pair], quick: bool, folder: Path) -> None:
    """Bring runs and source to where the newest checkpoint in `folder` is, if there is one.

    Raises ValueError that names the settings in which it is not one of these runs.
    """
    state = parallel.newest(folder, _sharded(runs))
    if not state:
        return
    if len(state["runs"]) != len(runs):
        raise ValueError(f"the checkpoint in {folder} is of {len(state['runs'])} SAEs, and "
                         f"{len(runs)} are to be trained: go on with the same ones, or choose "
                         "another folder")
    for i, run in enumerate(runs):
        there = state["runs"][str(i)].get("settings", {}) | dict(quick=state.get("quick"))
        differ = [f"{name} {there.get(name)!r} (asked for: {value!r})"
                  for name, value in (run.settings | dict(quick=quick)).items()
                  if there.get(name) != value]
        if differ:
            raise ValueError(f"the checkpoint in {folder} is of an SAE with {', '.join(differ)}: "
                             "go on with its settings, or choose another folder")
    source.restore(_cloned(state["source"]))
    for i, run in enumerate(runs):
        _go_on(run, state["runs"][str(i)])
