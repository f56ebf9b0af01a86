"""LoRA adapters in PEFT's form: merged into their base on loading, and written from a run of this package, verified."""

import dataclasses
import importlib.util
import shlex
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop.hf_spec import ADAPTER_CONFIG, HFModelSpec, shown
from cucafera.interop.hugging_face import (
    DTYPES,
    READABLE_DTYPES,
    ExportMismatchError,
    TensorHeaders,
    as_json,
    check_finite,
    check_token_ids,
    compare_logits,
    load_weights,
    read_tensors,
    write_usage_files,
)
from cucafera.interop.peft_spec import AdaptedSpec, adapter_description, linear_layers, read_spec
from cucafera.model.lora import merged_weight, merged_weights
from cucafera.model.transformer import Decoder
from cucafera.storage import atomic_write, write_text

log = getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Stands before the name of a layer in LlamaForCausalLM."""
BASE_NOTE = "The adapter fits its base as a LlamaForCausalLM or a GemmaForCausalLM: their linear layers are the same."
ROUNDED = 2.0**-7
"""Relative error of the coarsest dtype that a base may have been exported in, bf16."""


class TrainedAdapter(NamedTuple):
    """The adapters that a run trained.

    Attributes:
        state_dict: The frozen weights and the adapters, by the names of a LanguageModel's state dict.
        config: Fields of its AdapterConfig.
    """

    state_dict: Mapping[str, Tensor]
    config: Mapping[str, Any]


def load_spec_weights(spec: HFModelSpec) -> dict[str, Tensor]:
    """Return the weights of a folder as `load_weights` does; those of an adapter are merged into its base.

    Raises:
        UserError: a file is missing or damaged, or the tensors do not fit.
    """
    weights = load_weights(spec)
    if not isinstance(spec, AdaptedSpec):
        return weights
    path = spec.adapter / ADAPTER_WEIGHTS
    if not path.exists():
        others = ", ".join(sorted(other.name for other in spec.adapter.glob("*.bin")))
        advice = f", only {others}, whose format can run code: convert it with PEFT" if others else ""
        raise UserError(f"{spec.adapter} holds no {ADAPTER_WEIGHTS}{advice}")
    tensors = read_tensors([path], lambda described: _checked_names(spec, path, weights, described))
    for layer, (_, scale) in spec.layers.items():
        name_a, name_b = _names_of(layer)
        if name_a in tensors:
            name = f"{layer}.weight"
            weights[name] = merged_weight(weights[name], tensors[name_a], tensors[name_b], scale)
            if not weights[name].isfinite().all():
                raise UserError(f"{path}: with the adapter of {layer}, its weights are not finite")
    return weights


def _names_of(layer: str) -> tuple[str, str]:
    """Return the names of the matrices A and B of a layer's adapter."""
    return f"{PREFIX}{layer}.lora_A.weight", f"{PREFIX}{layer}.lora_B.weight"


def _checked_names(spec: AdaptedSpec, path: Path, base: Mapping[str, Tensor], described: TensorHeaders) -> list[str]:
    """Return the names of an adapter's tensors. Raises UserError if they do not fit its description and its base."""
    expected: dict[str, tuple[int, ...]] = {}
    for layer, (rank, _) in spec.layers.items():
        names = _names_of(layer)
        if spec.is_exact or described.keys() & set(names):
            outputs, inputs = base[f"{layer}.weight"].shape
            expected |= zip(names, ((rank, inputs), (outputs, rank)), strict=True)
    problems = [f"{name} is missing" for name in expected.keys() - described.keys()]
    problems += [
        f"{name} is unexpected (only LoRA matrices of linear layers in {ADAPTER_CONFIG} are supported)"
        for name in described.keys() - expected.keys()
    ]
    for name in expected.keys() & described.keys():
        shape, dtype = described[name]
        if shape != expected[name]:
            problems.append(f"{name} has shape {shape}, but {ADAPTER_CONFIG} and the base require {expected[name]}")
        elif dtype not in READABLE_DTYPES:
            problems.append(f"{name} has the dtype {dtype} (supported are {', '.join(READABLE_DTYPES)})")
    if not expected:
        problems.append("it holds no LoRA matrices")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"the tensors in {path} do not fit: {shown(min(problems))}{more}")
    return list(expected)


def write_adapter(
    adapter: TrainedAdapter,
    base: str,
    model: Decoder,
    tokenizer: Tokenizer,
    chats: bool,
    sampling: SamplingConfig,
    dtype: str,
    folder: Path,
) -> str:
    """Write the files of PEFT into an existing folder, read them back, and compare with PEFT where it is installed.

    Args:
        adapter: The adapters.
        base: A Hugging Face folder or name with the weights that the adapters were trained on.
        model: The run's model with its adapters merged, in fp32 on the CPU.
        tokenizer: Its tokenizer.
        chats: True if it was trained on conversations.
        sampling: Recommended in generation_config.json.
        dtype: Of the adapters, a key of DTYPES.
        folder: An existing folder.

    Returns:
        A sentence about the result.

    Raises:
        ExportMismatchError: the files give another model.
        UserError: the base is another model, transformers is not installed, or weights overflow the dtype.
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save

    spec = read_spec(base, with_weights=True)
    base_weights = load_spec_weights(spec)
    _check_base(base, spec, base_weights, adapter, model, tokenizer)
    matrices = {name: value for name, value in adapter.state_dict.items() if ".lora_" in name}
    written = {f"{PREFIX}{name}.weight": value.to(DTYPES[dtype]).contiguous() for name, value in matrices.items()}
    check_finite(written, dtype)
    with atomic_write(folder / ADAPTER_WEIGHTS) as file:
        file.write(save(written, metadata={"format": "pt"}))
    write_text(folder / ADAPTER_CONFIG, as_json(adapter_description(base, adapter.config)))
    write_usage_files(model.config, tokenizer, chats, sampling, folder)
    rounded = {name: value.to(DTYPES[dtype]) for name, value in matrices.items()}
    expected = merged_weights(base_weights | rounded, adapter.config)
    found = load_spec_weights(read_spec(str(folder), with_weights=True))
    if any(not torch.equal(found[name], expected[name]) for name in expected):
        raise ExportMismatchError("the written files, read back, give other weights. Nothing is exported")
    return _verify(model, found, tokenizer, chats, spec.folder, folder)


def _check_base(
    base: str,
    spec: HFModelSpec,
    weights: Mapping[str, Tensor],
    adapter: TrainedAdapter,
    model: Decoder,
    tokenizer: Tokenizer,
) -> None:
    """Raise UserError if a base is not what the adapters were trained on, but for the rounding of its dtype."""
    if isinstance(spec, AdaptedSpec) or spec.row_of_id is not None:
        kind = "an adapter itself" if isinstance(spec, AdaptedSpec) else "with other token ids than the run"
        raise UserError(
            f"{base} is {kind}: export it as a base with python -m cucafera.export {shlex.quote(base)} --to hf FOLDER, "
            "and give --base FOLDER"
        )
    shapeless = {"base_hidden_size": None, "initializer_range": None, "max_position_embeddings": None}
    same = dataclasses.asdict(spec.model) | shapeless == dataclasses.asdict(model.config) | shapeless
    if not same or spec.tokenizer.fingerprint != tokenizer.fingerprint:
        part = "tokenizer" if same else "shape"
        raise UserError(f"{base} is not the base of this adapter: its {part} is another")
    layers = set(linear_layers(model.config))
    for name, value in weights.items():
        frozen = adapter.state_dict[name].float()
        if name.removesuffix(".weight") in layers:  # the same in every form of the base
            is_same = any(torch.equal(value, frozen.to(dtype).float()) for dtype in DTYPES.values())
        else:
            is_same = bool((value - frozen).norm() <= ROUNDED * frozen.norm())
        if not is_same:
            raise UserError(
                f"{base} is not the base of this adapter: its weights are others, such as those of {name}. It must be "
                "made from the checkpoint in the run's init_from"
            )


def _verify(
    model: Decoder, found: dict[str, Tensor], tokenizer: Tokenizer, chats: bool, base: Path, folder: Path
) -> str:
    """Compare token ids and, where PEFT is installed, logits. `found` are the weights that the files give."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_token_ids(tokenizer, AutoTokenizer.from_pretrained(folder), chats)
    by_name = {name.removeprefix("model."): value for name, value in found.items()}
    if importlib.util.find_spec("peft") is None:
        source = model.state_dict()
        largest = max((value - source[name]).abs().max().item() for name, value in by_name.items())
        return "Verified without PEFT, which is not installed: read back and merged into the base, the files give " + (
            f"weights that differ from those of the run by at most {largest:.1e}" if largest else "the run's weights"
        )
    from peft import PeftModel

    log.info("Comparing logits with PEFT")

    def load() -> Any:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)

    return compare_logits("PEFT", model, Decoder.from_weights(model.config, by_name), load, tokenizer, chats)
