"""GGUF, the file that llama.cpp reads: our weights and tokenizer in its terms, and back.

llama.cpp computes a model by the graph of its architecture. Two of its graphs compute ours, each with the head tied to
the embedding (src/models/gemma.cpp and llama.cpp there):

    model.hidden_act    architecture   what is stored otherwise than in our checkpoints
    gelu_pytorch_tanh   gemma          It multiplies embeddings by sqrt(hidden_size): they are divided by it, and the
                                       gain of the final norm, which stands before the same matrix, is multiplied.
    silu                llama          It turns pairs (x[2 i], x[2 i + 1]) by an angle, not (x[i], x[i + d / 2]): the
                                       rows of q_proj and k_proj are put in that order, head by head.

The `llama` graph has SiLU fixed in it: with other weights it would load, and write nonsense. GELU by the error function
is in neither.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cucafera.config import SPECIAL_TOKENS, ModelConfig, UserError
from cucafera.data.chat import PLAIN_CHAT_TEMPLATE
from cucafera.data.tokenizer import DOCUMENT_START_ID, IM_END_ID, PAD_ID, Tokenizer
from cucafera.model.transformer import Decoder

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

ARCHITECTURES = {"gelu_pytorch_tanh": "gemma", "silu": "llama"}
"""The graph that computes a model, by its hidden_act."""

WEIGHT_NAMES = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
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

INSTALL_GGUF = "GGUF needs the package gguf: pip install '.[gguf]'"


class Weight(NamedTuple):
    """One tensor of a file.

    Attributes:
        ours: Its name in the Decoder.
        theirs: Its name in the file.
        value: Its fp32 value, as the file has it.
    """

    ours: str
    theirs: str
    value: Tensor


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name for the graph that computes a model. Raises UserError: it has none."""
    if config.hidden_act not in ARCHITECTURES:
        raise UserError(
            f"model.hidden_act is {config.hidden_act}, which none of llama.cpp's graphs computes: GGUF can hold "
            f"models with {' or '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[config.hidden_act]


def stored_weights(model: Decoder) -> Iterator[Weight]:
    """The weights of a decoder, as llama.cpp's graph wants them."""
    for name, value in model.state_dict().items():
        yield Weight(name, _stored_name(name), _stored(name, value.float(), model.config))


def _stored_name(name: str) -> str:
    if name in WEIGHT_NAMES:
        return WEIGHT_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def _stored(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """A weight in the terms of the graph."""
    if architecture_of(config) == "gemma":
        return value * _gemma_factor(name, config)
    if (heads := _turned_heads(name, config)) is None:
        return value
    return torch.cat([rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) for rows in value.chunk(heads)])


def _restored(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """A weight in our terms: the inverse of `_stored`."""
    if architecture_of(config) == "gemma":
        return value / _gemma_factor(name, config)
    if (heads := _turned_heads(name, config)) is None:
        return value
    return torch.cat([rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) for rows in value.chunk(heads)])


def _gemma_factor(name: str, config: ModelConfig) -> float:
    root = math.sqrt(config.hidden_size)
    return {"embed_tokens.weight": 1 / root, "norm.weight": root}.get(name, 1.0)


def _turned_heads(name: str, config: ModelConfig) -> int | None:
    """How many heads' rows a weight has that are turned by position; None: it is not turned."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else None


def add_metadata(writer: "GGUFWriter", config: ModelConfig, tokenizer: Tokenizer, chats: bool) -> None:
    """What llama.cpp must know of the model, and the tokenizer.

    Raises:
        UserError: the tokenizer is one that the file cannot hold.
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
            "the tokenizer takes whole words before it merges (ignore_merges), which GGUF cannot say of a tokenizer "
            "with the GPT-2 pattern"
        )
    spare = config.vocab_size - tokenizer.vocab_size
    tokens = tokenizer.tokens
    ordinary = len(tokens) - len(SPECIAL_TOKENS)
    types = [TokenType.CONTROL] * len(SPECIAL_TOKENS) + [TokenType.NORMAL] * ordinary + [TokenType.UNUSED] * spare
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # No entry of a byte-level vocabulary has a space in it, so these names are of their own.
    writer.add_token_list(tokens + [f"unused {token}" for token in range(len(tokens), config.vocab_size)])
    writer.add_token_types(types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_bos_token_id(DOCUMENT_START_ID)
    writer.add_eos_token_id(IM_END_ID if chats else DOCUMENT_START_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_unk_token_id(SPECIAL_TOKENS.index("<unk>"))
    writer.add_add_bos_token(not chats)  # a document begins with it, a conversation with <im_start>
    if chats:
        writer.add_chat_template(PLAIN_CHAT_TEMPLATE)


def open_gguf(path: Path) -> "GGUFReader":
    """Opens a file; its tensors are read when they are needed.

    Raises:
        UserError: there is none, it is no GGUF, or it is cut off; or the package gguf is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(INSTALL_GGUF) from error

    try:
        with path.open("rb") as file:
            begins = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if begins != b"GGUF":
        raise UserError(f"{path} is not a GGUF file")
    try:
        return GGUFReader(path)
    except Exception as error:  # whatever the library meets where it expected something else
        raise UserError(f"{path} is damaged or cut off; write it anew") from error


def metadata(reader: "GGUFReader", key: str) -> Any:
    """A value of the file, or None. ARCH in the key stands for the name of the architecture."""
    field = reader.get_field(key.replace("ARCH", _text(reader, "general.architecture")))
    return None if field is None else field.contents()


def _text(reader: "GGUFReader", key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def tokenizer_in(reader: "GGUFReader", path: Path) -> Tokenizer:
    """The tokenizer that a file holds.

    Raises:
        UserError: it is another than those of this package.
    """
    from gguf import TokenType

    tokens, types = metadata(reader, "tokenizer.ggml.tokens"), metadata(reader, "tokenizer.ggml.token_type")
    kind = [_text(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre")]
    if kind != ["gpt2", "gpt-2"] or tokens is None or types is None:
        raise UserError(f"{path} has another tokenizer than this package's models: {' '.join(kind) or 'none'}")
    used = len(tokens) - types.count(TokenType.UNUSED)
    try:
        return Tokenizer.from_merges(tokens[:used], metadata(reader, "tokenizer.ggml.merges") or [])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def decoder_in(reader: "GGUFReader", config: ModelConfig) -> Decoder:
    """A decoder with the weights of a file, in fp32, in our terms."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with torch.device("meta"):
        shapes = Decoder(config).state_dict()
    state = {}
    for name, value in shapes.items():
        tensor = tensors[_stored_name(name)]
        stored = torch.from_numpy(_numbers(tensor.data, tensor.tensor_type)).reshape(value.shape)
        state[name] = _restored(name, stored, config)
    return Decoder.holding(config, state)


def _numbers(data: NDArray[Any], type_: Any) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    return np.array(dequantize(data, type_), dtype=np.float32)  # a copy: the file's memory cannot be written
