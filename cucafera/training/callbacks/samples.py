"""Texts that the model writes, so that a person sees it learn."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from cucafera.config import Config
from cucafera.generation.generate import generate
from cucafera.model.transformer import Decoder
from cucafera.training.callbacks.validation import Validation
from cucafera.training.module import LanguageModel, data_module_of


class Samples(pl.Callback):
    """Continues the fixed prompts, or answers them, after each validation, with the same random numbers each time.

    Emits, against steps: the text samples/N for the N-th prompt.

    Attributes:
        latest: For each prompt of the last time: prompt, continuation, and why it ended (see `Written.ended`).
    """

    def __init__(self, config: Config, validation: Validation) -> None:
        self.config = config
        self.validation = validation
        self.latest: list[dict[str, str]] = []

    def state_dict(self) -> dict[str, Any]:
        """The latest texts."""
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self.latest = state_dict["latest"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes when a validation has just been done, unless the model is broken: there is nothing to draw from."""
        assert isinstance(pl_module, LanguageModel)
        validation = self.validation.done_at(pl_module.steps_done)
        if validation is not None and math.isfinite(validation["loss"]):
            model = pl_module.whole_model()
            if model is not None:
                self._write(trainer, pl_module, model)

    def _write(self, trainer: pl.Trainer, module: LanguageModel, model: Decoder) -> None:
        data = data_module_of(trainer)
        callbacks = self.config.callbacks
        room = self.config.model.max_position_embeddings - 1
        self.latest = []
        model.eval()
        for prompt in callbacks.prompts:
            (written,) = generate(
                model,
                data.tokenizer,
                [data.prompt_ids(prompt)[-room:]],
                callbacks.sampling,
                frozenset({data.stop_id}),
                torch.Generator(module.device).manual_seed(self.config.seed),
            )
            self.latest.append({"prompt": prompt, "continuation": written.text, "ended": written.ended})
        model.train()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for number, sample in enumerate(self.latest, 1):
                    # Two spaces before a line's end keep it in Markdown, which TensorBoard shows texts as.
                    text = as_markdown(sample, self.config.data.kind).replace("\n", "  \n")
                    logger.experiment.add_text(f"samples/{number}", text, module.steps_done)


def continuation_of(sample: dict[str, str]) -> str:
    """What was written; an ellipsis says that it was cut."""
    return sample["continuation"] + ("" if sample["ended"] == "stop" else " …")


def as_markdown(sample: dict[str, str], kind: str) -> str:
    """A prompt in bold and its continuation behind it, or its answer below it.

    Args:
        sample: One of `Samples.latest`.
        kind: data.kind of the run.
    """
    between = "\n\n" if kind == "conversations" else ""
    return f"**{sample['prompt']}**{between}{continuation_of(sample)}"
