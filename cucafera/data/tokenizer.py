"""The tokenizer: byte-level BPE with the control tokens at ids 0..9.

Text never yields a control token, whatever it spells: only the code that frames documents and conversations adds them.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from cucafera.config.errors import UserError
from cucafera.config.tokens import DOCUMENT_START_ID, MAX_VOCABULARY, SPECIAL_TOKENS
from cucafera.quantities import number_of
from cucafera.storage import read_small_file, write_text

WORD = re.compile(r"\s*+(?:\S++(?:[^\S \t\r\n]\s*+)?+)++|\s++")
"""Parts of a text that can be encoded one by one. They end where a space, tab or line end follows a visible character:
no match of the GPT-2 pattern reaches across such a position, so no merge does. (Other whitespace does not count, since
Python and the pattern disagree on U+001C to U+001F. Quantifiers are possessive: no backtracking on long texts.)"""

LONGEST_WORD = 16_384
"""Characters that the library gets as one word. It takes 150 bytes per character, and a stretch of text without spaces
may have millions."""
PART = re.compile(rf".{{1,{LONGEST_WORD}}}(?:\Z|(?<=[^\W_])(?=[^\w\s]))|(.{{{LONGEST_WORD}}})", re.DOTALL)
"""Parts of a longer word. They end where a sign follows a letter or digit: no match of the GPT-2 pattern reaches across
such a position either. If there is none, the word is cut: that part is the group."""

CUT = f"with over {LONGEST_WORD:,} letters, digits, signs or spaces in a row: tokenized in parts"
"""How texts are described that have a word which is cut."""

ENCODED_CHARACTERS = 64 * LONGEST_WORD
"""Text that is encoded at a time, whatever the length of a document."""
LIBRARY_CHARACTERS = 16 * LONGEST_WORD
"""Words that the library gets at a time."""

CACHED_CHARACTERS = 4_000_000
"""Size of the word cache, in characters of its words: about 100 MB of memory."""

LONGEST_TRAINED_WORD = 1024
"""Characters of a word that a tokenizer is trained on: the time of training grows with the square of its length."""
TRAINING_CHARACTERS = 16_384
"""Size of the excerpts of a document that a tokenizer is trained on."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()

PROBE = "".join(map(chr, range(0x800))) + " \u2013 \uff5e\n\n \U0001f600\U00100000 l'aigua freda  "
"""A text that a tokenizer must reproduce: characters of one to four UTF-8 bytes, and all kinds of whitespace."""


BREAK = re.compile(r"(?<=\S)(?=[ \t\r\n])")
"""Where a match of WORD ends, unless the text does."""


class TokenizerError(UserError):
    """A tokenizer file that cannot be used."""


class NotUsableError(TokenizerError):
    """A tokenizer of a kind that this package does not support."""


class Tokenizer:
    """Byte-level BPE with the GPT-2 pattern and no normalizer. Made by `train` or `load`; threads may share it.

    Attributes:
        texts_cut: Number of texts so far in which a stretch of over LONGEST_WORD letters, of digits, of signs or of
            spaces was encoded in parts.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.encode_special_tokens = True  # text that spells a control token is ordinary text
        inner.post_processor = None  # control tokens are added by the code that frames a text
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._bytes = _bytes_of_tokens(inner)
        self._word_cache: dict[str, bytes] = {}
        self._cached_characters = 0
        self._lock = threading.Lock()  # of the cache's size, and of texts_cut
        self.texts_cut = 0

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, bar_total: int | None = None) -> "Tokenizer":
        """Train a tokenizer; the same texts give the same tokenizer.

        Args:
            texts: The corpus. Of a stretch without spaces, the first LONGEST_TRAINED_WORD characters are used.
            vocab_size: Entries, control tokens and bytes included; fewer when the texts repeat too little.
            bar_total: Number of `excerpts` of the texts, for progress bars; None: no bars.
        """
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=bar_total is not None,
        )
        parts = chain.from_iterable(map(excerpts, texts))
        inner.train_from_iterator(map(_without_long_words, parts), trainer, length=bar_total)
        return cls(inner)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Return the tokenizer of a tokenizer.json.

        Raises:
            TokenizerError: There is no such file, or it holds no byte-level BPE with this package's control tokens.
        """
        try:
            content = read_small_file(Path(path))
        except OSError as error:
            raise TokenizerError(
                f"cannot read the tokenizer {path}: {error.strerror}. tokenizer.path names a tokenizer.json; "
                "null trains one on the corpus"
            ) from error
        try:
            return cls.from_json(content)
        except NotUsableError as error:
            raise TokenizerError(
                f"the tokenizer {path} cannot be used: {error}. Give a byte-level BPE with the control tokens of "
                "this package, or set tokenizer.path=null to train one"
            ) from error
        except TokenizerError as error:
            raise TokenizerError(f"{path} is not a tokenizer.json: {error}") from error

    @classmethod
    def from_json(cls, content: bytes) -> "Tokenizer":
        """Return the tokenizer of the content of a tokenizer.json.

        Raises:
            NotUsableError: It is another kind of tokenizer; the message is a clause with the reason.
            TokenizerError: It is no tokenizer.
        """
        try:
            inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(str(error)) from error
        if problem := _problem(inner):
            raise NotUsableError(problem)
        return cls(inner)

    @classmethod
    def from_merges(cls, tokens: Sequence[str], merges: Sequence[str]) -> "Tokenizer":
        """Return the tokenizer with these `tokens` and `merges`.

        Raises:
            TokenizerError: They are no byte-level BPE with this package's control tokens.
        """
        pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
        try:
            model = models.BPE({token: number for number, token in enumerate(tokens)}, pairs)
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"the tokenizer cannot be used: {error}") from error
        inner = tokenizers.Tokenizer(model)
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([name for name in SPECIAL_TOKENS if name in tokens])
        if problem := _problem(inner):
            raise TokenizerError(f"the tokenizer cannot be used: {problem}")
        return cls(inner)

    def save(self, path: Path | str, begins_documents: bool = False) -> None:
        """Write a tokenizer.json atomically.

        Args:
            path: The file.
            begins_documents: Let other libraries put the document-start token before each text, if their
                `add_special_tokens` is true. This package never asks the tokenizer for it.
        """
        written = tokenizers.Tokenizer.from_str(self._inner.to_str())
        if begins_documents:
            name = SPECIAL_TOKENS[DOCUMENT_START_ID]
            written.post_processor = processors.TemplateProcessing(
                single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, DOCUMENT_START_ID)]
            )
        write_text(Path(path), written.to_str(pretty=True))

    def __reduce__(self) -> tuple[Callable[[str], "Tokenizer"], tuple[str]]:
        # As JSON: the library's own pickling loses encode_special_tokens, and text could spell control tokens.
        return _from_json, (self._inner.to_str(),)

    @property
    def vocab_size(self) -> int:
        """Entries, control tokens and bytes included: ids are below it."""
        return len(self._bytes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of everything that decides the ids of a text."""
        canonical = json.dumps([self.tokens, self.merges, self.ignores_merges])
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def tokens(self) -> list[str]:
        """The entries in the order of their ids, with bytes as GPT-2's characters for them."""
        return _tokens(self._inner)

    @property
    def merges(self) -> list[str]:
        """Pairs of entries that become one, by priority, each as two entries with a space between them."""
        merges = self._described_model["merges"]
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]

    @property
    def ignores_merges(self) -> bool:
        """True if a word that is an entry becomes that entry even if no merges lead to it."""
        return bool(self._described_model.get("ignore_merges"))

    @property
    def _described_model(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(self._inner.to_str())["model"]
        return described

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; never a control token."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint16]]:
        """Return the ids of each text, uint16.

        The memory that this takes, besides the ids, does not depend on the length of texts or words.
        """
        # Words repeat, so most are looked up: from a file to shards, this is 1.7 times as fast on one core as the
        # library's faster call on texts in memory, and 1.1 times on two (scripts/benchmark_data.py tokenize).
        ids = [bytearray() for _ in texts]
        cut: set[int] = set()
        for group in _words(texts, cut):
            with self._lock:
                if self._cached_characters > CACHED_CHARACTERS:
                    # Cheaper than an LRU: frequent words are back with the next texts. A new cache, since another
                    # thread may be reading the old one.
                    self._word_cache = {}
                    self._cached_characters = 0
                cache = self._word_cache
            found = set(chain.from_iterable(words for _, words in group))
            self._add_to_cache(list(found.difference(cache)), cache)
            # The cache holds ids as bytes: joining bytes is one call of C per text, joining lists or arrays is not.
            for number, words in group:
                ids[number] += b"".join(map(cache.__getitem__, words))
        if cut:
            with self._lock:
                self.texts_cut += len(cut)
        return [np.frombuffer(content, dtype=np.uint16) for content in ids]

    def _add_to_cache(self, words: list[str], cache: dict[str, bytes]) -> None:
        start = characters = 0
        for end, last in enumerate(words, 1):
            characters += len(last)
            if characters < LIBRARY_CHARACTERS and end < len(words):
                continue
            part = words[start:end]
            encodings = self._inner.encode_batch_fast(part, add_special_tokens=False)
            for word, encoding in zip(part, encodings, strict=True):
                cache[word] = np.array(encoding.ids, dtype=np.uint16).tobytes()
            with self._lock:
                self._cached_characters += characters
            start, characters = end, 0

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """Return the text of ids: the exact inverse of `encode`.

        Args:
            ids: Token ids. Those beyond the vocabulary, and bytes that are not UTF-8, show as U+FFFD.
            skip_control: Leave control tokens out instead of showing their names.
        """
        first = len(SPECIAL_TOKENS) if skip_control else 0
        parts = (self.bytes_of(token) for token in ids if token >= first)
        return b"".join(parts).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token, which may be a part of a character; for a control token, its name."""
        return self._bytes[token] if token < len(self._bytes) else REPLACEMENT

    def token_bytes(self) -> NDArray[np.int64]:
        """Return the UTF-8 bytes per token, [vocab_size]; 0 for control tokens. The denominator of bpb."""
        lengths = np.array([len(content) for content in self._bytes], dtype=np.int64)
        lengths[: len(SPECIAL_TOKENS)] = 0
        return lengths


def _words(texts: Sequence[str], cut: set[int]) -> Iterator[list[tuple[int, list[str]]]]:
    """Yield the words of texts, those of about ENCODED_CHARACTERS at a time: numbers of texts, and words in them.

    Args:
        texts: The texts.
        cut: Gets the numbers of texts that have a word too long for one part.
    """
    group: list[tuple[int, list[str]]] = []
    characters = 0
    for number, text in enumerate(texts):
        start = 0
        while start < len(text):
            end = min(start + ENCODED_CHARACTERS, len(text))
            words = WORD.findall(text, start, end)
            if end - start > LONGEST_WORD and max(map(len, words)) > LONGEST_WORD:
                parts = [part for word in words for part in PART.finditer(word)]
                if any(part.lastindex for part in parts):
                    cut.add(number)
                words = [part.group() for part in parts]
            if end < len(text):
                end -= len(words.pop())  # it may continue after the end: first of the next group
            group.append((number, words))
            characters += end - start
            start = end
            if characters >= ENCODED_CHARACTERS:
                yield group
                group, characters = [], 0
    if group:
        yield group


def excerpts(text: str) -> Iterator[str]:
    """Yield parts of a text, of about TRAINING_CHARACTERS: all of it, except for what is long without a space."""
    start = 0
    while start < len(text):
        following = BREAK.search(text, start + TRAINING_CHARACTERS)
        end = following.start() if following else len(text)
        yield text[start : min(end, start + TRAINING_CHARACTERS + LONGEST_TRAINED_WORD)]
        start = end


def _without_long_words(text: str) -> str:
    """Return a text with the first LONGEST_TRAINED_WORD characters of each word."""
    if len(text) <= LONGEST_TRAINED_WORD:
        return text
    return "".join(word[:LONGEST_TRAINED_WORD] for word in WORD.findall(text))


def _from_json(content: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(content))


def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary: GPT-2 writes unprintable bytes as U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _tokens(inner: tokenizers.Tokenizer) -> list[str]:
    """Return the vocabulary in the order of its ids."""
    vocabulary = inner.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _bytes_of_tokens(inner: tokenizers.Tokenizer) -> list[bytes]:
    """Return the bytes of each token; for a control token, its name."""
    names = [name.encode() for name in SPECIAL_TOKENS]
    return names + [
        bytes(BYTE_OF_CHARACTER[character] for character in token) for token in _tokens(inner)[len(names) :]
    ]


def _problem(inner: tokenizers.Tokenizer) -> str | None:
    """Return the reason why a tokenizer cannot be used, or None."""
    vocabulary = inner.get_vocab()
    if (highest := max(vocabulary.values(), default=-1)) >= len(vocabulary):  # `to_str` would count all the missing ids
        return f"its ids have gaps: {number_of(len(vocabulary), 'entry')}, but ids up to {highest:,}"
    described = json.loads(inner.to_str())
    if problem := _vocabulary_problem(vocabulary, described) or _pattern_problem(described):
        return problem
    tokenizer = Tokenizer(inner)
    return None if tokenizer.decode(tokenizer.encode(PROBE)) == PROBE else "it does not give texts back exactly"


def _vocabulary_problem(vocabulary: dict[str, int], described: dict[str, Any]) -> str | None:
    misplaced = [
        f"{name} has {f'id {vocabulary[name]}' if name in vocabulary else 'no id'} instead of {token}"
        for token, name in enumerate(SPECIAL_TOKENS)
        if vocabulary.get(name) != token
    ]
    if misplaced:
        return "control tokens are not where they should be: " + ", ".join(misplaced)
    special = {token["content"] for token in described["added_tokens"] if token["special"]}
    if (
        odd := special.symmetric_difference(SPECIAL_TOKENS)
        | {t["content"] for t in described["added_tokens"]} - special
    ):
        return f"its added tokens must be the control tokens, all special: not so {', '.join(sorted(odd))}"
    if len(vocabulary) > MAX_VOCABULARY:
        return f"it has {number_of(len(vocabulary), 'entry')}; ids are stored in 16 bits, so at most {MAX_VOCABULARY:,}"
    if described["model"]["type"] != "BPE" or not BYTE_OF_CHARACTER.keys() <= vocabulary.keys():
        return "it is not a byte-level BPE: the 256 bytes are not all in its vocabulary"
    foreign = [t for t in vocabulary if t not in SPECIAL_TOKENS and not BYTE_OF_CHARACTER.keys() >= set(t)]
    return f"it is not a byte-level BPE: the entry {foreign[0]!r} is not made of bytes" if foreign else None


def _pattern_problem(described: dict[str, Any]) -> str | None:
    if described["normalizer"] is not None:
        return f"it changes text before encoding it (normalizer {described['normalizer']['type']})"
    splitter = described["pre_tokenizer"] or {}
    if splitter.get("type") != "ByteLevel" or not splitter.get("use_regex", True):
        return "its pre-tokenizer must be ByteLevel with the GPT-2 pattern (use_regex)"
    if splitter["add_prefix_space"]:
        return "it puts a space before each text (add_prefix_space)"
    if described["model"].get("dropout"):
        return "it encodes at random (dropout)"
    return None
