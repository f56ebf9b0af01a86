"""Hugging Face folders: read their weights, and write a model as one, verified with transformers."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cucafera.config.errors import UserError
from cucafera.config.schema import ModelConfig, SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID, PAD_ID
from cucafera.data.chatml import STOP_IDS, render, tokenizer_description
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop.gemma import from_transformers_gemma, to_transformers_gemma
from cucafera.interop.hf_spec import (
    ARCHITECTURES,
    CONFIG,
    GENERATION_CONFIG,
    TANH_GELU,
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

TensorHeaders = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of tensors by name, from the headers of their files."""
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
    """Return the weights of a folder in fp32, by the names of LlamaForCausalLM, as our Decoder has them.

    Raises:
        UserError: a file is missing or damaged, or the tensors do not fit the shape in config.json.
    """
    weights = read_tensors(_weight_files(spec.folder), lambda described: _checked_names(spec, described))
    head = weights.pop(HEAD, None)
    if head is not None and not torch.equal(head, weights[EMBEDDING]):
        raise _misfit(spec, [f"{HEAD} differs from the embedding (only tied embeddings are supported)"])
    if spec.architecture == "gemma":
        weights = {name: _from_gemma(name, value, spec.model) for name, value in weights.items()}
    if spec.row_of_id is not None:
        weights[EMBEDDING] = _reorder_rows(weights[EMBEDDING], spec.row_of_id)
    return weights


def read_tensors(paths: Sequence[Path], checked_names: Callable[[TensorHeaders], Sequence[str]]) -> dict[str, Tensor]:
    """Return tensors of safetensors files in fp32, after what the headers of all files say was checked.

    Args:
        paths: The files.
        checked_names: Returns the names of the tensors to read, or raises UserError.

    Raises:
        UserError: a file is missing or damaged, or values are not finite.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError("reading model.safetensors needs safetensors: pip install '.[hf]'") from error
    weights: dict[str, Tensor] = {}
    owner: dict[str, tuple[Path, Any]] = {}
    described: TensorHeaders = {}
    with contextlib.ExitStack() as opened:
        for path in paths:
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
        for name in checked_names(described):
            path, file = owner[name]
            try:
                weights[name] = file.get_tensor(name).float()
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path} is damaged or truncated: {shown(str(error))}. Download it again") from error
            if not weights[name].isfinite().all():
                raise UserError(f"{path}: {name} holds values that are not finite")
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


def _checked_names(spec: HFModelSpec, described: TensorHeaders) -> list[str]:
    """Return the names of the tensors to read: those of the model, and a head, if there is one.

    Args:
        spec: The model.
        described: What the headers say of each tensor of the folder.

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


def architecture_of(model: ModelConfig, requested: str | None) -> str:
    """Return the architecture that a model is written as, a key of ARCHITECTURES.

    A model with the tanh approximation of GELU is written as Gemma, since tools with a Llama of their own have SiLU
    fixed. One with SiLU is a Llama. So is one with the exact GELU, which transformers 5 does not compute for Gemma.

    Args:
        model: The shape.
        requested: The user's choice; None: the default.

    Raises:
        UserError: a Gemma would compute another model.
    """
    if requested == "gemma" and model.hidden_act != TANH_GELU:
        raise UserError(
            f"--architecture gemma: Gemma computes {TANH_GELU}, and the model has model.hidden_act={model.hidden_act}: "
            "leave out --architecture"
        )
    return requested or ("gemma" if model.hidden_act == TANH_GELU else "llama")


def tools_note(model: ModelConfig, architecture: str) -> str:
    """Return sentences about the tools that compute a folder's model, each with a full stop."""
    if architecture == "gemma":
        return (
            f"The model is written as a {ARCHITECTURES['gemma']}. That multiplies embeddings by the root of the hidden "
            "size, so they are divided by it, and its norms are stored minus 1. transformers 4 and 5 and vLLM compute "
            "it; mlx-lm does too, but with the exact GELU instead of its tanh approximation."
        )
    if model.hidden_act == "silu":
        return f"The model is a {ARCHITECTURES['llama']} in all respects, for any tool that computes one."
    advice = ", and --architecture gemma writes a model for them" if model.hidden_act == TANH_GELU else ""
    return (
        f"The model is written as a {ARCHITECTURES['llama']} with hidden_act={model.hidden_act}, which transformers 4 "
        "and 5 compute. vLLM refuses it. Tools whose Llama has SiLU fixed, such as mlx-lm, compute another model"
        f"{advice}."
    )


def write_folder(
    model: Decoder,
    tokenizer: Tokenizer,
    chats: bool,
    sampling: SamplingConfig,
    dtype: str,
    folder: Path,
    architecture: str | None = None,
) -> str:
    """Write the files of transformers into an existing folder, load it with transformers, and compare the logits.

    Args:
        model: In fp32 on the CPU.
        tokenizer: Its tokenizer.
        chats: True if it was trained on conversations; decides the bos and eos tokens.
        sampling: Recommended in generation_config.json.
        dtype: Of the weights, a key of DTYPES.
        folder: An existing folder.
        architecture: A key of ARCHITECTURES; None: see `architecture_of`.

    Returns:
        A sentence about the largest difference of logits.

    Raises:
        ExportMismatchError: transformers computes something else from these files.
        UserError: transformers is not installed, the weights overflow the dtype, or the architecture does not fit.
        OSError: the folder cannot be written.
    """
    require_transformers()
    from safetensors.torch import save

    architecture = architecture_of(model.config, architecture)
    state, size = model.state_dict(), model.config.hidden_size
    if architecture == "gemma":
        state = {name: to_transformers_gemma(name, value, size) for name, value in state.items()}
    weights = {f"model.{name}": value.to(DTYPES[dtype]).contiguous() for name, value in state.items()}
    del state
    check_finite(weights, dtype)
    log.info("Writing %s of weights", f"{sum(value.nbytes for value in weights.values()) / 1e6:,.1f} MB")
    with atomic_write(folder / WEIGHTS) as file:
        file.write(save(weights, metadata={"format": "pt"}))
    as_read = {name: value.float() for name, value in weights.items()}
    if architecture == "gemma":
        as_read = {name: _from_gemma(name, value, model.config) for name, value in as_read.items()}
    rounded = Decoder.from_weights(
        model.config, {name.removeprefix("model."): value for name, value in as_read.items()}
    )
    write_text(folder / CONFIG, as_json(_model_config(model, chats, dtype, architecture)))
    write_usage_files(model.config, tokenizer, chats, sampling, folder)
    return _verify(model, rounded, tokenizer, chats, folder)


def _from_gemma(name: str, value: Tensor, model: ModelConfig) -> Tensor:
    """Return a weight of a GemmaForCausalLM, by its name there, as our Decoder has it."""
    return from_transformers_gemma(name.removeprefix("model."), value, model.hidden_size)


def check_finite(weights: Mapping[str, Tensor], dtype: str) -> None:
    """Raise UserError if a weight overflowed the dtype."""
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise UserError(f"a weight is too large for {dtype}: choose --type bf16 or fp32")


def write_usage_files(
    model: ModelConfig, tokenizer: Tokenizer, chats: bool, sampling: SamplingConfig, folder: Path
) -> None:
    """Write generation_config.json and the tokenizer's files; the arguments are those of `write_folder`."""
    write_text(folder / GENERATION_CONFIG, as_json(generation_config(sampling, chats)))
    tokenizer.save(folder / TOKENIZER, begins_documents=not chats)
    description = tokenizer_description(_end_id(chats), model.max_position_embeddings)
    write_text(folder / TOKENIZER_CONFIG, as_json(description))


def _end_id(chats: bool) -> int:
    return IM_END_ID if chats else DOCUMENT_START_ID


def as_json(content: dict[str, Any]) -> str:
    """Return the text of a description file."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _model_config(model: Decoder, chats: bool, dtype: str, architecture: str) -> dict[str, Any]:
    """Return config.json, with the fields of both transformers 4 and 5."""
    config = dataclasses.asdict(model.config)
    del config["base_hidden_size"]  # muP's base width: only initialization and learning rates depend on it
    # vLLM reads hidden_activation of a Gemma, and transformers hidden_act.
    own = {"hidden_activation": config["hidden_act"]} if architecture == "gemma" else {"mlp_bias": False}
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        **config,
        **own,
        "head_dim": model.config.hidden_size // model.config.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.config.rope_theta},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": DOCUMENT_START_ID,
        "eos_token_id": _end_id(chats),
        "pad_token_id": PAD_ID,
        "use_cache": True,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }


def generation_config(sampling: SamplingConfig, chats: bool) -> dict[str, Any]:
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
    check_token_ids(tokenizer, AutoTokenizer.from_pretrained(folder), chats)
    load = functools.partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32)
    return compare_logits("transformers", model, rounded, load, tokenizer, chats)


def compare_logits(
    program: str, model: Decoder, rounded: Decoder, load: Callable[[], Any], tokenizer: Tokenizer, chats: bool
) -> str:
    """Compare logits of a written folder with those of the source, on real text; returns a sentence about them.

    Args:
        program: The package that computes the folder's.
        model: The source.
        rounded: A decoder with the written weights; converted to fp64 here.
        load: Loads the folder with that package, in fp32.
        tokenizer, chats: Of the source.

    Raises:
        ExportMismatchError: they differ by more than rounding.
    """
    theirs = load()
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
                f"{program} computes other logits from the written files: they differ by up to {difference:.1e}, "
                f"and rounding explains {allowed:.1e}. Nothing is exported"
            )
        largest = max(largest, difference)
        lost = max(lost, (source - expected).abs().max().item())
    result = f"Verified with {program} on {VERIFIED_TEXTS} texts: logits differ by at most {largest:.1e}"
    return result if lost == 0 else f"{result}; rounding the weights changed them by up to {lost:.1e}"


def check_token_ids(tokenizer: Tokenizer, theirs: Any, chats: bool) -> None:
    """Raise ExportMismatchError if a tokenizer of transformers has other token ids for real text."""
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
