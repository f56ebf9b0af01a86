"""The data that a run held out; of a preference run, also what the finetuned run before it held out."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from cucafera.evaluation.evaluated_model import EvaluatedModel, load_evaluated_model
from cucafera.evaluation.held_out import held_out_texts, measure_held_out, preference_pairs
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.perplexity import score_texts
from cucafera.evaluation.results import ResultFile
from cucafera.run import train
from tests.support import compose_small_preferences

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tuned(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the chat model's run, and outputs/prefer, which began with it."""
    folder = tmp_path_factory.mktemp("preferences")
    shutil.copytree(runs / "prepared", folder / "prepared")
    for name in ("base", "chat"):
        ignored = shutil.ignore_patterns("evaluation.json")
        shutil.copytree(runs / "outputs" / name, folder / "outputs" / name, ignore=ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(compose_small_preferences(folder, "name=prefer", "init_from=outputs/chat"), [])
    return folder


@pytest.fixture
def prefer(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluatedModel:
    """The preference-tuned model, in the test's own copy of the folder."""
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return load_evaluated_model("outputs/prefer", CPU)


def test_the_pairs_that_a_preference_run_held_out_score_as_in_its_validation(prefer):
    pairs, answers = measure_held_out(prefer, None, None)
    validations = json.loads(Path("outputs/prefer/metrics.json").read_text())["validation"]
    (validation,) = (record for record in validations if record["step"] == prefer.step)
    assert (pairs.kind, pairs.task, answers.kind) == ("pairs", "held-out-files", "answers")
    for name in ("logprob_accuracy", "chosen_logprob", "rejected_logprob"):
        assert pairs.metrics[name].value == pytest.approx(validation[name], rel=1e-4)
    assert pairs.settings == {"held_out": "files", "documents": None, "context": 128}
    assert "left out" not in pairs.note


def test_the_answers_that_the_finetuned_run_held_out_are_measured_next_to_its_own_value(prefer):
    chat = load_evaluated_model("outputs/chat", CPU)
    (texts,) = held_out_texts(chat).values()
    expected = score_texts(DecoderScorer(prefer.model), texts, stride=64).metrics()
    _, answers = measure_held_out(prefer, None, None)
    assert answers.metrics == expected
    assert answers.note.endswith("; held out by outputs/chat: for its own bpb, evaluate outputs/chat")
    (own,) = measure_held_out(chat, None, None)
    assert (own.kind, own.task, own.settings) == (answers.kind, answers.task, answers.settings)
    assert own.metrics != answers.metrics
    ResultFile(chat.run).add(own, chat.checkpoint.name, chat.step)
    _, answers = measure_held_out(prefer, None, None)
    assert answers.note.endswith(f"; held out by outputs/chat: its own bpb is {own.metrics['bpb'].value:.4f}")
    (fewer,) = list(measure_held_out(prefer, 3, None))[1:]
    assert fewer.note.endswith("for its own bpb, evaluate outputs/chat")  # of other conversations


def test_the_finetuned_run_is_found_behind_another_preference_run(prefer, tmp_path):
    train(compose_small_preferences(tmp_path, "name=second", "init_from=outputs/prefer", "budget_tokens=4096"), [])
    _, answers = measure_held_out(load_evaluated_model("outputs/second", CPU), None, None)
    assert "held out by outputs/chat" in answers.note


def test_only_the_pairs_are_measured_if_the_finetuned_run_or_its_data_is_gone(prefer, caplog):
    shutil.move("outputs/chat/checkpoints", "elsewhere")
    assert [result.kind for result in measure_held_out(prefer, None, None)] == ["pairs"]
    assert "the answers that an earlier run held out are not measured: outputs/chat: the folder holds" in caplog.text
    caplog.clear()
    shutil.move("elsewhere", "outputs/chat/checkpoints")
    for path in Path("prepared").glob("conversations-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert [result.kind for result in measure_held_out(prefer, None, None)] == ["pairs"]
    shutil.rmtree("outputs/chat")
    assert [result.kind for result in measure_held_out(prefer, None, None)] == ["pairs"]
    assert caplog.text.count("no run before this one has held-out conversations here") == 2


def test_a_model_from_elsewhere_has_held_out_nothing(prefer):
    elsewhere = dataclasses.replace(prefer, run=None)
    assert (held_out_texts(elsewhere), preference_pairs(elsewhere)) == ({}, {})


def test_the_pairs_of_a_source_that_was_deleted_are_left_out(prefer):
    assert list(preference_pairs(prefer)) == ["files"]
    shutil.rmtree("prepared")
    assert preference_pairs(prefer) == {}
