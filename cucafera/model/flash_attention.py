"""Variable-length flash attention (Dao, 2023, FlashAttention-2): concatenated documents, no padding, no mask in memory.

N tokens of all windows, H heads, K key/value heads, d head dim
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

from cucafera.config.errors import UserError

CAUSAL = (-1, 0)
"""Window to the left and right of a query: unlimited, and none."""

GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch 2.11 infers grouped-query attention from the shapes; later versions require the argument."""

IMPLEMENTATIONS = {"flash3": ("FA3", "flash_attn_interface", (9,)), "flash4": ("FA4", "flash_attn.cute", (9, 10))}
"""FlashAttention 3 (Shah et al., 2024) and 4: name in PyTorch, module with the kernels, and the major compute
capabilities that they support. FlashAttention 2 comes with PyTorch."""


def activate_flash_attention(name: str, device_name: str, capability: tuple[int, int]) -> None:
    """Make PyTorch call FlashAttention 3 or 4 instead of 2, in this process.

    Args:
        name: flash3 or flash4.
        device_name, capability: Of the GPU.

    Raises:
        UserError: the GPU is not supported, the package is not installed, or this PyTorch cannot call it.
    """
    official_name, module, capabilities = IMPLEMENTATIONS[name]
    setting = f"trainer.document_attention={name}"
    if capability[0] not in capabilities:
        needed = " or ".join(f"{major}.0" for major in capabilities)
        raise UserError(
            f"{setting}: {device_name} has compute capability {capability[0]}.{capability[1]}, and it needs {needed}; "
            "leave the setting out"
        )
    if name == "flash4" and torch.__version__ < "2.12":
        raise UserError(f"{setting}: PyTorch {torch.__version__} has no backward pass for it: install 2.12 or newer")
    try:
        activate_flash_attention_impl(official_name)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{setting}: its kernels, the module {module}, cannot be loaded: {error}") from error


def attend_within_documents(
    queries: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """Compute causal attention within each document.

    Args:
        queries: [N, H, d], bf16, on CUDA.
        keys, values: [N, K, d].
        cu_seqlens: Tokens before each document, int32, N at the end; repeated values are empty documents.
        max_seqlen: Upper bound on the length of a document.

    Returns:
        [N, H, d].
    """
    offsets = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)  # of queries and of keys
    mixed = varlen_attn(queries, keys, values, *offsets, window_size=CAUSAL, **GROUPED)
    assert isinstance(mixed, Tensor)
    return mixed
