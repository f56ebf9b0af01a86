"""The model under evaluation, and what is known of the run that trained it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cucafera.interop.trained import TrainedModel, load_mean, load_trained
from cucafera.quantities import number_of
from cucafera.runs.averaging import steps_in_words
from cucafera.runs.checkpoints import read_checkpoint
from cucafera.runs.folder import RunFolder


class PreparedSources(NamedTuple):
    """The prepared data of a run.

    Attributes:
        fingerprints: Of the training data, by source; empty if unknown.
        folder: data.prepared_dir; a relative one is relative to the folder that training was started in.
    """

    fingerprints: dict[str, str]
    folder: Path


def prepared_sources(run: RunFolder, checkpoint: Path) -> PreparedSources:
    """Return the prepared data of a run, as its config.yaml and one of its checkpoints say.

    Raises:
        UserError: they cannot be read.
    """
    identity: dict[str, str] = read_checkpoint(checkpoint, mapped=True)["fingerprints"]
    prefix = "data.sources."
    fingerprints = {name.removeprefix(prefix): value for name, value in identity.items() if name.startswith(prefix)}
    return PreparedSources(fingerprints, Path(str(_setting(run, "data", "prepared_dir") or "outputs/prepared")))


@dataclasses.dataclass(frozen=True)
class EvaluatedModel(TrainedModel):
    """A trained model on the device where it is evaluated.

    Attributes:
        source: The path or name that the user gave.
    """

    source: str = dataclasses.field(kw_only=True)

    @property
    def facts(self) -> str:
        """One line for the terminal and for pages: parameters, checkpoint, steps."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        steps = "" if self.step is None else f", after {number_of(self.step, 'step')}"
        origin = f"the mean of the weights after the {steps_in_words(self.averaged)}" if self.averaged else ""
        return f"{number_of(parameters, 'parameter')}; {origin or self.checkpoint.name + steps}"

    @property
    def data(self) -> PreparedSources | None:
        """The prepared data of its run; None for a model from elsewhere."""
        return None if self.run is None else prepared_sources(self.run, self.checkpoint)

    @property
    def prompts(self) -> list[str]:
        """The prompts of the run's samples; empty if unknown."""
        prompts = None if self.run is None else _setting(self.run, "callbacks", "prompts")
        return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []


def _setting(run: RunFolder, group: str, key: str) -> Any:
    """Return a setting of a run; None if it is not there: another version may have written its config.yaml."""
    settings = run.read_config().get(group)
    return settings.get(key) if isinstance(settings, dict) else None


def load_evaluated_model(source: str, device: torch.device, averaged: Sequence[Path] = ()) -> EvaluatedModel:
    """Load the model of a run folder, a checkpoint, or a Hugging Face folder or name.

    Args:
        source: The path or name that the user gave.
        device: Where it is evaluated.
        averaged: Checkpoints of the source whose mean is evaluated; none: see `load_trained`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    trained = load_mean(averaged) if averaged else load_trained(source)
    trained.model.to(device)
    return EvaluatedModel(**vars(trained), source=source)
