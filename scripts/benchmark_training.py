"""Training speed beside its peers: the same batches, optimizer, precision and machine, each in a process of its own.

    python scripts/benchmark_training.py                            the quickstart's model on a CPU
    python scripts/benchmark_training.py --model cucafera           the 245M model; on a GPU in bf16, on a CPU in fp32
    python scripts/benchmark_training.py --out outputs/training     also outputs/training.json and outputs/training.png

    cucafera        the product's training path: Lightning, guards, curves, data loading
    bare loop       the same model in a loop with nothing around it: what Lightning costs
    original        the original's architecture as a plain loop: attention with its whole matrix, all logits at once
    Hugging Face    LlamaForCausalLM with SDPA attention and its own loss
    litgpt          litgpt's GPT

Each of them is measured as it is written, and compiled by torch.compile. A round starts every process once; it takes
some steps that are not counted, of which the first holds the compilation, and then those that are. So the peers come in
turn, and a machine that is busy for a while is busy for all.

Tokens/s is of the median step. MFU counts attention over the whole window (and over its causal half) against the rate
that this machine reaches in a large matrix product, measured in the same run, or on a GPU also against its data sheet.
Memory is the most that the process, or the GPU, has held; `above the state` leaves out weights, gradients and moments,
which are the same for all. A peer that is not installed is named as missing.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cucafera.composition import composed_config
from cucafera.config import Config, ModelConfig
from cucafera.data.packed import PackedDataModule
from cucafera.data.windows import Batch
from cucafera.model.flops import parameter_count, peak_flops, training_flops_per_token
from cucafera.training.process import keep_freed_memory, let_threads_wait_briefly

PEERS = ("cucafera", "bare loop", "original", "Hugging Face", "litgpt")
OURS = ("cucafera", "bare loop")
"""Run in a process that is set up as the product's; the others as a person would start them."""
UNCOUNTED_STEPS = 2
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
STATE_BYTES = 16
"""A parameter's weight, gradient and both moments, in fp32."""
Loss = Callable[[Batch], Tensor]
"""The mean loss of a batch of windows on the device."""


# The peers. Each returns its module and what computes its loss.


def bare_loop(config: ModelConfig) -> tuple[nn.Module, Loss]:
    """Our own decoder."""
    from cucafera.model.transformer import Decoder

    model = Decoder(config)
    return model, lambda batch: model(batch.input_ids, batch.targets, batch.documents) / batch.targets.numel()


class OriginalBlock(nn.Module):
    """Attention that makes its whole matrix, keys and values repeated for every head; norms and rotation in parts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = width // self.heads
        self.norms = nn.ParameterList([torch.ones(width), torch.ones(width)])
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * self.groups * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        normed = root_mean_square_norm(x, self.norms[0])
        queries = turned(self.query(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2), cos, sin)
        keys, values = self.key_value(normed).unflatten(-1, (2 * self.groups, -1)).transpose(1, 2).chunk(2, dim=1)
        keys = turned(keys, cos, sin).repeat_interleave(self.heads // self.groups, dim=1)
        values = values.repeat_interleave(self.heads // self.groups, dim=1)
        scores = (queries @ keys.transpose(2, 3)) / math.sqrt(self.head_dim)
        weights = scores.masked_fill(mask, -math.inf).softmax(-1)
        x = x + self.out((weights @ values).transpose(1, 2).flatten(2))
        normed = root_mean_square_norm(x, self.norms[1])
        return x + self.down(F.gelu(self.gate(normed), approximate="tanh") * self.up(normed))


def root_mean_square_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x over the root of its mean square, times the gain."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, H, T, d]; the tables are [T, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Original(nn.Module):
    """The whole of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        from cucafera.model.transformer import rotary_tables

        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(OriginalBlock(config) for _ in range(config.num_hidden_layers))
        self.gain = nn.Parameter(torch.ones(config.hidden_size))
        for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True):
            self.register_buffer(name, torch.cat([table, table], dim=-1), persistent=False)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """[B, T] ids and targets to the mean loss."""
        tokens = input_ids.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=input_ids.device).triu(1)
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, self.cos[:tokens], self.sin[:tokens], mask)
        logits = F.linear(root_mean_square_norm(x, self.gain), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def original(config: ModelConfig) -> tuple[nn.Module, Loss]:
    """The original's architecture."""
    model = Original(config)
    return model, lambda batch: model(batch.input_ids, batch.targets)


def hugging_face(config: ModelConfig) -> tuple[nn.Module, Loss]:
    """transformers' Llama; it shifts the labels itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(**dataclasses.asdict(config), tie_word_embeddings=True, attn_implementation="sdpa")
    model = LlamaForCausalLM(settings)
    return model, lambda batch: model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss


def litgpt(config: ModelConfig) -> tuple[nn.Module, Loss]:
    """litgpt's GPT with the same shape; its head is not tied, which costs memory and no products."""
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


LOOPS = {"bare loop": bare_loop, "original": original, "Hugging Face": hugging_face, "litgpt": litgpt}


# One measurement, in a process of its own.


def measured(peer: str, config: Config, compiled: bool, steps: int) -> dict[str, Any]:
    """Seconds of each step, the first apart; most memory in use; and of the product, the share of waiting for data."""
    from cucafera.training.callbacks.throughput import peak_memory_bytes
    from cucafera.training.hardware import decide_hardware

    if peer in OURS:
        keep_freed_memory()
    config.trainer.compile = compiled
    config.budget_tokens = (UNCOUNTED_STEPS + steps) * int(config.batch_tokens)
    hardware = decide_hardware(config, os.environ)
    device = torch.device(hardware.accelerator)
    data = PackedDataModule(config)
    data.prepare_data()
    data.setup()
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
        "data_wait": waiting,
    }


def product(config: Config, hardware: Any, data: PackedDataModule) -> tuple[list[float], float]:
    """The end of each step on the product's training path, and the share of the time spent waiting for data."""
    import lightning.pytorch as pl

    from cucafera.training.callbacks.interruption import Interruption
    from cucafera.training.module import LanguageModel
    from cucafera.training.run_folder import RunFolder
    from cucafera.training.trainer import build_callbacks, build_trainer

    ends: list[float] = []

    class StepEnds(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
            waited_for(pl_module.device)
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as directory:
        folder = RunFolder(Path(directory))
        callbacks = build_callbacks(config, hardware, folder, None, [], Interruption(config, time.monotonic()), [])
        trainer = build_trainer(config, hardware, folder, callbacks, first_step=0)
        # The others do nothing between two validations and checkpoints, which the peers have not.
        trainer.callbacks = [callbacks.interruption, callbacks.guards, callbacks.throughput, StepEnds()]  # type: ignore[attr-defined]
        trainer.fit(LanguageModel(config, hardware), data)
    return ends, callbacks.throughput.waiting_seconds / callbacks.throughput.training_seconds


def loop(peer: str, config: Config, hardware: Any, data: PackedDataModule, device: torch.device) -> list[float]:
    """The end of each step of a loop with nothing around it."""
    model, loss_of = LOOPS[peer](config.model)
    model.to(device)
    if hardware.compile:
        model.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, betas=tuple(config.optimizer.betas), fused=True
    )
    ends = []
    for step in range(config.total_steps):
        batch = on_device(data.training_steps[step], device)
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


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, in int64: PyTorch's cross-entropy takes no other targets."""
    return batch._replace(
        input_ids=batch.input_ids.to(device, torch.int64),
        targets=batch.targets.to(device, torch.int64),
        documents=None if batch.documents is None else batch.documents.to(device),
    )


def waited_for(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product, the best of some."""
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


# All of them, and what they come to.


def configured(arguments: argparse.Namespace) -> Config:
    """The configuration that all measurements share."""
    on_gpu = torch.cuda.is_available() and not {"trainer=cpu", "trainer.accelerator=cpu"} & set(arguments.overrides)
    # On a GPU as many windows at a time as the peers, who hold all logits, can be given in 80 GB.
    size = ["batch_tokens=65_536", "trainer.micro_batch_windows=8"] if on_gpu else ["batch_tokens=2048"]
    return composed_config(
        [
            f"model={arguments.model}", "tokenizer.vocab_size=1024", "data.document_masking=false", "logger=none",
            "schedule.warmup_steps=0", "callbacks.validate_every_steps=0", "callbacks.checkpoint_every_steps=0",
            "callbacks.log_every_steps=10", "budget_tokens=1e9", *size, *arguments.overrides,
        ]
    )  # fmt: skip


def run_apart(arguments: argparse.Namespace, peer: str, compiled: bool) -> dict[str, Any] | str:
    """A measurement in a new process; or what kept it from being made."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", peer, *(["--compiled"] if compiled else [])]
    environment = dict(os.environ)
    if peer in OURS:
        let_threads_wait_briefly(environment)
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        last = (result.stderr.strip() or "no word").splitlines()[-1]
        return f"not installed: {last}" if "ModuleNotFoundError" in last else f"failed: {last}"
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def report(config: Config, rounds: dict[str, list[dict[str, Any]]], missing: dict[str, str], rate: float) -> str:
    """The table."""
    device = "cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu"
    tokens = int(config.batch_tokens)
    full = training_flops_per_token(config.model, config.sequence_length)
    half = training_flops_per_token(config.model, config.sequence_length, causal_half=True)
    state = STATE_BYTES * parameter_count(config.model)
    best = max((name for name in rounds if name.startswith("cucafera")), key=lambda name: speed(rounds[name], tokens))
    lines = [
        f"{config.name}: {parameter_count(config.model):,} parameters, {tokens:,} tokens a step, on {device}; "
        f"matrix products reach {rate / 1e12:.2f} TFLOP/s",
        "",
        f"{'':24}{'tokens/s':>10}{'quartiles':>19}{'ratio':>8}{'MFU':>8}{'causal':>8}{'memory':>10}{'above':>10}{'first':>9}",
    ]
    for name, results in sorted(rounds.items(), key=lambda item: -speed(item[1], tokens)):
        per_second = speed(results, tokens)
        low, _, high = statistics.quantiles([tokens / s for r in results for s in r["step_seconds"]], n=4)
        pairs = zip(rounds[best], results, strict=True)
        ratio = statistics.median(
            statistics.median(r["step_seconds"]) / statistics.median(b["step_seconds"]) for b, r in pairs
        )
        peak = max(result["peak_bytes"] for result in results)
        first = results[0]["first_step_seconds"]
        lines.append(
            f"{name:24}{per_second:>10,.0f}{f'{low:,.0f} to {high:,.0f}':>19}{1 / ratio:>8.2f}"
            f"{full * per_second / rate:>8.1%}{half * per_second / rate:>8.1%}{peak / 2**30:>6.2f} GiB"
            f"{max(0, peak - state) / 2**30:>6.2f} GiB{first:>7.1f} s"
        )
    lines += [f"{name:24}{why}" for name, why in missing.items()]
    wait = statistics.median(result["data_wait"] for result in rounds[best])
    lines += [
        "",
        f"ratio: speed over that of {best}, median of the rounds. MFU: of the rate of matrix products, with",
        "attention over the whole window, and over its causal half. above: memory above weights, gradients and",
        f"moments. first: the first step, compilation included. {best} waits for data {wait:.2%} of the time.",
    ]
    if device == "cuda" and (peak_rate := peak_flops(torch.cuda.get_device_name())):
        lines.append(
            f"{best}: {full * speed(rounds[best], tokens) / peak_rate:.1%} of the data sheet's dense bf16 peak."
        )
    return "\n".join(lines)


def speed(results: list[dict[str, Any]], tokens: int) -> float:
    """Tokens/s of the median step of all rounds."""
    return tokens / statistics.median(seconds for result in results for seconds in result["step_seconds"])


def draw(rounds: dict[str, list[dict[str, Any]]], tokens: int, path: Path) -> None:
    """A bar a peer, with the quartiles of its steps."""
    from matplotlib.figure import Figure

    names = sorted(rounds, key=lambda name: speed(rounds[name], tokens))
    figure = Figure(figsize=(6.4, 0.6 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    for name in names:
        low, median, high = statistics.quantiles([tokens / s for r in rounds[name] for s in r["step_seconds"]], n=4)
        colour = "C1" if name.startswith("cucafera") else "C0"
        axes.barh(name, median, color=colour, xerr=[[median - low], [high - median]], capsize=2)
    axes.set_xlabel("training speed (tokens per second)")
    figure.savefig(path, dpi=200)


def main() -> None:
    """Measures all of them, or one in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a preset of conf/model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="counted steps of a round")
    parser.add_argument("--peer", action="append", choices=PEERS, help="one to measure; may be repeated; else all")
    parser.add_argument("--out", type=Path, help="where FILE.json and FILE.png go")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, such as batch_tokens=16384")
    arguments = parser.parse_intermixed_args()
    config = configured(arguments)
    if arguments.only:
        print(json.dumps(measured(arguments.only, config, arguments.compiled, arguments.steps)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    for number in range(arguments.rounds):
        for peer, compiled in itertools.product(arguments.peer or PEERS, (False, True)):
            name = f"{peer}, compiled" if compiled else peer
            if name in missing or peer in missing:
                continue
            found = run_apart(arguments, peer, compiled)
            if isinstance(found, str):
                missing[peer if found.startswith("not installed") else name] = found
                rounds.pop(name, None)
            else:
                rounds.setdefault(name, []).append(found)
                seconds = statistics.median(found["step_seconds"])
                print(f"round {number + 1}: {name:24}{int(config.batch_tokens) / seconds:>10,.0f} tokens/s", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu")
    rate = matrix_rate(device, "bf16" if device.type == "cuda" else "fp32")
    print()
    print(report(config, rounds, missing, rate))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"rounds": rounds, "missing": missing, "matrix_flops": rate, "batch_tokens": int(config.batch_tokens)}
        arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        draw(rounds, int(config.batch_tokens), arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
