"""Oracle: the run that was never interrupted, and files damaged on purpose."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tsae import store
from tsae.scale import checkpoints

KILLS = int(os.environ.get("TSAE_KILLS", 4))  # 50 were seen to pass in a row; see the README
STATE = {"a": torch.arange(6.0), "deep": {"b": torch.tensor(2), "name": "x", "list": [1, 2.5], "empty": {}}, "seen": 7}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def test_a_state_comes_back_and_two_are_kept(tmp_path):
    assert checkpoints.last(tmp_path / "none")[1] is None
    for step in (5, 10, 100):
        checkpoints.save(tmp_path / "c", step, STATE | {"seen": step})
        assert same(checkpoints.last(tmp_path / "c")[1], STATE | {"seen": step})
    assert [int(path.name) for path in sorted((tmp_path / "c").iterdir())] == [10, 100]


def test_what_killed_processes_left_is_removed(tmp_path):
    for name, age_s in ((".old", 2 * checkpoints.ABANDONED_S), (".new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors.safetensors").write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    checkpoints.save(tmp_path, 1, STATE)
    assert {path.name for path in tmp_path.iterdir()} == {f"{1:015d}", ".new"}, "a process beside this one may be writing"


def test_only_shared_memory_is_copied(tmp_path):
    a = torch.arange(6.0)
    state = {"a": a, "tail": a[3:], "other": a.view(2, 3).T, "two": {"a": a}, "alone": torch.arange(4.0)[1:]}
    tensors, _ = checkpoints._taken_apart(state, set())
    assert [name for name, held in tensors.items() if held.data_ptr() == state.get(name, a).data_ptr()] == ["a", "alone"]
    checkpoints.save(tmp_path, 1, state)
    assert same(checkpoints.last(tmp_path)[1], state)


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-20]), flip, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, file, tmp_path, capsys):
    checkpoints.save(tmp_path, 1, STATE | {"seen": 1})
    checkpoints.save(tmp_path, 2, STATE | {"seen": 2})
    damage(tmp_path / f"{2:015d}" / file)
    found = checkpoints.last(tmp_path)[1]
    assert same(found, STATE | {"seen": 1}) and f"{2:015d} is damaged" in capsys.readouterr().err
    checkpoints.save(tmp_path, 2, STATE | {"seen": 3})  # and the run goes on over it
    assert checkpoints.last(tmp_path)[1]["seen"] == 3


def test_a_pickle_is_no_checkpoint(tmp_path, capsys):
    checkpoints.save(tmp_path, 1, STATE)
    place = tmp_path / f"{1:015d}"
    torch.save({"a": torch.ones(1)}, place / "tensors.safetensors")
    held = json.loads((place / "state.json").read_text()) | {"sha256": store.digest(place / "tensors.safetensors")}
    (place / "state.json").write_text(json.dumps(held))
    assert checkpoints.last(tmp_path)[1] is None and "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_gets_a_sentence_and_leaves_what_was_there(code, tmp_path, monkeypatch):
    checkpoints.save(tmp_path, 1, STATE)

    def full(*_):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=f"could not be written.*{os.strerror(code)}.*free some space"):
        checkpoints.save(tmp_path, 2, STATE)
    assert [path.name for path in tmp_path.iterdir()] == [f"{1:015d}"] and same(checkpoints.last(tmp_path)[1], STATE)


def test_a_really_full_disk(tmp_path):
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)],
                                      capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        checkpoints.save(tmp_path, 1, STATE)
        with pytest.raises(OSError, match="could not be written"):
            checkpoints.save(tmp_path, 2, STATE | {"a": torch.zeros(100_000)})
        assert same(checkpoints.last(tmp_path)[1], STATE)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def killed(folder: Path, after: int | None, wait_s: float = 0.0) -> None:
    """Run tests.killed in `folder`; kill -9 it `wait_s` after it has begun step `after` of this run."""
    with subprocess.Popen([sys.executable, "-m", "tests.killed", str(folder)], stdout=subprocess.PIPE, text=True,
                          cwd=store.ROOT) as process:
        for count, _ in enumerate(process.stdout):
            if count == after:
                time.sleep(wait_s)
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode in (0, -signal.SIGKILL)


def result(folder: Path) -> dict[str, str]:
    return {path.name + path.parent.name: store.digest(path) for path in sorted(folder.glob("[0-9]*/*.safetensors"))
            } | {path.name: path.read_text() for path in folder.glob("*.csv")}


def test_kill_at_any_instant_and_go_on_gives_the_same_bits(tmp_path):
    killed(tmp_path / "whole", None)
    wanted, dice = result(tmp_path / "whole"), random.Random(os.environ.get("TSAE_KILL_SEED", "0"))
    assert len(wanted) == 6
    for point in range(KILLS):
        folder = tmp_path / str(point)
        for _ in range(dice.choice([1, 2])):  # also a run that was resumed already
            killed(folder, dice.randrange(18), dice.random() * 0.02)  # a step and its checkpoint take about so long
        killed(folder, None)
        assert result(folder) == wanted, f"kill point {point}"
        shutil.rmtree(folder)
