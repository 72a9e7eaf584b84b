"""Oracle: arithmetic by hand, products and layers computed naively, a stub that answers with seconds it was told."""

import io
from argparse import Namespace

import bench
import pandas as pd
import peers
import pytest
import torch
from conftest import tiny_network

from tsae import store

CASE = dict(kind="topk", d=8, n=32, k=4, batch=16, vocabulary=0, grams=0, dead=0.0, active=0, device="cpu", threads=1)
OPTIONS = Namespace(rounds=3, turn=1.0, limit=600.0, threads=1, full=False, peers=False, vocabulary=50,
                    size=dict(d=8, n=32, k=4, batch=16))
STUB = """
import json, sys, time
name, case = sys.argv[1], json.loads(sys.argv[2])
def answer(**message): print(json.dumps(message), flush=True)
answer(torch="1", version="2")
if name == "authors":
    answer(error="ValueError: broken")
answer(ready=True)
each = dict(floor=[0.1], tsae=[0.9, 0.4, 0.2, 0.2, 0.3, 0.2], silent=[0])[name]  # first three turns of warming up
for turn, line in enumerate(sys.stdin):
    time.sleep(60 * (name == "silent"))
    steps = int(line.removeprefix("run "))
    answer(seconds=steps * each[turn % len(each)], steps=steps, peak_gb=0.5)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Contenders that say what STUB says, in a process that imports nothing."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(bench, "SCRIPT", tmp_path / "stub.py")


def test_ratios_are_of_medians_within_a_cell():
    assert bench.spread([1.0, 9.0, 2.0]) == dict(low=1.5, seconds=2.0, high=5.5)
    table = bench.ratios([dict(contender="a", seconds=2.0), dict(contender="b", seconds=5.0)], to_a="a", to_c="c")
    assert table["to_a"].tolist() == [1.0, 2.5] and table["to_c"].isna().all()


def test_a_cell_has_a_row_for_every_contender_that_runs(stub, capsys):
    wide = CASE | dict(n=10**9)
    some = {name: (name, CASE) for name in ("floor", "tsae", "authors")} | {"too wide": ("tsae", wide)}
    table = bench.cell(some, OPTIONS, cell="gpt2").set_index("contender")
    assert list(table.index) == ["floor", "tsae"]
    assert table.loc["floor", "steps"] == 10 and table.loc["tsae", "steps"] == 5, "one second"
    assert table.loc["tsae", ["low", "seconds", "high"]].tolist() == pytest.approx([0.2, 0.2, 0.25])
    assert table.loc["tsae", "to_floor"] == pytest.approx(2.0) and table.loc["tsae", "to_tsae"] == 1.0
    said = capsys.readouterr().out
    assert "left out: authors" in said and "broken" in said and "left out: too wide" in said and "GB" in said


def test_a_step_slower_than_the_limit_is_left_out(stub, capsys):
    options = Namespace(**vars(OPTIONS) | dict(limit=0.5))
    assert list(bench.cell({"floor": ("floor", CASE), "tsae": ("tsae", CASE)}, options)["contender"]) == ["floor"]
    assert "all rounds more than" in capsys.readouterr().out


def test_a_silent_peer_is_ended(stub):
    contender = bench.Contender("silent", CASE, patience=0.2)
    with pytest.raises(RuntimeError, match="no answer in 0 s"):
        contender.run(1)
    assert contender.process.returncode is not None


def test_every_axis_and_kind_has_its_cell():
    options = Namespace(**vars(OPTIONS) | dict(full=True, peers=True, size={}))
    cells = [(name, {label: (of, case["kind"], case[name]) if name in case else (of, case["kind"], None)
                     for label, (of, case) in some.items()}) for name, some in bench.cells(options, "cpu")]
    for axis, sizes in bench.AXES.items():
        assert [some["tsae"][2] for name, some in cells if name == axis] == list(sizes)
    assert [some["tsae"][1] for name, some in cells if name == "base"] == ["topk", "relu", "gated", "jumprelu"]
    for _, some in cells:
        assert {"tsae", "floor"} <= set(some)
        assert all(kind == some["tsae"][1] and of in vars(peers) for of, kind, _ in some.values())
    assert set(cells[0][1]) - {"floor", "tsae + table", "tsae, dead"} == {"tsae", *bench.RIVALS["topk"]}


def test_an_answer_is_the_time_of_so_many_batches():
    said = []
    source = peers.commands(CASE, said.append, io.StringIO("run 2\nrun 3\n"))
    assert len(list(_until_exit(source))) == 5
    assert said[0] == dict(ready=True) and [message["steps"] for message in said[1:]] == [2, 3]
    assert all(message["seconds"] > 0 for message in said[1:])
    first, again = peers.batches(CASE), peers.batches(CASE)
    assert all(torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(first, again))
    assert torch.stack([x for x, _ in first]).square().mean().sqrt() == pytest.approx(1, rel=0.2)


def _until_exit(source):
    try:
        yield from source
    except SystemExit:
        return


def test_the_floor_is_the_encoder_product_alone(monkeypatch):
    calls, product = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, W, out: calls.append((x, W, product(x, W, out=out))))
    with pytest.raises(SystemExit):
        peers.floor(CASE, peers.commands(CASE, print, io.StringIO("run 3\n")))
    x, W, out = calls[2]
    assert len(calls) == 3 and len({call[2].data_ptr() for call in calls}) == 1, "one buffer"
    assert torch.equal(x, peers.batches(CASE)[2][0].bfloat16()) and out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), x.double() @ W.double(), rtol=0.01, atol=0.01) and out.shape == (16, 32)


@pytest.mark.parametrize("name, case", [
    ("tsae", {}), ("tsae", dict(vocabulary=20)), ("tsae", dict(dead=0.5)), ("tsae", dict(kind="relu")),
    ("tsae", dict(vocabulary=20, grams=100)),
    ("tsae", dict(kind="gated")), ("tsae", dict(kind="jumprelu")), ("authors", {}), ("authors", dict(vocabulary=20))])
def test_contenders_train_on_as_many_batches_as_told(name, case):
    said = []
    with pytest.raises(SystemExit):
        getattr(peers, name)(CASE | case, peers.commands(CASE | case, said.append, io.StringIO("run 4\n")))
    assert [message.get("steps") for message in said] == [None, 4]


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu"])
def test_few_active_features_are_as_many_as_asked(kind, monkeypatch):
    case, seen = CASE | dict(kind=kind, active=4), []
    monkeypatch.setattr("tsae.train.fit", lambda sae, source, *_, **__: seen.append(sae.loss(next(source)[0])["codes"]))
    peers.tsae(case, peers.commands(case, lambda _: None, io.StringIO("run 1\n")))
    assert (seen[0] > 0).sum().item() == pytest.approx(4 * case["batch"], abs=1)


def test_truncated_ends_where_residuals_are_read(tiny):
    tokens = torch.randint(1, 257, (2, 8))
    base = bench.truncated(tiny_network(tiny.name), 2)
    seen = []
    final = next(part for name, part in base.named_children() if "norm" in name or name == "ln_f")
    final.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        base(input_ids=tokens, use_cache=False)
    x = seen[0] - seen[0].mean(-1, keepdim=True) if tiny.centred else seen[0]
    assert torch.allclose(tiny.layer(2).residuals(tokens), x, atol=1e-5)


def test_a_table_lands_beside_its_line_of_the_manifest(tmp_path, monkeypatch, capsys):
    def step(options):
        """Nothing is timed."""
        return pd.DataFrame([dict(cell="gpt2", seconds=options.size["d"])])

    monkeypatch.setitem(bench.PARTS, "step", step)
    store.write_json(tmp_path / "manifest.json", {"other.csv": {}})
    threads = torch.get_num_threads()
    bench.main(["step", "--d", "3", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    manifest = store.read_json(tmp_path / "manifest.json")
    assert set(manifest) == {"other.csv", "bench_step.csv"} and "cpu" in manifest["bench_step.csv"]["parameters"]
    assert manifest["bench_step.csv"]["sha256"] == store.digest(tmp_path / "bench_step.csv")
    assert store.read_table(tmp_path / "bench_step.csv")["seconds"].tolist() == [3]
    assert "gpt2" in capsys.readouterr().out


def test_no_gpu_is_said_and_an_unknown_part_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.gpu(OPTIONS) is None and "no GPU: not run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["stepp"])


def test_the_script_answers_in_json_and_survives_a_failure(tmp_path):
    contender = bench.Contender("floor", CASE)
    assert contender.run(2) > 0 and contender.peak_gb > 0.01 and contender.versions["torch"] == torch.__version__
    contender.close()
    with pytest.raises(RuntimeError, match="KeyError"):
        bench.Contender("no such trainer", CASE)
