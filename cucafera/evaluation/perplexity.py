"""Bits a byte and perplexity: how well a model predicts text that it is given.

A document is its start token and its text. It is read in windows as long as the model's context, each of which begins
`stride` tokens behind the one before. The first window scores all tokens but the start; every other one only its last
`stride` tokens, for which what stands before them in the window is context. So each token of the text counts once, and
has at least `context - stride` tokens before it, if the document has (Hugging Face's guide to the perplexity of models
of fixed length has the same).

The end of a document is not scored. Validation in training measures windows of many documents, and the start token of
the next one, which ends the one before, with them: its bpb is another number.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from cucafera.config import SourceConfig
from cucafera.data.chat import Rendered
from cucafera.data.conversations import held_out_conversations, places_that_fit
from cucafera.data.corpus import Called, CorpusError, ReadCounts, read_documents
from cucafera.data.packed import held_out_stream
from cucafera.data.shards import TokenStream
from cucafera.data.tokenizer import DOCUMENT_START_ID, Tokenizer
from cucafera.evaluation.likelihood import Scorer, Window, progress
from cucafera.evaluation.results import Metric
from cucafera.evaluation.subject import Subject

TOKENS_AT_A_TIME = 1 << 15
"""Of the texts whose windows are scored together; progress is shown as often."""
CALLED = Called("--text", "name one with --column", "Mend it, or name another column with --column", "--text")


class Text(NamedTuple):
    """What is read as one.

    Attributes:
        ids: Token ids, the document start or the opening of a conversation first.
        scored: Which of them count, as long as `ids`; None: all but the first.
        text_bytes: UTF-8 bytes that those stand for.
    """

    ids: list[int]
    scored: list[bool] | None
    text_bytes: int


@dataclass
class TextScore:
    """Sums over texts."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    texts: int = 0

    def metrics(self) -> dict[str, Metric]:
        """bpb in bits a byte, loss in nats a token, and its exponential."""
        loss = self.nats / self.tokens
        return {
            "bpb": Metric(self.nats / (math.log(2) * self.text_bytes)),
            "loss": Metric(loss),
            "perplexity": Metric(math.exp(loss) if loss < 700 else math.inf),
        }


def windows_of(ids: list[int], context: int, stride: int) -> list[Window]:
    """The windows that score each token of a text once.

    Args:
        ids: Token ids; the first is not scored.
        context: Most ids of a window.
        stride: How many of them a later window scores, below `context`.
    """
    end = min(context, len(ids))
    windows = [(ids[:end], 1)] if end > 1 else []
    while end < len(ids):
        before, end = end, min(end + stride, len(ids))
        start = max(0, end - context)
        windows.append((ids[start:end], before - start))
    return windows


def measure(scorer: Scorer, texts: Iterable[Text], stride: int) -> TextScore:
    """Scores texts; see above.

    Args:
        scorer: The model.
        texts: They are read a few at a time.
        stride: Tokens that a later window of a text scores.
    """
    score = TextScore()
    with progress("Texts", None) as bar:
        for batch in _batches(texts):
            parts = [windows_of(text.ids, scorer.context, stride) for text in batch]
            nats = iter(scorer.nats([window for windows in parts for window in windows]))
            for text, windows in zip(batch, parts, strict=True):
                of_text = [value for _ in windows for value in next(nats)]
                counted = [True] * len(of_text) if text.scored is None else text.scored[1:]
                score.nats += math.fsum(value for value, counts in zip(of_text, counted, strict=True) if counts)
                score.tokens += sum(counted)
                score.text_bytes += text.text_bytes
                score.texts += 1
            bar.update(len(batch))
    return score


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    tokens = 0
    for text in texts:
        batch.append(text)
        tokens += len(text.ids)
        if tokens >= TOKENS_AT_A_TIME:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def texts_of_files(path: str, column: str, most: int | None, tokenizer: Tokenizer) -> Iterator[Text]:
    """The documents of files.

    Args:
        path: A file, folder or glob.
        column: Where the text is, in files that have columns.
        most: How many documents; None: all.
        tokenizer: Makes the ids.

    Raises:
        CorpusError: they are not there, cannot be read, or hold no document.
    """
    counts = ReadCounts()
    source = SourceConfig(path=path, column=column)
    for text, _ in islice(read_documents(CALLED, source, skip_broken_lines=False, counts=counts), most):
        yield Text([DOCUMENT_START_ID, *tokenizer.encode(text)], None, len(text.encode()))
    if not counts.documents:
        raise CorpusError(f"--text {path} holds no document")


def held_out_texts(subject: Subject) -> dict[str, Iterator[Text]]:
    """By source: the documents that a run did not train on, or the answers of the conversations that it did not.

    Nothing for a source whose prepared tokens are not there any more.
    """
    found: dict[str, Iterator[Text]] = {}
    for name, identity in subject.sources.items():
        vocab_size = subject.model.config.vocab_size
        if subject.chats:
            conversations = held_out_conversations(subject.prepared, identity, vocab_size)
            if conversations is not None:
                rendered = map(conversations.conversation, range(len(conversations)))
                found[name] = _answers(rendered, subject.tokenizer, subject.model.config.max_position_embeddings)
        else:
            stream = held_out_stream(subject.prepared, identity, subject.tokenizer, vocab_size)
            if stream is not None:
                found[name] = _documents(stream, subject.tokenizer)
    return found


def _documents(stream: TokenStream, tokenizer: Tokenizer) -> Iterator[Text]:
    """The documents of a stream, each from one document start to the next."""
    token_bytes = tokenizer.token_bytes()
    document: list[int] = []
    for start in range(0, len(stream), TOKENS_AT_A_TIME):
        for token in stream.read(start, min(TOKENS_AT_A_TIME, len(stream) - start)).tolist():
            if token == DOCUMENT_START_ID and document:
                yield Text(document, None, int(token_bytes[document].sum()))
                document = []
            document.append(token)
    if document:
        yield Text(document, None, int(token_bytes[document].sum()))


def _answers(conversations: Iterable[Rendered], tokenizer: Tokenizer, context: int) -> Iterator[Text]:
    """What is trained of conversations, the <im_end> of each answer with it, up to the last answer that fits."""
    token_bytes = tokenizer.token_bytes()
    for rendered in conversations:
        if places := places_that_fit(rendered, context - 1):
            ids, trained = rendered.ids[: places + 1], rendered.trained[: places + 1]
            yield Text(ids.tolist(), trained.tolist(), int(token_bytes[ids[trained].astype(np.int64)].sum()))
