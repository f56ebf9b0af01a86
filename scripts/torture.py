"""Injects random faults into a run, and compares its result with that of an undisturbed run.

    python scripts/torture.py series --kills 100      one run, killed that often, with other faults in between
    python scripts/torture.py damage --trials 200     one damaged file per trial, then the same command again
    python scripts/torture.py output --trials 66      one fault of an output, terminal or helper per trial
    python scripts/torture.py inject                  NaN, an infinite gradient and a spike: what the guards do

The first three end with status 1 if anything differs, a message is missing, or a stack trace is printed. Each start of
the run is a process of its own that calls `cucafera.run.main`; a fork server shares the imports, which would take most
of the time. The last one runs the quickstart, with overrides if any are given.

The faults of a series, at random times:
    kill            SIGKILL
    kill in save    SIGKILL at a random write, flush, rename or removal of a checkpoint
    terminate       SIGTERM: it must save and end with 143
    full disk       writes of checkpoints, curves and history fail for some saves; it must continue; then SIGKILL
    damage          a bit flipped or a file truncated between two starts: the newest checkpoint, its marker, or a shard

The faults of the trials of `output`, each in a run of its own, which must end by itself as if nothing had happened, or
stop with a checkpoint from which the same command continues:
    head            stdout and stderr are a pipe, whose reader leaves after some lines
    closed pipe     a pipe without a reader, for stdout, stderr or both
    /dev/full       stdout, stderr or both can never be written
    >&-             stdout, stderr or both are closed at the start
    tee, Ctrl-C     the reader of the pipe leaves, and SIGINT is sent
    terminal        the terminal is closed, and so SIGHUP is sent
    nohup           the same with SIGHUP ignored
    worker          SIGKILL to a data loader worker
    no thread       no thread can be started
    no memory       the copies for some saves do not fit the memory
    I/O error       writes of curves, history and run.log fail for a time
"""

import argparse
import contextlib
import errno
import json
import math
import multiprocessing
import os
import random
import select
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from cucafera.quantities import number_of

PRELOADED = [
    "cucafera.run",
    "cucafera.data.packed",
    "cucafera.data.conversations",
    "cucafera.runs.report",
    "cucafera.training.trainer",
    "cucafera.training.module",
]
SETTINGS = [
    "trainer=cpu",
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=32",
    "batch_tokens=128",
    "schedule.warmup_steps=2",
    "data.processes=1",
    "data.prepared_dir=prepared",
    "data.validation_windows=8",
    "callbacks.prompts=[La mar]",
    "callbacks.sampling.max_new_tokens=4",
]
TOKENS_OF_STEP = 128
VARYING_METRICS = ("training_seconds", "tokens_per_second", "data_wait", "peak_memory_gib", "name", "crc32")
VARYING_CURVES = ("speed/", "memory/")
KILLS = ("kill", "kill in save")
LONGEST_START_SECONDS = 120
LONGEST_TRIAL_SECONDS = 120
TERMINALS = ("terminal", "nohup")
PIPES = ("head", "closed pipe", "tee, Ctrl-C")
EXIT_CODES = {
    "head": 0,
    "closed pipe": 0,
    "/dev/full": 0,
    ">&-": 0,
    "tee, Ctrl-C": 130,
    "terminal": 129,
    "nohup": 0,
    "worker": 1,
    "no thread": 0,
    "no memory": 0,
    "I/O error": 0,
}
"""Faults of outputs and helpers, with the exit code of a run that they stop."""


class Ended(NamedTuple):
    """The exit status of a start of the run, negative for a signal, and its output."""

    status: int
    output: str


class Fault(NamedTuple):
    """The fault of one start.

    Attributes:
        name: See the list above.
        after_seconds: Seconds from the first step to the signal.
        operation: Number of the file operation at which the process is killed.
        saves: First and last save during which the disk is full, or memory.
        lines: Lines that the reader of the output takes.
        outputs: The descriptors that are affected.
        workers: Number of data loader workers.
    """

    name: str
    after_seconds: float = 0.0
    operation: int = 0
    saves: tuple[int, int] = (0, 0)
    lines: int = 0
    outputs: tuple[int, ...] = (1, 2)
    workers: int = 0


def start_run(arguments: list[str], folder: str, output: str | Connection, fault: Fault) -> None:
    """Run cucafera in this process, with a fault."""
    os.chdir(folder)
    if fault.name in TERMINALS:
        os.setsid()  # the terminal that is opened next is that of this session
    mode = os.O_RDWR if fault.name in TERMINALS else os.O_WRONLY | os.O_CREAT
    descriptor = os.open(output, mode) if isinstance(output, str) else os.dup(output.fileno())
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(descriptor if number in fault.outputs else null, number)
    os.close(descriptor)
    os.close(null)
    # New objects, since those of the fork server know whether its files can be sought in.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    if fault.name == ">&-":
        for number in fault.outputs:
            os.close(number)
            setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if fault.name == "nohup":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)  # a model this small is slower with several threads
    if fault.name == "kill in save":
        kill_at_operation(fault.operation)
    if fault.name == "full disk":
        fill_disk(*fault.saves)
    if fault.name in FAILURES:
        FAILURES[fault.name](fault)
    from cucafera.run import main

    sys.argv = ["cucafera", *arguments]
    main()
    sys.stdout.flush()


def refuse_threads(fault: Fault) -> None:
    """Let no thread be started in this process."""

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refused  # type: ignore[method-assign]


def refuse_memory(fault: Fault) -> None:
    """Let the copies for some saves fail."""
    from cucafera.training import checkpoint_writer

    copied, saves = checkpoint_writer._copied, 0

    def failing(state: Any, copies: Any, path: str = "") -> Any:
        nonlocal saves
        saves += not path
        if fault.saves[0] <= saves <= fault.saves[1] and path:
            raise MemoryError
        return copied(state, copies, path)

    checkpoint_writer._copied = failing


def fail_writes(fault: Fault) -> None:
    """For some steps before the last, let writes of the log, the curves and the history fail."""
    from cucafera.output import RunLog
    from cucafera.runs import history
    from cucafera.training import events

    append, emit, writes = events.append, RunLog.flush, 0
    first = 2 + int(20 * fault.after_seconds)  # the start is in the history: a start that cannot be is refused

    def fail() -> None:
        if first <= writes < first + 8:
            raise OSError(errno.EIO, "Input/output error")

    def failing(path: Path, content: bytes) -> None:
        nonlocal writes
        writes += 1
        fail()
        append(path, content)

    def failing_flush(log: RunLog) -> None:
        fail()
        emit(log)

    events.FLUSH_SECONDS = 0
    events.append = history.append = failing  # type: ignore[assignment]
    RunLog.flush = failing_flush  # type: ignore[method-assign]


FAILURES = {"no thread": refuse_threads, "no memory": refuse_memory, "I/O error": fail_writes}


def kill_at_operation(number: int) -> None:
    """Kill this process at the n-th file operation of its saves of checkpoints."""
    from cucafera.runs import checkpoints
    from cucafera.training.checkpoint_writer import CheckpointWriter

    left = number
    saving = False

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal left
            left -= saving
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)

        return call

    def save(function: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal saving
            saving = True
            try:
                return function(*arguments, **settings)
            finally:
                saving = False

        return call

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoints._HashedFile.write = counted(checkpoints._HashedFile.write)  # type: ignore[method-assign]
    CheckpointWriter._write = save(CheckpointWriter._write)  # type: ignore[method-assign]


def fill_disk(first: int, last: int) -> None:
    """From the first to the last of these saves, let every flush to disk fail with ENOSPC."""
    from cucafera.training.callbacks.checkpoints import Checkpoints

    saves = 0
    fsync, save = os.fsync, Checkpoints._save

    def full_fsync(descriptor: int) -> None:
        if first <= saves <= last:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    def counted(checkpoints: Checkpoints, *arguments: Any) -> None:
        nonlocal saves
        checkpoints.writer.finish()
        saves += 1
        save(checkpoints, *arguments)

    os.fsync = full_fsync
    Checkpoints._save = counted  # type: ignore[method-assign]


class Bench:
    """Starts a run in a folder, again and again.

    Args:
        folder: The folder that contains outputs/.
        overrides: The command line.
    """

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder = folder
        self.overrides = overrides
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(self, name: str, fault: Fault) -> Ended:
        """Start the run of a name with a fault, and wait until it ends."""
        output = self.folder / "output.txt"
        output.unlink(missing_ok=True)
        arguments = [*self.overrides, f"name={name}"]
        process = self.context.Process(target=start_run, args=(arguments, str(self.folder), str(output), fault))
        process.start()
        if fault.name in ("kill", "terminate", "full disk") and self._trains(process, output):
            process.join(fault.after_seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGTERM if fault.name == "terminate" else signal.SIGKILL)
        process.join(600)
        assert process.exitcode is not None, "the run hangs"
        return Ended(process.exitcode, output.read_text(errors="replace"))

    def start_with_output(self, name: str, fault: Fault) -> int | None:
        """Start the run of a name with a fault of its output or helpers; return its exit status, None if it hangs."""
        run, arguments = self.folder / "outputs" / name, [*self.overrides, f"name={name}"]
        ours, theirs = -1, -1
        output: str | Connection = str(self.folder / "output.txt")
        if fault.name in TERMINALS:
            ours, theirs = os.openpty()
            output = os.ttyname(theirs)
        elif fault.name in PIPES:
            ours, theirs = os.pipe()
            output = Connection(os.dup(theirs), readable=False)
        elif fault.name == "/dev/full":
            output = fault.name
        if fault.workers:
            arguments.append(f"trainer.num_workers={fault.workers}")
        process = self.context.Process(target=start_run, args=(arguments, str(self.folder), output, fault))
        process.start()
        if isinstance(output, Connection):
            output.close()
            os.close(theirs)
            theirs = -1
        lines, strike, has_struck, deadline = 0, math.inf, False, time.monotonic() + LONGEST_TRIAL_SECONDS
        while process.is_alive() and time.monotonic() < deadline:
            if strike == math.inf and (run / "run.log").exists() and "tokens/s" in (run / "run.log").read_text():
                strike = time.monotonic() + fault.after_seconds
            if theirs >= 0 and strike < math.inf:
                os.close(theirs)  # the run has opened the terminal
                theirs = -1
            if ours >= 0 and select.select([ours], [], [], 0.01)[0]:
                with contextlib.suppress(OSError):  # the run has ended
                    lines += os.read(ours, 1 << 16).count(b"\n")
            process.join(0.01)
            leaves = lines >= fault.lines if fault.name == "head" else time.monotonic() > strike
            if ours >= 0 and (leaves or fault.name == "closed pipe"):
                os.close(ours)
                ours = -1
            if fault.name in ("tee, Ctrl-C", "worker") and time.monotonic() > strike and not has_struck:
                has_struck = True  # a second SIGINT would end it without saving
                self._strike(process, fault)
        for descriptor in {ours, theirs} - {-1}:
            os.close(descriptor)
        if process.is_alive():
            process.kill()
            return None
        return process.exitcode

    def _strike(self, process: Any, fault: Fault) -> None:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if fault.name == "tee, Ctrl-C":
                os.kill(process.pid, signal.SIGINT)
                return
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children:
                os.kill(int(children[-1]), signal.SIGKILL)

    def _trains(self, process: Any, output: Path) -> bool:
        """Wait until the first step is printed. Return False if the run ended before."""
        deadline = time.monotonic() + LONGEST_START_SECONDS
        while process.is_alive() and time.monotonic() < deadline:
            if output.exists() and "\nstep" in "\n" + output.read_text(errors="replace"):
                return True
            process.join(0.02)
        return False


def damage(path: Path, rng: random.Random) -> str:
    """Flip a bit of a file, or truncate it. Return what was done."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        position = rng.randrange(len(content))
        content[position] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        return f"a bit of byte {position} flipped"
    length = rng.randrange(len(content))
    path.write_bytes(content[:length])
    return f"truncated to {number_of(length, 'byte')}"


def check(ended: Ended, expected: set[int], what: str) -> None:
    """Exit if a start of the run ended with another status than expected, or with a stack trace."""
    if "Traceback" in ended.output or ended.status not in expected:
        sys.exit(f"{what}: status {ended.status}, allowed {sorted(expected)}; it printed:\n{ended.output}")


def differences(left: Path, right: Path) -> list[str]:
    """Return what differs between two run folders: weights, moments, metrics or curves."""
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tb_logging

    from cucafera.runs.checkpoints import read_checkpoint
    from cucafera.runs.folder import RunFolder

    tb_logging.get_logger().setLevel("ERROR")  # it warns about each file that continues after a kill
    found = []
    states = [read_checkpoint(RunFolder(path).checkpoints.marked()[-1]) for path in (left, right)]
    for part in ("state_dict", "optimizer_states", "random_state", "steps_done"):
        flat = [dict(flattened(state[part])) for state in states]
        if flat[0].keys() != flat[1].keys():
            found.append(f"{part} has other entries")
            continue
        for key, value in flat[0].items():
            same = torch.equal(value, flat[1][key]) if isinstance(value, torch.Tensor) else value == flat[1][key]
            if not same:
                found.append(f"{part}{key} differs")
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (left, right)]
    found += [
        f"metrics.json: {key} is {value} and {metrics[1][key]}"
        for key, value in metrics[0].items()
        if key not in VARYING_METRICS and value != metrics[1][key]
    ]
    curves = []
    for path in (left, right):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(VARYING_CURVES)]
        curves.append({tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags})
    for tag, points in curves[0].items():
        if points != curves[1].get(tag):
            odd = sorted(set(points) ^ set(curves[1].get(tag, [])))
            found.append(f"the curve {tag} differs, first at {odd[:3]}")
        steps = [step for step, _ in curves[1].get(tag, [])]
        if steps != sorted(set(steps)):
            found.append(f"the curve {tag} has steps lost or repeated")
    return found


def output_trials(folder: Path, trials: int, seed: int, kinds: list[str]) -> None:
    """Start a run of its own for each trial, with a fault of its outputs or helpers, and resume it if it stopped."""
    rng = random.Random(seed)
    steps = 80
    bench = Bench(
        folder,
        [
            *SETTINGS,
            f"budget_tokens={steps * TOKENS_OF_STEP}",
            "callbacks.log_every_steps=2",
            "callbacks.validate_every_steps=40",
            "callbacks.checkpoint_every_steps=20",
        ],
    )
    check(bench.start("undisturbed", Fault("none")), {0}, "the undisturbed run")
    started = time.monotonic()
    outcomes = {kind: Counter[str]() for kind in kinds}
    for number in range(trials):
        kind = kinds[number % len(kinds)]
        fault = Fault(
            kind,
            after_seconds=rng.uniform(0, 0.8),
            saves=(first := rng.randint(1, 3), first + rng.randint(0, 2)),
            lines=rng.randint(0, 40),
            outputs=rng.choice([(1,), (2,), (1, 2)]) if kind in ("closed pipe", "/dev/full", ">&-") else (1, 2),
            workers=rng.randint(1, 2) if kind == "worker" else rng.choice([0, 0, 1]),
        )
        name = f"trial-{number}"
        status = bench.start_with_output(name, fault)
        outcome = "ended by itself"
        if status is None:
            outcome = "hanging"
        elif status not in {0, EXIT_CODES[kind]}:
            outcome = "lost"
        elif status:
            outcome = "stopped, resumed"
            stopped = json.loads((bench.folder / "outputs" / name / "history.jsonl").read_text().splitlines()[-1])
            if stopped["event"] != "stopped" or stopped["saved_step"] != stopped["step"]:
                outcome = "lost"
            check(bench.start(name, Fault("none")), {0}, f"{name}, {fault}")
        found: list[str] = []
        if outcome not in ("hanging", "lost"):
            found = differences(folder / "outputs" / "undisturbed", folder / "outputs" / name)
            if found or "Traceback" in (folder / "outputs" / name / "run.log").read_text():
                outcome = "lost"
        outcomes[kind][outcome] += 1
        if outcome in ("hanging", "lost"):
            print("; ".join([f"{name}: {outcome}, status {status}, {fault}", *found[:3]]), flush=True)
        else:
            shutil.rmtree(folder / "outputs" / name)
    print(
        f"seed {seed}: {number_of(trials, 'run')} of {number_of(steps, 'step')}, {time.monotonic() - started:.0f} s\n"
    )
    columns = ("ended by itself", "stopped, resumed", "lost", "hanging")
    print(f"{'':14}" + "".join(f"{column:>18}" for column in ("trials", *columns)))
    for kind, counts in outcomes.items():
        print(f"{kind:14}{counts.total():>18}" + "".join(f"{counts[column]:>18}" for column in columns))
    failed = sum(counts["lost"] + counts["hanging"] for counts in outcomes.values())
    report([f"{number_of(failed, 'trial')}"] if failed else [])


def flattened(value: Any, key: str = "") -> Any:
    """Yield each leaf of nested dictionaries, lists and tuples with its path."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, list | tuple):
        value = list(enumerate(value))
    else:
        yield key, value
        return
    for name, inner in value:
        yield from flattened(inner, f"{key}/{name}")


def series(folder: Path, kills: int, steps: int, seed: int) -> None:
    """Inject faults into one run until it was killed that often, and compare it with an undisturbed run."""
    rng = random.Random(seed)
    bench = Bench(
        folder,
        [
            *SETTINGS,
            f"budget_tokens={steps * TOKENS_OF_STEP}",
            "callbacks.log_every_steps=1",
            "callbacks.validate_every_steps=50",
            "callbacks.checkpoint_every_steps=5",
            "callbacks.keep_every_steps=100",
        ],
    )
    started = time.monotonic()
    check(bench.start("undisturbed", Fault("none")), {0}, "the undisturbed run")
    print(f"undisturbed: {number_of(steps, 'step')} in {time.monotonic() - started:.0f} s", flush=True)
    counts: Counter[str] = Counter()
    run = folder / "outputs" / "disturbed"
    while sum(counts[name] for name in KILLS) < kills:
        name = rng.choices(["kill", "kill in save", "terminate", "full disk", "damage"], weights=[30, 35, 10, 10, 15])[
            0
        ]
        if name == "damage":
            counts[name] += damaged_between_starts(bench, run, rng)
            continue
        fault = Fault(
            name,
            after_seconds=rng.uniform(0, 0.8),
            operation=rng.randint(1, 200),
            saves=(first := rng.randint(1, 3), first + rng.randint(0, 2)),
        )
        ended = bench.start("disturbed", fault)
        allowed = {0, 143, -signal.SIGTERM} if name == "terminate" else {0, -signal.SIGKILL}
        check(ended, allowed, name)
        if ended.status == 0:
            sys.exit(f"the run is complete after {counts}: give it more --steps")
        if ended.status == 143 and "the same command" not in ended.output:
            sys.exit(f"after SIGTERM, the message does not say how to resume:\n{ended.output}")
        if name == "full disk" and "COULD NOT BE WRITTEN" not in ended.output:
            continue  # it was killed before a save met the full disk
        counts[name] += 1
    ended = bench.start("disturbed", Fault("none"))
    check(ended, {0}, "the last start")
    found = differences(folder / "outputs" / "undisturbed", run)
    print(
        f"seed {seed}: {sum(counts.values())} faults in one run of {number_of(steps, 'step')}, "
        f"{time.monotonic() - started:.0f} s"
    )
    for name, count in sorted(counts.items()):
        print(f"  {name:14}{count:5}")
    report(found)


def damaged_between_starts(bench: Bench, run: Path, rng: random.Random) -> int:
    """Damage a file between two starts, and restore it if the run refuses. Return 1, or 0 if there was no file yet."""
    markers = sorted((run / "checkpoints").glob("step-*.json"))
    shards = sorted((bench.folder / "prepared").rglob("train/*.shard"))  # read, and so verified, at the first step
    if len(markers) < 2:
        return 0
    path = rng.choice([markers[-1].with_suffix(".ckpt"), markers[-1], rng.choice(shards)])
    content = path.read_bytes()
    damage(path, rng)
    ended = bench.start("disturbed", Fault("kill", after_seconds=0.1))
    check(ended, {2} if path in shards else {0, -signal.SIGKILL}, f"{path.name} was damaged")
    if path.stem not in ended.output or not ("damaged" in ended.output or "cannot be used" in ended.output):
        sys.exit(f"{path} was damaged, and no message says so:\n{ended.output}")
    if path in shards:
        path.write_bytes(content)
    return 1


def damage_trials(folder: Path, trials: int, seed: int) -> None:
    """Damage one file of a half-finished run and start it again, once per trial."""
    rng = random.Random(seed)
    settings = [*SETTINGS, "callbacks.checkpoint_every_steps=4", "callbacks.validate_every_steps=4"]
    half, full = f"budget_tokens={8 * TOKENS_OF_STEP}", f"budget_tokens={12 * TOKENS_OF_STEP}"
    settings.append("schedule.horizon_steps=12")
    original = folder / "original"
    original.mkdir()
    check(Bench(original, [*settings, half]).start("run", Fault("none")), {0}, "the first half")
    undisturbed = folder / "undisturbed"
    shutil.copytree(original, undisturbed)
    check(Bench(undisturbed, [*settings, full]).start("run", Fault("none")), {0}, "the second half")
    newest = max((original / "outputs/run/checkpoints").glob("step-*.json"))
    files = [newest, newest.with_suffix(".ckpt"), *(p for p in (original / "prepared").rglob("*") if p.is_file())]
    files = [path for path in files if path.suffix != ".lock"]
    outcomes: Counter[tuple[str, str]] = Counter()
    for number in range(trials):
        path = files[number % len(files)].relative_to(original)
        trial = folder / "trial"
        shutil.copytree(original, trial)
        done = damage(trial / path, rng)
        ended = Bench(trial, [*settings, full]).start("run", Fault("none"))
        check(ended, {0, 2}, f"{path} ({done})")
        if path.name not in ended.output and path.stem not in ended.output:
            sys.exit(f"{path} ({done}): not reported; status {ended.status}:\n{ended.output}")
        if ended.status == 0 and (found := differences(undisturbed / "outputs/run", trial / "outputs/run")):
            sys.exit(f"{path} ({done}): a wrong result: {found}")
        kind = "checkpoint" if path.suffix == ".ckpt" else path.name
        outcomes[kind, "refused" if ended.status == 2 else "fallback, same result"] += 1
        shutil.rmtree(trial)
    print(f"seed {seed}: {trials} damaged files, all reported")
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"  {kind:20}{outcome:26}{count:5}")


def inject(overrides: list[str]) -> None:
    """Train with three faulty batches."""
    import math

    from torch import Tensor

    from cucafera.data.windows import Batch, TrainingSteps
    from cucafera.model.transformer import Decoder
    from cucafera.run import main

    item, forward = TrainingSteps.__getitem__, Decoder.forward
    broken = {59: "nan", 119: "inf", 179: "spike"}  # numbers of batches; the first token id marks them for the model
    first_id = 100

    def item_with_mark(steps: TrainingSteps, step: int) -> Batch:
        batch = item(steps, step)
        if steps.batch_at(step) in broken:
            batch.input_ids.fill_(first_id + steps.batch_at(step))
        return batch

    def forward_that_breaks(model: Decoder, input_ids: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        result = forward(model, input_ids, *arguments, **settings)
        what = broken.get(int(input_ids[0, 0]) - first_id) if bool((input_ids == input_ids[0, 0]).all()) else None
        if what == "inf":
            result.register_hook(lambda gradient: gradient * math.inf)
        return result * {"nan": math.nan, "spike": 2.0}.get(what or "", 1.0)

    TrainingSteps.__getitem__ = item_with_mark  # type: ignore[method-assign]
    Decoder.forward = forward_that_breaks  # type: ignore[method-assign]
    sys.argv = [sys.argv[0], "name=injected", "resume=overwrite", *overrides]
    main()


def report(found: list[str]) -> None:
    """Print whether the two runs are equal, and exit with status 1 if not."""
    if found:
        sys.exit("DIFFERENT:\n" + "\n".join(f"  {line}" for line in found[:20]))
    print("The result is bit-equal to the undisturbed run: weights, moments, random state, metrics, curves.")


def main() -> None:
    """Parse the command line and run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("series", help="one run with many faults")
    one.add_argument("--kills", type=int, default=100)
    one.add_argument("--steps", type=int, help="of the run; default: 60 per kill")
    two = commands.add_parser("damage", help="one damaged file per trial")
    two.add_argument("--trials", type=int, default=200)
    outputs = commands.add_parser("output", help="one fault of an output, terminal or helper per trial")
    outputs.add_argument("--trials", type=int, default=66)
    outputs.add_argument("--kind", action="append", choices=EXIT_CODES, help="only this fault; may be repeated")
    three = commands.add_parser("inject", help="what the guards do")
    three.add_argument(
        "overrides", nargs="*", help="overrides of the quickstart, such as callbacks.guards.loss_spike=rollback"
    )
    for command in (one, two, outputs):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--folder", type=Path, default=Path("outputs/torture"), help="emptied first")
    arguments = parser.parse_args()
    if arguments.command == "inject":
        return inject(arguments.overrides)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    folder = arguments.folder.resolve()
    if arguments.command == "series":
        series(folder, arguments.kills, arguments.steps or 60 * arguments.kills, arguments.seed)
    elif arguments.command == "output":
        output_trials(folder, arguments.trials, arguments.seed, arguments.kind or list(EXIT_CODES))
    else:
        damage_trials(folder, arguments.trials, arguments.seed)
    return None


if __name__ == "__main__":
    main()
