"""lm-evaluation-harness on our models: equal to its own backend, and tasks from files."""

import itertools
import json
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

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from cucafera.evaluation.harness import HarnessModel, run_tasks

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
    assert model._encode_pair(text, "bé") == (prompt, chat.tokenizer.encode("bé"))
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


def test_tasks_from_files_run_and_agree_with_our_multiple_choice(base, tasks):
    random = torch.random.get_rng_state()
    names = ["local_copa", str(tasks / "local_text.yaml"), "local_answers"]
    results = {result.task: result for result in run_tasks(base, names, str(tasks), None, None, as_chat=False)}
    assert torch.equal(torch.random.get_rng_state(), random)
    ours = answer_questions(read_questions(str(tasks / "copa.jsonl")), DecoderScorer(base.model), base.tokenizer)
    assert 0 < ours["acc"].value < 1
    for name, metric in ours.items():
        assert results["local_copa"].metrics[name] == pytest.approx(metric)
    assert results["local_copa"].settings["num_fewshot"] == 0
    assert results["local_copa"].note == "24 of 24 questions, 0-shot"
    assert 0 < results["local_text"].metrics["bits_per_byte"].value < 20
    assert results["local_answers"].metrics["exact_match"].value == 0


def test_few_shot_questions_can_be_asked_in_a_conversation(chat, tasks):
    (result,) = run_tasks(chat, ["local_copa"], str(tasks), 1, 4, as_chat=True)
    assert result.settings | {"lm_eval": ""} == {
        "num_fewshot": 1, "version": "1.0", "limit": 4, "chat_template": True, "lm_eval": "",
    }  # fmt: skip
    assert 0 <= result.metrics["acc"].value <= 1


def test_a_task_that_cannot_be_loaded_is_an_error_of_one_line(base, tasks, monkeypatch):
    broken = {"task": "local_broken", "dataset_path": "json", "dataset_kwargs": {"data_files": "no.jsonl"}}
    (tasks / "local_broken.yaml").write_text(yaml.safe_dump(broken | {"test_split": "test"}))
    monkeypatch.chdir(tasks)
    with pytest.raises(UserError, match="--tasks local_broken: a task cannot be loaded: ") as raised:
        run_tasks(base, ["local_broken"], ".", None, None, as_chat=False)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_an_unknown_task_is_an_error_with_similar_names(base):
    with pytest.raises(UserError, match=r"there is no such task; similar: .*copa_ca"):
        run_tasks(base, ["copa_cat"], None, None, None, as_chat=False)
