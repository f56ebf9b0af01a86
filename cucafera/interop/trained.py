"""Load a trained model from its path alone: a run folder, a checkpoint, or a Hugging Face folder or name."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        checkpoint: The origin of its weights: a checkpoint file, or a Hugging Face folder.
        run: The run folder; None for a model from elsewhere.
        step: Optimizer steps done; None if unknown.
        chats: True if it was trained on conversations.
        notes: What was changed or assumed on loading, as sentences for the user.
        adapter: The adapters that a run trained; None if it trained all weights, or for a model from elsewhere.
    """

    model: Decoder
    tokenizer: Tokenizer
    checkpoint: Path
    run: RunFolder | None
    step: int | None
    chats: bool
    notes: tuple[str, ...] = ()
    adapter: TrainedAdapter | None = None


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The initial weights of a run.

    Attributes:
        weights: By the names of a LanguageModel's state dict, adapters merged.
        tokenizer: The fingerprint of the tokenizer that they were trained with.
    """

    weights: dict[str, Tensor]
    tokenizer: str


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
    tokenizer_path = tokenizer_path_of(path)
    if not tokenizer_path.exists():
        raise UserError(f"{path}: {tokenizer_path} is missing; a checkpoint can only be read in its run folder")
    tokenizer = Tokenizer.load(tokenizer_path)
    with _errors_of_content(path):
        config = checkpoint["config"]
        if tokenizer.fingerprint != checkpoint["fingerprints"]["tokenizer"]:
            raise UserError(f"{tokenizer_path} is not the tokenizer that {path} was trained with")
        model = _decoder(ModelConfig(**config["model"]), merged_weights(checkpoint["state_dict"], config["adapter"]))
        chats = objective_of(config).chats
        adapter = TrainedAdapter(checkpoint["state_dict"], config["adapter"]) if config["adapter"]["rank"] else None
    folder = RunFolder(path.parent.parent)
    return TrainedModel(model, tokenizer, path, folder, checkpoint["steps_done"], chats, adapter=adapter)


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
        return InitialWeights(load_spec_weights(spec), spec.tokenizer.fingerprint)
    path, checkpoint = read_checkpoint_of(config.init_from, "init_from=")
    with _errors_of_content(path):
        _check_same_shape(config, checkpoint["config"]["model"])
        weights = merged_weights(checkpoint["state_dict"], checkpoint["config"]["adapter"])
        return InitialWeights(weights, checkpoint["fingerprints"]["tokenizer"])


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
