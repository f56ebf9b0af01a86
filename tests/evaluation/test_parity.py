"""The same metrics from transformers, and from the harness's own backend, on the exported model."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cucafera.config.schema import SamplingConfig
from cucafera.evaluation.evaluated_model import EvaluatedModel, load_evaluated_model
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.perplexity import score_texts
from cucafera.evaluation.texts import read_texts
from cucafera.interop.hugging_face import write_folder


def export(evaluated: EvaluatedModel, folder: Path) -> Path:
    folder.mkdir()
    write_folder(evaluated.model, evaluated.tokenizer, evaluated.chats, SamplingConfig(), "fp32", folder)
    return folder


@pytest.fixture
def exported(base: EvaluatedModel, tmp_path: Path) -> Path:
    return export(base, tmp_path / "hf")


def bits_per_byte(folder: Path, texts: list[str], stride: int) -> float:
    """Compute bpb from transformers' loss with labels, window by window, as in its guide to perplexity."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    context, nats = model.config.max_position_embeddings, 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        scored = 1
        while scored < ids.shape[1]:
            end = min(context if scored == 1 else scored + stride, ids.shape[1])
            window = ids[:, max(0, end - context) : end]
            labels = window.clone()
            labels[:, : -(end - scored)] = -100
            with torch.no_grad():
                nats += model(window, labels=labels).loss.item() * (end - scored)
            scored = end
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("stride", [16, 64, 127])
def test_bits_per_byte_equal_transformers_on_the_exported_model(base, exported, runs, stride):
    texts = read_texts("corpus.jsonl", "text", 12, base.tokenizer)
    ours = score_texts(DecoderScorer(base.model), texts, stride).metrics()["bpb"].value
    documents = [json.loads(line)["text"] for line in (runs / "corpus.jsonl").read_text("utf-8").splitlines()[:12]]
    assert max(len(base.tokenizer.encode(document)) for document in documents) > 128
    assert ours == pytest.approx(bits_per_byte(exported, documents, stride), rel=1e-5)


def test_an_exported_model_measures_the_same_as_its_run(base, exported):
    loaded = load_evaluated_model(str(exported), torch.device("cpu"))
    assert (loaded.run, loaded.step) == (None, None)
    scores = [
        score_texts(DecoderScorer(evaluated.model), read_texts("corpus.jsonl", "text", 5, evaluated.tokenizer), 64)
        for evaluated in (base, loaded)
    ]
    assert scores[0] == dataclasses.replace(scores[1], nats=pytest.approx(scores[1].nats, rel=1e-7))


@pytest.fixture
def harness_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Task files: multiple choice, and answers that are generated after a given beginning."""
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
    words = ["la mar", "el bosc", "un gat", "l'àvia"]
    rows = [
        {"context": f"{one} i {other} ", "choices": [f"{word} canta" for word in words] + ["  no"], "answer": number}
        for number, one in enumerate(words)
        for other in words
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = {
        "output_type": "multiple_choice",
        "description": "Tria.",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    begun = {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{choices[answer]}}",
        "gen_prefix": "Crec que ",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, task in {"local_choice": choice, "local_begun": begun}.items():
        common = {"task": name, "dataset_path": "json", "test_split": "test", "fewshot_split": "test"}
        data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "metadata": {"version": 1.0}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(common | data | task))
    return [str(tmp_path / f"{name}.yaml") for name in ("local_choice", "local_begun")]


ASKED = {
    "a base model with an instruction": ("base", {"num_fewshot": 2, "system_instruction": "Ets útil. "}, {}),
    "a chat model in plain text": ("chat", {}, {"add_bos_token": True}),
    "in a conversation with examples as turns": (
        "chat", {"as_chat": True, "num_fewshot": 2, "system_instruction": "Ets útil."}, {},
    ),
    "in a conversation with examples in the question": (
        "chat", {"as_chat": True, "num_fewshot": 2, "fewshot_as_multiturn": False}, {},
    ),
}  # fmt: skip
"""By name: the model, how it is asked, and what the harness's own backend needs for the same."""


@pytest.mark.parametrize("way", ASKED)
def test_the_harness_agrees_with_its_own_backend_on_the_exported_model(
    way, harness_tasks, tmp_path, request, monkeypatch
):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from cucafera.evaluation import harness
    from cucafera.evaluation.tasks import load_tasks

    name, asked, backend = ASKED[way]
    evaluated = request.getfixturevalue(name)
    settings = harness.TaskSettings(limit=6, **asked)
    answered = {}
    for method in ("loglikelihood", "generate_until"):
        answer = getattr(harness.HarnessModel, method)

        def recorded(model, requests, answer=answer, method=method):
            answers = answer(model, requests)
            answered.update(
                {
                    (method, *(str(part) for part in one.args)): given
                    for one, given in zip(requests, answers, strict=True)
                }
            )
            return answers

        monkeypatch.setattr(harness.HarnessModel, method, recorded)
    # Settings of generation in the folder come before those of a task.
    folder = export(evaluated, tmp_path / "hf")
    generation = json.loads((folder / "generation_config.json").read_text())
    kept = {key: generation[key] for key in generation if key not in ("max_new_tokens", "repetition_penalty")}
    (folder / "generation_config.json").write_text(json.dumps(kept))
    ours = {result.task: result for result in harness.run_tasks(evaluated, load_tasks(harness_tasks, None), settings)}
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32", **backend},
        tasks=harness_tasks,
        task_manager=TaskManager(include_defaults=False),  # indexing all tasks takes long
        device="cpu",
        limit=6,
        num_fewshot=settings.num_fewshot,
        apply_chat_template=settings.as_chat,
        system_instruction=settings.system_instruction,
        fewshot_as_multiturn=settings.as_chat and settings.fewshot_as_multiturn,
    )
    for task, metrics in {"local_choice": ("acc", "acc_norm"), "local_begun": ("exact_match",)}.items():
        figures = theirs["results"][task]
        for metric in metrics:
            assert ours[task].metrics[metric].value == pytest.approx(figures[f"{metric},none"])
            assert ours[task].metrics[metric].stderr == pytest.approx(figures[f"{metric}_stderr,none"])
    compared = 0
    for sample in theirs["samples"]["local_choice"]:
        for pair, given in zip(sample["arguments"], sample["resps"], strict=True):
            nats, is_greedy = answered["loglikelihood", *pair]
            assert (nats, is_greedy) == (pytest.approx(given[0][0], abs=1e-4), given[0][1])
            compared += 1
    for sample in theirs["samples"]["local_begun"]:
        prompt, how = sample["arguments"][0]
        assert answered["generate_until", prompt, str(how)] == sample["resps"][0][0]
        compared += 1
    assert compared == len(answered) == 6 * 5 + 6
