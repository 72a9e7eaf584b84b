"""Oracle: transformers itself, through its own hidden_states, hooks and forward passes."""

import pytest
import torch
from conftest import byte_tokenizer, tiny_network
from families import FAMILIES, POST_NORM, random_network
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tsae import lm as lms

TOKENS = torch.randint(1, 257, (3, 9), generator=torch.Generator().manual_seed(1))
TOKENS[:, 0] = 0


def centred(lm, x):
    return x - x.mean(-1, keepdim=True) if lm.centred else x


def test_residuals_are_hidden_states(tiny):
    with torch.no_grad():
        expected = tiny.model(TOKENS, output_hidden_states=True).hidden_states
    ours = tiny.residuals(TOKENS, [2, 0, 1])
    assert tiny.centred == (tiny.name in ("gpt2", "gpt_neox"))
    for layer in range(3):
        assert torch.allclose(ours[layer], centred(tiny, expected[layer]), atol=1e-5)
        assert torch.equal(tiny.layer(layer).residuals(TOKENS), ours[layer])


def test_the_forward_pass_stops_after_the_layer(tiny_gpt2):
    ran = []
    for i, block in enumerate(tiny_gpt2.model.transformer.h):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    tiny_gpt2.residuals(TOKENS, [1])
    assert ran == [0]


def test_unigrams_are_two_token_prompts(tiny):
    unigrams = tiny.unigrams(1)
    assert unigrams.shape == (257, 16)
    with torch.no_grad():
        one = tiny.model(torch.tensor([[0, 77]]), output_hidden_states=True).hidden_states[1][0, 1]
    assert torch.allclose(unigrams[77], centred(tiny, one), atol=1e-5)


def test_patching_what_was_there_changes_nothing(tiny):
    """Also shows that centring is free: the patched stream has no mean, the model computes the same."""
    with torch.no_grad():
        logits = tiny.model(TOKENS).logits
    kept = tiny.keep(TOKENS)[:, :-1]
    expected = cross_entropy(logits[:, :-1][kept], TOKENS[:, 1:][kept], reduction="none")
    assert torch.allclose(tiny.nats(TOKENS), expected, atol=1e-5)
    assert torch.allclose(tiny.nats(TOKENS, 1, lambda x, t: x), expected, atol=1e-4)


def test_patch_reaches_the_kept_positions_only(tiny_gpt2):
    tokens = TOKENS.clone()
    tokens[1, 4] = 0  # a special token in the middle of a row
    seen = []

    def zero(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    patched = tiny_gpt2.nats(tokens, 2, zero)
    x, t = seen[0]
    kept = tiny_gpt2.keep(tokens)
    assert kept.sum() == 3 * 8 - 1 and not kept[:, 0].any() and not kept[1, 4]
    assert torch.equal(t, tokens[kept]) and torch.allclose(x, tiny_gpt2.layer(2).residuals(tokens)[kept], atol=1e-6)
    network, stream = tiny_gpt2.model, tiny_gpt2.layer(2).residuals(tokens)
    stream[kept] = 0
    with torch.no_grad():
        hidden = network.transformer.h[2](stream)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        logits = network.lm_head(network.transformer.ln_f(hidden))
    expected = cross_entropy(logits[:, :-1][kept[:, :-1]], tokens[:, 1:][kept[:, :-1]], reduction="none")
    assert torch.allclose(patched, expected, atol=1e-4)
    assert tiny_gpt2.tail(tokens, 2)(zero) == pytest.approx(expected.mean().item(), abs=1e-4)


def test_no_gradients_are_kept(tiny_gpt2):
    assert not tiny_gpt2.layer(1).residuals(TOKENS).requires_grad and torch.is_grad_enabled()


def test_load_from_a_folder_in_hub_format(model_folder):
    folder = model_folder("llama")
    loaded = lms.load(str(folder), device="cpu")
    made = lms.LM(tiny_network("llama"), byte_tokenizer())
    assert torch.allclose(loaded.layer(2).residuals(TOKENS), made.layer(2).residuals(TOKENS), atol=1e-5)


@pytest.mark.parametrize("layers", [[3], [-2], []])
def test_layer_out_of_range(tiny_gpt2, layers):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        tiny_gpt2.residuals(TOKENS, layers)


def test_rows_longer_than_the_model_reads(tiny_gpt2):
    with pytest.raises(ValueError, match="at most 32.*context"):
        tiny_gpt2.residuals(torch.ones(1, 33, dtype=torch.long), [0])


def test_a_model_without_bos_and_how_to_mend_it(model_folder):
    folder = model_folder()
    byte_tokenizer(bos=None).save_pretrained(folder)
    with pytest.raises(ValueError, match="no BOS token.*bos_token"):
        lms.load(str(folder))
    assert lms.load(str(folder), bos_token="<|endoftext|>").bos == 0
    with pytest.raises(ValueError, match="no token of"):
        lms.load(str(folder), bos_token="<nonsense>")


def test_unknown_models_get_a_sentence(tmp_path, model_folder):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        lms.load(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="could not be loaded.*hub name"):
        lms.load("someone/no-such-model")
    weights = model_folder() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="could not be loaded"):
        lms.load(str(weights.parent))


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own kernels and classes
@pytest.mark.parametrize("family", [*FAMILIES, *POST_NORM])
def test_families(family):
    """Residuals are what blocks are given; a patch of the stream by itself, and skipped blocks, change nothing."""
    network, given = random_network(family), []
    with torch.no_grad():
        logits = network(input_ids=TOKENS, use_cache=False).logits
    lm = lms.LM(network, byte_tokenizer(), family)
    block = lm.blocks[2]._module
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: given.append((*args, *kwargs.values())[0]),
                                             with_kwargs=True)
    network(input_ids=TOKENS, use_cache=False)
    handle.remove()
    x = lm.residuals(TOKENS, [2])[2]
    assert torch.allclose(x, centred(lm, given[0].detach()), atol=1e-5)
    assert lm.centred == any(isinstance(module, torch.nn.LayerNorm) for module in block.modules()) or family in NOT_FREE
    kept = lm.keep(TOKENS)[:, :-1]
    expected = cross_entropy(logits[:, :-1][kept], TOKENS[:, 1:][kept], reduction="none")
    assert torch.allclose(lm.nats(TOKENS, 2, lambda x, t: x), expected, atol=1e-4)
    assert lm.tail(TOKENS, 2)(lambda x, t: x) == pytest.approx(expected.mean().item(), abs=1e-4)
    assert torch.allclose(lm.next_token_logits(TOKENS, 2, lambda x: x, x), logits[:, -1], atol=1e-3)


NOT_FREE = {*POST_NORM, "openai-gpt"}  # the mean is left in: it is part of what the model reads


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(ValueError, match="bert sees later tokens: a causal language model was expected"):
        lms.LM(random_network("bert"), byte_tokenizer(), "bert")


@pytest.mark.parametrize("change", ["missing", "renamed", "other shape"])
def test_a_checkpoint_that_lacks_weights_is_refused(change, model_folder):
    path = model_folder("llama") / "model.safetensors"
    weights, name = load_file(path), "model.layers.1.mlp.up_proj.weight"
    taken = weights.pop(name)
    weights |= {"missing": {}, "renamed": {"model.layers.1.mlp.up.weight": taken}, "other shape": {name: taken[:-1]}}[change]
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, metadata=dict(format="pt"))
    with pytest.raises(ValueError, match=r"no fitting weights for model.layers.1.mlp.up_proj.weight \(1 in all\)"):
        lms.load(str(path.parent))


def test_a_folder_without_a_tokenizer_is_refused(model_folder):
    folder = model_folder()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no tokenizer that reads text|no BOS token|could not be loaded"):
        lms.load(str(folder))


def test_a_tokenizer_of_more_ids_than_rows_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(ValueError, match="gives ids up to 257, the embedding of gpt2 has 257 rows"):
        lms.LM(tiny_network("gpt2"), tokenizer, "gpt2")


def test_devices_and_dtypes_that_are_not_there(model_folder):
    folder = str(model_folder())
    with pytest.raises(ValueError, match="dtype is 'bf16': expected one of auto, float32, bfloat16, float16"):
        lms.load(folder, dtype="bf16")
    for device in ("cuda:77", "gpu", "CPU"):
        with pytest.raises(ValueError, match=f"the device '{device}' was asked for, and torch has none of that name here"):
            lms.load(folder, device=device)
    assert lms.load(folder, dtype="bfloat16").layer(1).residuals(TOKENS).dtype == torch.float32


def test_sinks_are_neither_patched_nor_counted(tiny):
    x = tiny.residuals(TOKENS, [1])[1]
    limit = x[tiny.keep(TOKENS)].norm(dim=-1).median().item()
    counted = tiny.keep(TOKENS, x, limit)
    assert counted.sum() < tiny.keep(TOKENS).sum() and not counted[x.norm(dim=-1) > limit].any()
    patched = []
    nats = tiny.nats(TOKENS, 1, lambda x, t: patched.append(t) or 0 * x, x, limit)
    assert torch.equal(patched[0], TOKENS[counted].long())
    changed = x.clone()
    changed[counted] = 0
    whole = tiny.nats(TOKENS, 1, residuals=changed)
    assert torch.allclose(nats, whole[counted[:, :-1][tiny.keep(TOKENS)[:, :-1]]], atol=1e-4)
    tail = tiny.tail(TOKENS, 1, limit)
    assert tail(lambda x, t: 0 * x) == pytest.approx(nats.mean().item(), abs=1e-4)
    each = torch.zeros(TOKENS.shape)
    each[tail.kept] = tail.each(lambda x, t: 0 * x)
    assert torch.allclose(each[:, :-1][counted[:, :-1]], nats, atol=1e-4), "every position's nats lie at its place"


def test_auto_is_bfloat16_where_the_hardware_multiplies_it(model_folder, monkeypatch):
    folder = str(model_folder())
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: dict(avx512_bf16=able))
        assert lms.load(folder, device="cpu", dtype="auto").model.dtype == (torch.bfloat16 if able else torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_a_suffix_can_stand_where_it_stands_in_its_row(family):
    """Against the model called directly; with learned positions, against one whose rows of them were moved."""
    lm = lms.LM(tiny_network(family), byte_tokenizer(), family)
    at = torch.arange(TOKENS.shape[1]).expand(TOKENS.shape)
    assert torch.equal(lm.residuals(TOKENS, [2])[2], lm.residuals(TOKENS, [2], at)[2]), "0 .. T - 1 is what it does anyway"
    grams, ends = TOKENS[:, 3:5], torch.tensor([7, 9, 20])
    rows = torch.cat([torch.full((3, 1), lm.bos), grams], 1)
    places = torch.stack([torch.zeros(3, dtype=torch.long), ends - 1, ends], 1)
    with torch.no_grad():
        states = lm.model(input_ids=rows, position_ids=places, attention_mask=torch.ones_like(rows), use_cache=False,
                          output_hidden_states=True).hidden_states[2][:, -1].float()
    states = states - states.mean(-1, keepdim=True) if lm.centred else states
    moved = lm.last(grams, [2], ends=ends)[2]
    assert torch.allclose(moved, states, atol=1e-5) and not torch.allclose(moved, lm.last(grams, [2])[2], atol=1e-3)
    changed = grams.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 200
    assert not torch.allclose(lm.last(changed, [2], ends=ends)[2], moved, atol=1e-3), "the last token sees the one before"
    if family == "gpt2":
        for row, end in enumerate(ends):
            other = lms.LM(tiny_network(family), byte_tokenizer(), family)
            other.model.transformer.wpe.weight.data[1:3] = lm.model.transformer.wpe.weight.data[end - 1:end + 1]
            assert torch.allclose(other.last(grams[row:row + 1], [2])[2], moved[row:row + 1], atol=1e-5)


NO_POSITIONS = {"bloom", "mpt", "rwkv", "mamba", "mamba2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_which_models_can_be_told_of_positions(family):
    """What the model computes decides, not its arguments: with ALiBi they are there and change nothing."""
    lm = lms.LM(random_network(family), byte_tokenizer(), family)
    assert lm.takes_positions == (family not in NO_POSITIONS)
    if family == "falcon":
        with_alibi = random_network(family).config
        with_alibi.alibi = True
        network = AutoModelForCausalLM.from_config(with_alibi).eval()
        assert not lms.LM(network, byte_tokenizer(), family).takes_positions


def test_a_model_that_cannot_be_told_of_positions_says_so():
    lm = lms.LM(random_network("bloom"), byte_tokenizer(), "bloom")
    assert not lm.takes_positions
    with pytest.raises(ValueError, match="bloom cannot be told at which positions tokens stand"):
        lm.last(TOKENS[:, :2], [1], ends=torch.tensor([7, 7, 7]))


def test_long_work_has_a_bar_that_can_be_turned_off(tiny_gpt2, capsys):
    """By tqdm's own variable, which an argument `disable` would overrule."""
    assert tiny_gpt2.generate("a", tokens=25) and not capsys.readouterr().err, "conftest sets TQDM_DISABLE"
    assert list(lms._progress(range(3), "few")) == [0, 1, 2]
