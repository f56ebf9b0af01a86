"""Finetuning data: whole conversations packed into windows, in which they do not see each other.

n  tokens of a conversation, up to the <im_end> of its last answer
T  sequence_length; a conversation takes n - 1 places of a window, since its last token is only a target
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cucafera.config import Config, SourceConfig, UserError
from cucafera.data.chat import Conversation, Message, Rendered, render, render_prompt
from cucafera.data.corpus import (
    CorpusError,
    ReadCounts,
    is_held_out,
    read_rows,
    source_bytes,
    source_fingerprint,
)
from cucafera.data.files import file_sha256, flush, write_sealed
from cucafera.data.formats import conversation_of_row, is_repetitive
from cucafera.data.packing import best_fit
from cucafera.data.prepared import SUMMARY, PreparationProgress, damaged, prepare_once, read_summary
from cucafera.data.tokenizer import IM_END_ID, PAD_ID, Tokenizer
from cucafera.data.windows import IGNORED, OpenedSource, Window, WindowDataModule, short_hash

VERSION = 2
"""Changes whenever the same rows would be prepared in another way."""
CONVERSATIONS_AT_A_TIME = 1000
TRAINING_FILE, VALIDATION_FILE = "train.npz", "validation.npz"
LINES_SHOWN = 30
"""Lines of the first conversation that are shown when training begins."""


@dataclass
class PreparedConversations:
    """What became of the conversations of one source: the content of prepared.json."""

    tokenizer: str = ""
    """Fingerprint."""
    conversations: int = 0
    """Conversations to train on."""
    held_out: int = 0
    """Conversations to validate on."""
    repetitive: int = 0
    """Left out, because an answer repeats itself."""
    broken: int = 0
    """Left out, because they cannot be read or are no conversations."""
    first_broken: str = ""
    """Where the first of those is, and what is wrong with it."""
    identity: str = ""
    """SHA-256 of the tokens to train on."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file."""


class TokenizedConversations(NamedTuple):
    """Conversations laid end to end.

    Attributes:
        ids: Token ids, uint16.
        trained: True for what is trained, as long as `ids`.
        ends: Where each conversation ends in them.
    """

    ids: NDArray[np.uint16]
    trained: NDArray[np.bool_]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def conversation(self, number: int) -> Rendered:
        """One of them."""
        part = slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))
        return Rendered(self.ids[part], self.trained[part])


class ConversationWindows:
    """Windows of whole conversations, packed by best fit; what they leave free is padding.

    A conversation that is longer than a window is cut behind the last answer that still fits; if none does, it is left
    out. So every window has something to train on.

    Args:
        conversations: The conversations.
        length: T.

    Attributes:
        kept: Conversations in the windows.
        cut, left_out: How many were too long, and what became of them.
        places: Tokens that are no padding.
        targets: Tokens that are trained.
    """

    def __init__(self, conversations: TokenizedConversations, length: int) -> None:
        self.conversations = conversations
        self.length = length
        self.cut = self.left_out = self.targets = 0
        kept: list[tuple[int, int]] = []
        for number in range(len(conversations)):
            rendered = conversations.conversation(number)
            places = places_that_fit(rendered, length)
            self.cut += 0 < places < len(rendered.ids) - 1
            self.left_out += places == 0
            if places:
                kept.append((number, places))
                self.targets += int(rendered.trained[1 : places + 1].sum())
        self.kept = len(kept)
        self.places = sum(places for _, places in kept)
        bins = best_fit([places for _, places in kept], length)
        self._windows = [[kept[item] for item in items] for items in bins]

    def __len__(self) -> int:
        return len(self._windows)

    def window(self, number: int) -> Window:
        """Conversations one after another, then padding, which is a document of its own."""
        input_ids = np.full(self.length, PAD_ID, dtype=np.int32)
        targets = np.full(self.length, IGNORED, dtype=np.int32)
        documents = np.full(self.length, len(self._windows[number]), dtype=np.int32)
        start = 0
        for document, (conversation, places) in enumerate(self._windows[number]):
            rendered = self.conversations.conversation(conversation)
            ids = rendered.ids.astype(np.int32)  # IGNORED does not fit uint16
            here = slice(start, start + places)
            input_ids[here] = ids[:places]
            targets[here] = np.where(rendered.trained[1 : places + 1], ids[1 : places + 1], IGNORED)
            documents[here] = document
            start += places
        return Window(input_ids, targets, documents)


def places_that_fit(rendered: Rendered, length: int) -> int:
    """How many tokens of a conversation go into a window, up to an answer's <im_end>; 0 if no answer fits."""
    if len(rendered.ids) - 1 <= length:
        return len(rendered.ids) - 1
    ends = np.flatnonzero(rendered.trained & (rendered.ids == IM_END_ID))
    fitting = ends[ends <= length]
    return int(fitting[-1]) if len(fitting) else 0


class ChatDataModule(WindowDataModule[ConversationWindows]):
    """Conversations, in ChatML, of a finetuning run."""

    stop_id = IM_END_ID

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._summaries: dict[str, PreparedConversations] = {}

    def prepare_source(self, name: str, source: SourceConfig) -> None:
        """Tokenizes the conversations of a source."""
        data, tokenizer, folder = self.config.data, self.tokenizer, self._folder(source)
        made = prepare_once(
            f"data.sources.{name}", folder, lambda partial: _prepare(name, source, self.config, tokenizer, partial)
        )
        summary = PreparedConversations(**made)
        if not summary.conversations:
            raise CorpusError(
                f"data.sources.{name} holds no conversation to train on: {summary.broken:,} could not be used, "
                f"{summary.repetitive:,} repeat themselves, {summary.held_out:,} are held out "
                f"(data.validation_fraction={data.validation_fraction})"
                + (f". The first that could not be used: {summary.first_broken}" if summary.broken else "")
            )

    def open_source(self, name: str, source: SourceConfig) -> OpenedSource[ConversationWindows]:
        """Opens the tokenized conversations of a source, and packs them."""
        folder, length = self._folder(source), self.config.sequence_length
        summary = self._summaries[name] = PreparedConversations(**read_summary(folder))
        training, validation = (
            ConversationWindows(_read(folder / name, summary.files[name], self.config.model.vocab_size), length)
            for name in (TRAINING_FILE, VALIDATION_FILE)
        )
        if not len(training):
            raise UserError(
                f"data.sources.{name}: not one of {summary.conversations:,} conversations has an answer that ends "
                f"within the window of {length:,} tokens: set a larger sequence_length"
            )
        return OpenedSource(training, validation, summary.identity)

    def nothing_held_out(self) -> str:
        """The message that there is no window to validate on."""
        if any(windows.left_out for windows in self.validation_sources):
            return (
                f"not one of the held-out conversations has an answer that ends within the window of "
                f"{self.config.sequence_length:,} tokens: set a larger sequence_length, or data.validation_fraction"
            )
        return (
            f"no conversation is held out for validation (data.validation_fraction="
            f"{self.config.data.validation_fraction}): give more conversations, or a larger fraction"
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """A question of the user, and the opening of the answer."""
        return render_prompt([Message("user", prompt)], self.tokenizer)

    def describe(self) -> str:
        """The amounts of conversations, and the first of them with its mask."""
        lines = []
        names = self.config.data.sources
        for name, training, validation in zip(names, self.training_sources, self.validation_sources, strict=True):
            room = len(training) * self.config.sequence_length
            line = (
                f"Data    {name}: {training.kept:,} conversations in {len(training):,} windows, {validation.kept:,} "
                f"held out; {1 - training.places / room:.1%} padding, {training.targets / room:.1%} trained on"
            )
            cut, left_out = training.cut + validation.cut, training.left_out + validation.left_out
            if cut or left_out:
                line += f"; longer than a window: {cut:,} cut behind an answer, {left_out:,} left out"
            lines.append(line)
            summary = self._summaries[name]
            if summary.repetitive:
                lines.append(f"        {summary.repetitive:,} more left out: an answer repeats itself")
            if summary.broken:
                lines.append(f"        {summary.broken:,} more could not be used; the first: {summary.first_broken}")
        lines.append(f"        seen {self.epochs_at(self.config.total_steps):.2f} times")
        lines.append("The first conversation as the model sees it; it is trained on what stands in ⟦ ⟧:")
        first = self._first_conversation().split("\n")
        lines += ["        " + line for line in first[:LINES_SHOWN]]
        if len(first) > LINES_SHOWN:
            lines.append(f"        … ({len(first) - LINES_SHOWN} more lines)")
        return "\n".join(lines)

    def _first_conversation(self) -> str:
        """The first conversation of the first step, rebuilt from what the model is given."""
        source, number = (int(found[0]) for found in self.training_steps.order.windows(0, 1))
        window = self.training_sources[source].window(number)
        places = int((window.documents == 0).sum())
        tokens = [*window.input_ids[:places].tolist(), int(window.targets[places - 1])]
        trained = [False, *(window.targets[:places] != IGNORED).tolist()]
        text, start = "", 0
        for place in range(1, len(tokens) + 1):
            if place == len(tokens) or trained[place] != trained[start]:
                run = self.tokenizer.decode(tokens[start:place])
                text += f"⟦{run}⟧" if trained[start] else run
                start = place
        return text

    def _folder(self, source: SourceConfig) -> Path:
        data = self.config.data
        columns = [value for key, value in sorted(vars(source).items()) if key.endswith("_column")]
        settings = (VERSION, data.validation_fraction, data.skip_broken_lines, data.repeated_5grams)
        key = short_hash(source_fingerprint(source), self.tokenizer.fingerprint, *columns, *settings)
        return self.prepared / f"conversations-{key}"


def held_out_conversations(prepared: Path, identity: str, vocab_size: int) -> TokenizedConversations | None:
    """The held-out conversations of a source of a run, found again.

    Args:
        prepared: data.prepared_dir of the run.
        identity: Of its training data; see `OpenedSource`.
        vocab_size: Of the run.

    Returns:
        None if they are not there any more.

    Raises:
        PreparedDataError: they are damaged.
    """
    for path in prepared.glob(f"conversations-*/{SUMMARY}"):
        summary = PreparedConversations(**read_summary(path.parent))
        if summary.identity == identity:
            return _read(path.parent / VALIDATION_FILE, summary.files[VALIDATION_FILE], vocab_size)
    return None


def _prepare(name: str, source: SourceConfig, config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Reads, splits and tokenizes the conversations of a source into train.npz and validation.npz."""
    data = config.data
    counts = ReadCounts()
    summary = PreparedConversations(tokenizer=tokenizer.fingerprint)
    sides: dict[bool, list[Rendered]] = {False: [], True: []}
    rows = read_rows(name, source, data.skip_broken_lines, counts, lambda row: conversation_of_row(row, source))
    with PreparationProgress(f"Tokenizing {name}", source_bytes(source)) as progress:
        while batch := list(islice(rows, CONVERSATIONS_AT_A_TIME)):
            conversations = [
                conversation
                for conversation, _ in batch
                if data.repeated_5grams is None or not is_repetitive(conversation, data.repeated_5grams)
            ]
            summary.repetitive += len(batch) - len(conversations)
            tokens = 0
            for conversation, rendered in zip(conversations, render(conversations, tokenizer), strict=True):
                end = int(np.flatnonzero(rendered.trained)[-1]) + 1  # nothing behind the last answer is trained
                side = is_held_out(_question(conversation), data.validation_fraction)
                sides[side].append(Rendered(rendered.ids[:end], rendered.trained[:end]))
                tokens += end
            text_bytes = sum(len(message.content.encode()) for messages in conversations for message in messages)
            progress.advance(sum(size for _, size in batch), text_bytes, tokens)
    summary.conversations, summary.held_out = len(sides[False]), len(sides[True])
    summary.broken, summary.first_broken = counts.broken, counts.first_broken
    folder.mkdir(parents=True)
    for side, file_name in ((False, TRAINING_FILE), (True, VALIDATION_FILE)):
        joined = _joined(sides[side])
        if not side:
            summary.identity = hashlib.sha256(b"".join(part.tobytes() for part in joined)).hexdigest()
        with (folder / file_name).open("wb") as file:
            np.savez(file, ids=joined.ids, trained=joined.trained, ends=joined.ends)
            flush(file)
        summary.files[file_name] = file_sha256(folder / file_name)
    write_sealed(folder / SUMMARY, asdict(summary))


def _question(conversation: Conversation) -> str:
    """What the user says first: it decides the side, so that a question is never on both, whatever surrounds it."""
    contents = [message.content.strip() for message in conversation if message.role == "user"]
    return contents[0] if contents else "\n".join(message.content.strip() for message in conversation)


def _joined(conversations: Sequence[Rendered]) -> TokenizedConversations:
    return TokenizedConversations(
        np.concatenate([np.empty(0, np.uint16), *(rendered.ids for rendered in conversations)]),
        np.concatenate([np.empty(0, np.bool_), *(rendered.trained for rendered in conversations)]),
        np.cumsum([len(rendered.ids) for rendered in conversations], dtype=np.int64),
    )


def _read(path: Path, expected_sha256: str, vocab_size: int) -> TokenizedConversations:
    """Conversations that `_prepare` wrote."""
    try:
        if file_sha256(path) != expected_sha256:
            raise damaged(path, "it is not what was written")
        with np.load(path) as arrays:
            read = TokenizedConversations(arrays["ids"], arrays["trained"], arrays["ends"])
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror})") from error
    if len(read.ids) and int(read.ids.max()) >= vocab_size:
        raise damaged(path, f"it holds the id {int(read.ids.max()):,}; the vocabulary has {vocab_size:,} entries")
    return read
