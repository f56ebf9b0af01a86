"""Recognize the language of a text; needs pip install '.[language]'.

py3langid, a naive Bayes classifier on byte n-grams (Lui and Baldwin 2012), gives a probability for each language. Only
languages that data for a Catalan model is likely to hold are compared: among all of py3langid's, half as many answers
again go unrecognized, because rare ones, such as Ligurian, take a share of the probability. README.md has the figures.
"""

from functools import cache
from typing import Any

from cucafera.config.errors import UserError
from cucafera.data.chatml import Conversation

LANGUAGES = tuple("ca es en fr it pt gl oc de eu nl ro pl tr el ru uk he ar hi zh ja ko".split())
"""ISO 639-1 codes: neighbours of Catalan, large languages of data sets, and those of the common scripts."""

FEWEST_LETTERS = 12
"""Shorter texts are often the same in several languages: "Roma.", "No."."""

LEAST_PROBABILITY = 0.6
"""With it, no answer of the embedded corpora is taken for another language; with 0.5, three are."""


def language_of(text: str) -> str | None:
    """Return the ISO 639-1 code of the language of a text, of LANGUAGES; None: too short, or between two.

    A text of which a part is in another language has that of the larger part, or none.

    Raises:
        UserError: py3langid is not installed.
    """
    if sum(map(str.isalpha, text)) < FEWEST_LETTERS:
        return None
    language, probability = _identifier().classify(text)
    return str(language) if probability >= LEAST_PROBABILITY else None


def is_in_language(conversation: Conversation, language: str | None) -> bool:
    """False if the answers of a conversation are recognized as another language than this one; None: any will do."""
    if language is None:
        return True
    answers = [message.content for message in conversation if message.role == "assistant" and message.trained]
    return language_of("\n".join(answers)) in (language, None)


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError("recognizing languages needs py3langid: pip install '.[language]'") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier
