"""The model card of an exported model: the README.md of its folder, from the files of the run folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from yaml import safe_dump

from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import ModelConfig, SamplingConfig
from cucafera.interop.trained import TrainedModel
from cucafera.markup import markdown, markdown_table
from cucafera.model.flops import parameter_count
from cucafera.objectives import objective_of
from cucafera.optimizers import OptimizerSpec
from cucafera.quantities import number_of
from cucafera.runs.averaging import steps_in_words
from cucafera.runs.folder import RunFolder
from cucafera.runs.lineage import stages_back
from cucafera.runs.locate import is_hugging_face
from cucafera.runs.report import as_quoted_samples

CURVES = "curves.png"
MAX_ROWS = 12
"""Validations in the table."""
PATH_SETTINGS = ("text", "chats", "pairs", "choices")
"""Settings of an evaluation that hold local paths; omitted for privacy."""

LIMITATIONS = """\
- It is small: it hallucinates facts, and loses the thread of a long text. Its context is {context}.
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
        last_step: Step after which a branch continued it; None if none did.
    """

    config: dict[str, Any]
    metrics: dict[str, Any] | None
    evaluation: list[dict[str, Any]]
    init_from: str | None
    parent: "TrainingLineage | None"
    last_step: int | None = None

    @property
    def is_branch(self) -> bool:
        """True if it began with the complete state of init_from, and not with weights alone."""
        return self.config["schedule"]["cooldown_start_step"] is not None

    @property
    def steps(self) -> int | None:
        """Steps of this stage: a branch counts on from its parent, and has those of one that is not on this machine."""
        last = self.last_step or (self.metrics["steps"] if self.metrics else None)
        branched = self.config["schedule"]["cooldown_start_step"] if self.parent else None
        return None if last is None else last - (branched or 0)

    @property
    def tokens(self) -> int | None:
        """Tokens of this stage."""
        return None if self.steps is None else self.steps * int(self.config["batch_tokens"])

    def stages(self) -> "list[TrainingLineage]":
        """Return the runs that made the model, the first one first."""
        return [*(self.parent.stages() if self.parent else []), self]


def read_lineage(folder: RunFolder) -> TrainingLineage:
    """Read the lineage of a run from its run folder and those that init_from names.

    Raises:
        UserError: a configuration, metrics or evaluation cannot be read, or the runs lead in a ring.
    """
    lineage: TrainingLineage | None = None
    stages = stages_back(folder)
    for (source, config), follower in zip(reversed(stages), [*reversed(stages[:-1]), None], strict=True):
        last_step = None if follower is None else follower.config.schedule.cooldown_start_step
        metrics, evaluation = source.read_metrics(), source.read_evaluation()
        values = dataclasses.asdict(config)
        lineage = TrainingLineage(values, metrics, evaluation, config.init_from, lineage, last_step)
    assert lineage is not None
    return lineage


def model_card(
    trained: TrainedModel,
    lineage: TrainingLineage | None,
    name: str,
    licence: str | None,
    verification: str,
    has_curves: bool,
    sampling: SamplingConfig,
    base: str | None = None,
) -> str:
    """Return the README.md.

    Args:
        trained: The model.
        lineage: Its lineage, with evaluations of any weights; None for a model from elsewhere.
        name: The name of the model.
        licence: An identifier of the hub, such as apache-2.0; None: not chosen.
        verification: The form of the files, and how they were compared with the source, as sentences without the last
            full stop.
        has_curves: True if CURVES is in the same folder.
        sampling: The settings in generation_config.json, but for its penalty, which a chat model is exported without.
        base: For the export of an adapter alone: its base, a Hugging Face name, or a folder relative to the adapter's.
    """
    if lineage is not None:
        of_weights = [result for result in lineage.evaluation if _is_of(result, trained)]
        lineage = dataclasses.replace(lineage, evaluation=of_weights)
    sections = [_overview(trained, lineage, name, base), _usage(trained, sampling, base)]
    if lineage is not None:
        sections += [_data(lineage), _recipe(lineage, base is None)]
        sections += [_validation(lineage, has_curves, bool(trained.averaged))]
        sections += [_evaluation(lineage, bool(trained.averaged))]
        if lineage.metrics and lineage.metrics["samples"]:
            sections += [_samples(lineage, bool(trained.averaged))]
    context = trained.model.config.max_position_embeddings
    sections += [
        f"## Limitations\n\n{LIMITATIONS.format(context=number_of(context, 'token'))}",
        f"## Files\n\n{markdown(verification)}.",
        _licence(licence, lineage),
    ]
    front = safe_dump(_front_matter(lineage, name, licence, base), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _is_of(result: Mapping[str, Any], trained: TrainedModel) -> bool:
    """True for an evaluation of these weights: of this checkpoint, or of the mean of these."""
    averaged = list(trained.averaged)
    return bool(result["checkpoint"] == trained.checkpoint.name and result.get("averaged", []) == averaged)


def _front_matter(lineage: TrainingLineage | None, name: str, licence: str | None, base: str | None) -> dict[str, Any]:
    """Return the metadata of the hub, the YAML at the top of the card."""
    stages = lineage.stages() if lineage else []
    datasets = [
        source["dataset"]
        for stage in stages
        for source in stage.config["data"]["sources"].values()
        if source.get("dataset")
    ]
    base_model = base or (stages[0].init_from if stages else None)
    front: dict[str, Any] = {
        "language": ["ca"],
        "license": licence or "unknown",
        "library_name": "peft" if base else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cucafera", "catalan", *(["lora"] if base else []), *_objective_tags(stages)],
    }
    if datasets:
        front["datasets"] = list(dict.fromkeys(datasets))
    if base_model is not None and _is_name_of_hub(base_model):
        front["base_model"] = base_model.split("@")[0]
        front["base_model_relation"] = "adapter" if base else "finetune"
    harness = [result for result in lineage.evaluation if result["kind"] == "harness"] if lineage else []
    if harness:
        front["model-index"] = [{"name": name, "results": [_index_entry(result) for result in harness]}]
    return front


def _objective_tags(stages: Sequence[TrainingLineage]) -> list[str]:
    tags = [tag for stage in stages for tag in objective_of(stage.config).tags(stage.config["objective"])]
    return list(dict.fromkeys(tags))


def _is_name_of_hub(source: str) -> bool:
    return is_hugging_face(source) and not Path(source).expanduser().is_dir()


def _index_entry(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": result["task"], "type": result["task"]},
        "metrics": [
            {"type": metric, "name": metric, "value": value["value"]}
            for metric, value in result["metrics"].items()
            if value["value"] is not None
        ],
    }


def _overview(trained: TrainedModel, lineage: TrainingLineage | None, name: str, base: str | None) -> str:
    config = trained.model.config
    kind = "answers in conversations" if trained.chats else "continues texts"
    model = f"A Catalan language model of {number_of(parameter_count(config), 'parameter')} that {kind}"
    if base is not None:
        assert trained.adapter is not None
        rank = trained.adapter.config["rank"]
        model = f"A LoRA adapter of rank {rank:,}. With its base, {_base_name(base, lineage)}, it is a{model[1:]}"
    origin = "trained with cucafera" if lineage is not None else "loaded and exported with cucafera"
    lines = [
        f"# {markdown(name)}",
        "",
        f"{model}, {origin}.",
        "",
        *markdown_table([("", ""), *_shape(config, trained)]),
    ]
    if trained.averaged:
        merged = ", each with its adapters merged" if lineage is not None and lineage.config["adapter"]["rank"] else ""
        lines += [
            "",
            f"The weights are the uniform mean of those after the {steps_in_words(trained.averaged)}, of "
            f"{number_of(len(trained.averaged), 'checkpoint')} of one run{merged} (latest weight averaging: Izmailov "
            "et al., 2018; Kaddour, 2022).",
        ]
    if lineage is not None and lineage.metrics is not None:
        history = lineage.metrics["validation"]
        record = next((record for record in history if record["step"] == trained.step), history[-1])
        whose = ", by the weights of that step and not by their mean" if trained.averaged else ""
        lines += [
            "",
            f"Validation: {_primary_metric(lineage, record)} on held-out {_kind_of_data(lineage)}, after "
            f"{number_of(record['step'], 'step')}{whose}.",
        ]
    return "\n".join(lines)


def _base_name(base: str, lineage: TrainingLineage | None) -> str:
    """Return the name of an adapter's base: on the hub, of the run that it is, or else of its folder."""
    if _is_name_of_hub(base):
        return markdown(base)
    # The adapters of a cooldown were added by its parent.
    added = lineage.parent if lineage and lineage.is_branch else lineage
    run = added.parent if added else None
    return markdown(str(run.config["name"]) if run else Path(base).name)


def _kind_of_data(stage: TrainingLineage) -> str:
    return objective_of(stage.config).kind_of_data


def _primary_metric(lineage: TrainingLineage, record: Mapping[str, Any]) -> str:
    """Return the primary metric of a validation, with its unit."""
    metric = objective_of(lineage.config).primary_metric
    return metric.text(record[metric.name])


def _shape(config: ModelConfig, trained: TrainedModel) -> list[tuple[str, str]]:
    return [
        (
            "Architecture",
            f"Decoder: RoPE, grouped-query attention, gated MLP ({config.hidden_act}), RMSNorm, tied head",
        ),
        ("Layers x hidden", f"{config.num_hidden_layers} x {config.hidden_size}"),
        ("Query / key-value heads", f"{config.num_attention_heads} / {config.num_key_value_heads}"),
        ("MLP", f"{config.intermediate_size:,}"),
        ("Vocabulary", f"{trained.tokenizer.vocab_size:,}, byte-level BPE"),
        ("Context", number_of(config.max_position_embeddings, "token")),
    ]


def _usage(trained: TrainedModel, sampling: SamplingConfig, base: str | None) -> str:
    package = "peft, transformers and torch" if base else "transformers and torch"
    code = _adapter_code(base, trained.chats) if base else _pipeline_code(trained.chats)
    chat = "python -m cucafera.chat ."
    where = "Run it in the folder of this file; elsewhere, write its path or its name on the hub instead of the dot."
    if base is not None and not _is_name_of_hub(base):
        where += " The base is another folder, with the weights of the run that the adapter was trained on."
    if trained.chats:
        note = (
            "Conversations are ChatML with `<im_start>` and `<im_end>`, ids 4 and 5; the chat template writes them. "
            "transformers also parses them in the text of a user: remove them from untrusted input."
        )
    else:
        note = "The tokenizer prepends `</s>`, the document start token, to each text, as in training."
    return "\n\n".join(
        [
            f"## Usage\n\nWith {package}:",
            f"```python\n{code}\n```",
            where,
            f"With cucafera, {'as a chat' if trained.chats else 'which continues what is typed'}:",
            f"```bash\n{chat}\n```",
            note,
            _recommended(sampling, trained.chats),
        ]
    )


QUESTION = "Quina és la capital de Catalunya?"
BEGINNING = "Hi havia una vegada"


def _pipeline_code(chats: bool) -> str:
    asked = (
        f'messages = [{{"role": "user", "content": "{QUESTION}"}}]\n'
        'print(write(messages)[0]["generated_text"][-1]["content"])'
        if chats
        else f'print(write("{BEGINNING}")[0]["generated_text"])'
    )
    return (
        'from transformers import pipeline\n\nwrite = pipeline("text-generation", ".")\n'
        "write.generation_config = write.model.generation_config  # transformers 4 would take others\n" + asked
    )


def _adapter_code(base: str, chats: bool) -> str:
    prompt = (
        f'messages = [{{"role": "user", "content": "{QUESTION}"}}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
        ")"
        if chats
        else f'inputs = tokenizer("{BEGINNING}", return_tensors="pt")'
    )
    name, _, revision = base.partition("@") if _is_name_of_hub(base) else (base, "", "")
    source = json.dumps(name, ensure_ascii=False) + (f', revision="{revision}"' if revision else "")
    start = 'inputs["input_ids"].shape[1]' if chats else "0"
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({source})\n"
        'base.generation_config = GenerationConfig.from_pretrained(".")\n'
        'model, tokenizer = PeftModel.from_pretrained(base, "."), AutoTokenizer.from_pretrained(".")\n'
        f"{prompt}\n"
        "written = model.generate(**inputs)[0]\n"
        f"print(tokenizer.decode(written[{start}:], skip_special_tokens=True))"
    )


def _recommended(sampling: SamplingConfig, chats: bool) -> str:
    """Return a sentence about generation_config.json."""
    if sampling.temperature:
        settings = f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}"
        settings += f", min-p {sampling.min_p:g}" if sampling.min_p else ""
    else:
        settings = "greedy decoding"
    penalty = f"a repetition penalty of {sampling.repetition_penalty:g}"
    if chats and sampling.repetition_penalty != 1:
        penalty = f"no repetition penalty (the run had {penalty}, but transformers would penalize the stop token too)"
    elif sampling.repetition_penalty == 1:
        penalty = "no repetition penalty"
    return (
        f"`generation_config.json` recommends {settings}, {penalty}, and at most "
        f"{number_of(sampling.max_new_tokens, 'new token')}."
    )


def _data(lineage: TrainingLineage) -> str:
    rows = ["| stage | data | source | weight | tokens of the stage |", "|---|---|---|---:|---:|"]
    for stage in lineage.stages():
        tokens = "unknown" if stage.tokens is None else f"{stage.tokens:,}"
        name = markdown(str(stage.config["name"]))
        for key, source in stage.config["data"]["sources"].items():
            described = f"{_kind_of_data(stage)} | {_source(key, source)} | {source.get('weight', 1):g}"
            rows.append(f"| {name} | {described} | {tokens} |")
    return "\n".join(["## Data", "", *rows])


def _source(key: str, source: Mapping[str, Any]) -> str:
    if source.get("dataset"):
        name = str(source["dataset"])
        return f"[{markdown(name)}](https://huggingface.co/datasets/{quote(name)})"
    if source.get("embedded"):
        return "cucafera's own, in Catalan (CC0 1.0)"
    return f"local files: {markdown(key)}"  # without their paths, for privacy


def _recipe(lineage: TrainingLineage, is_merged: bool) -> str:
    stages = lineage.stages()
    rows: list[tuple[str, list[str]]] = [
        ("stage", [objective_of(stage.config).describe(stage.config["objective"]) for stage in stages]),
        ("trained", [_trained_part(stage, is_merged or _is_merged(stage, lineage)) for stage in stages]),
        ("optimizer", [_optimizer(stage.config["optimizer"]) for stage in stages]),
        ("schedule", [_schedule(stage.config["schedule"]) for stage in stages]),
        ("batch", [number_of(int(stage.config["batch_tokens"]), "token") for stage in stages]),
        ("window", [number_of(stage.config["sequence_length"], "token") for stage in stages]),
        ("steps", ["unknown" if stage.steps is None else f"{stage.steps:,}" for stage in stages]),
        ("seed", [str(stage.config["seed"]) for stage in stages]),
        ("device", [_device(stage) for stage in stages]),
    ]
    head = ["", *(str(stage.config["name"]) for stage in stages)]
    lines = ["## Recipe", "", *markdown_table([head, *([label, *values] for label, values in rows)])]
    if source := stages[0].init_from:
        lines += ["", f"Initial weights: {markdown(Path(source).name if Path(source).exists() else source)}."]
    return "\n".join(lines)


def _is_merged(stage: TrainingLineage, last: TrainingLineage) -> bool:
    """True if the next stage began with weights into which the adapters of this one were merged."""
    return stage is not last and stage.last_step is None


def _optimizer(settings: Mapping[str, Any]) -> str:
    spec: OptimizerSpec = OPTIMIZERS.get(settings["name"])
    return spec.describe(settings)


def _trained_part(stage: TrainingLineage, is_merged: bool) -> str:
    adapter = stage.config["adapter"]
    if not adapter["rank"]:
        return "all weights"
    return f"LoRA adapters of rank {adapter['rank']}, alpha {adapter['alpha']:g}{', merged' if is_merged else ''}"


def _schedule(schedule: Mapping[str, Any]) -> str:
    if (start := schedule["cooldown_start_step"]) is not None:
        steps = number_of(schedule["cooldown_steps"], "step")
        return f"cooldown: the state after step {start:,}, then a line to 0 in {steps}"
    return f"{schedule['name']}, {number_of(schedule['warmup_steps'], 'warmup step')}"


def _device(stage: TrainingLineage) -> str:
    if stage.metrics is None:
        return "unknown"
    count = f"{stage.metrics['devices']} x " if stage.metrics["devices"] > 1 else ""
    return f"{count}{stage.metrics['device']}, {stage.metrics['precision']}"


def _validation(lineage: TrainingLineage, has_curves: bool, is_mean: bool) -> str:
    lines = ["## Validation", ""]
    if is_mean:
        lines += ["Of the weights after each step, in training; their mean was not validated.", ""]
    if lineage.metrics is None:
        return "\n".join([*lines, "The run has not finished."])
    if has_curves:
        lines += [f"![Validation over tokens]({CURVES})", ""]
    metrics, history = objective_of(lineage.config).metrics, lineage.metrics["validation"]
    labels = [metric.label_with_unit for metric in metrics]
    shown = [history[round(number * (len(history) - 1) / (MAX_ROWS - 1))] for number in range(MAX_ROWS)]
    rows = [
        [f"{record['step']:,}", f"{record['tokens']:,}", *(f"{record[m.name]:{m.format}}" for m in metrics)]
        for record in (shown if len(history) > MAX_ROWS else history)
    ]
    lines += markdown_table([["step", "tokens", *labels], *rows], "r" * (2 + len(metrics)))
    if len(history) > MAX_ROWS:
        lines += ["", f"Of {len(history):,} validations, {MAX_ROWS} are shown."]
    return "\n".join(lines)


def _evaluation(lineage: TrainingLineage, is_mean: bool) -> str:
    lines = ["## Evaluation", ""]
    if not lineage.evaluation:
        return "\n".join([*lines, f"{'The mean is not' if is_mean else 'Only validated, not'} evaluated yet."])
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


def _samples(lineage: TrainingLineage, is_mean: bool) -> str:
    assert lineage.metrics is not None
    samples = as_quoted_samples(lineage.metrics)
    end = f"Written at the end of training, after {number_of(lineage.metrics['steps'], 'step')}; not selected."
    end += " Not by the mean, but by the weights of that step." if is_mean else ""
    return "\n".join(["## Samples", "", end, "", *samples]).rstrip()


def _licence(licence: str | None, lineage: TrainingLineage | None) -> str:
    weights = f"Weights: {markdown(licence)}." if licence else "No licence has been chosen for the weights yet."
    data = "The training data has its own licences: see its sources above."
    if lineage is None or lineage.stages()[0].init_from is not None:
        data += " The weights that training began with have theirs." if lineage else ""
        data = data if lineage else "The model that it was made from, and the data of its training, have their own."
    return f"## Licence\n\n{weights} {data}"
