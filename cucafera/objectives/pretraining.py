"""Pretraining: next-token prediction on documents."""

from typing import TYPE_CHECKING, Any

from cucafera.config.registry import OBJECTIVES
from cucafera.config.schema import Config
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.objectives import MetricSpec
from cucafera.objectives._next_token import NEXT_TOKEN_METRICS, NextToken

if TYPE_CHECKING:
    from cucafera.data.run_data import RunData
    from cucafera.data.tokenizer import Tokenizer


@OBJECTIVES.register
class Pretraining(NextToken):
    """Every token of packed documents is a target."""

    name = "pretraining"
    chats = False
    metrics: tuple[MetricSpec, ...] = NEXT_TOKEN_METRICS
    primary = "bpb"
    stop_id = DOCUMENT_START_ID

    def open_data(self, config: Config) -> "RunData[Any]":
        """Train or load the tokenizer, tokenize the sources into shards, and open their windows."""
        from cucafera.data.packed import open_documents

        return open_documents(config)

    def prompt_ids(self, tokenizer: "Tokenizer", prompt: str) -> list[int]:
        """Return a document that begins with the prompt."""
        return [DOCUMENT_START_ID, *tokenizer.encode(prompt)]
