"""The run folder: configuration, tokenizer, checkpoints, TensorBoard events, metrics, report and log of a run."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cucafera.config import Config, UserError, shown

log = logging.getLogger(__name__)

MAY_CHANGE = ("name", "run_dir", "resume", "budget_tokens", "trainer", "callbacks", "logger")
"""Keys that a run may be continued with other values of: hardware, budget, and what happens beside training."""
MAY_CHANGE_IN_DATA = ("data.prepared_dir", "data.processes", "data.validation_windows")


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
            and key not in MAY_CHANGE_IN_DATA
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

    def _erase(self) -> None:
        events = self.path.glob("events.out.tfevents.*")
        for path in (*self.step_checkpoints(), self.best_checkpoint, self.metrics, self.report, *events):
            path.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors and plain data, mapped from disk. Raises UserError if it cannot be read."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "config" in checkpoint and "state_dict" in checkpoint:
            return dict(checkpoint)
        reason = "it is not a checkpoint of cucafera"
    except FileNotFoundError:
        reason = "there is no such file"
    except Exception as error:  # torch.load raises many kinds for a broken archive; each means the same to the user
        reason = str(error).split("\n")[0]
    raise UserError(f"{path} cannot be read: {reason}")


def checkpoint_to_begin_with(config: Config) -> dict[str, Any]:
    """The checkpoint that init_from names, the best of a run folder, checked against the model's shape.

    Raises:
        UserError: nothing readable there, or a model of another shape.
    """
    assert config.init_from is not None
    source = Path(config.init_from).expanduser()
    if source.is_dir():
        folder = RunFolder(source)
        candidates = [folder.best_checkpoint, *reversed(folder.step_checkpoints())]
        found = next((path for path in candidates if path.exists()), None)
        if found is None:
            raise UserError(f"init_from={config.init_from}: the folder holds no checkpoint")
        source = found
    elif not source.exists():
        raise UserError(f"init_from={config.init_from}: there is no such run folder or checkpoint")
    checkpoint = read_checkpoint(source)
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
    return checkpoint


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
