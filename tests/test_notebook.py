"""What a notebook begins with: wrong parameters are refused in a sentence, and every run has a folder of its own."""

import json

import nbformat
import papermill
import pytest

from tsae import notebook, store

SOURCE = "\n".join(("run_name: str = ''", "model: str = 'embedded'", "context: int = 128  # tokens", "n_features: int = 64",
                    "k: int = 8", "lr: float = 0.003", "browse: bool = True", "seeds: list = [0, 1]", "layers: list = []",
                    "rates: list = []", "rivals: list = [['relu', 1, 3.0]]", "layer: int = -1", "outliers: float = 10.0"))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository with one notebook, "01_a", which writes its folder and whether it has the defaults."""
    nb = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(SOURCE, metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell("from tsae import notebook\nthis = notebook.start('01_a', globals())"),
        nbformat.v4.new_code_cell("print(this.folder, this.by_default)")])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="Python 3", language="python")
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nb, tmp_path / "notebooks/01_a.ipynb")
    monkeypatch.setattr(notebook, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(store, "DATA", tmp_path / "data")
    return tmp_path


def started(**changes) -> notebook.Notebook:
    names: dict = {}
    exec(SOURCE, names)
    return notebook.start("01_a", names | changes)


@pytest.mark.parametrize("changes, words", [
    (dict(k=0), "k is 0: expected more than 0"), (dict(seeds=[]), "seeds is empty: at least one entry"),
    (dict(context=1), "context is 1: expected 2 or more"), (dict(seeds="[0, 1]"), "papermill takes by -y '{seeds: .0, 1.}'"),
    (dict(k=128), "k is 128, more than the 64 of n_features"),
    (dict(lr=float("inf")), "lr is inf: expected a number"), (dict(k=True), "k is True, a bool: expected int such as 8"),
    (dict(k=[8]), r"k is \[8\], a list: expected int"), (dict(browse=1), "browse is 1, a int: expected bool"),
    (dict(seeds=[0, "1"]), "seeds has the entry '1', a str: expected int"), (dict(seeds=[1, 1]), "seeds has 1 twice"),
    (dict(seeds=[-1]), "an entry of seeds is -1: expected 0 or more"), (dict(layers=["3"]), "layers has the entry '3'"),
    (dict(rates=[0.0]), "an entry of rates is 0.0: expected more than 0"), (dict(lr=float("nan")), "lr is nan"),
    (dict(rivals=[["relu", 1]]), "rivals has the entry"), (dict(rivals=[["relu", "1", 3.0]]), "rivals has the entry"),
    (dict(layer=-2), "layer is -2: expected -1 or more"), (dict(lr="fast"), "lr is 'fast', a str: expected float"),
    (dict(In=["", "# Parameters\nkk = 5\nk = 3\n"], kk=5), "there is no parameter 'kk': did you mean 'k'")])
def test_wrong_parameters_are_refused_in_a_sentence(house, changes, words):
    with pytest.raises(ValueError, match=words) as refused:
        started(**changes)
    assert "\n" not in str(refused.value) and not (house / "data/runs").exists(), "before any work"


def test_what_may_be_is_taken(house):
    taken = dict(lr=1, outliers=0, layers=[0, 2], rates=[1, 0.5], rivals=[], In=["# Parameters\nk = 3\n"], k=3)
    assert not started(**taken).by_default


def test_papermill_says_what_is_wrong(house, monkeypatch):
    """By papermill itself, which passes lists as text and only warns of a name that it does not know."""
    monkeypatch.setenv("TSAE_HOME", str(house))
    for given, words in ((dict(seeds="[0]"), "seeds is the text"), (dict(sede=1), "there is no parameter 'sede'")):
        with pytest.raises(papermill.PapermillExecutionError, match=words):
            papermill.execute_notebook(str(house / "notebooks/01_a.ipynb"), None, given, progress_bar=False)


def test_other_parameters_go_to_another_folder(house):
    """From papermill and JupyterLab as from the command: nothing overwrites the tables of another run."""
    runs = house / "data/runs"
    first = started()
    assert first.folder == runs / "embedded" and first.by_default
    other = started(k=4)
    assert other.folder.parent == runs and other.folder != first.folder and not other.by_default
    assert started(k=4).folder == other.folder != started(k=2).folder and started().folder == first.folder
    with pytest.raises(ValueError, match=r"embedded holds a run of other parameters \(k=8\): name another folder"):
        started(run_name="embedded", k=4)
    assert started(run_name="mine", k=4).folder == runs / "mine" == started(run_name="mine", k=4).folder
    with pytest.raises(ValueError, match=r"mine holds a run of other parameters \(k=4\)"):
        started(run_name="mine")


KNOWN = dict(run_name="", k=8, lr=0.1, tokens=300, scorer="me")
OTHER = KNOWN | dict(tokens=150)  # a notebook with another default


def test_a_preset_keeps_its_folder_when_its_file_changes(tmp_path):
    def noted(**given) -> dict:
        return {"03_a": notebook.described(given, KNOWN)}

    notebook.settle(tmp_path, noted(k=8, lr=0.2), "smollm2")
    notebook.settle(tmp_path, noted(k=8, lr=0.2, scorer="ada"))
    with pytest.raises(ValueError, match="holds a run of preset 'smollm2' .k=8."):
        notebook.settle(tmp_path, noted(k=4, lr=0.2))
    with pytest.raises(ValueError, match="holds a run of preset 'smollm2'"):
        notebook.settle(tmp_path, noted(k=8, lr=0.2), "smollm2-ab12")
    notebook.settle(tmp_path, noted(k=4), "smollm2")
    assert store.read_json(tmp_path / "run.json") == dict(preset="smollm2", notebooks=noted(k=4))


@pytest.mark.parametrize("given, fits", [
    ({}, True), (dict(k=4), True), (dict(tokens=300), True), (dict(tokens=150), True), (dict(tokens=77), True)])
def test_a_parameter_may_have_another_default_in_another_notebook(tmp_path, given, fits):
    """What is given to all notebooks of a run never speaks against itself."""
    notebook.settle(tmp_path, {"03_a": notebook.described(given, KNOWN), "06_b": notebook.described(given, OTHER)})
    notebook.settle(tmp_path, {"06_b": notebook.described(given, OTHER)})
    notebook.settle(tmp_path, {"03_a": notebook.described(given, KNOWN)})


def test_notebooks_of_one_run_share_what_was_changed(tmp_path):
    notebook.settle(tmp_path, {"03_a": notebook.described(dict(tokens=9), KNOWN)})
    with pytest.raises(ValueError, match="tokens=9"):
        notebook.settle(tmp_path, {"06_b": notebook.described({}, OTHER)})
    with pytest.raises(ValueError, match="tokens=9"):  # the notebook's own cell was changed, and saved
        notebook.settle(tmp_path, {"03_a": notebook.described({}, KNOWN | dict(tokens=10))})


def test_two_scorers_share_a_folder(house):
    assert notebook.changes(dict(scorer="ada", memory_gb=1.0, k=8), KNOWN | dict(memory_gb=4.0)) == {}


def test_findings_are_asserted_with_the_defaults_only(capsys):
    by_default, other = (notebook.Notebook("01_a", None, flag) for flag in (True, False))
    by_default.found("water is wet", True)
    other.found("water is dry", False)
    assert capsys.readouterr().out == "water is wet\nnot seen with these settings: water is dry\n"
    with pytest.raises(AssertionError, match="not seen: water is dry"):
        by_default.found("water is dry", False)


def test_parameters_are_read_from_the_tagged_cell(house):
    known = notebook.declared(house / "notebooks/01_a.ipynb")
    assert known["seeds"] == [0, 1] and known["layer"] == -1 and len(known) == 13
    cells = json.loads((house / "notebooks/01_a.ipynb").read_text())["cells"]
    assert "k: int = 8" in "".join(cells[0]["source"])


def test_a_run_folder_of_another_version_is_refused_in_a_sentence(tmp_path):
    store.write_json(tmp_path / "run.json", dict(preset="smollm2", settings={}))
    with pytest.raises(ValueError, match="run.json is not of this version of tsae: delete this file if"):
        notebook.settle(tmp_path, {}, "smollm2")
