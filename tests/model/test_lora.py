"""Low-rank adapters: initially zero, trained alone, and merged into plain weights."""

import dataclasses

import torch

from cucafera.config.schema import AdapterConfig, ModelConfig
from cucafera.model.flops import adapter_parameter_count
from cucafera.model.lora import add_adapters, merged_weights
from cucafera.model.transformer import Decoder

MODEL = ModelConfig(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=24,
)  # fmt: skip
ADAPTER = AdapterConfig(rank=4, alpha=8.0)


def decoders(adapter: AdapterConfig = ADAPTER) -> tuple[Decoder, Decoder]:
    """Return a decoder, and the same with adapters."""
    torch.manual_seed(0)
    plain = Decoder(MODEL)
    adapted = Decoder(MODEL)
    adapted.load_state_dict(plain.state_dict())
    add_adapters(adapted, adapter)
    return plain, adapted


def test_new_adapters_change_nothing_and_keep_the_names_of_the_weights():
    plain, adapted = decoders()
    ids = torch.randint(0, 80, (2, 24))
    assert torch.equal(plain(ids), adapted(ids))
    names = {name for name in adapted.state_dict() if ".lora_" not in name}
    assert names == set(plain.state_dict())


def test_only_adapters_are_trained_and_merging_them_is_equivalent():
    plain, adapted = decoders()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    count = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert count == adapter_parameter_count(MODEL, ADAPTER)

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    ids = torch.randint(0, 80, (2, 24))
    first = adapted(ids[:, :-1], ids[:, 1:])
    for _ in range(20):
        optimizer.zero_grad()
        loss = adapted(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss < 0.95 * first
    for name, value in plain.state_dict().items():
        assert torch.equal(value, adapted.state_dict()[name])

    merged = Decoder(MODEL)
    merged.load_state_dict(merged_weights(adapted.state_dict(), dataclasses.asdict(ADAPTER)))
    torch.testing.assert_close(merged(ids), adapted(ids), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged(ids), plain(ids), atol=1e-2)


def test_only_the_named_layers_get_adapters():
    _, adapted = decoders(AdapterConfig(rank=2, modules=["q_proj", "v_proj"]))
    layers = {name.split(".")[-2] for name in adapted.state_dict() if name.endswith(".lora_A")}
    assert layers == {"q_proj", "v_proj"}


def test_merging_leaves_plain_weights_unchanged():
    plain, _ = decoders()
    merged = merged_weights(plain.state_dict(), dataclasses.asdict(AdapterConfig()))
    assert merged.keys() == plain.state_dict().keys()
    assert all(torch.equal(merged[name], value) for name, value in plain.state_dict().items())
