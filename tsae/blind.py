"""The blind scoring protocol of the paper's Table 1: shuffled, source hidden, scores kept as they are given."""

import html
import os
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

SCALES = {"interpretability": "1-4 no pattern, 5-7 noisy, 8-10 clear",
          "complexity": "1-3 unigrams, 4-6 simple patterns, 7-10 complex semantics"}


def table(contexts: pd.DataFrame, title: str = "") -> str:
    """A feature's contexts (from features.contexts) as an HTML table, the activating token marked, all text escaped."""
    def visible(text: str) -> str:
        return html.escape(text.replace("\n", "⏎").replace("\t", "→"))

    lines = [f"<tr><td style='color:#718096'>{row.code:.1f}</td><td style='text-align:right'>{visible(row.before)}</td>"
             f"<td><mark>{visible(row.token)}</mark></td><td>{visible(row.after)}</td></tr>" for row in contexts.itertuples()]
    return (f"<b>{html.escape(title)}</b><table style='font-family:monospace;font-size:12px;white-space:pre'>"
            f"{''.join(lines)}</table>")


class Study:
    """Features to score and the scores so far. `contexts` maps (source, feature) to its table of contexts.

    Scores are appended to the csv at `path`, one line each, and read back from it: a study goes on where it was left.
    """

    def __init__(self, contexts: dict[tuple[str, int], pd.DataFrame], path: str | Path, seed: int = 0):
        self.contexts, self.path = contexts, Path(path)
        keys = sorted(contexts)
        self.order = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
        known = set(self.order)
        held = pd.read_csv(self.path) if self.path.is_file() else pd.DataFrame(columns=["source", "feature", *SCALES])
        if not {"source", "feature", *SCALES} <= set(held.columns):
            raise ValueError(f"{self.path} is no file of blind scores: it needs the columns source, feature, "
                             f"{', '.join(SCALES)}")
        self.scores = [row for row in held.to_dict("records") if (row["source"], row["feature"]) in known]

    @property
    def next(self) -> tuple[str, int] | None:
        """The first feature without a score, or None at the end."""
        done = {(row["source"], row["feature"]) for row in self.scores}
        return next((key for key in self.order if key not in done), None)

    @property
    def finished(self) -> bool:
        return self.next is None

    def record(self, interpretability: int, complexity: int) -> None:
        """Score the next feature, each 1 to 10; the line is on disk when this returns."""
        given = dict(interpretability=interpretability, complexity=complexity)
        for name, value in given.items():
            if value not in range(1, 11):
                raise ValueError(f"{name} is {value!r}: a whole number from 1 to 10 was expected")
        source, feature = self.next
        row = dict(source=source, feature=feature, **given)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first = not self.path.is_file()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(pd.DataFrame([row]).to_csv(index=False, header=first, lineterminator="\n"))
            file.flush()
            os.fsync(file.fileno())
        self.scores.append(row)

    def summary(self) -> pd.DataFrame:
        """Unblinding: mean scores by source. Raises ValueError while features are unscored."""
        if not self.finished:
            raise ValueError(f"{len(self.scores)} of {len(self.order)} features are scored: finish before unblinding")
        return pd.DataFrame(self.scores).groupby("source")[list(SCALES)].agg(["mean", "std", "count"])


def form(study: Study) -> widgets.VBox:
    """Contexts of the next feature, a slider for each scale, and a button that records them and goes on."""
    head, shown = widgets.HTML(), widgets.VBox()
    sliders = {name: widgets.IntSlider(5, 1, 10, description=name, style={"description_width": "110px"},
                                       layout={"width": "420px"}) for name in SCALES}
    button = widgets.Button(description="Record and next", button_style="primary")

    def refresh() -> None:
        key = study.next
        head.value = f"<b>{len(study.scores)} of {len(study.order)} scored</b>"
        shown.children = [] if key is None else [widgets.HTML(table(study.contexts[key]))]
        button.disabled = key is None
        if key is None:
            head.value += ": done. Run the next cell to see the sources."

    def record(_) -> None:
        study.record(**{name: slider.value for name, slider in sliders.items()})
        refresh()

    button.on_click(record)
    refresh()
    scales = [widgets.HBox([slider, widgets.Label(SCALES[name])]) for name, slider in sliders.items()]
    return widgets.VBox([head, shown, *scales, button])
