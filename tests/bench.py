"""What training costs: `python -m tests.bench [step extraction storing sweep gpu] [--peers] [--full]`.

Prints a table for each part and writes it to data/results/bench (or --out) with its line in the manifest there. Without
names: all parts. `--full` adds the grid of sizes and takes the promised ones (a store of 2 million rows), `--peers`
adds the other trainers, each from the package index in an environment of its own with the torch version of this one.

Fairness. Contenders take turns (ABCABC...), one at a time on the same number of threads, and ratios are of medians over
the rounds. What a step of each contains is said in tests/peers.py, beside its code. Each trains in its own loop with
its own defaults: tsae with `quick=True`, as everywhere in this repository (bfloat16 products), the others in float32,
but for `sae_lens_bf16`; dictionary_learning and sparsify have no bfloat16 on a CPU. The floor is no trainer.
"""

import argparse
import json
import math
import os
import select
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported: progress bars are no part of what is timed or printed

import pandas as pd
import torch

from tsae import picture, plots, readme, store

PEERS = store.CACHE / "peers"
SCRIPT = Path(__file__).with_name("peers.py")
REQUIREMENTS = {  # name: what pip installs beside this environment's torch, and what it then takes away
    "sparsify": (["eai-sparsify==1.3.3", "transformers==5.23.0", "numpy==2.4.6"], []),
    "dictionary_learning": (["dictionary-learning==0.1.0", "transformers==5.23.0", "nnsight==0.3.7", "numpy==2.4.6"],
                            ["torchvision"]),  # comes built for another torch, and nothing here needs it
    "sae_lens": (["sae-lens==6.54.12", "transformers==5.23.0", "numpy==2.4.6"], []),
}
SAE_LENS = ("sae_lens", "sae_lens_bf16")
RIVALS = {"topk": ("authors", "sparsify", "dictionary_learning", *SAE_LENS),
          **dict.fromkeys(("relu", "gated", "jumprelu"), ("dictionary_learning", *SAE_LENS))}
GPT2 = dict(kind="topk", d=768, n=12288, k=32, batch=2048, vocabulary=0, grams=0, dead=0.0, active=0)
SMOLLM2 = dict(n=9216, d=576, k=8)
AXES = dict(n=(2048, 6144, 12288, 24576, 49152, 98304), d=(128, 256, 512, 768, 1536, 2304), k=(8, 16, 32, 64, 128))
CORNERS = (dict(n=2048, d=128, k=8), dict(n=98304, d=2304, k=128))
SHOWN = ["cell", "contender", "version", "kind", "n", "d", "k", "steps", "seconds", "low", "high", "tokens_per_second",
         "to_floor", "to_tsae", "peak_gb", "of_matmul_rate"]


def machine(threads: int) -> dict:
    """Where the numbers come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return dict(cpu=cpu, capability=torch.backends.cpu.get_cpu_capability(), cores=os.cpu_count(), threads=threads,
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none", torch=torch.__version__)


def free_gb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable")), math.inf)


def environment(name: str) -> str:
    """The python that has a peer: this one where it is installed, else that of an environment under data/cache."""
    needs, without = REQUIREMENTS[name]
    try:
        if version(needs[0].split("==")[0]) == needs[0].split("==")[1]:
            return sys.executable
    except PackageNotFoundError:
        pass
    folder, wanted = PEERS / name, [f"torch=={torch.__version__.split('+')[0]}", *needs]
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if not done.is_file() or done.read_text().split() != wanted:
        print(f"building the environment of {name} in {folder} ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True, stderr=subprocess.DEVNULL)
        if without:
            subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *without], check=True)
        store.write_text(done, "\n".join(wanted))
    return str(python)


class Contender:
    """A trainer in a process of its own, asleep until it is told to `run`."""

    def __init__(self, name: str, case: dict, python: str = sys.executable, patience: float = 600):
        threads = str(case["threads"])
        own = dict(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, HF_HUB_OFFLINE="1")
        self.case, self.patience = case, patience
        self.process = subprocess.Popen(  # no buffer: `select` must see every line
            [python, "-P", SCRIPT, name, json.dumps(case)], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=os.environ | own)
        self.versions = self.answer()
        self.answer()

    def answer(self) -> dict:
        """Its next line. Raises RuntimeError when it failed, ended or says nothing for `patience` seconds."""
        ready = select.select([self.process.stdout], [], [], self.patience)[0]
        line = self.process.stdout.readline() if ready else b""
        silence = "it ended" if ready else f"no answer in {self.patience:.0f} s"
        message = json.loads(line) if line else dict(error=silence)
        if "error" in message:
            self.close()
            raise RuntimeError(message["error"])
        return message

    def run(self, steps: int) -> float:
        """Train on `steps` batches: seconds a step. Notes the peak memory of the process."""
        self.process.stdin.write(f"run {steps}\n".encode())
        told = self.answer()
        self.peak_gb = told["peak_gb"]
        return told["seconds"] / steps

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def memory_gb(name: str, case: dict) -> float:
    """An upper estimate: weights, gradients and Adam's state, the table likewise, codes, gathered rows, batches."""
    n, d, k, b = (case[key] for key in ("n", "d", "k", "batch"))
    codes = 1 if name == "floor" or (name == "tsae" and case["kind"] == "topk") else 6
    gathered = 2 * b * k * d if name == "sparsify" else 0
    weights = (1 if name == "floor" else 8) * n * d + (3 if name == "tsae" else 4) * case["vocabulary"] * d
    return 0.5 + 4 * (weights + codes * b * n + gathered + 10 * b * d) / 1e9


def enter(name: str, case: dict, options: argparse.Namespace) -> tuple[Contender, int]:
    """A contender warmed up by five steps, and how many fit into a turn. RuntimeError if it cannot run."""
    if (need := memory_gb(name, case)) > 0.8 * (free := free_gb()):
        raise RuntimeError(f"it needs about {need:.1f} GB, {free:.1f} GB are free")
    peer = name.removesuffix("_bf16")
    contender = Contender(name, case, environment(peer) if peer in REQUIREMENTS else sys.executable)
    contender.run(1)
    each = min(contender.run(2), contender.run(2))
    if each * options.rounds > options.limit:
        contender.close()
        raise RuntimeError(f"a step takes {each:.0f} s, all rounds more than {options.limit:.0f} s")
    return contender, max(1, min(200, round(options.turn / each)))


def spread(seconds: list[float]) -> dict:
    """Median and quartiles."""
    return dict(zip(("low", "seconds", "high"), pd.Series(seconds).quantile([0.25, 0.5, 0.75]).tolist()))


def cell(contenders: dict[str, tuple[str, dict]], options: argparse.Namespace, **columns) -> pd.DataFrame:
    """One row for each contender {label: (name, case)}, timed in turns. What cannot run is left out, with why."""
    standing, samples = {}, {}
    try:
        for label, (name, case) in contenders.items():
            try:
                standing[label] = enter(name, case, options)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                size = ", ".join(f"{key} {case[key]}" for key in ("kind", "n", "d", "k"))
                print(f"left out: {label}, {size}: {error}", flush=True)
        for _ in range(options.rounds):
            for label, (contender, steps) in standing.items():
                samples.setdefault(label, []).append(contender.run(steps))
    finally:
        for contender, _ in standing.values():
            contender.close()
    rows = [dict(contender=label, **columns, **contender.versions, **contender.case, rounds=options.rounds, steps=steps,
                 **spread(samples[label]), peak_gb=contender.peak_gb) for label, (contender, steps) in standing.items()]
    return ratios(rows, to_floor="floor", to_tsae="tsae")


def ratios(rows: list[dict], **columns: str) -> pd.DataFrame:
    """The rows with a column for each name=contender: their median seconds divided by those of that contender."""
    at = {row["contender"]: row["seconds"] for row in rows}
    return pd.DataFrame([row | {column: row["seconds"] / at.get(label, math.nan) for column, label in columns.items()}
                         for row in rows])


def cells(options: argparse.Namespace, device: str) -> Iterator[tuple[str, dict[str, tuple[str, dict]]]]:
    """Every cell of `step`: what it varies, and its contenders."""
    base = GPT2 | dict(device=device, threads=options.threads) | options.size
    table = dict(vocabulary=options.vocabulary)
    rivals = dict(topk=("sparsify",)) if device == "cuda" else RIVALS if options.peers else {}
    own = {"floor": ("floor", base), "tsae": ("tsae", base), "tsae + table": ("tsae", base | table),
           "tsae, dead": ("tsae", base | dict(dead=0.1))}
    yield "base", own | {name: (name, base) for name in rivals.get("topk", ())}
    for kind in ("relu", "gated", "jumprelu"):
        at = base | dict(kind=kind)
        own = {"floor": ("floor", at), "tsae": ("tsae", at), "tsae, few active": ("tsae", at | dict(active=2 * base["k"]))}
        yield "base", own | {name: (name, at) for name in rivals.get(kind, ())}
    sizes = [(axis, {axis: size}) for axis, values in AXES.items() for size in values]
    for axis, size in [*sizes, *(("corner", size) for size in CORNERS)] if options.full else []:
        at = base | size
        some = {"floor": ("floor", at), "tsae": ("tsae", at), "tsae + table": ("tsae", at | table)}
        yield axis, some | ({"sparsify": ("sparsify", at)} if rivals else {})  # the fastest peer stands for all


def step(options: argparse.Namespace, device: str = "cpu") -> pd.DataFrame:
    """Seconds a training step, against the bare bfloat16 encoder product and against tsae without a table."""
    table = pd.concat([cell(some, options, cell=axis) for axis, some in cells(options, device)], ignore_index=True)
    return table.assign(tokens_per_second=table["batch"] / table["seconds"])


def grams(options: argparse.Namespace) -> pd.DataFrame:
    """What a table, and four times as many rows of n-grams beside it, add to a step at SmolLM2's size."""
    at = GPT2 | SMOLLM2 | dict(device="cpu", threads=options.threads) | options.size
    table = at | dict(vocabulary=options.vocabulary)
    some = {"tsae": ("tsae", at), "tsae + table": ("tsae", table),
            "tsae + table + n-grams": ("tsae", table | dict(grams=4 * options.vocabulary))}
    return cell(some, options, cell="grams")


def alternate(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, called in turns after one call that does not count."""
    samples = {label: [] for label in functions}
    for turn in range(rounds + 1):
        for label, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:
                samples[label].append(time.perf_counter() - started)
    return samples


def truncated(network: torch.nn.Module, layer: int) -> torch.nn.Module:
    """The transformer without its head and with its first `layer` blocks only: the least that a forward can do."""
    base, depth = deepcopy(network.base_model), network.config.num_hidden_layers
    path = next(name for name, part in base.named_modules()
                if isinstance(part, torch.nn.ModuleList) and len(part) == depth)
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, base.get_submodule(path)[:layer])
    return base.eval()


@torch.no_grad()
def extraction(options: argparse.Namespace) -> pd.DataFrame:
    """Seconds a batch of `lm.residuals`, which stops at its layer, against a forward of the model truncated there."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from tsae.lm import LM
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(store.EMBEDDED)
    networks = {"embedded": AutoModelForCausalLM.from_pretrained(store.EMBEDDED, dtype=torch.float32),
                "gpt2, random weights": AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2"))}
    tables = []
    for name, network in networks.items():
        layer = round(network.config.num_hidden_layers * 2 / 3)
        bare, lm = truncated(network, layer), LM(network, tokenizer, name)
        tokens = torch.randint(lm.vocabulary, options.rows)
        samples = alternate({"bare": lambda tokens=tokens, bare=bare: bare(input_ids=tokens, use_cache=False),
                             "tsae": lambda tokens=tokens, read=lm.layer(layer).residuals: read(tokens)}, options.rounds)
        rows = [dict(model=name, layer=layer, contender=label, rows=options.rows[0], context=options.rows[1],
                     rounds=options.rounds, **spread(seconds)) for label, seconds in samples.items()]
        tables.append(ratios(rows, to_bare="bare"))
    return pd.concat(tables, ignore_index=True)


def synthetic_store(folder: Path, positions: int, d: int, vocabulary: int, context: int = 128):
    """A store of noise, made by the code that users run."""
    from tsae.pairs.shards import Store
    rows = torch.randint(vocabulary, (-(-positions // (context - 1)), context), dtype=torch.int32)
    noise = torch.randn(64, context, d)

    def keep(tokens: torch.Tensor) -> torch.Tensor:
        return (torch.arange(context) > 0).expand(tokens.shape)

    return Store.make(folder, rows, lambda tokens: noise[:len(tokens)], keep, d, dict(noise=True), positions)


def storing(options: argparse.Namespace) -> pd.DataFrame:
    """GB/s into and out of the activation store, beside one plain file: written with fsync, read in random batches."""
    from tsae.pairs.order import Shuffled
    from tsae.pairs.shards import Store
    positions, d, folder = options.positions, options.size.get("d", 768), store.CACHE / "bench-store"
    plain, block = folder.with_suffix(".plain"), torch.randn(65536, d).bfloat16().view(torch.uint8).numpy()

    def write_plain() -> None:
        with open(plain, "wb") as file:
            for at in range(0, positions, len(block)):
                file.write(block[:positions - at])
            os.fsync(file.fileno())

    def write_store() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        synthetic_store(folder, positions, d, options.vocabulary)

    def read_plain() -> None:
        rows = torch.from_file(str(plain), False, positions * d, dtype=torch.bfloat16).view(positions, d)
        for index in torch.randperm(positions).split(2048):
            rows[index].float()

    def read_store() -> None:
        for _ in islice(Shuffled(Store.open(folder), 2048, 0), -(-positions // 2048)):
            pass

    try:
        samples = dict(write=alternate(dict(plain=write_plain, store=write_store), options.rounds))
        samples["read"] = alternate(dict(plain=read_plain, store=read_store), options.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        plain.unlink(missing_ok=True)
    about = dict(positions=positions, d=d, rounds=options.rounds)
    tables = [ratios([dict(what=what, contender=label, **about, **spread(seconds)) for label, seconds in both.items()],
                     to_plain="plain") for what, both in samples.items()]
    table = pd.concat(tables, ignore_index=True)
    return table.assign(gb_per_second=positions * d * 2 / 1e9 / table["seconds"])


def train_sweep(folder: Path, pairs, jobs: list[dict], vocabulary: int) -> None:
    """The one place here that knows how a sweep over a store is trained."""
    from tsae.pairs.order import Shuffled
    from tsae.pairs.prepare import Data
    from tsae.scale import sweep as sweeps
    data = Data(lambda seed: Shuffled(pairs, 2048, seed), pairs.statistics(vocabulary),
                torch.zeros(vocabulary, pairs.d_model), dict(batch=2048))
    sweeps.keep_memory()
    sweeps.sweep(folder, data, jobs, memory_gb=1.0)


def sweep(options: argparse.Namespace) -> pd.DataFrame:
    """Peak memory of ten SAEs trained from one store, in a process of its own. Pages of mapped files count as well.

    It is VmHWM: the maximum that `getrusage` tells starts at that of the process which started this one.
    """
    d, n, place = options.size.get("d", 768), options.size.get("n", 12288), store.CACHE / "bench-sweep"
    if options.child:
        jobs = [dict(activation="topk", n=n, k=k, lookup=lookup, seed=0, tokens=options.tokens)
                for lookup in ("none", "learned") for k in (8, 16, 32, 64, 128)]
        from tsae.pairs.shards import Store
        started = time.perf_counter()
        train_sweep(place / "runs", Store.open(place / "store"), jobs, options.vocabulary)
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        print(json.dumps(dict(saes=len(jobs), d=d, n=n, positions=options.positions, tokens=options.tokens,
                              seconds=time.perf_counter() - started,
                              peak_gb=int(status["VmHWM"].split()[0]) * 1024 / 1e9)), flush=True)
        raise SystemExit
    shutil.rmtree(place / "runs", ignore_errors=True)
    try:
        synthetic_store(place / "store", options.positions, d, options.vocabulary)
        told = subprocess.run([sys.executable, "-P", __file__, *sys.argv[1:], "--child"], check=True,
                              stdout=subprocess.PIPE)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return pd.DataFrame([json.loads(told.stdout.splitlines()[-1])])


def gpu(options: argparse.Namespace) -> pd.DataFrame | None:
    """`step` on a GPU against sparsify, and the share of the bfloat16 rate of a large product that the step reaches."""
    if not torch.cuda.is_available():
        return print("\nno GPU: not run")
    a, out = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()

    def products() -> None:
        for _ in range(20):
            torch.mm(a, a.T, out=out)
        torch.cuda.synchronize()

    rate = 20 * 2 * 8192**3 / spread(alternate(dict(products=products), 5)["products"])["seconds"]
    table = step(options, "cuda")
    work = 2 * table["batch"] * table["d"] * table["n"]  # the encoder's product: the rest of a top-k step is sparse
    return table.assign(matmul_tflops=rate / 1e12, of_matmul_rate=work / table["seconds"] / rate)


def record(out: Path, name: str, table: pd.DataFrame, **parameters: object) -> None:
    """Write a table to `out`/<name>.csv and its line to the manifest there."""
    path, manifest = store.write_table(out / f"{name}.csv", table), out / "manifest.json"
    lines = store.read_json(manifest) if manifest.is_file() else {}
    versions = {package: version(package) for package in ("torch", "transformers", "nnsight")}
    lines[path.name] = dict(sha256=store.digest(path), notebook="tests.bench", parameters=parameters, versions=versions)
    store.write_json(manifest, lines)


PARTS = dict(step=step, grams=grams, extraction=extraction, storing=storing, sweep=sweep, gpu=gpu)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--peers", action="store_true", help="time the other trainers too")
    parser.add_argument("--full", action="store_true", help="the grid of sizes, and a store of 2 million rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", type=float, default=3.0, help="seconds of one contender's turn")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one contender of a cell may take")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=store.DATA / "results" / "bench")
    parser.add_argument("--vocabulary", type=int, default=50257, help="rows of the lookup table")
    parser.add_argument("--positions", type=int, help="rows of the activation store")
    parser.add_argument("--tokens", type=int, default=1 << 17, help="training tokens of each SAE of the sweep")
    parser.add_argument("--rows", type=int, nargs=2, default=(64, 128), help="rows and context of extraction's batch")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    for name in ("d", "n", "k", "batch"):
        parser.add_argument(f"--{name}", type=int, help=f"instead of {GPT2[name]}")
    options = parser.parse_args(arguments)
    options.size = {name: value for name in ("d", "n", "k", "batch") if (value := getattr(options, name))}
    options.positions = options.positions or (2_000_000 if options.full else 200_000)
    if set(options.parts) - set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}")
    torch.set_num_threads(options.threads)
    about = machine(options.threads)
    if not options.child:
        print(*(f"{key} {value}" for key, value in about.items()), sep=", ", flush=True)
    for part in ["sweep"] if options.child else options.parts or PARTS:
        table = PARTS[part](options)
        if table is not None:
            print(f"\n{part}: {PARTS[part].__doc__.splitlines()[0]}")
            shown = [column for column in SHOWN if column in table] if "cell" in table else list(table)
            print(table[shown].to_string(index=False, na_rep="", float_format="{:.3g}".format), flush=True)
            record(options.out, f"bench_{part}", table, **about, peers=options.peers, full=options.full)
            if part == "step" and options.full and options.out == store.DATA / "results" / "bench":
                picture.write_picture(plots.cost(table), store.ROOT / "figures" / "cost.png")
    if options.out == store.DATA / "results" / "bench" and not options.child:
        readme.tie()


if __name__ == "__main__":
    main()
