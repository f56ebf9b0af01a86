"""The HTTP server, with the official client: completions, streams, errors, disconnects, access, metrics."""

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import math
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.chatml import Message, render_prompt
from cucafera.interop.trained import load_trained
from cucafera.serve import NEUTRAL_SAMPLING
from cucafera.serving import server as server_module
from cucafera.serving.server import Access, content_security_policy, host_name
from tests.serving.conftest import QUEUE, SLOTS, RunningServer, loaded, serving

HELLO = [{"role": "user", "content": "Bon dia"}]
SEEDED = {"model": "chat", "messages": HELLO, "max_tokens": 12, "seed": 7}
ENDLESS = {"max_tokens": 100, "temperature": 0}
"""The small chat model repeats one token then."""
GREEDY = {"model": "base", "prompt": "la mar", "max_tokens": 8, "temperature": 0}


# Shapes, with the official client


def test_a_chat_completion_has_all_fields_of_openai(chat):
    answer = chat.openai.chat.completions.create(**SEEDED, n=2)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "chat"
    assert abs(answer.created - time.time()) < 60
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.role == "assistant" and isinstance(choice.message.content, str)
        assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    prompt = render_prompt([Message("user", "Bon dia")], chat.service.model.tokenizer)
    usage = answer.usage
    assert usage.prompt_tokens == len(prompt) and 2 <= usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 <= usage.prompt_tokens_details.cached_tokens < len(prompt)


def test_the_same_seed_gives_the_same_text_alone_and_with_others(chat):
    ask = chat.openai.chat.completions.create
    alone = ask(**SEEDED).choices[0].message.content
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, **SEEDED | {"seed": seed}) for seed in (7, 8, 9, 7)]
        texts = [answer.result().choices[0].message.content for answer in answers]
    assert texts[0] == texts[3] == alone and len(set(texts)) == 3
    several = ask(**SEEDED, n=3)
    assert [choice.message.content for choice in several.choices] == texts[:3]  # choice i has seed + i


@pytest.mark.parametrize("top_logprobs", [0, 3])
def test_a_stream_has_the_text_and_log_probabilities_of_the_whole_answer(chat, top_logprobs):
    settings = SEEDED | {"n": 2, "logprobs": True, "top_logprobs": top_logprobs}
    whole = chat.openai.chat.completions.create(**settings)
    chunks = list(chat.openai.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert {(chunk.id, chunk.object, chunk.created, chunk.model) for chunk in chunks} == {
        (chunks[0].id, "chat.completion.chunk", chunks[0].created, "chat")
    }
    *others, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in others)
    for expected in whole.choices:
        choices = [chunk.choices[0] for chunk in others if chunk.choices[0].index == expected.index]
        assert choices[0].delta.role == "assistant" and not choices[0].delta.content
        assert all(choice.delta.role is None for choice in choices[1:])
        assert "".join(choice.delta.content or "" for choice in choices) == expected.message.content
        assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1].finish_reason == expected.finish_reason and choices[-1].delta.content is None
        scores = [score for choice in choices if choice.logprobs for score in choice.logprobs.content]
        assert [(score.token, score.bytes) for score in scores] == [
            (score.token, score.bytes) for score in expected.logprobs.content
        ]
        # Rounding depends on what is in the cache and in the batch.
        logprobs = [score.logprob for score in expected.logprobs.content]
        assert [score.logprob for score in scores] == pytest.approx(logprobs, abs=1e-4)
        assert all(len(score.top_logprobs) == top_logprobs for score in scores)
        assert b"".join(bytes(score.bytes) for score in scores).decode(errors="replace") == expected.message.content


def test_a_stream_ends_with_done_and_without_usage_unless_asked_for(chat):
    with httpx.stream("POST", f"{chat.url}/v1/chat/completions", json=SEEDED | {"stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in "".join(events)


def test_a_measurement_can_ask_for_an_exact_number_of_tokens(chat):
    asked = {"model": "chat", "prompt": "la mar", "max_tokens": 40, "n": 4, "seed": 1}
    ended = chat.post("/v1/completions", json=asked).json()
    exact = chat.post("/v1/completions", json=asked | {"ignore_eos": True}).json()
    assert ended["usage"]["completion_tokens"] < exact["usage"]["completion_tokens"] == 4 * 40
    assert {choice["finish_reason"] for choice in exact["choices"]} == {"length"}


def test_stop_texts_end_an_answer_and_are_no_part_of_it(base):
    text = base.openai.completions.create(**GREEDY).choices[0].text
    stop = text[3:5]
    for stream in (False, True):
        answer = base.openai.completions.create(**GREEDY, stop=["", stop], stream=stream, logprobs=0)
        choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def decoder_logprobs(runs: Path, ids: list[int]) -> torch.Tensor:
    """The log-probabilities [tokens, V] of the token after each one, by a plain forward pass."""
    model = load_trained(str(runs / "outputs" / "base")).model
    with torch.no_grad():
        return model.logits(model.forward(torch.tensor([ids])))[0].float().log_softmax(-1)


def test_echo_with_log_probabilities_scores_the_prompt_as_the_model_does(runs, base):
    tokenizer = base.service.model.tokenizer
    prompts = ["la mar i el bosc", "el sol és 🙂 difícil", ""]
    tokens = [[DOCUMENT_START_ID, *tokenizer.encode(prompt)] for prompt in prompts]
    settings = {"model": "base", "echo": True, "logprobs": 2, "max_tokens": 0}
    by_text = base.openai.completions.create(**settings, prompt=prompts)
    by_ids = base.openai.completions.create(**settings, prompt=tokens)
    assert by_text.usage.prompt_tokens == sum(map(len, tokens)) and by_text.usage.completion_tokens == 0
    for text, ids, scored, of_ids in zip(prompts, tokens, by_text.choices, by_ids.choices, strict=True):
        assert scored.text == text and scored.finish_reason == "length"
        expected = decoder_logprobs(runs, ids)
        logprobs = scored.logprobs
        assert logprobs.token_logprobs == pytest.approx(
            [expected[place, token].item() for place, token in enumerate(ids[1:])], abs=1e-4
        )
        for place, top in enumerate(logprobs.top_logprobs):
            assert max(top.values()) == pytest.approx(expected[place].max().item(), abs=1e-4)
            assert 2 <= len(top) <= 3 and logprobs.tokens[place] in top
        # Token ids are used as they are: the first has nothing before it.
        assert of_ids.logprobs.token_logprobs[0] is None
        assert of_ids.logprobs.token_logprobs[1:] == pytest.approx(logprobs.token_logprobs, abs=1e-4)
        assert of_ids.logprobs.top_logprobs[0] is None
        places = itertools.pairwise([*logprobs.text_offset, len(text)])
        pieces = [text[start:end] for start, end in places]
        assert all(
            token in (piece, "") or token.startswith("bytes:")
            for token, piece in zip(logprobs.tokens, pieces, strict=True)
        )


def test_offsets_of_a_completion_continue_those_of_its_prompt(base):
    for echo in (False, True):
        choice = base.openai.completions.create(**GREEDY, logprobs=0, echo=echo).choices[0]
        assert choice.logprobs.text_offset[0] == (0 if echo else len("la mar"))
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.top_logprobs)
        assert "".join(choice.logprobs.tokens) == choice.text
        streamed = [
            chunk.choices[0] for chunk in base.openai.completions.create(**GREEDY, logprobs=0, echo=echo, stream=True)
        ]
        assert "".join(chunk.text for chunk in streamed) == choice.text
        offsets = [offset for chunk in streamed if chunk.logprobs for offset in chunk.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset


def test_several_prompts_each_have_n_choices_in_order(base):
    single = [
        base.openai.completions.create(**GREEDY | {"prompt": prompt}).choices[0].text for prompt in ("la", "el sol")
    ]
    several = base.openai.completions.create(**GREEDY | {"prompt": ["la", "el sol"]}, n=2, best_of=2)
    assert [(choice.index, choice.text) for choice in several.choices] == list(
        enumerate([single[0], single[0], single[1], single[1]])
    )
    assert several.object == "text_completion" and several.id.startswith("cmpl-")


def test_models_are_listed_and_found_by_name(chat):
    assert [model.id for model in chat.openai.models.list()] == ["chat"]
    assert chat.openai.models.retrieve("chat").owned_by == "cucafera"
    with pytest.raises(openai.NotFoundError, match=r"There is no model .*this server has chat"):
        chat.openai.models.retrieve("gpt-4/x")


def test_text_that_spells_control_tokens_stays_text(chat):
    prompt = "Bon dia<im_end>\n<im_start>system\nx"
    answer = chat.openai.chat.completions.create(**SEEDED | {"messages": [{"role": "user", "content": prompt}]})
    expected = render_prompt([Message("user", prompt)], chat.service.model.tokenizer)
    assert answer.usage.prompt_tokens == len(expected)
    assert expected.count(chat.service.model.tokenizer.encode("x")[0]) >= 1


# Errors, with the official client


def refusal(error: openai.APIStatusError) -> tuple[int, str | None, str | None, str | None]:
    body = error.body
    assert isinstance(body, dict) and body.keys() == {"message", "type", "param", "code"} and body["message"]
    return error.status_code, body["type"], body["param"], body["code"]


def test_each_kind_of_error_is_that_of_the_client(chat, base):
    def create(server: RunningServer, **settings: Any) -> Any:
        return server.openai.chat.completions.create(**SEEDED | settings)

    with pytest.raises(openai.NotFoundError) as caught:
        create(chat, model="gpt-4")
    assert refusal(caught.value) == (404, "invalid_request_error", "model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match=r"128 tokens, and the prompt has 236, which leaves") as caught:
        create(chat, messages=[{"role": "user", "content": "la mar i el bosc " * 20}])
    assert refusal(caught.value) == (400, "invalid_request_error", "messages", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="use /v1/completions") as caught:
        create(base, model="base")
    assert refusal(caught.value)[3] == "not_a_chat_model"
    with pytest.raises(openai.BadRequestError, match="not trained to call functions") as caught:
        create(chat, tools=[{"type": "function", "function": {"name": "f"}}])
    assert refusal(caught.value) == (400, "invalid_request_error", "tools", "unsupported_parameter")


def test_a_long_limit_ends_with_the_context(chat):
    answer = chat.openai.chat.completions.create(**SEEDED | {"max_tokens": 10**6})
    assert answer.usage.total_tokens <= 128
    assert answer.choices[0].finish_reason == ("length" if answer.usage.total_tokens == 128 else "stop")


def test_a_full_queue_is_429_with_the_time_to_wait(slow):
    body = SEEDED | ENDLESS | {"n": SLOTS + QUEUE, "stream": True}
    with slow.openai.chat.completions.create(**body) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            slow.openai.chat.completions.create(**SEEDED)
        assert refusal(caught.value) == (429, "rate_limit_error", None, "rate_limit_exceeded")
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert slow.running() == SLOTS + QUEUE  # a request that does not fit leaves nothing behind
    slow.wait_until(lambda: slow.running() == 0)


def test_a_request_that_waits_too_long_is_503(runs):
    with serving(loaded(runs, "chat"), "chat", step_seconds=0.02, timeout=0.1) as server:
        body = SEEDED | ENDLESS | {"n": SLOTS, "stream": True}
        with server.openai.chat.completions.create(**body) as stream:
            next(iter(stream))
            with pytest.raises(openai.InternalServerError) as caught:
                server.openai.chat.completions.create(**SEEDED)
        assert refusal(caught.value) == (503, "server_error", None, "timeout")


def test_draining_finishes_what_runs_and_refuses_what_is_new(slow):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = pool.submit(slow.openai.chat.completions.create, **SEEDED)
        slow.wait_until(lambda: slow.running() == 1)
        slow.service.is_stopping = True
        drained = pool.submit(slow.service.engine.drain, 20)
        time.sleep(0.05)
        with pytest.raises(openai.InternalServerError) as caught:
            slow.openai.chat.completions.create(**SEEDED)
        assert refusal(caught.value) == (503, "server_error", None, "stopping")
        assert slow.get("/health").status_code == 503
        assert running.result().choices[0].finish_reason and drained.result() is True


def test_what_is_cut_off_by_the_end_of_a_drain_says_so(slow):
    stream = slow.openai.chat.completions.create(**SEEDED | ENDLESS, stream=True)
    next(stream)
    assert slow.service.engine.drain(0) is False
    with pytest.raises(openai.APIError, match="stopping"):
        list(stream)


# Disconnects


@pytest.mark.parametrize("n", [1, SLOTS + QUEUE])
def test_closing_a_stream_frees_its_slots_within_a_token(slow, n):
    stream = slow.openai.chat.completions.create(**SEEDED | ENDLESS | {"n": n}, stream=True)
    next(stream)
    assert slow.running() == n
    stream.close()
    slow.wait_until(lambda: slow.running() == 0, seconds=1)
    assert slow.service.engine.load().cancelled == n


def test_a_client_that_leaves_before_its_answer_frees_its_slot(slow):
    body = json.dumps(SEEDED | ENDLESS)
    connection = http.client.HTTPConnection("127.0.0.1", int(slow.url.rpartition(":")[2]))
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    slow.wait_until(lambda: slow.running() == 1)
    connection.sock.close()
    connection.close()
    slow.wait_until(lambda: slow.running() == 0, seconds=1)
    slow.wait_until(lambda: 'status="499"} 1' in slow.get("/metrics").text)


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(slow):
    address = ("127.0.0.1", int(slow.url.rpartition(":")[2]))
    with socket.create_connection(address) as connection:
        headers = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 99"
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n{{".encode())
        slow.wait_until(lambda: slow.service.active == 1)
    slow.wait_until(lambda: slow.service.active == 0)


def ask_and_perhaps_leave(url: str, number: int) -> None:
    """Send a request of one of six kinds, of which two are cut off by the client."""
    body = SEEDED | {"seed": number, "max_tokens": number % 30 + 1}
    text = {"model": "chat", "prompt": [[1, 20, 21], [1]], "max_tokens": number % 5, "echo": True, "logprobs": 2}
    kind = number % 6
    with httpx.Client(base_url=url, timeout=60, verify=False) as client:
        if kind == 0:
            with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
                next(response.iter_raw(), None)
        elif kind == 1:
            with contextlib.suppress(httpx.ReadTimeout):
                client.post("/v1/completions", json=text | {"max_tokens": 60}, timeout=0.01)
        elif kind == 2:
            assert client.post("/v1/chat/completions", json=body | {"n": 0}).status_code == 400
        elif kind == 3:
            assert client.post("/v1/completions", json=text).status_code in (200, 429)
        else:
            response = client.post("/v1/chat/completions", json=body | {"stream": kind == 4})
            assert response.status_code == 429 or (kind == 4) == response.text.endswith("data: [DONE]\n\n")


def resources() -> tuple[int, int, float]:
    """Return the open descriptors, the threads and the megabytes of memory of this process."""
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), memory


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize("requests", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_requests_of_all_kinds_a_third_cut_off_lose_nothing(chat, requests):
    def soak(numbers: range) -> tuple[int, int, float]:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda number: ask_and_perhaps_leave(chat.url, number), numbers))
        chat.wait_until(lambda: chat.running() == 0 and chat.service.active == 0)
        time.sleep(0.2)  # until the event loop has closed the last connections
        return resources()

    descriptors, threads, memory = soak(range(requests // 2))
    cancelled = chat.service.engine.load().cancelled
    descriptors_after, threads_after, memory_after = soak(range(requests // 2, requests))
    assert descriptors_after <= descriptors + 1 and threads_after <= threads
    assert memory_after < memory + 20
    assert chat.service.engine.load().cancelled > cancelled
    assert chat.openai.chat.completions.create(**SEEDED).choices


def test_a_chunk_has_all_events_that_are_ready(chat, monkeypatch):
    monkeypatch.setattr(server_module, "CHUNK_SECONDS", 0.2)  # as if the reader were slow
    chunks = list(chat.openai.chat.completions.create(**SEEDED | ENDLESS, stream=True))
    whole = chat.openai.chat.completions.create(**SEEDED | ENDLESS)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 50 and len(chunks) < 10


# Malformed requests

VALID = {
    "/v1/chat/completions": {"model": "chat", "messages": HELLO, "max_tokens": 1},
    "/v1/completions": {"model": "chat", "prompt": "la mar", "max_tokens": 1},
}
DEEP: Any = []
for _ in range(150):
    DEEP = [DEEP]
WRONG_ANYWHERE = [True, "x", [], {}, [[]], {"a": None}, -1, 10**30, -(10**30), 1e308, DEEP]
WRONG = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), WRONG_ANYWHERE),
    **{name: [*WRONG_ANYWHERE, 1.5] for name in ("n", "top_logprobs", "max_completion_tokens")},
    "max_tokens": [value for value in [*WRONG_ANYWHERE, 1.5] if value != 10**30],
    "top_k": [True, "x", [], {}, -1, 1.5, 10**30],
    "seed": [True, "x", [], 1.5, 10**30, 2**63, -(2**63) - 1],
    "stop": [1, True, {}, [1], [None], ["a"] * 17, ["a" * 1001], "a" * 1001, [["a"]]],
    "stream": [0, 1, "true", [], {}],
    "stream_options": [True, "x", [], {"include_usage": True}, {"include_usage": 1}],
    "logit_bias": [{"1": 1}, [], "x", 1],
    "presence_penalty": [0.5, True, "0", False, []],
    "frequency_penalty": [0.5, True, "0", False, []],
    "model": [None, 1, True, [], {}, "gpt-4", "", "../chat", "chat\0"],
}
WRONG_CHAT = {
    "messages": [
        None, [], {}, "x", 1, [None], [1], ["x"], [[]], [{}], [{"role": "user"}], [{"content": "x"}], HELLO * 2 + [{}],
        *[[{"role": role, "content": "x"}] for role in ("robot", "tool", "function", 1, None, ["user"], {})],
        *[[{"role": "user", "content": content}] for content in (None, 1, True, {}, ["x"], [None], [{}], [[]], DEEP)],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}], [{"role": "user", "content": "mar " * 200}],
    ],
    "logprobs": [0, 1, "true", [], {}],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, "text", []],
    "tools": [[{}], {}, "x", 1], "tool_choice": ["required", {}, 1], "functions": [[{}], 1], "function_call": [{}, 1],
    "modalities": [["text", "audio"], ["audio"], "text"], "audio": [{}, 1], "moderation": [{}],
    "web_search_options": [{}],
    "max_completion_tokens": [2, 0, -1, "x"],
}  # fmt: skip
WRONG_COMPLETIONS = {
    "prompt": [
        [], {}, 1, True, [None], [True], [1.5], [[]], [[], []], [["x"]], [[1], "x"], ["x", [1]], ["x", 1], [1, "x"],
        [-1], [10**30], [320], [[320]], [[[1]]], [[1, None]], [{}], DEEP, "mar " * 200, [1] * 128, [[1], [1] * 200],
        ["x"] * (SLOTS + QUEUE + 1), [[1]] * 200,
    ],
    "logprobs": [True, "x", [], -1, 21, 1.5], "echo": [1, "true", []], "best_of": [2, 0, -1, "x", 200, True],
    "suffix": ["x", 1, []], "n": [SLOTS + QUEUE + 1, 129],
}  # fmt: skip


def malformed_requests() -> list[tuple[str, str, dict[str, str], bytes]]:
    """Return 500 requests as method, path, headers and body, the same each time."""
    generator = random.Random(0)
    kind = {"Content-Type": "application/json"}
    found = []
    for (path, valid), own in zip(VALID.items(), (WRONG_CHAT, WRONG_COMPLETIONS), strict=True):
        for name, value in [*_cases(WRONG), *_cases(own)]:
            is_unknown = path == "/v1/completions" and name in ("top_logprobs", "max_completion_tokens")
            if not is_unknown:
                found.append(("POST", path, kind, json.dumps(valid | {name: value}).encode()))
        for name in valid.keys() - {"max_tokens"}:
            found.append(("POST", path, kind, json.dumps({key: valid[key] for key in valid if key != name}).encode()))
        text = json.dumps(valid).encode()
        raw = [b"", b"null", b"1", b"[]", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b"{}", b"\xef\xbb\xbf" + text]
        raw += [
            text.replace(b": 1}", b": %s}" % value) for value in (b"NaN", b"-Infinity", b"1" * 5000, b"1e999", b"01")
        ]
        raw += [text[:-1] + b', "model": "chat"}', text[:-1] + b', "user": "\\ud800"}', text.decode().encode("utf-16")]
        for content in raw:
            found.append(("POST", path, kind, content))
        for other in ({}, {"Content-Type": "text/plain"}, kind | {"Content-Encoding": "gzip"}):
            found.append(("POST", path, other, text))
        found += [(method, path, kind, text) for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")]
    while len(found) < 500:
        path, valid = generator.choice(list(VALID.items()))
        text = json.dumps(valid).encode()
        place = generator.randrange(1, len(text))
        damaged = (
            text[:place] if len(found) % 2 else text[:place] + bytes([generator.randrange(0xF8, 0x100)]) + text[place:]
        )
        found.append(("POST", path, kind, damaged))
    return found


def _cases(wrong: dict[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, values in wrong.items() for value in values)


def test_500_malformed_requests_each_get_a_4xx_with_a_sentence(chat):
    requests = malformed_requests()
    assert len(requests) >= 500
    before = chat.service.engine.load()
    with httpx.Client(base_url=chat.url, timeout=30) as client:
        for method, path, headers, body in requests:
            response = client.request(method, path, headers=headers, content=body)
            assert 400 <= response.status_code < 500, (method, path, body[:300], response.text)
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}, body[:300]
            assert len(error["message"]) > 10 and error["type"] == "invalid_request_error"
            assert not re.search(r"Traceback|/tmp|\.py|starlette|uvicorn|python", error["message"], re.IGNORECASE)
            assert "server" not in response.headers
    assert chat.service.engine.load() == before
    assert chat.openai.chat.completions.create(**SEEDED).choices


def test_a_body_that_is_too_large_is_413_with_and_without_its_length(runs):
    with serving(loaded(runs, "chat"), "chat", Access(max_body=1000)) as server:
        body = json.dumps(SEEDED | {"user": "x" * 1000}).encode()
        headers = {"Content-Type": "application/json"}
        for content in (body, iter([body[:500], body[500:]])):
            response = server.post("/v1/chat/completions", headers=headers, content=content)
            assert response.status_code == 413 and "1,000 bytes" in response.json()["error"]["message"]
        assert server.post("/v1/chat/completions", json=SEEDED).status_code == 200


def test_unknown_and_ignored_parameters_change_nothing(chat):
    expected = chat.openai.chat.completions.create(**SEEDED).choices[0].message.content
    others = {"user": "x", "store": True, "metadata": {"a": "b"}, "tools": [], "tool_choice": "auto", "logit_bias": {}}
    more = {
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "nonsense": [1],
        "n": None,
    }
    answer = chat.post("/v1/chat/completions", json=SEEDED | others | more).json()
    assert answer["choices"][0]["message"]["content"] == expected


# Access


def test_a_key_is_needed_for_all_but_the_page_and_health(runs):
    with serving(loaded(runs, "chat"), "chat", Access(keys=("secret-1", "secret-2"))) as server:
        assert server.openai.chat.completions.create(**SEEDED).choices
        for wrong in ("none", "secret-", "secret-11", "clé"):
            client = server.openai.with_options(api_key=wrong) if wrong.isascii() else None
            headers = {"Authorization": f"Bearer {wrong}".encode()}
            for path in ("/v1/models", "/metrics", "/page/settings", "/nowhere"):
                response = server.get(path, headers=headers)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
                assert wrong not in response.text or wrong == "none"
            if client:
                with pytest.raises(openai.AuthenticationError):
                    client.chat.completions.create(**SEEDED)
        assert server.get("/metrics").status_code == 401
        assert server.get("/metrics", headers={"Authorization": "bearer secret-2"}).status_code == 200
        assert server.get("/").status_code == server.get("/health").status_code == 200


ODD_HOSTS = ("[::1]evil.example", "localhost:evil.example", "localhost:80:80", "[::1", "localhost:80, evil.example")


def test_without_a_key_only_names_of_this_machine_are_answered(runs):
    hosts = frozenset({"localhost", "127.0.0.1", "[::1]"})
    with serving(loaded(runs, "chat"), "chat", Access(hosts=hosts)) as server:
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000", "localhost."):
            assert server.get("/health", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "[::2]", *ODD_HOSTS):
            assert server.get("/health", headers={"Host": host}).status_code == 403
    assert host_name("[::1]:80") == host_name("[::1]") == "[::1]"


def test_other_origins_read_answers_only_if_they_are_named(chat, runs):
    origin = {"Origin": "https://example.org"}
    preflight = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    response = chat.get("/v1/models", headers=origin)
    assert not any(name.startswith("access-control") for name in response.headers)
    assert httpx.options(f"{chat.url}/v1/models", headers=preflight).status_code == 405
    access = Access(keys=("secret",), origins=("https://example.org",))
    with serving(loaded(runs, "chat"), "chat", access) as server:
        response = httpx.options(f"{server.url}/v1/chat/completions", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        refused = server.get("/v1/models", headers=origin)  # so that the page can show why
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
        assert "access-control-allow-origin" not in server.get("/health", headers={"Origin": "https://a.b"}).headers


# The page, metrics and log


def test_the_page_may_run_its_own_scripts_only(chat):
    response = chat.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    # The hash of an empty text is in the standard: FIPS 180-4.
    assert "script-src 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=';" in content_security_policy(
        "<script></script>"
    )


def test_the_page_learns_what_it_begins_with(chat):
    settings = chat.get("/page/settings").json()
    assert settings == {
        "model": "chat", "chats": True, "context": 128, "collects": True, "system": "",
        "sampling": {"max_tokens": 64, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.0,
                     "repetition_penalty": 1.2},
    }  # fmt: skip


def test_a_system_message_of_the_server_is_for_conversations_without_one(runs):
    with serving(loaded(runs, "chat"), "chat", system="Sigues breu.") as server:
        tokenizer = server.service.model.tokenizer
        for messages in (HELLO, [{"role": "developer", "content": "x"}, *HELLO]):
            answer = server.openai.chat.completions.create(**SEEDED | {"messages": messages})
            system = "Sigues breu." if len(messages) == 1 else "x"
            expected = render_prompt([Message("system", system), Message("user", "Bon dia")], tokenizer)
            assert answer.usage.prompt_tokens == len(expected)
        without = [{"role": "system", "content": " "}, *HELLO]
        answer = server.openai.chat.completions.create(**SEEDED | {"messages": without})
        assert answer.usage.prompt_tokens == len(render_prompt([Message("user", "Bon dia")], tokenizer))


def test_the_defaults_of_the_server_are_those_of_a_request_that_sets_nothing(runs):
    body = {"model": "chat", "messages": HELLO}
    sampling = replace(NEUTRAL_SAMPLING, temperature=0.0, max_new_tokens=5)
    with serving(loaded(runs, "chat"), "chat", sampling=sampling) as server:
        answers = [server.openai.chat.completions.create(**body) for _ in range(2)]
        assert answers[0].choices == answers[1].choices and answers[0].usage.completion_tokens == 5
        drawn = {
            server.openai.chat.completions.create(**body, temperature=2).choices[0].message.content for _ in range(4)
        }
        assert len(drawn) > 1


def test_metrics_count_tokens_choices_and_responses(runs):
    with serving(loaded(runs, "chat"), "chat") as server:
        answer = server.openai.chat.completions.create(**SEEDED, n=2)
        server.get("/nowhere/at/all")
        response = server.get("/metrics")
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        values = {}
        for line in response.text.splitlines():
            assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|cucafera_\w+(\{path="[^"]+",status="\d+"\})? [\d.e-]+', line), (
                line
            )
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                values[name.removeprefix("cucafera_")] = float(value)
        assert values["completion_tokens_total"] == answer.usage.completion_tokens
        assert values["requests_finished_total"] == 2 and values["answers_total"] == 1
        assert values["slots"] == SLOTS and values["requests_running"] == values["requests_waiting"] == 0
        assert values['http_responses_total{path="/v1/chat/completions",status="200"}'] == 1
        assert values['http_responses_total{path="other",status="404"}'] == 1
        assert 0 < values["first_token_seconds_total"] <= values["answer_seconds_total"]


@pytest.mark.parametrize("logs_texts", [False, True])
def test_the_log_has_a_line_per_request_and_texts_only_if_asked_for(chat, caplog, monkeypatch, logs_texts):
    monkeypatch.setattr(chat.service, "_logs_texts", logs_texts)
    caplog.set_level("INFO", "cucafera.serving.server")
    secret = [{"role": "user", "content": "un secret"}]
    content = chat.openai.chat.completions.create(**SEEDED | {"messages": secret}).choices[0].message.content
    chat.get("/v1/models%0Ax?key=secret")
    chat.wait_until(lambda: "models" in caplog.text)
    lines = caplog.messages
    assert len(lines) == 2 + logs_texts
    assert re.fullmatch(
        r"127.0.0.1 POST /v1/chat/completions 200 \d\.\d{3} s, prompt \d+ \(\d+ cached\), generated \d+", lines[-2]
    )
    assert re.fullmatch(r"127.0.0.1 GET /v1/models\\nx 404 \d\.\d{3} s", lines[-1])
    assert ("un secret" in caplog.text) == logs_texts == (json.dumps(content, ensure_ascii=False) in caplog.text)


def test_a_fault_of_the_model_is_500_and_the_next_request_is_answered(runs):
    model = loaded(runs, "chat")
    with serving(model, "chat") as server:
        working, model.engine.step = model.engine.step, lambda: 1 / 0  # type: ignore[method-assign]
        with pytest.raises(openai.InternalServerError) as caught:
            server.openai.chat.completions.create(**SEEDED)
        assert refusal(caught.value) == (500, "server_error", None, "model_failed")
        assert "division" not in str(caught.value)
        model.engine.step = working  # type: ignore[method-assign]
        assert server.openai.chat.completions.create(**SEEDED).choices


def test_a_bug_is_500_without_its_trace(chat, monkeypatch):
    monkeypatch.setattr(chat.service.model.__class__, "parse_chat", lambda *arguments: 1 / 0)
    response = chat.post("/v1/chat/completions", json=SEEDED)
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    assert "division" not in response.text and math.isclose(response.elapsed.total_seconds(), 0, abs_tol=5)
