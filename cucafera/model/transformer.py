"""The decoder: the function and the parameter names of Hugging Face's LlamaForCausalLM with a tied head.

B batch, T time, D hidden, H heads, K key/value heads, F intermediate, V vocabulary, d head dim
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cucafera.config.schema import ModelConfig
from cucafera.model.attention import Mask, attend, document_mask
from cucafera.model.linear import Linear, fused_projections, linear
from cucafera.model.loss import linear_cross_entropy, linear_loss_and_accuracy, token_logprobs
from cucafera.model.mup import initial_scale


class Cache(Protocol):
    """Keys and values of earlier tokens, prepared for the tokens that come next; `generation.cache` implements it."""

    positions: Tensor
    """Position of each new token within its text, [B, T]."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store keys and values [B, K, T, d] of new tokens; return what their queries [B, H, T, d] attend to."""
        ...


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary angles (Su et al., 2021), each [max_position_embeddings, d / 2]."""
    head_dim = config.hidden_size // config.num_attention_heads
    frequencies = config.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + d/2]) by the angle of its position, in fp32.

    Args:
        x: Queries or keys [B, T, heads, d].
        cos, sin: [T, d / 2], or [B, T, d / 2] where positions differ between texts.

    Returns:
        [B, T, heads, d], in the dtype of x.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def positions_within(documents: Tensor) -> Tensor:
    """Return the position of each token within its own document, from document numbers [B, T]: [B, T] int64."""
    positions = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return positions - torch.where(starts, positions, 0).cummax(1).values


def activation(name: str, x: Tensor) -> Tensor:
    """Apply the gate's activation, by its Hugging Face name."""
    if name == "silu":
        return F.silu(x)
    if name == "gelu_pytorch_tanh" and torch.compiler.is_compiling():
        # Equivalent: (1 + tanh(u)) / 2 = sigmoid(2 u). Compiled for a CPU, forward and backward take 0.7 of the time.
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


class Embedding(nn.Embedding):
    """An embedding that draws no weights on the meta device: there, `normal_` imports torch._dynamo, one CPU second."""

    def reset_parameters(self) -> None:
        """Draw the weights as nn.Embedding does, unless they have no memory."""
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (Zhang & Sennrich, 2019), computed in fp32 also where the residual stream is in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D], in the wider dtype of x and gain."""
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.hidden_size // config.num_attention_heads
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, key_value_size)
        self.v_proj = Linear(config.hidden_size, key_value_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: Cache | None) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        projected = fused_projections(x, (self.q_proj, self.k_proj, self.v_proj))
        queries, keys, values = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projected)
        queries, keys = (rotate(heads, cos, sin).transpose(1, 2) for heads in (queries, keys))
        values = values.transpose(1, 2)
        if cache is None:
            mixed = attend(queries, keys, values, mask)
        else:
            mixed = cache.attend(self.layer, queries, keys, values)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class MLP(nn.Module):
    """Gated linear unit (Shazeer, 2020): GeGLU or SwiGLU, by the activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D], through [B, T, F]."""
        gate, up = fused_projections(x, (self.gate_proj, self.up_proj))
        output: Tensor = self.down_proj(activation(self.hidden_act, gate) * up)
        return output


class Block(nn.Module):
    """Attention and MLP, each applied to the normed residual stream and added to it (pre-norm)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: Cache | None) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """The language model: token ids to hidden states, logits or loss.

    As the attribute `model` of another module, its state dict has the keys of LlamaForCausalLM with a tied head.
    Initial weights are drawn from torch's global generator: N(0, initializer_range), gains 1; with a base_hidden_size,
    some are scaled by the width (mup.py). On the meta device nothing is drawn or computed; see `make_rotary_tables`.

    Args:
        config: Shape of the model.
        activation_checkpointing: In training, keep only the input of each layer, and recompute its activations in the
            backward pass (Chen et al., 2016). The results are identical.
        document_attention: Kernel for attention within documents; one of `attention.DOCUMENT_ATTENTION`.
        residual_dtype: Dtype of the residual stream; None: that of the embedding.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        activation_checkpointing: bool = False,
        document_attention: str = "dense",
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.document_attention = document_attention
        self.residual_dtype = residual_dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.embed_tokens.weight.is_meta:  # `arange` and `normal_` would import torch._dynamo: over a CPU second
            return
        self.make_rotary_tables()
        for name, parameter in self.named_parameters():
            scale = initial_scale(name, config)
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=scale * config.initializer_range)
            else:
                nn.init.constant_(parameter, scale)

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: Mapping[str, Tensor]) -> "Decoder":
        """Return a decoder for inference with these weights by parameter name, without initializing or copying any."""
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        model.make_rotary_tables()
        return model.eval().requires_grad_(False)

    def make_rotary_tables(self) -> None:
        """Compute the rotary tables, which are in no checkpoint; call it again after building on the meta device."""
        cos, sin = rotary_tables(self.config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        document_limit: int | None = None,
    ) -> Tensor:
        """Return hidden states, or the loss if there are targets.

        Args:
            input_ids: [B, T], int32 or int64.
            targets: [B, T], int32 or int64, the next token of each; -100: no target.
            documents: Document number of each token within its window, [B, T] int32; tokens attend within their own
                document, whose positions start at 0. None: each window is one document. Not together with a cache.
            cache: KV cache of the tokens before `input_ids`, prepared for these; they are added.
            document_limit: The most documents in all windows together, for flash attention. A new value recompiles.

        Returns:
            Normed hidden states [B, T, D]; with targets, the cross-entropy in nats summed over the valid targets, an
            fp32 scalar.
        """
        tokens = input_ids.shape[1]
        positions: slice | Tensor = slice(tokens)
        mask: Mask = None
        if cache is not None:
            positions = cache.positions
        elif documents is not None:
            positions = positions_within(documents)
            mask = document_mask(documents, self.document_attention, document_limit)
        cos, sin = self.cos[positions], self.sin[positions]

        x = self.embed_tokens(input_ids).to(self.residual_dtype)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Layers have no dropout, so there is no random state to restore.
                x = checkpoint(layer, x, cos, sin, mask, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        hidden: Tensor = self.norm(x)
        if targets is None:
            return hidden
        return linear_cross_entropy(hidden.flatten(0, 1), self.embed_tokens.weight, targets.flatten())

    def loss_and_accuracy(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        document_limit: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return summed loss and number of correct predictions; no gradients.

        Args:
            input_ids, targets, documents, document_limit: As for `forward`.

        Returns:
            The cross-entropy in nats summed over the valid targets, an fp32 scalar; and the number of valid targets
            that are the top-1 prediction, an int64 scalar.
        """
        hidden = self(input_ids, documents=documents, document_limit=document_limit)
        valid = targets != -100
        return linear_loss_and_accuracy(hidden[valid], self.embed_tokens.weight, targets[valid])

    def target_logprobs(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        document_limit: int | None = None,
    ) -> Tensor:
        """Return the log-probability of each target, for losses that are functions of them.

        Only positions with a target take part in the head, so the device is waited for once, for their number.

        Args:
            input_ids, targets, documents, document_limit: As for `forward`.

        Returns:
            [B, T] in nats, fp32; 0 where there is no target.
        """
        hidden = self(input_ids, documents=documents, document_limit=document_limit).flatten(0, 1)
        positions = (targets.flatten() != -100).nonzero()[:, 0]
        logprobs = token_logprobs(hidden[positions], self.embed_tokens.weight, targets.flatten()[positions])
        return logprobs.new_zeros(targets.numel()).index_copy(0, positions, logprobs).view(targets.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the next token: [..., D] to [..., V]."""
        return linear(hidden, self.embed_tokens.weight)
