"""A tokenizer and corpora of a few kilobytes, the same in every run."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from cucafera.data.tokenizer import Tokenizer

WORDS = (
    "la",
    "mar",
    "i",
    "el",
    "bosc",
    "són",
    "l'avi",
    "cantava",
    "cançons",
    "d'hivern,",
    "col·legi;",
    "1714",
    "€",
    "🐌",
)


def sentences(documents: int, words: int = 60) -> list[str]:
    """Documents of random words."""
    generator = random.Random(7)
    return [" ".join(generator.choices(WORDS, k=words)) + "." for _ in range(documents)]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """300 entries, 34 of them merges."""
    return Tokenizer.train(sentences(50), vocab_size=300)


@pytest.fixture(scope="session")
def make_documents() -> Callable[..., list[str]]:
    """The function that makes documents."""
    return sentences


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Iterable[Any]], Path]:
    """Writes rows (texts stand for {"text": ...}) into a file below the test's folder."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        objects = [{"text": row} if isinstance(row, str) else row for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in objects), encoding="utf-8")
        return path

    return write
