"""The figures of a finished run."""

import math
from typing import Any

from cucafera.config.schema import Config
from cucafera.model.flops import adapter_parameter_count, parameter_count, training_flops_per_token
from cucafera.objectives import objective_of
from cucafera.training.hardware import Hardware
from cucafera.training.trainer import Callbacks, describe_cooldown


def collect_metrics(config: Config, hardware: Hardware, callbacks: Callbacks) -> dict[str, Any]:
    """Return the figures of a run, as they go into metrics.json."""
    primary = objective_of(config).primary_metric
    guards, throughput, validation = callbacks.guards, callbacks.throughput, callbacks.validation
    steps_done, tokens = int(validation.history[-1]["step"]), int(validation.history[-1]["tokens"])
    seconds = throughput.training_seconds
    loss = throughput.latest["loss/train"]
    tokens_per_second = tokens / seconds if seconds else None
    flops_per_token = training_flops_per_token(config.model, config.sequence_length, config.adapter)
    mfu = None
    if hardware.peak_flops is not None and tokens_per_second is not None:
        mfu = flops_per_token * tokens_per_second / hardware.world_size / hardware.peak_flops
    return {
        "name": config.name,
        "objective": config.objective.name,
        "parameters": parameter_count(config.model),
        "adapter_parameters": adapter_parameter_count(config.model, config.adapter),
        "steps": steps_done,
        "tokens": tokens,
        "start": describe_cooldown(config),
        "training_seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "data_wait": throughput.waiting_seconds / seconds if seconds else None,
        "flops_per_token": flops_per_token,
        "mfu": mfu,
        "device": hardware.name,
        "devices": hardware.world_size,
        "precision": hardware.precision,
        "skipped_updates": guards.skipped_updates,
        "skipped_batches": guards.skipped_batches,
        "left_out": throughput.left_out,
        "train_loss": loss if math.isfinite(loss) else None,
        "peak_memory_gib": throughput.latest.get("memory/peak_gib"),
        "validation": validation.history,
        f"best_{primary.name}": primary.best([record[primary.name] for record in validation.history]),
        "samples": callbacks.samples.latest,
        "answers": callbacks.samples.answers,
        "answer_warnings": callbacks.answers.warnings,
    }
