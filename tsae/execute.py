"""Notebooks run through papermill, each once for the same inputs, several at a time."""

import json
import logging
import os
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import papermill
import psutil
from nbclient.exceptions import DeadKernelError

from tsae import fetch, store

VERSION = 1  # of finished notebooks: raise it when metrics or scores give other results
LAST = "05_figures"  # it draws from the tables of all others
# Which notebooks find their SAEs where another trained them. Alone they train them themselves.
AFTER = {"02": "03", "04": "03", "07": "04", "08": "04"}


def key_of(path: Path, parameters: dict[str, object], folder: Path) -> str:
    """What names a finished notebook: its inputs.

    They are its code, its parameters but for where the run lies, what lies at those that are
    paths, every VERSION of the package, and the tables it reads. A finished run that was moved or
    copied is still finished.
    """
    own = own_of(parameters)
    inputs = [str(own.get("model", "")), *corpora(own)]
    wheels = fetch.known("model") | fetch.known("corpus")
    files = {name: wheels.get(name) or store.stamp(name) for name in inputs if name}
    reads = parameters.keys() == {"run_name"}  # tables alone, as LAST does
    tables = made_before(folder, path) if reads else {}
    return store.key(notebook=code_of(path), parameters=own, versions=store.versions(),
                     files=files, tables=tables)


def own_of(parameters: dict[str, object]) -> dict[str, object]:
    """The parameters but for where the run lies."""
    return {name: value for name, value in parameters.items() if name != "run_name"}


def is_done(path: Path, parameters: dict[str, object], folder: Path) -> bool:
    """Whether a notebook was finished in a run folder with the inputs of now."""
    done, executed = folder / f"done/{path.stem}.json", folder / "notebooks" / path.name
    there = done.is_file() and executed.is_file()
    return there and store.read_json(done)["key"] == key_of(path, parameters, folder)


def execute(plan: dict[Path, dict[str, object]], folder: Path, jobs: int) -> None:
    """Run the notebooks of `plan`, each with its parameters, `jobs` at a time.

    Each has its share of the cores; results do not depend on it. SystemExit, in a sentence, for
    one that fails. It, and KeyboardInterrupt, stop the others: they write their checkpoints.
    """
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what fails is said once, below
    waiting, running = list(plan), {}
    labels = {path: f"[{i}/{len(plan)}] {path.stem}" for i, path in enumerate(plan, 1)}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                for path in _next(waiting, list(running.values()), jobs):
                    waiting.remove(path)
                    begun = pool.submit(run, path, plan[path], folder, labels[path], jobs == 1)
                    running[begun] = path
                _tell(running, folder, labels, shown=jobs == 1)
        except BaseException:
            _stop(list(running))
            raise


def _next(waiting: list[Path], running: list[Path], jobs: int) -> list[Path]:
    """The notebooks to start now, in order: those that need no other one that is not done."""
    open_ones = {path.name[:2] for path in [*waiting, *running]}
    ready = [path for path in waiting if AFTER.get(path.name[:2]) not in open_ones or jobs == 1]
    ready = [path for path in ready if path.stem != LAST or len(open_ones) == 1]
    needed = set(AFTER.values())
    ready.sort(key=lambda path: jobs > 1 and path.name[:2] not in needed)  # others wait for these
    return ready[:jobs - len(running)]


def _tell(running: dict[Future, Path], folder: Path, labels: dict[Path, str], shown: bool) -> None:
    """Wait for a notebook to end, and raise what it raised; say once a minute how far all are."""
    done = wait(running, timeout=60, return_when=FIRST_COMPLETED).done
    for future in done:
        running.pop(future)
        future.result()
    if not done and not (shown and sys.stderr.isatty()):
        for path in running.values():
            print(f"{labels[path]}  {_progress(folder / 'notebooks' / path.name)}", flush=True)


def _progress(executed: Path) -> str:
    try:
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):  # it is being written
        return "running"
    states = [cell["metadata"].get("papermill", {}).get("status") for cell in cells]
    return f"cell {states.count('completed') + 1} of {len(cells)}"


def _stop(running: list[Future]) -> None:
    """Interrupt the kernels, which are this process's children; kill those that go on."""
    for kernel in psutil.Process().children():
        kernel.send_signal(signal.SIGINT)
    if wait(running, timeout=60).not_done:
        for kernel in psutil.Process().children():
            kernel.kill()


def run(path: Path, parameters: dict[str, object], folder: Path, label: str,
        bar: bool = False) -> None:
    """Execute a notebook into `folder`/notebooks, unless that was done with the same inputs.

    SystemExit with one sentence if it fails. `bar`: a progress bar, where there is a terminal.
    """
    if is_done(path, parameters, folder):
        print(f"{label}  done before", flush=True)
        return
    print(f"{label}  running", flush=True)
    key, started = key_of(path, parameters, folder), time.monotonic()
    executed = folder / "notebooks" / path.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(path), str(executed), parameters, progress_bar=bar and sys.stderr.isatty(),
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
    except (papermill.PapermillExecutionError, RuntimeError) as error:
        said = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error)
        if isinstance(error, DeadKernelError):
            said = ("its kernel died, most often for want of memory: close other programs, or take "
                    "smaller sizes (-p memory_gb=1)")
        raise SystemExit(f"{path.stem} stopped: {said}\nIts copy is in {executed.parent}") from None
    seconds = time.monotonic() - started
    store.write_json(folder / f"done/{path.stem}.json",
                     dict(key=key, parameters=own_of(parameters), seconds=round(seconds, 1)))
    print(f"{label}  done in {seconds:.0f} s", flush=True)


def corpora(settings: dict[str, object]) -> list[str]:
    """The parts of a corpus: one that is there is one part, whatever its name."""
    corpus = str(settings.get("corpus", ""))
    if Path(corpus).expanduser().exists():
        return [corpus]
    return [part.strip() for part in corpus.split("+")]


def manifest_of(folder: Path) -> dict[str, dict]:
    """What is known of the tables in a folder: {file name: what made it, from what}."""
    path = folder / "manifest.json"
    return store.read_json(path) if path.is_file() else {}


def made_before(folder: Path, notebook: Path) -> dict[str, str]:
    """Digests of the tables that other notebooks left in the run folder."""
    return {name: line["sha256"] for name, line in manifest_of(folder / "tables").items()
            if line["notebook"] != notebook.stem}


def code_of(notebook: Path) -> list[str]:
    """The code cells' text: outputs and prose do not make a notebook new."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


