"""The Telegram bot against a local fake of the Bot API, with a scripted model."""

import asyncio
import contextlib
import json
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from aiogram.types import Message as TelegramMessage

from cucafera.config.errors import UserError
from cucafera.data.chatml import Message, render_prompt
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.request import ContextFullError, Finished, GenerationEvent, TextDelta, Usage
from cucafera.serving import telegram_api, telegram_bot
from cucafera.serving import telegram_messages as say
from cucafera.serving.telegram_api import TokenRefusedError, split_message, utf16_length
from cucafera.serving.telegram_bot import BotSettings, RateLimit, TelegramBot, create_bot, most_turns
from cucafera.serving.unanswered import Place, UnansweredFile
from tests.serving.bot_api import TOKEN, FakeBotApi, bad_gateway, hang, limited, refused, reset, too_many_requests

EVERYONE = BotSettings(anyone=True, per_minute=1000, slots=4)


class ScriptedModel:
    """Answers of all sessions, by message; without a script: how many turns came before, and the message.

    Attributes:
        answers: Words, or the error, by message.
        gates: By message: the answer is incomplete until the event is set.
        running: Messages that are being answered.
        most_running: Largest number of them so far.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[str] | Exception] = {}
        self.gates: dict[str, threading.Event] = {}
        self.running: list[str] = []
        self.most_running = 0
        self.sessions: list[ScriptedSession] = []

    def session(self) -> "ScriptedSession":
        self.sessions.append(ScriptedSession(self))
        return self.sessions[-1]


class ScriptedSession:
    """A stand-in for ChatSession."""

    def __init__(self, model: ScriptedModel) -> None:
        self.model = model
        self.system = ""
        self.history: list[str] = []  # messages and answers in turn

    def answer(self, text: str) -> Iterator[GenerationEvent]:
        yield from self._respond(text, self.history)

    def redo(self) -> Iterator[GenerationEvent]:
        if not self.history:
            raise UserError("There is no answer to redo.")
        yield from self._respond(self.history[-2], self.history[:-2])

    def reset(self) -> None:
        self.history = []

    def _respond(self, text: str, before: list[str]) -> Iterator[GenerationEvent]:
        model = self.model
        words = model.answers.get(
            text, [f"{len(before) // 2}:", f" {text}", f" ({self.system})" if self.system else ""]
        )
        if isinstance(words, Exception):
            raise words
        model.running.append(text)
        model.most_running = max(model.most_running, len(model.running))
        answer = ""
        try:
            for word in words:
                answer += word
                yield TextDelta(word)
            while text in model.gates and not model.gates[text].wait(0.005):
                yield TextDelta("")  # a decode step
            yield Finished("stop", Usage(1, 1))
        finally:
            model.running.remove(text)
            if answer.strip():
                self.history = [*before, text, answer]


class RunningBot:
    """A bot that runs against a fake."""

    def __init__(self, api: FakeBotApi, model: ScriptedModel, settings: BotSettings, file: Path | None) -> None:
        self.api = api
        self.model = model
        self.client = create_bot(TOKEN, api.url)
        self.stopping = asyncio.Event()
        self.bot = TelegramBot(self.client, model.session, settings, UnansweredFile(file))  # type: ignore[arg-type]
        self.drain_seconds = 5.0
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self.bot.run(self.stopping, self.drain_seconds)

    async def end(self) -> None:
        """Stop as SIGTERM does."""
        self.stopping.set()
        try:
            await asyncio.wait_for(self.task, 30)
        finally:
            await self.close()

    async def kill(self) -> None:
        """End without finishing anything, as SIGKILL does; only the model of the test must be let go."""
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if "TelegramBot" in repr(task.get_coro()) or task is self.task:
                task.cancel()
        for gate in self.model.gates.values():
            gate.set()
        await asyncio.wait({self.task})
        await self.close()

    async def close(self) -> None:
        session = self.client.session
        if session._session is not None:  # type: ignore[attr-defined]
            await session._session.close()  # type: ignore[attr-defined]  # without aiogram's pause


@contextlib.asynccontextmanager
async def running(
    settings: BotSettings = EVERYONE, model: ScriptedModel | None = None, file: Path | None = None
) -> AsyncIterator[tuple[FakeBotApi, ScriptedModel, RunningBot]]:
    model = model or ScriptedModel()
    async with FakeBotApi().running() as api:
        bot = RunningBot(api, model, settings, file)
        try:
            yield api, model, bot
            await bot.end()
        finally:
            for gate in model.gates.values():
                gate.set()
            bot.task.cancel()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telegram_api, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(telegram_bot, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(telegram_bot, "DRAFT_SECONDS", 0.02)
    monkeypatch.setattr(telegram_bot, "LAST_SECONDS", 1.0)


# Commands


def test_every_command_by_all_its_names():
    async def scenario() -> None:
        async with running() as (api, _, _):
            exchanges = [
                ("/start", "Hola, amb què et puc ajudar?"),
                ("/hello", "Hola, amb què et puc ajudar?"),
                ("/redo", say.NOTHING_TO_REDO),
                ("Bon dia", "0: Bon dia"),
                ("Què fas?", "1: Què fas?"),
                ("/redo", "1: Què fas?"),
                ("/repeteix", "1: Què fas?"),
                ("/reset", "Ja no recordo res."),
                ("Hola", "0: Hola"),
                ("/Reseteja@Cucafera_Bot", "Ja no recordo res."),
                ("/help", say.HELP),
                ("/ajuda", say.HELP),
                ("/stop", say.NOTHING_TO_STOP),
                ("/para", say.NOTHING_TO_STOP),
                ("/system Sigues breu.", say.ONLY_OWNERS),
                ("/tmp/x", "0: /tmp/x"),
                ("/nope", say.UNKNOWN_COMMAND),
                ("/nope x", say.UNKNOWN_COMMAND),
            ]
            for number, (text, answer) in enumerate(exchanges, 1):
                await api.say(text)
                assert (await api.received(number))[-1] == answer, text
            assert not any("parse_mode" in sent for _, sent in api.calls)
            names = [name for name, _ in api.calls if name != "sendChatAction"]
            assert names[:3] == ["getMe", "deleteWebhook", "setMyCommands"]
            assert "drop_pending_updates" not in api.calls[1][1] or api.calls[1][1]["drop_pending_updates"] == "false"
            menu = {entry["command"] for entry in json.loads(api.calls[2][1]["commands"])}
            assert menu == set(say.MENU) <= set(say.COMMANDS)

    run(scenario)


def test_only_owners_set_the_system_message_of_a_chat():
    async def scenario() -> None:
        async with running(BotSettings(owners=frozenset({7}), allowed=frozenset({8}), per_minute=99)) as (api, _, _):
            exchanges = [
                ("/system", say.NO_SYSTEM),
                ("/system Sigues breu.\nI amable.", say.SYSTEM_IS.format("Sigues breu.\nI amable.")),
                ("Hola", "0: Hola (Sigues breu.\nI amable.)"),
                ("/reset", say.FORGOTTEN),
                ("/system", say.SYSTEM_IS.format("Sigues breu.\nI amable.")),
                ("/system -", say.NO_SYSTEM),
                ("Hola", "0: Hola"),
                ("/help", say.HELP_FOR_OWNERS),
            ]
            for number, (text, answer) in enumerate(exchanges, 1):
                await api.say(text)
                assert (await api.received(number))[-1] == answer
            await api.say("/system Sigues dolent.", chat=8)
            await api.say("Hola", chat=8)
            assert await api.received(2, chat=8) == [say.ONLY_OWNERS, "0: Hola"]

    run(scenario)


# Order and concurrency


def test_two_chats_are_answered_at_the_same_time_and_one_in_its_order():
    async def scenario() -> None:
        async with running() as (api, model, _):
            model.gates = {"primer": threading.Event(), "altre": threading.Event()}
            await api.say("primer")
            await api.say("/reset")
            await api.say("segon")
            await api.say("altre", chat=8)
            await api.until(lambda: len(model.running) == 2)
            await asyncio.sleep(0.05)
            assert model.running == ["primer", "altre"] and not api.texts(None)
            model.gates["primer"].set()
            assert await api.received(3) == ["0: primer", "Ja no recordo res.", "0: segon"]
            assert model.running == ["altre"]
            model.gates["altre"].set()
            assert await api.received(1, chat=8) == ["0: altre"]

    run(scenario)


def test_no_more_answers_than_slots_are_generated_at_the_same_time(monkeypatch):
    monkeypatch.setattr(telegram_bot, "MAX_WAITING", 3)

    async def scenario() -> None:
        async with running(BotSettings(anyone=True, slots=2)) as (api, model, _):
            model.gates = {f"{chat}": threading.Event() for chat in range(1, 7)}
            for chat in range(1, 7):  # two run, three wait, one is too many
                await api.say(f"{chat}", chat=chat)
            assert await api.received(1, chat=6) == [say.BUSY]
            await api.until(lambda: len(model.running) == 2)
            for gate in model.gates.values():
                gate.set()
            await api.received(6, chat=None)
            assert model.most_running == 2
            assert [api.texts(chat) for chat in range(1, 6)] == [[f"0: {chat}"] for chat in range(1, 6)]

    run(scenario)


def test_stop_ends_the_running_answer_at_once_and_keeps_it_as_far_as_it_came():
    async def scenario() -> None:
        async with running(BotSettings(anyone=True, slots=1)) as (api, model, _):
            model.gates = {"conta": threading.Event(), "espera": threading.Event()}
            model.answers["conta"] = ["Hi havia", " una vegada"]
            await api.say("conta")
            await api.until(lambda: model.running == ["conta"])
            await api.say("espera", chat=8)  # for the only slot
            await api.until(lambda: api.count("sendChatAction") >= 1 and not api.updates)
            await api.say("/para", chat=8)
            assert await api.received(1, chat=8) == [say.STOPPED]
            await api.say("/stop")
            assert await api.received(1) == ["Hi havia una vegada"]
            await api.say("i què més?")
            assert (await api.received(2))[1] == "1: i què més?"
            model.answers["buit"] = [" "]
            model.gates["buit"] = threading.Event()
            await api.say("buit")
            await api.say("/stop")  # in one batch perhaps, before the answer has begun
            assert (await api.received(3))[2] == say.STOPPED
            assert len(model.sessions[0].history) == 4

    run(scenario)


# Progress


def test_an_answer_is_shown_as_a_draft_that_grows_and_sent_when_it_is_complete():
    async def scenario() -> None:
        async with running() as (api, model, _):
            model.gates["conta"] = threading.Event()
            model.answers["conta"] = ["Hi havia", " una vegada"]
            asked = await api.say("conta")
            await api.until(lambda: "Hi havia una vegada" in api.texts(method="sendMessageDraft"))
            assert not api.texts()
            await api.add_update({"stopped_message_generation": {"chat": {"id": 7, "type": "private"}, "draft_id": 99}})
            await asyncio.sleep(0.05)
            assert not api.texts()  # that was a draft from before
            await api.add_update(
                {"stopped_message_generation": {"chat": {"id": 7, "type": "private"}, "draft_id": asked}}
            )
            assert await api.received(1) == ["Hi havia una vegada"]
            drafts = [sent for name, sent in api.calls if name == "sendMessageDraft"]
            assert {draft["draft_id"] for draft in drafts} == {str(asked)}
            assert api.calls[-1][0] == "sendMessage"

    run(scenario)


def test_where_drafts_are_refused_the_bot_is_shown_typing(monkeypatch):
    monkeypatch.setattr(telegram_bot, "TYPING_SECONDS", 0.03)

    async def scenario() -> None:
        async with running() as (api, model, _):
            api.failures["sendMessageDraft"] = [refused(404, "Not Found: method not found")]
            api.failures["sendChatAction"] = [limited(1), bad_gateway]  # not worth a retry, nor an answer's end
            model.gates = {"conta": threading.Event(), "grup @cucafera_bot": threading.Event()}
            await api.say("conta")
            await api.until(lambda: api.count("sendChatAction") >= 3)
            assert api.requests["sendMessageDraft"] == 1 and not api.texts(method="sendMessageDraft")
            model.gates["conta"].set()
            await api.received(1)
            await api.say("@cucafera_bot hola", chat=-5, user=7)
            await api.received(1, chat=-5)
            assert api.requests["sendMessageDraft"] == 1  # groups have no drafts

    run(scenario)


# Failures of Telegram


def test_a_message_survives_rate_limits_failures_and_resets_in_its_order():
    async def scenario() -> None:
        async with running() as (api, _, _):
            api.failures["getMe"] = [bad_gateway, reset]
            api.failures["sendMessage"] = [limited(1), reset, bad_gateway, refused(500, "Internal Server Error")]
            await api.say("u")
            await api.say("dos")
            start = time.monotonic()
            assert await api.received(2) == ["0: u", "1: dos"]
            assert time.monotonic() - start > 0.9  # as long as Telegram asks
            assert api.requests["sendMessage"] == 6

    run(scenario)


def test_every_rate_limit_is_waited_out_even_without_a_time(monkeypatch):
    monkeypatch.setattr(telegram_api, "FIRST_RETRY_SECONDS", 0.1)

    async def scenario() -> None:
        async with running() as (api, _, _):
            api.failures["sendMessage"] = [limited(0), limited(None), too_many_requests]
            api.failures["getUpdates"] = [limited(0), limited(None)]
            await api.say("hola")
            start = time.monotonic()
            assert await api.received(1) == ["0: hola"]
            assert time.monotonic() - start > 0.29

    run(scenario)


def test_a_stop_while_an_answer_waits_to_be_sent_stops_nothing():
    async def scenario() -> None:
        async with running() as (api, model, _):
            api.failures["sendMessage"] = [limited(1)]
            model.gates["segon"] = threading.Event()
            model.gates["segon"].set()
            await api.say("primer")
            await api.until(lambda: not api.failures["sendMessage"])
            await api.say("segon")
            await api.say("/stop")
            await api.until(lambda: not api.updates)
            assert await api.received(2) == ["0: primer", "1: segon"]
            model.gates["tercer"] = threading.Event()
            model.answers["tercer"] = ["Hi havia"]
            await api.say("tercer")
            await api.until(lambda: model.running == ["tercer"])
            await api.say("/stop")
            assert (await api.received(3))[2] == "Hi havia"

    run(scenario)


def test_a_request_without_a_response_is_repeated(monkeypatch):
    monkeypatch.setattr(telegram_api, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(telegram_api.call, "__defaults__", (0.2,))
    monkeypatch.setattr(telegram_api.call_once, "__defaults__", (0.2,))

    async def scenario() -> None:
        async with running() as (api, _, _):
            api.failures["sendMessage"] = [hang]
            await api.say("hola")
            assert await api.received(1) == ["0: hola"]

    run(scenario)


def test_updates_are_received_again_after_failures(monkeypatch, caplog):
    async def scenario() -> None:
        async with running() as (api, _, _):
            api.failures["getUpdates"] = [bad_gateway, reset, refused(409, "Conflict"), limited(1), refused(500, "x")]
            api.failures["setMyCommands"] = [refused(400, "Bad Request")]
            await api.say("hola")
            assert await api.received(1) == ["0: hola"]
            await api.say("adéu")
            await api.received(2)
            await asyncio.sleep(0.05)
            assert api.texts() == ["0: hola", "1: adéu"]  # and none of them twice

    run(scenario)


def test_a_message_that_telegram_refuses_does_not_keep_the_next_from_being_sent():
    async def scenario() -> None:
        async with running() as (api, _, _):
            api.failures["sendMessage"] = [refused(403, "Forbidden: bot was blocked by the user")]
            await api.say("u")
            await api.say("dos")
            assert await api.received(1) == ["1: dos"]
            moved = refused(400, "Bad Request: group chat was upgraded", parameters={"migrate_to_chat_id": -100})
            api.failures["sendMessage"] = [moved]
            await api.say("/start", chat=-5, user=7)
            assert await api.received(1, chat=-100) == [say.GREETING]

    run(scenario)


def test_an_update_that_cannot_be_read_is_left_out(caplog):
    async def scenario() -> None:
        async with running() as (api, _, _):
            await api.add_update({"message": {"message_id": "not a number"}})
            await api.say("hola")
            assert await api.received(1) == ["0: hola"]

    run(scenario)
    assert "Update 1000 is of a kind that aiogram cannot read" in caplog.text


def test_a_fault_in_handling_an_update_does_not_end_the_bot(monkeypatch, caplog):
    text_for_me = TelegramBot._text_for_me

    def fail(bot: TelegramBot, message: TelegramMessage) -> str | None:
        if message.text == "defecte":
            raise KeyError
        return text_for_me(bot, message)

    monkeypatch.setattr(TelegramBot, "_text_for_me", fail)

    async def scenario() -> None:
        async with running() as (api, _, _):
            await api.say("defecte")
            await api.say("hola")
            assert await api.received(1) == ["0: hola"]

    run(scenario)
    assert "An update could not be handled" in caplog.text


def test_a_token_that_is_refused_and_another_program_end_the_bot(monkeypatch):
    monkeypatch.setattr(telegram_bot, "CONFLICT_SECONDS", 0.05)

    async def revoked() -> None:
        async with running() as (api, _, bot):
            await api.say("hola")
            await api.received(1)
            api.token = "another"
            await api.say("hola")
            await asyncio.wait({bot.task}, timeout=10)

    with pytest.raises(TokenRefusedError):
        run(revoked)

    async def shared() -> None:
        async with running() as (api, _, bot):
            api.failures["getUpdates"] = [refused(409, "Conflict: terminated by other getUpdates request")] * 100
            await asyncio.wait({bot.task}, timeout=10)

    with pytest.raises(UserError, match="Another program receives this bot's messages"):
        run(shared)


# Texts


def test_a_long_answer_comes_in_several_messages():
    async def scenario() -> None:
        async with running() as (api, model, _):
            text = " ".join(f"Frase número {number} 🐉." for number in range(500))
            model.answers["llarg"] = [text]
            await api.say("llarg")
            await api.until(lambda: " ".join(api.texts()) == text)
            assert len(api.texts()) == 3
            assert all(part.endswith("🐉.") for part in api.texts())

    run(scenario)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("curt", ["curt"]),
        ("  curt \n", ["curt"]),
        (" \n ", []),
        ("un paràgraf\n\nun altre", ["un paràgraf", "un altre"]),
        ("una ratlla\nuna altra. Fi", ["una ratlla", "una altra. Fi"]),
        ("Una frase. Una altra", ["Una frase.", "Una altra"]),
        ("Què?» I ara un altre", ["Què?» I ara un", "altre"]),  # a sentence that ends too early
        ("Digué: «Hola.» I res", ["Digué: «Hola.»", "I res"]),
        ("paraules sense punts", ["paraules sense", "punts"]),
        ("unaparaulasenseespais", ["unaparaulasense", "espais"]),
        ("exactament quin ze", ["exactament quin", "ze"]),
        ("🐉🐉🐉🐉🐉🐉🐉🐉", ["🐉🐉🐉🐉🐉🐉🐉", "🐉"]),
    ],
)
def test_a_text_is_cut_at_paragraphs_lines_sentences_or_words(text, parts):
    assert split_message(text, 15) == parts


def test_parts_of_any_text_fit_and_lose_only_spaces():
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(generator.choices(["a", "bé", " ", "\n", "\n\n", ". ", "🐉", "·"], k=generator.randrange(200)))
        parts = split_message(text, 16)
        assert all(0 < len(part.encode("utf-16-le")) // 2 == utf16_length(part) <= 16 for part in parts)
        assert "".join("".join(parts).split()) == "".join(text.split())
        assert all(part == part.strip() for part in parts)


def test_what_cannot_be_answered_is_answered_by_a_sentence(caplog):
    async def scenario() -> None:
        async with running() as (api, model, _):
            model.answers = {
                "buit": ["", " "],
                "llarg": ContextFullError("this message has 5,000 tokens", 5000, 2048),
                "error": UserError("something else"),
                "defecte": RuntimeError("CUDA error"),
            }
            for number, text in enumerate([*model.answers, "hola"], 1):
                await api.say(text)
                await api.received(number)
            assert api.texts() == [say.EMPTY, say.TOO_LONG, say.FAILED, say.FAILED, "0: hola"]

    run(scenario)


def test_what_is_no_text_is_answered_by_one_sentence_per_minute():
    async def scenario() -> None:
        async with running() as (api, _, _):
            photo = {"photo": [{"file_id": "x", "file_unique_id": "x", "width": 1, "height": 1}], "caption": "mira"}
            for _ in range(5):  # an album
                await api.say(None, media_group_id="1", **photo)
            await api.say(None, chat=8, voice={"file_id": "x", "file_unique_id": "x", "duration": 1})
            await api.say(None, chat=9, new_chat_title="un altre nom")
            await api.say("ho he editat", chat=10, edited=True, edit_date=1_700_000_001)
            await api.say("hola", chat=9)
            assert await api.received(1, chat=9) == ["0: hola"]
            assert await api.received(1, chat=7) == await api.received(1, chat=8) == [say.ONLY_TEXT]
            assert await api.received(1, chat=10) == [say.EDITED]

    run(scenario)


# Who may use it


def test_who_is_not_allowed_gets_a_number_and_no_answer(caplog):
    caplog.set_level(logging.INFO)
    settings = BotSettings(allowed=frozenset({8, -5}), owners=frozenset({9}), per_minute=99)

    async def scenario() -> None:
        async with running(settings) as (api, model, _):
            await api.say("hola")
            await api.say("/reset")
            await api.say("hola", chat=8)
            await api.say("hola", chat=9)
            await api.say("@cucafera_bot hola", chat=-5, user=7)  # anyone, in a group that is allowed
            await api.say("@cucafera_bot hola", chat=-6, user=8)  # one that is allowed, in any group
            await api.say("@cucafera_bot hola", chat=-6, user=7)
            await api.until(lambda: len(api.texts(-6)) == 2)
            assert [api.texts(chat) for chat in (8, 9, -5)] == [["0: hola"]] * 3
            assert sorted(api.texts(-6)) == ["0: hola", say.NOT_ALLOWED.format(-6)]
            assert api.texts(7) == [say.NOT_ALLOWED.format(7)]
            assert len(model.sessions) == 4

    run(scenario)
    assert "Chat 7 is not allowed: --allow 7 lets it in" in caplog.text
    assert not BotSettings().allows(7, 8)


def test_a_user_that_is_too_fast_is_asked_to_wait_once_and_can_still_stop():
    async def scenario() -> None:
        async with running(BotSettings(anyone=True, per_minute=3)) as (api, model, _):
            model.gates["3"] = threading.Event()
            for number in range(1, 6):
                await api.say(f"{number}")
            await api.say("hola", chat=8)
            await api.received(1, chat=8)
            await api.until(lambda: model.running == ["3"])
            await api.say("/stop")
            await api.received(4)
            await api.say("/stop")  # there is nothing to stop: it counts
            await api.say("hola", chat=9)
            await api.received(1, chat=9)
            assert sorted(api.texts()) == ["0: 1", "1: 2", "2: 3", say.TOO_FAST.format(60)]

    run(scenario)


def test_a_rate_limit_is_a_sliding_window_per_user(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(telegram_bot.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(telegram_bot, "MAX_COUNTED", 2)
    limit = RateLimit(2, 60.0)
    assert [limit.wait("a"), limit.wait("a"), limit.wait("a"), limit.wait("b")] == [0, 0, 60, 0]
    now[0] += 30
    assert limit.wait("a") == 30
    now[0] += 30
    assert [limit.wait("a"), limit.wait("a"), limit.wait("a")] == [0, 0, 60]
    assert [limit.wait("c"), limit.wait("d"), limit.wait("a")] == [0, 0, 0]  # only two are remembered


def test_in_a_group_only_what_is_meant_for_the_bot_is_answered():
    async def scenario() -> None:
        async with running() as (api, model, _):
            mine = {"message_id": 1, "date": 1, "chat": {"id": -5, "type": "supergroup"}, "text": "x"}
            mine["from"] = {"id": 4242, "is_bot": True, "first_name": "Cucafera"}
            other_bot = {"from": {"id": 5, "is_bot": True, "first_name": "Altre"}}
            ignored = ["hola", "/nope", "/reset@altre_bot", "@cucafera_bots hola", "x@cucafera_bot"]
            for text in ignored:
                await api.say(text, chat=-5)
            await api.say("@cucafera_bot hola", chat=-5, **other_bot)
            asked = await api.say("hola, @Cucafera_bot, què tal?", chat=-5, user=7)
            await api.say("i això?", chat=-5, user=8, reply_to_message=mine)
            await api.say("/reset@cucafera_bot", chat=-5, user=8)
            await api.say("/hello", chat=-5, user=8)
            await api.say("@cucafera_bot", chat=-5, user=8)
            await api.say("/nope@cucafera_bot", chat=-5, user=8)
            await api.say("@cucafera_bot tema", chat=-5, user=8, message_thread_id=3, is_topic_message=True)
            expected = ["0: hola, què tal?", "1: i això?", say.FORGOTTEN, say.GREETING, say.GREETING]
            texts = await api.received(7, chat=-5)
            assert [text for text in texts if text != "0: tema"] == [*expected, say.UNKNOWN_COMMAND]
            sent = [sent for name, sent in api.calls if name == "sendMessage"]
            assert json.loads(sent[0]["reply_parameters"])["message_id"] == asked
            assert [message["text"] for message in sent if message.get("message_thread_id") == "3"] == ["0: tema"]
            assert len(model.sessions) == 2  # the group and its topic

    run(scenario)


def test_the_longest_idle_chats_are_forgotten(monkeypatch):
    monkeypatch.setattr(telegram_bot, "MAX_CHATS", 2)

    async def scenario() -> None:
        async with running() as (api, model, bot):

            async def until_idle(but: int) -> None:
                """Wait until no more chats than that have something to do: a task ends after its message."""
                await api.until(lambda: sum(chat.updates for chat in bot.bot._conversations.values()) <= but)

            model.gates["a"] = threading.Event()
            await api.say("a", chat=1)  # the longest, but not idle
            for chat in (2, 3):
                await api.say("b", chat=chat)
                await api.received(1, chat=chat)
                await until_idle(but=1)
            model.gates["a"].set()
            await api.received(1, chat=1)
            for chat in (1, 3, 2):
                await api.say("d", chat=chat)
                await api.received(2, chat=chat)
                await until_idle(but=0)
            assert [api.texts(chat)[1] for chat in (1, 3, 2)] == ["1: d", "1: d", "0: d"]
            assert len(bot.bot._conversations) == 2

    run(scenario)


def test_no_chat_is_forgotten_before_there_are_too_many(monkeypatch):
    monkeypatch.setattr(telegram_bot, "MAX_CHATS", 10)

    async def scenario() -> None:
        bot = TelegramBot(create_bot(TOKEN, None), ScriptedModel().session, EVERYONE, UnansweredFile(None))  # type: ignore[arg-type]
        places = [Place(chat, None, is_private=True) for chat in range(12)]
        for place in places[:7]:
            bot._conversation(place).updates = 1
        for conversation in bot._conversations.values():  # all become idle at the same time
            conversation.updates = 0
        for number, place in enumerate(places[7:10], 8):
            bot._conversation(place)
            assert len(bot._conversations) == number
        bot._conversation(places[10])
        bot._conversation(places[11])
        assert list(bot._conversations) == places[2:]

    run(scenario)


def test_a_chat_keeps_its_last_turns():
    async def scenario() -> None:
        async with running(BotSettings(anyone=True, turns=2)) as (api, model, _):
            for number, text in enumerate(["a", "b", "c", "d", "/redo"], 1):
                await api.say(text)
                await api.received(number)
            assert api.texts() == ["0: a", "1: b", "2: c", "2: d", "1: d"]
            assert model.sessions[0].history == ["c", "2: c", "d", "1: d"]

    run(scenario)


def test_no_more_turns_fit_the_context_than_are_kept():
    shortest = [Message("user", "a"), Message("assistant", "b")]
    tokens = len(render_prompt(shortest * 257, Tokenizer.train(["user\nassistant\n"] * 9, 300)))
    assert most_turns(2048) == 257 and tokens > 2048 and most_turns(1) == 1


# The end and the restart


async def restarted(api: FakeBotApi, file: Path | None = None) -> RunningBot:
    return RunningBot(api, ScriptedModel(), EVERYONE, file)


def test_at_its_end_the_bot_finishes_what_it_has_received_and_the_next_one_does_the_rest():
    async def scenario() -> None:
        async with FakeBotApi().running() as api:
            model = ScriptedModel()
            bot = RunningBot(api, model, EVERYONE, None)
            model.gates["primer"] = threading.Event()
            await api.say("primer")
            await api.say("segon")
            await api.until(lambda: model.running == ["primer"])
            bot.stopping.set()
            await asyncio.sleep(0.1)
            await api.say("tercer")  # it is left for the next
            model.gates["primer"].set()
            await bot.end()
            assert api.texts() == ["0: primer", "1: segon"]
            bot = await restarted(api)
            await api.received(3)
            await bot.end()
            assert api.texts() == ["0: primer", "1: segon", "0: tercer"]

    run(scenario)


def test_what_takes_too_long_at_the_end_is_sent_as_far_as_it_came():
    async def scenario() -> None:
        async with FakeBotApi().running() as api:
            model = ScriptedModel()
            bot = RunningBot(api, model, EVERYONE, None)
            bot.drain_seconds = 0.1
            model.gates["primer"] = threading.Event()
            await api.say("primer")
            await api.say("segon")
            await api.say("tercer", chat=8)
            await api.until(lambda: model.running == ["primer"] and bool(api.texts(8)))
            await bot.end()
            assert api.texts() == ["0: primer", say.SHUTTING_DOWN]
            bot = await restarted(api)
            await api.until(lambda: api.requests["getMe"] == 2 and len(api.offsets) > 2)
            await bot.end()
            assert len(api.texts(None)) == 3

    run(scenario)


def test_a_bot_that_was_killed_answers_what_was_left_and_nothing_twice(tmp_path):
    file = tmp_path / "unanswered.json"

    async def scenario() -> None:
        async with FakeBotApi().running() as api:
            model = ScriptedModel()
            bot = RunningBot(api, model, EVERYONE, file)
            model.gates["primer"] = threading.Event()
            await api.say("primer")
            await api.say("segon")
            await api.say("altre", chat=8)
            await api.received(1, chat=8)
            await api.until(lambda: not api.updates)  # all were acknowledged
            await api.until(lambda: "altre" not in file.read_text())  # or it would be answered again
            assert file.stat().st_mode & 0o777 == 0o600
            await bot.kill()
            assert not api.texts()
            await api.say("tercer")
            bot = await restarted(api, file)
            assert await api.received(3) == ["0: primer", "1: segon", "2: tercer"]
            await bot.end()
            assert api.texts(8) == ["0: altre"]
            assert json.loads(file.read_text())["unanswered"] == []

    run(scenario)


def test_an_update_that_comes_again_after_a_kill_is_not_answered_again(tmp_path):
    async def scenario() -> None:
        async with FakeBotApi().running() as api:
            bot = RunningBot(api, ScriptedModel(), EVERYONE, tmp_path / "file")
            await api.say("hola")
            await api.received(1)
            await bot.end()
            again = {"message_id": 2, "date": 1, "chat": {"id": 7, "type": "private"}, "text": "hola"}
            sender = {"id": 7, "is_bot": False, "first_name": "Pau"}
            api.updates = [{"update_id": 1000, "message": again | {"from": sender}}]  # the acknowledgement was lost
            bot = await restarted(api, tmp_path / "file")
            await api.say("adéu")
            await api.received(2)
            await bot.end()
            assert api.texts() == ["0: hola", "0: adéu"]

    run(scenario)


def test_a_question_that_kills_the_program_twice_is_given_up(tmp_path):
    async def scenario() -> None:
        async with FakeBotApi().running() as api:
            await api.say("defecte")
            for _ in range(2):
                model = ScriptedModel()
                model.gates["defecte"] = threading.Event()
                bot = RunningBot(api, model, EVERYONE, tmp_path / "file")
                await api.until(lambda model=model: model.running == ["defecte"] and not api.updates)
                await asyncio.sleep(0.05)
                await bot.kill()
            bot = await restarted(api, tmp_path / "file")
            assert await api.received(1) == [say.FAILED]
            await bot.end()
            bot = await restarted(api, tmp_path / "file")
            await api.say("hola")
            assert await api.received(2) == [say.FAILED, "0: hola"]
            await bot.end()

    run(scenario)


@pytest.mark.parametrize("content", ["x", "[]", '{"unanswered": [{}], "last_batch": []}', '{"unanswered": 1}'])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "file").write_text(content)
    with pytest.raises(UserError, match="is not a file of unanswered questions: remove it"):
        UnansweredFile(tmp_path / "file")
    assert (tmp_path / "file").read_text() == content


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    with pytest.raises(UserError, match="nowhere/file cannot be written"):
        UnansweredFile(tmp_path / "nowhere" / "file")


# The log


def test_texts_are_logged_only_if_asked_for(caplog):
    caplog.set_level(logging.INFO)

    async def scenario(settings: BotSettings) -> None:
        async with running(settings) as (api, _, _):
            await api.say("un secret")
            await api.received(1)

    run(lambda: scenario(EVERYONE))
    assert "an answer of 12 characters" in caplog.text and "secret" not in caplog.text
    run(lambda: scenario(BotSettings(anyone=True, logs_texts=True)))
    assert "'un secret' is answered by '0: un secret'" in caplog.text
