"""The checkpoints whose weights are averaged: the last ones, without one that is kept for its validation alone."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from cucafera.config.errors import UserError
from cucafera.runs.averaging import checkpoints_to_average, steps_in_words
from cucafera.runs.checkpoints import Score
from cucafera.runs.folder import RunFolder


@pytest.fixture
def run(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The run folder outputs/base without checkpoints, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "outputs" / "base", "outputs/base", ignore=shutil.ignore_patterns("step-*"))
    return RunFolder(Path("outputs/base"))


def save(run: RunFolder, *steps: int, best: int = 0) -> None:
    for step in steps:
        score = Score("bpb", 1.0 if step == best else 2.0, "lower") if best else None
        run.checkpoints.write(step, {"weight": torch.zeros(1)}, score)


def steps_of(source: str, count: int) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints_to_average(source, count)]


def test_the_last_checkpoints_are_averaged_and_the_best_among_them_counts_once(run):
    save(run, 4, 8, 12, 16, best=16)
    assert steps_of("outputs/base", 2) == [12, 16]
    assert steps_of("outputs/base", 4) == [4, 8, 12, 16]


def test_a_checkpoint_is_the_last_of_those_up_to_it(run):
    save(run, 4, 8, 12, 16)
    assert steps_of("outputs/base/checkpoints/step-00000012.ckpt", 2) == [8, 12]
    with pytest.raises(
        UserError, match=r"--average 3: there are only 2 checkpoints up to .*00008\.ckpt \(steps 4 and 8"
    ):
        steps_of("outputs/base/checkpoints/step-00000008.ckpt", 3)


def test_a_best_checkpoint_that_is_kept_for_that_alone_is_not_one_of_the_last(run):
    save(run, 2, 12, 16, best=2)
    with pytest.raises(UserError) as caught:
        steps_of("outputs/base", 3)
    assert str(caught.value) == (
        "--average 3: there are only 2 checkpoints in outputs/base (steps 12 and 16); step-00000002.ckpt is apart from "
        "them, kept as the best. A run keeps more with callbacks.keep_last=3, given before they are removed"
    )
    with pytest.raises(UserError, match=r"only 1 checkpoint up to .* \(step 2\)\. A run"):
        steps_of("outputs/base/checkpoints/step-00000002.ckpt", 2)
    config = yaml.safe_load(run.config.read_text())
    config["callbacks"]["keep_every_steps"] = 2
    run.config.write_text(yaml.safe_dump(config))
    assert steps_of("outputs/base", 3) == [2, 12, 16]


def test_a_damaged_marker_is_refused_by_its_name_and_not_left_out(run):
    save(run, 4, 8, 12)
    (run.checkpoints.path / "step-00000008.json").write_text("{")
    with pytest.raises(UserError, match=r"step-00000008\.ckpt cannot be used: .*: delete it and its marker to average"):
        steps_of("outputs/base", 3)
    (run.checkpoints.path / "step-00000008.json").unlink()
    assert steps_of("outputs/base", 2) == [4, 12], "never completed, so ignored as everywhere"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("outputs/base", "outputs/base: the folder holds no checkpoint: its checkpoints/ is empty"),
        ("outputs/base/hf", "--average 2: outputs/base/hf is one model: only a run has checkpoints to average"),
        ("owner/name", "--average 2: owner/name is one model: only a run has checkpoints to average"),
    ],
)
def test_what_has_no_checkpoints_is_refused(run, source, message):
    (run.path / "hf").mkdir()
    (run.path / "hf" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"^{message}$"):
        checkpoints_to_average(source, 2)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([1500], "step 1,500"),
        ([8, 12], "steps 8 and 12"),
        ([1600, 1800, 2000], "steps 1,600 to 2,000, every 200"),
        ([500, 1900, 2000], "steps 500, 1,900 and 2,000"),
    ],
)
def test_steps_are_given_with_their_spacing(steps, words):
    assert steps_in_words(steps) == words
