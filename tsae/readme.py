"""The tables of three pages, written from result tables: nothing between two marks is by hand."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from tsae import claims, store
from tsae.baseline import FROZEN, WITH, WITHOUT

KINDS = {"topk": "TopK", "relu": "ReLU", "gated": "Gated", "jumprelu": "JumpReLU"}


def markdown(rows: list[dict]) -> str:
    """A markdown table of rows with equal keys."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_interval(row: pd.Series, form: str = "{:.3f}") -> str:
    """A value with its interval: "value [low, high]"; alone where it has none (one seed)."""
    interval = f" [{form.format(row['low'])}, {form.format(row['high'])}]"
    return form.format(row["value"]) + interval * pd.notna(row["low"])


def sweep(results: Path) -> str:
    """TopK at every k: nmse and ce_added of the three arms, and the table's gain over none."""
    fronts = store.read_table(results / "embedded" / "fronts.csv").query("activation == 'topk'")
    fronts = fronts.set_index(["metric", "k", "table"])
    rows = []
    for k in sorted(k for metric, k, table in fronts.index if (metric, table) == ("nmse", WITHOUT)):
        row = {"k": k}
        for metric in ("nmse", "ce_added"):
            found = {arm: fronts.loc[(metric, k, arm)] for arm in (WITHOUT, FROZEN, WITH)}
            row |= {f"{metric}, {arm}": with_interval(value) for arm, value in found.items()}
            row[f"{metric}, gain"] = f"{1 - found[WITH]['value'] / found[WITHOUT]['value']:.0%}"
        rows.append(row)
    return markdown(rows)


def real(results: Path) -> str:
    """TopK on SmolLM2-135M: every arm at every k, with what became of the features."""
    folder = results / "smollm2"
    fronts = store.read_table(folder / "fronts.csv").query("activation == 'topk'")
    about = store.read_json(folder / "manifest.json")["fronts.csv"]["parameters"]
    fronts = fronts.set_index(["metric", "k", "table"])
    shown = {"nmse": "{:.3f}", "ce_added": "{:.3f}", "dead": "{:.1%}", "single_token": "{:.0%}"}
    rows = [{"k": k, "arm": arm} | {metric: with_interval(fronts.loc[(metric, k, arm)], form)
                                    for metric, form in shown.items()}
            for k in sorted({k for _, k, _ in fronts.index}) for arm in (WITHOUT, FROZEN, WITH)]
    form = ("Layer {layer}, {n_features} features, {tokens} training tokens of {corpus}, {dtype}, "
            "{seeds} seeds; sinks left out: {sinks}.\n\n")
    return form.format(**about | dict(seeds=len(about["seeds"]))) + markdown(rows)


def recipes(results: Path) -> str:
    """How the table is trained on SmolLM2: every arm that was taken to the longest run."""
    folder = results / "smollm2-recipes"
    table = store.read_table(folder / "recipes.csv")
    about = store.read_json(folder / "manifest.json")["recipes.csv"]["parameters"]
    own = table["layer"] == about["layer"]
    shown = table[~own | (table["tokens"] == table["tokens"].max())]
    form = "TopK, k {k}, {n_features} features, rates chosen on other text, {seeds} seeds.\n\n"
    keys = ["layer", "tokens", "arm", "lr"]
    metrics = dict(nmse="{:.3f}", ce_added="{:.3f}", dead="{:.1%}", single_token="{:.0%}",
                   token_read="{:.0%}")
    return form.format(**about | dict(seeds=len(about["seeds"]))) + _wide(shown, keys, metrics)


def beyond(results: Path) -> str:
    """What else the decoder could know, on both models: the baselines by ce_added."""
    form = "{model}, layer {layer}, k {k}, {n_features} features, {tokens} training tokens:\n\n"
    parts = []
    for preset in ("embedded", "smollm2-beyond"):
        if not (results / preset / "beyond.csv").is_file():
            continue
        table = store.read_table(results / preset / "beyond.csv")
        about = store.read_json(results / preset / "manifest.json")["beyond.csv"]["parameters"]
        added = table[table["metric"] == "ce_added"].set_index("arm")["value"]
        ordered = table.iloc[table["arm"].map(added).argsort(kind="stable")]
        metrics = dict(ce_added="{:.3f}", nmse="{:.3f}", l0_without="{:.1f}", stability="{:.2f}")
        wide = _wide(ordered, ["arm"], metrics, alone="{:.0%}", parameters="{:.2g}")
        parts.append(form.format(**about) + wide)
    return "\n\n".join(parts)


def silent(results: Path) -> str:
    """How many of many features never fire over a long stretch of new text, on SmolLM2."""
    folder = results / "smollm2-silent"
    about = store.read_json(folder / "manifest.json")["silent.csv"]["parameters"]
    form = "{n_features} features, {tokens} training tokens, {positions} new positions:\n\n"
    table = store.read_table(folder / "silent.csv")
    return form.format(**about) + _wide(table, ["k", "arm"], dict(silent="{:.1%}", nmse="{:.3f}"))


def _wide(table: pd.DataFrame, keys: list[str], forms: dict[str, str], **bare: str) -> str:
    """A row for each value of the keys, with its metrics; those in `bare` have no interval."""
    rows = []
    for names, group in table.groupby(keys, sort=False):
        found, row = group.set_index("metric"), dict(zip(keys, names))
        for metric, form in (forms | bare).items():
            known = metric in found.index
            row[metric] = with_interval(found.loc[metric], form) if known and metric in forms else (
                form.format(found.loc[metric, "value"]) if known else "")
        rows.append(row)
    return markdown(rows)


def headline(results: Path) -> str:
    """One line a result, with the table and the notebook that it comes from."""
    about = store.read_json(results / "embedded" / "manifest.json")
    size = about["unigram_sensitivity.csv"]["parameters"]["n_features"]
    threshold = about["unigram_classes.csv"]["parameters"]["threshold"]
    shares = store.read_table(results / "embedded" / "unigram_sensitivity.csv")
    chosen = (shares["size"] == size) & ((shares["threshold"] - threshold).abs() < 1e-9)
    kinds = (
        ("savings", store.read_table(results / "embedded" / "savings.csv"), "{:.0%}",
         "active features saved at the {of} of the baseline with k = {baseline_k}, {counted}"),
        ("speedups", store.read_table(results / "embedded" / "speedups.csv"), "{:.1f}",
         "times fewer training tokens to the baseline's final {of}, layer {layer}"),
        ("unigram_sensitivity", shares[chosen].rename(columns={"share": "value"}), "{:.1%}",
         "live features that answer to a unigram, {table}"))
    return markdown([
        {"result": what.format(**row),
         "value [95 % interval]": f"at least {form.format(row['value'])}" if row.get("bound", False)
         else with_interval(row, form),
         "made by": f"`{about[f'{name}.csv']['notebook']}` ({name}.csv)"}
        for name, table, form, what in kinds for _, row in table.iterrows()])


MODELS = {"embedded": ("embedded-long", "embedded-fronts", "embedded-nulls", "embedded"),
          "SmolLM2": ("smollm2-long", "smollm2")}


def evidence(results: Path) -> str:
    """The claims, each with its verdict on either model: by its long run where that decides it."""
    lines, found = claims.read(), {}
    for model, presets in MODELS.items():
        tables = [claims.held(lines, results / name).set_index("id") for name in presets]
        for name in lines["id"]:
            rows = [table.loc[name] for table in tables]
            tested = [row for row in rows if row["verdict"] != claims.UNTESTED]
            found[model, name] = (tested or rows)[0]
    rows = []
    for line in lines.itertuples():
        row = {"claim": f"{line.id} {line.claim}", "paper": line.published,
               "criterion": claims.criterion(line)}
        for model in MODELS:
            its = found[model, line.id]
            between = pd.notna(its["low"]) and its["low"] <= line.bar <= its["high"]
            mark = ", not resolved" if between else ""
            mark += ", post hoc" if its["post_hoc"] else ""
            row[model] = f"{its['ours']} **{its['verdict']}**{mark}".strip()
        rows.append(row)
    return markdown(rows)


ROWS = "6b 6l 6e 6f 6g 6m 9d 4b 7b 7f 8a 8b 8d 8e 11".split()  # the claims that the README shows


def rows(results: Path) -> str:
    """The claims that the README shows, in its order."""
    lines = evidence(results).splitlines()
    shown = [line for line in lines[2:] if line.split()[1] in ROWS]
    order = {name: i for i, name in enumerate(ROWS)}
    shown.sort(key=lambda line: order[line.split()[1]])
    return "\n".join([*lines[:2], *shown])


def lengths(results: Path) -> str:
    """The gains of the learned table over its rivals, over training tokens: models and texts."""
    form = "{model}, {corpus}, {n_features} features, {seeds} seeds: how much lower with the table."
    parts = []
    for presets in (*MODELS.values(), ("smollm2-sotu",)):
        path = _first(results, presets, "gains")
        if not path.is_file():
            continue
        about = store.read_json(path.parent / "manifest.json")["gains.csv"]["parameters"]
        table = store.read_table(path).query("arm == @WITH and metric in ['nmse', 'ce_added']")
        metrics = dict(nmse="{:.0%}", ce_added="{:.0%}")
        wide = _wide(table, ["k", "layer", "tokens", "over"], metrics)
        parts.append(f"{form.format(**about | dict(seeds=len(about['seeds'])))}\n\n{wide}")
    return "\n\n".join(parts)


def _first(results: Path, presets: tuple[str, ...], name: str) -> Path:
    """The file of a table: of the first of the presets that has it, or of the first."""
    paths = [results / preset / f"{name}.csv" for preset in presets]
    return next(filter(Path.is_file, paths), paths[0])


def faster(results: Path) -> str:
    """How many times fewer tokens the table needs to a rival's error, on both models."""
    rows = {}
    for model, presets in MODELS.items():
        table = store.read_table(_first(results, presets, "length_speedups"))
        for _, row in table.iterrows():
            ours = f"at least {row['value']:.1f}" if row["bound"] else with_interval(row, "{:.1f}")
            key = dict(model=model, k=row["k"], rival=row["over"])
            rows.setdefault(tuple(key.values()), key)[row["metric"]] = (
                ours if row["high"] > 1 else "not reached")
    return markdown(list(rows.values()))


def labels(results: Path) -> str:
    """Mean AUC of labels that the text gives, read from few columns, on both models."""
    tables = {model: store.read_table(_first(results, presets, "label_probes"))
              for model, presets in MODELS.items()}
    columns = sorted({each for table in tables.values() for each in table["columns"]})
    rows = []
    for model, table in tables.items():
        for (k, source, arm), group in table.groupby(["k", "input", "arm"], sort=False):
            row = dict(model=model, k=k or "", arm=arm, columns=source)
            row |= {f"{count} of them": "" for count in columns}
            rows.append(row | {f"{each['columns']} of them": with_interval(each)
                               for _, each in group.iterrows()})
    return markdown(rows)


def cost(results: Path) -> str:
    """Time of a training step at the benchmark's base size: each trainer, the floor, the ratios."""
    base = store.read_table(results / "bench" / "bench_step.csv").query("cell == 'base'")
    rows = []
    for row in base.itertuples():
        version = f" {row.version}" if isinstance(row.version, str) else ""
        low, middle, high = (f"{1e3 * seconds:.0f}" for seconds in (row.low, row.seconds, row.high))
        rows.append({
            "architecture": KINDS[row.kind], "trainer": row.contender + version,
            "ms a step [quartiles]": f"{middle} [{low}, {high}]",
            "tokens a second": f"{row.tokens_per_second:.0f}", "times tsae's": f"{row.to_tsae:.2f}",
            "times the floor's": f"{row.to_floor:.2f}", "peak GB": f"{row.peak_gb:.1f}"})
    about = store.read_json(results / "bench" / "manifest.json")["bench_step.csv"]["parameters"]
    form = ("d {d}, {n} features, k {k}, batch {batch}; {cpu}, {threads} threads, {capability}, "
            "torch {torch}; medians of {rounds} interleaved rounds.\n\n")
    return form.format(**dict(base.iloc[0]) | about) + markdown(rows)


def engine(results: Path) -> str:
    """The other parts of the benchmark: extraction, the store, a sweep's memory."""
    parts = {
        "grams": ("{to_tsae:.2f} x", "a training step with {vocabulary} rows of tokens and {grams} "
                  "of n-grams, against none: d {d}, {n} features, k {k}"),
        "extraction": ("{to_bare:.2f} x", "residuals of {model}, layer {layer}, against a bare "
                       "forward truncated there"),
        "storing": ("{to_plain:.2f} x, {gb_per_second:.2g} GB/s", "activation store, {what} of "
                    "{positions} rows of {d}, against one plain file"),
        "sweep": ("{peak_gb:.2f} GB in {seconds:.0f} s", "peak memory of a sweep: {saes} SAEs, "
                  "d {d}, {n} features, {tokens} tokens each, from a store of {positions} rows")}
    rows = []
    for part, (value, measured) in parts.items():
        path = results / "bench" / f"bench_{part}.csv"
        for row in store.read_table(path).to_dict("records") if path.is_file() else ():
            if row.get("contender") not in ("bare", "plain") and row.get("to_tsae") != 1.0:
                rows.append({"measured": measured.format(**row), "value": value.format(**row)})
    return markdown(rows)


# Whose tables are shown, and on which page.
PRESETS = ("embedded", "embedded-long", "embedded-fronts", "embedded-nulls", "smollm2",
           "smollm2-long", "smollm2-sotu", "smollm2-recipes", "smollm2-silent", "smollm2-beyond")
PAGES = {"README.md": dict(rows=rows),
         "data/results/README.md": dict(
             evidence=evidence, lengths=lengths, sweep=sweep, real=real, silent=silent,
             headline=headline, recipes=recipes, beyond=beyond, faster=faster, labels=labels),
         "tests/BENCHMARK.md": dict(cost=cost, engine=engine)}


def written(text: str, results: Path, blocks: dict[str, Callable[[Path], str]]) -> str:
    """`text` with every block made anew from the tables in `results`. Each must have its place."""
    for name, make in blocks.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not start or not end:
            raise ValueError(f"the page has no place for the table {name!r}: "
                             f"<!-- {name} --> and <!-- /{name} -->")
        try:
            made = make(results)
        except FileNotFoundError:  # a preset that was not published yet
            continue
        text = f"{before}{start}\n{made}\n\n{end}{after}"
    return text


def tie() -> None:
    """Write the tables of PAGES, and the manifest that ties the figures to the result tables."""
    results, figures = store.DATA / "results", store.ROOT / "figures"
    store.write_json(figures / "manifest.json", dict(
        tables=store.digest(results / "embedded" / "manifest.json"), notebook="05_figures",
        figures={file.name: store.digest(file) for file in figures.glob("*.png")}))
    for name, blocks in PAGES.items():
        page = store.ROOT / name
        store.write_text(page, written(page.read_text(encoding="utf-8"), results, blocks))
