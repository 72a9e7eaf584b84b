"""The README's tables, written from the result tables: between `<!-- name -->` and `<!-- /name -->` nothing is by hand."""

import re
from pathlib import Path

import pandas as pd

from tsae import plots, store


def markdown(rows: list[dict]) -> str:
    """A markdown table of rows with equal keys."""
    def cells(values) -> str:
        return "| " + " | ".join(str(value).replace("|", "\\|") for value in values) + " |"

    return "\n".join([cells(rows[0]), cells(["---"] * len(rows[0])), *(cells(row.values()) for row in rows)])


def spread(row: pd.Series, form: str = "{:.3f}") -> str:
    """A value with its interval."""
    return f"{form.format(row['value'])} [{form.format(row['low'])}, {form.format(row['high'])}]"


def sweep(results: Path) -> str:
    """TopK at every k: nmse and ce_added without and with the table, and the relative gain."""
    fronts = store.read_table(results / "fronts.csv")
    fronts = fronts[fronts["activation"] == "topk"].set_index(["metric", "k", "table"])
    rows = []
    for k in sorted(k for metric, k, table in fronts.index if table == plots.WITHOUT and metric == "nmse"):
        rows.append({"k": k})
        for metric in ("nmse", "ce_added"):
            without, with_ = fronts.loc[(metric, k, plots.WITHOUT)], fronts.loc[(metric, k, plots.WITH)]
            rows[-1] |= {f"{metric}, no table": spread(without), f"{metric}, with table": spread(with_),
                         f"{metric}, gain": f"{1 - with_['value'] / without['value']:.0%}"}
    return markdown(rows)


def headline(results: Path) -> str:
    """One line a result, with the table and the notebook that it comes from."""
    about = store.read_json(results / "manifest.json")
    size = about["feature_tokens.csv"]["parameters"]["n_features"]
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
                      "value [95 % interval]": spread(row, form),
                      "made by": f"`{about[f'{name}.csv']['notebook']}` ({name}.csv)"}
                     for name, table, form, what in kinds for _, row in table.iterrows()])


def evidence(results: Path) -> str:
    """The evidence table."""
    def ours(row) -> str:
        if pd.isna(row.ours):
            return ""
        return f"{row.ours}" + ("" if pd.isna(row.low) else f" [{row.low:.3g}, {row.high:.3g}]")

    return markdown([{"claim": row.claim, "paper": row.paper, "ours": ours(row), "verdict": row.verdict}
                     for row in store.read_table(results / "evidence.csv").itertuples()])


BLOCKS = {"sweep": sweep, "headline": headline, "evidence": evidence}


def written(text: str, results: Path) -> str:
    """`text` with every block made anew from the tables in the folder `results`."""
    for name, make in BLOCKS.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not block.search(text):
            raise ValueError(f"the README has no place for the table {name!r}: <!-- {name} --> and <!-- /{name} -->")
        text = block.sub(lambda match, table=make(results): f"{match[1]}\n{table}\n\n{match[2]}", text)
    return text
