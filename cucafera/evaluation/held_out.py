"""Measurements of the data that a run held out: documents, the answers of conversations, or preference pairs.

Of a preference run they are its pairs, and the answers of the conversations that the finetuned model before it held
out: by how much their bits per byte moved says what preference tuning did to what finetuning had taught.
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cucafera.config.errors import UserError
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.conversations import held_out_conversations
from cucafera.data.packed import held_out_stream
from cucafera.data.preferences import held_out_pairs
from cucafera.data.shards import TokenStream
from cucafera.data.tokenizer import Tokenizer
from cucafera.evaluation.evaluated_model import EvaluatedModel, PreparedSources, prepared_sources
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.pairs import RenderedPair, compare_answers
from cucafera.evaluation.perplexity import ALTERNATIVES, TOKENS_AT_ONCE, FittingAnswers, measure_texts
from cucafera.evaluation.results import Result
from cucafera.evaluation.texts import EncodedText
from cucafera.runs.folder import RunFolder, checkpoint_of
from cucafera.runs.lineage import stages_back

log = logging.getLogger(__name__)


class FinetunedRun(NamedTuple):
    """A finetuned run that a preference run began with, or one before it.

    Attributes:
        folder: Its run folder.
        checkpoint: The checkpoint that `evaluate` measures.
        answers: Its held-out conversations, by source.
    """

    folder: RunFolder
    checkpoint: Path
    answers: dict[str, FittingAnswers]


def measure_held_out(evaluated: EvaluatedModel, documents: int | None, stride: int | None) -> Iterator[Result]:
    """Yield, for each source of the run, the metrics of what was held out from training.

    Of documents and answers they are those of `measure_texts`, of pairs those of `compare_answers`; after pairs, those
    of the answers that the finetuned model before the run held out, if its run and its data are still here.

    Args:
        evaluated: The model.
        documents: Maximum number of documents, conversations or pairs of a source; None: all.
        stride: As for `measure_texts`.

    Raises:
        UserError: the held-out data is not known or deleted, or the stride is not below the context.
    """
    texts, pairs = held_out_texts(evaluated), preference_pairs(evaluated)
    if not texts and not pairs:
        data = evaluated.data
        reason = f": its tokenized data is not in {data.folder}" if data and data.fingerprints else ""
        raise UserError(f"the held-out data of {evaluated.source} cannot be measured{reason}; {ALTERNATIVES}")
    scorer = DecoderScorer(evaluated.model)
    for name, selected in pairs.items():
        yield compare_answers(scorer, _task(name), selected, documents, {"held_out": name})
    for name, source in texts.items():
        yield measure_texts(scorer, _task(name), source, documents, stride, {"held_out": name})
    if pairs:
        yield from _measure_earlier_answers(evaluated, scorer, documents, stride)


def _task(source: str) -> str:
    return f"held-out-{source}"


def _measure_earlier_answers(
    evaluated: EvaluatedModel, scorer: DecoderScorer, documents: int | None, stride: int | None
) -> Iterator[Result]:
    """Yield the metrics of the answers that the finetuned run before this one held out, next to its own bpb."""
    assert evaluated.run is not None
    try:
        finetuned = _finetuned_run(evaluated, evaluated.run)
    except UserError as error:
        log.warning("the answers that an earlier run held out are not measured: %s", error)
        return
    if finetuned is None:
        log.warning("no run before this one has held-out conversations here: its answers to them are not measured")
        return
    for name, answers in finetuned.answers.items():
        result = measure_texts(scorer, _task(name), answers, documents, stride, {"held_out": name})
        before, path = _bpb_of(finetuned, result), finetuned.folder.path
        known = f"for its own bpb, evaluate {path}" if before is None else f"its own bpb is {before:.4f}"
        yield dataclasses.replace(result, note=f"{result.note}; held out by {path}: {known}")


def _finetuned_run(evaluated: EvaluatedModel, folder: RunFolder) -> FinetunedRun | None:
    """Return the nearest run before this one whose held-out conversations are still here."""
    for stage in stages_back(folder)[1:]:
        checkpoint = checkpoint_of(str(stage.folder.path), "")
        if answers := _answers(evaluated, prepared_sources(stage.folder, checkpoint)):
            return FinetunedRun(stage.folder, checkpoint, answers)
    return None


def _bpb_of(finetuned: FinetunedRun, measured: Result) -> float | None:
    """Return the bpb of a finetuned run on the same data; None if it is not in its evaluation.json."""
    for entry in finetuned.folder.read_evaluation():
        is_same = (entry["kind"], entry["task"], entry["settings"]) == (measured.kind, measured.task, measured.settings)
        if is_same and entry["checkpoint"] == finetuned.checkpoint.name and not entry.get("averaged"):
            value: float | None = entry["metrics"]["bpb"]["value"]
            return value
    return None


def held_out_texts(evaluated: EvaluatedModel) -> dict[str, Iterator[EncodedText] | FittingAnswers]:
    """Return, by source, the held-out documents of a run, or its held-out conversations with the answers scored.

    A source whose prepared tokens were deleted is left out.
    """
    found: dict[str, Iterator[EncodedText] | FittingAnswers] = {}
    if (data := evaluated.data) is None:
        return found
    if evaluated.chats:
        return {**found, **_answers(evaluated, data)}
    for name, identity in data.fingerprints.items():
        stream = held_out_stream(data.folder, identity, evaluated.tokenizer, evaluated.model.config.vocab_size)
        if stream is not None:
            found[name] = _documents(stream, evaluated.tokenizer)
    return found


def preference_pairs(evaluated: EvaluatedModel) -> dict[str, Iterator[RenderedPair]]:
    """Return, by source, the held-out preference pairs of a run, but for sources that were deleted."""
    found: dict[str, Iterator[RenderedPair]] = {}
    if (data := evaluated.data) is not None:
        for name, identity in data.fingerprints.items():
            pairs = held_out_pairs(data.folder, identity, evaluated.model.config.vocab_size)
            if pairs is not None:
                conversations = map(pairs.conversation, range(len(pairs)))
                found[name] = map(RenderedPair, conversations, conversations)  # better and worse answers alternate
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


def _answers(evaluated: EvaluatedModel, data: PreparedSources) -> dict[str, FittingAnswers]:
    """Return, by source, the held-out conversations of a run, but for sources that were deleted or hold no such."""
    found = {}
    for name, identity in data.fingerprints.items():
        conversations = held_out_conversations(data.folder, identity, evaluated.model.config.vocab_size)
        if conversations is not None:
            rendered = map(conversations.conversation, range(len(conversations)))
            found[name] = FittingAnswers(rendered, evaluated.tokenizer, evaluated.model.config.max_position_embeddings)
    return found
