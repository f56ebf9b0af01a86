"""The jobs of a sweep, each in its own process."""

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
import torch

from cucafera.config.command_line import (
    check_command_line,
    command_line_problems,
    composed_config,
    default_config,
    parse_command_line,
    sweep_arguments,
    with_search_path,
)
from cucafera.config.compose import hydra_session
from cucafera.config.folders import folder_problem, job_folder_name, job_label, rounded
from cucafera.config.launch import start_sweep
from cucafera.config.quoting import quoted, readable
from cucafera.config.schema import Config
from cucafera.objectives import MetricSpec
from cucafera.run import job
from cucafera.runs.folder import RunFolder
from cucafera.sweeps import jobs
from cucafera.sweeps.jobs import JobRecord, SweepJob
from cucafera.sweeps.progress import PROGRESS_FILE, JobEvent
from cucafera.sweeps.summary import SweepSummaryCallback
from tests.support import assert_equal, wait_for, weights, write_metrics

HORIZON = "schedule.warmup_steps=0"

CRASH = """
import os, sys
if any("optimizer.lr=0.5" in argument for argument in sys.orig_argv) and "--multirun" not in sys.orig_argv:
    os._exit(77)
"""


def ended(folder: Path) -> dict[str, tuple[str, int | None]]:
    """The statuses of the jobs of a sweep, by their names."""
    found = {path.parent.name: JobRecord.read(path.parent) for path in folder.glob("*/job.json")}
    return {name: (job.status, job.exit_code) for name, job in found.items() if job}


@pytest.mark.slow
def test_a_sweep_keeps_finished_jobs_and_a_job_equals_the_run_alone(command, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    sweep = tmp_path / "outputs" / "files-sweep"
    overrides = ("--multirun", "optimizer.lr=1e9,0.5,2e-3", "budget_tokens=2048", HORIZON)
    code, output = command.run(*overrides)
    assert code == 1, output  # for the crash
    assert ended(sweep) == {
        "optimizer.lr=1000000000.0": ("diverged", 3),
        "optimizer.lr=0.5": ("crashed", 77),
        "optimizer.lr=0.002": ("finished", 0),
    }
    assert "Diverged: optimizer.lr=1000000000.0." in output and "Crashed" in output
    assert "Traceback" not in output
    assert command.run("name=alone", "optimizer.lr=2e-3", "budget_tokens=2048", HORIZON)[0] == 0
    assert_equal(weights(tmp_path / "outputs" / "alone"), weights(sweep / "optimizer.lr=0.002"))

    (tmp_path / "sitecustomize.py").unlink()
    code, output = command.run(*overrides)
    assert code == 0, output
    assert ended(sweep)["optimizer.lr=0.5"] == ("finished", 0)
    assert output.count("  before  ") == 2  # only the one that had crashed ran again
    assert (
        len((sweep / "optimizer.lr=0.002" / "history.jsonl").read_text().splitlines()) == 3
    )  # start, first checkpoint, end


@pytest.mark.slow
def test_a_killed_sweep_resumes_with_the_job_that_was_running(command, tmp_path):
    sweep = tmp_path / "outputs" / "files-sweep"
    first, second = RunFolder(sweep / "seed=1"), RunFolder(sweep / "seed=2")
    overrides = ("--multirun", "seed=1,2", "budget_tokens=25_600", "callbacks.checkpoint_every_steps=20")
    process = command.start(*overrides)
    wait_for(second.checkpoints.path / "step-00000020.json", process)
    history = first.history.read_text()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while second.lock.exists():  # the job ends, and saves, when its parent is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads(second.history.read_text().splitlines()[-1])["reason"] == "the sweep"
    code, output = command.run(*overrides)
    assert code == 0, output
    assert first.history.read_text() == history
    assert [json.loads(line)["event"] for line in second.history.read_text().splitlines()][-2:] == [
        "resumed",
        "completed",
    ]
    assert "mean and standard deviation of 2 seeds" in output


@pytest.mark.slow
def test_a_signal_stops_the_job_and_the_sweep(command, tmp_path):
    sweep = tmp_path / "outputs" / "files-sweep"
    process = command.start(
        "--multirun", "seed=1,2", "budget_tokens=51_200", "callbacks.checkpoint_every_steps=20", "trainer.devices=2"
    )
    wait_for(sweep / "seed=1" / "checkpoints" / "step-00000020.json", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Stopped by the sweep after step" in output and "checkpoint saved" in output and "Traceback" not in output
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
        ([signal.SIGHUP, signal.SIGHUP, signal.SIGTERM], 7),  # of a closed terminal: shell, system and systemd
        ([signal.SIGTERM, signal.SIGHUP], 7),
        ([signal.SIGINT, signal.SIGINT], -signal.SIGKILL),
        ([signal.SIGUSR2, signal.SIGINT, signal.SIGINT], -signal.SIGKILL),
    ],
)
def test_simultaneous_signals_let_a_job_save(tmp_path, signals, code):
    def send() -> None:
        while "ready" not in (tmp_path / "output").read_text():
            time.sleep(0.01)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    with (tmp_path / "output").open("wb") as output:
        thread = threading.Thread(target=send)
        thread.start()
        stopped = jobs._run_forwarding_signals([sys.executable, "-c", SAVES], dict(os.environ), output)
        thread.join()
    assert stopped == (signals[0], code)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])  # to all, as a terminal does; to the first alone
def test_jobs_side_by_side_are_saved_when_the_sweep_is_stopped_or_killed(command, tmp_path, number):
    sweep = tmp_path / "outputs" / "files-sweep"
    process = command.start(
        "--multirun", "hydra/launcher=parallel", "hydra.launcher.n_jobs=2", "seed=1,2", "budget_tokens=256_000",
        "callbacks.checkpoint_every_steps=20", "callbacks.keep_last=100", new_group=True,
    )  # fmt: skip
    folders = [RunFolder(sweep / f"seed={seed}") for seed in (1, 2)]
    for folder in folders:
        wait_for(folder.checkpoints.path / "step-00000020.json", process)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGKILL), output
    deadline = time.monotonic() + 30
    while any(folder.lock.exists() for folder in folders):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for folder in folders:
        assert json.loads(folder.history.read_text().splitlines()[-1])["event"] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["hydra/launcher=parallel", "hydra/launcher=submitit_local"])
def test_other_launchers_run_the_same_jobs(command, tmp_path, launcher):
    settings = {"parallel": "hydra.launcher.n_jobs=2", "submitit_local": "hydra.launcher.timeout_min=5"}
    code, output = command.run(
        "--multirun", launcher, settings[launcher.partition("=")[2]], "seed=1,2", "budget_tokens=1024", HORIZON
    )
    assert code == 0, output
    sweep = tmp_path / "outputs" / "files-sweep"
    assert ended(sweep) == {"seed=1": ("finished", 0), "seed=2": ("finished", 0)}
    assert "Validation bpb" in (sweep / "seed=1" / "job.out").read_text()
    assert "mean and standard deviation of 2 seeds" in output


@pytest.mark.slow
def test_optuna_minimizes_and_resumes_its_search(command, tmp_path):
    command.arguments.remove("optimizer.lr=3e-3")  # the search looks for it
    overrides = ("--multirun", "+experiment=search", "budget_tokens=1024", "name=found")
    fixed = ("schedule.warmup_steps=0", "optimizer.weight_decay=0.1", "callbacks.validate_every_steps=4")
    code, output = command.run(*overrides, *fixed, "hydra.sweeper.n_trials=2")
    assert code == 0, output
    sweep = tmp_path / "outputs" / "found"
    first = ended(sweep)
    assert [status for status, _ in first.values()] == ["finished"] * 2
    assert all(name.startswith("optimizer.lr=") for name in first)
    assert "best_params" in (sweep / "optimization_results.yaml").read_text()
    code, output = command.run(*overrides, *fixed, "hydra.sweeper.n_trials=1")
    assert code == 0, output
    assert first.items() < ended(sweep).items() and len(ended(sweep)) == 3


def test_a_refused_job_does_not_stop_the_others(command, tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    code, output = command.run("--multirun", "tokenizer.path=broken.json,null", "budget_tokens=1024", HORIZON)
    assert code == 2, output
    assert "    | broken.json is not a tokenizer.json" in output and "Traceback" not in output
    assert "Refused (see job.out in its folder): tokenizer.path=broken.json." in output
    assert "Sweep of 2 jobs in outputs/files-sweep" in output and "Validation bpb" not in output
    assert "Sweep: 2 of 2 done, 1 failed, best so far tokenizer.path=null (loss " in output
    assert "\r" not in output and "[HYDRA]" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("2/2")]
    assert line.split()[:2] == ["2/2", "tokenizer.path=null"] and line.endswith("finished")
    sweep = tmp_path / "outputs" / "files-sweep"
    assert ended(sweep) == {"tokenizer.path=broken.json": ("refused", 2), "tokenizer.path=null": ("finished", 0)}


def arguments_of(*overrides: str) -> list[str]:
    """The overrides with which Hydra composes a sweep."""
    with hydra_session():
        composition = check_command_line(overrides, multirun=True)
        assert composition.problems == []
        return sweep_arguments(composition.node, overrides)


def test_jobs_are_named_by_what_is_swept_and_the_command_line_outdoes_the_experiment():
    arguments = arguments_of("+experiment=lr_sweep", "model=tiny,small", "budget_tokens=3e6", "batch_tokens=1024")
    assert "hydra.job.config.override_dirname.exclude_keys=[experiment,budget_tokens,batch_tokens]" in arguments
    (rates,) = [text for text in arguments if text.startswith("optimizer.lr=")]
    assert rates.count(",") >= 5
    assert [
        text
        for text in arguments_of("+experiment=lr_sweep", "optimizer.lr=1e-3,2e-3")
        if text.startswith("optimizer.lr=")
    ] == ["optimizer.lr=1e-3,2e-3"]


def test_the_jobs_of_a_sweep_share_one_folder_whatever_is_swept():
    for swept in ("name=a,b", "+experiment=debug/one_batch,pretrain", "data.sources.embedded.weight=1,2"):
        assert "hydra.sweep.dir='outputs/quickstart-sweep'" in arguments_of(swept)
    (problem,) = command_line_problems(["seed=1,2", "run_dir=mine"], multirun=True)
    assert "run_dir is the folder of one run; that of a sweep is hydra.sweep.dir=..." in problem


def jobs_of(*overrides: str, config_dirs: tuple[str, ...] = ()) -> list[tuple[Path, Config]]:
    """The folder of each job of a sweep, and the configuration that its command composes; nothing is started."""
    commands: list[list[str]] = []

    def record(command, *rest):
        commands.append(command[3:])
        return None, 2

    given = parse_command_line(["--multirun", *overrides, *(f"--config-dir={folder}" for folder in config_dirs)])
    with pytest.MonkeyPatch.context() as patch, hydra_session():
        patch.setattr(jobs, "_run_forwarding_signals", record)
        composition = check_command_line(given.overrides, multirun=True)
        assert composition.problems == []
        patch.setattr(SweepSummaryCallback, "on_multirun_end", lambda *given, **more: None)
        start_sweep(sweep_arguments(composition.node, given.overrides), job)
    configs = [composed_config(parse_command_line(command).overrides) for command in commands]
    return [(Path(config.run_dir), config) for config in configs]


@pytest.mark.parametrize("by", ["--config-dir", "hydra.searchpath"])
def test_the_model_of_each_job_is_the_one_that_was_asked_for(by, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configuració d'aquí"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "petit.yaml").write_text("num_hidden_layers: 7\n")
    (folder / "experiment").mkdir()
    (folder / "experiment" / "meu.yaml").write_text("# @package _global_\nbudget_tokens: 8192\n")
    overrides = ["model=petit", "+experiment=meu", "seed=1,2", "schedule.warmup_steps=0"]
    if by == "--config-dir":
        found = jobs_of(*overrides, config_dirs=(str(folder),))
    else:
        found = jobs_of(*overrides, f"hydra.searchpath=[{quoted(f'file://{folder}')}]")
    assert [config.seed for _, config in found] == [1, 2]
    assert all(config.model.num_hidden_layers == 7 and config.budget_tokens == 8192 for _, config in found)


@pytest.mark.parametrize("flags", [["--config-name", "petit"], ["--config-path", "."], ["-cn=petit"], ["-cp", "."]])
def test_a_sweep_with_another_main_file_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as exited:
        parse_command_line(["--multirun", "seed=1,2", *flags])
    assert exited.value.code == 2 and "is not supported: a run starts from conf/config.yaml" in capsys.readouterr().err


def test_jobs_get_folders_of_their_own_whatever_the_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = [
        "outputs/t0/checkpoints/step-00000004.ckpt",
        "outputs/t0",
        "..",
        "/",
        "a_b",
        "a/b",
        "l'avi",
        "a." + "b" * 300,
    ]
    found = jobs_of("init_from=" + ",".join(values), "name=swept")
    assert [config.init_from for _, config in found] == values
    sweep = Path("outputs/swept-sweep")
    assert all(folder.parent == sweep and len(folder.name.encode()) <= 150 for folder, _ in found)
    assert len({folder for folder, _ in found}) == len(values)


def test_names_of_jobs_are_rounded_and_still_unique():
    def name(*overrides: str) -> str:
        return job_folder_name(["+experiment=search", *overrides], ["experiment"])

    one, other = "optimizer.lr=0.0021684759391728", "optimizer.lr=0.0021684759391729"
    assert name(one, "schedule.warmup_steps=20").startswith("optimizer.lr=0.002168,schedule.warmup_steps=20-")
    assert name(one) == name(one) != name(other)
    assert name("optimizer.lr=2.5e-4", "seed=123456") == "optimizer.lr=0.00025,seed=123456"
    assert name("optimizer.lr=1e9", "optimizer.betas=[0.9,0.95]").startswith("optimizer.betas=[0.9,0.95],optimizer.lr")
    assert name("optimizer.betas=[0.9123456,0.95]").startswith("optimizer.betas=[0.9123,0.95]-")
    assert job_label([one, "seed=3", "name=a"], ["name"]) == "optimizer.lr=0.002168  seed=3"
    assert rounded("v1.23456") == "v1.23456"


def test_texts_of_a_sweep_reach_the_job_as_they_were_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = jobs_of("callbacks.prompts=[El preu és 5\\${x}],[L'avi, 1e3]", "tokenizer.path=${name}", "name=2026_11")
    assert [config.callbacks.prompts for _, config in found] == [["El preu és 5${x}"], ["L'avi", "1e3"]]
    assert {(config.name, config.tokenizer.path) for _, config in found} == {("2026_11", "2026_11")}


def test_a_glob_sweeps_over_choices_of_other_folders_too(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tinier.yaml").write_text("num_hidden_layers: 1\n")
    overrides = with_search_path(["model=glob(tin*)"], [str(tmp_path)])
    assert "model=tinier,tiny" in arguments_of(*overrides)


def test_a_folder_around_or_within_another_run_is_refused(tmp_path):
    run_folder = tmp_path / "outputs" / "a"
    (run_folder / "checkpoints").mkdir(parents=True)
    (run_folder / "history.jsonl").touch()
    assert folder_problem(run_folder) is None and folder_problem(tmp_path / "outputs" / "b") is None
    for inner in (run_folder / "b", run_folder / "checkpoints", run_folder / "checkpoints" / "x"):
        assert "the folder of another run; choose another name=..." in folder_problem(inner)
        assert "the folder of another run" in folder_problem(inner, is_sweep=True)
    assert "holds other runs, such as" in folder_problem(tmp_path / "outputs")
    assert "holds other runs" in folder_problem(tmp_path)
    assert folder_problem(tmp_path / "outputs", is_sweep=True) is None
    assert "is the folder of another run" in folder_problem(run_folder, is_sweep=True)
    (tmp_path / "link").symlink_to(run_folder)
    assert "the folder of another run" in folder_problem(tmp_path / "link" / "b")
    assert run(composed_config([]), run_folder / "checkpoints") == math.inf
    assert not list((run_folder / "checkpoints").iterdir())


@pytest.mark.parametrize("is_sweep", [False, True])
def test_a_path_that_leads_to_no_folder_is_refused(tmp_path, is_sweep):
    (tmp_path / "file").touch()
    (tmp_path / "unmounted").symlink_to("/nowhere/disk")
    (tmp_path / "loop").symlink_to("loop")
    for name, problem in (("file", "is not a folder"), ("unmounted", "to /nowhere/disk, which"), ("loop", "a symlink")):
        for path in (tmp_path / name, tmp_path / name / "outputs" / "run"):
            assert problem in folder_problem(path, is_sweep)
            assert str(tmp_path / name) in folder_problem(path, is_sweep)


def test_a_job_that_ended_with_another_configuration_is_kept_and_reported(tmp_path, monkeypatch):
    sweep, tmp_path = tmp_path, tmp_path / "job"
    tmp_path.mkdir()
    started = []
    monkeypatch.setattr(jobs, "_run_forwarding_signals", lambda command, *rest: started.append(command) or (None, 2))
    config = composed_config(["optimizer.lr=1e-3"])
    job = ("finished", 0, ["optimizer.lr=1e-3"], jobs.identity_of(config))
    JobRecord(*job).write(tmp_path)
    write_metrics(tmp_path, [{"bpb": 2.5}])
    assert run(config, tmp_path) == 2.5
    assert run(composed_config(["optimizer.lr=1e-3", "max_time=01:00:00", "trainer.num_workers=2"]), tmp_path) == 2.5
    assert run(composed_config(["optimizer.lr=1e-3", "budget_tokens=3e6"]), tmp_path) == math.inf
    event = reported(sweep)
    assert event.status == "not run" and event.cost is None
    assert "holds a job with another configuration: choose another name=... for this sweep" in event.message
    assert JobRecord.read(tmp_path) == JobRecord(*job) and not started
    assert run(composed_config(["optimizer.lr=1e-3", "resume=overwrite"]), tmp_path) == math.inf
    assert len(started) == 1 and JobRecord.read(tmp_path).status == "refused"


def test_a_sweeper_gets_the_negated_metric_where_higher_is_better(tmp_path, monkeypatch):
    config = composed_config(["optimizer.lr=1e-3"])
    JobRecord("finished", 0, ["optimizer.lr=1e-3"], jobs.identity_of(config)).write(tmp_path)
    write_metrics(tmp_path, [{"accuracy": 0.5}, {"accuracy": 0.75}])
    accuracy = MetricSpec("accuracy", "accuracy", "of the pairs", "higher", ".2f")
    monkeypatch.setattr(jobs, "primary_metric", lambda config: accuracy)
    assert run(config, tmp_path) == -0.75
    assert jobs._status(0, config, tmp_path) == "finished"


def test_a_job_whose_results_were_edited_is_run_again(tmp_path, monkeypatch):
    sweep, tmp_path = tmp_path, tmp_path / "job"
    tmp_path.mkdir()
    started = []
    monkeypatch.setattr(jobs, "_run_forwarding_signals", lambda command, *rest: started.append(command) or (None, 2))
    config = composed_config(["optimizer.lr=1e-3"])
    for number, name in enumerate(("metrics.json", "job.json"), 1):
        JobRecord("finished", 0, ["optimizer.lr=1e-3"], jobs.identity_of(config)).write(tmp_path)
        write_metrics(tmp_path, [{"bpb": 2.5}])
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("1", "2"))
        assert run(config, tmp_path) == math.inf
        assert len(started) == number and f"{name} " in reported(sweep).message


@pytest.mark.parametrize(
    ("values", "status", "result"),
    [
        ([3.0, 1.0, 2.0], "finished", 2.0),  # the last value, although another was better
        ([3.0, 1.0, 3.5], "diverged", math.inf),  # worse than before training at the end
        ([3.0, 1.0, 3.0], "finished", 3.0),  # as an accuracy over few pairs may
        ([3.0, math.nan], "diverged", math.inf),
        ([math.nan, math.nan], "diverged", math.inf),
        ([3.0, 2.999], "finished", 2.999),
    ],
)
def test_a_job_is_judged_by_its_last_validation(tmp_path, monkeypatch, values, status, result):
    validations = [{"bpb": value, "loss": 9 - value} for value in values]
    write_metrics(tmp_path, validations)
    monkeypatch.setattr(jobs, "_run_forwarding_signals", lambda *arguments: (None, 0))
    assert run(composed_config(["optimizer.lr=1e-3"]), tmp_path) == result
    assert JobRecord.read(tmp_path).status == status


@pytest.mark.parametrize(
    ("code", "status", "starts"),
    [(2, "refused", 2), (3, "diverged", 1), (124, "stopped", 2), (130, "stopped", 2), (143, "stopped", 2),
     (1, "crashed", 2), (-9, "crashed", 2)],
)  # fmt: skip
def test_the_exit_code_of_a_job_is_its_status_and_only_a_result_is_kept(tmp_path, monkeypatch, code, status, starts):
    started = []
    monkeypatch.setattr(jobs, "_run_forwarding_signals", lambda *arguments: started.append(arguments) or (None, code))
    config = composed_config(["optimizer.lr=1e-3"])
    for _ in range(2):
        assert run(config, tmp_path) == math.inf
        assert (JobRecord.read(tmp_path).status, JobRecord.read(tmp_path).exit_code) == (status, code)
    assert len(started) == starts


def test_the_identity_of_a_job_is_what_decides_its_result():
    identity = jobs.identity_of(composed_config([]))
    for same in ("name=b", "trainer.num_workers=2", "max_time=1:00:00:00", "logger.tensorboard=false"):
        assert jobs.identity_of(composed_config([same])) == identity
    for other in ("seed=2", "optimizer.lr=1e-4", "budget_tokens=3e6", "data.sources.embedded.weight=2"):
        assert jobs.identity_of(composed_config([other])) != identity


def run(config: Config, folder: Path) -> float:
    place = {"folder": folder, "sweep": folder.parent, "launcher": "basic"}
    return jobs.run_job(config, SweepJob(0, "optimizer.lr=0.001", ["optimizer.lr=1e-3"], [], **place))


def reported(sweep: Path) -> JobEvent:
    """The last event of a sweep."""
    return JobEvent(**json.loads((sweep / PROGRESS_FILE).read_text().splitlines()[-1]))


def test_a_job_can_be_given_as_init_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=1", "a=2"):
        Path(name).mkdir()
    assert readable("init_from=a=1,a=2", multirun=True) == "init_from='a=1','a=2'"
    place = "outputs/lr_sweep/optimizer.lr=0.002,seed=1"
    assert readable(f"init_from={place}", multirun=False) == f"init_from='{place}'"
    assert composed_config([f"tokenizer.path={place}"]).tokenizer.path == place
    assert composed_config([f"tokenizer.path={quoted('it' + chr(39) + 's=a')}"]).tokenizer.path == "it's=a"


@pytest.mark.parametrize(
    ("named", "count", "gpus"),
    [
        *((none, 0, []) for none in ("", " ", "-1", "none", "NoDevFiles", "void", "-1,0")),
        (None, 2, ["0", "1"]), ("0, 3", 2, ["0", "3"]), ("GPU-6d0a,MIG-1f", 2, ["GPU-6d0a", "MIG-1f"]),
        ("2,-1,3", 1, ["2"]),
    ],
)  # fmt: skip
def test_only_gpus_that_cuda_shows_are_shared_among_jobs(monkeypatch, tmp_path, named, count, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert jobs._visible_gpus() == gpus
    with jobs._own_gpus(default_config(), tmp_path) as environment:
        assert environment == ({"CUDA_VISIBLE_DEVICES": gpus[0]} if gpus else {})


def test_a_job_waits_for_free_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: pytest.fail("there are enough"))
    configs = [composed_config([f"trainer.devices={count}", "batch_tokens=1024"]) for count in (1, 2, 4, "auto")]
    one, two, four, every = configs
    with jobs._own_gpus(two, tmp_path) as environment:
        assert environment == {"CUDA_VISIBLE_DEVICES": "0,3"}
        with jobs._own_gpus(one, tmp_path) as environment:
            assert environment == {"CUDA_VISIBLE_DEVICES": "5"}
    with jobs._own_gpus(four, tmp_path) as environment:
        assert environment == {}  # more than the machine has, which the job reports
    with jobs._own_gpus(composed_config(["trainer=cpu", "trainer.devices=2"]), tmp_path) as environment:
        assert environment == {}
    other = os.open(next(tmp_path.glob(".*-gpu-3.lock")), os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    waited = []

    def free_the_gpu(seconds: float) -> None:
        waited.append(seconds)
        assert len(waited) == 1  # or the two would wait for each other for ever
        with jobs._own_gpus(two, tmp_path) as meanwhile:  # a job that waits holds no GPU
            assert meanwhile == {"CUDA_VISIBLE_DEVICES": "0,5"}
        os.close(other)

    monkeypatch.setattr(jobs.time, "sleep", free_the_gpu)
    with jobs._own_gpus(every, tmp_path) as environment:
        assert environment == {"CUDA_VISIBLE_DEVICES": "0,3,5"}
    assert len(waited) == 1


def test_signals_are_forwarded_to_the_job(tmp_path):
    script = (
        "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: exit(7)); print(1, flush=True); time.sleep(30)"
    )
    with (tmp_path / "out").open("wb") as output:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        before = signal.getsignal(signal.SIGUSR1)
        assert jobs._run_forwarding_signals([sys.executable, "-c", script], dict(os.environ), output) == (None, 7)
        assert signal.getsignal(signal.SIGUSR1) == before
