"""Tiny random language models of four families, made here: no download."""

import os

os.environ.update(TQDM_DISABLE="1", TSAE_PNG="0")  # before tqdm is imported, here; store.py sets both for kernels
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import chromium_driver
import pytest
import torch
from nbval.plugin import IPyNbCell
from printed import Printed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tsae.lm import LM
from tsae.pairs.prepare import Data, prepare

ROWS = torch.randint(1, 257, (8, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)

FAMILIES = {
    "gpt2": dict(n_embd=16, n_layer=3, n_head=2, n_positions=32, activation_function="gelu_pytorch_tanh"),
    "gpt_neox": dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
                     max_position_embeddings=32),
    "llama": dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                  intermediate_size=32, max_position_embeddings=32),
    "qwen2": dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                  intermediate_size=32, max_position_embeddings=32),
    "gemma2": dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                   intermediate_size=32, max_position_embeddings=32),
}


def byte_tokenizer(bos: str | None = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """256 bytes and one special token: reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<|endoftext|>")


def tiny_network(family: str, seed: int = 0):
    """A random causal LM of a family, three blocks of width 16."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=257, bos_token_id=0, eos_token_id=0, pad_token_id=None,
                                  initializer_range=0.2, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=FAMILIES)
def tiny(request) -> LM:
    return LM(tiny_network(request.param), byte_tokenizer(), request.param)


@pytest.fixture
def tiny_gpt2() -> LM:
    return LM(tiny_network("gpt2"), byte_tokenizer(), "gpt2")


@pytest.fixture
def model_folder(tmp_path):
    """Function that writes a tiny model of a family in hub format and returns its folder."""
    def write(family: str = "gpt2"):
        folder = tmp_path / family
        tiny_network(family).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder
    return write


@pytest.fixture
def data(tiny_gpt2, tmp_path) -> Data:
    """The activations of ROWS at layer 1 of a tiny language model."""
    return prepare(tiny_gpt2.layer(1), ROWS, batch=16, folder=tmp_path / "activations")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser, or a skipped test where there is none."""
    if not chromium_driver.CHROMIUM:
        pytest.skip("there is no Chromium here")
    found = chromium_driver.Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.socket.close()
    found.process.kill()
    found.process.wait(60)


def pytest_collection_modifyitems(items) -> None:
    """The notebook that draws from all others comes last. What cells print is compared with a tolerance."""
    items.sort(key=lambda item: "05_figures" in item.nodeid)
    for item in items:
        if isinstance(item, IPyNbCell):
            item.sanitize = _printed(item.sanitize)  # nbval has no hook for it


def _printed(sanitize):
    def printed(output):
        return Printed(sanitize(output)) if isinstance(output, str) else output
    return printed
