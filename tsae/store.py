"""Where things lie, and how they are written: whole or not at all, in a temporary file first."""

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

# Threads that wait for each other spin a moment and then sleep: else a step takes many times as
# long where another process wants the cores. It must be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if "PYTEST_VERSION" in os.environ:  # in the kernels of nbval too: no progress bars, no pictures
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TSAE_PNG", "0")

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(os.environ.get("TSAE_HOME") or Path(__file__).resolve().parents[1])
DATA = ROOT / "data"
CACHE = Path(os.environ.get("TSAE_CACHE") or DATA / "cache")  # is made anew where it is missing
EMBEDDED = DATA / "embedded"
WINDOWS = os.name == "nt"


def sync(path: Path) -> None:
    """Wait until the disk holds a file's bytes or a folder's names.

    Windows syncs only what was opened for writing, and no folders.
    """
    if path.is_dir() and WINDOWS:
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | Path):
    """Yields a temporary path beside `path`. It replaces `path` if the block raises no error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(path.suffix, f".{path.stem}-", path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        sync(Path(temporary))  # the bytes before the name, should the machine stop
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except SafetensorError as error:  # what it raises on a full disk is no OSError
        raise OSError(f"{path} could not be written ({error}): free some space there or choose "
                      "another folder") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: object) -> Path:
    """Write a value as JSON with sorted keys. What JSON does not know becomes its `str`."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def read_json(path: str | Path) -> dict:
    """A JSON object from disk. Raises ValueError with the file's name when it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): restore or make it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where a JSON object was expected")
    return value


def write_table(path: str | Path, table: pd.DataFrame) -> Path:
    """Write a result table as csv with six significant digits, in the order of its rows."""
    return write_text(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def read_table(path: str | Path, made_by: str = "") -> pd.DataFrame:
    """A result table. Raises FileNotFoundError that names the notebook which makes it."""
    if not Path(path).is_file():
        hint = f": run {made_by} first with the same `run_name`" if made_by else ""
        raise FileNotFoundError(f"there is no table {path}{hint}")
    return pd.read_csv(path, keep_default_na=False, na_values=[""], lineterminator="\n")


def result(folder: Path, name: str, table: pd.DataFrame, notebook: str, **parameters) -> None:
    """Write a result table to folder/tables/<name>.csv, and what made it to the manifest there."""
    path = write_table(folder / "tables" / f"{name}.csv", table)
    packages = ("torch", "transformers", "nnsight", "datasets")
    made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M")
    line = dict(sha256=digest(path), made=made, notebook=notebook, parameters=parameters,
                versions={package: version(package) for package in packages})
    with _manifest(folder) as lines:
        lines[path.name] = line


def no_result(folder: Path, *names: str) -> None:
    """Remove result tables that a run with other settings left in `folder`, and their lines."""
    with _manifest(folder) as lines:
        for name in names:
            (folder / "tables" / f"{name}.csv").unlink(missing_ok=True)
            lines.pop(f"{name}.csv", None)


@contextmanager
def _manifest(folder: Path):
    """Yields the lines of a run's manifest, to be changed: one notebook at a time."""
    path = folder / "tables" / "manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        lines = read_json(path) if path.is_file() else {}
        yield lines
        write_json(path, lines)


def versions() -> dict[str, str]:
    """The VERSION of each file of the package that has one, read without loading the files."""
    source = Path(__file__).parent
    line = re.compile(r"^(?:\w+, )?VERSION = (?:.*, )?(\d+)", re.M)
    found = {path: line.search(path.read_text(encoding="utf-8")) for path in source.rglob("*.py")}
    return {path.relative_to(source).as_posix(): match[1] for path, match in found.items() if match}


def once(folder: Path, make: Callable[[], dict], **inputs: object) -> dict:
    """Numbers, or lists of them, that take long to make: made once for these inputs and `versions`.

    They are kept in `folder`, so that a loop over many goes on where it was stopped.
    """
    path = folder / f"{key(**inputs, versions=versions())}.json"
    if not path.is_file():
        made = make().items()
        write_json(path, {name: np.asarray(value, dtype=float).tolist() for name, value in made})
    return read_json(path)


def find(folder: str | Path, **settings: object) -> Path:
    """Where the trained SAE with these settings lies, say k=8, lookup="learned", seed=0.

    `folder`: of a run (or its name under data/runs), whose saes/index.csv names all of them, or
    the folder of a sweep.
    Raises FileNotFoundError where there is no SAE, ValueError where none or several fit.
    """
    folder = Path(folder) if Path(folder).is_dir() else DATA / "runs" / folder
    place = folder if (folder / "index.csv").is_file() else folder / "saes"
    index = place / "index.csv"
    if not index.is_file():
        raise FileNotFoundError(f"no SAE was trained in {folder}: there is no {index}")
    table = read_table(index)
    if unknown := settings.keys() - set(table):
        raise ValueError(f"the SAEs of {folder} have no setting {', '.join(sorted(unknown))}: they "
                         f"have {', '.join(table)}")
    fits = np.logical_and.reduce([table[name] == value for name, value in settings.items()])
    found = table[fits] if settings else table
    if len(found) != 1:
        told = [name for name in table if name not in ("name", "nmse", "dead")
                and found[name].nunique(dropna=False) > 1]
        raise ValueError(f"{len(found)} SAEs of {folder} have these settings"
                         + (f"; they differ in {', '.join(told)}: name one" if told else ""))
    return place / found["name"].iloc[0]


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write tensors as safetensors beside the sha256 of what they hold, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=dict(sha256=content(tensors)))
    return Path(path)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor] | None:
    """What `write_tensors` wrote. None for no such file, and, with a line on stderr, for damage."""
    if not Path(path).is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            noted = (file.metadata() or {}).get("sha256")
        tensors = load_file(path)
        if content(tensors) == noted:
            return tensors
        reason = "its checksum differs" if noted else "it has no checksum"
    except SafetensorError as error:
        reason = str(error)
    tqdm.write(f"{path} is damaged or too old ({reason}): it is made anew", file=sys.stderr)
    return None


def content(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, as hex."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def stamp(place: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each file at a local path; nothing where there is none."""
    path = Path(place).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
            for file in files if file.is_file()]


def digest(path: str | Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key(**parameters: object) -> str:
    """Twelve hex digits that name these parameters, whatever their order."""
    text = json.dumps(parameters, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
