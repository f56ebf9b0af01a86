"""The texts of this package that an objective reads."""

from collections.abc import Iterator

from cucafera.config.registry import Judge
from cucafera.config.schema import Config
from cucafera.data.sources.embedded import CONTENTS, EmbeddedConfig

CHOICES = {"documents": "embedded", "conversations": "conversations", "pairs of answers": "preferences"}
"""The choice of `data` by what the texts are."""


def embedded_problems(config: Config, judge: Judge, objective: str, readable: str) -> Iterator[str]:
    """Yield a sentence for each source with texts of this package that the objective cannot read.

    Args:
        config: The configuration.
        judge: Which keys have usable values.
        objective: Its name.
        readable: What it reads: a value of `CONTENTS`.
    """
    for name, source in config.data.sources.items():
        if not isinstance(source, EmbeddedConfig) or not judge(f"data.sources.{name}"):
            continue
        content = CONTENTS.get(str(source.embedded), readable)
        has_answers = (content, readable) == ("pairs of answers", "conversations")
        if content == readable or (has_answers and source.columns.answer == "chosen"):
            continue
        yield (
            f"data.sources.{name}.embedded is {source.embedded}, which holds {content}, and objective={objective} "
            f"reads {readable}; use data={CHOICES[readable]}"
            + (f", or data.sources.{name}.columns.answer=chosen for the better answers" if has_answers else "")
        )
