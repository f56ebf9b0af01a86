"""Training speed against peers, with the same batches, optimizer, precision and machine, each in a separate process.

    python scripts/benchmark_training.py                            the quickstart's model on a CPU
    python scripts/benchmark_training.py --model cucafera           the 245M model; on a GPU in bf16, on a CPU in fp32
    python scripts/benchmark_training.py --out outputs/training     also outputs/training.json and outputs/training.png
    python scripts/benchmark_training.py --compiled-only --setting documents --seconds 300

    cucafera        the training path of `cucafera.run`: Lightning, guards, curves, data loading
    bare loop       the same model in a bare loop: the difference is the cost of Lightning
    Hugging Face    LlamaForCausalLM with SDPA attention and its own loss
    nanochat-like   a plain loop like nanochat's: SDPA, a residual stream in bf16, all logits in fp32
    litgpt          litgpt's GPT
    original        the original architecture in a plain loop: attention with the full matrix, all logits at once

Settings, for --setting:
    windows         attention over full windows and a small batch (65,536 tokens per step on a GPU); on a GPU all peers
                    have micro-batches of 8 windows, which fit those that hold all logits (original: 4)
    documents       the training configuration: document masking, 524,288 tokens per step on a GPU, and micro-batches
                    chosen automatically. Peers have the same batch, but do not support document masking

Each peer is measured in eager mode, and compiled by torch.compile. A round starts every process once, for some warm-up
steps, the first of which includes compilation, and then the measured steps. Peers run in turn, so that other load on
the machine affects all of them. FILE.json is written after each measurement, so that stopping this script, or the limit
of --seconds, loses no earlier measurement.

Tokens/s is of the median step. MFU counts full attention (and its causal half) against the rate of a large matrix
product on this machine, measured in the same run, and on a GPU also against its data sheet. Memory is the peak of the
process, or of the GPU; `above` excludes weights, gradients and moments, which are the same for all. A peer that is not
installed is reported as missing.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cucafera.config.command_line import composed_config
from cucafera.config.schema import Config, ModelConfig
from cucafera.data.packed import DocumentData, open_documents
from cucafera.data.windows import Batch
from cucafera.model.flops import parameter_count, peak_flops, training_flops_per_token
from cucafera.process import keep_freed_memory, let_threads_wait_briefly
from cucafera.quantities import number_of
from cucafera.storage import write_text
from cucafera.training.hardware import Hardware, decide_hardware

PEERS = ("cucafera", "Hugging Face", "nanochat-like", "litgpt", "original", "bare loop")
OURS = ("cucafera", "bare loop")
"""Run with the process settings of `cucafera.run`, and mask documents; the others run with defaults."""
SETTINGS = {
    "windows": {
        "cpu": ["data.document_masking=false", "batch_tokens=2048"],
        "cuda": ["data.document_masking=false", "batch_tokens=65_536", "trainer.micro_batch_windows=8"],
    },
    "documents": {
        "cpu": ["data.document_masking=true", "batch_tokens=4096"],
        "cuda": ["data.document_masking=true", "batch_tokens=524_288"],
    },
}
"""Overrides of the configuration, by setting and device."""
PEER_WINDOWS = {"original": 4}
"""Windows per micro-batch on a GPU with 80 GB, for peers that do not fit 8."""
UNCOUNTED_STEPS = 2
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
STATE_BYTES = 16
"""Per parameter: weight, gradient and two moments, in fp32."""
MIN_SECONDS = 5
"""No measurement is started with less left of --seconds."""
MATRIX = "matrix products"
"""In place of a peer, in the measurement of the reference rate for MFU."""
Loss = Callable[[Batch], Tensor]
"""The mean loss of a batch of windows on the device."""


# The peers. Each returns its module and its loss function; only the bare loop uses the hardware settings.


def bare_loop(config: ModelConfig, hardware: Hardware) -> tuple[nn.Module, Loss]:
    """cucafera's decoder."""
    from cucafera.model.attention import document_limit
    from cucafera.training.module import build_decoder

    model, limit = build_decoder(config, hardware), 0

    def loss(batch: Batch) -> Tensor:
        nonlocal limit
        if hardware.document_attention.startswith("flash") and batch.document_counts:
            limit = document_limit(sum(batch.document_counts), limit)
        nats = model(batch.input_ids, batch.targets, batch.documents, document_limit=limit or None)
        return nats / batch.targets.numel()

    return model, loss


class PlainBlock(nn.Module):
    """Attention and gated MLP. Like the original: attention with the full matrix, unfused norms, repeated keys. Or
    `fused`, like nanochat: SDPA with grouped queries, one operation per norm."""

    def __init__(self, config: ModelConfig, fused: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.fused = fused
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = width // self.heads
        self.norms = nn.ParameterList([torch.ones(width), torch.ones(width)])
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * self.groups * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        normed = root_mean_square_norm(x, self.norms[0], self.fused)
        queries = turned(self.query(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2), cos, sin)
        keys, values = self.key_value(normed).unflatten(-1, (2 * self.groups, -1)).transpose(1, 2).chunk(2, dim=1)
        keys = turned(keys, cos, sin)
        if self.fused:
            mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        else:
            keys, values = (part.repeat_interleave(self.heads // self.groups, dim=1) for part in (keys, values))
            scores = (queries @ keys.transpose(2, 3)) / math.sqrt(self.head_dim)
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            mixed = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        normed = root_mean_square_norm(x, self.norms[1], self.fused)
        return x + self.down(F.gelu(self.gate(normed), approximate="tanh") * self.up(normed))


def root_mean_square_norm(x: Tensor, gain: Tensor, fused: bool) -> Tensor:
    """Root mean square norm of the last dimension."""
    if fused:
        return F.rms_norm(x, gain.shape, gain.to(x.dtype), 1e-5)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, H, T, d], in its dtype; the tables are [T, d]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class PlainDecoder(nn.Module):
    """Embedding, blocks and the tied head, in the dtype of the embedding, or of autocast if it is `fused`."""

    def __init__(self, config: ModelConfig, fused: bool) -> None:
        super().__init__()
        from cucafera.model.transformer import rotary_tables

        self.fused = fused
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(config, fused) for _ in range(config.num_hidden_layers))
        self.gain = nn.Parameter(torch.ones(config.hidden_size))
        for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True):
            self.register_buffer(name, torch.cat([table, table], dim=-1), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """[B, T] ids and targets to the mean loss."""
        tokens, device = input_ids.shape[1], input_ids.device.type
        x, cos, sin = self.embedding(input_ids), self.cos[:tokens], self.sin[:tokens]
        if self.fused and torch.is_autocast_enabled(device):
            x, cos, sin = (part.to(torch.get_autocast_dtype(device)) for part in (x, cos, sin))
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(root_mean_square_norm(x, self.gain, self.fused), self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def original(config: ModelConfig, hardware: Hardware) -> tuple[nn.Module, Loss]:
    """The original architecture."""
    model = PlainDecoder(config, fused=False)
    return model, lambda batch: model(batch.input_ids, batch.targets)


def nanochat_like(config: ModelConfig, hardware: Hardware) -> tuple[nn.Module, Loss]:
    """nanochat's implementation, with the architecture of all peers: gains, GeGLU and a tied head."""
    model = PlainDecoder(config, fused=True)
    return model, lambda batch: model(batch.input_ids, batch.targets)


def hugging_face(config: ModelConfig, hardware: Hardware) -> tuple[nn.Module, Loss]:
    """transformers' Llama; it shifts the labels itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(**dataclasses.asdict(config), tie_word_embeddings=True, attn_implementation="sdpa")
    model = LlamaForCausalLM(settings)
    return model, lambda batch: model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss


def litgpt(config: ModelConfig, hardware: Hardware) -> tuple[nn.Module, Loss]:
    """litgpt's GPT with the same shape; its head is not tied, which costs memory but no arithmetic."""
    from litgpt import GPT
    from litgpt.config import Config as LitConfig

    model = GPT(
        LitConfig(
            block_size=config.max_position_embeddings, padded_vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, n_embd=config.hidden_size,
            n_query_groups=config.num_key_value_heads, rotary_percentage=1.0, parallel_residual=False, bias=False,
            norm_class_name="RMSNorm", mlp_class_name="GemmaMLP", intermediate_size=config.intermediate_size,
            gelu_approximate="tanh",
        )
    )  # fmt: skip

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.targets.flatten())

    return model, loss


LOOPS = {
    "bare loop": bare_loop, "original": original, "Hugging Face": hugging_face, "nanochat-like": nanochat_like,
    "litgpt": litgpt,
}  # fmt: skip


# One measurement, in a separate process.


def measured(peer: str, config: Config) -> dict[str, Any]:
    """Return seconds per step, the first separately; peak memory; and for cucafera, the share of waiting for data."""
    from cucafera.training.callbacks.throughput import peak_memory_bytes

    if peer in OURS:
        keep_freed_memory()
    hardware = decide_hardware(config, os.environ)
    device = torch.device(hardware.accelerator)
    data = open_documents(config)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    waiting = None
    started = time.perf_counter()
    if peer == "cucafera":
        ends, waiting = product(config, hardware, data)
    else:
        ends = loop(peer, config, hardware, data, device)
    times = [after - before for before, after in itertools.pairwise([started, *ends])]
    return {
        "first_step_seconds": times[0],
        "step_seconds": times[UNCOUNTED_STEPS:],
        "peak_bytes": peak_memory_bytes(device),
        "micro_batch_windows": hardware.micro_batch_windows,
        "data_wait": waiting,
    }


def product(config: Config, hardware: Hardware, data: DocumentData) -> tuple[list[float], float]:
    """Return the end of each step of the training path, and the share of the time spent waiting for data."""
    import lightning.pytorch as pl

    from cucafera.runs.folder import RunFolder
    from cucafera.training.callbacks.interruption import Interruption
    from cucafera.training.data_module import WindowDataModule
    from cucafera.training.module import LanguageModel
    from cucafera.training.trainer import build_callbacks, build_trainer

    ends: list[float] = []

    class StepEnds(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
            waited_for(pl_module.device)
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as directory:
        folder = RunFolder(Path(directory))
        callbacks = build_callbacks(config, hardware, folder, None, [], Interruption(config, time.monotonic()), [], {})
        trainer = build_trainer(config, hardware, folder, callbacks, first_step=0)
        # The others do nothing between two validations and checkpoints, which the peers do not have.
        trainer.callbacks = [callbacks.interruption, callbacks.guards, callbacks.throughput, StepEnds()]  # type: ignore[attr-defined]
        trainer.fit(LanguageModel(config, hardware), WindowDataModule(data))
    return ends, callbacks.throughput.waiting_seconds / callbacks.throughput.training_seconds


def loop(peer: str, config: Config, hardware: Hardware, data: DocumentData, device: torch.device) -> list[float]:
    """Return the end of each step of a bare loop."""
    model, loss_of = LOOPS[peer](config.model, hardware)
    model.to(device)
    if hardware.compile:
        model.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, betas=tuple(config.optimizer.betas), fused=True
    )
    ends = []
    for step in range(config.total_steps):
        batch = on_device(data.training_steps(())[step], device, peer in OURS)
        micro_batches = list(batch.split(hardware.micro_batch_windows))
        for micro_batch in micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=hardware.precision == "bf16"):
                loss = loss_of(micro_batch) / len(micro_batches)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        waited_for(device)
        ends.append(time.perf_counter())
    return ends


def on_device(batch: Batch, device: torch.device, is_ours: bool) -> Batch:
    """Return a step's windows on the device; the peers take int64 and no documents."""
    ids = {} if is_ours else {"dtype": torch.int64}
    documents = None if batch.documents is None or not is_ours else batch.documents.to(device)
    return batch._replace(
        input_ids=batch.input_ids.to(device, **ids), targets=batch.targets.to(device, **ids), documents=documents
    )


def waited_for(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of a large matrix product, the best of 12."""
    size = MATRIX_SIZE[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        waited_for(device)
        started = time.perf_counter()
        left @ right
        waited_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


# All measurements, and their tables.


class Measurement(NamedTuple):
    """The measurement of one process."""

    setting: str
    peer: str
    compiled: bool

    @property
    def row(self) -> str:
        """Name in the table of its setting."""
        unmasked = self.setting == "documents" and self.peer not in OURS
        return self.peer + (", compiled" if self.compiled else "") + (" (not masked)" if unmasked else "")


def device_of(arguments: argparse.Namespace) -> str:
    """Return cpu or cuda."""
    on_cpu = {"trainer=cpu", "trainer.accelerator=cpu"} & set(arguments.overrides)
    return "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"


def configured(arguments: argparse.Namespace, what: Measurement) -> Config:
    """Return the configuration of a measurement; within a setting, micro-batch and compilation differ."""
    device = device_of(arguments)
    size = list(SETTINGS[what.setting][device])
    if device == "cuda" and what.peer not in OURS:
        size.append(f"trainer.micro_batch_windows={PEER_WINDOWS.get(what.peer, 8)}")
    config = composed_config(
        [
            f"model={arguments.model}", "tokenizer.vocab_size=1024", "logger=none", "schedule.warmup_steps=0",
            "callbacks.validate_every_steps=0", "callbacks.checkpoint_every_steps=0", "callbacks.log_every_steps=10",
            "budget_tokens=1e9", *size, *arguments.overrides,
        ]
    )  # fmt: skip
    config.trainer.compile = what.compiled
    config.budget_tokens = (UNCOUNTED_STEPS + arguments.steps) * config.batch_tokens
    return config


def measure_apart(what: Measurement, seconds: float | None) -> dict[str, Any] | str:
    """Run a measurement in a new process. Return it, or the reason why there is none, such as the time limit."""
    compiled = "compiled" if what.compiled else "eager"
    command = [sys.executable, __file__, *sys.argv[1:], "--only", what.setting, what.peer, compiled]
    environment = dict(os.environ)
    if what.peer in OURS:
        let_threads_wait_briefly(environment)
    # In a new process group, so that its compile and data workers are killed with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, process_group=0
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "killed: time limit (--seconds)"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        last = (errors.strip() or f"exit status {process.returncode}, without a message").splitlines()[-1]
        return f"not installed: {last}" if "ModuleNotFoundError" in last else f"failed: {last}"
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


class Results:
    """All measurements.

    Attributes:
        setup: Device, model and matrix rate.
        settings: By setting: tokens per step and FLOPs per token.
        measurements: By setting and row: the measurement of each round.
        missing: Rows, or peers, that could not be measured, with the reason.
        skipped: Measurements that the time limit did not allow.
    """

    def __init__(self, setup: dict[str, Any], settings: dict[str, dict[str, int]]) -> None:
        self.setup = setup
        self.settings = settings
        self.measurements: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in settings}
        self.missing: dict[str, str] = {}
        self.skipped: list[str] = []

    def rows(self, setting: str) -> list[dict[str, Any]]:
        """Return the figures of a table, the fastest first."""
        measured, tokens = self.measurements[setting], self.settings[setting]["batch_tokens"]
        if not measured:
            return []
        medians = {
            name: [statistics.median(result["step_seconds"]) for result in found] for name, found in measured.items()
        }
        candidates = [name for name in measured if name.startswith("cucafera")] or list(measured)
        base = min(candidates, key=lambda name: statistics.median(medians[name]))
        rows = []
        for name, found in measured.items():
            speeds = [tokens / seconds for result in found for seconds in result["step_seconds"]]
            speed = statistics.median(speeds)
            low, _, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else (speed, speed, speed)
            pairs = zip(medians[base], medians[name], strict=False)  # the last round may be incomplete
            peak = max(result["peak_bytes"] for result in found)
            mfu = self.settings[setting]["flops_per_token"] * speed / self.setup["matrix_flops"]
            causal = self.settings[setting]["causal_flops_per_token"] / self.settings[setting]["flops_per_token"]
            rows.append(
                {
                    "name": name, "tokens_per_second": speed, "quartiles": [low, high], "of": base,
                    "ratio": statistics.median(ours / theirs for ours, theirs in pairs), "mfu": mfu,
                    "mfu_causal": causal * mfu, "peak_bytes": peak, "rounds": len(found),
                    "bytes_above_state": max(0, peak - STATE_BYTES * self.setup["parameters"]),
                    "micro_batch_windows": found[0]["micro_batch_windows"], "data_wait": found[0]["data_wait"],
                    "first_step_seconds": found[0]["first_step_seconds"],
                }
            )  # fmt: skip
        return sorted(rows, key=lambda row: -row["tokens_per_second"])

    def write(self, path: Path) -> None:
        """Write all results as JSON, atomically."""
        content = {
            **self.setup, "missing": self.missing, "skipped": self.skipped,
            "settings": {
                name: {**facts, "rows": self.rows(name), "measurements": self.measurements[name]}
                for name, facts in self.settings.items()
            },
        }  # fmt: skip
        write_text(path, json.dumps(content, indent=1) + "\n")

    def report(self) -> str:
        """Return the tables."""
        setup = self.setup
        lines = [
            f"{setup['model']}: {number_of(setup['parameters'], 'parameter')}, on {setup['device']}; matrix "
            "products reach "
            f"{setup['matrix_flops'] / 1e12:.2f} TFLOP/s"
        ]
        for setting, facts in self.settings.items():
            if not self.measurements[setting]:
                continue
            masked = "; not masked: full windows, by a peer without document masking" if setting == "documents" else ""
            lines += ["", f"{setting}: {number_of(facts['batch_tokens'], 'token')} per step{masked}", ""]
            lines += [
                f"{'':32}{'tokens/s':>10}{'quartiles':>21}{'ratio':>7}{'MFU':>8}{'causal':>8}{'memory':>11}{'above':>11}"
                f"{'first':>9}"
            ]
            for row in self.rows(setting):
                low, high = row["quartiles"]
                lines.append(
                    f"{row['name']:32}{row['tokens_per_second']:>10,.0f}{f'{low:,.0f} to {high:,.0f}':>21}"
                    f"{row['ratio']:>7.2f}{row['mfu']:>8.1%}{row['mfu_causal']:>8.1%}"
                    f"{row['peak_bytes'] / 2**30:>7.2f} GiB{row['bytes_above_state'] / 2**30:>7.2f} GiB"
                    f"{row['first_step_seconds']:>7.1f} s"
                )
        lines += ["", *(f"{name:32}{why}" for name, why in self.missing.items())]
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)} measurements for lack of time, from {self.skipped[0]} on")
        lines += [
            "ratio: speed over that of the fastest of cucafera in the same table, median of the rounds. MFU: of the",
            "rate of matrix products, with full attention, and with its causal half. above: memory",
            "above weights, gradients and moments. first: the first step, including compilation.",
        ]
        for setting, facts in self.settings.items():
            for row in self.rows(setting):
                if row["data_wait"] is not None:
                    peak = peak_flops(setup["device"])
                    rate = facts["flops_per_token"] * row["tokens_per_second"]
                    sheet = f", {rate / peak:.1%} of the data sheet's dense bf16 peak" if peak else ""
                    lines.append(
                        f"{row['name']} ({setting}): waits for data {row['data_wait']:.2%} of the time{sheet}."
                    )
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Draw one bar per row, with the quartiles of its steps."""
        from matplotlib.figure import Figure

        rows = [(setting, row) for setting in self.settings for row in reversed(self.rows(setting))]
        figure = Figure(figsize=(7.2, 0.6 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for setting, row in rows:
            speed, (low, high) = row["tokens_per_second"], row["quartiles"]
            colour = "C1" if row["name"].startswith("cucafera") else "C0"
            axes.barh(
                f"{row['name']} ({setting})", speed, color=colour, xerr=[[speed - low], [high - speed]], capsize=2
            )
        axes.set_xlabel("training speed (tokens per second)")
        figure.savefig(path, dpi=200)


def facts_of(config: Config) -> dict[str, int]:
    """Return tokens per step and FLOPs per token of a setting."""
    return {
        "batch_tokens": config.batch_tokens,
        "flops_per_token": training_flops_per_token(config.model, config.sequence_length),
        "causal_flops_per_token": training_flops_per_token(config.model, config.sequence_length, causal_half=True),
    }


def measure_all(arguments: argparse.Namespace) -> Results:
    """Run all measurements that the time limit allows, and write the results after each."""
    deadline = math.inf if arguments.seconds is None else time.monotonic() + arguments.seconds
    first = {name: configured(arguments, Measurement(name, "cucafera", True)) for name in arguments.setting}
    setup: dict[str, Any] = {"model": arguments.model, "parameters": parameter_count(first[arguments.setting[0]].model)}
    results = Results(setup, {name: facts_of(config) for name, config in first.items()})
    rate = measure_apart(Measurement(arguments.setting[0], MATRIX, False), arguments.seconds)
    if isinstance(rate, str):
        sys.exit(f"matrix products could not be measured: {rate}")
    setup |= rate
    kinds = (True,) if arguments.compiled_only else (False, True)
    plan = itertools.product(range(arguments.rounds), arguments.setting, arguments.peer or PEERS, kinds)
    for number, *rest in plan:
        what = Measurement(*rest)
        if what.peer in results.missing or f"{what.row} ({what.setting})" in results.missing:
            continue
        seconds = deadline - time.monotonic()
        name = f"round {number + 1}, {what.setting}: {what.row}"
        found = (
            "not started" if seconds < MIN_SECONDS else measure_apart(what, None if math.isinf(seconds) else seconds)
        )
        if isinstance(found, dict):
            results.measurements[what.setting].setdefault(what.row, []).append(found)
            speed = results.settings[what.setting]["batch_tokens"] / statistics.median(found["step_seconds"])
            print(f"{name:60}{speed:>12,.0f} tokens/s", flush=True)
        elif found.startswith(("not started", "killed")):
            results.skipped.append(name)
        else:
            results.missing[what.peer if found.startswith("not installed") else f"{what.row} ({what.setting})"] = found
            results.measurements[what.setting].pop(what.row, None)
            print(f"{name:60}{found}", flush=True)
        if arguments.out:
            results.write(arguments.out.with_suffix(".json"))
    return results


def main() -> None:
    """Run all measurements, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a preset of conf/model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="measured steps per round")
    parser.add_argument("--peer", action="append", choices=PEERS, help="peer to measure; may be repeated; default: all")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="may be repeated (windows)")
    parser.add_argument("--compiled-only", action="store_true", help="no measurements in eager mode")
    parser.add_argument("--seconds", type=float, help="time limit: measurements beyond it are skipped or killed")
    parser.add_argument("--out", type=Path, help="path of FILE.json and FILE.png")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, such as batch_tokens=16384")
    arguments = parser.parse_intermixed_args()
    arguments.setting = list(dict.fromkeys(arguments.setting or ["windows"]))
    if arguments.only:
        setting, peer, compiled = arguments.only
        if peer == MATRIX:
            device = torch.device(device_of(arguments))
            name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
            rate = matrix_rate(device, "bf16" if device.type == "cuda" else "fp32")
            print(json.dumps({"device": name, "matrix_flops": rate}))
        else:
            what = Measurement(setting, peer, compiled == "compiled")
            print(json.dumps(measured(peer, configured(arguments, what))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the measuring process is killed too
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = measure_all(arguments)
    print()
    print(results.report())
    if arguments.out and any(results.measurements.values()):
        try:
            results.draw(arguments.out.with_suffix(".png"))
        except ModuleNotFoundError as error:
            print(f"No picture: {error}")


if __name__ == "__main__":
    main()
