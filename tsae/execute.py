"""Notebooks run through papermill, each once for the same inputs, several at a time."""

import json
import logging
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import papermill
import psutil
from nbclient.exceptions import DeadKernelError

from tsae import fetch, store

VERSION = 1  # of finished notebooks: raise it when metrics or scores give other results
LAST = "05_figures"  # it draws from the tables of all others
# These share SAEs: one at a time, in this order, each finds those that the ones before trained.
SHARE = ("03", "02", "04", "07", "08")


def key_of(path: Path, parameters: dict[str, object], folder: Path) -> str:
    """What names a finished notebook: its inputs.

    They are its code, its parameters but for where the run lies, what lies at its model and
    corpus, every VERSION of the package, and the tables that LAST reads. A finished run that was
    moved or copied is still finished.
    """
    own = own_of(parameters)
    inputs = [str(own.get("model", "")), str(own.get("saelens", "")), *corpora(own)]
    wheels = fetch.known("model") | fetch.known("corpus")
    files = {name: wheels.get(name) or store.stamp(name) for name in inputs if name}
    tables = made_before(folder, path) if path.stem == LAST else {}
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

    SystemExit, in a sentence, for one that fails. It, and KeyboardInterrupt, stop the others:
    they write their checkpoints.
    """
    for name in ("papermill", "tornado"):  # what fails is said once, below
        logging.getLogger(name).setLevel(logging.CRITICAL)
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
    """The notebooks to start now: LAST when it is alone, the next of SHARE when none of it runs."""
    others = [path for path in waiting if path.stem != LAST]
    if jobs == 1 or not others:
        return waiting[:jobs - len(running)] if others or not running else []
    chain = sorted((path for path in others if path.name[:2] in SHARE),
                   key=lambda path: SHARE.index(path.name[:2]))
    if any(path.name[:2] in SHARE for path in running):
        chain = []
    free = [path for path in others if path.name[:2] not in SHARE]
    return [*chain[:1], *free][:jobs - len(running)]


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
    for attempt in range(6):  # a kernel between two cells does not listen
        for kernel in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if attempt < 5:
                    kernel.send_signal(signal.SIGINT)
                else:
                    kernel.kill()
        if not wait(running, timeout=30).not_done:
            return


def run(path: Path, parameters: dict[str, object], folder: Path, label: str,
        bar: bool = False) -> None:
    """Execute a notebook into `folder`/notebooks, unless that was done with the same inputs.

    SystemExit with one sentence if it fails. `bar`: a progress bar, where there is a terminal. The
    seconds that are kept are those of all attempts with these inputs, as each goes on.
    """
    if is_done(path, parameters, folder):
        print(f"{label}  done before", flush=True)
        return
    print(f"{label}  running", flush=True)
    key, started = key_of(path, parameters, folder), time.monotonic()
    executed, done = folder / "notebooks" / path.name, folder / f"done/{path.stem}.json"
    spent = folder / f"spent/{path.stem}.json"
    before = store.read_json(spent) if spent.is_file() else {}
    before = before["seconds"] if before.get("key") == key else 0.0
    executed.parent.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)  # its tables are about to change
    try:
        papermill.execute_notebook(
            str(path), str(executed), parameters, progress_bar=bar and sys.stderr.isatty(),
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
        seconds = before + time.monotonic() - started
    except (papermill.PapermillExecutionError, RuntimeError) as error:
        said = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error)
        if isinstance(error, DeadKernelError):
            said = ("its kernel died, most often for want of memory: close other programs, or take "
                    "smaller sizes (-p memory_gb=1)")
        raise SystemExit(f"{path.stem} stopped: {said}\nIts copy is in {executed.parent}") from None
    finally:
        store.write_json(spent, dict(key=key, seconds=before + time.monotonic() - started))
    spent.unlink()
    store.write_json(done, dict(key=key, parameters=own_of(parameters),
                                seconds=round(seconds, 1)))
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


