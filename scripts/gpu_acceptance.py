"""Check training on this GPU for correctness and speed: one command for a machine that is rented for ten minutes.

    python scripts/gpu_acceptance.py                       everything, in 560 seconds
    python scripts/gpu_acceptance.py --out FOLDER          folder of acceptance.json, acceptance.md and acceptance.log
    python scripts/gpu_acceptance.py --stage gradients     one stage; may be repeated
    python scripts/gpu_acceptance.py --small               a small version, as on a machine without a GPU

Each stage is a separate process with a share of the time; unused time goes to later stages. Results are written
immediately. A stage that fails, or is killed at its time limit, does not stop the others.

    environment    card, driver, versions, memory, and the rate of a large bf16 matrix product
    gradients      of every parameter in a compiled step at head dim 96, against eager fp32 on the CPU
    training       twelve steps of the 245M model, 524,288 tokens each, by `cucafera.run`: speed, MFU, memory
    tests          those that need a GPU
    resume         the same run killed by SIGKILL after a checkpoint, and resumed
    generation     the chat command, and the speed of generation
    checkpoint     the cost of saving
    benchmark      speed against compiled peers (benchmark_training.py), with document masking and without

Nothing is downloaded: the corpus is the embedded one. Requirements: the dependencies of pyproject.toml but `datasets`,
a C compiler for Triton, 15 GB of disk below --out; `transformers`, `litgpt` and `pytest` are used if installed.
Without a GPU a small version runs in fp32, which tests the script and says nothing about a GPU.

The exit status is 1 if a stage failed or was killed. A missed speed goal is reported as "below goal", not as a failure.
acceptance.md can be pasted into scripts/README.md.
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

from cucafera.process import let_threads_wait_briefly  # noqa: E402
from cucafera.quantities import number_of  # noqa: E402
from cucafera.storage import write_text  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cucafera.config.schema import Config
    from cucafera.data.windows import Batch
    from cucafera.model.transformer import Decoder

MFU_GOAL, PEER_GOAL = 0.48, 1.2
"""MFU on an H100, by the dense bf16 peak and full attention; and speed over the fastest compiled peer, with document
masking."""
TOLERANCE = {"bf16": 0.05, "fp32": 1e-3}
"""Largest relative error of a gradient, by norms, for each parameter."""
MIN_COSINE = 0.998
STEPS, RESUMED_STEPS, CHECKPOINT_STEPS = 12, 8, 3
"""Steps of the training stage, of the run that is killed, and between its checkpoints."""
STEADY_STEPS = (3, 4, 10, 11, 12)
"""Steps of the training stage without compilation and profiler."""
LOSS_TOLERANCE = 0.02
"""Largest relative difference in loss between a run that was killed and resumed and one that was not."""
START_SECONDS = 15
"""Time for the imports of a stage, whatever its share of the work."""
NO_RESULT = "ended without a result"
GRACE_SECONDS = 3
"""Time between SIGTERM and SIGKILL to a stage."""
PACKAGES = ("torch", "triton", "lightning", "hydra-core", "tensorboard", "transformers", "litgpt", "pytest", "datasets")


class FailureError(Exception):
    """A stage failed; the message says why."""


class SkippedError(Exception):
    """A stage does not apply to this machine; the message says why."""


class Bench:
    """Settings of a stage and its results so far, which are written after each one.

    Args:
        folder: Folder for results; its subfolder `work` is removed at the end.
        name: Name of the stage.
        small: True without a GPU, or to run as if there were none.
        seconds: Time limit of the stage.
        before: Figures of earlier stages, by name.

    Attributes:
        figures: Results as numbers and strings, for programs.
        rows: Results as text: what, value, and optionally the goal and whether it was reached.
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

    def record(self, what: str, value: str, goal: str = "", is_met: bool | None = None, **figures: Any) -> None:
        """Add a result, and write all results so far."""
        self.rows.append({"what": what, "value": value, "goal": goal, "is_met": is_met})
        self.figures |= figures
        print(f"{what}: {value}", flush=True)
        self.write("failed", NO_RESULT)  # the status if nothing is written after this

    def write(self, status: str, why: str) -> None:
        """Write the results to the file that the main process reads."""
        result = {"status": status, "why": why, "rows": self.rows, "figures": self.figures}
        write_text(result_path(self.folder, self.name), json.dumps(result) + "\n")


def result_path(folder: Path, name: str) -> Path:
    """Return the file in which a stage's process writes its results."""
    return folder / "work" / f"stage-{name}.json"


# The stages.


def environment(bench: Bench) -> None:
    """Report the machine, and the rate of matrix products as a reference for MFU."""
    import torch
    from benchmark_training import matrix_rate

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device = device_of(bench)
    if device.type == "cuda":
        card, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        bench.record("GPU memory", f"{memory / 2**30:.1f} GiB", memory_bytes=memory)
        bench.record("driver, CUDA", f"{driver()}, {torch.version.cuda}", driver=driver(), cuda=torch.version.cuda)
    else:
        card = f"CPU ({number_of(torch.get_num_threads(), 'core')} in use)"
    bench.record("device", card, card=card)
    bench.record("versions", ", ".join(f"{name} {version}" for name, version in versions.items()), versions=versions)
    missing = [name for name in PACKAGES if name not in versions]
    bench.record("not installed", ", ".join(missing) or "nothing", missing=missing)
    for path in ("/dev/shm", str(bench.folder)):
        if Path(path).exists():
            free = shutil.disk_usage(path).free
            shown = "/dev/shm" if path == "/dev/shm" else "the disk"
            bench.record(f"free on {shown}", f"{free / 2**30:.2f} GiB", **{f"free_bytes_{shown.split('/')[-1]}": free})
    rate = matrix_rate(device, "bf16" if device.type == "cuda" else "fp32")
    bench.record("matrix products", f"{rate / 1e12:.4g} TFLOP/s", matrix_flops=rate)


def device_of(bench: Bench) -> "torch.device":
    """Return the device of this stage."""
    import torch

    return torch.device("cpu" if bench.small else "cuda")


def driver() -> str:
    """Return the version of the GPU driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "unknown"


def gradients(bench: Bench) -> None:
    """Compare gradients of one compiled step, with document masking and without, with the CPU in fp32."""
    import torch

    # On a CPU the step is traced but runs eagerly: compiling its kernels takes a minute.
    backend = "aot_eager" if bench.small else "inductor"
    torch.set_float32_matmul_precision("highest")  # no TF32
    wrong = []
    for masked in (True, False):
        config = small_depth(bench, masked)
        batch = first_batch(config)
        reference = step_gradients(config, batch, torch.device("cpu"), "fp32", None, "dense")
        for precision, attention in kernels(bench, masked):
            tolerance = TOLERANCE[precision]
            found = step_gradients(config, batch, device_of(bench), precision, backend, attention)
            case = f"{precision}, {f'documents by {attention}' if masked else 'full windows'}"
            far = [fault for name in reference if (fault := difference(name, found, reference, tolerance))]
            wrong += [f"{case}: {fault}" for fault in far]
            errors = {name: relative_error(found[name], reference[name]) for name in reference}
            worst = max(errors, key=lambda name: errors[name])
            bench.record(
                f"gradients in {case}",
                f"{len(far)} of {number_of(len(errors), 'parameter')} wrong; largest error "
                f"{errors[worst]:.2g} ({worst})",
                goal=f"error at most {tolerance:g}, cosine above {MIN_COSINE}, none zero",
                **{case: {name: error if math.isfinite(error) else None for name, error in errors.items()}},
            )
    if wrong:
        raise FailureError("; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))


def kernels(bench: Bench, masked: bool) -> list[tuple[str, str]]:
    """Return pairs of precision and attention kernel that the device supports."""
    if bench.small or not masked:
        return [(precision, "dense") for precision in TOLERANCE]
    import torch

    flash = [("bf16", "flash")] if torch.cuda.get_device_capability() >= (8, 0) else []
    return [*flash, ("bf16", "flex"), ("fp32", "flex"), ("bf16", "dense")]


def small_depth(bench: Bench, masked: bool) -> "Config":
    """Return a configuration with the 245M model's width and heads, two layers and a small vocabulary."""
    from cucafera.config.command_line import composed_config

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
    """Return overrides for the embedded corpus, prepared once for all stages."""
    return ["data=embedded", f"data.prepared_dir={bench.work / 'prepared'}"]


def first_batch(config: "Config") -> "Batch":
    """Return the windows of the first step."""
    from cucafera.data.packed import open_documents

    return open_documents(config).training_steps(())[0]


def step_gradients(
    config: "Config", batch: "Batch", device: "torch.device", precision: str, backend: str | None, attention: str
) -> dict[str, "Tensor"]:
    """Return the gradient of each parameter after one step, on the CPU in fp64; the weights are always the same."""
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
    """Return the mean loss of a batch in nats, from the decoder alone."""
    from cucafera.model.attention import document_limit

    documents = None if batch.documents is None else batch.documents.to(device)
    limit = None if batch.document_counts is None else document_limit(sum(batch.document_counts))
    total: Tensor = model(batch.input_ids.to(device), batch.targets.to(device), documents, document_limit=limit)
    return total / batch.targets.numel()


def relative_error(found: "Tensor", reference: "Tensor") -> float:
    """Return the norm of the difference over that of the reference; infinity for a non-finite or zero tensor."""
    if not found.isfinite().all() or not found.any():
        return math.inf
    return float((found - reference).norm() / reference.norm())


def difference(
    name: str, found: Mapping[str, "Tensor"], reference: Mapping[str, "Tensor"], tolerance: float
) -> str | None:
    """Return what is wrong with a parameter's gradient, or None."""
    gradient, expected = found[name], reference[name]
    if not gradient.isfinite().all():
        return f"{name} is not finite"
    if not gradient.any():
        return f"{name} is exactly zero"
    cosine = float((gradient.flatten() @ expected.flatten()) / (gradient.norm() * expected.norm()))
    error = relative_error(gradient, expected)
    return None if error <= tolerance and cosine > MIN_COSINE else f"{name} is off by {error:.2g}, cosine {cosine:.5f}"


def product_command(bench: Bench, name: str, steps: int, *overrides: str) -> list[str]:
    """Return the `python -m cucafera.run` command of a run, to be started in `work`."""
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
    """Return the folder of a run."""
    return bench.work / "outputs" / name


def called(bench: Bench, command: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in `work`. Raises FailureError if its exit status is not 0."""
    ended = subprocess.run(command, cwd=bench.work, text=True, **settings)
    if ended.returncode:
        raise FailureError(f"`{' '.join(command[1:4])} ...` ended with status {ended.returncode}: see the log")
    return ended


def curves(run: Path) -> dict[str, dict[int, float]]:
    """Return the TensorBoard curves of a run: values by step, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def sessions(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's history that record its sessions, with hardware and first step."""
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] in ("started", "resumed")]


def training(bench: Bench) -> None:
    """Run the training command: its speed, its memory, and a falling loss."""
    from cucafera.config.command_line import composed_config
    from cucafera.model.flops import peak_flops, training_flops_per_token

    command = product_command(bench, "training", STEPS, "trainer.profile=true", "callbacks.checkpoint_every_steps=0")
    called(bench, command)
    run = run_of(bench, "training")
    metrics, points = json.loads((run / "metrics.json").read_text(encoding="utf-8")), curves(run)
    hardware = sessions(run)[-1]["hardware"]
    config = composed_config(command[3:])
    loss = points["loss/train"]
    end = statistics.mean(list(loss.values())[-3:])
    bench.record(
        "loss of the first step, and mean of the last three", f"{loss[1]:.3f}, {end:.3f}", loss=list(loss.values())
    )
    norms = points["train/gradient_norm"]
    bench.record("gradient norm of the first and the last step", f"{norms[1]:.3g}, {norms[STEPS]:.3g}")

    speed = statistics.median(points["speed/tokens_per_second"][step] for step in STEADY_STEPS)
    seconds = config.batch_tokens / speed
    shape = f"{number_of(hardware['micro_batch_windows'], 'window')} per micro-batch, {hardware['precision']}"
    shape += ", compiled" if hardware["compile"] else ""
    bench.record("tokens per second", f"{speed:,.0f} ({seconds:.3g} s per step; {shape})",
               tokens_per_second=speed, step_seconds=seconds, hardware=hardware)  # fmt: skip
    sheet = peak_flops(hardware["name"])
    rate = bench.before.get("environment", {}).get("matrix_flops")
    for convention, half in (("full attention", False), ("causal half of attention", True)):
        flops = speed * training_flops_per_token(config.model, config.sequence_length, causal_half=half)
        of_sheet, of_rate = flops / sheet if sheet else None, flops / rate if rate else None
        value = f"{shown_share(of_sheet)} of the data sheet's bf16 peak, {shown_share(of_rate)} of matrix products"
        is_goal = not half and of_sheet is not None
        bench.record(
            f"MFU, {convention}", value, goal=f"{MFU_GOAL:.0%} of an H100's peak" if is_goal else "",
            is_met=of_sheet >= MFU_GOAL if is_goal else None,
            **{"mfu_causal" if half else "mfu": {"of_data_sheet": of_sheet, "of_matrix_products": of_rate}},
        )  # fmt: skip
    memory_against_formula(bench, config, hardware, metrics["peak_memory_gib"])
    wait = statistics.mean(points["speed/data_wait"][step] for step in STEADY_STEPS)
    bench.record("waiting for data", f"{wait:.2%} of the time", data_wait=wait)
    bench.record(
        "first step, compilation included", f"{config.batch_tokens / points['speed/tokens_per_second'][1]:.1f} s"
    )
    bench.record("profile", "below", profile=(run / "profile.txt").read_text(encoding="utf-8"))
    if not end < loss[1]:
        raise FailureError(f"the loss does not fall: {loss[1]:.3f} at the start, {end:.3f} at the end")
    if not all(0 < norm < math.inf for norm in norms.values()):
        raise FailureError(f"gradient norms are {sorted(norms.values())}")


def shown_share(share: float | None) -> str:
    """Format a share in percent, or `unknown`."""
    return "unknown" if share is None else f"{share:.1%}"


def memory_against_formula(bench: Bench, config: "Config", hardware: dict[str, Any], peak_gib: float) -> None:
    """Report the peak memory of a run, and the formula by which its micro-batch was chosen."""
    from cucafera.config.registry import OPTIMIZERS
    from cucafera.training.memory import StepMemory

    if bench.small:
        bench.record("peak memory", f"{peak_gib:.2f} GiB of the process", peak_memory_gib=peak_gib)
        return
    step = StepMemory(
        config,
        hardware["precision"],
        OPTIMIZERS.get(config.optimizer.name).state_bytes(config),
        hardware["residual_precision"],
        hardware["compile"],
    )
    tokens = hardware["micro_batch_windows"] * config.sequence_length
    computed = step.peak_bytes(tokens, hardware["activation_checkpointing"]) / 2**30
    bench.record(
        "peak memory", f"{peak_gib:.2f} GiB; by the formula {computed:.2f} GiB ({peak_gib / computed:.2f} of it)",
        peak_memory_gib=peak_gib, computed_memory_gib=computed,
    )  # fmt: skip


def tests(bench: Bench) -> None:
    """Run the tests that are marked gpu."""
    if importlib.util.find_spec("pytest") is None:
        raise SkippedError("pytest is not installed")
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    if not files:
        raise SkippedError("the tests are not part of this source tree")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--strict-markers", "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-v", "-m", "gpu", *map(str, files)]
    counts: Counter[str] = Counter()
    failed: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if match := re.search(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", line):
                counts[match[2].lower()] += 1
                failed += [match[1].split("::", 1)[1]] if match[2] in ("FAILED", "ERROR") else []
                bench.rows.clear()  # keep one row, with the counts so far
                summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
                bench.record("tests", summary, counts=dict(counts))
    if failed or process.returncode:
        raise FailureError(f"{', '.join(failed) or 'pytest'}: see the log")
    if not bench.small and not counts["passed"]:
        raise FailureError("no test ran")


def resume(bench: Bench) -> None:
    """Kill a run and resume it after its last checkpoint: its loss must equal that of an uninterrupted run."""
    from cucafera.runs.folder import RunFolder

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
    bench.record("killed after the checkpoint of step", str(saved), saved_step=saved)
    called(bench, command)
    begun = sessions(run)[-1]
    loss = curves(run)["loss/train"]
    bench.record("resumed after step", str(begun["step"]), resumed_step=begun["step"], loss=list(loss.values()))
    if begun["event"] != "resumed" or begun["step"] != saved:
        raise FailureError(f"it should have resumed after step {saved}, and {begun['event']} at {begun['step']}")
    if sorted(loss) != list(range(1, RESUMED_STEPS + 1)):
        raise FailureError(f"its curve has the steps {sorted(loss)}")
    uninterrupted = bench.before.get("training", {}).get("loss")
    if uninterrupted is None:
        bench.record(f"loss of step {RESUMED_STEPS}", f"{loss[RESUMED_STEPS]:.4f}; no other run to compare with")
        return
    other = uninterrupted[RESUMED_STEPS - 1]
    apart = abs(loss[RESUMED_STEPS] - other) / other
    what = f"loss of step {RESUMED_STEPS}, resumed and uninterrupted"
    bench.record(what, f"{loss[RESUMED_STEPS]:.4f}, {other:.4f} ({apart:.2%} apart)", apart=apart)
    if apart > LOSS_TOLERANCE:
        raise FailureError(f"the loss of the resumed run is {apart:.1%} from that of the uninterrupted one")


def generation(bench: Bench) -> None:
    """Run the chat command, and measure greedy decoding after a prompt of 128 tokens."""
    from cucafera.config.schema import SamplingConfig
    from cucafera.generation.backend import TorchBackend
    from cucafera.generation.engine import Engine
    from cucafera.generation.request import Request
    from cucafera.interop.trained import load_trained

    run = trained_run(bench)
    chat = [sys.executable, "-m", "cucafera.chat", str(run), "--prompt", "La mar", "--max-new-tokens", "16"]
    chat += ["--device", device_of(bench).type]
    reply = called(bench, chat, stdout=subprocess.PIPE).stdout.strip()
    bench.record(
        "the chat command", "empty response" if not reply else f"{number_of(len(reply), 'character')}", reply=reply
    )
    if not reply:
        raise FailureError("the chat command gave an empty response")
    trained = load_trained(str(run))
    model = trained.model.to(device_of(bench))
    prompt = (trained.tokenizer.encode("Hi havia una vegada una vila vora la mar. ") * 128)[:128]
    tokens = 8 if bench.small else 64
    for batch in (1, 16):
        for _ in range(2):  # the first is a warm-up
            started = now(bench)
            engine = Engine(TorchBackend(model, batch), trained.tokenizer)
            greedy = SamplingConfig(temperature=0, max_new_tokens=tokens)
            generations = [engine.add(Request(prompt, greedy, frozenset())) for _ in range(batch)]
            while not all(generation.ids for generation in generations):
                engine.step()
            first, count = now(bench) - started, sum(len(generation.ids) for generation in generations)
            while engine.running:
                engine.step()
            rest = now(bench) - started - first
        speed = (batch * tokens - count) / rest
        bench.record(
            f"generating {batch} text{'s' if batch > 1 else ''} in fp32",
            f"{number_of(round(speed), 'token')} per second, first token after {1000 * first:.1f} ms",
            **{f"generation_{batch}": {"tokens_per_second": speed, "first_token_seconds": first}},
        )


def trained_run(bench: Bench) -> Path:
    """Return the run folder of the training stage. Raises SkippedError without a checkpoint in it."""
    run = run_of(bench, "training")
    if not list((run / "checkpoints").glob("step-*.json")):
        raise SkippedError("the training stage wrote no checkpoint")
    return run


def now(bench: Bench) -> float:
    """Return the time, after waiting for the device."""
    import torch

    if device_of(bench).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def checkpoint(bench: Bench) -> None:
    """Measure a save of the trained state: the time that training waits, and the time until it is on disk."""
    import torch
    from torch.utils._pytree import tree_map_only

    from cucafera.config.command_line import composed_config
    from cucafera.runs.checkpoints import CheckpointFolder, read_checkpoint
    from cucafera.training.checkpoint_writer import CheckpointWriter
    from cucafera.training.memory import free_memory_bytes

    newest = sorted((trained_run(bench) / "checkpoints").glob("step-*.ckpt"))[-1]
    state = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device_of(bench)), read_checkpoint(newest))
    folder = CheckpointFolder(bench.work / "saved")
    writer = CheckpointWriter(folder, None, 1, 0, free_memory_bytes)
    for _ in range(2):  # the second reuses the copy in main memory, as all saves of a run but the first do
        started = now(bench)
        writer.save_checkpoint(state, None)
        waited = now(bench) - started
        writer.finish()
        written = time.perf_counter() - started
        if writer.failure is not None:
            raise FailureError(f"it could not be written: {writer.failure}")
    size = folder.complete()[-1].size
    bench.record("a checkpoint",
               f"{size / 1e9:.3g} GB; training waits {waited:.3g} s, on disk after {written:.3g} s",
               checkpoint_bytes=size, waited_seconds=waited, written_seconds=written)  # fmt: skip
    every = composed_config(["+experiment=pretrain"]).callbacks.checkpoint_every_steps
    if step := bench.before.get("training", {}).get("step_seconds"):
        share = waited / (every * step)
        bench.record(
            f"of the training time, with one every {number_of(every, 'step')}", f"{share:.3%}", checkpoint_share=share
        )


def benchmark(bench: Bench) -> None:
    """Measure speed against the installed compiled peers, within the time limit."""
    packages = {"Hugging Face": "transformers", "litgpt": "litgpt"}
    peers = ["cucafera", *(peer for peer, package in packages.items() if importlib.util.find_spec(package))]
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
            bench.record(
                f"{row['name']}, {setting}", f"{number_of(round(row['tokens_per_second']), 'token')} per second"
            )
        compare(bench, setting, {row["name"]: row["tokens_per_second"] for row in facts["rows"]})
    if found["skipped"]:
        bench.record("not measured (time limit)", f"{len(found['skipped'])} of {2 * len(peers)}")
    for name, why in found["missing"].items():
        bench.record(name, why)
    wrong = [name for name, why in found["missing"].items() if why.startswith("failed")]
    if wrong:
        raise FailureError(f"{', '.join(wrong)} failed")
    if not any(row["name"].startswith("cucafera") for facts in found["settings"].values() for row in facts["rows"]):
        raise FailureError("cucafera could not be measured in this time")


def compare(bench: Bench, setting: str, speeds: Mapping[str, float]) -> None:
    """Report the speed over that of the fastest peer."""
    ours = [speed for name, speed in speeds.items() if name.startswith("cucafera")]
    peers = {name: speed for name, speed in speeds.items() if not name.startswith(("cucafera", "bare loop"))}
    if not ours or not peers:
        return
    fastest = max(peers, key=lambda name: peers[name])
    ratio = max(ours) / peers[fastest]
    is_goal = setting == "documents" and not bench.small
    bench.record(
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
"""Stages with their shares of the time. Those that others depend on come first; the last uses the remaining time."""


def run_stage(bench: Bench) -> int:
    """Run a stage in this process. Return the exit status."""
    bench.write("failed", NO_RESULT)
    if bench.name != "benchmark":  # whose peers run with default settings
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
        name: Name of the stage.
        share: Weight of its share of the time.
        command: Command of its process; the time limit in seconds is appended.
    """

    name: str
    share: float
    command: list[str]


def accept(stages: Sequence[Planned], folder: Path, seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
    """Run the stages in order, and write acceptance.json after each.

    Args:
        stages: Stages to run.
        folder: Folder for results.
        seconds: Time limit for all stages.
        facts: Further content of acceptance.json.

    Returns:
        The content of acceptance.json: the facts and, as `stages`, the result of each.
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
    """Return the time limit of the first stage, from the seconds left for all: start-up, and its share of the rest."""
    start = min(START_SECONDS, left / (2 * len(stages)))
    return max(1.0, start + (left - start * len(stages)) * stages[0].share / sum(stage.share for stage in stages))


def result_of(stage: Planned, folder: Path, limit: float, log: Any) -> dict[str, Any]:
    """Run one stage within its time limit. Return its result, with the results so far if it was killed."""
    path = result_path(folder, stage.name)
    path.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["PYTHONUNBUFFERED"] = "1"
    started = time.monotonic()
    # In a new process group, so that its child processes are killed with it.
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
    found = {"status": "failed", "why": NO_RESULT, "rows": [], "figures": {}}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
    if overran:
        found |= {"status": "overran", "why": f"killed after its {limit:.0f} s"}
    elif process.returncode and found["status"] != "failed":
        found |= {"status": "failed", "why": f"ended with status {process.returncode}"}
    return {"name": stage.name, "seconds": round(time.monotonic() - started, 1), "limit": round(limit, 1), **found}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Terminate the remaining processes of a stage."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(GRACE_SECONDS)  # the benchmark terminates a process group too
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def terminal_table(content: dict[str, Any]) -> str:
    """Return all results as a table for the terminal."""
    lines = []
    for result in content["stages"]:
        why = f"  {result['why']}" if result["why"] else ""
        lines += ["", f"{result['name']:14}{result['status'].upper():10}{result['seconds']:>6.0f} s{why}"]
        lines += [f"  {row['what']:56}{row['value']}{shown_goal(row, '  [', ']')}" for row in result["rows"]]
        lines += ["  " + line for line in result["figures"].get("profile", "").splitlines()]
    return "\n".join(lines)


def shown_goal(row: dict[str, Any], before: str = "", after: str = "") -> str:
    """Format the goal of a row, and whether it was reached."""
    if not row["goal"]:
        return ""
    verdict = {None: "", True: ": reached", False: ": below goal"}[row["is_met"]]
    return f"{before}goal {row['goal']}{verdict}{after}"


def markdown(content: dict[str, Any]) -> str:
    """Return the results as a section of scripts/README.md."""
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
    """Parse the command line, and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="time limit for all stages together (560; 280 if small)")
    parser.add_argument("--out", type=Path, default=Path("outputs/acceptance"), help="folder for results (%(default)s)")
    parser.add_argument("--stage", action="append", choices=STAGES, help="stage to run; may be repeated; default: all")
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stage is terminated too
    try:
        content = accept(stages, folder, seconds, facts)
    finally:
        shutil.rmtree(folder / "work", ignore_errors=True)
    write_text(folder / "acceptance.md", markdown(content))
    print(terminal_table(content))
    print(f"\n{folder}/acceptance.json, acceptance.md (for scripts/README.md) and acceptance.log")
    wrong = [result["name"] for result in content["stages"] if result["status"] in ("failed", "overran")]
    if wrong:
        sys.exit(f"not accepted: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
