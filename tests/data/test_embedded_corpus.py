"""The corpora that come with the package: documents, and pairs of answers."""

import json
import re
import unicodedata
from collections import Counter

import pytest

from cucafera.data.chatml import Message, check_conversation, render
from cucafera.data.language import language_of
from cucafera.data.sources.embedded import CONTENTS, CORPORA, embedded_path
from cucafera.data.tokenizer import Tokenizer

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


def test_each_file_is_a_choice_of_the_configuration():
    assert {path.stem for path in CORPORA.glob("*.jsonl")} == CONTENTS.keys()


# Pairs of answers

KINDS = {"repeats", "language", "runs_on", "invents", "off_topic", "verbose"}
"""The ways in which an answer is worse, as in cucafera/corpora/SOURCES.md."""


@pytest.fixture(scope="module")
def pairs():
    return [json.loads(line) for line in embedded_path("preferences").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def questions():
    """The messages of the user in the embedded conversations."""
    rows = [json.loads(line) for line in embedded_path("conversations").read_text(encoding="utf-8").splitlines()]
    return {message["content"] for row in rows for message in row["messages"] if message["role"] == "user"}


def answer(pair, side):
    [message] = pair[side]
    assert message["role"] == "assistant"
    return message["content"]


def messages(pair, side):
    return [Message(**message) for message in pair["prompt"] + pair[side]]


def test_the_pairs_are_many_and_of_all_kinds(pairs):
    kinds = Counter(pair["kind"] for pair in pairs)
    sources = (embedded_path("preferences").parent / "SOURCES.md").read_text(encoding="utf-8")
    assert f"| `preferences.jsonl` | {len(pairs)} pairs" in sources
    assert dict(re.findall(r"\| `(\w+)` \| (\d+) \|", sources)) == {kind: str(count) for kind, count in kinds.items()}
    assert max(kinds.values()) < 1.5 * min(kinds.values()), kinds
    topics = Counter(pair["topic"] for pair in pairs)
    assert len(topics) >= 18 and max(topics.values()) < 0.16 * len(pairs), topics
    assert sum(len(pair["prompt"]) > 1 for pair in pairs) >= 0.18 * len(pairs)
    for start in range(0, len(pairs) - 12):  # any part of the file has all of them
        assert {pair["kind"] for pair in pairs[start : start + 12]} == KINDS


def test_a_pair_is_a_prompt_that_ends_with_the_user_and_two_answers(pairs):
    for pair in pairs:
        assert [*pair] == ["topic", "kind", "prompt", "chosen", "rejected"]
        roles = [message["role"] for message in pair["prompt"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert answer(pair, "chosen") != answer(pair, "rejected")
        for side in ("chosen", "rejected"):
            check_conversation(messages(pair, side))


def test_no_prompt_and_no_better_answer_comes_twice_and_most_prompts_are_not_those_of_the_conversations(
    pairs, questions
):
    last = [pair["prompt"][-1]["content"] for pair in pairs]
    assert len(set(last)) == len(pairs)
    assert len({answer(pair, "chosen") for pair in pairs}) == len(pairs)
    assert sum(prompt in questions for prompt in last) <= len(pairs) // 3


def test_length_alone_does_not_tell_the_better_answer(pairs):
    shorter = [len(answer(pair, "rejected")) < len(answer(pair, "chosen")) for pair in pairs]
    assert 0.3 <= sum(shorter) / len(pairs) <= 0.7
    assert len({pair["kind"] for pair, is_shorter in zip(pairs, shorter, strict=True) if is_shorter}) >= 5


def test_a_pair_fits_the_window_of_the_quickstart(pairs, documents):
    """256 tokens hold the prompt twice, with either answer, for a tokenizer of its size."""
    tokenizer = Tokenizer.train([document["text"] for document in documents], vocab_size=1024)
    rendered = [render([messages(pair, side) for side in ("chosen", "rejected")], tokenizer) for pair in pairs]
    tokens = [sum(len(side.ids) for side in pair) for pair in rendered]
    assert max(tokens) <= 220, max(
        zip(tokens, (pair["prompt"] for pair in pairs), strict=True), key=lambda each: each[0]
    )


def test_the_typography_of_pairs_is_that_of_the_documents(pairs):
    for pair in pairs:
        for message in pair["prompt"] + pair["chosen"] + pair["rejected"]:
            text = message["content"]
            assert text == text.strip() and unicodedata.is_normalized("NFC", text)
            assert not set('…"“”\u2019') & set(text), text
            assert text.count("«") == text.count("»"), text
        for text in (answer(pair, "chosen"), *([] if pair["kind"] == "language" else [answer(pair, "rejected")])):
            assert not set("ñãõìêâôß¿¡") & set(text.lower()), text
            assert not re.search(r": «[A-ZÀ-Ý][^«»]*»\.(\s|$)", text), text
            assert not re.search(r"\b(sóc|dóna|adéu|vénen|óssos|féu)\b", text.lower()), text  # accents until 2017


def test_better_answers_are_catalan_and_do_not_loop(pairs):
    pytest.importorskip("py3langid")
    for pair in pairs:
        text = answer(pair, "chosen")
        assert language_of(text) in ("ca", None), text
        words = re.findall(r"\w+", text.lower())
        runs = [tuple(words[start : start + 5]) for start in range(len(words) - 4)]
        assert len(set(runs)) == len(runs), text
        assert len(text) <= 120, text


def test_a_worse_answer_of_each_kind_is_what_it_is_said_to_be(pairs):
    pytest.importorskip("py3langid")
    of_kind = {kind: [pair for pair in pairs if pair["kind"] == kind] for kind in KINDS}
    languages = [language_of(answer(pair, "rejected")) for pair in of_kind["language"]]
    assert not {"ca"} & {*languages}
    assert {"es", "en", "fr"} <= {*languages}
    assert languages.count(None) <= len(languages) // 6
    for kind in KINDS - {"language"}:
        for pair in of_kind[kind]:
            assert language_of(answer(pair, "rejected")) in ("ca", None), pair
    for pair in of_kind["repeats"]:
        words = re.findall(r"\w+", answer(pair, "rejected").lower())
        assert len({*words}) <= 0.7 * len(words), pair
    for pair in of_kind["verbose"]:
        assert len(answer(pair, "rejected")) > 2 * len(answer(pair, "chosen")), pair
    for pair in of_kind["runs_on"]:
        assert len(re.findall(r"[.?!»](?= |$)", answer(pair, "rejected"))) >= 3, pair
