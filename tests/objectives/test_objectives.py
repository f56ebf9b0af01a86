"""Objectives: how a prompt is framed, what ends a text, and which value of a metric is better."""

import pytest

from cucafera.config.registry import OBJECTIVES
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID
from cucafera.data.chatml import Message, render_prompt
from cucafera.data.tokenizer import Tokenizer
from cucafera.objectives import MetricSpec

LOWER = MetricSpec("loss", "validation loss", "nats per token")
HIGHER = MetricSpec("accuracy", "accuracy", direction="higher", format=".1%")


def test_a_base_model_continues_a_document_and_stops_at_the_next():
    tokenizer = Tokenizer.train(["la mar i el bosc"] * 9, 280)
    objective = OBJECTIVES.get("pretraining")
    assert objective.prompt_ids(tokenizer, "la mar") == [DOCUMENT_START_ID, *tokenizer.encode("la mar")]
    assert objective.stop_id == DOCUMENT_START_ID and not objective.chats


def test_a_chat_model_answers_a_message_and_stops_at_its_end():
    tokenizer = Tokenizer.train(["la mar i el bosc"] * 9, 280)
    objective = OBJECTIVES.get("finetuning")
    assert objective.prompt_ids(tokenizer, "la mar") == render_prompt([Message("user", "la mar")], tokenizer)
    assert objective.stop_id == IM_END_ID and objective.chats


def test_the_best_value_follows_the_direction_of_a_metric():
    values = [3.0, 1.0, 2.0]
    assert (LOWER.best(values), HIGHER.best(values)) == (1.0, 3.0)
    assert LOWER.better(1.0, 2.0) and not LOWER.better(2.0, 1.0) and not LOWER.better(1.0, 1.0)
    assert HIGHER.better(2.0, 1.0) and not HIGHER.better(1.0, 2.0) and not HIGHER.better(1.0, 1.0)
    assert (LOWER.cost(2.0), HIGHER.cost(2.0)) == (2.0, -2.0)
    assert (LOWER.text(1.23456), HIGHER.text(0.51)) == ("1.235 nats per token", "51.0%")


@pytest.mark.parametrize(("name", "metrics"), [("pretraining", ["loss", "bpb"]), ("finetuning", ["loss", "bpb"])])
def test_runs_are_compared_by_loss_and_bits_per_byte(name, metrics):
    objective = OBJECTIVES.get(name)
    assert objective.comparison_metrics == metrics and objective.primary_metric.name == "bpb"
