"""Configurations before and now: which keys may change when a run is resumed or branched, and which may not."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cucafera.config.branch import config_as_recorded, cooldown_schedule
from cucafera.config.errors import UserError
from cucafera.config.fields import flat, format_value
from cucafera.config.schema import Config

RESUMABLE_KEYS = (
    "name", "run_dir", "resume", "resume_allow_changed", "max_time",
    "budget_tokens", "epochs", "trainer", "callbacks", "logger",
    "data.prepared_dir", "data.processes", "data.validation_windows", "tokenizer.path",
)  # fmt: skip
"""Keys that may change when a run is resumed: hardware, budget, logging, validation, and where files are. The tokenizer
itself may not change, whatever path it is read from."""
IMMUTABLE_KEYS = ("model", "adapter", "optimizer.name", "batch_tokens", "sequence_length", "objective.name")
"""Keys that may not change even with `resume_allow_changed`: the step, the weights or the state of the optimizer would
lose their meaning."""
KEYS_WITHOUT_EFFECT = (
    "name", "run_dir", "resume", "resume_allow_changed", "max_time", "logger", "data.prepared_dir", "data.processes",
)  # fmt: skip
"""Keys that do not affect the result of a run."""


def check_config_compatible(config: Config, before: dict[str, Any], folder: Path) -> None:
    """Raise UserError, naming each key with both values, if a run cannot be resumed with a configuration.

    Args:
        config: The configuration that was requested.
        before: The configuration in the checkpoint.
        folder: The run folder.
    """
    changes = changed_keys(config, before)
    immutable = {key: values for key, values in changes.items() if matches_key(key, IMMUTABLE_KEYS)}
    allowed = (*RESUMABLE_KEYS, *config.resume_allow_changed)
    others = {key: values for key, values in changes.items() if key not in immutable and not matches_key(key, allowed)}
    if not immutable and not others:
        return
    lines = [
        f"  - {key}: {format_value(now)} (requested) != {format_value(then)} (checkpoint)"
        + ("; this key cannot change within a run" if key in immutable else "")
        for key, (then, now) in (others | immutable).items()
    ]
    if immutable:
        advice = f"To start another run from these weights: name=ANOTHER init_from={folder}"
    else:
        accepted = [*config.resume_allow_changed, *others]
        advice = f"To resume with the new values anyway: 'resume_allow_changed=[{','.join(accepted)}]'"
    raise UserError(
        f"{folder} holds a run with another configuration:\n"
        + "\n".join(lines)
        + f"\n{advice}. Or restore the values, choose another name=..., or erase that run with resume=overwrite."
    )


BRANCH_KEYS = (*RESUMABLE_KEYS, "init_from")
"""Keys in which a branch may differ from its parent, as settings of the optimizer may that are given."""


def check_branch_compatible(config: Config, before: Mapping[str, Any], parent: Path, given: Sequence[str]) -> None:
    """Raise UserError, naming each key with both values, if a branch would not continue the run of its checkpoint.

    Args:
        config: The configuration of the branch.
        before: That of its parent: of the checkpoint, or of config.yaml.
        parent: The run folder of the parent, or its checkpoint.
        given: Keys of the optimizer that may differ; its name never may.
    """
    then = config_as_recorded(before, str(parent))
    schedule = config.schedule
    assert schedule.cooldown_start_step is not None
    then.schedule = cooldown_schedule(then, schedule.cooldown_start_step, schedule.cooldown_steps)
    moved = [key for key in config.resume_allow_changed if key.startswith("data.sources.")]
    changes = changed_keys(config, dataclasses.asdict(then))
    refused = [
        f"{key}: {format_value(now)} (requested) != {format_value(value)} ({parent.name})"
        for key, (value, now) in changes.items()
        if not matches_key(key, (*BRANCH_KEYS, *moved)) and (key == "optimizer.name" or not matches_key(key, given))
    ]
    if refused:
        raise UserError(
            f"init_from: this would be no cooldown of {parent}:\n"
            + "\n".join(f"  - {line}" for line in refused)
            + "\nIt continues that run, with its model, data, order, batch and optimizer. It may have its own "
            "schedule.cooldown_steps, and settings of the optimizer such as optimizer.lr; the path of files that were "
            "moved, with 'resume_allow_changed=[data.sources.NAME.path]'"
        )


NOT_GIVEN = "not given"
"""Stands for the value of a key that only the other configuration has."""


def changed_keys(config: Config, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each dotted key that differs, with its value before and now; also each source that only one side has."""
    now = dataclasses.asdict(config)
    sources = {name: side["data"]["sources"] for name, side in (("before", before), ("now", now))}
    changes: dict[str, tuple[Any, Any]] = {
        f"data.sources.{name}": (NOT_GIVEN, "given") if name in sources["now"] else ("given", NOT_GIVEN)
        for name in sorted(set(sources["before"]) ^ set(sources["now"]))
    }
    values_before, values_now = dict(flat(before)), dict(flat(now))
    for key in dict.fromkeys([*values_now, *values_before]):
        then, value = (values.get(key, NOT_GIVEN) for values in (values_before, values_now))
        if then != value and not matches_key(key, list(changes)):
            changes[key] = (then, value)
    return changes


def matches_key(key: str, accepted: Sequence[str]) -> bool:
    """True if a dotted key is one of the accepted keys, or below one of them."""
    return any(key == other or key.startswith(other + ".") for other in accepted)
