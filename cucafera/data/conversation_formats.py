"""Conversation formats: from the columns of a row to messages.

| format                | columns                                                              |
|-----------------------|----------------------------------------------------------------------|
| OpenAI                | messages: a list of {role, content}                                  |
| ShareGPT              | conversations: a list of {from: human or gpt, value}                 |
| prompt and completion | prompt, and completion, output, response or summary: texts, or lists |
| Alpaca                | instruction, input (may be empty), output, history (pairs)           |
| Dolly                 | instruction, context (may be empty), response                        |
| question and answer   | question, answer                                                     |

A column `system` or `system_prompt` next to them, if it holds text, becomes the first message. The configuration may
name other columns.

Everything else in a row or message refuses the row, or is left out: see row_reader.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cucafera.config.schema import ColumnsConfig
from cucafera.data.chatml import ConversationError, Message, check_conversation
from cucafera.data.row_reader import (
    ANSWER,
    LABELS,
    PROMPT,
    ROW,
    ROW_WEIGHTS,
    RowReader,
    is_filled,
    is_label,
    is_preference,
)

MESSAGES = ("messages", "conversations", "conversation")
BAD_RATINGS = ("down", "thumbs_down", "negative", "bad")
PREFERENCE_REASON = "preference data is not finetuning data, which teaches each answer, also a bad one"


def conversation_of_row(
    row: Mapping[str, Any], columns: ColumnsConfig, unused: set[str] | None = None
) -> list[Message]:
    """Return the conversation in a row; system messages without text are left out.

    Args:
        row: Values by column.
        columns: Columns that the configuration names; the others are found by their usual names.
        unused: Receives the columns and keys of messages (as COLUMN[].KEY) that hold something and are not used.

    Raises:
        ConversationError: No format is recognized by the columns, their values are no conversation, or something else
            in the row changes its meaning.
    """
    reader = _ConversationReader(row, columns)
    conversation = reader.conversation()
    if unused is not None:
        unused |= reader.unused
    return conversation


def prompt_of_row(row: Mapping[str, Any], columns: ColumnsConfig) -> tuple[list[Message], str | None]:
    """Return the conversation in a row up to its last message of the user, and the answer to it; None without one.

    Columns about answers, such as a rating, or a better and a worse one, do not change a prompt and are not read.

    Args:
        row: Values by column.
        columns: Columns that the configuration names; the others are found by their usual names.

    Raises:
        ConversationError: As `conversation_of_row`, but for what concerns answers.
    """
    about_answers = {*ROW_WEIGHTS, *LABELS, "rating"}
    read = {
        column: value
        for column, value in row.items()
        if not is_preference(column) and str(column).lower() not in about_answers
    }
    conversation = _ConversationReader(read, columns, needs_answer=False).conversation()
    ends = [number for number, message in enumerate(conversation, 1) if message.role == "user"]
    if not ends:
        raise ConversationError("it has no message of the user, so there is nothing to answer")
    prompt = [Message(message.role, message.content) for message in conversation[: ends[-1]]]
    for number, message in enumerate(prompt, 1):
        if not message.content.strip():
            raise ConversationError(f"message {number}, of the {message.role}, is empty")
    answer = next((message.content for message in conversation[ends[-1] :] if message.content.strip()), None)
    return prompt, answer


class _ConversationReader(RowReader):
    """A row with a conversation.

    Args:
        row: Values by column.
        columns: Columns that the configuration names.
        needs_answer: Refuse a row without one.
    """

    def __init__(self, row: Mapping[str, Any], columns: ColumnsConfig, needs_answer: bool = True) -> None:
        super().__init__(row, columns)
        self._needs_answer = needs_answer

    def conversation(self) -> list[Message]:
        """Return the messages of the row, checked."""
        prefers = any(is_preference(column) for column in self.named)  # the answers of one kind have been chosen
        for column, value in self.row.items():
            if column not in self.named and not (prefers and is_preference(column)):
                self.check_meaning(column, value, ROW)
        messages = self._messages_column()
        conversation = self.messages(messages) if messages is not None else self._prompt_and_answer()
        conversation = self.with_system(conversation)
        self.check_speakers(conversation)
        if self._needs_answer:
            check_conversation(conversation)
        self.finish(conversation, messages)
        return conversation

    def preference_problem(self, key: Any, value: Any) -> str | None:
        """Say that preferences and labels are not for finetuning."""
        name = str(key).lower()
        if is_preference(name) or (name in LABELS and is_label(value)):
            if name != "chosen":
                return f"{PREFERENCE_REASON}; data=preference_files reads pairs of a better and a worse answer"
            return (
                f"{PREFERENCE_REASON}; data=preference_files reads pairs, columns.answer={key} trains on these "
                f"answers, and columns.messages={key} on conversations"
            )
        if name == "rating" and str(value).strip().lower() in BAD_RATINGS:
            return (
                "an answer that was rated bad is not for finetuning; data.skip_broken_lines=true leaves such rows out"
            )
        return None

    def unread_answer(
        self, name: str, column: str, conversation: Sequence[Message], messages: str | None
    ) -> str | None:
        """Return why an unused column seems to hold the answer; None if it does not."""
        is_open = messages is not None and conversation[-1].role != "assistant"
        if not (self._needs_answer and is_open and name in ANSWER):
            return None
        return (
            f"{messages} ends without an answer, and the column {column} holds one: set columns.prompt="
            f"{messages} and columns.answer={column} (of data.sources.NAME)"
        )

    def _messages_column(self) -> str | None:
        """Return the column of messages, or None if the conversation is a prompt and an answer."""
        if self.config.prompt is not None or self.config.answer is not None:
            return None
        column = self.column("messages", MESSAGES)
        if column is None or self.config.messages is not None or is_filled(self.row[column]):
            return column
        prompt = self.column("prompt", PROMPT)
        return None if prompt is not None and is_filled(self.row[prompt]) else column

    def _prompt_and_answer(self) -> list[Message]:
        prompt, answer = self.column("prompt", PROMPT), self.column("answer", ANSWER)
        if answer is not None and not self._needs_answer and not is_filled(self.row[answer]):
            answer = None
        if prompt is None or (answer is None and self._needs_answer):
            raise ConversationError(
                f"no conversation is recognized in the columns {self.column_names}: name them "
                "with columns.messages, or with columns.prompt and columns.answer (of data.sources.NAME)"
            )
        return self.question(prompt) + (self.turns(answer, "assistant") if answer is not None else [])
