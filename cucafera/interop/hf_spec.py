"""The content of a Hugging Face folder except its weights: shape, tokenizer, and the embedding row of each token id.

This package has its control tokens at ids 0 to 9, and no ids after the vocabulary. A folder that has them elsewhere,
such as the published cucafera chat models with `<|im_start|>` and `<|im_end|>` after the vocabulary, is read with its
rows reordered. Nothing here imports torch: a configuration inherits the shape before anything heavy is loaded.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cucafera.config.errors import UserError
from cucafera.config.fields import format_value
from cucafera.config.schema import ModelConfig
from cucafera.config.tokens import MAX_VOCABULARY, SPECIAL_TOKENS
from cucafera.data.tokenizer import NotUsableError, Tokenizer, TokenizerError
from cucafera.runs.locate import HUB_NAME

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
DESCRIPTION_FILES = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG)

OTHER_NAMES = {
    "</s>": ("<|endoftext|>",),
    "<unk>": ("<|unk|>", "[UNK]"),
    "<pad>": ("<|pad|>", "[PAD]"),
    "<im_start>": ("<|im_start|>",),
    "<im_end>": ("<|im_end|>",),
    "<fim_prefix>": ("<|fim_prefix|>",),
    "<fim_middle>": ("<|fim_middle|>",),
    "<fim_suffix>": ("<|fim_suffix|>",),
    "<mask>": ("<|mask|>", "[MASK]"),
}
"""Names of the control tokens in other vocabularies."""
CHATML_TOKENS = ("<im_start>", "<im_end>")
"""Control tokens whose other name comes first: a vocabulary that has both had it added for the chat training."""

LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
"""Default values of transformers for fields of LlamaConfig that config.json omits."""
INTEGER_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
FLOAT_FIELDS = ("initializer_range", "rms_norm_eps", "rope_theta")
ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh", "gelu": "gelu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip
"""From names of transformers to `model.hidden_act`."""


@dataclasses.dataclass(frozen=True)
class HFModelSpec:
    """The content of a Hugging Face folder, in this package's terms.

    Attributes:
        folder: A local folder.
        model: The shape.
        embedding_rows: Rows of the embedding in the folder.
        tokenizer: With the control tokens at this package's ids.
        row_of_id: For each token id, its row in the folder's embedding, or None for the mean of all rows; None if
            every id is its own row.
        chats: True if `<im_end>` is the end-of-sequence token.
        notes: What was changed or assumed, as sentences for the user.
    """

    folder: Path
    model: ModelConfig
    embedding_rows: int
    tokenizer: Tokenizer
    row_of_id: tuple[int | None, ...] | None
    chats: bool
    notes: tuple[str, ...]


def folder_of(source: str, with_weights: bool) -> Path:
    """Return the local folder; download it if the source is a name of the hub (OWNER/NAME or OWNER/NAME@REVISION).

    Raises:
        UserError: the download failed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    name = HUB_NAME.fullmatch(source)
    assert name is not None
    patterns = [*DESCRIPTION_FILES, *(["*.safetensors", "*.safetensors.index.json"] if with_weights else [])]
    try:
        return Path(snapshot_download(name["repository"], revision=name["revision"], allow_patterns=patterns))
    except Exception as error:  # wrong names and network failures raise many classes
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"{source}: there is no such run folder, and the download from the Hugging Face hub failed: {reason}"
        ) from error


def read_hf_spec(folder: Path) -> HFModelSpec:
    """Return the content of a folder.

    Raises:
        UserError: a file is missing or damaged, or the model is not supported; the message names the fields.
    """
    times = tuple((folder / name).stat().st_mtime_ns for name in DESCRIPTION_FILES if (folder / name).is_file())
    return _read_hf_spec(folder, times)


@functools.lru_cache(maxsize=8)
def _read_hf_spec(folder: Path, modified_ns: tuple[int, ...]) -> HFModelSpec:
    """Cache by modification times: each inherited key of a configuration asks for the same folder."""
    described = _read_json(folder / CONFIG)
    if problems := list(_problems(described)):
        raise UserError(_unsupported(folder / CONFIG, problems))
    values = {key: described.get(key, default) for key, default in LLAMA_DEFAULTS.items()}
    values["rope_theta"] = _rope(described).get("rope_theta", values["rope_theta"])
    values["num_key_value_heads"] = described.get("num_key_value_heads") or values["num_attention_heads"]
    values["hidden_act"] = ACTIVATIONS[values["hidden_act"]]
    del values["tie_word_embeddings"]
    embedding_rows: int = values["vocab_size"]
    tokenizer, row_of_id, notes = _tokenizer(folder, embedding_rows)
    if row_of_id is not None:
        values["vocab_size"] = len(row_of_id)
    if values["hidden_act"] == "gelu":
        notes.append(
            f"hidden_act=gelu in {folder / CONFIG} is computed as the exact GELU; a model that was trained with the "
            "tanh approximation should have gelu_pytorch_tanh"
        )
    chats = _ends_with_im_end(folder)
    return HFModelSpec(folder, ModelConfig(**values), embedding_rows, tokenizer, row_of_id, chats, tuple(notes))


def _unsupported(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{path}: unsupported model: {problems[0]}"
    return f"{path}: unsupported model:\n" + "\n".join(f"  - {problem}" for problem in problems)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _rope(described: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE parameters: rope_parameters in transformers 5; rope_scaling, without the base, in 4."""
    rope: dict[str, Any] = described.get("rope_parameters") or described.get("rope_scaling") or {}
    return rope if isinstance(rope, dict) else {"rope_type": rope}


def _problems(described: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each field with an unsupported value."""
    kind = described.get("model_type")
    architectures = described.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama":
        yield f"model_type={format_value(kind)} (only llama is supported)"
        return  # other model types have other fields
    if architectures != ["LlamaForCausalLM"]:
        yield f"architectures={format_value(architectures)} (only LlamaForCausalLM is supported)"
    wrong = set()
    for key in (*INTEGER_FIELDS, *FLOAT_FIELDS):
        value = described.get(key, LLAMA_DEFAULTS.get(key))
        kinds = (int,) if key in INTEGER_FIELDS else (int, float)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or value <= 0):
            wrong.add(key)
            yield f"{key}={format_value(value)} (must be a positive {'integer' if kinds == (int,) else 'number'})"
    activation = described.get("hidden_act", LLAMA_DEFAULTS["hidden_act"])
    if activation not in ACTIVATIONS:
        yield f"hidden_act={format_value(activation)} (supported are {', '.join(ACTIVATIONS)})"
    if not described.get("tie_word_embeddings", LLAMA_DEFAULTS["tie_word_embeddings"]):
        yield "tie_word_embeddings=false (only tied embeddings are supported)"
    for key in ("attention_bias", "mlp_bias"):
        if described.get(key):
            yield f"{key}={format_value(described[key])} (only bias-free Llama is supported)"
    rope = _rope(described)
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
        yield f"rope_scaling of type {format_value(rope_type)} (only RoPE without scaling is supported)"
    if (part := rope.get("partial_rotary_factor", described.get("partial_rotary_factor"))) not in (None, 1, 1.0):
        yield f"partial_rotary_factor={format_value(part)} (only 1 is supported)"
    if described.get("quantization_config"):
        yield "quantization_config (only unquantized weights are supported)"
    if not wrong:
        yield from _shape_problems(described)


def _shape_problems(described: dict[str, Any]) -> Iterator[str]:
    size = described.get("hidden_size", LLAMA_DEFAULTS["hidden_size"])
    heads = described.get("num_attention_heads", LLAMA_DEFAULTS["num_attention_heads"])
    shared = described.get("num_key_value_heads") or heads
    head_dim = described.get("head_dim")
    if size % heads or size // heads % 2:
        yield f"hidden_size={size}, num_attention_heads={heads} (the quotient must be an even integer)"
    elif head_dim is not None and head_dim != size // heads:
        yield f"head_dim={format_value(head_dim)} (must be hidden_size / num_attention_heads, {size // heads})"
    if heads % shared:
        yield f"num_key_value_heads={shared} (must divide num_attention_heads, {heads})"


def _ends_with_im_end(folder: Path) -> bool:
    """Return True if the end-of-sequence token is `<im_end>`, by either name."""
    path = folder / TOKENIZER_CONFIG
    eos = _read_json(path).get("eos_token") if path.is_file() else None
    name = eos.get("content") if isinstance(eos, dict) else eos
    return name in ("<im_end>", *OTHER_NAMES["<im_end>"])


def _tokenizer(folder: Path, embedding_rows: int) -> tuple[Tokenizer, tuple[int | None, ...] | None, list[str]]:
    """Return tokenizer, row_of_id and notes of an `HFModelSpec`."""
    path = folder / TOKENIZER
    described = _read_json(path)
    row_of_id: tuple[int | None, ...] | None = None
    notes: list[str] = []
    try:
        try:
            tokenizer = Tokenizer.from_json(path.read_bytes())
        except NotUsableError:
            reordered, row_of_id, notes = _reordered(described)
            tokenizer = Tokenizer.from_json(json.dumps(reordered).encode())
    except TokenizerError as error:
        raise UserError(f"{path}: unsupported tokenizer: {error}") from error
    if row_of_id is None and embedding_rows > MAX_VOCABULARY:
        row_of_id = tuple(range(tokenizer.vocab_size))
        unused = embedding_rows - len(row_of_id)
        notes = [
            f"The last {unused:,} rows of the embedding are dropped: the vocabulary has {len(row_of_id):,} entries"
        ]
    highest = max((row for row in row_of_id or () if row is not None), default=tokenizer.vocab_size - 1)
    if highest >= embedding_rows:
        raise UserError(f"{path} has the id {highest:,}, but {folder / CONFIG} has vocab_size={embedding_rows:,}")
    return tokenizer, row_of_id, notes


def _reordered(described: dict[str, Any]) -> tuple[dict[str, Any], tuple[int | None, ...], list[str]]:
    """Return a tokenizer.json with the control tokens at ids 0 to 9 and the other tokens after them, row_of_id, notes.

    Raises:
        NotUsableError: it is not a BPE.
    """
    try:
        model = described["model"]
        words = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
        extra = {token["content"]: token["id"] for token in described["added_tokens"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise NotUsableError("it holds no BPE with a vocabulary") from error
    id_of = words | extra
    source = {name: _source_name(name, id_of) for name in SPECIAL_TOKENS}
    controls = {name for name in source.values() if name is not None} | set(SPECIAL_TOKENS)
    kept = [word for word in words if word not in controls and word not in extra]
    row_of_id = (*(None if name is None else id_of[name] for name in source.values()), *(words[word] for word in kept))
    vocabulary = {name: number for number, name in enumerate((*SPECIAL_TOKENS, *kept))}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": name, **plain} for number, name in enumerate(SPECIAL_TOKENS)]
    changed = {**described, "model": {**model, "vocab": vocabulary}, "added_tokens": added, "post_processor": None}
    return changed, row_of_id, list(_reordering_notes(source, id_of, extra.keys() - controls))


def _source_name(name: str, id_of: dict[str, int]) -> str | None:
    """Return the name of one of this package's control tokens in another vocabulary; None if it is missing."""
    others = OTHER_NAMES.get(name, ())
    names = (*others, name) if name in CHATML_TOKENS else (name, *others)
    return next((candidate for candidate in names if candidate in id_of), None)


def _reordering_notes(source: dict[str, str | None], id_of: dict[str, int], dropped: set[str]) -> Iterator[str]:
    moved = [
        f"{name} from {id_of[name]:,} to {number}"
        for number, name in enumerate(source.values())
        if name is not None and id_of[name] != number
    ]
    if moved:
        yield f"Control tokens are moved to this package's ids: {', '.join(moved)}"
    if missing := [name for name, found in source.items() if found is None]:
        yield f"Control tokens that its vocabulary lacks start as the mean of all embeddings: {', '.join(missing)}"
    if dropped:
        yield f"Added tokens are dropped: {', '.join(sorted(dropped))}"
