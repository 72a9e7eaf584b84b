"""A browser of features: static pages without a server or a network, as a folder or as one file.

    material = Material(x, t, rows, places, strings, unigrams, unembedding)  # shared by all SAEs
    write("browser", material, [gather(sae, "with table", material, scores), ...], "My SAEs")

The folder opens from disk and loads tens of thousands of features in parts. `write_one` makes a
single file with the same pages, for JupyterLab, where a page cannot load others beside it.
"""

import base64
import hashlib
import html
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd

from tsae import store
from tsae.baseline import token_ids
from tsae.browser.gather import NEAREST, Material, Pages, describe_rows, gather, matches, short

__all__ = ["Material", "Pages", "data", "gather", "serve", "write", "write_one"]
ASSETS = Path(__file__).parent
PART = dict(features=64, tokens=256, rows=256)  # in one file of data
GENERATOR = '<meta name="generator" content="tsae.browser">'
MEANINGS = dict(frequency="share of the positions where it fires", peak_code="its largest code",
                mean_code="its mean code where it fires")


def script_json(value: object) -> str:
    """ASCII JSON without "<" (no `</script>`, no U+2028), for a <script>. ValueError for a NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def data(material: Material, pages: list[Pages], title: str, about: dict[str, str],
         meanings: dict[str, str],
         start: dict[str, str] | None = None) -> Iterator[tuple[str, object]]:
    """Everything that the pages show, as pairs (key, value) of what is loaded at once."""
    seen = set(material.t.tolist())
    if not pages or any(set(page.tokens) != seen for page in pages):
        raise ValueError("no pages, or some gathered on another text: gather all of them on this")
    saes = [dict(name=page.name, n=page.n, live=len(page.scores), columns=_kinds(page))
            for page in pages]
    facts = {key: str(value) for key, value in about.items()}
    yield "about", dict(title=title, about=facts, meanings=MEANINGS | meanings, part=PART,
                        start=start or {},
                        positions=len(material.t), saes=saes)
    seen = token_ids(material.t).cpu().numpy()
    counts = np.bincount(seen, minlength=len(material.strings)).tolist()
    yield "strings", dict(strings=material.strings, counts=counts)
    yield from _parts("x", material.rows.tolist(), PART["rows"])
    for i, page in enumerate(pages):
        yield f"s{i}", _overview(page)
        yield from _parts(f"s{i}f", _with_neighbours(page, pages), PART["features"])
    tokens = {token: dict(saes=[page.tokens[token] for page in pages]) for token in pages[0].tokens}
    if material.unigrams is not None:
        describe_rows(tokens, material.unigrams.float(), "unigram")
    for first in range(0, len(material.strings), PART["tokens"]):
        ids = range(first, first + PART["tokens"])
        if part := {token: tokens[token] for token in ids if token in tokens}:
            yield f"t{first // PART['tokens']}", part


def _parts(name: str, values: list, size: int) -> Iterator[tuple[str, list]]:
    for first in range(0, len(values), size):
        yield f"{name}{first // size}", values[first:first + size]


def _overview(page: Pages) -> dict[str, object]:
    """What the list of an SAE's features shows and searches, a column at a time."""
    tokens = {name: [[token for token, _ in found.get(name, [])] for found in page.features]
              for name in ("tokens", "promoted")}
    columns = {}
    for name, kind in _kinds(page).items():
        column = page.scores[name]
        if kind == "text":
            columns[name] = ["" if na else str(value) for value, na in zip(column, column.isna())]
        else:
            values = short(column.to_numpy(np.float64, na_value=np.nan))
            columns[name] = [value if np.isfinite(value) else None for value in values.tolist()]
    counts = np.array([found["histogram"] for found in page.features])
    levels = np.ceil(9 * counts / counts.max(axis=1, keepdims=True)).astype(int)
    shape = ["".join(map(str, row)) for row in levels.tolist()]  # 0 only for an empty bin
    return dict(feature=page.scores["feature"].tolist(), shape=shape, columns=columns, **tokens)


def _with_neighbours(page: Pages, pages: list[Pages]) -> list[dict]:
    """The page's features, with the nearest features (feature, cosine) of each SAE as `near`."""
    near = []
    for other in pages:
        feature = other.scores["feature"].tolist()
        near.append([[(feature[i], cosine) for i, cosine in row]
                     for row in matches(page.directions, other.directions, NEAREST)])
    return [found | dict(near=row) for found, *row in zip(page.features, *near)]


def _kinds(page: Pages) -> dict[str, str]:
    """For each score "token", "number" or "text"."""
    numeric = pd.api.types.is_numeric_dtype
    return {name: "token" if name.endswith("_token") else "number" if numeric(column) else "text"
            for name, column in page.scores.items() if name != "feature"}


def _page(title: str, policy: str, head: str, scripts: str) -> str:
    page = Template((ASSETS / "browser.html").read_text(encoding="utf-8"))
    return page.substitute(title=html.escape(title), policy=policy, generator=GENERATOR, head=head,
                           scripts=scripts)


def write(folder: str | Path, material: Material, pages: list[Pages], title: str = "Features",
          about: dict[str, str] | None = None, meanings: dict[str, str] | None = None,
          start: dict[str, str] | None = None) -> Path:
    """Write the browser as a folder, whole or not at all; returns its index.html.

    An older browser there is replaced. `about`: facts that the pages state (model, layer, text);
    `meanings`: what a score is, by the name of its column; `start`: the search `q` and the column
    `sort` (behind a minus: the largest first) that a list opens with.
    """
    folder = Path(folder)
    index = folder / "index.html"
    ours = index.is_file() and GENERATOR in index.read_text(encoding="utf-8", errors="replace")
    usable = ours or folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and (folder.is_symlink() or not usable):
        raise ValueError(f"{folder} is no feature browser: name another folder or move it away")
    policy = ("default-src 'none'; script-src 'self' file:; style-src 'self' file:; "
              "base-uri 'none'; form-action 'none'")
    page = _page(title, policy, '<link rel="stylesheet" href="browser.css">',
                 '<script src="browser.js"></script>')
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        (new / "data").mkdir()
        for name in ("browser.css", "browser.js"):
            shutil.copyfile(ASSETS / name, new / name)
        for key, value in data(material, pages, title, about or {}, meanings or {}, start):
            line = f'tsae("{key}",{script_json(value)})\n'
            (new / "data" / f"{key}.js").write_text(line, encoding="ascii")
        (new / "index.html").write_text(page, encoding="utf-8")
        os.chmod(new, 0o755)  # mkdtemp makes folders that only their owner can read
        _replace(folder, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return index


def _replace(folder: Path, new: Path) -> None:
    """Put `new` where `folder` is, or leave `folder` as it was."""
    old = new.with_name(f"{new.name}-old")
    if folder.exists():
        os.replace(folder, old)  # a folder cannot be renamed onto a full one
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_one(path: str | Path, material: Material, pages: list[Pages], title: str = "Features",
              about: dict[str, str] | None = None, meanings: dict[str, str] | None = None,
              start: dict[str, str] | None = None) -> Path:
    """The same pages in one file, loaded whole: for thousands of features, not for more."""
    style = (ASSETS / "browser.css").read_text(encoding="utf-8")
    code = (ASSETS / "browser.js").read_text(encoding="utf-8")
    policy = (f"default-src 'none'; script-src '{_digest(code)}'; style-src '{_digest(style)}'; "
              "form-action 'none'")
    blocks = [f'<script type="application/json" id="data-{key}">{script_json(value)}</script>'
              for key, value in data(material, pages, title, about or {}, meanings or {}, start)]
    scripts = "\n".join([*blocks, f"<script>{code}</script>"])
    return store.write_text(path, _page(title, policy, f"<style>{style}</style>", scripts))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        """Say nothing of what was asked for: it would end in a notebook's output."""


def serve(folder: str | Path) -> str:
    """Show a folder to browsers on this machine until Python ends; returns the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def _digest(part: str) -> str:
    """What a policy names to allow this script or style and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
