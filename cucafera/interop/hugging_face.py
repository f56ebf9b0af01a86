"""Hugging Face folders: read their weights, and write a model as one, verified with transformers."""

import contextlib
import dataclasses
import json
from itertools import islice
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID, PAD_ID
from cucafera.data.chatml import STOP_IDS, render, tokenizer_description
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop.hf_spec import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    HFModelSpec,
    read_json,
    shown,
)
from cucafera.interop.real_text import conversations, documents, sample_ids
from cucafera.model.transformer import Decoder
from cucafera.storage import atomic_write, write_text

log = getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

READABLE_DTYPES = ("F64", "F32", "F16", "BF16")
"""Of tensors in a file; quantized ones have a scale elsewhere."""

LOGIT_TOLERANCE = 1e-5
"""Difference of two fp32 logits of the same weights that is always accepted."""
ROUNDING_FACTOR = 4
"""Larger differences may be this many times the difference between our fp32 and fp64 logits, because the order of sums
differs. With random weights of the 245M model that is up to 1e-4; the exact GELU instead of the tanh approximation
changes logits by 1e-3."""
VERIFIED_TEXTS, VERIFIED_TOKENS = 4, 256
"""Number of documents, or conversations, that an export is compared on, and the tokens of each."""


class ExportMismatchError(UserError):
    """The written files do not compute the same as the source."""


def load_weights(spec: HFModelSpec) -> dict[str, Tensor]:
    """Return the weights of a folder in fp32, by the names of LlamaForCausalLM, with embedding rows by our token ids.

    Raises:
        UserError: a file is missing or damaged, or the tensors do not fit the shape in config.json.
    """
    weights = _read_tensors(spec)
    if spec.row_of_id is not None:
        weights[EMBEDDING] = _reorder_rows(weights[EMBEDDING], spec.row_of_id)
    return weights


def _read_tensors(spec: HFModelSpec) -> dict[str, Tensor]:
    """Read the weights, after names, shapes and dtypes in the headers of all files were compared with the shape."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError("reading model.safetensors needs safetensors: pip install '.[hf]'") from error
    weights: dict[str, Tensor] = {}
    owner: dict[str, tuple[Path, Any]] = {}
    described: dict[str, tuple[tuple[int, ...], str]] = {}
    with contextlib.ExitStack() as opened:
        for path in _weight_files(spec.folder):
            try:
                if path.exists() and not path.is_file():
                    raise UserError(f"{shown(str(path))} is not a regular file")
                file = opened.enter_context(safe_open(path, framework="pt"))
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            except FileNotFoundError as error:
                raise UserError(f"{path} does not exist") from error
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(
                    f"{shown(str(path))} is damaged or truncated: {shown(str(error))}. Download it again"
                ) from error
            if twice := sorted(parts.keys() & owner.keys()):
                raise UserError(f"{path} holds {shown(twice[0])}, which another file of the folder holds too")
            owner |= dict.fromkeys(parts, (path, file))
            described |= {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        for name in _checked_names(spec, described):
            path, file = owner[name]
            try:
                weights[name] = file.get_tensor(name).float()
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path} is damaged or truncated: {shown(str(error))}. Download it again") from error
            if not weights[name].isfinite().all():
                raise UserError(f"{path}: {name} holds values that are not finite")
    head = weights.pop(HEAD, None)
    if head is not None and not torch.equal(head, weights[EMBEDDING]):
        raise _misfit(spec, [f"{HEAD} differs from the embedding (only tied embeddings are supported)"])
    return weights


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            others = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
            advice = f", only {others}, whose format can run code: convert it with transformers" if others else ""
            raise UserError(f"{folder} holds no {WEIGHTS}{advice}")
        return [folder / WEIGHTS]
    try:
        names = set(read_json(folder / INDEX)["weight_map"].values())
        if not names:
            raise ValueError("it names no file")
        if not all(Path(name).name == name for name in names):
            raise ValueError("it names a file outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} cannot be used: {shown(str(error))}") from error
    return [folder / name for name in sorted(names)]


def _checked_names(spec: HFModelSpec, described: dict[str, tuple[tuple[int, ...], str]]) -> list[str]:
    """Return the names of the tensors to read: those of the model, and a head, if there is one.

    Args:
        spec: The model.
        described: Shape and dtype of each tensor of the folder.

    Raises:
        UserError: the tensors do not fit the shape in config.json.
    """
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(spec.model, vocab_size=spec.embedding_rows))
    expected = {f"model.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if HEAD in described:
        expected[HEAD] = expected[EMBEDDING]
    # Old versions of transformers saved inv_freq, which is derived from the shape.
    found = {name: value for name, value in described.items() if not name.endswith("rotary_emb.inv_freq")}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        shape, dtype = found[name]
        if shape != expected[name]:
            problems.append(f"{name} has shape {shape}, but {CONFIG} requires {expected[name]}")
        elif dtype not in READABLE_DTYPES:
            problems.append(f"{name} has the dtype {dtype} (supported are {', '.join(READABLE_DTYPES)})")
    if problems:
        raise _misfit(spec, problems)
    return list(expected)


def _misfit(spec: HFModelSpec, problems: list[str]) -> UserError:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return UserError(f"the weights in {spec.folder} do not fit: {shown(min(problems))}{more}")


def _reorder_rows(embedding: Tensor, row_of_id: tuple[int | None, ...]) -> Tensor:
    """Return the row of each token id, [len(row_of_id), D], of an embedding [V, D]; for None the mean of all rows."""
    mean = embedding.mean(0)
    known = torch.tensor([0 if row is None else row for row in row_of_id])
    unknown = torch.tensor([row is None for row in row_of_id])
    return torch.where(unknown[:, None], mean, embedding[known])


def write_folder(
    model: Decoder, tokenizer: Tokenizer, chats: bool, sampling: SamplingConfig, dtype: str, folder: Path
) -> str:
    """Write the files of transformers into an existing folder, load it with transformers, and compare the logits.

    Args:
        model: In fp32 on the CPU.
        tokenizer: Its tokenizer.
        chats: True if it was trained on conversations; decides the bos and eos tokens.
        sampling: Recommended in generation_config.json.
        dtype: Of the weights, a key of DTYPES.
        folder: An existing folder.

    Returns:
        A sentence about the largest difference of logits.

    Raises:
        ExportMismatchError: transformers computes something else from these files.
        UserError: transformers is not installed, or the weights overflow the dtype.
        OSError: the folder cannot be written.
    """
    require_transformers()
    from safetensors.torch import save

    weights = {f"model.{name}": value.to(DTYPES[dtype]).contiguous() for name, value in model.state_dict().items()}
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise UserError(f"a weight is too large for {dtype}: choose --type bf16 or fp32")
    log.info("Writing %s of weights", f"{sum(value.nbytes for value in weights.values()) / 1e6:,.1f} MB")
    with atomic_write(folder / WEIGHTS) as file:
        file.write(save(weights, metadata={"format": "pt"}))
    as_read = {name.removeprefix("model."): value.float() for name, value in weights.items()}
    rounded = Decoder.from_weights(model.config, as_read)
    write_text(folder / CONFIG, _as_json(_model_config(model, chats, dtype)))
    write_text(folder / GENERATION_CONFIG, _as_json(_generation_config(sampling, chats)))
    tokenizer.save(folder / TOKENIZER, begins_documents=not chats)
    write_text(
        folder / TOKENIZER_CONFIG, _as_json(tokenizer_description(_end_id(chats), model.config.max_position_embeddings))
    )
    return _verify(model, rounded, tokenizer, chats, folder)


def _end_id(chats: bool) -> int:
    return IM_END_ID if chats else DOCUMENT_START_ID


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _model_config(model: Decoder, chats: bool, dtype: str) -> dict[str, Any]:
    """Return config.json, with the fields of both transformers 4 and 5."""
    config = dataclasses.asdict(model.config)
    del config["base_hidden_size"]  # muP's base width: only initialization and learning rates depend on it
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config,
        "head_dim": model.config.hidden_size // model.config.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.config.rope_theta},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": DOCUMENT_START_ID,
        "eos_token_id": _end_id(chats),
        "pad_token_id": PAD_ID,
        "use_cache": True,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }


def _generation_config(sampling: SamplingConfig, chats: bool) -> dict[str, Any]:
    """Return generation_config.json.

    The repetition penalty of transformers counts control tokens too, and each turn of a conversation holds the stop
    token: with 1.2, answers become several times as long. So a chat model is exported without a penalty.
    """
    sampled = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }
    return {
        "bos_token_id": DOCUMENT_START_ID,
        "eos_token_id": list(STOP_IDS),  # as the chat and samples of this package stop
        "pad_token_id": PAD_ID,
        **(sampled if sampling.temperature else {"do_sample": False}),
        **({"min_p": sampling.min_p} if sampling.temperature and sampling.min_p else {}),
        "repetition_penalty": 1.0 if chats else sampling.repetition_penalty,
        "max_new_tokens": sampling.max_new_tokens,
    }


def require_transformers() -> None:
    """Raise UserError if transformers is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError("exports are verified with transformers: pip install '.[hf]'") from error


def _verify(model: Decoder, rounded: Decoder, tokenizer: Tokenizer, chats: bool, folder: Path) -> str:
    """Compare token ids and logits of a written folder with those of the source, on real text.

    Args:
        model: The source.
        rounded: A decoder with the written weights; converted to fp64 here.
        tokenizer, chats: Of the source.
        folder: The written folder.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    log.info("Comparing logits with transformers")
    logging.set_verbosity_error()  # it warns of texts longer than the context
    logging.disable_progress_bar()
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    _check_token_ids(tokenizer, their_tokenizer, chats)
    largest = lost = 0.0
    texts = [
        torch.tensor([ids])
        for ids in sample_ids(tokenizer, chats, min(VERIFIED_TOKENS, len(model.cos)), VERIFIED_TEXTS)
    ]
    with torch.inference_mode():
        computed = [(model.logits(model(ids)), rounded.logits(rounded(ids)), theirs(ids).logits) for ids in texts]
        del theirs  # frees the memory that fp64 takes next
        rounded.double()
        exact = [rounded.logits(rounded(ids)) for ids in texts]
    for (source, expected, found), reference in zip(computed, exact, strict=True):
        allowed = max(LOGIT_TOLERANCE, ROUNDING_FACTOR * (expected - reference).abs().max().item())
        difference = (found - expected).abs().max().item()
        if not difference <= allowed:  # true of NaN too
            raise ExportMismatchError(
                f"transformers computes other logits from the written files: they differ by up to {difference:.1e}, "
                f"and rounding explains {allowed:.1e}. Nothing is exported"
            )
        largest = max(largest, difference)
        lost = max(lost, (source - expected).abs().max().item())
    result = f"Verified with transformers on {VERIFIED_TEXTS} texts: logits differ by at most {largest:.1e}"
    return result if lost == 0 else f"{result}; rounding the weights changed them by up to {lost:.1e}"


def _check_token_ids(tokenizer: Tokenizer, theirs: Any, chats: bool) -> None:
    prefix = [] if chats else [DOCUMENT_START_ID]
    for text in islice(documents(), VERIFIED_TEXTS):
        if theirs(text)["input_ids"] != prefix + tokenizer.encode(text):
            raise ExportMismatchError(f"transformers tokenizes {text[:40]!r} differently. Nothing is exported")
    for messages in islice(conversations(), VERIFIED_TEXTS):
        turns = [message._asdict() for message in messages]
        ids = theirs.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        if ids != render([messages], tokenizer)[0].ids.tolist():
            raise ExportMismatchError(
                f"transformers renders {turns[0]['content'][:40]!r} differently. Nothing is exported"
            )
