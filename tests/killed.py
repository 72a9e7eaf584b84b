"""The run that is killed in test_checkpoints.py: python -m tests.killed FOLDER trains a small SAE and saves it there.

Prints a line at every step, so that the one who kills can choose an instant; a checkpoint is written at every step.
"""

import sys
from pathlib import Path

import torch

from tsae import train
from tsae.pairs.order import Shuffled
from tsae.pairs.shards import Memory
from tsae.sae import SAE
from tsae.scale import passes

D, N, V, STEPS, BATCH = 32, 64, 50, 40, 64


def main(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(1000, D, generator=g), torch.randint(V, (1000,), generator=g)

    class Told(Shuffled):
        def __next__(self):
            print(self.given, flush=True)
            return super().__next__()

    runs = [train.Run(SAE(D, N, activation, 4, V, lookup).start(torch.zeros(D), seed=seed), STEPS * BATCH, lr=1e-2,
                      sparsity=0.1, dead_after_tokens=500, log_every_tokens=BATCH)
            for seed, (activation, lookup) in enumerate((("topk", "learned"), ("batchtopk", "none"), ("gated", "learned")))]
    histories = passes.fit_all(runs, Told(Memory(x, t), BATCH, seed=3), quick=True, folder=folder / "unfinished",
                              checkpoint_every_s=0)
    for i, (run, history) in enumerate(zip(runs, histories)):
        run.sae.save(folder / str(i))
        history.to_csv(folder / f"{i}.csv", float_format="%r")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
