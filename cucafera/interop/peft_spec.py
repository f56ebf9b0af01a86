"""The description of a LoRA adapter in PEFT's form: the base that it belongs to, and the linear layers that it changes.

A folder with such an adapter behaves like a Hugging Face folder with the base's weights and the adapter merged into
them. What else PEFT can train or do is refused by the name of its field. Nothing here imports torch.
"""

import dataclasses
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from cucafera.config.errors import UserError
from cucafera.config.schema import ADAPTED_MODULES, ModelConfig
from cucafera.interop.hf_spec import (
    ADAPTER_CONFIG,
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    HFModelSpec,
    folder_of,
    read_chat_form,
    read_hf_spec,
    read_json,
    read_tokenizer,
    shown,
)
from cucafera.runs.locate import HUB_NAME

BASE = "base_model_name_or_path"
LORA_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "bias": "none", "init_lora_weights": True}
"""Default values of PEFT for fields of LoraConfig that adapter_config.json omits."""
USED_FIELDS = {
    BASE, "revision", "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights",
}  # fmt: skip
FIELDS_WITHOUT_EFFECT = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "runtime_config", "task_type",
}  # fmt: skip
"""Of LoraConfig: they concern training, or nothing without another field."""
NEUTRAL_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights with which PEFT leaves the base's weights as they are."""
MAX_PATTERN_LENGTH = 1000
QUANTIFIERS = re.compile(r"[*+?{]")


class LayerAdapter(NamedTuple):
    """The adapter of one linear layer: its weight becomes W + scale * B A, with A [rank, inputs], B [outputs, rank]."""

    rank: int
    scale: float


@dataclasses.dataclass(frozen=True)
class AdaptedSpec(HFModelSpec):
    """A base, and an adapter of it. The fields of HFModelSpec are those of the base, but for `chats` and `notes`.

    Attributes:
        adapter: The folder of the adapter.
        layers: The adapter that each linear layer has, or could have, by the layer's name in LlamaForCausalLM.
        is_exact: True if every one of `layers` has one; False if the tensors in the file decide.
    """

    adapter: Path = dataclasses.field(kw_only=True)
    layers: Mapping[str, LayerAdapter] = dataclasses.field(kw_only=True)
    is_exact: bool = dataclasses.field(kw_only=True)


def read_spec(source: str, with_weights: bool) -> HFModelSpec:
    """Return the content of a Hugging Face folder or name, of a model or of an adapter; the latter's base is read too.

    Args:
        source: The folder, or the name.
        with_weights: Download the weights too, of a name of the hub.

    Raises:
        UserError: a file is missing or damaged, or the model or the adapter is not supported.
    """
    folder = folder_of(source, with_weights)
    if not (folder / ADAPTER_CONFIG).exists():
        return read_hf_spec(folder)
    path = folder / ADAPTER_CONFIG
    described = LORA_DEFAULTS | read_json(path)
    if problems := list(_problems(described)):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{path}: unsupported adapter: {problems[0]}{more}")
    base = read_hf_spec(_base_folder(path, described, with_weights))
    layers, is_exact = _layers(path, described, base.model)
    chats = _chats(folder, base)
    notes = (*base.notes, f"The adapter of {folder} is merged into its base, {base.folder}")
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return AdaptedSpec(**fields | {"chats": chats, "notes": notes}, adapter=folder, layers=layers, is_exact=is_exact)


def adapter_description(base: str, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json, with the fields that all versions of PEFT know.

    Args:
        base: The base, a folder or a name of the hub, with its revision.
        adapter: Fields of the AdapterConfig used in training.
    """
    name = None if Path(base).is_dir() else HUB_NAME.fullmatch(base)
    alpha = float(adapter["alpha"])
    return {
        "auto_mapping": None,
        BASE: name["repository"] if name else base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # an integer in LoraConfig
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter["rank"],
        "revision": name["revision"] if name else None,
        "target_modules": sorted(adapter["modules"]),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def _problems(described: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each field of adapter_config.json with an unsupported value."""
    if (kind := described.get("peft_type")) != "LORA":
        yield f"peft_type={shown(kind)} (only LORA is supported)"
        return  # other kinds have other fields
    for key in sorted(described.keys() - USED_FIELDS - FIELDS_WITHOUT_EFFECT):
        if described[key]:
            yield f"{shown(key)}={shown(described[key])} (only LoRA matrices of linear layers are supported)"
    if described["bias"] != "none":
        yield f"bias={shown(described['bias'])} (only none is supported: the model has no biases)"
    if (start := described["init_lora_weights"]) is not None and start not in NEUTRAL_INITS:
        yield (
            f"init_lora_weights={shown(start)} (it changes the base: save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion)"
        )
    if not _is_rank(described["r"]):
        yield f"r={shown(described['r'])} (must be an integer, at least 1)"
    if not _is_alpha(described["lora_alpha"]):
        yield f"lora_alpha={shown(described['lora_alpha'])} (must be a finite number)"
    if described.get("use_rslora") not in (None, True, False):
        yield f"use_rslora={shown(described['use_rslora'])} (must be true or false)"
    for key, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        yield from _pattern_problems(key, described.get(key), is_valid)
    targets = described.get("target_modules")
    if not (targets is None or isinstance(targets, str) or _is_names(targets)):
        yield f"target_modules={shown(targets)} (must be a list of names of layers)"
    embeddings = {"embed_tokens", "lm_head"}
    names = {name.rpartition(".")[2] for name in targets} if _is_names(targets) else set()
    if found := sorted(names & embeddings):
        yield f"target_modules has {found[0]} (supported are the linear layers {', '.join(ADAPTED_MODULES)})"


def _pattern_problems(key: str, patterns: object, is_valid: Callable[[object], bool]) -> Iterator[str]:
    if patterns is None:
        return
    if not isinstance(patterns, dict) or not all(map(is_valid, patterns.values())):
        yield f"{key}={shown(patterns)} (must hold a number for each pattern)"
        return
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{key} has {shown(pattern)}, which is no regular expression ({shown(str(error))})"
            return
        # Several quantifiers can take longer than the age of the universe to match.
        if len(pattern) > MAX_PATTERN_LENGTH or len(QUANTIFIERS.findall(pattern)) > 1:
            yield f"{key} has {shown(pattern)}, a regular expression that is too complex: name each layer by itself"
            return


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # type: ignore[arg-type]  # false for NaN


def _is_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _base_folder(path: Path, described: Mapping[str, Any], with_weights: bool) -> Path:
    """Return the folder of the base; it is downloaded if there is no such folder.

    A relative path is that from the current folder, as for PEFT, or else from the adapter's folder or one above it.
    """
    base, revision = described.get(BASE), described.get("revision")
    if not isinstance(base, str) or not base.strip():
        raise UserError(f"{path} names no base in {BASE}: write the path of its folder, or its name on the hub, there")
    for folder in (Path(base), *(above / base for above in path.resolve().parents)):
        try:
            is_model, is_run = (folder / CONFIG).is_file(), (folder / "checkpoints").is_dir()
        except (OSError, ValueError):  # a name that is too long
            continue
        if is_model:
            return folder
        if is_run:
            raise UserError(
                f"{path}: {BASE}={shown(base)} is a run, which PEFT cannot read: python -m cucafera.export "
                f"{shlex.quote(str(folder))} --to hf {shlex.quote(str(folder / 'hf'))}, and write {folder / 'hf'} there"
            )
    name = base if revision is None else f"{base}@{revision}"
    if Path(base).is_absolute() or not HUB_NAME.fullmatch(name) or Path(base).parent.is_dir():
        raise UserError(
            f"{path}: {BASE}={shown(base)} is no folder with a {CONFIG}: write the path of the base's folder, or its "
            "name on the hub, there"
        )
    return folder_of(name, with_weights)


def _chats(folder: Path, base: HFModelSpec) -> bool:
    """Return `chats` of the adapter: its tokenizer, if it has one of its own, says so.

    Raises:
        UserError: the tokenizer has other token ids than that of the base.
    """
    if (folder / TOKENIZER).exists():
        tokenizer, row_of_id, _ = read_tokenizer(folder, base.embedding_rows)
        if (tokenizer.fingerprint, row_of_id) != (base.tokenizer.fingerprint, base.row_of_id):
            raise UserError(
                f"{folder / TOKENIZER} has other tokens than the base in {base.folder}: adapters that added tokens are "
                "not supported"
            )
    return read_chat_form(folder)[0] if (folder / TOKENIZER_CONFIG).exists() else base.chats


def _layers(path: Path, described: Mapping[str, Any], model: ModelConfig) -> tuple[dict[str, LayerAdapter], bool]:
    """Return `layers` and `is_exact` of an `AdaptedSpec`."""
    adapters = {name: _layer_adapter(name, described) for name in linear_layers(model)}
    targets, excluded = described.get("target_modules"), described.get("exclude_modules") or []
    numbers = described.get("layers_to_transform")
    numbers = [numbers] if isinstance(numbers, int) else numbers or None
    if targets == "all-linear":
        targets = list(ADAPTED_MODULES)
    is_plain = described.get("layers_pattern") in (None, [], "layers") and isinstance(numbers, list | None)
    if not (is_plain and _is_names(targets) and _is_names(excluded)):
        return adapters, False
    chosen = {
        name: adapter
        for name, adapter in adapters.items()
        if _names(targets, name)
        and not _names(excluded, name)
        and (numbers is None or int(name.split(".")[2]) in numbers)
    }
    if not chosen:
        raise UserError(
            f"{path}: unsupported adapter: target_modules={shown(targets)} (none of the base's linear layers "
            f"{', '.join(ADAPTED_MODULES)})"
        )
    return chosen, True


def _names(names: list[str], layer: str) -> bool:
    """True if a list of names of PEFT has a layer, by its whole name or by the end of it."""
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def linear_layers(model: ModelConfig) -> Iterator[str]:
    """Yield the names of the layers that may have adapters, as in LlamaForCausalLM."""
    for number in range(model.num_hidden_layers):
        for name in ADAPTED_MODULES:
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            yield f"model.layers.{number}.{part}.{name}"


def _layer_adapter(name: str, described: Mapping[str, Any]) -> LayerAdapter:
    rank: int = _of_pattern(described.get("rank_pattern"), name, described["r"])
    alpha: float = _of_pattern(described.get("alpha_pattern"), name, described["lora_alpha"])
    # Rank-stabilized LoRA: Kalajdzievski, 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA.
    return LayerAdapter(rank, alpha / (math.sqrt(rank) if described.get("use_rslora") else rank))


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a layer, as PEFT does."""
    matching = (key for key in patterns or () if re.match(rf"(.*\.)?({key})$", name))
    return next((patterns[key] for key in matching if patterns), default)
