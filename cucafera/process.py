"""Settings of a process: how OpenMP threads wait, whether freed memory is kept, and Ctrl-C during imports; its rank.

The first two matter on a CPU, where a step is thousands of small operations. Nothing here is slow to import.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Mapping, MutableMapping
from types import FrameType

SPINS = 3000
"""How often a thread of GNU OpenMP looks for work before it sleeps: about 0.1 ms. Measured in steps per second of the
quickstart's model, relative to endless spinning (OpenMP's default), alone / with another such program on the same two
cores: 3,000 spins 0.98 / 1.75; 10,000 spins 1.0 / 1.25; no spinning 0.83 / 2.1."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Of torchrun, Lightning and SLURM; the first that is set counts, as for Lightning."""


def is_first_process(environment: Mapping[str, str]) -> bool:
    """Return True in the process of a job that writes messages and files."""
    rank = next((environment[name] for name in RANK_VARIABLES if name in environment), "0")
    return rank == "0" and environment.get("NODE_RANK", "0") == "0"


def let_threads_wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Limit how long OpenMP threads spin, unless the user set it. Call it before PyTorch is imported."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(environment):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def keep_freed_memory() -> None:
    """Keep freed memory in the process for the next step, if the C library is glibc.

    By default it returns large blocks to the system, which clears every page that is allocated again: up to 7% of a
    step.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, another C library
        set_option = ctypes.CDLL(None).mallopt
        set_option(MMAP_THRESHOLD, 32 << 20)  # the maximum
        set_option(TRIM_THRESHOLD, (1 << 31) - 1)


def exit_on_interrupt() -> None:
    """Let Ctrl-C exit at once, without a stack trace, until `raise_on_interrupt`: there is nothing to save yet.

    An exception in the middle of an import may be printed by a C extension, or leave a module half initialized.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored, as in the background
        signal.signal(signal.SIGINT, _exit)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: from here on there is something to end in good order."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\nInterrupted.\n")
    os._exit(128 + number)
