"""Local files to documents: many formats, read in blocks no further than wanted, any path.

Each format has a reader of its own here, because `datasets.load_dataset` takes brackets, stars and
`::` in a path for patterns, and reads a text file whole.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import pyarrow
from pyarrow import parquet
from tqdm import tqdm

ABOUT = 2000  # characters of a document that is cut from a longer text
LONG = 100_000  # a row with more characters than this is cut, as a text file is
BLOCK = 2**16  # characters of a text that are read at once
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ENDINGS = ".txt, .md, .json, .jsonl, .csv, .parquet, with or without .gz or .zst"
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16",
             codecs.BOM_UTF16_BE: "utf-16"}
WORDS = dict(train="train training", validation="validation valid val dev",
             test="test testing eval evaluation")  # for splits, as on the hub
FORMS = dict.fromkeys((".json", ".jsonl"), "JSON: a list of objects or strings, or one a line")
SPLITS = {word: split for split, words in WORDS.items() for word in words.split()}
SURROGATE = re.compile("[\ud800-\udfff]")
# Bytes that are no text become a lone surrogate at first, so that `sound` counts them too.
codecs.register_error("mark", lambda error: ("\ud800", error.end))


def ending(file: Path) -> str:
    """What tells the format of a file: ".txt" for "A.TXT" and for "a.txt.gz"."""
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
    return name.suffix.lower()


def files(folder: Path, split: str) -> list[Path]:
    """The files of a folder that are corpora: those of the split, or else those that name none.

    Hidden files and editors' checkpoint copies are no corpus. What else is left out is said.
    """
    found = {file: file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()}
    found = {file: name for file, name in found.items() if "-checkpoint." not in name.name
             and not any(part.startswith(".") for part in name.parts)}
    wanted = SPLITS.get(split.lower(), split.lower())
    splits = {file: _split(name, wanted) for file, name in found.items() if ending(file) in READERS}
    if not splits:
        raise ValueError(f"the folder {str(folder)!r} holds no file that ends in {ENDINGS}")
    chosen = [file for file in splits if splits[file] == wanted]
    chosen = chosen or [file for file in splits if splits[file] is None]
    if not chosen:
        raise ValueError(f"the folder {str(folder)!r} holds no file of the split {split!r}, only "
                         f"of {', '.join(sorted(set(splits.values())))}: name one of these with "
                         "`split`, or give a file in it as the corpus")
    if len(found) > len(chosen):
        tqdm.write(f"the folder {str(folder)!r} has {len(found)} files, {len(chosen)} are read: "
                   f"{len(found) - len(splits)} end in none of {ENDINGS}, "
                   f"{len(splits) - len(chosen)} do not belong to split {split!r}", file=sys.stderr)
    return chosen


def _split(name: Path, wanted: str) -> str | None:
    """The split that a path names: at the start of the file's name, or as a folder."""
    if name.name.lower().startswith((f"{wanted}-", f"{wanted}.")):
        return wanted
    first = re.split(r"[-.]|_?\d", name.name.lower())[0]  # "train" of "train_01.txt"
    for word in (first, *(part.lower() for part in reversed(name.parts[:-1]))):
        if word == wanted or word in SPLITS:
            return SPLITS.get(word, word)
    return None


def read(file: Path, column: str) -> Iterator[str]:
    """The documents of a file. Raises ValueError with its name when it is damaged or no corpus."""
    if (kind := ending(file)) not in READERS:
        raise ValueError(f"the corpus file {file} ends in none of {ENDINGS}")
    if READERS[kind] is _blocks:
        return cut(_parts(file, column))
    return texts(_parts(file, column), str(file), column)


def _parts(file: Path, column: str) -> Iterator:
    """The blocks or rows of a file, of an empty one none."""
    kind = ending(file)
    try:
        with open(file, "rb") as stream:
            if compression := COMPRESSIONS.get(file.suffix.lower()):
                stream = io.BufferedReader(pyarrow.CompressedInputStream(stream, compression))
            if start := stream.peek(4):
                mark = next(filter(start.startswith, ENCODINGS), None)
                if kind != ".parquet":
                    stream = io.TextIOWrapper(stream, ENCODINGS.get(mark, "utf-8"), "mark",
                                              newline="" if kind == ".csv" else None)
                with stream:
                    yield from READERS[kind](stream, column)
    except Exception as error:  # readers raise a dozen types for damage, some name no file
        raise ValueError(f"the corpus file {file} is damaged or no {FORMS.get(kind, kind[1:])} "
                         f"({type(error).__name__}: {error}): restore it") from error


def _blocks(text: io.TextIOWrapper, column: str) -> Iterator[str]:
    return iter(partial(text.read, BLOCK), "")


def _json(text: io.TextIOWrapper, column: str) -> Iterator[dict]:
    """The rows of one list, which is read whole, or of one value a line."""
    lines = (line for line in text if line.strip())
    first = next(lines, "[]")
    if first.lstrip().startswith("["):
        values = json.loads(first + text.read())
    else:
        values = map(json.loads, chain([first], lines))
    for value in values:
        if not isinstance(value, (dict, str)):
            raise ValueError(f"a row is a {type(value).__name__}, expected an object or a string")
        yield {column: value} if isinstance(value, str) else value


def _csv(text: io.TextIOWrapper, column: str) -> Iterator[dict]:
    reader = csv.DictReader(text, strict=True)
    while True:
        usual = csv.field_size_limit(2**31 - 1)  # it holds for the whole process: put back at once
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(usual)
        if row is None:
            return
        if None in row:
            raise ValueError(f"line {reader.line_num} has more fields than the first line")
        yield row


def _parquet(stream: io.BufferedReader, column: str) -> Iterator[dict]:
    """The rows; only the text column where it holds strings, whatever their bytes."""
    source = stream if stream.seekable() else pyarrow.BufferReader(stream.read())
    table = parquet.ParquetFile(source, buffer_size=2**20)
    kinds = {field.name: field.type for field in table.schema_arrow}
    strings = kinds.get(column) in (pyarrow.string(), pyarrow.large_string())
    for batch in table.iter_batches(256, columns=[column] if strings else None):
        if strings:
            for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                yield {column: None if value is None else value.decode("utf-8", "mark")}
        else:
            yield from batch.to_pylist()


READERS = {".txt": _blocks, ".md": _blocks, ".json": _json, ".jsonl": _json, ".csv": _csv,
           ".parquet": _parquet}


def texts(rows: Iterable[dict], corpus: str, column: str) -> Iterator[str]:
    """The texts of the rows, very long ones in pieces. Later rows without one are passed over."""
    first = True
    for row in rows:
        if first and column not in row:
            raise ValueError(f"the corpus {corpus!r} has no text column {column!r}: its columns "
                             f"are {', '.join(row)}; name one with `column`")
        first, text = False, row.get(column)
        if isinstance(text, str):
            yield from cut([text]) if len(text) > LONG else [text]
        elif text is not None:
            raise ValueError(f"column {column!r} of {corpus!r} holds a {type(text).__name__} "
                             f"where a string was expected: choose `column` from {', '.join(row)}")


def cut(blocks: Iterable[str], about: int = ABOUT) -> Iterator[str]:
    """The documents of a long text, of `about` characters up to twice as many.

    A document ends at the first blank line after `about` characters; without one at a line's end,
    without that at a space, without that anywhere.
    """
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start >= 2 * about:
            found = ((rest.find(mark, start + about, start + 2 * about), len(mark))
                     for mark in ("\n\n", "\n", " "))
            end, gap = next((place for place in found if place[0] >= 0), (start + about, 0))
            yield rest[start:end]
            start = end + gap
        rest = rest[start:]
    end = rest.find("\n\n", about)
    for document in [rest] if end < 0 else [rest[:end], rest[end + 2:]]:
        if document:
            yield document


def sound(documents: Iterable[str], corpus: str) -> Iterator[str]:
    """The documents with U+FFFD for what is no text, and a line that says how often that was.

    A lone surrogate, as JSON can hold, has no bytes: no hash and no tokenizer takes it.
    """
    replaced = 0
    try:
        for document in documents:
            try:
                document.encode()
            except UnicodeEncodeError:
                document, times = SURROGATE.subn("\ufffd", document)
                replaced += times
            yield document
    finally:  # also when the reader stops before the end
        if replaced:
            tqdm.write(f"the corpus {corpus!r} holds {replaced} characters or bytes that are no "
                       "Unicode text: U+FFFD stands in their places", file=sys.stderr)
