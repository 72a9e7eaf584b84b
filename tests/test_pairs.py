"""Oracle: an uninterrupted run's bytes, multisets of positions, a plain generator, real processes that are killed."""

import errno
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
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsae import activations, store
from tsae.pairs.order import Shuffled, Streamed
from tsae.pairs.shards import Memory, Store

torch.set_num_threads(1)
ROWS = torch.arange(97 * 8, dtype=torch.int32).view(97, 8)  # every position has a token of its own
V, D = 97 * 8, 3
IDENTITY = {"model": "none", "layer": 1}
SMALL = dict(shard_tokens=100, batch_rows=10)  # 10 passes, 5 shards
fork = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


def residuals(tokens):
    """x is a function of t alone, so that a pair which was torn apart shows."""
    t = tokens.float()
    return torch.stack([t / 7, t.sin() * 300, -t], dim=-1)


def keep(tokens):
    kept = tokens % 5 != 3
    kept[:, 0] = False
    return kept


KEPT = ROWS[keep(ROWS)]


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
def at(tmp_path, whole):
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


def source_of(kind, **changes):
    """A source of each kind over the same pairs, with settings small enough for several epochs and refills."""
    if kind == "streamed":
        arguments = dict(batch=12, buffer=90, seed=1, batch_rows=10)
        return Streamed(ROWS, changes.pop("residuals", residuals), keep, **(arguments | changes))
    return Shuffled(Memory(residuals(KEPT), KEPT), **(dict(batch=12, seed=1) | changes))


def equal(ours, theirs):
    return all(torch.equal(a, b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True))


# The language model's pass


def test_activations_are_the_kept_positions_in_order():
    x, t = activations.collect(ROWS, residuals, keep, batch_rows=7)
    naive = [token for row in ROWS.tolist() for i, token in enumerate(row) if i and token % 5 != 3]
    assert t.tolist() == naive and torch.equal(x, residuals(torch.tensor(naive)))
    order = torch.tensor([5, 0])
    (_, t), = activations.activations(ROWS, residuals, keep, order=order)
    assert t.tolist() == [token for row in ROWS[order].tolist() for i, token in enumerate(row) if i and token % 5 != 3]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_broken_activation_names_its_row_position_and_token(tmp_path, wrong):
    def broken(tokens):
        return residuals(tokens).masked_fill((tokens == 8 * 35 + 2).unsqueeze(-1), wrong)
    sentence = "row 35 of the tokens, position 2, token id 282: .*float32"
    with pytest.raises(ValueError, match=sentence):
        list(activations.activations(ROWS, broken, keep, 7, torch.arange(96, -1, -1)))
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path / "store", broken)
    with pytest.raises(ValueError, match=sentence):
        list(islice(source_of("streamed", residuals=broken), 60))


# A store


@pytest.mark.parametrize("tokens", [0, 1, 99, 250, 10**6])
@pytest.mark.parametrize("shape", [SMALL, dict(shard_tokens=1, batch_rows=97), dict(shard_tokens=10**6, batch_rows=1)])
def test_a_store_gives_the_rows_that_were_written(tmp_path, tokens, shape):
    made = make(tmp_path, tokens=tokens, **shape)
    expected = KEPT[:tokens or None]
    for held in (made, Store.open(tmp_path)):
        assert len(held) == len(expected) and held.d_model == D and held.identity == IDENTITY
        some = torch.randint(len(held), (300,), generator=torch.Generator().manual_seed(0))
        for index in (some, torch.arange(len(held)), torch.tensor([len(held) - 1, 0, 0]), torch.tensor([], dtype=int)):
            x, t = held.gather(index)
            assert torch.equal(t, expected[index].long()) and x.dtype == torch.float32 and t.dtype == torch.int64
            assert torch.equal(x, residuals(t).bfloat16().float())
        held.verify()
    for wrong in (-1, len(made)):
        with pytest.raises(IndexError, match=f"pairs 0 to {len(made) - 1}, got.*{wrong}"):
            made.gather(torch.tensor([0, wrong]))


def test_the_files_are_what_they_are_said_to_be(whole, at):
    assert sorted(whole) == sorted(["manifest.json"] + [f"{i:05}.{kind}" for i in range(5) for kind in "xt"])
    t = torch.frombuffer(bytearray(b"".join(whole[f"{i:05}.t"] for i in range(5))), dtype=torch.int32)
    x = torch.frombuffer(bytearray(b"".join(whole[f"{i:05}.x"] for i in range(5))), dtype=torch.bfloat16).view(-1, D)
    assert torch.equal(t, KEPT) and torch.equal(x, residuals(t).bfloat16())
    assert sum(map(len, whole.values())) - len(whole["manifest.json"]) == activations.estimate(len(KEPT), D)
    for shard in json.loads(whole["manifest.json"])["shards"]:
        assert shard["sha256_x"] == store.digest(at / f"{shard['name']}.x")
        assert shard["last_row"] % 10 == 0 or shard["last_row"] == 97
        assert shard["tokens"] == int(keep(ROWS[shard["first_row"]:shard["last_row"]]).sum())


def test_a_complete_store_is_not_made_again(at, whole):
    stamps = {path: path.stat().st_mtime_ns for path in at.iterdir()}
    make(at, lambda tokens: pytest.fail("the language model was run"), max_gb=0.0)
    assert {path: path.stat().st_mtime_ns for path in at.iterdir()} == stamps and contents(at) == whole


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
    at, kills = random.Random(0), 0
    while killed(tmp_path / "often", at.randint(15, 60), tokens=0):
        kills += 1
        assert kills < 100
    assert kills >= 2 and contents(tmp_path / "often") == whole


@pytest.mark.skipif(not fork, reason="needs fork")
def test_a_kill_from_outside_at_random_times_loses_nothing(tmp_path, whole):
    at = random.Random(0)
    for i in range(12):
        process = fork.Process(target=make, args=(tmp_path / f"{i % 3}", slow), daemon=True)
        process.start()
        time.sleep(at.uniform(0.005, 0.12))
        process.kill()
        process.join(300)
    for i in range(3):
        make(tmp_path / f"{i}")
        assert contents(tmp_path / f"{i}") == whole


def slow(tokens):
    time.sleep(0.01)
    return residuals(tokens)


@pytest.mark.skipif(not fork or not activations.fcntl, reason="needs fork and flock")
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
            until(lambda: "another process is writing the store" in (tmp_path / "said1").read_text())
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
def test_damaged_shards_are_named_and_made_again(at, whole, capsys, name, change, sentence):
    passes, opened = [], Store.open(at)
    damage(at / name, change)
    for read in [opened.verify] + [lambda: Store.open(at)] * (change != "a bit"):  # sizes alone do not show a bit
        with pytest.raises(ValueError, match=f"{name}.*{sentence}.*Store.make"):
            read()
    make(at, lambda tokens: passes.append(1) or residuals(tokens))
    assert contents(at) == whole and len(passes) <= 3
    assert name in (said := capsys.readouterr().err) and sentence in said
    Store.open(at).verify()


def test_a_manifest_that_says_too_much_is_not_believed(at, whole):
    change_manifest(at, lambda manifest: manifest["shards"].pop())
    make(at)
    assert contents(at) == whole


def test_checksums_are_left_out_above_verify_gb(at, whole):
    damage(at / "00001.x", "a bit")
    make(at, verify_gb=0.0)
    assert contents(at) != whole
    make(at)
    assert contents(at) == whole


def test_a_shard_that_comes_out_otherwise_is_refused(at):
    damage(at / "00001.x", "missing")
    before = contents(at)
    with pytest.raises(ValueError, match="shard 00001 of .*made again, is not what it was"):
        make(at, lambda tokens: residuals(tokens) + 1)
    assert contents(at) == before


@pytest.mark.parametrize("change, sentence", [
    (dict(identity={"model": "none", "layer": 2}), "made with layer 1, and 2 is asked for"),
    (dict(identity=IDENTITY | {"weights": "abc"}), "made with weights None, and 'abc' is asked for"),
    (dict(rows=ROWS + 5), "made with rows"), (dict(tokens=9), "made with tokens 0, and 9"),
    (dict(shard_tokens=200), "made with shard_tokens 100"), (dict(batch_rows=5), "made with batch_rows 10, and 5"),
    (dict(d_model=D + 1), "another width than 4"),
    (dict(keep=lambda tokens: tokens % 5 != 2), "other positions than are kept now"),
    (dict(batch_rows=0), "batch_rows=0.*must be positive")])
@pytest.mark.parametrize("complete", [True, False])
def test_another_store_in_the_folder_is_left_alone(at, change, sentence, complete):
    if not complete:
        change_manifest(at, lambda manifest: (manifest.update(complete=False), manifest["shards"].pop()))
    before = contents(at)
    with pytest.raises(ValueError, match=sentence):
        make(at, **change)
    assert contents(at) == before


def test_the_width_and_the_positions_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="width 3, d_model is 4"):
        make(tmp_path, d_model=4)
    for source in (lambda **a: make(tmp_path, **a), lambda **a: next(Streamed(ROWS, residuals, a["keep"], 4, 9, 0))):
        with pytest.raises(ValueError, match="special tokens only"):
            source(keep=lambda tokens: torch.zeros_like(tokens, dtype=torch.bool))


def test_identities_are_compared_as_they_are_read_again(tmp_path):
    for _ in range(2):
        make(tmp_path, identity={"layers": (1, 2), "path": tmp_path, 3: None})


def test_a_store_over_its_limit_is_refused_before_anything_is_written(tmp_path, monkeypatch, at):
    size = activations.estimate(len(KEPT), D)
    folder = tmp_path / "new" / "store"
    with pytest.raises(ValueError, match="takes .* GB .*more than `max_gb` = .*raise it, or ask for fewer `tokens`"):
        make(folder, max_gb=(size - 1) / 1e9)
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(ValueError, match="still to write, and the disk has .* GB free: make room"):
        make(folder)
    assert not folder.parent.exists()
    damage(at / "00000.x", "missing")
    make(at)  # of a store that is there only what it lacks counts
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
    monkeypatch.setattr(activations, "open", opened, raising=False)
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
def test_a_folder_without_permission(tmp_path, at):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OSError, match="read-only: choose another folder"):
        make(tmp_path / "closed" / "store")
    at.chmod(0o500)
    make(at)  # there is nothing to write
    at.chmod(0o700)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", "00000", "1", "", "00001.x"])
def test_names_that_are_paths_are_refused(at, name):
    change_manifest(at, lambda manifest: manifest["shards"][1].update(name=name))
    for read in (Store.open, make):
        with pytest.raises(ValueError, match="names shard .*expected the name '00001'"):
            read(at)


def test_a_link_that_leaves_the_folder_is_refused(at, tmp_path, whole):
    (at / "00001.x").rename(tmp_path / "elsewhere.x")
    (at / "00001.x").symlink_to(tmp_path / "elsewhere.x")
    with pytest.raises(ValueError, match="00001.x is a link that leaves the store"):
        Store.open(at)
    before = (tmp_path / "elsewhere.x").read_bytes()
    make(at)
    assert contents(at) == whole and not (at / "00001.x").is_symlink()
    assert (tmp_path / "elsewhere.x").read_bytes() == before
    (tmp_path / "link").symlink_to(at, target_is_directory=True)
    assert len(Store.open(tmp_path / "link")) == len(KEPT)


@pytest.mark.parametrize("change, sentence", [
    (dict(version=2), "version 2: this code reads 'tsae-activations', version 1"),
    (dict(format="other"), "format 'other'"), (dict(d_model="3"), "damaged at d_model"), (dict(d_model=0), "width 0"),
    (dict(d_model=True), "damaged at d_model"), (dict(dtype="float32"), "float32 of width 3: expected bfloat16"),
    (dict(identity=None), "damaged at identity"), (dict(shards={}), "damaged at shards"), (dict(shards=[3]), "at name"),
    (dict(complete=1), "damaged at complete"), (dict(complete=False), "not complete, it has 5 shards"),
    (dict(shards=[]), "without a shard"), (dict(shards=[{"name": "00000"}]), "damaged at first_row, last_row, tokens"),
    (dict(shards=[dict(name="00000", first_row=0, last_row=1, tokens=0, sha256_x="", sha256_t="")]), "with 0 pairs")])
def test_a_manifest_that_is_wrong_gets_a_sentence(at, change, sentence):
    change_manifest(at, lambda manifest: manifest.update(change))
    with pytest.raises(ValueError, match=sentence):
        Store.open(at)


def test_no_store_gets_a_sentence(tmp_path, at):
    with pytest.raises(FileNotFoundError, match="no store of activations in .*Store.make"):
        Store.open(tmp_path / "nothing")
    damage(at / "manifest.json", "cut off")
    (at / "manifest.json").write_bytes((at / "manifest.json").read_bytes()[:50])
    with pytest.raises(ValueError, match="manifest.json is not valid JSON"):
        Store.open(at)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_of_what_is_no_number_are_refused(value):
    moments = activations.Moments(5)
    moments.add(torch.tensor([[1.0, value]]), torch.tensor([2]))
    with pytest.raises(ValueError, match="NaN or infinite.*another layer"):
        moments.result()


@pytest.mark.parametrize("kind", ["store", "memory"])
def test_statistics_by_hand(at, kind):
    x, t = residuals(KEPT), KEPT % 50  # the last of 51 tokens never occurs
    x = x.bfloat16() if kind == "store" else x
    held = Memory(x, t)
    if kind == "store":
        held = Store.open(at)
        held.parts = [(x, t % 50) for x, t in held.parts]
    stats = held.statistics(51)
    x = x.double()
    assert torch.allclose(stats["mean"], x.mean(0).float()) and stats["mean"].dtype == torch.float32
    assert torch.allclose(stats["scale"], (x - x.mean(0)).square().mean().sqrt().float()) and not stats["scale"].ndim
    assert stats["count"].tolist() == [Counter(t.tolist())[token] for token in range(51)]
    for token in range(51):
        assert torch.allclose(stats["sum"][token], x[t == token].sum(0).float())
    assert stats["sum"].dtype == torch.float32 and stats["sum"].shape == (51, D)
    with pytest.raises(ValueError, match="token id 49 is outside the vocabulary of 49"):
        held.statistics(49)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_keeps_what_it_was_given(dtype):
    held = Memory(residuals(KEPT).to(dtype), KEPT)
    index = torch.tensor([5, 0, 5])
    x, t = held.gather(index)
    assert torch.equal(x, residuals(KEPT[index]).to(dtype).float()) and t.tolist() == KEPT[index].tolist()
    assert len(held) == len(KEPT) and held.d_model == D and held.parts[0][0].dtype == dtype and t.dtype == torch.int64
    for x, t in ((residuals(KEPT), KEPT[1:]), (residuals(KEPT[:0]), KEPT[:0])):
        with pytest.raises(ValueError, match="expected as many of both, and some"):
            Memory(x, t)


def test_the_estimate_is_what_tensors_take():
    for dtype, copies in ((torch.bfloat16, 1), (torch.float32, 2)):
        x, t = torch.zeros(10, D, dtype=dtype), torch.zeros(10, dtype=torch.int32)
        assert activations.estimate(10, D, dtype, copies) == copies * (x.nbytes + t.nbytes)


# Orders


@pytest.mark.parametrize("n", [*range(1, 201), 1000, 4096, 4097])
def test_the_permutation_is_one(n):
    for seed, epoch in ((0, 0), (0, 1), (2**70, 3)):
        p = activations.permuted(torch.arange(n), n, seed, epoch)
        assert p.dtype == torch.int64 and torch.equal(p.sort().values, torch.arange(n))
        part = torch.randint(n, (5,), generator=torch.Generator().manual_seed(0))
        assert torch.equal(activations.permuted(part, n, seed, epoch), p[part])  # one number at a time or all


def test_the_permutation_holds_for_more_pairs_than_memory():
    n = 3 * 10**17
    i = torch.cat([torch.arange(1000), n - 1 - torch.arange(1000)])
    p = activations.permuted(i, n, 0, 0)
    assert 0 <= p.min() and p.max() < n and len(p.unique()) == 2000
    assert 0.45 < (p.double() / n).mean() < 0.55


def test_the_permutation_looks_shuffled():
    """Each statistic within 4 of its own standard deviations, for fixed keys."""
    n = 4099
    i = torch.arange(n).double()
    seen = [activations.permuted(torch.arange(n), n, seed, epoch) for seed in range(4) for epoch in range(4)]
    for p in seen:
        moved = torch.stack([p.double(), p.roll(1).double(), (p % 2).double(), (p % 64).double()])
        assert torch.corrcoef(torch.cat([i[None], moved]))[0, 1:].abs().max() < 4 / n**0.5
        assert torch.corrcoef(moved[:2])[0, 1].abs() < 4 / n**0.5
        assert (p == torch.arange(n)).sum() <= 5  # fixed points: 1 is expected
        steps = (p[1:] > p[:-1]).sum().item() - n / 2
        assert abs(steps) < 4 * (n / 12) ** 0.5
        cells = torch.histc(p[:1024].double(), 32, 0, n)  # where the first quarter goes
        assert (cells - 32).square().sum() / 32 < 31 + 4 * 62**0.5
    for a, b in zip(seen, seen[1:]):
        assert (a == b).sum() <= 5 and torch.corrcoef(torch.stack([a, b]).double())[0, 1].abs() < 4 / n**0.5


@pytest.mark.parametrize("n, batch", [(1, 3), (5, 12), (97, 10), (96, 12), (543, 543), (543, 7)])
def test_every_epoch_gives_every_pair_once(n, batch):
    source = Shuffled(Memory(residuals(torch.arange(n)), torch.arange(n)), batch, seed=3)
    batches = list(islice(source, 4 * n // batch + 1))
    assert all(len(t) == batch and torch.equal(x, residuals(t)) for x, t in batches)
    order = torch.cat([t for _, t in batches])[:4 * n].view(4, n)
    assert all(torch.equal(epoch.sort().values, torch.arange(n)) for epoch in order)
    assert n < 20 or len({tuple(epoch.tolist()) for epoch in order}) == 4


def naive_stream(rows, batch, buffer, seed, batch_rows):
    """The stream as a plain generator, with whole copies and no state."""
    generator, x, t = torch.Generator().manual_seed(seed), torch.zeros(0, D), torch.zeros(0, dtype=torch.int32)
    while True:
        for which in torch.randperm(len(rows), generator=generator).split(batch_rows):
            kept = rows[which][keep(rows[which])]
            x, t = torch.cat([x, residuals(kept)]), torch.cat([t, kept])
            if len(t) >= max(buffer, 2 * batch):
                order = torch.randperm(len(t), generator=generator)
                x, t = x[order], t[order]
                used = len(t) // 2 // batch * batch
                yield from zip(x[:used].split(batch), t[:used].split(batch))
                x, t = x[used:], t[used:]


@pytest.mark.parametrize("batch, buffer, seed, batch_rows", [(12, 90, 1, 10), (5, 1, 2, 97), (100, 0, 0, 1),
                                                             (7, 2000, 3, 64)])
def test_streamed_batches_are_those_of_a_plain_generator(batch, buffer, seed, batch_rows):
    settings = dict(batch=batch, buffer=buffer, seed=seed, batch_rows=batch_rows)
    naive = [(x, t.long()) for x, t in islice(naive_stream(ROWS, **settings), 200)]
    assert equal(islice(Streamed(ROWS, residuals, keep, dtype=torch.float32, **settings), 200), naive)
    rounded = [(x.bfloat16().float(), t) for x, t in naive]
    assert equal(islice(Streamed(ROWS, residuals, keep, **settings), 200), rounded)


def test_a_stream_gives_every_epoch_and_holds_a_bounded_number():
    read = []
    source = source_of("streamed", residuals=lambda tokens: read.append(int(keep(tokens).sum())) or residuals(tokens))
    given = Counter()
    for number in range(1, 300):
        given.update(next(source)[1].tolist())
        assert sum(read) - 12 * number <= 90 + max(read) and source.x.dtype == torch.bfloat16
    assert set(given) == set(KEPT.tolist()) and max(given.values()) - min(given.values()) <= 2


@pytest.mark.parametrize("kind", ["shuffled", "streamed"])
def test_a_restored_source_goes_on_bit_for_bit(kind, tmp_path):
    straight, passes = list(islice(source_of(kind), 150)), []
    counted = {"residuals": lambda tokens: passes.append(1) or residuals(tokens)} if kind == "streamed" else {}
    for stop in [*range(12), 37, 38, 50, 77, 101]:
        source = source_of(kind)
        list(islice(source, stop))
        state = source.state()
        assert all(isinstance(value, (int, torch.Tensor)) for value in state.values())
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        if tensors:
            save_file(tensors, tmp_path / "state")
            tensors = load_file(tmp_path / "state")
        numbers = json.loads(json.dumps({name: value for name, value in state.items() if name not in tensors}))
        after = list(islice(source, 5))  # the state is a snapshot
        again = source_of(kind, **counted)
        list(islice(again, 3))  # whatever it was in the middle of
        passes.clear()
        again.restore(numbers | tensors)
        assert not passes and again.state().keys() == state.keys() and again.given == stop
        rest = list(islice(again, 150 - stop))
        assert equal(after, straight[stop:stop + 5]) and equal(rest, straight[stop:])
        assert len(passes) <= math.ceil((150 - stop) * 12 / 50) + 3


@pytest.mark.parametrize("kind", ["shuffled", "streamed"])
def test_a_state_of_another_source_is_refused(kind):
    state = source_of(kind).state()
    for name, value in dict(seed=2, batch=6).items():
        with pytest.raises(ValueError, match=f"saved with {name} .*, and this source has {value}"):
            source_of(kind, **{name: value}).restore(state)
    with pytest.raises(ValueError, match="lacks given"):
        source_of(kind).restore({name: value for name, value in state.items() if name != "given"})
    if kind == "shuffled":
        with pytest.raises(ValueError, match=f"saved with pairs {len(KEPT)}, and this source has 9"):
            Shuffled(Memory(residuals(KEPT[:9]), KEPT[:9]), 12, 1).restore(state)
    else:
        with pytest.raises(ValueError, match="saved with rows 97, and this source has 96"):
            Streamed(ROWS[:96], residuals, keep, 12, 90, 1, 10).restore(state)
        with pytest.raises(ValueError, match="buffer of torch.bfloat16, and this source has torch.float32"):
            source_of(kind, dtype=torch.float32).restore(state)


def test_an_interrupted_stream_gives_what_it_would_have():
    straight, interrupts = list(islice(source_of("streamed"), 100)), []

    def interrupted(tokens):
        interrupts.append(1)
        if len(interrupts) % 3 == 0:
            raise KeyboardInterrupt
        return residuals(tokens)

    source, batches = source_of("streamed", residuals=interrupted), []
    while len(batches) < 100:
        try:
            batches.append(next(source))
        except KeyboardInterrupt:
            assert source.state()["given"] == len(batches)
    assert equal(batches, straight) and len(interrupts) > 30


@pytest.mark.parametrize("kind", ["shuffled", "streamed"])
def test_ranks_share_out_the_global_batches(kind):
    whole = list(islice(source_of(kind), 40))
    for world in (2, 3, 12):
        ranks = [source_of(kind, rank=rank, world=world) for rank in range(world)]
        for x, t in whole:
            shares = [next(source) for source in ranks]
            assert all(torch.equal(share_x, x[rank::world]) and torch.equal(share_t, t[rank::world])
                       for rank, (share_x, share_t) in enumerate(shares))
        one = source_of(kind)
        one.restore(ranks[-1].state())  # states know nothing of ranks
        assert equal(islice(one, 3), list(islice(source_of(kind), 43))[40:])
    for rank, world in ((0, 5), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="batch of 12 pairs cannot be dealt to rank"):
            source_of(kind, rank=rank, world=world)


def test_prefetch_changes_nothing_but_the_time(at):
    held, straight = Store.open(at), list(islice(Shuffled(Store.open(at), 12, 1), 100))
    source = Shuffled(held, 12, 1, prefetch=True)
    first = list(islice(source, 30))
    state = source.state()
    assert state == dict(seed=1, pairs=len(held), batch=12, given=30)
    assert equal(first + list(islice(source, 70)), straight)
    source.restore(state)
    assert equal(islice(source, 70), straight[30:])


def test_an_error_in_the_thread_comes_out_of_next():
    class Broken(Memory):
        whole = True

        def gather(self, index):
            if not self.whole:
                raise OSError("the disk is gone")
            return super().gather(index)

    held = Broken(residuals(KEPT), KEPT)
    straight = list(islice(Shuffled(held, 12, 1), 5))
    source = Shuffled(held, 12, 1, prefetch=True)
    first = [next(source), next(source)]
    source._ahead.result()
    held.whole = False
    first.append(next(source))  # it was ahead already
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(source)
    assert source.state()["given"] == 3
    held.whole = True
    assert equal(first + [next(source), next(source)], straight)
