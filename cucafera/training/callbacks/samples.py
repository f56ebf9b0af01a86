"""Texts that the model writes, so that a person sees it learn."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from cucafera.config import Config
from cucafera.data.packed import PackedDataModule
from cucafera.data.tokenizer import DOCUMENT_START_ID
from cucafera.generation.generate import generate
from cucafera.training.callbacks.validation import Validation
from cucafera.training.module import LanguageModel


class Samples(pl.Callback):
    """Continues the fixed prompts after each validation, with the same random numbers each time.

    Emits, against steps: the text samples/N for the N-th prompt.

    Attributes:
        latest: Prompt and continuation of the last time.
    """

    def __init__(self, config: Config, validation: Validation) -> None:
        self.config = config
        self.validation = validation
        self.latest: list[tuple[str, str]] = []

    def state_dict(self) -> dict[str, Any]:
        """The latest texts."""
        return {"latest": [list(pair) for pair in self.latest]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self.latest = [(prompt, continuation) for prompt, continuation in state_dict["latest"]]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes when a validation has just been done."""
        assert isinstance(pl_module, LanguageModel)
        if self.validation.done_at(pl_module.steps_done) and trainer.is_global_zero:
            self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        data: PackedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        sampling = self.config.callbacks.sampling
        self.latest = []
        module.eval()
        for prompt in sampling.prompts:
            room = self.config.model.max_position_embeddings - 1
            ids = [DOCUMENT_START_ID, *data.tokenizer.encode(prompt)][:room]
            generator = torch.Generator(module.device).manual_seed(self.config.seed)
            continuation = generate(
                module.model,
                torch.tensor([ids], device=module.device),
                sampling,
                generator,
                stop_ids=frozenset({DOCUMENT_START_ID}),
            )
            self.latest.append((prompt, data.tokenizer.decode(continuation.tolist())))
        module.train()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for number, (prompt, continuation_text) in enumerate(self.latest, 1):
                    # Two spaces before a line's end keep it in Markdown, which TensorBoard shows texts as.
                    text = f"**{prompt}**{continuation_text}".replace("\n", "  \n")
                    logger.experiment.add_text(f"samples/{number}", text, module.steps_done)
