"""Attention probabilities equal those inside the model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cucafera.config.schema import ModelConfig
from cucafera.model.attention_maps import attention_probabilities
from cucafera.model.transformer import Decoder

SHAPE = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip


def small_model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(**SHAPE)).eval()


def test_rows_sum_to_one_and_later_keys_have_no_weight():
    maps = attention_probabilities(small_model(), torch.arange(20, 37))
    assert maps.shape == (3, 4, 17, 17)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4, 17))
    assert not maps.triu(1).any()


def test_probabilities_times_values_give_the_output_of_the_layer():
    model = small_model()
    ids = torch.arange(20, 37)
    maps = attention_probabilities(model, ids)
    layer = model.layers[0]
    x = layer.input_layernorm(model.embed_tokens(ids[None]))
    values = layer.self_attn.v_proj(x).unflatten(-1, (2, 12)).transpose(1, 2).repeat_interleave(2, dim=1)
    mixed = layer.self_attn.o_proj((maps[0] @ values).transpose(1, 2).flatten(2))
    expected = layer.self_attn(x, model.cos[:17], model.sin[:17], None, None)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


def test_probabilities_equal_those_of_transformers():
    model = small_model()
    config = LlamaConfig(
        **SHAPE, hidden_act=model.config.hidden_act, rms_norm_eps=model.config.rms_norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta}, attn_implementation="eager",
    )  # fmt: skip
    other = LlamaForCausalLM(config).eval()
    other.model.load_state_dict(model.state_dict())
    ids = torch.arange(20, 37)
    expected = torch.cat(other(ids[None], output_attentions=True).attentions)
    torch.testing.assert_close(attention_probabilities(model, ids), expected, atol=1e-5, rtol=0)
