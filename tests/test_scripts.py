"""The scripts around the package, where they can be tested without measuring."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cucafera.composition import composed_config
from cucafera.data.order import permutation
from cucafera.data.shards import HEADER_BYTES, TokenStream
from cucafera.data.windows import Batch
from cucafera.model.flops import parameter_count
from tests.test_readme import load_script


@pytest.mark.parametrize("peer", ["bare loop", "original", "Hugging Face"])
def test_the_peers_of_the_speed_benchmark_are_the_same_model(peer):
    config = composed_config(["model.vocab_size=320", "model.num_hidden_layers=2"]).model
    torch.manual_seed(0)
    model, loss_of = load_script("benchmark_training").LOOPS[peer](config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config)
    ids = torch.randint(10, 320, (2, 65))
    loss = loss_of(Batch(ids[:, :-1], ids[:, 1:], None, None))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if peer != "original":  # it is measured only, and keeps PyTorch's larger initial weights
        assert loss.item() == pytest.approx(math.log(320), rel=0.05)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what a process reads")
def test_a_stream_of_a_billion_tokens_opens_by_its_headers_and_takes_no_memory_to_read(tmp_path):
    script = load_script("benchmark_data")
    script.write_zeros(tmp_path / "s", 1_000_000_000)
    files = list((tmp_path / "s").iterdir())
    assert sum(file.stat().st_size for file in files) > 2e9 > 1e3 * sum(512 * file.stat().st_blocks for file in files)
    before = script.bytes_read()
    stream = TokenStream.open(tmp_path / "s", "benchmark", 65_536)
    assert len(stream) == 1_000_000_000
    assert script.bytes_read() - before < 10 * HEADER_BYTES + 10_000

    windows = permutation(np.arange(2000), len(stream) // 2048, key=0)
    stream.read(0, 2049)
    memory = script.memory()
    for window in windows:
        stream.read(int(window) * 2048, 2049)
    assert script.bytes_read() - before > 5e8  # whole blocks were verified
    assert script.memory()["VmRSS"] < memory["VmRSS"] + 5


def two_writers():
    """The script, its model, and the writers of both sides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    script = load_script("benchmark_generation")
    config = composed_config(["model.vocab_size=320", "model.num_hidden_layers=2"]).model
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**dataclasses.asdict(config), tie_word_embeddings=True)).eval()
    model = script.Decoder(config).eval()
    model.load_state_dict(theirs.model.state_dict())
    return script, model, {"cucafera": script.ours(model), "Hugging Face": script.hugging_face(theirs, compiled=False)}


def test_the_benchmark_of_writing_sees_that_its_peers_write_the_same():
    script, model, peers = two_writers()
    with pytest.raises(script.NotThereError, match="no --gguf"):
        script.llama_cpp(None, model.config, torch.device("cpu"))

    def not_there(prompts, tokens):
        raise script.NotThereError("not here")

    rows, missing = script.measure(peers | {"llama.cpp": not_there}, model, batch=2, length=9, tokens=5, rounds=2)
    assert missing == {"llama.cpp": "batch 2: not here"}
    assert [(row.peer, row.agreement, len(row.first), len(row.rest)) for row in rows] == [
        ("cucafera", "the same tokens", 2, 2), ("Hugging Face", "the same tokens", 2, 2)
    ]  # fmt: skip
    assert script.table(rows, 5).count("the same tokens") == 2


def test_the_benchmark_of_writing_forgives_rounding_and_nothing_else(monkeypatch):
    script, model, peers = two_writers()
    prompts = [[20, 30, 40], [50, 60, 70]]
    texts = peers["cucafera"](prompts, 6).texts
    other = [texts[0], [*texts[1][:4], (texts[1][4] + 1) % 320, 5]]
    with pytest.raises(SystemExit, match="not the same model: text 2 differs from token 5 on"):
        script.agreement(model, prompts, texts, other)
    monkeypatch.setattr(script, "ROUNDING", 10)
    assert script.agreement(model, prompts, texts, other).startswith("text 2 differs from token 5 on, logits ")
