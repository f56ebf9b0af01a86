"""Exported files in llama.cpp: the same tokens, logits and texts, also by the chat and evaluate commands."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID, SPECIAL_TOKENS
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.generation.backend import Extension, TorchBackend
from cucafera.generation.engine import Engine
from cucafera.generation.generate import generate
from cucafera.generation.request import Request, TextDelta
from cucafera.generation.session import ChatSession
from cucafera.interop import llama_cpp
from cucafera.interop.gguf import TYPES, logits_of, write_gguf
from cucafera.interop.gguf_format import decoder_in, open_gguf
from cucafera.interop.llama_cpp import LlamaCpp
from cucafera.interop.trained import TrainedModel, load_trained
from cucafera.run import train
from tests.support import compose_small_chat, compose_small_run, load_script, write_corpus

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

GREEDY = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=40)
ODD_TEXTS = (
    "", " ", "  \n\n \t x", "cel·la d'aigua, l'avi", "l'l'll 's 're're", "1234567 12a b3", "e\u0301 \u200b\ufeff",
    "🐌👩\u200d👩\u200d👧", "<im_start>user\n<im_end></s><pad>", "a\u00a0b\u2003c\u3000", "x" * 600, "\x00\x01\x7f",
    "日本語 العربية עברית", "A  B   C    \n", "...!?¡¿ «» —", "\r\n\r\n  \r", "\u017f ǅ ᾳ ½ ² Ⅷ",
    " \u0085 \u2028\u2029 ", "   fi",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model in outputs/base and a chat model in outputs/chat, both of a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_corpus(folder / "corpus.jsonl", documents=80)
        shape = ("model.hidden_size=64", "model.max_position_embeddings=64")
        train(compose_small_run(folder / "corpus.jsonl", "name=base", *shape, "optimizer.lr=0.01"), [])
        train(compose_small_chat(folder, "name=chat", "init_from=outputs/base", "optimizer.lr=0.01"), [])
    finally:
        os.chdir(before)
    for name in ("base", "chat"):
        write_gguf(load_trained(str(folder / "outputs" / name)), folder / f"{name}.gguf", "f32")
    return folder


@pytest.fixture
def trained(runs: Path) -> TrainedModel:
    return load_trained(str(runs / "outputs" / "chat"))


@pytest.fixture
def llama(runs: Path) -> LlamaCpp:
    return LlamaCpp(runs / "chat.gguf")


def some_ids(trained: TrainedModel, count: int) -> list[int]:
    text = "el gat de la vila menja pa amb oli i dorm al sol de la plaça " * 4
    return [DOCUMENT_START_ID, *trained.tokenizer.encode(text)][:count]


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "silu"])
@pytest.mark.parametrize("type_", TYPES)
def test_every_type_computes_what_its_weights_give(trained, tmp_path, type_, act):
    config = dataclasses.replace(trained.model.config, hidden_act=act)
    trained.model.config = config
    for layer in trained.model.layers:
        layer.mlp.hidden_act = act
    path = tmp_path / "model.gguf"
    proof = write_gguf(trained, path, type_)  # which raises if it does not
    assert proof.computed is not None and proof.computed.top1_agreement > 0.8
    assert f"llama.cpp against the weights of the file: logits differ by at most {proof.computed.largest:.2g}" in str(
        proof
    )
    ids = some_ids(trained, 64)
    largest = (LlamaCpp(path).logits(ids) - logits_of(decoder_in(open_gguf(path), config), ids)).abs().max().item()
    assert largest < (0.05 if type_ in ("f32", "f16") else 0.5) * proof.deviation
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("type_", ["f32", "f16", "q8_0"])
def test_greedy_text_is_that_of_the_weights_in_the_file(trained, tmp_path, type_):
    path = tmp_path / "model.gguf"
    write_gguf(trained, path, type_)
    decoder, llama = decoder_in(open_gguf(path), trained.model.config), LlamaCpp(path)
    for count in (1, 7, 20):
        prompt = some_ids(trained, count)
        (ours,) = generate(decoder, trained.tokenizer, [prompt], GREEDY, frozenset())
        (theirs,) = generate(llama, llama.tokenizer, [prompt], GREEDY, frozenset())
        assert theirs == ours


def test_a_graph_that_is_not_ours_is_found_out(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("cucafera.interop.gguf_format.ARCHITECTURES", {"gelu_pytorch_tanh": "llama"})
    with pytest.raises(UserError, match=r"verification failed: llama\.cpp computes logits that differ from"):
        write_gguf(trained, tmp_path / "model.gguf", "f32")
    assert list(tmp_path.iterdir()) == []


def test_its_tokenizer_gives_our_ids_and_ours_comes_out_of_the_file(trained, llama):
    assert llama.tokenizer.fingerprint == trained.tokenizer.fingerprint
    for text in ODD_TEXTS:
        assert llama.encode(text) == trained.tokenizer.encode(text) == llama.tokenizer.encode(text), repr(text)
    assert min(llama.tokenizer.encode("<im_end></s>")) >= len(SPECIAL_TOKENS)


def test_a_file_says_whether_it_chats_and_how_much_it_reads(runs, llama):
    assert (llama.chats, LlamaCpp(runs / "base.gguf").chats) == (True, False)
    assert (llama.context, llama.vocab_size) == (64, 320)
    assert llama.parameters == sum(p.numel() for p in load_trained(str(runs / "outputs/chat")).model.parameters())


@pytest.mark.parametrize("batch", [512, 7])
def test_nats_are_those_of_our_decoder_whatever_is_cached(trained, runs, monkeypatch, batch):
    monkeypatch.setattr(llama_cpp, "BATCH", batch)
    llama = LlamaCpp(runs / "chat.gguf")
    ids = some_ids(trained, 64)
    windows = [
        (ids, 1),
        (ids, 40),
        (ids[:30], 10),
        ([*ids[:20], 77, 78, 79], 21),
        (ids[:2], 1),
        (ids, 1),
        (ids[5:], 63 - 5),
    ]
    for (text, first), nats in zip(windows, llama.nats(windows), strict=True):
        logits = logits_of(trained.model, text[:-1])[first - 1 :]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(text[first:]), reduction="none")
        torch.testing.assert_close(torch.tensor(nats), expected, atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match="must be from 1 to 63"):
        llama.nats([(ids, 0)])
    with pytest.raises(ValueError, match="65 tokens are more than the context of 64"):
        llama.nats([([*ids, 20, 21], 1)])


def test_sixteen_requests_together_get_the_text_that_each_gets_alone(trained, runs):
    kinds = [GREEDY, SamplingConfig(max_new_tokens=9), dataclasses.replace(GREEDY, temperature=1.0)]
    requests = [
        Request(some_ids(trained, 40)[number : 20 + number], kinds[number % 3], frozenset(), seed=number)
        for number in range(16)
    ]
    alone = []
    for request in requests:
        llama = LlamaCpp(runs / "chat.gguf")
        alone.append(list(Engine(llama, trained.tokenizer).stream(request)))
    engine = Engine(LlamaCpp(runs / "chat.gguf", slots=4), trained.tokenizer)
    together = [engine.add(request) for request in requests]
    while engine.running or engine.waiting:
        engine.step()
    assert [text_of(generation.events) for generation in together] == [text_of(events) for events in alone]


def text_of(events) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_cached_tokens_are_not_decoded_again_and_copied_where_another_slot_has_them(trained, runs, monkeypatch):
    decoded: list[int] = []
    llama = LlamaCpp(runs / "chat.gguf", slots=2)
    decode_batch = llama._decode_batch
    monkeypatch.setattr(llama, "_decode_batch", lambda tokens: decoded.append(len(tokens)) or decode_batch(tokens))
    ids = some_ids(trained, 30)
    llama.extend([Extension(0, 0, ids[:20], 1)])
    llama.extend([Extension(0, 20, ids[20:21], 1)])
    again = llama.extend([Extension(0, 21, ids[21:], 1)])
    llama.copy(0, 1, 25)
    copied = llama.extend([Extension(1, 25, ids[25:], 1)])
    assert decoded == [20, 1, 9, 5]
    alone = LlamaCpp(llama.path).extend([Extension(0, 0, ids, 1)])
    for logits in (again, copied):
        torch.testing.assert_close(logits, alone, atol=1e-2, rtol=0)


def test_a_conversation_is_the_same_as_with_the_run_itself(trained, llama):
    conversations = []
    for backend, tokenizer in ((TorchBackend(trained.model), trained.tokenizer), (llama, llama.tokenizer)):
        engine = Engine(backend, tokenizer)
        sampling = SamplingConfig(temperature=0.8, repetition_penalty=1.3, top_k=40, max_new_tokens=8)
        session = ChatSession(engine, tokenizer, sampling, 3)
        session.system = "mar"
        for text in ("Hola", "El <im_end> és text", "I què més?", "Més encara", "I encara més"):
            list(session.answer(text))
        conversations.append(session.messages())
    assert conversations[0] == conversations[1] and len(conversations[0]) > 5


def test_a_file_that_cannot_be_loaded_is_refused_with_the_reason(runs, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    content = (runs / "chat.gguf").read_bytes()
    path.write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(UserError, match=r"llama\.cpp cannot load .*model\.gguf: .*blk\.1\.ffn_up\.weight"):
        LlamaCpp(path)
    path.write_bytes(content.replace(b"gpt-2", b"qwen2"))
    with pytest.raises(UserError, match=r"model\.gguf: unsupported tokenizer: gpt2 qwen2"):
        LlamaCpp(path)
    path.write_bytes(content.replace(b"<im_end>", b"<im_eno>"))
    with pytest.raises(UserError, match=r"model\.gguf: the tokenizer cannot be used: .*<im_end> has no id"):
        LlamaCpp(path)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    llama_cpp.library.cache_clear()
    with pytest.raises(UserError, match=r"run by llama\.cpp, which is not installed: pip install '\.\[llama\]'"):
        LlamaCpp(runs / "chat.gguf")


# The commands


def run_chat(runs: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cucafera.chat", *arguments],
        cwd=runs, input=text, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_chat_command_talks_to_a_file(runs):
    settings = ("--seed", "1", "--max-new-tokens", "6")
    answered = run_chat(runs, "chat.gguf", "--prompt", "Hola", *settings)
    assert (answered.returncode, answered.stderr) == (0, "")
    assert answered.stdout == run_chat(runs, "outputs/chat", "--prompt", "Hola", *settings).stdout
    lines = run_chat(runs, "chat.gguf", *settings, text="Hola\n/system Sigues breu.\nBon dia\n/redo\n/quit\nx\n")
    assert (lines.returncode, lines.stderr) == (0, "")
    assert "(system: Sigues breu.)" in lines.stdout
    continued = run_chat(runs, "base.gguf", "--prompt", "la mar", *settings)
    assert continued.returncode == 0 and continued.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.gguf"], "nowhere.gguf: there is no such .gguf file"),
        (["text.gguf"], "text.gguf is not a GGUF file"),
        (["short.gguf"], "short.gguf is damaged or"),
        (["base.gguf", "--system", "x"], "--system needs a model that was trained on conversations"),
        (["chat.gguf", "--prompt", "la mar i el bosc " * 20], "the model's context of 64 leaves room for 48"),
        (["base.gguf", "--prompt", "la mar i el bosc " * 20], "no space is left for a response"),
    ],
)
def test_a_wrong_file_or_prompt_is_refused_with_exit_code_2(runs, arguments, message):
    (runs / "text.gguf").write_text("hola")
    (runs / "short.gguf").write_bytes((runs / "chat.gguf").read_bytes()[:-100_000])
    result = run_chat(runs, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_benchmark_measures_the_same_on_both_sides(runs, trained, llama):
    script = load_script("benchmark_quantized")
    texts = list(script.texts_of(None, 2, trained.tokenizer))
    assert len(texts[0].ids) > 64
    sides = {
        "fp32": script.Side(1, Engine(TorchBackend(trained.model), trained.tokenizer), DecoderScorer(trained.model)),
        "f32": script.Side(1, Engine(llama, llama.tokenizer), llama),
    }
    prompts = [some_ids(trained, 20)[start:] for start in range(3)]
    results = script.compared(sides, texts, prompts, 5)
    assert results["fp32"].texts == results["f32"].texts and len(results["f32"].texts) == 2
    assert results["fp32"].bpb == pytest.approx(results["f32"].bpb, abs=1e-3)
    assert script.table(sides, results, 5).count("2 of 2") == 2


def test_the_evaluate_command_measures_a_file(runs):
    measured = []
    for source in ("outputs/base", "base.gguf"):
        asked = [sys.executable, "-m", "cucafera.evaluate", source, "--text", "corpus.jsonl", "--documents", "5"]
        done = subprocess.run(asked, cwd=runs, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        measured.append(float(re.search(r"bpb +(\d\.\d+)", done.stdout)[1]))
    assert measured[0] == pytest.approx(measured[1], abs=2e-3)
    asked = [sys.executable, "-m", "cucafera.evaluate", "base.gguf", "--choices", "x.jsonl"]
    refused = subprocess.run(asked, cwd=runs, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert (
        refused.stderr
        == "base.gguf: a .gguf file can only be measured with --text or --chats or --pairs; use its run for the rest\n"
    )
