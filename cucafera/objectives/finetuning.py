"""Finetuning: what the assistant says in ChatML conversations."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cucafera.config.registry import OBJECTIVES, Judge
from cucafera.config.schema import Config
from cucafera.config.tokens import IM_END_ID
from cucafera.objectives._next_token import NEXT_TOKEN_METRICS, NextToken

if TYPE_CHECKING:
    from cucafera.data.run_data import RunData
    from cucafera.data.tokenizer import Tokenizer


@OBJECTIVES.register
class Finetuning(NextToken):
    """The assistant's tokens, and the `<im_end>` after each answer, are the targets."""

    name = "finetuning"
    chats = True
    metrics = NEXT_TOKEN_METRICS
    primary = "bpb"
    stop_id = IM_END_ID

    def problems(self, config: Config, judge: Judge) -> Iterator[str]:
        """A tokenizer is never trained on conversations alone, and the embedded documents are none."""
        for name, source in config.data.sources.items():
            if getattr(source, "embedded", None) == "catalan":
                yield (f"data.sources.{name}.embedded is catalan, which holds documents; use data=conversations")
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

    def summary(self, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the number of sample answers that the model ended."""
        samples = metrics["samples"]
        if not samples:
            return []
        ended = sum(sample["finish_reason"] == "stop" for sample in samples)
        return [("Answers", f"{ended} of {len(samples)} ended by themselves")]
