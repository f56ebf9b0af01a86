"""The corpus that comes with the package."""

import json
import unicodedata
from collections import Counter

import pytest

from cucafera.data.sources.embedded import embedded_path


@pytest.fixture(scope="module")
def documents():
    return [json.loads(line) for line in embedded_path("catalan").read_text(encoding="utf-8").splitlines()]


def test_it_is_large_and_varied_enough_to_learn_from(documents):
    assert len(documents) >= 150
    assert sum(len(document["text"].encode()) for document in documents) >= 100_000
    assert len({document["genre"] for document in documents}) >= 10


def test_every_document_has_a_title_of_its_own_a_genre_and_clean_text(documents):
    assert max(Counter(document["title"] for document in documents).values()) == 1
    for document in documents:
        assert list(document) == ["title", "genre", "text"]
        assert len(document["text"]) > 300
        assert unicodedata.is_normalized("NFC", document["text"])
        assert document["text"] == document["text"].strip()
        assert not document["text"].startswith(document["title"] + "\n")
        assert not any(
            unicodedata.category(character) in ("Cc", "Co", "Cn") for character in document["text"].replace("\n", "")
        )


def test_no_template_is_repeated(documents):
    """No two documents share a run of ten words, and no opening of four words comes more than twice."""
    owners: dict[tuple[str, ...], int] = {}
    for number, document in enumerate(documents):
        words = document["text"].split()
        for start in range(len(words) - 9):
            run = tuple(words[start : start + 10])
            assert owners.setdefault(run, number) == number, " ".join(run)
    openings = Counter(" ".join(document["text"].split()[:4]) for document in documents)
    assert openings.most_common(1)[0][1] <= 2, openings.most_common(3)


def test_its_letters_are_those_of_catalan(documents):
    text = "".join(document["text"] for document in documents).lower()
    for letter in "àèéíïòóúüç":
        assert text.count(letter) > 20, letter
    assert text.count("l·l") > 5
    assert not set("ñãõìêâôß") & set(text)
