"""Finetuning: what the assistant says in ChatML conversations."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cucafera.config.registry import OBJECTIVES, Judge
from cucafera.config.schema import Config
from cucafera.config.tokens import IM_END_ID
from cucafera.objectives._embedded import embedded_problems
from cucafera.objectives._language import language_problems
from cucafera.objectives._next_token import NEXT_TOKEN_METRICS, NextToken

if TYPE_CHECKING:
    from cucafera.data.run_data import RunData
    from cucafera.data.tokenizer import Tokenizer


@OBJECTIVES.register
class Finetuning(NextToken):
    """The assistant's tokens, and the `<im_end>` after each answer, are the targets."""

    name = "finetuning"
    stage = "finetuning"
    kind_of_data = "conversations"
    chats = True
    metrics = NEXT_TOKEN_METRICS
    primary = "bpb"
    stop_id = IM_END_ID

    def problems(self, config: Config, judge: Judge) -> Iterator[str]:
        """A tokenizer is never trained on conversations alone, and other texts of this package are none."""
        yield from embedded_problems(config, judge, self.name, "conversations")
        yield from language_problems(config, judge, self.name, has_answers=True)
        if judge("init_from", "tokenizer.path") and config.init_from is None and config.tokenizer.path is None:
            yield (
                "conversations need a pretrained model, or at least a tokenizer: init_from=RUN, the folder or a "
                "checkpoint of a pretrained model (or tokenizer.path=TOKENIZER.json, to train a new model on them "
                "alone)"
            )

    def open_data(self, config: Config) -> "RunData[Any]":
        """Tokenize the conversations, and pack them into windows."""
        from cucafera.data.conversations import open_conversations

        return open_conversations(config)

    def prompt_ids(self, tokenizer: "Tokenizer", prompt: str) -> list[int]:
        """Return the prompt as the user's message, and the opening of the assistant's answer."""
        from cucafera.data.chatml import Message, render_prompt

        return render_prompt([Message("user", prompt)], tokenizer)
