"""A profile of a few steps: a table of the time by kind of work, and a trace."""

import logging
import re
import time
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile

from cucafera.storage import write_text
from cucafera.training.callbacks.base import Callback
from cucafera.training.hardware import Hardware
from cucafera.training.module import LanguageModel

log = logging.getLogger(__name__)

FIRST_STEP = 5
"""First profiled step; earlier ones are slower, because they compile and allocate."""
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
"""Kinds of work, with the pattern of the names of their operations or kernels; the first match counts."""
OTHER = "elementwise and other"


class Profile(Callback):
    """Profile a few steps, and write a table of their time and a trace.

    The table goes to the terminal and to profile.txt in the run folder. The trace, profile.json.gz in the same folder,
    opens in chrome://tracing and ui.perfetto.dev.
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

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Decide how many steps to skip; a run of few steps is profiled from its first."""
        self._steps_to_skip = min(FIRST_STEP - 1, max(0, self.total_steps - module.steps_done - PROFILED_STEPS))

    def on_step_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Count the time since the last step as waiting for data, and start the profiler if it is time."""
        if self._profiler is not None:
            self._waiting += time.perf_counter() - module.other_hooks_done_at
        if self._seen == self._steps_to_skip and trainer.is_global_zero:
            cuda = [ProfilerActivity.CUDA] if self.hardware.accelerator == "cuda" else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profiler.start()
            self._started = time.perf_counter()

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Stop the profiler after the last profiled step."""
        self._seen += 1
        if self._profiler is not None and self._seen == self._steps_to_skip + PROFILED_STEPS:
            self._end(module.device)

    def on_session_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Stop the profiler if the session has ended before that."""
        if self._profiler is not None:
            self._end(module.device)

    def _end(self, device: torch.device) -> None:
        assert self._profiler is not None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - self._started
        self._profiler.stop()
        steps = self._seen - self._steps_to_skip
        table = time_table(self._profiler, seconds / steps, steps, self._waiting / steps, device)
        write_text(self.folder / TABLE, table + "\n")
        partial = self.folder / f"partial-{TRACE}"  # the profiler compresses by the suffix
        self._profiler.export_chrome_trace(str(partial))
        partial.replace(self.folder / TRACE)
        log.info("%s\nTrace   %s (open it in ui.perfetto.dev)", table, self.folder / TRACE)
        self._profiler = None


def time_table(profiled: profile, seconds: float, steps: int, waiting: float, device: torch.device) -> str:
    """Return a table of the time of a step by kind of work.

    On a CPU the times are those of the operations of the training process; on a GPU those of its kernels.

    Args:
        profiled: The stopped profiler.
        seconds: Wall time per step.
        steps: Profiled steps.
        waiting: Seconds per step spent waiting for data.
        device: Device of the model.
    """
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[kind_of(event.key)] += microseconds / 1e6 / steps
    rows: list[tuple[str, float]] = [
        (kind, spent[kind]) for kind in sorted(spent, key=lambda kind: -spent[kind]) if spent[kind]
    ]
    rows.append(("waiting for data", waiting))
    rows.append(("not attributed", max(0.0, seconds - sum(time for _, time in rows))))
    lines = [f"{'':24}{'ms per step':>12}{'share':>9}", f"{'step':24}{1000 * seconds:>12.2f}{1:>9.1%}"]
    lines += [f"{kind:24}{1000 * time:>12.2f}{time / seconds:>9.1%}" for kind, time in rows]
    return "\n".join(lines)


def kind_of(name: str) -> str:
    """Return the kind of work of an operation or kernel."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)
