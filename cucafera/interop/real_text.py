"""Real text to compare models on: the corpus and the conversations that come with the package."""

import json
from collections.abc import Iterator
from itertools import islice

from cucafera.data.chat import Message, render
from cucafera.data.corpus import embedded_conversations, embedded_corpus
from cucafera.data.tokenizer import DOCUMENT_START_ID, Tokenizer


def documents(count: int) -> list[str]:
    """The first embedded documents."""
    with embedded_corpus().open("rb") as lines:
        return [json.loads(line)["text"] for line in islice(lines, count)]


def conversations(count: int) -> list[list[Message]]:
    """The first embedded conversations."""
    with embedded_conversations().open("rb") as lines:
        rows = [json.loads(line)["messages"] for line in islice(lines, count)]
    return [[Message(message["role"], message["content"]) for message in row] for row in rows]


def sample_ids(tokenizer: Tokenizer, chats: bool, context: int, count: int) -> Iterator[list[int]]:
    """Token ids of texts as a model was trained on them, no longer than its context: conversations if it chats."""
    if chats:
        for rendered in render(conversations(count), tokenizer):
            yield rendered.ids.tolist()[:context]
    else:
        for text in documents(count):
            yield [DOCUMENT_START_ID, *tokenizer.encode(text)][:context]
