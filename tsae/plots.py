"""One style, and one function a figure: a result table in, a plotly figure out."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import display

from tsae.baseline import WITH, WITHOUT
from tsae.picture import picture, write_picture

COLOURS = {WITHOUT: "#6b7a8f", WITH: "#d9541e"}
SEQUENCE = ["#2b6cb0", "#d9541e", "#2f855a", "#8a5cc2", "#b7791f", "#6b7a8f"]
MARKERS = {"topk": "circle", "batchtopk": "square", "relu": "diamond", "jumprelu": "triangle-up", "gated": "x"}
pio.templates["tsae"] = go.layout.Template(layout=dict(
    font=dict(family="DejaVu Sans, Arial, sans-serif", size=15, color="#1a202c"), colorway=SEQUENCE,
    title=dict(x=0.01, xanchor="left", font=dict(size=17)), paper_bgcolor="white", plot_bgcolor="white",
    margin=dict(l=75, r=25, t=70, b=65), legend=dict(title=None, bgcolor="rgba(255,255,255,0.8)"),
    xaxis=dict(showline=True, linecolor="#4a5568", gridcolor="#edf2f7", ticks="outside", zeroline=False),
    yaxis=dict(showline=True, linecolor="#4a5568", gridcolor="#edf2f7", ticks="outside", zeroline=False)))
px.defaults.template, px.defaults.color_discrete_sequence = "tsae", SEQUENCE
STYLE = dict(legend_title_text="", template="tsae", width=860, height=460)


def show(figure: go.Figure, path: str | Path = "") -> None:
    """Display a figure, and write it: `path`.html always, `path`.png where kaleido finds a Chrome.

    The stored output holds the plotly bundle and beside it the PNG, which is what viewers without JavaScript show.
    """
    bundle = {"application/vnd.plotly.v1+json": json.loads(figure.to_json()), "text/plain": figure.layout.title.text or ""}
    image = picture(figure)  # small: a notebook holds every figure twice
    if image:
        bundle["image/png"] = image
    if path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.write_html(path.with_suffix(".html"), include_plotlyjs="directory")
        write_picture(figure, path.with_suffix(".png"))
    display(bundle, raw=True)


def _titled(figure: go.Figure, title: str, x: str = "", y: str = "", **layout) -> go.Figure:
    figure.update_layout(title=title, **(STYLE | layout))
    if x:
        figure.update_xaxes(title=x, row=1 if figure._grid_ref else None)
    if y:
        figure.update_yaxes(title=y, col=1 if figure._grid_ref else None)
    return figure


def _log_ticks(axis, values: pd.Series) -> None:
    """Few round numbers, written out: plotly's own mix of digits and powers cannot be read at a glance."""
    low, high = np.log10([values.min() / 1.3, values.max() * 1.3])
    digits = (1,) if high - low > 3 else (1, 2, 5) if high - low > 1 else (1, 1.5, 2, 3, 4, 5, 7)
    ticks = [digit * 10.0**power for power in range(-9, 10) for digit in digits]
    ticks = [tick for tick in ticks if low <= np.log10(tick) <= high]
    axis.update(tickvals=ticks, ticktext=[f"{tick:g}" if tick < 1e4 else f"{tick / 1000:g}k" for tick in ticks])


def _facet_names(figure: go.Figure, names: dict | None = None) -> go.Figure:
    return figure.for_each_annotation(
        lambda a: a.update(text=(names or {}).get(a.text.split("=")[-1], a.text.split("=")[-1]), font_size=15))


def loss_curve(table: pd.DataFrame) -> go.Figure:
    """Columns step, train, validation (nats a token)."""
    figure = px.line(table.melt("step", ["train", "validation"]), x="step", y="value", color="variable")
    return _titled(figure, "Training the embedded language model", "optimiser step", "cross-entropy (nats a token)")


def norms(table: pd.DataFrame) -> go.Figure:
    """Columns position, layer, norm."""
    table = table.assign(layer="layer " + table["layer"].astype(str))
    figure = px.line(table, x="position", y="norm", color="layer", log_y=True, markers=table["position"].nunique() < 20)
    return _titled(figure, "Activation norm by position (position 0 is BOS)", "position",
                   "mean norm of the activation")


def token_share(table: pd.DataFrame) -> go.Figure:
    """Columns layer, predictor, r2."""
    figure = px.line(table, x="layer", y="r2", color="predictor", markers=True, range_y=[min(0, table["r2"].min()), 1])
    figure.update_xaxes(dtick=1)
    return _titled(figure, "How much of the activation the token alone explains", "layer (resid_pre)",
                   "share of variance explained (R²)")


def suffix_cosine(table: pd.DataFrame) -> go.Figure:
    """Columns n, layer, position, cosine: one heat map for each n (the paper's Fig. 5)."""
    positions = sorted(table["position"].unique())
    grids = [table[table["n"] == n].pivot(index="layer", columns="position", values="cosine").reindex(columns=positions)
             for n in (1, 2, 3)]
    figure = px.imshow(np.stack([grid.values for grid in grids]), facet_col=0, aspect="auto", zmin=0.4, zmax=1,
                       x=grids[0].columns, y=grids[0].index.astype(str), color_continuous_scale="Viridis", origin="lower")
    names = dict(zip(("0", "1", "2"), ("BOS + last token", "BOS + last 2", "BOS + last 3")))
    figure.update_layout(coloraxis_colorbar=dict(title="cosine"))
    return _titled(_facet_names(figure, names), "The last tokens nearly determine the activation", "position", "layer",
                   width=1000, height=380)


def gram_counts(table: pd.DataFrame) -> go.Figure:
    """Columns n, per_million, grams (the paper's Fig. 1)."""
    table = table.assign(seen="over " + table["per_million"].map("{:.3g}".format) + " per million tokens",
                         n=table["n"].astype(str))
    figure = px.bar(table, x="n", y="grams", color="seen", barmode="group", log_y=True)
    return _titled(figure, "A few n-grams are seen enormously often", "n", "distinct n-grams")


def error_by_count(table: pd.DataFrame) -> go.Figure:
    """Columns count, error, sae: unigrams binned by training count (the paper's Fig. 2), with low and high quartiles."""
    figure = px.line(table, x="count", y="error", color="sae", markers=True, log_x=True, log_y=True,
                     error_y=table["high"] - table["error"], error_y_minus=table["error"] - table["low"],
                     color_discrete_map=COLOURS)
    for axis, column in ((figure.layout.xaxis, "count"), (figure.layout.yaxis, "error")):
        _log_ticks(axis, table[column])
    return _titled(figure, "The more often a token was seen, the better its unigram is reconstructed",
                   "times the token was seen in training", "error of [BOS, t]: median, quartiles")


def unigram_activations(table: pd.DataFrame, token: str) -> go.Figure:
    """Columns rank, activation, sae: pre-activations of one unigram over all features, sorted (the paper's Fig. 3)."""
    figure = px.line(table, x="rank", y="activation", color="sae", log_x=True, color_discrete_map=COLOURS)
    return _titled(figure, f"One unigram, [BOS, {token!r}], excites a handful of features strongly",
                   "feature, by rank", "pre-activation")


def shares(table: pd.DataFrame) -> go.Figure:
    """Columns sae, inputs, metric (answering, top_is_top, any_shared), value: claim 5."""
    labels = {"answering": "answer to one", "top_is_top": "of these: same<br>top token",
              "any_shared": "of these: share<br>a top token"}
    table = table[table["metric"].isin(labels)].assign(measure=lambda rows: rows["metric"].map(labels))
    figure = px.bar(table, x="measure", y="value", color="inputs", barmode="group", facet_col="sae", text_auto=".0%")
    figure.update_yaxes(range=[0, 1.08], tickformat=".0%", matches=None)
    return _titled(_facet_names(figure), "Features that short n-grams activate", " ", "share", width=1000)


def pareto(table: pd.DataFrame, title: str = "With the table, better reconstruction at every sparsity") -> go.Figure:
    """Columns architecture, table, l0, metric, value, low, high: a front for each architecture, with and without table."""
    figure = px.line(table, x="l0", y="value", color="table", facet_col="metric", symbol="architecture",
                     line_dash="architecture", log_x=True, log_y=True, error_y=table["high"] - table["value"],
                     error_y_minus=table["value"] - table["low"], color_discrete_map=COLOURS, symbol_map=MARKERS)
    figure.update_yaxes(matches=None, showticklabels=True).update_traces(marker_size=8)
    figure.update_xaxes(tickvals=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    for axis, (_, part) in zip(figure.select_yaxes(row=1), table.groupby("metric", sort=False)):
        _log_ticks(axis, part["value"])
    figure.for_each_trace(lambda trace: trace.update(name=", ".join(reversed(trace.name.split(", ")))))
    return _titled(_facet_names(figure), title, "L0 (active features a token)", "lower is better", width=1060, height=500)


def bars(table: pd.DataFrame, x: str, title: str, label: str, colour: str | None = None) -> go.Figure:
    """Horizontal bars with intervals: columns `x` (the names), value, low, high."""
    figure = px.bar(table, y=x, x="value", color=colour, barmode="group", orientation="h",
                    error_x=table["high"] - table["value"], error_x_minus=table["value"] - table["low"],
                    color_discrete_map=COLOURS)
    figure.update_yaxes(autorange="reversed")
    figure = _titled(figure, title, label, height=150 + 34 * table[x].nunique() * (2 if colour else 1))
    return figure.update_yaxes(title=None).update_layout(margin_l=20 + 9 * int(table[x].str.len().max()))


def speedup(table: pd.DataFrame) -> go.Figure:
    """Columns where (model, layer), metric, value, low, high: tokens the baseline needed over tokens the tokenized needed."""
    figure = px.scatter(table, x="where", y="value", color="metric", error_y=table["high"] - table["value"],
                        error_y_minus=table["value"] - table["low"], symbol="metric",
                        symbol_sequence=["circle", "diamond-open"])
    figure.update_traces(marker_size=11).update_yaxes(rangemode="tozero")
    figure.add_hline(y=1, line_dash="dot", line_color="#4a5568")
    return _titled(figure, "Training speed-up: baseline tokens / tokenized tokens to the same quality", " ",
                   "times fewer tokens", width=1000)


def unigram_classes(table: pd.DataFrame) -> go.Figure:
    """Columns size, table, answers, share (the paper's Fig. 7)."""
    figure = px.bar(table, x="size", y="share", color="answers", facet_col="table",
                    color_discrete_sequence=["#cbd5e0", "#90cdf4", "#3182ce", "#1a365d"])
    figure.update_yaxes(tickformat=".0%").update_xaxes(type="category")
    return _titled(_facet_names(figure), "Features by the number of unigrams they answer to", "dictionary size",
                   "share of live features")


def thresholds(table: pd.DataFrame, at: float) -> go.Figure:
    """Columns threshold, share, table, low, high: sensitivity of claim 7 to its threshold."""
    figure = px.line(table, x="threshold", y="share", color="table", markers=True, color_discrete_map=COLOURS,
                     error_y=table["high"] - table["share"], error_y_minus=table["share"] - table["low"])
    figure.update_yaxes(tickformat=".0%", rangemode="tozero").add_vline(x=at, line_dash="dot", line_color="#4a5568")
    return _titled(figure, "Features that answer to some unigram, over the threshold",
                   "threshold on the activation (share of the rms norm of the centred activations)",
                   "share of live features")


def cost(table: pd.DataFrame) -> go.Figure:
    """Columns cell, contender, n, d, k, seconds (of tests.bench step --full): time of a training step against its size."""
    axes = {"n": "features", "d": "width d", "k": "active features k"}
    parts = [table[table["cell"] == axis].assign(size=table[axis], axis=label) for axis, label in axes.items()]
    drawn = pd.concat(parts).assign(ms=lambda rows: 1e3 * rows["seconds"]).sort_values("size")
    figure = px.line(drawn, x="size", y="ms", color="contender", facet_col="axis", markers=True, log_x=True, log_y=True,
                     facet_col_spacing=0.04,
                     color_discrete_map={"tsae": "#2b6cb0", "tsae + table": COLOURS[WITH], "floor": "#a0aec0"})
    figure.update_xaxes(matches=None)
    _log_ticks(figure.layout.yaxis, drawn["ms"])
    for axis, label in zip(figure.select_xaxes(row=1), drawn["axis"].unique()):
        sizes = sorted(drawn.loc[drawn["axis"] == label, "size"].unique())
        axis.update(title=label, tickangle=0, tickfont_size=11, tickvals=sizes,
                    ticktext=[f"{size:g}" if size < 10_000 else f"{size / 1000:.0f}k" for size in sizes])
    return _titled(figure.for_each_annotation(lambda a: a.update(text="")),
                   "Time of a training step; what is not on the axis is at the base size (d 768, 12k features, k 32)", "",
                   "milliseconds", width=1060)


def ladder(table: pd.DataFrame) -> go.Figure:
    """Columns n, table, value, low, high: how well the last n tokens predict a feature."""
    figure = px.line(table, x="n", y="value", color="table", markers=True, color_discrete_map=COLOURS,
                     error_y=table["high"] - table["value"], error_y_minus=table["value"] - table["low"])
    figure.update_xaxes(dtick=1).update_yaxes(rangemode="tozero")
    return _titled(figure, "How many tokens predict a feature", "last n tokens", "R², mean over features, held-out")


def complexity_by_frequency(table: pd.DataFrame) -> go.Figure:
    """Columns frequency, table, value, low, high: complexity within firing-frequency bins."""
    figure = px.line(table, x="frequency", y="value", color="table", markers=True, log_x=True,
                     color_discrete_map=COLOURS, error_y=table["high"] - table["value"],
                     error_y_minus=table["value"] - table["low"])
    _log_ticks(figure.layout.xaxis, table["frequency"])
    figure.update_yaxes(range=[0, 1.02])
    return _titled(figure, "Complexity at equal firing frequency", "firing frequency (share of positions)",
                   "share not explained by the token")


def plane(table: pd.DataFrame) -> go.Figure:
    """Columns architecture, k, table, l0, complexity_1, fuzzing, one row an SAE: a point a setting, over its seeds."""
    drawn = table.groupby(["architecture", "k", "table"], as_index=False)[["fuzzing", "complexity_1", "l0"]].mean()
    drawn["label"] = np.where(drawn["architecture"].isin(["topk", "batchtopk"]), "k " + drawn["k"].astype(str), "")
    figure = px.scatter(drawn, x="fuzzing", y="complexity_1", color="table", symbol="architecture", symbol_map=MARKERS,
                        color_discrete_map=COLOURS, hover_data=["k", "l0"], text="label")
    figure.update_traces(marker_size=11, textposition="middle right", textfont_size=12)
    return _titled(figure, "Complexity and consistency, one point a kind of SAE",
                   "a simple rule finds the firing (balanced accuracy)",
                   "share not explained by the token")


def table_quality(table: pd.DataFrame) -> go.Figure:
    """Columns low (count in training), cosine_unigram, cosine_mean, ratio_mean, nmse_table, nmse: the table, by count."""
    names = {"cosine_unigram": "cosine to the unigram residual", "cosine_mean": "cosine to the token's mean",
             "ratio_mean": "norm over that of the mean", "nmse_table": "nmse, table alone", "nmse": "nmse, whole SAE"}
    drawn = table[table["low"] > 0].rename(columns=names).melt(["low"], list(names.values()), "measure")
    drawn["part"] = np.where(drawn["measure"].str.startswith("nmse"), "error", "cosine or ratio")
    figure = px.line(drawn, x="low", y="value", color="measure", facet_col="part", markers=True, log_x=True,
                     facet_col_spacing=0.08)
    figure.update_yaxes(matches=None, showticklabels=True, rangemode="tozero", title="")
    for axis in figure.select_xaxes():
        _log_ticks(axis, drawn["low"])
    return _titled(_facet_names(figure), "The table, token by token", "count in the training text", "", width=1060)
