"""Cooldowns: a run is continued from one of its checkpoints, in another folder, until its learning rate is zero."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from cucafera.config.command_line import command_line_problems, composed_config
from cucafera.config.errors import UserError
from cucafera.config.files import with_checksum
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config, ScheduleConfig
from cucafera.interop.model_card import read_lineage
from cucafera.run import train
from cucafera.runs.checkpoints import CheckpointFolder, read_checkpoint
from cucafera.runs.inputs import input_problems
from cucafera.training.module import LanguageModel
from cucafera.training.schedules import lr_ratio
from tests.support import (
    assert_close,
    compose_small_run,
    folder_of,
    history_of,
    scalars,
    weights,
    write_corpus,
)

EXPERIMENT = "+experiment=cooldown"
STATE = ("state_dict", "optimizer_states", "random_state", "fingerprints", "skipped_batches", "steps_done")


def cool_down(*overrides: str) -> Config:
    """Train the cooldown of a command line."""
    config = composed_config([EXPERIMENT, *overrides])
    train(config, [EXPERIMENT, *overrides])
    return config


def checkpoint(name: str, step: int) -> dict:
    return read_checkpoint(folder_of(name).checkpoints.file_at(step))


def assert_same(left, right) -> None:
    """Compare nested plain data and tensors, bit by bit."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def assert_same_state(left: dict, right: dict) -> None:
    for part in STATE:
        assert_same(left[part], right[part])


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def train_stable(*overrides: str) -> None:
    """Train the constant run outputs/stable, which keeps every fourth checkpoint, or continue it."""
    config = compose_small_run(Path("corpus.jsonl"), "name=stable", "schedule=constant", "callbacks.keep_every_steps=4",
                               *overrides)  # fmt: skip
    train(config, [])


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    """A folder with outputs/stable, of twelve steps."""
    folder = tmp_path_factory.mktemp("parents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_corpus(Path("corpus.jsonl"), documents=80)
        train_stable()
    return folder


@pytest.fixture
def stable(parents, tmp_path, monkeypatch) -> Path:
    """The current folder is a copy of `parents`; returns the run folder."""
    shutil.copytree(parents, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("outputs/stable")


# What it computes


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_a_stable_run_and_its_cooldown_equal_wsd_planned_to_that_end(small_run, optimizer):
    planned = ["schedule=wsd", "schedule.decay_fraction=0.25", "budget_tokens=4096"]
    train(small_run("name=planned", f"optimizer={optimizer}", *planned), [])
    train(small_run("name=stable", f"optimizer={optimizer}", "schedule=constant"), [])
    config = cool_down("init_from=outputs/stable", "schedule.cooldown_steps=4", "callbacks.checkpoint_every_steps=2")
    assert (config.run_dir, config.total_steps) == ("outputs/stable-cooldown", 16)
    assert_same_state(checkpoint("planned", 16), checkpoint("stable-cooldown", 16))
    assert scalars("outputs/planned", "loss/train")[12:] == scalars("outputs/stable-cooldown", "loss/train")


@pytest.mark.parametrize(("start", "steps"), [(80, 20), (73, 27), (99, 1), (10, 90)])
def test_its_rates_are_those_of_wsd_bit_for_bit(start, steps):
    planned = ScheduleConfig("wsd", 10, final_lr_ratio=0.0, decay_fraction=steps / (start + steps))
    for name in ("constant", "wsd"):
        cooled = ScheduleConfig(name, 10, cooldown_steps=steps, cooldown_start_step=start)
        for step in range(start + steps + 5):
            assert lr_ratio(step, cooled, 1000) == lr_ratio(step, planned, start + steps), step


def test_it_begins_with_the_rate_that_a_cosine_has_at_that_step():
    cosine = ScheduleConfig("cosine", 10, final_lr_ratio=0.1)
    cooled = ScheduleConfig("cosine", 10, final_lr_ratio=0.1, cooldown_steps=8, cooldown_start_step=60)
    ratios = [lr_ratio(step, cooled, 100) for step in range(70)]
    assert ratios[:61] == [lr_ratio(step, cosine, 100) for step in range(61)]
    assert ratios[60:] == pytest.approx([ratios[60] * max(0, 8 - step) / 8 for step in range(10)])


def test_the_cosine_that_a_cooldown_leaves_is_that_of_its_run(small_run):
    train(small_run("name=cosine"), [])
    cool_down("init_from=outputs/cosine", "schedule.cooldown_start_step=8", "schedule.cooldown_steps=3")
    before = dict(scalars("outputs/cosine", "train/lr/gains"))
    for step, rate in scalars("outputs/cosine-cooldown-8", "train/lr/gains"):
        assert rate == pytest.approx(before[9] * (12 - step) / 3)


def test_an_interrupted_cooldown_resumes_to_the_same_end(stable, monkeypatch):
    before = content_of(stable)
    cool_down("init_from=outputs/stable", "schedule.cooldown_steps=6")
    overrides = ["init_from=outputs/stable", "schedule.cooldown_steps=6", "name=interrupted"]
    clip = LanguageModel._clip_gradients

    def clip_and_stop(module):
        if module.steps_done == 14:
            signal.raise_signal(signal.SIGTERM)
        return clip(module)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(LanguageModel, "_clip_gradients", clip_and_stop)
        cool_down(*overrides)
    assert content_of(stable) == before
    shutil.rmtree(stable)  # it is not needed any more
    cool_down(*overrides)
    for name in ("interrupted", "stable-cooldown"):
        assert [event["step"] for event in history_of(name) if event["event"] == "completed"] == [18]
    assert_same_state(checkpoint("interrupted", 18), checkpoint("stable-cooldown", 18))
    for curve in ("loss/train", "bpb/val", "train/lr/gains"):
        assert scalars("outputs/interrupted", curve) == scalars("outputs/stable-cooldown", curve)


def test_a_run_has_several_cooldowns_while_it_continues(stable):
    early = cool_down(f"init_from={stable}/checkpoints/step-00000008.ckpt")
    assert (early.run_dir, early.total_steps) == ("outputs/stable-cooldown-8", 10)  # a fifth more
    command = ["init_from=outputs/stable", "schedule.cooldown_steps=2"]
    cool_down(*command)
    train_stable("budget_tokens=4096")
    assert composed_config([EXPERIMENT, *command]).total_steps == 14  # it has started, and stays what it is
    assert composed_config([EXPERIMENT, *command, "name=other"]).total_steps == 18
    assert composed_config([EXPERIMENT, *command, "resume=overwrite"]).total_steps == 18
    chosen = composed_config([EXPERIMENT, *command, "schedule.cooldown_start_step=4"])
    assert (chosen.name, chosen.total_steps) == ("stable-cooldown-4", 6)


def test_a_start_before_its_first_checkpoint_is_repeated_from_the_same_step_while_it_exists(stable):
    overrides = [EXPERIMENT, "init_from=outputs/stable", "schedule.cooldown_steps=2"]
    config = composed_config(overrides)
    train(config, overrides)
    shutil.rmtree("outputs/stable-cooldown/checkpoints")
    for suffix in ("ckpt", "json"):
        shutil.copy(stable / f"checkpoints/step-00000012.{suffix}", stable / f"checkpoints/step-00000099.{suffix}")
    assert composed_config(overrides).schedule.cooldown_start_step == 12
    (stable / "checkpoints/step-00000012.json").unlink()
    assert composed_config(overrides).schedule.cooldown_start_step == 99


def test_the_learning_rate_and_other_settings_of_the_optimizer_take_effect(stable):
    overrides = ["optimizer.lr=1e-3", "optimizer.weight_decay=0.5", "schedule.cooldown_steps=2"]
    cool_down("init_from=outputs/stable", *overrides)
    assert scalars("outputs/stable-cooldown", "train/lr/gains") == [
        (13, pytest.approx(1e-3)),
        (14, pytest.approx(5e-4)),
    ]
    groups = checkpoint("stable-cooldown", 14)["optimizer_states"][0]["param_groups"]
    assert max(group["weight_decay"] for group in groups) == 0.5


def test_it_has_the_settings_of_its_run_and_only_its_own_place(stable):
    config = composed_config(
        [EXPERIMENT, "init_from=outputs/stable", "callbacks.log_every_steps=3", "max_time=1:00:00"]
    )
    assert (config.model.hidden_size, config.batch_tokens, config.optimizer.lr) == (48, 256, 3e-3)
    assert (config.name, config.run_dir, config.resume) == ("stable-cooldown", "outputs/stable-cooldown", "auto")
    assert config.callbacks.log_every_steps == 3 and config.callbacks.validate_every_steps == 4
    assert config.data.sources["files"].path == "corpus.jsonl"
    assert (config.budget_tokens, config.schedule.cooldown_steps) == (14 * 256, 2)


def test_a_text_with_a_dollar_and_a_brace_stays_what_it_is(stable):
    path = stable / "config.yaml"
    prompts = composed_config(
        [EXPERIMENT, "init_from=outputs/stable", r"callbacks.prompts=['5\${x}']"]
    ).callbacks.prompts
    assert prompts == ["5${x}"]
    body = (
        path.read_text().rsplit("# crc32", 1)[0].replace("- Hi havia una vegada", r"- 'a\\${x}'").replace(r"\\", "\\")
    )
    path.write_text(with_checksum(body))
    first, *_ = composed_config([EXPERIMENT, "init_from=outputs/stable"]).callbacks.prompts
    assert first == r"a\${x}"


# What it says


def test_records_say_what_it_is_and_count_on_from_its_run(stable, caplog):
    caplog.set_level("INFO")
    cool_down("init_from=outputs/stable", "schedule.cooldown_steps=4", "callbacks.validate_every_steps=2")
    start = "cooldown of outputs/stable after step 12: 4 steps, learning rate 0.003 to 0"
    assert f"Start   {start}" in caplog.text and "16 steps x 256 tokens" in caplog.text
    folder = folder_of("stable-cooldown")
    assert f"| Start | {start} |" in folder.report.read_text()
    metrics = folder.read_metrics()
    assert (metrics["steps"], metrics["tokens"]) == (16, 16 * 256)
    assert [record["step"] for record in metrics["validation"]] == [0, 4, 8, 12, 14, 16]
    started = history_of("stable-cooldown")[0]
    assert (started["event"], started["step"]) == ("started", 12)
    assert started["branch_of"] == "outputs/stable/checkpoints/step-00000012.ckpt"
    assert [step for step, _ in scalars(folder.path, "loss/train")] == [13, 14, 15, 16]
    assert [step for step, _ in scalars(folder.path, "bpb/val_by_tokens")] == [14 * 256, 16 * 256]
    cool_down("init_from=outputs/stable", "schedule.cooldown_steps=4", "callbacks.validate_every_steps=2")
    assert "This run is complete. Cool down another checkpoint" in caplog.text


def test_the_lineage_counts_no_step_twice(stable):
    train_stable("budget_tokens=4096")
    cool_down(f"init_from={stable}/checkpoints/step-00000008.ckpt", "schedule.cooldown_steps=2", "name=short")
    lineage = read_lineage(folder_of("short"))
    assert [(stage.config["name"], stage.steps, stage.tokens) for stage in lineage.stages()] == [
        ("stable", 8, 8 * 256),
        ("short", 2, 2 * 256),
    ]
    shutil.rmtree(stable)
    (alone,) = read_lineage(folder_of("short")).stages()
    assert (alone.steps, alone.tokens) == (10, 10 * 256)


# What is refused


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("budget_tokens=8192", "the budget of a cooldown follows from its length, schedule.cooldown_steps=STEPS"),
        ("epochs=2", "the budget of a cooldown follows from its length"),
        ("schedule=wsd", "the schedule of a cooldown is that of the run of init_from"),
        ("schedule.warmup_steps=9", "the schedule of a cooldown is that of the run of init_from"),
        ("model=small", "only trainer, callbacks, logger may be chosen again"),
        ("optimizer=muon", "only trainer, callbacks, logger may be chosen again"),
        ("~data.sources.embedded", "only trainer, callbacks, logger may be chosen again"),
        ("schedule.cooldown_start_step=5", "step-00000005.ckpt cannot be used: it does not exist. outputs/stable has"),
        ("seed=2", "seed: 2 (requested) != 1337 (stable)"),
        ("batch_tokens=512", "batch_tokens: 512 (requested) != 256 (stable)"),
        ("model.rope_theta=5", "model.rope_theta: 5 (requested) != 10_000 (stable)"),
        ("optimizer.name=muon", "is not a setting of muon"),
        ("data.document_masking=false", "data.document_masking: false (requested) != true (stable)"),
        ("data.sources.files.weight=2", "data.sources.files.weight: 2 (requested) != 1 (stable)"),
        ("+data.sources.more.path=corpus.jsonl", "data.sources.more: given (requested) != not given (stable)"),
        ("init_from=null", "init_from must be given: init_from=RUN, the run that the cooldown continues"),
        ("init_from=outputs/nothing", "outputs/nothing is not a run folder or a checkpoint in one"),
        ("init_from=owner/model", "models of the Hugging Face hub hold weights alone"),
    ],
)
def test_what_would_be_no_cooldown_of_the_run_is_refused(stable, override, problem):
    given = [] if override.startswith("init_from=") else ["init_from=outputs/stable"]
    overrides = [EXPERIMENT, *given, override]
    problems = command_line_problems(overrides)
    if not problems:
        problems = list(input_problems(composed_config(overrides)))
    assert len(problems) >= 1 and problem in problems[0]


def test_no_experiment_but_the_cooldown_is_taken(stable):
    (problem,) = command_line_problems(["+experiment=[pretrain,cooldown]", "init_from=outputs/stable"])
    assert problem.endswith("a cooldown has the settings of the run of init_from: +experiment=cooldown alone")
    (problem,) = command_line_problems(["schedule.cooldown_start_step=5"])
    assert problem.startswith("schedule.cooldown_start_step is of a cooldown")


def test_files_that_were_moved_may_be_named(stable):
    shutil.move("corpus.jsonl", "moved.jsonl")
    overrides = ["init_from=outputs/stable", "data.sources.files.path=moved.jsonl"]
    (problem,) = input_problems(composed_config([EXPERIMENT, *overrides]))
    assert "resume_allow_changed=[data.sources.NAME.path]" in problem
    cool_down(*overrides, "resume_allow_changed=[data.sources.files.path]", "schedule.cooldown_steps=1")
    assert folder_of("stable-cooldown").read_metrics()["steps"] == 13


def test_a_run_in_its_warm_up_or_at_the_end_of_its_decay_is_refused(small_run):
    train(small_run("name=warm", "schedule.warmup_steps=12"), [])
    (problem,) = command_line_problems([EXPERIMENT, "init_from=outputs/warm", "schedule.cooldown_start_step=8"])
    assert problem.startswith("init_from: at step 8, the run is still in its warm-up of 12 steps")
    for schedule in ("wsd", "linear"):
        train(small_run(f"name={schedule}", f"schedule={schedule}"), [])
        (problem,) = command_line_problems([EXPERIMENT, f"init_from=outputs/{schedule}"])
        assert "at step 12, the learning rate of the run is already 0: there is nothing to cool down" in problem
        early = [EXPERIMENT, f"init_from=outputs/{schedule}", "schedule.cooldown_start_step=8"]
        assert command_line_problems(early) == []


def test_a_checkpoint_without_optimizer_state_is_refused(stable):
    state = checkpoint("stable", 12)
    state["optimizer_states"] = []
    CheckpointFolder(stable / "checkpoints").write(12, state, None)
    with pytest.raises(UserError, match=r"step-00000012\.ckpt holds no optimizer state, only weights"):
        cool_down("init_from=outputs/stable")


def test_the_checkpoint_and_not_the_config_says_how_the_run_was_trained(stable):
    train_stable("budget_tokens=4096", "optimizer.lr=1e-3", "resume_allow_changed=[optimizer.lr]")
    start = f"init_from={stable}/checkpoints/step-00000008.ckpt"
    with pytest.raises(UserError, match=r"optimizer.lr: 0.001 \(requested\) != 0.003"):
        cool_down(start)
    assert cool_down(start, "optimizer.lr=3e-3").schedule.horizon_steps == 12


def test_an_edited_configuration_is_refused(stable):
    path = stable / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.003", "lr: 0.3"))
    (problem,) = command_line_problems([EXPERIMENT, "init_from=outputs/stable"])
    assert "config.yaml was edited since the run wrote it" in problem


def test_a_cooldown_is_not_cooled_down_again(stable):
    cool_down("init_from=outputs/stable", "schedule.cooldown_steps=1")
    (problem,) = command_line_problems([EXPERIMENT, "init_from=outputs/stable-cooldown"])
    assert "is a cooldown itself. Run its own command again" in problem and "init_from=outputs/stable" in problem


def test_another_length_is_refused_on_resume_with_the_override_that_forces_it(stable):
    cool_down("init_from=outputs/stable", "schedule.cooldown_steps=1")
    with pytest.raises(UserError, match=r"schedule.cooldown_steps: 3 \(requested\) != 1 \(checkpoint\)"):
        cool_down("init_from=outputs/stable", "schedule.cooldown_steps=3")


# Processes


@pytest.mark.slow
def test_a_cooldown_on_two_devices_equals_that_on_one(stable, command):
    cool_down("init_from=outputs/stable", "schedule.cooldown_steps=2")
    command.arguments = []
    status, output = command.run(
        EXPERIMENT, "init_from=outputs/stable", "schedule.cooldown_steps=2", "name=two", "trainer.devices=2"
    )
    assert status == 0, output
    assert_close(weights("outputs/stable-cooldown"), weights("outputs/two"))


@pytest.mark.slow
def test_a_sweep_cools_down_several_checkpoints(stable, command):
    command.arguments = []
    starts = ",".join(f"{stable}/checkpoints/step-{step:08d}.ckpt" for step in (4, 8))
    for _ in range(2):  # the second time, nothing is left to do
        status, output = command.run("--multirun", EXPERIMENT, f"init_from={starts}", "schedule.cooldown_steps=2")
        assert status == 0, output
    folders = [path.parent for path in Path("outputs/cooldown-sweep").glob("*/metrics.json")]
    assert sorted(len(scalars(folder, "loss/train")) for folder in folders) == [2, 2]
