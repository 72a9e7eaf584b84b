"""A browser of features: static pages that need no server and no network, as a folder or as one file.

    material = Material(x, t, rows, places, strings, unigrams, unembedding)  # shared by all SAEs that are shown
    write("browser", material, [gather(sae, "with table", material, scores), ...], "My SAEs")

The folder opens from disk and stays fast with tens of thousands of features, which it loads in parts. `write_one` makes
a single file with the same pages: that is the form for JupyterLab, which does not let a page load others beside it.
"""

import base64
import hashlib
import html
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from tsae import store
from tsae.codes import encoded, firings
from tsae.sae import SAE
from tsae.scoring.dictionary import nearest_rows

BINS = 30  # of a histogram of codes, of equal width from 0 to the feature's largest code
LISTED = 8  # tokens in each list of a feature, features in the list of a token
NEAREST = 6
PART = dict(features=64, tokens=256, rows=256)  # in one file of data
GENERATOR = '<meta name="generator" content="tsae.browser">'
MEANINGS = dict(frequency="share of the positions where it fires", peak_code="its largest code",
                mean_code="its mean code where it fires")


@dataclass
class Material:
    """Held-out text and what belongs to its language model, the same for every SAE that is shown.

    x (m, d), t (m,): activations, raw, and tokens of m positions; places (m, 2): their row and column in the token rows
    (N, T), from features.where; strings: the V tokens as text. Optional, (V, d): unigrams, the activations of [BOS, t];
    unembedding, the rows that score next tokens, with the final norm's gain folded in.
    """

    x: torch.Tensor
    t: torch.Tensor
    rows: torch.Tensor
    places: np.ndarray
    strings: list[str]
    unigrams: torch.Tensor | None = None
    unembedding: torch.Tensor | None = None

    def __post_init__(self):
        at = self.rows.cpu().numpy()[tuple(self.places.T)]
        if not len(self.x) == len(self.t) == len(at) or not np.array_equal(at, self.t.cpu().numpy()):
            raise ValueError("x, t and places do not belong together: rows[places] must be t (see features.where)")
        if (np.diff(self.places @ [self.rows.shape[1], 1]) <= 0).any():
            raise ValueError("the places are not in reading order: take them from features.where")
        if int(self.rows.max()) >= len(self.strings):
            raise ValueError(f"the text holds token {int(self.rows.max())}, there are strings for {len(self.strings)}")
        for name in ("unigrams", "unembedding"):
            table = getattr(self, name)
            if table is not None and len(table) != len(self.strings):
                raise ValueError(f"{name} has {len(table)} rows, there are strings for {len(self.strings)} tokens")


@dataclass
class Pages:
    """What is shown of one SAE: scores, one row a live feature; features, one dict for each of these; tokens, one dict
    for each token of the text; directions (live, d): the decoder's rows."""

    name: str
    n: int
    scores: pd.DataFrame
    features: list[dict]
    tokens: dict[int, dict]
    directions: torch.Tensor


def leading(group: np.ndarray, key: np.ndarray, most: int, once: np.ndarray | None = None) -> np.ndarray:
    """Where the `most` smallest keys of each group stand, by group and key. `once`: one at most of each such value."""
    order = np.lexsort((key, group))
    if once is not None:
        pair = group[order].astype(np.int64) * (int(once.max()) + 1) + once[order]
        order = order[np.sort(np.unique(pair, return_index=True)[1])]
    ordered = group[order]
    return order[np.arange(len(order)) - np.searchsorted(ordered, ordered) < most]


def nearest(a: torch.Tensor, b: torch.Tensor, top: int, sign: int = 1) -> list[list[tuple[int, float]]]:
    """`nearest_rows` for every row of a, as (row of b, <a, b>) with four digits."""
    value, index = nearest_rows(a, b, top, sign)
    return [list(zip(*row)) for row in zip(index.tolist(), short(value.numpy()).tolist())]


def short(values: np.ndarray) -> np.ndarray:
    """Float64 with four significant digits."""
    values = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = 10.0 ** np.clip(3 - np.floor(np.log10(np.abs(values))), 0, 15)
        return np.where((values == 0) | ~np.isfinite(values), values, np.round(values * unit) / unit)


def gather(sae: SAE, name: str, material: Material, scores: pd.DataFrame | None = None, contexts_each: int = 8,
           seed: int = 0) -> Pages:
    """One pass over the text, and everything that is shown of an SAE.

    `scores` has a column "feature" and any others: numbers, text, or token ids where the name ends in `_token`. The
    contexts are `contexts_each` of the strongest, of those nearest to the median code and of random ones, a row of text
    at most once in each; codes in units of the SAE's scale.
    """
    if sae.lookup != "none" and sae.vocabulary != len(material.strings):
        raise ValueError(f"the table of {name!r} has {sae.vocabulary} rows, there are strings for {len(material.strings)} "
                         "tokens")
    position, feature, code = firings(encoded(sae, material.x, material.t))
    if not len(code):
        raise ValueError(f"no feature of {name!r} fires on this text: there is nothing to show")
    live, start, count = np.unique(feature, return_index=True, return_counts=True)
    own, peak = np.repeat(np.arange(len(live)), count), np.maximum.reduceat(code, start)
    bins = np.minimum(BINS * (code / peak[own]), BINS - 1).astype(np.int64)
    histogram = np.bincount(own * BINS + bins, minlength=BINS * len(live)).reshape(-1, BINS)
    t = material.t.cpu().numpy().astype(np.int64)
    pair, inverse = np.unique(own * len(material.strings) + t[position], return_inverse=True)
    of_feature, of_token = np.divmod(pair, len(material.strings))
    mass, fired = np.bincount(inverse, code), np.bincount(inverse)
    total = np.add.reduceat(code, start, dtype=np.float64)
    best = leading(of_feature, -mass, LISTED)
    share = short(mass[best] / total[of_feature[best]])
    lists = dict(tokens=_lists(of_feature[best], len(live), of_token[best], share))

    directions = sae.W_dec.detach()[torch.as_tensor(live, device=sae.W_dec.device)].float()
    unit = normalize(directions, dim=1)
    if material.unembedding is not None:
        logits = (material.unembedding - material.unembedding.mean(0)).to(directions) * sae.scale
        lists["promoted"] = nearest(directions, logits, LISTED)
        lists["suppressed"] = nearest(directions, logits, LISTED, -1)
    if material.unigrams is not None:
        lists["unigrams"] = nearest(unit, _centred(material.unigrams).to(unit), NEAREST)
    if sae.lookup != "none":
        lists["rows"] = nearest(unit, _centred(sae.W_lookup.detach()).float(), NEAREST)
    contexts = _contexts(own, start, count, position, code, material.places, contexts_each, seed)
    features = [dict(peak=top, histogram=bins, contexts=found, **dict(zip(lists, row)))
                for top, bins, found, *row in zip(short(peak).tolist(), histogram.tolist(), contexts, *lists.values())]

    table = pd.DataFrame(dict(feature=live, frequency=count / len(t), peak_code=peak, mean_code=total / count))
    if scores is not None:
        if "feature" not in scores or scores["feature"].duplicated().any():
            raise ValueError('the scores need a column "feature" that names every feature once')
        ours = [name for name in table if name == "feature" or name not in scores]
        table = table[ours].merge(scores, on="feature", how="left")[list(dict.fromkeys([*table, *scores]))]
    best = leading(of_token, -mass, LISTED)
    seen, occurs = np.unique(t, return_counts=True)
    place = np.searchsorted(seen, of_token[best])
    answers = _lists(place, len(seen), live[of_feature[best]], short(fired[best] / occurs[place]),
                     short(mass[best] / fired[best]))
    l0 = short(np.bincount(t[position], minlength=len(material.strings))[seen] / occurs).tolist()
    tokens = {int(token): dict(features=found, l0=level) for token, found, level in zip(seen, answers, l0)}
    if sae.lookup != "none":
        _describe_rows(tokens, sae.W_lookup.detach().float() * sae.scale, "row")
    return Pages(name, sae.n, table, features, tokens, unit)


def _lists(group: np.ndarray, n: int, *columns: np.ndarray) -> list[list[tuple]]:
    """For each of n groups, its entries; `group` ascends."""
    entries = list(zip(*[column.tolist() for column in columns]))
    return [entries[a:b] for a, b in pairwise(np.searchsorted(group, np.arange(n + 1)).tolist())]


def _centred(table: torch.Tensor) -> torch.Tensor:
    return normalize(table - table.mean(0), dim=1)


def _describe_rows(tokens: dict[int, dict], table: torch.Tensor, name: str) -> None:
    """Add to each token's dict the norm of its row of `table` (V, d), its rank by it, and the nearest of the others."""
    ids = list(tokens)
    rows = table[torch.tensor(ids, device=table.device)]
    norm, unit = rows.norm(dim=1).cpu().numpy(), _centred(rows)
    rank = short(norm.argsort().argsort() / max(1, len(ids) - 1)).tolist()
    for token, *found, near in zip(ids, short(norm).tolist(), rank, nearest(unit, unit, NEAREST)):
        tokens[token][name] = [*found, [(ids[i], cosine) for i, cosine in near]]


def _contexts(own, start, count, position, code, places, each: int, seed: int) -> list[dict[str, list]]:
    """For each feature {kind: [(row, column, columns, codes)]}: all the feature's codes in the row of each context."""
    row, column = places[position].T
    rank = np.empty(len(code), np.int64)
    rank[np.lexsort((-code, own))] = np.arange(len(code)) - np.repeat(start, count)
    keys = dict(top=rank, middle=abs(2 * rank - (count[own] - 1)),
                random=np.random.default_rng(seed).permutation(len(code)))
    pair = own * (int(row.max()) + 1) + row  # ascends, as the firings of a feature are in reading order
    columns, codes, found = column.tolist(), short(code).tolist(), []
    for key in keys.values():
        chosen = leading(own, key, each, once=row)
        spans = zip(row[chosen].tolist(), column[chosen].tolist(), np.searchsorted(pair, pair[chosen]).tolist(),
                    np.searchsorted(pair, pair[chosen], side="right").tolist())
        shown = [(row, at, columns[a:b], codes[a:b]) for row, at, a, b in spans]
        ends = np.searchsorted(own[chosen], np.arange(len(start) + 1)).tolist()
        found.append([shown[a:b] for a, b in pairwise(ends)])
    return [dict(zip(keys, kinds)) for kinds in zip(*found)]


def script_json(value: object) -> str:
    """JSON that can stand inside a <script>: no "<", so neither `</script>` nor `<!--`; ASCII, so no U+2028; no NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def data(material: Material, pages: list[Pages], title: str, about: dict[str, str], meanings: dict[str, str]) -> Iterator:
    """Everything that the pages show, as pairs (key, value) of what is loaded at once."""
    seen = set(material.t.tolist())
    if not pages or any(set(page.tokens) != seen for page in pages):
        raise ValueError("nothing to show, or pages that were gathered on another text: gather all of them on this one")
    kinds = [{name: _kind(column) for name, column in page.scores.items() if name != "feature"} for page in pages]
    yield "about", dict(
        title=title, about={key: str(value) for key, value in about.items()}, meanings=MEANINGS | meanings, part=PART,
        positions=len(material.t), saes=[dict(name=page.name, n=page.n, live=len(page.scores), columns=kind)
                                     for page, kind in zip(pages, kinds)])
    counts = np.bincount(material.t.cpu().numpy(), minlength=len(material.strings)).tolist()
    yield "strings", dict(strings=material.strings, counts=counts)
    for first in range(0, len(material.rows), PART["rows"]):
        yield f"x{first // PART['rows']}", material.rows[first:first + PART["rows"]].tolist()
    for i, page in enumerate(pages):
        level = np.array([found["histogram"] for found in page.features])
        shape = np.ceil(9 * level / level.max(axis=1, keepdims=True)).astype(int)  # a digit a bin, 1 where there is any
        yield f"s{i}", dict(
            feature=page.scores["feature"].tolist(), shape=["".join(map(str, row)) for row in shape.tolist()],
            columns={column: _column(page.scores[column], kind) for column, kind in kinds[i].items()},
            **{name: [[token for token, _ in found.get(name, [])] for found in page.features]
               for name in ("tokens", "promoted")})
        near = [[[(int(other.scores["feature"].iat[j]), cosine) for j, cosine in row]
                 for row in nearest(page.directions, other.directions, NEAREST)] for other in pages]
        every = [found | dict(near=row) for found, *row in zip(page.features, *near)]
        for first in range(0, len(every), PART["features"]):
            yield f"s{i}f{first // PART['features']}", every[first:first + PART["features"]]
    tokens = {token: dict(saes=[page.tokens[token] for page in pages]) for token in pages[0].tokens}
    if material.unigrams is not None:
        _describe_rows(tokens, material.unigrams.float(), "unigram")
    for first in range(0, len(material.strings), PART["tokens"]):
        part = {token: tokens[token] for token in range(first, first + PART["tokens"]) if token in tokens}
        if part:
            yield f"t{first // PART['tokens']}", part


def _kind(column: pd.Series) -> str:
    if column.name.endswith("_token"):
        return "token"
    return "number" if pd.api.types.is_numeric_dtype(column) else "text"


def _column(column: pd.Series, kind: str) -> list:
    if kind == "text":
        return ["" if missing else str(value) for value, missing in zip(column, column.isna())]
    values = short(column.to_numpy(np.float64, na_value=np.nan))
    return [value if np.isfinite(value) else None for value in values.tolist()]


def _page(title: str, policy: str, head: str, scripts: str) -> str:
    page = Template((Path(__file__).parent / "browser.html").read_text(encoding="utf-8"))
    return page.substitute(title=html.escape(title), policy=policy, generator=GENERATOR, head=head, scripts=scripts)


def write(folder: str | Path, material: Material, pages: list[Pages], title: str = "Features",
          about: dict[str, str] | None = None, meanings: dict[str, str] | None = None) -> Path:
    """Write the browser as a folder, whole or not at all; returns its index.html. An older browser there is replaced.

    `about`: facts that the pages state (model, layer, text); `meanings`: what a score is, by the name of its column.
    """
    folder = Path(folder)
    if folder.exists() and not _replaceable(folder):
        raise ValueError(f"{folder} is there and is no feature browser: name another folder, or move this one away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        (new / "data").mkdir()
        for name in ("browser.css", "browser.js"):
            shutil.copyfile(Path(__file__).parent / name, new / name)
        for key, value in data(material, pages, title, about or {}, meanings or {}):
            (new / "data" / f"{key}.js").write_text(f'tsae("{key}",{script_json(value)})\n', encoding="ascii")
        policy = ("default-src 'none'; script-src 'self' file:; style-src 'self' file:; base-uri 'none'; "
                  "form-action 'none'")
        (new / "index.html").write_text(_page(title, policy, '<link rel="stylesheet" href="browser.css">',
                                              '<script src="browser.js"></script>'), encoding="utf-8")
        os.chmod(new, 0o755)  # mkdtemp makes folders that only their owner can read
        old = new.with_name(f"{new.name}-old")
        if folder.exists():
            os.replace(folder, old)  # a folder cannot be renamed onto a full one
        try:
            os.replace(new, folder)
        except OSError:
            os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder / "index.html"


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir() or folder.is_symlink():
        return False
    index = folder / "index.html"
    ours = index.is_file() and GENERATOR in index.read_text(encoding="utf-8", errors="replace")
    return ours or not any(folder.iterdir())


def write_one(path: str | Path, material: Material, pages: list[Pages], title: str = "Features",
              about: dict[str, str] | None = None, meanings: dict[str, str] | None = None) -> Path:
    """The same pages in one file; it is read whole, so rather for thousands of features than for tens of thousands."""
    style, code = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("browser.css", "browser.js"))
    allowed = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (code, style)]
    policy = "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; form-action 'none'".format(*allowed)
    blocks = [f'<script type="application/json" id="data-{key}">{script_json(value)}</script>'
              for key, value in data(material, pages, title, about or {}, meanings or {})]
    return store.write_text(path, _page(title, policy, f"<style>{style}</style>",
                                        "\n".join([*blocks, f"<script>{code}</script>"])))
