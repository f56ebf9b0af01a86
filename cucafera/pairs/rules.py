"""Rules that an answer keeps or breaks, and the pair of answers that they decide for.

    stops      the model ends the answer itself
    language   it is recognized as the language that was asked for, or is too short to tell
    repeats    no five consecutive words occur twice
    length     it has a number of words within bounds

An answer is better than another if it breaks fewer rules, and none that the other keeps. An empty answer is no part of
a pair.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cucafera.data.repetition import repeats_words
from cucafera.pairs.answers import OwnAnswer

STOPS, LANGUAGE, REPEATS, LENGTH = "does not stop", "another language", "repeats itself", "length"
RULES = (STOPS, LANGUAGE, REPEATS, LENGTH)
"""By the fault of an answer that breaks them."""
ALL_GOOD, ALL_BAD = "all answers keep the rules", "all answers break the same rules"
MIXED, ALIKE = "no answer is better by one rule and worse by none", "fewer than two different answers"
"""Why a prompt gives no pair."""


class Rules(NamedTuple):
    """Bounds of the rules.

    Attributes:
        language: ISO 639-1 code; None: any language.
        language_of: Recognizes the code of a text; None: too short to tell.
        words: Fewest and most words of an answer; None: any number.
    """

    language: str | None
    language_of: Callable[[str], str | None]
    words: tuple[int, int] | None

    def broken_by(self, answer: OwnAnswer) -> frozenset[str]:
        """Return the rules that an answer breaks."""
        broken = set()
        if answer.finish_reason != "stop":
            broken.add(STOPS)
        if self.language is not None and self.language_of(answer.text) not in (self.language, None):
            broken.add(LANGUAGE)
        if repeats_words(answer.text):
            broken.add(REPEATS)
        if self.words is not None and not self.words[0] <= word_count(answer.text) <= self.words[1]:
            broken.add(LENGTH)
        return frozenset(broken)


class Ranking(NamedTuple):
    """The pair of a prompt's answers.

    Attributes:
        chosen: Number of the better answer.
        rejected: Number of the worse one.
        reasons: The rules that only the worse one breaks, in the order above.
    """

    chosen: int
    rejected: int
    reasons: list[str]


def best_and_worst(answers: Sequence[OwnAnswer], broken: Sequence[frozenset[str]]) -> Ranking | str:
    """Return the pair of the best answer and the worst one that it is better than, or why there is none.

    The best breaks the fewest rules, the worst the most. Of several such pairs, the one whose answers differ least in
    their numbers of words is taken, so that length is learned only from the rule about it; then the first.

    Args:
        answers: Of one prompt.
        broken: The rules that each breaks.
    """
    numbers = [number for number, answer in enumerate(answers) if answer.text]
    pairs = [(best, worst) for best in numbers for worst in numbers if broken[best] < broken[worst]]
    pairs = [(best, worst) for best, worst in pairs if answers[best].text != answers[worst].text]
    if pairs:
        words = [word_count(answer.text) for answer in answers]
        best, worst = min(
            pairs,
            key=lambda pair: (len(broken[pair[0]]), -len(broken[pair[1]]), abs(words[pair[0]] - words[pair[1]]), pair),
        )
        more = broken[worst] - broken[best]
        return Ranking(best, worst, [rule for rule in RULES if rule in more])
    if len({answers[number].text for number in numbers}) < 2:
        return ALIKE
    kinds = {broken[number] for number in numbers}
    if len(kinds) > 1:
        return MIXED
    return ALL_BAD if any(kinds) else ALL_GOOD


def word_count(text: str) -> int:
    """Return the number of words."""
    return len(text.split())
