"""Every figure is drawn from the committed tables; a picture is made where a Chrome is at hand."""

import asyncio
import json
import os
import subprocess
import sys

import pandas as pd
import plotly.graph_objects as go
import pytest
from choreographer.browsers.chromium import Chromium

from tsae import plots

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


def test_show_writes_the_page_and_leaves_a_bundle(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda bundle, raw: shown.append(bundle))
    monkeypatch.setattr(plots, "picture", lambda figure, scale=1.0: b"png")
    plots.show(go.Figure(layout_title_text="a title"), tmp_path / "figures/one")
    assert (tmp_path / "figures/one.png").read_bytes() == b"png" and (tmp_path / "figures/one.html").is_file()
    assert json.dumps(shown[0]["application/vnd.plotly.v1+json"]) and shown[0]["image/png"] == b"png"


@pytest.mark.parametrize("browser", ["no/such/browser", sys.executable], ids=["missing", "not a browser"])
def test_no_chrome_costs_the_picture_only(tmp_path, monkeypatch, browser):
    """In a process of its own, with the real kaleido: it must neither raise nor wait."""
    code = ("import plotly.graph_objects as go; from tsae import plots; "
            "print(plots.show(go.Figure(), 'one'), plots.picture(go.Figure()))")
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | dict(TSAE_PNG="1", BROWSER_PATH=browser),
                          capture_output=True, text=True, timeout=120)
    assert told.returncode == 0 and told.stdout.endswith("None None\n"), told.stderr
    assert (tmp_path / "one.html").is_file() and not (tmp_path / "one.png").exists()


@pytest.mark.skipif(Chromium.find_browser(skip_local=False) is None, reason="no Chrome here")
def test_a_chrome_draws_the_picture(monkeypatch):
    monkeypatch.setenv("TSAE_PNG", "1")
    assert plots.picture(go.Figure(layout=dict(width=100, height=80))).startswith(b"\x89PNG")


def test_a_browser_that_does_not_answer_is_asked_once(monkeypatch):
    painter = plots._Painter.__new__(plots._Painter)
    monkeypatch.setattr(plots._Painter, "_opened", lambda self, _: asyncio.sleep(60))
    painter.__init__(patience_s=0.1)
    assert painter.browser is None and not painter.works
