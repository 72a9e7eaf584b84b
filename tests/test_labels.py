"""Oracle: planted labels, scikit-learn's AUC, means in a loop."""

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array
from sklearn.metrics import roc_auc_score

from tsae import fetch, store, text
from tsae import lm as lms
from tsae.scoring import labels


def documents(seed: int, n: int = 40, columns: int = 30, width: int = 25):
    """Codes (m, columns) of n documents of `width` positions: column 3 is strong in half of them; and that half."""
    random = np.random.default_rng(seed)
    flag = np.arange(n) % 2
    codes = random.exponential(size=(n * width, columns)) * (random.random((n * width, columns)) < 0.2)
    document = np.repeat(np.arange(n), width)
    codes[:, 3] *= 1 + 4 * flag[document]
    return codes, document, flag.astype(float)


def test_means_are_those_of_a_loop():
    codes, document, _ = documents(0)
    of = labels.long(np.r_[document, [90] * 3], least=5)
    assert of.tolist() == list(range(40))
    mean = labels.pooled(csc_array(codes), document, of[::2])
    for row, name in zip(mean, of[::2]):
        np.testing.assert_allclose(row, codes[document == name].mean(0))
    spelt = labels.tokens(np.array([2, 0, 2]), 4)
    assert spelt.toarray().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]


def test_a_planted_label_is_found_by_one_column_and_a_shuffled_one_is_not():
    sides = [documents(seed) for seed in (0, 1)]
    (fit, test), flag = ([labels.pooled(csc_array(codes), document, np.arange(40)) for codes, document, _ in sides],
                         sides[0][2])
    other = np.random.default_rng(2).permutation(flag)
    found = labels.probed({"features": (fit, test), "without it": (np.delete(fit, 3, 1), np.delete(test, 3, 1))},
                          [("planted", flag, flag), ("shuffled", other, other)], [1, 5])
    each = {name: [labels.auc(row, true) for row, true in zip(guess, (flag, other))] for name, guess in found.items()}
    assert each["features", 1][0] > 0.95 and each["features", 5][0] > 0.9
    assert all(0.2 < value < 0.8 for value in (*each["without it", 1], each["features", 1][1])), "chance is a half"
    assert labels.probe(np.ones((4, 2)), np.array([0, 1, 0, 1.0]), np.ones((3, 2)), 1).tolist() == [0, 0, 0]


def test_auc_is_that_of_the_textbook_and_its_draws_lie_around_it():
    random = np.random.default_rng(0)
    flag = (random.random(60) < 0.4).astype(float)
    guess = (random.normal(size=(2, 1, 60)) + flag).round(1)  # with ties
    assert labels.auc(guess[0, 0], flag) == pytest.approx(roc_auc_score(flag, guess[0, 0]))
    some = np.where(np.arange(60) < 10, np.nan, flag)
    assert labels.auc(guess[0, 0], some) == pytest.approx(roc_auc_score(flag[10:], guess[0, 0, 10:]))
    assert np.isnan(labels.auc(guess[0, 0], np.ones(60)))
    each = [roc_auc_score(flag, one[0]) for one in guess]
    value, low, high = labels.mean_auc(guess, flag[None], ["kind: a"])
    assert value == pytest.approx(np.mean(each)) and low < min(each) and high > max(each), "Student's t of two is wide"
    assert labels.mean_auc(guess, flag[None], ["kind: a"], guess) == (0, 0, 0), "the same draws serve both"
    assert np.isnan(labels.mean_auc(guess[:1], flag[None], ["kind: a"])[1:]).all(), "one seed has no interval"


def test_kinds_count_alike_however_many_values_they_have():
    flag = np.tile([1.0, 0], 20)
    right, wrong = flag[None], 1 - flag[None]
    guesses = np.stack([np.concatenate([right, wrong, wrong])] * 2)
    value, *_ = labels.mean_auc(guesses, np.stack([flag] * 3), ["a: x", "b: x", "b: y"])
    assert value == 0.5


def test_flags_are_within_a_kind_and_need_enough_documents_on_both_sides():
    told = [dict(kind="a", package=name) for name in "xxxyyz"] + [dict(kind="b")] * 3
    found = {name: (fit, test) for name, fit, test in labels.flags(told, np.arange(9), np.arange(9), least=2)}
    assert set(found) == {"kind: a", "package: x", "package: y"}, "z stands in one document; b is what is not a"
    np.testing.assert_array_equal(found["package: y"][0], [0, 0, 0, 1, 1, 0, np.nan, np.nan, np.nan])


def test_held_out_rows_know_where_their_documents_come_from(tmp_path, monkeypatch):
    (tmp_path / "speeches" / "data" / "speeches").mkdir(parents=True)
    for year, name in ((1801, "Jefferson"), (1999, "Clinton")):
        body = "\n\n".join(f"{name} on {number}: <|endoftext|> the state of the union." * 20 for number in range(40))
        (tmp_path / "speeches" / "data" / "speeches" / f"{year}-{name}-1.txt").write_text(body)
    source = {f"{name}.py": "\n".join(f'def f{i}():\n    """{name} says {i}: {"an array of zeros. " * 12}"""'
                                      for i in range(60)) for name in ("a", "b")}
    (tmp_path / "pack" / "sub").mkdir(parents=True)
    for name, code in source.items():
        (tmp_path / "pack" / "sub" / name).write_text(code)
    monkeypatch.setattr(store, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(text, "PACKAGES", ["pack"])
    monkeypatch.setattr(text.docstrings, "__defaults__", (["pack"], 0.0))
    monkeypatch.setattr(text, "_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(fetch, "package", lambda name: tmp_path / "speeches")
    tokenizer = lms.load("embedded").tokenizer
    rows = text.tokens("docstrings+sotu", tokenizer, 32, 0, 0, validation_share=0.3)["validation"]
    document, told = text.labels("docstrings+sotu", rows, tokenizer, 0.3)
    assert document.shape == rows.shape
    seen = set()
    for number, its in enumerate(told):
        words = tokenizer.decode(rows[:, 1:][document[:, 1:] == number])
        if its["kind"] == "sotu" and words:
            assert its["author"] in words and its["century"] == {"Jefferson": "1800s", "Clinton": "1900s"}[its["author"]]
        elif words:
            assert its == dict(kind="docstrings", package="pack", section="pack/sub") and "array of zeros" in words
        seen.add(its.get("author", "docstrings"))
    assert seen == {"docstrings", "Jefferson", "Clinton"}
    with pytest.raises(ValueError, match="nothing is known of the documents of 'mine.txt'"):
        text.labels("mine.txt", rows, tokenizer)
    with pytest.raises(ValueError, match="not the held-out text of 'docstrings"):
        text.labels("docstrings+sotu", torch.flip(rows, [0]), tokenizer, 0.3)
