"""The content of a Hugging Face folder except its weights: shape, tokenizer, and the embedding row of each token id.

This package has its control tokens at ids 0 to 9, and no ids after the vocabulary. A folder that has them elsewhere,
such as the published cucafera chat models with `<|im_start|>` and `<|im_end|>` after the vocabulary, is read with its
rows reordered. Nothing here imports torch: a configuration inherits the shape before anything heavy is loaded.
"""

import dataclasses
import fnmatch
import functools
import importlib.util
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cucafera import hub
from cucafera.config.errors import UserError
from cucafera.config.fields import Limits, format_value
from cucafera.config.schema import ModelConfig
from cucafera.config.tokens import MAX_VOCABULARY, SPECIAL_TOKENS
from cucafera.data.tokenizer import NotUsableError, Tokenizer, TokenizerError
from cucafera.hub import hub_problem, unreachable
from cucafera.interop.chat_template import chat_template_notes, token_name
from cucafera.quantities import number_of
from cucafera.runs.locate import HUB_NAME

log = logging.getLogger(__name__)

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
DESCRIPTION_FILES = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG, CHAT_TEMPLATE_FILE)

MAX_DESCRIPTION_BYTES = 1 << 26
"""Largest size of a description file; the tokenizer.json of 250,000 entries has half of it."""
MAX_EMBEDDING_ROWS = 1 << 20
MAX_ROTARY_VALUES = 1 << 28
"""Positions times head dim: the tables of RoPE take four bytes each, in total 1 GiB."""

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

ARCHITECTURES = {"llama": "LlamaForCausalLM", "gemma": "GemmaForCausalLM"}
"""The class of transformers for each model_type that is read and written."""
_COMMON = {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        **_COMMON,
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "gemma": {
        **_COMMON,
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}
"""Default values of transformers for fields of LlamaConfig and GemmaConfig that config.json omits."""
TANH_GELU = "gelu_pytorch_tanh"
ACTIVATIONS = {
    "llama": {TANH_GELU: TANH_GELU, "gelu_new": TANH_GELU, "gelu": "gelu", "silu": "silu", "swish": "silu"},
    "gemma": {TANH_GELU: TANH_GELU, "gelu_new": TANH_GELU, "gelu": TANH_GELU},
}
"""From names of transformers to `model.hidden_act`. The first configurations of Gemma say gelu and mean the tanh
approximation, which transformers 5 and vLLM compute for them."""
MAX_SHOWN = 200
"""Characters of a value of a foreign file, or of a text about it, in a message."""


@dataclasses.dataclass(frozen=True)
class HFModelSpec:
    """The content of a Hugging Face folder, in this package's terms.

    Attributes:
        folder: A local folder.
        architecture: The form of the weights, a key of ARCHITECTURES.
        model: The shape.
        embedding_rows: Rows of the embedding in the folder.
        tokenizer: With the control tokens at this package's ids.
        row_of_id: For each token id, its row in the folder's embedding, or None for the mean of all rows; None if
            every id is its own row.
        chats: True if `<im_end>` is the end-of-sequence token.
        notes: What was changed or assumed, as sentences for the user.
    """

    folder: Path
    architecture: str
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

    problem = hub_problem()
    name = HUB_NAME.fullmatch(source)
    assert name is not None
    patterns = [*DESCRIPTION_FILES, *(["*.safetensors", "*.safetensors.index.json"] if with_weights else [])]
    if with_weights and importlib.util.find_spec("safetensors") is None:
        raise UserError(f"{source}: reading its weights needs safetensors: pip install '.[hf]'")
    if problem is None:
        problem = _announce_download(name["repository"], name["revision"], patterns)
    try:
        return Path(snapshot_download(name["repository"], revision=name["revision"], allow_patterns=patterns))
    except Exception as error:  # wrong names and network failures raise many classes
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        problem = problem or f"the download from the hub failed: {reason}"
        raise UserError(f"{source}: there is no such run folder, no earlier download, and {problem}") from error


def _announce_download(repository: str, revision: str | None, patterns: list[str]) -> str | None:
    """Log the size, folder and licence of what will be downloaded, unless it was downloaded before.

    Returns:
        Why the hub cannot be asked, as `hub_problem` does; None if it answers, be it that there is no such model.

    Raises:
        UserError: the disk has less space than that.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=hub.WAIT_SECONDS)
    except HfHubHTTPError:  # an answer, which the download reports
        return None
    except Exception as error:  # the download would wait for an answer without end
        return unreachable(error)
    wanted = {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in patterns)
        and not isinstance(try_to_load_from_cache(repository, file.rfilename, revision=info.sha), str)
    }
    if not wanted:
        return None
    cache, size = Path(constants.HF_HUB_CACHE), sum(wanted.values())
    cache.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(cache).free) < size:
        raise UserError(
            f"{repository} has {size / 1e9:,.3f} GB, and the disk of {cache} has {free / 1e9:,.3f} GB free. HF_HOME "
            "names a folder on another disk"
        )
    licence = shown(getattr(info.card_data, "license", None) or "none is named")
    log.info(
        "Downloading %s from the Hugging Face hub to %s: %s GB, licence: %s",
        repository, cache, f"{size / 1e9:,.3f}", licence,
    )  # fmt: skip
    return None


def read_hf_spec(folder: Path) -> HFModelSpec:
    """Return the content of a folder.

    Raises:
        UserError: a file is missing or damaged, or the model is not supported; the message names the fields.
    """
    paths = [folder / name for name in DESCRIPTION_FILES]
    times = tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)
    return _read_hf_spec(folder, times)


@functools.lru_cache(maxsize=8)
def _read_hf_spec(folder: Path, modified_ns: tuple[int, ...]) -> HFModelSpec:
    """Cache by modification times: each inherited key of a configuration asks for the same folder."""
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: the base of an adapter must be a whole model, and this is an adapter: merge "
            f"it with python -m cucafera.export {shlex.quote(str(folder))} --to hf FOLDER, and name that folder"
        )
    described = read_json(folder / CONFIG)
    architecture = described.get("model_type")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:  # other types have other fields
        supported = " and ".join(ARCHITECTURES)
        problem = f"model_type={shown(architecture)} (only {supported} are supported)"
        raise UserError(_unsupported(folder / CONFIG, [problem]))
    described = DEFAULTS[architecture] | described
    values = _model_values(described)
    if problems := list(_problems(described, values)):
        raise UserError(_unsupported(folder / CONFIG, problems))
    values["hidden_act"] = ACTIVATIONS[architecture][values["hidden_act"]]
    embedding_rows: int = values["vocab_size"]
    tokenizer, row_of_id, notes = read_tokenizer(folder, embedding_rows)
    if row_of_id is not None:
        values["vocab_size"] = len(row_of_id)
    if values["hidden_act"] == "gelu":
        notes.append(
            f"hidden_act=gelu in {folder / CONFIG} is computed as the exact GELU; a model that was trained with the "
            "tanh approximation should have gelu_pytorch_tanh"
        )
    chats, chat_notes = read_chat_form(folder)
    notes += chat_notes
    model = ModelConfig(**values)
    return HFModelSpec(folder, architecture, model, embedding_rows, tokenizer, row_of_id, chats, tuple(notes))


def read_chat_form(folder: Path) -> tuple[bool, list[str]]:
    """Return `chats` of an `HFModelSpec`, and a note for a chat template that renders another prompt than ChatML."""
    about_tokenizer = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
    notes = chat_template_notes(_chat_template(folder, about_tokenizer), about_tokenizer, OTHER_NAMES)
    return _ends_with_im_end(about_tokenizer), notes


def _unsupported(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{path}: unsupported model: {problems[0]}"
    return f"{path}: unsupported model:\n" + "\n".join(f"  - {problem}" for problem in problems)


def read_bytes(path: Path) -> bytes:
    """Return the content of a description file.

    Raises:
        UserError: it cannot be read, is a pipe, a folder or another special file, or is far too large.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file")
        if (size := path.stat().st_size) > MAX_DESCRIPTION_BYTES:
            raise UserError(f"{path} has {number_of(size, 'byte')}; such a file has at most {MAX_DESCRIPTION_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a description file.

    Raises:
        UserError: as `read_bytes` does; or it holds no JSON object.
    """
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {shown(str(error))}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _chat_template(folder: Path, about_tokenizer: dict[str, Any]) -> Any:
    """Return the folder's own chat template: a file of its own in transformers 5; None if there is none."""
    if not (folder / CHAT_TEMPLATE_FILE).exists():
        return about_tokenizer.get("chat_template")
    try:
        return read_bytes(folder / CHAT_TEMPLATE_FILE).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / CHAT_TEMPLATE_FILE} is not UTF-8") from error


def _model_values(described: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a ModelConfig as config.json has them: values of any type, activations by any name."""
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name in DEFAULTS["llama"]]
    values = {name: described[name] for name in names}
    values["rope_theta"] = _rope(described).get("rope_theta", values["rope_theta"])
    if described["model_type"] == "llama" and values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values


def _rope(described: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE parameters: rope_parameters in transformers 5; rope_scaling, without the base, in 4."""
    rope: dict[str, Any] = described.get("rope_parameters") or described.get("rope_scaling") or {}
    return rope if isinstance(rope, dict) else {"rope_type": rope}


def _problems(described: dict[str, Any], values: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each field with an unsupported value; arguments are config.json, and `_model_values`."""
    kind = described["model_type"]
    architectures = described.get("architectures") or [ARCHITECTURES[kind]]
    if architectures != [ARCHITECTURES[kind]]:
        yield f"architectures={shown(architectures)} (only {ARCHITECTURES[kind]} is supported)"
    activation, supported = values["hidden_act"], ACTIVATIONS[kind]
    if not isinstance(activation, str) or activation not in supported:
        yield f"hidden_act={shown(activation)} (supported are {', '.join(supported)})"
    if kind == "gemma" and (other := described.get("hidden_activation")) not in (None, TANH_GELU, "gelu_new"):
        yield f"hidden_activation={shown(other)} (only {TANH_GELU} is supported)"
    if (tied := described["tie_word_embeddings"]) is not True:
        yield f"tie_word_embeddings={shown(tied)} (only tied embeddings are supported)"
    for key in ("attention_bias", "mlp_bias"):
        if described.get(key):
            yield f"{key}={shown(described[key])} (only models without biases are supported)"
    if bidirectional := described.get("use_bidirectional_attention"):
        yield f"use_bidirectional_attention={shown(bidirectional)} (only causal attention is supported)"
    yield from _rope_problems(described)
    if described.get("quantization_config"):
        yield "quantization_config (only unquantized weights are supported)"
    wrong = list(_field_problems(values))
    yield from wrong or _shape_problems(described, values)


def shown(value: Any) -> str:
    """Return a value of a foreign file, or a text about it, for a message: one line of limited length."""
    text = " ".join(format_value(value).split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _field_problems(values: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each number that a ModelConfig cannot have."""
    for field in dataclasses.fields(ModelConfig):
        if field.type not in (int, float):
            continue
        value, limits = values[field.name], field.metadata["limits"]
        if field.name == "vocab_size":  # of the folder, whose rows are reordered to at most MAX_VOCABULARY
            limits = Limits(at_least=1, at_most=MAX_EMBEDDING_ROWS)
        is_number = type(value) in (int, field.type) and abs(value) <= sys.float_info.max  # not so of NaN
        if not is_number or not limits.allow(value):
            kind = "an integer" if field.type is int else "a number"
            yield f"{field.name}={shown(value)} (must be {kind}, {limits.text()})"


def _rope_problems(described: dict[str, Any]) -> Iterator[str]:
    rope = _rope(described)
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
        yield f"rope_scaling of type {shown(rope_type)} (only RoPE without scaling is supported)"
    if parts := [key for key, value in rope.items() if isinstance(value, dict)]:
        yield f"rope_parameters of {', '.join(map(shown, parts))} (only one RoPE for all layers is supported)"
    if (part := rope.get("partial_rotary_factor", described.get("partial_rotary_factor"))) not in (None, 1, 1.0):
        yield f"partial_rotary_factor={shown(part)} (only 1 is supported)"


def _shape_problems(described: dict[str, Any], values: dict[str, Any]) -> Iterator[str]:
    size, heads, shared = (values[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim, positions = described["head_dim"], values["max_position_embeddings"]
    if size % heads or size // heads % 2:
        yield f"hidden_size={size}, num_attention_heads={heads} (the quotient must be an even integer)"
    elif head_dim is not None and head_dim != size // heads:
        yield f"head_dim={shown(head_dim)} (must be hidden_size / num_attention_heads, {size // heads})"
    elif positions * (size // heads) > MAX_ROTARY_VALUES:
        yield f"max_position_embeddings={format_value(positions)} (too many for heads of {size // heads})"
    if heads % shared:
        yield f"num_key_value_heads={shared} (must divide num_attention_heads, {heads})"


def _ends_with_im_end(about_tokenizer: dict[str, Any]) -> bool:
    """Return True if the end-of-sequence token is `<im_end>`, by either name."""
    return token_name(about_tokenizer, "eos_token") in ("<im_end>", *OTHER_NAMES["<im_end>"])


def read_tokenizer(folder: Path, embedding_rows: int) -> tuple[Tokenizer, tuple[int | None, ...] | None, list[str]]:
    """Return tokenizer, row_of_id and notes of an `HFModelSpec`."""
    path = folder / TOKENIZER
    described = read_json(path)
    row_of_id: tuple[int | None, ...] | None = None
    notes: list[str] = []
    try:
        try:
            tokenizer = Tokenizer.from_json(json.dumps(described).encode())
        except NotUsableError:
            reordered, row_of_id, notes = _reordered(described)
            tokenizer = Tokenizer.from_json(json.dumps(reordered).encode())
    except TokenizerError as error:
        raise UserError(f"{path}: unsupported tokenizer: {shown(str(error))}") from error
    if row_of_id is None and embedding_rows > MAX_VOCABULARY:
        row_of_id = tuple(range(tokenizer.vocab_size))
        unused = embedding_rows - len(row_of_id)
        notes = [
            f"The last {number_of(unused, 'row')} of the embedding are dropped: the vocabulary has "
            f"{number_of(len(row_of_id), 'entry')}"
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
        id_of = words | extra
    except (KeyError, TypeError, AttributeError) as error:
        raise NotUsableError("it holds no BPE with a vocabulary") from error
    if not all(type(token) is int and token >= 0 for token in id_of.values()):
        raise NotUsableError("its ids are not all whole numbers from 0 on")
    if len(set(id_of.values())) < len(id_of):
        raise NotUsableError("two of its entries have the same id")
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
        yield f"Added tokens are dropped: {shown(', '.join(sorted(dropped)))}"
