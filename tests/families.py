"""Tiny random language models of many families, by their configurations: no download."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = dict(vocab_size=257, bos_token_id=0, eos_token_id=0, pad_token_id=None)
PLAIN = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)
GROUPED = PLAIN | dict(num_key_value_heads=1)
SHORT = dict(n_embd=16, n_layer=3, n_head=2, n_positions=32)
OPT = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32, max_position_embeddings=32,
           word_embed_proj_dim=16)
FAMILIES = {
    # blocks that return a tuple or a list
    "gptj": SHORT | dict(rotary_dim=4), "codegen": SHORT | dict(n_head=4, n_ctx=32, rotary_dim=4), "openai-gpt": SHORT,
    "gpt_neo": dict(hidden_size=16, num_layers=3, num_heads=2, attention_types=[[["global"], 3]], intermediate_size=32,
                    max_position_embeddings=32),
    "bloom": dict(hidden_size=16, n_layer=3, n_head=2), "mpt": dict(d_model=16, n_layers=3, n_heads=2, max_seq_len=32),
    "falcon": dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32),
    "rwkv": dict(hidden_size=16, num_hidden_layers=3, attention_hidden_size=16, intermediate_size=32, context_length=32),
    "gpt_neox_japanese": dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32,
                              intermediate_multiple_size=2),
    # blocks that return a tensor
    "opt": OPT, "phi": PLAIN, "gpt_bigcode": SHORT, "stablelm": GROUPED, "mistral": GROUPED, "olmo2": GROUPED,
    "mixtral": GROUPED | dict(num_local_experts=2), "qwen3": GROUPED | dict(head_dim=8), "granite": GROUPED,
    "gemma3_text": GROUPED | dict(head_dim=8), "cohere2": GROUPED | dict(head_dim=8),
    "mamba": dict(hidden_size=16, num_hidden_layers=3, state_size=4),
    "mamba2": dict(hidden_size=16, num_hidden_layers=3, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=8),
}
POST_NORM = {  # LayerNorm behind what is added to the stream: its mean is part of what the model reads
    "opt post-norm": OPT | dict(do_layer_norm_before=False),
    "bart decoder": dict(d_model=16, decoder_layers=3, decoder_attention_heads=2, decoder_ffn_dim=32, encoder_layers=3,
                         encoder_attention_heads=2, encoder_ffn_dim=32, max_position_embeddings=32, is_decoder=True),
}
SEES_LATER = {"bert": PLAIN}


def random_network(name: str):
    """A random model with weights large enough to matter, and biases in its norms."""
    torch.manual_seed(0)
    settings = (FAMILIES | POST_NORM | SEES_LATER)[name]
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **COMMON, **settings)).eval()
    for module in network.modules():
        for p in module.parameters(recurse=False):
            if p.ndim > 1:
                p.data *= 10
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            nn.init.normal_(module.bias)
    return network
