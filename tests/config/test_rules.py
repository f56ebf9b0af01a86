"""Exact boundaries: of single values, of combinations of them, and of what is derived from them."""

import copy
from typing import Any

import pytest

from cucafera.config.fields import Limits, convert, flat
from cucafera.config.rules import rule_problems
from cucafera.config.schema import Config
from cucafera.data.sources.embedded import EmbeddedConfig
from cucafera.objectives._preference_config import PreferenceConfig


def config_of(**values: Any) -> Config:
    """Return the default run of 20 steps with other values, by keys with two underscores in place of dots."""
    config = Config(budget_tokens=20 * 2048, sequence_length=256)
    config.tokenizer.vocab_size = 1024
    config.data.sources = {"embedded": EmbeddedConfig(embedded="catalan")}
    for key, value in values.items():
        *parents, name = key.split("__")
        group: Any = config
        for parent in parents:
            group = getattr(group, parent)
        assert hasattr(group, name)
        setattr(group, name, value)
    return config


def problems(**values: Any) -> list[str]:
    return list(rule_problems(config_of(**values), set()))


AT_THE_BOUNDARY = [
    # what is still allowed, what is not, the key that is named
    ({"sequence_length": 256}, {"sequence_length": 512}, "sequence_length is 512"),
    ({"tokenizer__vocab_size": 1024}, {"tokenizer__vocab_size": 1025}, "tokenizer.vocab_size is 1025"),
    ({"budget_tokens": 2048, "schedule__warmup_steps": 0}, {"budget_tokens": 2047}, "budget_tokens is 2047"),
    ({"schedule__warmup_steps": 20}, {"schedule__warmup_steps": 21}, "schedule.warmup_steps is 21"),
    (
        {"schedule__warmup_steps": 5, "schedule__horizon_steps": 5},
        {"schedule__warmup_steps": 6, "schedule__horizon_steps": 5},
        "the horizon, 5 steps",
    ),
    (
        {"schedule__warmup_steps": 30, "schedule__horizon_steps": 40},
        {"schedule__warmup_steps": 30},
        "warmup_steps is 30",
    ),
    ({"epochs": 1.0, "budget_tokens": 1}, {"budget_tokens": 1}, "budget_tokens is 1"),
    ({"batch_tokens": 2048}, {"batch_tokens": 2047}, "the nearest is batch_tokens=2048"),
    ({"batch_tokens": 256}, {"batch_tokens": 100}, "the nearest is batch_tokens=256"),
    ({"trainer__devices": 8}, {"trainer__devices": 3}, "among 3 devices"),
    (
        {"trainer__devices": 2, "trainer__num_nodes": 4},
        {"trainer__devices": 4, "trainer__num_nodes": 4},
        "among 16 devices (trainer.devices x trainer.num_nodes)",
    ),
    ({"model__num_key_value_heads": 3}, {"model__num_key_value_heads": 4}, "model.num_key_value_heads is 4"),
    ({"model__num_key_value_heads": 6}, {"model__num_key_value_heads": 12}, "model.num_key_value_heads is 12"),
    ({"model__hidden_size": 12}, {"model__hidden_size": 18}, "each head is 3 wide"),
    (
        {"model__num_attention_heads": 3, "model__num_key_value_heads": 3},
        {"model__num_attention_heads": 64, "model__num_key_value_heads": 2},
        "each head is 3 wide",
    ),
    ({"model__hidden_size": 192}, {"model__hidden_size": 193}, "must be a multiple of model.num_attention_heads (6)"),
    (
        {"callbacks__keep_every_steps": 100, "callbacks__checkpoint_every_steps": 50},
        {"callbacks__keep_every_steps": 25, "callbacks__checkpoint_every_steps": 50},
        "callbacks.keep_every_steps is 25",
    ),
    (
        {"callbacks__keep_every_steps": 0, "callbacks__checkpoint_every_steps": 0},
        {"callbacks__keep_every_steps": 50, "callbacks__checkpoint_every_steps": 0},
        "callbacks.keep_every_steps is 50",
    ),
    ({"adapter__rank": 1, "init_from": "outputs/base"}, {"adapter__rank": 1}, "adapter.rank is 1"),
]


@pytest.mark.parametrize(("allowed", "refused", "message"), AT_THE_BOUNDARY, ids=[case[2] for case in AT_THE_BOUNDARY])
def test_a_combination_is_refused_from_exactly_where_it_cannot_work(allowed, refused, message):
    assert problems(**allowed) == []
    (problem,) = problems(**refused)
    assert message in problem


def preference_problems(**values: Any) -> list[str]:
    """The problems of preference tuning on the pairs of the package, with other values."""
    pairs = {"preferences": EmbeddedConfig(embedded="preferences")}
    return problems(**{"objective": PreferenceConfig(), "init_from": "outputs/chat", "data__sources": pairs} | values)


@pytest.mark.parametrize(
    ("allowed", "refused", "message"),
    [
        (
            {"objective": PreferenceConfig(loss="simpo", gamma=0.5)},
            {"objective": PreferenceConfig(gamma=0.5)},
            "objective.gamma is 0.5; only the loss simpo has it, and objective.loss is sigmoid",
        ),
        (
            {"objective": PreferenceConfig(loss="robust", label_smoothing=0.1)},
            {"objective": PreferenceConfig(loss="ipo", label_smoothing=0.1)},
            "objective.label_smoothing is 0.1; only the loss robust has it, and objective.loss is ipo",
        ),
        (
            {"objective": PreferenceConfig(loss="robust", label_smoothing=0.01)},
            {"objective": PreferenceConfig(loss="robust")},
            "objective.loss is robust and objective.label_smoothing is 0, which is sigmoid",
        ),
        ({}, {"init_from": None}, "preference tuning needs a model that answers: init_from=RUN"),
        ({}, {"data__document_masking": False}, "data.document_masking is false; the two answers of a pair must not"),
        ({"data__language": "ca"}, {"data__language": "xx"}, "data.language is xx; the languages that can be"),
    ],
)
def test_preference_tuning_refuses_what_its_loss_or_its_pairs_cannot_work_with(allowed, refused, message):
    assert preference_problems(**allowed) == []
    (problem,) = preference_problems(**refused)
    assert message in problem


def test_preference_tuning_reports_all_its_problems_at_once():
    objective = PreferenceConfig(loss="simpo", label_smoothing=0.1)
    found = preference_problems(objective=objective, init_from=None, data__document_masking=False, data__language="xx")
    starts = (
        "data.language is xx",
        "objective.label_smoothing is 0.1",
        "preference tuning needs",
        "data.document_mask",
    )
    assert len(found) == len(starts)
    assert all(problem.startswith(start) for problem, start in zip(found, starts, strict=True))


def test_documents_are_not_filtered_by_language():
    assert problems() == []
    (problem,) = problems(data__language="ca")
    assert problem.startswith("data.language is ca, and objective=pretraining reads documents, which are not filtered")
    assert list(rule_problems(config_of(data__language="ca"), {"data.language"})) == []


def test_a_rule_is_not_judged_by_a_value_that_is_wrong_itself():
    config = config_of(sequence_length=512, model__num_attention_heads=7)
    assert len(list(rule_problems(config, set()))) == 3
    assert len(list(rule_problems(config, {"model.num_attention_heads"}))) == 1
    assert len(list(rule_problems(config, {"model.num_attention_heads", "model.max_position_embeddings"}))) == 0
    assert list(rule_problems(config, {"model", "sequence_length"})) == []


def test_steps_are_those_that_the_budget_pays_in_full():
    for tokens, steps in ((2048, 1), (4095, 1), (4096, 2), (int(2.6 * 2048), 2), (int(2.4 * 2048), 2)):
        assert config_of(budget_tokens=tokens).total_steps == steps


def test_a_step_has_windows_of_the_sequence_length():
    assert config_of(sequence_length=64).windows_per_step == 32
    assert config_of(sequence_length=64, model__max_position_embeddings=512).windows_per_step == 32


def test_the_schedule_ends_at_its_horizon_or_else_at_the_last_step():
    assert config_of().horizon_steps == 20
    assert config_of(schedule__horizon_steps=7).horizon_steps == 7
    assert config_of(schedule__horizon_steps=70).horizon_steps == 70


@pytest.mark.parametrize(("steps", "every"), [(341, 34), (55, 5), (9, 1), (20_000, 2000)])
def test_validations_are_a_tenth_of_the_run_apart_if_that_is_asked_for(steps, every):
    config = config_of(budget_tokens=steps * 2048, callbacks__validate_every_steps="auto")
    assert config.validation_steps == every
    assert sum(step % every == 0 for step in range(1, steps + 1)) in (9, 10, 11)
    assert config.is_log_step(every)
    assert config_of(callbacks__validate_every_steps=7).validation_steps == 7
    assert config_of(callbacks__validate_every_steps=0).validation_steps == 0


def test_something_is_logged_at_each_interval_and_at_the_last_step():
    every = {"log_every_steps": 6, "validate_every_steps": 4, "checkpoint_every_steps": 9}
    config = config_of(**{f"callbacks__{name}": steps for name, steps in every.items()})
    assert [step for step in range(1, 21) if config.is_log_step(step)] == [4, 6, 8, 9, 12, 16, 18, 20]
    last_only = config_of(**{f"callbacks__{name}": 0 for name in every} | {"callbacks__log_every_steps": 50})
    assert [step for step in range(1, 21) if last_only.is_log_step(step)] == [20]


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Limits(above=0), [1e-9, 5], [0, -1]),
        (Limits(at_least=0), [0, 1], [-1e-9]),
        (Limits(below=1), [0.999], [1, 2]),
        (Limits(at_most=1), [1, 0.5], [1.001]),
        (Limits(above=0, at_most=1), [1, 0.1], [0, 1.1]),
        (Limits(at_least=1, choices=("auto",)), [1, "auto"], [0, "all", True]),
        (Limits(choices=("a", "b")), ["a", ["a"], ["a", "b"]], ["c", [], ["a", "c"]]),
        (Limits(at_least=2), [None, [2, 3], []], [[2, 1]]),
        (Limits(), [0, "x", [], None], []),
    ],
)
def test_limits_are_met_exactly(limits, inside, outside):
    assert all(limits.allow(value) for value in inside)
    assert not any(limits.allow(value) for value in outside)


@pytest.mark.parametrize(
    ("hint", "value", "converted"),
    [(int, 5e9, 5_000_000_000), (int, 3, 3), (float, 3, 3.0), (str | int, 3, 3), (str, "a", "a"), (bool, True, True),
     (int | None, None, None), (int | str, "auto", "auto"), (int | str, 4.0, 4), (bool | str, False, False),
     (float | None, 2, 2.0), (list[float], [1, 0.5], [1.0, 0.5]), (list[str], [], [])],
)  # fmt: skip
def test_a_value_becomes_its_type_without_loss(hint, value, converted):
    found = convert(hint, value)
    assert found == converted and type(found) is type(converted)


@pytest.mark.parametrize(
    ("hint", "value"),
    [(int, 2.5), (int, True), (int, "3"), (int, None), (float, True), (float, "1"), (float, float("inf")),
     (float, float("nan")), (int, float("inf")), (bool, 1), (bool, "true"), (str, True), (str, 3), (str, None),
     (int | None, False), (list[int], 3), (list[int], [1, 2.5]), (list[int], ["1"]), (int, [1])],
)  # fmt: skip
def test_a_value_that_would_be_changed_is_refused(hint, value):
    with pytest.raises(TypeError):
        convert(hint, value)


def test_nested_values_are_listed_by_their_full_keys():
    values = {"a": 1, "b": {"c": 2, "d": {"e": [3]}}}
    assert dict(flat(copy.deepcopy(values))) == {"a": 1, "b.c": 2, "b.d.e": [3]}
