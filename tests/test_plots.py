"""Figures carry the values of their tables; a picture is made where a Chrome is at hand."""

import asyncio
import inspect
import json
import os
import re
import subprocess
import sys

import pandas as pd
import plotly.graph_objects as go
import pytest
from choreographer.browsers.chromium import Chromium

from tsae import picture, plots

FRONT = pd.DataFrame([dict(architecture=a, table=t, l0=k, metric=m, value=1 / k, low=0.9 / k, high=1.1 / k)
                      for a in ("topk", "gated") for t in (plots.WITHOUT, plots.WITH) for k in (4, 8)
                      for m in ("nmse", "ce_added")])


def test_a_front_has_one_line_a_kind_and_carries_the_values():
    figure = plots.pareto(FRONT)
    assert len(figure.data) == 2 * 2 * 2
    trace = next(t for t in figure.data if t.name == "topk, " + plots.WITH)
    assert list(trace.x) == [4, 8] and list(trace.y) == [0.25, 0.125]
    assert list(trace.error_y.array) == pytest.approx([0.025, 0.0125])
    assert trace.line.color == plots.COLOURS[plots.WITH]


def test_suffix_cosines_keep_their_places():
    table = pd.DataFrame([dict(n=n, layer=layer, position=p, cosine=n / 10 + layer / 100)
                          for n in (1, 2, 3) for layer in (0, 1) for p in range(n, 6)])
    figure = plots.suffix_cosine(table)
    assert len(figure.data) == 3 and figure.data[2].z[1][-1] == pytest.approx(0.31)
    assert figure.data[2].z[0][0] != figure.data[2].z[0][0], "a position without a suffix of three is empty"


def test_what_untrained_saes_reach_are_lines_in_the_panel_of_their_inputs():
    table = pd.DataFrame([dict(sae=sae, inputs=inputs, bar=bar, metric=metric, value=i + j / 10, low=0, high=1)
                          for i, inputs in enumerate(("unigrams", "bigrams")) for j, bar in enumerate(("absolute", "its mean"))
                          for sae in (plots.WITHOUT, plots.WITH, *plots.NULLS) for metric in ("answering", "live")])
    figure = plots.shares(table)
    assert [trace.type for trace in figure.data] == ["bar"] * 4 + ["scatter"] * 4
    for trace in figure.data:
        i = ("x", "x2").index(trace.xaxis)
        assert list(trace.x) == ["absolute", "its<br>mean"] and list(trace.y) == [i, i + 0.1]
        assert trace.marker.color == (plots.COLOURS | plots.NULLS)[trace.name]
    assert len({trace.name for trace in figure.data if trace.showlegend}) == 4


KINDS = pd.DataFrame(dict(table=[plots.WITHOUT, plots.WITH] * 2, n=[1, 1, 2, 2], position=[0, 1, 0, 1], layer=[0, 0, 1, 1],
                          value=[0.2, 0.3, 0.4, 0.5], low=[0.1, 0.2, 0.3, 0.4], high=[0.3, 0.4, 0.5, 0.6]))
KINDS["sae"] = KINDS["table"]


def renamed(**names: str) -> pd.DataFrame:
    """KINDS with columns of these names, each a copy of another."""
    return KINDS.assign(**{name: KINDS[of] for name, of in names.items()})


STEPS = pd.DataFrame([dict(contender="tsae", cell=cell, n=2 * n, d=d, k=4, seconds=0.1)
                      for cell in ("base", "n", "d", "k") for n in (8, 20_000) for d in (2, 3)])
NULLS = pd.DataFrame([dict(null=null, table=plots.WITH, metric=metric, value=0.9) for null in ("trained", "permuted")
                      for metric in ("complexity_1", "fuzzing", "nmse")])
INPUTS = {
    "loss_curve": (renamed(step="n", train="low", validation="high").drop(columns="value"),),
    "norms": (renamed(norm="value"),), "token_share": (renamed(predictor="sae", r2="value"),),
    "suffix_cosine": (pd.concat([renamed(cosine="value").assign(n=n) for n in (1, 2, 3)]),),
    "gram_counts": (renamed(per_million="value", grams="n"),),
    "error_by_count": (renamed(count="n", error="value"),),
    "unigram_activations": (renamed(rank="n", activation="value"), " the"),
    "training": (renamed(tokens="n", nmse="value").drop(columns=["low", "high"]),),
    "shares": (renamed(inputs="table", bar="position").astype({"bar": str}).assign(metric="answering"),), "pareto": (FRONT,),
    "gains": (renamed(arm="sae", tokens="n").assign(metric=["nmse", "ce_added"] * 2), ""),
    "bars": (KINDS, "sae", "", "error"), "speedup": (renamed(where="sae").assign(metric="nmse"),),
    "unigram_classes": (renamed(size="n", answers="position", share="value").astype({"answers": str}),),
    "thresholds": (renamed(threshold="n", share="value"), 1.5), "cost": (STEPS,), "ladder": (KINDS,),
    "complexity_by_frequency": (renamed(frequency="value"),),
    "plane": (renamed(k="n", fuzzing="low", complexity_1="high", l0="n").assign(architecture="topk"), NULLS),
    "table_quality": (renamed(cosine_unigram="value", cosine_mean="low", ratio_mean="high", nmse_table="low",
                              nmse="value").drop(columns="value"),)}
VERDICTS = re.compile(r"\b(better|best|worse|worst|more|most|fewer|less|few|only|nearly|almost|enormously|strongly|handful|"
                      r"every|always|never|determines?|improves?|beats?|wins?|helps?|gains?|falls?|rises?|predicts?|"
                      r"matters?)\b", re.I)


def test_every_figure_has_a_table_here():
    own = [name for name, made in inspect.getmembers(plots, inspect.isfunction)
           if made.__module__ == plots.__name__ and not name.startswith("_")]
    assert set(own) - {"show"} == set(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_a_figure_names_quantities_and_fits_the_page(name):
    figure = getattr(plots, name)(*INPUTS[name])
    assert figure.data and figure.layout.width <= 940 and figure.layout.height <= 600, "a cell beside the sidebar"
    assert figure.layout.legend.orientation == "h" and figure.layout.legend.y < 0, "the legend stands below"
    for trace in figure.data:  # under the mouse stand names, as in "position 115, cosine 0.82"
        assert not re.search(r"=|<br>|^x |, y ", trace.hovertemplate or ""), trace.hovertemplate
    title = figure.layout.title.text
    assert (title or name in ("bars", "gains")) and not VERDICTS.search(title), "a title holds whatever the data say"
    assert not any("=" in heading.text for heading in figure.layout.annotations)


def test_nulls_stand_beside_the_saes_on_the_plane():
    alone, beside = plots.plane(INPUTS["plane"][0]), plots.plane(*INPUTS["plane"])
    assert len(alone.data) == 2 and {trace.name for trace in beside.data} - {trace.name for trace in alone.data} == {
        f"{plots.WITH}, permuted"}
    assert [trace.marker.symbol for trace in beside.data if "permuted" in trace.name] == ["hexagon-open"]


def test_titles_with_a_verdict_are_recognised():
    for title in ("The last tokens nearly determine the activation", "A few n-grams are seen enormously often",
                  "With the table, better reconstruction at every sparsity", "How many tokens predict a feature",
                  "One unigram, [BOS, 'a'], excites a handful of features strongly",
                  "The more often a token was seen, the better its unigram is reconstructed"):
        assert VERDICTS.search(title)


@pytest.mark.parametrize("low, high, expected", [
    (2, 900, "2 5 10 20 50 100 200 500 1000"), (0.5, 90_000, "1 10 100 1000 10k 100k"),
    (0.06, 0.15, "0.05 0.07 0.1 0.15"), (0, 10, "10")])
def test_a_log_axis_is_labelled_with_few_round_numbers(low, high, expected):
    ticks = plots._log_ticks(pd.Series([low, high]))
    assert " ".join(ticks["ticktext"]) == expected and len(ticks["tickvals"]) == len(ticks["ticktext"])


def test_show_writes_the_page_and_leaves_a_bundle(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda bundle, raw: shown.append(bundle))
    for module in (plots, picture):
        monkeypatch.setattr(module, "picture", lambda figure, scale=1.0: b"png")
    plots.show(go.Figure(layout_title_text="a title"), tmp_path / "figures/one")
    assert (tmp_path / "figures/one.png").read_bytes() == b"png" and (tmp_path / "figures/one.html").is_file()
    assert json.dumps(shown[0]["application/vnd.plotly.v1+json"]) and shown[0]["image/png"] == b"png"


@pytest.mark.parametrize("browser", ["no/such/browser", sys.executable], ids=["missing", "not a browser"])
def test_no_chrome_costs_the_picture_only(tmp_path, monkeypatch, browser):
    """In a process of its own, with the real kaleido: it must neither raise nor wait."""
    code = ("import plotly.graph_objects as go; from tsae import picture, plots; "
            "print(plots.show(go.Figure(), 'one'), picture.picture(go.Figure()))")
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | dict(TSAE_PNG="1", BROWSER_PATH=browser),
                          capture_output=True, text=True, timeout=120)
    assert told.returncode == 0 and told.stdout.endswith("None None\n"), told.stderr
    assert (tmp_path / "one.html").is_file() and not (tmp_path / "one.png").exists()


@pytest.mark.skipif(Chromium.find_browser(skip_local=False) is None, reason="no Chrome here")
def test_a_chrome_draws_the_picture(monkeypatch):
    monkeypatch.setenv("TSAE_PNG", "1")
    assert picture.picture(go.Figure(layout=dict(width=100, height=80))).startswith(b"\x89PNG")


def test_a_browser_that_does_not_answer_is_asked_once(monkeypatch):
    monkeypatch.setattr(picture._Painter, "_opened", lambda self, _: asyncio.sleep(60))
    painter = picture._Painter(patience_s=0.1)
    assert painter.browser is None and not painter.works
    monkeypatch.setenv("TSAE_PNG", "1")
    monkeypatch.setattr(picture, "_painter", lambda: painter)
    monkeypatch.setattr(painter, "wait", lambda work: pytest.fail("asked again"))
    assert picture.picture(go.Figure()) is None
