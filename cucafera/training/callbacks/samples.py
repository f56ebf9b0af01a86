"""Sample texts during training."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from cucafera.config.schema import Config
from cucafera.data.chatml import STOP_IDS
from cucafera.generation.generate import generate
from cucafera.model.transformer import Decoder
from cucafera.runs.report import continuation_of
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.validation import Validation
from cucafera.training.data_module import data_of
from cucafera.training.module import LanguageModel


class Samples(Callback):
    """Continue or answer the fixed prompts after each validation, with the same random numbers each time.

    Emits, against steps: the text samples/N for the N-th prompt.

    Attributes:
        latest: For each prompt of the last time: prompt, continuation, and why it ended (see `Completion`).
    """

    def __init__(self, config: Config, validation: Validation) -> None:
        self.config = config
        self.validation = validation
        self.latest: list[dict[str, str]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the latest samples."""
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the latest samples."""
        self.latest = state_dict["latest"]

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Sample after a validation, unless its result is not finite: then there is no distribution to draw from."""
        validation = self.validation.done_at(module.steps_done)
        if validation is not None and math.isfinite(validation[module.objective.primary]):
            model = module.gather_full_model()
            if model is not None:
                self._write(trainer, module, model)

    def _write(self, trainer: pl.Trainer, module: LanguageModel, model: Decoder) -> None:
        data = data_of(trainer)
        callbacks = self.config.callbacks
        max_prompt_tokens = self.config.model.max_position_embeddings - 1
        self.latest = []
        model.eval()
        for prompt in callbacks.prompts:
            (written,) = generate(
                model,
                data.tokenizer,
                [module.objective.prompt_ids(data.tokenizer, prompt)[-max_prompt_tokens:]],
                callbacks.sampling,
                frozenset(STOP_IDS),
                self.config.seed,
            )
            self.latest.append({"prompt": prompt, "continuation": written.text, "finish_reason": written.finish_reason})
        model.train()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for number, sample in enumerate(self.latest, 1):
                    text = module.objective.sample_markdown(sample["prompt"], continuation_of(sample))
                    logger.experiment.add_text(f"samples/{number}", text, module.steps_done)
