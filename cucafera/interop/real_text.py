"""Real text to compare models on: the embedded corpus and conversations."""

import json
from collections.abc import Iterator
from itertools import islice

from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.chatml import Message, render
from cucafera.data.sources.embedded import embedded_path
from cucafera.data.tokenizer import Tokenizer


def documents() -> Iterator[str]:
    """Yield the texts of the embedded documents."""
    with embedded_path("catalan").open("rb") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def conversations() -> Iterator[list[Message]]:
    """Yield the embedded conversations."""
    with embedded_path("conversations").open("rb") as lines:
        for line in lines:
            yield [Message(**message) for message in json.loads(line)["messages"]]


def sample_ids(tokenizer: Tokenizer, chats: bool, context: int, count: int) -> Iterator[list[int]]:
    """Yield token ids of `count` documents, or conversations, as in training, truncated to the context."""
    if chats:
        for rendered in render(list(islice(conversations(), count)), tokenizer):
            yield rendered.ids.tolist()[:context]
    else:
        for text in islice(documents(), count):
            yield [DOCUMENT_START_ID, *tokenizer.encode(text)][:context]
