"""What is measured: a trained model, and what is known of the run that it comes from."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cucafera.config import UserError
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop.trained import load_trained
from cucafera.model.transformer import Decoder
from cucafera.training.checkpoint_files import read_checkpoint
from cucafera.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        source: What the user called it.
        model: The decoder, in fp32, on the device.
        tokenizer: Its tokenizer.
        chats: Whether it was trained on conversations.
        checkpoint: Where its weights come from.
        step: After how many steps; None where nobody knows.
        folder: The run folder that the checkpoint is in; None for a model from elsewhere.
        notes: What a user should know of how it was taken.
    """

    source: str
    model: Decoder
    tokenizer: Tokenizer
    chats: bool
    checkpoint: Path
    step: int | None
    folder: RunFolder | None
    notes: tuple[str, ...] = ()

    @property
    def facts(self) -> str:
        """What it is, for the terminal and for pages: parameters, checkpoint, steps."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        steps = "" if self.step is None else f", after {self.step:,} steps"
        return f"{parameters:,} parameters; {self.checkpoint.name}{steps}"

    @property
    def sources(self) -> dict[str, str]:
        """The identity of the training data of each source; empty if nobody knows."""
        if self.folder is None:
            return {}
        identity: dict[str, str] = read_checkpoint(self.checkpoint, mapped=True)["identity"]
        prefix = "data.sources."
        return {name.removeprefix(prefix): value for name, value in identity.items() if name.startswith(prefix)}

    @property
    def prepared(self) -> Path:
        """Where the run found its tokens; if relative, seen from the folder that it was started in."""
        return Path(str(_value(self._config(), "data.prepared_dir") or "outputs/prepared"))

    @property
    def prompts(self) -> list[str]:
        """What the run showed of itself in training; empty if nobody knows."""
        return [str(prompt) for prompt in _value(self._config(), "callbacks.prompts") or []]

    def _config(self) -> Any:
        """The configuration of the run, as it stands in its folder; nothing for a model from elsewhere."""
        if self.folder is None:
            return OmegaConf.create()
        try:
            return OmegaConf.load(self.folder.config)
        except (OSError, YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{self.folder.config} cannot be read: {str(error).splitlines()[0]}") from error


def load_subject(source: str, device: torch.device) -> Subject:
    """The model that a path names.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not source:
        raise UserError("RUN is empty: name a run folder, a checkpoint or a Hugging Face folder")
    trained = load_trained(source)
    return Subject(
        source=source,
        model=trained.model.to(device),
        tokenizer=trained.tokenizer,
        chats=trained.chats,
        checkpoint=trained.checkpoint,
        step=trained.step,
        folder=trained.run,
        notes=trained.notes,
    )


def _value(config: Any, key: str) -> Any:
    """A value of a configuration that may be of another version."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None
