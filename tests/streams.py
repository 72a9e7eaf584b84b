"""Synthetic streams of letters: features planted in them, and noise for naive loops."""

import numpy as np
import torch
from conftest import byte_tokenizer
from scipy.sparse import csc_array

from tsae.scoring import heldout

TOKEN, BIGRAM, SKIP, TOPIC, PLACE, DEAD = range(6)


def stream(seed: int = 0, N: int = 320, T: int = 64, letters: str = "abcdefghij"):
    """Rows of random letters (each a document) and their planted codes (m, 6)."""
    random, tokenizer = np.random.default_rng(seed), byte_tokenizer()
    ids = np.array(tokenizer.encode(letters))
    rows = np.c_[np.zeros((N, 1), int), random.choice(ids, (N, T - 1))]
    letter = dict(zip(letters, ids))
    shifted = [np.pad(rows, ((0, 0), (by, 0)))[:, :T] for by in range(3)]
    topical = (random.random((N, 1)) < 0.4) & (random.random((N, T)) < 0.3)
    place = np.tile((np.arange(T) >= 16) & (np.arange(T) < 24), (N, 1))
    fires = np.stack([rows == letter["a"], (shifted[1] == letter["b"]) & (rows == letter["c"]),
                      (shifted[2] == letter["d"]) & (rows == letter["e"]), topical, place, place & False], -1)
    codes = fires * random.uniform(0.9, 1.1, fires.shape).astype(np.float32)
    rows = torch.from_numpy(rows).int()
    keep = rows != 0
    return rows, keep, codes[keep.numpy()].astype(np.float32), tokenizer


def planted():
    """The stream's codes (m, 6), sparse, and its text."""
    rows, keep, codes, tokenizer = stream()
    return csc_array(codes), heldout.prepare(rows, keep, tokenizer)


def noisy(seed: int = 3, n: int = 7):
    """A small text with inner document ends and arbitrary codes, for the loops."""
    random, tokenizer = np.random.default_rng(seed), byte_tokenizer()
    ids = np.array(tokenizer.encode("abc\n"))
    rows = np.c_[np.zeros((30, 1), int), random.choice(ids, (30, 15), p=[0.5, 0.3, 0.15, 0.05])]
    rows[random.random(rows.shape) < 0.05] = 0
    rows = torch.from_numpy(rows).int()
    keep = rows != 0
    text = heldout.prepare(rows, keep, tokenizer)
    chance = 0.1 + 0.4 * (text.t == ids[1])[:, None]
    codes = random.exponential(1, (len(text.t), n)) * (random.random((len(text.t), n)) < chance)
    codes[:, 0] = np.round(codes[:, 0])  # ties
    codes[:, 1] = 0
    return csc_array(codes.astype(np.float32)), text


def naive_suffix(text, p: int, n: int) -> tuple:
    """The last n tokens of a position; the start of its document counts as one, nothing before it."""
    told = []
    for q in range(p, p - n, -1):
        told.append(text.t[q])
        if q == 0 or text.row[q - 1] != text.row[q] or text.column[q - 1] != text.column[q] - 1:
            told.append("start")
            break
    return tuple(told[:n])
