"""Oracle: tables written out by hand. The README itself is compared with its tables in test_house.py."""

import subprocess
import sys

import pandas as pd
import pytest

from tsae import readme


def test_a_table_is_markdown_and_keeps_its_bars():
    rows = [{"a": 1, "b|c": "x|y"}, {"a": 2, "b|c": ""}]
    assert readme.markdown(rows).splitlines() == ["| a | b\\|c |", "| --- | --- |", "| 1 | x\\|y |", "| 2 |  |"]
    assert readme.with_interval(pd.Series(dict(value=0.5, low=0.25, high=1)), "{:.0%}") == "50% [25%, 100%]"


def test_blocks_are_replaced_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "BLOCKS", {"one": lambda results: f"table of {results.name}", "two": lambda results: r"a\\1"})
    page = "head\n<!-- two -->\nold\n<!-- /two -->\nbetween\n<!-- one -->\n<!-- /one -->\ntail"
    written = readme.written(page, tmp_path)
    assert written == ("head\n<!-- two -->\n\na\\\\1\n\n<!-- /two -->\nbetween\n"
                       f"<!-- one -->\n\ntable of {tmp_path.name}\n\n<!-- /one -->\ntail")
    assert readme.written(written, tmp_path) == written
    for lacking in (page.replace("<!-- one -->", ""), page.replace("<!-- /one -->", "")):
        with pytest.raises(ValueError, match="no place for the table 'one'"):
            readme.written(lacking, tmp_path)


@pytest.mark.parametrize("module, never", [
    ("readme", "plotly kaleido transformers nnsight datasets"), ("text", "nnsight plotly"), ("picture", "nnsight transformers"),
    ("plots", "nnsight"), ("interop", "nnsight plotly"), ("store", "plotly transformers nnsight datasets")])
def test_a_module_loads_only_what_it_needs(module, never):
    code = f"import sys, tsae.{module}; print(sorted(sys.modules.keys() & set({never.split()})))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert told.stdout == "[]\n", told.stdout + told.stderr
