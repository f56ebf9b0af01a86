"""The model card of an exported model: the README.md of its folder, written from what the run left behind."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_dump

from cucafera.config import ModelConfig, UserError
from cucafera.interop.trained import TrainedModel
from cucafera.model.flops import parameter_count
from cucafera.training.report import as_quoted_samples, validation_table
from cucafera.training.run_folder import RunFolder

CURVES = "curves.png"
PLACES = ("text", "choices")
"""Settings of an evaluation that say where a file lay, which is nobody's business."""

LIMITS = """\
- It is small: it makes facts up, and loses the thread of a long text.
- It knows the language and the views of the texts that it was trained on, with their errors and prejudices.
- Nothing was done to make it safe. Do not let it decide anything about people."""


@dataclasses.dataclass(frozen=True)
class Past:
    """What is known of how a model came to be.

    Attributes:
        config: The configuration of its run, as nested dictionaries.
        metrics: Its metrics.json; None if it has not come to its end.
        evaluation: The results in its evaluation.json.
        before: What it began with, and that one's past, as far as its folder is still there.
    """

    config: dict[str, Any]
    metrics: dict[str, Any] | None
    evaluation: list[dict[str, Any]]
    before: "tuple[str, Past | None] | None"


def read_past(folder: RunFolder) -> Past:
    """The past of a run, back to where it began.

    Raises:
        UserError: its configuration or evaluation cannot be read.
    """
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder.config), resolve=False)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{folder.config} cannot be read: {error}") from error
    begun_with = config.get("init_from")
    before = None
    if begun_with:
        path = Path(begun_with).expanduser()
        earlier = RunFolder(path.parent.parent if path.is_file() else path)
        is_there = earlier.config.is_file() and earlier.path.resolve() != folder.path.resolve()
        before = (str(begun_with), read_past(earlier) if is_there else None)
    return Past(config, folder.read_metrics(), _evaluation(folder.evaluation), before)


def _evaluation(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        results: list[dict[str, Any]] = json.loads(path.read_bytes())["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return results


def model_card(
    trained: TrainedModel, past: Past | None, name: str, licence: str | None, proof: str, has_curves: bool
) -> str:
    """The README.md.

    Args:
        trained: The model.
        past: Its past, with what was measured of any checkpoint; None for a model that was not trained here.
        name: What to call it.
        licence: Identifier of the hub, such as apache-2.0; None: nobody has said.
        proof: How the files were compared with the source.
        has_curves: Whether CURVES lies beside it.
    """
    if past is not None:
        of_checkpoint = [result for result in past.evaluation if result["checkpoint"] == trained.checkpoint.name]
        past = dataclasses.replace(past, evaluation=of_checkpoint)
    sections = [_what_it_is(trained, past, name), _use(trained.chats)]
    if past is not None:
        sections += [_data(past), _recipe(past), _curves(past, has_curves), _evaluation_section(past)]
        sections += [_samples(past)] if past.metrics and past.metrics["samples"] else []
    sections += [f"## Limits\n\n{LIMITS}", f"## Files\n\n{proof}.", _licence(licence)]
    front = safe_dump(_front_matter(past, name, licence), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(past: Past | None, name: str, licence: str | None) -> dict[str, Any]:
    stages = list(_stages(past))
    datasets = [
        source["dataset"]
        for _, stage in stages
        for source in stage.config["data"]["sources"].values()
        if source.get("dataset")
    ]
    begun_with = stages[0][1].before if stages else None
    front: dict[str, Any] = {
        "language": ["ca"],
        "license": licence or "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cucafera", "catalan", "llama"],
    }
    if datasets:
        front["datasets"] = list(dict.fromkeys(datasets))
    if begun_with is not None and begun_with[1] is None and not Path(begun_with[0]).exists():
        front["base_model"] = begun_with[0]
    harness = [] if past is None else [result for result in past.evaluation if result["kind"] == "harness"]
    if harness:
        front["model-index"] = [{"name": name, "results": [_index_entry(result) for result in harness]}]
    return front


def _index_entry(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": result["task"], "type": result["task"]},
        "metrics": [
            {"type": metric, "name": metric, "value": value["value"]} for metric, value in result["metrics"].items()
        ],
    }


def _stages(past: Past | None) -> Iterator[tuple[str, Past]]:
    """The runs that made the model, the first one first, by their names."""
    if past is not None:
        if past.before is not None:
            yield from _stages(past.before[1])
        yield past.config["name"], past


def _what_it_is(trained: TrainedModel, past: Past | None, name: str) -> str:
    config = trained.model.config
    kind = "answers in conversations" if trained.chats else "continues texts"
    lines = [
        f"# {name}",
        "",
        f"A Catalan language model of {parameter_count(config):,} parameters that {kind}, made with cucafera.",
        "",
        *_table(_shape(config, trained)),
    ]
    if past is not None and past.metrics is not None:
        history = past.metrics["validation"]
        last = next((record for record in history if record["step"] == trained.step), history[-1])
        lines += [
            "",
            f"On text that was held out it needs {last['bpb']:.3f} bits a byte (after {last['step']:,} steps).",
        ]
    return "\n".join(lines)


def _shape(config: ModelConfig, trained: TrainedModel) -> list[tuple[str, str]]:
    return [
        ("Architecture", f"Llama: RoPE, grouped-query attention, gated MLP ({config.hidden_act}), RMSNorm, tied head"),
        ("Layers x hidden", f"{config.num_hidden_layers} x {config.hidden_size}"),
        ("Query / key-value heads", f"{config.num_attention_heads} / {config.num_key_value_heads}"),
        ("MLP", f"{config.intermediate_size:,}"),
        ("Vocabulary", f"{trained.tokenizer.vocab_size:,}, byte-level BPE"),
        ("Context", f"{config.max_position_embeddings:,} tokens"),
    ]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]


def _use(chats: bool) -> str:
    if chats:
        code = (
            'messages = [{"role": "user", "content": "Quina és la capital de Catalunya?"}]\n'
            'print(write(messages)[0]["generated_text"][-1]["content"])'
        )
        told = (
            "Conversations are ChatML with `<im_start>` and `<im_end>`, ids 4 and 5; the chat template writes them. A "
            "text of a user that spells one of them becomes one there: take such spellings out first."
        )
    else:
        code = 'print(write("Hi havia una vegada")[0]["generated_text"])'
        told = "The tokenizer puts `</s>`, which begins a document, in front of each text, as in training."
    return (
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        f'write = pipeline("text-generation", "PATH OR NAME OF THIS FOLDER")\n{code}\n```\n\n{told}'
    )


def _data(past: Past) -> str:
    lines = ["## Data", "", "| stage | source | weight | tokens seen in the stage |", "|---|---|---:|---:|"]
    for name, stage in _stages(past):
        tokens = f"{stage.metrics['tokens']:,}" if stage.metrics else "not known"
        for key, source in stage.config["data"]["sources"].items():
            lines.append(f"| {name} | {_source(key, source)} | {source.get('weight', 1):g} | {tokens} |")
    return "\n".join(lines)


def _source(key: str, source: Mapping[str, Any]) -> str:
    if source.get("dataset"):
        return f"[{source['dataset']}](https://huggingface.co/datasets/{source['dataset']})"
    if source.get("embedded"):
        return "the Catalan texts that come with cucafera (CC0)"
    return f"local files: {key}"  # where they lay is nobody's business


def _recipe(past: Past) -> str:
    stages = list(_stages(past))
    rows: list[tuple[str, list[str]]] = [
        ("trained", [_trained_part(stage.config["adapter"]) for _, stage in stages]),
        ("optimizer", [f"AdamW, lr {stage.config['optimizer']['lr']:g}" for _, stage in stages]),
        ("weight decay", [f"{stage.config['optimizer']['weight_decay']:g}" for _, stage in stages]),
        ("schedule", [_schedule(stage.config["schedule"]) for _, stage in stages]),
        ("batch", [f"{int(stage.config['batch_tokens']):,} tokens" for _, stage in stages]),
        ("window", [f"{int(_resolved(stage.config, 'sequence_length')):,} tokens" for _, stage in stages]),
        ("steps", [f"{stage.metrics['steps']:,}" if stage.metrics else "not known" for _, stage in stages]),
        ("seed", [str(stage.config["seed"]) for _, stage in stages]),
        ("device", [_device(stage) for _, stage in stages]),
    ]
    lines = ["## Recipe", "", f"| | {' | '.join(name for name, _ in stages)} |", "|---|" + "---|" * len(stages)]
    lines += [f"| {what} | {' | '.join(values)} |" for what, values in rows]
    first = stages[0][1].before
    if first is not None:
        lines += ["", f"It began with `{Path(first[0]).name if Path(first[0]).exists() else first[0]}`."]
    return "\n".join(lines)


def _resolved(config: dict[str, Any], key: str) -> Any:
    return OmegaConf.select(OmegaConf.create(config), key)


def _trained_part(adapter: Mapping[str, Any]) -> str:
    return f"adapters of rank {adapter['rank']} (LoRA), merged" if adapter["rank"] else "all weights"


def _schedule(schedule: Mapping[str, Any]) -> str:
    return f"{schedule['name']}, {schedule['warmup_steps']:,} steps of warm-up"


def _device(stage: Past) -> str:
    if stage.metrics is None:
        return "not known"
    count = f"{stage.metrics['devices']} x " if stage.metrics["devices"] > 1 else ""
    return f"{count}{stage.metrics['device']}, {stage.metrics['precision']}"


def _curves(past: Past, has_curves: bool) -> str:
    picture = [f"![Validation loss against tokens]({CURVES})", ""] if has_curves else []
    if past.metrics is None:
        return "\n".join(["## Curves", "", *picture, "The run has not come to its end."])
    return "\n".join(["## Curves", "", *picture, *validation_table(past.metrics["validation"])])


def _evaluation_section(past: Past) -> str:
    lines = ["## Evaluation", ""]
    if not past.evaluation:
        return "\n".join([*lines, "Beside the curves, it has not been measured yet."])
    lines += ["| task | metric | value | stderr | settings |", "|---|---|---:|---:|---|"]
    for result in past.evaluation:
        told = {key: value for key, value in result["settings"].items() if key not in PLACES and value is not None}
        settings = ", ".join(f"{key}={value}" for key, value in told.items())
        for metric, value in result["metrics"].items():
            stderr = "" if value.get("stderr") is None else f"{value['stderr']:.4f}"
            lines.append(f"| {result['task']} | {metric} | {value['value']:.4f} | {stderr} | {settings} |")
    return "\n".join(lines)


def _samples(past: Past) -> str:
    assert past.metrics is not None
    return "\n".join(["## Samples", "", *as_quoted_samples(past.metrics)]).rstrip()


def _licence(licence: str | None) -> str:
    told = f"The weights: {licence}." if licence else "Nobody has said yet under which licence the weights are."
    return f"## Licence\n\n{told} What they were trained on has licences of its own: see the sources above."
