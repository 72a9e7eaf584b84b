"""Training: one step (`Run.step`), one loop (`fit`), how SAEs start and learn (`RECIPES`).

Pairs (x, t) come without BOS and special tokens: lm.LM.keep says which positions count, and
pairs.extract leaves the others out.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import pandas as pd
import torch
from tqdm import tqdm

from tsae import baseline, kernels
from tsae.evaluate import squared_errors
from tsae.sae import SAE

Pair = tuple[torch.Tensor, torch.Tensor]
VERSION = 2  # of trained SAEs: raise it when a step or a start computes something else
SPIKE = 10.0  # times its running mean: a batch with a larger loss is softened


class RowAdam(torch.optim.Optimizer):
    """Adam for tables with sparse gradients: only rows of the batch move, each with its step count.

    A row's first step is then lr in every coordinate, as for any parameter. Dense Adam would move
    a row for dozens of steps after its token was seen, and pass over the whole table each time.
    """

    ROWS = 256  # handled at a time, so that they stay in the caches from the first line to the last

    def __init__(self, params: Iterable, lr: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p),
                                         steps=p.new_zeros(len(p), 1))
                grad = p.grad.coalesce()
                parts = grad.indices()[0].split(self.ROWS), grad.values().split(self.ROWS)
                for rows, g in zip(*parts):
                    self._move(p, rows, g, group)

    def _move(self, p: torch.Tensor, rows: torch.Tensor, g: torch.Tensor, group: dict) -> None:
        """One Adam step of the rows (r,) of p (V, d), whose gradients are g (r, d)."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        steps = state["steps"].index_select(0, rows).add_(1)
        m = state["m"].index_select(0, rows).lerp_(g, 1 - beta1)
        v = state["v"].index_select(0, rows).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        for name, moved in (("steps", steps), ("m", m), ("v", v)):
            state[name].index_copy_(0, rows, moved)
        size = v.div_(1 - beta2**steps).sqrt_().add_(group["eps"])
        p.index_add_(0, rows, m.div_(1 - beta1**steps).div_(size), alpha=-group["lr"])


def learning_rate(progress: float, schedule: str, last: float) -> float:
    """Share of the peak rate at `progress` in [0, 1].

    "cosine" falls to `last`; "decay" is constant, and linear to `last` over the last 20 %.
    """
    if schedule == "cosine":
        return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "decay":
        return last + (1 - last) * min(1.0, (1 - progress) / 0.2)
    raise ValueError(f'schedule is {schedule!r}: expected "cosine" or "decay"')


class Alone:
    """One process, that has no others to talk to; scale.parallel.Ranks is the one of many.

    `share` averages gradients over the processes, and returns the features that fired and the
    largest loss of any; `kth_largest` looks at the values of all; `average` averages a line.
    """

    world = 1
    kth_largest = staticmethod(kernels.kth_largest)

    @staticmethod
    def share(sae: SAE, fired: torch.Tensor, loss: torch.Tensor) -> tuple[torch.Tensor, float]:
        return fired, loss.detach().float().item()

    @staticmethod
    def average(line: dict[str, float]) -> dict[str, float]:
        return line


class Run:
    """One SAE in training: its optimisers, its dead counters, its history, and where it stands.

    Adam moves everything but tables, RowAdam moves tables at `table_lr`, in units of the SAE's
    scale; both rates follow `schedule` over `tokens`. `sparsity` rises linearly over the
    first `sparsity_warmup` of training. A feature is dead when it has not fired for
    `dead_after_tokens`. `check(sae) -> dict` adds columns to the history at `checks` points, evenly
    spaced in log tokens (fewer where one batch crosses several). `seed` only names the SAE where
    something goes wrong. `exchange`: see Alone.
    """

    def __init__(self, sae: SAE, tokens: int, lr: float = 1e-3, table_lr: float = 1e-2,
                 schedule: str = "decay", last_lr: float = 0.0, sparsity: float = 0.0,
                 sparsity_warmup: float = 0.05, dead_after_tokens: int = 200_000,
                 aux_weight: float = 1 / 32, check: Callable[[SAE], dict] | None = None,
                 checks: int = 0, log_every_tokens: int = 50_000, seed: int | None = None,
                 exchange: Alone = Alone()):
        learning_rate(0.0, schedule, last_lr)  # an unknown schedule is refused here
        if tokens < 1:
            raise ValueError(f"training on {tokens} tokens was asked for: expected 1 or more")
        self.settings = sae.config | dict(
            tokens=tokens, lr=lr, table_lr=table_lr, schedule=schedule, last_lr=last_lr,
            sparsity=sparsity, sparsity_warmup=sparsity_warmup, dead_after_tokens=dead_after_tokens,
            aux_weight=aux_weight, checks=checks, log_every_tokens=log_every_tokens, seed=seed,
            version=VERSION)
        which = "" if seed is None else f", seed {seed}"
        self.name = f"{sae.activation} SAE (n {sae.n}, k {sae.k}, lookup {sae.lookup}{which})"
        self.sae, self.tokens, self.schedule, self.last_lr = sae.train(), tokens, schedule, last_lr
        self.sparsity, self.warmup_tokens = sparsity, max(1.0, sparsity_warmup * tokens)
        self.dead_after_tokens, self.aux_weight = dead_after_tokens, aux_weight
        self.check, self.log_every_tokens, self.exchange = check, log_every_tokens, exchange
        tables = {f"baseline.{name}" for name in sae.baseline.tables}
        table = [p for name, p in sae.named_parameters() if name in tables and p.requires_grad]
        rest = [p for name, p in sae.named_parameters() if name not in tables and p.requires_grad]
        if not rest:
            raise ValueError(f"no parameter of the {self.name} learns: if it was loaded, train "
                             "sae.learn()")
        self.optimisers = [(torch.optim.Adam(rest, lr=lr, fused=True), lr)]
        if table:
            self.optimisers.append((RowAdam(table, table_lr), table_lr))
        # For each feature, the tokens since it last fired.
        self.silent = torch.zeros(sae.n, dtype=torch.long, device=sae.b_enc.device)
        self.seen, self.logged, self.history = 0, 0, []
        self.usual_loss: float | None = None  # a running mean
        self.checks_left = [tokens * 100 ** (i / checks - 1) for i in range(1, checks + 1)]

    def until_done(self, pairs: Iterator[Pair]) -> Iterator[Pair]:
        """The pairs (x, t) of the steps still to go. Raises ValueError when there are too few."""
        while self.seen < self.tokens:
            x, t = next(pairs, (None, None))
            if x is None:
                raise ValueError(f"{self.tokens} tokens of training were asked for, the activations"
                                 f" ended after {self.seen}: give more text, or train on fewer")
            yield x.to(self.silent.device), t.to(self.silent.device)

    def rate(self, tokens: int) -> float:
        """Share of the peak rate at the next step of a training on `tokens`."""
        return learning_rate(self.seen / tokens, self.schedule, self.last_lr)

    def branch(self, tokens: int) -> "Run":
        """A copy that ends after `tokens`, bit for bit a run of that length.

        To be taken before the first step at which `rate` of the two differs, and before that run's
        last one; not for runs with `checks` or `sparsity`.
        """
        run = copy.deepcopy(self)
        run.tokens, run.settings = tokens, self.settings | dict(tokens=tokens)
        return run

    def step(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """One optimiser step on x (b, d) raw, t (b,); returns what SAE.loss returns.

        Raises FloatingPointError for a loss that is NaN or infinite.
        """
        for optimiser, peak in self.optimisers:
            optimiser.param_groups[0]["lr"] = peak * self.rate(self.tokens)
            optimiser.zero_grad()
        sparsity = self.sparsity * min(1.0, (self.seen + 1) / self.warmup_tokens)
        dead = self.silent >= self.dead_after_tokens
        out = self.sae.loss(x, t, sparsity, dead, self.aux_weight, self.exchange.kth_largest)
        self._refuse_nan(out["loss"])
        torch.autograd.backward(out["loss"])  # where a library replaces Tensor.backward, not this
        fired, loss = self.exchange.share(self.sae, out["fired"], out["loss"])
        self._soften(loss)
        for optimiser, _ in self.optimisers:
            optimiser.step()
        self.sae.normalise()
        tokens = len(t) * self.exchange.world
        self.seen += tokens
        self.silent = torch.where(fired, 0, self.silent + tokens)
        return out

    def _refuse_nan(self, loss: torch.Tensor) -> None:
        if torch.isfinite(loss + self.sae.b_enc.detach().sum()):
            return
        if torch.isfinite(loss):  # a NaN bias need not show in the loss
            self.refuse_nan_weights()
        raise FloatingPointError(f"the loss of the {self.name} is {loss.item()} after {self.seen} "
                                 "tokens: lower `lr`, or check the activations for outliers")

    def refuse_nan_weights(self) -> None:
        """Raises FloatingPointError that names the parameters with NaN or infinite values."""
        wrong = [name for name, p in self.sae.named_parameters() if not torch.isfinite(p).all()]
        if wrong:
            raise FloatingPointError(
                f"{', '.join(wrong)} of the {self.name} have NaN or infinite values after "
                f"{self.seen} tokens: lower `lr`, or check the activations for outliers")

    def _soften(self, loss: float) -> None:
        """Scale the gradients of a batch whose loss is over SPIKE times the usual one down to that.

        Adam's second moments would remember it for thousands of steps, in which nothing moves.
        """
        if self.usual_loss and loss > (most := SPIKE * self.usual_loss):
            warnings.warn(
                f"the loss of the {self.name} jumps to {loss:.3g} after {self.seen} tokens, "
                f"{loss / self.usual_loss:.0f} times the usual: its gradients are scaled down "
                "to ten times. If it comes again, look at the activations there, or lower `lr`",
                RuntimeWarning, stacklevel=2)
            for p in self.sae.parameters():
                if p.grad is not None:
                    p.grad *= most / loss
            loss = most
        self.usual_loss = loss if self.usual_loss is None else 0.99 * self.usual_loss + 0.01 * loss

    def due(self) -> bool:
        """Whether the history gets a line after this step."""
        return (self._check_due() or self.seen - self.logged >= self.log_every_tokens
                or self.seen >= self.tokens)

    def _check_due(self) -> bool:
        return bool(self.checks_left) and self.seen >= min(self.checks_left[0], self.tokens)

    def line(self, x: torch.Tensor, out: dict[str, torch.Tensor]) -> dict[str, float]:
        """The history's line after the step on x (b, d) that gave `out`, with its check if due."""
        z, self.logged = x / self.sae.scale, self.seen
        values = dict(loss=out["loss"].item(), l0=(out["codes"] > 0).sum().item() / len(x),
                      nmse=squared_errors(z, out["z_hat"]).mean().item(),
                      dead=(self.silent >= self.dead_after_tokens).float().mean().item())
        line = dict(tokens=self.seen) | self.exchange.average(values)
        if self._check_due():
            self.checks_left = [point for point in self.checks_left if point > self.seen]
            if self.check:
                line |= self.check(self.sae.eval())
                self.sae.train()
        return line

    def finish(self) -> pd.DataFrame:
        """The history, one row a line; the SAE is in eval mode from here on."""
        self.refuse_nan_weights()
        self.sae.eval()
        return pd.DataFrame(self.history)


def fit(sae: SAE, pairs: Iterator[Pair], tokens: int, quick: bool = False, **how) -> pd.DataFrame:
    """Train an SAE in place on `tokens` pairs (x (b, d) raw, t (b,)); returns its history.

    `how` as in Run; `quick`: steps run inside `kernels.quick_products`. `scale.passes` has the loop
    for many SAEs at once, with checkpoints, on many devices.
    """
    run = Run(sae, tokens, **how)
    with tqdm(total=tokens, desc="training", unit="tok", unit_scale=True, leave=False) as progress:
        for x, t in run.until_done(pairs):
            with kernels.quick_products(quick):
                out = run.step(x, t)
            if run.due():
                run.history.append(run.line(x, out))
            progress.update(run.seen - progress.n)
    return run.finish()


# How a run starts and learns. "text" and "code" are the paper's two recipes; in "ours" the table
# starts at the token's shrunk mean, and the encoder sees what the table leaves (data/results says
# why). Rates are in units of the activation scale; table_lr 0 is the common rate (see `learning`).
# Without a table the encoder starts at plain_scale x W_dec: a half is better there too.
_CODE = dict(start="unigram", table_scale=0.5, encoder="transpose", encoder_scale=0.5,
             plain_scale=1.0, encoder_sees="full", table_lr=1e-2, schedule="cosine", last_lr=0.3,
             aux_weight=0.0, aux_lookup=False)
RECIPES = {
    "code": _CODE,
    "text": _CODE | dict(table_scale=1.0, encoder="kaiming", table_lr=0.0, last_lr=0.0),
    "ours": _CODE | dict(start="mean", table_scale=1.0, encoder_sees="rest", table_lr=3e-2,
                         plain_scale=0.5, schedule="decay", last_lr=0.0, aux_weight=0.25,
                         aux_lookup=True),
}


def learning(recipe: dict, lr: float) -> dict[str, float | str]:
    """The arguments of Run that a recipe (an entry of RECIPES) decides, at the common rate `lr`."""
    own = {name: recipe[name] for name in ("schedule", "last_lr", "aux_weight")}
    return own | dict(lr=lr, table_lr=recipe["table_lr"] or lr)


def _finite(limit: torch.Tensor | float | None) -> float | None:
    return None if limit is None or math.isinf(limit) else float(limit)


def build(stats: dict[str, torch.Tensor], unigrams: torch.Tensor, recipe: dict, activation: str,
          n: int, k: int, lookup: str, seed: int, known: baseline.Baseline | None = None) -> SAE:
    """An SAE where a recipe (an entry of RECIPES) starts it.

    `stats`: the statistics of the activations (pairs.extract.Moments); `unigrams` (V, d) raw;
    `known`: a baseline in place of the token table, where it starts (it is copied).
    """
    vocabulary, d_model = unigrams.shape
    sae = SAE(d_model, n, activation, k, vocabulary, lookup, recipe["encoder_sees"],
              stats["scale"].item(), recipe["aux_lookup"], baseline=copy.deepcopy(known),
              limit=_finite(stats.get("limit"))).to(unigrams.device)
    if lookup == "none" and known is None:
        return sae.start(stats["mean"], None, 1.0, recipe["plain_scale"], seed=seed)
    if known is not None:
        mean = stats["mean"] - known.mean * stats["scale"]
        return sae.start(mean, None, 1.0, recipe["encoder_scale"], recipe["encoder"], seed)
    table = baseline.start_table(stats, unigrams, recipe)
    mean = baseline.left_over(stats, table)
    return sae.start(mean, table, 1.0, recipe["encoder_scale"], recipe["encoder"], seed)
