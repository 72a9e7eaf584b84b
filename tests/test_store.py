"""Oracle: round trips, and what lies in the folder afterwards."""

import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tsae import store
from tsae.sae import SAE
from tsae.scale import checkpoints
from tsae.study import form

# Tokens that a careless csv reader loses: names of missing values, blanks, line ends, separators, quotes, numbers.
HARD = ["NA", "nan", "None", "null", " ", " the", "a\nb", "\n", "\r\n", "\r", ",", '"', '""', "#", "007", "1e5", "é", "\\n"]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = store.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt):
        with store.replacing(path) as temporary:
            temporary.write_text("half of the n")
            assert path.read_text() == "old" and temporary.parent == path.parent  # one file system: the move is atomic
            raise KeyboardInterrupt
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with pytest.raises(ValueError):
        with store.replacing(tmp_path / "never.txt"):
            raise ValueError
    assert names(tmp_path) == ["a.txt"]


def test_a_write_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("one", "two: äöü €\n"):
        assert store.write_text(path, text) == path and path.read_bytes() == text.encode("utf-8")
    assert names(path.parent) == ["a.txt"] and stat.S_IMODE(path.stat().st_mode) == 0o644


def test_tables_survive_the_round_trip(tmp_path):
    count = len(HARD)
    table = pd.DataFrame(dict(token=HARD, count=range(count), share=[i / 7 for i in range(count)], dead=[True] * count))
    table.loc[3, "share"] = float("nan")
    back = store.read_table(store.write_table(tmp_path / "a.csv", table))
    assert back.token.tolist() == HARD and back["count"].tolist() == list(range(count)) and back.dead.all()
    assert back["count"].dtype == int and back.dead.dtype == bool
    assert back.share.dropna().tolist() == pytest.approx(table.share.dropna().tolist(), rel=1e-5)
    assert back.share.isna().tolist() == table.share.isna().tolist()
    assert (tmp_path / "a.csv").read_text().splitlines()[:3] == ["token,count,share,dead", "NA,0,0,True",
                                                                 "nan,1,0.142857,True"]
    first = store.digest(tmp_path / "a.csv")
    assert store.digest(store.write_table(tmp_path / "b.csv", back)) == first  # six digits of six digits are the same


def test_a_missing_table_names_its_notebook(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.csv: run 03_train first"):
        store.read_table(tmp_path / "a.csv", "03_train")
    with pytest.raises(FileNotFoundError, match="a.csv$"):
        store.read_table(tmp_path / "a.csv")


def test_json_survives_the_round_trip_and_its_errors_name_the_file(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"é": "ü"}}
    path = store.write_json(tmp_path / "a.json", value)
    assert store.read_json(path) == value and path.read_text().index('"a"') < path.read_text().index('"b"')
    circular: dict = {}
    circular["a"] = circular
    with pytest.raises(ValueError, match="Circular"):
        store.write_json(path, circular)
    assert store.read_json(path) == value  # still the old one
    for wrong in (b"{", b"", b'{"a": "\xff"}'):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="a.json is not valid JSON.*make it again"):
            store.read_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="a.json holds a list"):
        store.read_json(path)


def test_results_leave_a_line_in_the_manifest(tmp_path):
    for name in ("b", "a", "b"):  # the second b replaces the first
        store.result(tmp_path, name, pd.DataFrame({"x": [1]}), "03_train", seed=4)
        path = tmp_path / "tables" / f"{name}.csv"
    lines = json.loads((tmp_path / "tables" / "manifest.json").read_text())
    assert names(tmp_path / "tables") == ["a.csv", "b.csv", "manifest.json"] and sorted(lines) == ["a.csv", "b.csv"]
    assert lines["b.csv"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert lines["b.csv"]["notebook"] == "03_train" and lines["b.csv"]["parameters"] == {"seed": 4}


def test_a_key_is_a_function_of_the_parameters_and_not_of_their_order():
    first = store.key(a=1, b={"x": 2, "y": [1, 2]})
    assert first == store.key(b={"y": [1, 2], "x": 2}, a=1) and len(first) == 12 and int(first, 16)
    changed = [dict(a=1, b={"x": 2, "y": [2, 1]}), dict(a=1), dict(a="1"), dict(b=1)]
    assert len({store.key(**parameters) for parameters in changed} | {first}) == 5


def test_an_environment_moves_home_and_cache(tmp_path):
    code = "from tsae import store; print(store.DATA, store.CACHE)"
    told = subprocess.run([sys.executable, "-c", code], env=os.environ | dict(TSAE_HOME="/a", TSAE_CACHE="/b"),
                          capture_output=True, text=True, timeout=120)
    assert told.stdout == "/a/data /b\n", told.stderr


def test_tensors_come_back_or_are_named_as_damaged(tmp_path, capsys):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(2), "c": torch.ones(3, dtype=torch.bfloat16),
               "d": torch.empty(0)}
    path = store.write_tensors(tmp_path / "a.safetensors", tensors)
    back = store.read_tensors(path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], value) for name, value in tensors.items())
    assert store.read_tensors(tmp_path / "none") is None and not capsys.readouterr().err
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    save_file({"a": torch.ones(1)}, tmp_path / "old")
    for raw, reason in ((whole[:-3], ""), (b"", ""), (bytes(flipped), "its checksum differs"),
                        ((tmp_path / "old").read_bytes(), "it has no checksum")):
        path.write_bytes(raw)
        assert store.read_tensors(path) is None
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "a.safetensors is damaged" in said and reason in said


def test_a_full_disk_is_an_os_error_of_safetensors_too(tmp_path):
    store.write_tensors(tmp_path / "a", {"a": torch.ones(1)})
    with pytest.raises(OSError, match="a could not be written.*No space left.*free"), store.replacing(tmp_path / "a"):
        raise SafetensorError("I/O error: No space left on device")
    assert store.read_tensors(tmp_path / "a")["a"] == 1 and names(tmp_path) == ["a"]


def test_a_table_that_is_not_made_any_more_leaves_with_its_line(tmp_path):
    for name in ("a", "b"):
        store.result(tmp_path, name, pd.DataFrame(dict(x=[1])), "01_a")
    store.no_result(tmp_path, "a", "never made")
    assert names(tmp_path / "tables") == ["b.csv", "manifest.json"]
    assert set(store.read_json(tmp_path / "tables/manifest.json")) == {"b.csv"}


def test_a_row_is_made_once_for_its_inputs_and_versions(tmp_path, monkeypatch):
    made = []

    def row() -> dict:
        made.append(1)
        return dict(a=len(made), b=float("nan"), each=np.array([0.1, 1 / 3]), rows=np.arange(2))

    first, again = (store.once(tmp_path, row, sae="x", rows=3) for _ in range(2))
    assert first["a"] == again["a"] == 1 and len(made) == 1
    assert again["each"] == [0.1, 1 / 3] and again["rows"] == [0, 1], "to the last bit"
    assert store.once(tmp_path, row, sae="y", rows=3)["a"] == 2
    monkeypatch.setattr(store, "versions", lambda: {"evaluate.py": "99"})
    assert store.once(tmp_path, row, sae="x", rows=3)["a"] == 3, "other code, another row"


def test_windows_syncs_only_what_is_opened_for_writing(tmp_path, monkeypatch):
    """And no folders: there every write once failed."""
    def strict(number: int) -> None:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(store, "WINDOWS", True)
    monkeypatch.setattr(os, "fsync", strict)
    store.write_text(tmp_path / "a.txt", "a")
    SAE(4, 8, k=2).start(torch.zeros(4)).save(tmp_path / "sae")
    checkpoints.save(tmp_path / "run", 1, dict(step=1, w=torch.ones(2)))
    study = form.Study({("a", 0, 0): pd.DataFrame([dict(code=1.0, before="", token="x", after="")])}, tmp_path / "b", "ada")
    study.record(1, 2)
    assert (tmp_path / "a.txt").read_text() == "a" and (tmp_path / "b/ada.csv").is_file()
    with pytest.raises(OSError, match="Bad file descriptor"), open(tmp_path / "a.txt", "rb") as file:
        os.fsync(file.fileno())
