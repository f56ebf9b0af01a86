"""The model card of an exported model: the README.md of its folder, from the files of the run folder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from yaml import safe_dump

from cucafera.config.check import build
from cucafera.config.errors import UserError
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config, ModelConfig
from cucafera.interop.trained import TrainedModel
from cucafera.markup import markdown, markdown_table
from cucafera.model.flops import parameter_count
from cucafera.objectives import objective_of
from cucafera.optimizers import OptimizerSpec
from cucafera.runs.folder import RunFolder
from cucafera.runs.report import as_quoted_samples, validation_table

CURVES = "curves.png"
PATH_SETTINGS = ("text", "choices")
"""Settings of an evaluation that hold local paths; omitted for privacy."""

LIMITATIONS = """\
- It is small: it hallucinates facts, and loses the thread of a long text.
- It reproduces the language and the views of its training texts, with their errors and biases.
- It has no safety training. Do not use it for decisions about people."""


@dataclasses.dataclass(frozen=True)
class TrainingLineage:
    """A run, and the runs that its initial weights come from.

    Attributes:
        config: The configuration of the run, as nested dictionaries.
        metrics: Its metrics.json; None if it has not finished.
        evaluation: The results in its evaluation.json.
        init_from: The source of its initial weights; None if it started from random weights.
        parent: The lineage of init_from; None if that is not a run folder on this machine.
    """

    config: dict[str, Any]
    metrics: dict[str, Any] | None
    evaluation: list[dict[str, Any]]
    init_from: str | None
    parent: "TrainingLineage | None"

    def stages(self) -> "list[TrainingLineage]":
        """Return the runs that made the model, the first one first."""
        return [*(self.parent.stages() if self.parent else []), self]


def read_lineage(folder: RunFolder) -> TrainingLineage:
    """Read the lineage of a run from its run folder and those that init_from names.

    Raises:
        UserError: a configuration, metrics or evaluation cannot be read, or the runs lead in a ring.
    """
    return _read_lineage(folder, [])


def _read_lineage(folder: RunFolder, followers: list[Path]) -> TrainingLineage:
    """Read the lineage of a run whose weights the followers began with, the last one first."""
    place = folder.path.resolve()
    if place in followers:
        ring = " <- ".join(path.name for path in (place, *followers))
        raise UserError(
            f"{folder.path}: the init_from of these runs lead in a ring, {ring}, so one of the folders was overwritten "
            "since: rename the one that is no longer what the others began with, and its lineage ends there"
        )
    config = _checked_config(folder)
    init_from, parent = config["init_from"], None
    if init_from:
        path = Path(init_from).expanduser()
        source = RunFolder(path.parent.parent if path.is_file() else path)
        if source.config.is_file() and source.path.resolve() != place:
            parent = _read_lineage(source, [place, *followers])
    return TrainingLineage(config, folder.read_metrics(), folder.read_evaluation(), init_from, parent)


def _checked_config(folder: RunFolder) -> dict[str, Any]:
    """Return the configuration of a run, with values of the types of the schema."""
    problems: dict[str, str] = {}
    config = build(Config, folder.read_config(), "", problems)
    if problems:
        raise UserError(f"{folder.config} cannot be used: {next(iter(problems.values()))}")
    return dataclasses.asdict(config)


def model_card(
    trained: TrainedModel,
    lineage: TrainingLineage | None,
    name: str,
    licence: str | None,
    verification: str,
    has_curves: bool,
) -> str:
    """Return the README.md.

    Args:
        trained: The model.
        lineage: Its lineage, with evaluations of any checkpoint; None for a model from elsewhere.
        name: The name of the model.
        licence: An identifier of the hub, such as apache-2.0; None: not chosen.
        verification: How the files were compared with the source, as a sentence without its full stop.
        has_curves: True if CURVES is in the same folder.
    """
    if lineage is not None:
        of_checkpoint = [result for result in lineage.evaluation if result["checkpoint"] == trained.checkpoint.name]
        lineage = dataclasses.replace(lineage, evaluation=of_checkpoint)
    sections = [_overview(trained, lineage, name), _usage(trained.chats)]
    if lineage is not None:
        sections += [_data(lineage), _recipe(lineage), _curves(lineage, has_curves), _evaluation(lineage)]
        sections += [_samples(lineage)] if lineage.metrics and lineage.metrics["samples"] else []
    sections += [f"## Limitations\n\n{LIMITATIONS}", f"## Files\n\n{markdown(verification)}.", _licence(licence)]
    front = safe_dump(_front_matter(lineage, name, licence), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(lineage: TrainingLineage | None, name: str, licence: str | None) -> dict[str, Any]:
    """Return the metadata of the hub, the YAML at the top of the card."""
    stages = lineage.stages() if lineage else []
    datasets = [
        source["dataset"]
        for stage in stages
        for source in stage.config["data"]["sources"].values()
        if source.get("dataset")
    ]
    base_model = stages[0].init_from if stages else None
    front: dict[str, Any] = {
        "language": ["ca"],
        "license": licence or "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cucafera", "catalan", "llama"],
    }
    if datasets:
        front["datasets"] = list(dict.fromkeys(datasets))
    if base_model is not None and not Path(base_model).exists():  # a name of the hub, not a local path
        front["base_model"] = base_model
    harness = [result for result in lineage.evaluation if result["kind"] == "harness"] if lineage else []
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


def _overview(trained: TrainedModel, lineage: TrainingLineage | None, name: str) -> str:
    config = trained.model.config
    kind = "answers in conversations" if trained.chats else "continues texts"
    lines = [
        f"# {markdown(name)}",
        "",
        f"A Catalan language model of {parameter_count(config):,} parameters that {kind}, trained with cucafera.",
        "",
        *markdown_table([("", ""), *_shape(config, trained)]),
    ]
    if lineage is not None and lineage.metrics is not None:
        history = lineage.metrics["validation"]
        record = next((record for record in history if record["step"] == trained.step), history[-1])
        lines += [
            "",
            f"Validation: {_primary_metric(lineage, record)} on held-out text, after {record['step']:,} steps.",
        ]
    return "\n".join(lines)


def _primary_metric(lineage: TrainingLineage, record: Mapping[str, Any]) -> str:
    """Return the primary metric of a validation, with its unit."""
    metric = objective_of(lineage.config).primary_metric
    return metric.text(record[metric.name])


def _shape(config: ModelConfig, trained: TrainedModel) -> list[tuple[str, str]]:
    return [
        ("Architecture", f"Llama: RoPE, grouped-query attention, gated MLP ({config.hidden_act}), RMSNorm, tied head"),
        ("Layers x hidden", f"{config.num_hidden_layers} x {config.hidden_size}"),
        ("Query / key-value heads", f"{config.num_attention_heads} / {config.num_key_value_heads}"),
        ("MLP", f"{config.intermediate_size:,}"),
        ("Vocabulary", f"{trained.tokenizer.vocab_size:,}, byte-level BPE"),
        ("Context", f"{config.max_position_embeddings:,} tokens"),
    ]


def _usage(chats: bool) -> str:
    if chats:
        code = (
            'messages = [{"role": "user", "content": "Quina és la capital de Catalunya?"}]\n'
            'print(write(messages)[0]["generated_text"][-1]["content"])'
        )
        note = (
            "Conversations are ChatML with `<im_start>` and `<im_end>`, ids 4 and 5; the chat template writes them. "
            "transformers also parses them in the text of a user: remove them from untrusted input."
        )
    else:
        code = 'print(write("Hi havia una vegada")[0]["generated_text"])'
        note = "The tokenizer prepends `</s>`, the document start token, to each text, as in training."
    return (
        "## Usage\n\n```python\nfrom transformers import pipeline\n\n"
        f'write = pipeline("text-generation", "PATH OR NAME OF THIS FOLDER")\n{code}\n```\n\n{note}'
    )


def _data(lineage: TrainingLineage) -> str:
    rows = ["| stage | source | weight | tokens of the stage |", "|---|---|---:|---:|"]
    for stage in lineage.stages():
        tokens = f"{stage.metrics['tokens']:,}" if stage.metrics else "unknown"
        for key, source in stage.config["data"]["sources"].items():
            name = markdown(str(stage.config["name"]))
            rows.append(f"| {name} | {_source(key, source)} | {source.get('weight', 1):g} | {tokens} |")
    return "\n".join(["## Data", "", *rows])


def _source(key: str, source: Mapping[str, Any]) -> str:
    if source.get("dataset"):
        name = str(source["dataset"])
        return f"[{markdown(name)}](https://huggingface.co/datasets/{quote(name)})"
    if source.get("embedded"):
        return "the embedded Catalan texts of cucafera (CC0)"
    return f"local files: {markdown(key)}"  # without their paths, for privacy


def _recipe(lineage: TrainingLineage) -> str:
    stages = lineage.stages()
    rows: list[tuple[str, list[str]]] = [
        ("trained", [_trained_part(stage.config["adapter"]) for stage in stages]),
        ("optimizer", [_optimizer(stage.config["optimizer"]) for stage in stages]),
        ("schedule", [_schedule(stage.config["schedule"]) for stage in stages]),
        ("batch", [f"{int(stage.config['batch_tokens']):,} tokens" for stage in stages]),
        ("window", [f"{stage.config['sequence_length']:,} tokens" for stage in stages]),
        ("steps", [f"{stage.metrics['steps']:,}" if stage.metrics else "unknown" for stage in stages]),
        ("seed", [str(stage.config["seed"]) for stage in stages]),
        ("device", [_device(stage) for stage in stages]),
    ]
    head = ["", *(str(stage.config["name"]) for stage in stages)]
    lines = ["## Recipe", "", *markdown_table([head, *([label, *values] for label, values in rows)])]
    if source := stages[0].init_from:
        lines += ["", f"Initial weights: {markdown(Path(source).name if Path(source).exists() else source)}."]
    return "\n".join(lines)


def _optimizer(settings: Mapping[str, Any]) -> str:
    spec: OptimizerSpec = OPTIMIZERS.get(settings["name"])
    return spec.describe(settings)


def _trained_part(adapter: Mapping[str, Any]) -> str:
    return f"LoRA adapters of rank {adapter['rank']}, merged" if adapter["rank"] else "all weights"


def _schedule(schedule: Mapping[str, Any]) -> str:
    return f"{schedule['name']}, {schedule['warmup_steps']:,} warmup steps"


def _device(stage: TrainingLineage) -> str:
    if stage.metrics is None:
        return "unknown"
    count = f"{stage.metrics['devices']} x " if stage.metrics["devices"] > 1 else ""
    return f"{count}{stage.metrics['device']}, {stage.metrics['precision']}"


def _curves(lineage: TrainingLineage, has_curves: bool) -> str:
    picture = [f"![Validation loss over tokens]({CURVES})", ""] if has_curves else []
    if lineage.metrics is None:
        return "\n".join(["## Validation", "", *picture, "The run has not finished."])
    return "\n".join(["## Validation", "", *picture, *validation_table(lineage.metrics)])


def _evaluation(lineage: TrainingLineage) -> str:
    lines = ["## Evaluation", ""]
    if not lineage.evaluation:
        return "\n".join([*lines, "Only validated, not evaluated yet."])
    rows = [["task", "metric", "value", "stderr", "settings"]]
    for result in lineage.evaluation:
        settings = ", ".join(
            f"{key}={value}"
            for key, value in result["settings"].items()
            if key not in PATH_SETTINGS and value is not None
        )
        for metric, value in result["metrics"].items():
            stderr = "" if value["stderr"] is None else f"{value['stderr']:.4f}"
            number = "not finite" if value["value"] is None else f"{value['value']:.4f}"
            rows.append([str(result["task"]), metric, number, stderr, settings])
    return "\n".join([*lines, *markdown_table(rows, "llrrl")])


def _samples(lineage: TrainingLineage) -> str:
    assert lineage.metrics is not None
    return "\n".join(["## Samples", "", *as_quoted_samples(lineage.metrics)]).rstrip()


def _licence(licence: str | None) -> str:
    weights = f"Weights: {markdown(licence)}." if licence else "No licence has been chosen for the weights yet."
    return f"## Licence\n\n{weights} The training data has its own licences: see the sources above."
