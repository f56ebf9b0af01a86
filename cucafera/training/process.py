"""What the libraries below PyTorch are told: how threads wait, and what becomes of memory that is freed.

Both matter on a CPU, where a step is thousands of small pieces of work. None of this is heavy to import.
"""

import contextlib
import ctypes
from collections.abc import MutableMapping

SPINS = 3000
"""Times that a thread of GNU OpenMP looks for work before it sleeps, about 0.1 ms. Steps a second of the quickstart's
model against endless looking (OpenMP's own default), alone and beside another such program on the same two cores:
0.98 and 1.75; looking 10,000 times, 1.0 and 1.25; sleeping at once, 0.83 and 2.1."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of settings in glibc's malloc.h."""


def let_threads_wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Sets how long threads wait, unless the user has; before PyTorch is loaded."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(environment):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def keep_freed_memory() -> None:
    """Keeps what a step frees for the next one, where the C library is glibc.

    It would give large pieces back to the system, which clears every page that is asked for again: up to 7% of a step.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, another C library
        set_option = ctypes.CDLL(None).mallopt
        set_option(MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        set_option(TRIM_THRESHOLD, (1 << 31) - 1)
