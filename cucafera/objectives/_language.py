"""The language that answers must have."""

from collections.abc import Iterator

from cucafera.config.registry import Judge
from cucafera.config.schema import Config


def language_problems(config: Config, judge: Judge, objective: str, has_answers: bool) -> Iterator[str]:
    """Yield a sentence if data.language cannot be used.

    Args:
        config: The configuration.
        judge: Which keys have usable values.
        objective: Its name.
        has_answers: True if its data are conversations or pairs of answers; documents are not filtered by language.
    """
    language = config.data.language
    if language is None or not judge("data.language"):
        return
    if not has_answers:
        yield (
            f"data.language is {language}, and objective={objective} reads documents, which are not filtered by "
            "language; remove it (data.language=null), and give texts that are in one language"
        )
        return

    from cucafera.data.language import LANGUAGES

    if language not in LANGUAGES:
        yield f"data.language is {language}; the languages that can be recognized are {', '.join(LANGUAGES)}"
