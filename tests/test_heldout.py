"""Oracles: groups of positions against naive loops over tuples and text."""

import pickle
import re

import numpy as np
import torch
from conftest import byte_tokenizer
from streams import naive_suffix, noisy

from tsae.scoring import heldout


def test_suffix_groups_equal_tuples():
    _, text = noisy()
    for n in range(1, 5):
        names = [naive_suffix(text, p, n) for p in range(len(text.t))]
        pairs = set(zip(names, text.ids[n - 1].tolist()))
        assert len(pairs) == len(set(names)) == len({group for _, group in pairs})
        nested = sorted(zip(text.ids[n - 1].tolist(), text.ids[0].tolist()))
        assert [token for _, token in nested] == sorted(token for _, token in nested), "nested"
    for rule, offset in ((4, 1), (5, 2)):
        names = [(naive_suffix(text, p, offset + 1) + ("start",))[offset] for p in range(len(text.t))]
        names = list(zip(names, text.t if rule == 5 else names))
        assert len(set(zip(names, text.ids[rule]))) == len(set(names)) == len(set(text.ids[rule]))


def test_documents_are_split_whole_and_in_half():
    _, text = noisy()
    assert 0.4 < text.fit.mean() < 0.6
    for document in np.unique(text.document):
        assert len(np.unique(text.fit[text.document == document])) == 1
    assert len(np.unique(text.document)) > 20 and len(np.unique(text.document)) != len(np.unique(text.row))


def test_attributes_know_the_text():
    lines = ["See `foo_bar` now. Then go", "", "Parameters", "----------", "x1 : int (or None)", "Returns",
             "    fooBar", ">>> a.b"]
    tokenizer = byte_tokenizer()
    rows = torch.tensor([[0, *tokenizer.encode("\n".join(lines))]])
    text = heldout.prepare(rows, rows != 0, tokenizer)
    said = "".join(text.word(int(i)) for i in text.t)
    assert said == "\n".join(lines)

    def marked(name: str) -> str:
        return "".join(letter if on else "·" for letter, on in zip(said, text.ids[text.names.index(name)])).strip("·")

    assert marked("inside backticks").rstrip("`") == "foo_bar" and marked("inside brackets") == "or None"
    assert marked("in a parameter list").startswith("----") and marked("in a parameter list").endswith("or None)")
    assert marked("in code") == ">>> a.b" and marked("in camelCase") == "fooBar" and marked("in a dotted name") == "b"
    assert marked("in indentation") == "    " and marked("a number") == "1" and marked("in snake_case") == "foo_bar"
    assert re.sub("·+", " ", marked("first of a sentence")) == "S T P"
    occurrence = {name: text.ids[text.names.index(name)].astype(bool) for name in heldout.OCCURRENCES}
    for i, token in enumerate(text.t):
        before = int((text.t[:i] == token).sum())
        assert [bool(flag[i]) for flag in occurrence.values()] == [before == 0, before == 1, before > 1]


def naive_telling(text, rule: int, p: int) -> str:
    """The group of a position in words."""
    name, suffix = text.names[rule], naive_suffix(text, p, max(rule + 1, 4))
    words = ["the start" if token == "start" else text.word(int(token)) for token in (*suffix, "start", "start")]
    quoted = [word if word == "the start" else repr(word) for word in words]
    if rule < heldout.LEVELS:
        its = [word for word in reversed(words[:rule + 1]) if word != "the start"]
        return ("the start " if len(its) < rule + 1 else "") + repr("".join(its))
    if name == "the token before":
        return quoted[1]
    if name == "the token and the second before":
        return f"{quoted[2]} _ {quoted[0]}"
    if name == "the column":
        first = text.column[p] // 8 * 8
        return f"columns {first}-{first + 7}" if first else f"column {text.column[p]}"
    return name if text.ids[rule, p] else f"not {name}"


def test_groups_are_told_in_words():
    _, text = noisy()
    for p in range(0, len(text.t), 7):
        for rule in range(len(text.names)):
            assert text.describe(rule, int(text.ids[rule, p])) == naive_telling(text, rule, p)


def test_taken_positions_keep_their_groups():
    _, text = noisy()
    mask = text.column % 3 == 0
    for part in (text.take(mask), pickle.loads(pickle.dumps(text)).take(mask)):
        for name in ("t", "row", "column", "document", "fit"):
            assert np.array_equal(getattr(part, name), getattr(text, name)[mask])
        assert np.array_equal(part.ids, text.ids[:, mask]) and part.names == text.names
        assert part.describe(3, int(part.ids[3, 5])) == naive_telling(text, 3, np.flatnonzero(mask)[5])
        assert part.word(int(part.t[0])) == text.word(int(part.t[0]))
    assert [text.names[rule] for rule in text.attributes] == [*heldout.OF_TOKEN, *heldout.OF_TEXT, *heldout.OCCURRENCES]
