"""The blind study of the paper's Table 1: scorers do not know the source, and no score is lost.

sample -> Study -> form, once for each scorer; then load, and `agreement.analyse`. A feature is
(source, seed, feature): an architecture, the seed of its SAE, and the feature's number in it.
"""

import csv
import hashlib
import html
import io
import os
import re
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import display

from tsae import store
from tsae.study.agreement import KEY, SCALES

COLUMNS = ["step", *KEY, "shown", *SCALES]  # of a scorer's csv; `shown` is a digest of the text
HEADER = (",".join(COLUMNS) + "\n").encode()
STYLE = {"button_width": "44px", "description_width": "110px"}
GUIDE = "".join(f"<li><b>{name}</b>: {'; '.join(map(' '.join, bands.items()))}</li>"
                for name, bands in SCALES.items())
GUIDE += ("<li>The number before a line is the activation, 10 at the feature's strongest. Some "
          "features come twice, to see how steady scores are.</li>")


def sample(scores: pd.DataFrame, per_source: int, bins: int, seed: int = 0) -> pd.DataFrame:
    """`per_source` features of every source, equally many in each `bin` of firing frequency."""
    live = scores[scores["frequency"] > 0].sort_values(KEY).reset_index(drop=True)
    if live.duplicated(KEY).any():
        raise ValueError(f"a feature is listed twice: expected one row for each {', '.join(KEY)}")
    frequency = np.log(live["frequency"])
    quantiles = frequency.groupby(live["source"]).quantile(np.linspace(0, 1, bins + 1))
    live["bin"] = np.searchsorted(quantiles.unstack().mean()[1:-1], frequency)
    room = live.groupby(["bin", "source"]).size().unstack(fill_value=0).min(axis=1)
    if room.sum() < per_source:
        raise ValueError(f"{per_source} features a source were asked for; with equally many of "
                         f"every source in each of {bins} bins there are {room.sum()}")
    generator = np.random.default_rng(seed)
    take = pd.Series(0, generator.permutation(room.index))
    for _ in range(per_source):  # one more in the emptiest bin that has one left
        take[take[take < room.reindex(take.index)].idxmin()] += 1
    mixed = live.sample(frac=1, random_state=generator)
    turn = mixed.groupby(["source", "seed", "bin"]).cumcount()
    mixed = mixed.iloc[turn.argsort(kind="stable")]  # seeds take turns
    place = mixed.groupby(["source", "bin"]).cumcount()
    return mixed[place < mixed["bin"].map(take)].sort_values(KEY).reset_index(drop=True)


def contexts_html(contexts: pd.DataFrame, title: str = "") -> str:
    """A feature's contexts (from features.contexts) as an HTML table, all text escaped."""
    lines = [f"<tr><td style='color:#718096'>{row.code:.1f}</td>"
             f"<td style='text-align:right'>{html.escape(row.before)}</td><td><mark>"
             f"{html.escape(row.token)}</mark></td><td>{html.escape(row.after)}</td></tr>"
             for row in contexts.itertuples()]
    visible = "".join(lines).replace("\n", "⏎").replace("\t", "→")
    style = "font-family:monospace;font-size:12px;white-space:pre"
    return f"<b>{html.escape(title)}</b><table style='{style}'>{visible}</table>"


def _whole(name: str, value: int) -> int:
    if value not in range(1, 11):
        raise ValueError(f"{name} is {value!r}: a whole number from 1 to 10 was expected")
    return int(value)


def _read(path: Path) -> tuple[list[dict], int]:
    """The scores that stand in a scorer's csv, by step, and the bytes of its whole lines.

    A line without its end, cut off by a crash, does not count; one without scores takes one back.
    """
    raw = path.read_bytes() if path.is_file() else b""
    if not (raw.startswith(HEADER) or HEADER.startswith(raw)):
        raise ValueError(f"{path} is no file of blind scores: it needs the columns "
                         f"{', '.join(COLUMNS)}")
    size, standing = raw.rfind(b"\n") + 1, []
    for number, line in enumerate(raw[len(HEADER):size].split(b"\n")[:-1], 2):
        try:
            row = dict(zip(COLUMNS, next(csv.reader([line.decode()], strict=True)), strict=True))
            row |= {name: int(row[name]) for name in ("step", "seed", "feature")}
            scored = any(row[name] for name in SCALES)
            if scored:
                row |= {name: _whole(name, int(row[name])) for name in SCALES}
            if row["step"] != (len(standing) if scored else len(standing) - 1):
                raise ValueError(f"step {row['step']} is out of turn")
        except (ValueError, csv.Error) as error:
            raise ValueError(f"line {number} of {path} is damaged ({error}): mend it or move the "
                             "file away") from None
        standing[row["step"]:] = [row] if scored else []
    return standing, size


def _order(keys: list[tuple], repeats: float, generator: np.random.Generator) -> list[tuple]:
    """The keys in random order, a share `repeats` of them twice, at least half of them apart."""
    n, far = len(keys), max(1, len(keys) // 2)
    places = {float(place): keys[i] for place, i in enumerate(generator.permutation(n))}
    twice = min(max(1, round(repeats * n)), n - far) if repeats else 0
    for first in generator.choice(n - far, twice, replace=False):
        places[generator.integers(first + far, n) + generator.uniform(0.1, 0.9)] = places[first]
    return [places[place] for place in sorted(places)]


class Study:
    """One scorer's features in an order of their own, and the scores so far.

    `contexts` maps (source, seed, feature) to contexts. A share `repeats` of the features comes
    twice, at least half of all apart. `<folder>/<scorer>.csv` names sources, is only appended to.
    """

    def __init__(self, contexts: dict[tuple[str, int, int], pd.DataFrame], folder: str | Path,
                 scorer: str, seed: int = 0, repeats: float = 0.1):
        self.scorer = str(scorer).strip().lower()
        if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,39}", self.scorer):
            raise ValueError(f"{scorer!r} cannot name a scorer: expected 1-40 of a-z, 0-9, -, _")
        broken = any(re.search(r"[\r\n]", source) for source, *_ in contexts)
        if not contexts or not 0 <= repeats <= 0.5 or broken:
            raise ValueError("a study needs features, one-line sources, and repeats from 0 to 0.5")
        self.path = Path(folder) / f"{self.scorer}.csv"
        self.contexts = {(source, int(sae), int(feature)): shown
                         for (source, sae, feature), shown in contexts.items()}
        generator = np.random.default_rng([seed, *self.scorer.encode()])
        self.order = _order(sorted(self.contexts), repeats, generator)
        self.scores, self._size = _read(self.path)
        for row in self.scores:
            if (row["step"] >= len(self.order)
                    or [row[name] for name in COLUMNS[:5]] != self._fields(row["step"])):
                raise ValueError(f"step {row['step']} of {self.path} is about another feature, "
                                 "text or order than this study's: give the study another folder")
        if self.path.is_file() and self.path.stat().st_size > self._size:
            os.truncate(self.path, self._size)  # a line cut off by a crash, which never counted

    def _fields(self, step: int) -> list:
        """A csv line's fields before its scores."""
        shown = self.contexts[self.order[step]][["before", "token", "after"]]
        text = shown.to_csv(index=False, lineterminator="\n").encode("utf-8", "surrogatepass")
        return [step, *self.order[step], hashlib.sha256(text).hexdigest()[:12]]

    def _append(self, step: int, *scores) -> dict:
        """A csv line for a step, empty `scores` to take it back; on disk when this returns."""
        row, line = [*self._fields(step), *scores], io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        written = (b"" if self._size else HEADER) + line.getvalue().encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            if file.tell() != self._size:
                raise ValueError(f"{self.path} was changed meanwhile, perhaps in a second window: "
                                 "nothing was recorded. Make the study again to go on")
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        if not self._size:  # the new file's name too
            store.sync(self.path.parent)
        self._size += len(written)
        return dict(zip(COLUMNS, row))

    @property
    def next(self) -> tuple[str, int, int] | None:
        """The feature to score now, or None at the end."""
        return None if self.finished else self.order[len(self.scores)]

    @property
    def finished(self) -> bool:
        return len(self.scores) == len(self.order)

    def record(self, interpretability: int, complexity: int) -> None:
        """Score the next feature, each 1 to 10; the line is on disk when this returns."""
        if self.finished:
            raise ValueError("all features are scored")
        given = _whole("interpretability", interpretability), _whole("complexity", complexity)
        self.scores.append(self._append(len(self.scores), *given))

    def undo(self) -> None:
        """Take the last score back, by a line that says so. Not at the end: sources are open."""
        if not self.scores or self.finished:
            raise ValueError("the study is finished" if self.scores else "no score to take back")
        self._append(len(self.scores) - 1, *[""] * len(SCALES))
        self.scores.pop()

    def summary(self) -> pd.DataFrame:
        """Unblinding: mean scores by source without repeats. ValueError before the study's end."""
        if not self.finished:
            raise ValueError(f"{len(self.scores)} of {len(self.order)} are scored: finish before "
                             "unblinding")
        first = pd.DataFrame(self.scores).drop_duplicates(KEY)
        return first.groupby("source")[list(SCALES)].agg(["mean", "std", "count"])


def form(study: Study) -> widgets.VBox:
    """The next feature and two rows of buttons. Scores can be typed, too."""
    bar, said, shown = widgets.IntProgress(0, 0, len(study.order)), widgets.HTML(), widgets.HTML()
    rows = [widgets.ToggleButtons(options=range(1, 11), value=None, description=name, style=STYLE)
            for name in SCALES]  # without a value, there is nothing to lean on
    wide = {"width": "300px"}
    keys = widgets.Text(placeholder="or type, as 8 3, then Enter (u: undo)", layout=wide,
                        continuous_update=False)  # its value comes whole, on Enter
    save = widgets.Button(description="Record and next", button_style="primary")
    back = widgets.Button(description="Undo the last")
    guide = widgets.HTML(f"<ul>{GUIDE}</ul>")

    def refresh(message: str = "") -> None:
        n, done = len(study.scores), study.finished
        bar.value, bar.description = n, f"{n} of {bar.max}"
        said.value = message or ("Done. Run the next cell to see the sources." if done else "")
        shown.value = "" if done else _relative(study.contexts[study.next])
        for row in rows:
            row.value, row.disabled = None, done
        keys.value, keys.disabled, back.disabled = "", done, done or n == 0
        allow_save()

    def allow_save(_=None) -> None:
        save.disabled = study.finished or any(row.value is None for row in rows)

    def act(change, *given) -> None:
        before = len(study.scores)
        try:
            change(*given)
        except (ValueError, OSError) as error:
            said.value = html.escape(str(error))
        else:
            refresh(_told(study, before))

    def typed(change: dict) -> None:
        if change["new"].strip():  # "" is the field being emptied for the next feature
            act(_obey, study, change["new"])

    for row in rows:
        row.observe(allow_save, "value")
    save.on_click(lambda _: act(study.record, *(row.value for row in rows)))
    back.on_click(lambda _: act(study.undo))
    keys.observe(typed, "value")
    refresh()
    return widgets.VBox([bar, guide, shown, *rows, widgets.HBox([keys, save, back]), said])


def show(study: Study) -> None:
    """Display the form; where no kernel runs, a picture of it."""
    display(form(study)._repr_mimebundle_() | {"text/html": _picture(study)}, raw=True)


def _picture(study: Study) -> str:
    box = "<span style='border:1px solid #cbd5e0;padding:2px 12px;margin:2px'>{}</span>"
    buttons = "".join(map(box.format, range(1, 11)))
    rows = "".join(f"<p><b>{name}</b> {buttons}</p>" for name in SCALES)
    shown = "" if study.finished else _relative(study.contexts[study.next])
    return (f"<p>{len(study.scores)} of {len(study.order)}. A picture: run this cell to score.</p>"
            f"{shown}{rows}")


def _told(study: Study, before: int) -> str:
    """What was done since there were `before` scores, for the scorer to see."""
    if len(study.scores) < before:
        return "Taken back."
    given = " / ".join(str(study.scores[-1][name]) for name in SCALES)
    end = {1: " One is left: it cannot be undone.",
           0: " Done. Run the next cell to see the sources."}
    return f"Recorded {given}.{end.get(len(study.order) - len(study.scores), '')}"


def _relative(contexts: pd.DataFrame) -> str:
    """Contexts with their codes on a scale to 10: the true scale could tell the source."""
    return contexts_html(contexts.assign(code=10 * contexts["code"] / contexts["code"].max()))


def _obey(study: Study, text: str) -> None:
    if text.strip().lower() == "u":
        study.undo()
    elif re.fullmatch(r"\s*\d+[\s,;/]+\d+\s*", text):
        study.record(*map(int, re.findall(r"\d+", text)))
    else:
        raise ValueError(f"Two numbers from 1 to 10 were expected, {' then '.join(SCALES)}: "
                         "nothing was recorded.")


def load(folder: str | Path) -> pd.DataFrame:
    """All scores, one row a showing: scorer, columns of the csv, `repeat` (a second showing)."""
    rows = [dict(scorer=path.stem) | row for path in sorted(Path(folder).glob("*.csv"))
            for row in _read(path)[0]]
    scores = pd.DataFrame(rows, columns=["scorer", *COLUMNS])
    if (scores.groupby(KEY)["shown"].nunique() > 1).any():
        raise ValueError(f"different texts of the same feature in {folder}: use one folder a study")
    return scores.assign(repeat=scores.duplicated(["scorer", *KEY]))
