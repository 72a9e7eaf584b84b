"""python -m tsae: run the notebooks in order through papermill, each once for the same inputs."""

import argparse
import ast
import difflib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import papermill
import yaml

from tsae import readme, store

NOTEBOOKS = store.ROOT / "notebooks"
BENCHMARK = "tests.bench"
VERSION = 1  # of finished notebooks: raise it when the package gives them other results


def declared(notebook: Path) -> dict[str, object]:
    """The parameters of a notebook with their defaults, read from its tagged cell."""
    found = papermill.inspect_notebook(str(notebook))
    return {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}


def read_preset(name: str) -> dict[str, object]:
    """The settings of notebooks/presets/<name>.yaml, or of a yaml file given by its path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else NOTEBOOKS / "presets" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in (NOTEBOOKS / "presets").glob("*.yaml"))
        raise SystemExit(f"there is no preset {name!r}: the presets are {', '.join(known)}, or give a .yaml file")
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(settings, dict):
        raise SystemExit(f"the preset {path} must be lines of `name: value`")
    return settings


def read_assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SystemExit(f"-p takes name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)  # numbers and lists as Python writes them
    except (ValueError, SyntaxError):
        return name, yaml.safe_load(value)  # true, false and plain words


def check(settings: dict[str, object], parameters: dict[str, dict[str, object]]) -> None:
    """Refuse names that no notebook declares and values of another type than the default's."""
    known = {name: default for entry in parameters.values() for name, default in entry.items()}
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise SystemExit(f"no notebook has a parameter {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        wanted = (int, float) if isinstance(known[name], float) else type(known[name])
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise SystemExit(f"{name} is {value!r}, a {type(value).__name__}: expected "
                             f"{type(known[name]).__name__} such as {known[name]!r}")


def run(notebook: Path, parameters: dict[str, object], folder: Path, tables: dict[str, str], label: str) -> None:
    """Execute a notebook into `folder`/notebooks unless that was done with the same inputs, `tables` read included."""
    own = {name: value for name, value in parameters.items() if name != "run_name"}  # where it lies changes nothing
    key = store.key(notebook=code_of(notebook), parameters=own, version=VERSION, tables=tables)
    done, executed = folder / "done" / f"{notebook.stem}.json", folder / "notebooks" / notebook.name
    if done.is_file() and executed.is_file() and store.read_json(done)["key"] == key:
        print(f"{label}  done before", flush=True)
        return
    print(f"{label}  running", flush=True)
    started = time.monotonic()
    executed.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(str(notebook), str(executed), parameters, progress_bar=sys.stderr.isatty(),
                               extra_arguments=["--IPKernelApp.log_level=ERROR"])  # no warning that loopback is not encrypted
    seconds = time.monotonic() - started
    store.write_json(done, dict(key=key, parameters=parameters, seconds=round(seconds, 1)))
    print(f"{label}  done in {seconds:.0f} s", flush=True)


def made_before(folder: Path, notebook: Path) -> dict[str, str]:
    """Digests of the tables that notebooks with smaller numbers left in the run folder."""
    manifest = folder / "tables" / "manifest.json"
    lines = store.read_json(manifest) if manifest.is_file() else {}
    return {name: line["sha256"] for name, line in lines.items() if line["notebook"] < notebook.stem}


def code_of(notebook: Path) -> list[str]:
    """The code cells' text: outputs and prose do not make a notebook new."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def publish(folder: Path) -> None:
    """Copy a run's tables and pictures over the repository's, tie the two by a manifest, and write the README's tables.

    Tables of the benchmark, which no notebook makes, stay.
    """
    results, figures = store.DATA / "results", store.ROOT / "figures"
    lines = store.read_json(results / "manifest.json") if (results / "manifest.json").is_file() else {}
    lines = {name: line for name, line in lines.items() if line["notebook"] == BENCHMARK}
    for part, place, pattern in (("tables", results, "*.csv"), ("figures", figures, "*.png")):
        for file in sorted((folder / part).glob(pattern)):
            with store.replacing(place / file.name) as temporary:
                shutil.copyfile(file, temporary)
    store.write_json(results / "manifest.json", lines | store.read_json(folder / "tables" / "manifest.json"))
    readme.tie()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tsae", description=__doc__)
    parser.add_argument("--preset", default="embedded", help="a file of notebooks/presets, or a path to a yaml file")
    parser.add_argument("-p", action="append", default=[], metavar="name=value", help="set a notebook parameter")
    parser.add_argument("--only", nargs="+", default=[], metavar="NN", help="only these notebooks, by their numbers")
    parser.add_argument("--out", default="", help="run folder; default: data/runs/<preset>, with a hash where -p is given")
    parser.add_argument("--publish", action="store_true",
                        help="afterwards copy tables and figures to data/results and figures, which the README shows")
    options = parser.parse_args(arguments)
    assigned = dict(read_assignment(text) for text in options.p)
    settings = read_preset(options.preset) | assigned
    only = options.only or [str(number) for number in settings.pop("only", [])]
    settings.pop("only", None)
    if options.publish and settings:
        raise SystemExit("--publish is for the defaults: the README speaks of the embedded model")
    notebooks = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    wanted = [path for path in notebooks if not only or path.name[:2] in only]
    missing = set(only) - {path.name[:2] for path in notebooks}
    if missing or not wanted:
        raise SystemExit(f"there is no notebook {', '.join(sorted(missing))}: there are "
                         f"{', '.join(path.stem for path in notebooks)}")
    parameters = {path.name: declared(path) for path in notebooks}
    check(settings, parameters)
    name = Path(options.preset).name.removesuffix(".yaml") + (f"-{store.key(**assigned)}" if assigned else "")
    folder = Path(options.out).resolve() if options.out else store.DATA / "runs" / name
    print(f"run folder {os.path.relpath(folder)}", flush=True)
    for i, path in enumerate(wanted):
        own = {name: value for name, value in (settings | {"run_name": str(folder)}).items() if name in parameters[path.name]}
        reads = {} if "model" in parameters[path.name] else made_before(folder, path)  # 01 to 04 need a model, not tables
        try:
            run(path, own, folder, reads, f"[{i + 1}/{len(wanted)}] {path.stem}")
        except (papermill.PapermillExecutionError, RuntimeError) as error:
            what = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error)
            raise SystemExit(f"{path.stem} stopped: {what}\nIts copy is in {folder / 'notebooks'}") from None
    if options.publish:
        publish(folder)
    evidence = folder / "tables" / "evidence.csv"
    if evidence.is_file() and wanted[-1].stem == "05_figures":
        table = store.read_table(evidence)[["claim", "paper", "ours", "low", "high", "verdict"]]
        print(table.to_string(index=False, na_rep="", float_format="{:.3g}".format))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted: what was finished is kept, and the same command goes on from there") from None
