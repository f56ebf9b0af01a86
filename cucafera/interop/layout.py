"""What a Hugging Face folder holds, without its weights: the model's shape, the tokenizer, and which row is which id.

The package keeps its control tokens at ids 0 to 9 and nothing behind the vocabulary. A folder that has them elsewhere,
as the published cucafera chat models have `<|im_start|>` and `<|im_end|>` behind theirs, is taken with its rows in
another order. Nothing here imports torch: a configuration inherits the shape before anything heavy is loaded.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cucafera.config import MAX_VOCABULARY, SPECIAL_TOKENS, ModelConfig, UserError, shown
from cucafera.data.tokenizer import NotUsableError, Tokenizer, TokenizerError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
DESCRIPTION_FILES = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG)

HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")

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
"""What others call the control tokens."""
FRAMING = ("<im_start>", "<im_end>")
"""Control tokens whose other name, where it exists too, is the one that was trained: it was added for that."""

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
"""What transformers takes for a field of LlamaConfig that config.json leaves out."""
WHOLE_NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
NUMBERS = ("initializer_range", "rms_norm_eps", "rope_theta")
ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh", "gelu": "gelu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip
"""Names of transformers, and what each is called here."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a Hugging Face folder holds, in this package's terms.

    Attributes:
        folder: Where it lies on this machine.
        model: The shape.
        rows_there: Rows of the embedding in the folder.
        tokenizer: With the control tokens at their ids.
        rows: For each id, the row of the folder's embedding that it takes, None for the mean of all; None where rows
            are the ids already.
        chats: Whether a text of it ends with `<im_end>`.
        notes: What a user should know of how it was taken, each a sentence.
    """

    folder: Path
    model: ModelConfig
    rows_there: int
    tokenizer: Tokenizer
    rows: tuple[int | None, ...] | None
    chats: bool
    notes: tuple[str, ...]


def is_hugging_face(source: str) -> bool:
    """Whether a source names a Hugging Face folder or a model of the hub, and not a run of this package."""
    path = Path(source).expanduser()
    if path.is_dir():
        return (path / CONFIG).is_file()
    # A path that leads through a folder which is there was meant for a run.
    return not path.exists() and not path.parent.is_dir() and HUB_NAME.fullmatch(source) is not None


def folder_of(source: str, with_weights: bool) -> Path:
    """The folder, downloaded if the source is a name of the hub (OWNER/NAME, or OWNER/NAME@REVISION).

    Raises:
        UserError: the hub does not give it.
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
    except Exception as error:  # for a wrong name as for a lost network, of many classes
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"{source}: there is no such run folder, and the Hugging Face hub does not give it: {reason}"
        ) from error


def read_layout(folder: Path) -> Layout:
    """What a folder holds.

    Raises:
        UserError: a file is missing or broken, or holds what this package does not compute; the field is named.
    """
    times = tuple((folder / name).stat().st_mtime_ns for name in DESCRIPTION_FILES if (folder / name).is_file())
    return _layout(folder, times)


@functools.lru_cache(maxsize=8)
def _layout(folder: Path, changed_ns: tuple[int, ...]) -> Layout:
    """As the folder was at these times: each key that is inherited asks for it."""
    described = _read_json(folder / CONFIG)
    if problems := list(_problems(described)):
        raise UserError(_told(folder / CONFIG, problems))
    values = {key: described.get(key, default) for key, default in LLAMA_DEFAULTS.items()}
    values["rope_theta"] = _rope(described).get("rope_theta", values["rope_theta"])
    values["num_key_value_heads"] = described.get("num_key_value_heads") or values["num_attention_heads"]
    values["hidden_act"] = ACTIVATIONS[values["hidden_act"]]
    del values["tie_word_embeddings"]
    rows_there: int = values["vocab_size"]
    tokenizer, rows, notes = _tokenizer(folder, rows_there)
    if rows is not None:
        values["vocab_size"] = len(rows)
    if values["hidden_act"] == "gelu":
        notes.append(
            f"{folder / CONFIG} says hidden_act=gelu, the exact one, and so it is computed; models that were trained "
            "with the tanh form say gelu_pytorch_tanh"
        )
    return Layout(folder, ModelConfig(**values), rows_there, tokenizer, rows, _chats(folder), tuple(notes))


def _told(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{path} cannot be taken: {problems[0]}"
    return f"{path} cannot be taken:\n" + "\n".join(f"  - {problem}" for problem in problems)


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
    """Parameters of the rotary embedding: transformers 5 has a field for them, 4 another for all but the base."""
    rope: dict[str, Any] = described.get("rope_parameters") or described.get("rope_scaling") or {}
    return rope if isinstance(rope, dict) else {"rope_type": rope}


def _problems(described: dict[str, Any]) -> Iterator[str]:
    """A clause for each field that holds what this package does not compute."""
    kind = described.get("model_type")
    architectures = described.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama":
        yield f"model_type is {shown(kind)}, and only llama is known"
        return  # the other fields mean other things there
    if architectures != ["LlamaForCausalLM"]:
        yield f"architectures is {shown(architectures)}, and only LlamaForCausalLM is known"
    wrong = set()
    for key in (*WHOLE_NUMBERS, *NUMBERS):
        value = described.get(key, LLAMA_DEFAULTS.get(key))
        kinds = (int,) if key in WHOLE_NUMBERS else (int, float)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or value <= 0):
            wrong.add(key)
            yield f"{key} is {shown(value)}, and must be a {'whole ' * (kinds == (int,))}number above zero"
    activation = described.get("hidden_act", LLAMA_DEFAULTS["hidden_act"])
    if activation not in ACTIVATIONS:
        yield f"hidden_act is {shown(activation)}, and only {', '.join(ACTIVATIONS)} are known"
    if not described.get("tie_word_embeddings", LLAMA_DEFAULTS["tie_word_embeddings"]):
        yield "tie_word_embeddings is false, and the head is always the embedding here"
    for key in ("attention_bias", "mlp_bias"):
        if described.get(key):
            yield f"{key} is {shown(described[key])}, and there are no biases here"
    rope = _rope(described)
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
        yield f"rope_scaling has the type {shown(rope_type)}, and only the default, without scaling, is known"
    if (part := rope.get("partial_rotary_factor", described.get("partial_rotary_factor"))) not in (None, 1, 1.0):
        yield f"partial_rotary_factor is {shown(part)}, and heads are always rotated whole here"
    if described.get("quantization_config"):
        yield "quantization_config is given, and only plain weights can be read"
    if not wrong:
        yield from _shape_problems(described)


def _shape_problems(described: dict[str, Any]) -> Iterator[str]:
    size = described.get("hidden_size", LLAMA_DEFAULTS["hidden_size"])
    heads = described.get("num_attention_heads", LLAMA_DEFAULTS["num_attention_heads"])
    shared = described.get("num_key_value_heads") or heads
    head_dim = described.get("head_dim")
    if size % heads or size // heads % 2:
        yield f"hidden_size is {size} and num_attention_heads {heads}: heads must have one even width"
    elif head_dim is not None and head_dim != size // heads:
        yield f"head_dim is {shown(head_dim)}, and is always hidden_size / num_attention_heads here, {size // heads}"
    if heads % shared:
        yield f"num_key_value_heads is {shared}, and must divide num_attention_heads, {heads}"


def _chats(folder: Path) -> bool:
    """Whether the token that ends a text is `<im_end>`, by either name."""
    path = folder / TOKENIZER_CONFIG
    ends = _read_json(path).get("eos_token") if path.is_file() else None
    name = ends.get("content") if isinstance(ends, dict) else ends
    return name in ("<im_end>", *OTHER_NAMES["<im_end>"])


def _tokenizer(folder: Path, rows_there: int) -> tuple[Tokenizer, tuple[int | None, ...] | None, list[str]]:
    """The tokenizer as this package has it, the rows of its ids, and what there is to say about them."""
    path = folder / TOKENIZER
    described = _read_json(path)
    rows: tuple[int | None, ...] | None = None
    notes: list[str] = []
    try:
        try:
            tokenizer = Tokenizer.from_json(path.read_bytes())
        except NotUsableError:
            rearranged, rows, notes = _rearranged(described)
            tokenizer = Tokenizer.from_json(json.dumps(rearranged).encode())
    except TokenizerError as error:
        raise UserError(f"{path} cannot be taken: {error}") from error
    if rows is None and rows_there > MAX_VOCABULARY:
        rows = tuple(range(tokenizer.vocab_size))
        notes = [f"Left out are the {rows_there - len(rows):,} rows behind the {len(rows):,} of its vocabulary"]
    highest = max((row for row in rows or () if row is not None), default=tokenizer.vocab_size - 1)
    if highest >= rows_there:
        raise UserError(f"{path} has the id {highest:,}, and {folder / CONFIG} says vocab_size={rows_there:,}")
    return tokenizer, rows, notes


def _rearranged(described: dict[str, Any]) -> tuple[dict[str, Any], tuple[int | None, ...], list[str]]:
    """A tokenizer.json with the control tokens at ids 0 to 9 and the rest behind them; the rows; the notes.

    Raises:
        NotUsableError: it is not a BPE.
    """
    try:
        model, added = described["model"], described["added_tokens"]
        words = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
        extra = {token["content"]: token["id"] for token in added}
    except (KeyError, TypeError, AttributeError) as error:
        raise NotUsableError("it holds no BPE with its vocabulary") from error
    there = words | extra
    source = {name: _name_there(name, there) for name in SPECIAL_TOKENS}
    taken = {name for name in source.values() if name is not None} | set(SPECIAL_TOKENS)
    kept = [word for word in words if word not in taken and word not in extra]
    rows = (*(None if name is None else there[name] for name in source.values()), *(words[word] for word in kept))
    vocabulary = {name: number for number, name in enumerate((*SPECIAL_TOKENS, *kept))}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    controls = [{"id": number, "content": name, **plain} for number, name in enumerate(SPECIAL_TOKENS)]
    changed = {**described, "model": {**model, "vocab": vocabulary}, "added_tokens": controls, "post_processor": None}
    return changed, rows, list(_rearrangement_notes(source, there, taken, extra))


def _name_there(name: str, there: dict[str, int]) -> str | None:
    """What a control token of this package is called in another vocabulary."""
    others = OTHER_NAMES.get(name, ())
    names = (*others, name) if name in FRAMING else (name, *others)
    return next((candidate for candidate in names if candidate in there), None)


def _rearrangement_notes(
    source: dict[str, str | None], there: dict[str, int], taken: set[str], extra: dict[str, int]
) -> Iterator[str]:
    moved = [
        f"{there[name]:,} ({name}) becomes {number}"
        for number, name in enumerate(source.values())
        if name is not None and there[name] != number
    ]
    if moved:
        yield f"Control tokens are moved to the ids that they have here: {', '.join(moved)}"
    if missing := [name for name, found in source.items() if found is None]:
        yield f"{', '.join(missing)} are not in its vocabulary: each begins as the mean of all embeddings"
    if left_out := sorted(extra.keys() - taken):
        yield f"Left out are the added tokens {', '.join(left_out)}"
