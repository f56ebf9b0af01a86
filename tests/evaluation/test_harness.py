"""lm-evaluation-harness on our models: equal to its own backend, and tasks from files."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cucafera.config.errors import UserError
from cucafera.data.chatml import Message, render_prompt
from cucafera.evaluation.evaluated_model import EvaluatedModel
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.multiple_choice import answer_questions, read_questions
from cucafera.evaluation.results import Result

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from cucafera.evaluation.harness import HarnessModel, TaskSettings, run_tasks
from cucafera.evaluation.tasks import (
    TASKS,
    _defined_names,
    described_tasks,
    load_tasks,
    refuse_impossible,
    task_manager,
)

CONTEXTS = ["", "la mar", "la mar i el bosc ", "Pregunta: què té el gat?\nResposta:", "el sol. " * 60, "la mar"]
CONTINUATIONS = [" és gran", "i el vent", "dorm", " la nit és llarga", " x", " i la muntanya"]
TEXTS = ["la mar", "el sol i la lluna. " * 50, "l'àvia menja pa amb tomàquet"]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def harness_backend(evaluated: EvaluatedModel, add_bos_token: bool) -> HFLM:
    """The harness's own backend on the same weights."""
    config = evaluated.model.config
    shape = {name: value for name, value in vars(config).items() if hasattr(LlamaConfig(), name)}
    llama = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).eval()
    llama.model.load_state_dict(evaluated.model.state_dict())
    assert llama.config.rope_parameters["rope_theta"] == config.rope_theta
    assert evaluated.run is not None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(evaluated.run.tokenizer), bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )
    if add_bos_token:
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    return HFLM(pretrained=llama, tokenizer=tokenizer, device="cpu", dtype="float32", add_bos_token=add_bos_token,
                batch_size=2, max_length=config.max_position_embeddings)  # fmt: skip


def test_likelihoods_equal_the_harness_with_transformers(base):
    requests = instances("loglikelihood", [(a, b) for a in CONTEXTS for b in CONTINUATIONS])
    ours = HarnessModel(base).loglikelihood(requests, disable_tqdm=True)
    theirs = harness_backend(base, add_bos_token=True).loglikelihood(requests, disable_tqdm=True)
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_likelihoods_equal_the_harness_with_transformers(base):
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    ours = HarnessModel(base).loglikelihood_rolling(requests)
    theirs = harness_backend(base, add_bos_token=False).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)


def test_greedy_answers_equal_the_harness_with_transformers(base):
    settings = {"until": [".", "\n"], "max_gen_toks": 20}
    requests = instances("generate_until", [(context, dict(settings)) for context in CONTEXTS if context])
    ours = HarnessModel(base).generate_until(requests)
    assert ours == harness_backend(base, add_bos_token=True).generate_until(requests, disable_tqdm=True)
    assert any(ours)


def test_a_conversation_is_rendered_as_in_finetuning_and_only_its_answer_scored(chat):
    model = HarnessModel(chat)
    text = model.apply_chat_template([{"role": "user", "content": "Hola, <im_end> "}])
    assert text == "<im_start>user\nHola, <im_end><im_end>\n<im_start>assistant\n"
    prompt = render_prompt([Message("user", "Hola, <im_end>")], chat.tokenizer)
    assert model.tok_encode(text) == prompt
    role_end = len(chat.tokenizer.encode("\n"))
    context, scored = model._encode_pair(text, "bé")
    assert [*context, *scored] == [*prompt, *chat.tokenizer.encode("bé")]
    assert scored == [*prompt[-role_end:], *chat.tokenizer.encode("bé")]  # as in the harness, with the line end
    prefilled = model.apply_chat_template(
        [{"role": "user", "content": "Hola"}, {"role": "assistant", "content": "Bon"}], add_generation_prompt=False
    )
    assert prefilled.endswith("assistant\nBon")
    assert model.tok_encode("Hola <im_end>") == [1, *chat.tokenizer.encode("Hola <im_end>")]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with three tasks and their data files."""
    choices = ["La nena dorm.", "El gat corre.", "Sap nedar molt bé", "Mira el mar"]
    rows = [
        {"premise": "Plovia molt. ", "question": asked, "choice1": one, "choice2": other, "label": len(one + other) % 2}
        for one, other in itertools.permutations(choices, 2)
        for asked in ("cause", "effect")
    ]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    connectors = '{"cause": "perquè", "effect": "i per tant"}'
    lowered = [f"{name}[0].lower() + {name}[1:]" for name in ("choice1", "choice2")]
    described = {
        "local_copa": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{premise[:-1].strip() + ' ' + " + connectors + "[question]}}",
            "doc_to_choice": "{{[" + ", ".join(lowered) + "]}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
        "local_answers": {
            "output_type": "generate_until",
            "doc_to_text": "{{text[:20]}}",
            "doc_to_target": "x",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 5},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in described.items():
        data = str(tmp_path / ("copa.jsonl" if name == "local_copa" else "texts.jsonl"))
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}}
        more = {"test_split": "test", "metadata": {"version": 1.0}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(common | more | task))
    return tmp_path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def measure(evaluated: EvaluatedModel, names: list[str], folder: Path | None, **settings) -> dict[str, Result]:
    tasks = load_tasks(names, None if folder is None else str(folder))
    return {result.task: result for result in run_tasks(evaluated, tasks, TaskSettings(**settings))}


def test_tasks_from_files_run_and_agree_with_our_multiple_choice(base, tasks):
    random = torch.random.get_rng_state()
    results = measure(base, ["local_copa", str(tasks / "local_text.yaml"), "local_answers"], tasks)
    assert torch.equal(torch.random.get_rng_state(), random)
    ours = answer_questions(read_questions(str(tasks / "copa.jsonl")), DecoderScorer(base.model), base.tokenizer)
    assert 0 < ours["acc"].value < 1
    for name, metric in ours.items():
        assert results["local_copa"].metrics[name] == pytest.approx(metric)
    assert results["local_copa"].settings["num_fewshot"] == 0
    assert results["local_copa"].note == "24 of 24 questions, 0-shot"
    assert 0 < results["local_text"].metrics["bits_per_byte"].value < 20
    assert results["local_answers"].metrics["exact_match"].value == 0
    assert results["local_answers"].note == "3 of 3 questions, 0-shot"


def test_questions_asked_in_a_conversation_agree_with_our_multiple_choice(chat, tasks):
    (result,) = measure(chat, ["local_copa"], tasks, as_chat=True).values()
    questions = read_questions(str(tasks / "copa.jsonl"))
    ours = answer_questions(questions, DecoderScorer(chat.model), chat.tokenizer, as_chat=True)
    for name, metric in ours.items():
        assert result.metrics[name] == pytest.approx(metric)
    assert result.note == "24 of 24 questions, 0-shot, in a conversation"


def test_how_questions_are_asked_is_part_of_the_result(chat, tasks):
    settings = {"num_fewshot": 1, "limit": 4, "as_chat": True}
    (result,) = measure(chat, ["local_copa"], tasks, **settings).values()
    common = {"num_fewshot": 1, "version": "1.0", "limit": 4, "chat_template": True, "lm_eval": ""}
    assert result.settings | {"lm_eval": ""} == common
    settings |= {"system_instruction": "Respon.", "fewshot_as_multiturn": False}
    (result,) = measure(chat, ["local_copa"], tasks, **settings).values()
    assert result.settings | {"lm_eval": ""} == common | {
        "system_instruction": "Respon.", "fewshot_as_multiturn": False
    }  # fmt: skip


@pytest.fixture
def group(tasks: Path) -> Path:
    """The tasks in groups: one with a metric of its own, a tag, another group, and a task that it changes."""
    described = {
        "local_all": {
            "task": ["local_inner", "local_tag", {"task": "local_answers", "generation_kwargs": {"until": ["x"]}}],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        },
        "local_inner": {"task": ["local_copa", {"group": "local_written", "task": ["local_text"]}]},
    }
    for name, content in described.items():
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, **content}))
    task = yaml.safe_load((tasks / "local_copa.yaml").read_text())
    task |= {"task": "local_few", "tag": "local_tag", "num_fewshot": 2, "fewshot_split": "test"}
    (tasks / "local_few.yaml").write_text(yaml.safe_dump(task))
    return tasks


def test_a_group_runs_with_its_groups_tags_and_changes(base, group):
    results = measure(base, ["local_all"], group, limit=3)
    assert results.keys() >= {"local_copa", "local_few", "local_text", "local_answers", "local_all"}
    assert results["local_few"].settings["num_fewshot"] == 2
    parts = [results[name].metrics["acc"].value for name in ("local_copa", "local_few")]
    assert results["local_all"].metrics["acc"].value == pytest.approx(sum(parts) / 2)
    assert measure(base, [str(group / "local_inner.yaml")], group, limit=1).keys() == {"local_copa", "local_text"}
    assert measure(base, ["local_tag"], group, limit=1).keys() == {"local_few"}


def test_a_task_without_examples_stays_without(base, tasks):
    path = tasks / "local_copa.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"num_fewshot": 0}))
    (result,) = measure(base, ["local_copa"], tasks, num_fewshot=2, limit=2).values()
    assert (result.settings["num_fewshot"], result.note) == (0, "2 of 24 questions, 0-shot")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"dataset_kwargs": {"data_files": "no.jsonl"}}, "local_task: it cannot be loaded: FileNotFoundError: "),
        ({"metric_list": [{"metric": "nothing"}]}, "local_task: it cannot be loaded: "),
        ({"unsafe_code": True}, "local_task: it runs programs that the model writes, which"),
        ({"doc_to_image": "image"}, "local_task: its questions hold images or sound, and the model reads text only"),
        ({"generation_kwargs": {"num_beams": 4}}, "local_task: its generation_kwargs have num_beams=4, which"),
        ({"doc_to_text": "!function missing_module.f"}, "local_task: it cannot be loaded: .*missing_module"),
        ({"doc_to_text": "!function ending.f"}, "local_task: it cannot be loaded: SystemExit: a tool is missing"),
        ({"task": ["local_copa", "local_none"]}, "local_task: its member local_none is neither a task of the harness"),
        ({"task": [{"task": "local_none"}]}, "a task cannot be loaded: "),
        ({"task": ["local_copa", {"x": 1}]}, "a task cannot be loaded: ValueError: Dict entry in group"),
        ("a: [", "local_task.yaml cannot be read: "),
    ],
)
def test_a_task_that_cannot_be_run_is_refused_in_one_line(tasks, task, message):
    content = task
    if isinstance(task, dict):
        named = {"group": "local_task"} if isinstance(task.get("task"), list) else {"task": "local_task"}
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tasks / "copa.jsonl")}}}
        content = yaml.safe_dump({**named, **data, "test_split": "test", "doc_to_text": "x"} | task)
        content = re.sub("'(!function .*)'", r"\1", content)
        (tasks / "ending.py").write_text("raise SystemExit('a tool is missing')")
    (tasks / "local_task.yaml").write_text(content)
    with pytest.raises(UserError, match=message) as refused:
        load_tasks(["local_task"], str(tasks))
    assert "\n" not in str(refused.value)


def test_what_fails_between_a_task_and_the_model_is_refused_in_one_line(base, tasks):
    loaded = load_tasks(["local_copa"], str(tasks))
    with pytest.raises(UserError, match="--tasks local_copa: the harness cannot measure it: ") as refused:
        list(run_tasks(base, loaded, TaskSettings(num_fewshot=100)))
    assert "\n" not in str(refused.value)


def test_an_unknown_task_is_an_error_with_similar_names():
    with pytest.raises(UserError, match=r"copa_cat: there is no such task; similar: .*copa_ca"):
        load_tasks(["copa_cat"], None)


class DataNeeded(Exception):  # noqa: N818
    """A task is complete but for its data."""


@pytest.fixture
def without_data(monkeypatch):
    """Stop the construction of a task where its data would be loaded."""

    def stop(*arguments, **settings):
        raise DataNeeded

    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.download", stop)
    monkeypatch.setattr("lm_eval.api.task.Task.download", stop)


def test_each_member_of_catalan_bench_is_found_and_constructed(without_data):
    manager = task_manager(["catalan_bench"], None)
    described = dict(described_tasks(["catalan_bench"], manager, None))
    assert {"belebele_cat_Latn", "eqbench_ca", "copa_ca", "phrases_ca-va"} <= described.keys()
    for name, description in described.items():
        refuse_impossible(name, description)
        with pytest.raises(DataNeeded):
            manager.load([name])


def test_a_group_with_members_in_many_folders_is_found():
    manager = task_manager(["openllm", "pythia"], None)
    described = dict(described_tasks(["openllm", "pythia"], manager, None))
    assert {"arc_challenge", "hellaswag", "winogrande", "mmlu_anatomy", "lambada_openai"} <= described.keys()


@pytest.mark.slow
def test_every_name_of_the_harness_is_found_as_in_its_own_index():
    theirs = TaskManager()
    assert len(theirs.all_tasks) > 10_000
    ours = task_manager(theirs.all_tasks, None)
    different = {
        name
        for name, entry in theirs.task_index.items()
        if name not in ours.task_index
        or (ours.task_index[name].kind, ours.task_index[name].tags) != (entry.kind, entry.tags)
        or ours.task_index[name].yaml_path != entry.yaml_path
    }
    assert not different
    folders = _defined_names()
    for name, entry in theirs.task_index.items():  # each folder that a name needs, by itself
        for task in entry.tags if entry.kind is Kind.TAG else [name]:
            path = theirs.task_index[task].yaml_path
            folder = TASKS / path.relative_to(TASKS).parts[0]
            assert name in folders[folder], name
    unknown = {}
    for name in theirs.all_groups:
        try:
            list(described_tasks([name], ours, None))
        except UserError as error:
            unknown[name] = str(error)
    assert not unknown
