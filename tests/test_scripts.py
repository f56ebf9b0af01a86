"""The scripts around the package, where they can be tested without measuring."""

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
    loss = loss_of(Batch(ids[:, :-1], ids[:, 1:], None))
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
