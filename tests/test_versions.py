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
import pytest
import torch
from conftest import byte_tokenizer
from scipy.sparse import random_array

from tsae import __main__ as command
from tsae import evaluate, lm, store, text, train
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
    assert tiny_gpt2.keep(torch.tensor([[0, 5, 0, 7]])).tolist() == [[False, True, False, True]]


def test_kept_statistics_are_those_of_their_version(data):
    check("statistics", prepare.VERSION, numbers(**data.stats))


def test_tokens_are_those_of_their_version():
    documents = [f"Document {i}: " + "some text of it. " * (i % 5 + 1) for i in range(200)]
    rows = text.pack(documents, byte_tokenizer(), 32, 0, 0)
    check("tokens", text.VERSION, numbers(**rows))


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_trained_saes_are_those_of_their_version(activation):
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(9, (40, 32), generator=generator)
    x = torch.randn(9, 12, generator=generator)[t] + 0.5 * torch.randn(40, 32, 12, generator=generator)
    unigrams, stats = x[0, :9], dict(mean=x.mean((0, 1)), scale=x.std(), count=torch.bincount(t.flatten(), minlength=9),
                                     sum=torch.zeros(9, 12).index_add_(0, t.flatten(), x.flatten(0, 1)))
    found = {}
    for recipe in train.RECIPES:
        sae = train.build(stats, unigrams, train.RECIPES[recipe], activation, 24, 3, "learned", seed=1)
        train.fit(sae, zip(x, t), 40 * 32, sparsity=0.1, dead_after_tokens=200, **train.learning(train.RECIPES[recipe], 0.01))
        found |= numbers(**{f"{recipe} a_hat": sae(x[1], t[1]), f"{recipe} table": sae.W_lookup})
    check(f"{activation} SAEs", train.VERSION, found)


def test_results_of_notebooks_are_those_of_their_version():
    """What the notebooks compute, but for what is tested above: metrics and scores."""
    sae, generator = SAE(12, 24, "topk", 3, 9, "learned"), torch.Generator().manual_seed(2)
    sae.start(torch.zeros(12), torch.randn(9, 12, generator=generator), seed=2)
    x, t = torch.randn(64, 12, generator=generator), torch.randint(9, (64,), generator=generator)
    rows = torch.randint(1, 257, (40, 20), generator=generator)
    rows[:, 0] = 0
    on = heldout.prepare(rows, rows > 0, byte_tokenizer())
    codes = random_array((40 * 19, 8), density=0.1, format="csc", dtype=np.float32, rng=np.random.default_rng(0))
    table = scores.scored(codes, on).select_dtypes("number")
    check("results", command.VERSION, evaluate.reconstruction(sae, x, t) | table.mean().to_dict())


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
