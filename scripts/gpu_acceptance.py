"""Is this GPU training right, and how fast? One command for a machine that was rented for ten minutes.

    python scripts/gpu_acceptance.py                       everything, in 560 seconds
    python scripts/gpu_acceptance.py --out FOLDER          acceptance.json, acceptance.md and acceptance.log go there
    python scripts/gpu_acceptance.py --stage gradients     one stage; may be repeated
    python scripts/gpu_acceptance.py --small               the same small, as on a machine without a GPU

Each stage is a process of its own that has a share of the time; what an early one leaves is for the later ones. What
it found is written at once. A stage that fails, or is killed because its time is over, does not stop the others.

    environment    card, driver, versions, memory, and the rate that a large bf16 matrix product reaches
    gradients      of a compiled step at head dim 96, against fp32 on the CPU without the compiler, every parameter
    training       twelve steps of the 245M model, 524,288 tokens each, as `cucafera.run` takes them: speed, MFU, memory
    tests          those that need a GPU
    resume         the same run killed by SIGKILL after a checkpoint, and started again
    generation     the chat command, and how fast text is written
    checkpoint     what saving costs
    benchmark      speed beside compiled peers (benchmark_training.py), with document masking and without

Nothing is downloaded: the embedded corpus is enough. What is needed: the dependencies of pyproject.toml but `datasets`,
a C compiler for Triton, 15 GB of disk below --out; `transformers`, `litgpt` and `pytest` if they are there.
Without a GPU all of this runs small and in fp32, which shows that the script works and nothing about a GPU.

Ends with status 1 if a stage failed or was killed. A missed goal of speed is reported as "below goal": no failure.
acceptance.md can be pasted into scripts/PERFORMANCE.md.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a rented machine may have the sources only

from cucafera.data.files import write_text  # noqa: E402
from cucafera.training.process import let_threads_wait_briefly  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cucafera.config import Config
    from cucafera.data.windows import Batch
    from cucafera.model.transformer import Decoder

MFU_GOAL, PEER_GOAL = 0.48, 1.2
"""Of an H100's dense bf16 peak, attention counted over the whole window; and times the fastest compiled peer, with
document masking on."""
TOLERANCE = {"bf16": 0.05, "fp32": 1e-3}
"""Most norm of a gradient's difference over its norm, for each parameter."""
LEAST_COSINE = 0.998
STEPS, RESUMED_STEPS, CHECKPOINT_STEPS = 12, 8, 3
"""Of the training stage; of the run that is killed; between its checkpoints."""
STEADY_STEPS = (3, 4, 10, 11, 12)
"""Those of the training stage that neither compile nor are profiled."""
LOSS_TOLERANCE = 0.02
"""Most relative difference of the loss of a run that was killed and resumed from one that was not."""
START_SECONDS = 15
"""That a stage takes to import what it needs, whatever its share of the work."""
GRACE_SECONDS = 3
"""From the request to end until a stage is killed."""
PACKAGES = ("torch", "triton", "lightning", "hydra-core", "tensorboard", "transformers", "litgpt", "pytest", "datasets")


class FailureError(Exception):
    """Why a stage has failed, in words."""


class SkippedError(Exception):
    """Why a stage has nothing to do here, in words."""


class Bench:
    """What a stage works with, and what it has found so far, which is written at each finding.

    Args:
        folder: Where results go; `work` below it is removed at the end.
        name: The stage.
        small: Without a GPU, or as if there were none.
        seconds: The stage's time.
        before: Figures of the stages before, by their names.

    Attributes:
        figures: Numbers and texts, for programs.
        rows: The same for people: what, value, and where there is one, the goal and whether it was reached.
    """

    def __init__(self, folder: Path, name: str, small: bool, seconds: float, before: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.name = name
        self.small = small
        self.seconds = seconds
        self.before = before
        self.figures: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def tell(self, what: str, value: str, goal: str = "", is_met: bool | None = None, **figures: Any) -> None:
        """Adds a finding."""
        self.rows.append({"what": what, "value": value, "goal": goal, "is_met": is_met})
        self.figures |= figures
        print(f"{what}: {value}", flush=True)
        self.write("failed", "it ended without a word")  # that is so unless more comes

    def write(self, status: str, why: str) -> None:
        """Leaves the findings where the main process reads them."""
        result = {"status": status, "why": why, "rows": self.rows, "figures": self.figures}
        write_text(result_path(self.folder, self.name), json.dumps(result) + "\n")


def result_path(folder: Path, name: str) -> Path:
    """Where a stage's process leaves its findings."""
    return folder / "work" / f"stage-{name}.json"


# The stages.


def environment(bench: Bench) -> None:
    """What this machine is, and the rate of matrix products that MFU is compared with."""
    import torch
    from benchmark_training import matrix_rate

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device = device_of(bench)
    if device.type == "cuda":
        card, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        bench.tell("GPU memory", f"{memory / 2**30:.1f} GiB", memory_bytes=memory)
        bench.tell("driver, CUDA", f"{driver()}, {torch.version.cuda}", driver=driver(), cuda=torch.version.cuda)
    else:
        card = f"CPU ({torch.get_num_threads()} cores in use)"
    bench.tell("device", card, card=card)
    bench.tell("versions", ", ".join(f"{name} {version}" for name, version in versions.items()), versions=versions)
    missing = [name for name in PACKAGES if name not in versions]
    bench.tell("not installed", ", ".join(missing) or "nothing that is of use here", missing=missing)
    for place in ("/dev/shm", str(bench.folder)):
        if Path(place).exists():
            free = shutil.disk_usage(place).free
            shown = "/dev/shm" if place == "/dev/shm" else "the disk"
            bench.tell(f"free on {shown}", f"{free / 2**30:.2f} GiB", **{f"free_bytes_{shown.split('/')[-1]}": free})
    rate = matrix_rate(device, "bf16" if device.type == "cuda" else "fp32")
    bench.tell("matrix products", f"{rate / 1e12:.4g} TFLOP/s", matrix_flops=rate)


def device_of(bench: Bench) -> "torch.device":
    """Where this stage computes."""
    import torch

    return torch.device("cpu" if bench.small else "cuda")


def driver() -> str:
    """The version of the GPU's driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "unknown"


def gradients(bench: Bench) -> None:
    """Gradients of one compiled step, with document masking and without, against the CPU's in fp32."""
    import torch

    # On a CPU the compiler takes the step apart, and what it found runs as it is: its own kernels take a minute.
    backend = "aot_eager" if bench.small else "inductor"
    torch.set_float32_matmul_precision("highest")  # TF32 is no fp32
    wrong = []
    for masked in (True, False):
        config = small_depth(bench, masked)
        batch = first_batch(config)
        reference = step_gradients(config, batch, torch.device("cpu"), "fp32", None, "dense")
        for precision, attention in kernels(bench, masked):
            tolerance = TOLERANCE[precision]
            found = step_gradients(config, batch, device_of(bench), precision, backend, attention)
            where = f"{precision}, {f'documents by {attention}' if masked else 'whole windows'}"
            far = [fault for name in reference if (fault := difference(name, found, reference, tolerance))]
            wrong += [f"{where}: {fault}" for fault in far]
            errors = {name: relative_error(found[name], reference[name]) for name in reference}
            worst = max(errors, key=lambda name: errors[name])
            bench.tell(
                f"gradients in {where}",
                f"{len(far)} of {len(errors)} parameters wrong; largest error {errors[worst]:.2g} ({worst})",
                goal=f"error at most {tolerance:g}, cosine above {LEAST_COSINE}, none zero",
                **{where: {name: error if math.isfinite(error) else None for name, error in errors.items()}},
            )
    if wrong:
        raise FailureError("; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))


def kernels(bench: Bench, masked: bool) -> list[tuple[str, str]]:
    """Precisions, and for documents the kernels of attention that the device has in each."""
    if bench.small or not masked:
        return [(precision, "dense") for precision in TOLERANCE]
    import torch

    flash = [("bf16", "flash")] if torch.cuda.get_device_capability() >= (8, 0) else []
    return [*flash, ("bf16", "flex"), ("fp32", "flex"), ("bf16", "dense")]


def small_depth(bench: Bench, masked: bool) -> "Config":
    """The 245M model's width and heads, with two layers and a small vocabulary."""
    from cucafera.composition import composed_config

    tokens, inner = (64, 512) if bench.small else (512, 2048)
    return composed_config(
        [
            "model=cucafera", f"model.intermediate_size={inner}", "model.num_hidden_layers=2",
            "model.vocab_size=1024", "tokenizer.vocab_size=1024",
            f"model.max_position_embeddings={tokens}", f"batch_tokens={2 * tokens}", f"budget_tokens={2 * tokens}",
            "schedule.warmup_steps=0", f"data.document_masking={str(masked).lower()}", *data_settings(bench),
        ]
    )  # fmt: skip


def data_settings(bench: Bench) -> list[str]:
    """The embedded corpus, prepared once for all stages."""
    return ["data=embedded", f"data.prepared_dir={bench.work / 'prepared'}"]


def first_batch(config: "Config") -> "Batch":
    """The windows of the first step."""
    from cucafera.data.packed import PackedDataModule

    data = PackedDataModule(config)
    data.prepare_data()
    data.setup()
    return data.training_steps[0]


def step_gradients(
    config: "Config", batch: "Batch", device: "torch.device", precision: str, backend: str | None, attention: str
) -> dict[str, "Tensor"]:
    """The gradient of each parameter after one step, on the CPU in fp64; the same weights each time."""
    import torch

    from cucafera.model.transformer import Decoder

    torch.manual_seed(0)
    residual_dtype = torch.bfloat16 if precision == "bf16" else None
    model = Decoder(config.model, document_attention=attention, residual_dtype=residual_dtype).to(device)
    torch.compiler.reset()
    if backend:
        model.compile(backend=backend, dynamic=False)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = decoder_loss(model, batch, device)
    loss.backward()
    return {name: parameter.grad.detach().cpu().double() for name, parameter in model.named_parameters()}


def decoder_loss(model: "Decoder", batch: "Batch", device: "torch.device") -> "Tensor":
    """The mean loss of a batch, in nats, by the decoder alone."""
    from cucafera.model.attention import document_limit

    documents = None if batch.documents is None else batch.documents.to(device)
    limit = None if batch.document_counts is None else document_limit(sum(batch.document_counts))
    total: Tensor = model(batch.input_ids.to(device), batch.targets.to(device), documents, document_limit=limit)
    return total / batch.targets.numel()


def relative_error(found: "Tensor", reference: "Tensor") -> float:
    """The norm of the difference over that of the reference; infinite if it is not finite, or nothing was found."""
    if not found.isfinite().all() or not found.any():
        return math.inf
    return float((found - reference).norm() / reference.norm())


def difference(
    name: str, found: Mapping[str, "Tensor"], reference: Mapping[str, "Tensor"], tolerance: float
) -> str | None:
    """What is wrong with a parameter's gradient; None if nothing is."""
    gradient, expected = found[name], reference[name]
    if not gradient.isfinite().all():
        return f"{name} is not finite"
    if not gradient.any():
        return f"{name} is exactly zero"
    cosine = float((gradient.flatten() @ expected.flatten()) / (gradient.norm() * expected.norm()))
    error = relative_error(gradient, expected)
    return (
        None if error <= tolerance and cosine > LEAST_COSINE else f"{name} is off by {error:.2g}, cosine {cosine:.5f}"
    )


def product_command(bench: Bench, name: str, steps: int, *overrides: str) -> list[str]:
    """`python -m cucafera.run` of a run, to be started in `work`."""
    small = ("trainer=cpu", "model=tiny", "model.num_hidden_layers=2", "batch_tokens=2048")
    size = small if bench.small else ("model=cucafera", "batch_tokens=524_288")
    batch = 2048 if bench.small else 524_288
    return [
        sys.executable, "-m", "cucafera.run", "+experiment=pretrain", *size, *data_settings(bench), f"name={name}",
        "tokenizer.vocab_size=1024", f"budget_tokens={steps * batch}", f"schedule.horizon_steps={STEPS}",
        "schedule.warmup_steps=2", "data.document_masking=true", "callbacks.log_every_steps=1",
        "callbacks.validate_every_steps=0", "callbacks.keep_last=1", "callbacks.reference_curve=null",
        "callbacks.prompts=[La mar]", "callbacks.sampling.max_new_tokens=8", *overrides,
    ]  # fmt: skip


def run_of(bench: Bench, name: str) -> Path:
    """A run folder of the product."""
    return bench.work / "outputs" / name


def called(bench: Bench, command: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command in `work`. Raises FailureError if it does not end with 0."""
    ended = subprocess.run(command, cwd=bench.work, text=True, **settings)
    if ended.returncode:
        raise FailureError(f"`{' '.join(command[1:4])} ...` ended with status {ended.returncode}: see the log")
    return ended


def curves(run: Path) -> dict[str, dict[int, float]]:
    """The TensorBoard curves of a run: for each, its value at each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def sessions(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's history that say on what it was started, and from which step."""
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["what"] in ("began", "went on")]


def training(bench: Bench) -> None:
    """The real training path: how fast, in how much memory, and that it learns."""
    from cucafera.composition import composed_config
    from cucafera.model.flops import peak_flops, training_flops_per_token

    command = product_command(bench, "training", STEPS, "trainer.profile=true", "callbacks.checkpoint_every_steps=0")
    called(bench, command)
    run = run_of(bench, "training")
    metrics, points = json.loads((run / "metrics.json").read_text(encoding="utf-8")), curves(run)
    hardware = sessions(run)[-1]["hardware"]
    config = composed_config(command[3:])
    loss = points["train/loss"]
    end = statistics.mean(list(loss.values())[-3:])
    bench.tell(
        "loss of the first step, and mean of the last three", f"{loss[1]:.3f}, {end:.3f}", loss=list(loss.values())
    )
    norms = points["train/gradient_norm"]
    bench.tell("gradient norm of the first and the last step", f"{norms[1]:.3g}, {norms[STEPS]:.3g}")

    speed = statistics.median(points["speed/tokens_per_second"][step] for step in STEADY_STEPS)
    seconds = int(config.batch_tokens) / speed
    shape = f"{hardware['micro_batch_windows']} windows at a time, {hardware['precision']}"
    shape += ", compiled" if hardware["compile"] else ""
    bench.tell("tokens per second", f"{speed:,.0f} ({seconds:.3g} s a step; {shape})",
               tokens_per_second=speed, step_seconds=seconds, hardware=hardware)  # fmt: skip
    sheet = peak_flops(hardware["name"])
    rate = bench.before.get("environment", {}).get("matrix_flops")
    for convention, half in (("attention over the whole window", False), ("its causal half", True)):
        flops = speed * training_flops_per_token(config.model, config.sequence_length, causal_half=half)
        of_sheet, of_rate = flops / sheet if sheet else None, flops / rate if rate else None
        value = f"{shown_share(of_sheet)} of the data sheet's bf16 peak, {shown_share(of_rate)} of matrix products"
        is_goal = not half and of_sheet is not None
        bench.tell(
            f"MFU, {convention}", value, goal=f"{MFU_GOAL:.0%} of an H100's peak" if is_goal else "",
            is_met=of_sheet >= MFU_GOAL if is_goal else None,
            **{"mfu_causal" if half else "mfu": {"of_data_sheet": of_sheet, "of_matrix_products": of_rate}},
        )  # fmt: skip
    memory_against_formula(bench, config, hardware, metrics["peak_memory_gib"])
    wait = statistics.mean(points["speed/data_wait"][step] for step in STEADY_STEPS)
    bench.tell("waiting for data", f"{wait:.2%} of the time", data_wait=wait)
    bench.tell(
        "first step, compilation included", f"{int(config.batch_tokens) / points['speed/tokens_per_second'][1]:.1f} s"
    )
    bench.tell("profile", "below", profile=(run / "profile.txt").read_text(encoding="utf-8"))
    if not end < loss[1]:
        raise FailureError(f"the loss does not fall: {loss[1]:.3f} at first, {end:.3f} at the end")
    if not all(0 < norm < math.inf for norm in norms.values()):
        raise FailureError(f"gradient norms are {sorted(norms.values())}")


def shown_share(share: float | None) -> str:
    """A share in percent, or that it is not known."""
    return "unknown" if share is None else f"{share:.1%}"


def memory_against_formula(bench: Bench, config: "Config", hardware: dict[str, Any], peak_gib: float) -> None:
    """Tells the most memory that a run has had allocated, beside what the micro-batch was chosen by."""
    from cucafera.training.hardware import StepMemory

    if bench.small:
        bench.tell("peak memory", f"{peak_gib:.2f} GiB of the process", peak_memory_gib=peak_gib)
        return
    step = StepMemory(config, hardware["precision"], hardware["residual_precision"], hardware["compile"])
    tokens = hardware["micro_batch_windows"] * config.sequence_length
    computed = step.at(tokens, hardware["activation_checkpointing"]) / 2**30
    bench.tell(
        "peak memory", f"{peak_gib:.2f} GiB; by the formula {computed:.2f} GiB ({peak_gib / computed:.2f} of it)",
        peak_memory_gib=peak_gib, computed_memory_gib=computed,
    )  # fmt: skip


def tests(bench: Bench) -> None:
    """The tests that are marked gpu, in the files that have some."""
    if importlib.util.find_spec("pytest") is None:
        raise SkippedError("pytest is not installed")
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    if not files:
        raise SkippedError("the sources came without tests")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--strict-markers", "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-v", "-m", "gpu", *map(str, files)]
    counts: Counter[str] = Counter()
    failed: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if told := re.search(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", line):
                counts[told[2].lower()] += 1
                failed += [told[1].split("::", 1)[1]] if told[2] in ("FAILED", "ERROR") else []
                bench.rows.clear()  # the counts so far, in case that time is over before the last
                bench.tell("tests", ", ".join(f"{count} {kind}" for kind, count in counts.items()), counts=dict(counts))
    if failed or process.returncode:
        raise FailureError(f"{', '.join(failed) or 'pytest'}: see the log")
    if not bench.small and not counts["passed"]:
        raise FailureError("none of them ran")


def resume(bench: Bench) -> None:
    """A run that SIGKILL ended goes on after its last checkpoint, and ends as one that nothing disturbed."""
    from cucafera.training.run_folder import RunFolder

    run = run_of(bench, "resumed")
    command = product_command(bench, "resumed", RESUMED_STEPS, f"callbacks.checkpoint_every_steps={CHECKPOINT_STEPS}")
    process = subprocess.Popen(command, cwd=bench.work)
    while not (saved := RunFolder(run).checkpoints.newest_step()):
        if process.poll() is not None:
            raise FailureError(f"the run ended with status {process.returncode} before its first checkpoint")
        time.sleep(0.02)
    process.kill()
    process.wait()
    saved = RunFolder(run).checkpoints.newest_step()
    if (run / "metrics.json").exists():
        raise FailureError("the run was complete before it could be killed")
    bench.tell("killed after the checkpoint of step", str(saved), saved_step=saved)
    called(bench, command)
    begun = sessions(run)[-1]
    loss = curves(run)["train/loss"]
    bench.tell("went on after step", str(begun["step"]), resumed_step=begun["step"], loss=list(loss.values()))
    if begun["what"] != "went on" or begun["step"] != saved:
        raise FailureError(f"it should have gone on after step {saved}, and {begun['what']} at {begun['step']}")
    if sorted(loss) != list(range(1, RESUMED_STEPS + 1)):
        raise FailureError(f"its curve has the steps {sorted(loss)}")
    undisturbed = bench.before.get("training", {}).get("loss")
    if undisturbed is None:
        bench.tell(f"loss of step {RESUMED_STEPS}", f"{loss[RESUMED_STEPS]:.4f}; there is no other run to compare with")
        return
    other = undisturbed[RESUMED_STEPS - 1]
    apart = abs(loss[RESUMED_STEPS] - other) / other
    what = f"loss of step {RESUMED_STEPS}, resumed and undisturbed"
    bench.tell(what, f"{loss[RESUMED_STEPS]:.4f}, {other:.4f} ({apart:.2%} apart)", apart=apart)
    if apart > LOSS_TOLERANCE:
        raise FailureError(f"the loss of the resumed run is {apart:.1%} from that of the undisturbed one")


def generation(bench: Bench) -> None:
    """The chat command writes something; and greedy writing after 128 tokens, as fast as it goes."""
    from cucafera.config import SamplingConfig
    from cucafera.generation.generate import token_columns
    from cucafera.interop.trained import load_trained

    run = trained_run(bench)
    chat = [sys.executable, "-m", "cucafera.chat", str(run), "--prompt", "La mar", "--max-new-tokens", "16"]
    chat += ["--device", device_of(bench).type]
    said = called(bench, chat, stdout=subprocess.PIPE).stdout.strip()
    bench.tell("the chat command", "wrote nothing" if not said else f"wrote {len(said)} characters", said=said)
    if not said:
        raise FailureError("the chat command wrote nothing")
    trained = load_trained(str(run))
    model = trained.model.to(device_of(bench))
    prompt = (trained.tokenizer.encode("Hi havia una vegada una vila vora la mar. ") * 128)[:128]
    tokens = 8 if bench.small else 64
    for batch in (1, 16):
        for _ in range(2):  # the first time is not counted
            started = now(bench)
            columns = token_columns(model, [prompt] * batch, SamplingConfig(temperature=0, max_new_tokens=tokens), None)
            next(columns)
            first = now(bench) - started
            count = sum(1 for _ in columns)
            rest = now(bench) - started - first
        speed = batch * count / rest
        bench.tell(
            f"writing {batch} text{'s' if batch > 1 else ''} in fp32",
            f"{speed:,.0f} tokens per second, first token after {1000 * first:.1f} ms",
            **{f"generation_{batch}": {"tokens_per_second": speed, "first_token_seconds": first}},
        )


def trained_run(bench: Bench) -> Path:
    """The run of the training stage. Raises SkippedError if there is none."""
    run = run_of(bench, "training")
    if not list((run / "checkpoints").glob("step-*.json")):
        raise SkippedError("the training stage has left no checkpoint")
    return run


def now(bench: Bench) -> float:
    """The time at which the device has done what it was given."""
    import torch

    if device_of(bench).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def checkpoint(bench: Bench) -> None:
    """What a save of the trained state costs: the time that training waits, and that until it is on the disk."""
    import torch
    from torch.utils._pytree import tree_map_only

    from cucafera.composition import composed_config
    from cucafera.training.checkpoint_files import CheckpointFolder, CheckpointWriter, read_checkpoint
    from cucafera.training.hardware import free_memory_bytes

    newest = sorted((trained_run(bench) / "checkpoints").glob("step-*.ckpt"))[-1]
    state = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device_of(bench)), read_checkpoint(newest))
    folder = CheckpointFolder(bench.work / "saved")
    writer = CheckpointWriter(folder, None, 1, 0, free_memory_bytes)
    for _ in range(2):  # the second writes over the first's copy in main memory, as all but a run's first do
        started = now(bench)
        writer.save_checkpoint(state, None)
        waited = now(bench) - started
        writer.finish()
        written = time.perf_counter() - started
        if writer.failure is not None:
            raise FailureError(f"it could not be written: {writer.failure}")
    size = folder.complete()[-1].size
    bench.tell("a checkpoint", f"{size / 1e9:.3g} GB; training waits {waited:.3g} s, on the disk after {written:.3g} s",
               checkpoint_bytes=size, waited_seconds=waited, written_seconds=written)  # fmt: skip
    every = composed_config(["+experiment=pretrain"]).callbacks.checkpoint_every_steps
    if step := bench.before.get("training", {}).get("step_seconds"):
        share = waited / (every * step)
        bench.tell(f"of the training time, with one every {every} steps", f"{share:.3%}", checkpoint_share=share)


def benchmark(bench: Bench) -> None:
    """Speed beside the compiled peers that are installed, as far as the time goes."""
    there = {"Hugging Face": "transformers", "litgpt": "litgpt"}
    peers = ["cucafera", *(peer for peer, package in there.items() if importlib.util.find_spec(package))]
    peers += ["nanochat-like", "bare loop"]
    out = bench.folder / "benchmark"
    out.with_suffix(".json").unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_training.py"), "--compiled-only", "--rounds", "1"]
    command += [
        "--setting",
        "documents",
        "--setting",
        "windows",
        *(word for peer in peers for word in ("--peer", peer)),
    ]
    command += ["--seconds", f"{max(1.0, bench.seconds - 15):.0f}", "--steps", "2" if bench.small else "4"]
    command += ["--out", str(out), "--model", "tiny" if bench.small else "cucafera", *data_settings(bench)]
    command += ["trainer=cpu", "model.num_hidden_layers=2", "batch_tokens=1024"] if bench.small else []
    called(bench, command)
    found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    bench.figures["benchmark"] = found
    for setting, facts in found["settings"].items():
        for row in facts["rows"]:
            bench.tell(f"{row['name']}, {setting}", f"{row['tokens_per_second']:,.0f} tokens per second")
        compare(bench, setting, {row["name"]: row["tokens_per_second"] for row in facts["rows"]})
    if found["left_out"]:
        bench.tell("not measured, for want of time", f"{len(found['left_out'])} of {2 * len(peers)}")
    for name, why in found["missing"].items():
        bench.tell(name, why)
    wrong = [name for name, why in found["missing"].items() if why.startswith("failed")]
    if wrong:
        raise FailureError(f"{', '.join(wrong)} failed")
    if not any(row["name"].startswith("cucafera") for facts in found["settings"].values() for row in facts["rows"]):
        raise FailureError("cucafera could not be measured in this time")


def compare(bench: Bench, setting: str, speeds: Mapping[str, float]) -> None:
    """Tells how many times as fast as the fastest peer the product is; it alone masks documents."""
    ours = [speed for name, speed in speeds.items() if name.startswith("cucafera")]
    peers = {name: speed for name, speed in speeds.items() if not name.startswith(("cucafera", "bare loop"))}
    if not ours or not peers:
        return
    fastest = max(peers, key=lambda name: peers[name])
    ratio = max(ours) / peers[fastest]
    is_goal = setting == "documents" and not bench.small
    bench.tell(
        f"cucafera over the fastest peer ({setting})", f"{ratio:.2f} ({fastest})",
        goal=f"{PEER_GOAL:g}" if is_goal else "", is_met=ratio >= PEER_GOAL if is_goal else None,
        **{f"ratio_{setting}": ratio},
    )  # fmt: skip


STAGES: dict[str, tuple[Callable[[Bench], None], int]] = {
    "environment": (environment, 3),
    "gradients": (gradients, 14),
    "training": (training, 30),
    "tests": (tests, 9),
    "resume": (resume, 20),
    "generation": (generation, 4),
    "checkpoint": (checkpoint, 3),
    "benchmark": (benchmark, 27),
}
"""Each with its share of the time. Those that others need come first; last, the one that takes what is left."""


def run_stage(bench: Bench) -> int:
    """Runs a stage in this process, which is its own. Returns the exit status."""
    bench.write("failed", "it ended without a word")
    if bench.name != "benchmark":  # which starts each of its peers as a person would
        let_threads_wait_briefly(os.environ)
    try:
        STAGES[bench.name][0](bench)
    except SkippedError as why:
        bench.write("skipped", str(why))
    except Exception as error:
        traceback.print_exc()
        why = str(error) if isinstance(error, FailureError) else f"{type(error).__name__}: {error}"
        bench.write("failed", why.splitlines()[0])
        return 1
    else:
        bench.write("passed", "")
    return 0


# The main process.


class Planned(NamedTuple):
    """A stage to run.

    Attributes:
        name: Its name.
        share: Of the time, beside those of the others.
        command: What runs it in a process of its own; the seconds that it has are added.
    """

    name: str
    share: float
    command: list[str]


def accept(stages: Sequence[Planned], folder: Path, seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
    """Runs the stages one after another, and writes acceptance.json after each.

    Args:
        stages: Those to run.
        folder: Where results go.
        seconds: Of all of them.
        facts: What else acceptance.json is to hold.

    Returns:
        What acceptance.json holds: the facts and, as `stages`, the result of each.
    """
    started = time.monotonic()
    results: list[dict[str, Any]] = []
    content = {**facts, "seconds": seconds, "stages": results}
    with (folder / "acceptance.log").open("a", encoding="utf-8") as log:
        for number, stage in enumerate(stages):
            left = seconds - (time.monotonic() - started)
            limit = limit_of(stages[number:], left)
            print(f"{stage.name:14}{limit:>5.0f} s at most ... ", end="", flush=True)
            log.write(f"\n==== {stage.name}\n")
            log.flush()
            result = result_of(stage, folder, limit, log)
            results.append(result)
            content["stages_seconds"] = round(time.monotonic() - started, 1)
            write_text(folder / "acceptance.json", json.dumps(content, indent=1) + "\n")
            why = f": {result['why']}" if result["why"] else ""
            print(f"{result['status']} after {result['seconds']:.0f} s{why}", flush=True)
    return content


def limit_of(stages: Sequence[Planned], left: float) -> float:
    """Seconds of the first of these stages, when so many are left for all: to start, and its share of the rest."""
    start = min(START_SECONDS, left / (2 * len(stages)))
    return max(1.0, start + (left - start * len(stages)) * stages[0].share / sum(stage.share for stage in stages))


def result_of(stage: Planned, folder: Path, limit: float, log: Any) -> dict[str, Any]:
    """Runs one stage within its time. Returns its result, with what it had found if it was killed."""
    path = result_path(folder, stage.name)
    path.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["PYTHONUNBUFFERED"] = "1"
    started = time.monotonic()
    # A group of its own, so that all that it has started ends with it.
    process = subprocess.Popen(
        [*stage.command, f"{limit:.1f}"], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env=environment, process_group=0,
    )  # fmt: skip
    overran = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        overran = True
    finally:
        end_group(process)
    found = {"status": "failed", "why": "it ended without a word", "rows": [], "figures": {}}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
    if overran:
        found |= {"status": "overran", "why": f"killed after its {limit:.0f} s"}
    elif process.returncode and found["status"] != "failed":
        found |= {"status": "failed", "why": f"ended with status {process.returncode}"}
    return {"name": stage.name, "seconds": round(time.monotonic() - started, 1), "limit": round(limit, 1), **found}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a stage's processes."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(GRACE_SECONDS)  # the benchmark has a group of its own to end
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def terminal_table(content: dict[str, Any]) -> str:
    """All findings."""
    lines = []
    for result in content["stages"]:
        why = f"  {result['why']}" if result["why"] else ""
        lines += ["", f"{result['name']:14}{result['status'].upper():10}{result['seconds']:>6.0f} s{why}"]
        lines += [f"  {row['what']:56}{row['value']}{shown_goal(row, '  [', ']')}" for row in result["rows"]]
        lines += ["  " + line for line in result["figures"].get("profile", "").splitlines()]
    return "\n".join(lines)


def shown_goal(row: dict[str, Any], before: str = "", after: str = "") -> str:
    """A row's goal, and whether it was reached."""
    if not row["goal"]:
        return ""
    verdict = {None: "", True: ": reached", False: ": below goal"}[row["is_met"]]
    return f"{before}goal {row['goal']}{verdict}{after}"


def markdown(content: dict[str, Any]) -> str:
    """The findings as a section of scripts/PERFORMANCE.md."""
    figures = {result["name"]: result["figures"] for result in content["stages"]}
    facts = figures.get("environment", {})
    torch_version = facts.get("versions", {}).get("torch", "of unknown version")
    lines = [f"### {facts.get('card', 'unknown device')}, torch {torch_version}, {content['date']}", ""]
    if content["small"]:
        lines += ["**Small models in fp32 on a CPU: these figures say nothing about a GPU.**", ""]
    states = ", ".join(f"{result['name']} {result['status']}" for result in content["stages"])
    lines += [
        f"`{content['command']}`, {content['stages_seconds']:.0f} s: {states}.",
        "",
        "| | measured | goal |",
        "|---|---|---|",
    ]
    for result in content["stages"]:
        lines += [
            f"| {row['what']} | {row['value'].replace('|', '/')} | {shown_goal(row).removeprefix('goal ')} |"
            for row in result["rows"]
            if row["what"] not in ("profile", "the chat command")
        ]
    if profile := figures.get("training", {}).get("profile"):
        lines += ["", "```text", profile.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="for all stages together (560; 280 if small)")
    parser.add_argument("--out", type=Path, default=Path("outputs/acceptance"), help="where results go (%(default)s)")
    parser.add_argument("--stage", action="append", choices=STAGES, help="one to run; may be repeated; else all")
    parser.add_argument("--small", action="store_true", help="as on a machine without a GPU")
    parser.add_argument("--run-stage", nargs=2, metavar=("NAME", "SECONDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    if arguments.run_stage:
        name, limit = arguments.run_stage
        results = json.loads((folder / "acceptance.json").read_text(encoding="utf-8"))["stages"]
        before = {result["name"]: result["figures"] for result in results}
        sys.exit(run_stage(Bench(folder, name, arguments.small, float(limit), before)))

    import torch

    small = arguments.small or not torch.cuda.is_available()
    seconds = arguments.seconds or (280 if small else 560)
    shutil.rmtree(folder / "work", ignore_errors=True)
    (folder / "work").mkdir(parents=True)
    (folder / "acceptance.log").unlink(missing_ok=True)
    if small:
        print("On a CPU, small and in fp32: these figures say nothing about a GPU.")
    facts = {
        "date": datetime.date.today().isoformat(),
        "small": small,
        "command": " ".join(["python", "scripts/gpu_acceptance.py", *sys.argv[1:]]),
    }
    write_text(folder / "acceptance.json", json.dumps({**facts, "stages": []}) + "\n")
    own = [sys.executable, str(Path(__file__).resolve()), "--out", str(folder), *(["--small"] if small else [])]
    stages = [
        Planned(name, share, [*own, "--run-stage", name])
        for name, (_, share) in STAGES.items()
        if name in (arguments.stage or STAGES)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stage ends too
    try:
        content = accept(stages, folder, seconds, facts)
    finally:
        shutil.rmtree(folder / "work", ignore_errors=True)
    write_text(folder / "acceptance.md", markdown(content))
    print(terminal_table(content))
    print(f"\n{folder}/acceptance.json, acceptance.md (for scripts/PERFORMANCE.md) and acceptance.log")
    wrong = [result["name"] for result in content["stages"] if result["status"] in ("failed", "overran")]
    if wrong:
        sys.exit(f"not accepted: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
