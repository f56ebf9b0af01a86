"""Chat sessions: history, redo, forgetting when the context is full, cancellation, and nothing shared between two."""

import random
from collections.abc import Iterator
from itertools import zip_longest

import pytest
import torch

from cucafera.config.errors import UserError
from cucafera.config.schema import ModelConfig, SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID, IM_START_ID
from cucafera.data.chatml import STOP_IDS, Message, render_prompt
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation import session as session_module
from cucafera.generation.backend import Extension, TorchBackend
from cucafera.generation.engine import Engine
from cucafera.generation.generate import generate
from cucafera.generation.request import ContextFullError, Finished, GenerationEvent, TextDelta, Usage
from cucafera.generation.session import ChatSession, chat_request, completion_request
from cucafera.model.transformer import Decoder

TURNS = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A random model: what it says is noise, and no test depends on it."""
    torch.manual_seed(0)
    decoder = Decoder(
        ModelConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return decoder


@pytest.fixture
def session(model, tokenizer) -> ChatSession:
    return session_of(model, tokenizer)


def session_of(model: Decoder, tokenizer: Tokenizer, seed: int = 0, **sampling) -> ChatSession:
    settings = SamplingConfig(**{"max_new_tokens": 8, "temperature": 1.0} | sampling)
    return ChatSession(Engine(TorchBackend(model), tokenizer), tokenizer, settings, seed)


def text_of(events: Iterator[GenerationEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_answers_go_into_the_history_and_the_history_into_the_prompt(session):
    first = text_of(session.answer("Hola"))
    assert session.history == ([Message("user", "Hola"), Message("assistant", first)] if first.strip() else [])
    session.history = TURNS[:2]
    session.system = "Sigues breu."
    assert session.messages() == [Message("system", "Sigues breu."), *TURNS[:2]]


def test_the_same_seed_gives_the_same_conversation(model, tokenizer):
    conversations = []
    for seed in (0, 0, 1):
        session = session_of(model, tokenizer, seed)
        conversations.append([text_of(session.answer(text)) for text in ("Hola", "Bon dia")])
    assert conversations[0] == conversations[1] != conversations[2]


def test_an_answer_ends_with_finish_reason_and_usage(model, tokenizer, session):
    prompt = render_prompt([Message("user", "Hola")], tokenizer)
    *deltas, last = session.answer("Hola")
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert isinstance(last, Finished) and last.usage.prompt_tokens == len(prompt)
    assert last.finish_reason == ("length" if last.usage.completion_tokens == 8 else "stop")


def test_a_request_without_history_gives_the_events_of_a_session(model, tokenizer, session):
    messages = [Message("system", "mar"), Message("user", "Hola")]
    engine = Engine(TorchBackend(model), tokenizer)
    seed = random.Random(0).getrandbits(63)
    alone = list(engine.stream(chat_request(messages, tokenizer, session.sampling, seed)))
    session.system = "mar"
    assert list(session.answer("Hola")) == alone
    with pytest.raises(ContextFullError, match="the model's context 64"):
        list(engine.stream(chat_request(messages * 30, tokenizer, session.sampling, seed)))


def test_the_next_turn_of_a_conversation_uses_the_cache_of_the_one_before(session, tokenizer):
    session.sampling = SamplingConfig(temperature=0, max_new_tokens=2)
    *_, first = session.answer("a")
    *_, second = session.answer("b")
    assert first.usage.cached_tokens == 0
    assert len(session.history) == 4 and second.usage.cached_tokens >= first.usage.prompt_tokens


@pytest.mark.parametrize("slots", [1, 2])
def test_two_sessions_of_one_engine_share_nothing_but_its_slots(model, tokenizer, slots):
    engine = Engine(TorchBackend(model, slots), tokenizer)
    settings = SamplingConfig(max_new_tokens=8, temperature=1.0)
    shared = [ChatSession(engine, tokenizer, settings, seed) for seed in (1, 2)]
    alone = [session_of(model, tokenizer, seed) for seed in (1, 2)]
    for text in ("Hola", "Bon dia"):
        list(zip_longest(*(session.answer(text) for session in shared)))
        for session in alone:
            list(session.answer(text))
    assert [session.history for session in shared] == [session.history for session in alone]


def test_two_sessions_that_answer_at_the_same_time_share_nothing(model, tokenizer):
    settings = ({"seed": 1}, {"seed": 2, "temperature": 0.7, "stop": ["a"]})
    alone, shared = ([session_of(model, tokenizer, **setting) for setting in settings] for _ in range(2))
    expected = [[list(session.answer(text)) for text in ("Hola", "Bon dia")] for session in alone]
    for number in range(2):
        texts = ("Hola", "Bon dia")[number]
        pairs = list(zip_longest(*(session.answer(texts) for session in shared)))
        for which in range(2):
            assert [pair[which] for pair in pairs if pair[which] is not None] == expected[which][number]
    assert [session.history for session in shared] == [session.history for session in alone]


def test_a_base_model_continues_a_text(model, tokenizer, session):
    *_, last = session.complete("la mar")
    assert isinstance(last, Finished) and last.usage.prompt_tokens == 1 + len(tokenizer.encode("la mar"))
    assert session.history == []
    greedy = SamplingConfig(temperature=0, max_new_tokens=60)
    engine = Engine(TorchBackend(model), tokenizer)
    events = list(engine.stream(completion_request("la mar", tokenizer, greedy, None)))
    prompt = [DOCUMENT_START_ID, *tokenizer.encode("la mar")]
    (completion,) = generate(model, tokenizer, [prompt], greedy, frozenset(STOP_IDS))
    assert text_of(iter(events)) == completion.text
    with pytest.raises(ContextFullError, match="Shorten the prompt"):
        text_of(session.complete("xyz " * 80))


def test_the_oldest_turns_are_left_out_of_a_full_context_but_stay_in_the_history(session, tokenizer, monkeypatch):
    session.system = "mar"
    old = [Message(role, text) for text in ("unu", "dos", "tres") for role in ("user", "assistant")]
    session.history = list(old)
    shown = []
    monkeypatch.setattr(session, "_respond", lambda messages: shown.append(messages) or iter([TextDelta("bosc")]))
    assert text_of(session.answer("sol")) == "bosc"
    candidates = [[Message("system", "mar"), *old[2 * forgotten :], Message("user", "sol")] for forgotten in range(4)]
    fitting = [messages for messages in candidates if len(render_prompt(messages, tokenizer)) <= 64 - 8]
    assert shown == fitting[:1] and len(fitting) < 4
    assert session.history == [*old, Message("user", "sol"), Message("assistant", "bosc")]


def test_a_long_history_costs_no_more_than_what_fits(session, monkeypatch):
    rendered: list[int] = []
    render = session_module.render
    monkeypatch.setattr(
        session_module, "render", lambda parts, tokenizer: rendered.append(len(parts)) or render(parts, tokenizer)
    )
    for turns in (3, 30, 3000):
        session.history = [Message("user", "a"), Message("assistant", "b")] * turns
        text_of(session.answer("c"))
    assert rendered[0] <= rendered[1] == rendered[2] < 64 // 5


@pytest.mark.parametrize(("max_new_tokens", "room"), [(8, 56), (16, 48), (17, 48), (1000, 48)])
def test_at_most_a_quarter_of_the_context_is_kept_for_the_answer(model, tokenizer, max_new_tokens, room):
    session = session_of(model, tokenizer, max_new_tokens=max_new_tokens)
    with pytest.raises(ContextFullError, match=rf"context of 64 leaves room for {room} before"):
        text_of(session.answer("la mar i el bosc " * 20))


class Scripted:
    """A backend that writes given tokens."""

    context, vocab_size, device, slots, capacity = 64, 300, torch.device("cpu"), 1, 64

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = iter(tokens)
        self.prompts: list[list[int]] = []

    def extend(self, extensions: list[Extension]) -> torch.Tensor:
        if len(extensions[0].ids) > 1:
            self.prompts.append(list(extensions[0].ids))
        return torch.nn.functional.one_hot(torch.tensor([next(self.tokens)]), 300).float()


@pytest.mark.parametrize("stop", STOP_IDS)
def test_an_answer_ends_with_a_turn_a_new_turn_or_a_document(tokenizer, stop):
    assert {IM_END_ID, IM_START_ID, DOCUMENT_START_ID} == set(STOP_IDS)
    words = tokenizer.encode("la mar")
    backend = Scripted([*words, stop, *words, IM_END_ID])
    greedy = SamplingConfig(temperature=0, max_new_tokens=20)
    session = ChatSession(Engine(backend, tokenizer), tokenizer, greedy)
    *_, last = session.answer("Hola")
    assert last == Finished("stop", Usage(len(backend.prompts[0]), len(words) + 1))
    assert session.history == [Message("user", "Hola"), Message("assistant", "la mar")]


def test_the_last_message_is_removed_with_its_answer(session):
    session.history = [*TURNS]
    assert session.undo() == "c" and session.history == TURNS[:2]
    session._unanswered = "e"  # its response was empty
    assert session.undo() == "e" and session.history == TURNS[:2]
    assert session.undo() == "a" and session.history == []
    with pytest.raises(UserError, match="There is no message to remove"):
        session.undo()


def test_a_reset_forgets_the_question_without_an_answer(tokenizer):
    engine = Engine(Scripted([IM_END_ID]), tokenizer)
    session = ChatSession(engine, tokenizer, SamplingConfig(temperature=0))
    session.system = "mar"
    text_of(session.answer("Hola"))
    assert session.history == []
    session.reset()
    assert session.system == "mar"
    with pytest.raises(UserError, match="There is no answer to redo"):
        text_of(session.redo())


def test_a_message_that_fills_the_context_is_refused_and_not_kept(session):
    session.history = TURNS[:2]
    with pytest.raises(ContextFullError, match=r"this message has \d+ tokens .* context of 64 leaves room for 56"):
        text_of(session.answer("la mar i el bosc " * 20))
    session.system = "xyz " * 60
    with pytest.raises(ContextFullError, match="and the system message"):
        text_of(session.redo())
    assert session.history == TURNS[:2]


def test_a_lone_surrogate_becomes_a_question_mark(session):
    text_of(session.answer("hola \udcff"))
    assert all("\udcff" not in message.content for message in session.messages())
    session.system = "\udcff"
    assert session.messages()[0] == Message("system", "?")


def test_a_cancelled_answer_is_kept_as_far_as_it_came(model, tokenizer):
    session = session_of(model, tokenizer, max_new_tokens=30)
    answer, text = session.answer("Hola"), ""
    while not text.strip():
        text += next(answer).text
    answer.close()
    assert session.history == [Message("user", "Hola"), Message("assistant", text)]
    assert isinstance(list(session.answer("Bon dia"))[-1], Finished)


@pytest.fixture
def scripted(session, monkeypatch):
    """A session with given answers; an exception among them is raised."""
    answers: list = []

    def respond(messages):
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return iter([TextDelta(answer), Finished("stop", Usage(1, 1))])

    monkeypatch.setattr(session, "_respond", respond)
    session.history = list(TURNS)
    return session, answers


def contents(session: ChatSession) -> str:
    return "".join(message.content for message in session.history)


def test_redo_replaces_the_last_answer_unless_the_response_is_empty(scripted):
    session, answers = scripted
    answers += ["e", "", KeyboardInterrupt(), "f"]
    assert text_of(session.redo()) == "e"
    assert contents(session) == "abce"
    assert text_of(session.redo()) == ""
    with pytest.raises(KeyboardInterrupt):
        text_of(session.redo())
    assert contents(session) == "abce"
    assert text_of(session.redo()) == "f"
    assert contents(session) == "abcf"


def test_redo_asks_an_unanswered_message_again(scripted):
    session, answers = scripted
    answers += ["", KeyboardInterrupt(), "h"]
    assert text_of(session.answer("g")) == ""
    with pytest.raises(KeyboardInterrupt):
        text_of(session.redo())
    assert contents(session) == "abcd"
    text_of(session.redo())
    assert contents(session) == "abcdgh"
    session.reset()
    with pytest.raises(UserError, match="There is no answer to redo"):
        text_of(session.redo())
