"""The jobs of a sweep, each in a process of its own."""

import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from cucafera.composition import command_line_problems, composed_config, hydra_arguments
from cucafera.config import Config
from cucafera.sweeps import jobs
from cucafera.sweeps.jobs import Job, quoted
from cucafera.training.run_folder import RunFolder
from tests.test_processes import Door, wait_for
from tests.test_run import assert_equal, weights

HORIZON = "schedule.warmup_steps=0"

CRASH = """
import os, sys
if any("optimizer.lr=0.5" in argument for argument in sys.orig_argv) and "--multirun" not in sys.orig_argv:
    os._exit(77)
"""


@pytest.fixture
def door(corpus: Path, tmp_path: Path) -> Door:
    return Door(corpus, tmp_path)


def ended(folder: Path) -> dict[str, tuple[str, int | None]]:
    """How each job of a sweep ended, by its name."""
    found = {path.parent.name: Job.read(path.parent) for path in folder.glob("*/job.json")}
    return {name: (job.status, job.exit_code) for name, job in found.items() if job}


def test_a_sweep_keeps_what_is_finished_and_a_job_of_it_is_the_same_as_alone(door, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    sweep = tmp_path / "outputs" / "quickstart-sweep"
    command = ("--multirun", "optimizer.lr=1e-3,1e9,0.5,2e-3", "budget_tokens=2048", HORIZON)
    code, output = door.run(*command)
    assert code == 1, output  # for the crash
    assert ended(sweep) == {
        "optimizer.lr=0.001": ("finished", 0),
        "optimizer.lr=1000000000.0": ("diverged", 3),
        "optimizer.lr=0.5": ("crashed", 77),
        "optimizer.lr=0.002": ("finished", 0),
    }
    assert "Diverged: optimizer.lr=1000000000.0." in output and "Crashed" in output
    assert "Traceback" not in output
    assert door.run("name=alone", "optimizer.lr=2e-3", "budget_tokens=2048", HORIZON)[0] == 0
    assert_equal(weights(tmp_path / "outputs" / "alone"), weights(sweep / "optimizer.lr=0.002"))

    (tmp_path / "sitecustomize.py").unlink()
    code, output = door.run(*command)
    assert code == 0, output
    assert ended(sweep)["optimizer.lr=0.5"][0] in ("finished", "diverged")
    assert output.count("Run     ") == 1  # only the one that had crashed ran again
    assert len((sweep / "optimizer.lr=0.001" / "history.jsonl").read_text().splitlines()) == 2


def test_a_sweep_that_is_killed_goes_on_with_the_job_that_it_was_at(door, tmp_path):
    sweep = tmp_path / "outputs" / "quickstart-sweep"
    first, second = RunFolder(sweep / "seed=1"), RunFolder(sweep / "seed=2")
    command = ("--multirun", "seed=1,2", "budget_tokens=25_600", "callbacks.checkpoint_every_steps=20")
    process = door.start(*command)
    wait_for(second.checkpoints.path / "step-00000020.json", process)
    history = first.history.read_text()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while second.lock.exists():  # the job ends, and saves, when its parent is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads(second.history.read_text().splitlines()[-1])["why"] == "the sweep"
    code, output = door.run(*command)
    assert code == 0, output
    assert first.history.read_text() == history
    assert [json.loads(line)["what"] for line in second.history.read_text().splitlines()][-2:] == [
        "went on",
        "completed",
    ]
    assert "The best is seed=" in output


def test_a_signal_stops_the_job_and_the_sweep(door, tmp_path):
    sweep = tmp_path / "outputs" / "quickstart-sweep"
    process = door.start(
        "--multirun", "seed=1,2", "budget_tokens=51_200", "callbacks.checkpoint_every_steps=20", "trainer.devices=2"
    )
    wait_for(sweep / "seed=1" / "checkpoints" / "step-00000020.json", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Stopped by the sweep after step" in output and "and saved" in output and "Traceback" not in output
    assert not (sweep / "seed=2").exists()


SAVES = """
import signal, sys, time

def save(number, frame):
    time.sleep(0.5)
    sys.exit(7)

signal.signal(signal.SIGUSR2, save)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGUSR2, signal.SIGINT], 7),  # the death of the sweep's process and Ctrl-C, in either order
        ([signal.SIGINT, signal.SIGUSR2], 7),
        ([signal.SIGINT, signal.SIGINT], -signal.SIGKILL),
        ([signal.SIGUSR2, signal.SIGINT, signal.SIGINT], -signal.SIGKILL),
    ],
)
def test_signals_that_come_together_let_a_job_save(tmp_path, signals, code):
    def send() -> None:
        while "ready" not in (tmp_path / "output").read_text():
            time.sleep(0.01)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    with (tmp_path / "output").open("wb") as output:
        thread = threading.Thread(target=send)
        thread.start()
        stopped = jobs._answered([sys.executable, "-c", SAVES], dict(os.environ), output)
        thread.join()
    assert stopped == (signals[0], code)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])  # to all, as a terminal does; to the first alone
def test_jobs_side_by_side_are_saved_when_the_sweep_is_stopped_or_killed(door, tmp_path, number):
    sweep = tmp_path / "outputs" / "quickstart-sweep"
    process = door.start(
        "--multirun", "hydra/launcher=parallel", "hydra.launcher.n_jobs=2", "seed=1,2", "budget_tokens=256_000",
        "callbacks.checkpoint_every_steps=20", "callbacks.keep_last=100", new_group=True,
    )  # fmt: skip
    jobs = [RunFolder(sweep / f"seed={seed}") for seed in (1, 2)]
    for job in jobs:
        wait_for(job.checkpoints.path / "step-00000020.json", process)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGKILL), output
    deadline = time.monotonic() + 30
    while any(job.lock.exists() for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for job in jobs:
        assert json.loads(job.history.read_text().splitlines()[-1])["what"] == "stopped"


@pytest.mark.parametrize("launcher", ["hydra/launcher=parallel", "hydra/launcher=submitit_local"])
def test_other_launchers_run_the_same_jobs(door, tmp_path, launcher):
    settings = {"parallel": "hydra.launcher.n_jobs=2", "submitit_local": "hydra.launcher.timeout_min=5"}
    code, output = door.run(
        "--multirun", launcher, settings[launcher.partition("=")[2]], "seed=1,2", "budget_tokens=1024", HORIZON
    )
    assert code == 0, output
    sweep = tmp_path / "outputs" / "quickstart-sweep"
    assert ended(sweep) == {"seed=1": ("finished", 0), "seed=2": ("finished", 0)}
    assert "Validation bpb" in (sweep / "seed=1" / "job.out").read_text()
    assert "The best is seed=" in output


def test_optuna_looks_for_what_is_best_and_goes_on_where_it_was(door, tmp_path):
    command = ("--multirun", "+experiment=search", "budget_tokens=1024", "name=found")
    fixed = ("schedule.warmup_steps=0", "optimizer.weight_decay=0.1", "callbacks.validate_every_steps=4")
    code, output = door.run(*command, *fixed, "hydra.sweeper.n_trials=2")
    assert code == 0, output
    sweep = tmp_path / "outputs" / "found"
    first = ended(sweep)
    assert [status for status, _ in first.values()] == ["finished"] * 2
    assert all(name.startswith("optimizer.lr=") for name in first)
    assert "best_params" in (sweep / "optimization_results.yaml").read_text()
    code, output = door.run(*command, *fixed, "hydra.sweeper.n_trials=1")
    assert code == 0, output
    assert first.items() < ended(sweep).items() and len(ended(sweep)) == 3


def test_a_refused_job_does_not_keep_the_others_from_their_end(door, tmp_path):
    code, output = door.run("--multirun", "tokenizer.path=nowhere.json,null", "budget_tokens=1024", HORIZON)
    assert code == 2, output
    assert "nowhere.json" in output and "Traceback" not in output
    assert "Refused, for what stands above or in job.out of their folders: tokenizer.path=nowhere.json." in output
    sweep = tmp_path / "outputs" / "quickstart-sweep"
    assert ended(sweep) == {"tokenizer.path=nowhere.json": ("refused", 2), "tokenizer.path=null": ("finished", 0)}


def test_jobs_are_named_by_what_is_swept_and_the_command_line_outdoes_the_experiment():
    arguments = hydra_arguments(["+experiment=lr_sweep", "model=tiny,small", "budget_tokens=1e6"], multirun=True)
    assert "hydra.job.config.override_dirname.exclude_keys=[experiment,budget_tokens]" in arguments
    (rates,) = [text for text in arguments if text.startswith("optimizer.lr=")]
    assert rates.count(",") >= 5
    assert [
        text
        for text in hydra_arguments(["+experiment=lr_sweep", "optimizer.lr=1e-3,2e-3"], multirun=True)
        if text.startswith("optimizer.lr=")
    ] == ["optimizer.lr=1e-3,2e-3"]


def test_the_jobs_of_a_sweep_share_one_folder_whatever_is_swept():
    for swept in ("name=a,b", "+experiment=quickstart,pretrain"):
        assert "hydra.sweep.dir='outputs/quickstart-sweep'" in hydra_arguments([swept], multirun=True)
    (told,) = command_line_problems(["seed=1,2", "run_dir=mine"], multirun=True)
    assert "run_dir is the folder of one run; that of a sweep is hydra.sweep.dir=..." in told


def test_a_job_that_ended_with_another_configuration_is_left_as_it_is_and_told(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(jobs, "_answered", lambda command, *rest: started.append(command) or (None, 2))
    config = composed_config(["optimizer.lr=1e-3"])
    job = ("finished", 0, ["optimizer.lr=1e-3"], jobs.identity_of(config))
    Job(*job).write(tmp_path)
    (tmp_path / "metrics.json").write_text('{"steps": 1, "validation": [{"bpb": 2.5}]}')
    assert run(config, tmp_path) == 2.5
    assert run(composed_config(["optimizer.lr=1e-3", "max_time=01:00:00", "trainer.num_workers=2"]), tmp_path) == 2.5
    assert run(composed_config(["optimizer.lr=1e-3", "budget_tokens=1e6"]), tmp_path) == math.inf
    assert "holds a job with another configuration: name=ANOTHER makes a sweep of its own" in capsys.readouterr().err
    assert Job.read(tmp_path) == Job(*job) and not started
    assert run(composed_config(["optimizer.lr=1e-3", "resume=overwrite"]), tmp_path) == math.inf
    assert len(started) == 1 and Job.read(tmp_path).status == "refused"


def run(config: Config, folder: Path) -> float:
    return jobs.run_job(config, ["optimizer.lr=1e-3"], folder, [], "basic")


def test_a_job_can_be_named_as_the_run_to_begin_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=1", "a=2"):
        Path(name).mkdir()
    assert hydra_arguments(["init_from=a=1,a=2", "seed=1"], multirun=True)[0] == "init_from='a=1','a=2'"
    place = "outputs/lr_sweep/optimizer.lr=0.002,seed=1"
    assert hydra_arguments([f"init_from={place}"]) == [f"init_from='{place}'"]
    assert composed_config([f"tokenizer.path={place}"]).tokenizer.path == place
    assert composed_config([f"tokenizer.path={quoted('it' + chr(39) + 's=a')}"]).tokenizer.path == "it's=a"


def test_a_job_waits_for_gpus_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5")
    one, two, four, every = (composed_config([f"trainer.devices={devices}"]) for devices in (1, 2, 4, "auto"))
    with jobs._own_gpus(two, tmp_path) as environment:
        assert environment == {"CUDA_VISIBLE_DEVICES": "0,3"}
        with jobs._own_gpus(one, tmp_path) as environment:
            assert environment == {"CUDA_VISIBLE_DEVICES": "5"}
    with jobs._own_gpus(four, tmp_path) as environment:
        assert environment == {}  # more than there are, which the job will tell
    with jobs._own_gpus(composed_config(["trainer=cpu", "trainer.devices=2"]), tmp_path) as environment:
        assert environment == {}
    other = os.open(next(tmp_path.glob(".*-gpu-3.lock")), os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    waited = []

    def free_the_gpu(seconds: float) -> None:
        waited.append(seconds)
        with jobs._own_gpus(two, tmp_path) as meanwhile:  # who waits holds none
            assert meanwhile == {"CUDA_VISIBLE_DEVICES": "0,5"}
        os.close(other)

    monkeypatch.setattr(jobs.time, "sleep", free_the_gpu)
    with jobs._own_gpus(every, tmp_path) as environment:
        assert environment == {"CUDA_VISIBLE_DEVICES": "0,3,5"}
    assert len(waited) == 1


def test_signals_are_handed_on_to_the_job(tmp_path):
    script = (
        "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: exit(7)); print(1, flush=True); time.sleep(30)"
    )
    with (tmp_path / "out").open("wb") as output:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        before = signal.getsignal(signal.SIGUSR1)
        assert jobs._answered([sys.executable, "-c", script], dict(os.environ), output) == (None, 7)
        assert signal.getsignal(signal.SIGUSR1) == before
