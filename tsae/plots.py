"""One function a figure: a result table in, a plotly figure out. A title names what is drawn."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import display

from tsae.baseline import FROZEN, UNTRAINED, UNTRAINED_FROZEN, WITH, WITHOUT
from tsae.picture import HEIGHT, WIDTH, picture, write_picture

COLOURS = {WITHOUT: "#6b7a8f", WITH: "#d9541e", FROZEN: "#2b6cb0",  # an arm has one everywhere
           "no table, as many parameters": "#2f855a", "bigrams": "#8a5cc2",
           "table, encoder sees all": "#b7791f"}
NULLS = {UNTRAINED: "#1a202c", UNTRAINED_FROZEN: "#b7791f"}
SEQUENCE = ["#2b6cb0", "#d9541e", "#2f855a", "#8a5cc2", "#b7791f", "#6b7a8f"]
MORE = ["#00838f", "#ad1457", "#5d4037", "#9e9d24"]  # where a figure has more than six kinds
MARKERS = dict(topk="circle", batchtopk="square", relu="diamond", jumprelu="triangle-up", gated="x",
               untrained="star-open", permuted="hexagon-open", gaussian="cross-open")
AXIS = dict(showline=True, linecolor="#4a5568", gridcolor="#edf2f7", ticks="outside",
            zeroline=False)
pio.templates["tsae"] = go.layout.Template(layout=dict(
    font=dict(family="DejaVu Sans, Arial, sans-serif", size=15, color="#1a202c"),
    colorway=SEQUENCE, title=dict(x=0.01, xanchor="left", font=dict(size=17)),
    paper_bgcolor="white", plot_bgcolor="white", margin=dict(l=75, r=25, t=70, b=65),
    xaxis=AXIS, yaxis=AXIS))
px.defaults.template = "tsae"
DOTTED = dict(line_dash="dot", line_color="#4a5568")
BELOW = dict(title=None, orientation="h", x=0, y=-0.25, yanchor="top")
STYLE = dict(legend=BELOW, template="tsae", width=WIDTH, height=HEIGHT)


def show(figure: go.Figure, path: str | Path = "") -> None:
    """Display a figure. With a `path` write it too: as html, and as png where there is a Chrome."""
    bundle = {"application/vnd.plotly.v1+json": json.loads(figure.to_json()),
              "text/plain": figure.layout.title.text or ""}
    if image := picture(figure):  # small: for viewers without JavaScript
        bundle["image/png"] = image
    if path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.write_html(path.with_suffix(".html"), include_plotlyjs="directory")
        write_picture(figure, path.with_suffix(".png"))
    display(bundle, raw=True)


def _titled(figure: go.Figure, title: str, x: str = "", y: str = "", **layout) -> go.Figure:
    """The figure in the common style, each panel headed by its value; y stands at the left one."""
    figure.update_layout(title=title, **(STYLE | layout))
    for heading in figure.layout.annotations:  # "nmse", not plotly's "metric=nmse"
        heading.update(text=heading.text.split("=")[-1], font_size=15)
    for trace in figure.data:  # under the mouse: "position 115, n 3", not "position=115"
        if trace.hovertemplate:
            trace.hovertemplate = trace.hovertemplate.replace("=", " ").replace("<br>", ", ")
    first = 1 if figure._grid_ref else None  # of the panels' rows and columns
    if x:
        figure.update_xaxes(title=x, row=first)
    return figure.update_yaxes(title=y, col=first) if y else figure


def _error_bars(table: pd.DataFrame, value: str = "value", axis: str = "y") -> dict[str, pd.Series]:
    """Arguments for plotly express: error bars from the column low to the column high."""
    return {f"error_{axis}": table["high"] - table[value],
            f"error_{axis}_minus": table[value] - table["low"]}


def _log_ticks(values: pd.Series) -> dict[str, list]:
    """Few round labels for a log axis of `values`. Plotly's own digits are hard to read."""
    low, high = np.log10([values[values > 0].min() / 1.3, values.max() * 1.3])
    digits = (1, 1.5, 2, 3, 4, 5, 7)
    if high - low > 1:  # decades
        digits = (1,) if high - low > 3 else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(-9, 10) for digit in digits]
    ticks = [tick for tick in ticks if low <= np.log10(tick) <= high]
    labels = [f"{tick:g}" if tick < 1e4 else f"{tick / 1000:g}k" for tick in ticks]
    return dict(tickvals=ticks, ticktext=labels)


def _lines(table: pd.DataFrame, x: str, y: str, color: str = "table", **options) -> go.Figure:
    """A line for each `color`, with intervals where the table has the columns low and high."""
    colours = COLOURS if color in ("table", "sae") else None  # the column of arms
    options = dict(markers=True, facet_col_spacing=0.08, color_discrete_map=colours) | options
    if "high" in table:
        options |= _error_bars(table, y)
    figure = px.line(table, x, y, color=color, **options)
    if options.get("log_x"):
        figure.update_xaxes(_log_ticks(table[x]))
    if options.get("log_y"):
        figure.update_yaxes(_log_ticks(table[y]))
    return figure


def loss_curve(table: pd.DataFrame) -> go.Figure:
    """Columns step, train, validation (nats a token)."""
    figure = px.line(table, "step", ["train", "validation"])
    return _titled(figure, "Cross-entropy of the embedded model", "optimiser step", "nats a token")


def training(table: pd.DataFrame) -> go.Figure:
    """Columns tokens, nmse, table: the error of SAEs while they train."""
    figure = _lines(table, "tokens", "nmse", log_y=True)
    figure.update_yaxes(_log_ticks(table["nmse"]))
    return _titled(figure, "Error on the batch, by training tokens", "training tokens", "nmse")


def norms(table: pd.DataFrame) -> go.Figure:
    """Columns position, layer, norm."""
    drawn = table.assign(layer="layer " + table["layer"].astype(str))
    figure = _lines(drawn, "position", "norm", "layer", log_y=True,
                    markers=drawn["position"].nunique() < 20)
    return _titled(figure, "Activation norm by position (0 is BOS)", "position", "mean norm")


def token_share(table: pd.DataFrame) -> go.Figure:
    """Columns layer, predictor, r2."""
    figure = px.line(table, "layer", "r2", color="predictor", markers=True)
    lowest = max(-1, min(0, table["r2"].min()))  # what is worse than the mean by far leaves below
    figure.update_xaxes(dtick=1).update_yaxes(range=[lowest, 1])
    return _titled(figure, "Share of the activation's variance that the token explains",
                   "layer (resid_pre)", "share of variance explained (R²)")


def suffix_cosine(table: pd.DataFrame, where: str = "") -> go.Figure:
    """Columns n, layer, position, cosine: one heat map for each n (the paper's Fig. 5)."""
    grid = table.pivot(index=["n", "layer"], columns="position", values="cosine")
    figure = px.imshow(np.stack([grid.loc[n] for n in (1, 2, 3)]), x=grid.columns, facet_col=0,
                       y=grid.loc[1].index.astype(str), origin="lower", aspect="auto",
                       zmin=0.4, zmax=1, color_continuous_scale="Viridis")
    for heading, last in zip(figure.layout.annotations, ("token", "2", "3")):
        heading.text = f"BOS + last {last}"
    figure.update_traces(hovertemplate="position %{x}, layer %{y}, cosine %{z:.2f}<extra></extra>")
    bar = dict(title="cosine", tickvals=[0.4, 0.6, 0.8, 1], ticktext=["0.4 or less", 0.6, 0.8, 1])
    return _titled(figure, f"Cosine of the activation to that of BOS and the last n tokens{where}",
                   "position", "layer", width=940, height=380, coloraxis_colorbar=bar)


def gram_counts(table: pd.DataFrame) -> go.Figure:
    """Columns n, per_million, grams (the paper's Fig. 1)."""
    seen = table["per_million"].map("over {:.3g} per million tokens".format)
    drawn = table.assign(seen=seen, n=table["n"].astype(str))
    figure = px.bar(drawn, "n", "grams", color="seen", barmode="group", log_y=True)
    figure.update_yaxes(_log_ticks(drawn["grams"]))
    return _titled(figure, "Distinct n-grams by how often they are seen", "n", "distinct n-grams")


def error_by_count(table: pd.DataFrame) -> go.Figure:
    """Columns count, error, low and high (quartiles), sae: unigrams by training count (Fig. 2)."""
    figure = _lines(table, "count", "error", "sae", log_x=True, log_y=True)
    return _titled(figure, "Reconstruction error of a unigram by the token's training count",
                   "times the token was seen in training", "error of [BOS, t]: median, quartiles")


def unigram_activations(table: pd.DataFrame, token: str) -> go.Figure:
    """Columns rank, activation, sae: sorted pre-activations of one unigram (the paper's Fig. 3)."""
    figure = _lines(table, "rank", "activation", "sae", log_x=True, markers=False)
    return _titled(figure, f"Pre-activations of all features on the unigram [BOS, {token!r}]",
                   "feature, by rank", "pre-activation")


def shares(table: pd.DataFrame) -> go.Figure:
    """Columns sae, inputs, bar, metric, value, low, high: the paper's results 5 and 7.

    What untrained SAEs reach are lines through the bars of the arms.
    """
    drawn = table[table["metric"] == "answering"]
    drawn = drawn.assign(bar=drawn["bar"].str.replace(" ", "<br>", n=1))
    arms, null = drawn[~drawn["sae"].isin(NULLS)], drawn[drawn["sae"].isin(NULLS)]
    figure = px.bar(arms, "bar", "value", "sae", facet_col="inputs", barmode="group",
                    color_discrete_map=COLOURS, **_error_bars(arms))
    lines = px.scatter(null, "bar", "value", "sae", facet_col="inputs", color_discrete_map=NULLS)
    lines.update_traces(marker=dict(symbol="line-ew-open", size=36, line_width=3))
    figure.add_traces(lines.data).update_traces(error_y_thickness=1, error_y_width=2)
    figure.update_xaxes(tickangle=0, tickfont_size=13)
    figure.update_yaxes(range=[0, 1.04], tickformat=".0%")
    title = "Share of live features that some input, fed alone, drives above a bar"
    return _titled(figure, title, "bar", "share of live features", width=940,
                   legend=BELOW | dict(y=-0.3))


def pareto(table: pd.DataFrame, title: str = "Error by sparsity, by kind of SAE") -> go.Figure:
    """Columns architecture, table, l0, metric, value, low, high: a line a kind of SAE (Fig. 6)."""
    figure = _lines(table, "l0", "value", facet_col="metric", log_x=True, log_y=True,
                    symbol="architecture", symbol_map=MARKERS, line_dash="architecture")
    figure.update_yaxes(matches=None, showticklabels=True).update_traces(marker_size=8)
    figure.update_xaxes(tickvals=[1, 2, 4, 8, 16, 32, 64, 128, 256], ticktext=None)
    for axis, (_, part) in zip(figure.select_yaxes(row=1), table.groupby("metric", sort=False)):
        axis.update(_log_ticks(part["value"]))
    for trace in figure.data:  # "topk, with table", not "with table, topk"
        trace.name = ", ".join(reversed(trace.name.split(", ")))
    return _titled(figure, title, "L0 (active features a token)", "error", width=940, height=560)


def gains(table: pd.DataFrame, title: str) -> go.Figure:
    """Columns arm, tokens, metric, value, low, high: shares saved, over training tokens."""
    drawn = table[table["metric"].isin(["nmse", "ce_added"])].sort_values("tokens")
    others = [arm for arm in drawn["arm"].unique() if arm not in COLOURS]
    free = [colour for colour in SEQUENCE + MORE if colour not in COLOURS.values()]
    colours = COLOURS | dict(zip(others, free))
    figure = _lines(drawn, "tokens", "value", "arm", facet_col="metric", log_x=True,
                    color_discrete_map=colours)
    figure.update_yaxes(tickformat=".0%").add_hline(0, **DOTTED)
    ticks = sorted(drawn["tokens"].unique())
    labels = [f"{tick / 1e6:g}M" if tick >= 1e6 else f"{tick / 1e3:g}k" for tick in ticks]
    figure.update_xaxes(tickvals=ticks, ticktext=labels)
    return _titled(figure, title, "training tokens", "share by which it is lower", width=940,
                   height=560)


def bars(table: pd.DataFrame, x: str, title: str, label: str) -> go.Figure:
    """Horizontal bars with intervals: columns `x` (the names), value, low, high."""
    figure = px.bar(table, y=x, x="value", orientation="h", **_error_bars(table, axis="x"))
    figure = _titled(figure, title, label, height=150 + 34 * table[x].nunique())
    figure.update_yaxes(autorange="reversed", title=None)
    return figure.update_layout(margin_l=20 + 9 * int(table[x].str.len().max()))


def speedup(table: pd.DataFrame) -> go.Figure:
    """Columns where (model, layer), metric, value, low, high: the paper's speed-up (result 9)."""
    figure = px.scatter(table, "where", "value", "metric", "metric", **_error_bars(table),
                        symbol_sequence=["circle", "diamond-open"])
    figure.update_traces(marker_size=11).update_yaxes(rangemode="tozero").add_hline(1, **DOTTED)
    return _titled(figure, "Training speed-up: tokens to equal quality, baseline / tokenized", " ",
                   "ratio of training tokens", width=940)


def unigram_classes(table: pd.DataFrame) -> go.Figure:
    """Columns size, table, answers, share (the paper's Fig. 7)."""
    figure = px.bar(table, x="size", y="share", color="answers", facet_col="table",
                    color_discrete_sequence=["#cbd5e0", "#90cdf4", "#3182ce", "#1a365d"])
    figure.update_yaxes(tickformat=".0%").update_xaxes(type="category")
    return _titled(figure, "Features by the number of unigrams they answer to",
                   "dictionary size", "share of live features")


def thresholds(table: pd.DataFrame, chosen: float) -> go.Figure:
    """Columns threshold, share, table, low, high: result 7 by threshold; the dots mark `chosen`."""
    figure = _lines(table, "threshold", "share")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero").add_vline(chosen, **DOTTED)
    return _titled(figure, "Features that answer to some unigram, by threshold",
                   "threshold on the activation (share of the rms norm of the centred activations)",
                   "share of live features")


def cost(table: pd.DataFrame) -> go.Figure:
    """Columns cell (base, or what varies: n, d, k), contender, n, d, k, seconds: of tests.bench."""
    axes = {"n": "features", "d": "width d", "k": "active features k"}
    parts = [table[table["cell"] == axis].assign(size=table[axis], axis=label)
             for axis, label in axes.items()]
    drawn = pd.concat(parts).eval("ms = 1000 * seconds").sort_values("size")
    colours = {"tsae": "#2b6cb0", "tsae + table": COLOURS[WITH], "floor": "#a0aec0"}
    figure = px.line(drawn, x="size", y="ms", color="contender", facet_col="axis", markers=True,
                     log_x=True, log_y=True, facet_col_spacing=0.04, color_discrete_map=colours)
    figure.update_xaxes(matches=None, tickangle=0, tickfont_size=11)
    figure.layout.yaxis.update(_log_ticks(drawn["ms"]))
    for axis, (label, part) in zip(figure.select_xaxes(row=1), drawn.groupby("axis", sort=False)):
        sizes = sorted(part["size"].unique())
        axis.update(title=label, tickvals=sizes, ticktext=[
            f"{size:g}" if size < 10_000 else f"{size / 1000:.0f}k" for size in sizes])
    figure.layout.annotations = ()  # the x axes say it
    base = table[table["cell"] == "base"].iloc[0]
    title = "Time of a training step; the rest at d {d}, {n} features, k {k}".format(**base)
    return _titled(figure, title, "", "milliseconds", width=940)


def ladder(table: pd.DataFrame) -> go.Figure:
    """Columns n, table, value, low, high: how well the last n tokens predict a feature."""
    figure = _lines(table, "n", "value").update_xaxes(dtick=1).update_yaxes(rangemode="tozero")
    return _titled(figure, "R² of a feature's activation given the last n tokens", "last n tokens",
                   "R², mean over features, held-out")


def complexity_by_frequency(table: pd.DataFrame) -> go.Figure:
    """Columns frequency, table, value, low, high: complexity within firing-frequency bins."""
    figure = _lines(table, "frequency", "value", log_x=True).update_yaxes(range=[0, 1.02])
    return _titled(figure, "Complexity by firing frequency",
                   "firing frequency (share of positions)", "share not explained by the token")


def plane(table: pd.DataFrame, nulls: pd.DataFrame | None = None) -> go.Figure:
    """Columns architecture, k, table, l0, complexity_1, fuzzing, a row an SAE: means over seeds.

    `nulls`, drawn beside: columns null, table, metric, value.
    """
    drawn = table.groupby(["architecture", "k", "table"], as_index=False).mean(numeric_only=True)
    has_k = drawn["architecture"].isin(["topk", "batchtopk"])
    drawn["label"] = np.where(has_k, "k " + drawn["k"].astype(str), "")
    if nulls is not None:
        points = nulls.pivot(index=["null", "table"], columns="metric", values="value")
        points = points.drop("trained").reset_index().rename(columns={"null": "architecture"})
        drawn = pd.concat([drawn, points])
    figure = px.scatter(drawn, "fuzzing", "complexity_1", "table", "architecture", text="label",
                        color_discrete_map=COLOURS, symbol_map=MARKERS, hover_data=["k", "l0"])
    figure.update_traces(marker_size=11, textposition="middle right", textfont_size=12)
    figure.update_traces(textposition="bottom center", selector=dict(marker_symbol="square"))
    return _titled(figure, "Complexity and consistency, one point a kind of SAE",
                   "balanced accuracy of a simple rule", "share not explained by the token",
                   width=940, height=600)


def table_quality(table: pd.DataFrame) -> go.Figure:
    """Columns low (the least training count of a bin of tokens) and `names`: the table's rows."""
    names = dict(cosine_unigram="cosine to the unigram residual",
                 cosine_mean="cosine to the token's mean", ratio_mean="norm over that of the mean",
                 nmse_table="nmse, table alone", nmse="nmse, whole SAE")
    drawn = table[table["low"] > 0].rename(columns=names).melt("low", [*names.values()], "measure")
    drawn["part"] = np.where(drawn["measure"].str.contains("nmse"), "error", "cosine or ratio")
    figure = _lines(drawn, "low", "value", "measure", log_x=True, facet_col="part")
    figure.update_yaxes(matches=None, showticklabels=True, rangemode="tozero", title="")
    return _titled(figure, "Rows of the table by training count", "count in the training text",
                   width=940)
