"""The house rules that a machine can keep: imports go down, notebooks are clean, presets and figures are real."""

import ast
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from tsae import __main__ as command
from tsae import readme, store

FLOORS = {"gpu": -2, "kernels": -1, "store": 0, "sae": 0, "lm": 0, "blind": 0, "parallel": 1, "sharded": 1, "judge": 1,
          "browser": 1, "scores": 1, "quality": 1, "heldout": 1, "checkpoints": 1,
          "activations": 1, "text": 1, "train": 1, "evaluate": 1, "features": 1, "plots": 1, "interop": 1, "readme": 1,
          "__main__": 2, "scaleout": 2}
NOTEBOOKS = sorted((store.ROOT / "notebooks").glob("*.ipynb"))
PRESETS = sorted((store.ROOT / "notebooks" / "presets").glob("*.yaml"))
RESULTS = store.DATA / "results"


def imports(module: str) -> set[str]:
    """Every absolute module that a file of the package imports, `tsae.x` written out."""
    tree = ast.parse((Path(command.__file__).parent / f"{module}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "tsae" else {node.module}
    return found


def test_every_module_has_a_floor():
    assert {path.stem for path in Path(command.__file__).parent.glob("*.py")} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("module", FLOORS)
def test_imports_only_go_down(module):
    for name in imports(module):
        if name.startswith("tsae."):
            below = name.split(".")[1]
            assert FLOORS[below] < FLOORS[module] or FLOORS[below] == FLOORS[module] == 1, f"{module} imports {below}"
    assert ("nnsight" in imports(module)) == (module == "lm"), "one file knows nnsight"


def test_the_model_and_its_kernels_stand_alone():
    """Three files that anyone can copy and leave with."""
    own, libraries = {"tsae.kernels", "tsae.gpu"}, {"torch", "safetensors", "numpy", "triton"}
    for module in ("sae", "kernels", "gpu"):
        outside = {name for name in imports(module) if ".".join(name.split(".")[:2]) not in own}
        assert {name.split(".")[0] for name in outside} <= libraries | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean_runs(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it top to bottom"
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and all(line.count(" = ") == 1 for line in tagged[0].source.splitlines())
    for cell in cells:
        lines = cell.source.splitlines()
        assert len(lines) <= 16 or cell in tagged, lines[0]
        assert max(map(len, lines)) <= 120 and "sys.path" not in cell.source
    assert cells[-1].source.startswith("# check\n") and "assert" in cells[-1].source
    assert path.stat().st_size < 2e6


def test_a_parameter_means_the_same_everywhere():
    types: dict[str, type] = {}
    for path in NOTEBOOKS:
        for name, default in command.declared(path).items():
            assert types.setdefault(name, type(default)) is type(default), name


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_name_real_parameters(path):
    settings = yaml.safe_load(path.read_text()) or {}
    settings.pop("only", None)
    command.check(settings, {notebook.name: command.declared(notebook) for notebook in NOTEBOOKS})


def test_results_are_those_of_their_manifest():
    manifest = store.read_json(RESULTS / "manifest.json")
    assert set(manifest) == {path.name for path in RESULTS.glob("*.csv")}
    for name, line in manifest.items():
        assert store.digest(RESULTS / name) == line["sha256"], f"{name} was changed after {line['notebook']} made it"


def test_the_readme_shows_the_tables():
    page = (store.ROOT / "README.md").read_text()
    assert readme.written(page, RESULTS) == page, "run python -m tsae --publish"


def test_figures_are_not_older_than_their_tables():
    manifest = store.read_json(store.ROOT / "figures" / "manifest.json")
    assert manifest["tables"] == store.digest(RESULTS / "manifest.json"), "run python -m tsae --publish"
    assert manifest["figures"] == {path.name: store.digest(path) for path in (store.ROOT / "figures").glob("*.png")}
