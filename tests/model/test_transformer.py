"""The decoder against Hugging Face, and the tokens that each token attends to."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cucafera.config.schema import ModelConfig
from cucafera.model.attention import attend
from cucafera.model.transformer import Decoder, positions_within
from tests.support import (
    CUCAFERA,
    DOCUMENT_START,
    Holder,
    documents_of,
    hugging_face,
    random_ids,
    small_config,
    small_decoder,
)


class ListCache:
    """The simplest cache that keeps the protocol."""

    def __init__(self, config: ModelConfig) -> None:
        self.positions = torch.arange(0)
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * config.num_hidden_layers

    def begin(self, tokens: int) -> None:
        before = self.layers[0]
        past = 0 if before is None else before[0].shape[2]
        self.positions = torch.arange(past, past + tokens)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if (before := self.layers[layer]) is not None:
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        self.layers[layer] = keys, values
        visible = torch.arange(keys.shape[2]) <= self.positions[:, None]
        return attend(queries, keys, values, visible[None, None])


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu"},
        {"hidden_act": "silu"},
        {"num_key_value_heads": 4, "rope_theta": 500.0},
        {"num_key_value_heads": 1, "num_hidden_layers": 3, "rms_norm_eps": 1e-3},
        {"hidden_size": 24, "intermediate_size": 100, "num_attention_heads": 6},
    ],
    ids=str,
)
def test_logits_and_gradients_equal_those_of_hugging_face(changes: dict[str, object]) -> None:
    config = small_config(**changes)
    torch.manual_seed(0)
    ours, theirs = Holder(config), hugging_face(config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    outcome = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert outcome.missing_keys == ["lm_head.weight"]  # tied
    assert outcome.unexpected_keys == []

    input_ids, targets = random_ids(3, 40), random_ids(3, 40)
    targets[:, ::3] = -100
    their_logits = theirs(input_ids).logits
    torch.testing.assert_close(ours.model.logits(ours.model(input_ids)), their_logits, atol=1e-5, rtol=0)

    valid = (targets != -100).sum()
    their_loss = cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    loss = ours.model(input_ids, targets) / valid
    torch.testing.assert_close(loss, their_loss)
    loss.backward()
    their_loss.backward()
    their_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, their_parameters[name].grad, atol=1e-5, rtol=0, msg=name)


def test_the_state_dict_has_the_keys_of_hugging_face_and_nothing_else() -> None:
    config = small_config()
    theirs = set(hugging_face(config).state_dict()) - {"lm_head.weight"}
    assert set(Holder(config).state_dict()) == theirs


def test_cucafera_has_245_020_416_parameters_of_which_61_tensors_are_gains() -> None:
    with torch.device("meta"):
        parameters = list(Decoder(CUCAFERA).parameters())
    tensors, numbers = Counter[bool](), Counter[bool]()
    for parameter in parameters:
        tensors[parameter.ndim >= 2] += 1
        numbers[parameter.ndim >= 2] += parameter.numel()
    assert tensors == {True: 211, False: 61}
    assert numbers == {True: 244_973_568, False: 46_848}


def test_initial_weights_follow_the_seed_and_the_initializer_range() -> None:
    first, second = small_decoder(initializer_range=0.02), small_decoder(initializer_range=0.02)
    for (name, parameter), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(parameter, other)
        if parameter.ndim >= 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.06), name
            assert abs(parameter.mean().item()) < 0.002, name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_a_changed_token_changes_nothing_before_it(masked: bool) -> None:
    decoder, input_ids = small_decoder(), random_ids(2, 48)
    documents = torch.zeros(2, 48, dtype=torch.int32) if masked else None
    changed = input_ids.clone()
    changed[:, 30] = 1
    with torch.no_grad():
        before, after = decoder(input_ids, documents=documents), decoder(changed, documents=documents)
    assert torch.equal(before[:, :30], after[:, :30])
    assert (before[:, 30:] != after[:, 30:]).any(dim=-1).all()


def test_a_changed_document_changes_nothing_in_other_documents() -> None:
    decoder, input_ids = small_decoder(), random_ids(2, 60)
    input_ids[:, [20, 40]] = DOCUMENT_START
    documents = documents_of(input_ids)
    changed = input_ids.clone()
    changed[:, 21:40] = random_ids(2, 19) // 2 + 1
    with torch.no_grad():
        before, after = decoder(input_ids, documents=documents), decoder(changed, documents=documents)
    assert torch.equal(before[:, :20], after[:, :20])
    assert torch.equal(before[:, 40:], after[:, 40:])
    assert not torch.allclose(before[:, 21:40], after[:, 21:40])


def test_a_window_of_two_documents_equals_both_alone() -> None:
    decoder, input_ids = small_decoder(), random_ids(1, 50)
    input_ids[:, [0, 22]] = DOCUMENT_START
    with torch.no_grad():
        together = decoder(input_ids, documents=documents_of(input_ids))
        alone = torch.cat([decoder(input_ids[:, :22]), decoder(input_ids[:, 22:])], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompt", [1, 9])
def test_a_cache_gives_the_logits_of_the_full_text(prompt: int) -> None:
    decoder, input_ids = small_decoder(), random_ids(2, 20)
    cache = ListCache(decoder.config)
    pieces = [input_ids[:, :prompt], input_ids[:, prompt : prompt + 4]]  # several new tokens on a filled cache
    pieces += list(input_ids[:, prompt + 4 :].split(1, dim=1))
    with torch.no_grad():
        whole = decoder.logits(decoder(input_ids))
        pieced = []
        for piece in pieces:
            cache.begin(piece.shape[1])
            pieced.append(decoder.logits(decoder(piece, cache=cache)))
    torch.testing.assert_close(torch.cat(pieced, dim=1), whole, atol=1e-5, rtol=0)


def test_positions_restart_in_each_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 5, 5, 5, 5, 6]], dtype=torch.int32)
    assert positions_within(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]]


def test_the_loss_is_the_sum_of_the_cross_entropy_over_valid_targets() -> None:
    decoder, input_ids, targets = small_decoder(), random_ids(2, 30), random_ids(2, 30)
    targets[0] = -100
    loss = decoder(input_ids, targets)
    assert loss.dtype == torch.float32
    logits = decoder.logits(decoder(input_ids))
    torch.testing.assert_close(loss, cross_entropy(logits[1], targets[1], reduction="sum"))


def test_bf16_autocast_changes_the_loss_by_little() -> None:
    decoder, input_ids, targets = small_decoder(), random_ids(2, 48), random_ids(2, 48)
    input_ids[:, 20] = DOCUMENT_START
    documents = documents_of(input_ids)
    expected = decoder(input_ids, targets, documents)
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder(input_ids, targets, documents)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in decoder.parameters())


@pytest.mark.slow
def test_a_decoder_compiled_in_place_gives_the_same_loss_and_gradients() -> None:
    decoder, input_ids, targets = small_decoder(), random_ids(2, 48), random_ids(2, 48)
    input_ids[:, 20] = DOCUMENT_START
    targets[:, :5] = -100
    documents = documents_of(input_ids)
    expected = decoder(input_ids, targets, documents)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    decoder.zero_grad(set_to_none=True)
    keys = list(decoder.state_dict())

    decoder.compile(fullgraph=True)
    loss = decoder(input_ids, targets, documents)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4, msg=name)
    assert list(decoder.state_dict()) == keys
