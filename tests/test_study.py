"""Oracles: textbook agreement, naive loops, crashes at every byte, and studies simulated with a known answer."""

import json
import os
from itertools import product

import numpy as np
import pandas as pd
import pytest

from tsae import blind

SECRET = ("zebra-model", "quokka-model")  # sources, in words that stand nowhere else


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Thousands of scores are given here; one test below sees to it that each is synced."""
    monkeypatch.setattr(blind.os, "fsync", lambda number: None)


def contexts(n: int = 10, text: str = "x < y") -> dict:
    return {(source, seed, feature): pd.DataFrame([dict(code=code, before=f"{feature} ", token=text, after="\n")
                                                   for code in (40.0 + feature, 20.0)])
            for source, seed, feature in product(SECRET, (0, 1), range(n // 2))}


def finish(study: blind.Study, generator=None) -> blind.Study:
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
    drawn = blind.sample(population(), 50, 6, seed=1)
    counts = drawn.groupby(["bin", "source"]).size().unstack()
    assert (counts["a"] == counts["b"]).all() and counts["a"].sum() == 50 and sorted(counts["a"].unique()) == [8, 9]
    ranges = drawn.groupby("bin")["frequency"].agg(["min", "max"])
    assert (ranges["max"].to_numpy()[:-1] < ranges["min"].to_numpy()[1:]).all(), "bins are shared and do not overlap"
    turns = drawn.groupby(["bin", "source", "seed"]).size().unstack()
    assert (turns.max(axis=1) - turns.min(axis=1) <= 1).all(), "seeds take turns"
    assert not drawn.duplicated(blind.KEY).any() and (drawn["frequency"] > 0).all() and (drawn["note"] == "kept").all()
    shuffled = population().sample(frac=1, random_state=3)
    assert drawn.equals(blind.sample(shuffled, 50, 6, seed=1))
    assert not drawn.equals(blind.sample(shuffled, 50, 6, seed=2))


def test_a_bin_that_one_source_lacks_leaves_its_share_to_the_others():
    scores = population()
    scores = scores[(scores["source"] == "a") | (scores["frequency"] > np.exp(-5))]
    counts = blind.sample(scores, 60, 5).groupby(["source", "bin"]).size().unstack(fill_value=0)
    assert counts.loc["a"].equals(counts.loc["b"].rename("a")) and (counts.sum(axis=1) == 60).all()
    with pytest.raises(ValueError, match="features a source were asked for; .* there are"):
        blind.sample(scores, 5000, 5)
    with pytest.raises(ValueError, match="listed twice"):
        blind.sample(pd.concat([scores, scores]), 5, 5)


# the study

def test_the_order_is_the_scorers_own_and_repeats_are_far_apart(tmp_path):
    shown = contexts(20)  # 40 features
    for seed in range(20):
        study = blind.Study(shown, tmp_path, "ada", seed, repeats=0.25)
        first, again = {}, {}
        for step, key in enumerate(study.order):
            (again if key in first else first)[key] = step
        assert set(first) == set(shown) and len(again) == 10 and len(study.order) == 50
        assert min(step - first[key] for key, step in again.items()) > 20, "at least half the study between them"
    assert study.order == blind.Study(shown, tmp_path, " Ada", 19, 0.25).order
    assert study.order != blind.Study(shown, tmp_path, "bob", 19, 0.25).order
    assert study.order != blind.Study(shown, tmp_path, "ada", 18, 0.25).order
    assert len(blind.Study(shown, tmp_path, "ada", repeats=0).order) == 40
    assert len(blind.Study(contexts(2), tmp_path, "ada", repeats=0.01).order) == 5, "any share is one feature at least"
    assert not os.listdir(tmp_path), "a study that nobody scored leaves no file"
    one = dict([next(iter(shown.items()))])
    assert len(blind.Study(one, tmp_path, "ada").order) == 1


def test_every_score_is_on_disk_when_record_returns(tmp_path, monkeypatch):
    study, synced = blind.Study(contexts(), tmp_path / "new", "ada"), []
    monkeypatch.setattr(blind.os, "fsync", lambda number: synced.append(os.fstat(number)))
    for step in range(3):
        study.record(7, 1 + step)
        lines = (tmp_path / "new" / "ada.csv").read_text().split("\n")
        assert lines[0].split(",") == blind.COLUMNS and len(lines) == step + 3 and lines[-2].endswith(f",7,{1 + step}")
        seen, now = synced[-1 if step else 0], study.path.stat()
        assert (seen.st_ino, seen.st_size) == (now.st_ino, now.st_size), "the whole line was written before the sync"
        assert len(synced) == step + 2, "the folder once, for the new name, and every line"
    with pytest.raises(ValueError, match="interpretability is 0: a whole number from 1 to 10"):
        study.record(0, 5)
    with pytest.raises(ValueError, match="complexity is 2.5"):
        study.record(5, 2.5)
    assert len(study.scores) == 3 and study.next == study.order[3]


def test_a_crash_between_bytes_costs_the_unfinished_line_only(tmp_path):
    study = blind.Study(contexts(4), tmp_path, "ada")
    study.record(8, 10), study.record(3, 4), study.undo(), study.record(2, 10)
    whole = study.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    standing = {0: [], ends[0]: [], ends[1]: [8], ends[2]: [8, 3], ends[3]: [8], ends[4]: [8, 2]}
    for cut in sorted({*range(0, len(whole), 5), *(end + near for end in ends for near in (-2, -1, 0))}):
        study.path.write_bytes(whole[:cut])
        good = max(end for end in standing if end <= cut)
        assert [row["interpretability"] for row in blind._read(study.path)[0]] == standing[good]
        assert study.path.read_bytes() == whole[:cut], "reading changes nothing"
        again = blind.Study(contexts(4), tmp_path, "ada")
        assert [row["interpretability"] for row in again.scores] == standing[good]
        again.record(9, 9)
        assert study.path.read_bytes().startswith(whole[:good] or blind.HEADER)
        assert [row["interpretability"] for row in blind._read(study.path)[0]] == [*standing[good], 9]


def test_a_study_goes_on_where_it_was_and_opens_at_the_end(tmp_path):
    study = blind.Study(contexts(), tmp_path, "ada", seed=3)
    with pytest.raises(ValueError, match="0 of 22 are scored: finish before unblinding"):
        study.summary()
    study.record(8, 2), study.record(6, 9)
    again = blind.Study(contexts(), tmp_path, "ada", seed=3)
    assert again.scores == study.scores and again.next == study.order[2]
    means, kept = finish(again).summary(), blind.load(tmp_path)
    assert again.next is None and len(kept) == 22 and kept["repeat"].sum() == 2
    for source in SECRET:
        given = kept[(kept["source"] == source) & ~kept["repeat"]]
        assert means.loc[source, ("complexity", "mean")] == given["complexity"].mean() and len(given) == 10
    with pytest.raises(ValueError, match="all features are scored"):
        again.record(5, 5)
    with pytest.raises(ValueError, match="finished"):
        again.undo()
    with pytest.raises(ValueError, match="0 of 22"):
        blind.Study(contexts(), tmp_path, "bob").summary()


def test_undo_appends_and_survives_a_restart(tmp_path):
    study = blind.Study(contexts(), tmp_path, "ada")
    with pytest.raises(ValueError, match="no score to take back"):
        study.undo()
    study.record(1, 1), study.record(2, 2)
    before = study.path.read_bytes()
    study.undo(), study.undo()
    assert study.path.read_bytes().startswith(before) and study.next == study.order[0]
    again = blind.Study(contexts(), tmp_path, "ada")
    assert again.scores == [] and again.next == study.order[0]
    again.record(9, 8)
    assert blind.load(tmp_path)[["step", *blind.SCALES]].to_dict("records") == [
        dict(step=0, interpretability=9, complexity=8)]


def test_two_windows_do_not_mix_their_lines(tmp_path):
    one, two = (blind.Study(contexts(), tmp_path, "ada") for _ in range(2))
    one.record(5, 5)
    with pytest.raises(ValueError, match="changed meanwhile"):
        two.record(6, 6)
    assert blind.load(tmp_path)["interpretability"].tolist() == [5]


@pytest.mark.parametrize("name", ["", "..", "../ada", "a/b", "a\\b", "/tmp/ada", ".ada", "a.csv", "a\nb", "é",
                                  "a" * 41])
def test_a_scorers_name_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a scorer"):
        blind.Study(contexts(), tmp_path, name)


def test_what_is_no_study_is_refused(tmp_path):
    for wrong in (({}, 0.1), (contexts(), 0.6), ({("a\nb", 0, 1): contexts()[SECRET[0], 0, 0]}, 0.1)):
        with pytest.raises(ValueError, match="a study needs"):
            blind.Study(wrong[0], tmp_path, "ada", repeats=wrong[1])


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"hello", b"\x00" * 9])
def test_a_foreign_csv_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "ada.csv").write_bytes(content)
    with pytest.raises(ValueError, match="ada.csv is no file of blind scores: it needs the columns step, source"):
        blind.Study(contexts(), tmp_path, "ada")
    assert (tmp_path / "ada.csv").read_bytes() == content


@pytest.mark.parametrize("old,new", [(b",7,8\n", b",7,11\n"), (b",7,8\n", b",7,\n"), (b",7,8\n", b",7\n"),
                                     (b",7,8\n", b",7,8,9\n"), (b"\n1,", b"\n2,"), (b"\n1,", b"\n\n1,"),
                                     (b"\n1,", b'\n1,"'), (b"\n1,", b"\n1\xff,"), (b",7,8\n", b",7,\x00\n")])
def test_a_damaged_csv_gets_a_sentence(tmp_path, old, new):
    study = blind.Study(contexts(), tmp_path, "ada")
    study.record(3, 4), study.record(7, 8), study.record(5, 6)
    damaged = study.path.read_bytes().replace(old, new)
    assert damaged != study.path.read_bytes()
    study.path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"line [34] of .*ada.csv is damaged .*: mend it or move the file away"):
        blind.Study(contexts(), tmp_path, "ada")
    assert study.path.read_bytes() == damaged


def test_scores_of_another_study_are_refused(tmp_path):
    study = blind.Study(contexts(), tmp_path, "ada")
    study.record(3, 4)
    for other in (dict(contexts=contexts(text="else")), dict(seed=5), dict(contexts=contexts(30))):
        with pytest.raises(ValueError, match="another feature, text or order"):
            blind.Study(**dict(contexts=contexts(), folder=tmp_path, scorer="ada") | other)
    finish(blind.Study(contexts(), tmp_path, "ada")), finish(blind.Study(contexts(text="else"), tmp_path, "bob"))
    with pytest.raises(ValueError, match="different texts of the same feature"):
        blind.load(tmp_path)


# the form

def tree(widget) -> list:
    return [widget, *[below for child in getattr(widget, "children", ()) for below in tree(child)]]


def kinds(box) -> dict:
    found = {}
    for widget in tree(box):
        found.setdefault(type(widget).__name__, []).append(widget)
    return found


def press(box, text: str) -> None:
    """What the browser sends when text is typed and Enter pressed."""
    line = kinds(box)["Text"][0]
    line.value = text
    line._handle_custom_msg({"event": "submit"}, [])


def test_the_form_hides_the_source_everywhere_and_records_on_click(tmp_path):
    study = blind.Study(contexts(), tmp_path / "scores", "ada")
    box = blind.form(study)
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
    study = blind.Study(contexts(), tmp_path, "ada")
    box = blind.form(study)
    said, line = kinds(box)["HTML"][-1], kinds(box)["Text"][0]
    for text in ("8 3", "10,1", " 2 / 9 "):
        press(box, text)
        assert line.value == ""
    assert [(row["interpretability"], row["complexity"]) for row in study.scores] == [(8, 3), (10, 1), (2, 9)]
    press(box, "u")
    assert len(study.scores) == 2 and "Taken back" in said.value
    for text, sentence in (("8", "Two num"), ("8 3 1", "Two num"), ("<b>", "Two num"), ("11 3", "a whole number")):
        press(box, text)
        assert sentence in said.value and len(study.scores) == 2
    kinds(box)["Button"][1].click()
    assert len(study.scores) == 1 and kinds(box)["IntProgress"][0].value == 1
    blind.Study(contexts(), tmp_path, "ada").record(1, 1)
    press(box, "5 5")
    assert "changed meanwhile" in said.value


def test_all_text_is_escaped(tmp_path):
    hostile = pd.DataFrame([dict(code=1.0, before="<script>alert(1)</script>", token="a&b", after="</td><img src=x>")])
    page = blind.table(hostile, "<b>title</b>")
    assert "<mark>a&amp;b</mark>" in page and "&lt;b&gt;" in page
    box = blind.form(blind.Study({("<i>s</i>", 0, 0): hostile}, tmp_path / "<u>", "ada"))
    for shown in (page, *(widget.value for widget in kinds(box)["HTML"])):
        assert "<script" not in shown and "<img" not in shown and "<i>" not in shown
    assert "&lt;script&gt;" in kinds(box)["HTML"][1].value
    (tmp_path / "<u>").mkdir(), (tmp_path / "<u>" / "ada.csv").write_text("x")
    press(box, "5 5")
    assert "changed meanwhile" in kinds(box)["HTML"][-1].value and "<u>" not in kinds(box)["HTML"][-1].value


# agreement

NONE = np.nan
CANONICAL = np.array([[1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],  # Krippendorff 2011, example C
                      [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
                      [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
                      [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE]])


@pytest.mark.parametrize("metric,value", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_textbook(metric, value):
    assert round(blind.alpha(CANONICAL, metric), 3) == value


def test_interval_alpha_equals_a_naive_loop():
    generator = np.random.default_rng(0)
    ratings = generator.integers(1, 11, (4, 30)).astype(float)
    ratings[generator.random(ratings.shape) < 0.3] = np.nan
    units = [unit for unit in (column[~np.isnan(column)] for column in ratings.T) if len(unit) > 1]
    every = np.concatenate(units)
    within = sum((a - b) ** 2 / (len(unit) - 1) for unit in units for a in unit for b in unit) / len(every)
    overall = sum((a - b) ** 2 for a in every for b in every) / (len(every) * (len(every) - 1))
    assert blind.alpha(ratings, "interval") == pytest.approx(1 - within / overall)
    assert blind.alpha(np.tile(ratings[:1], (2, 1))) == pytest.approx(1), "a scorer agrees with a copy"
    assert np.isnan(blind.alpha(np.full((2, 5), 3.0))), "nothing to tell apart"


def test_kappa_equals_the_table_of_counts():
    generator = np.random.default_rng(0)
    a = generator.integers(1, 11, 60)
    b = np.clip(a + generator.integers(-3, 4, 60), 1, 10)
    seen, weights = np.zeros((10, 10)), np.subtract.outer(np.arange(10), np.arange(10)) ** 2
    for i, j in zip(a, b):
        seen[i - 1, j - 1] += 1 / 60
    expected = 1 - (weights * seen).sum() / (weights * np.outer(seen.sum(1), seen.sum(0))).sum()
    assert blind.kappa(a, b) == pytest.approx(expected)
    assert blind.kappa([*a, np.nan, 3], [*b, 4, np.nan]) == pytest.approx(expected), "what one left out is left out"
    assert blind.kappa([1, 1, 2, 2], [1, 2, 1, 2]) == 0 and blind.kappa([1, 2], [2, 1]) == -1
    assert np.isnan(blind.kappa([3, 3], [3, 3])) and np.isnan(blind.kappa([np.nan], [1]))


# comparison

def ratings(generator, effect: float, scorers: int = 3, n: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Crossed random effects: features, the scorers' strictness, each scorer's own liking for a source, and noise."""
    first = np.arange(2 * n) < n
    given = (5 + effect * first + generator.normal(0, 1, 2 * n) + generator.normal(0, 2, (scorers, 1))
             + generator.normal(0, 0.2, (scorers, 1)) * first + generator.normal(0, 0.7, (scorers, 2 * n)))
    given[generator.random(given.shape) < 0.1] = np.nan
    return given, first


def test_the_difference_is_least_squares_with_a_level_for_each_scorer():
    given, first = ratings(np.random.default_rng(0), 1.0)
    scorer, feature = np.nonzero(~np.isnan(given))
    design = np.column_stack([first[feature], *(scorer == s for s in range(3))]).astype(float)
    expected = np.linalg.lstsq(design, given[scorer, feature], rcond=None)[0][0]
    assert blind.compare(given, first, draws=10)["difference"] == pytest.approx(expected)
    strict = given + np.array([[0], [50], [-50]])
    assert blind.compare(strict, first, draws=200) == pytest.approx(blind.compare(given, first, draws=200))


def test_p_is_uniform_where_there_is_no_difference_and_the_interval_covers():
    generator, p, covered = np.random.default_rng(0), [], []
    for _ in range(200):
        given, first = ratings(generator, 0.0, scorers=2)
        found = blind.compare(given, first, draws=299, seed=int(generator.integers(1 << 30)))
        p.append(found["p"]), covered.append(found["low"] <= 0 <= found["high"])
    assert 0.9 <= np.mean(covered) <= 0.99
    assert np.abs(np.quantile(p, [0.1, 0.25, 0.5, 0.75, 0.9]) - [0.1, 0.25, 0.5, 0.75, 0.9]).max() < 0.1
    assert np.mean(np.array(p) <= 0.05) < 0.1


def test_p_equals_all_permutations_and_stays_within_strata():
    given, first = np.array([[1.0, 2, 4, 3, 6, 8]]), np.array([0, 0, 1, 0, 1, 1], bool)
    sums = np.array([2 * given[0, list(labels)].sum() - 24 for labels in product([False, True], repeat=6)
                     if sum(labels) == 3])
    exact = (np.abs(sums) >= abs(2 * 18 - 24)).mean()
    assert blind.compare(given, first, draws=5000)["p"] == pytest.approx(exact, abs=0.02)
    paired = blind.compare(given, first, np.array([0, 1, 0, 2, 1, 2]), draws=5000)
    assert paired["p"] == pytest.approx(2 / 8, abs=0.02), "three pairs have eight labellings, two as extreme"
    assert np.isnan(blind.compare(np.array([[1.0, 2, 3]]), np.array([1, 0, 0], bool))["low"])


def test_sources_that_no_scorer_saw_both_of_are_not_compared():
    given = np.array([[1.0, 2, 1, np.nan, np.nan, np.nan], [np.nan, np.nan, np.nan, 8, 9, 9]])
    found = blind.compare(given, np.array([1, 1, 1, 0, 0, 0], bool), draws=50)
    assert found.pop("p") > 0.5 and np.isnan(list(found.values())).all()


def test_analysis_finds_what_was_planted(tmp_path):
    for scorer, shift in (("ada", 0), ("bob", 2)):
        study = blind.Study(contexts(20), tmp_path, scorer, repeats=0.25)
        generator = np.random.default_rng(shift)
        while not study.finished:
            source, _, feature = study.next
            level = 2 + shift + feature % 3 + 3 * (source == SECRET[0])
            study.record(int(generator.integers(1, 11)), level)
    scores = blind.load(tmp_path)
    found = blind.analyse(scores, draws=500)
    comparison = found["comparison"].set_index("scale")
    assert list(comparison["source"]) == [SECRET[1]] * 2 and list(comparison["against"]) == [SECRET[0]] * 2
    assert comparison.loc["complexity", "difference"] == pytest.approx(-3)
    assert comparison.loc["complexity", "high"] < -2 and comparison.loc["complexity", "p"] < 0.01
    assert comparison.loc["interpretability", "low"] < 0 < comparison.loc["interpretability", "high"]
    repeats = found["repeats"].set_index(["scale", "scorer"])
    assert set(repeats.index.levels[1]) == {"ada", "bob", "all"} and repeats.loc[("complexity", "all"), "repeats"] == 20
    assert (repeats.loc["complexity", "same"] == 1).all() and (repeats.loc["interpretability", "kappa"] < 0.7).all()
    agreement = found["agreement"].set_index(["scale", "measure"])["value"]
    wide = scores[~scores["repeat"]].pivot(index=blind.KEY, columns="scorer", values="complexity")
    assert agreement["complexity", "weighted kappa"] == pytest.approx(blind.kappa(wide["ada"], wide["bob"]))
    assert agreement["complexity", "alpha, interval"] == pytest.approx(blind.alpha(wide.to_numpy(float).T, "interval"))
    assert agreement["complexity", "alpha, ordinal"] > 0.3 > abs(agreement["interpretability", "alpha, ordinal"])
    assert found["means"]["count"].eq(20).all() and len(found["means"]) == 8
    binned = scores.merge(scores[blind.KEY].drop_duplicates().assign(bin=lambda table: table["feature"] % 3))
    kept = blind.analyse(binned, draws=500)["comparison"].set_index("scale")
    assert kept["difference"].to_numpy() == pytest.approx(comparison["difference"].to_numpy())
    with pytest.raises(ValueError, match="no scores"):
        blind.analyse(blind.load(tmp_path / "nobody"))


def test_one_scorer_half_way_can_be_analysed(tmp_path):
    study = blind.Study(contexts(), tmp_path, "ada")
    for _ in range(12):
        study.record(5, 5)
    found = blind.analyse(blind.load(tmp_path), draws=50)
    assert found["comparison"]["difference"].eq(0).all() and found["comparison"]["p"].eq(1).all()
    assert found["agreement"]["value"].isna().all()


# power

def test_the_flattest_distribution_has_the_mean_and_the_largest_entropy():
    k = np.arange(1, 11)
    assert blind.flattest(5.5) == pytest.approx(np.full(10, 0.1))
    for mean in (1.5, 6.9, 7.2):
        chances = blind.flattest(mean)
        assert chances.sum() == pytest.approx(1) and chances @ k == pytest.approx(mean)
        aside = chances + 1e-4 * np.array([1, -1, -1, 1, 0, 0, 0, 0, 0, 0])  # keeps the sum and the mean
        assert -(aside * np.log(aside)).sum() < -(chances * np.log(chances)).sum()


def test_power_grows_with_features_and_scorers_and_agrees_with_the_normal_formula():
    means = blind.PAPER["interpretability"]["tokenized"], blind.PAPER["interpretability"]["baseline"]
    grid = [20, 60, 180, 400, 550, 700, 900]
    curve, three = (blind.power(means, grid, scorers, simulations=300, draws=199) for scorers in (1, 3))
    for each in (curve, three):
        steps = np.diff(each["power"])
        assert (steps > -2 * each["error"].to_numpy()[:-1]).all() and each["error"].between(0, 0.03).all()
    variance = sum(blind.flattest(mean) @ (np.arange(1, 11) - mean) ** 2 for mean in means)
    expected = variance * (1.96 + 0.8416) ** 2 / (means[0] - means[1]) ** 2
    assert blind.enough(curve) == pytest.approx(expected, rel=0.15) and blind.enough(three) < blind.enough(curve)
    assert curve.equals(blind.power(means, grid, simulations=300, draws=199))


def test_power_without_a_difference_is_the_level_and_the_papers_is_seen_with_few():
    assert blind.power((5.0, 5.0), [10, 40], simulations=400)["power"].between(0.02, 0.085).all()
    means = blind.PAPER["complexity"]["tokenized"], blind.PAPER["complexity"]["baseline"]
    curve = blind.power(means, [3, 4, 5, 6, 8, 10])
    assert curve["power"].iloc[0] == 0, "20 labellings of three and three cannot reach 5 % on both sides"
    assert 4 <= blind.enough(curve) <= 7 and curve["power"].iloc[-1] > 0.98


def test_enough_is_where_the_curve_stays_at_the_target():
    def curve(*power):
        return pd.DataFrame(dict(features=np.arange(1, len(power) + 1) * 10, power=power))

    assert blind.enough(curve(0.2, 0.9, 0.7, 0.8, 0.9)) == 40 and blind.enough(curve(0.2, 0.6, 1.0)) == 25
    assert blind.enough(curve(0.9, 1.0)) == 10 and np.isnan(blind.enough(curve(0.9, 0.7)))
