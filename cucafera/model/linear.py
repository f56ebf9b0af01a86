"""Linear layers without bias, and their matrix products.

N rows, I inputs, O outputs
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_PARALLEL_ELEMENTS = 1 << 20
"""Of a weight: below it, waking a second thread takes longer than reading its half."""


HEAD_ELEMENTS = 1 << 24
"""Of a weight: from it on, that of a large vocabulary, few rows are faster as columns."""
MAX_COLUMNS = 16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T: [..., I] to [..., O].

    A decode step on a CPU multiplies few rows in fp32, which is bound by reading the weight:

    - One row is read by one thread in PyTorch. As a batch of products, one per thread with its share of the outputs,
      all threads read: with two threads, 19 GB/s instead of 12 GB/s of the weights of the 245M model.
    - A few rows and a head of 65,536 x 768 take less time as weight @ x.T: with two threads and 2, 4, 8, 16 rows 16,
      25, 36, 44 ms instead of 46, 49, 53, 55.
    """
    rows = x.numel() // x.shape[-1]
    is_decoding = 0 < rows <= MAX_COLUMNS and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not is_decoding or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight)
    if rows > 1:
        if weight.numel() < HEAD_ELEMENTS:
            return F.linear(x, weight)
        return (weight @ x.reshape(rows, -1).T).T.view(*x.shape[:-1], -1)
    outputs, inputs = weight.shape
    threads = torch.get_num_threads()
    if threads == 1 or outputs % threads or weight.numel() < MIN_PARALLEL_ELEMENTS:
        return F.linear(x, weight)
    shared = x.reshape(1, 1, inputs).expand(threads, 1, inputs)
    shares = weight.view(threads, outputs // threads, inputs).transpose(1, 2)
    return torch.bmm(shared, shares).view(*x.shape[:-1], outputs)


def fused_projections(x: Tensor, layers: Sequence["Linear"]) -> tuple[Tensor, ...]:
    """Apply several linear layers to the same input: [..., I] to [..., O] of each.

    Compiled, they are one product with the concatenated weights, forward and backward: fewer and larger kernels, which
    matters most for small models. In eager mode, concatenating the weights costs as much as it saves.
    """
    if not torch.compiler.is_compiling() or any(type(layer) is not Linear for layer in layers):
        return tuple(layer(x) for layer in layers)
    together = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return tuple(together.split([layer.out_features for layer in layers], dim=-1))


class Linear(nn.Linear):
    """A linear layer without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return linear(x, self.weight)
