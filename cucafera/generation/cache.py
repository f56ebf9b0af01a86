"""The key/value cache.

B batch, K key/value heads, T new tokens, S tokens so far, d head dim
"""

import torch
from torch import Tensor

from cucafera.config import ModelConfig


class KeyValueCache:
    """Keys and values of the tokens so far, in memory taken once.

    Args:
        config: The model that fills it.
        batch_size: Texts that are written side by side.
        capacity: Most tokens it can hold.
        device, dtype: Those of the model's hidden states.
        padding: How many tokens at the beginning of each text are padding, [B]; None: there is none.
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
        """Appends the keys and values [B, K, T, d] of new tokens; returns those of all tokens, [B, K, S, d]."""
        end = self.length + keys.shape[2]
        self._keys[layer, :, :, self.length : end] = keys
        self._values[layer, :, :, self.length : end] = values
        if layer == self._layers - 1:
            self.length = end
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def repeated(self, times: Tensor, room: int) -> "KeyValueCache":
        """A cache in which each text stands several times, to be written on in as many ways.

        Args:
            times: How many times each of them, int64 [B].
            room: Most tokens that are added to it.
        """
        texts, device = int(times.sum()), self._keys.device
        padding = None if self.padding is None else self.padding.repeat_interleave(times)
        cache = KeyValueCache(self._config, texts, self.length + room, device, self._keys.dtype, padding)
        cache.length = self.length
        for there, here in ((self._keys, cache._keys), (self._values, cache._values)):
            here[:, :, :, : self.length] = there[:, :, :, : self.length].repeat_interleave(times, dim=1)
        return cache
