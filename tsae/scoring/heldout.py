"""Held-out positions and the rules that group them: by suffix, by place, by kind of text.

One `Text` is prepared once and shared by the scores of all SAEs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from tsae.features import where

LEVELS = 4  # the ladder's longest suffix, in tokens
OF_TOKEN = {  # what a token can be: its own text matches as a whole
    "a number": r"\s*\d[\d.,]*", "capitalised": r"\s*[A-Z][a-z]+",
    "upper case": r"\s*[A-Z][A-Z\d_]+", "punctuation": r"\s*[^\w\s]+", "white space": r"\s+",
    "with a line break": r"[^\n]*\n.*", "after a space": r" \S.*", "a lower-case piece": r"[a-z]+",
    "a bracket": r"\s*[()\[\]{}]+", "a quote or backtick": r"\s*['\"`]+",
    "with an underscore": r".*_.*", "not ASCII": r".*[^\x00-\x7f].*",
}
# What a token can stand in: it overlaps a match in the text of its document, or the match's group
# where the pattern has one. What is opened and not yet closed matches too.
OF_TEXT = {
    "inside backticks": r"`([^`\n]+)`?", "inside brackets": r"[(\[{]([^()\[\]{}\n]+)",
    "inside quotes": r"(?<!\w)(?:\"([^\"\n]+)\"?|'([^'\n]+)'?)",
    "in code": r"(?ms)^[ \t]*(?:>>>|\.\.\. )[^\n]*|```.*?(?:```|\Z)"
               r"|::[ \t]*\n[ \t]*\n((?:[ \t]+[^\n]*\n?|\n)+)",
    "in a parameter list":
        r"(?ms)^[ \t]*(?:Parameters|Arguments|Args|Attributes):?[ \t]*\n(.+?)"
        r"(?=\n[ \t]*(?:Returns?|Yields|Raises|Examples?|Notes?|References|See Also)\b|\Z)",
    "in camelCase": r"\b[a-z]*(?:[A-Z][a-z\d]+){2,}\w*|\b[a-z]+[A-Z]\w*",
    "in snake_case": r"\b\w*[a-zA-Z\d]_\w+", "in a dotted name": r"\w+\.(\w[\w.]*)",
    "in a link": r"https?://\S+", "in indentation": r"(?m)^[ \t]+",
    "first of a line": r"(?m)^[ \t]*(\S)",
    "first of a sentence": r"(?:\A|[.!?]\s+|\n[ \t]*\n)\s*(\w)",
}
OCCURRENCES = "first occurrence", "second occurrence", "later occurrence"  # of its token in it
ATTRIBUTES = {*OF_TOKEN, *OF_TEXT, *OCCURRENCES}


class Rule(NamedTuple):
    """A way to group positions: its name, each position's group (m,), and a group in words."""

    name: str
    ids: np.ndarray
    tell: Callable[[int], str]


@dataclass(frozen=True)
class Text:
    """m held-out positions, in the order of the pairs, and R rules that group them.

    t, row, column, document (m,) int64; fit (m,) bool: the half that is fitted on. names, tell,
    ids (R, m) int32: the rules; suffixes of 1 .. LEVELS tokens come first. word: the text of a
    token id.
    """

    t: np.ndarray
    row: np.ndarray
    column: np.ndarray
    document: np.ndarray
    fit: np.ndarray
    names: list[str]
    ids: np.ndarray
    tell: list[Callable[[int], str]]
    word: Callable[[int], str]

    def describe(self, rule: int, group: int) -> str:
        """A group of a rule in words."""
        return self.tell[rule](group)

    def take(self, mask: np.ndarray) -> "Text":
        """The positions of a mask (m,) bool; groups keep their ids."""
        return replace(self, t=self.t[mask], row=self.row[mask], column=self.column[mask],
                       document=self.document[mask], fit=self.fit[mask], ids=self.ids[:, mask])

    @property
    def attributes(self) -> list[int]:
        """The rules that are yes/no attributes: group 1 is yes."""
        return [rule for rule, name in enumerate(self.names) if name in ATTRIBUTES]


def prepare(rows: torch.Tensor, keep: torch.Tensor, tokenizer, seed: int = 0) -> Text:
    """The `Text` of token rows (N, T) of which `keep` (N, T) bool marks the positions that count.

    Half of the positions, in whole documents (see `documents`) drawn by `seed`, are fitted on.
    """
    (row, column), t = where(keep).T, rows[keep].numpy().astype(np.int64)
    document = documents(keep)[row, column]
    tokens, token = np.unique(t, return_inverse=True)
    words, places = _words(tokens, tokenizer), np.arange(len(t))
    follows = np.r_[False, (row[1:] == row[:-1]) & (column[1:] == column[:-1] + 1)][:len(t)]
    begin = np.maximum.accumulate(np.where(follows, 0, places))  # where its stretch of text begins
    rules = [*_suffixes(token, begin, words), *_contexts(token, begin, words), _columns(column),
             *_attributes(token, begin, words)]
    names, ids, tell = map(list, zip(*rules))
    word = dict(zip(tokens.tolist(), words)).get
    fit = half(document, seed)
    return Text(t, row, column, document, fit, names, np.array(ids, np.int32), tell, word)


def documents(keep: torch.Tensor) -> np.ndarray:
    """The number of each position's document (N, T), of rows of which `keep` (N, T) bool count.

    Documents end at positions inside a row that do not count; where that gives fewer than 20, rows
    are documents.
    """
    ends = ~keep.numpy()
    ends[:, 0] = False
    document = ends.cumsum().reshape(ends.shape)
    if len(np.unique(document[keep.numpy()])) < 20:
        return np.repeat(np.arange(len(keep))[:, None], keep.shape[1], axis=1)
    return document


def half(document: np.ndarray, seed: int) -> np.ndarray:
    """True (m,) in about half of the positions, in whole documents."""
    names, which, sizes = np.unique(document, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = np.zeros(len(names), bool)
    chosen[order] = sizes[order].cumsum() - sizes[order] / 2 < len(document) / 2
    return chosen[which]


def _words(tokens: np.ndarray, tokenizer) -> list[str]:
    """Each token's text as it stands after another: some tokenizers drop a leading space first."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    start = len(tokenizer.decode(anchor))
    return [tokenizer.decode([*anchor, token])[start:] for token in tokens.tolist()]


def _earlier(ids: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """The id (m,) of the position before; 0 where the text begins."""
    return np.where(begin < np.arange(len(begin)), np.r_[0, ids[:-1]], 0)


def _suffixes(token: np.ndarray, begin: np.ndarray, words: list[str]) -> list[Rule]:
    """The last 1 .. LEVELS tokens. The start of the text counts as a token, nothing before it does.

    Ids are in the order of the shorter suffix: what is sorted by the longest is sorted by all.
    """
    rules, key = [], token
    for n in range(1, LEVELS + 1):
        _, first, ids = np.unique(key, return_index=True, return_inverse=True)
        name = f"the last {n} tokens" if n > 1 else "the token"
        rules.append(Rule(name, ids, partial(_tell_suffix, n, first, token, begin, words)))
        before = _earlier(ids + 1, begin)
        key = ids * (before.max(initial=0) + 1) + before
    return rules


def _tell_suffix(n: int, first, token, begin, words, group: int) -> str:
    """The n tokens that end where the group is seen first."""
    last = first[group]
    start = max(last - n + 1, begin[last])
    told = repr("".join(words[i] for i in token[start:last + 1]))
    return told if last - start == n - 1 else "the start " + told


def _contexts(token: np.ndarray, begin: np.ndarray, words: list[str]) -> list[Rule]:
    """The token before; the token with the second before, whatever stands between."""
    before = _earlier(token + 1, begin)
    second = _earlier(before, begin)
    told = ["the start", *map(repr, words)]
    _, first, ids = np.unique(token * len(told) + second, return_index=True, return_inverse=True)
    pairs = [f"{told[second[i]]} _ {told[token[i] + 1]}" for i in first]
    return [Rule("the token before", before, told.__getitem__),
            Rule("the token and the second before", ids, pairs.__getitem__)]


def _columns(column: np.ndarray) -> Rule:
    """The place in the row: each of the first 8, then eights."""
    told = [f"column {i}" for i in range(8)]
    told += [f"columns {i}-{i + 7}" for i in range(8, column.max(initial=0) + 1, 8)]
    return Rule("the column", np.where(column < 8, column, 7 + column // 8), told.__getitem__)


def _attributes(token: np.ndarray, begin: np.ndarray, words: list[str]) -> list[Rule]:
    """Yes/no: OF_TOKEN, OF_TEXT and OCCURRENCES."""
    flags = {}
    for name, pattern in OF_TOKEN.items():
        flags[name] = np.array([bool(re.fullmatch(pattern, word, re.S)) for word in words])[token]
    flags |= _of_text([words[i] for i in token], begin)
    nth = pd.Series(token).groupby([begin, token]).cumcount().to_numpy()
    flags |= dict(zip(OCCURRENCES, (nth == 0, nth == 1, nth > 1)))
    return [Rule(name, flag, [f"not {name}", name].__getitem__) for name, flag in flags.items()]


def _of_text(pieces: list[str], begin: np.ndarray) -> dict[str, np.ndarray]:
    """{name: (m,) bool} of OF_TEXT, from the text of every position."""
    flags, starts = {name: np.zeros(len(pieces), bool) for name in OF_TEXT}, np.unique(begin)
    for first, last in zip(starts, [*starts[1:], len(pieces)]):
        text = "".join(pieces[first:last])
        ends = np.cumsum([0, *map(len, pieces[first:last])])
        for name, pattern in OF_TEXT.items():
            marked = np.zeros(len(text) + 1, np.int32)
            for match in re.finditer(pattern, text):
                start, end = match.span(match.lastindex or 0)
                marked[start + 1:end + 1] = 1
            total = marked.cumsum()
            flags[name][first:last] = total[ends[1:]] > total[ends[:-1]]
    return flags
