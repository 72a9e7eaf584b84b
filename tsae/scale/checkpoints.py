"""Checkpoints of a training run: written whole or not at all, and a damaged one is passed over."""

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from tsae import store

ABANDONED_S = 3600  # a half-written checkpoint so old is of a process that was killed
State = dict  # nested dicts of tensors, numbers, strings and lists


def save(folder: Path, step: int, state: State) -> None:
    """Write `state` to folder/<step>, synced and renamed into place; then keep the newest two.

    Raises OSError with a sentence when the disk is full or read-only: earlier checkpoints stay.
    """
    tensors, plain = _taken_apart(state, set())
    final, new = folder / f"{step:015d}", None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        new = Path(tempfile.mkdtemp(dir=folder, prefix="."))
        save_file(tensors, new / "tensors.safetensors")
        digest = store.digest(new / "tensors.safetensors")
        text = json.dumps(dict(sha256=digest, key=store.key(**plain), state=plain))
        (new / "state.json").write_text(text, encoding="utf-8")
        for path in (new / "tensors.safetensors", new / "state.json", new):
            store.sync(path)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
        os.rename(new, final)
        store.sync(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the checkpoint {final} could not be written ({error}): free some space "
                      "there or choose another folder; what was written before is kept") from error
    finally:
        if new:
            shutil.rmtree(new, ignore_errors=True)
    for old in _steps(folder)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    for leftover in folder.glob(".*/"):
        with suppress(FileNotFoundError):  # another process has just finished with it
            if time.time() - leftover.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(leftover, ignore_errors=True)


def last(folder: Path, upto: float = math.inf) -> tuple[int, State | None]:
    """Step and state of the newest whole checkpoint up to `upto`, or -1 and None.

    A damaged one is named on stderr.
    """
    for place in (place for place in reversed(_steps(folder)) if int(place.name) <= upto):
        try:
            return int(place.name), _read(place)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            tqdm.write(f"the checkpoint {place} is damaged ({error}): going on from an earlier one",
                       file=sys.stderr)
    return -1, None


def _read(place: Path) -> State:
    """The state of a checkpoint. Raises ValueError where it is not what was written."""
    found, path = store.read_json(place / "state.json"), place / "tensors.safetensors"
    if (store.digest(path), store.key(**found["state"])) != (found["sha256"], found["key"]):
        raise ValueError("it is not what was written")
    return _put_together(load_file(path), found["state"])


def drop(folder: Path, after: int) -> None:
    """Delete the checkpoints after a step."""
    for place in _steps(folder):
        if int(place.name) > after:
            shutil.rmtree(place)


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def _taken_apart(state: State, seen: set[int],
                 name: str = "") -> tuple[dict[str, torch.Tensor], State]:
    """The tensors by their dotted names, and the rest with their names in place of them.

    Only what shares memory with a tensor before it (in `seen`) is copied: safetensors must not.
    """
    tensors, plain = {}, {}
    for key, value in state.items():
        path = f"{name}{key}"
        if isinstance(value, torch.Tensor):
            own = value.detach().cpu().contiguous()
            memory = own.untyped_storage().data_ptr()
            tensors[path] = own.clone() if memory in seen else own
            plain[key] = {"tensor": path}
            seen.add(memory)
        elif isinstance(value, dict):
            inner, plain[key] = _taken_apart(value, seen, f"{path}.")
            tensors |= inner
        else:
            plain[key] = value
    return tensors, plain


def _put_together(tensors: dict[str, torch.Tensor], plain: State) -> State:
    def value(part):
        if not isinstance(part, dict):
            return part
        return tensors[part["tensor"]] if set(part) == {"tensor"} else _put_together(tensors, part)

    return {key: value(part) for key, part in plain.items()}


@dataclass
class Stop:
    """Which signal asked to stop, 0 if none did."""

    signal: int = 0

    def leave(self) -> None:
        """Raise what the signal would have raised."""
        raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM only take a note, so that the loop can write a checkpoint first.

    A second one acts at once.
    """
    stop, kinds = Stop(), (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(number, _):
        stop.signal = number
        for kind, handler in before.items():
            signal.signal(kind, handler)

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
