"""The house rules that a machine can keep: imports go down, functions are short, notebooks are clean, figures real."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml

from tsae import __main__ as command
from tsae import notebook as beginning
from tsae import readme, store

PACKAGE = Path(command.__file__).parent
# Rooms with their floors, from the bottom up. A file may import files on lower floors of its room and those of lower
# rooms: never one beside it, in the room or in another of the same height.
ROOMS = {"": 0, "pairs": 1, "scale": 2, "scoring": 2, "browser": 3, "study": 3}
FLOORS = {
    "": ("store gpu", "corpus fetch notebook", "kernels baseline text picture formats claims", "sae lm", "codes evaluate",
         "features plots train interop readme overview execute", "__main__"),
    "pairs": ("extract", "shards", "order", "prepare", "known"),
    "scale": ("checkpoints", "parallel", "sharded passes", "sweep", "__main__"),
    "scoring": ("heldout", "ladder tokens rules effects dictionary compare judge nulls labels", "table scores"),
    "browser": ("gather", "pages"),
    "study": ("agreement", "form"),
}
PLACES = {f"{room}.{name}".lstrip("."): (ROOMS[room], room, floor)
          for room, floors in FLOORS.items() for floor, names in enumerate(floors) for name in names.split()}
NOTEBOOKS = sorted((store.ROOT / "notebooks").glob("*.ipynb"))
PRESETS = sorted((store.ROOT / "notebooks" / "presets").glob("*.yaml"))
RESULTS = store.DATA / "results"


def imported(source: str) -> set[str]:
    """Every module that a source file imports, anywhere in it; the package's own as `tsae.room.file`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}".removeprefix("tsae.") in PLACES
                      else node.module for alias in node.names}
    return found


def climbing(sources: dict[str, str]) -> list[str]:
    """The imports, "a imports b", that do not go strictly down, in files {place: source}."""
    wrong = []
    for module, source in sources.items():
        height, room, floor = PLACES[module]
        for name in sorted(imported(source)):
            if name.partition(".")[0] != "tsae":
                continue
            below = PLACES.get(name.removeprefix("tsae."))
            inside = below is not None and below[1] == room and below[2] < floor
            if not inside and (below is None or below[0] >= height):
                wrong.append(f"{module} imports {name}")
    return wrong


def sources() -> dict[str, str]:
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
             if path.name != "__init__.py"}
    return {name: path.read_text() for name, path in files.items()}


def test_a_room_holds_its_files_only():
    """What a room's __init__ imports would be imported with each of its files: it has a docstring, no more."""
    rooms = {path.parent.relative_to(PACKAGE): path.read_text() for path in PACKAGE.rglob("__init__.py")}
    assert {str(room).strip(".") for room in rooms} == set(ROOMS)
    for room, source in rooms.items():
        assert [type(node) for node in ast.parse(source).body] == [ast.Expr], room


def test_nothing_is_imported_by_the_back_door():
    """Neither the command, nor by a name that is worked out."""
    for module, source in sources().items():
        assert not {name for name in imported(source) if name.endswith("__main__")}, module
        assert "__import__(" not in source and "exec(" not in source, module
        named = re.findall(r"importlib\.import_module\((.*)\)", source)
        assert named in ([], ['"torch._dynamo"']), module


def test_every_file_has_a_place_and_imports_only_go_down():
    assert set(sources()) == set(PLACES)
    assert not climbing(sources())


@pytest.mark.parametrize("module, line, said", [
    ("evaluate", "from tsae import codes", "evaluate imports tsae.codes"),  # beside it
    ("scale.passes", "from tsae.scale.sharded import Sharded", "scale.passes imports tsae.scale.sharded"),
    ("scoring.rules", "from tsae.scale import sweep", "scoring.rules imports tsae.scale.sweep"),  # a room of its height
    ("lm", "import tsae.train", "lm imports tsae.train"),  # up
    ("store", "def f():\n    from tsae.study import form", "store imports tsae.study.form"),  # hidden in a function
    ("sae", "import tsae", "sae imports tsae")])
def test_a_planted_import_is_found(module, line, said):
    assert climbing(sources() | {module: f"{sources()[module]}\n{line}\n"}) == [said]


def test_a_planted_circle_is_found():
    planted = {"codes": "from tsae import sae", "sae": "from tsae.evaluate import nmse", "evaluate": "import tsae.codes"}
    assert climbing(planted) == ["sae imports tsae.evaluate", "evaluate imports tsae.codes"]


def test_one_file_knows_nnsight():
    roots = {module: {name.split(".")[0] for name in imported(source)} for module, source in sources().items()}
    assert [module for module, names in roots.items() if "nnsight" in names] == ["lm"]


def test_the_model_and_its_kernels_stand_alone():
    """Four files that anyone can copy and leave with."""
    for module in ("sae", "baseline", "kernels", "gpu"):
        own = {"tsae.kernels", "tsae.gpu", "tsae.baseline"}
        outside = {name.split(".")[0] for name in imported(sources()[module]) - own}
        assert outside <= {"torch", "safetensors", "numpy", "triton"} | set(sys.stdlib_module_names)


def test_the_model_runs_where_it_was_copied_to(tmp_path):
    (tmp_path / "tsae").mkdir()
    for name in ("sae", "baseline", "kernels", "gpu"):
        shutil.copy(PACKAGE / f"{name}.py", tmp_path / "tsae")
    work = ("import torch, tsae.sae as sae\ns = sae.SAE(8, 16, k=2).start(torch.zeros(8))\n"
            "print(sae.__file__, tuple(s(torch.randn(3, 8)).shape))")
    done = subprocess.run([sys.executable, "-c", work], cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(tmp_path)),
                          capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'tsae/sae.py'} (3, 8)\n", done.stderr


def test_lines_and_functions_are_short():
    for module, source in sources().items():
        assert max(map(len, source.splitlines())) <= 100, module
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{module}: {node.name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean_runs(path):
    notebook = nbformat.read(path, 4)
    assert "widgets" not in notebook.metadata, "no widget state"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it top to bottom"
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and all(line.count(" = ") == 1 for line in tagged[0].source.splitlines())
    for cell in cells:
        lines = cell.source.splitlines()
        assert len(lines) <= 16 or cell in tagged, lines[0]
        assert max(map(len, lines)) <= 120 and "sys.path" not in cell.source
    kinds = [cell.cell_type for cell in notebook.cells]
    assert all(above == "markdown" for above, kind in zip([None, *kinds], kinds) if kind == "code"), "a sentence above each"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.get("name") == "stderr" for output in outputs), "no remains of progress bars"
    assert cells[-1].source.startswith("# check\n") and "assert" in cells[-1].source
    for cell in cells:
        made_by = re.findall(r'store\.result\(\w+, "?\w+"?, \w+, ([^,)\s]+)', cell.source)
        assert set(made_by) <= {"this.name"}, "a table names the notebook that made it"
    assert path.stat().st_size < 2e6


def test_a_parameter_means_the_same_everywhere():
    types: dict[str, type] = {}
    for path in NOTEBOOKS:
        for name, default in beginning.declared(path).items():
            assert types.setdefault(name, type(default)) is type(default), name
            assert default != [] or name in beginning.ENTRIES, f"{name} is empty by default: ENTRIES says what it may hold"


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_name_real_parameters(path):
    settings = yaml.safe_load(path.read_text()) or {}
    settings.pop("only", None)
    known = {name: value for notebook in NOTEBOOKS for name, value in beginning.declared(notebook).items()}
    beginning.check(settings, known)
    with pytest.raises(ValueError, match="there is no parameter 'n_featurs': did you mean 'n_features'"):
        beginning.check(settings | dict(n_featurs=1), known)


def test_results_are_those_of_their_manifest():
    for folder in filter(Path.is_dir, RESULTS.iterdir()):
        manifest = store.read_json(folder / "manifest.json")
        assert set(manifest) == {path.name for path in folder.glob("*.csv")}
        for name, line in manifest.items():
            assert store.digest(folder / name) == line["sha256"], f"{name} was changed after {line['notebook']} made it"


SHOWN = {  # what a notebook displays of a published table
    "02": lambda shares: shares[shares["metric"] == "answering"].pivot(index=["inputs", "sae"], columns="bar",
                                                                       values="value").round(2),
    "03": lambda fronts: fronts[(fronts["activation"] == "topk") & fronts["metric"].isin(["nmse", "ce_added"])
                                & (fronts["k"] > 2)].pivot(index=["metric", "k"], columns="table", values="value").round(3),
    "04": lambda unigram_sensitivity: unigram_sensitivity[np.isclose(unigram_sensitivity["threshold"], 0.2)].pivot(
        index="size", columns="table", values="share").round(3),
    "07": lambda effects: effects.set_index(["measure", "view"])[["without table", "with table", "difference", "low", "high",
                                                                  "says"]].round(3)}


@pytest.mark.parametrize("number", SHOWN)
def test_notebooks_show_the_tables_that_are_published(number):
    """To the last digit: no stored output can be changed, or be of another run."""
    path = next(path for path in NOTEBOOKS if path.name.startswith(number))
    (source,) = inspect.signature(SHOWN[number]).parameters
    table = SHOWN[number](store.read_table(RESULTS / f"embedded/{source.replace('shares', 'gram_shares')}.csv"))
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    pages = [output["data"].get("text/html", "") for cell in cells for output in cell.outputs if "data" in output]

    def numbers(page: str) -> list[str]:
        return re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", page)

    assert numbers(table.to_html(notebook=True)) in [numbers(page) for page in pages], "run python -m tsae --publish"


@pytest.mark.parametrize("name", readme.PAGES)
def test_the_pages_show_the_tables(name):
    page = (store.ROOT / name).read_text()
    assert readme.written(page, RESULTS, readme.PAGES[name]) == page, "run python -m tsae --publish"


def test_the_readme_is_read_in_ten_minutes():
    assert len((store.ROOT / "README.md").read_text().splitlines()) <= 150


def test_figures_are_not_older_than_their_tables():
    manifest = store.read_json(store.ROOT / "figures" / "manifest.json")
    assert manifest["tables"] == store.digest(RESULTS / "embedded/manifest.json"), "run python -m tsae --publish"
    assert manifest["figures"] == {path.name: store.digest(path) for path in (store.ROOT / "figures").glob("*.png")}
