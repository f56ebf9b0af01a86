"""Decoding: equal to Hugging Face's, independent of KV cache and batch; detokenization in complete characters."""

import dataclasses
from collections.abc import Iterator
from itertools import zip_longest

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cucafera.config.schema import ModelConfig, SamplingConfig
from cucafera.config.tokens import IM_END_ID, PAD_ID, SPECIAL_TOKENS
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.generate import (
    ContextFullError,
    Finished,
    GenerationEvent,
    IncrementalDetokenizer,
    NonfiniteError,
    TextDelta,
    TorchBackend,
    Usage,
    generate,
    stream,
)
from cucafera.generation.sampling import TokenPresence, filtered_logits, sample_tokens
from cucafera.model.transformer import Decoder

GREEDY = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=20)
NO_STOP: frozenset[int] = frozenset()
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**dataclasses.asdict(CONFIG), tie_word_embeddings=True)).eval()


@pytest.fixture(scope="module")
def model(theirs: LlamaForCausalLM) -> Decoder:
    """A decoder with the weights of `theirs`."""
    decoder = Decoder(CONFIG)
    weights = theirs.model.state_dict()
    decoder.load_state_dict(weights)
    return decoder


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 300, (length,), generator=generator).tolist() for length in lengths]


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
    assert list(stream(model, tokenizer, prompt, unlimited, NO_STOP))[-1] == Finished("length", Usage(7, 48 - 7))
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
    texts = [ids(model, tokenizer, prompts, sampling, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# From logits to tokens

SETTINGS = [
    {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
    {"top_k": 5, "top_p": 1.0, "repetition_penalty": 1.0},
    {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.3},  # negative logits too, which the other filters drop
    {"top_k": 0, "top_p": 0.7, "repetition_penalty": 1.0},
    {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_p": 0.05},
    {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2},
    {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "min_p": 0.1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(settings):
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 300) * 3, torch.randint(10, 300, (3, 12))
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]), TemperatureLogitsWarper(0.6)]
    )
    if settings["top_k"]:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    if settings.get("min_p"):
        processors.append(MinPLogitsWarper(settings["min_p"]))
    ours = filtered_logits(
        logits, TokenPresence(ids.tolist(), 300, logits.device).mask, SamplingConfig(temperature=0.6, **settings)
    )
    torch.testing.assert_close(ours.softmax(-1), processors(ids, logits.clone()).softmax(-1))


def test_a_penalty_makes_every_seen_token_less_probable_and_no_other():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, 0.5]])
    present = torch.tensor([[True, False, True, True, False, False]])
    sampling = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=2.0)
    assert filtered_logits(logits, present, sampling).tolist() == [[1.0, 1.0, 0.0, -2.0, -2.0, 0.5]]
    greedy = dataclasses.replace(GREEDY, repetition_penalty=2.0)
    negative = torch.tensor([[-3.0, -1.0, -1.5]])
    assert sample_tokens(negative, torch.tensor([[False, True, False]]), greedy, None).tolist() == [[2]]


def test_top_k_keeps_exactly_so_many_tokens_and_top_p_the_one_that_crosses_it():
    logits = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0]])
    absent = torch.zeros(1, 5, dtype=torch.bool)
    for top_k in (1, 2, 4, 5, 9):
        sampling = SamplingConfig(temperature=1.0, top_k=top_k, top_p=1.0, repetition_penalty=1.0)
        assert int(filtered_logits(logits, absent, sampling).isfinite().sum()) == min(top_k, 5)
    probabilities = logits.softmax(-1)[0].sort(descending=True).values
    for kept in (1, 2, 3):
        top_p = float(probabilities[:kept].sum()) - 1e-3
        sampling = SamplingConfig(temperature=1.0, top_k=0, top_p=top_p, repetition_penalty=1.0)
        assert int(filtered_logits(logits, absent, sampling).isfinite().sum()) == kept


def test_tokens_are_sampled_with_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20_000, 4)
    sampling = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    sampled = sample_tokens(
        logits, torch.zeros(20_000, 4, dtype=torch.bool), sampling, torch.Generator().manual_seed(0)
    )
    frequencies = torch.bincount(sampled[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), atol=0.015, rtol=0)


def test_temperature_zero_takes_the_most_probable_token_after_the_penalty():
    logits = torch.tensor([[0.0, 3.0, 2.9], [2.0, 0.0, 1.0]])
    present = torch.tensor([[False, True, False], [False, False, False]])
    assert sample_tokens(logits, present, GREEDY, None).tolist() == [[1], [0]]
    assert sample_tokens(logits, present, dataclasses.replace(GREEDY, repetition_penalty=1.2), None).tolist() == [
        [2],
        [0],
    ]


def test_control_tokens_are_never_penalized():
    presence = TokenPresence([[4, 5, 20, 5], [21]], 300, torch.device("cpu"))
    presence.add(torch.tensor([[IM_END_ID], [30]]))
    assert presence.mask[0].nonzero()[:, 0].tolist() == [20]
    assert presence.mask[1].nonzero()[:, 0].tolist() == [21, 30]
    assert not presence.mask[:, : len(SPECIAL_TOKENS)].any()


# Detokenization


@pytest.mark.parametrize("text", ["la mar 🐌 € cançons", "🐌🐌€é", "", "abc"])
def test_deltas_hold_complete_characters_and_add_up_to_the_text(tokenizer, text):
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    byte_tokens = [next(t for t in range(10, 266) if tokenizer.bytes_of(t) == bytes([b])) for b in text.encode()]
    deltas = [detokenizer.add(token) for token in byte_tokens]
    deltas.append(detokenizer.finish())
    assert "".join(deltas) == detokenizer.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)
    assert len(byte_tokens) >= sum(1 for delta in deltas if delta)


def test_an_incomplete_character_becomes_a_replacement_character_at_the_end(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    half = [next(t for t in range(10, 266) if tokenizer.bytes_of(t) == bytes([b])) for b in "🐌".encode()[:2]]
    assert [detokenizer.add(token) for token in half] == ["", ""]
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("la mar i el bosc", ["mar"], "la "),
        ("la mar i el bosc", ["bosc", "mar"], "la "),
        ("la mar i el bosc", ["boscos"], "la mar i el bosc"),
        ("aaab", ["aab"], "a"),
        ("un\n\ndos", ["\n\n"], "un"),
        ("cançons €", ["ç"], "can"),
        ("la mar", ["r", "m"], "la "),
        ("la mar", ["m", "r"], "la "),
    ],
)
def test_a_stop_text_ends_the_text_and_no_part_of_it_is_shown(tokenizer, text, stop, expected):
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    shown = ""
    for token in tokenizer.encode(text):
        shown += detokenizer.add(token)
        assert expected.startswith(shown)
        if detokenizer.stopped:
            break
    shown += detokenizer.finish()
    assert shown == detokenizer.text == expected
    assert detokenizer.stopped == any(part in text for part in stop)


def test_a_stream_is_the_text_of_generate_in_deltas(model, tokenizer):
    (prompt,) = prompts_of(6, seed=4)
    (completion,) = generate(model, tokenizer, [prompt], GREEDY, NO_STOP)
    assert text_of(stream(model, tokenizer, prompt, GREEDY, NO_STOP)) == completion.text
    middle = completion.text[len(completion.text) // 2 :][:3]
    stopped = dataclasses.replace(GREEDY, stop=[middle])
    (shorter,) = generate(model, tokenizer, [prompt], stopped, NO_STOP)
    assert shorter.finish_reason == "stop"
    assert shorter.text == completion.text[: completion.text.index(middle)]
    assert text_of(stream(model, tokenizer, prompt, stopped, NO_STOP)) == shorter.text


def text_of(events: Iterator[GenerationEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_a_stream_ends_with_finish_reason_and_usage(model, tokenizer):
    (prompt,) = prompts_of(6, seed=4)
    *deltas, last = stream(model, tokenizer, prompt, GREEDY, NO_STOP)
    assert last == Finished("length", Usage(6, 20))
    assert len(deltas) >= 20 and all(isinstance(delta, TextDelta) for delta in deltas)
    (unstopped,) = ids(model, tokenizer, [prompt], GREEDY)
    stop = unstopped[9]
    *_, last = stream(model, tokenizer, prompt, GREEDY, frozenset({stop}))
    assert last == Finished("stop", Usage(6, unstopped.index(stop) + 1))  # the stop token was generated too


def test_a_closed_stream_decodes_no_further_token(model, tokenizer, monkeypatch):
    steps: list[int] = []
    backend = TorchBackend(model)
    decode_step = backend.decode_step
    monkeypatch.setattr(backend, "decode_step", lambda tokens: steps.append(1) or decode_step(tokens))
    # Nothing of this stop text is final before its end, and yet control returns after each token.
    events = stream(backend, tokenizer, prompts_of(6)[0], dataclasses.replace(GREEDY, stop=["x" * 100]), NO_STOP)
    for _ in range(3):
        next(events)
    events.close()
    assert len(steps) == 3  # the prefill, and the steps after the first and the second token


def test_backends_of_one_model_do_not_share_a_cache(model, tokenizer):
    first, second = prompts_of(6, 9)
    alone = [list(stream(model, tokenizer, prompt, GREEDY, NO_STOP)) for prompt in (first, second)]
    streams = [stream(TorchBackend(model), tokenizer, prompt, GREEDY, NO_STOP) for prompt in (first, second)]
    interleaved = list(zip_longest(*streams))
    for number, expected in enumerate(alone):
        assert [pair[number] for pair in interleaved if pair[number] is not None] == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_computes_nan_is_an_error_in_one_line(tokenizer, temperature):
    decoder = Decoder(CONFIG)
    decoder.norm.weight.data[3] = torch.nan
    settings = SamplingConfig(temperature=temperature, max_new_tokens=2)
    with pytest.raises(NonfiniteError, match="values that are not finite: its training diverged"):
        generate(decoder, tokenizer, [[1, 20]], settings, frozenset())
