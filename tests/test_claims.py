import re
import subprocess
from types import SimpleNamespace

import pandas as pd
import pytest

from tsae import claims, store

RESULTS = store.DATA / "results"


def claim(**changes) -> SimpleNamespace:
    own = dict(id="1", claim="it falls", published="a half", table="t", where="arm=a", take="only", column="value",
               better="over", bar=0.1, low=0.4, high=0.6, date="2026-01-02", post_hoc="")
    return SimpleNamespace(**(own | changes))


@pytest.mark.parametrize("value, low, high, says", [
    (0.5, 0.45, 0.55, "reproduced"), (0.3, 0.2, 0.41, "reproduced"), (0.3, 0.2, 0.39, "direction only"),
    (0.8, 0.7, 0.9, "direction only"), (0.3, 0.09, 0.5, "not reproduced"), (-1, -2, 0, "not reproduced"),
    (0.5, float("nan"), float("nan"), "not testable here"), (None, None, None, "not testable here"),
    (0.5, None, None, "reproduced"), (0.05, None, None, "not reproduced")])
def test_a_verdict_needs_the_whole_interval_beyond_the_bar(value, low, high, says):
    assert claims.verdict(claim(), value, low, high) == says
    if value is not None:  # the mirror image says the same of a value that must be small
        mirror = claim(better="under", bar=-0.1, low=-0.6, high=-0.4)
        low, high = (None, None) if low is None else (-high, -low)
        assert claims.verdict(mirror, -value, low, high) == says


def test_a_claim_without_a_published_size_is_reproduced_by_its_direction():
    nothing = float("nan")
    assert claims.verdict(claim(low=nothing, high=nothing), 9.0, 8.0, 10.0) == "reproduced"


def test_a_bound_says_nothing_of_what_may_lie_below_it():
    assert claims.verdict(claim(), 0.5, 0.5, 0.5, bound=True) == "direction only", "the true value may be .9"
    assert claims.verdict(claim(), 0.0, 0.0, 0.0, bound=True) == "not testable here"
    assert claims.verdict(claim(better="under"), 0.0, 0.0, 0.0, bound=True) == "not testable here"


def table_of(tmp_path, rows: list[dict], made: str = "2026-01-03T10:00", **parameters):
    store.write_table(tmp_path / "t.csv", pd.DataFrame(rows))
    store.write_json(tmp_path / "manifest.json", {"t.csv": dict(made=made, parameters=parameters)})
    return tmp_path


def held(tmp_path, **changes) -> dict:
    lines = pd.DataFrame([vars(claim(**changes))])
    return claims.held(lines, tmp_path).iloc[0].to_dict()


def test_a_claim_finds_its_row_or_says_that_there_is_none(tmp_path):
    rows = [dict(arm=arm, tokens=tokens, value=value, low=value - 0.1, high=value + 0.1)
            for arm, tokens, value in (("a", 1, 0.3), ("a", 10, 0.5), ("b", 100, 0.7))]
    table_of(tmp_path, rows)
    assert held(tmp_path, where="arm=a; tokens=longest")["value"] == 0.5
    assert held(tmp_path, where="arm=a", take="lowest")["value"] == 0.3
    assert held(tmp_path, where="arm=a; tokens=10")["ours"] == "0.5 [0.4, 0.6]"
    with pytest.raises(ValueError, match="2 rows of .*, one was expected"):
        held(tmp_path)
    for missing in (dict(where="arm=c"), dict(where="k=8"), dict(table="u")):
        assert held(tmp_path, **missing)["verdict"] == "not testable here"


def test_of_two_layers_the_main_one_decides(tmp_path):
    rows = [dict(arm="a", layer=layer, value=value, low=value - 0.1, high=value + 0.1) for layer, value in ((1, 0.3), (3, 0.5))]
    assert held(table_of(tmp_path, rows, layer=3))["value"] == 0.5
    assert held(tmp_path, take="lowest")["value"] == 0.3, "over all layers"
    with pytest.raises(ValueError, match="2 rows of .*, one was expected"):
        held(table_of(tmp_path, rows + rows, layer=3))


def test_a_measured_row_is_taken_rather_than_a_bound(tmp_path):
    rows = [dict(arm="a", value=value, low=value - 0.1, high=value + 0.1, bound=bound)
            for value, bound in ((0.2, True), (0.5, False), (0.7, False))]
    assert held(table_of(tmp_path, rows), take="lowest")["ours"] == "0.5 [0.4, 0.6]"
    assert held(table_of(tmp_path, rows[:1]), take="lowest")["ours"] == "at least 0.2"


def test_a_criterion_that_is_newer_than_its_table_is_marked(tmp_path):
    rows = [dict(arm="a", value=0.5, low=0.4, high=0.6)]
    assert not held(table_of(tmp_path, rows))["post_hoc"]
    assert held(table_of(tmp_path, rows, made="2026-01-01T10:00"))["post_hoc"]
    assert held(table_of(tmp_path, rows, made=""))["post_hoc"], "a table without a date is older"
    assert held(table_of(tmp_path, rows), post_hoc="changed")["post_hoc"], "for ever"


def test_a_line_that_cannot_be_applied_is_refused(tmp_path):
    text = (store.DATA / "claims.csv").read_text().replace(",over,", ",above,", 1)
    with pytest.raises(ValueError, match="claim 1 .*over or under"):
        claims.read(store.write_text(tmp_path / "claims.csv", text))


def test_every_claim_of_the_paper_has_a_line_of_its_own():
    lines = claims.read()
    assert lines["id"].is_unique and {int(re.match(r"\d+", name)[0]) for name in lines["id"]} >= set(range(1, 11))
    banded = lines.dropna(subset=["low", "high"])
    assert len(banded) and (banded["low"] < banded["high"]).all() and lines["bar"].notna().all()


def test_published_verdicts_are_those_of_the_criteria():
    """Nobody typed them: they follow from claims.csv and the published tables, marks included."""
    for path in RESULTS.glob("*/evidence.csv"):
        again = claims.held(claims.read(), path.parent).drop(columns=["value", "low", "high"])
        published = store.read_table(path)[list(again)].fillna({"ours": ""})
        pd.testing.assert_frame_equal(again.astype(str), published.astype(str))


def test_a_line_that_was_edited_after_its_date_says_so():
    command = ["git", "-C", str(store.ROOT), "blame", "--line-porcelain", "HEAD", "--", "data/claims.csv"]
    blamed = subprocess.run(command, capture_output=True, text=True)
    if blamed.returncode or (store.ROOT / ".git/shallow").exists():
        pytest.skip("there is no history here")
    committed = re.findall(r"^author-time (\d+)$.*?^\t(\w+),", blamed.stdout, re.M | re.S)[1:]
    lines = claims.read().set_index("id")
    for name, seconds in committed:
        if name in lines.index and not lines.loc[name, "post_hoc"]:
            late = pd.Timestamp(int(seconds), unit="s") - pd.Timestamp(lines.loc[name, "date"])
            assert late < pd.Timedelta(hours=1), f"claim {name} was edited {late} after its date: mark it post hoc"
