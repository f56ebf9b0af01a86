"""Real text to compare models on: the corpus and the conversations that come with the package."""

import json
from collections.abc import Iterator
from itertools import islice

from cucafera.data.chat import Message, render
from cucafera.data.corpus import embedded_conversations, embedded_corpus
from cucafera.data.tokenizer import DOCUMENT_START_ID, Tokenizer


def documents() -> Iterator[str]:
    """The embedded documents."""
    with embedded_corpus().open("rb") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def conversations() -> Iterator[list[Message]]:
    """The embedded conversations."""
    with embedded_conversations().open("rb") as lines:
        for line in lines:
            yield [Message(**message) for message in json.loads(line)["messages"]]


def sample_ids(tokenizer: Tokenizer, chats: bool, context: int, count: int) -> Iterator[list[int]]:
    """Token ids of texts as a model was trained on them, no longer than its context: conversations if it chats."""
    if chats:
        for rendered in render(list(islice(conversations(), count)), tokenizer):
            yield rendered.ids.tolist()[:context]
    else:
        for text in islice(documents(), count):
            yield [DOCUMENT_START_ID, *tokenizer.encode(text)][:context]
