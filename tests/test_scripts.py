"""Scripts, as far as they can be tested without measuring."""

import argparse
import dataclasses
import json
import math
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cucafera.config.command_line import composed_config
from cucafera.data.order import permutation
from cucafera.data.shards import HEADER_BYTES, TokenStream
from cucafera.data.windows import Batch
from cucafera.model.flops import parameter_count
from cucafera.training.hardware import decide_hardware
from tests.support import ROOT, Process, load_script, run_command


def test_every_mutant_fits_the_code_and_its_tests_exist():
    script = load_script("mutants")
    mutants = script.read_list()
    assert len(mutants) > 100
    assert script.problems(mutants) == []


def test_a_mutant_that_does_not_fit_is_named(tmp_path):
    script = load_script("mutants")
    (tmp_path / "code.py").write_text("first = 1\nsecond = 1\n")
    (tmp_path / "test_code.py").write_text("def test_it():\n    pass\n")

    def found(before: str, after: str = "2", test: str = "test_code.py::test_it") -> list[str]:
        return script.problems([script.Mutant("wrong", "code.py", before, after, (test,))], tmp_path)

    assert found("first = 1") == []
    assert found("= 1") == ["wrong: code.py has '= 1' 2 times instead of once"]
    assert found("third") == ["wrong: code.py has 'third' 0 times instead of once"]
    assert found("first", "first") == ["wrong: changes nothing"]
    assert found("first", test="test_code.py::test_other") == ["wrong: there is no test_code.py::test_other"]
    assert found("first", test="test_none.py") == ["wrong: there is no test_none.py"]


def test_mutants_are_caught_or_survive_in_a_copy_that_is_restored(tmp_path, monkeypatch):
    script = load_script("mutants")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "doubling.py").write_text("def double(x):\n    return 2 * x  # twice\n")
    (checkout / "test_code.py").write_text("import doubling\ndef test_two():\n    assert doubling.double(2) == 4\n")
    subprocess.run(["git", "init", "-q", checkout], check=True)
    monkeypatch.setattr(script, "ROOT", checkout)
    mutants = [
        script.Mutant("thrice", "doubling.py", "2 * x", "3 * x", ("test_code.py",)),
        script.Mutant("two squared is four too", "doubling.py", "2 * x", "x**2", ("test_code.py",)),
        script.Mutant("it cannot be imported", "doubling.py", "def", "df", ("test_code.py",)),
    ]
    (tmp_path / "work").mkdir()
    copy = script.Copy(tmp_path / "work", seconds=60)
    results = list(script.measure(mutants, [copy]))
    assert [(result.name, result.status) for result in results] == [
        ("thrice", "caught"), ("two squared is four too", "survived"), ("it cannot be imported", "caught")
    ]  # fmt: skip
    assert (copy.root / "doubling.py").read_text() == (checkout / "doubling.py").read_text()
    table = script.table(results, mutants)
    assert table.startswith("2 of 3 mutants were caught (66.7%).")
    assert "| two squared is four too | doubling.py | survived |" in table and "thrice" not in table

    copy.seconds = 0.3
    copy.start(
        "slow", script.Mutant("slow", "doubling.py", "return", "__import__('time').sleep(60)\n    return", ()), ["."]
    )
    wait_until(lambda: (result := copy.result()) and result.status == "time limit")
    copy.seconds = 60
    (copy.root / "doubling.py").write_text("def double(x):\n    return 5\n")
    with pytest.raises(script.MutantError, match=r"fail without any mutant: FAILED test_code\.py::test_two"):
        list(script.measure(mutants[:1], [copy]))


def wait_until(happened):
    """Wait for something, for at most a minute."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("peer", ["bare loop", "original", "nanochat-like", "Hugging Face"])
def test_the_peers_of_the_speed_benchmark_are_the_same_model(peer):
    config = composed_config(["model.vocab_size=320", "model.num_hidden_layers=2", "trainer=cpu"])
    torch.manual_seed(0)
    model, loss_of = load_script("benchmark_training").LOOPS[peer](config.model, decide_hardware(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config.model)
    ids = torch.randint(10, 320, (2, 65))
    loss = loss_of(Batch(input_ids=ids[:, :-1], targets=ids[:, 1:], documents=None, document_counts=None))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert loss.item() == pytest.approx(math.log(320), rel=0.05)


@pytest.mark.parametrize("fused", [True, False])
def test_the_plain_peers_of_the_speed_benchmark_compute_the_same_loss(fused):
    script = load_script("benchmark_training")
    config = composed_config(["model.vocab_size=320", "model.num_hidden_layers=2", "trainer=cpu"])
    torch.manual_seed(0)
    ours, loss_of = script.bare_loop(config.model, decide_hardware(config))
    plain = script.PlainDecoder(config.model, fused)
    plain.embedding.weight.data = ours.embed_tokens.weight.data
    for theirs, block in zip(plain.blocks, ours.layers, strict=True):
        attention, mlp = block.self_attn, block.mlp
        theirs.query.weight.data = attention.q_proj.weight.data
        theirs.key_value.weight.data = torch.cat([attention.k_proj.weight.data, attention.v_proj.weight.data])
        theirs.out.weight.data = attention.o_proj.weight.data
        theirs.gate.weight.data, theirs.up.weight.data = mlp.gate_proj.weight.data, mlp.up_proj.weight.data
        theirs.down.weight.data = mlp.down_proj.weight.data
    ids = torch.randint(10, 320, (2, 65))
    batch = Batch(input_ids=ids[:, :-1], targets=ids[:, 1:], documents=None, document_counts=None)
    torch.testing.assert_close(plain(batch.input_ids, batch.targets), loss_of(batch), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(batch.input_ids, batch.targets).item() == pytest.approx(loss_of(batch).item(), rel=1e-2)


def results_of(script, measured):
    """Results of a setting with 1,000 tokens per step, from the step times of each row."""
    setup = {"model": "tiny", "parameters": 10, "device": "cpu", "matrix_flops": 1e9}
    facts = {"batch_tokens": 1000, "flops_per_token": 1e6, "causal_flops_per_token": 5e5}
    results = script.Results(setup, {"documents": facts})
    for name, rounds in measured.items():
        results.measurements["documents"][name] = [
            {"first_step_seconds": 9.0, "step_seconds": seconds, "peak_bytes": 1000, "micro_batch_windows": 4,
             "data_wait": 0.01 if name.startswith("cucafera") else None}
            for seconds in rounds
        ]  # fmt: skip
    return results


def test_the_speed_benchmark_compares_with_the_fastest_cucafera_row(tmp_path):
    script = load_script("benchmark_training")
    results = results_of(script, {"peer": [[3.0]], "cucafera, compiled": [[2.0], [2.0]], "cucafera": [[4.0], [4.0]]})
    results.skipped.append("round 2, documents: peer")
    rows = results.rows("documents")
    assert [(row["name"], row["tokens_per_second"]) for row in rows] == [
        ("cucafera, compiled", 500), ("peer", pytest.approx(1000 / 3)), ("cucafera", 250)
    ]  # fmt: skip
    assert [round(row["ratio"], 2) for row in rows] == [1.0, 0.67, 0.5]
    assert (rows[0]["mfu"], rows[0]["mfu_causal"]) == (0.5, 0.25)
    assert (
        "documents: 1,000 tokens per step; not masked" in results.report()
        and "round 2, documents: peer on" in results.report()
    )
    results.write(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["settings"]["documents"]["rows"] == rows


def test_the_speed_benchmark_masks_documents_for_cucafera_only(monkeypatch):
    script = load_script("benchmark_training")
    monkeypatch.setattr(script, "device_of", lambda arguments: "cuda")
    arguments = argparse.Namespace(model="cucafera", overrides=[], steps=4)

    def micro_batch_windows(setting, peer):
        config = script.configured(arguments, script.Measurement(setting, peer, True))
        assert config.data.document_masking == (setting == "documents") and config.trainer.compile is True
        assert int(config.batch_tokens) == {"windows": 65_536, "documents": 524_288}[setting]
        return config.trainer.micro_batch_windows

    for setting in script.SETTINGS:
        assert micro_batch_windows(setting, "cucafera") == (8 if setting == "windows" else "auto")
        assert micro_batch_windows(setting, "Hugging Face") == 8
        assert micro_batch_windows(setting, "original") == 4
    ids = torch.ones(2, 8, dtype=torch.int32)
    batch = Batch(input_ids=ids, targets=ids, documents=ids, document_counts=(1,) * len(ids))
    assert script.on_device(batch, torch.device("cpu"), is_ours=True).documents is not None
    theirs = script.on_device(batch, torch.device("cpu"), is_ours=False)
    assert theirs.documents is None and theirs.targets.dtype == torch.int64
    assert script.Measurement("documents", "litgpt", True).row == "litgpt, compiled (not masked)"


@pytest.mark.slow
def test_measurements_survive_the_time_limit_of_the_speed_benchmark(tmp_path):
    small = ["model.num_hidden_layers=1", "batch_tokens=256", f"data.prepared_dir={tmp_path}/prepared"]
    command = ["--rounds", "1", "--steps", "1", "--peer", "bare loop", "--peer", "cucafera", *small]
    script = [ROOT / "scripts" / "benchmark_training.py", *command, "--out", tmp_path / "speed"]
    process = Process(script, tmp_path, merged=False)
    assert "tokens/s" in process.outputs[0].readline()  # the first measurement is printed
    wait_until((tmp_path / "speed.json").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [row["name"] for row in found["settings"]["windows"]["rows"]] == ["bare loop"]

    ended = run_command(*script, "--seconds", "1")
    assert ended.returncode == 1 and "matrix products could not be measured: killed" in ended.stderr


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc/self/io of Linux")
def test_a_billion_tokens_open_by_their_headers_and_are_read_in_constant_memory(tmp_path):
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
    assert script.bytes_read() - before > 5e8  # complete blocks were verified
    assert script.memory()["VmRSS"] < memory["VmRSS"] + 5


def two_peers():
    """The script, its model, and two peers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    script = load_script("benchmark_generation")
    config = composed_config(["model.vocab_size=320", "model.num_hidden_layers=2"]).model
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**dataclasses.asdict(config), tie_word_embeddings=True)).eval()
    model = script.Decoder(config).eval()
    model.load_state_dict(theirs.model.state_dict())
    return script, model, {"cucafera": script.ours(model), "Hugging Face": script.hugging_face(theirs, compiled=False)}


def test_the_generation_benchmark_checks_that_peers_generate_the_same():
    script, model, peers = two_peers()
    with pytest.raises(script.MissingPeerError, match="no --gguf"):
        script.llama_cpp(None, model.config, torch.device("cpu"))

    def missing_peer(prompts, tokens):
        raise script.MissingPeerError("not installed")

    rows, missing = script.measure(peers | {"llama.cpp": missing_peer}, model, batch=2, length=9, tokens=5, rounds=2)
    assert missing == {"llama.cpp": "batch 2: not installed"}
    assert [(row.peer, row.agreement, len(row.first), len(row.rest)) for row in rows] == [
        ("cucafera", "the same tokens", 2, 2), ("Hugging Face", "the same tokens", 2, 2)
    ]  # fmt: skip
    assert script.table(rows, 5).count("the same tokens") == 2


def test_the_generation_benchmark_accepts_differences_by_rounding_only(monkeypatch):
    script, model, peers = two_peers()
    prompts = [[20, 30, 40], [50, 60, 70]]
    texts = peers["cucafera"](prompts, 6).texts
    other = [texts[0], [*texts[1][:4], (texts[1][4] + 1) % 320, 5]]
    with pytest.raises(SystemExit, match="not the same model: text 2 differs from token 5 on"):
        script.agreement(model, prompts, texts, other)
    monkeypatch.setattr(script, "ROUNDING", 10)
    assert script.agreement(model, prompts, texts, other).startswith("text 2 differs from token 5 on, logits ")


SMALL_PREFERENCE = argparse.Namespace(model="tiny", vocabulary=320, context=256)


def test_the_pairs_of_the_preference_benchmark_look_like_the_real_ones_and_fit_a_window():
    script = load_script("benchmark_preference")
    pairs = script.random_pairs(1000, 320, 1024)
    assert max(pair.tokens for pair in pairs) <= 1024 and max(pairs[0].prompt) < 320
    assert script.random_pairs(10, 320, 1024) == pairs[:10]
    for length, median in zip(zip(*(map(len, pair) for pair in pairs), strict=True), (22, 13, 12), strict=True):
        assert np.median(length) == pytest.approx(median, abs=2)
    assert 0.05 < np.mean([pair.tokens > 200 for pair in pairs]) < 0.1
    assert max(pair.tokens for pair in script.random_pairs(1000, 320, 100)) <= 100


def test_our_side_of_the_preference_benchmark_starts_at_the_reference_and_counts_every_pair():
    script = load_script("benchmark_preference")
    pairs = script.random_pairs(8, 320, 256)
    steps = script.our_steps(script.configured(SMALL_PREFERENCE), pairs, 2, 2)
    assert len(steps) == 2 and steps[0].loss == pytest.approx(math.log(2), abs=1e-6)
    packed = script.packed_pairs(pairs, 256)
    assert packed.kept == 8 and packed.targets == sum(len(pair.chosen + pair.rejected) for pair in pairs)
    assert packed.tokens == sum(pair.tokens - 2 for pair in pairs)


@pytest.mark.parametrize("helped", [False, True])
def test_both_sides_of_the_preference_benchmark_compute_the_same_losses(helped):
    pytest.importorskip("trl", reason="TRL is not installed")
    script = load_script("benchmark_preference")
    config = script.configured(SMALL_PREFERENCE)
    pairs = script.random_pairs(8, 320, 256)
    ours, theirs = script.our_steps(config, pairs, 3, 2), script.trl_steps(config, pairs, 3, 4, helped)
    assert [step.loss for step in ours] == pytest.approx([step.loss for step in theirs], abs=1e-5)
    assert ours[0].loss - ours[2].loss > 1e-3  # the steps change something


def test_the_preference_benchmark_compares_the_rounds_and_the_losses():
    script = load_script("benchmark_preference")

    def rounds(speeds, mebibytes, losses):
        facts = {"bytes_above_state": mebibytes * 2**20, "losses": losses}
        return [{"tokens_per_second": speed, "tokens_per_core_second": speed / 2, **facts} for speed in speeds]

    measurements = {
        script.Row("cucafera", 4): rounds([300, 100], 50, [0.7, 0.6]),
        script.Row("TRL", 1): rounds([100, 100], 200, [0.7, 0.5]),
    }
    assert script.largest_difference(measurements) == pytest.approx(0.1)
    ours, theirs = script.table(measurements).splitlines()[1:]
    assert ours.startswith("cucafera, 4 windows at a time ") and theirs.startswith("TRL, 1 pair at a time ")
    assert ours.split()[-9:-2] == ["200", "2.00x", "100", "2.00x", "50", "MiB", "0.25x"]
    assert theirs.split()[-9:] == ["100", "1.00x", "50", "1.00x", "200", "MiB", "1.00x", "0.700000", "0.500000"]
