"""Held-out positions and the ways to group them, shared by the scores of all SAEs: suffixes, places, kinds of text."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from tsae.features import where

LEVELS = 4  # the ladder's longest suffix, in tokens
# What a token can be, by its own text (whole match), and what it can stand in, by the text of its document in the row:
# it overlaps a match, or the match's group where there is one. Patterns also match what is still open.
OF_TOKEN = {
    "a number": r"\s*\d[\d.,]*", "capitalised": r"\s*[A-Z][a-z]+", "upper case": r"\s*[A-Z][A-Z\d_]+",
    "punctuation": r"\s*[^\w\s]+", "white space": r"\s+", "with a line break": r"[^\n]*\n.*", "after a space": r" \S.*",
    "a lower-case piece": r"[a-z]+", "a bracket": r"\s*[()\[\]{}]+", "a quote or backtick": r"\s*['\"`]+",
    "with an underscore": r".*_.*", "not ASCII": r".*[^\x00-\x7f].*",
}
OF_TEXT = {
    "inside backticks": r"`([^`\n]+)`?", "inside brackets": r"[(\[{]([^()\[\]{}\n]+)",
    "inside quotes": r"(?<!\w)(?:\"([^\"\n]+)\"?|'([^'\n]+)'?)",
    "in code": r"(?ms)^[ \t]*(?:>>>|\.\.\. )[^\n]*|```.*?(?:```|\Z)|::[ \t]*\n[ \t]*\n((?:[ \t]+[^\n]*\n?|\n)+)",
    "in a parameter list": r"(?ms)^[ \t]*(?:Parameters|Arguments|Args|Attributes):?[ \t]*\n(.+?)"
                           r"(?=\n[ \t]*(?:Returns?|Yields|Raises|Examples?|Notes?|References|See Also)\b|\Z)",
    "in camelCase": r"\b[a-z]*(?:[A-Z][a-z\d]+){2,}\w*|\b[a-z]+[A-Z]\w*", "in snake_case": r"\b\w*[a-zA-Z\d]_\w+",
    "in a dotted name": r"\w+\.(\w[\w.]*)", "in a link": r"https?://\S+", "in indentation": r"(?m)^[ \t]+",
    "first of a line": r"(?m)^[ \t]*(\S)", "first of a sentence": r"(?:\A|[.!?]\s+|\n[ \t]*\n)\s*(\w)",
}
OCCURRENCES = ("first occurrence", "second occurrence", "later occurrence")  # of the token, in its document and row


@dataclass(frozen=True)
class Text:
    """m held-out positions and the ways in which they can be grouped; all arrays follow the order of the pairs.

    t, row, column, document (m,) int64; fit (m,) bool: the half that is fitted on; ids (R, m) int32: the group of each
    position under each of R rules, named by `names`: the last 1 .. 4 tokens first (of one document; its start counts as
    a token, nothing before it does), then other tokens, the place in the row, and yes/no attributes; describe(rule,
    group): that group in words; word(token id): its text.
    """

    t: np.ndarray
    row: np.ndarray
    column: np.ndarray
    document: np.ndarray
    fit: np.ndarray
    names: list[str]
    ids: np.ndarray
    describe: Callable[[int, int], str]
    word: Callable[[int], str]

    def take(self, mask: np.ndarray) -> "Text":
        """The positions of a mask (m,) bool; groups keep their ids."""
        return replace(self, ids=self.ids[:, mask], **{name: getattr(self, name)[mask]
                                                       for name in ("t", "row", "column", "document", "fit")})

    @property
    def attributes(self) -> list[int]:
        """The rules that are yes/no attributes."""
        return [i for i, name in enumerate(self.names) if name in OF_TOKEN | OF_TEXT or name in OCCURRENCES]


def prepare(rows: torch.Tensor, keep: torch.Tensor, tokenizer, seed: int = 0) -> Text:
    """The `Text` of token rows (N, T) of which `keep` (N, T) bool marks the positions that count.

    Documents end at positions inside a row that do not count (BOS); where that gives fewer than 20, rows are documents.
    Half of the positions, in whole documents drawn by `seed`, are fitted on.
    """
    (row, column), t = where(keep).T, rows[keep].numpy().astype(np.int64)
    ends = (~keep.numpy()).copy()
    ends[:, 0] = False
    document = ends.cumsum().reshape(ends.shape)[row, column]
    if len(np.unique(document)) < 20:
        document = row.copy()
    follows = np.r_[False, (row[1:] == row[:-1]) & (column[1:] == column[:-1] + 1)][:len(t)]
    tokens, token = np.unique(t, return_inverse=True)
    suffixes = [token]
    for _ in range(LEVELS - 1):  # ids in the order of the shorter suffix: sorted by the longest is sorted by all
        before = np.where(follows, np.r_[0, suffixes[-1][:-1]] + 1, 0)
        suffixes.append(np.unique(suffixes[-1] * (before.max(initial=0) + 1) + before, return_inverse=True)[1])
    back = [np.where(follows, np.r_[0, token[:-1]] + 1, 0)]
    back.append(np.where(follows, np.r_[0, back[0][:-1]], 0))
    skip = np.unique(token * (len(tokens) + 1) + back[1], return_inverse=True)[1]
    words = dict(zip(tokens.tolist(), _words(tokens, tokenizer)))
    flags = _attributes([words[i] for i in t.tolist()], follows, t)
    names = ["the token", *(f"the last {n} tokens" for n in range(2, LEVELS + 1)), "the token before",
             "the token and the second before", "the column", *flags]
    ids = np.array([*suffixes, back[0], skip, np.where(column < 8, column, 7 + column // 8), *flags.values()], np.int32)

    seen = {}
    for rule in (*range(LEVELS), LEVELS + 1):  # where each group of suffixes is seen first
        seen[rule] = np.zeros(int(ids[rule].max(initial=0)) + 1, np.int64)
        seen[rule][ids[rule][::-1]] = np.arange(len(t))[::-1]

    def describe(rule: int, group: int) -> str:
        if rule >= LEVELS + 3:
            return ("" if group else "not ") + names[rule]
        if rule == LEVELS + 2:
            return f"column {group}" if group < 8 else f"columns {8 * (group - 7)}-{8 * (group - 7) + 7}"
        if rule == LEVELS:
            return repr(words[tokens[group - 1]]) if group else "the start"
        at = int(seen[rule][group])
        if rule == LEVELS + 1:
            return f"{repr(words[t[at - 2]]) if back[1][at] else 'the start'} _ {words[t[at]]!r}"
        first = at
        while first > at - rule and follows[first]:
            first -= 1
        return ("the start " if at - first < rule else "") + repr("".join(words[i] for i in t[first:at + 1].tolist()))

    return Text(t, row, column, document, half(document, seed), names, ids, describe, words.get)


def half(document: np.ndarray, seed: int) -> np.ndarray:
    """True (m,) in about half of the positions, in whole documents."""
    names, which, sizes = np.unique(document, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = np.zeros(len(names), bool)
    chosen[order] = sizes[order].cumsum() - sizes[order] / 2 < len(document) / 2
    return chosen[which]


def _words(tokens: np.ndarray, tokenizer) -> list[str]:
    """Each token's text as it stands after another: some tokenizers drop a leading space at the start of a text."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    start = len(tokenizer.decode(anchor))
    return [tokenizer.decode([*anchor, token])[start:] for token in tokens.tolist()]


def _attributes(pieces: list[str], follows: np.ndarray, t: np.ndarray) -> dict[str, np.ndarray]:
    """{name: (m,) bool} of OF_TOKEN, OF_TEXT and OCCURRENCES, from the text of every position."""
    distinct = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    which = np.array([distinct[piece] for piece in pieces], np.int64)
    flags = {name: np.array([bool(re.fullmatch(pattern, piece, re.S)) for piece in distinct], bool)[which]
             for name, pattern in OF_TOKEN.items()}
    flags |= {name: np.zeros(len(pieces), bool) for name in OF_TEXT}
    patterns = {name: re.compile(pattern) for name, pattern in OF_TEXT.items()}
    starts = np.flatnonzero(~follows)
    for first, last in zip(starts, np.r_[starts[1:], len(pieces)]):
        text = "".join(pieces[first:last])
        ends = np.cumsum([0, *map(len, pieces[first:last])])
        for name, pattern in patterns.items():
            marked = np.zeros(len(text) + 1, np.int32)
            for match in pattern.finditer(text):
                start, end = match.span(match.lastindex or 0)
                marked[start + 1:end + 1] = 1
            total = marked.cumsum()
            flags[name][first:last] = total[ends[1:]] > total[ends[:-1]]
    document = np.cumsum(~follows)
    order = np.lexsort((t, document))  # stable: equal tokens stay in the order of the text
    new = np.r_[True, (np.diff(t[order]) != 0) | (np.diff(document[order]) != 0)][:len(t)]
    nth = np.empty(len(t), np.int64)
    nth[order] = np.arange(len(t)) - np.maximum.accumulate(np.where(new, np.arange(len(t)), 0))
    return flags | dict(zip(OCCURRENCES, (nth == 0, nth == 1, nth > 1)))
