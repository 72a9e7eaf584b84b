"""Documents to packed token rows: BOS first, no padding, split into training and validation by document."""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path

import datasets
import huggingface_hub
import torch
from tqdm import tqdm

from tsae import store

VERSION = 1  # of kept documents and tokens: raise it when the same corpus gives others
DOCSTRINGS = "docstrings"
# The installed packages whose docstrings are worth parsing: 9 in 10 characters of prose for half of the time.
PACKAGES = "torch transformers scipy sympy sklearn pandas networkx numpy huggingface_hub datasets nnsight mpmath".split()
RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0)  # the waits between five tries to reach the hub
CLIENTS = {"requests", "urllib3", "httpx", "httpx2", "aiohttp", "huggingface_hub"}
SUFFIXES = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


def _docstrings_of(path: str) -> list[str]:
    """The docstrings in triple quotes of one source file, read with `ast`: nothing is imported or executed."""
    try:
        source = Path(path).read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:  # a third of the files
            return []
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):  # test suites ship files that are wrong on purpose
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) >= 100]


def docstrings(packages: Iterable[str] = PACKAGES, fresh_share: float = 0.5) -> list[str]:
    """The docstrings of installed packages, one document each, in the order of their hashes.

    A document whose lines stood mostly (more than 1 - `fresh_share` of its characters) in earlier documents is left
    out: libraries repeat their parameter lists hundreds of times. The result is cached per set of versions.
    """
    packages = tuple(packages)
    versions = {name: version(name) for name in packages}
    cached = store.CACHE / f"docstrings-{store.key(versions=versions, fresh_share=fresh_share, version=VERSION)}.json"
    if cached.is_file():
        return store.read_json(cached)["documents"]
    files = [str(path) for name in packages for path in sorted(_folder(name).rglob("*.py"))]
    with ProcessPoolExecutor(initializer=gc.disable) as pool:  # it would go through every syntax tree, and free none
        found = pool.map(_docstrings_of, files, chunksize=32)
        found = list(chain.from_iterable(tqdm(found, "reading docstrings", len(files), unit="file", leave=False)))
    documents, seen = [], set()
    for text in dict.fromkeys(found):
        lines = [line.strip() for line in text.splitlines()]
        fresh = sum(len(line) for line in lines if line not in seen)
        if fresh > fresh_share * sum(map(len, lines)):
            documents.append(text)
        seen.update(line for line in lines if len(line) >= 20)
    documents.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    store.write_json(cached, {"versions": versions, "documents": documents})
    return documents


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"the docstring corpus reads the package {package!r}, which is not installed: "
                                  "run `pip install -r requirements.txt`")
    return Path(spec.submodule_search_locations[0])


def version(package: str) -> str:
    name = {"sklearn": "scikit-learn"}.get(package, package)
    try:
        return importlib.metadata.version(name).split("+")[0]  # torch's build suffix changes no docstring
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def fingerprint(documents: Iterable[str]) -> str:
    """sha256 over the documents in their order, as hex."""
    state = hashlib.sha256()
    for text in documents:
        state.update(hashlib.sha256(text.encode()).digest())
    return state.hexdigest()


def documents(corpus: str, split: str = "train", column: str = "text") -> Iterator[str]:
    """The documents of a corpus, one string each.

    `corpus` is "docstrings" (the installed packages', no download); a .txt file (cut at blank lines into documents of
    about 2000 characters), a .jsonl or .parquet file (one document a row), or a folder of such files; or a dataset of
    the Hugging Face hub, "owner/name" or "owner/name:configuration", which is streamed and tried again after each of
    RETRY_AFTER_S where the network fails. Raises FileNotFoundError, ValueError or ConnectionError that says what was
    looked for.
    """
    if corpus == DOCSTRINGS:
        return iter(docstrings())
    path = Path(corpus).expanduser()
    if path.is_file():
        return _from_files([path], split, column)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        files = [file for file in files if file.name.startswith((f"{split}-", f"{split}."))] or files  # the hub's layout
        if not files:
            raise ValueError(f"the corpus folder {corpus!r} holds no file that ends in {', '.join(SUFFIXES)}")
        return _from_files(files, split, column)
    if path.suffix in SUFFIXES or corpus.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no corpus file or folder {corpus!r}")
    return _texts(_from_hub(corpus, split, RETRY_AFTER_S), corpus, column)


def _from_hub(corpus: str, split: str, waits_s: Iterable[float]) -> Iterator[dict]:
    """The rows of a streamed dataset. Where the network fails it is opened again, and the rows given are skipped.

    A row that came through makes all `waits_s` (seconds) available again.
    """
    name, _, configuration = corpus.partition(":")
    waits, given = list(waits_s), 0
    left = iter(waits)
    while True:
        try:
            stream = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
            for row in islice(stream, given, None):
                given, left = given + 1, iter(waits)
                yield row
            return
        except Exception as error:  # the hub client raises dozens of types for "not there" and "no network"
            said = f"{type(error).__name__}: {error}"
            if not _passes(error):
                done = f"read after {given} rows" if given else "opened"
                raise ValueError(f"the corpus {corpus!r} is no local file and could not be {done} on the Hugging Face "
                                 f"hub ({said}): check the name and the network, or pass a local file or folder, or "
                                 '"docstrings"') from error
            wait = next(left, None)
            if wait is None:
                raise ConnectionError(f"the Hugging Face hub failed {len(waits) + 1} times in a row to give row {given} "
                                      f"of the corpus {corpus!r} ({said}): try again later, or pass a local file or "
                                      'folder, or "docstrings"') from error
            tqdm.write(f"the Hugging Face hub failed at row {given} of {corpus!r} ({said}): trying again in {wait:g} s",
                       file=sys.stderr)
        time.sleep(wait)


def _passes(error: BaseException | None) -> bool:
    """True for a failure of the network or the server that may be over in a moment: not for "no such dataset"."""
    if error is None or huggingface_hub.is_offline_mode():
        return False
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status", None)  # the latter: aiohttp's
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    of_a_client = CLIENTS & {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return bool(of_a_client) and not isinstance(error, (FileNotFoundError, ValueError)) or _passes(error.__cause__)


def _from_files(files: list[Path], split: str, column: str) -> Iterator[str]:
    for file in files:
        kind = SUFFIXES.get(file.suffix)
        if kind is None:
            raise ValueError(f"the corpus file {file} ends in none of {', '.join(SUFFIXES)}")
        if kind == "text":
            yield from _paragraphs(file.read_text(encoding="utf-8", errors="replace"))
        elif file.stat().st_size:
            yield from _texts(_from_file(file, kind), str(file), column)


def _from_file(file: Path, kind: str) -> Iterator[dict]:
    try:
        yield from datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
    except Exception as error:  # the reader raises a dozen types for damage, an OSError that names no file among them
        raise ValueError(f"the corpus file {file} is damaged or no {kind} of one object a row ({type(error).__name__}: "
                         f"{error}): restore it, or write one object with a text column a row") from error


def _paragraphs(text: str, about: int = 2000) -> Iterator[str]:
    """Consecutive paragraphs joined into documents: a single file then has documents for both sides of the split."""
    held, size = [], 0
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        size += len(paragraph)
        if size >= about:
            yield "\n\n".join(held)
            held, size = [], 0
    if size:
        yield "\n\n".join(held)


def _texts(stream: Iterable[dict], corpus: str, column: str) -> Iterator[str]:
    for row in stream:
        if column in row and row[column] is None:
            continue
        if column not in row:
            raise ValueError(f"the corpus {corpus!r} has no text column {column!r}: its columns are "
                             f"{', '.join(row)}; name one with `column`")
        if not isinstance(row[column], str):
            raise ValueError(f"the column {column!r} of the corpus {corpus!r} holds a {type(row[column]).__name__} where a "
                             f"string was expected: name a text column with `column`; there are {', '.join(row)}")
        yield row[column]


def is_validation(document: str, share: float) -> bool:
    """True for a `share` of all documents, decided by the document's own hash: the same in every run and order."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < share * 2**64


def bos_id(tokenizer) -> int:
    """The id of the token that starts every row. Raises ValueError for a tokenizer that has none."""
    if tokenizer.bos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no BOS token, which starts every row and every "
                         'unigram [BOS, t]: name one of its tokens with `bos_token`, such as "<|endoftext|>"')
    return tokenizer.bos_token_id


def pack(texts: Iterable[str], tokenizer, context: int, train_tokens: int, validation_tokens: int,
         validation_share: float = 0.05) -> dict[str, torch.Tensor]:
    """Tokenized documents, joined with BOS between them and cut into rows of BOS + (context - 1) tokens.

    Returns {"train": (N, context) int32, "validation": (M, context) int32}; reading stops when both hold the tokens
    asked for (0: all there are). Raises ValueError when a split has not even one row.
    """
    bos = bos_id(tokenizer)
    wanted = {"train": train_tokens, "validation": validation_tokens}
    streams = {name: array("i") for name in wanted}
    full = {name: False for name in wanted}
    with tqdm(desc="tokenizing", unit="tok", unit_scale=True, leave=False) as progress:
        texts = (text for text in texts if text.strip())
        while group := list(islice(texts, 1000)):
            ids = tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]
            for text, document in zip(group, ids):
                name = "validation" if is_validation(text, validation_share) else "train"
                if not full[name]:
                    streams[name].fromlist(document + [bos])
                    progress.update(len(document) + 1)
                    full[name] = 0 < wanted[name] <= len(streams[name]) // (context - 1) * context
            if all(full.values()):
                break
    return {name: _cut(stream, bos, context, wanted[name], name) for name, stream in streams.items()}


def _cut(stream: array, bos: int, context: int, wanted: int, name: str) -> torch.Tensor:
    n = len(stream) // (context - 1)
    if wanted:
        n = min(n, -(-wanted // context))
    if n == 0:
        raise ValueError(f"the corpus gives {len(stream)} {name} tokens, fewer than one row of {context - 1}: use a "
                         "longer corpus (documents go to one side or the other whole) or a shorter `context`")
    body = torch.frombuffer(stream, dtype=torch.int32, count=n * (context - 1)).view(n, context - 1)
    return torch.cat([torch.full((n, 1), bos, dtype=torch.int32), body], dim=1)


def tokens(corpus: str, tokenizer, context: int, train_tokens: int, validation_tokens: int,
           validation_share: float = 0.05, split: str = "train", column: str = "text") -> dict[str, torch.Tensor]:
    """`pack(documents(corpus), ...)`, kept on disk: the second call with the same arguments reads no document.

    Without `train_tokens` all of the text is read, and kept once for every `validation_tokens`.
    """
    if validation_tokens and not train_tokens:
        rows = tokens(corpus, tokenizer, context, 0, 0, validation_share, split, column)
        _say_short(corpus, rows, validation=validation_tokens)
        return rows | dict(validation=rows["validation"][:-(-validation_tokens // context)])
    path = Path(corpus).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamp = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    if corpus == DOCSTRINGS:
        stamp = {name: version(name) for name in PACKAGES}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    key = store.key(corpus=corpus, stamp=stamp, tokenizer=backend.to_str() if backend else tokenizer.name_or_path,
                    bos=bos_id(tokenizer), context=context, train_tokens=train_tokens, split=split, column=column,
                    validation_tokens=validation_tokens, validation_share=validation_share, version=VERSION)
    cached = store.CACHE / f"tokens-{key}.safetensors"
    if (held := store.read_tensors(cached)) is not None:
        return held
    rows = pack(documents(corpus, split, column), tokenizer, context, train_tokens, validation_tokens, validation_share)
    _say_short(corpus, rows, train=train_tokens, validation=validation_tokens)
    store.write_tensors(cached, rows)
    return rows


def _say_short(corpus: str, rows: dict[str, torch.Tensor], **wanted: int) -> None:
    for name, tokens in wanted.items():
        if rows[name].numel() < tokens:
            tqdm.write(f"the corpus {corpus!r} has {rows[name].numel()} {name} tokens of the {tokens} asked for: it is used "
                       "whole", file=sys.stderr)
