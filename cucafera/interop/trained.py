"""Load a trained model from its path alone: a run folder, a checkpoint, or a Hugging Face folder or name."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from cucafera.config.errors import UserError
from cucafera.config.fields import format_value
from cucafera.config.schema import Config, ModelConfig
from cucafera.data.packed import prepared_tokenizer
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop.hf_spec import TOKENIZER
from cucafera.interop.peft import TrainedAdapter, load_spec_weights
from cucafera.interop.peft_spec import AdaptedSpec, read_spec
from cucafera.model.lora import merged_weights
from cucafera.model.transformer import Decoder
from cucafera.objectives import objective_of
from cucafera.quantities import number_of
from cucafera.runs.averaging import DO_WITHOUT, steps_in_words
from cucafera.runs.checkpoints import DamagedCheckpointError, read_checkpoint
from cucafera.runs.folder import RunFolder, read_checkpoint_of, tokenizer_path_of
from cucafera.runs.locate import is_hugging_face

log = logging.getLogger(__name__)

SHAPELESS_FIELDS = ("initializer_range", "base_hidden_size", "max_position_embeddings")
"""Fields of ModelConfig that the weights do not depend on."""


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model ready for inference.

    Attributes:
        model: In fp32 on the CPU, adapters merged.
        tokenizer: Its tokenizer.
        checkpoint: The origin of its weights: a checkpoint file, the last one for a mean, or a Hugging Face folder.
        run: The run folder; None for a model from elsewhere.
        step: Optimizer steps done; None if unknown.
        chats: True if it was trained on conversations.
        notes: What was changed or assumed on loading, as sentences for the user.
        adapter: The adapters that a run trained; None if it trained all weights, for a mean, which has none of that
            rank, or for a model from elsewhere.
        averaged: The steps whose weights these are the mean of; empty for those of one checkpoint.
    """

    model: Decoder
    tokenizer: Tokenizer
    checkpoint: Path
    run: RunFolder | None
    step: int | None
    chats: bool
    notes: tuple[str, ...] = ()
    adapter: TrainedAdapter | None = None
    averaged: tuple[int, ...] = ()

    @property
    def origin(self) -> str:
        """The origin of the weights, for a line on the terminal."""
        if not self.averaged:
            return str(self.checkpoint)
        count = number_of(len(self.averaged), "checkpoint")
        return f"the mean of {count} up to {self.checkpoint} ({steps_in_words(self.averaged)})"


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The initial weights of a run.

    Attributes:
        weights: By the names of a LanguageModel's state dict, adapters merged.
        tokenizer: The fingerprint of the tokenizer that they were trained with.
        chats: True if they were trained on conversations.
    """

    weights: dict[str, Tensor]
    tokenizer: str
    chats: bool


def load_trained(source: str) -> TrainedModel:
    """Load the model of a run folder, a checkpoint, a Hugging Face folder or a name of its hub.

    Raises:
        UserError: the model or its tokenizer is missing, damaged or not supported.
    """
    if is_hugging_face(source):
        spec = read_spec(source, with_weights=True)
        model = _decoder(spec.model, load_spec_weights(spec))
        origin = spec.adapter if isinstance(spec, AdaptedSpec) else spec.folder
        return TrainedModel(model, spec.tokenizer, origin, None, None, spec.chats, spec.notes)
    path, checkpoint = read_checkpoint_of(source, "")
    tokenizer = _tokenizer_of(path)
    with _errors_of_content(path):
        config = checkpoint["config"]
        _check_tokenizer(tokenizer, path, checkpoint)
        model = _decoder(ModelConfig(**config["model"]), merged_weights(checkpoint["state_dict"], config["adapter"]))
        chats = objective_of(config).chats
        adapter = TrainedAdapter(checkpoint["state_dict"], config["adapter"]) if config["adapter"]["rank"] else None
    folder = RunFolder(path.parent.parent)
    return TrainedModel(model, tokenizer, path, folder, checkpoint["steps_done"], chats, adapter=adapter)


def load_mean(paths: Sequence[Path]) -> TrainedModel:
    """Load the uniform mean of the weights of checkpoints of one run (Izmailov et al., 2018; Kaddour, 2022, LAWA).

    Adapters are merged before: the product of the means of A and B is not the mean of their products. Of each file,
    the weights alone are read into memory, one file after another; its checksum covers the rest too.

    Args:
        paths: At least one, ascending by step.

    Raises:
        UserError: a checkpoint is missing or damaged, or its model or tokenizer is not that of the first.
    """
    tokenizer = _tokenizer_of(paths[-1])
    mean: dict[str, Tensor] = {}
    configs: list[Mapping[str, Any]] = []
    steps: list[int] = []
    for path in paths:
        config, step = _add_to_mean(mean, path, len(steps), tokenizer)
        configs.append(config)
        with _errors_of_content(path):
            if config["model"] != configs[0]["model"]:
                raise _of_another_shape(path)
        steps.append(step)
    with _errors_of_content(paths[-1]):
        model, chats = _decoder(ModelConfig(**config["model"]), mean), objective_of(config).chats
    folder = RunFolder(paths[-1].parent.parent)
    return TrainedModel(model, tokenizer, paths[-1], folder, steps[-1], chats, averaged=tuple(steps))


def _add_to_mean(
    mean: dict[str, Tensor], path: Path, count: int, tokenizer: Tokenizer
) -> tuple[Mapping[str, Any], int]:
    """Make the mean of `count` checkpoints that of one more; returns the configuration and the step of that one."""
    try:
        checkpoint = read_checkpoint(path, mapped=True)
    except DamagedCheckpointError as error:
        raise UserError(f"{error}: {DO_WITHOUT}") from error
    with _errors_of_content(path):
        _check_tokenizer(tokenizer, path, checkpoint)
        config = checkpoint["config"]
        weights = merged_weights(checkpoint["state_dict"], config["adapter"])
        if count == 0:
            mean.update((name, value.float().clone()) for name, value in weights.items())
            return config, checkpoint["steps_done"]
        if {name: value.shape for name, value in weights.items()} != {name: part.shape for name, part in mean.items()}:
            raise _of_another_shape(path)
        for name, value in weights.items():
            # A running mean: exact for weights that do not change, such as those that adapters leave frozen, and else
            # with an error of a few 2^-24 of the values, as an fp32 sum of so few has. Steps change weights by far
            # more, so fp64 would take twice the memory for nothing.
            mean[name].lerp_(value.float(), 1 / (count + 1))
        return config, checkpoint["steps_done"]


def _of_another_shape(path: Path) -> UserError:
    return UserError(f"{path} holds a model of another shape than the checkpoints before it, so they have no mean")


def _tokenizer_of(path: Path) -> Tokenizer:
    """Return the tokenizer of the run folder that a checkpoint is in. Raises UserError if there is none."""
    tokenizer_path = tokenizer_path_of(path)
    if not tokenizer_path.exists():
        raise UserError(f"{path}: {tokenizer_path} is missing; a checkpoint can only be read in its run folder")
    return Tokenizer.load(tokenizer_path)


def _check_tokenizer(tokenizer: Tokenizer, path: Path, checkpoint: Mapping[str, Any]) -> None:
    if tokenizer.fingerprint != checkpoint["fingerprints"]["tokenizer"]:
        raise UserError(f"{tokenizer_path_of(path)} is not the tokenizer that {path} was trained with")


@contextmanager
def _errors_of_content(path: Path) -> Iterator[None]:
    """Raise UserError for the content of an intact checkpoint that this version does not know."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be used: it was not written by this version of cucafera ({reason})") from error


def _decoder(config: ModelConfig, weights: dict[str, Tensor]) -> Decoder:
    """Return a decoder with weights that have the names of a LanguageModel's state dict."""
    return Decoder.from_weights(config, {name.removeprefix("model."): value for name, value in weights.items()})


def load_initial_weights(config: Config) -> InitialWeights:
    """Return the weights of init_from.

    Raises:
        UserError: they are missing or damaged, or have another shape than the configured model.
    """
    assert config.init_from is not None
    if is_hugging_face(config.init_from):
        spec = read_spec(config.init_from, with_weights=True)
        for note in spec.notes:
            log.info("%s", note)
        _check_same_shape(config, dataclasses.asdict(spec.model))
        return InitialWeights(load_spec_weights(spec), spec.tokenizer.fingerprint, spec.chats)
    path, checkpoint = read_checkpoint_of(config.init_from, "init_from=")
    with _errors_of_content(path):
        _check_same_shape(config, checkpoint["config"]["model"])
        weights = merged_weights(checkpoint["state_dict"], checkpoint["config"]["adapter"])
        chats = objective_of(checkpoint["config"]).chats
        return InitialWeights(weights, checkpoint["fingerprints"]["tokenizer"], chats)


def _check_same_shape(config: Config, loaded: dict[str, object]) -> None:
    requested = dataclasses.asdict(config.model)
    differences = [
        f"model.{key}: {format_value(requested[key])} (requested) != {format_value(loaded.get(key))} (init_from)"
        for key in requested
        if requested[key] != loaded.get(key) and key not in SHAPELESS_FIELDS
    ]
    if differences:
        raise UserError(
            f"init_from={config.init_from} holds a model of another shape:\n"
            + "\n".join(f"  - {line}" for line in differences)
        )


def initial_tokenizer(config: Config) -> Path:
    """Return the path of the tokenizer of init_from, which the weights were trained with.

    A tokenizer of Hugging Face whose ids had to be reordered is written into the prepared data.

    Raises:
        UserError: the tokenizer of a Hugging Face folder is missing or not supported.
    """
    assert config.init_from is not None
    if not is_hugging_face(config.init_from):
        return tokenizer_path_of(Path(config.init_from).expanduser())
    spec = read_spec(config.init_from, with_weights=False)
    if spec.row_of_id is None:
        return spec.folder / TOKENIZER
    folder = Path(config.data.prepared_dir) / f"tokenizer-{spec.tokenizer.fingerprint[:16]}"
    return prepared_tokenizer(folder, lambda: spec.tokenizer)
