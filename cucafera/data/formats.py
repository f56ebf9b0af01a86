"""Conversations as others write them: from the columns of a row to messages.

| format                | columns                                                              |
|-----------------------|----------------------------------------------------------------------|
| OpenAI                | messages: a list of {role, content}                                  |
| ShareGPT              | conversations: a list of {from: human or gpt, value}                 |
| prompt and completion | prompt, and completion, output, response or summary: texts, or lists |
| Alpaca                | instruction, input (may be empty), output                            |
| question and answer   | question, answer                                                     |

A column `system` or `system_prompt` beside them, if it holds text, becomes the first message. The configuration may
name other columns.
"""

from collections.abc import Mapping
from typing import Any

from cucafera.config import SourceConfig
from cucafera.data.chat import ConversationError, Message, check_conversation

MESSAGES = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
PROMPT = ("prompt", "instruction", "question")
INPUT = ("input",)
ANSWER = ("completion", "output", "answer", "response", "summary")

ROLE_OF_SPEAKER = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""ShareGPT's names."""


def conversation_of_row(row: Mapping[str, Any], source: SourceConfig) -> list[Message]:
    """The conversation that a row holds.

    Raises:
        ConversationError: no format is recognized by the columns, or what they hold is no conversation.
    """
    messages = _column(row, source.messages_column, MESSAGES)
    system = _column(row, source.system_column, SYSTEM)
    conversation = [Message("system", _text(row[system], system))] if system and row[system] else []
    if messages is not None and source.prompt_column is None:
        conversation += _messages(row[messages], messages)
    else:
        prompt = _column(row, source.prompt_column, PROMPT)
        answer = _column(row, source.answer_column, ANSWER)
        if prompt is None or answer is None:
            raise ConversationError(
                f"no conversation is recognized in the columns {', '.join(map(str, row)) or '(none)'}: name them with "
                "messages_column, or with prompt_column and answer_column (of data.sources.NAME)"
            )
        conversation += _turns(row[prompt], prompt, "user")
        extra = _column(row, source.input_column, INPUT)
        if extra is not None and row[extra]:
            *before, last = conversation
            conversation = [*before, Message(last.role, f"{last.content}\n\n{_text(row[extra], extra)}")]
        conversation += _turns(row[answer], answer, "assistant")
    check_conversation(conversation)
    return conversation


def _column(row: Mapping[str, Any], named: str | None, known: tuple[str, ...]) -> str | None:
    """The column that the configuration names, or else the first known one that there is."""
    if named is None:
        return next((column for column in known if column in row), None)
    if named not in row:
        raise ConversationError(f"no column {named!r}; it has {', '.join(map(str, row)) or 'none'}")
    return named


def _turns(value: Any, column: str, role: str) -> list[Message]:
    """A column that holds one text, or messages."""
    return _messages(value, column) if isinstance(value, list) else [Message(role, _text(value, column))]


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if isinstance(value, str):
        raise ConversationError(f"{column} is a text, not a list of messages; it must be JSON, not a text of it")
    if not isinstance(value, list):
        raise ConversationError(f"{column} is {_kind(value)}, not a list of messages")
    return [_message(part, f"message {number} of {column}") for number, part in enumerate(value, 1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise ConversationError(f"{place} is {_kind(value)}, not an object with role and content")
    if "role" in value and "content" in value:
        role, content = value["role"], value["content"]
        if isinstance(content, list):
            content = _joined(content, place)
    elif "from" in value and "value" in value:
        role, content = ROLE_OF_SPEAKER.get(value["from"], value["from"]), value["value"]
    else:
        raise ConversationError(f"{place} has {', '.join(map(str, value)) or 'nothing'}, not role and content")
    return Message(_text(role, f"the role of {place}"), _text(content, place))


def _joined(parts: list[Any], place: str) -> str:
    """OpenAI's contents in parts, all of them text."""
    if not all(isinstance(part, dict) and part.get("type") == "text" and "text" in part for part in parts):
        raise ConversationError(f"{place} has parts that are not text")
    return "".join(_text(part["text"], place) for part in parts)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ConversationError(f"{place} is {_kind(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"{place} holds half of a surrogate pair, which no UTF-8 text can hold") from error
    return value


def _kind(value: Any) -> str:
    """The kind of a value in JSON's words."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return kinds.get(type(value), "an object")


def is_repetitive(conversation: list[Message], times: int) -> bool:
    """Whether some run of five words occurs so many times in one of the assistant's answers."""
    for message in conversation:
        if message.role != "assistant":
            continue
        words = message.content.split()
        counts: dict[tuple[str, ...], int] = {}
        for run in zip(*(words[start:] for start in range(5)), strict=False):
            counts[run] = counts.get(run, 0) + 1
            if counts[run] >= times:
                return True
    return False
