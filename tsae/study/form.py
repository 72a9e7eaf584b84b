"""The blind study of the paper's Table 1: who scores does not know the source, and no score given is lost.

sample -> Study -> form, once for each scorer; then load, and `agreement.analyse`. A feature is (source, seed, feature):
an architecture, the seed of its SAE, and the feature's number in it.
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

from tsae.study.agreement import KEY, SCALES

COLUMNS = ["step", *KEY, "shown", *SCALES]  # a line of a scorer's csv; `shown` is a digest of the text that was shown
HEADER = (",".join(COLUMNS) + "\n").encode()


def sample(scores: pd.DataFrame, per_source: int, bins: int, seed: int = 0) -> pd.DataFrame:
    """`per_source` features of every source, equally many in each `bin` of firing frequency; SAE seeds take turns.

    Edges of bins are the sources' mean quantiles of log frequency. What one bin lacks, the others give.
    """
    live = scores[scores["frequency"] > 0].sort_values(KEY).reset_index(drop=True)
    if live.duplicated(KEY).any():
        raise ValueError(f"a feature is listed twice: one row for each {', '.join(KEY)} was expected")
    quantiles = np.log(live["frequency"]).groupby(live["source"]).quantile(np.linspace(0, 1, bins + 1))
    live["bin"] = np.searchsorted(quantiles.unstack().mean()[1:-1], np.log(live["frequency"]))
    room = live.groupby(["bin", "source"]).size().unstack(fill_value=0).min(axis=1)
    if room.sum() < per_source:
        raise ValueError(f"{per_source} features a source were asked for; with equally many of every source in each of "
                         f"{bins} bins there are {room.sum()}")
    generator = np.random.default_rng(seed)
    take = pd.Series(0, generator.permutation(room.index))
    for _ in range(per_source):  # one more in the emptiest bin that has one left
        take[take[take < room.reindex(take.index)].idxmin()] += 1
    mixed = live.sample(frac=1, random_state=generator)
    mixed = mixed.iloc[mixed.groupby([*KEY[:2], "bin"]).cumcount().argsort(kind="stable")]
    place = mixed.groupby(["source", "bin"]).cumcount()
    return mixed[place < mixed["bin"].map(take)].sort_values(KEY).reset_index(drop=True)


def contexts_html(contexts: pd.DataFrame, title: str = "") -> str:
    """A feature's contexts (from features.contexts) as an HTML table, the activating token marked, all text escaped."""
    def visible(text: str) -> str:
        return html.escape(text.replace("\n", "⏎").replace("\t", "→"))

    lines = [f"<tr><td style='color:#718096'>{row.code:.1f}</td><td style='text-align:right'>{visible(row.before)}</td>"
             f"<td><mark>{visible(row.token)}</mark></td><td>{visible(row.after)}</td></tr>"
             for row in contexts.itertuples()]
    return (f"<b>{html.escape(title)}</b><table style='font-family:monospace;font-size:12px;white-space:pre'>"
            f"{''.join(lines)}</table>")


def _whole(name: str, value: int) -> int:
    if value not in range(1, 11):
        raise ValueError(f"{name} is {value!r}: a whole number from 1 to 10 was expected")
    return int(value)


def _read(path: Path) -> tuple[list[dict], int]:
    """The scores that stand in a scorer's csv, by step, and the bytes of its whole lines; changes nothing.

    A line without its end was cut off by a crash and does not count. A line without scores takes its step back.
    """
    raw = path.read_bytes() if path.is_file() else b""
    size, standing = raw.rfind(b"\n") + 1, []
    if not (raw.startswith(HEADER) or HEADER.startswith(raw)):
        raise ValueError(f"{path} is no file of blind scores: it needs the columns {', '.join(COLUMNS)}")
    for number, line in enumerate(raw[len(HEADER):size].split(b"\n")[:-1], 2):
        try:
            row = dict(zip(COLUMNS, next(csv.reader([line.decode()], strict=True)), strict=True))
            row |= {name: int(row[name]) for name in ("step", "seed", "feature")}
            back = not any(row[name] for name in SCALES)
            if row["step"] != len(standing) - back:
                raise ValueError(f"step {row['step']} is out of turn")
            standing[row["step"]:] = [] if back else [row | {name: _whole(name, int(row[name])) for name in SCALES}]
        except (ValueError, csv.Error) as error:
            raise ValueError(f"line {number} of {path} is damaged ({error}): mend it or move the file away") from None
    return standing, size


class Study:
    """One scorer's features in the scorer's own order, and the scores so far in `<folder>/<scorer>.csv`.

    `contexts` maps (source, seed, feature) to the feature's contexts. A share `repeats` of the features comes twice, at
    least half the study apart. The csv is only appended to, and names the sources: it is for afterwards.
    """

    def __init__(self, contexts: dict[tuple[str, int, int], pd.DataFrame], folder: str | Path, scorer: str,
                 seed: int = 0, repeats: float = 0.1):
        self.scorer = str(scorer).strip().lower()
        if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,39}", self.scorer):
            raise ValueError(f"{scorer!r} cannot name a scorer: 1 to 40 of a-z, 0-9, - and _ were expected")
        if not contexts or not 0 <= repeats <= 0.5 or any(re.search(r"[\r\n]", source) for source, *_ in contexts):
            raise ValueError("a study needs features, sources named on one line, and a share of repeats from 0 to 0.5")
        self.path = Path(folder) / f"{self.scorer}.csv"
        self.contexts = {(source, int(sae), int(feature)): kept for (source, sae, feature), kept in contexts.items()}
        generator = np.random.default_rng([seed, *self.scorer.encode()])
        keys, n = sorted(self.contexts), len(contexts)
        far = max(1, n // 2)
        places = {float(place): keys[i] for place, i in enumerate(generator.permutation(n))}
        twice = min(max(1, round(repeats * n)), n - far) if repeats else 0
        for first in generator.choice(n - far, twice, replace=False):  # again, after at least `far` others
            places[generator.integers(first + far, n) + generator.uniform(0.1, 0.9)] = places[float(first)]
        self.order = [places[place] for place in sorted(places)]
        self.scores, self._size = _read(self.path)
        for row in self.scores:
            if row["step"] >= len(self.order) or [row[name] for name in COLUMNS[:5]] != self._fields(row["step"]):
                raise ValueError(f"step {row['step']} of {self.path} is about another feature, text or order than this "
                                 "study's: give the study another folder")
        if self.path.is_file() and self.path.stat().st_size > self._size:
            os.truncate(self.path, self._size)  # a line cut off by a crash, which never counted

    def _fields(self, step: int) -> list:
        text = self.contexts[self.order[step]][["before", "token", "after"]].to_csv(index=False, lineterminator="\n")
        return [step, *self.order[step], hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]]

    def _append(self, *scores) -> dict:
        """A line for the next step, or one that takes the last back; on disk when this returns."""
        row = dict(zip(COLUMNS, [*self._fields(len(self.scores) - (not any(scores))), *scores]))
        csv.writer(line := io.StringIO(), lineterminator="\n").writerow(row.values())
        written = (b"" if self._size else HEADER) + line.getvalue().encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            if file.tell() != self._size:
                raise ValueError(f"{self.path} was changed meanwhile, perhaps in a second window: nothing was "
                                 "recorded. Make the study again to go on")
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        if not self._size and os.name == "posix":  # the new file's name too
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder), os.close(folder)
        self._size += len(written)
        return row

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
        self.scores.append(self._append(_whole("interpretability", interpretability), _whole("complexity", complexity)))

    def undo(self) -> None:
        """Take the last score back, by a line that says so. Not at the end, when the sources are open."""
        if not self.scores or self.finished:
            raise ValueError("the study is finished" if self.scores else "there is no score to take back")
        self._append("", "")
        self.scores.pop()

    def summary(self) -> pd.DataFrame:
        """Unblinding: mean scores by source, repeats left out. Raises ValueError while features are unscored."""
        if not self.finished:
            raise ValueError(f"{len(self.scores)} of {len(self.order)} are scored: finish before unblinding")
        first = pd.DataFrame(self.scores).drop_duplicates(KEY)
        return first.groupby("source")[list(SCALES)].agg(["mean", "std", "count"])


def form(study: Study) -> widgets.VBox:
    """The next feature and two rows of buttons. Without a mouse: type both scores and Enter, or u and Enter to undo."""
    guide = "".join(f"<li><b>{name}</b>: {'; '.join(f'{band} {text}' for band, text in bands.items())}</li>"
                    for name, bands in SCALES.items())
    guide = widgets.HTML(f"<ul>{guide}<li>The number before a line is the activation, 10 at the feature's strongest. "
                         "Some features come twice, to see how steady scores are.</li></ul>")
    bar, said, shown = widgets.IntProgress(0, 0, len(study.order)), widgets.HTML(), widgets.HTML()
    rows = {name: widgets.ToggleButtons(options=range(1, 11), value=None, description=name, style={
        "button_width": "32px", "description_width": "110px"}) for name in SCALES}  # no value yet: nothing to lean on
    keys = widgets.Text(placeholder="or type, as 8 3, then Enter (u: undo)", layout={"width": "300px"})
    save = widgets.Button(description="Record and next", button_style="primary")
    back = widgets.Button(description="Undo the last")

    def refresh(message: str = "") -> None:
        n, m, key = len(study.scores), len(study.order), study.next
        bar.value, bar.description = n, f"{n} of {m}"
        last = "The last one: it cannot be undone." if n == m - 1 else ""
        said.value = message or ("Done. Run the next cell to see the sources." if key is None else last)
        kept = None if key is None else study.contexts[key]  # activations relative: their scale could tell the source
        shown.value = "" if key is None else contexts_html(kept.assign(code=10 * kept["code"] / kept["code"].max()))
        for row in rows.values():
            row.value, row.disabled = None, key is None
        keys.value, keys.disabled, back.disabled = "", key is None, key is None or n == 0
        ready()

    def ready(_=None) -> None:
        save.disabled = study.finished or any(row.value is None for row in rows.values())

    def act(what, *given) -> None:
        try:
            what(*given)
        except (ValueError, OSError) as error:
            said.value = html.escape(str(error))
        else:
            refresh("Taken back." if what == study.undo else "")

    def typed(_, content: dict, __) -> None:
        if content.get("event") != "submit":
            return
        if keys.value.strip().lower() == "u":
            act(study.undo)
        elif re.fullmatch(r"\s*\d+[\s,;/]+\d+\s*", keys.value):
            act(study.record, *map(int, re.findall(r"\d+", keys.value)))
        else:
            said.value = f"Two numbers from 1 to 10 were expected, {' then '.join(SCALES)}: nothing was recorded."

    for row in rows.values():
        row.observe(ready, "value")
    save.on_click(lambda _: act(study.record, *(row.value for row in rows.values())))
    back.on_click(lambda _: act(study.undo))
    keys.on_msg(typed)
    refresh()
    return widgets.VBox([bar, guide, shown, *rows.values(), widgets.HBox([keys, save, back]), said])


def load(folder: str | Path) -> pd.DataFrame:
    """The scores of every scorer, one row a showing: `scorer`, the csv's columns, and `repeat` for second showings."""
    scores = pd.DataFrame([dict(scorer=path.stem) | row for path in sorted(Path(folder).glob("*.csv"))
                           for row in _read(path)[0]], columns=["scorer", *COLUMNS])
    if (scores.groupby(KEY)["shown"].nunique() > 1).any():
        raise ValueError(f"{folder}: scorers saw different texts of the same feature, so this is more than one study")
    return scores.assign(repeat=scores.duplicated(["scorer", *KEY]))
