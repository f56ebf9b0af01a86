"""The same metrics from transformers, and from the harness's own backend, on the exported model."""

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


@pytest.fixture
def exported(base: EvaluatedModel, tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    write_folder(base.model, base.tokenizer, base.chats, SamplingConfig(), "fp32", folder)
    return folder


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
    assert scores[0] == scores[1]


def test_the_harness_agrees_with_its_own_backend_on_the_exported_model(base, exported, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from cucafera.evaluation.harness import run_tasks

    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = ["la mar", "el bosc", "un gat", "la nit", "pa amb oli", "l'àvia"]
    rows = [
        {"context": f"{one} i {other}", "choices": [f"{word} canta" for word in words], "answer": number}
        for number, one in enumerate(words)
        for other in words
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }
    path = tmp_path / "local_choice.yaml"
    path.write_text(yaml.safe_dump(task))
    (ours,) = run_tasks(base, [str(path)], None, None, None, as_chat=False)
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(exported), "dtype": "float32"}, tasks=[str(path)], device="cpu"
    )
    figures = theirs["results"]["local_choice"]
    for name in ("acc", "acc_norm"):
        assert ours.metrics[name].value == pytest.approx(figures[f"{name},none"])
        assert ours.metrics[name].stderr == pytest.approx(figures[f"{name}_stderr,none"])
    from cucafera.evaluation.harness import HarnessModel

    samples = theirs["samples"]["local_choice"]
    asked = [(sample["doc"]["context"], f" {choice}") for sample in samples for choice in sample["doc"]["choices"]]
    likelihoods = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
    requests = [lm_eval.api.instance.Instance("loglikelihood", {}, pair, 0) for pair in asked]
    mine = [nats for nats, _ in HarnessModel(base).loglikelihood(requests, disable_tqdm=True)]
    assert len(mine) == 216 and mine == pytest.approx(likelihoods, abs=1e-4)
