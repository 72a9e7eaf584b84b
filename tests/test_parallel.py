"""Oracle: the one process that trains on the same batches, in float64, and the run that was not interrupted.

Ranks are processes on this machine that talk over gloo. They are forked from a server that has imported everything once.
"""

import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tsae import baseline, store, train
from tsae.baseline import Context, Needs
from tsae.pairs.order import Shuffled
from tsae.pairs.shards import InContext, Memory
from tsae.sae import SAE
from tsae.scale import __main__ as trainer
from tsae.scale import checkpoints, parallel
from tsae.scale.passes import fit_all
from tsae.scale.sharded import Sharded

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tsae.scale", "torch._dynamo", "test_parallel"])
KILLS = int(os.environ.get("TSAE_KILLS", 4))
D, N, V, BATCH, STEPS = 24, 36, 30, 60, 30
CASES = {
    "topk": dict(), "table": dict(lookup="learned"), "frozen": dict(lookup="frozen"),
    "rest": dict(lookup="learned", encoder_sees="rest"), "batchtopk": dict(activation="batchtopk", lookup="learned"),
    "relu": dict(activation="relu", lookup="learned"), "jumprelu": dict(activation="jumprelu", lookup="learned"),
    "gated": dict(activation="gated", lookup="learned"),
    **{kind: dict(kind=kind, encoder_sees="rest") for kind in ("grams", "hashed", "embedding", "low rank",
                                                                     "affine", "directions", "earlier")}}
NEEDS = Needs(3, (5,))
TOPK = [name for name, case in CASES.items() if "activation" not in case]


def rank_of(world: int, rank: int, port: int, job, arguments) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TQDM_DISABLE="1")
    torch.set_num_threads(1)
    with parallel.start("cpu") if job not in (command_line, alone_of_two) else nullcontext():
        job(*arguments)


def launched(world: int, job, *arguments) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [SERVER.Process(target=rank_of, args=(world, rank, port, job, arguments), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def run(world: int, job, *arguments) -> None:
    """job(*arguments) on every rank of `world`, to its end."""
    ranks, deadline = launched(world, job, *arguments), time.monotonic() + 150
    try:
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in ranks] == [0] * world
    finally:
        killed(ranks)


def pairs(m: int = 900) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    u, directions = torch.randn(V, D, generator=g), torch.randn(N, D, generator=g)
    t, which = torch.randint(V, (m,), generator=g), torch.randint(N // 2, (m, 3), generator=g)
    return u[t] + directions[which].sum(1) + 0.1 * torch.randn(m, D, generator=g), t


def dealt(**ranks) -> Shuffled:
    """Batches of this rank; their contexts hold three ids, and x as layer 5."""
    x, t = pairs()
    ids = torch.stack([t, t.roll(1), t.roll(2)], 1)
    ranks = ranks or dict(rank=parallel.rank(), world=parallel.world())
    return Shuffled(InContext(Memory(x, t), NEEDS, ids, {}), BATCH, seed=1, **ranks)


def doubled(x: torch.Tensor, t: Context) -> tuple[torch.Tensor, Context]:
    return x.double(), t.to(torch.double)


def known(kind: str) -> baseline.Baseline:
    """A baseline with random values."""
    g = torch.Generator().manual_seed(3)
    if kind == "earlier":
        first = SAE(D, 10, k=2, scale=1.5).start(torch.zeros(D), seed=4)
        return baseline.Earlier(D, 5, 1.5, first)
    found = {"grams": baseline.Grams(D, V, [V, 0]), "hashed": baseline.Hashed(D, V, 12),
             "embedding": baseline.Factored(D, V, 4, left_learned=False), "low rank": baseline.Factored(D, V, 4),
             "affine": baseline.Affine(D, 5, D, 1.5, 3), "directions": baseline.Affine(D, 5, D, 1.5, 3, learned=False)}[kind]
    if kind == "grams":
        found.keys.copy_(torch.arange(V) * (V + 1))  # every token after itself
        found.keys[1:] -= V - 1  # or after the one that is one less
        found.keys.copy_(found.keys.sort().values)
    with torch.no_grad():
        for p in found.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return found


def build(activation="topk", kind="", **settings) -> SAE:
    sae = SAE(D, N, activation, 3, 0 if kind else V, scale=1.5, baseline=known(kind) if kind else None, **settings)
    table = None if kind else torch.randn(V, D, generator=torch.Generator().manual_seed(2))
    sae.start(torch.full((D,), 0.1), table, seed=1)
    sae.W_enc.data[::2] *= 0.05  # too weak to be chosen: more dead features than AuxK takes
    if activation == "jumprelu":
        sae.log_threshold.data.fill_(-0.5)
    return sae.double()


def trained(sae: SAE) -> pd.DataFrame:
    source = (doubled(*pair) for pair in dealt())
    return fit_all([train.Run(sae, STEPS * BATCH, lr=0.01, sparsity=0.05, dead_after_tokens=4 * BATCH, log_every_tokens=BATCH,
                              exchange=parallel.Ranks())], source)[0]


def train_all(folder: Path, names: list[str], sharded: bool = False) -> None:
    """Train each of the cases; every rank writes what it has."""
    for name in names:
        sae = Sharded(build(**CASES[name])) if sharded else build(**CASES[name])
        place = folder / name / str(parallel.rank())
        text = trained(sae).to_csv(index=False)
        store.write_text(place / "history.csv", text)
        save_file(sae.state_dict(), place / "own.safetensors")
        if sharded:
            sae.save(folder / name)
            save_file({"x": sae(*doubled(*next(dealt()))).detach().contiguous()}, place / "rebuilt.safetensors")


@pytest.fixture(scope="module")
def alone() -> dict:
    """History and weights of each case in this one process."""
    saes = {name: build(**case) for name, case in CASES.items()}
    return {name: (trained(sae), sae) for name, sae in saes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two ranks (and three, of the sharded) made of the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    run(2, train_all, folder / "2", list(CASES))
    for world in (2, 3):
        run(world, train_all, folder / f"sharded{world}", TOPK, True)
    return folder


def history(place: Path) -> pd.DataFrame:
    return pd.read_csv(place / "history.csv")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_what_one_does(name, folder, alone):
    wanted, sae = alone[name]
    found, weights = history(folder / "2" / name / "0"), load_file(folder / "2" / name / "0/own.safetensors")
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-7)
    for key, value in sae.state_dict().items():
        assert torch.allclose(weights[key], value, rtol=1e-6, atol=1e-7), key
    assert wanted.loss.iloc[-1] < 0.9 * wanted.loss.iloc[0]
    if "topk" in sae.activation:
        assert wanted.dead.max() * N > D // 2  # AuxK was at work, and had to choose
    other = folder / "2" / name / "1"
    assert all(torch.equal(value, weights[key]) for key, value in load_file(other / "own.safetensors").items())
    assert history(other).equals(found)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", TOPK)
def test_sharded_features_learn_what_the_whole_sae_does(name, world, folder, alone):
    wanted, sae = alone[name]
    place = folder / f"sharded{world}" / name
    pd.testing.assert_frame_equal(history(place / "0"), wanted, rtol=1e-7)
    whole = load_file(place / "weights.safetensors")
    for key, value in sae.state_dict().items():
        assert torch.allclose(whole[key], value, rtol=1e-6, atol=1e-6), key
    assert SAE.load(place).n == N and load_file(place / "0/own.safetensors")["W_enc"].shape == (N // world, D)
    parts = [load_file(place / str(rank) / "rebuilt.safetensors")["x"] for rank in range(world)]
    with torch.no_grad():
        assert torch.allclose(torch.stack(parts, 1).flatten(0, 1), sae(*doubled(*next(dealt(rank=0)))), atol=1e-6)


def exchange(folder: Path) -> None:
    """Gradients of one batch, by both sizes of message; what a rank without them does; the small functions."""
    rank, results = parallel.rank(), {}
    x, t = next(dealt())
    for size in (1, 10**9):
        parallel.BUCKET, sae = size, build(lookup="learned")
        out = sae.loss(x.double(), t)
        out["loss"].backward()
        if size == 1 and rank == 1:
            sae.b_enc.grad = sae.W_lookup.grad = None
        sae.W_dec.requires_grad_(False)
        fired, results["worst"] = parallel.Ranks.share(sae, out["fired"], out["loss"] + rank)
        assert sae.W_lookup.grad.layout == torch.sparse_coo
        results |= {f"{name} {size}": p.grad.to_dense() for name, p in sae.named_parameters() if p.requires_grad}
        results["worst"], results[f"loss {size}"] = torch.tensor(results["worst"]), out["loss"].detach()
        results[f"rows {size}"], results["fired"] = sae.W_lookup.grad.coalesce().indices()[0], fired
    values = torch.randn(40, generator=torch.Generator().manual_seed(rank)) + 5 * rank
    results["kth"] = parallel.Ranks.kth_largest(values, 25)
    results["asked"] = torch.tensor([parallel.any_rank(7 * rank), parallel.any_rank(rank == 0), parallel.any_rank(False)])
    results["averaged"] = torch.tensor(list(parallel.Ranks.average(dict(a=float(rank), b=0.1)).values()))
    save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{rank}.safetensors")


def test_what_ranks_tell_each_other(tmp_path):
    run(2, exchange, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    own = {name for name in first if name.startswith("loss")}
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first.keys() - own)
    assert first["worst"] == (second[f"loss {10**9}"] + 1).float(), "the loss of the rank where it is largest"
    sae, (x, t) = build(lookup="learned"), next(Shuffled(Memory(*pairs()), BATCH, seed=1))
    out = sae.loss(x.double(), t)
    out["loss"].backward()
    for name, p in sae.named_parameters():
        if name != "W_dec":
            assert torch.allclose(first[f"{name} {10**9}"], p.grad.to_dense(), atol=1e-12), name
    assert torch.equal(first[f"rows {10**9}"], t.unique()) and torch.equal(first["fired"], out["fired"])
    sae.zero_grad()
    sae.loss(x[::2].double(), t[::2])["loss"].backward()  # rank 0's share, all that there is of these two
    for name in ("b_enc", "baseline.W_lookup"):
        grad = sae.get_parameter(name).grad.to_dense()
        assert torch.allclose(first[f"{name} 1"], grad / 2, atol=1e-12)
    assert torch.equal(first["rows 1"], t[::2].unique())
    every = torch.cat([torch.randn(40, generator=torch.Generator().manual_seed(rank)) + 5 * rank for rank in range(2)])
    assert first["kth"] == every.sort(descending=True).values[49]
    assert first["asked"].tolist() == [7, 1, 0] and first["averaged"].tolist() == pytest.approx([0.5, 0.1])


def tell(folder: Path) -> None:
    """What is refused, as each rank hears it."""
    heard = []
    for whole in (SAE(D, N + 1, k=2), SAE(D, N, "relu")):
        try:
            Sharded(whole)
        except ValueError as error:
            heard.append(str(error))
    parallel.save(folder / "c", 5, dict(seen=1), sharded=True)
    (folder / f"rank{parallel.rank()}").write_text("\n".join(heard))


def test_what_cannot_be_sharded_gets_a_sentence(tmp_path, monkeypatch):
    run(3, tell, tmp_path)
    for rank in range(3):
        odd, relu = (tmp_path / f"rank{rank}").read_text().splitlines()
        assert "topk SAE of 37 features cannot be dealt to 3 ranks" in odd and "relu SAE" in relu
    for sharded in (True, False):
        with pytest.raises(ValueError, match="of an SAE in 3 shards: go on with as many ranks"):
            parallel.newest(tmp_path / "c", sharded)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="not WORLD_SIZE.*start the command with torchrun"), parallel.start("cpu"):
        pass


def uneven(folder: Path) -> None:
    """Rank 0 was killed after its third checkpoint, rank 1 before; then the same where both should read one folder."""
    rank, heard = parallel.rank(), []
    for step in (10, 20):
        parallel.save(folder / "c", step, dict(seen=step), sharded=True)
    if parallel.main():
        checkpoints.save(folder / "c/rank0-of-2", 30, dict(seen=30))
    heard.append(parallel.newest(folder / "c", sharded=True)["seen"])
    heard.append(checkpoints.last(folder / f"c/rank{rank}-of-2")[0])
    checkpoints.save(folder / f"own{rank}", 10 + rank, dict(seen=10))
    try:
        parallel.newest(folder / f"own{rank}")
    except ValueError as error:
        heard.append("all share" in str(error))
    (folder / f"rank{rank}").write_text(str(heard))


def test_the_newest_checkpoint_is_one_that_all_have(tmp_path):
    run(2, uneven, tmp_path)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["[20, 20, True]"] * 2


def test_one_process_needs_no_group(tmp_path):
    with parallel.start("cpu") as device:
        assert (device, parallel.world(), parallel.main(), parallel.any_rank(3)) == ("cpu", 1, True, 3)
    sharded, whole = Sharded(build(lookup="learned")), build(lookup="learned")
    pd.testing.assert_frame_equal(trained(sharded), trained(whole), rtol=1e-9)
    saved = SAE.load(sharded.save(tmp_path))
    for name, value in whole.state_dict().items():
        assert torch.allclose(saved.state_dict()[name], value.float(), atol=1e-6), name
    with pytest.raises(NotImplementedError, match="whole"):
        sharded.encode(pairs()[0])


def patience(folder: Path) -> None:
    group = torch.distributed.distributed_c10d._get_default_group()
    (folder / f"rank{parallel.rank()}").write_text(str(group._get_backend(torch.device("cpu")).options._timeout))


def alone_of_two(folder: Path) -> None:
    parallel.MEET, os.environ["WORLD_SIZE"] = timedelta(seconds=1), "2"
    try:
        with parallel.start("cpu"):
            pass
    except ConnectionError as error:
        (folder / "heard").write_text(str(error))


def test_ranks_meet_soon_or_never_and_then_wait_for_each_other(tmp_path):
    run(2, patience, tmp_path)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == [str(parallel.WAIT)] * 2
    run(1, alone_of_two, tmp_path)
    assert "rank 0 did not meet all 2 ranks at 127.0.0.1" in (tmp_path / "heard").read_text()


def resumable(folder: Path, sharded: bool, stall: tuple[int, str, int] | None = None) -> None:
    """Train with a checkpoint at every step. With `stall`, that rank waits for ever at its n-th call of a function."""
    if stall and stall[0] == parallel.rank():
        module = os if stall[1] == "rename" else shutil
        function, left = getattr(module, stall[1]), iter(range(stall[2]))

        def waits(*arguments, **named):
            if next(left, None) is None:
                (folder / "stalled").touch()
                time.sleep(1000)
            return function(*arguments, **named)
        setattr(module, stall[1], waits)
    sae = build(lookup="learned").float()
    sae = Sharded(sae) if sharded else sae
    one = train.Run(sae, 15 * BATCH, dead_after_tokens=3 * BATCH, log_every_tokens=BATCH, exchange=parallel.Ranks())
    history, = fit_all([one], dealt(), quick=True, folder=folder / "unfinished", checkpoint_every_s=0)
    if sharded or parallel.main():
        sae.save(folder)
    store.write_text(folder / f"history{parallel.rank()}.csv", history.to_csv())


def killed(ranks: list) -> None:
    for process in ranks:
        if process.exitcode is None:
            with suppress(ProcessLookupError):  # it ended by itself, and nobody has been told yet
                os.kill(process.pid, signal.SIGKILL)
    for process in ranks:
        process.join(100)


def result(folder: Path) -> list[str]:
    return [store.digest(folder / "weights.safetensors"), *((folder / f"history{rank}.csv").read_text() for rank in range(2))]


@pytest.mark.parametrize("sharded", [False, True])
def test_kill_all_ranks_at_any_instant_and_go_on_gives_the_same_bits(sharded, tmp_path):
    run(2, resumable, tmp_path / "whole", sharded)
    wanted, dice = result(tmp_path / "whole"), random.Random(os.environ.get("TSAE_KILL_SEED", "0"))
    stalls = [(rank, call, dice.randrange(12)) for rank in range(1 + sharded) for call in ("rename", "rmtree")]
    for point, stall in enumerate(stalls + [None] * KILLS):
        folder = tmp_path / str(point)
        folder.mkdir()
        ranks = launched(2, resumable, folder, sharded, stall)
        try:
            deadline = time.monotonic() + 150
            while time.monotonic() < deadline and not (folder / ("stalled" if stall else "unfinished")).exists():
                time.sleep(0.005)
            time.sleep(0.1 if stall else 0.3 * dice.random())  # 0.1: the other rank is done with its own by then
            assert stall is None or (folder / "stalled").exists()
        finally:
            killed(ranks)
        run(2, resumable, folder, sharded)
        assert result(folder) == wanted, f"kill point {point}: {stall}"
        shutil.rmtree(folder)


def stopped(folder: Path) -> None:
    """Rank 1 alone is asked to stop after some steps: all leave, with a checkpoint."""
    class Asked(Shuffled):
        def __next__(self):
            if self.given == 5 and self.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()
    source = Asked(Memory(*pairs()), BATCH, seed=1, rank=parallel.rank(), world=parallel.world())
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        fit_all([train.Run(build().float(), STEPS * BATCH, exchange=parallel.Ranks())], source, folder=folder)


def test_a_signal_to_one_rank_stops_all(tmp_path):
    run(2, stopped, tmp_path)
    assert checkpoints.last(tmp_path)[0] == 6 * BATCH


@pytest.fixture
def command(model_folder, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(store, "CACHE", tmp_path / "cache")
    words, draw = "alpha beta gamma delta of the and in to a is was for on with".split(), random.Random(0)
    (tmp_path / "words.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=80)) for _ in range(300)))
    return ["--model", str(model_folder("gpt2")), "--corpus", str(tmp_path / "words.txt"), "--layer", "2", "--n-features", "64",
            "--k", "4", "--train-tokens", "6000", "--context", "32", "--batch", "256", "--lr", "0.003", "--device", "cpu"]


def command_line(cache: Path, arguments: list[str]) -> None:
    store.CACHE = cache
    trainer.main(arguments)


def test_the_command_under_torchrun(command, tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tsae.scale",
            *command, "--out", str(tmp_path / "run")]
    environment = os.environ | dict(TSAE_HOME=str(tmp_path), OMP_NUM_THREADS="1")
    done = subprocess.run(line, env=environment, cwd=store.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "by 2 ranks, nmse 0." in done.stdout and done.stdout.count("trained on") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "history.csv", "settings.json",
                                                                        "weights.safetensors"]
    trainer.main([*command, "--out", str(tmp_path / "alone")])
    run(2, command_line, store.CACHE, [*command, "--out", str(tmp_path / "dealt"), "--shard-features"])
    wanted = pd.read_csv(tmp_path / "alone/history.csv")
    for name in ("run", "dealt"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name / "history.csv"), wanted, rtol=0.02)
        assert SAE.load(tmp_path / name).config == SAE.load(tmp_path / "alone").config


def test_the_command_trains_ngrams_on_any_number_of_ranks(command, tmp_path):
    line = [*command, "--grams", "20", "10"]
    trainer.main([*line, "--out", str(tmp_path / "alone")])
    for name, more in dict(shared=[], dealt=["--shard-features"], streamed=["--store-gb", "0"]).items():
        run(2, command_line, store.CACHE, [*line, "--out", str(tmp_path / name), *more])
    wanted, alone = pd.read_csv(tmp_path / "alone/history.csv"), SAE.load(tmp_path / "alone")
    assert alone.lookup == "grams" and alone.baseline.config["rows"] == [20, 10]
    for name in ("shared", "dealt"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name / "history.csv"), wanted, rtol=0.02)
        assert torch.equal(SAE.load(tmp_path / name).baseline.keys, alone.baseline.keys)
    assert all(SAE.load(tmp_path / name).config == alone.config for name in ("shared", "dealt", "streamed"))
    for wrong in (["--grams", "-1"], ["--grams", "5", "--lookup", "none"], ["--grams", "5", "--recipe", "code"]):
        with pytest.raises(SystemExit, match="stand beside a learned table"):
            trainer.main([*command, "--out", str(tmp_path / "wrong"), *wrong])


def test_a_run_that_was_begun_goes_on_in_its_own_way_only(command, tmp_path, monkeypatch):
    line, step, left = [*command, "--out", str(tmp_path / "run"), "--checkpoint-every-s", "0"], train.Run.step, [1] * 5

    def cut(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return step(*arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "step", cut)
        trainer.main(line)
    for change, sentence in ((["--store-gb", "0"], "begun with streamed False.*--store-gb makes it True.*another --out"),
                             (["--shard-features"], "begun with shard_features False.*give the --shard-features")):
        with pytest.raises(SystemExit, match=sentence):
            trainer.main([*line, *change])
    steps = []
    monkeypatch.setattr(train.Run, "step", lambda *a: steps.append(1) or step(*a))
    trainer.main([*line, "--store-gb", "50"])  # still a store
    assert len(steps) == -(-6000 // 256) - 5 and not (tmp_path / "run/unfinished").exists()


def test_the_command_says_what_is_wrong(command, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    trainer.main([*command, *out])
    trainer.main([*command, *out])
    assert "holds this SAE already" in capsys.readouterr().out
    for changes, sentence in ((["--k", "99"], "k is 99"), (["--layer", "99"], "layer 99 was asked for"),
                              (["--grams", *["1"] * 9], "n-grams up to")):
        with pytest.raises(SystemExit, match=sentence):
            trainer.main([*command, "--out", str(tmp_path / "late"), *changes])
        assert not (tmp_path / "late" / "settings.json").exists(), "the corrected command can go there"
    for changes, sentence in ((["--k", "5"], "other settings.*choose another --out"), (["--model", "/nowhere"], "no model")):
        with pytest.raises(SystemExit, match=sentence):
            trainer.main([*command, *(out if "--k" in changes else ["--out", str(tmp_path / "new")]), *changes])
