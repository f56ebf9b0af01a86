"""Models as Hugging Face's transformers has them: a folder's weights in, and a model out as such a folder."""

import dataclasses
import json
from itertools import islice
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cucafera.config import SamplingConfig, UserError
from cucafera.data.chat import STOP_IDS, render, tokenizer_description
from cucafera.data.files import write_text, written_whole
from cucafera.data.tokenizer import DOCUMENT_START_ID, IM_END_ID, PAD_ID, Tokenizer
from cucafera.interop.layout import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, Layout
from cucafera.interop.real_text import conversations, documents, sample_ids
from cucafera.model.transformer import Decoder

log = getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CLOSE = 1e-5
"""Difference of two logits of the same weights in fp32 that needs no explanation."""
ROUNDINGS = 4
"""Larger ones may be so many times what separates fp32 from double precision here: the order of sums differs. At random
weights of the 245M model that is up to 1e-4, where the exact GELU in place of the other changes logits by 1e-3."""
TEXTS, TOKENS = 4, 256
"""Documents, or conversations, that an export is compared on, and how much of each."""


class DifferentError(UserError):
    """What was written does not compute what the source does."""


def load_weights(layout: Layout) -> dict[str, Tensor]:
    """The weights of a folder in fp32, by the names of LlamaForCausalLM, with the rows of the embedding by our ids.

    Raises:
        UserError: a file is missing or damaged, or tensors are not those of the shape that config.json gives.
    """
    weights = _read_tensors(layout.folder)
    _refuse_other_tensors(layout, weights)
    if layout.rows is not None:
        weights[EMBEDDING] = _rearranged(weights[EMBEDDING], layout.rows)
    return weights


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError("to read model.safetensors, install safetensors: pip install '.[hf]'") from error
    weights = {}
    for path in _weight_files(folder):
        try:
            weights.update(load_file(path))
        except FileNotFoundError as error:
            raise UserError(f"{path} is not there") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or cut short: {error}. Fetch it again") from error
    return {name: tensor.float() for name, tensor in weights.items()}


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            others = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
            beside = f", only {others}, whose format can run code: convert it with transformers" if others else ""
            raise UserError(f"{folder} holds no {WEIGHTS}{beside}")
        return [folder / WEIGHTS]
    try:
        names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        if not all(Path(name).name == name for name in names):
            raise ValueError("it names a file outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} cannot be used: {error}") from error
    return [folder / name for name in sorted(names)]


def _refuse_other_tensors(layout: Layout, weights: dict[str, Tensor]) -> None:
    """Removes a head that repeats the embedding; raises UserError for anything else that does not fit."""
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(layout.model, vocab_size=layout.rows_there))
    wanted = {f"model.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    head = weights.pop(HEAD, None)
    for name in [name for name in weights if name.endswith("rotary_emb.inv_freq")]:
        del weights[name]  # transformers once saved it; it follows from the shape
    problems = [f"{name} is missing" for name in wanted.keys() - weights.keys()]
    problems += [f"{name} has no place in this model" for name in weights.keys() - wanted.keys()]
    problems += [
        f"{name} has the shape {tuple(weights[name].shape)}, and by {CONFIG} it must be {shape}"
        for name, shape in wanted.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if head is not None and not problems and not torch.equal(head, weights[EMBEDDING]):
        problems = [f"{HEAD} is not the embedding, and here they are one"]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"the weights in {layout.folder} do not fit: {min(problems)}{more}")


def _rearranged(embedding: Tensor, rows: tuple[int | None, ...]) -> Tensor:
    """An embedding [V there, D] with a row for each id here, [len(rows), D]; None takes the mean of all."""
    mean = embedding.mean(0)
    known = torch.tensor([0 if row is None else row for row in rows])
    unknown = torch.tensor([row is None for row in rows])
    return torch.where(unknown[:, None], mean, embedding[known])


def write_folder(
    model: Decoder, tokenizer: Tokenizer, chats: bool, sampling: SamplingConfig, dtype: str, folder: Path
) -> str:
    """Writes what transformers needs into a folder that exists, reads it back with transformers, and compares.

    Args:
        model: In fp32 on the CPU.
        tokenizer: Its tokenizer.
        chats: Whether it was trained on conversations; decides what begins and what ends a text.
        sampling: What generation_config.json recommends.
        dtype: Of the weights, one of DTYPES.
        folder: Where.

    Returns:
        How near they are, as a sentence.

    Raises:
        UserError: transformers is not installed; DifferentError: it does not compute the same from these files.
        OSError: the folder cannot be written.
    """
    _require_transformers()
    from safetensors.torch import save

    weights = {f"model.{name}": value.to(DTYPES[dtype]).contiguous() for name, value in model.state_dict().items()}
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise UserError(f"a weight is too large for {dtype}: choose --type bf16 or fp32")
    log.info("Writing %s of weights", f"{sum(value.nbytes for value in weights.values()) / 1e6:,.1f} MB")
    with written_whole(folder / WEIGHTS) as file:
        file.write(save(weights, metadata={"format": "pt"}))
    as_read = {name.removeprefix("model."): value.float() for name, value in weights.items()}
    rounded = Decoder.holding(model.config, as_read)
    write_text(folder / CONFIG, _as_json(_model_description(model, chats, dtype)))
    write_text(folder / GENERATION_CONFIG, _as_json(_generation_description(sampling, chats)))
    tokenizer.save(folder / TOKENIZER, begins_documents=not chats)
    write_text(
        folder / TOKENIZER_CONFIG, _as_json(tokenizer_description(_end_id(chats), model.config.max_position_embeddings))
    )
    return _compared(model, rounded, tokenizer, chats, folder)


def _end_id(chats: bool) -> int:
    return IM_END_ID if chats else DOCUMENT_START_ID


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _model_description(model: Decoder, chats: bool, dtype: str) -> dict[str, Any]:
    """config.json, in the fields of transformers 4 and 5."""
    config = dataclasses.asdict(model.config)
    del config["base_hidden_size"]  # it is in the weights
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


def _generation_description(sampling: SamplingConfig, chats: bool) -> dict[str, Any]:
    """generation_config.json.

    The repetition penalty of transformers counts control tokens too, and each turn of a conversation holds the stop
    token: with 1.2, answers become several times as long. So a model that chats has none there.
    """
    drawn = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }
    return {
        "bos_token_id": DOCUMENT_START_ID,
        "eos_token_id": list(STOP_IDS) if chats else DOCUMENT_START_ID,
        "pad_token_id": PAD_ID,
        **(drawn if sampling.temperature else {"do_sample": False}),
        **({"min_p": sampling.min_p} if sampling.temperature and sampling.min_p else {}),
        "repetition_penalty": 1.0 if chats else sampling.repetition_penalty,
        "max_new_tokens": sampling.max_new_tokens,
    }


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError("an export is compared with what transformers computes: pip install '.[hf]'") from error


def _compared(model: Decoder, rounded: Decoder, tokenizer: Tokenizer, chats: bool, folder: Path) -> str:
    """Compares tokenizer and logits of a written folder with the source, on real text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    log.info("Comparing them with what transformers computes")
    logging.set_verbosity_error()  # texts are longer than the context until they are cut
    logging.disable_progress_bar()
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    _refuse_other_ids(tokenizer, their_tokenizer, chats)
    largest = lost = 0.0
    texts = [torch.tensor([ids]) for ids in sample_ids(tokenizer, chats, min(TOKENS, len(model.cos)), TEXTS)]
    with torch.inference_mode():
        computed = [(model.logits(model(ids)), rounded.logits(rounded(ids)), theirs(ids).logits) for ids in texts]
        del theirs  # a large model stands here often enough
        rounded.double()
        exact = [rounded.logits(rounded(ids)) for ids in texts]
    for (source, expected, found), reference in zip(computed, exact, strict=True):
        allowed = max(CLOSE, ROUNDINGS * (expected - reference).abs().max().item())
        difference = (found - expected).abs().max().item()
        if not difference <= allowed:
            raise DifferentError(
                f"transformers computes other logits from what was written: up to {difference:.1e} apart, where "
                f"rounding explains {allowed:.1e}. Nothing is kept"
            )
        largest = max(largest, difference)
        lost = max(lost, (source - expected).abs().max().item())
    told = f"Logits of transformers on {TEXTS} real texts: at most {largest:.1e} from those of the same weights here"
    return told if lost == 0 else f"{told}; rounding the weights changed them by up to {lost:.1e}"


def _refuse_other_ids(tokenizer: Tokenizer, theirs: Any, chats: bool) -> None:
    before = [] if chats else [DOCUMENT_START_ID]
    for text in islice(documents(), TEXTS):
        if theirs(text)["input_ids"] != before + tokenizer.encode(text):
            raise DifferentError(f"transformers gives other token ids to {text[:40]!r}. Nothing is kept")
    for messages in islice(conversations(), TEXTS):
        turns = [message._asdict() for message in messages]
        ids = theirs.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        if ids != render([messages], tokenizer)[0].ids.tolist():
            raise DifferentError(f"transformers renders a conversation otherwise: {turns[0]['content'][:40]!r}")
