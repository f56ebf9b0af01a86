"""Preference tuning: whole runs on pairs of answers, in one process."""

import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.data.preferences import open_preferences
from cucafera.interop.model_card import model_card, read_lineage
from cucafera.interop.trained import load_trained
from cucafera.objectives._preference_config import LOSSES, WITHOUT_REFERENCE
from cucafera.run import train
from cucafera.runs.checkpoints import read_checkpoint
from cucafera.training.callbacks.reference_logprobs import FILE, ReferenceLogprobs
from tests.support import (
    assert_close,
    assert_equal,
    assert_same_curve,
    compose_small_preferences,
    folder_of,
    run_command,
    scalars,
    small_preferences,
    weights,
)

STEP_0 = {"sigmoid": math.log(2), "robust": math.log(2), "sigmoid_norm": math.log(2), "apo_zero": 1, "ipo": 25}
GIVEN = {
    "simpo": ["objective.gamma=0.5"],
    "robust": ["objective.label_smoothing=0.1"],
    "ipo": ["optimizer.lr=3e-3"],
}
IN_PARTS = "schedule.horizon_steps=12"


@pytest.fixture
def preferences(runs, tmp_path, monkeypatch):
    """Composes preference tuning of the session's chat model, in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "outputs" / "chat", "outputs/chat")
    return functools.partial(compose_small_preferences, tmp_path, "init_from=outputs/chat")


def validations(name: str) -> list[dict[str, float]]:
    return json.loads(Path(f"outputs/{name}/metrics.json").read_text())["validation"]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_better_answers_win(preferences, caplog, loss):
    caplog.set_level("INFO")
    accuracy = train(preferences("name=prefer", f"objective.loss={loss}", *GIVEN.get(loss, [])), [])
    first, *_, last = validations("prefer")
    if loss not in WITHOUT_REFERENCE:
        assert first["loss"] == pytest.approx(STEP_0[loss], rel=1e-9)
        assert (first["reward_accuracy"], first["reward_margin"]) == (0.5, 0)
    assert last["reward_accuracy"] == accuracy > 0.7 and last["reward_margin"] > first["reward_margin"]
    assert last["loss"] < first["loss"]
    assert load_trained("outputs/prefer").chats
    curve = [step for step, _ in scalars("outputs/prefer", "reward_accuracy/val")]
    assert curve == [0, 4, 8, 12]
    assert "Reward accuracy" in caplog.text and "python -m cucafera.chat outputs/prefer" in caplog.text
    assert ("Computing the log-probabilities of 60 pairs" in caplog.text) == (loss not in WITHOUT_REFERENCE)


@pytest.mark.parametrize("other", ["micro_batch_windows=4", "micro_batch_windows=1", "num_workers=2"])
def test_micro_batches_and_workers_do_not_change_the_trajectory(preferences, other):
    train(preferences("name=first", "trainer.micro_batch_windows=8"), [])
    shutil.rmtree("prepared")  # the other run computes its references with its own micro-batches
    train(preferences("name=second", f"trainer.{other}"), [])
    for tag in ("loss/train", "train/gradient_norm", "loss/val", "val/reward_margin"):
        assert_same_curve("outputs/first", "outputs/second", tag)
    assert_close(weights("outputs/first"), weights("outputs/second"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_take_the_same_steps_as_one(preferences, tmp_path, strategy):
    settings = [*small_preferences(tmp_path), "init_from=outputs/chat", "trainer.micro_batch_windows=2"]
    for name, devices in (
        ("one", []),
        ("two", [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2"]),
    ):
        given = [override for override in settings if not (devices and override.startswith("trainer="))]
        done = run_command("-m", "cucafera.run", *given, *devices, f"name={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        shutil.rmtree("prepared")  # each computes its references
    for tag in ("loss/train", "train/gradient_norm", "loss/val", "reward_accuracy/val", "val/reward_margin"):
        assert_same_curve("outputs/one", "outputs/two", tag)
    assert_close(weights("outputs/one"), weights("outputs/two"))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_run_in_two_parts_ends_bit_equal_without_the_base_and_the_prepared_data(preferences, adapter):
    settings = (IN_PARTS, f"adapter={adapter}", "optimizer.lr=1e-2")
    train(preferences("name=whole", *settings), [])
    train(preferences("name=parts", *settings, "budget_tokens=6144"), [])
    whole = preferences("name=parts", *settings)
    shutil.rmtree("prepared")
    shutil.rmtree("outputs/chat")
    train(whole, [])
    assert_equal(weights("outputs/whole"), weights("outputs/parts"))
    assert validations("whole")[-1] == validations("parts")[-1]
    assert scalars("outputs/whole", "loss/train") == scalars("outputs/parts", "loss/train")


def test_with_adapters_the_reference_is_the_model_without_them(preferences, caplog):
    caplog.set_level("INFO")
    train(preferences("name=all", "budget_tokens=1024", "schedule.warmup_steps=0"), [])
    caplog.clear()
    train(preferences("name=lora", "adapter=lora", "budget_tokens=1024", "schedule.warmup_steps=0"), [])
    assert "are those of an earlier run" in caplog.text
    tables = [
        read_checkpoint(folder_of(name).checkpoints.marked()[-1])["callbacks"]["ReferenceLogprobs"]["tables"]
        for name in ("all", "lora")
    ]
    assert all(torch.equal(one, other) for one, other in zip(*tables, strict=True))
    before = validations("lora")[0]
    assert before == validations("all")[0]
    assert (before["reward_margin"], before["reward_chosen"]) == (0, 0)  # exactly: the model is the base
    base = weights("outputs/chat")
    trained = {name: value for name, value in weights("outputs/lora").items() if ".lora_" not in name}
    assert_equal(trained, base)


def test_the_references_are_the_log_probabilities_of_the_initial_model(preferences):
    config = preferences("name=prefer", "budget_tokens=1024", "schedule.warmup_steps=0")
    train(config, [])
    model = load_trained("outputs/chat").model
    tables = read_checkpoint(folder_of("prefer").checkpoints.marked()[-1])["callbacks"]["ReferenceLogprobs"]["tables"]
    data = open_preferences(config)
    for windows, table in zip([*data.training, *data.validation], tables, strict=True):
        seen = set()
        for number in range(len(windows)):
            window = windows.window(number)
            for index, pair in enumerate(windows.pairs_of(number)):
                seen.add(pair)
                for side in (0, 1):
                    document = window.documents == 2 * index + side
                    targets = torch.from_numpy(window.targets[document].astype(np.int64))
                    ids = torch.from_numpy(window.input_ids[document].astype(np.int64))[None]
                    with torch.no_grad():
                        logprobs = model.logits(model(ids))[0].log_softmax(-1)
                    valid = targets >= 0
                    expected = logprobs[valid].gather(1, targets[valid, None]).double().sum()
                    assert table[pair, side].item() == pytest.approx(expected.item(), rel=1e-5)
        assert seen == set(range(len(table)))  # no pair of these is too long


def test_computing_or_reading_the_references_changes_nothing_else(preferences):
    train(preferences("name=computed"), [])
    train(preferences("name=read"), [])
    assert_equal(weights("outputs/computed"), weights("outputs/read"))
    states = [
        read_checkpoint(folder_of(name).checkpoints.marked()[-1])["random_state"]["torch"]
        for name in ("computed", "read")
    ]
    assert torch.equal(*states)
    train(preferences("name=without", "objective.loss=simpo"), [])  # computes none
    without = read_checkpoint(folder_of("without").checkpoints.marked()[-1])["random_state"]["torch"]
    assert torch.equal(states[0], without)


@pytest.mark.parametrize("change", ["init_from=outputs/base", "sequence_length=64", "data.validation_fraction=0.4"])
def test_references_of_other_weights_windows_or_pairs_are_computed_again(preferences, runs, caplog, change):
    shutil.copytree(runs / "outputs" / "base", "outputs/base")
    train(preferences("name=first", "budget_tokens=1024", "schedule.warmup_steps=0"), [])
    caplog.set_level("INFO")
    train(preferences("name=second", "budget_tokens=1024", "schedule.warmup_steps=0", change), [])
    assert "Computing the log-probabilities" in caplog.text
    assert validations("second")[0]["reward_margin"] == 0


def test_references_of_other_held_out_pairs_are_computed_again(preferences, tmp_path, caplog):
    config = preferences("name=first", "budget_tokens=1024", "schedule.warmup_steps=0")
    train(config, [])
    held_out = open_preferences(config).validation[0].pairs
    path = tmp_path / "pairs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for number in range(len(lines)):  # until one was left out that is held out
        path.write_text("".join([*lines[:number], *lines[number + 1 :]]))
        if open_preferences(config).validation[0].pairs < held_out:
            break
    caplog.set_level("INFO")
    train(preferences("name=second", "budget_tokens=1024", "schedule.warmup_steps=0"), [])
    assert "Computing the log-probabilities" in caplog.text
    assert validations("second")[0]["reward_margin"] == 0


def test_damaged_references_are_refused(preferences):
    train(preferences("name=first", "budget_tokens=1024", "schedule.warmup_steps=0"), [])
    (path,) = Path("prepared").glob(f"reference-*/{FILE}")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{FILE} is damaged: checksum mismatch. Delete the folder prepared/reference-"
    ):
        train(preferences("name=second", "budget_tokens=1024", "schedule.warmup_steps=0"), [])


def test_a_run_does_not_continue_with_references_of_other_pairs(preferences, tmp_path):
    train(preferences("name=run", "budget_tokens=4096", IN_PARTS), [])
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(UserError, match=r"no log-probabilities of these pairs .* since they are of other pairs"):
        train(preferences("name=run", IN_PARTS, "resume_allow_changed=[data.sources]"), [])


def test_a_run_without_reference_does_not_continue_with_one(preferences):
    train(preferences("name=run", "objective.loss=simpo", "budget_tokens=4096", IN_PARTS), [])
    with pytest.raises(UserError, match="since its loss had no reference"):
        train(preferences("name=run", IN_PARTS, "resume_allow_changed=[objective.loss]"), [])


def test_a_signal_while_references_are_computed_ends_the_run_at_once(preferences, monkeypatch):
    def interrupted(*arguments):
        assert not arguments[0].interruption._training
        raise KeyboardInterrupt

    monkeypatch.setattr(ReferenceLogprobs, "_computed", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(preferences("name=run"), [])
    assert not folder_of("run").checkpoints.complete()
    monkeypatch.undo()


def test_the_model_card_names_the_stages(preferences):
    train(preferences("name=prefer", "objective.nll_weight=0.5", "budget_tokens=1024", "schedule.warmup_steps=0"), [])
    trained = load_trained("outputs/prefer")
    card = model_card(trained, read_lineage(folder_of("prefer")), "prefer", None, "Verified", False, SamplingConfig())
    assert "| stage | finetuning | preference tuning, loss sigmoid, beta 0.1, nll_weight 0.5 |" in card
    assert "| prefer | pairs of a better and a worse answer | local files: files | 1 | 1,024 |" in card
    assert "- dpo\n" in card and "on held-out pairs of a better and a worse answer" in card


def test_a_compiled_run_equals_an_eager_one(preferences):
    train(preferences("name=eager", "budget_tokens=4096"), [])
    train(preferences("name=compiled", "budget_tokens=4096", "trainer.compile=true"), [])
    assert_close(weights("outputs/eager"), weights("outputs/compiled"))
