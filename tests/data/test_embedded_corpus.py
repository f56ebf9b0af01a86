"""The corpus that comes with the package."""

import json
import re
import unicodedata
from collections import Counter

import pytest

from cucafera.data.sources.embedded import embedded_path

COMMON_OPENINGS = (
    "Hi havia una vegada",
    "La plaça del poble",
    "A la tardor,",
    "La Cuca Fera",
    "Barcelona és",
    "Per fer",
)
"""Openings that a newcomer asks for: several texts continue each of them."""


@pytest.fixture(scope="module")
def documents():
    return [json.loads(line) for line in embedded_path("catalan").read_text(encoding="utf-8").splitlines()]


def first_words(document):
    """The start of a document as it is trained on: a short one has no title."""
    return document.get("title", document["text"])


def test_it_is_large_and_varied_enough_to_learn_from(documents):
    assert len(documents) >= 500
    assert sum(len(document["text"].encode()) for document in documents) >= 350_000
    genres = Counter(document["genre"] for document in documents)
    assert len(genres) >= 20
    assert min(genres.values()) >= 3, genres


def test_every_document_has_a_title_of_its_own_or_none_a_genre_and_clean_text(documents):
    assert max(Counter(document["title"] for document in documents if "title" in document).values()) == 1
    assert len({document["text"] for document in documents}) == len(documents)
    for document in documents:
        assert [*document] in (["title", "genre", "text"], ["genre", "text"])
        assert len(document["text"]) > 60
        assert unicodedata.is_normalized("NFC", document["text"])
        assert document["text"] == document["text"].strip()
        assert not document["text"].startswith(document.get("title", "") + "\n")
        assert not any(
            unicodedata.category(character) in ("Cc", "Co", "Cn") for character in document["text"].replace("\n", "")
        )


def test_lengths_and_forms_vary(documents):
    words = [len(document["text"].split()) for document in documents]
    assert min(words) < 20 and max(words) > 300
    assert sum(count < 40 for count in words) >= 80
    paragraphs = Counter(document["text"].count("\n\n") + 1 for document in documents)
    assert max(paragraphs.values()) < 0.4 * len(documents), paragraphs


def test_no_template_is_repeated(documents):
    """No two documents share a run of ten words, and but for the common ones, no opening comes more than twice."""
    owners: dict[tuple[str, ...], int] = {}
    for number, document in enumerate(documents):
        words = document["text"].split()
        for start in range(len(words) - 9):
            run = tuple(words[start : start + 10])
            assert owners.setdefault(run, number) == number, " ".join(run)
    openings = Counter(
        " ".join(first_words(document).split()[:4])
        for document in documents
        if not first_words(document).startswith(COMMON_OPENINGS)
    )
    assert openings.most_common(1)[0][1] <= 2, openings.most_common(3)


@pytest.mark.parametrize("opening", COMMON_OPENINGS)
def test_an_opening_that_newcomers_ask_for_has_several_continuations(documents, opening):
    continuations = {first_words(document) for document in documents if first_words(document).startswith(opening)}
    assert len(continuations) >= 4


def test_typography_is_uniform(documents):
    """The rules of cucafera/corpora/SOURCES.md."""
    for document in documents:
        text = document["text"]
        assert not set('…"“”\u2019') & set(text), document
        assert text.count("«") == text.count("»") or "\n»" in text or "\n\n»" in text, document
        assert not re.search(r": «[A-ZÀ-Ý][^«»]*»\.(\s|$)", text), document
        assert not re.search(r"segles? (nou|dotze|catorze|quinze|setze|disset|divuit|dinou)\b", text), document


def test_its_letters_are_those_of_catalan(documents):
    text = "".join(document["text"] for document in documents).lower()
    for letter in "àèéíïòóúüç":
        assert text.count(letter) > 20, letter
    assert text.count("l·l") > 5
    assert not set("ñãõìêâôß") & set(text)
