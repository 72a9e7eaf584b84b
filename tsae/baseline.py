"""What the decoder adds before the features speak: a_hat = W_dec^T f + b_dec + baseline(context).

A context is what is known at a position without features: its token t, the tokens before it, the
activation of some layer. A tokenized SAE has a vector for each token; others are beside it.

    Tokens    W_lookup[t]                                   the paper's table, or a frozen mean
    Grams     W_lookup[t] + rows of the n-grams that end here, where they have one
    Hashed    the same, but n-grams share rows: their hash says which
    Factored  left[t] right: a map of the token's embedding, or a table of low rank
    Affine    (x - mean) left right: a map of an earlier layer, or the first directions of this one
    Earlier   the reconstruction of a trained SAE

Rows are in units of the SAE's `scale`, contexts hold raw activations. Statistics are those of
pairs.prepare.Data: mean (d,), count (V,) and sum (V, d) of the activations, and `limit`, the norm
over which one is a sink.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag

WITHOUT, WITH, FROZEN = "without table", "with table", "frozen token mean"
# SAEs as they start, with random directions: without a table, and with the frozen token mean.
UNTRAINED, UNTRAINED_FROZEN = "untrained", "untrained, frozen token mean"
NAMES = {"none": WITHOUT, "learned": WITH}  # of a `lookup`, in result tables and figures


@dataclass
class Context:
    """What is known at b positions: `ids` (b, m) int64 of the last m tokens, the position's own
    first, -1 before the start of a row; `layers`: {layer: activations (b, d) raw}.
    """

    ids: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Context":
        return Context(change(self.ids), {n: change(x) for n, x in self.layers.items()})

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index) -> "Context":
        return self._each(lambda part: part[index])

    def split(self, size: int) -> Iterator["Context"]:
        return (self[i:i + size] for i in range(0, len(self), size))

    def to(self, *to) -> "Context":
        return self._each(lambda part: part.to(*to))

    @property
    def parts(self) -> list[Tensor]:
        """Its tensors, which `Needs.joined` puts together again."""
        return [self.ids, *(x for _, x in sorted(self.layers.items()))]


def token_ids(t: Tensor | Context) -> Tensor:
    """The position's own token ids (b,) of a context, or of ids that are one already."""
    return t.ids[..., 0] if isinstance(t, Context) else t


@dataclass(frozen=True)
class Needs:
    """What a baseline must be told: the last `grams` tokens, the activations of some `layers`."""

    grams: int = 1
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(max(self.grams, other.grams), (*self.layers, *other.layers))

    @property
    def more(self) -> bool:
        """Whether the token alone is not enough."""
        return self != Needs()

    def context(self, tokens: Tensor, layers: dict[int, Tensor]) -> Tensor | Context:
        """Of token rows (b, T) and {layer: activations (b, T, d)}: ids (b, T), or a Context."""
        if not self.more:
            return tokens
        ids = tokens.long().unsqueeze(-1).repeat(1, 1, self.grams)
        for back in range(1, self.grams):
            ids[:, back:, back] = tokens[:, :-back]
            ids[:, :back, back] = -1
        return Context(ids, {n: layers[n] for n in self.layers})

    def joined(self, parts: list[Tensor]) -> Tensor | Context:
        """Ids (b,) alone, or a Context from its `parts`; ids become int64, activations float32."""
        ids, *layers = parts
        if not self.more:
            return ids.long()
        return Context(ids.long(), {n: x.float() for n, x in zip(self.layers, layers)})


class Baseline(nn.Module):
    """Rows (b, d) in units of the SAE's scale, of a context. Without parameters: nothing, 0.0.

    `needs` says what a context must hold; `tables` names the parameters with sparse gradients,
    which RowAdam moves. `mean` (d,) is the mean of the rows over the training data (of a table: of
    its token rows). b_dec starts at the activations' mean less this one.
    """

    kind, needs, tables = "none", Needs(), ()
    mean: Tensor | float = 0.0

    def __init__(self, d_model: int, **config):
        super().__init__()
        self.config = dict(kind=self.kind, d_model=d_model) | config

    def forward(self, t: Tensor | Context | None) -> Tensor | float:
        return 0.0

    def token_rows(self) -> Tensor | None:
        """What it adds for each token alone (V, d), without gradient; None where none is kept."""
        return None

    def _token(self, t: Tensor | Context | None) -> Tensor:
        """The ids (b,) of t. Raises ValueError for none and for ids beyond the table."""
        vocabulary = self.config["vocabulary"]
        if t is None:
            raise ValueError("this SAE has a lookup table: pass the token ids `t` beside x")
        ids = token_ids(t).long()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(f"token ids run from {int(ids.min())} to {int(ids.max())}, the table "
                             f"has rows 0 to {vocabulary - 1}: is it of another tokenizer?")
        return ids

    def _ids(self, t: Tensor | Context | None, last: int) -> Tensor:
        """The last ids (b, last) of a context. Raises ValueError where it holds fewer."""
        own = self._token(t)
        held = t.ids.shape[1] if isinstance(t, Context) else 1
        if held < last:
            raise ValueError(f"this baseline looks at the last {last} tokens, and got {held}: "
                             "prepare the data with its `needs`")
        return t.ids[:, :last].long() if last > 1 else own.unsqueeze(1)

    def _layer(self, t: Tensor | Context | None, number: int) -> Tensor:
        if not isinstance(t, Context) or number not in t.layers:
            raise ValueError(f"this baseline looks at the activation of layer {number}: prepare "
                             "the data with its `needs`")
        return t.layers[number]


class Tokens(Baseline):
    """W_lookup[t] (b, d): the token table."""

    kind, tables = "tokens", ("W_lookup",)

    def __init__(self, d_model: int, vocabulary: int, learned: bool = True):
        super().__init__(d_model, vocabulary=vocabulary, learned=learned)
        self.W_lookup = nn.Parameter(torch.zeros(vocabulary, d_model), learned)

    def token_rows(self):
        return self.W_lookup.detach()[:self.config["vocabulary"]]

    def forward(self, t):
        return embedding(self._token(t), self.W_lookup, sparse=True)


class Grams(Tokens):
    """The token's row and those of the n-grams that end here, added up: each corrects the shorter.

    `rows` = [rows for 2-grams, for 3-grams, ...] of W_lookup, which follow those of the V tokens.
    An n-gram with a row is found by its key, sum_i id_i V^i from the newest on, in sorted keys.
    """

    kind = "grams"

    def __init__(self, d_model: int, vocabulary: int, rows: list[int], learned: bool = True):
        Baseline.__init__(self, d_model, vocabulary=vocabulary, rows=list(rows), learned=learned)
        if not rows or vocabulary ** (len(rows) + 1) >= 2**63:
            raise ValueError(f"n-grams up to {len(rows) + 1} over {vocabulary} tokens: expected 2 "
                             "or longer, and fewer than 2^63 of them; leave out the longest")
        self.needs = Needs(len(rows) + 1)
        self.W_lookup = nn.Parameter(torch.zeros(vocabulary + sum(rows), d_model), learned)
        self.register_buffer("keys", torch.zeros(sum(rows), dtype=torch.int64))

    def index(self, ids: Tensor) -> Tensor:
        """Rows (b, m) of W_lookup for the last m ids (b, m); -1 where an n-gram has none."""
        own, V, first = [ids[:, 0]], self.config["vocabulary"], 0
        for n, rows in enumerate(self.config["rows"], 2):
            if rows:
                keys, key = self.keys[first:first + rows], self.key(ids[:, :n])
                place = torch.searchsorted(keys, key).clamp_max(rows - 1)
                known = (ids[:, :n] >= 0).all(1) & (keys[place] == key)
                own.append(torch.where(known, V + first + place, -1))
            first += rows
        return torch.stack(own, 1)

    def key(self, ids: Tensor) -> Tensor:
        """What names n-grams (b, n), the newest token first: (b,) int64."""
        powers = [self.config["vocabulary"] ** i for i in range(ids.shape[1])]
        return (ids.long() * torch.tensor(powers, device=ids.device)).sum(1)

    def forward(self, t):
        index = self.index(self._ids(t, self.needs.grams))
        known = index >= 0
        starts = known.sum(1).cumsum(0) - known.sum(1)
        return embedding_bag(index[known], self.W_lookup, starts, mode="sum", sparse=True)


class Hashed(Tokens):
    """The token's row, and for each n-gram that ends here `heads` rows shared with others (Engram).

    n-grams of canonical ids: tokens alike but for case and space share one (buffer `canonical`).
    """

    kind = "hashed"

    def __init__(self, d_model: int, vocabulary: int, rows: int, grams: int = 3, heads: int = 2,
                 learned: bool = True):
        Baseline.__init__(self, d_model, vocabulary=vocabulary, rows=rows, grams=grams,
                          heads=heads, learned=learned)
        if grams < 2 or heads < 1 or rows < 1:
            raise ValueError(f"{grams=}, {heads=}, {rows=}: expected n-grams of 2 tokens or more, "
                             "1 head or more, and 1 row or more")
        self.needs = Needs(grams)
        self.W_lookup = nn.Parameter(torch.zeros(vocabulary + rows, d_model), learned)
        self.register_buffer("canonical", torch.arange(vocabulary))

    def index(self, ids: Tensor) -> Tensor:
        """Rows (b, 1 + (grams - 1) heads) of W_lookup for the last ids (b, grams)."""
        own, c = self.config, torch.where(ids >= 0, self.canonical[ids.clamp_min(0)] + 1, 0)
        rows = [ids[:, 0]]
        for n in range(2, own["grams"] + 1):
            for head in range(own["heads"]):
                state = torch.full_like(c[:, 0], n * own["heads"] + head)
                for back in range(n):
                    state = mixed(state * 31 + c[:, back])
                rows.append(own["vocabulary"] + state % own["rows"])
        return torch.stack(rows, 1)

    def forward(self, t):
        index = self.index(self._ids(t, self.needs.grams))
        return embedding_bag(index, self.W_lookup, mode="sum", sparse=True)


def mixed(v: Tensor) -> Tensor:
    """32 bits of v (b,) int64, mixed; the multiplier has 27 bits, so no product leaves int64."""
    for _ in range(2):
        v = v & 0xFFFFFFFF
        v = (v ^ (v >> 16)) * 0x45D9F3B
    v = v & 0xFFFFFFFF
    return v ^ (v >> 16)


class Factored(Baseline):
    """left[t] right (b, d), from left (V, r) and right (r, d).

    With the language model's embedding as a frozen `left` it is a linear map of that; with both
    learned, a table of rank r.
    """

    kind = "factored"

    def __init__(self, d_model: int, vocabulary: int, rank: int, left_learned: bool = True,
                 learned: bool = True):
        super().__init__(d_model, vocabulary=vocabulary, rank=rank, left_learned=left_learned,
                         learned=learned)
        self.left = nn.Parameter(torch.zeros(vocabulary, rank), learned and left_learned)
        self.right = nn.Parameter(torch.zeros(rank, d_model), learned)
        self.tables = ("left",) if learned and left_learned else ()

    def token_rows(self):
        return self.left.detach() @ self.right.detach()

    def forward(self, t):
        return embedding(self._token(t), self.left, sparse=True) @ self.right


class Affine(Baseline):
    """(x - centre) / scale left right (b, d) of the raw activation x (b, d') at `layer`.

    left (d', r), right (r, d); with rank r = 0 there is no `right`, and left is (d', d). An x with
    a norm over `limit` (a sink of that layer) is shortened to it.
    """

    kind = "affine"

    def __init__(self, d_model: int, layer: int, width: int, scale: float, rank: int = 0,
                 limit: float = math.inf, learned: bool = True):
        super().__init__(d_model, layer=layer, width=width, scale=scale, rank=rank, limit=limit,
                         learned=learned)
        self.needs = Needs(layers=(layer,))
        self.left = nn.Parameter(torch.zeros(width, rank or d_model), learned)
        self.right = nn.Parameter(torch.zeros(rank, d_model), learned) if rank else None
        self.register_buffer("centre", torch.zeros(width))

    def forward(self, t):
        rows = self.seen(self._layer(t, self.config["layer"])) @ self.left
        return rows if self.right is None else rows @ self.right

    def seen(self, x: Tensor) -> Tensor:
        """What `left` multiplies, (b, d') of raw x (b, d')."""
        share = (self.config["limit"] / x.norm(dim=-1, keepdim=True)).clamp_max(1.0)
        return (x * share - self.centre) / self.config["scale"]


class Earlier(Baseline):
    """The reconstruction (b, d) of a trained SAE of `layer`, over `scale`: it stays as it is."""

    kind = "earlier"

    def __init__(self, d_model: int, layer: int, scale: float, sae: nn.Module):
        super().__init__(d_model, layer=layer, scale=scale, sae=sae.config)
        self.needs = Needs(layers=(layer,)) | sae.baseline.needs
        self.sae = copy.deepcopy(sae).eval().requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(False)  # its batchtopk threshold must not move

    @torch.no_grad()
    def forward(self, t):
        return self.sae(self._layer(t, self.config["layer"]), t) / self.config["scale"]


KINDS = {each.kind: each for each in (Baseline, Tokens, Grams, Hashed, Factored, Affine, Earlier)}


def made(config: dict, sae_class: type) -> Baseline:
    """The baseline of a saved `config`, before its state is loaded. ValueError for another kind."""
    config = dict(config)
    kind = config.pop("kind")
    if kind not in KINDS:
        raise ValueError(f"the baseline is {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "earlier":
        config["sae"] = sae_class(**config["sae"])
    return KINDS[kind](**config)


def conditional_mean(stats: dict[str, torch.Tensor], prior: float = 4.0) -> torch.Tensor:
    """E[a | t] (V, d), shrunk to the overall mean, as if each t had been at it `prior` times."""
    return (stats["sum"] + prior * stats["mean"]) / (stats["count"].unsqueeze(-1) + prior)


def left_over(stats: dict[str, torch.Tensor], table: torch.Tensor) -> torch.Tensor:
    """Mean (d,) of a_t - table[t]: where b_dec starts beside a table (V, d)."""
    share = stats["count"] / stats["count"].sum()
    return stats["mean"] - share @ table


def start_table(stats: dict[str, torch.Tensor], unigrams: torch.Tensor,
                recipe: dict) -> torch.Tensor:
    """Where the table of a recipe (an entry of train.RECIPES) starts: (V, d) raw.

    Its `start` is "unigram", the residuals A([BOS, t])[1] in `unigrams` (V, d), or "mean", the
    shrunk conditional means; both times its `table_scale`. The mean stands in for a unigram that is
    a sink: one with a norm over stats["limit"].
    """
    if recipe["start"] == "unigram":
        sinks = unigrams.norm(dim=-1, keepdim=True) > stats["limit"]
        return recipe["table_scale"] * torch.where(sinks, conditional_mean(stats), unigrams)
    if recipe["start"] == "mean":
        return recipe["table_scale"] * conditional_mean(stats)
    raise ValueError(f'start is {recipe["start"]!r}: expected "unigram" or "mean"')
