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
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.chatml import Rendered
from cucafera.data.conversations import held_out_conversations, tokens_that_fit
from cucafera.data.packed import held_out_stream
from cucafera.data.shards import TokenStream
from cucafera.data.tokenizer import Tokenizer
from cucafera.evaluation.evaluated_model import EvaluatedModel
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.progress import progress_bar
from cucafera.evaluation.requests import Scorer, ScoringWindow
from cucafera.evaluation.results import Metric, Result
from cucafera.evaluation.texts import EncodedText, read_texts, task_name
from cucafera.quantities import number_of

TOKENS_AT_ONCE = 1 << 15
"""Tokens of the texts whose windows are scored together; the progress bar moves as often."""
ALTERNATIVES = (
    "give --text FILE for bits per byte, --choices FILE for multiple choice, --tasks NAMES for lm-evaluation-harness, "
    "--samples for generated texts, or --attention TEXT for attention maps"
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
    settings = {"text": path, "column": column, "documents": documents}
    texts = read_texts(path, column, documents, tokenizer)
    return _measure(scorer, "text", task_name(path), texts, stride, settings)


def measure_held_out(evaluated: EvaluatedModel, documents: int | None, stride: int | None) -> Iterator[Result]:
    """Yield, for each source of the run, bits per byte and perplexity of what was held out from training.

    Args:
        evaluated: The model.
        documents, stride: As for `measure_files`.

    Raises:
        UserError: the held-out data is not known or deleted, or the stride is not below the context.
    """
    held_out = held_out_texts(evaluated)
    if not held_out:
        reason = f": its tokenized data is not in {evaluated.prepared}" if evaluated.sources else ""
        raise UserError(f"the held-out data of {evaluated.source} cannot be measured{reason}; {ALTERNATIVES}")
    for name, texts in held_out.items():
        kind = "answers" if evaluated.chats else "text"
        settings = {"held_out": name, "documents": documents}
        selected = islice(texts, documents)
        yield _measure(DecoderScorer(evaluated.model), kind, f"held-out-{name}", selected, stride, settings)


def _measure(
    scorer: Scorer, kind: str, task: str, texts: Iterable[EncodedText], stride: int | None, settings: dict[str, Any]
) -> Result:
    stride = scorer.context // 2 if stride is None else stride
    if stride >= scorer.context:
        raise UserError(
            f"--stride is {stride:,}; it must be below the model's context of {number_of(scorer.context, 'token')}"
        )
    sums = score_texts(scorer, texts, stride)
    if not sums.tokens or not sums.text_bytes:
        raise UserError(f"{task}: there is no text to measure; {ALTERNATIVES}")
    unit, left_out = ("conversation", "answers only") if kind == "answers" else ("document", "their ends not scored")
    amounts = (number_of(sums.tokens, "token"), number_of(sums.text_bytes, "byte"), number_of(sums.texts, unit))
    note = (
        f"{', '.join(amounts)}, {left_out}; sliding windows of {number_of(scorer.context, 'token')}, stride {stride:,}"
    )
    return Result(kind, task, sums.metrics(), settings | {"stride": stride, "context": scorer.context}, note)


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


def held_out_texts(evaluated: EvaluatedModel) -> dict[str, Iterator[EncodedText]]:
    """Return, by source, the held-out documents of a run, or its held-out conversations with the answers scored.

    A source whose prepared tokens were deleted is left out.
    """
    found: dict[str, Iterator[EncodedText]] = {}
    for name, identity in evaluated.sources.items():
        vocab_size = evaluated.model.config.vocab_size
        if evaluated.chats:
            conversations = held_out_conversations(evaluated.prepared, identity, vocab_size)
            if conversations is not None:
                rendered = map(conversations.conversation, range(len(conversations)))
                found[name] = _answers(rendered, evaluated.tokenizer, evaluated.model.config.max_position_embeddings)
        else:
            stream = held_out_stream(evaluated.prepared, identity, evaluated.tokenizer, vocab_size)
            if stream is not None:
                found[name] = _documents(stream, evaluated.tokenizer)
    return found


def _documents(stream: TokenStream, tokenizer: Tokenizer) -> Iterator[EncodedText]:
    """Yield the documents of a stream: each runs from one document start token to the next."""
    token_bytes = tokenizer.token_bytes()
    document: list[int] = []
    for start in range(0, len(stream), TOKENS_AT_ONCE):
        for token in stream.read(start, min(TOKENS_AT_ONCE, len(stream) - start)).tolist():
            if token == DOCUMENT_START_ID and document:
                yield EncodedText(document, None, int(token_bytes[document].sum()))
                document = []
            document.append(token)
    if document:
        yield EncodedText(document, None, int(token_bytes[document].sum()))


def _answers(conversations: Iterable[Rendered], tokenizer: Tokenizer, context: int) -> Iterator[EncodedText]:
    """Yield conversations up to their last answer that fits the context; scored is what finetuning trains on.

    That is each answer with its <im_end>.
    """
    token_bytes = tokenizer.token_bytes()
    for rendered in conversations:
        if length := tokens_that_fit(rendered, context - 1):
            ids, trained = rendered.ids[: length + 1], rendered.trained[: length + 1]
            yield EncodedText(ids.tolist(), trained.tolist(), int(token_bytes[ids[trained].astype(np.int64)].sum()))
