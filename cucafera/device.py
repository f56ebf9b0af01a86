"""GPU discovery: which device PyTorch can compute on, and the reason and remedy where it cannot use a GPU."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cucafera.config.errors import UserError

log = logging.getLogger(__name__)

DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
"""One of them exists where an NVIDIA driver is loaded; the last is that of Windows Subsystem for Linux."""
GET_STARTED = "see pytorch.org/get-started"
CONTEXT_BYTES = 1 << 30
"""GPU memory in use below which no other process is assumed: larger than the CUDA context of this process."""


class GpuStatus(NamedTuple):
    """Result of `find_gpu`.

    Attributes:
        usable: True if PyTorch can compute on a GPU.
        problem: Reason and remedy if there are signs of a GPU that cannot be used, else None.
    """

    usable: bool
    problem: str | None


def find_gpu(environment: Mapping[str, str]) -> GpuStatus:
    """Look for a GPU that the installed PyTorch can use.

    Args:
        environment: The environment variables of the process: CUDA_VISIBLE_DEVICES may hide a GPU.

    Raises:
        UserError: the GPU accepts no further process.
    """
    with warnings.catch_warnings(record=True) as caught:  # PyTorch gives the reason only in a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        problem = _architecture_problem()
        return GpuStatus(problem is None, problem)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return GpuStatus(False, _unavailable_reason(visible, [str(warning.message) for warning in caught]))


def _unavailable_reason(visible_devices: str | None, cuda_warnings: Sequence[str]) -> str | None:
    """Return why torch.cuda is not available, from the warnings of PyTorch; None without any sign of a GPU."""
    has_driver = any(path.exists() for path in DRIVER_FILES)
    if torch.version.cuda is None:
        if not has_driver:
            return None
        return (
            f"PyTorch {torch.__version__} is a build without CUDA, although this machine has an NVIDIA driver: install "
            f"the CUDA build (pip install --force-reinstall torch --index-url URL; for the URL {GET_STARTED})"
        )
    for warning in cuda_warnings:
        if match := re.search(r"driver on your system is too old \(found version (\d+)\)", warning):
            version = int(match[1])
            return (
                f"the NVIDIA driver is too old for PyTorch {torch.__version__}: it supports CUDA {version // 1000}."
                f"{version % 1000 // 10} (found version {version}), and this build needs {torch.version.cuda}: update "
                f"the driver, or install a build of torch for an older CUDA, {GET_STARTED}"
            )
        text = " ".join(warning.split(" (Triggered internally")[0].removeprefix("CUDA initialization: ").split())
        return f"CUDA does not start (check that nvidia-smi lists the GPU): {text}"
    if not has_driver:
        return None
    advice = "start a container with --gpus all, a SLURM job with --gres=gpu:1"
    if visible_devices is None:
        return f"the system has an NVIDIA driver, but this process sees no GPU: {advice}"
    if not visible_devices.strip() or visible_devices.startswith("-"):
        value = visible_devices.strip() or "empty"
        return f"CUDA_VISIBLE_DEVICES is {value}, which hides every GPU: unset it, or give numbers of nvidia-smi -L"
    return (
        f"CUDA_VISIBLE_DEVICES is {visible_devices}, and this process sees no such GPU: give numbers of nvidia-smi -L; "
        f"if that lists none, {advice}"
    )


def _architecture_problem() -> str | None:
    """Return a message if this build of PyTorch has no kernels for the GPU, else None."""
    if torch.version.cuda is None:  # ROCm names architectures differently
        return None
    with warnings.catch_warnings(), _gpu_errors_as_user_errors():
        warnings.simplefilter("ignore")  # PyTorch warns of the same in several lines
        capability, architectures = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if not architectures or has_kernels_for(capability, architectures):
        return None
    return (
        f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and PyTorch "
        f"{torch.__version__} has kernels for {' '.join(architectures)} only: install a build of torch that has them "
        f"for this GPU, {GET_STARTED}"
    )


def has_kernels_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return True if a GPU of this compute capability can run kernels compiled for one of these architectures.

    sm_XY, machine code, runs on X.Y and later ones of the same major version. compute_XY, PTX, is compiled for any
    later one at its first use. With the suffix "a" either runs on X.Y only, with "f" on its major version (NVIDIA,
    CUDA C++ Programming Guide, "Compute Capabilities").
    """
    for name in architectures:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name):
            kind, suffix, compiled_for = match[1], match[4], (int(match[2]), int(match[3]))
            if suffix == "a":
                fits = capability == compiled_for
            else:
                same_major = capability[0] == compiled_for[0]
                fits = capability >= compiled_for and (same_major or (kind == "compute" and not suffix))
            if fits:
                return True
    return False


@contextlib.contextmanager
def _gpu_errors_as_user_errors() -> Iterator[None]:
    """Raise UserError where CUDA refuses this process because of other processes."""
    try:
        yield
    except RuntimeError as error:  # torch.AcceleratorError and torch.OutOfMemoryError are subclasses
        advice = "wait for the processes that nvidia-smi shows, or name another GPU in CUDA_VISIBLE_DEVICES"
        if "busy or unavailable" in str(error):
            raise UserError(
                f"the GPU is in use and in exclusive compute mode, for one process only: {advice}"
            ) from error
        if "out of memory" in str(error):
            raise UserError(f"other processes have taken all of the GPU's memory: {advice}") from error
        raise


def memory_used_by_others(device: int) -> int:
    """Return the bytes of a GPU's memory that other processes use, or 0 if they are few.

    Raises UserError if other processes use all of it.
    """
    with _gpu_errors_as_user_errors():
        free, total = torch.cuda.mem_get_info(device)
        used = total - free - torch.cuda.memory_reserved(device)
    return used if used > max(CONTEXT_BYTES, 0.05 * total) else 0


def is_mig_slice(device_name: str) -> bool:
    """Return True for a part of a card (Multi-Instance GPU), such as "NVIDIA A100-SXM4-80GB MIG 3g.40gb"."""
    return " MIG " in device_name


def resolve_device(name: str, environment: Mapping[str, str]) -> torch.device:
    """Return the device for a command's --device: cpu, cuda, or auto for a GPU if one is usable.

    Args:
        name: cpu, cuda or auto.
        environment: As for `find_gpu`.

    Raises:
        UserError: the device is missing or cannot be used.
    """
    if name == "cpu":
        return torch.device("cpu")
    gpu = find_gpu(environment)
    if gpu.usable:
        memory_used_by_others(0)  # raises if the GPU accepts no further process
        return torch.device("cuda")
    if name == "cuda":
        raise UserError(f"--device cuda: {gpu.problem or 'this machine has no CUDA GPU that PyTorch can use'}")
    if gpu.problem:
        log.warning("Computing on the CPU: %s", gpu.problem)
    return torch.device("cpu")
