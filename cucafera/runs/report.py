"""The report of a run: metrics.json, report.md, and the same on the terminal."""

import shlex
from collections.abc import Mapping
from typing import Any

from cucafera.config.errors import UserError
from cucafera.config.registry import OBJECTIVES
from cucafera.data.left_out import LeftOut
from cucafera.markup import markdown, markdown_code, markdown_table
from cucafera.objectives import Objective
from cucafera.quantities import duration, number_of, rounded
from cucafera.runs.folder import RunFolder
from cucafera.runs.results import write_metrics
from cucafera.storage import write_text


def summary(metrics: dict[str, Any], folder: RunFolder) -> list[tuple[str, str]]:
    """Return the lines of the report: label and value."""
    objective: Objective = OBJECTIVES.get(metrics["objective"])
    first, last = metrics["validation"][0], metrics["validation"][-1]
    speed = f"{rounded(metrics['tokens_per_second'])} tokens/s on {metrics['device']}, {metrics['precision']}"
    if metrics["devices"] > 1:
        speed += f", {number_of(metrics['devices'], 'device')}"
    mfu = []
    if metrics["mfu"] is not None:  # of a device whose peak is known
        mfu = [("MFU", f"{metrics['mfu']:.1%} (full-attention convention, dense bf16 peak)")]
    parameters = f"{metrics['parameters']:,}"
    if metrics["adapter_parameters"]:
        parameters += f"; {metrics['adapter_parameters']:,} of adapters were trained"
    trained = f"{number_of(metrics['tokens'], 'token')} in {number_of(metrics['steps'], 'step')}"
    if metrics["skipped_updates"]:
        trained += f"; not finite, and so not applied: {metrics['skipped_updates']:,} of the steps"
    if metrics["skipped_batches"]:
        trained += f"; left out after rollbacks: {len(metrics['skipped_batches']):,} of the batches"
    train_loss = "not finite"
    if metrics["train_loss"] is not None:
        train_loss = f"{metrics['train_loss']:.3f} {objective.loss_unit}".rstrip()
    lines = [
        ("Parameters", parameters),
        *(("Left out", str(LeftOut(**entry))) for entry in metrics["left_out"]),
        *([("Start", metrics["start"])] if metrics.get("start") else []),
        ("Trained on", trained),
        ("Time", f"{duration(metrics['training_seconds'])} of training"),
        ("Speed", speed),
        *mfu,
        ("Waiting for data", f"{metrics['data_wait']:.2%} of the time"),
        ("Train loss", train_loss),
    ]
    for metric in objective.metrics:
        change = f"{first[metric.name]:{metric.format}} -> {metric.text(last[metric.name])}"
        if metric.name == objective.primary:
            change += f" (best {metrics[f'best_{metric.name}']:{metric.format}})"
        lines.append((metric.label[0].upper() + metric.label[1:], change))
    lines += [*_answer_lines(metrics), *objective.summary(metrics)]
    return [*lines, ("Checkpoint", str(folder.checkpoints.complete()[-1].path))]


def _answer_lines(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of the first and the last sample answers, and the warnings about them."""
    lines = []
    if answers := metrics.get("answers"):
        first, last = answers[0], answers[-1]
        stopped, repeated = (
            _change(*(round(record[share] * record["count"]) for record in (first, last)))
            for share in ("stopped", "repeated_5gram")
        )
        before, now = round(first["tokens"]), round(last["tokens"])
        length = ("" if before == now else f"{before:,} -> ") + number_of(now, "token")
        line = f"{stopped} of {last['count']} ended by themselves, {repeated} with a repeated 5-gram"
        lines.append(("Answers", f"{line}, {length} on average"))
    return [*lines, *(("Warning", warning) for warning in metrics.get("answer_warnings", []))]


def _change(first: int, last: int) -> str:
    return f"{first:,} -> {last:,}" if first != last else f"{last:,}"


def write_report(metrics: dict[str, Any], folder: RunFolder) -> None:
    """Write metrics.json and report.md into the run folder. Raises UserError if they cannot be written."""
    report = [f"# {markdown(metrics['name'])}", "", *markdown_table([("", ""), *summary(metrics, folder)]), ""]
    report += ["## Validation", "", *validation_table(metrics)]
    report += ["", "## Samples", "", *as_quoted_samples(metrics)]
    report += ["## Next", "", *(markdown_code(command) for _, command in next_commands(folder)), ""]
    try:
        write_text(folder.report, "\n".join(report))
        write_metrics(folder.metrics, metrics)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder.path}: {error.strerror or error}. The run itself is complete and "
            "saved: free some space, and run the same command again to write it"
        ) from error


def validation_table(metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines of a Markdown table of all validations, from a run's metrics."""
    names = [metric.name for metric in OBJECTIVES.get(metrics["objective"]).metrics]
    return [
        f"| step | tokens | {' | '.join(names)} |",
        "|---:|---:|" + "---:|" * len(names),
        *(
            f"| {record['step']:,} | {record['tokens']:,} | {' | '.join(f'{record[name]:.4f}' for name in names)} |"
            for record in metrics["validation"]
        ),
    ]


def as_quoted_samples(metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines of the samples in Markdown, an empty one after each."""
    objective: Objective = OBJECTIVES.get(metrics["objective"])
    lines = []
    for sample in metrics["samples"]:
        text = objective.sample_markdown(sample["prompt"], continuation_of(sample))
        lines += ["> " + text.replace("\n", "\n> "), ""]
    return lines


def terminal_report(metrics: dict[str, Any], folder: RunFolder) -> str:
    """Return the report for the terminal."""
    objective: Objective = OBJECTIVES.get(metrics["objective"])
    lines = summary(metrics, folder)
    width = max(len(label) for label, _ in lines)
    terminal = ["", *(f"  {label:<{width}}  {value}" for label, value in lines), ""]
    for sample in metrics["samples"]:
        text = objective.sample_text(sample["prompt"], continuation_of(sample))
        terminal += [*(f"  {line}" for line in text), ""]
    terminal += [f"  Report: {folder.report}", *(f"  {label}: {command}" for label, command in next_commands(folder))]
    return "\n".join(terminal)


def next_commands(folder: RunFolder) -> list[tuple[str, str]]:
    """Return the next commands to type, each with a label."""
    run = shlex.quote(str(folder.path))
    return [
        ("Curves", f"tensorboard --logdir {shlex.quote(str(folder.path.parent))}"),
        ("Talk", f"python -m cucafera.chat {run}"),
        ("Measure", f"python -m cucafera.evaluate {run}"),
        ("Share", f"python -m cucafera.export {run} --to hf {shlex.quote(str(folder.path / 'hf'))}"),
    ]


def continuation_of(sample: dict[str, str]) -> str:
    """Return the generated text; an ellipsis marks one that was cut at the length limit."""
    return sample["continuation"] + ("" if sample["finish_reason"] == "stop" else " …")
