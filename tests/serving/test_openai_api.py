"""Checking of request bodies, and OpenAI's response objects."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase

from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.chatml import Message, render_prompt
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.request import Finished, PromptScores, TextDelta, TokenScore, Usage
from cucafera.serve import NEUTRAL_SAMPLING
from cucafera.serving.openai_api import (
    PARAMETERS,
    SEEDS,
    Answer,
    ApiError,
    ServedModel,
    TokenOffsets,
    parameter_table,
    parse_body,
    quoted,
    token_text,
)
from tests.support import ROOT

HELLO = [{"role": "user", "content": "Bon dia"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["la mar i el bosc, l'avi cantava cançons " * 5] * 20, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> ServedModel:
    return ServedModel("mine", tokenizer, context=64, chats=True, sampling=replace(NEUTRAL_SAMPLING))


def chat(model: ServedModel, **body: Any) -> Any:
    return model.parse_chat({"model": "mine", "messages": HELLO} | body)


def completion(model: ServedModel, **body: Any) -> Any:
    return model.parse_completion({"model": "mine", "prompt": "la mar"} | body)


def test_the_table_of_parameters_is_in_the_documentation():
    assert parameter_table() in (ROOT / "cucafera" / "serving" / "README.md").read_text()


def test_every_parameter_of_openai_is_supported_ignored_or_refused():
    for types, endpoint in (
        (chat_params.CompletionCreateParamsBase, "chat"),
        (CompletionCreateParamsBase, "completions"),
    ):
        names = set(types.__annotations__) | {"stream"}
        assert names <= {name for name, parameter in PARAMETERS.items() if parameter.endpoints in ("both", endpoint)}


def test_a_request_that_sets_nothing_has_the_defaults_of_the_server(model):
    request = chat(model, temperature=None, stop=None, n=None, stream=None, logprobs=None, messages=HELLO)
    assert request.sampling == replace(NEUTRAL_SAMPLING)
    assert (request.n, request.seed, request.stream, request.echo, request.top_logprobs) == (
        1,
        None,
        False,
        False,
        None,
    )
    (prompt,) = request.prompts
    assert prompt.ids == render_prompt([Message("user", "Bon dia")], model.tokenizer)
    (of_engine,) = request.engine_requests(64)
    assert of_engine.sampling.max_new_tokens == 64 - len(prompt.ids)
    assert of_engine.prompt == prompt.ids and of_engine.seed is None and not of_engine.prompt_logprobs


def test_each_sampling_parameter_reaches_the_engine(model):
    given = {"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "max_tokens": 3}
    for parse in (chat, completion):
        sampling = parse(model, **given, stop=["", "a", "a"], seed=-1).engine_requests(64)[0].sampling
        assert vars(sampling) == {"max_new_tokens": 3, "stop": ["a"], **{key: given[key] for key in list(given)[:-1]}}
    assert chat(model, stop="a").sampling.stop == ["a"]
    assert chat(model, top_k=10**9).sampling.top_k == model.tokenizer.vocab_size
    assert chat(model, max_completion_tokens=5, max_tokens=5).sampling.max_new_tokens == 5


def test_choices_have_seeds_in_turn_and_prompts_their_own(model):
    request = completion(model, prompt=["la", "el"], n=2, seed=SEEDS - 1, max_tokens=1)
    requests = request.engine_requests(64)
    assert [item.seed for item in requests] == [SEEDS - 1, 0] * 2
    assert [item.prompt for item in requests] == [
        [DOCUMENT_START_ID, *model.tokenizer.encode(text)] for text in ("la", "la", "el", "el")
    ]


def test_roles_and_parts_of_openai_are_read(model):
    parts = [{"type": "text", "text": "Bon "}, {"type": "text", "text": "dia"}]
    messages = [{"role": "developer", "content": "Breu."}, {"role": "user", "name": "x", "content": parts}]
    expected = render_prompt([Message("system", "Breu."), Message("user", "Bon dia")], model.tokenizer)
    assert chat(model, messages=messages).prompts[0].ids == expected


@pytest.mark.parametrize("prompt", [None, "", [""]])
def test_an_empty_prompt_begins_a_document(model, prompt):
    assert [prompt.ids for prompt in completion(model, prompt=prompt).prompts] == [[DOCUMENT_START_ID]]


def test_the_context_is_counted_to_the_token(model):
    assert completion(model, prompt=[5] * 63).engine_requests(64)[0].sampling.max_new_tokens == 1
    with pytest.raises(ApiError, match="maximum context length is 64 tokens, and the prompt has 64") as caught:
        completion(model, prompt=[5] * 64)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    scored = completion(model, prompt=[5] * 64, max_tokens=0).engine_requests(64)[0]
    assert (len(scored.prompt), scored.sampling.max_new_tokens) == (64, 0)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"temperature": 1e-5}, "temperature", "temperature is 1e-05; it must be 0 or at least 0.001"),
        ({"temperature": 2.1}, "temperature", "temperature is 2.1; it must be a number from 0 to 2"),
        ({"top_p": 0}, "top_p", "top_p is 0; it must be above 0 and at most 1"),
        ({"repetition_penalty": 0.001}, "repetition_penalty", "must be a number from 0.01 to 100"),
        ({"n": 0}, "n", "n is 0; it must be a whole number from 1 to 128"),
        ({"n": True}, "n", "n is true; it must be a whole number"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream: true"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs: true"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "are one setting"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "is not supported: only 0; repetition_penalty"),
        ({"frequency_penalty": False}, "frequency_penalty", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported: only {type: text}"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "not trained to call functions"),
        ({"messages": [*HELLO, {"role": "x", "content": "y"}]}, "messages[1]", 'messages[1] has the role "x"; roles'),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "must be a text, or a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(model, body, param, message):
    with pytest.raises(ApiError) as caught:
        chat(model, **body)
    assert caught.value.status == 400 and caught.value.param == param
    assert message in str(caught.value)


def test_a_repeated_key_among_many_is_found_at_once():
    keys = [f'"{number}": 0' for number in range(20_000)]
    began = time.monotonic()
    with pytest.raises(ApiError, match='repeats the key "19999"'):
        parse_body(("{" + ", ".join([*keys, keys[-1]]) + "}").encode())
    assert time.monotonic() - began < 2


def test_a_body_is_strict_json():
    assert parse_body('{"a": [1, 2.5, "é🙂\\u00e9"]}'.encode()) == {"a": [1, 2.5, "é🙂é"]}
    assert parse_body(b'{"a": "\\ud83d\\ude42 \\\\ud800"}') == {"a": "🙂 \\ud800"}
    problems = {
        b'{"a": NaN}': "NaN is no number of it",
        b'{"a": 1, "a": 2}': 'repeats the key "a"',
        b'{"b": {"a": "\\udc00"}}': "lone surrogate",
        b'{"a": ' + b"9" * 5000 + b"}": "too many digits",
        b'{"a":' * 50_000: "nested too deeply",
        b'{"a": "\xff"}': "not UTF-8: byte 7",
        b"[1]": "must be a JSON object",
    }
    for body, problem in problems.items():
        with pytest.raises(ApiError, match=problem) as caught:
            parse_body(body)
        assert caught.value.status == 400
    assert quoted("é" * 100) == '"' + "é" * 59 + "..."


def score(token: int, logprob: float = -1.0, *top: tuple[int, float]) -> TokenScore:
    return TokenScore(token, logprob, top)


def test_parts_of_characters_are_spelled_as_bytes_and_have_the_place_of_their_character(tokenizer):
    ids = tokenizer.encode("a🙂b")
    assert token_text(tokenizer, ids[0]) == "a" and token_text(tokenizer, ids[1]).startswith("bytes:\\xf0")
    offsets = TokenOffsets(3)
    assert [offsets.next(tokenizer.bytes_of(token)) for token in ids] == [3, *[4] * (len(ids) - 2), 5]


def test_an_echoed_prompt_of_ids_has_no_score_for_its_first_token(model):
    tokenizer = model.tokenizer
    first, second = tokenizer.encode("la")[0], tokenizer.encode("mar")[0]
    request = completion(model, prompt=[first, second], echo=True, logprobs=1, max_tokens=1)
    events = [
        PromptScores((score(second, -2.0, (first, -0.5)),)),
        TextDelta(tokenizer.decode([first]), (score(first, float("-inf"), (first, -0.1)),)),
        Finished("length", Usage(2, 1, 1)),
    ]
    (choice,) = Answer(request, tokenizer).complete([events])["choices"]
    texts = [tokenizer.decode([token]) for token in (first, second, first)]
    assert choice["text"] == "".join(texts)
    assert choice["logprobs"] == {
        "tokens": texts,
        "token_logprobs": [None, -2.0, -9999.0],
        "top_logprobs": [None, {texts[0]: -0.5, texts[1]: -2.0}, {texts[0]: -9999.0}],
        "text_offset": [0, len(texts[0]), len(texts[0]) + len(texts[1])],
    }


def test_events_of_several_steps_are_one_chunk_and_the_reason_another(model):
    request = chat(model, stream=True, stream_options={"include_usage": True})
    answer = Answer(request, model.tokenizer)
    (opening,) = answer.opening()
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert list(answer.chunks(0, [TextDelta("")])) == []  # within a character
    events = [TextDelta("Bon"), TextDelta(""), TextDelta(" dia"), Finished("stop", Usage(9, 4, 2))]
    text, reason = answer.chunks(0, events)
    assert text["choices"][0]["delta"] == {"content": "Bon dia"} and text["choices"][0]["finish_reason"] is None
    assert reason["choices"][0]["delta"] == {} and reason["choices"][0]["finish_reason"] == "stop"
    (usage,) = answer.closing()
    assert usage["choices"] == [] and usage["usage"] == {
        "prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip
    json.dumps([opening, text, reason, usage], allow_nan=False)


def test_a_prompt_counts_once_however_many_choices_it_has(model):
    request = completion(model, prompt=["la", "el"], n=2)
    finished = [[Finished("stop", Usage(prompt, tokens, cached))] for prompt, tokens, cached in
                [(3, 1, 0), (3, 2, 2), (5, 3, 1), (5, 4, 4)]]  # fmt: skip
    usage = Answer(request, model.tokenizer).complete(finished)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (8, 10, 18)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
