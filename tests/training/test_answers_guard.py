"""Answers that become worse in training: what is measured, and what the guard says and does."""

import json
from pathlib import Path

import pytest

from cucafera.config.errors import EXIT_DIVERGED
from cucafera.config.schema import GuardsConfig
from cucafera.generation.generate import Completion
from cucafera.objectives.finetuning import Finetuning
from cucafera.run import train
from cucafera.training.callbacks import samples
from cucafera.training.callbacks.answers_guard import answer_changes, logprob_change
from cucafera.training.callbacks.samples import answer_statistics
from tests.support import history_of, scalars

LIMITS = GuardsConfig()
FELL = "callbacks.guards.max_logprob_fall=0.01"


def record(stopped: int = 12, repeated: int = 0, tokens: float = 30, count: int = 12) -> dict[str, float]:
    return {"count": count, "stopped": stopped / count, "repeated_5gram": repeated / count, "tokens": tokens}


@pytest.mark.parametrize(
    ("first", "last", "limits", "expected"),
    [
        (record(), record(stopped=9), LIMITS, {}),
        (record(), record(stopped=8), LIMITS, {"stopped": "8 of 12 instead of 12 sample answers end by themselves"}),
        (record(stopped=10), record(stopped=7), LIMITS, {}),  # 0.25 is not more than 0.25, whatever floats say
        (record(stopped=3), record(), LIMITS, {}),
        (record(), record(repeated=3), LIMITS, {}),
        (
            *(record(repeated=1), record(repeated=5), LIMITS),
            {"repeated_5gram": "5 of 12 instead of 1 sample answers repeat five words"},
        ),
        (record(repeated=9), record(), LIMITS, {}),
        (record(), record(tokens=60), LIMITS, {}),
        (record(), record(tokens=61), LIMITS, {"tokens": "sample answers are longer (30 -> 61 tokens on average)"}),
        (record(tokens=61), record(), LIMITS, {}),
        (record(tokens=5), record(tokens=5 + 100 / 12), LIMITS, {}),  # one answer may have run to max_new_tokens
        (record(), record(stopped=11, repeated=1), GuardsConfig(max_stopped_fall=0.01, max_repeated_growth=0.01), {}),
        (record(3, 0, 10, 3), record(2, 1, 40, 3), LIMITS, {}),
        (record(3, 0, 10, 3), record(1, 2, 60, 3), LIMITS, {"stopped", "repeated_5gram", "tokens"}),
    ],
)  # fmt: skip
def test_answers_are_worse_by_more_than_one_of_them_and_by_more_than_the_limits(first, last, limits, expected):
    found = answer_changes(first, last, 100, limits)
    assert (found if isinstance(expected, dict) else found.keys()) == expected


def test_a_watched_metric_may_fall_by_nats_and_rise_as_it_likes(monkeypatch):
    monkeypatch.setattr(Finetuning, "watched", "loss")
    objective = Finetuning()
    assert logprob_change(objective, {"loss": -2.0}, {"loss": -3.0}, LIMITS) == {}
    assert logprob_change(objective, {"loss": -2.0}, {"loss": 0.0}, LIMITS) == {}
    fell = logprob_change(objective, {"loss": -2.0}, {"loss": -3.5}, LIMITS)
    assert fell == {"loss": "validation loss are less probable by 1.50 nats per token (-2.00 -> -3.50)"}


def test_statistics_of_answers():
    texts = [("un dos tres quatre cinc Un dos tres quatre cinc", "length", 8), ("hola", "stop", 2), ("", "stop", 0)]
    completions = [Completion([7] * tokens, text, reason) for text, reason, tokens in texts]
    assert answer_statistics(completions) == {
        "count": 3, "stopped": pytest.approx(2 / 3), "tokens": pytest.approx(10 / 3),
        "repeated_5gram": pytest.approx(1 / 3),
    }  # fmt: skip


@pytest.fixture
def chat(small_run, small_chat, monkeypatch):
    """Composes the small chat run, whose validation loss the guard takes for a log-probability; it falls."""
    train(small_run("name=base", "model.max_position_embeddings=128", "callbacks.prompts=[]"), [])
    monkeypatch.setattr(Finetuning, "watched", "loss")
    return lambda *overrides: small_chat("init_from=outputs/base", *overrides)


def metrics_of(name: str) -> dict:
    return json.loads(Path(f"outputs/{name}/metrics.json").read_text())


def warnings_in(name: str) -> list[dict]:
    return [event for event in history_of(name) if event["event"] == "answers became worse"]


def test_a_fall_is_one_warning_on_the_terminal_in_the_history_and_in_the_report(chat, caplog):
    train(chat("name=run", FELL), [])
    assert caplog.text.count("THE ANSWERS BECOME WORSE: after step 4, compared with before training") == 1
    for words in ("lower optimizer.lr;", "less probable by", "callbacks.guards.answers=stop"):
        assert words in caplog.text
    (event,) = warnings_in("run")
    assert event["step"] == 4 and "nats per token" in event["changes"][0]
    (warning,) = metrics_of("run")["answer_warnings"]
    assert warning.startswith("after step 4, validation loss are less probable")
    assert "after step 4, validation loss" in Path("outputs/run/report.md").read_text()


def test_the_policy_stop_saves_and_a_resume_stops_at_the_next_validation_without_a_second_warning(chat, caplog):
    caplog.set_level("INFO")
    settings = ("name=run", FELL, "callbacks.guards.answers=stop", "callbacks.checkpoint_every_steps=0")
    for step in (4, 8):
        with pytest.raises(SystemExit) as stopped:
            train(chat(*settings), [])
        assert stopped.value.code == EXIT_DIVERGED
        assert f"Stopped by callbacks.guards.answers=stop after step {step}; checkpoint saved" in caplog.text
        event = history_of("run")[-1]
        assert (event["event"], event["step"], event["saved_step"]) == ("stopped", step, step)
    train(chat(*settings), [])  # the last step ends training in any case
    assert len(warnings_in("run")) == len(metrics_of("run")["answer_warnings"]) == 1


def test_nothing_is_said_when_it_is_ignored_or_the_objective_is_not_watched(chat, monkeypatch, caplog):
    train(chat("name=ignored", FELL, "callbacks.guards.answers=ignore"), [])
    monkeypatch.setattr(Finetuning, "watched", None)
    train(chat("name=ordinary", FELL), [])
    assert "THE ANSWERS" not in caplog.text
    assert metrics_of("ignored")["answer_warnings"] == metrics_of("ordinary")["answer_warnings"] == []


def test_answers_that_no_longer_end_are_a_warning_after_a_resume_too(chat, monkeypatch, caplog):
    calls = []

    def generate(model, tokenizer, prompts, sampling, stops, seeds):
        calls.append(seeds)
        stopped = (3, 2, 1, 1)[len(calls) - 1]  # one fewer each time: only compared with the first is it a change
        return [Completion([9], "x", "stop" if number < stopped else "length") for number in range(len(prompts))]

    monkeypatch.setattr(samples, "generate", generate)
    settings = ("name=run", "schedule.horizon_steps=12", "callbacks.guards.max_logprob_fall=100")
    train(chat(*settings, "budget_tokens=2048"), [])
    assert "THE ANSWERS" not in caplog.text
    train(chat(*settings), [])
    assert "after step 8, compared with before training, 1 of 3 instead of 3 sample answers end" in caplog.text
    assert calls == [[config_seed := calls[0][0]] * 3] * 4 and isinstance(config_seed, int)
    assert [answers["step"] for answers in metrics_of("run")["answers"]] == [0, 4, 8, 12]
    assert scalars("outputs/run", "samples/stopped") == [
        (0, 1), (4, pytest.approx(2 / 3)), (8, pytest.approx(1 / 3)), (12, pytest.approx(1 / 3))
    ]  # fmt: skip
    assert "3 -> 1 of 3 ended by themselves, 0 with a repeated 5-gram, 1 token on average" in Path(
        "outputs/run/report.md"
    ).read_text().replace("\\", "")


def test_answers_to_other_prompts_are_compared_from_the_resume_on(chat):
    settings = ("name=run", "schedule.horizon_steps=12")
    train(chat(*settings, "budget_tokens=2048"), [])
    train(chat(*settings, "callbacks.prompts=[Hola]"), [])
    assert [(answers["step"], answers["count"]) for answers in metrics_of("run")["answers"]] == [(8, 1), (12, 1)]


def test_a_batch_of_prompts_gives_the_texts_that_each_gives_alone(chat):
    random = "callbacks.sampling.temperature=1.0"
    config = chat("name=run", random)
    train(config, [])
    train(chat("name=alone", random, f"callbacks.prompts=[{config.callbacks.prompts[-1]}]"), [])
    assert metrics_of("alone")["samples"] == metrics_of("run")["samples"][-1:]
