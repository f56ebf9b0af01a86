"""Pretraining: next-token prediction on documents."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cucafera.config.registry import OBJECTIVES, Judge
from cucafera.config.schema import Config
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.objectives import MetricSpec
from cucafera.objectives._embedded import embedded_problems
from cucafera.objectives._language import language_problems
from cucafera.objectives._next_token import NEXT_TOKEN_METRICS, NextToken

if TYPE_CHECKING:
    from cucafera.data.run_data import RunData
    from cucafera.data.tokenizer import Tokenizer


@OBJECTIVES.register
class Pretraining(NextToken):
    """Every token of packed documents is a target."""

    name = "pretraining"
    stage = "pretraining"
    kind_of_data = "texts"
    chats = False
    metrics: tuple[MetricSpec, ...] = NEXT_TOKEN_METRICS
    primary = "bpb"
    stop_id = DOCUMENT_START_ID

    def problems(self, config: Config, judge: Judge) -> Iterator[str]:
        """Of the texts of this package, only the documents have a text column; no text is filtered by language."""
        yield from embedded_problems(config, judge, self.name, "documents")
        yield from language_problems(config, judge, self.name, has_answers=False)

    def open_data(self, config: Config) -> "RunData[Any]":
        """Train or load the tokenizer, tokenize the sources into shards, and open their windows."""
        from cucafera.data.packed import open_documents

        return open_documents(config)

    def prompt_ids(self, tokenizer: "Tokenizer", prompt: str) -> list[int]:
        """Return a document that begins with the prompt."""
        return [DOCUMENT_START_ID, *tokenizer.encode(prompt)]
