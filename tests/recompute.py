"""Published numbers once more, by other means: python -m tests.recompute [run folder].

From the weights of the language model and of the SAEs that a run of the default preset kept: loops over positions in
float64, the equations as the paper has them, nothing of tsae but the rows of text. Compares with
data/results/embedded/sweep.csv, to 1 %: the published numbers come from activations stored in bfloat16.
"""

import csv
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsae import text

DATA = Path(__file__).resolve().parents[1] / "data"
LAYER, ROWS, CE_ROWS, TOKENS = 3, 200, 48, 300_000


def find(saes: Path, lookup: str, k: int, seed: int) -> Path:
    """The folder of the TopK SAE of the sweep with these settings."""
    found = {path: json.loads(path.read_text()) for path in sorted(saes.glob("*/settings.json"))}
    model, _ = Counter(own["weights"] for own in found.values()).most_common(1)[0]  # others are nulls
    for path, own in found.items():
        wanted = dict(activation="topk", n=1024, k=k, lookup=lookup, seed=seed, tokens=TOKENS, lr=0.003, start="mean",
                      aux_weight=0.25, encoder_sees="rest", table_scale=1.0, table_lr=0.03, checks=0, layer=LAYER,
                      encoder_scale=0.5, weights=model)
        alone = own.get("plain_scale", 0.5) == 0.5 and not {"known", "gaussian"} & own.keys()
        if alone and all(own.get(name) == value for name, value in wanted.items()):
            return path.parent
    raise SystemExit(f"no such SAE in {saes} (lookup {lookup}, k {k}, seed {seed}): run python -m tsae first")


class Naive:
    """Equations 1 and 2, one position at a time."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.w = {name: value.astype(np.float64) for name, value in load_file(folder / "weights.safetensors").items()}

    def codes(self, x: np.ndarray, token: int) -> np.ndarray:
        z = x / self.config["scale"]
        if self.config["encoder_sees"] == "rest":
            z = z - self.row(token)
        pre = self.w["W_enc"] @ (z - self.w["b_dec"]) + self.w["b_enc"]
        chosen = np.argsort(-pre)[:self.config["k"]]
        codes = np.zeros_like(pre)
        codes[chosen] = np.maximum(pre[chosen], 0)
        return codes

    def row(self, token: int) -> np.ndarray | float:
        return self.w["baseline.W_lookup"][token] if self.config["lookup"] != "none" else 0.0

    def rebuilt(self, codes: np.ndarray, token: int) -> np.ndarray:
        fired = np.flatnonzero(codes)
        return self.config["scale"] * (codes[fired] @ self.w["W_dec"][fired] + self.w["b_dec"] + self.row(token))


def measured(sae: Naive, model, tokens: torch.Tensor, special: set[int]) -> dict[str, float]:
    """nmse, fvu, l0, dead and single_token on all rows, ce_added on the first CE_ROWS."""
    with torch.no_grad():
        stream = model(tokens, output_hidden_states=True).hidden_states[LAYER]
    stream = (stream - stream.mean(-1, keepdim=True)).numpy()
    limit = sae.config["limit"] or np.inf
    errors, squares, xs, active, mass, patched = [], [], [], 0, {}, stream.copy()
    fired = np.zeros(sae.config["n"], int)
    for row, ids in enumerate(tokens.tolist()):
        for column, token in enumerate(ids):
            x = stream[row, column]
            if column == 0 or token in special or np.sqrt(x @ x) > limit:
                continue
            codes = sae.codes(x, token)
            patched[row, column] = x_hat = sae.rebuilt(codes, token)
            errors.append((x - x_hat) @ (x - x_hat) / (x @ x))
            squares.append((x - x_hat) @ (x - x_hat))
            xs.append(x)
            active += np.count_nonzero(codes)
            fired += codes > 0
            for feature in np.flatnonzero(codes):
                mass.setdefault(feature, {}).setdefault(token, 0.0)
                mass[feature][token] += codes[feature]
    often = [feature for feature in mass if fired[feature] >= 50]
    single = [max(mass[feature].values()) > sum(mass[feature].values()) / 2 for feature in often]
    xs = np.array(xs)
    return dict(nmse=np.mean(errors), fvu=np.sum(squares) / ((xs - xs.mean(0)) ** 2).sum(), l0=active / len(xs),
                dead=np.mean(fired == 0), single_token=np.mean(single), ce_added=ce_added(model, tokens, patched, special))


def ce_added(model, tokens: torch.Tensor, patched: np.ndarray, special: set[int]) -> float:
    """Equation 3, with `patched` (N, T, d) in place of the stream (there are no sinks here)."""
    tokens, patched = tokens[:CE_ROWS], torch.from_numpy(patched[:CE_ROWS])

    def nats() -> float:
        with torch.no_grad():
            logs = model(tokens, use_cache=False).logits.log_softmax(-1)
        found = [-logs[row, column, ids[column + 1]].item() for row, ids in enumerate(tokens.tolist())
                 for column in range(1, len(ids) - 1) if ids[column] not in special]
        return float(np.mean(found))

    clean = nats()
    hook = model.transformer.h[LAYER].register_forward_pre_hook(lambda module, given: (patched, *given[1:]))
    damaged = nats()
    hook.remove()
    return (damaged - clean) / clean


def main(run: str = "") -> None:
    folder = Path(run) if run else DATA / "runs/embedded"
    tokenizer = AutoTokenizer.from_pretrained(DATA / "embedded")
    model = AutoModelForCausalLM.from_pretrained(DATA / "embedded").double().eval()
    rows = text.tokens("docstrings", tokenizer, 128, 0, 150_000)["validation"][:ROWS].long()
    with open(DATA / "results/embedded/sweep.csv", newline="") as file:
        published = list(csv.DictReader(file))
    wrong = 0
    for lookup, k, seed in (("none", 8, 0), ("learned", 8, 0)):
        found = measured(Naive(find(folder / "saes", lookup, k, seed)), model, rows, set(tokenizer.all_special_ids))
        line = next(row for row in published if row["activation"] == "topk" and row["lookup"] == lookup
                    and (row["k"], row["seed"]) == (str(k), str(seed)))
        for name, value in found.items():
            theirs = float(line[name])
            near = abs(value - theirs) <= 0.01 * abs(theirs) + 0.002 * (name in ("dead", "single_token"))  # one or two features
            wrong += not near
            print(f"{lookup:8} k {k} {name:13} {value:9.5f}  published {theirs:9.5f}  {'' if near else 'DIFFERS'}")
    if wrong:
        raise SystemExit(f"{wrong} numbers differ from the published ones by more than a rounding")


if __name__ == "__main__":
    main(*sys.argv[1:])
