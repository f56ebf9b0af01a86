"""Preference formats: from the columns of a row to a prompt, a better and a worse answer.

| format                          | columns                                                            |
|---------------------------------|--------------------------------------------------------------------|
| explicit prompt                 | prompt, chosen, rejected: texts, or lists of messages              |
| messages before the answers     | messages or conversations, chosen, rejected                        |
| OpenAI                          | input: messages; preferred_output, non_preferred_output            |
| repeated prompt (UltraFeedback) | prompt; chosen and rejected: lists of messages that begin with it  |
| implicit prompt (TRL)           | chosen, rejected: lists of messages; the prompt is their beginning |

In all of them, the messages that both answers begin with, up to one of the user, belong to the prompt: only what
differs is compared. Columns of system messages, of texts to append and of history are read as for conversations, and
everything else in a row refuses it or is left out by the same rules: see conversation_formats.py and row_reader.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cucafera.config.schema import ColumnsConfig
from cucafera.data.chatml import Conversation, ConversationError, Message, stripped
from cucafera.data.conversation_formats import MESSAGES
from cucafera.data.row_reader import LABELS, PROMPT, ROW, RowReader, is_filled, is_label

INPUT_AS_PROMPT = ("input",)
"""Names of the column of the prompt where no other one holds it."""
CHOSEN = ("chosen", "preferred_output", "preferred_response", "chosen_response")
REJECTED = ("rejected", "non_preferred_output", "dispreferred_response", "rejected_response")
PREFERRED, DISPREFERRED = "preferred", "dispreferred"
"""Columns of answers if a row has both; `preferred` alone may name the better one."""
VERDICTS = ("winner", PREFERRED)
"""Columns of verdicts, which are not read."""
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
FINISH_REASONS = "finish_reasons"
"""Column of why the better and the worse answer end, as OpenAI's API names it."""
CUT_REASONS = ("length", "context")


class Preference(NamedTuple):
    """A better and a worse answer to the same prompt.

    Attributes:
        prompt: Messages up to one of the user, none of them trained.
        chosen: The better answer: messages that begin and end with one of the assistant.
        rejected: The worse answer, in the same form.
        ended: For both answers, False if it was cut where no more tokens were to be generated: then the end of its text
            is not compared, or a model would learn not to stop there.
    """

    prompt: Conversation
    chosen: Conversation
    rejected: Conversation
    ended: tuple[bool, bool] = (True, True)


def preference_of_row(row: Mapping[str, Any], columns: ColumnsConfig, unused: set[str] | None = None) -> Preference:
    """Return the pair in a row; system messages without text are left out.

    Args:
        row: Values by column.
        columns: Columns that the configuration names; the others are found by their usual names.
        unused: Receives the columns and keys of messages (as COLUMN[].KEY) that hold something and are not used.

    Raises:
        ConversationError: No pair is recognized by the columns, their values are none, or something else in the row
            changes its meaning.
    """
    reader = _PreferenceReader(row, columns)
    preference = reader.preference()
    if unused is not None:
        unused |= reader.unused
    return preference


class _PreferenceReader(RowReader):
    """A row with a pair of answers; the messages and tools of OpenAI's input are read like columns."""

    def __init__(self, row: Mapping[str, Any], columns: ColumnsConfig) -> None:
        nested = row.get("input")
        if isinstance(nested, dict) and "messages" in nested and nested.keys().isdisjoint(row):
            row = {column: value for column, value in row.items() if column != "input"} | nested
        super().__init__(row, columns)

    def preference(self) -> Preference:
        """Return the pair of the row, checked."""
        for setting in ("messages", "answer"):
            if getattr(self.config, setting) is not None:
                raise ConversationError(
                    f"columns.{setting} is for conversations; the columns of pairs are columns.prompt, columns.chosen "
                    "and columns.rejected (of data.sources.NAME)"
                )
        columns = self._answer_columns()
        for column, value in self.row.items():
            if column not in self.named:
                self.check_meaning(column, value, ROW)
        answers = [self._answer(column) for column in columns]
        prompt_column = self._prompt_column(answers)
        if prompt_column is None:
            if text := next((column for column in columns if isinstance(self.row[column], str)), None):
                raise ConversationError(
                    f"it has no prompt, and {text} is a text: name the prompt's column with columns.prompt (of "
                    "data.sources.NAME); a text that begins with its prompt must become a list of messages"
                )
            chosen, rejected = answers
        else:
            prompt = self._prompt(prompt_column)
            chosen, rejected = (_continued(prompt, *pair) for pair in zip(answers, columns, strict=True))
        start = _length_of_prompt(chosen, rejected, columns)
        prompt, chosen, rejected = self.with_system(chosen[:start]), chosen[start:], rejected[start:]
        for answer, column in zip((chosen, rejected), columns, strict=True):
            if not all(message.trained for message in answer):
                raise ConversationError(f"{column} has a message with weight 0; an answer is compared as a whole")
        ended = self._ended()
        self.finish([*prompt, *chosen, *rejected], None)
        return Preference([message._replace(trained=False) for message in prompt], chosen, rejected, ended)

    def preference_problem(self, key: str, value: Any) -> str | None:
        """Say that a label of good or bad does not decide which answer is better."""
        if str(key).lower() in LABELS and is_label(value):
            return "it may say which of the two answers is better; chosen is, whatever it says"
        return None

    def _ended(self) -> tuple[bool, bool]:
        """Return for both answers if the model that wrote it ended it, from the column of `cucafera.prefer`."""
        reasons = self.row.get(FINISH_REASONS)
        if not isinstance(reasons, list) or len(reasons) != 2 or FINISH_REASONS in self.config.ignore:
            return True, True
        self.use(FINISH_REASONS)
        return reasons[0] not in CUT_REASONS, reasons[1] not in CUT_REASONS

    def _answer_columns(self) -> tuple[str, str]:
        """Return the columns of the better and the worse answer."""
        further = DISPREFERRED in self.row
        chosen = self.column("chosen", (*CHOSEN, PREFERRED) if further else CHOSEN)
        rejected = self.column("rejected", (*REJECTED, DISPREFERRED) if further else REJECTED)
        if chosen is not None and rejected is not None:
            if chosen == rejected:
                raise ConversationError(f"columns.chosen and columns.rejected are the same column, {chosen}")
            return chosen, rejected
        if (present := chosen or rejected) is not None:
            raise ConversationError(
                f"it has {present}, and no other answer to compare with: name both with columns.chosen and "
                "columns.rejected (of data.sources.NAME)"
            )
        raise ConversationError(
            f"no pair is recognized in the columns {self.column_names}: name the better and the worse answer with "
            f"columns.chosen and columns.rejected (of data.sources.NAME){self._other_kind()}"
        )

    def _other_kind(self) -> str:
        """Return what a row without a pair seems to be, to end a message."""
        names = {str(column).lower() for column in self.row}
        if any(str(key).lower() in LABELS and is_label(value) for key, value in self.row.items()):
            return "; answers that are labelled one by one (KTO) are no pairs"
        if not names.isdisjoint(VERDICTS):
            return "; a verdict is not read, so the better answer must have a column of its own"
        if not names.isdisjoint(MESSAGES):
            return "; conversations are for objective=finetuning"
        return ""

    def _prompt_column(self, answers: Sequence[Sequence[Message]]) -> str | None:
        """Return the column of the prompt; None if the prompt is what the answers have in common."""
        column = self.column("prompt", PROMPT)
        if column is not None and (self.config.prompt is not None or is_filled(self.row[column])):
            return column
        if any(answer[0].role != "assistant" for answer in answers):
            return None
        others = (self.column("prompt", names) for names in (MESSAGES, INPUT_AS_PROMPT))
        return next((column for column in others if column is not None and is_filled(self.row[column])), None)

    def _prompt(self, column: str) -> list[Message]:
        """Return the messages of a column of prompts, which end with one of the user."""
        prompt = self._checked(self.question(column), column)
        if not prompt or prompt[-1].role != "user":
            found = f"is one of the {prompt[-1].role}" if prompt else "is missing"
            raise ConversationError(f"a prompt ends with a message of the user, and the last one of {column} {found}")
        return prompt

    def _answer(self, column: str) -> list[Message]:
        """Return the messages of a column of answers, which may begin with the prompt, and end with the assistant's."""
        answer = self._checked(self.turns(column, "assistant"), column)
        if not answer or answer[-1].role != "assistant":
            found = f"one of the {answer[-1].role}" if answer else "none"
            raise ConversationError(f"{column} must end with a message of the assistant; its last one is {found}")
        return answer

    def _checked(self, messages: list[Message], column: str) -> list[Message]:
        """Return the messages of a column but for system messages without text; refuse other empty ones, and roles."""
        self.check_speakers(messages, f" of {column}")
        for number, message in enumerate(messages, 1):
            if message.role != "system" and not message.content.strip():
                place = column if len(messages) == 1 else f"message {number} of {column}, of the {message.role},"
                raise ConversationError(f"{place} is empty")
            if len(messages) == 1 and MESSAGES_AS_TEXT.match(message.content):
                raise ConversationError(f"{column} is a text of JSON messages; they must be JSON, not a text of it")
        return [message for message in messages if message.content.strip()]


def _continued(prompt: list[Message], answer: list[Message], column: str) -> list[Message]:
    """Return a prompt and its answer, which may repeat the prompt, or have the system message that the prompt lacks.

    Args:
        prompt: The messages of its own column.
        answer: The messages of a column of answers.
        column: That column, for messages.
    """
    if answer[0].role == "assistant":
        return [*prompt, *answer]
    questions = [message for message in answer if message.role == "user"]
    if len(prompt) == 1 and questions and _same(questions[-1], prompt[0]):
        return answer
    if prompt[0].role == "system" != answer[0].role:
        answer = [prompt[0], *answer]
    repeated = answer[1:] if answer[0].role == "system" != prompt[0].role else answer
    if len(repeated) < len(prompt) or not all(map(_same, repeated, prompt)):
        raise ConversationError(f"{column} begins with another prompt than the column of the prompt holds")
    return answer


def _length_of_prompt(chosen: Sequence[Message], rejected: Sequence[Message], columns: tuple[str, str]) -> int:
    """Return how many messages of two conversations are their prompt: all before the first answer that differs.

    Args:
        chosen: The conversation with the better answer.
        rejected: That with the worse one.
        columns: The columns of both, for messages.
    """
    fewest = min(len(chosen), len(rejected))
    common = next((number for number in range(fewest) if not _same(chosen[number], rejected[number])), fewest)
    if common == fewest:
        if len(chosen) == len(rejected):
            raise ConversationError("the better and the worse answer are the same")
        shorter, longer = columns if len(chosen) < len(rejected) else columns[::-1]
        raise ConversationError(f"{longer} begins with all of {shorter}, which leaves nothing to compare")
    roles = {chosen[common].role, rejected[common].role}
    if roles != {"assistant"}:
        differ = "have different system messages" if "system" in roles else "are to different prompts"
        raise ConversationError(f"the better and the worse answer {differ}")
    while common and chosen[common - 1].role != "user":
        common -= 1
    if not common:
        raise ConversationError("it has no prompt: name its column with columns.prompt (of data.sources.NAME)")
    return common


def _same(message: Message, other: Message) -> bool:
    return message.role == other.role and stripped(message.content) == stripped(other.content)
