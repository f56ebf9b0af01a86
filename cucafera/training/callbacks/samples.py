"""Sample texts during training."""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from cucafera.config.schema import Config
from cucafera.data.chatml import STOP_IDS
from cucafera.data.repetition import repeats_words
from cucafera.generation.generate import Completion, generate
from cucafera.model.transformer import Decoder
from cucafera.runs.report import continuation_of
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.validation import Validation
from cucafera.training.data_module import data_of
from cucafera.training.module import LanguageModel

ANSWER_CURVES = ("stopped", "tokens", "repeated_5gram")
"""Curves of the answers; keys of `answer_statistics` too."""


class Samples(Callback):
    """Continue or answer the fixed prompts after each validation, with the same random numbers each time.

    The prompts are one batch. A model that answers also does so before the first step, to compare with.

    Emits, against steps, the text samples/N for the N-th prompt, and for a model that answers
        samples/stopped         share of the answers that the model ended by itself
        samples/tokens          mean length
        samples/repeated_5gram  share of the answers in which five consecutive words come again

    Attributes:
        latest: For each prompt of the last time: prompt, continuation, and why it ended (see `Completion`).
        answers: For a model that answers, one record per validation: step, and `answer_statistics`.
    """

    def __init__(self, config: Config, validation: Validation) -> None:
        self.config = config
        self.validation = validation
        self.latest: list[dict[str, str]] = []
        self.answers: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the latest samples, and the figures of all answers."""
        return {"latest": self.latest, "answers": self.answers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the samples and figures; those of other prompts are no figures to compare with."""
        self.latest = state_dict["latest"]
        is_same = [sample["prompt"] for sample in self.latest] == self.config.callbacks.prompts
        self.answers = state_dict.get("answers", []) if is_same else []  # none: saved before answers were counted

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Let a model that answers do so before its first step."""
        if module.objective.chats and module.steps_done == 0:
            self._sample(trainer, module)

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Sample after a validation."""
        self._sample(trainer, module)

    def _sample(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Sample if this step was validated, unless its result is not finite: there is no distribution to draw from."""
        validation = self.validation.done_at(module.steps_done)
        if not self.config.callbacks.prompts or validation is None:
            return
        if math.isfinite(validation[module.objective.primary]):
            model = module.gather_full_model()
            statistics = None if model is None else self._write(trainer, module, model)
            if module.objective.chats:
                statistics = trainer.strategy.broadcast(statistics)  # what the guard decides, every process must
                assert statistics is not None
                self.answers.append({"step": module.steps_done, **statistics})

    def _write(self, trainer: pl.Trainer, module: LanguageModel, model: Decoder) -> dict[str, float]:
        """Generate and log the texts; return `answer_statistics`."""
        tokenizer, callbacks = data_of(trainer).tokenizer, self.config.callbacks
        max_prompt_tokens = self.config.model.max_position_embeddings - 1
        prompts = [module.objective.prompt_ids(tokenizer, text)[-max_prompt_tokens:] for text in callbacks.prompts]
        seeds = [self.config.seed] * len(prompts)  # a text does not depend on the place of its prompt
        model.eval()
        written = generate(model, tokenizer, prompts, callbacks.sampling, frozenset(STOP_IDS), seeds)
        model.train()
        self.latest = [
            {"prompt": prompt, "continuation": text.text, "finish_reason": text.finish_reason}
            for prompt, text in zip(callbacks.prompts, written, strict=True)
        ]
        statistics = answer_statistics(written)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for number, sample in enumerate(self.latest, 1):
                    text = module.objective.sample_markdown(sample["prompt"], continuation_of(sample))
                    logger.experiment.add_text(f"samples/{number}", text, module.steps_done)
            if module.objective.chats:
                curves = {f"samples/{name}": statistics[name] for name in ANSWER_CURVES}
                logger.log_metrics(curves, step=module.steps_done)
        return statistics


def answer_statistics(answers: Sequence[Completion]) -> dict[str, float]:
    """Return figures of answers, of which there is at least one.

    Returns:
        count; stopped: share that the model ended by itself; tokens: mean length, without the stop token;
        repeated_5gram: share in which five consecutive words come again.
    """
    count = len(answers)
    return {
        "count": count,
        "stopped": sum(answer.finish_reason == "stop" for answer in answers) / count,
        "tokens": sum(len(answer.ids) for answer in answers) / count,
        "repeated_5gram": sum(repeats_words(answer.text) for answer in answers) / count,
    }
