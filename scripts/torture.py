"""Injects random faults into a run, and compares its result with that of an undisturbed run.

    python scripts/torture.py series --kills 100      one run, killed that often, with other faults in between
    python scripts/torture.py damage --trials 200     one damaged file per trial, then the same command again
    python scripts/torture.py inject                  NaN, an infinite gradient and a spike: what the guards do

The first two end with status 1 if anything differs, a message is missing, or a stack trace is printed. Each start of
the run is a process of its own that calls `cucafera.run.main`; a fork server shares the imports, which would take most
of the time. The last one runs the quickstart, with overrides if any are given.

The faults of a series, at random times:
    kill            SIGKILL
    kill in save    SIGKILL at a random write, flush, rename or removal of a checkpoint
    terminate       SIGTERM: it must save and end with 143
    full disk       writes of checkpoints, curves and history fail for some saves; it must continue; then SIGKILL
    damage          a bit flipped or a file truncated between two starts: the newest checkpoint, its marker, or a shard
"""

import argparse
import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

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
VARYING_METRICS = ("training_seconds", "tokens_per_second", "data_wait", "peak_memory_gib", "name")
VARYING_CURVES = ("speed/", "memory/", "hp/tokens_per_second")
KILLS = ("kill", "kill in save")
LONGEST_START_SECONDS = 120


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
        saves: First and last save during which the disk is full.
    """

    name: str
    after_seconds: float = 0.0
    operation: int = 0
    saves: tuple[int, int] = (0, 0)


def start_run(arguments: list[str], folder: str, output: str, fault: Fault) -> None:
    """Run cucafera in this process, with a fault."""
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)  # a model this small is slower with several threads
    if fault.name == "kill in save":
        kill_at_operation(fault.operation)
    if fault.name == "full disk":
        fill_disk(*fault.saves)
    from cucafera.run import main

    sys.argv = ["cucafera", *arguments]
    main()
    sys.stdout.flush()


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
    return f"truncated to {length} bytes"


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
    print(f"undisturbed: {steps} steps in {time.monotonic() - started:.0f} s", flush=True)
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
    print(f"seed {seed}: {sum(counts.values())} faults in one run of {steps} steps, {time.monotonic() - started:.0f} s")
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
    three = commands.add_parser("inject", help="what the guards do")
    three.add_argument(
        "overrides", nargs="*", help="overrides of the quickstart, such as callbacks.guards.loss_spike=rollback"
    )
    for command in (one, two):
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
    else:
        damage_trials(folder, arguments.trials, arguments.seed)
    return None


if __name__ == "__main__":
    main()
