"""Bits per byte and perplexity of text, in overlapping windows.

A document is its start token and its text. It is read in windows as long as the model's context, each shifted by
`stride` tokens. The first window scores all tokens but the start token; each later one scores only its last `stride`
tokens, and the tokens before them are context. So each token of the text is scored once, after at least
`context - stride` tokens of context if the document has them. This is the sliding window of Hugging Face's guide
"Perplexity of fixed-length models".

The end of a document is not scored. Validation during training reads windows that span many documents, and scores each
document's start token as the end of the one before, so its bpb is another number.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from cucafera.config.errors import UserError
from cucafera.data.chatml import Rendered
from cucafera.data.conversations import tokens_that_fit
from cucafera.data.tokenizer import Tokenizer
from cucafera.evaluation.progress import progress_bar
from cucafera.evaluation.requests import Scorer, ScoringWindow
from cucafera.evaluation.results import Metric, Result
from cucafera.evaluation.texts import EncodedText, read_conversations, read_texts, task_name
from cucafera.quantities import number_of

TOKENS_AT_ONCE = 1 << 15
"""Tokens of the texts whose windows are scored together; the progress bar moves as often."""
ALTERNATIVES = (
    "give --text FILE for bits per byte, --chats FILE for those of answers, --pairs FILE for preference pairs, "
    "--choices FILE for multiple choice, --tasks NAMES for lm-evaluation-harness, --samples for generated texts, or "
    "--attention TEXT for attention maps"
)


@dataclass
class ScoreSums:
    """Sums over texts."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    texts: int = 0

    def metrics(self) -> dict[str, Metric]:
        """Return bpb (bits per byte), loss (nats per token) and perplexity, the exponential of the loss."""
        loss = self.nats / self.tokens
        return {
            "bpb": Metric(self.nats / (math.log(2) * self.text_bytes)),
            "loss": Metric(loss),
            "perplexity": Metric(math.exp(loss) if loss < 700 else math.inf),  # exp overflows above 709
        }


def measure_files(
    scorer: Scorer, tokenizer: Tokenizer, path: str, column: str, documents: int | None, stride: int | None
) -> Result:
    """Return bits per byte and perplexity of the documents of files.

    Args:
        scorer: The model.
        tokenizer: Its tokenizer.
        path: A file, folder or glob.
        column: The column of the text, in files that have columns.
        documents: Maximum number of documents; None: all.
        stride: Tokens that a later window scores; None: half of the context.

    Raises:
        UserError: the files cannot be read or hold no text, or the stride is not below the context.
    """
    texts = read_texts(path, column, documents, tokenizer)
    return measure_texts(scorer, task_name(path), texts, documents, stride, {"text": path, "column": column})


def measure_conversations(
    scorer: Scorer, tokenizer: Tokenizer, path: str, documents: int | None, stride: int | None
) -> Result:
    """Return bits per byte and perplexity of the answers of the conversations of files.

    Args:
        scorer: The model.
        tokenizer: Its tokenizer.
        path: A file, folder or glob.
        documents: Maximum number of conversations; None: all.
        stride: As for `measure_files`: without effect, since what is scored of a conversation is one window.

    Raises:
        UserError: the files cannot be read, hold no conversation or none whose first answer ends within the context, or
            the stride is not below the context.
    """
    answers = FittingAnswers(read_conversations(path, tokenizer), tokenizer, scorer.context)
    return measure_texts(scorer, task_name(path), answers, documents, stride, {"chats": path})


def measure_texts(
    scorer: Scorer,
    task: str,
    texts: "Iterable[EncodedText] | FittingAnswers",
    documents: int | None,
    stride: int | None,
    settings: dict[str, Any],
) -> Result:
    """Return bits per byte and perplexity of texts.

    Args:
        scorer: The model.
        task: Name of the measurement.
        texts: Documents, or the answers of conversations.
        documents: Maximum number of them; None: all.
        stride: Tokens that a later window scores; None: half of the context.
        settings: Of the result; the other arguments are added.

    Raises:
        UserError: there is no text, or the stride is not below the context.
    """
    stride = scorer.context // 2 if stride is None else stride
    if stride >= scorer.context:
        raise UserError(
            f"--stride is {stride:,}; it must be below the model's context of {number_of(scorer.context, 'token')}"
        )
    sums = score_texts(scorer, islice(texts, documents), stride)
    is_chat = isinstance(texts, FittingAnswers)
    too_long = texts.too_long if isinstance(texts, FittingAnswers) else ""
    if not sums.tokens or not sums.text_bytes:
        raise UserError(f"{task}: there is no text to measure{too_long and f': {too_long}'}; {ALTERNATIVES}")
    unit, scored = ("conversation", "answers only") if is_chat else ("document", "their ends not scored")
    amounts = (number_of(sums.tokens, "token"), number_of(sums.text_bytes, "byte"), number_of(sums.texts, unit))
    note = f"{', '.join(amounts)}, {scored}; sliding windows of {number_of(scorer.context, 'token')}, stride {stride:,}"
    note += too_long and f"; {too_long}"
    settings = settings | {"documents": documents, "stride": stride, "context": scorer.context}
    return Result("answers" if is_chat else "text", task, sums.metrics(), settings, note)


def score_texts(scorer: Scorer, texts: Iterable[EncodedText], stride: int) -> ScoreSums:
    """Score texts in sliding windows.

    Args:
        scorer: The model.
        texts: Consumed in groups of about TOKENS_AT_ONCE tokens.
        stride: Tokens that a later window of a text scores, below the scorer's context.
    """
    sums = ScoreSums()
    with progress_bar("Texts", None) as bar:
        for batch in _batches(texts):
            parts = [sliding_windows(text.ids, scorer.context, stride) for text in batch]
            nats = iter(scorer.nats([window for windows in parts for window in windows]))
            for text, windows in zip(batch, parts, strict=True):
                token_nats = [value for _ in windows for value in next(nats)]
                mask = [True] * len(token_nats) if text.scored is None else text.scored[1:]
                sums.nats += math.fsum(value for value, scored in zip(token_nats, mask, strict=True) if scored)
                sums.tokens += sum(mask)
                sums.text_bytes += text.text_bytes
                sums.texts += 1
            bar.update(len(batch))
    return sums


def sliding_windows(ids: list[int], context: int, stride: int) -> list[ScoringWindow]:
    """Return the windows that score each token of a text once.

    Args:
        ids: Token ids; the first is not scored.
        context: Longest window.
        stride: Tokens that a later window scores, below `context`.
    """
    end = min(context, len(ids))
    windows = [(ids[:end], 1)] if end > 1 else []
    while end < len(ids):
        before, end = end, min(end + stride, len(ids))
        start = max(0, end - context)
        windows.append((ids[start:end], before - start))
    return windows


def _batches(texts: Iterable[EncodedText]) -> Iterator[list[EncodedText]]:
    batch: list[EncodedText] = []
    tokens = 0
    for text in texts:
        batch.append(text)
        tokens += len(text.ids)
        if tokens >= TOKENS_AT_ONCE:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


class FittingAnswers:
    """Conversations up to the last answer that fits the context; scored is what finetuning trains on.

    That is each answer with its <im_end>.

    Args:
        conversations: Consumed once.
        tokenizer: The model's tokenizer.
        context: Tokens of the model's context.

    Attributes:
        cut, left_out: Conversations so far that are longer: cut after an answer, or left out, since none fits.
    """

    def __init__(self, conversations: Iterable[Rendered], tokenizer: Tokenizer, context: int) -> None:
        self.cut = self.left_out = 0
        self._conversations = conversations
        self._token_bytes = tokenizer.token_bytes()
        self._context = context

    def __iter__(self) -> Iterator[EncodedText]:
        for rendered in self._conversations:
            length = tokens_that_fit(rendered, self._context - 1)
            self.left_out += length == 0
            if length:
                self.cut += length < len(rendered.ids) - 1
                ids, trained = rendered.ids[: length + 1], rendered.trained[: length + 1]
                scored_bytes = self._token_bytes[ids[trained].astype(np.int64)].sum()
                yield EncodedText(ids.tolist(), trained.tolist(), int(scored_bytes))

    @property
    def too_long(self) -> str:
        """A clause on conversations that are longer than the context; empty if there was none."""
        parts = [(self.cut, "cut after an answer"), (self.left_out, "left out, since no answer ends within it")]
        done = " and ".join(f"{count:,} {what}" for count, what in parts if count)
        return done and f"longer than the context: {done}"
