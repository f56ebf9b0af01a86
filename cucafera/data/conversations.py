"""Finetuning data: complete conversations packed into windows, in which they do not see each other.

n  tokens of a conversation, up to the <im_end> of its last answer
T  sequence_length; a conversation takes n - 1 positions of a window, since its last token is only a target
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cucafera.config.errors import UserError, one_line
from cucafera.config.schema import Config, SourceConfig
from cucafera.config.tokens import IM_END_ID, PAD_ID
from cucafera.data.chatml import Rendered, render, up_to_last_answer
from cucafera.data.conversation_formats import conversation_of_row
from cucafera.data.inspection import pieces, text_of
from cucafera.data.language import is_in_language
from cucafera.data.left_out import LeftOut, counted
from cucafera.data.packing import best_fit
from cucafera.data.prepared import (
    SUMMARY,
    PreparationProgress,
    prepare_once,
    prepared_folders,
    read_summary,
)
from cucafera.data.repetition import is_repetitive
from cucafera.data.run_data import RunData, load_tokenizer, short_hash
from cucafera.data.sources import CorpusError, is_held_out, open_source
from cucafera.data.split import complete_text, first_question
from cucafera.data.tokenized_conversations import (
    TokenizedConversations,
    joined,
    read_conversations,
    write_conversations,
)
from cucafera.data.tokenizer import CUT, Tokenizer
from cucafera.data.windows import IGNORED, OpenedSource, Window
from cucafera.quantities import number_of
from cucafera.storage import write_json_with_checksum

VERSION = 7
"""Increased whenever the same rows would be prepared differently."""
CONVERSATIONS_AT_A_TIME = 1000
TRAINING_FILE, VALIDATION_FILE = "train.npz", "validation.npz"
COLUMNS_SHOWN = 20
LINES_SHOWN = 30
"""Lines of the first conversation that are shown when training begins."""


@dataclass
class PreparedConversations:
    """Counts of the conversations of one source: the content of prepared.json."""

    tokenizer: str = ""
    """Fingerprint."""
    conversations: int = 0
    """Conversations to train on."""
    held_out: int = 0
    """Conversations to validate on."""
    repetitive: int = 0
    """Left out, because an answer repeats itself."""
    other_language: int = 0
    """Left out, because the answers are in another language than data.language."""
    broken: int = 0
    """Left out, because they cannot be read or are no conversations."""
    first_broken: str = ""
    """Position of the first of those, and its problem."""
    messages: int = 0
    """Messages of the conversations that are not left out."""
    cut_messages: int = 0
    """Those with a word that is too long for the tokenizer; see `Tokenizer.texts_cut`."""
    unused: list[str] = field(default_factory=list)
    """Columns and keys of messages that hold something and are not used."""
    split_by_conversation: bool = False
    """Held out by the hash of the complete conversation, since that of the first question leaves a side empty."""
    notes: list[str] = field(default_factory=list)
    """Facts about the source that a person should know, as clauses."""
    fingerprint: str = ""
    """SHA-256 of the tokens to train on."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file."""


class ConversationWindows:
    """Windows of complete conversations, packed by best fit; the rest of a window is padding.

    A conversation that is longer than a window is cut after the last answer that still fits; if none does, it is left
    out. So every window has something to train on.

    Args:
        conversations: The conversations.
        length: T.

    Attributes:
        kept: Conversations in the windows.
        cut, left_out: Conversations too long for a window: cut after an answer, or left out.
        tokens: Positions that are not padding.
        targets: Tokens that are trained.
    """

    def __init__(self, conversations: TokenizedConversations, length: int) -> None:
        self.conversations = conversations
        self.length = length
        self.cut = self.left_out = self.targets = 0
        kept: list[tuple[int, int]] = []
        for number in range(len(conversations)):
            rendered = conversations.conversation(number)
            size = tokens_that_fit(rendered, length)
            self.cut += 0 < size < len(rendered.ids) - 1
            self.left_out += size == 0
            if size:
                kept.append((number, size))
                self.targets += int(rendered.trained[1 : size + 1].sum())
        self.kept = len(kept)
        self.tokens = sum(size for _, size in kept)
        bins = best_fit([size for _, size in kept], length)
        self._windows = [[kept[item] for item in items] for items in bins]

    def __len__(self) -> int:
        return len(self._windows)

    def lengths(self, most_tokens: int) -> NDArray[np.int64]:
        """Return the tokens of each conversation, those that are left out or cut included."""
        return np.diff(self.conversations.ends, prepend=0)

    def window(self, number: int) -> Window:
        """Return conversations one after another, then padding, which is a document of its own."""
        input_ids = np.full(self.length, PAD_ID, dtype=np.int32)
        targets = np.full(self.length, IGNORED, dtype=np.int32)
        documents = np.full(self.length, len(self._windows[number]), dtype=np.int32)
        start = 0
        for document, (conversation, size) in enumerate(self._windows[number]):
            rendered = self.conversations.conversation(conversation)
            ids = rendered.ids.astype(np.int32)  # IGNORED does not fit uint16
            span = slice(start, start + size)
            input_ids[span] = ids[:size]
            targets[span] = np.where(rendered.trained[1 : size + 1], ids[1 : size + 1], IGNORED)
            documents[span] = document
            start += size
        return Window(input_ids, targets, documents)


def tokens_that_fit(rendered: Rendered, length: int) -> int:
    """Return how many tokens of a conversation fit a window, up to an answer's <im_end>; 0 if no answer fits."""
    if len(rendered.ids) - 1 <= length:
        return len(rendered.ids) - 1
    ends = np.flatnonzero(rendered.trained & (rendered.ids == IM_END_ID))
    fitting = ends[ends <= length]
    return int(fitting[-1]) if len(fitting) else 0


class ConversationData(RunData[ConversationWindows]):
    """The conversations of a finetuning run, tokenized and packed."""

    noun = "conversation"
    piece = "conversation"

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        sources: Mapping[str, OpenedSource[ConversationWindows]],
        summaries: Mapping[str, PreparedConversations],
    ) -> None:
        left_out = [entry for name, summary in summaries.items() for entry in _left_out(name, summary, sources[name])]
        super().__init__(config, tokenizer, sources, left_out)
        self._summaries = summaries

    def describe(self) -> str:
        """Return the amounts of conversations, and the first of them with its loss mask."""
        lines = []
        for (name, summary), training, validation in zip(
            self._summaries.items(), self.training, self.validation, strict=True
        ):
            positions = len(training) * self.config.sequence_length
            lines.append(
                f"Data    {name}: {number_of(training.kept, 'conversation')} in "
                f"{number_of(len(training), 'window')}, {validation.kept:,} "
                f"held out; {1 - training.tokens / positions:.1%} padding, "
                f"{training.targets / positions:.1%} trained on"
            )
            if summary.unused:
                more = len(summary.unused) - COLUMNS_SHOWN
                shown = ", ".join(summary.unused[:COLUMNS_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
                lines.append(f"        columns and keys that are not used: {shown}")
            if summary.split_by_conversation:
                lines.append(
                    "        held out by the hash of the complete conversation: by that of the first question, all "
                    "would be on one side"
                )
        lines += [f"        {note}" for note in self.notes]
        lines.append(f"        seen {self.epochs_at(self.config.total_steps):.2f} times")
        lines.append("The first conversation as the model sees it; the text in ⟦ ⟧ is trained on:")
        first = self._first_conversation().split("\n")
        lines += ["        " + line for line in first[:LINES_SHOWN]]
        if len(first) > LINES_SHOWN:
            lines.append(f"        … ({len(first) - LINES_SHOWN} more lines)")
        return "\n".join(lines)

    def _first_conversation(self) -> str:
        """The first conversation of the first step, rebuilt from the model's inputs and targets."""
        source, number = (int(found[0]) for found in self.order.windows(0, 1))
        return text_of(next(pieces(self.training[source].window(number))), self.tokenizer)


def _left_out(name: str, summary: PreparedConversations, windows: OpenedSource[ConversationWindows]) -> list[LeftOut]:
    """Return what was left out of a source, and what was not used as it is."""
    kept = summary.conversations + summary.held_out
    rows = kept + summary.repetitive + summary.other_language + summary.broken
    cut = windows.training.cut + windows.validation.cut
    too_long = windows.training.left_out + windows.validation.left_out
    return counted(
        LeftOut(name, summary.broken, rows, "conversations could not be used: left out", summary.first_broken),
        LeftOut(name, summary.repetitive, rows, "conversations left out: an answer repeats itself"),
        LeftOut(name, summary.other_language, rows, "conversations left out: their answers are in another language"),
        LeftOut(name, too_long, kept, "conversations left out: no answer ends within a window"),
        LeftOut(name, cut, kept, "conversations are longer than a window: cut after an answer"),
        LeftOut(name, summary.cut_messages, summary.messages, f"messages {CUT}"),
    )


def open_conversations(config: Config) -> ConversationData:
    """Tokenize the conversations of every source, and pack them into windows.

    What was prepared before, for this run or another, is found by the hash of what it was made from.

    Raises:
        UserError: A source cannot be read, or has no conversation that fits a window, or none is held out.
    """
    tokenizer = load_tokenizer(config)
    folders = {name: _tokenized(name, source, config, tokenizer) for name, source in config.data.sources.items()}
    summaries = {name: PreparedConversations(**read_summary(folder)) for name, folder in folders.items()}
    sources = {name: _opened(name, folder, summaries[name], config) for name, folder in folders.items()}
    data = ConversationData(config, tokenizer, sources, summaries)
    if not data.validation_positions():
        raise UserError(_empty_validation_message(data))
    return data


def _tokenized(name: str, source: SourceConfig, config: Config, tokenizer: Tokenizer) -> Path:
    """The folder with the tokenized conversations of a source, made if it is not there."""
    data = config.data
    settings = (VERSION, data.validation_fraction, data.skip_broken_lines, data.max_5gram_repeats)
    # What was prepared before languages could be named keeps its folder.
    language = () if data.language is None else (data.language,)
    key = short_hash(open_source(name, source).fingerprint(), tokenizer.fingerprint, *settings, *language)
    folder = Path(data.prepared_dir) / f"conversations-{key}"
    made = prepare_once(
        f"data.sources.{name}", folder, lambda partial: _write_tokenized(name, source, config, tokenizer, partial)
    )
    summary = PreparedConversations(**made)
    if not summary.conversations:
        raise CorpusError(
            f"data.sources.{name} holds no conversation to train on: {summary.broken:,} could not be used, "
            f"{summary.repetitive:,} repeat themselves, {summary.other_language:,} are in another language, "
            f"{summary.held_out:,} are held out "
            f"(data.validation_fraction={data.validation_fraction})"
            + (f". The first that could not be used: {summary.first_broken}" if summary.broken else "")
        )
    return folder


def _opened(
    name: str, folder: Path, summary: PreparedConversations, config: Config
) -> OpenedSource[ConversationWindows]:
    """The packed windows of the tokenized conversations of a source."""
    length = config.sequence_length
    training, validation = (
        ConversationWindows(read_conversations(folder / file, summary.files[file], config.model.vocab_size), length)
        for file in (TRAINING_FILE, VALIDATION_FILE)
    )
    if not len(training):
        raise UserError(
            f"data.sources.{name}: not one of {number_of(summary.conversations, 'conversation')} has an "
            "answer that ends "
            f"within the window of {number_of(length, 'token')}: set a larger sequence_length"
        )
    return OpenedSource(training, validation, summary.fingerprint, summary.notes)


def _empty_validation_message(data: ConversationData) -> str:
    if any(windows.left_out for windows in data.validation):
        return (
            f"not one of the held-out conversations has an answer that ends within the window of "
            f"{number_of(data.config.sequence_length, 'token')}: set a larger sequence_length, or "
            "data.validation_fraction"
        )
    return (
        f"no conversation is held out for validation (data.validation_fraction="
        f"{data.config.data.validation_fraction}): give more different conversations, or a larger fraction"
    )


def held_out_conversations(prepared: Path, fingerprint: str, vocab_size: int) -> TokenizedConversations | None:
    """Find the held-out conversations of a source of a run.

    Args:
        prepared: data.prepared_dir of the run.
        fingerprint: Of its training data; see `OpenedSource`.
        vocab_size: Of the run.

    Returns:
        None if they are gone.

    Raises:
        PreparedDataError: They are damaged.
    """
    for folder in prepared_folders(prepared, "conversations-"):
        summary = PreparedConversations(**read_summary(folder))
        if summary.fingerprint == fingerprint:
            return read_conversations(folder / VALIDATION_FILE, summary.files[VALIDATION_FILE], vocab_size)
    return None


def _write_tokenized(name: str, source: SourceConfig, config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Read, split and tokenize the conversations of a source into train.npz and validation.npz."""
    data = config.data
    opened = open_source(name, source, data.skip_broken_lines)
    summary = PreparedConversations(tokenizer=tokenizer.fingerprint)
    cut_before = tokenizer.texts_cut
    unused: set[str] = set()
    kept: list[Rendered] = []
    by_question: list[bool] = []
    by_conversation: list[bool] = []
    rows = opened.convert(lambda row: conversation_of_row(row, source.columns, unused))
    with PreparationProgress(f"Tokenizing {name}", opened.size_bytes()) as progress:
        while batch := list(islice(rows, CONVERSATIONS_AT_A_TIME)):
            conversations = [
                conversation
                for conversation, _ in batch
                if data.max_5gram_repeats is None or not is_repetitive(conversation, data.max_5gram_repeats)
            ]
            summary.repetitive += len(batch) - len(conversations)
            understood = [messages for messages in conversations if is_in_language(messages, data.language)]
            summary.other_language += len(conversations) - len(understood)
            conversations = understood
            summary.messages += sum(map(len, conversations))
            tokens = 0
            for conversation, rendered in zip(conversations, render(conversations, tokenizer), strict=True):
                kept.append(up_to_last_answer(rendered))
                by_question.append(is_held_out(first_question(conversation), data.validation_fraction))
                by_conversation.append(is_held_out(complete_text(conversation), data.validation_fraction))
                tokens += len(kept[-1].ids)
            text_bytes = sum(len(message.content.encode()) for messages in conversations for message in messages)
            progress.advance(sum(size for _, size in batch), text_bytes, tokens)
    summary.split_by_conversation = len(set(by_question)) == 1 and len(set(by_conversation)) == 2
    split = by_conversation if summary.split_by_conversation else by_question
    summary.cut_messages = tokenizer.texts_cut - cut_before
    summary.held_out = sum(split)
    summary.conversations = len(split) - summary.held_out
    summary.unused = sorted(map(one_line, unused))
    summary.broken, summary.first_broken = opened.counts.broken, opened.counts.first_broken
    summary.notes = opened.counts.notes
    folder.mkdir(parents=True)
    for held_out, file_name in ((False, TRAINING_FILE), (True, VALIDATION_FILE)):
        tokenized = joined([rendered for rendered, side in zip(kept, split, strict=True) if side == held_out])
        if not held_out:
            summary.fingerprint = hashlib.sha256(b"".join(part.tobytes() for part in tokenized)).hexdigest()
        summary.files[file_name] = write_conversations(folder / file_name, tokenized)
    write_json_with_checksum(folder / SUMMARY, asdict(summary))
