"""Conversation formats: from the columns of a row to messages.

| format                | columns                                                              |
|-----------------------|----------------------------------------------------------------------|
| OpenAI                | messages: a list of {role, content}                                  |
| ShareGPT              | conversations: a list of {from: human or gpt, value}                 |
| prompt and completion | prompt, and completion, output, response or summary: texts, or lists |
| Alpaca                | instruction, input (may be empty), output                            |
| question and answer   | question, answer                                                     |

A column `system` or `system_prompt` next to them, if it holds text, becomes the first message. The configuration may
name other columns.
"""

from collections.abc import Mapping
from typing import Any

from cucafera.config.schema import ColumnsConfig
from cucafera.data.chatml import ConversationError, Message, check_conversation

MESSAGES = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
PROMPT = ("prompt", "instruction", "question")
INPUT = ("input",)
ANSWER = ("completion", "output", "answer", "response", "summary")

ROLE_OF_SPEAKER = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names."""


def conversation_of_row(row: Mapping[str, Any], columns: ColumnsConfig) -> list[Message]:
    """Return the conversation in a row; system messages without text are left out.

    Args:
        row: Values by column.
        columns: Columns that the configuration names; the others are found by their usual names.

    Raises:
        ConversationError: No format is recognized by the columns, or their values are no conversation.
    """
    messages = _messages_column(row, columns)
    conversation = _messages(row[messages], messages) if messages is not None else _prompt_and_answer(row, columns)
    system = _column(row, columns.system, SYSTEM)
    if system is not None and row[system]:
        if any(message.role == "system" for message in conversation):
            raise ConversationError(f"it has a system message in the column {system} and another among its messages")
        conversation = [Message("system", _text(row[system], system)), *conversation]
    conversation = [message for message in conversation if message.role != "system" or message.content.strip()]
    check_conversation(conversation)
    return conversation


def _messages_column(row: Mapping[str, Any], columns: ColumnsConfig) -> str | None:
    """Return the column of messages, or None if the conversation is a prompt and an answer."""
    if columns.prompt is not None or columns.answer is not None:
        return None
    column = _column(row, columns.messages, MESSAGES)
    is_null = columns.messages is None and column is not None and row[column] is None
    return None if is_null and _column(row, None, PROMPT) is not None else column


def _prompt_and_answer(row: Mapping[str, Any], columns: ColumnsConfig) -> list[Message]:
    prompt = _column(row, columns.prompt, PROMPT)
    answer = _column(row, columns.answer, ANSWER)
    if prompt is None or answer is None:
        raise ConversationError(
            f"no conversation is recognized in the columns {', '.join(map(str, row)) or '(none)'}: name them with "
            "columns.messages, or with columns.prompt and columns.answer (of data.sources.NAME)"
        )
    question = _turns(row[prompt], prompt, "user")
    extra = _column(row, columns.input, INPUT)
    if extra is not None and row[extra]:
        if not question or question[-1].role != "user":
            raise ConversationError(f"{extra} belongs to a last message of the user in {prompt}, and there is none")
        question[-1] = Message("user", f"{question[-1].content}\n\n{_text(row[extra], extra)}")
    return question + _turns(row[answer], answer, "assistant")


def _column(row: Mapping[str, Any], named: str | None, known: tuple[str, ...]) -> str | None:
    """Return the column that the configuration names, or else the first known one, if possible one that is not null."""
    if named is None:
        present = [column for column in known if column in row]
        return next((column for column in present if row[column] is not None), present[0] if present else None)
    if named not in row:
        raise ConversationError(f"no column {named!r}; it has {', '.join(map(str, row)) or 'none'}")
    return named


def _turns(value: Any, column: str, role: str) -> list[Message]:
    """Return the messages of a column that holds one text, or messages."""
    return _messages(value, column) if isinstance(value, list) else [Message(role, _text(value, column))]


def _messages(value: Any, column: str) -> list[Message]:
    # Datasets give a list of objects as an object of lists.
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        if len({len(part) for part in value.values()}) > 1:
            raise ConversationError(f"{column} has lists of different lengths: {', '.join(map(str, value))}")
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    if isinstance(value, str):
        raise ConversationError(f"{column} is a text, not a list of messages; it must be JSON, not a text of it")
    if not isinstance(value, list):
        raise ConversationError(f"{column} is {_kind(value)}, not a list of messages")
    return [_message(part, f"message {number} of {column}") for number, part in enumerate(value, 1)]


def _message(value: Any, position: str) -> Message:
    if not isinstance(value, dict):
        raise ConversationError(f"{position} is {_kind(value)}, not an object with role and content")
    for role_key, content_key in (("role", "content"), ("from", "value")):
        # Parquet gives each message the keys of all, null where it has none.
        if {role_key, content_key} <= value.keys() and (value[role_key], value[content_key]) != (None, None):
            role, content = _text(value[role_key], f"the role of {position}"), value[content_key]
            if isinstance(content, list):
                content = _join_parts(content, position)
            return Message(ROLE_OF_SPEAKER.get(role, role), _text(content, position))
    raise ConversationError(f"{position} has {', '.join(map(str, value)) or 'nothing'}, not role and content")


def _join_parts(parts: list[Any], position: str) -> str:
    """Return OpenAI's content in parts, all of them text."""
    if not all(isinstance(part, dict) and part.get("type") == "text" and "text" in part for part in parts):
        raise ConversationError(f"{position} has parts that are not text")
    return "".join(_text(part["text"], position) for part in parts)


def _text(value: Any, position: str) -> str:
    if not isinstance(value, str):
        raise ConversationError(f"{position} is {_kind(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"{position} holds half of a surrogate pair, which UTF-8 cannot encode") from error
    return value


def _kind(value: Any) -> str:
    """Return the kind of a value in JSON's words."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return kinds.get(type(value), "an object")


def is_repetitive(conversation: list[Message], times: int) -> bool:
    """True if one of the assistant's answers has the same five words in a row `times` times or more."""
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
