"""The Telegram bot: updates in, answers of a chat model out.

Updates are handled at the same time; those of one chat in the order in which they came, by a lock per chat. Only /stop
does not wait: it ends the answer that is being written. Answers are generated in worker threads, one per slot of the
engine; the others wait for a slot in asyncio, so that /stop reaches them too.
"""

import asyncio
import contextlib
import logging
import math
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiogram import Bot
from aiogram.client.telegram import PRODUCTION, TelegramAPIServer
from aiogram.exceptions import AiogramError, TelegramAPIError, TelegramConflictError, TelegramRetryAfter
from aiogram.methods import DeleteWebhook, GetMe, SendChatAction, SendMessage, SendMessageDraft, SetMyCommands
from aiogram.types import BotCommand, LinkPreviewOptions, Message, ReplyParameters, Update, User

from cucafera.config.errors import UserError
from cucafera.generation.request import (
    ContextFullError,
    GenerationEvent,
    QueueFullError,
    StoppingError,
    TextDelta,
    WaitedTooLongError,
)
from cucafera.quantities import number_of
from cucafera.serving import telegram_messages as say
from cucafera.serving.telegram_api import (
    FAILURES,
    FIRST_RETRY_SECONDS,
    LONGEST_RETRY_SECONDS,
    RateLimitedSession,
    TokenRefusedError,
    call,
    call_once,
    get_updates,
    reason,
    split_message,
)
from cucafera.serving.unanswered import PendingQuestion, Place, UnansweredFile

if TYPE_CHECKING:
    from cucafera.generation.session import ChatSession

log = logging.getLogger(__name__)

REFUSALS: dict[type[UserError], str] = {
    ContextFullError: say.TOO_LONG,
    QueueFullError: say.BUSY,
    WaitedTooLongError: say.BUSY,
    StoppingError: say.SHUTTING_DOWN,
}
"""What a person reads when the engine refuses a request, or ends it."""
COMMAND = re.compile(r"/(?P<name>\w+)(?:@(?P<bot>\w+))?(?:\s+(?P<argument>.*))?", re.DOTALL)
NOTHING = "-"
"""The argument of /system that removes the system message."""
MEDIA = set(
    "animation audio document live_photo paid_media photo sticker story video video_note voice checklist contact dice "
    "game poll venue location".split()
)
"""Content that a person sends and the model cannot read; other messages without text are Telegram's own."""
UPDATES = ["message", "edited_message", "stopped_message_generation"]
"""The kinds of updates that are asked for."""

FEWEST_TOKENS = 8
"""Tokens of a turn without contents, at least: two messages with two control tokens, a role and a line end each."""
MAX_CHATS = 1000
"""Number of chats whose history is in memory; of more, the longest idle are forgotten."""
MAX_COUNTED = 10_000
"""Number of users whose messages are counted for the rate limit; of more, the longest idle are not."""
MAX_WAITING = 64
"""Number of questions that wait for a slot, or for an earlier message of their chat."""
POLL_SECONDS = 50
"""How long Telegram waits for an update before it responds that there is none."""
DRAFT_SECONDS = 1.0
"""Time between two drafts of an answer that is being written."""
TYPING_SECONDS = 4.0
"""Time between two chat actions: Telegram shows one for 5 seconds."""
CONFLICT_SECONDS = 60.0
"""How long another program may receive the bot's updates: one that was just killed seems to for a while."""
LAST_SECONDS = 5.0
"""Time in which answers that the end of the program cuts off are sent."""


def most_turns(context: int) -> int:
    """Return the number of turns of which no more fit a context of that many tokens, plus one."""
    return context // FEWEST_TOKENS + 1


def create_bot(token: str, api_url: str | None) -> Bot:
    """Return aiogram's client of the Bot API at a URL; None: Telegram's own."""
    server = TelegramAPIServer.from_base(api_url) if api_url else PRODUCTION
    return Bot(token, session=RateLimitedSession(api=server))


@dataclass(frozen=True)
class BotSettings:
    """Settings of a bot.

    Attributes:
        allowed: Ids of the users and groups that it answers.
        anyone: It answers everyone.
        owners: Ids of the users that may set the system message of a chat; they are allowed.
        per_minute: Maximum number of messages of a user per minute.
        slots: Number of answers that are generated at the same time; no more than the engine has.
        turns: Number of turns of a conversation that are kept, as pairs of a message and its answer.
        logs_texts: Messages and answers are logged.
    """

    allowed: frozenset[int] = frozenset()
    anyone: bool = False
    owners: frozenset[int] = frozenset()
    per_minute: int = 20
    slots: int = 1
    turns: int = 1000
    logs_texts: bool = False

    def allows(self, *ids: int) -> bool:
        """Return True if the user or the chat with one of these ids may use the bot."""
        return self.anyone or not (self.allowed | self.owners).isdisjoint(ids)


class RateLimit:
    """Counts events per key in a sliding window.

    Args:
        count: Maximum number of events of a key in a window.
        seconds: Length of the window.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self._count = count
        self._seconds = seconds
        self._times: OrderedDict[Hashable, deque[float]] = OrderedDict()

    def wait(self, key: Hashable) -> float:
        """Count an event and return 0; or return the seconds until the key may have another one."""
        now = time.monotonic()
        times = self._times.setdefault(key, deque())
        self._times.move_to_end(key)
        if len(self._times) > MAX_COUNTED:
            self._times.popitem(last=False)
        while times and times[0] <= now - self._seconds:
            times.popleft()
        if len(times) >= self._count:
            return times[0] + self._seconds - now
        times.append(now)
        return 0.0


class PendingAnswer:
    """An answer that waits for its turn, or is being generated.

    Args:
        question: The message; for /redo, that command.
        respond: Starts the response; called in a worker thread.

    Attributes:
        text: The answer as far as it is generated.
    """

    def __init__(self, question: PendingQuestion, respond: Callable[[], Iterator[GenerationEvent]]) -> None:
        self.question = question
        self.text = ""
        self._respond = respond
        self._stop = threading.Event()
        self._waiting: asyncio.Future[Any] | None = None

    @property
    def is_stopped(self) -> bool:
        """True if `stop` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End it: at once while it waits, else within a token."""
        self._stop.set()
        if self._waiting is not None:
            self._waiting.cancel()

    async def generate(self, slots: asyncio.Semaphore, threads: ThreadPoolExecutor) -> None:
        """Wait for a slot, and generate the answer in a thread. Raises UserError as the session does."""
        if self.is_stopped:
            return
        self._waiting = asyncio.ensure_future(slots.acquire())
        await asyncio.wait({self._waiting})
        if self._waiting.cancelled():
            return
        try:
            await asyncio.get_running_loop().run_in_executor(threads, self._generate)
        finally:
            slots.release()

    def _generate(self) -> None:
        events = self._respond()
        try:
            while not self.is_stopped and (event := next(events, None)) is not None:
                if isinstance(event, TextDelta):
                    self.text += event.text
        finally:
            events.close()  # type: ignore[attr-defined]


@dataclass
class Conversation:
    """The state of a place.

    Attributes:
        session: History and settings.
        lock: Held for the update that is being handled; the others wait in the order of their arrival.
        updates: Number of updates that are being handled, or wait.
        answers: The answers to these updates that are not complete, in their order.
        is_sending: An answer is complete, and being sent.
        takes_drafts: Telegram has not refused to show drafts here.
    """

    session: "ChatSession"
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    updates: int = 0
    answers: deque[PendingAnswer] = field(default_factory=deque)
    is_sending: bool = False
    takes_drafts: bool = True


class TelegramBot:
    """A bot that answers with a chat model. Make it in the event loop that runs it.

    Args:
        bot: aiogram's client of the Bot API.
        new_session: Makes the session of a conversation.
        settings: Who may use it, and how much.
        unanswered: Keeps questions until they are answered.
    """

    def __init__(
        self, bot: Bot, new_session: "Callable[[], ChatSession]", settings: BotSettings, unanswered: UnansweredFile
    ) -> None:
        self._bot = bot
        self._new_session = new_session
        self._settings = settings
        self._unanswered = unanswered
        self._me: User
        self._offset: int | None = None
        self._conversations: OrderedDict[Place, Conversation] = OrderedDict()
        self._rate = RateLimit(settings.per_minute, 60.0)
        self._notices = RateLimit(1, 60.0)
        self._slots = asyncio.Semaphore(settings.slots)
        self._threads = ThreadPoolExecutor(settings.slots, thread_name_prefix="answer")
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_ending = False

    async def run(self, stopping: asyncio.Event, drain_seconds: float) -> None:
        """Answer until `stopping` is set; then finish what was received until then.

        Args:
            stopping: Set it to end the bot.
            drain_seconds: Time for that; answers that take longer are sent as far as they came.

        Raises:
            UserError: Telegram refuses the token or cannot be reached, or another program receives the bot's updates.
        """
        receiving = asyncio.create_task(self._receive())
        stopped = asyncio.create_task(stopping.wait())
        try:
            ends: set[asyncio.Future[Any]] = {receiving, stopped, self._failure}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            receiving.cancel()
            await asyncio.wait({receiving})
            await self._drain(drain_seconds)
            for ended in (receiving, self._failure):
                if ended.done() and not ended.cancelled():
                    ended.result()
        except (AiogramError, OSError) as error:
            raise UserError(f"Telegram cannot be reached: {reason(error)}") from None
        finally:
            stopped.cancel()
            self._failure.cancel()
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _receive(self) -> None:
        """Receive updates, and begin to handle each."""
        self._me = await call(self._bot, GetMe())
        await call(self._bot, DeleteWebhook(drop_pending_updates=False))  # while there is one, updates go there
        menu = [BotCommand(command=name, description=meaning) for name, meaning in say.MENU.items()]
        try:
            await call_once(self._bot, SetMyCommands(commands=menu))
        except (TelegramAPIError, *FAILURES) as error:
            log.warning("Telegram does not take the menu of commands: %s", reason(error))
        again, given_up = await self._unanswered.take_up()
        for question in again:
            self._ask(question, is_new=False)
        for question in given_up:
            self._spawn(self._send(question.place, say.FAILED, question.message_id))
        log.info("Running as https://t.me/%s", self._me.username)
        delay = FIRST_RETRY_SECONDS
        conflict_since: float | None = None
        while True:
            try:
                updates = await get_updates(self._bot, self._offset, POLL_SECONDS, UPDATES)
            except TelegramRetryAfter as error:
                await asyncio.sleep(max(error.retry_after, FIRST_RETRY_SECONDS))
            except (TelegramConflictError, *FAILURES) as error:
                now = time.monotonic()
                conflict_since = (conflict_since or now) if isinstance(error, TelegramConflictError) else None
                if conflict_since is not None and now - conflict_since >= CONFLICT_SECONDS:
                    raise UserError("Another program receives this bot's messages: end it, and start again") from None
                log.warning("Updates cannot be received: %s; the next try is in %.0f s", reason(error), delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, LONGEST_RETRY_SECONDS)
            else:
                delay, conflict_since = FIRST_RETRY_SECONDS, None
                for update_id, update in updates:
                    self._offset = update_id + 1
                    if update is not None and update_id not in self._unanswered:
                        self._handle(update)
                if updates:  # before the next request acknowledges them
                    await self._unanswered.save({update_id for update_id, _ in updates})

    async def _drain(self, seconds: float) -> None:
        """Finish all that was received, acknowledge it, and stop the answers that take longer than the limit."""
        if self._offset is not None:  # or the last updates might come again after the restart
            with contextlib.suppress(AiogramError, UserError, OSError, TimeoutError):
                await self._unanswered.save()
                await asyncio.wait_for(get_updates(self._bot, self._offset, 0, UPDATES), LAST_SECONDS)
        if self._tasks:
            log.info("Finishing what was received, for at most %.0f s", seconds)
            await asyncio.wait(self._tasks, timeout=seconds)
        self._is_ending = True
        for conversation in self._conversations.values():
            for answer in conversation.answers:
                answer.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LAST_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # One update

    def _handle(self, update: Update) -> None:
        """Begin to handle an update; everything that takes time is done in tasks."""
        try:
            self._begin(update)
        except Exception:  # it must neither end the bot nor come again
            log.exception("An update could not be handled")

    def _begin(self, update: Update) -> None:
        if stopped := update.stopped_message_generation:
            self._stop(Place(stopped.chat.id, stopped.message_thread_id, is_private=True), stopped.draft_id)
            return
        message = update.message or update.edited_message
        text = None if message is None else self._text_for_me(message)
        if message is None or text is None:
            return
        thread_id = message.message_thread_id if message.is_topic_message else None
        place = Place(message.chat.id, thread_id, message.chat.type == "private")
        sender = message.sender_chat or message.from_user or message.chat
        if not self._settings.allows(place.chat_id, sender.id):
            if self._notice(place, say.NOT_ALLOWED, place.chat_id):
                log.info("Chat %d is not allowed: --allow %d lets it in", place.chat_id, place.chat_id)
        elif message.content_type in MEDIA:
            self._notice(place, say.ONLY_TEXT)
        elif message.text is None:
            return  # Telegram's own: someone came, something was pinned
        elif update.edited_message:
            self._notice(place, say.EDITED)
        else:
            self._handle_text(PendingQuestion(update.update_id, place, message.message_id, text), sender.id)

    def _text_for_me(self, message: Message) -> str | None:
        """Return a message without a mention of the bot; None if it is not for the bot.

        In a group, the bot answers commands, mentions, and replies to what it said. Other bots are not answered: two
        that answer each other do not stop.
        """
        text = message.text or message.caption or ""
        if message.chat.type == "private":
            return text
        is_bot = message.from_user is not None and message.from_user.is_bot and message.sender_chat is None
        if is_bot or message.chat.type == "channel":
            return None
        if command := COMMAND.fullmatch(text):
            name, bot = command["name"].lower(), (command["bot"] or "").lower()
            is_mine = bot == (self._me.username or "").lower() if bot else name in say.COMMANDS
            return text if is_mine else None
        mention = re.compile(rf"(?<!\w)@{self._me.username}\b[,:]?\s*", re.IGNORECASE)
        replied = message.reply_to_message
        is_reply = replied is not None and replied.from_user is not None and replied.from_user.id == self._me.id
        return mention.sub("", text).strip() if is_reply or mention.search(text) else None

    def _handle_text(self, question: PendingQuestion, user: int) -> None:
        """Begin to answer a message, or to obey a command."""
        place = question.place
        command = COMMAND.fullmatch(question.text)
        name = say.COMMANDS.get(command["name"].lower(), "unknown") if command else ""
        if name == "stop" and self._stop(place):
            return
        if seconds := self._rate.wait(user):
            self._notice(place, say.TOO_FAST, math.ceil(seconds))
        elif (command or not question.text) and name != "redo":
            argument = (command["argument"] or "").strip() if command else ""
            conversation = self._conversation(place)
            is_owner = user in self._settings.owners
            self._take_turn(conversation, lambda: self._obey(conversation, place, name, argument, is_owner))
        elif sum(len(other.answers) for other in self._conversations.values()) >= self._settings.slots + MAX_WAITING:
            self._spawn(self._send(place, say.BUSY, question.message_id))
        else:
            self._ask(question, is_redo=name == "redo")

    def _ask(self, question: PendingQuestion, is_redo: bool = False, is_new: bool = True) -> None:
        """Begin to answer a message, or for /redo the one before.

        Args:
            question: The message, or the command.
            is_redo: It is the command.
            is_new: An earlier process has not received it.
        """
        conversation = self._conversation(question.place)
        session = conversation.session
        answer = PendingAnswer(question, session.redo if is_redo else lambda: session.answer(question.text))
        conversation.answers.append(answer)
        if is_new and not is_redo:
            self._unanswered.add(question)
        self._take_turn(conversation, lambda: self._answer(conversation, answer))

    def _stop(self, place: Place, draft_id: int | None = None) -> bool:
        """Stop the answer that is being written, if it has this draft; return False if there is none.

        One that is complete, but not yet sent, is left as it is: who has not seen it does not mean the next.
        """
        conversation = self._conversations.get(place)
        if conversation is not None and conversation.is_sending:
            return True
        if conversation is None or not conversation.answers:
            return False
        answer = conversation.answers[0]
        if draft_id in (None, answer.question.message_id):
            answer.stop()
        return True

    def _conversation(self, place: Place) -> Conversation:
        """Return the conversation of a place; a new one may take the memory of the longest idle."""
        if place not in self._conversations:
            idle = [other for other, conversation in self._conversations.items() if not conversation.updates]
            for longest_idle in idle[: max(0, len(self._conversations) - MAX_CHATS + 1)]:
                del self._conversations[longest_idle]
            self._conversations[place] = Conversation(self._new_session())
        self._conversations.move_to_end(place)
        return self._conversations[place]

    # Tasks

    def _take_turn(self, conversation: Conversation, work: Callable[[], Awaitable[None]]) -> None:
        """Do something for an update when the earlier ones of its conversation are done."""
        conversation.updates += 1

        async def wait_and_work() -> None:
            try:
                async with conversation.lock:  # first in, first out
                    try:
                        await work()
                    finally:
                        conversation.is_sending = False
            finally:
                conversation.updates -= 1

        self._spawn(wait_and_work())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something in a task, which starts after those before it; `run` waits for it at the end."""
        task = asyncio.create_task(self._report_failure(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report_failure(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except TokenRefusedError as error:
            if not self._failure.done():
                self._failure.set_exception(error)
        except Exception:
            log.exception("An update could not be handled")

    async def _obey(self, conversation: Conversation, place: Place, name: str, argument: str, is_owner: bool) -> None:
        """Obey a command that generates nothing; a mention without a text is a greeting."""
        session = conversation.session
        if name == "reset":
            session.reset()
            text = say.FORGOTTEN
        elif name == "system" and is_owner:
            if argument:
                session.system = "" if argument == NOTHING else argument
            text = say.SYSTEM_IS.format(session.system) if session.system else say.NO_SYSTEM
        else:
            text = {
                "help": say.HELP_FOR_OWNERS if is_owner else say.HELP,
                "stop": say.NOTHING_TO_STOP,
                "system": say.ONLY_OWNERS,
                "unknown": say.UNKNOWN_COMMAND,
            }.get(name, say.GREETING)
        await self._send(place, text)

    async def _answer(self, conversation: Conversation, answer: PendingAnswer) -> None:
        """Generate an answer, show how it grows, and send it."""
        question, start = answer.question, time.monotonic()
        refusal = say.EMPTY
        is_done = asyncio.Event()
        progress = asyncio.create_task(self._show_progress(conversation, answer, is_done))
        try:
            await answer.generate(self._slots, self._threads)
        except UserError as error:
            is_redo = type(error) is UserError and COMMAND.fullmatch(question.text)
            refusal = REFUSALS.get(type(error), say.NOTHING_TO_REDO if is_redo else say.FAILED)
            level = logging.WARNING if refusal == say.FAILED else logging.INFO
            log.log(level, "Chat %d: %s", question.place.chat_id, error)
        except Exception:
            refusal = say.FAILED
            log.exception("An answer could not be generated")
        finally:
            conversation.answers.remove(answer)
            conversation.is_sending = True
            del conversation.session.history[: -2 * self._settings.turns]  # each is encoded for each answer
            is_done.set()
            await asyncio.wait({progress}, timeout=2 * DRAFT_SECONDS)  # a draft must not come after the message
            progress.cancel()
        text = answer.text.strip()
        if not text and answer.is_stopped:
            if self._is_ending and self._unanswered.keeps(question):
                return  # it is answered after the restart
            refusal = say.SHUTTING_DOWN if self._is_ending else say.STOPPED
        seconds = time.monotonic() - start
        length = number_of(len(text), "character")
        log.info("Chat %d: an answer of %s in %.1f s", question.place.chat_id, length, seconds)
        if self._settings.logs_texts:
            log.info("Chat %d: %r is answered by %r", question.place.chat_id, question.text, text or refusal)
        await self._send(question.place, text or refusal, question.message_id)
        await self._unanswered.remove(question)

    async def _show_progress(self, conversation: Conversation, answer: PendingAnswer, is_done: asyncio.Event) -> None:
        """Show the answer as a draft that grows, where Telegram has drafts, else that the bot is typing."""
        place = answer.question.place
        shown, next_typing = "", 0.0
        while not is_done.is_set():
            text, wait = answer.text.strip(), DRAFT_SECONDS
            is_draft = place.is_private and conversation.takes_drafts and text != shown
            try:
                if is_draft:
                    await self._send_draft(answer.question, split_message(text)[-1])
                    shown = text
                elif time.monotonic() >= next_typing:
                    next_typing = time.monotonic() + TYPING_SECONDS
                    action = SendChatAction(chat_id=place.chat_id, action="typing", message_thread_id=place.thread_id)
                    await call_once(self._bot, action)
            except TelegramRetryAfter as error:
                wait = max(float(error.retry_after), DRAFT_SECONDS)
            except FAILURES:
                pass  # it is not worth a retry
            except TelegramAPIError as error:
                conversation.takes_drafts = conversation.takes_drafts and not is_draft
                log.info("Chat %d: %s", place.chat_id, reason(error))
            except UserError:
                return  # the answer itself meets the same
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_done.wait(), wait)

    # Sending

    async def _send_draft(self, question: PendingQuestion, text: str) -> None:
        place = question.place
        draft = SendMessageDraft(
            chat_id=place.chat_id,
            message_thread_id=place.thread_id,
            draft_id=question.message_id,  # a number other than zero
            text=text,
            can_stop=True,
        )
        await call_once(self._bot, draft)

    async def _send(self, place: Place, text: str, reply_to: int | None = None) -> None:
        """Send a text, in as many messages as it needs; in a group as a reply. What Telegram refuses is logged."""
        for number, part in enumerate(split_message(text)):
            quoted = None
            if reply_to is not None and not place.is_private and number == 0:
                quoted = ReplyParameters(message_id=reply_to, allow_sending_without_reply=True)
            message = SendMessage(
                chat_id=place.chat_id,
                message_thread_id=place.thread_id,
                text=part,
                reply_parameters=quoted,
                link_preview_options=LinkPreviewOptions(is_disabled=True),  # a model invents addresses
            )
            try:
                await call(self._bot, message)
            except (TelegramAPIError, *FAILURES) as error:
                log.warning("Chat %d: a message could not be sent: %s", place.chat_id, reason(error))
                return

    def _notice(self, place: Place, sentence: str, *values: object) -> bool:
        """Send a sentence, unless this place has received it within a minute; return True if it is sent."""
        if self._notices.wait((place, sentence)):
            return False
        self._spawn(self._send(place, sentence.format(*values)))
        return True
