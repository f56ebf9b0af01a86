"""Advice for a machine without a GPU: the command that was given, or a small version of it.

This module does not import torch.
"""

import re
import shlex
from collections.abc import Sequence

from cucafera.config.schema import Config
from cucafera.model.flops import training_flops_per_token

CPU_FLOPS = 1.3e11
"""FLOP/s of two cores, from 10,753 tokens per second of the quickstart's model at 0.0118 GFLOP per token."""
LONGEST_SECONDS = 24 * 3600
"""Of training on a CPU that is worth advising."""
SMALL = {
    "model": "tiny",
    "budget_tokens": "400_000",
    "batch_tokens": "4096",
    "schedule.warmup_steps": "10",
    "callbacks": "default",
}
"""A pretraining of minutes."""
OF_SIZE = re.compile(
    r"[+~]*(model|tokenizer|callbacks|budget_tokens|epochs|batch_tokens|sequence_length|name|run_dir"
    r"|schedule\.(warmup|horizon)_steps)\b"
)
"""Beginnings of the overrides that a small version replaces."""


def cpu_advice(config: Config, overrides: Sequence[str]) -> str:
    """Return the command that does on the CPU what these overrides ask for, with a sentence before it.

    Where that would take more than a day, the command trains a small model on the same data, or on the embedded corpus
    in place of a download. Finetuning keeps its model, which is that of its initial weights.
    """
    kept = [text for text in overrides if not re.match(r"\+*trainer\b", text)]
    seconds = training_flops_per_token(config.model, config.sequence_length) * config.budget_tokens / CPU_FLOPS
    is_pretraining = config.objective.name == "pretraining" and config.epochs is None
    if not is_pretraining or seconds < LONGEST_SECONDS:
        return f"To train on the CPU, which is slower:\n  {_command([*kept, 'trainer=cpu'])}"
    kept = [text for text in kept if not OF_SIZE.match(text)]
    settings = {"name": f"{config.name}-small", "trainer": "cpu"} | SMALL
    if any(hasattr(source, "dataset") for source in config.data.sources.values()):
        kept = [text for text in kept if not re.match(r"[+~]*data\b", text)]
        settings["data"] = "embedded"
    return (
        f"On two CPU cores it would take {seconds / 86_400:,.0f} days. To try the same with a small model:\n  "
        + _command([*kept, *(f"{key}={value}" for key, value in settings.items())])
    )


def _command(overrides: Sequence[str]) -> str:
    return f"python -m cucafera.run {shlex.join(overrides)}"
