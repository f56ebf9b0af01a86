"""GGUF, the file format of llama.cpp: conversion of weights, metadata and tokenizer, and back.

llama.cpp computes a model by the graph of its architecture. Two of its graphs (src/models/gemma.cpp and llama.cpp in
its repository) compute our model, with the head tied to the embedding:

    model.hidden_act    architecture   stored differently from our checkpoints
    gelu_pytorch_tanh   gemma          The embedding and the weight of the final norm: see interop/gemma.py.
    silu                llama          The graph rotates pairs (x[2 i], x[2 i + 1]), not (x[i], x[i + d / 2]), so the
                                       rows of q_proj and k_proj are interleaved, head by head.

SiLU is fixed in the `llama` graph: it would load the weights of a GELU model, and generate nonsense. No graph has the
exact GELU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cucafera.config.errors import UserError
from cucafera.config.schema import ModelConfig
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID, PAD_ID, SPECIAL_TOKENS
from cucafera.data.chatml import PLAIN_CHAT_TEMPLATE
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop.gemma import EMBEDDING, FINAL_NORM, scale_for_gemma, unscale_from_gemma
from cucafera.model.transformer import Decoder

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

T = TypeVar("T")

ARCHITECTURES = {"gelu_pytorch_tanh": "gemma", "silu": "llama"}
"""The architecture by model.hidden_act."""

WEIGHT_NAMES = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

MAX_READS = 2_000_000
"""Values of a file's header that are read: a vocabulary of 65,536 entries has 400,000, and each takes memory."""
INSTALL_GGUF = "GGUF needs the package gguf: pip install '.[gguf]'"


class Weight(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: In the Decoder.
        gguf_name: In the file.
        value: In fp32, converted for the graph.
    """

    name: str
    gguf_name: str
    value: Tensor


def architecture_of(config: ModelConfig) -> str:
    """Return llama.cpp's architecture for a model. Raises UserError if there is none."""
    if config.hidden_act not in ARCHITECTURES:
        raise UserError(
            f"unsupported model: model.hidden_act={config.hidden_act} (llama.cpp computes {' or '.join(ARCHITECTURES)})"
        )
    return ARCHITECTURES[config.hidden_act]


def stored_weights(model: Decoder) -> Iterator[Weight]:
    """Yield the weights of a decoder, converted for llama.cpp's graph."""
    for name, value in model.state_dict().items():
        yield Weight(name, _gguf_name(name), _to_graph(name, value.float(), model.config))


def _gguf_name(name: str) -> str:
    if name in WEIGHT_NAMES:
        return WEIGHT_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def _to_graph(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """Convert a weight for the graph."""
    if architecture_of(config) == "gemma":
        return scale_for_gemma(name, value, config.hidden_size)
    if (heads := _rotated_heads(name, config)) is None:
        return value
    return torch.cat([rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) for rows in value.chunk(heads)])


def _from_graph(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """Invert `_to_graph`."""
    if architecture_of(config) == "gemma":
        return unscale_from_gemma(name, value, config.hidden_size)
    if (heads := _rotated_heads(name, config)) is None:
        return value
    return torch.cat([rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) for rows in value.chunk(heads)])


def _rotated_heads(name: str, config: ModelConfig) -> int | None:
    """Return the number of heads of a weight whose output is rotated by RoPE; None for other weights."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else None


def add_metadata(writer: "GGUFWriter", config: ModelConfig, tokenizer: Tokenizer, chats: bool) -> None:
    """Write the hyperparameters, the tokenizer and the chat template.

    Raises:
        UserError: GGUF cannot represent the tokenizer.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config, tokenizer, chats)


def _add_tokenizer(writer: "GGUFWriter", config: ModelConfig, tokenizer: Tokenizer, chats: bool) -> None:
    from gguf import TokenType

    if tokenizer.ignores_merges:
        raise UserError(
            "unsupported tokenizer: ignore_merges=true, which GGUF cannot represent together with the GPT-2 pattern"
        )
    spare = config.vocab_size - tokenizer.vocab_size
    tokens = tokenizer.tokens
    ordinary = len(tokens) - len(SPECIAL_TOKENS)
    types = [TokenType.CONTROL] * len(SPECIAL_TOKENS) + [TokenType.NORMAL] * ordinary + [TokenType.UNUSED] * spare
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # Entries of a byte-level vocabulary have no spaces, so these names are unique.
    writer.add_token_list(tokens + [f"unused {token}" for token in range(len(tokens), config.vocab_size)])
    writer.add_token_types(types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_bos_token_id(DOCUMENT_START_ID)
    writer.add_eos_token_id(IM_END_ID if chats else DOCUMENT_START_ID)
    writer.add_eot_token_id(IM_END_ID)  # llama.cpp finds it by its name only if that is <|im_end|>
    writer.add_pad_token_id(PAD_ID)
    writer.add_unk_token_id(SPECIAL_TOKENS.index("<unk>"))
    writer.add_add_bos_token(not chats)  # documents begin with it, conversations with <im_start>
    if chats:
        writer.add_chat_template(PLAIN_CHAT_TEMPLATE)


def open_gguf(path: Path) -> "GGUFReader":
    """Open a file; its tensors are memory-mapped.

    Raises:
        UserError: it does not exist, is not GGUF or is truncated, or the package gguf is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(INSTALL_GGUF) from error

    class Reader(GGUFReader):
        """Reads nothing beyond the end of the file, and stops where an array claims more items than metadata has."""

        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **settings: Any) -> NDArray[Any]:
            self.reads += 1
            values: NDArray[Any] = super()._get(offset, dtype, count, *order, **settings)
            if len(values) != int(count) or self.reads > MAX_READS:
                raise ValueError("a size in the file is wrong")
            return values

    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file")
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise UserError(f"{path} is not a GGUF file")
    try:
        with np.errstate(all="ignore"):
            return Reader(path)
    except Exception as error:  # parsing damaged bytes raises many classes
        raise UserError(f"{path} is damaged or truncated; write it again") from error


def metadata(reader: "GGUFReader", key: str, kind: type[T]) -> T | None:
    """Return a value of the file, or None. ARCH in the key is replaced by the name of the architecture.

    Raises:
        UserError: it is of another type than `kind`, or cannot be decoded.
    """
    if key.startswith("ARCH."):
        key = key.replace("ARCH", metadata(reader, "general.architecture", str) or "")
    field = reader.get_field(key)
    if field is None:
        return None
    try:
        value = field.contents()
    except Exception as error:  # damaged bytes raise many classes
        raise _damaged(reader, key) from error
    if not isinstance(value, kind):
        raise _damaged(reader, key)
    return value


def _damaged(reader: "GGUFReader", what: str) -> UserError:
    path = getattr(reader.data, "filename", "the file")
    return UserError(f"{path} is damaged: {what} is not what it should be; write it again")


def context_in(reader: "GGUFReader") -> int:
    """Return the context of a model, in tokens. Raises UserError if the file states none, or an impossible one."""
    limits = ModelConfig.__dataclass_fields__["max_position_embeddings"].metadata["limits"]
    context = metadata(reader, "ARCH.context_length", int)
    if context is None or not limits.allow(context):
        raise _damaged(reader, "its context_length")
    return context


def tokenizer_in(reader: "GGUFReader", path: Path) -> Tokenizer:
    """Return the tokenizer of a file.

    Raises:
        UserError: it is not a byte-level BPE with the GPT-2 pattern, as this package writes it.
    """
    from gguf import TokenType

    kind = [metadata(reader, f"tokenizer.ggml.{key}", str) or "" for key in ("model", "pre")]
    tokens, types, merges = (
        metadata(reader, f"tokenizer.ggml.{key}", list) for key in ("tokens", "token_type", "merges")
    )
    if kind != ["gpt2", "gpt-2"] or tokens is None or types is None:
        raise UserError(
            f"{path}: unsupported tokenizer: {' '.join(kind).strip() or 'none'} (only gpt2 with pattern gpt-2)"
        )
    if len(types) != len(tokens) or not all(isinstance(text, str) for text in [*tokens, *(merges or [])]):
        raise _damaged(reader, "its tokenizer")
    used = len(tokens) - types.count(TokenType.UNUSED)
    try:
        return Tokenizer.from_merges(tokens[:used], merges or [])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def decoder_in(reader: "GGUFReader", config: ModelConfig) -> Decoder:
    """Return a decoder with the weights of a file, in fp32.

    Raises:
        UserError: a weight is missing, or has another shape or an unknown type.
    """
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with torch.device("meta"):
        shapes = Decoder(config).state_dict()
    state = {}
    for name, value in shapes.items():
        try:
            tensor = tensors[_gguf_name(name)]
            stored = torch.from_numpy(_dequantized(tensor.data, tensor.tensor_type)).reshape(value.shape)
        except (KeyError, NotImplementedError, ValueError, RuntimeError) as error:
            raise _damaged(reader, _gguf_name(name)) from error
        state[name] = _from_graph(name, stored, config)
    return Decoder.from_weights(config, state)


def _dequantized(data: NDArray[Any], type_: Any) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        return np.array(dequantize(data, type_), dtype=np.float32)  # a copy: the memory-mapped file is read-only
