"""Oracle: files written by hand, in every format; the cutting of texts as one would describe it."""

import csv
import gzip
import json
from itertools import chain, islice

import pyarrow as pa
import pytest
from pyarrow import parquet

from tsae import corpus, text

TEXTS = ["First, 'quoted'.\n", "Zweites Dokument: äöü €\nin two lines", "\tthird \"one\", and more", ""]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "\n".join(json.dumps(row) for row in ROWS)


def squeezed(raw: bytes, how: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, how) as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


def written(path, rows=ROWS):
    """`path` with the rows, in the format that its name tells."""
    kinds = path.name.lower().split(".")
    how = {"gz": "gzip", "zst": "zstd"}.get(kinds[-1])
    kind = kinds[-2] if how else kinds[-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows, schema=pa.schema(dict(id=pa.int64(), text=pa.string()))), sink)
        raw = sink.getvalue().to_pybytes()
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["id", "text"])
            table.writeheader()
            table.writerows(rows)
        raw = path.read_bytes()
    else:
        raw = {"json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows))}.get(
            kind, "\n".join(row["text"] for row in rows)).encode()
    path.write_bytes(squeezed(raw, how) if how else raw)
    return path


def read(path, **given):
    return list(text.documents(str(path), **given))


@pytest.mark.parametrize("more", ["", ".gz", ".ZST"])
@pytest.mark.parametrize("name", ["a.json", "A.JsonL", "a.csv", "a.parquet", "a.TXT", "a.md"])
def test_every_format_gives_its_documents(tmp_path, name, more):
    path = written(tmp_path / "folder" / f"{name}{more}")
    expected = ["\n".join(TEXTS)] if name in ("a.TXT", "a.md") else TEXTS
    assert read(path) == read(path.parent) == expected


@pytest.mark.parametrize("content", [
    json.dumps(ROWS), json.dumps(TEXTS), json.dumps(ROWS, indent=2), LINES, LINES.replace("\n", "\r\n\n") + "\n",
    "\n".join(map(json.dumps, TEXTS)), "\n \n" + json.dumps(TEXTS, indent=1, ensure_ascii=False)])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_is_a_list_or_a_value_a_line(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read(tmp_path / name) == TEXTS


def test_rows_without_a_text_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"other": 1}\n{"text": "two"}')
    assert read(tmp_path / "a.jsonl") == ["one", "two"]


def test_long_fields_of_csv_are_read_and_the_limit_of_others_stays(tmp_path):
    usual, rows = csv.field_size_limit(), [{"id": i, "text": f"{i} " * 100_000} for i in range(3)]
    for name in ("a.csv", "b.csv"):
        written(tmp_path / name, rows)
    found = text.documents(f"{tmp_path / 'a.csv'}+{tmp_path / 'b.csv'}")  # both in turn
    assert next(found).startswith("0 0 0") and csv.field_size_limit() == usual
    assert sum(map(len, found)) > 1_100_000 and csv.field_size_limit() == usual


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_of_parquet_in_any_column(tmp_path, kind):
    for column in ("text", "a.b", "text with [1]"):
        table = pa.table({column: pa.array(["one", None, "two"]).cast(kind), "other": [{"text": 1}] * 3})
        parquet.write_table(table, tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet", column=column) == ["one", "two"]
    with pytest.raises(ValueError, match="no text column 'text': its columns are text with .1., other"):
        read(tmp_path / "a.parquet")


def naive_cut(whole, about):
    """What `cut` promises, on a text that is there whole."""
    found = []
    while len(whole) >= 2 * about:
        for mark in ("\n\n", "\n", " ", ""):
            if mark in whole[about:2 * about]:
                end = about + whole[about:2 * about].index(mark)
                break
        found.append(whole[:end])
        whole = whole[end + len(mark):]
    if "\n\n" in whole[about:]:
        end = about + whole[about:].index("\n\n")
        found.append(whole[:end])
        whole = whole[end + 2:]
    return [*found, whole] if whole else found


@pytest.mark.parametrize("whole", [
    "x" * 1234, "word " * 400, "a line of it\n" * 200, "".join(f"paragraph {i}" + "\n" * (i % 4) for i in range(300)),
    "short", "", "\n" * 500, "ä" * 90 + "\n\n" + "b" * 300 + " " + "c" * 99, "x" * 199 + "\n\n", "x" * 101 + "\n\ny"])
def test_a_text_is_cut_at_the_best_place_whatever_the_blocks(whole):
    expected = naive_cut(whole, 100)
    for size in (1, 7, 64, 5000):
        blocks = [whole[i:i + size] for i in range(0, len(whole), size)]
        assert list(corpus.cut(iter(blocks), 100)) == expected
    assert all(len(document) < 201 for document in expected)
    assert "".join(chain.from_iterable(d.split() for d in expected)) == "".join(whole.split())


def test_reading_goes_no_further_than_wanted(tmp_path):
    """The end of each file is damaged: who stops before it does not see that."""
    random = "".join(chr(97 + i * i * i % 26) + (" " if i * i % 7 == 3 else "") for i in range(1_000_000))
    noise = gzip.compress(random.encode())
    (tmp_path / "a.txt.gz").write_bytes(noise[:-9])
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": random[:500]})] * 3000) + "\n{")
    (tmp_path / "a.csv").write_text("id,text\n" + "\n".join(["1,some text"] * 30_000) + '\n2,"more')
    for name in ("a.txt.gz", "a.jsonl", "a.csv"):
        documents = text.documents(str(tmp_path / name))
        assert len(list(islice(documents, 20))) == 20
        with pytest.raises(ValueError, match=f"(?s)the corpus file .*{name} is damaged .*restore it"):
            list(documents)


def test_a_very_long_row_is_cut_and_a_long_one_is_not(tmp_path):
    rows = [{"id": 1, "text": "word " * 20_000}, {"id": 2, "text": "word " * 20_001}]
    for name in ("a.json", "a.csv", "a.parquet"):
        found = read(written(tmp_path / name, rows))
        assert found[0] == rows[0]["text"] and all(len(document) < 4001 for document in found[1:])
        assert " ".join(found[1:]) == rows[1]["text"]


@pytest.mark.parametrize("split, files, read_ones", [
    ("train", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
     [0, 1]),
    ("test", ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md"], [1]),
    ("train", ["default/test/0000.parquet", "default/train/0000.parquet"], [1]),
    ("test", ["test/0000.parquet", "train/0000.parquet"], [0]),
    ("validation", ["train.jsonl", "val.jsonl"], [1]), ("dev", ["train/a.csv", "validation/a.csv"], [1]),
    ("train", ["test_1.txt", "train_1.txt", "train_2.txt"], [1, 2]), ("train", ["TRAIN.TXT", "test.txt"], [0]),
    ("train_sft", ["data/train_gen-0.parquet", "data/train_sft-0.parquet"], [1]), ("en-de", ["en-de.txt", "en-fr.txt"], [0]),
    ("train", ["a.txt", "b/c.txt", "training day.txt", "contest.txt"], [0, 1, 3, 2]),
    ("train", ["a.txt", "test.txt"], [0]),  # the file that names no split, never the test
    ("train", ["a.txt", ".git/b.txt", ".hidden.txt", ".ipynb_checkpoints/a-checkpoint.txt", "a-checkpoint.txt"], [0])])
def test_a_folder_is_read_by_split(tmp_path, split, files, read_ones):
    for name in files:
        written(tmp_path / name, [{"id": 0, "text": name}])
    assert read(tmp_path, split=split) == [files[i] for i in read_ones]


def test_what_a_folder_leaves_out_is_said(tmp_path, capsys):
    for name in ("train.txt", "test.txt", "a.pdf", "b.pdf", "c"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["train.txt"]
    said, = capsys.readouterr().err.splitlines()
    assert "has 5 files, 1 are read: 3 end in none of .txt" in said and "1 do not belong to split 'train'" in said
    for name in ("a.pdf", "b.pdf", "c", "test.txt"):
        (tmp_path / name).unlink()
    assert read(tmp_path) == ["train.txt"] and not capsys.readouterr().err
    with pytest.raises(ValueError, match="no file of the split 'test', only of train: name one of these with `split`"):
        read(tmp_path, split="test")


def test_empty_files_are_skipped(tmp_path):
    for name in ("a.txt", "b.json", "c.jsonl", "d.csv", "e.parquet", "f.txt.gz", "g.parquet.zst"):
        (tmp_path / name).write_bytes(b"")
    for name, how in (("h.json.gz", "gzip"), ("i.csv.zst", "zstd"), ("j.parquet.gz", "gzip")):
        (tmp_path / name).write_bytes(squeezed(b"", how))
    for name in ("k.parquet", "l.json", "m.csv", "n.parquet.gz"):
        written(tmp_path / name, [])
    (tmp_path / "o.jsonl").write_text("\n\n")
    written(tmp_path / "p.jsonl")
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("name", ["a[1]", "b*c?", "d::e", "fü g#h", "100%", "i+j", "k{x,y}", "l'm\"n", "hf:o@p", "q&r;s"])
def test_paths_hold_any_characters(tmp_path, name):
    for kind in ("json", "jsonl.gz", "csv", "parquet", "parquet.zst"):
        path = written(tmp_path / kind / name / f"{name}.{kind}")
        assert read(path) == read(path.parent) == TEXTS


@pytest.mark.parametrize("name, damage", [
    ("a.json", lambda raw: raw[:-3]), ("a.json", lambda raw: raw + raw), ("a.jsonl", lambda raw: raw[:-3]),
    ("a.jsonl", lambda raw: b"[1, 2]\n" + raw), ("a.jsonl", lambda raw: raw + b"\n5"), ("a.json", lambda raw: b"{\n" + raw),
    ("a.csv", lambda raw: raw + b'9,"open'), ("a.csv", lambda raw: raw + b"9,a,comma\n"),
    ("a.parquet", lambda raw: raw[:-9]), ("a.parquet", lambda raw: raw[:4] + bytes(len(raw) - 400) + raw[-396:]),
    ("a.parquet", lambda raw: b"PAR1"), ("a.parquet.gz", lambda raw: raw[:-9]), ("a.txt.gz", lambda raw: raw[:-9]),
    ("a.txt.gz", lambda raw: b"no gzip"), ("a.csv.zst", lambda raw: raw[:-3]), ("a.md.zst", lambda raw: b"no zstd")])
def test_damaged_files_are_named(tmp_path, name, damage):
    path = written(tmp_path / name)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"(?s)the corpus file .*{name} is damaged or no .*: restore it"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("more", ["", ".gz"])
def test_marks_at_the_start_tell_the_encoding(tmp_path, capsys, encoding, more):
    mark = "\ufeff" if encoding.endswith("e") else ""
    for name, content, expected in (
            ("a.txt", "Grüße, 你好 😀\nzwei", ["Grüße, 你好 😀\nzwei"]),
            ("a.json", json.dumps(TEXTS, ensure_ascii=False), TEXTS), ("a.jsonl", LINES, TEXTS),
            ("a.csv", "id,text\n1,größer\n", ["größer"])):
        raw = f"{mark}{content}".encode(encoding)
        (tmp_path / f"{name}{more}").write_bytes(gzip.compress(raw) if more else raw)
        assert read(tmp_path / f"{name}{more}") == expected
    assert not capsys.readouterr().err


def test_what_is_no_text_is_replaced_counted_and_said(tmp_path, capsys):
    bad = pa.array([b"a\xffb", b"fine", None]).cast(pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, bad.buffers())
    parquet.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    for name, raw, expected, count in (
            ("a.jsonl", b'{"text": "a\\ud800b \\ud83d\\ude00 \\udc00"}\n"\xff"', ["a\ufffdb 😀 \ufffd", "\ufffd"], 3),
            ("a.txt", "ä€".encode()[:-1] + b" z \xff\xfe" * 20_000, ["ä\ufffd" + " z \ufffd\ufffd"], 40_001),
            ("b.txt", "\ufeffa".encode("utf-16-le") + b"\x00\xd8b\x00", ["a\ufffdb"], 1),
            ("a.csv", b"text\na\xffb\n", ["a\ufffdb"], 1), ("a.parquet", None, ["a\ufffdb", "fine"], 1),
            ("c.txt", "an honest \ufffd".encode(), ["an honest \ufffd"], 0)):
        if raw is not None:
            (tmp_path / name).write_bytes(raw)
        found = read(tmp_path / name)
        assert [document[:len(start)] for document, start in zip(found, expected)] == expected
        assert len(found) == len(expected) or name == "a.txt"
        said = capsys.readouterr().err.splitlines()
        assert len(said) == (count > 0) and (not said or f"holds {count} characters or bytes that are no Unicode" in said[0])
        assert text.fingerprint(found) and not any(text.is_validation(document, 0.0) for document in found)
