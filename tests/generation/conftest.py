"""A small tokenizer."""

import pytest

from cucafera.data.tokenizer import Tokenizer


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    texts = ["la mar i el bosc, l'avi cantava cançons 🐌 € " * 5] * 20
    return Tokenizer.train(texts, vocab_size=300)
