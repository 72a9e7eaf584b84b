"""Oracle: tables written out by hand. The pages themselves are compared with their tables in test_house.py."""

import subprocess
import sys

import pandas as pd
import pytest
import test_baseline
import test_parallel

from tsae import readme, store


def test_a_table_is_markdown_and_keeps_its_bars():
    rows = [{"a": 1, "b|c": "x|y"}, {"a": 2, "b|c": ""}]
    assert readme.markdown(rows).splitlines() == ["| a | b\\|c |", "| --- | --- |", "| 1 | x\\|y |", "| 2 |  |"]
    assert readme.with_interval(pd.Series(dict(value=0.5, low=0.25, high=1)), "{:.0%}") == "50% [25%, 100%]"


def test_blocks_are_replaced_and_the_rest_is_kept(tmp_path):
    blocks = {"one": lambda results: f"table of {results.name}", "two": lambda results: r"a\\1"}
    page = "head\n<!-- two -->\nold\n<!-- /two -->\nbetween\n<!-- one -->\n<!-- /one -->\ntail"
    written = readme.written(page, tmp_path, blocks)
    assert written == ("head\n<!-- two -->\n\na\\\\1\n\n<!-- /two -->\nbetween\n"
                       f"<!-- one -->\n\ntable of {tmp_path.name}\n\n<!-- /one -->\ntail")
    assert readme.written(written, tmp_path, blocks) == written
    for lacking in (page.replace("<!-- one -->", ""), page.replace("<!-- /one -->", "")):
        with pytest.raises(ValueError, match="no place for the table 'one'"):
            readme.written(lacking, tmp_path, blocks)


@pytest.mark.parametrize("module, never", [
    ("readme", "plotly kaleido transformers nnsight datasets"), ("text", "nnsight plotly"), ("picture", "nnsight transformers"),
    ("plots", "nnsight"), ("interop", "nnsight plotly"), ("store", "plotly transformers nnsight datasets")])
def test_a_module_loads_only_what_it_needs(module, never):
    code = f"import sys, tsae.{module}; print(sorted(sys.modules.keys() & set({never.split()})))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert told.stdout == "[]\n", told.stdout + told.stderr


def test_bounds_and_what_is_never_reached_are_said_so(tmp_path):
    rows = [dict(k=8, over="no table", metric="nmse", value=6.7, low=6.7, high=6.7, bound=True),
            dict(k=8, over="no table", metric="ce_added", value=3.0, low=2.0, high=4.0, bound=False),
            dict(k=8, over="bigrams", metric="nmse", value=1.0, low=1.0, high=1.0, bound=False)]
    probes = [dict(arm="with table", k=8, input="features", columns=columns, value=0.7, low=0.6, high=0.8)
              for columns in (1, 5)]
    for preset in ("embedded-long", "smollm2-long"):
        store.write_table(tmp_path / preset / "length_speedups.csv", pd.DataFrame(rows))
        store.write_table(tmp_path / preset / "label_probes.csv", pd.DataFrame(probes))
    lines = readme.faster(tmp_path).splitlines()
    assert lines[0] == "| model | k | rival | nmse | ce_added |" and len(lines) == 6
    assert lines[2] == "| embedded | 8 | no table | at least 6.7 | 3.0 [2.0, 4.0] |"
    assert lines[3].startswith("| embedded | 8 | bigrams | not reached")
    assert readme.labels(tmp_path).splitlines()[2] == (
        "| embedded | 8 | with table | features | 0.700 [0.600, 0.800] | 0.700 [0.600, 0.800] |")


DOES = {  # what a baseline adds, and whether it learns
    "tokens": ("one row a token: the table of the paper", "yes"), "frozen": ("the token's mean", "no"),
    "grams": ("rows of tokens, and of the n-grams that pay for one", "yes"),
    "hashed": ("rows of tokens, and rows that n-grams share by hash", "yes"),
    "embedding": ("a map of the model's token embedding", "the map"), "low rank": ("a table of low rank", "yes"),
    "affine": ("a map of the activation at an earlier layer", "yes"),
    "directions": ("the first principal directions of the activation", "no"),
    "earlier": ("the reconstruction of a trained SAE", "no")}


def works() -> str:
    """The table of what works with what, from the parametrisation of the tests."""
    marks = {mark.args[0]: mark.args[1] for mark in test_baseline.test_every_baseline_goes_with_every_activation.pytestmark}
    resumes = test_baseline.test_a_run_with_any_baseline_goes_on_bit_for_bit.pytestmark[0].args[1]
    case = dict(tokens="table", frozen="frozen")
    return readme.markdown([{
        "baseline": kind, "adds": DOES[kind][0], "learns": DOES[kind][1],
        "activations": ", ".join(marks["activation"]), "encoder sees": " or ".join(marks["sees"]),
        "exact resume": "yes" if kind in resumes else "no",
        "ranks share a batch": "yes" if case.get(kind, kind) in test_parallel.CASES else "not tested",
        "features on several ranks": "topk" if case.get(kind, kind) in test_parallel.TOPK else "not tested",
    } for kind in marks["kind"]])


def test_the_results_say_what_works_as_the_tests_have_it():
    page = (store.ROOT / "data/results/README.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- works -->\n")
    assert rest.partition("<!-- /works -->")[0].strip() == works()
