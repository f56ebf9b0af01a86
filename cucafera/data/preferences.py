"""Preference data: pairs of a better and a worse answer to a prompt, packed into windows.

n  tokens of a conversation: the prompt and one of its two answers, up to the <im_end> of the answer
T  sequence_length; a pair takes the (n - 1) positions of both conversations, next to each other in one window
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
from cucafera.config.tokens import PAD_ID
from cucafera.data.chatml import Rendered, render, up_to_last_answer
from cucafera.data.inspection import pieces, text_of
from cucafera.data.language import is_in_language
from cucafera.data.left_out import LeftOut, counted
from cucafera.data.packing import best_fit
from cucafera.data.preference_formats import Preference, preference_of_row
from cucafera.data.prepared import SUMMARY, PreparationProgress, prepare_once, prepared_folders, read_summary
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

VERSION = 3
"""Increased whenever the same rows would be prepared differently."""
PAIRS_AT_A_TIME = 500
TRAINING_FILE, VALIDATION_FILE = "train.npz", "validation.npz"
FOLDER = "preferences-"
COLUMNS_SHOWN = 20


@dataclass
class PreparedPreferences:
    """Counts of the pairs of one source: the content of prepared.json."""

    tokenizer: str = ""
    """Fingerprint."""
    pairs: int = 0
    """Pairs to train on."""
    held_out: int = 0
    """Pairs to validate on."""
    repetitive: int = 0
    """Left out, because the better answer repeats itself."""
    other_language: int = 0
    """Left out, because the better answer is in another language than data.language."""
    broken: int = 0
    """Left out, because they cannot be read or are no pairs."""
    first_broken: str = ""
    """Position of the first of those, and its problem."""
    messages: int = 0
    """Messages of the conversations of the pairs that are not left out."""
    cut_messages: int = 0
    """Those with a word that is too long for the tokenizer; see `Tokenizer.texts_cut`."""
    unused: list[str] = field(default_factory=list)
    """Columns and keys of messages that hold something and are not used."""
    split_by_prompt: bool = False
    """Held out by the hash of the complete prompt, since that of the first question leaves a side empty."""
    notes: list[str] = field(default_factory=list)
    """Facts about the source that a person should know, as clauses."""
    fingerprint: str = ""
    """SHA-256 of the tokens of all pairs, the held-out ones too: reference log-probabilities are kept of both."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file."""


class PreferenceWindows:
    """Windows of complete pairs, packed by best fit; the rest of a window is padding.

    The two conversations of a pair are the documents 2k and 2k + 1 of a window, the better one first. A pair that is
    longer than a window is left out: cut, its answers would be compared by another end.

    Args:
        conversations: Those of pair p are number 2p and 2p + 1.
        length: T.

    Attributes:
        pairs: Number of pairs.
        kept: Those in the windows.
        left_out: Those too long for a window.
        tokens: Positions that are not padding.
        targets: Tokens of the answers.
        reference_logprobs: Log-probability of both answers of each pair under another model, [pairs, 2] float64, which
            windows then carry; None: they carry none.
    """

    def __init__(self, conversations: TokenizedConversations, length: int) -> None:
        self.conversations = conversations
        self.length = length
        self.pairs = len(conversations) // 2
        self.reference_logprobs: NDArray[np.float64] | None = None
        sizes = self.lengths(0)
        kept = np.flatnonzero(sizes <= length).tolist()
        self.kept, self.left_out = len(kept), self.pairs - len(kept)
        self.tokens = int(sizes[kept].sum())
        self._windows = [[kept[item] for item in items] for items in best_fit(sizes[kept].tolist(), length)]
        compared = np.cumsum(conversations.trained, dtype=np.int64)[conversations.ends[1::2] - 1]
        self.targets = int(np.diff(compared, prepend=0)[kept].sum())

    def __len__(self) -> int:
        return len(self._windows)

    def lengths(self, most_tokens: int) -> NDArray[np.int64]:
        """Return the positions that each pair takes, those that are left out included: n - 1 of each conversation."""
        return np.diff(self.conversations.ends[1::2], prepend=0) - 2

    def pairs_of(self, window: int) -> list[int]:
        """Return the numbers of the pairs in a window, in the order of its documents."""
        return self._windows[window]

    def window(self, number: int) -> Window:
        """Return pairs one after another, then padding, which is a document of its own."""
        pairs = self._windows[number]
        input_ids = np.full(self.length, PAD_ID, dtype=np.int32)
        targets = np.full(self.length, IGNORED, dtype=np.int32)
        documents = np.full(self.length, 2 * len(pairs), dtype=np.int32)
        start = 0
        for document, conversation in enumerate(2 * pair + side for pair in pairs for side in (0, 1)):
            rendered = self.conversations.conversation(conversation)
            ids = rendered.ids.astype(np.int32)  # IGNORED does not fit uint16
            span = slice(start, start + len(ids) - 1)
            input_ids[span] = ids[:-1]
            targets[span] = np.where(rendered.trained[1:], ids[1:], IGNORED)
            documents[span] = document
            start = span.stop
        known = None if self.reference_logprobs is None else self.reference_logprobs[pairs].flatten()
        return Window(input_ids, targets, documents, known)


class PreferenceData(RunData[PreferenceWindows]):
    """The pairs of a run, tokenized and packed."""

    noun = "pair"
    piece = "conversation"
    use = "compared"

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        sources: Mapping[str, OpenedSource[PreferenceWindows]],
        summaries: Mapping[str, PreparedPreferences],
    ) -> None:
        left_out = [entry for name, summary in summaries.items() for entry in _left_out(name, summary, sources[name])]
        super().__init__(config, tokenizer, sources, left_out)
        self._summaries = summaries

    def name_of_piece(self, number: int) -> str:
        """Return the number of a pair in a window, and which of its answers this is."""
        return f"pair {number // 2 + 1}, {'worse' if number % 2 else 'better'} answer"

    def describe(self) -> str:
        """Return the amounts of pairs, and the first of them with the answers that are compared."""
        lines = []
        for (name, summary), training, validation in zip(
            self._summaries.items(), self.training, self.validation, strict=True
        ):
            positions = len(training) * self.config.sequence_length
            lines.append(
                f"Data    {name}: {number_of(training.kept, 'pair')} in {number_of(len(training), 'window')}, "
                f"{validation.kept:,} held out; {1 - training.tokens / positions:.1%} padding, "
                f"{training.targets / positions:.1%} answers"
            )
            if summary.unused:
                more = len(summary.unused) - COLUMNS_SHOWN
                shown = ", ".join(summary.unused[:COLUMNS_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
                lines.append(f"        columns and keys that are not used: {shown}")
            if summary.split_by_prompt:
                lines.append(
                    "        held out by the hash of the complete prompt: by that of the first question, all would be "
                    "on one side"
                )
        pairs_per_step = self.config.windows_per_step * sum(windows.kept for windows in self.training)
        pairs_per_step //= sum(map(len, self.training))
        lines += [f"        {note}" for note in self.notes]
        lines.append(
            f"        seen {self.epochs_at(self.config.total_steps):.2f} times; about "
            f"{number_of(pairs_per_step, 'pair')} per step"
        )
        lines.append("The first pair as the model sees it; the answers in ⟦ ⟧ are compared, the better one first:")
        lines += [f"        {line}" for text in self._first_pair() for line in text.split("\n")]
        return "\n".join(lines)

    def _first_pair(self) -> list[str]:
        """Both conversations of the first pair of the first step, rebuilt from the model's inputs and targets."""
        source, number = (int(found[0]) for found in self.order.windows(0, 1))
        return [text_of(piece, self.tokenizer) for piece in islice(pieces(self.training[source].window(number)), 2)]


def _left_out(name: str, summary: PreparedPreferences, windows: OpenedSource[PreferenceWindows]) -> list[LeftOut]:
    """Return what was left out of a source, and what was not used as it is."""
    kept = summary.pairs + summary.held_out
    rows = kept + summary.repetitive + summary.other_language + summary.broken
    too_long = windows.training.left_out + windows.validation.left_out
    return counted(
        LeftOut(name, summary.broken, rows, "pairs could not be used: left out", summary.first_broken),
        LeftOut(name, summary.repetitive, rows, "pairs left out: the better answer repeats itself"),
        LeftOut(name, summary.other_language, rows, "pairs left out: the better answer is in another language"),
        LeftOut(name, too_long, kept, "pairs left out: both conversations do not fit a window together"),
        LeftOut(name, summary.cut_messages, summary.messages, f"messages {CUT}"),
    )


def open_preferences(config: Config) -> PreferenceData:
    """Tokenize the pairs of every source, and pack them into windows.

    What was prepared before, for this run or another, is found by the hash of what it was made from.

    Raises:
        UserError: A source cannot be read, or has no pair that fits a window, or none is held out.
    """
    tokenizer = load_tokenizer(config)
    folders = {name: _tokenized(name, source, config, tokenizer) for name, source in config.data.sources.items()}
    summaries = {name: PreparedPreferences(**read_summary(folder)) for name, folder in folders.items()}
    sources = {name: _opened(name, folder, summaries[name], config) for name, folder in folders.items()}
    data = PreferenceData(config, tokenizer, sources, summaries)
    if not data.validation_positions():
        raise UserError(_empty_validation_message(data))
    return data


def _tokenized(name: str, source: SourceConfig, config: Config, tokenizer: Tokenizer) -> Path:
    """The folder with the tokenized pairs of a source, made if it is not there."""
    data = config.data
    settings = (VERSION, data.validation_fraction, data.skip_broken_lines, data.max_5gram_repeats, data.language)
    key = short_hash(open_source(name, source).fingerprint(), tokenizer.fingerprint, *settings)
    folder = Path(data.prepared_dir) / f"{FOLDER}{key}"
    made = prepare_once(
        f"data.sources.{name}", folder, lambda partial: _write_tokenized(name, source, config, tokenizer, partial)
    )
    summary = PreparedPreferences(**made)
    if not summary.pairs:
        raise CorpusError(
            f"data.sources.{name} holds no pair to train on: {summary.broken:,} could not be used, "
            f"{summary.repetitive:,} repeat themselves, {summary.other_language:,} are in another language, "
            f"{summary.held_out:,} are held out (data.validation_fraction={data.validation_fraction})"
            + (f". The first that could not be used: {summary.first_broken}" if summary.broken else "")
        )
    return folder


def _opened(name: str, folder: Path, summary: PreparedPreferences, config: Config) -> OpenedSource[PreferenceWindows]:
    """The packed windows of the tokenized pairs of a source."""
    length = config.sequence_length
    training, validation = (
        PreferenceWindows(read_conversations(folder / file, summary.files[file], config.model.vocab_size), length)
        for file in (TRAINING_FILE, VALIDATION_FILE)
    )
    if not len(training):
        raise UserError(
            f"data.sources.{name}: not one of {number_of(summary.pairs, 'pair')} fits the window of "
            f"{number_of(length, 'token')} with both answers, each after its prompt: set a larger sequence_length"
        )
    return OpenedSource(training, validation, summary.fingerprint, summary.notes)


def _empty_validation_message(data: PreferenceData) -> str:
    if any(windows.left_out for windows in data.validation):
        return (
            f"not one of the held-out pairs fits the window of {number_of(data.config.sequence_length, 'token')}: set "
            "a larger sequence_length, or data.validation_fraction"
        )
    return (
        f"no pair is held out for validation (data.validation_fraction={data.config.data.validation_fraction}): give "
        "more different prompts, or a larger fraction"
    )


def held_out_pairs(prepared: Path, fingerprint: str, vocab_size: int) -> TokenizedConversations | None:
    """Find the held-out pairs of a source of a run: the conversations 2p and 2p + 1 are those of pair p.

    Args:
        prepared: data.prepared_dir of the run.
        fingerprint: Of its pairs; see `OpenedSource`.
        vocab_size: Of the run.

    Returns:
        None if they are gone.

    Raises:
        PreparedDataError: They are damaged.
    """
    for folder in prepared_folders(prepared, FOLDER):
        summary = PreparedPreferences(**read_summary(folder))
        if summary.fingerprint == fingerprint:
            return read_conversations(folder / VALIDATION_FILE, summary.files[VALIDATION_FILE], vocab_size)
    return None


def _write_tokenized(name: str, source: SourceConfig, config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Read, split and tokenize the pairs of a source into train.npz and validation.npz."""
    data = config.data
    opened = open_source(name, source, data.skip_broken_lines)
    summary = PreparedPreferences(tokenizer=tokenizer.fingerprint)
    cut_before = tokenizer.texts_cut
    unused: set[str] = set()
    kept: list[list[Rendered]] = []
    by_question: list[bool] = []
    by_prompt: list[bool] = []
    rows = opened.convert(lambda row: preference_of_row(row, source.columns, unused))
    with PreparationProgress(f"Tokenizing {name}", opened.size_bytes()) as progress:
        while batch := list(islice(rows, PAIRS_AT_A_TIME)):
            pairs = [pair for pair, _ in batch if not _is_repetitive(pair, data.max_5gram_repeats)]
            summary.repetitive += len(batch) - len(pairs)
            understood = [pair for pair in pairs if is_in_language(pair.chosen, data.language)]
            summary.other_language += len(pairs) - len(understood)
            conversations = [[*pair.prompt, *answer] for pair in understood for answer in (pair.chosen, pair.rejected)]
            ends = [ended for pair in understood for ended in pair.ended]
            rendered = [
                _answered(tokens, ended) for tokens, ended in zip(render(conversations, tokenizer), ends, strict=True)
            ]
            for number, pair in enumerate(understood):
                kept.append(rendered[2 * number : 2 * number + 2])
                prompt = [message for message in pair.prompt if message.role != "system"]
                by_question.append(is_held_out(first_question(prompt), data.validation_fraction))
                by_prompt.append(is_held_out(complete_text(prompt), data.validation_fraction))
            summary.messages += sum(map(len, conversations))
            text_bytes = sum(len(message.content.encode()) for messages in conversations for message in messages)
            tokens = sum(len(one.ids) for one in rendered)
            progress.advance(sum(size for _, size in batch), text_bytes, tokens)
    summary.split_by_prompt = len(set(by_question)) == 1 and len(set(by_prompt)) == 2
    split = by_prompt if summary.split_by_prompt else by_question
    summary.cut_messages = tokenizer.texts_cut - cut_before
    summary.held_out = sum(split)
    summary.pairs = len(split) - summary.held_out
    summary.unused = sorted(map(one_line, unused))
    summary.broken, summary.first_broken = opened.counts.broken, opened.counts.first_broken
    summary.notes = opened.counts.notes
    folder.mkdir(parents=True)
    digest = hashlib.sha256()
    for held_out, file_name in ((False, TRAINING_FILE), (True, VALIDATION_FILE)):
        pairs_of_side = [pair for pair, side in zip(kept, split, strict=True) if side == held_out]
        tokenized = joined([conversation for pair in pairs_of_side for conversation in pair])
        for part in tokenized:
            digest.update(f"{file_name} {len(part)}".encode() + part.tobytes())
        summary.files[file_name] = write_conversations(folder / file_name, tokenized)
    summary.fingerprint = digest.hexdigest()
    write_json_with_checksum(folder / SUMMARY, asdict(summary))


def _answered(rendered: Rendered, ended: bool) -> Rendered:
    """Return a conversation up to the <im_end> of its last answer; without it, if the answer did not end there."""
    complete = up_to_last_answer(rendered)
    return complete if ended else Rendered(complete.ids[:-1], complete.trained[:-1])


def _is_repetitive(pair: Preference, times: int | None) -> bool:
    return times is not None and is_repetitive(list(pair.chosen), times)
