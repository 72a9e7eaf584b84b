"""What every notebook begins with: its parameters checked, a run folder that is its own."""

import ast
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tsae import store

NOTEBOOKS = store.ROOT / "notebooks"
# Numbers are above 0. These may be lower: the least that each may be.
LEAST = {"context": 2, "layer": -1, "second_layer": -1, "outliers": 0, "store_gb": 0, "below": 0,
         "text_tokens": 0, "distinct_tokens": 0, "middle": 0, "equal_tokens": 0,
         "effect_features": 0, "layers": 0, "seed": 0, "seeds": 0, "lm_seed": 0,
         "speedup_layers": 0, "strength": float("-inf"), "threshold": 0, "relu_sparsity": 0,
         "jumprelu_sparsity": 0, "gated_sparsity": 0, "warmup_steps": 0}
AROUND = {"run_name", "scorer", "judge_url", "judge_model", "judge_features", "browse",
          "features_to_score", "sentence", "prompt", "strength", "memory_gb",
          "store_gb"}  # change no table: they may change within a run
NOT_EMPTY = {"arm_names", "ks", "lengths", "main_ks", "seeds", "sizes"}
DICTIONARY = {name: "n_features" for name in ("k", "ks", "main_ks", "plain_ks", "ks_sparser",
                                              "other_ks", "ks_batchtopk")}
DICTIONARY["silent_ks"] = "silent_features"
ENTRIES = {"layers": 0, "rates": 0.001, "silent_ks": 8, "ks_batchtopk": 8, "other_ks": 8,
           "relu_sparsity": 3.0, "jumprelu_sparsity": 1.0,
           "gated_sparsity": 3.0}  # of lists empty by default


@dataclass(frozen=True)
class Notebook:
    """A notebook that runs: `folder` is its run's, or None where it keeps no tables."""

    name: str
    folder: Path | None
    by_default: bool  # every parameter is as the notebook declares it

    def found(self, sentence: str, seen: bool) -> None:
        """Print what was found. Raises AssertionError if it was not, with default parameters."""
        if not seen and self.by_default:
            raise AssertionError(f"not seen: {sentence}")
        print(sentence if seen else f"not seen with these settings: {sentence}")


def start(name: str, names: dict[str, object]) -> Notebook:
    """Check the parameters of notebook `name`, which stand in its globals `names`.

    Raises ValueError, in one sentence, for a parameter that papermill set and the notebook does
    not declare, for a value of another type or out of range, and for a run folder that holds a
    run with other parameters.
    """
    known = declared(NOTEBOOKS / f"{name}.ipynb")
    given = {each: names[each] for each in known}
    check(given | _injected(names), known)
    folder = _folder(name, given, known) if "run_name" in known else None
    return Notebook(name, folder, changes(given, known) == {})


def declared(notebook: Path) -> dict[str, object]:
    """The parameters of a notebook with their defaults, read from its tagged cell."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells
                       if "parameters" in cell["metadata"].get("tags", []))
    return {ast.unparse(line.target): ast.literal_eval(line.value)
            for line in ast.parse(source).body if isinstance(line, ast.AnnAssign)}


def _injected(names: dict[str, object]) -> dict[str, object]:
    """The parameters that papermill set: it adds a cell which begins with this comment."""
    cells = [cell for cell in names.get("In", []) if cell.startswith("# Parameters\n")]
    return {ast.unparse(target): names[ast.unparse(target)]
            for line in ast.parse("\n".join(cells)).body if isinstance(line, ast.Assign)
            for target in line.targets}


def check(given: dict[str, object], known: dict[str, object]) -> None:
    """Raise ValueError for a name that is not among the `known` ones, or a value that cannot be."""
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no parameter {name!r}{hint}")
        _check_one(name, value, known[name])
    for name, size in DICTIONARY.items():
        most, active = given.get(size, 0), given.get(name, 0)
        if most and max(active if isinstance(active, list) else [active], default=0) > most:
            raise ValueError(f"{name} is {active}, more than the {most} of {size}")


def _check_one(name: str, value: object, default: object) -> None:
    if isinstance(value, str) and isinstance(default, list):
        raise ValueError(f"{name} is the text {value!r}: a list was expected, which papermill "
                         f"takes by -y '{{{name}: {value}}}'")
    alike = isinstance(value, list) if isinstance(default, list) else _like(value, default)
    if not alike:
        raise ValueError(f"{name} is {value!r}, a {type(value).__name__}: expected "
                         f"{type(default).__name__} such as {default!r}")
    if not isinstance(value, list):
        return _in_range(name, name, value)
    if not value and name in NOT_EMPTY:
        raise ValueError(f"{name} is empty: at least one entry was expected, such as {default!r}")
    example = default[0] if default else ENTRIES[name]
    for entry in value:
        if not _like(entry, example):
            raise ValueError(f"{name} has the entry {entry!r}, a {type(entry).__name__}: expected "
                             f"{type(example).__name__} such as {example!r}")
        _in_range(f"an entry of {name}", name, entry)
        if value.count(entry) > 1:
            raise ValueError(f"{name} has {entry!r} twice: each entry was expected once")


def _like(value: object, example: object) -> bool:
    """Whether a value has an example's type. Whole numbers pass for others, bool for neither."""
    if isinstance(example, list) and isinstance(value, list):
        return len(value) == len(example) and all(map(_like, value, example))
    wanted = (int, float) if isinstance(example, float) else type(example)
    return isinstance(value, wanted) and isinstance(value, bool) == isinstance(example, bool)


def _in_range(what: str, name: str, value: object) -> None:
    if isinstance(value, (bool, str, list)):
        return
    low = LEAST.get(name, 0)
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}: expected a number")
    if value < low or value == low and name not in LEAST:
        raise ValueError(f"{what} is {value}: expected "
                         f"{f'{low} or more' if name in LEAST else 'more than 0'}")


def _folder(name: str, given: dict[str, object], known: dict[str, object]) -> Path:
    """The run folder: by its name, or by the parameters that are not the defaults."""
    changed = changes(given, known)
    folder = given["run_name"] or (f"run-{store.key(**changed)}" if changed else "embedded")
    settle(store.DATA / "runs" / folder, {name: described(given, known)})
    return store.DATA / "runs" / folder


def changes(given: dict[str, object], known: dict[str, object]) -> dict[str, object]:
    """The parameters that are not the defaults, but for those of AROUND."""
    return {name: value for name, value in given.items()
            if name in known and name not in AROUND and value != known[name]}


def described(given: dict[str, object], known: dict[str, object]) -> dict:
    """What a run folder notes of a notebook: the values of its parameters, those changed."""
    values = {name: value for name, value in (known | given).items()
              if name in known and name not in AROUND}
    return dict(values=values, changed=sorted(changes(given, known)))


def settle(folder: Path, notebooks: dict[str, dict], preset: str = "") -> None:
    """Note what a run folder is for: {notebook: what `described` gives}.

    Raises ValueError if it holds a run with other parameters. Those of a preset may change, with
    its file: the folder that has its name goes with it.
    """
    path = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        noted = store.read_json(path) if path.is_file() else dict(preset="", notebooks={})
        if not {"preset", "notebooks"} <= noted.keys():
            raise ValueError(f"{path} is not of this version of tsae: delete this file if the run "
                             "is of the same parameters, or move the folder away")
        same = preset and noted["preset"] == preset
        told = _differences(noted["notebooks"], notebooks)
        if not same and (told or preset and noted["preset"]):
            of = f"preset {noted['preset']!r}" if noted["preset"] else "other parameters"
            raise ValueError(f"{folder} holds a run of {of} ({', '.join(told)}): name another "
                             "folder for this one, or leave the name out")
        wanted = dict(preset=preset or noted["preset"], notebooks=noted["notebooks"] | notebooks)
        if wanted != noted or not path.is_file():
            store.write_json(path, wanted)


def _differences(noted: dict[str, dict], notebooks: dict[str, dict]) -> list[str]:
    """Parameters of a notebook that were others, or that two of a folder's notebooks share.

    A parameter may have another default in another notebook: there only a change counts.
    """
    found = {}
    for one_name, one in noted.items():
        for other_name, other in notebooks.items():
            for name in one["values"].keys() & other["values"].keys():
                counts = one_name == other_name or name in {*one["changed"], *other["changed"]}
                if counts and one["values"][name] != other["values"][name]:
                    found[name] = f"{name}={one['values'][name]!r}"
    return sorted(found.values())
