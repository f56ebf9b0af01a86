"""The KV cache.

B sequences, K key/value heads, T new tokens, S tokens in the cache, d head dim
"""

import torch
from torch import Tensor

from cucafera.config.schema import ModelConfig


class KeyValueCache:
    """Keys and values of the tokens decoded so far, in memory allocated once.

    Args:
        config: Configuration of the model that fills it.
        batch_size: B, sequences decoded together.
        capacity: Maximum number of tokens per sequence.
        device, dtype: Those of the model's hidden states.
        padding: Number of padding tokens on the left of each sequence, [B]; None: no padding.

    Attributes:
        length: S, the same for all sequences.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        padding: Tensor | None = None,
    ) -> None:
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, head_dim)
        self.length = 0
        self.padding = padding
        self._config = config
        self._layers = config.num_hidden_layers
        self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._values = torch.empty(shape, device=device, dtype=dtype)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values [B, K, T, d] of new tokens; return those of all tokens, [B, K, S, d]."""
        end = self.length + keys.shape[2]
        self._keys[layer, :, :, self.length : end] = keys
        self._values[layer, :, :, self.length : end] = values
        if layer == self._layers - 1:  # every layer writes at the same offset, so only the last one moves it
            self.length = end
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def repeat_interleave(self, repeats: Tensor, extra_tokens: int) -> "KeyValueCache":
        """Return a copy in which each sequence is repeated, to score several continuations of one context.

        Args:
            repeats: Number of copies of each sequence, int64 [B].
            extra_tokens: Maximum number of tokens that will be appended to the copy.
        """
        batch_size, device = int(repeats.sum()), self._keys.device
        padding = None if self.padding is None else self.padding.repeat_interleave(repeats)
        capacity = self.length + extra_tokens
        copy = KeyValueCache(self._config, batch_size, capacity, device, self._keys.dtype, padding)
        copy.length = self.length
        for source, target in ((self._keys, copy._keys), (self._values, copy._values)):
            target[:, :, :, : self.length] = source[:, :, :, : self.length].repeat_interleave(repeats, dim=1)
        return copy
