"""Where the time of a step goes."""

import logging
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile

from cucafera.data.files import write_text
from cucafera.training.hardware import Hardware
from cucafera.training.module import LanguageModel

log = logging.getLogger(__name__)

FIRST_STEP = 5
"""The steps before are slower: they compile, and take memory for the first time."""
PROFILED_STEPS = 5
TABLE, TRACE = "profile.txt", "profile.json.gz"

KINDS = (
    ("attention", r"attention|flash|fmha|flex|varlen"),
    ("loss", r"cross_entropy"),
    ("matrix products", r"gemm|^aten::(mm|addmm|addmm_|bmm|baddbmm)$|nvjet|cutlass|xmma|splitk|mkldnn"),
    ("optimizer", r"adam|multi_tensor|foreach|lamb_"),
    ("between devices", r"nccl|all_reduce|allreduce|all_gather|reduce_scatter|c10d"),
    ("copies", r"memcpy|memset|aten::(copy_|fill_|zero_|cat|_to_copy)$"),
    ("fused by the compiler", r"triton|cpp_fused|CompiledFxGraph"),
)
"""Kinds of work, and what the names of operations or kernels of that kind hold; the first that fits counts."""
OTHER = "elementwise and other"


class Profile(pl.Callback):
    """Profiles some steps, tells in a table what they spent their time with, and writes a trace.

    The table goes to the terminal and to profile.txt in the run folder, beside profile.json.gz, a trace that
    chrome://tracing and ui.perfetto.dev open.
    """

    def __init__(self, hardware: Hardware, folder: Path, total_steps: int) -> None:
        self.hardware = hardware
        self.folder = folder
        self.total_steps = total_steps
        self._steps_to_skip = 0
        self._profiler: profile | None = None
        self._seen = 0
        self._waiting = 0.0
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks how many steps there will be: of a few, the first ones count too."""
        assert isinstance(pl_module, LanguageModel)
        self._steps_to_skip = min(FIRST_STEP - 1, max(0, self.total_steps - pl_module.steps_done - PROFILED_STEPS))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the time since the last step as waiting for data, and begins before the first step that counts."""
        assert isinstance(pl_module, LanguageModel)
        if self._profiler is not None:
            self._waiting += time.perf_counter() - pl_module.other_hooks_done_at
        if self._seen == self._steps_to_skip and trainer.is_global_zero:
            cuda = [ProfilerActivity.CUDA] if self.hardware.accelerator == "cuda" else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profiler.start()
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends after the last step that counts."""
        self._seen += 1
        if self._profiler is not None and self._seen == self._steps_to_skip + PROFILED_STEPS:
            self._end(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends with the run if that has fewer steps."""
        if self._profiler is not None:
            self._end(pl_module.device)

    def _end(self, device: torch.device) -> None:
        assert self._profiler is not None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - self._started
        self._profiler.stop()
        steps = self._seen - self._steps_to_skip
        table = time_table(self._profiler, seconds / steps, steps, self._waiting / steps, device)
        write_text(self.folder / TABLE, table + "\n")
        partial = self.folder / f"partial-{TRACE}"  # the profiler looks at the end of the name to pack it
        self._profiler.export_chrome_trace(str(partial))
        partial.replace(self.folder / TRACE)
        log.info("%s\nTrace   %s (open it in ui.perfetto.dev)", table, self.folder / TRACE)
        self._profiler = None


def time_table(profiled: profile, seconds: float, steps: int, waiting: float, device: torch.device) -> str:
    """What a step spends its time with, by kind of work, as a table.

    On a CPU the times are those of the operations of the training process; on a GPU those of its kernels.

    Args:
        profiled: The profiler, stopped.
        seconds: Of a step, by the clock.
        steps: How many were profiled.
        waiting: Seconds of a step that waited for data.
        device: Where the model is.
    """
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[kind_of(event.key)] += microseconds / 1e6 / steps
    rows: list[tuple[str, float]] = [
        (kind, spent[kind]) for kind in sorted(spent, key=lambda kind: -spent[kind]) if spent[kind]
    ]
    rows.append(("waiting for data", waiting))
    rows.append(("nothing measured", max(0.0, seconds - sum(time for _, time in rows))))
    lines = [f"{'':24}{'ms a step':>12}{'share':>9}", f"{'a step':24}{1000 * seconds:>12.2f}{1:>9.1%}"]
    lines += [f"{kind:24}{1000 * time:>12.2f}{time / seconds:>9.1%}" for kind, time in rows]
    return "\n".join(lines)


def kind_of(name: str) -> str:
    """The kind of work of an operation or kernel."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)
