"""Batches of completions: equal to Hugging Face's, whatever else is in the batch."""

import dataclasses

import pytest
import torch

from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import PAD_ID
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.generate import generate
from cucafera.generation.request import ContextFullError, NonfiniteError
from cucafera.model.transformer import Decoder
from tests.generation.models import CONFIG, GREEDY, NO_STOP, prompts_of


def ids(model: Decoder, tokenizer: Tokenizer, prompts: list[list[int]], sampling: SamplingConfig, **more):
    return [completion.ids for completion in generate(model, tokenizer, prompts, sampling, NO_STOP, **more)]


@pytest.mark.parametrize("seed", range(5))
def test_greedy_decoding_gives_the_tokens_of_hugging_face(model, theirs, tokenizer, seed):
    (prompt,) = prompts_of(7, seed=seed)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=PAD_ID
    )[0, 7:]
    sampling = dataclasses.replace(GREEDY, max_new_tokens=40)
    assert ids(model, tokenizer, [prompt], sampling) == [expected.tolist()]


def test_greedy_decoding_with_a_penalty_gives_the_tokens_of_hugging_face(model, theirs, tokenizer):
    (prompt,) = prompts_of(7, seed=3)
    (expected,) = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=PAD_ID,
        repetition_penalty=1.3,
    )[:, 7:].tolist()  # fmt: skip
    ours = dataclasses.replace(GREEDY, max_new_tokens=30, repetition_penalty=1.3)
    until = next(
        (position + 1 for position, token in enumerate(expected) if token < 10), 30
    )  # they penalize control tokens
    assert until > 15
    assert ids(model, tokenizer, [prompt], ours)[0][:until] == expected[:until]


def test_prompts_of_different_lengths_in_a_batch_give_what_each_gives_alone(model, theirs, tokenizer):
    prompts = prompts_of(3, 11, 7, 1)
    together = ids(model, tokenizer, prompts, GREEDY)
    assert together == [ids(model, tokenizer, [prompt], GREEDY)[0] for prompt in prompts]
    padded = torch.tensor([[PAD_ID] * (11 - len(prompt)) + prompt for prompt in prompts])
    expected = theirs.generate(
        padded, attention_mask=(padded != PAD_ID).long(), max_new_tokens=20, do_sample=False, eos_token_id=None,
        pad_token_id=PAD_ID,
    )[:, 11:]  # fmt: skip
    assert together == expected.tolist()


def test_each_sequence_of_a_batch_stops_independently(model, tokenizer):
    prompts = prompts_of(5, 9, 2)
    free = ids(model, tokenizer, prompts, GREEDY)
    stop = free[0][4]
    completions = generate(model, tokenizer, prompts, GREEDY, frozenset({stop}))
    for completion, unstopped in zip(completions, free, strict=True):
        assert completion.ids == (unstopped[: unstopped.index(stop)] if stop in unstopped else unstopped)
        assert completion.finish_reason == ("stop" if stop in unstopped else "length")


def test_generation_ends_where_the_context_does(model, tokenizer):
    (prompt,) = prompts_of(7)
    unlimited = dataclasses.replace(GREEDY, max_new_tokens=1000)
    (completion,) = generate(model, tokenizer, [prompt], unlimited, NO_STOP)
    assert len(completion.ids) == 48 - 7
    assert completion.finish_reason == "context"
    with pytest.raises(ContextFullError, match="the prompt has 48 tokens and the model's context 48"):
        generate(model, tokenizer, prompts_of(48), GREEDY, NO_STOP)


def test_a_short_prompt_continues_after_a_long_one_has_filled_its_context(model, tokenizer):
    prompts = prompts_of(44, 3)
    sampling = dataclasses.replace(GREEDY, max_new_tokens=30)
    completions = generate(model, tokenizer, prompts, sampling, NO_STOP)
    assert [(len(text.ids), text.finish_reason) for text in completions] == [(4, "context"), (30, "length")]
    assert [text.ids for text in completions] == [ids(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]


def test_no_prompts_give_no_completions_and_an_empty_prompt_is_refused(model, tokenizer):
    assert generate(model, tokenizer, [], GREEDY, NO_STOP) == []
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, tokenizer, [[], [20]], GREEDY, NO_STOP)


def test_the_same_seed_gives_the_same_text(model, tokenizer):
    prompts = prompts_of(4, 6)
    sampling = SamplingConfig(max_new_tokens=16, temperature=1.0)
    texts = [ids(model, tokenizer, prompts, sampling, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert ids(model, tokenizer, prompts, sampling) != ids(model, tokenizer, prompts, sampling)
    assert ids(model, tokenizer, prompts[:1], sampling, seed=1) == texts[0][:1]
    assert ids(model, tokenizer, prompts, sampling, seed=1, slots=1) == texts[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_computes_nan_is_an_error_in_one_line(tokenizer, temperature):
    decoder = Decoder(CONFIG)
    decoder.norm.weight.data[3] = torch.nan
    settings = SamplingConfig(temperature=temperature, max_new_tokens=2)
    with pytest.raises(NonfiniteError, match="values that are not finite: its training diverged"):
        generate(decoder, tokenizer, [[1, 20]], settings, frozenset())
