"""The matrix products of linear layers.

N rows, I inputs, O outputs
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SHARED_WEIGHT = 1 << 20
"""Elements: below it, a second thread is woken for longer than it reads."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: [..., I] to [..., O].

    One row in fp32 on a CPU, which is what writing a text token by token asks for, is bound by reading the weight, and
    PyTorch reads it with one thread. As a batch of products, each with its share of the outputs, all threads read:
    measured 12 GB/s and 19 GB/s of the weights of the 245M model, with two threads.
    """
    one_row = x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not one_row or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight)
    outputs, inputs = weight.shape
    threads = torch.get_num_threads()
    if threads == 1 or outputs % threads or weight.numel() < SMALLEST_SHARED_WEIGHT:
        return F.linear(x, weight)
    rows = x.reshape(1, 1, inputs).expand(threads, 1, inputs)
    shares = weight.view(threads, outputs // threads, inputs).transpose(1, 2)
    return torch.bmm(rows, shares).view(*x.shape[:-1], outputs)


def linears(x: Tensor, layers: Sequence["Linear"]) -> tuple[Tensor, ...]:
    """What each of several linear layers makes of the same input: [..., I] to [..., O] of each.

    Compiled, it is one product with all their weights side by side, forward and backward: fewer and larger ones, which
    small models need most. Written out, copying the weights together would cost more than it gains.
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
