"""lm-evaluation-harness over HTTP: its client for OpenAI's API measures what the harness measures directly."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="the harness's client for APIs needs lm-eval[api]")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from cucafera.evaluation.evaluated_model import load_evaluated_model
from cucafera.evaluation.harness import HarnessModel
from tests.serving.conftest import RunningServer

CONTEXTS = ["", "la mar", "la mar i el bosc ", "Pregunta: què té el gat?\nResposta:", "el sol. " * 20]
CONTINUATIONS = [" és gran", "i el vent", "dorm", " x"]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def over_http(base: RunningServer, tokenizer: Path, add_bos_token: bool) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url=f"{base.url}/v1/completions", model="base", tokenizer_backend="huggingface", tokenizer=str(tokenizer),
        add_bos_token=add_bos_token, max_length=base.service.model.context, batch_size=3, max_retries=1,
    )  # fmt: skip


def test_every_request_over_http_equals_the_direct_one(runs, base, tmp_path, monkeypatch):
    monkeypatch.chdir(runs)
    evaluated = load_evaluated_model("outputs/base", torch.device("cpu"))
    evaluated.tokenizer.save(tmp_path / "tokenizer.json", begins_documents=True)  # as an export has it
    shutil.copy(runs / "outputs" / "base" / "tokenizer_config.json", tmp_path)
    direct, client = HarnessModel(evaluated), over_http(base, tmp_path, add_bos_token=True)
    requests = instances("loglikelihood", [(a, b) for a in CONTEXTS for b in CONTINUATIONS])
    expected, measured = direct.loglikelihood(requests, disable_tqdm=True), client.loglikelihood(requests)
    assert [nats for nats, _ in measured] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in measured] == [greedy for _, greedy in expected]
    settings = {"until": [".", "\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = instances("generate_until", [(context, dict(settings)) for context in CONTEXTS if context])
    assert client.generate_until(prompts) == direct.generate_until(prompts)
    texts = instances("loglikelihood_rolling", [("la mar i el bosc.",), ("el sol és difícil",)])
    rolling = over_http(base, tmp_path, add_bos_token=False)  # for these the client itself adds the document start
    assert rolling.loglikelihood_rolling(texts) == pytest.approx(direct.loglikelihood_rolling(texts), abs=1e-4)
