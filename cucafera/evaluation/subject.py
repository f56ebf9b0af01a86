"""What is measured: a trained model, and what is known of the run that it comes from."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cucafera.config import UserError
from cucafera.interop.trained import TrainedModel, load_trained
from cucafera.training.checkpoint_files import read_checkpoint


@dataclasses.dataclass(frozen=True)
class Subject(TrainedModel):
    """A model to be measured, on the device where that is done.

    Attributes:
        source: What the user called it.
    """

    source: str = dataclasses.field(kw_only=True)

    @property
    def facts(self) -> str:
        """What it is, for the terminal and for pages: parameters, checkpoint, steps."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        steps = "" if self.step is None else f", after {self.step:,} steps"
        return f"{parameters:,} parameters; {self.checkpoint.name}{steps}"

    @property
    def sources(self) -> dict[str, str]:
        """The identity of the training data of each source; empty if nobody knows."""
        if self.run is None:
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
        if self.run is None:
            return OmegaConf.create()
        try:
            return OmegaConf.load(self.run.config)
        except (OSError, YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{self.run.config} cannot be read: {str(error).splitlines()[0]}") from error


def load_subject(source: str, device: torch.device) -> Subject:
    """The model that a path names.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not source:
        raise UserError("RUN is empty: name a run folder, a checkpoint or a Hugging Face folder")
    trained = load_trained(source)
    trained.model.to(device)
    return Subject(**vars(trained), source=source)


def _value(config: Any, key: str) -> Any:
    """A value of a configuration that may be of another version."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None
