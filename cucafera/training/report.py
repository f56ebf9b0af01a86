"""What a run leaves for its reader: metrics.json, report.md, and the same on the terminal."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cucafera.config import Config, UserError
from cucafera.data.files import write_text
from cucafera.model.flops import adapter_parameter_count, parameter_count, training_flops_per_token
from cucafera.training.callbacks.progress import count, duration
from cucafera.training.callbacks.samples import as_markdown, continuation_of
from cucafera.training.hardware import Hardware
from cucafera.training.run_folder import RunFolder
from cucafera.training.trainer import Callbacks


def collect_metrics(config: Config, hardware: Hardware, callbacks: Callbacks) -> dict[str, Any]:
    """The figures of a run, as they go into metrics.json."""
    guards, throughput, validation = callbacks.guards, callbacks.throughput, callbacks.validation
    steps_done, tokens = int(validation.history[-1]["step"]), int(validation.history[-1]["tokens"])
    seconds = throughput.training_seconds
    loss = throughput.latest["train/loss"]
    tokens_per_second = tokens / seconds if seconds else None
    flops_per_token = training_flops_per_token(config.model, config.sequence_length, config.adapter)
    mfu = None
    if hardware.peak_flops is not None and tokens_per_second is not None:
        mfu = flops_per_token * tokens_per_second / hardware.world_size / hardware.peak_flops
    return {
        "name": config.name,
        "kind": config.data.kind,
        "parameters": parameter_count(config.model),
        "adapter_parameters": adapter_parameter_count(config.model, config.adapter),
        "steps": steps_done,
        "tokens": tokens,
        "training_seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "data_wait": throughput.waiting_seconds / seconds if seconds else None,
        "flops_per_token": flops_per_token,
        "mfu": mfu,
        "device": hardware.name,
        "devices": hardware.world_size,
        "precision": hardware.precision,
        "skipped_updates": guards.skipped_updates,
        "left_out_batches": guards.left_out_batches,
        "train_loss": loss if math.isfinite(loss) else None,
        "peak_memory_gib": throughput.latest.get("memory/peak_gib"),
        "validation": validation.history,
        "best_bpb": min(record["bpb"] for record in validation.history),
        "samples": callbacks.samples.latest,
    }


def summary(metrics: dict[str, Any], folder: RunFolder) -> list[tuple[str, str]]:
    """The lines of the report: what, and its value."""
    first, last = metrics["validation"][0], metrics["validation"][-1]
    speed = f"{count(metrics['tokens_per_second'])} tokens/s on {metrics['device']}, {metrics['precision']}"
    if metrics["devices"] > 1:
        speed += f", {metrics['devices']} devices"
    mfu = "unknown: the peak of this device is not in the table"
    if metrics["mfu"] is not None:
        mfu = f"{metrics['mfu']:.1%} (full-attention convention, dense bf16 peak)"
    parameters = f"{metrics['parameters']:,}"
    if metrics["adapter_parameters"]:
        parameters += f"; {metrics['adapter_parameters']:,} of adapters were trained"
    trained = f"{metrics['tokens']:,} tokens in {metrics['steps']:,} steps"
    if metrics["skipped_updates"]:
        trained += f"; not finite, and so not applied: {metrics['skipped_updates']:,} of the steps"
    if metrics["left_out_batches"]:
        trained += f"; left out after rollbacks: {len(metrics['left_out_batches']):,} of the batches"
    lines = [
        ("Parameters", parameters),
        ("Trained on", trained),
        ("Time", f"{duration(metrics['training_seconds'])} of training"),
        ("Speed", speed),
        ("MFU", mfu),
        ("Waiting for data", f"{metrics['data_wait']:.2%} of the time"),
        ("Train loss", "not finite" if metrics["train_loss"] is None else f"{metrics['train_loss']:.3f} nats a token"),
        ("Validation loss", f"{first['loss']:.3f} -> {last['loss']:.3f} (perplexity {last['perplexity']:.1f})"),
        ("Validation bpb", f"{first['bpb']:.3f} -> {last['bpb']:.3f} bits a byte (best {metrics['best_bpb']:.3f})"),
        ("Accuracy", f"{first['accuracy']:.1%} -> {last['accuracy']:.1%} of the tokens were the likeliest"),
    ]
    if metrics["kind"] == "conversations" and metrics["samples"]:
        stopped = sum(sample["ended"] == "stop" for sample in metrics["samples"])
        lines.append(("Answers", f"{stopped} of {len(metrics['samples'])} stopped by themselves"))
    return [*lines, ("Checkpoint", str(folder.checkpoints.complete()[-1].path))]


def write_report(metrics: dict[str, Any], folder: RunFolder) -> None:
    """Writes metrics.json and report.md into the run folder. Raises UserError if they cannot be written."""
    report = [f"# {metrics['name']}", ""]
    report += ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in summary(metrics, folder)), ""]
    report += ["## Validation", "", *validation_table(metrics["validation"])]
    report += ["", "## Samples", "", *as_quoted_samples(metrics)]
    report += ["## Next", "", *(f"    {command}" for _, command in next_commands(folder)), ""]
    try:
        write_text(folder.report, "\n".join(report))
        write_text(folder.metrics, json.dumps(metrics, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder.path}: {error.strerror or error}. The run itself is complete and "
            "saved: make room, and the same command writes it"
        ) from error


def validation_table(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table of all validations."""
    return [
        "| step | tokens | loss | perplexity | accuracy | bpb |",
        "|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {record['step']:,} | {record['tokens']:,} | {record['loss']:.4f} | {record['perplexity']:.2f} "
            f"| {record['accuracy']:.4f} | {record['bpb']:.4f} |"
            for record in history
        ),
    ]


def as_quoted_samples(metrics: Mapping[str, Any]) -> list[str]:
    """The lines of the samples in Markdown, an empty one behind each."""
    lines = []
    for sample in metrics["samples"]:
        lines += ["> " + as_markdown(sample, metrics["kind"]).replace("\n", "\n> "), ""]
    return lines


def terminal_report(metrics: dict[str, Any], folder: RunFolder) -> str:
    """The report for the terminal."""
    lines = summary(metrics, folder)
    width = max(len(what) for what, _ in lines)
    terminal = ["", *(f"  {what:<{width}}  {value}" for what, value in lines), ""]
    for sample in metrics["samples"]:
        if metrics["kind"] == "conversations":
            terminal += [f"  > {sample['prompt']}", f"  {continuation_of(sample)}", ""]
        else:
            terminal += [f"  «{sample['prompt']}{continuation_of(sample)}»", ""]
    terminal += [f"  Report: {folder.report}", *(f"  {what}: {command}" for what, command in next_commands(folder))]
    return "\n".join(terminal)


def next_commands(folder: RunFolder) -> list[tuple[str, str]]:
    """What to type next, and what for."""
    run = shlex.quote(str(folder.path))
    return [
        ("Curves", f"tensorboard --logdir {shlex.quote(str(folder.path.parent))}"),
        ("Talk", f"python -m cucafera.chat {run}"),
        ("Measure", f"python -m cucafera.evaluate {run}"),
        ("Share", f"python -m cucafera.export {run} --to hf {shlex.quote(str(folder.path / 'hf'))}"),
    ]
