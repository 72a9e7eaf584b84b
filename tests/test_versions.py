"""What is kept on disk is old when a version number says so: these numbers change when one was forgotten.

Each test works a tiny input through and compares with golden.json, what came out when the number was last raised. Where it
fails, the code computes something else than before: raise VERSION beside that code, so that nobody goes on with what an
older version kept, and let `TSAE_GOLDEN=write pytest tests/test_versions.py` note what the new one gives. Sums in float32 are
compared to two thousandths, as processors differ. (Test_shards.py and test_order.py guard the bytes of a store and the order.)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer
from scipy.sparse import random_array

from tsae import evaluate, features, kernels, lm, store, text, train
from tsae import execute as command
from tsae.pairs import prepare
from tsae.sae import SAE
from tsae.scoring import heldout, scores

GOLDEN = Path(__file__).with_name("golden.json")


def check(name: str, version: int, found: dict[str, float]) -> None:
    """Numbers of a version are those that were noted for it; in writing, only those of another version are noted anew."""
    known = store.read_json(GOLDEN) if GOLDEN.is_file() else {}
    if os.environ.get("TSAE_GOLDEN") == "write" and known.get(name, {}).get("version") != version:
        store.write_json(GOLDEN, known | {name: dict(version=version, numbers=found)})
        return
    assert known[name]["version"] == version, "note what the new version gives: see above"
    assert found == pytest.approx(known[name]["numbers"], rel=2e-3, abs=1e-3), f"raise VERSION: {name} are other numbers now"


def numbers(**tensors: torch.Tensor) -> dict[str, float]:
    """Sums that most changes of a tensor move."""
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().double().flatten()
        found |= {name: flat.sum().item(), f"{name}^2": flat.square().sum().item(),
                  f"{name} cos": (flat * torch.cos(torch.arange(len(flat)))).sum().item()}
    return found


def test_residuals_are_those_of_their_version(tiny_gpt2):
    tokens = torch.arange(1, 13).view(2, 6)
    check("residuals", lm.VERSION, numbers(residuals=tiny_gpt2.residuals(tokens, [2])[2], unigrams=tiny_gpt2.unigrams(1)))
    shifted = tiny_gpt2.tail(tokens, 1)(lambda x, t: x + 1.0 * (torch.arange(16) == 3))
    check("nats", command.VERSION, numbers(nats=tiny_gpt2.nats(tokens)) | dict(shifted=shifted))
    assert tiny_gpt2.keep(torch.tensor([[0, 5, 0, 7]])).tolist() == [[False, True, False, True]]


def test_kept_statistics_are_those_of_their_version(data):
    check("statistics", prepare.VERSION, numbers(**data.stats))


def test_documents_are_those_of_their_version(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"Paragraph {i}. " + "words and more " * (i % 40) for i in range(120)))
    found = list(text.documents(str(tmp_path / "a.txt")))
    check("documents", text.VERSION, dict(number=len(found), characters=sum(map(len, found)), first=len(found[0])))


def test_tokens_are_those_of_their_version():
    documents = [f"Document {i}: " + "some text of it. " * (i % 5 + 1) for i in range(200)]
    rows = text.pack(documents, byte_tokenizer(), 32, 0, 0)
    check("tokens", text.VERSION, numbers(**rows))


def small_data():
    """Batches x (40, 32, 12), t (40, 32) of noise around a vector a token, their statistics, and unigrams."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(9, (40, 32), generator=generator)
    x = torch.randn(9, 12, generator=generator)[t] + 0.5 * torch.randn(40, 32, 12, generator=generator)
    count, total = torch.bincount(t.flatten(), minlength=9), torch.zeros(9, 12).index_add_(0, t.flatten(), x.flatten(0, 1))
    return x, t, dict(mean=x.mean((0, 1)), scale=x.std(), count=count, sum=total, limit=float("inf")), x[0, :9]


def trained(activation: str, recipe: dict, lookup: str = "learned", spike: float = 1.0, quick: bool = False, **how):
    """An SAE and its history, on small_data with one batch `spike` times as large."""
    x, t, stats, unigrams = small_data()
    x[20] *= spike
    sae = train.build(stats, unigrams, recipe, activation, 24, 3, lookup, seed=1)
    history = train.fit(sae, zip(x, t), 40 * 32, quick, sparsity=0.1, dead_after_tokens=200,
                        **(train.learning(recipe, 0.01) | how))
    return sae, history, numbers(a_hat=sae(x[1], t[1]), decoder=sae.W_dec)


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_trained_saes_are_those_of_their_version(activation):
    found = {}
    for name, recipe in train.RECIPES.items():
        sae, _, sums = trained(activation, recipe)
        found |= {f"{name} {key}": value for key, value in (sums | numbers(table=sae.W_lookup)).items()}
    check(f"{activation} SAEs", train.VERSION, found)


@pytest.mark.filterwarnings("ignore:the loss of .* jumps:RuntimeWarning")
@pytest.mark.parametrize("name, changes", {
    "quick": dict(quick=True), "rest": dict(encoder_sees="rest"), "mean": dict(start="mean", table_scale=1.0),
    "frozen": dict(lookup="frozen"), "none": dict(lookup="none", plain_scale=1.0), "spike": dict(spike=30.0)}.items())
def test_ways_of_training_are_those_of_their_version(name, changes):
    own = {key: changes[key] for key in ("quick", "lookup", "spike") if key in changes}
    recipe = train.RECIPES["ours"] | {key: value for key, value in changes.items() if key not in own}
    _, history, sums = trained("topk", recipe, checks=3, log_every_tokens=300, check=lambda sae: dict(k=sae.k), **own)
    lines = {f"{column} {i}": value for i, row in enumerate(history.drop(columns="k").to_dict("records"))
             for column, value in row.items()}
    if name == "quick":  # products rounded to 8 bits differ from one processor to the next
        assert sums == pytest.approx(trained("topk", recipe)[2], rel=0.2, abs=2.0) and kernels_are_quick_inside()
    else:
        check(f"{name} SAE", train.VERSION, sums | lines | dict(checked=int(history["k"].notna().sum())))


def kernels_are_quick_inside() -> bool:
    """Whether quick products round, and others do not."""
    a, b = torch.full((64, 64), 1.001), torch.eye(64)
    with kernels.quick_products(True):
        rounded = kernels.product(a, b)
    return bool((rounded == 1.0).all()) and bool((kernels.product(a, b) > 1.0005).all())


def test_results_of_notebooks_are_those_of_their_version():
    """Metrics, summaries, features, and scores on small inputs. Effects, and comparisons, have oracles of their own."""
    sae, generator = SAE(12, 24, "topk", 3, 9, "learned"), torch.Generator().manual_seed(2)
    sae.start(torch.zeros(12), torch.randn(9, 12, generator=generator), seed=2)
    x, t = torch.randn(64, 12, generator=generator), torch.randint(9, (64,), generator=generator)
    rows = torch.randint(1, 257, (40, 20), generator=generator)
    rows[:, 0] = 0
    on = heldout.prepare(rows, rows > 0, byte_tokenizer())
    codes = random_array((40 * 19, 8), density=0.1, format="csc", dtype=np.float32, rng=np.random.default_rng(0))
    table = scores.scored(codes, on).select_dtypes("number")
    check("results", command.VERSION, evaluate.reconstruction(sae, x, t) | table.mean().to_dict())
    frame = pd.DataFrame(dict(kind=list("aabb"), y=[1.0, 2.0, 4.0, 7.0]))
    summary = evaluate.summarise(frame, ["kind"], ["y"])
    response, scanned = features.respond(sae, x[:20], t[:20], [0.0, 1.0]), features.scan(sae, x, t)
    overlap = features.overlap(response, scanned, t[:20].numpy(), t.numpy())
    grams, counts = features.grams(rows, rows > 0, 2)
    front = evaluate.l0_at_equal([2, 4, 8], [0.3, 0.2, 0.1], 0.15), evaluate.error_at_equal([2, 4, 8], [0.3, 0.2, 0.1], 5)
    tokens = evaluate.tokens_to_reach([10, 100, 1000], [3.0, 2.0, 1.0], 1.5)
    drawn = evaluate.bootstrap(np.mean, [np.arange(5.0), np.arange(3.0)], draws=200)
    check("summaries", command.VERSION, overlap | numbers(
        summary=torch.tensor(summary[["value", "low", "high"]].to_numpy()), above=torch.tensor(response.above),
        counts=torch.tensor(counts.copy()), others=torch.tensor([*front, tokens, *drawn, evaluate.ce_added(3.0, 2.0),
                                                                 evaluate.ce_recovered(3.0, 2.0, 5.0)])))


WORK = """
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from tsae import train
from tsae.pairs.prepare import prepare
from tsae.scale.sweep import sweep

kept, passes, steps, step = Path(sys.argv[1]), [], [], train.Run.step
train.Run.step = lambda *given: steps.append(1) or step(*given)


def residuals(tokens):
    passes.append(1)
    return torch.stack([tokens % 7, tokens % 5, tokens % 3, tokens % 2], -1).float()


layer = SimpleNamespace(residuals=residuals, keep=lambda tokens: tokens > 0, unigrams=lambda: torch.ones(50, 4),
                        d_model=4, vocabulary=50, device=torch.device("cpu"), identity=dict(layer=0))
data = prepare(layer, torch.arange(1, 41, dtype=torch.int32).view(4, 10), batch=8, folder=kept / "activations")
sweep(kept / "saes", data, [dict(activation="topk", n=8, k=2, lookup="learned", seed=0, tokens=40)])
print(len(passes), len(steps))
"""


def test_a_comment_in_every_file_makes_nothing_again(tmp_path):
    """What is kept is named by numbers raised by hand, not by the text of the code that made it."""
    for name in ("before", "after"):
        shutil.copytree(Path(train.__file__).parent, tmp_path / name / "tsae", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (tmp_path / "after").rglob("*.py"):
        file.write_text(file.read_text().replace('"""', '"""In other words: ', 1) + "\n# a remark\n")
    said = []
    for name in ("before", "after"):
        environment = os.environ | dict(PYTHONPATH=str(tmp_path / name), TSAE_HOME=str(tmp_path))
        done = subprocess.run([sys.executable, "-P", "-c", WORK, str(tmp_path / "kept")], env=environment, cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.split())
    assert said == [["1", "5"], ["0", "0"]]
