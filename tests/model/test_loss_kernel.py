"""The Triton kernel of the loss: its results by Triton's interpreter, and its registers by ptxas.

Triton comes with the CUDA builds of torch; with a CPU build these are skipped.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton")

BF16_ROUNDING = 2**-8
"""Tolerance for values below one: the interpreter truncates where a GPU rounds to nearest."""


IN_THE_INTERPRETER = """
import sys, torch
from cucafera.model.loss_kernel import cross_entropy_in_place
cases = torch.load(sys.argv[1])
for case in cases:
    cross_entropy_in_place(case["logits"], case["targets"], case["nats"], -100)
torch.save(cases, sys.argv[1])
"""


@pytest.fixture
def interpreted(tmp_path):
    """Run the kernel in the interpreter, in another process, since Triton decides that at import."""

    def run(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        path = tmp_path / "case.pt"
        nats = torch.full((len(logits),), torch.nan)
        torch.save([{"logits": logits, "targets": targets, "nats": nats}], path)
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", IN_THE_INTERPRETER, path], check=True, env=environment)
        (case,) = torch.load(path)
        return case["nats"], case["logits"]

    return run


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, and the gradient of their sum."""
    logits = logits.float().requires_grad_()
    nats = F.cross_entropy(logits, targets.long(), reduction="none")
    return nats.detach(), torch.autograd.grad(nats.sum(), logits)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [300, 16_384, 40_001])  # part of a block, one block, several with a partial one
def test_the_kernel_gives_cross_entropy_and_gradient_of_each_row(interpreted, vocabulary, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, vocabulary, generator=generator)).to(dtype)
    targets = torch.tensor([3, vocabulary - 1, -100, 7, 0], dtype=torch.int32)
    expected, gradient = plain(logits, targets)
    nats, found = interpreted(logits, targets)
    torch.testing.assert_close(nats, expected, atol=1e-5, rtol=1e-6)
    tolerance = 2e-6 if dtype == torch.float32 else BF16_ROUNDING
    torch.testing.assert_close(found.float(), gradient, atol=tolerance, rtol=0)
    assert found.dtype == dtype and not found[2].any()


def test_nonfinite_logits_give_a_nonfinite_loss(interpreted):
    logits = torch.zeros(3, 300)
    logits[0, 5], logits[1, 5] = torch.nan, torch.inf
    nats, _ = interpreted(logits, torch.tensor([1, 1, 1]))
    assert not nats[:2].isfinite().any() and nats[2].isfinite()


def test_logits_as_large_as_bf16_allows_give_a_finite_loss_and_gradient(interpreted):
    logits = torch.zeros(1, 300, dtype=torch.bfloat16)
    logits[0, 3], logits[0, 4] = 3e38, -3e38
    nats, found = interpreted(logits, torch.tensor([3]))
    assert nats.item() == 0 and found.isfinite().all()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_the_compiled_kernel_spills_no_registers(capability, dtype, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cucafera.model import loss_kernel

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not os.access(ptxas, os.X_OK):
        pytest.skip("this build of Triton brings no ptxas")
    source = ASTSource(
        fn=loss_kernel._cross_entropy_in_place,
        signature={
            "logits": dtype, "targets": "*i32", "nats": "*fp32", "ignore_index": "i32", "VOCABULARY": "constexpr",
            "BLOCK": "constexpr",
        },
        constexprs={"VOCABULARY": 65_536, "BLOCK": loss_kernel.MAX_BLOCK},
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 32})
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    architecture = re.search(r"\.target (\w+)", ptx.read_text())[1]
    command = [ptxas, "-v", f"-arch={architecture}", ptx, "-o", tmp_path / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")], report
    (registers,) = re.findall(r"Used (\d+) registers", report)
    assert int(registers) * 1024 <= 65_536  # or 1,024 threads would not fit a multiprocessor
