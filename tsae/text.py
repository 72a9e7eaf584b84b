"""Documents to packed token rows: BOS first, no padding, sides split by document."""

import ast
import gc
import hashlib
import math
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata, util
from itertools import chain, islice
from pathlib import Path

import datasets
import huggingface_hub
import torch
from tqdm import tqdm

from tsae import store

VERSION = 1  # of cached documents and tokens: raise it when the same corpus gives others
DOCSTRINGS = "docstrings"
# The packages worth parsing: they hold 9 in 10 characters of all docstrings, in half of the time.
PACKAGES = ("torch transformers scipy sympy sklearn pandas networkx numpy huggingface_hub datasets "
            "nnsight mpmath").split()
RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0)  # the waits between five tries to reach the hub
CLIENTS = {"requests", "urllib3", "httpx", "httpx2", "aiohttp", "huggingface_hub"}
INSTEAD = 'check name and network, or pass a local file or folder, or "docstrings"'
SUFFIXES = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
ENDINGS = ", ".join(SUFFIXES)


def _docstrings_of(path: str) -> list[str]:
    """The docstrings of 100 characters or more of one source file. Nothing in it is executed."""
    try:
        source = Path(path).read_text(encoding="utf-8")
        quoted = '"""' in source or "'''" in source  # a third of the files: no need to parse them
        tree = ast.parse(source if quoted else "")
    except (SyntaxError, UnicodeDecodeError, ValueError):  # some tests are wrong on purpose
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) >= 100]


def docstrings(packages: Iterable[str] = PACKAGES, fresh_share: float = 0.5) -> list[str]:
    """The docstrings of installed packages, one document each, in the order of their hashes.

    Left out: repetition, with at most `fresh_share` of its characters in lines not seen before.
    """
    versions = {name: version(name) for name in packages}
    key = store.key(versions=versions, fresh_share=fresh_share, version=VERSION)
    cached = store.CACHE / f"docstrings-{key}.json"
    if cached.is_file():
        return store.read_json(cached)["documents"]
    files = [str(path) for name in versions for path in sorted(_folder(name).rglob("*.py"))]
    with ProcessPoolExecutor(initializer=gc.disable) as pool:  # it would free no syntax tree
        found = tqdm(pool.map(_docstrings_of, files, chunksize=32), "reading docstrings",
                     len(files), unit="file", leave=False)
        documents = _without_repetition(chain.from_iterable(found), fresh_share)
    documents.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    store.write_json(cached, {"versions": versions, "documents": documents})
    return documents


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

    `corpus` is "docstrings" (those of the installed packages); a .txt file (cut at blank lines into
    documents of about 2000 characters); a .jsonl or .parquet file (a document a row); a folder of
    such files, or of those whose names start with `split`; or a dataset of the Hugging Face hub,
    "owner/name" or "owner/name:configuration", streamed. Raises FileNotFoundError, ValueError or
    ConnectionError that says what was looked for.
    """
    if corpus == DOCSTRINGS:
        return iter(docstrings())
    path = Path(corpus).expanduser()
    if path.is_file():
        return _from_file(path, column)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES]
        files = [file for file in files if file.is_file()]
        if not files:
            raise ValueError(f"the folder {corpus!r} holds no file that ends in {ENDINGS}")
        of_split = [file for file in files if file.name.startswith((f"{split}-", f"{split}."))]
        return chain.from_iterable(_from_file(file, column) for file in of_split or files)
    if path.suffix in SUFFIXES or corpus.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no corpus file or folder {corpus!r}")
    return _texts(_from_hub(corpus, split), corpus, column)


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


def _from_file(file: Path, column: str) -> Iterator[str]:
    if (kind := SUFFIXES.get(file.suffix)) is None:
        raise ValueError(f"the corpus file {file} ends in none of {ENDINGS}")
    if kind == "text":
        yield from _paragraphs(file.read_text(encoding="utf-8", errors="replace"))
    elif file.stat().st_size:
        yield from _texts(_rows(file, kind), str(file), column)


def _rows(file: Path, kind: str) -> Iterator[dict]:
    try:
        yield from datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
    except Exception as error:  # the reader raises a dozen types for damage, some name no file
        raise ValueError(f"the corpus file {file} is damaged or no {kind} of one object a row "
                         f"({type(error).__name__}: {error}): restore it") from error


def _paragraphs(text: str, about: int = 2000) -> Iterator[str]:
    """Consecutive paragraphs in documents of `about` characters, so that one file has several."""
    document, size = [], 0
    for paragraph in text.split("\n\n"):
        document.append(paragraph)
        size += len(paragraph)
        if size >= about:
            yield "\n\n".join(document)
            document, size = [], 0
    if size:
        yield "\n\n".join(document)


def _texts(stream: Iterable[dict], corpus: str, column: str) -> Iterator[str]:
    """The texts of the rows; None is passed over."""
    for row in stream:
        if column not in row:
            raise ValueError(f"the corpus {corpus!r} has no text column {column!r}: its columns "
                             f"are {', '.join(row)}; name one with `column`")
        text = row[column]
        if isinstance(text, str):
            yield text
        elif text is not None:
            raise ValueError(f"column {column!r} of {corpus!r} holds a {type(text).__name__} "
                             f"where a string was expected: choose `column` from {', '.join(row)}")


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
    return {name: _cut(streams[name], bos, context, wanted[name], name) for name in streams}


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
    if validation_tokens and not train_tokens:  # all is read, and cached once for any number
        rows = tokens(corpus, tokenizer, context, 0, 0, validation_share, split, column)
        _say_short(corpus, rows, validation=validation_tokens)
        return rows | dict(validation=rows["validation"][:math.ceil(validation_tokens / context)])
    stamp = store.stamp(corpus)
    if corpus == DOCSTRINGS:
        stamp = {name: version(name) for name in PACKAGES}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    sizes = dict(context=context, train_tokens=train_tokens, validation_tokens=validation_tokens,
                 validation_share=validation_share)
    key = store.key(corpus=corpus, stamp=stamp, split=split, column=column, **sizes,
                    tokenizer=backend.to_str() if backend else tokenizer.name_or_path,
                    bos=bos_id(tokenizer), version=VERSION)
    cached = store.CACHE / f"tokens-{key}.safetensors"
    if (rows := store.read_tensors(cached)) is not None:
        return rows
    rows = pack(documents(corpus, split, column), tokenizer, **sizes)
    _say_short(corpus, rows, train=train_tokens, validation=validation_tokens)
    store.write_tensors(cached, rows)
    return rows


def _say_short(corpus: str, rows: dict[str, torch.Tensor], **wanted: int) -> None:
    for name, tokens in wanted.items():
        if rows[name].numel() < tokens:
            tqdm.write(f"the corpus {corpus!r} has {rows[name].numel()} {name} tokens of the "
                       f"{tokens} asked for: it is used whole", file=sys.stderr)
