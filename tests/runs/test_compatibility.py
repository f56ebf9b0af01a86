"""Keys that may change when a run is resumed, and keys that may not."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.config.schema import Config
from cucafera.runs.compatibility import KEYS_WITHOUT_EFFECT, changed_keys, check_config_compatible, matches_key

BEFORE = composed_config(["data=files", "data.sources.files.path=a.jsonl"])


def with_values(**values: Any) -> Config:
    """Return the configuration of the run with other values, by keys with two underscores in place of dots."""
    config = copy.deepcopy(BEFORE)
    for key, value in values.items():
        *parents, name = key.split("__")
        group: Any = config
        for parent in parents:
            group = group[parent] if isinstance(group, dict) else getattr(group, parent)
        assert hasattr(group, name)
        setattr(group, name, value)
    return config


def refusal(**values: Any) -> str:
    """Return why the run cannot be resumed with other values; empty if it can."""
    try:
        check_config_compatible(with_values(**values), dataclasses.asdict(BEFORE), Path("outputs/run"))
    except UserError as error:
        return str(error)
    return ""


def test_a_key_matches_itself_and_what_is_below_it():
    assert matches_key("optimizer.lr", ["optimizer.lr"]) and matches_key("optimizer.lr", ["optimizer"])
    assert not matches_key("optimizer.lr_ratio", ["optimizer.lr"])
    assert not matches_key("optimizer", ["optimizer.lr"]) and not matches_key("optimizers", ["optimizer"])


def test_a_source_that_is_gone_or_new_is_one_change():
    more = copy.deepcopy(BEFORE)
    more.data.sources["more"] = dataclasses.replace(more.data.sources["files"], path="b.jsonl")
    assert changed_keys(more, dataclasses.asdict(BEFORE)) == {"data.sources.more": ("not given", "given")}
    assert changed_keys(BEFORE, dataclasses.asdict(more)) == {"data.sources.more": ("given", "not given")}
    assert changed_keys(more, dataclasses.asdict(more)) == {}
    with pytest.raises(UserError, match=r"data\.sources\.more: not given \(requested\) != given \(checkpoint\)"):
        check_config_compatible(BEFORE, dataclasses.asdict(more), Path("outputs/run"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", "other"), ("budget_tokens", 3 * 10**6), ("epochs", 2.0), ("trainer__precision", "bf16"),
     ("callbacks__keep_last", 3), ("max_time", "1:00:00:00"), ("logger__tensorboard", False),
     ("data__prepared_dir", "x"), ("data__processes", 2), ("data__validation_windows", 3),
     ("tokenizer__path", "x.json"), ("resume", "required")],
)  # fmt: skip
def test_hardware_budget_logging_and_places_may_change(key, value):
    found = changed_keys(with_values(**{key: value}), dataclasses.asdict(BEFORE))
    assert list(found) == [key.replace("__", ".")] and found[key.replace("__", ".")][1] == value
    assert refusal(**{key: value}) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 7), ("optimizer__lr", 1e-4), ("schedule__warmup_steps", 3), ("data__document_masking", False),
     ("data__sources__files__weight", 2.0), ("data__sources__files__path", "c.jsonl"), ("tokenizer__vocab_size", 300),
     ("data__validation_fraction", 0.5)],
)  # fmt: skip
def test_what_decides_the_result_may_change_only_if_it_is_named(key, value):
    dotted = key.replace("__", ".")
    assert f"'resume_allow_changed=[{dotted}]'" in refusal(**{key: value})
    assert refusal(**{key: value}, resume_allow_changed=[dotted]) == ""
    assert refusal(**{key: value}, resume_allow_changed=[dotted.partition(".")[0]]) == ""
    assert not matches_key(dotted, KEYS_WITHOUT_EFFECT)


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_tokens", 4096), ("sequence_length", 128), ("model__rope_theta", 5e3), ("adapter__alpha", 3.0)],
)  # fmt: skip
def test_what_gives_step_and_weights_their_meaning_never_changes(key, value):
    dotted = key.replace("__", ".")
    message = refusal(**{key: value}, resume_allow_changed=[dotted, dotted.partition(".")[0]])
    assert f"{dotted}: " in message and "this key cannot change within a run" in message
