"""What there is: presets, notebooks and runs; what a run would take; what can be removed."""

import json
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path

from tsae import store


def size_of(folder: Path) -> float:
    """Gigabytes of the files in a folder."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # a running notebook has just replaced it
            total += file.lstat().st_size
    return total / 1e9


def show(presets: Path, notebooks: list[Path]) -> None:
    """Print the presets, the notebooks, and the runs with their settings, size and state."""
    print("presets (python -m tsae --preset NAME)")
    for path in sorted(presets.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        about = " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))
        _line(path.stem, about)
    print("\nnotebooks (python -m tsae --only NN)")
    for path in sorted(notebooks):
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
        _line(path.stem, "".join(first).splitlines()[0].partition("·")[2].strip())
    print("\nruns (data/runs)")
    for folder in _folders(store.DATA / "runs"):
        done = sorted(path.stem[:2] for path in (folder / "done").glob("*.json"))
        note = folder / "run.json"
        noted = store.read_json(note)["notebooks"] if note.is_file() else {}
        changed = {name: one["values"][name] for one in noted.values() for name in one["changed"]}
        told = ", ".join(f"{name}={value}" for name, value in changed.items()) or "the defaults"
        state = f"finished {' '.join(done)}" if done else "not finished"
        _line(folder.name, f"{size_of(folder):.1f} GB; {state}; {told}")


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.glob("*") if path.is_dir())


def _line(name: str, about: str) -> None:
    width = max(40, shutil.get_terminal_size().columns - 34)
    print(f"  {name:<30}{about[:width - 3] + '...' if len(about) > width else about}")


def times(folder: Path, notebooks: list[Path]) -> dict[str, object]:
    """The wall times of a finished run, in seconds, with the machine and the disk that it took."""
    seconds = {path.stem: store.read_json(folder / f"done/{path.stem}.json")["seconds"]
               for path in notebooks}
    return dict(seconds=seconds, gigabytes=round(size_of(folder), 2), cores=os.cpu_count(),
                machine=f"{platform.system()} {platform.machine()}, Python "
                        f"{platform.python_version()}")


def forecast(done: dict[Path, bool], results: Path) -> None:
    """Print which notebooks would run, and what they took where the preset was published."""
    path = results / "times.json"
    known = store.read_json(path) if path.is_file() else dict(seconds={})
    for notebook, finished in done.items():
        seconds = known["seconds"].get(notebook.stem)
        took = f"took {seconds:.0f} s on {known['cores']} cores" if seconds else "time not known"
        print(f"{notebook.stem}  {'done before' if finished else f'would run; {took}'}")
    left = [known["seconds"].get(notebook.stem, 0) for notebook, finished in done.items()
            if not finished]
    if left and known["seconds"]:
        seconds = sum(left)
        took = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
        print(f"in all about {took} where those before it have run, and "
              f"{known['gigabytes']:.1f} GB of disk for a whole run")
    free = shutil.disk_usage(store.ROOT).free / 1e9
    print(f"stored activations take 2 bytes a number, up to store_gb; {free:.0f} GB are free")


def clean() -> None:
    """Remove the cache, and then each run, where the answer is y. Results are never touched."""
    for folder in [store.CACHE, *_folders(store.DATA / "runs")]:
        if folder.is_dir():
            try:
                answer = input(f"remove {folder} ({size_of(folder):.1f} GB)? [y/N] ")
            except EOFError:
                raise SystemExit("--clean asks before it removes: run it in a terminal") from None
            if answer.strip().lower() in ("y", "yes"):
                folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
