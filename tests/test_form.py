"""Oracles: naive samples, crashes at every byte, a form that is used by mouse and by keyboard."""

import json
import os
from itertools import product

import numpy as np
import pandas as pd
import pytest

from tsae.study import agreement, form

SECRET = ("zebra-model", "quokka-model")  # sources, in words that stand nowhere else


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Thousands of scores are given here; one test below sees to it that each is synced."""
    monkeypatch.setattr(form.os, "fsync", lambda number: None)


def contexts(n: int = 10, text: str = "x < y") -> dict:
    return {(source, seed, feature): pd.DataFrame([dict(code=code, before=f"{feature} ", token=text, after="\n")
                                                   for code in (40.0 + feature, 20.0)])
            for source, seed, feature in product(SECRET, (0, 1), range(n // 2))}


def finish(study: form.Study, generator=None) -> form.Study:
    generator = generator or np.random.default_rng(0)
    while not study.finished:
        study.record(*map(int, generator.integers(1, 11, 2)))
    return study


# sampling

def population(m: int = 300) -> pd.DataFrame:
    """Two sources whose frequencies overlap in part, three seeds each."""
    generator = np.random.default_rng(0)
    return pd.concat([pd.DataFrame(dict(source=source, seed=seed, feature=np.arange(m), note="kept",
                                        frequency=np.exp(generator.normal(centre, 1, m)) * (np.arange(m) > 5)))
                      for source, centre in zip("ab", (-6, -5)) for seed in range(3)], ignore_index=True)


def test_a_sample_has_equally_many_of_each_source_in_each_bin():
    drawn = form.sample(population(), 50, 6, seed=1)
    counts = drawn.groupby(["bin", "source"]).size().unstack()
    assert (counts["a"] == counts["b"]).all() and counts["a"].sum() == 50 and sorted(counts["a"].unique()) == [8, 9]
    ranges = drawn.groupby("bin")["frequency"].agg(["min", "max"])
    assert (ranges["max"].to_numpy()[:-1] < ranges["min"].to_numpy()[1:]).all(), "bins are shared and do not overlap"
    turns = drawn.groupby(["bin", "source", "seed"]).size().unstack()
    assert (turns.max(axis=1) - turns.min(axis=1) <= 1).all(), "seeds take turns"
    assert not drawn.duplicated(agreement.KEY).any() and (drawn["frequency"] > 0).all() and (drawn["note"] == "kept").all()
    shuffled = population().sample(frac=1, random_state=3)
    assert drawn.equals(form.sample(shuffled, 50, 6, seed=1))
    assert not drawn.equals(form.sample(shuffled, 50, 6, seed=2))


def test_a_bin_that_one_source_lacks_leaves_its_share_to_the_others():
    scores = population()
    scores = scores[(scores["source"] == "a") | (scores["frequency"] > np.exp(-5))]
    counts = form.sample(scores, 60, 5).groupby(["source", "bin"]).size().unstack(fill_value=0)
    assert counts.loc["a"].equals(counts.loc["b"].rename("a")) and (counts.sum(axis=1) == 60).all()
    with pytest.raises(ValueError, match="features a source were asked for; .* there are"):
        form.sample(scores, 5000, 5)
    with pytest.raises(ValueError, match="listed twice"):
        form.sample(pd.concat([scores, scores]), 5, 5)


# the study

def test_the_order_is_the_scorers_own_and_repeats_are_far_apart(tmp_path):
    shown = contexts(20)  # 40 features
    for seed in range(20):
        study = form.Study(shown, tmp_path, "ada", seed, repeats=0.25)
        first, again = {}, {}
        for step, key in enumerate(study.order):
            (again if key in first else first)[key] = step
        assert set(first) == set(shown) and len(again) == 10 and len(study.order) == 50
        assert min(step - first[key] for key, step in again.items()) > 20, "at least half the study between them"
    assert study.order == form.Study(shown, tmp_path, " Ada", 19, 0.25).order
    assert study.order != form.Study(shown, tmp_path, "bob", 19, 0.25).order
    assert study.order != form.Study(shown, tmp_path, "ada", 18, 0.25).order
    assert len(form.Study(shown, tmp_path, "ada", repeats=0).order) == 40
    assert len(form.Study(contexts(2), tmp_path, "ada", repeats=0.01).order) == 5, "any share is one feature at least"
    assert not os.listdir(tmp_path), "a study that nobody scored leaves no file"
    one = dict([next(iter(shown.items()))])
    assert len(form.Study(one, tmp_path, "ada").order) == 1


def test_every_score_is_on_disk_when_record_returns(tmp_path, monkeypatch):
    study, synced = form.Study(contexts(), tmp_path / "new", "ada"), []
    monkeypatch.setattr(form.os, "fsync", lambda number: synced.append(os.fstat(number)))
    for step in range(3):
        study.record(7, 1 + step)
        lines = (tmp_path / "new" / "ada.csv").read_text().split("\n")
        assert lines[0].split(",") == form.COLUMNS and len(lines) == step + 3 and lines[-2].endswith(f",7,{1 + step}")
        seen, now = synced[-1 if step else 0], study.path.stat()
        assert (seen.st_ino, seen.st_size) == (now.st_ino, now.st_size), "the whole line was written before the sync"
        assert len(synced) == step + 2, "the folder once, for the new name, and every line"
    with pytest.raises(ValueError, match="interpretability is 0: a whole number from 1 to 10"):
        study.record(0, 5)
    with pytest.raises(ValueError, match="complexity is 2.5"):
        study.record(5, 2.5)
    assert len(study.scores) == 3 and study.next == study.order[3]


def test_a_crash_between_bytes_costs_the_unfinished_line_only(tmp_path):
    study = form.Study(contexts(4), tmp_path, "ada")
    study.record(8, 10)
    study.record(3, 4)
    study.undo()
    study.record(2, 10)
    whole = study.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    standing = {0: [], ends[0]: [], ends[1]: [8], ends[2]: [8, 3], ends[3]: [8], ends[4]: [8, 2]}
    for cut in sorted({*range(0, len(whole), 5), *(end + near for end in ends for near in (-2, -1, 0))}):
        study.path.write_bytes(whole[:cut])
        good = max(end for end in standing if end <= cut)
        assert [row["interpretability"] for row in form._read(study.path)[0]] == standing[good]
        assert study.path.read_bytes() == whole[:cut], "reading changes nothing"
        again = form.Study(contexts(4), tmp_path, "ada")
        assert [row["interpretability"] for row in again.scores] == standing[good]
        again.record(9, 9)
        assert study.path.read_bytes().startswith(whole[:good] or form.HEADER)
        assert [row["interpretability"] for row in form._read(study.path)[0]] == [*standing[good], 9]


def test_a_study_goes_on_where_it_was_and_opens_at_the_end(tmp_path):
    study = form.Study(contexts(), tmp_path, "ada", seed=3)
    with pytest.raises(ValueError, match="0 of 22 are scored: finish before unblinding"):
        study.summary()
    study.record(8, 2)
    study.record(6, 9)
    again = form.Study(contexts(), tmp_path, "ada", seed=3)
    assert again.scores == study.scores and again.next == study.order[2]
    means, kept = finish(again).summary(), form.load(tmp_path)
    assert again.next is None and len(kept) == 22 and kept["repeat"].sum() == 2
    for source in SECRET:
        given = kept[(kept["source"] == source) & ~kept["repeat"]]
        assert means.loc[source, ("complexity", "mean")] == given["complexity"].mean() and len(given) == 10
    with pytest.raises(ValueError, match="all features are scored"):
        again.record(5, 5)
    with pytest.raises(ValueError, match="finished"):
        again.undo()
    with pytest.raises(ValueError, match="0 of 22"):
        form.Study(contexts(), tmp_path, "bob").summary()


def test_undo_appends_and_survives_a_restart(tmp_path):
    study = form.Study(contexts(), tmp_path, "ada")
    with pytest.raises(ValueError, match="no score to take back"):
        study.undo()
    study.record(1, 1)
    study.record(2, 2)
    before = study.path.read_bytes()
    study.undo()
    study.undo()
    assert study.path.read_bytes().startswith(before) and study.next == study.order[0]
    again = form.Study(contexts(), tmp_path, "ada")
    assert again.scores == [] and again.next == study.order[0]
    again.record(9, 8)
    assert form.load(tmp_path)[["step", *agreement.SCALES]].to_dict("records") == [
        dict(step=0, interpretability=9, complexity=8)]


def test_two_windows_do_not_mix_their_lines(tmp_path):
    one, two = (form.Study(contexts(), tmp_path, "ada") for _ in range(2))
    one.record(5, 5)
    with pytest.raises(ValueError, match="changed meanwhile"):
        two.record(6, 6)
    assert form.load(tmp_path)["interpretability"].tolist() == [5]


@pytest.mark.parametrize("name", ["", "..", "../ada", "a/b", "a\\b", "/tmp/ada", ".ada", "a.csv", "a\nb", "é",
                                  "a" * 41])
def test_a_scorers_name_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a scorer"):
        form.Study(contexts(), tmp_path, name)


def test_what_is_no_study_is_refused(tmp_path):
    for wrong in (({}, 0.1), (contexts(), 0.6), ({("a\nb", 0, 1): contexts()[SECRET[0], 0, 0]}, 0.1)):
        with pytest.raises(ValueError, match="a study needs"):
            form.Study(wrong[0], tmp_path, "ada", repeats=wrong[1])


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"hello", b"\x00" * 9])
def test_a_foreign_csv_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "ada.csv").write_bytes(content)
    with pytest.raises(ValueError, match="ada.csv is no file of blind scores: it needs the columns step, source"):
        form.Study(contexts(), tmp_path, "ada")
    assert (tmp_path / "ada.csv").read_bytes() == content


@pytest.mark.parametrize("old,new", [(b",7,8\n", b",7,11\n"), (b",7,8\n", b",7,\n"), (b",7,8\n", b",7\n"),
                                     (b",7,8\n", b",7,8,9\n"), (b"\n1,", b"\n2,"), (b"\n1,", b"\n\n1,"),
                                     (b"\n1,", b'\n1,"'), (b"\n1,", b"\n1\xff,"), (b",7,8\n", b",7,\x00\n")])
def test_a_damaged_csv_gets_a_sentence(tmp_path, old, new):
    study = form.Study(contexts(), tmp_path, "ada")
    for given in ((3, 4), (7, 8), (5, 6)):
        study.record(*given)
    damaged = study.path.read_bytes().replace(old, new)
    assert damaged != study.path.read_bytes()
    study.path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"line [34] of .*ada.csv is damaged .*: mend it or move the file away"):
        form.Study(contexts(), tmp_path, "ada")
    assert study.path.read_bytes() == damaged


def test_scores_of_another_study_are_refused(tmp_path):
    study = form.Study(contexts(), tmp_path, "ada")
    study.record(3, 4)
    for other in (dict(contexts=contexts(text="else")), dict(seed=5), dict(contexts=contexts(30))):
        with pytest.raises(ValueError, match="another feature, text or order"):
            form.Study(**dict(contexts=contexts(), folder=tmp_path, scorer="ada") | other)
    finish(form.Study(contexts(), tmp_path, "ada"))
    finish(form.Study(contexts(text="else"), tmp_path, "bob"))
    with pytest.raises(ValueError, match="different texts of the same feature"):
        form.load(tmp_path)


# the form

def tree(widget) -> list:
    return [widget, *[below for child in getattr(widget, "children", ()) for below in tree(child)]]


def kinds(box) -> dict:
    found = {}
    for widget in tree(box):
        found.setdefault(type(widget).__name__, []).append(widget)
    return found


def press(box, text: str) -> None:
    """What the browser sends when text is typed and Enter pressed; on a slow line the event comes before the text."""
    line = kinds(box)["Text"][0]
    line._handle_custom_msg({"event": "submit"}, [])
    line.value = text


def test_the_form_hides_the_source_everywhere_and_records_on_click(tmp_path):
    study = form.Study(contexts(), tmp_path / "scores", "ada")
    box = form.form(study)
    (save, back), choice, bar = kinds(box)["Button"], kinds(box)["ToggleButtons"], kinds(box)["IntProgress"][0]
    for step in range(22):
        page = json.dumps([widget.get_state() for widget in tree(box)], default=str)
        assert not any(source in page for source in SECRET) and str(tmp_path) not in page
        assert (bar.value, bar.max, bar.description) == (step, 22, f"{step} of 22")
        assert save.disabled and [each.value for each in choice] == [None, None], "no score is suggested"
        assert f"{study.next[2]} " in page and "10.0" in page, "codes are relative: their scale could tell the source"
        assert f"{40 + study.next[2]}.0" not in page
        choice[0].value = 7
        assert save.disabled
        choice[1].value = 1 + step % 10
        save.click()
    assert study.finished and save.disabled and back.disabled and "Done" in kinds(box)["HTML"][-1].value
    assert [row["complexity"] for row in study.scores] == [1 + step % 10 for step in range(22)]


def test_the_form_works_without_a_mouse(tmp_path):
    study = form.Study(contexts(), tmp_path, "ada")
    box = form.form(study)
    said, line = kinds(box)["HTML"][-1], kinds(box)["Text"][0]
    for text in ("8 3", "10,1", " 2 / 9 "):
        press(box, text)
        assert line.value == "" and said.value.startswith("Recorded ")
    assert [(row["interpretability"], row["complexity"]) for row in study.scores] == [(8, 3), (10, 1), (2, 9)]
    press(box, "u")
    assert len(study.scores) == 2 and "Taken back" in said.value
    for text, sentence in (("8", "Two num"), ("8 3 1", "Two num"), ("<b>", "Two num"), ("11 3", "a whole number")):
        press(box, text)
        assert sentence in said.value and len(study.scores) == 2
    kinds(box)["Button"][1].click()
    assert len(study.scores) == 1 and kinds(box)["IntProgress"][0].value == 1
    form.Study(contexts(), tmp_path, "ada").record(1, 1)
    press(box, "5 5")
    assert "changed meanwhile" in said.value


def test_without_a_kernel_there_is_a_picture(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(form, "display", lambda bundle, raw: shown.append(bundle))
    study = form.Study(contexts(), tmp_path, "ada")
    form.show(study)
    assert "application/vnd.jupyter.widget-view+json" in shown[0] and "0 of 22" in shown[0]["text/html"]
    assert f"{study.next[2]} " in shown[0]["text/html"] and not any(source in shown[0]["text/html"] for source in SECRET)
    form.show(finish(study))
    assert "22 of 22" in shown[1]["text/html"]


def test_all_text_is_escaped(tmp_path):
    hostile = pd.DataFrame([dict(code=1.0, before="<script>alert(1)</script>", token="a&b", after="</td><img src=x>")])
    page = form.contexts_html(hostile, "<b>title</b>")
    assert "<mark>a&amp;b</mark>" in page and "&lt;b&gt;" in page
    box = form.form(form.Study({("<i>s</i>", 0, 0): hostile}, tmp_path / "<u>", "ada"))
    for shown in (page, *(widget.value for widget in kinds(box)["HTML"])):
        assert "<script" not in shown and "<img" not in shown and "<i>" not in shown
    assert "&lt;script&gt;" in kinds(box)["HTML"][1].value
    (tmp_path / "<u>").mkdir()
    (tmp_path / "<u>" / "ada.csv").write_text("x")
    press(box, "5 5")
    assert "changed meanwhile" in kinds(box)["HTML"][-1].value and "<u>" not in kinds(box)["HTML"][-1].value
