"""Continuing a text: the cache changes nothing, and sampling draws from what it says."""

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from cucafera.config import ModelConfig, SamplingConfig
from cucafera.generation.generate import generate
from cucafera.generation.sampling import filtered_logits, next_tokens
from cucafera.model.transformer import Decoder

GREEDY = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=20)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decoder(
        ModelConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.5)
    )  # fmt: skip


def test_greedy_text_is_that_of_a_full_forward_pass_for_each_token(model):
    prompt = torch.randint(10, 300, (1, 7))
    tokens = prompt
    with torch.no_grad():
        for _ in range(20):
            following = model.logits(model(tokens)[:, -1]).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
    assert torch.equal(generate(model, prompt, GREEDY, torch.Generator(), frozenset()), tokens[0, 7:])


def test_text_ends_before_a_stop_token_and_at_the_end_of_the_context(model):
    prompt = torch.randint(10, 300, (1, 7))
    text = generate(model, prompt, GREEDY, torch.Generator(), frozenset()).tolist()
    stop = text[5]
    assert generate(model, prompt, GREEDY, torch.Generator(), frozenset({stop})).tolist() == text[: text.index(stop)]
    long = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=1000)
    assert len(generate(model, prompt, long, torch.Generator(), frozenset())) == 48 - 7


def test_the_same_seed_gives_the_same_text(model):
    prompt = torch.randint(10, 300, (1, 4))
    sampling = SamplingConfig(max_new_tokens=16, temperature=1.0)
    texts = [
        generate(model, prompt, sampling, torch.Generator().manual_seed(seed), frozenset()).tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("top_k", "top_p", "penalty"), [(0, 1.0, 1.0), (5, 1.0, 1.0), (0, 0.7, 1.0), (50, 0.9, 1.2)])
def test_filtered_logits_are_those_of_transformers(top_k, top_p, penalty):
    torch.manual_seed(0)
    logits, seen = torch.randn(3, 300) * 3, torch.randint(0, 300, (3, 12))
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(0.6)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    sampling = SamplingConfig(temperature=0.6, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    ours = filtered_logits(logits, seen, sampling)
    torch.testing.assert_close(ours.softmax(-1), processors(seen, logits.clone()).softmax(-1))


def test_temperature_zero_takes_the_likeliest_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    sampling = SamplingConfig(temperature=0, repetition_penalty=1.0)
    assert next_tokens(logits, torch.zeros(2, 1, dtype=torch.int64), sampling, torch.Generator()).tolist() == [[1], [0]]
