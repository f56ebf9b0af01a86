"""Rules that answers keep or break, and the pair that they decide for."""

import pytest

from cucafera.data.chatml import Message
from cucafera.pairs.answers import AnsweredPrompt, OwnAnswer
from cucafera.pairs.outcomes import EMPTY, NO_ROOM, SAME, against_reference, ranked, undecidable
from cucafera.pairs.prompts import prompt_of
from cucafera.pairs.rules import (
    ALIKE,
    ALL_BAD,
    ALL_GOOD,
    LANGUAGE,
    LENGTH,
    MIXED,
    REPEATS,
    STOPS,
    Ranking,
    Rules,
    best_and_worst,
)

LANGUAGES = {"the sea": "en", "hm": None}
RULES = Rules("ca", lambda text: LANGUAGES.get(text, "ca"), (2, 6))


@pytest.mark.parametrize(
    ("text", "finish_reason", "broken"),
    [
        ("la mar és blava", "stop", set()),
        ("la mar és blava", "length", {STOPS}),
        ("la mar és blava", "context", {STOPS}),
        ("the sea", "stop", {LANGUAGE}),
        ("hm", "stop", {LENGTH}),
        ("a b", "stop", set()),
        ("a b c d e f", "stop", set()),
        ("a b c d e f g", "stop", {LENGTH}),
        ("a b c d e A B C D E", "length", {STOPS, REPEATS, LENGTH}),
    ],
)
def test_the_rules_that_an_answer_breaks(text, finish_reason, broken):
    assert RULES.broken_by(OwnAnswer(text, finish_reason)) == broken


def test_without_a_language_or_bounds_their_rules_are_kept():
    assert Rules(None, LANGUAGES.get, None).broken_by(OwnAnswer("the sea", "stop")) == set()
    assert Rules(None, LANGUAGES.get, None).broken_by(OwnAnswer("x " * 900, "stop")) == {REPEATS}


def answers(*texts: str) -> list[OwnAnswer]:
    return [OwnAnswer(text, "stop") for text in texts]


def broken(*rules: str) -> list[frozenset[str]]:
    return [frozenset(of_answer.split("+")) - {""} for of_answer in rules]


@pytest.mark.parametrize(
    ("texts", "rules", "expected"),
    [
        (["a", "b", "c"], ["s", "", "s+l"], Ranking(1, 2, [])),
        (["a", "b", "c"], ["s", "s+l", "l"], Ranking(0, 1, [])),  # c is no better than b by more
        (["a", "b"], ["", ""], ALL_GOOD),
        (["a", "b"], ["s", "s"], ALL_BAD),
        (["a", "b"], ["s", "l"], MIXED),
        (["a", "b", "c"], ["s", "l+r", "r"], Ranking(2, 1, [])),
        (["a", "a"], ["", "s"], ALIKE),  # the same text once cut
        (["", "b"], ["", "s"], ALIKE),  # an empty answer is no part of a pair
        (["", "b", "c"], ["", "s", "s+l"], Ranking(1, 2, [])),
        (["a", "b c d", "x y z", "w"], ["", "", "s", "s"], Ranking(0, 3, [])),  # the same number of words
        (["a b", "b", "x y", "w"], ["", "", "s", "s"], Ranking(0, 2, [])),  # then the first
    ],
)
def test_the_best_answer_is_taken_against_the_worst_that_it_is_better_than(texts, rules, expected):
    assert best_and_worst(answers(*texts), broken(*rules)) == expected


def test_the_reasons_are_the_rules_that_only_the_worse_answer_breaks():
    sets = [frozenset({LENGTH}), frozenset({LENGTH, REPEATS, STOPS})]
    assert best_and_worst(answers("a", "b"), sets) == Ranking(0, 1, [STOPS, REPEATS])


def answered(*given: OwnAnswer, reference: str | None = None) -> AnsweredPrompt:
    return AnsweredPrompt(prompt_of([Message("user", "Hola")], reference), list(given))


def test_a_pair_by_rules_has_the_finish_reasons_of_both_answers():
    entry, pair = ranked(answered(OwnAnswer("the sea", "length"), OwnAnswer("Bon dia", "stop")), RULES)
    assert pair == ("Bon dia", "the sea", ("stop", "length"), [STOPS, LANGUAGE])
    assert entry[1:] == ("pair", 2, {STOPS: 1, LANGUAGE: 1})
    entry, pair = ranked(answered(), RULES)
    assert (entry.outcome, entry.answers, pair) == (NO_ROOM, 0, None)


def test_a_reference_is_better_than_the_models_own_answer_unless_they_are_the_same():
    own = OwnAnswer("Hola", "length")
    assert against_reference(answered(own, reference=" Bon dia "), RULES)[1] == (
        "Bon dia",
        "Hola",
        ("stop", "length"),
        (),
    )
    for given, outcome in (([own], SAME), ([OwnAnswer("", "stop")], EMPTY), ([], NO_ROOM)):
        entry, pair = against_reference(answered(*given, reference="Hola\n"), RULES)
        assert (entry.outcome, pair) == (outcome, None)


def test_a_person_is_asked_about_two_different_answers_that_are_not_empty():
    one, other, empty = answers("a", "b", "")
    assert undecidable(answered(one, other)) is None
    assert [undecidable(answered(*given)) for given in ([one, one], [one, empty], [])] == [ALIKE, EMPTY, NO_ROOM]
