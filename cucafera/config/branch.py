"""The configuration of a branch: a run that begins with the complete training state of a checkpoint of another run.

It takes over weights, optimizer state, step and place in the data of its parent, and so has the parent's settings: what
the command line does not give comes from the config.yaml of the parent. The one kind of branch is a cooldown, which
`schedule.cooldown_steps` asks for.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cucafera.config.check import build
from cucafera.config.errors import UserError
from cucafera.config.fields import format_value
from cucafera.config.files import config_text, is_as_written
from cucafera.config.schema import Config, ScheduleConfig

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OWN_KEYS = ("name", "run_dir", "init_from", "resume", "resume_allow_changed", "max_time")
"""Keys that a branch never has from its parent."""
OWN_GROUPS = ("trainer", "callbacks", "logger")
"""Groups of which a branch may have another choice than its parent."""
SCHEDULE_KEYS = ("schedule.cooldown_steps", "schedule.cooldown_start_step")
"""Keys of the schedule that are a cooldown's own."""
EXPERIMENT = "cooldown"
"""The experiment that does nothing but ask for a cooldown."""
CHECKPOINT = re.compile(r"step-(\d+)\.ckpt")
AUTO_SHARE = 5
"""schedule.cooldown_steps=auto is one of so many parts of the steps before it."""


def run_and_step(init_from: str) -> tuple[Path, int | None]:
    """Return the run folder that a path names, and the step if it is that of a checkpoint file."""
    path = Path(init_from).expanduser()
    if checkpoint := CHECKPOINT.fullmatch(path.name):
        return path.parent.parent, int(checkpoint[1])
    return path, None


def branch_name(node: DictConfig) -> str | None:
    """Return the name of a cooldown that was given none; None for any other run."""
    if not is_branch(node):
        return None
    init_from = OmegaConf.select(node, "init_from")
    if init_from is None:  # of a sweep over it
        return "cooldown"
    run, step = run_and_step(str(init_from))
    given = OmegaConf.select(node, SCHEDULE_KEYS[1]) or step
    return f"{run.absolute().name}-cooldown" + (f"-{given}" if given else "")


def is_branch(node: DictConfig) -> bool:
    """True if a composed configuration is that of a branch."""
    return OmegaConf.select(node, SCHEDULE_KEYS[0], throw_on_resolution_failure=False) is not None


def take_settings_of_parent(node: DictConfig, overrides: "Sequence[Override]") -> list[str]:
    """Replace the settings of a branch that the command line does not give by those of its parent.

    A branch that has started has its own: its parent may have trained further, or be gone.

    Args:
        node: As Hydra composed it; changed in place, unless it is no branch.
        overrides: The command line.

    Returns:
        A sentence for each problem.
    """
    if not is_branch(node):
        return []
    composed: Any = OmegaConf.to_container(node, resolve=False)
    # The name follows what is given, and not the step that is found.
    composed["name"] = OmegaConf.select(node, "name", throw_on_resolution_failure=False) or composed["name"]
    problems = list(_refused(overrides))
    try:
        parent, start = _settings_to_take(node)
    except UserError as error:
        return [*problems, str(error)]
    if problems:
        return problems
    settings = {key: _escaped(value) for key, value in dataclasses.asdict(parent).items()}
    settings |= {"epochs": None} | {key: composed[key] for key in OWN_KEYS}
    settings["tokenizer"]["path"] = None  # the parent has a copy
    for override in overrides:
        key = override.key_or_group
        if key in OWN_GROUPS:
            settings[key] = composed[key]
        elif key.split(".")[0] in settings:
            _set(settings, key.split("."), composed)
    steps = composed["schedule"]["cooldown_steps"]
    if steps == "auto":
        steps = max(1, round(start / AUTO_SHARE))
    settings["schedule"] |= dataclasses.asdict(cooldown_schedule(parent, start, steps))
    if isinstance(steps, int):
        settings["budget_tokens"] = (start + steps) * parent.batch_tokens
    with open_dict(node):
        for key, value in settings.items():
            node[key] = value
    return []


def cooldown_schedule(parent: Config, start: int, steps: int | str | None) -> ScheduleConfig:
    """Return the schedule of a cooldown: that of its parent, which no longer follows the budget, and then the line."""
    return dataclasses.replace(
        parent.schedule, horizon_steps=parent.horizon_steps, cooldown_start_step=start, cooldown_steps=steps
    )


def _refused(overrides: "Sequence[Override]") -> Iterator[str]:
    """Yield what is wrong with the overrides, whatever the parent is."""
    for override in overrides:
        key, text = override.key_or_group, override.input_line
        if key == "experiment":
            chosen = override.value()
            if chosen not in (EXPERIMENT, [EXPERIMENT]):
                yield f"{text}: a cooldown has the settings of the run of init_from: +experiment={EXPERIMENT} alone"
        elif key in ("budget_tokens", "epochs"):
            yield f"{text}: the budget of a cooldown follows from its length, {SCHEDULE_KEYS[0]}=STEPS"
        elif key.split(".")[0] == "schedule" and key not in SCHEDULE_KEYS:
            yield f"{text}: the schedule of a cooldown is that of the run of init_from, and then a line to zero"
        elif override.is_delete() or ("." not in key and key in GROUPS):
            yield (
                f"{text}: a cooldown has the settings of the run of init_from; only {', '.join(OWN_GROUPS)} may be "
                "chosen again"
            )


GROUPS = tuple(
    field.name
    for field in dataclasses.fields(Config)
    if dataclasses.is_dataclass(field.default_factory) and field.name not in OWN_GROUPS
)
"""Groups of which a branch has the choice of its parent."""


def _settings_to_take(node: DictConfig) -> tuple[Config, int]:
    """Return the configuration that a branch takes settings from, and the step that it begins with.

    Raises:
        UserError: init_from is missing, or no run that can be branched from.
    """
    try:
        init_from, own, resume = node.init_from, Path(str(node.run_dir)).expanduser(), node.resume
    except OmegaConfBaseException as error:
        raise UserError(f"init_from, name or run_dir cannot be read: {str(error).splitlines()[0]}") from None
    if init_from is None:
        raise UserError("init_from must be given: init_from=RUN, the run that the cooldown continues, or a checkpoint")
    run, of_file = run_and_step(str(init_from))
    if resume != "overwrite" and (started := _started(own, str(init_from), run)):
        return started
    if not (run / "config.yaml").is_file() or not (run / "checkpoints").is_dir():
        raise UserError(
            f"init_from: {init_from} is not a run folder or a checkpoint in one. A cooldown continues a run with its "
            "optimizer state; exports and models of the Hugging Face hub hold weights alone"
        )
    parent = _read(run / "config.yaml")
    if parent.schedule.cooldown_start_step is not None:
        raise UserError(
            f"init_from: {init_from} is a cooldown itself. Run its own command again to resume it, or cool down its "
            f"parent, init_from={parent.init_from}"
        )
    given = node.schedule.cooldown_start_step
    if given is not None and of_file is not None and given != of_file:
        raise UserError(f"{SCHEDULE_KEYS[1]} is {format_value(given)}, and init_from names that of step {of_file:,}")
    step = given or of_file or _newest_step(run)
    if step is None:
        raise UserError(f"init_from: {init_from} holds no complete checkpoint yet")
    return parent, step


def _started(folder: Path, init_from: str, parent: Path) -> tuple[Config, int] | None:
    """Return the configuration and first step of a branch that has started, as long as it can continue."""
    try:
        own = _read(folder / "config.yaml")
    except UserError:
        return None
    step = own.schedule.cooldown_start_step
    if own.init_from != init_from or step is None:
        return None
    saved = _newest_step(folder) is not None
    return (own, step) if saved or (parent / "checkpoints" / f"step-{step:08d}.json").is_file() else None


def _newest_step(run: Path) -> int | None:
    markers = (run / "checkpoints").glob("step-*.json")
    steps = [CHECKPOINT.fullmatch(path.with_suffix(".ckpt").name) for path in markers if _has_state(path)]
    return max((int(step[1]) for step in steps if step), default=None)


def _has_state(marker: Path) -> bool:
    return marker.with_suffix(".ckpt").is_file()


def _read(path: Path) -> Config:
    """Return the configuration of a run, as it was written. Raises UserError."""
    try:
        text = config_text(path)
        values: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"init_from: {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not is_as_written(text):
        raise UserError(
            f"init_from: {path} was edited since the run wrote it, so it may not say what was trained: restore it"
        )
    return config_as_recorded(values, f"init_from: {path}")


def config_as_recorded(values: Mapping[str, Any], place: str) -> Config:
    """Return the Config of a record; settings that are newer than it have their defaults.

    Raises:
        UserError: Some values are not those of the schema.
    """
    problems: dict[str, str] = {}
    config: Config = build(Config, values, "", problems)
    if problems:
        raise UserError(f"{place} cannot be used: {next(iter(problems.values()))}")
    return config


def _set(settings: dict[str, Any], parts: Sequence[str], composed: Mapping[str, Any]) -> None:
    """Copy the value at a dotted key, if it has been composed: settings of sources come later."""
    for part in parts[:-1]:
        settings, composed = settings.setdefault(part, {}), composed.get(part) or {}
    if parts[-1] in composed:
        settings[parts[-1]] = composed[parts[-1]]


def _escaped(value: Any) -> Any:
    """Return a value with its texts written so that they hold no interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
