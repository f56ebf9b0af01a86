"""The run folder: configuration, tokenizer, checkpoints, TensorBoard events, metrics, report and log of a run."""

import dataclasses
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cucafera.config import SPECIAL_TOKENS, Config, ModelConfig, UserError, shown
from cucafera.data.chat import CHAT_TEMPLATE
from cucafera.data.tokenizer import Tokenizer
from cucafera.model.lora import merged_weights
from cucafera.model.transformer import Decoder

log = logging.getLogger(__name__)

MAY_CHANGE = ("name", "run_dir", "resume", "budget_tokens", "epochs", "trainer", "callbacks", "logger")
"""Keys that a run may be continued with other values of: hardware, budget, and what happens beside training."""
MAY_CHANGE_WITHIN = ("data.prepared_dir", "data.processes", "data.validation_windows", "tokenizer.path")
"""More of them; the tokenizer itself may not change, wherever its file is."""


class RunFolder:
    """One folder under outputs/.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config = path / "config.yaml"
        self.overrides = path / "overrides.yaml"
        self.tokenizer = path / "tokenizer.json"
        self.tokenizer_config = path / "tokenizer_config.json"
        self.metrics = path / "metrics.json"
        self.report = path / "report.md"
        self.best_checkpoint = self.checkpoints / "best.ckpt"

    def checkpoint_at(self, step: int) -> Path:
        """Where the checkpoint after a step lies."""
        return self.checkpoints / f"step-{step:08d}.ckpt"

    def step_checkpoints(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return sorted(self.checkpoints.glob("step-*.ckpt"))

    def checkpoint_to_resume(self, config: Config) -> Path | None:
        """The newest readable checkpoint, or None for a run that begins here.

        Raises:
            UserError: the folder holds a run with another configuration, or only checkpoints that cannot be read;
                or it holds none and resume=required.
        """
        if config.resume == "overwrite" or not self.step_checkpoints():
            if config.resume == "required":
                raise UserError(f"resume=required, and {self.path} holds no checkpoint to go on from")
            if config.resume == "auto" and (foreign := self._not_ours_to_erase()):
                raise UserError(
                    f"{self.path} holds no checkpoint to go on from, but {', '.join(map(str, foreign))}. Choose "
                    "another name=..., or erase the run there with resume=overwrite"
                )
            return None
        for path in reversed(self.step_checkpoints()):
            try:
                saved = read_checkpoint(path)
            except UserError as error:
                log.warning("%s; falling back to the checkpoint before it", error)
                continue
            self._refuse_another_run(config, saved["config"])
            return path
        raise UserError(
            f"{self.path} holds checkpoints, and none of them can be read; resume=overwrite erases them and begins anew"
        )

    def _not_ours_to_erase(self) -> list[Path]:
        """What a run that failed before its first checkpoint cannot have left."""
        found = [path for path in self.checkpoints.glob("*") if path.suffix != ".tmp"]
        return found + [path for path in (self.metrics, self.report) if path.exists()]

    def _refuse_another_run(self, config: Config, saved: dict[str, Any]) -> None:
        now, before = dataclasses.asdict(config), saved
        sources = {name for side in (now, before) for name in side["data"]["sources"]}
        differences = [
            f"data.sources.{name} is {'only here' if name in now['data']['sources'] else 'only there'}"
            for name in sorted(sources)
            if not (name in now["data"]["sources"] and name in before["data"]["sources"])
        ]
        flat_now, flat_before = dict(_flat(now)), dict(_flat(before))
        differences += [
            f"{key} is {shown(flat_now[key])} here and {shown(flat_before[key])} there"
            for key in flat_now
            if key in flat_before
            and flat_now[key] != flat_before[key]
            and key.split(".")[0] not in MAY_CHANGE
            and key not in MAY_CHANGE_WITHIN
        ]
        if differences:
            raise UserError(
                f"{self.path} holds a run with another configuration:\n"
                + "\n".join(f"  - {line}" for line in differences)
                + "\nChoose another name=..., set the values back, or erase that run with resume=overwrite."
            )

    def begin(self, config: Config, overrides: Sequence[str], resumed: bool) -> None:
        """Writes what the run is; a run that begins anew erases what an earlier one left."""
        if not resumed:
            self._erase()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for unfinished in self.checkpoints.glob("*.tmp"):
            unfinished.unlink()
        write_text(self.config, OmegaConf.to_yaml(OmegaConf.structured(config)))
        write_text(self.overrides, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))

    def write_tokenizer(self, tokenizer: Tokenizer, stop_id: int) -> None:
        """Writes the tokenizer, and beside it what transformers needs to load it, with the chat template.

        Args:
            tokenizer: The tokenizer.
            stop_id: The token that ends what the model writes.
        """
        tokenizer.save(self.tokenizer)
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[stop_id],
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        write_text(self.tokenizer_config, json.dumps(described, indent=2) + "\n")

    def _erase(self) -> None:
        events = self.path.glob("events.out.tfevents.*")
        for path in (*self.step_checkpoints(), self.best_checkpoint, self.metrics, self.report, *events):
            path.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors and plain data, mapped from disk. Raises UserError if it cannot be read."""
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("it is not a checkpoint, or not a whole one")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "config" in checkpoint and "state_dict" in checkpoint:
            return dict(checkpoint)
        reason = "it is not a checkpoint of cucafera"
    except FileNotFoundError:
        reason = "there is no such file"
    except Exception as error:  # torch.load raises many kinds for a broken archive; each means the same to the user
        reason = str(error).split("\n")[0]
    raise UserError(f"{path} cannot be read: {reason}")


def checkpoint_of(source: str, key: str) -> Path:
    """The checkpoint that a path names: a file, or the best of a run folder, or else its newest.

    Args:
        source: The path.
        key: What the user gave it as, for messages.

    Raises:
        UserError: nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        folder = RunFolder(path)
        candidates = [folder.best_checkpoint, *reversed(folder.step_checkpoints())]
        found = next((candidate for candidate in candidates if candidate.exists()), None)
        if found is None:
            raise UserError(f"{key}{source}: the folder holds no checkpoint")
        return found
    if not path.exists():
        raise UserError(f"{key}{source}: there is no such run folder or checkpoint")
    return path


def checkpoint_to_begin_with(config: Config) -> dict[str, Any]:
    """The checkpoint that init_from names, checked against the model's shape, with its adapters merged.

    Raises:
        UserError: nothing readable there, or a model of another shape.
    """
    assert config.init_from is not None
    checkpoint = read_checkpoint(checkpoint_of(config.init_from, "init_from="))
    here, there = dataclasses.asdict(config.model), checkpoint["config"]["model"]
    differences = [
        f"model.{key} is {shown(here[key])} here and {shown(there.get(key))} there"
        for key in here
        if here[key] != there.get(key) and key not in ("initializer_range", "max_position_embeddings")
    ]
    if differences:
        raise UserError(
            f"init_from={config.init_from} holds another model:\n" + "\n".join(f"  - {line}" for line in differences)
        )
    checkpoint["state_dict"] = merged_weights(checkpoint["state_dict"], checkpoint["config"]["adapter"])
    return checkpoint


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model out of a run, ready to write.

    Attributes:
        model: In fp32 on the CPU, adapters merged.
        tokenizer: Its tokenizer.
        checkpoint: Where its weights come from.
        step: After how many steps.
        chats: Whether it was trained on conversations.
    """

    model: Decoder
    tokenizer: Tokenizer
    checkpoint: Path
    step: int
    chats: bool


def load_trained(source: str) -> TrainedModel:
    """The model of a run folder or checkpoint, from its path alone.

    Raises:
        UserError: no checkpoint or tokenizer there, or one that cannot be read.
    """
    path = checkpoint_of(source, "")
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    tokenizer_path = tokenizer_to_begin_with(str(path))
    if not Path(tokenizer_path).exists():
        raise UserError(f"{path}: there is no {tokenizer_path}; a checkpoint stays in its run folder")
    tokenizer = Tokenizer.load(tokenizer_path)
    if tokenizer.fingerprint != checkpoint["identity"]["tokenizer"]:
        raise UserError(f"{tokenizer_path} is not the tokenizer that {path} was trained with")
    weights = merged_weights(checkpoint["state_dict"], config["adapter"])
    with torch.device("meta"):
        model = Decoder(ModelConfig(**config["model"]))
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()}, assign=True)
    model.make_rotary_tables()
    return TrainedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        checkpoint=path,
        step=checkpoint["steps_done"],
        chats=config["data"]["kind"] == "conversations",
    )


def tokenizer_to_begin_with(init_from: str) -> str:
    """The tokenizer.json beside the checkpoints that init_from names: another would give the weights other words."""
    source = Path(init_from).expanduser()
    folder = source.parent.parent if source.is_file() else source
    return str(RunFolder(folder).tokenizer)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
