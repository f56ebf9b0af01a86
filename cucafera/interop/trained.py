"""Trained models by their path alone, whoever wrote them: a run folder, a checkpoint, a Hugging Face folder or name."""

import dataclasses
import logging
from pathlib import Path

from torch import Tensor

from cucafera.config import Config, ModelConfig, UserError, shown
from cucafera.data.packed import prepared_tokenizer
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop.hugging_face import load_weights
from cucafera.interop.layout import TOKENIZER, folder_of, is_hugging_face, read_layout
from cucafera.model.lora import merged_weights
from cucafera.model.transformer import Decoder
from cucafera.training.run_folder import RunFolder, read_checkpoint_of, tokenizer_beside

log = logging.getLogger(__name__)

MAY_DIFFER = ("initializer_range", "base_hidden_size", "max_position_embeddings")
"""Fields of a model's shape that its weights do not depend on."""


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model, ready to write.

    Attributes:
        model: In fp32 on the CPU, adapters merged.
        tokenizer: Its tokenizer.
        checkpoint: Where its weights come from: a checkpoint's file, or a Hugging Face folder.
        run: The run folder; None for what is no run of this package.
        step: After how many steps; None where nobody knows.
        chats: Whether it was trained on conversations.
        notes: What a user should know of how it was taken, each a sentence.
    """

    model: Decoder
    tokenizer: Tokenizer
    checkpoint: Path
    run: RunFolder | None
    step: int | None
    chats: bool
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        weights: By the names of a LanguageModel's state dict, adapters merged.
        tokenizer: The fingerprint of the tokenizer that they know.
    """

    weights: dict[str, Tensor]
    tokenizer: str


def load_trained(source: str) -> TrainedModel:
    """The model that a run folder, a checkpoint, a Hugging Face folder or a name of its hub gives.

    Raises:
        UserError: no model or tokenizer there, or one that cannot be read or computed.
    """
    if is_hugging_face(source):
        layout = read_layout(folder_of(source, with_weights=True))
        model = _decoder(layout.model, load_weights(layout))
        return TrainedModel(model, layout.tokenizer, layout.folder, None, None, layout.chats, layout.notes)
    path, checkpoint = read_checkpoint_of(source, "")
    config = checkpoint["config"]
    tokenizer_path = tokenizer_beside(path)
    if not tokenizer_path.exists():
        raise UserError(f"{path}: there is no {tokenizer_path}; a checkpoint stays in its run folder")
    tokenizer = Tokenizer.load(tokenizer_path)
    if tokenizer.fingerprint != checkpoint["identity"]["tokenizer"]:
        raise UserError(f"{tokenizer_path} is not the tokenizer that {path} was trained with")
    model = _decoder(ModelConfig(**config["model"]), merged_weights(checkpoint["state_dict"], config["adapter"]))
    chats = config["data"]["kind"] == "conversations"
    return TrainedModel(model, tokenizer, path, RunFolder(path.parent.parent), checkpoint["steps_done"], chats)


def _decoder(config: ModelConfig, weights: dict[str, Tensor]) -> Decoder:
    """A decoder with weights that have the names of a LanguageModel's state dict."""
    return Decoder.holding(config, {name.removeprefix("model."): value for name, value in weights.items()})


def weights_to_begin_with(config: Config) -> Beginning:
    """The weights that init_from names, of the model's shape.

    Raises:
        UserError: nothing readable there, or a model of another shape.
    """
    assert config.init_from is not None
    if is_hugging_face(config.init_from):
        layout = read_layout(folder_of(config.init_from, with_weights=True))
        for note in layout.notes:
            log.info("%s", note)
        _refuse_another_shape(config, dataclasses.asdict(layout.model))
        return Beginning(load_weights(layout), layout.tokenizer.fingerprint)
    _, checkpoint = read_checkpoint_of(config.init_from, "init_from=")
    _refuse_another_shape(config, checkpoint["config"]["model"])
    weights = merged_weights(checkpoint["state_dict"], checkpoint["config"]["adapter"])
    return Beginning(weights, checkpoint["identity"]["tokenizer"])


def _refuse_another_shape(config: Config, there: dict[str, object]) -> None:
    here = dataclasses.asdict(config.model)
    differences = [
        f"model.{key} is {shown(here[key])} here and {shown(there.get(key))} there"
        for key in here
        if here[key] != there.get(key) and key not in MAY_DIFFER
    ]
    if differences:
        raise UserError(
            f"init_from={config.init_from} holds another model:\n" + "\n".join(f"  - {line}" for line in differences)
        )


def tokenizer_to_begin_with(config: Config) -> Path:
    """The tokenizer.json of what init_from names: another would give the weights other words.

    One whose control tokens have other ids here is written among the prepared data.

    Raises:
        UserError: a Hugging Face folder holds none that can be used.
    """
    assert config.init_from is not None
    if not is_hugging_face(config.init_from):
        return tokenizer_beside(Path(config.init_from).expanduser())
    layout = read_layout(folder_of(config.init_from, with_weights=False))
    if layout.rows is None:
        return layout.folder / TOKENIZER
    folder = Path(config.data.prepared_dir) / f"tokenizer-{layout.tokenizer.fingerprint[:16]}"
    return prepared_tokenizer(folder, lambda: layout.tokenizer)
