"""The README's tables, written from the result tables: between `<!-- name -->` and `<!-- /name -->` nothing is by hand."""

import re
from pathlib import Path

import pandas as pd

from tsae import store
from tsae.baseline import WITH, WITHOUT


def markdown(rows: list[dict]) -> str:
    """A markdown table of rows with equal keys."""
    def cells(values) -> str:
        return "| " + " | ".join(str(value).replace("|", "\\|") for value in values) + " |"

    return "\n".join([cells(rows[0]), cells(["---"] * len(rows[0])), *(cells(row.values()) for row in rows)])


def with_interval(row: pd.Series, form: str = "{:.3f}") -> str:
    """A value with its interval."""
    return f"{form.format(row['value'])} [{form.format(row['low'])}, {form.format(row['high'])}]"


def sweep(results: Path) -> str:
    """TopK at every k: nmse and ce_added without and with the table, and the relative gain."""
    fronts = store.read_table(results / "fronts.csv")
    fronts = fronts[fronts["activation"] == "topk"].set_index(["metric", "k", "table"])
    rows = []
    for k in sorted(k for metric, k, table in fronts.index if table == WITHOUT and metric == "nmse"):
        rows.append({"k": k})
        for metric in ("nmse", "ce_added"):
            without, with_ = fronts.loc[(metric, k, WITHOUT)], fronts.loc[(metric, k, WITH)]
            rows[-1] |= {f"{metric}, no table": with_interval(without), f"{metric}, with table": with_interval(with_),
                         f"{metric}, gain": f"{1 - with_['value'] / without['value']:.0%}"}
    return markdown(rows)


def headline(results: Path) -> str:
    """One line a result, with the table and the notebook that it comes from."""
    about = store.read_json(results / "manifest.json")
    size = about["unigram_sensitivity.csv"]["parameters"]["n_features"]
    bar = about["unigram_classes.csv"]["parameters"]["threshold"]
    shares = store.read_table(results / "unigram_sensitivity.csv").rename(columns={"share": "value"})
    shares = shares[(shares["size"] == size) & ((shares["threshold"] - bar).abs() < 1e-9)]
    kinds = (
        ("savings", store.read_table(results / "savings.csv"), "{:.0%}",
         "active features saved at the {of} of the baseline with k = {baseline_k}"),
        ("speedups", store.read_table(results / "speedups.csv"), "{:.1f}",
         "times fewer training tokens to the baseline's final {of}, layer {layer}"),
        ("unigram_sensitivity", shares, "{:.1%}", "live features that answer to a unigram, {table}"))
    return markdown([{"result": what.format(**row) + " (lower bound)" * bool(row.get("bound", False)),
                      "value [95 % interval]": with_interval(row, form),
                      "made by": f"`{about[f'{name}.csv']['notebook']}` ({name}.csv)"}
                     for name, table, form, what in kinds for _, row in table.iterrows()])


def evidence(results: Path) -> str:
    """The evidence table."""
    def ours(row) -> str:
        if pd.isna(row.ours):
            return ""
        return f"{row.ours}" + ("" if pd.isna(row.low) else f" [{row.low:.3g}, {row.high:.3g}]")

    return markdown([{"claim": row.claim, "paper": row.paper, "ours": ours(row), "verdict": row.verdict,
                      "criterion": "" if pd.isna(row.criterion) else row.criterion}
                     for row in store.read_table(results / "evidence.csv").itertuples()])


KINDS = {"topk": "TopK", "relu": "ReLU", "gated": "Gated", "jumprelu": "JumpReLU"}


def cost(results: Path) -> str:
    """Seconds of a training step at the benchmark's base size: each trainer, the floor, and their ratios."""
    table = store.read_table(results / "bench_step.csv")
    base = table[table["cell"] == "base"]
    rows = [{"architecture": KINDS[row.kind], "trainer": row.contender + (f" {row.version}" if isinstance(row.version, str)
                                                                         and row.contender != "floor" else ""),
             "ms a step [quartiles]": f"{1e3 * row.seconds:.0f} [{1e3 * row.low:.0f}, {1e3 * row.high:.0f}]",
             "tokens a second": f"{row.tokens_per_second:.0f}", "times tsae's": f"{row.to_tsae:.2f}",
             "times the floor's": f"{row.to_floor:.2f}", "peak GB": f"{row.peak_gb:.1f}"} for row in base.itertuples()]
    about = store.read_json(results / "manifest.json")["bench_step.csv"]["parameters"]
    size = base.iloc[0]
    return (f"d {size['d']}, {size['n']} features, k {size['k']}, batch {size['batch']}; {about['cpu']}, {about['threads']} "
            f"threads, {about['capability']}, torch {about['torch']}; medians of {size['rounds']} interleaved rounds.\n\n"
            + markdown(rows))


def engine(results: Path) -> str:
    """The other parts of the benchmark: extraction, the store, a sweep's memory."""
    def rows_of(part: str):
        path = results / f"bench_{part}.csv"
        return store.read_table(path).itertuples() if path.is_file() else ()

    rows = [{"measured": f"residuals of {row.model}, layer {row.layer}, against a bare forward truncated there",
             "value": f"{row.to_bare:.2f} x"} for row in rows_of("extraction") if row.contender == "tsae"]
    rows += [{"measured": f"activation store, {row.what} of {row.positions} rows of {row.d}, against one plain file",
              "value": f"{row.to_plain:.2f} x, {row.gb_per_second:.2g} GB/s"}
             for row in rows_of("storing") if row.contender == "store"]
    rows += [{"measured": f"peak memory of a sweep: {row.saes} SAEs, d {row.d}, {row.n} features, {row.tokens} tokens each, "
              f"from a store of {row.positions} rows", "value": f"{row.peak_gb:.2f} GB in {row.seconds:.0f} s"}
             for row in rows_of("sweep")]
    return markdown(rows)


BLOCKS = {"sweep": sweep, "headline": headline, "evidence": evidence, "cost": cost, "engine": engine}


def written(text: str, results: Path) -> str:
    """`text` with every block made anew from the tables in the folder `results`."""
    for name, make in BLOCKS.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not block.search(text):
            raise ValueError(f"the README has no place for the table {name!r}: <!-- {name} --> and <!-- /{name} -->")
        text = block.sub(lambda match, table=make(results): f"{match[1]}\n{table}\n\n{match[2]}", text)
    return text


def tie() -> None:
    """Write the README's tables, and the manifest that ties the figures to the result tables, from what lies there."""
    results, figures = store.DATA / "results", store.ROOT / "figures"
    store.write_json(figures / "manifest.json", dict(
        tables=store.digest(results / "manifest.json"), notebook="05_figures",
        figures={file.name: store.digest(file) for file in sorted(figures.glob("*.png"))}))
    page = store.ROOT / "README.md"
    store.write_text(page, written(page.read_text(encoding="utf-8"), results))
