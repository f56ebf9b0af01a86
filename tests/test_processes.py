"""Whole runs as processes of their own: kills, signals, several devices, the installed package."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL_RUN
from tests.test_run import assert_close, assert_equal, assert_same_curve, scalars, weights

pytestmark = pytest.mark.slow


class Door:
    """Starts `python -m cucafera.run` on the small run, in the test's own folder."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.arguments = [*SMALL_RUN, f"data.sources.files.path={corpus}"]
        self.folder = folder

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        flags = [override for override in overrides if override.startswith("-")]
        values = [override for override in overrides if not override.startswith("-")]
        return subprocess.Popen(
            [sys.executable, "-m", "cucafera.run", *flags, *self.arguments, *values],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # for a model this small, threads only get in each other's way
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *overrides: str) -> tuple[int, str]:
        process = self.start(*overrides)
        output, _ = process.communicate(timeout=180)
        return process.returncode, output


@pytest.fixture
def door(corpus: Path, tmp_path: Path) -> Door:
    return Door(corpus, tmp_path)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


LONG = ("budget_tokens=51_200", "callbacks.checkpoint_every_steps=20", "callbacks.validate_every_steps=40")


def test_a_killed_run_goes_on_and_ends_bit_equal_to_an_undisturbed_one(door, tmp_path):
    assert door.run(*LONG, "name=whole")[0] == 0
    killed = tmp_path / "outputs" / "killed"
    for step in (20, 100):
        process = door.start(*LONG, "name=killed")
        wait_for(killed / "checkpoints" / f"step-{step:08d}.ckpt", process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (killed / "report.md").exists()
    code, output = door.run(*LONG, "name=killed")
    assert code == 0, output
    assert "going on after step" in output
    assert_equal(weights(tmp_path / "outputs" / "whole"), weights(killed))
    for tag in ("train/loss", "val/loss"):
        assert scalars(tmp_path / "outputs" / "whole", tag) == scalars(killed, tag)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(door, tmp_path, number):
    assert door.run(*LONG, "name=whole")[0] == 0
    process = door.start(*LONG, "name=stopped")
    wait_for(tmp_path / "outputs" / "stopped" / "checkpoints" / "step-00000020.ckpt", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "the same command goes on" in output
    assert "Traceback" not in output
    assert door.run(*LONG, "name=stopped")[0] == 0
    assert_equal(weights(tmp_path / "outputs" / "whole"), weights(tmp_path / "outputs" / "stopped"))


def test_two_devices_give_the_trajectory_of_one(door, tmp_path):
    assert door.run("name=one")[0] == 0
    code, output = door.run("name=two", "trainer.devices=2", "trainer.micro_batch_windows=2")
    assert code == 0, output
    one, two = tmp_path / "outputs" / "one", tmp_path / "outputs" / "two"
    for tag in ("train/loss", "val/loss", "val/bpb"):
        assert_same_curve(one, two, tag)
    assert_close(weights(one), weights(two))


def test_a_sweep_runs_each_value_in_a_folder_of_its_own(door, tmp_path):
    code, output = door.run("--multirun", "optimizer.lr=1e-3,2e-3", "budget_tokens=1024", "schedule.warmup_steps=0")
    assert code == 0, output
    sweep = tmp_path / "outputs" / "quickstart-sweep"
    first, second = (
        json.loads((sweep / "0/metrics.json").read_text()),
        json.loads((sweep / "1/metrics.json").read_text()),
    )
    assert first["validation"][0] == second["validation"][0]
    assert first["validation"][-1] != second["validation"][-1]


def test_a_sweep_over_several_devices_is_refused_in_words(door):
    code, output = door.run("--multirun", "seed=1,2", "trainer.devices=2")
    assert code == 1
    assert "start the jobs one by one" in output


def test_what_the_user_can_mend_ends_with_code_2_and_no_stack_trace(door, tmp_path):
    for overrides, message in [
        (["data.sources.files.path=nowhere/*.jsonl"], "nowhere"),
        (["data.sources.files.column=body"], "body"),
        (["tokenizer.path=nowhere.json"], "nowhere.json"),
        (["init_from=nowhere"], "there is no such run folder or checkpoint"),
    ]:
        code, output = door.run(*overrides)
        assert code == 2, output
        assert message in output
        assert "Traceback" not in output
    assert torch.cuda.is_available() or door.run("trainer=a100")[0] == 2


def test_an_installed_wheel_runs_without_the_source_tree(tmp_path):
    source = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source],
        check=True,
        timeout=120,
    )
    site = tmp_path / "site"
    (wheel,) = tmp_path.glob("cucafera-*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
        check=True,
        timeout=120,
    )
    result = subprocess.run(
        [sys.executable, "-m", "cucafera.run", "+experiment=debug/one_batch"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Validation bpb" in result.stdout
    assert (site / "cucafera" / "conf" / "config.yaml").exists()
