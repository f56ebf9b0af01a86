"""Runs as processes: kills, signals, several devices, the installed package."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cucafera.config.registry import OPTIMIZERS
from cucafera.runs.checkpoints import read_checkpoint
from cucafera.runs.folder import RunFolder
from tests.support import (
    Command,
    assert_close,
    assert_equal,
    assert_same_curve,
    run_command,
    scalars,
    wait_for,
    weights,
    write_corpus,
)

LONG = ("budget_tokens=51_200", "callbacks.checkpoint_every_steps=20", "callbacks.validate_every_steps=40")


def finished_run(tmp_path_factory, name: str, *overrides: str) -> Path:
    """The folder of a run that nothing has happened to."""
    folder = tmp_path_factory.mktemp(name)
    write_corpus(folder / "corpus.jsonl", documents=80)
    code, output = Command(folder / "corpus.jsonl", folder).run(*overrides, f"name={name}")
    assert code == 0, output
    return folder / "outputs" / name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of the long run, which nothing happens to."""
    return finished_run(tmp_path_factory, "undisturbed", *LONG)


def test_a_killed_run_resumes_and_ends_bit_equal_to_an_undisturbed_one(command, tmp_path, undisturbed):
    killed = tmp_path / "outputs" / "killed"
    for step in (20, 100):
        process = command.start(*LONG, "name=killed")
        wait_for(killed / "checkpoints" / f"step-{step:08d}.json", process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (killed / "report.md").exists()
    code, output = command.run(*LONG, "name=killed")
    assert code == 0, output
    assert "resuming after step" in output
    assert_equal(weights(undisturbed), weights(killed))
    for tag in ("loss/train", "loss/val", "loss/val_by_tokens", "per_layer/activation_rms/01"):
        assert scalars(undisturbed, tag) == scalars(killed, tag)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_resumes(command, tmp_path, number, undisturbed):
    process = command.start(*LONG, "name=stopped")
    wait_for(tmp_path / "outputs" / "stopped" / "checkpoints" / "step-00000020.json", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Run the same command again to resume" in output
    assert "Traceback" not in output
    assert command.run(*LONG, "name=stopped")[0] == 0
    assert_equal(weights(undisturbed), weights(tmp_path / "outputs" / "stopped"))


ON_TERMINAL = """
import os, sys
os.setsid()
terminal = os.open(sys.argv.pop(1), os.O_RDWR)  # becomes that of the session
for number in range(3):
    os.dup2(terminal, number)
os.close(terminal)
from cucafera.run import main
main()
"""


def test_a_run_whose_terminal_is_closed_saves_and_stops(command, tmp_path):
    (tmp_path / "on_terminal.py").write_text(ON_TERMINAL)
    ours, theirs = os.openpty()
    process = command.start(*LONG, "budget_tokens=512_000", "name=run", program=["on_terminal.py", os.ttyname(theirs)])
    wait_for(tmp_path / "outputs" / "run" / "checkpoints" / "step-00000020.json", process)
    os.close(theirs)
    os.close(ours)
    process.communicate(timeout=60)
    assert process.returncode == 129
    log = (tmp_path / "outputs" / "run" / "run.log").read_text()
    assert "Stopped by SIGHUP after step" in log and "checkpoint saved" in log and "Traceback" not in log


ELASTIC = ("schedule.horizon_steps=12", "trainer.micro_batch_windows=2", "callbacks.validate_every_steps=3")
TWO_DEVICES = ("trainer.accelerator=cpu", "trainer.devices=2")


@pytest.fixture(scope="module", params=OPTIMIZERS.names())
def optimizer(request) -> str:
    """Every registered optimizer."""
    return f"optimizer={request.param}"


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, optimizer) -> Path:
    """The folder of the small run, on one device."""
    return finished_run(tmp_path_factory, "one", optimizer, *ELASTIC)


def assert_same_run(one: Path, other: Path) -> None:
    """The same curves, texts and weights, and checkpoints of the same form."""
    for tag in ("loss/train", "train/gradient_norm", "loss/val", "bpb/val", "val/accuracy"):
        assert_same_curve(one, other, tag)
    for what in ("per_layer/gradient_norm", "per_layer/activation_rms"):
        for layer in ("embedding", "01"):
            assert_same_curve(one, other, f"{what}/{layer}")
    assert_close(weights(one), weights(other))
    samples = [json.loads((run / "metrics.json").read_text())["samples"] for run in (one, other)]
    assert samples[0] == samples[1]
    states = [read_checkpoint(RunFolder(run).checkpoints.marked()[-1])["optimizer_states"][0] for run in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    moments = [
        {f"{index}.{name}": value for index, values in state["state"].items() for name, value in values.items()}
        for state in states
    ]
    assert_close(moments[0], moments[1])


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_devices(command, tmp_path, one_device, optimizer):
    moved = tmp_path / "outputs" / "moved"
    starts = ((), ("trainer=fsdp", *TWO_DEVICES), ("trainer=ddp", *TWO_DEVICES), ())
    for start, budget in zip(starts, (768, 1536, 2304, 3072), strict=True):
        code, output = command.run("name=moved", *start, f"budget_tokens={budget}", optimizer, *ELASTIC)
        assert code == 0, output
        assert (f"{start[0].removeprefix('trainer=')}: each has" if start else "Device  CPU") in output
    assert_same_run(one_device, moved)
    history = [json.loads(line) for line in (moved / "history.jsonl").read_text().splitlines()]
    starts = [line for line in history if "hardware" in line]
    assert [start["hardware"]["devices"] for start in starts] == [1, 2, 2, 1]
    assert starts[1]["changed"]["trainer.devices"] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon"], indirect=True)  # which trains the embedding by AdamW
def test_torchrun_starts_a_sharded_run_that_equals_the_run_of_one_device(command, tmp_path, one_device, optimizer):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cucafera.run")
    memory = "trainer.activation_checkpointing=true"
    process = command.start("name=two", "trainer=fsdp", memory, optimizer, *TWO_DEVICES, *ELASTIC, program=torchrun)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert output.count("Trained on        3,072 tokens") == 1
    assert_same_run(one_device, tmp_path / "outputs" / "two")


INJECTION = """
import sys
from cucafera.data.windows import TrainingSteps
from cucafera.model.transformer import Decoder

item, forward = TrainingSteps.__getitem__, Decoder.forward

def poisoned_item(steps, step):
    batch = item(steps, step)
    if steps.batch_at(step) == 5 and steps.rank == steps.config.windows_per_step // steps.share - 1:
        batch.input_ids.fill_(9)  # on the last device alone
    return batch

def poisoned_forward(model, input_ids, *arguments, **settings):
    result = forward(model, input_ids, *arguments, **settings)
    return result * float("nan") if model.training and bool((input_ids == 9).all()) else result

TrainingSteps.__getitem__, Decoder.forward = poisoned_item, poisoned_forward
from cucafera.run import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "strategy"), [("skip", "fsdp"), ("rollback", "ddp")])
def test_all_devices_agree_when_one_of_them_has_a_nonfinite_value(command, tmp_path, policy, strategy):
    (tmp_path / "injected.py").write_text(INJECTION)
    for name, devices in (("one", 1), ("two", 2)):
        process = command.start(
            f"name={name}", f"trainer.devices={devices}", f"trainer.strategy={strategy}",
            f"callbacks.guards.non_finite={policy}", "callbacks.log_every_steps=2", program=["injected.py"],
        )  # fmt: skip
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0, output
        assert ("rolling back to step 4, skipping batch 5" if policy == "rollback" else "was not applied") in output
    one, two = tmp_path / "outputs" / "one", tmp_path / "outputs" / "two"
    if policy == "skip":
        assert scalars(two, "train/skipped_updates")[-1] == (12, 1)
    else:
        with pytest.raises(KeyError):  # nothing was skipped
            scalars(two, "train/skipped_updates")
    assert_close(weights(one), weights(two))


DEATH = """
import os, signal
from cucafera.data.windows import TrainingSteps

item = TrainingSteps.__getitem__

def last_item(steps, step):
    if step == 6 and steps.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return item(steps, step)

TrainingSteps.__getitem__ = last_item
from cucafera.run import main
main()
"""


@pytest.mark.slow
def test_the_death_of_another_process_of_a_job_ends_it_in_one_line_with_the_last_step_saved(command, tmp_path):
    (tmp_path / "death.py").write_text(DEATH)
    process = command.start("name=two", "trainer.devices=2", program=["death.py"])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "Another process of this job has died" in output and "to resume after step 6." in output
    assert "Traceback" not in output
    code, output = command.run("name=two", "trainer.devices=2")
    assert code == 0 and "resuming after step 6" in output, output


SLOW_DISK = """
import time
from cucafera.config.registry import OPTIMIZERS
from cucafera.runs.checkpoints import CheckpointFolder

write = CheckpointFolder.write

def slow_write(folder, step, state, score):
    if step != 20:
        time.sleep(8)  # Lightning looks every five seconds whether a process of the job has failed
    write(folder, step, state, score)

CheckpointFolder.write = slow_write
"""


@pytest.mark.slow
def test_devices_stop_together_and_wait_for_a_slow_disk(command, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_DISK + "from cucafera.run import main\nmain()\n")
    process = command.start(*LONG, "name=two", "trainer.devices=2", program=["slow.py"])
    wait_for(tmp_path / "outputs" / "two" / "checkpoints" / "step-00000020.json", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "Stopped by SIGTERM" in output and "checkpoint saved" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_guards_that_stop_several_devices_wait_for_a_slow_disk(command, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_DISK + INJECTION)
    policy = ("callbacks.guards.non_finite=stop", "callbacks.log_every_steps=2")
    process = command.start("name=two", "trainer.devices=2", *policy, program=["slow.py"])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert output.count("found a non-finite update at step 6; none was applied") == 1
    history = (tmp_path / "outputs" / "two" / "history.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["saved_step"] == 4


def test_a_signal_to_every_process_of_a_job_is_handled_by_one(command, tmp_path):
    process = command.start(*LONG, "name=job", "trainer.num_workers=2", "budget_tokens=512_000", new_group=True)
    wait_for(tmp_path / "outputs" / "job" / "checkpoints" / "step-00000020.json", process)
    os.killpg(process.pid, signal.SIGUSR1)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "checkpoint saved. Run the same command again to resume" in output and "Traceback" not in output


def test_a_folder_that_cannot_be_created_is_refused(command, tmp_path):
    (tmp_path / "outputs").write_text("a file")
    code, output = command.run()
    assert code == 2, output
    assert "outputs" in output and "Traceback" not in output


def test_a_second_ctrl_c_ends_at_once_and_a_second_start_is_refused(command, tmp_path):
    run = tmp_path / "outputs" / "run"
    process = command.start(*LONG, "name=run")
    wait_for(run / "checkpoints" / "step-00000020.json", process)
    process.send_signal(signal.SIGSTOP)  # or it would be done before there is another
    code, refusal = command.run(*LONG, "name=run")
    assert code == 2
    assert f"outputs/run is in use by process {process.pid}" in refusal
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (130, 143), output
    assert "Stopped by" not in output
    assert (run / "lock").exists()
    code, output = command.run(*LONG, "name=run")
    assert code == 0, output
    assert f"is taken over from process {process.pid}" in output


def stub(path: Path, script: str) -> None:
    path.write_text("#!/bin/bash\n" + script)
    path.chmod(0o755)


@pytest.mark.slow
def test_a_preempted_slurm_job_is_requeued_and_completes(command, tmp_path, undisturbed):
    programs = tmp_path / "programs"
    programs.mkdir()
    stub(programs / "srun", f'echo $$ > {tmp_path}/pid; export SLURM_PROCID=0 SLURM_LOCALID=0; exec "${{@:2}}"\n')
    stub(programs / "scontrol", f'echo "$@" >> {tmp_path}/requeued\n')
    stub(programs / "python", f'exec {sys.executable} "$@"\n')
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "cucafera", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    script = Path(__file__).parents[1] / "scripts" / "slurm.sh"
    arguments = ["bash", script, *command.arguments, *LONG, "name=job"]

    def submit() -> subprocess.Popen[str]:
        return subprocess.Popen(
            arguments, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **job, "OMP_NUM_THREADS": "1", "PATH": f"{programs}:{os.environ['PATH']}"},
        )  # fmt: skip

    process = submit()
    wait_for(tmp_path / "outputs" / "job" / "checkpoints" / "step-00000020.json", process)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    process = submit()
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert_equal(weights(undisturbed), weights(tmp_path / "outputs" / "job"))


TORTURE = Path(__file__).parents[1] / "scripts" / "torture.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["series", "--kills", "4", "--seed", "3"], "The result is bit-equal to the undisturbed run"),
        (["damage", "--trials", "9"], "9 damaged files, all reported"),
        (["output", "--trials", "11"], "The result is bit-equal to the undisturbed run"),
    ],
)
def test_a_tortured_run_ends_as_if_nothing_had_happened(tmp_path, arguments, expected):
    result = run_command(TORTURE, *arguments, "--folder", tmp_path / "torture", timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert expected in result.stdout


def test_user_errors_end_with_code_2_and_no_stack_trace(command, tmp_path, monkeypatch):
    for overrides, message in [
        (["data.sources.files.path=nowhere/*.jsonl"], "nowhere"),
        (["data.sources.files.columns.text=body"], "body"),
        (["tokenizer.path=nowhere.json"], "nowhere.json"),
        (["init_from=nowhere"], "there is no such run folder or checkpoint"),
    ]:
        code, output = command.run(*overrides)
        assert code == 2, output
        assert message in output
        assert "Traceback" not in output
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides a GPU, if there is one
    code, output = command.run("trainer=a100")
    assert code == 2 and "Traceback" not in output, output


@pytest.mark.slow
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
