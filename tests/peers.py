"""One contender of the benchmark, run in its own process and environment: `python peers.py NAME CASE`, CASE as JSON.

Every contender trains in the loop that its users call, on the same batches from memory. The loop pulls its batches from
`commands`, which is where the clock is: it answers `run N` on standard input with the seconds between the pull of one
batch and the pull of the N-th after it, so a step is all that its loop does for one batch. Between commands it sleeps.
Settings are each project's defaults, only the sizes are given: no model, no logging service, no saving. Features count
as dead after 10 million tokens or 1000 steps, so that AuxK is ready in all that have it and runs in none, but for the
contender that is given dead features on purpose.

A case: kind, d, n, k, batch, vocabulary (rows of the lookup table, 0 without), dead (the share of features that never
fire), active (the features active at a position at the start of relu, gated and jumprelu, 0: as they come, half of them
in relu and gated), device, threads.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from itertools import count
from types import SimpleNamespace

import torch
from torch.nn.functional import normalize

PACKAGES = {"sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning", "sae_lens": "sae-lens",
            "sae_lens_bf16": "sae-lens", "tsae": "tsae"}
FOR_EVER = 10**12  # tokens or steps: no schedule reaches its end


def batches(case: dict, pool: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same pairs for all contenders: coordinates with a power-law spectrum and unit rms, Zipfian tokens."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, case["d"] + 1).float().rsqrt()
    spectrum /= spectrum.square().mean().sqrt()
    words = 1 / torch.arange(1, max(2, case["vocabulary"]) + 1).float()
    pairs = []
    for _ in range(pool):
        x = torch.randn(case["batch"], case["d"], generator=generator) * spectrum
        t = torch.multinomial(words, case["batch"], replacement=True, generator=generator)
        pairs.append((x.to(case["device"]), t.to(case["device"])))
    return pairs


def peak_gb() -> float:
    """The most memory this process ever held (resident), in GB; NaN where /proc does not tell."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e9
    except (OSError, StopIteration):
        return float("nan")


def commands(case: dict, answer, questions=sys.stdin):
    """Endless batches; before the first, and whenever N are used up, it reports and waits for the next `run N`."""
    pool, cuda = batches(case), case["device"] == "cuda"
    left, steps, started = 0, 0, 0.0
    for i in count():
        if not left:
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            answer(dict(seconds=seconds, steps=steps, peak_gb=peak_gb()) if steps else dict(ready=True))
            line = questions.readline()
            if not line:
                raise SystemExit
            steps = left = int(line.removeprefix("run "))
            started = time.perf_counter()
        left -= 1
        yield pool[i % len(pool)]


def floor(case, source):
    """Not a trainer: the encoder product alone, from bfloat16 inputs made beforehand into one reused buffer."""
    wide = [x.bfloat16() for x, _ in batches(case)]
    W = torch.randn(case["n"], case["d"], generator=torch.Generator().manual_seed(1)).to(case["device"]).bfloat16()
    pre = torch.empty(case["batch"], case["n"], dtype=torch.bfloat16, device=case["device"])
    for i, _ in enumerate(source):
        torch.mm(wide[i % len(wide)], W.T, out=pre)


def tsae(case, source):
    """`train.fit`: Adam, row-wise Adam on the table, unit decoder rows, dead counts, AuxK wherever a feature is dead.

    With `grams`, so many n-gram rows stand beside the table's: every bigram and trigram of the batches has one. Dead features
    have encoders too short to be among the k largest; half of their pre-activations are positive. Few active
    features are those above a bias (jumprelu: a threshold) that is the same for all.
    """
    from tsae import sae, train
    from tsae.scale.sweep import keep_memory
    keep_memory()
    rows, off = case["vocabulary"], int(case["dead"] * case["n"])
    model = sae.SAE(case["d"], case["n"], case["kind"], case["k"], rows, "learned" if rows else "none")
    if case["grams"]:
        known, contexts = with_grams(case)
        model = sae.SAE(case["d"], case["n"], case["kind"], case["k"], baseline=known)
        source = ((x, contexts[i % len(contexts)]) for i, (x, _) in enumerate(source))
    model.start(torch.zeros(case["d"]), torch.zeros(rows, case["d"]) if rows and not case["grams"] else None, seed=0)
    model.to(case["device"])
    with torch.no_grad():
        model.W_enc[:off] *= 0.01
        if case["active"]:
            pre = model.preactivations(batches(case, 1)[0][0])
            bar = pre.flatten().topk(case["active"] * len(pre)).values[-1]
            if case["kind"] == "jumprelu":
                model.log_threshold.fill_(bar.log())
            else:
                model.b_enc.fill_(-bar)
    train.fit(model, source, FOR_EVER, lr=1e-4, sparsity=1e-3, quick=True,
              dead_after_tokens=2 * case["batch"] if off else 10_000_000)


def with_grams(case):
    """A baseline.Grams of half bigrams, half trigrams, those of the batches among them; the contexts of the batches."""
    from tsae.baseline import Context, Grams
    ids = [torch.stack([t, t.roll(1), t.roll(2)], 1) for _, t in batches(case)]
    known, half, found = Grams(case["d"], case["vocabulary"], [case["grams"] // 2] * 2), case["grams"] // 2, []
    for n in (2, 3):
        own = known.key(torch.cat(ids)[:, :n].cpu()).unique()[:half]
        others = torch.arange(half + len(own))  # small numbers are keys of n-grams of the commonest tokens
        others = others[~torch.isin(others, own)][:half - len(own)]
        found.append(torch.cat([own, others]).sort().values)
    known.keys.copy_(torch.cat(found))
    return known.to(case["device"]), [Context(each) for each in ids]


def authors(case, source):
    """The paper's arithmetic in plain PyTorch: codes scattered to (b, n), dense products, autograd, Adam on everything.

    With a table, that is an `nn.Embedding` with dense gradients and Adam. Unit decoder rows after each step, no AuxK.
    """
    d, n, device = case["d"], case["n"], case["device"]
    W = normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(1)), dim=-1)
    parts = torch.nn.ParameterList([W.T.contiguous(), torch.zeros(n), W, torch.zeros(d)]).to(device)
    table = torch.nn.Embedding(case["vocabulary"], d).to(device) if case["vocabulary"] else None
    optimiser = torch.optim.Adam([*parts, *(table.parameters() if table else [])], lr=1e-4)
    for x, t in source:
        W_enc, b_enc, W_dec, b_dec = parts
        pre = torch.relu((x - b_dec) @ W_enc + b_enc)
        values, index = pre.topk(case["k"], dim=-1)
        x_hat = torch.zeros_like(pre).scatter(-1, index, values) @ W_dec + b_dec + (table(t) if table else 0)
        optimiser.zero_grad()
        (x - x_hat).square().sum(-1).mean().backward()
        optimiser.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=-1, keepdim=True)


def sparsify(case, source):
    """`Trainer.fit` over a stand-in for the model whose only module gives the batch: its forward hook does the work.

    Signum with schedule-free averaging, gradients made orthogonal to the decoder, unit decoder rows, dead counts; AuxK
    is off by default. Decoder: its Triton kernel on a GPU, `embedding_bag` on a CPU, as it chooses itself. On a GPU its
    forward runs under bfloat16 autocast.
    """
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    class Model(torch.nn.Module):
        config, device = SimpleNamespace(num_hidden_layers=1), torch.device(case["device"])
        base_model = property(lambda self: self)
        dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

        def __init__(self):
            super().__init__()
            self.point, self.x = torch.nn.Identity(), torch.zeros(1, case["d"], device=case["device"])

        def forward(self, input_ids):
            return self.point(self.x.unsqueeze(0))

    class Rows:  # one row of token ids a batch
        def __len__(self):
            return FOR_EVER

        def __getitem__(self, _):
            model.x, t = next(source)
            return dict(input_ids=t)

    model = Model()
    Trainer(TrainConfig(SparseCoderConfig(num_latents=case["n"], k=case["k"]), batch_size=1, hookpoints=["point"],
                        save_every=FOR_EVER, log_to_wandb=False), Rows(), model).fit()


def dictionary_learning(case, source):
    """`trainSAE` with the trainer of the kind: Adam, gradients made orthogonal to the decoder, clipping (topk,
    jumprelu), unit decoder rows, dead counts, AuxK (topk). Its bfloat16 autocast, GPUs only, is off by default.
    """
    from dictionary_learning import trainers
    from dictionary_learning.training import trainSAE
    kind = dict(topk=trainers.TopKTrainer, relu=trainers.StandardTrainer, gated=trainers.GatedSAETrainer,
                jumprelu=trainers.JumpReluTrainer)[case["kind"]]
    settings = dict(trainer=kind, steps=FOR_EVER, activation_dim=case["d"], dict_size=case["n"], layer=0, lm_name="",
                    device=case["device"], **(dict(k=case["k"]) if case["kind"] == "topk" else {}))
    trainSAE((x for x, _ in source), [settings], FOR_EVER, device=case["device"])


def sae_lens(case, source, autocast: bool = False):
    """`SAETrainer.fit`: Adam, clipping, firing statistics, AuxK (topk); decoder norms are free and enter the codes."""
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer
    name = dict(topk="TopK", relu="Standard", gated="Gated", jumprelu="JumpReLU")[case["kind"]]
    config = getattr(saes, f"{name}TrainingSAEConfig")(d_in=case["d"], d_sae=case["n"], device=case["device"],
                                                       **(dict(k=case["k"]) if case["kind"] == "topk" else {}))
    settings = SAETrainerConfig(total_training_samples=FOR_EVER, train_batch_size_samples=case["batch"], lr_end=3e-5,
                                device=case["device"], autocast=autocast)
    SAETrainer(settings, getattr(saes, f"{name}TrainingSAE")(config), (x for x, _ in source)).fit()


def sae_lens_bf16(case, source):
    """The same with its option for bfloat16 autocast, which is off by default."""
    sae_lens(case, source, autocast=True)


def main() -> None:
    name, case = sys.argv[1], json.loads(sys.argv[2])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer

    def answer(message: dict) -> None:
        print(json.dumps(message), file=out, flush=True)

    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    try:
        answer(dict(torch=torch.__version__, version=version(PACKAGES[name]) if name in PACKAGES else ""))
        globals()[name](case, commands(case, answer))
    except Exception as error:  # any peer may fail for any reason: the others go on
        answer(dict(error=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"))
        raise


if __name__ == "__main__":
    main()
