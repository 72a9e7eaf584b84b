"""Oracle: an uninterrupted run's bytes, and real processes that are killed."""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from standin import GOLDEN_ROWS, KEPT, ROWS, D, golden_residuals, keep, residuals

from tsae import store
from tsae.pairs import shards
from tsae.pairs.shards import Memory, Store

torch.set_num_threads(1)
IDENTITY = {"model": "none", "layer": 1}
SMALL = dict(shard_tokens=100, batch_rows=10)  # 10 passes, 5 shards
fork = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


def make(folder, residuals=residuals, **changes):
    arguments = dict(rows=ROWS, residuals=residuals, keep=keep, d_model=D, identity=IDENTITY, **SMALL)
    return Store.make(folder, **(arguments | changes))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of every file of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    make(folder)
    return contents(folder)


@pytest.fixture
def stored(tmp_path, whole):
    """A folder with a complete store, to be damaged."""
    (folder := tmp_path / "store").mkdir()
    for name, data in whole.items():
        (folder / name).write_bytes(data)
    return folder


def damage(path, change):
    """`change` is "missing", "cut off", "longer" or "a bit"."""
    data = bytearray(path.read_bytes())
    if change == "a bit":
        data[len(data) // 2] ^= 16
    path.write_bytes(data[:-1] if change == "cut off" else data + b"x" if change == "longer" else data)
    if change == "missing":
        path.unlink()


def change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("tokens", [0, 1, 99, 250, 10**6])
@pytest.mark.parametrize("shape", [SMALL, dict(shard_tokens=1, batch_rows=97), dict(shard_tokens=10**6, batch_rows=1)])
def test_a_store_gives_the_rows_that_were_written(tmp_path, tokens, shape):
    made = make(tmp_path, tokens=tokens, **shape)
    expected = KEPT[:tokens or None]
    for pairs in (made, Store.open(tmp_path)):
        assert len(pairs) == len(expected) and pairs.d_model == D and pairs.identity == IDENTITY
        some = torch.randint(len(pairs), (300,), generator=torch.Generator().manual_seed(0))
        for index in (some, torch.arange(len(pairs)), torch.tensor([len(pairs) - 1, 0, 0]), torch.tensor([], dtype=int)):
            x, t = pairs.gather(index)
            assert torch.equal(t, expected[index].long()) and x.dtype == torch.float32 and t.dtype == torch.int64
            assert torch.equal(x, residuals(t).bfloat16().float())
        Store.open(tmp_path, checksums=True)
    for wrong in (-1, len(made)):
        with pytest.raises(IndexError, match=f"pairs 0 to {len(made) - 1}, got.*{wrong}"):
            made.gather(torch.tensor([0, wrong]))


def test_the_files_are_what_they_are_said_to_be(whole, stored):
    assert sorted(whole) == sorted(["manifest.json"] + [f"{i:05}.{kind}" for i in range(5) for kind in "xt"])
    t = torch.frombuffer(bytearray(b"".join(whole[f"{i:05}.t"] for i in range(5))), dtype=torch.int32)
    x = torch.frombuffer(bytearray(b"".join(whole[f"{i:05}.x"] for i in range(5))), dtype=torch.bfloat16).view(-1, D)
    assert torch.equal(t, KEPT) and torch.equal(x, residuals(t).bfloat16())
    assert sum(map(len, whole.values())) - len(whole["manifest.json"]) == len(KEPT) * (2 * D + 4)
    for shard in json.loads(whole["manifest.json"])["shards"]:
        assert shard["sha256_x"] == store.digest(stored / f"{shard['name']}.x")
        assert shard["last_row"] % 10 == 0 or shard["last_row"] == 97
        assert shard["tokens"] == int(keep(ROWS[shard["first_row"]:shard["last_row"]]).sum())


def test_a_complete_store_is_not_made_again(stored, whole):
    stamps = {path: path.stat().st_mtime_ns for path in stored.iterdir()}
    make(stored, lambda tokens: pytest.fail("the language model was run"), max_gb=0.0)
    assert {path: path.stat().st_mtime_ns for path in stored.iterdir()} == stamps and contents(stored) == whole


@pytest.mark.parametrize("fails_at", range(1, 11))
def test_a_run_that_fails_goes_on_with_the_shard_in_work(tmp_path, whole, fails_at):
    passes = []

    def failing(tokens):
        passes.append(tokens[0, 0].item() // 80)
        if len(passes) == fails_at:
            raise KeyboardInterrupt
        return residuals(tokens)

    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        make(folder, failing)
    shards = [path for path in contents(folder) if path.endswith(".x")]
    assert not any(path.startswith(".") for path in contents(folder))
    if shards:
        with pytest.raises(ValueError, match=f"not complete, it has {len(shards)} shards so far: run Store.make"):
            Store.open(folder)
    make(folder, failing)
    assert contents(folder) == whole
    assert len(passes) - 10 <= 3 and passes[fails_at:] == list(range(10 - len(passes[fails_at:]), 10))


def killed(folder, where, tokens):
    """Runs `make` in a process that ends itself by SIGKILL at the instant number `where`; True when it came so far."""
    def instants():
        count = 0
        while True:
            count += 1
            if count == where:
                os.kill(os.getpid(), signal.SIGKILL)
            yield

    def run():
        tick = instants()

        def noted(function):
            def called(*arguments, **named):
                next(tick)
                result = function(*arguments, **named)
                next(tick)
                return result
            return called

        for name in ("replace", "fsync", "chmod", "unlink"):
            setattr(os, name, noted(getattr(os, name)))
        tempfile.mkstemp = noted(tempfile.mkstemp)
        make(folder, noted(residuals), tokens=tokens)
        os._exit(0)

    process = fork.Process(target=run, daemon=True)
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.skipif(not fork, reason="needs fork")
def test_a_kill_at_any_instant_loses_nothing(tmp_path, whole):
    """Before and after every pass, file, fsync and rename; then again and again in one store."""
    make(tmp_path / "short", tokens=150)  # two shards
    short, instant = contents(tmp_path / "short"), 1
    while killed(folder := tmp_path / f"{instant}", instant, tokens=150):
        make(folder, tokens=150)
        assert contents(folder) == short, f"killed at instant {instant}"
        instant += 1
    assert instant > 60 and contents(folder) == short
    dice, kills = random.Random(0), 0
    while killed(tmp_path / "often", dice.randint(15, 60), tokens=0):
        kills += 1
        assert kills < 100
    assert kills >= 2 and contents(tmp_path / "often") == whole


@pytest.mark.skipif(not fork, reason="needs fork")
def test_a_kill_from_outside_at_random_times_loses_nothing(tmp_path, whole):
    dice = random.Random(0)
    for i in range(12):
        process = fork.Process(target=make, args=(tmp_path / f"{i % 3}", slow), daemon=True)
        process.start()
        time.sleep(dice.uniform(0.005, 0.12))
        process.kill()
        process.join(300)
    for i in range(3):
        make(tmp_path / f"{i}")
        assert contents(tmp_path / f"{i}") == whole


def slow(tokens):
    time.sleep(0.01)
    return residuals(tokens)


@pytest.mark.skipif(not fork or not shards.fcntl, reason="needs fork and flock")
def test_two_processes_at_once_share_the_work(tmp_path, whole):
    def until(condition):
        for _ in range(2000):
            if condition():
                return
            time.sleep(0.01)
        raise TimeoutError("the other process did not come so far")

    def run(number):
        os.dup2(os.open(tmp_path / f"said{number}", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", buffering=1)

        def counted(tokens):
            with open(tmp_path / "passes", "a") as file:
                file.write(f"{number}")
            until(lambda: "waiting for another process" in (tmp_path / "said1").read_text())
            return residuals(tokens)
        make(tmp_path / "store", counted)

    (tmp_path / "said1").touch()
    processes = [fork.Process(target=run, args=(number,), daemon=True) for number in range(2)]
    processes[0].start()
    until((tmp_path / "passes").exists)
    processes[1].start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0] and contents(tmp_path / "store") == whole
    assert (tmp_path / "passes").read_text() == 10 * "0" and not (tmp_path / "said0").read_text()


@pytest.mark.parametrize("name", ["00000.x", "00002.t", "00003.x"])
@pytest.mark.parametrize("change, sentence", [("missing", "is missing"), ("cut off", "bytes where"),
                                              ("longer", "bytes where"), ("a bit", "its checksum differs")])
def test_damaged_shards_are_named_and_made_again(stored, whole, capsys, name, change, sentence):
    passes = []
    damage(stored / name, change)
    for checksums in [True, False][:1 + (change != "a bit")]:  # sizes alone do not show a bit
        with pytest.raises(ValueError, match=f"{name}.*{sentence}.*Store.make"):
            Store.open(stored, checksums)
    make(stored, lambda tokens: passes.append(1) or residuals(tokens))
    assert contents(stored) == whole and len(passes) <= 3
    assert name in (said := capsys.readouterr().err) and sentence in said
    Store.open(stored, checksums=True)


def test_a_manifest_that_says_too_much_is_not_believed(stored, whole):
    change_manifest(stored, lambda manifest: manifest["shards"].pop())
    make(stored)
    assert contents(stored) == whole


def test_checksums_are_left_out_above_verify_gb(stored, whole):
    damage(stored / "00001.x", "a bit")
    make(stored, verify_gb=0.0)
    assert contents(stored) != whole
    make(stored)
    assert contents(stored) == whole


def test_a_shard_that_comes_out_otherwise_is_refused(stored):
    damage(stored / "00001.x", "missing")
    before = contents(stored)
    with pytest.raises(ValueError, match="shard 00001 of .*made again, is not what it was"):
        make(stored, lambda tokens: residuals(tokens) + 1)
    assert contents(stored) == before


@pytest.mark.parametrize("change, sentence", [
    (dict(identity={"model": "none", "layer": 2}), "made with layer 1, and 2 is asked for"),
    (dict(identity=IDENTITY | {"weights": "abc"}), "made with weights None, and 'abc' is asked for"),
    (dict(rows=ROWS + 5), "made with rows"), (dict(tokens=9), "made with tokens 0, and 9"),
    (dict(shard_tokens=200), "made with shard_tokens 100"), (dict(batch_rows=5), "made with batch_rows 10, and 5"),
    (dict(d_model=D + 1), "another width than 4"),
    (dict(keep=lambda tokens: tokens % 5 != 2), "other positions than are kept now"),
    (dict(batch_rows=0), "batch_rows=0.*must be positive")])
@pytest.mark.parametrize("complete", [True, False])
def test_another_store_in_the_folder_is_left_alone(stored, change, sentence, complete):
    if not complete:
        change_manifest(stored, lambda manifest: manifest.update(complete=False, shards=manifest["shards"][:-1]))
    before = contents(stored)
    with pytest.raises(ValueError, match=sentence):
        make(stored, **change)
    assert contents(stored) == before


def test_the_width_and_the_positions_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="width 3, d_model is 4"):
        make(tmp_path, d_model=4)
    with pytest.raises(ValueError, match="special tokens only"):
        make(tmp_path, keep=lambda tokens: torch.zeros_like(tokens, dtype=torch.bool))


def test_identities_are_compared_as_they_are_read_again(tmp_path):
    for _ in range(2):
        make(tmp_path, identity={"layers": (1, 2), "path": tmp_path, 3: None})


def test_a_store_over_its_limit_is_refused_before_anything_is_written(tmp_path, monkeypatch, stored):
    size = len(KEPT) * (2 * D + 4)
    folder = tmp_path / "new" / "store"
    with pytest.raises(ValueError, match="takes .* GB .*over `max_gb` = .*raise it, or ask for fewer `tokens`"):
        make(folder, max_gb=(size - 1) / 1e9)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(ValueError, match="still to write, and the disk has .* GB free: make room"):
        make(folder)
    assert not folder.parent.exists()
    damage(stored / "00000.x", "missing")
    make(stored)  # of a store that is there only what it lacks counts
    make(folder, max_gb=size / 1e9, tokens=len(KEPT) - 1)


@pytest.mark.parametrize("code, sentence", [(errno.ENOSPC, "its disk is full: make room"),
                                            (errno.EROFS, "read-only: choose another folder")])
@pytest.mark.parametrize("place", ["x", "t", "manifest", "lock"])
def test_a_disk_that_cannot_be_written_gets_a_sentence(tmp_path, monkeypatch, whole, code, sentence, place):
    folder, writes = tmp_path / "store", []

    class Full:
        def __init__(self, path, mode):
            self.file = open(path, mode)
            self.kind = str(path)[-1]

        def write(self, data):
            writes.append(self.kind)
            if self.kind == place and writes.count(place) == 4:  # in the second shard, half-way
                self.file.write(bytes(memoryview(data).cast("B"))[:3])
                raise OSError(code, os.strerror(code))
            self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    def failing_json(path, value):
        if len(value["shards"]) == 2:
            raise OSError(code, os.strerror(code))
        return write_json(path, value)

    def opened(path, mode):
        if place == "lock":
            raise OSError(code, os.strerror(code))
        return Full(path, mode) if str(path).endswith((".x", ".t")) else open(path, mode)

    write_json = store.write_json
    monkeypatch.setattr(shards, "open", opened, raising=False)
    if place == "manifest":
        monkeypatch.setattr(store, "write_json", failing_json)
    with pytest.raises(OSError, match=f"{sentence}.*goes on from there"):
        make(folder)
    if place != "lock":
        left = {name: data for name, data in contents(folder).items() if name != "manifest.json"}
        of_two = ["00000.x", "00000.t"] + ["00001.x", "00001.t"] * (place == "manifest")
        assert left == {name: whole[name] for name in of_two}
        assert len(json.loads((folder / "manifest.json").read_text())["shards"]) == 1
    monkeypatch.undo()
    make(folder)
    assert contents(folder) == whole


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(tmp_path, stored):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OSError, match="read-only: choose another folder"):
        make(tmp_path / "closed" / "store")
    stored.chmod(0o500)
    make(stored)  # there is nothing to write
    stored.chmod(0o700)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", "00000", "1", "", "00001.x"])
def test_names_that_are_paths_are_refused(stored, name):
    change_manifest(stored, lambda manifest: manifest["shards"][1].update(name=name))
    for read in (Store.open, make):
        with pytest.raises(ValueError, match="names shard .*expected the name '00001'"):
            read(stored)


def test_a_link_that_leaves_the_folder_is_refused(stored, tmp_path, whole):
    (stored / "00001.x").rename(tmp_path / "elsewhere.x")
    (stored / "00001.x").symlink_to(tmp_path / "elsewhere.x")
    with pytest.raises(ValueError, match="00001.x is a link that leaves the store"):
        Store.open(stored)
    before = (tmp_path / "elsewhere.x").read_bytes()
    make(stored)
    assert contents(stored) == whole and not (stored / "00001.x").is_symlink()
    assert (tmp_path / "elsewhere.x").read_bytes() == before
    (tmp_path / "link").symlink_to(stored, target_is_directory=True)
    assert len(Store.open(tmp_path / "link")) == len(KEPT)


@pytest.mark.parametrize("change, sentence", [
    (dict(version=2), "version 2: this code reads 'tsae-activations', version 1; delete the store"),
    (dict(format="other"), "format 'other'"), (dict(d_model="3"), "damaged at d_model"), (dict(d_model=0), "width 0"),
    (dict(d_model=True), "damaged at d_model"), (dict(dtype="float32"), "float32 of width 3: expected bfloat16"),
    (dict(identity=None), "damaged at identity"), (dict(shards={}), "damaged at shards"), (dict(shards=[3]), "at name"),
    (dict(complete=1), "damaged at complete"), (dict(complete=False), "not complete, it has 5 shards"),
    (dict(shards=[]), "without a shard"), (dict(shards=[{"name": "00000"}]), "damaged at first_row, last_row, tokens"),
    (dict(shards=[dict(name="00000", first_row=0, last_row=1, tokens=0, sha256_x="", sha256_t="")]), "with 0 pairs")])
def test_a_manifest_that_is_wrong_gets_a_sentence(stored, change, sentence):
    change_manifest(stored, lambda manifest: manifest.update(change))
    with pytest.raises(ValueError, match=sentence):
        Store.open(stored)


def test_no_store_gets_a_sentence(tmp_path, stored):
    with pytest.raises(FileNotFoundError, match="no store of activations in .*Store.make"):
        Store.open(tmp_path / "nothing")
    damage(stored / "manifest.json", "cut off")
    (stored / "manifest.json").write_bytes((stored / "manifest.json").read_bytes()[:50])
    with pytest.raises(ValueError, match="manifest.json is not valid JSON"):
        Store.open(stored)


@pytest.mark.parametrize("kind", ["store", "memory"])
def test_statistics_by_hand(stored, kind):
    x, t = residuals(KEPT), KEPT % 50  # the last of 51 tokens never occurs
    x = x.bfloat16() if kind == "store" else x
    pairs = Memory(x, t)
    if kind == "store":
        pairs = Store.open(stored)
        pairs.parts = [(x, t % 50) for x, t in pairs.parts]
    stats = pairs.statistics(51)
    x = x.double()
    assert torch.allclose(stats["mean"], x.mean(0).float()) and stats["mean"].dtype == torch.float32
    assert torch.allclose(stats["scale"], (x - x.mean(0)).square().mean().sqrt().float()) and not stats["scale"].ndim
    assert stats["count"].tolist() == [Counter(t.tolist())[token] for token in range(51)]
    for token in range(51):
        assert torch.allclose(stats["sum"][token], x[t == token].sum(0).float())
    assert stats["sum"].dtype == torch.float32 and stats["sum"].shape == (51, D)
    with pytest.raises(ValueError, match="token id 49 is outside the vocabulary of 49"):
        pairs.statistics(49)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_keeps_what_it_was_given(dtype):
    pairs = Memory(residuals(KEPT).to(dtype), KEPT)
    index = torch.tensor([5, 0, 5])
    x, t = pairs.gather(index)
    assert torch.equal(x, residuals(KEPT[index]).to(dtype).float()) and t.tolist() == KEPT[index].tolist()
    assert len(pairs) == len(KEPT) and pairs.d_model == D and pairs.parts[0][0].dtype == dtype and t.dtype == torch.int64
    for x, t in ((residuals(KEPT), KEPT[1:]), (residuals(KEPT[:0]), KEPT[:0])):
        with pytest.raises(ValueError, match="expected as many of both, and some"):
            Memory(x, t)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_broken_activation_is_not_stored(tmp_path, wrong):
    def broken(tokens):
        return residuals(tokens).masked_fill((tokens == 8 * 35 + 2).unsqueeze(-1), wrong)
    with pytest.raises(ValueError, match="row 35 of the tokens, position 2, token id 282: .*float32"):
        make(tmp_path, broken)
    make(tmp_path)
    Store.open(tmp_path, checksums=True)


def test_golden_bytes(tmp_path):
    make(tmp_path, golden_residuals, rows=GOLDEN_ROWS, d_model=4, shard_tokens=40, batch_rows=3)
    told = "the bytes changed: raise VERSION in tsae/pairs/shards.py and write the new digest here"
    files = contents(tmp_path)
    manifest = json.loads(files.pop("manifest.json"))
    assert {name: len(data) for name, data in files.items()} == {
        "00000.x": 464, "00000.t": 232, "00001.x": 456, "00001.t": 228, "00002.x": 104, "00002.t": 52}, told
    assert hashlib.sha256(b"".join(data for _, data in sorted(files.items()))).hexdigest() == (
        "26ae7bab4d8045da4f6554fa093c4f3146f38577d2780f0fd14a27253e3a4a52"), told
    assert set(manifest) == {"format", "version", "complete", "shards", *shards.HEAD}, told
    assert set(manifest["made_of"]) == {"rows", "shape", "tokens", "shard_tokens", "batch_rows"}, told
    assert set(manifest["shards"][0]) == {"name", "first_row", "last_row", "tokens", "sha256_x", "sha256_t"}, told
