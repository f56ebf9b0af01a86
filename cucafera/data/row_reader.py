"""Rows as conversations: messages from the columns that others use, and what refuses a row.

Columns in a row or keys of a message that are not used are of one of two kinds. What would change the meaning of the
conversation, such as a tool call or an image, refuses the row. The rest, such as an id, is left out, and its name is
handed to the caller. Values that are null or empty are neither: parquet fills every row with the keys of all.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from cucafera.config.schema import ColumnsConfig
from cucafera.data.chatml import ROLES, ConversationError, Message

SYSTEM = ("system", "system_prompt")
PROMPT = ("prompt", "instruction", "question")
INPUT = ("input", "context", "passage")
HISTORY = ("history", "chat_history", "conversation_history")
ANSWER = ("completion", "output", "answer", "response", "summary")

ROLE_OF_SPEAKER = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
}
"""Usual names, in lower case; the configuration may add others."""
TOOL_SPEAKERS = (
    *("tool", "tools", "function", "observation", "ipython", "environment"),
    *("tool_call", "tool_calls", "tool_response", "tool_result", "function_call", "function_response"),
)

WEIGHTS = (
    *("weight", "train", "training", "trained", "trainable", "is_trained", "train_on_turn"),
    *("loss", "loss_weight", "loss_scale"),
)
"""Keys of a message that say whether it is trained: 0 or false, 1 or true."""
ROW_WEIGHTS = ("weight", "sample_weight", "train", "trainable")
"""Columns of the same meaning for a complete row."""
LABELS = ("label", "labels", "kto_tag")
PREFERENCES = ("winner", "preferred", "preferred_output", "non_preferred_output", "preferred_response")
PREFERENCE_WORDS = {"chosen", "rejected", "dispreferred"}
"""Words in the names of columns with better and worse answers, such as score_chosen."""
CHANGES_MEANING = {
    **dict.fromkeys(
        ("tools", "functions", "tool_calls", "tool_call", "function_call", "tool_call_id", "tool_responses"),
        "tools and their calls cannot be trained on",
    ),
    **dict.fromkeys(
        (
            *(
                "reasoning_content",
                "reasoning",
                "reasoning_steps",
                "reasoning_trace",
                "thinking",
                "thoughts",
                "thought",
            ),
            *("cot", "complex_cot", "chain_of_thought", "rationale", "scratchpad"),
        ),
        "reasoning cannot be trained on, and the answer without it is another answer",
    ),
    **dict.fromkeys(
        ("train_detail", "training_detail", "mask", "loss_mask", "masks"),
        "a part of a message cannot be masked; weight 0 leaves out a complete one",
    ),
    **dict.fromkeys(
        ("masked", "is_masked", "ignore", "ignored", "exclude", "excluded", "skip"),
        "weight 0 is what excludes an answer",
    ),
    **dict.fromkeys(("attachment", "attachments", "file_ids", "pixel_values"), "the model reads text only"),
    "chat_template_kwargs": "settings of another chat template cannot be used",
}
"""Lower-case names of columns, and of keys of messages, that refuse a row if they hold something; and why."""
MEDIA = re.compile(r"(?!n_|num_)(.*_)?(image|img|picture|audio|video|speech)s?(_(id|path|file|url|name|byte)s?)?")
"""Names of columns and keys of what is no text."""
MESSAGE_CHANNELS = {
    "channel": (("final",), "reasoning and calls cannot be trained on; only the channel final is an answer"),
    "recipient": (("all", "user"), "tools and their calls cannot be trained on"),
}
"""Keys of messages that refuse a row unless they have one of some values; and why."""
MAY_BELONG_TO_QUESTION = (
    *(*INPUT, *HISTORY, "text", "document", "documents", "article", "paragraph", "contexts", "passages"),
    *("content", "story", "dialogue", "transcript", "premise", "hypothesis", "excerpt", "snippet", "table", "code"),
    *("knowledge", "background", "evidence", "schema", "choices", "options"),
)
"""Last words of the names of columns with texts that a question may be about: they refuse a row if not used."""

NAMED = ("messages", "system", "prompt", "input", "history", "answer", "chosen", "rejected")
"""Settings that name columns of conversations and pairs."""
ROW = "the row"
TEXT_PARTS = ("text", "input_text", "output_text")
"""OpenAI's types of contents that are text."""
EMPTY_JSON = ("[]", "{}", "null", "None")


class RowReader(ABC):
    """One row while it is read, and what is not used of it.

    Args:
        row: Values by column.
        columns: Columns that the configuration names; the others are found by their usual names.

    Attributes:
        unused: Columns and keys of messages (as COLUMN[].KEY) that hold something and are not used.
    """

    def __init__(self, row: Mapping[str, Any], columns: ColumnsConfig) -> None:
        self.unused: set[str] = set()
        self.row = row
        self.config = columns
        named = (getattr(columns, setting) for setting in NAMED)
        self.named = {column for column in named if column is not None}
        self._used: set[str] = set()
        self._names: dict[str, set[str]] = {}

    @abstractmethod
    def preference_problem(self, key: str, value: Any) -> str | None:
        """Return why a column or key that says which answers are good refuses the row; None if it does not."""

    def column(self, setting: str, known: Sequence[str]) -> str | None:
        """Return the column that the configuration names, or else the first known one, if possible one that is filled.

        Raises:
            ConversationError: The row lacks the named one, or several known ones hold different values.
        """
        named: str | None = getattr(self.config, setting)
        if named is not None:
            if named not in self.row:
                raise ConversationError(f"no column {named!r}; it has {self.column_names}")
            self._used.add(named)
            return named
        free = self.named.union(self.config.ignore)
        present = [column for column in known if column in self.row and column not in free]
        filled = [column for column in present if is_filled(self.row[column])]
        if any(_stripped(self.row[column]) != _stripped(self.row[filled[0]]) for column in filled[1:]):
            other = ", and one to append to it with columns.input" if setting == "prompt" else ""
            raise ConversationError(
                f"the columns {' and '.join(filled)} hold different values: name the one to use with columns.{setting}"
                f"{other} (of data.sources.NAME)"
            )
        column = next(iter(filled or [column for column in present if self.row[column] is not None] or present), None)
        self._used.update(filled if filled else [column] if column is not None else [])
        return column

    def use(self, column: str) -> None:
        """Count a column as used."""
        self._used.add(column)

    @property
    def column_names(self) -> str:
        """The columns of the row, for messages."""
        return ", ".join(map(str, self.row)) or "(none)"

    def question(self, prompt: str) -> list[Message]:
        """Return the turns before the answer: the columns of the prompt, of the text to append to it, and of history.

        Args:
            prompt: The column of the prompt.
        """
        question = self.turns(prompt, "user")
        extra = self.column("input", [name for name in INPUT if name != prompt])
        if extra is not None and is_filled(self.row[extra]):
            if not question or question[-1].role != "user":
                raise ConversationError(f"{extra} belongs to a last message of the user in {prompt}, and there is none")
            question[-1] = Message("user", f"{question[-1].content}\n\n{_text(self.row[extra], extra)}")
        history = self.column("history", HISTORY)
        if history is not None and is_filled(self.row[history]):
            if len(question) != 1:
                raise ConversationError(f"{history} holds turns before {prompt}, which is a list of messages itself")
            question = [*self._history(history), *question]
        return question

    def with_system(self, conversation: Sequence[Message]) -> list[Message]:
        """Return a conversation with the system message of its column; system messages without text are left out."""
        system = self.column("system", SYSTEM)
        if system is not None and is_filled(self.row[system]):
            text = _text(self.row[system], system)
            others = {message.content.strip() for message in conversation if message.role == "system"} - {""}
            if others - {text.strip()}:
                raise ConversationError(
                    f"it has a system message in the column {system} and another among its messages"
                )
            conversation = conversation if others else [Message("system", text), *conversation]
        return [message for message in conversation if message.role != "system" or message.content.strip()]

    def turns(self, column: str, role: str) -> list[Message]:
        """Return the messages of a column that holds one text, a message, or messages."""
        value = self.row[column]
        if isinstance(value, list | dict):
            return self.messages(column)
        return [Message(role, _text(value, column))]

    def _history(self, column: str) -> list[Message]:
        """Return the messages of pairs of question and answer."""
        value = _objects(self.row[column], column)
        if not isinstance(value, list) or any(isinstance(pair, dict) for pair in value):
            return self.messages(column)
        turns = []
        for number, pair in enumerate(value, 1):
            position = f"pair {number} of {column}"
            if not isinstance(pair, list) or len(pair) != 2:
                found = f"a list of {len(pair)}" if isinstance(pair, list) else _kind(pair)
                raise ConversationError(f"{position} is {found}, not a list of two: a question and its answer")
            turns += [Message("user", _text(pair[0], position)), Message("assistant", _text(pair[1], position))]
        return turns

    def messages(self, column: str) -> list[Message]:
        """Return the messages of a column that holds a list of them, or one."""
        value = _objects(self.row[column], column)
        if isinstance(value, dict) and value:
            value = [value]
        if isinstance(value, str):
            raise ConversationError(f"{column} is a text, not a list of messages; it must be JSON, not a text of it")
        if not isinstance(value, list):
            raise ConversationError(f"{column} is {_kind(value)}, not a list of messages")
        return [self._message(part, column, f"message {number} of {column}") for number, part in enumerate(value, 1)]

    def _message(self, value: Any, column: str, position: str) -> Message:
        if not isinstance(value, dict):
            raise ConversationError(f"{position} is {_kind(value)}, not an object with role and content")
        for key, part in value.items():
            self.check_meaning(key, part, position)
        pairs = [pair for pair in product(("role", "from"), ("content", "value")) if set(pair) <= value.keys()]
        # Parquet gives each message the keys of all, null where it has none.
        pairs.sort(key=lambda pair: sum(value[key] is None for key in pair))
        if pairs and any(value[key] is not None for key in pairs[0]):
            role_key, content_key = pairs[0]
            role = self._role(_text(value[role_key], f"the role of {position}"))
            content = _objects(value[content_key], position)
            if isinstance(content, list):
                content = self._join_parts(content, f"{column}[].{content_key}", position)
            trained = self._is_trained(value, role, column, position)
            if is_filled(value.get("name")):
                self._names.setdefault(role, set()).add(str(value["name"]))
            read = {role_key, content_key, *WEIGHTS}
            self.unused.update(f"{column}[].{key}" for key in value if key not in read and is_filled(value[key]))
            return Message(role, _text(content, position), trained)
        raise ConversationError(f"{position} has {', '.join(map(str, value)) or 'nothing'}, not role and content")

    def _role(self, speaker: str) -> str:
        """Return the role of a speaker, or the speaker if it is not known."""
        named = (role for role, speakers in vars(self.config.roles).items() if speaker in speakers)
        return next(named, None) or ROLE_OF_SPEAKER.get(speaker.strip().lower(), speaker)

    def _is_trained(self, message: Mapping[str, Any], role: str, column: str, position: str) -> bool:
        """False if the keys of WEIGHTS exclude a message of the assistant; those of others are never trained."""
        given = {key: message[key] for key in WEIGHTS if key not in self.config.ignore and is_filled(message.get(key))}
        for key, weight in given.items():
            if isinstance(weight, str) or weight not in (0, 1):
                raise ConversationError(
                    f"{position} has {key} {weight!r}; it must be 0 or 1, or false or true{ignore_advice(key)}"
                )
        if len({bool(weight) for weight in given.values()}) > 1:
            raise ConversationError(f"{position} has {' and '.join(given)}, which contradict each other")
        trained = all(given.values())
        if role != "assistant":
            self.unused.update(f"{column}[].{key} of the {role}" for key in given if trained)
            return True
        return trained

    def _join_parts(self, parts: list[Any], column: str, position: str) -> str:
        """Return OpenAI's content in parts, all of them text."""
        texts = []
        for number, part in enumerate(parts, 1):
            problem = f"{position} has parts that are not text: part {number}"
            if not isinstance(part, dict):
                raise ConversationError(f"{problem} is {_kind(part)}, not an object with type and text")
            if part.get("type", "text") not in TEXT_PARTS:
                raise ConversationError(f"{problem} has the type {part['type']!r}, not 'text'")
            if not {"type", "text"} <= part.keys():
                raise ConversationError(f"{problem} has {', '.join(map(str, part)) or 'nothing'}, not type and text")
            for key, value in part.items():
                self.check_meaning(key, value, f"part {number} of {position}")
                if key not in ("type", "text") and is_filled(value):
                    self.unused.add(f"{column}[].{key}")
            texts.append(_text(part["text"], f"part {number} of {position}"))
        return "".join(texts)

    def check_meaning(self, key: Any, value: Any, position: str) -> None:
        """Refuse a column or key that changes what the conversation means, if it holds something."""
        name = str(key).lower()
        if key in self.config.ignore or not is_filled(value) or value in EMPTY_JSON:
            return
        if (problem := self.preference_problem(key, value)) is not None:
            reason = problem
        elif name in ROW_WEIGHTS and position == ROW and str(value).lower() not in ("1", "1.0", "true"):
            reason = "a conversation has no weight; a source has one, data.sources.NAME.weight"
        elif name in CHANGES_MEANING and value is not False:
            reason = CHANGES_MEANING[name]
        elif MEDIA.fullmatch(name) and value is not False:
            reason = "the model reads text only"
        elif name in MESSAGE_CHANNELS and position != ROW and value not in MESSAGE_CHANNELS[name][0]:
            reason = MESSAGE_CHANNELS[name][1]
        else:
            return
        raise ConversationError(f"{position} has {key}: {reason}{ignore_advice(key)}")

    def check_speakers(self, conversation: Sequence[Message], place: str = "") -> None:
        """Refuse roles that are not known, and several speakers of one role.

        Args:
            conversation: Messages that were read.
            place: Where they stand, for messages: empty, or as in " of COLUMN".
        """
        for number, message in enumerate(conversation, 1):
            role = message.role
            if role not in ROLES:
                problem = f"message {number}{place} has the role {role!r}"
                if role.strip().lower() in TOOL_SPEAKERS:
                    raise ConversationError(f"{problem}: tools and their calls cannot be trained on")
                raise ConversationError(
                    f"{problem}; roles are {', '.join(ROLES)}: name it under the one that it has, as in "
                    f"columns.roles.user=[{role}] (of data.sources.NAME)"
                )
        for role, names in self._names.items():
            if len(names) > 1 and "name" not in self.config.ignore:
                raise ConversationError(
                    f"messages of the {role} have several names ({', '.join(sorted(names))}): ChatML does not say who "
                    f"of them speaks{ignore_advice('name')}"
                )

    def finish(self, conversation: Sequence[Message], messages: str | None) -> None:
        """Refuse unused columns that hold a part of the conversation, and note the others.

        Args:
            conversation: All messages that were read.
            messages: The column of a list of messages, if they are from one.
        """
        unused = [column for column, value in self.row.items() if column not in self._used and is_filled(value)]
        self._check_unused(unused, conversation, messages)
        self.unused.update(map(str, unused))

    def _check_unused(self, unused: Sequence[str], conversation: Sequence[Message], messages: str | None) -> None:
        contents = [message.content for message in conversation]
        for column in unused:
            if column in self.config.ignore:
                continue
            if column in self.named:
                if messages is None:
                    setting = next(name for name in NAMED if getattr(self.config, name) == column)
                    raise ConversationError(f"columns.{setting} names {column}, which this objective does not read")
                raise ConversationError(
                    f"{column} is a column next to a prompt and an answer, and the row has {messages}"
                )
            texts = [text.strip() for text in _texts(self.row[column])]
            is_repeated = all(any(text in content for content in contents) for text in texts)
            is_rendering = len(texts) == 1 and all(
                line.strip() in texts[0] for content in contents for line in content.splitlines()
            )
            if is_repeated or is_rendering:
                continue
            name = str(column).lower()
            word = re.split("[_ -]", name)[-1].rstrip("0123456789")
            if word in MAY_BELONG_TO_QUESTION and (not isinstance(self.row[column], str) or len(texts[0].split()) > 1):
                appends = messages is None and isinstance(self.row[column], str)
                use = f"; columns.input={column} appends it" if appends else ""
                raise ConversationError(
                    f"the column {column} is not used, and the question may be about it{use}{ignore_advice(column)}"
                )
            if (problem := self.unread_answer(name, column, conversation, messages)) is not None:
                raise ConversationError(problem)

    def unread_answer(
        self, name: str, column: str, conversation: Sequence[Message], messages: str | None
    ) -> str | None:
        """Return why an unused column seems to hold the answer; None if it does not."""
        return None


def ignore_advice(key: Any) -> str:
    """Return how a column or key that refuses a row is left out, to end a message."""
    return f" (data.sources.NAME.columns.ignore=[{key}] trains without it)"


def is_preference(column: Any) -> bool:
    """True if a column's name is one of better and worse answers, or of what is known of them."""
    name = str(column).lower()
    return name in PREFERENCES or not PREFERENCE_WORDS.isdisjoint(name.replace("-", "_").split("_"))


def is_label(value: Any) -> bool:
    """True if a label says good or bad, not which of several classes."""
    if isinstance(value, list):
        return any(map(is_label, value))
    return value in (0, 1) or str(value).lower() in ("0", "1", "true", "false", "desirable", "undesirable")


def is_filled(value: Any) -> bool:
    """False for null, NaN, blank texts, and lists and objects of nothing else."""
    if isinstance(value, str | bytes):
        return bool(value.strip())
    if isinstance(value, dict):
        return any(map(is_filled, value.values()))
    if isinstance(value, list):
        return any(map(is_filled, value))
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in nested lists and objects that are not blank."""
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _objects(value: Any, position: str) -> Any:
    """Return a list of objects that `datasets` gives as an object of lists; other values as they are."""
    if not isinstance(value, dict) or not value or not all(isinstance(part, list) for part in value.values()):
        return value
    if len({len(part) for part in value.values()}) > 1:
        raise ConversationError(f"{position} has lists of different lengths: {', '.join(map(str, value))}")
    return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]


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
