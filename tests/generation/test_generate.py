"""Writing: as Hugging Face writes, the cache and the batch change nothing, and text comes in whole characters."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cucafera.config import SPECIAL_TOKENS, ModelConfig, SamplingConfig
from cucafera.data.tokenizer import IM_END_ID, PAD_ID, Tokenizer
from cucafera.generation.generate import ContextFullError, TextWriter, generate, stream
from cucafera.generation.sampling import SeenTokens, filtered_logits, next_tokens
from cucafera.model.transformer import Decoder

GREEDY = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=20)
NO_STOP: frozenset[int] = frozenset()
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["la mar i el bosc, l'avi cantava cançons 🐌 € " * 5] * 20
    return Tokenizer.train(texts, vocab_size=300, show_progress=False)


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
    return [written.ids for written in generate(model, tokenizer, prompts, sampling, NO_STOP, **more)]


@pytest.mark.parametrize("seed", range(5))
def test_greedy_text_is_that_of_hugging_face_token_for_token(model, theirs, tokenizer, seed):
    (prompt,) = prompts_of(7, seed=seed)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=PAD_ID
    )[0, 7:]
    sampling = dataclasses.replace(GREEDY, max_new_tokens=40)
    assert ids(model, tokenizer, [prompt], sampling) == [expected.tolist()]


def test_greedy_text_with_a_penalty_is_that_of_hugging_face(model, theirs, tokenizer):
    (prompt,) = prompts_of(7, seed=3)
    (expected,) = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=PAD_ID,
        repetition_penalty=1.3,
    )[:, 7:].tolist()  # fmt: skip
    ours = dataclasses.replace(GREEDY, max_new_tokens=30, repetition_penalty=1.3)
    until = next((place + 1 for place, token in enumerate(expected) if token < 10), 30)  # they penalize control tokens
    assert until > 15
    assert ids(model, tokenizer, [prompt], ours)[0][:until] == expected[:until]


def test_different_prompts_side_by_side_give_what_each_gives_alone(model, theirs, tokenizer):
    prompts = prompts_of(3, 11, 7, 1)
    together = ids(model, tokenizer, prompts, GREEDY)
    assert together == [ids(model, tokenizer, [prompt], GREEDY)[0] for prompt in prompts]
    padded = torch.tensor([[PAD_ID] * (11 - len(prompt)) + prompt for prompt in prompts])
    expected = theirs.generate(
        padded, attention_mask=(padded != PAD_ID).long(), max_new_tokens=20, do_sample=False, eos_token_id=None,
        pad_token_id=PAD_ID,
    )[:, 11:]  # fmt: skip
    assert together == expected.tolist()


def test_each_text_ends_on_its_own(model, tokenizer):
    prompts = prompts_of(5, 9, 2)
    free = ids(model, tokenizer, prompts, GREEDY)
    stop = free[0][4]
    written = generate(model, tokenizer, prompts, GREEDY, frozenset({stop}))
    for text, whole in zip(written, free, strict=True):
        assert text.ids == (whole[: whole.index(stop)] if stop in whole else whole)
        assert text.ended == ("stop" if stop in whole else "length")


def test_text_ends_where_the_context_does(model, tokenizer):
    (prompt,) = prompts_of(7)
    (written,) = generate(model, tokenizer, [prompt], dataclasses.replace(GREEDY, max_new_tokens=1000), NO_STOP)
    assert len(written.ids) == 48 - 7
    assert written.ended == "context"
    with pytest.raises(ContextFullError, match="the prompt has 48 tokens and the model's context 48"):
        generate(model, tokenizer, prompts_of(48), GREEDY, NO_STOP)


def test_a_short_text_goes_on_beside_one_whose_context_is_full(model, tokenizer):
    prompts = prompts_of(44, 3)
    sampling = dataclasses.replace(GREEDY, max_new_tokens=30)
    written = generate(model, tokenizer, prompts, sampling, NO_STOP)
    assert [(len(text.ids), text.ended) for text in written] == [(4, "context"), (30, "length")]
    assert [text.ids for text in written] == [ids(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]


def test_no_prompts_give_no_texts_and_an_empty_prompt_is_refused(model, tokenizer):
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
    {"top_k": 0, "top_p": 0.7, "repetition_penalty": 1.0},
    {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_p": 0.05},
    {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2},
    {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "min_p": 0.1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(settings):
    torch.manual_seed(0)
    logits, seen = torch.randn(3, 300) * 3, torch.randint(10, 300, (3, 12))
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
        logits, SeenTokens(seen.tolist(), 300, logits.device).mask, SamplingConfig(temperature=0.6, **settings)
    )
    torch.testing.assert_close(ours.softmax(-1), processors(seen, logits.clone()).softmax(-1))


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20_000, 4)
    sampling = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    drawn = next_tokens(logits, torch.zeros(20_000, 4, dtype=torch.bool), sampling, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), atol=0.015, rtol=0)


def test_temperature_zero_takes_the_likeliest_token_after_the_penalty():
    logits = torch.tensor([[0.0, 3.0, 2.9], [2.0, 0.0, 1.0]])
    seen = torch.tensor([[False, True, False], [False, False, False]])
    assert next_tokens(logits, seen, GREEDY, None).tolist() == [[1], [0]]
    assert next_tokens(logits, seen, dataclasses.replace(GREEDY, repetition_penalty=1.2), None).tolist() == [[2], [0]]


def test_control_tokens_are_never_penalized():
    seen = SeenTokens([[4, 5, 20, 5], [21]], 300, torch.device("cpu"))
    seen.add(torch.tensor([[IM_END_ID], [30]]))
    assert seen.mask[0].nonzero()[:, 0].tolist() == [20]
    assert seen.mask[1].nonzero()[:, 0].tolist() == [21, 30]
    assert not seen.mask[:, : len(SPECIAL_TOKENS)].any()


# Text as it comes


@pytest.mark.parametrize("text", ["la mar 🐌 € cançons", "🐌🐌€é", "", "abc"])
def test_pieces_hold_whole_characters_and_add_up_to_the_text(tokenizer, text):
    writer = TextWriter(tokenizer, [])
    byte_tokens = [next(t for t in range(10, 266) if tokenizer.bytes_of(t) == bytes([b])) for b in text.encode()]
    written = [writer.add(token) for token in byte_tokens]
    written.append(writer.finish())
    assert "".join(written) == writer.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in written)
    assert len(byte_tokens) >= sum(1 for piece in written if piece)


def test_bytes_that_are_no_character_come_as_a_replacement_at_the_end(tokenizer):
    writer = TextWriter(tokenizer, [])
    half = [next(t for t in range(10, 266) if tokenizer.bytes_of(t) == bytes([b])) for b in "🐌".encode()[:2]]
    assert [writer.add(token) for token in half] == ["", ""]
    assert writer.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("la mar i el bosc", ["mar"], "la "),
        ("la mar i el bosc", ["bosc", "mar"], "la "),
        ("la mar i el bosc", ["boscos"], "la mar i el bosc"),
        ("aaab", ["aab"], "a"),
        ("un\n\ndos", ["\n\n"], "un"),
        ("cançons €", ["ç"], "can"),
    ],
)
def test_a_stop_text_ends_the_text_and_nothing_of_it_is_shown(tokenizer, text, stop, expected):
    writer = TextWriter(tokenizer, stop)
    shown = ""
    for token in tokenizer.encode(text):
        shown += writer.add(token)
        assert expected.startswith(shown)
        if writer.stopped:
            break
    shown += writer.finish()
    assert shown == writer.text == expected
    assert writer.stopped == any(part in text for part in stop)


def test_a_stream_is_the_text_of_generate_in_pieces(model, tokenizer):
    (prompt,) = prompts_of(6, seed=4)
    (written,) = generate(model, tokenizer, [prompt], GREEDY, NO_STOP)
    assert "".join(stream(model, tokenizer, prompt, GREEDY, NO_STOP)) == written.text
    middle = written.text[len(written.text) // 2 :][:3]
    stopped = dataclasses.replace(GREEDY, stop=[middle])
    (shorter,) = generate(model, tokenizer, [prompt], stopped, NO_STOP)
    assert shorter.ended == "stop"
    assert shorter.text == written.text[: written.text.index(middle)]
    assert "".join(stream(model, tokenizer, prompt, stopped, NO_STOP)) == shorter.text
