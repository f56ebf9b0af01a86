"""GGUF files, read by the package gguf, transformers and Jinja."""

import dataclasses
import json
import math
import os
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerFast

from cucafera.config.errors import UserError
from cucafera.config.schema import ModelConfig
from cucafera.config.tokens import SPECIAL_TOKENS
from cucafera.data.chatml import CHAT_TEMPLATE
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop import gguf as export
from cucafera.interop.gguf import TYPES, LogitDifference, logits_of, verification_texts, write_gguf
from cucafera.interop.gguf_format import context_in, decoder_in, open_gguf, tokenizer_in
from cucafera.interop.trained import TrainedModel
from cucafera.model.transformer import Decoder
from tests.support import WORDS

gguf = pytest.importorskip("gguf")

CONFIG = ModelConfig(
    vocab_size=340, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=48, rope_theta=5000.0, initializer_range=0.2,
)  # fmt: skip
CONVERSATION = [
    {"role": "system", "content": "Sigues breu."},
    {"role": "user", "content": " Què és <im_end>? \n"},
    {"role": "assistant", "content": "Un senyal.\n\nI prou. "},
    {"role": "user", "content": "Gràcies"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS)] * 3, vocab_size=330)


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide llama.cpp, also if it is installed."""
    monkeypatch.setattr(export, "is_installed", lambda: False)


def trained_model(tokenizer: Tokenizer, chats: bool = False, **settings) -> TrainedModel:
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(CONFIG, **settings))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    checkpoint = Path("outputs/barca/checkpoints/step-7.ckpt")
    return TrainedModel(model.eval().requires_grad_(False), tokenizer, checkpoint, None, 7, chats)


def some_ids(trained: TrainedModel) -> list[int]:
    return next(iter(verification_texts(trained)))


@pytest.mark.parametrize(("type_", "most"), [("f32", 1e-4), ("f16", 0.05), ("bf16", 0.3), ("q8_0", 1)])
def test_transformers_gemma_computes_the_same_with_the_tensors_of_a_geglu_model(tokenizer, tmp_path, type_, most):
    trained = trained_model(tokenizer)
    verification = write_gguf(trained, tmp_path / "model.gguf", type_)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("general.architecture").contents() == "gemma"

    theirs = GemmaForCausalLM(GemmaConfig(
        **{key: getattr(CONFIG, key) for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta",
        )},
        head_dim=16, hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True,
    )).eval()  # fmt: skip
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for tensor in reader.tensors:
        *before, name, _ = tensor.name.split(".")
        layer = f"model.layers.{before[1]}." if before else ""
        value = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        state[f"{layer}{names[name]}.weight"] = (
            value - 1 if value.ndim == 1 else value
        )  # theirs multiplies by 1 + weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)

    ids = some_ids(trained)
    with torch.inference_mode():
        expected = logits_of(trained.model, ids)
        difference = (theirs(torch.tensor([ids])).logits[0] - expected).abs().max().item()
    assert difference <= most * verification.deviation
    assert verification.stored.largest == pytest.approx(difference, abs=1e-4)
    assert verification.deviation == pytest.approx(expected.std().item(), rel=1e-3)
    assert (verification.positions, verification.size) == (48, (tmp_path / "model.gguf").stat().st_size)
    assert verification.matrices == {type_: 15}


def test_transformers_loads_the_file_of_a_swiglu_model(tokenizer, tmp_path):
    trained = trained_model(tokenizer, hidden_act="silu")
    write_gguf(trained, tmp_path / "model.gguf", "f32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = some_ids(trained)
    with torch.inference_mode():
        torch.testing.assert_close(
            theirs(torch.tensor([ids])).logits[0], logits_of(trained.model, ids), atol=1e-4, rtol=0
        )


def test_the_metadata_describes_the_model(tokenizer, tmp_path):
    for chats in (False, True):
        write_gguf(trained_model(tokenizer, chats), tmp_path / "model.gguf", "f16")
        reader = gguf.GGUFReader(tmp_path / "model.gguf")
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        assert (metadata["general.name"], metadata["general.languages"]) == ("model", ["ca"])
        assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
        assert "general.license" not in metadata
        assert {key.removeprefix("gemma."): value for key, value in metadata.items() if key.startswith("gemma.")} == {
            "context_length": 48, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
            "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
            "attention.value_length": 16, "rope.dimension_count": 16, "rope.freq_base": 5000.0,
            "attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "vocab_size": 340,
        }  # fmt: skip
        named = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
        assert (named["model"], named["pre"]) == ("gpt2", "gpt-2")
        assert named["tokens"][:330] == tokenizer.tokens and named["merges"] == tokenizer.merges
        assert named["tokens"][:10] == list(SPECIAL_TOKENS)
        assert len(set(named["tokens"])) == 340
        assert named["token_type"] == [3] * 10 + [1] * 320 + [5] * 10
        ids = [named[f"{kind}_token_id"] for kind in ("bos", "eos", "eot", "padding", "unknown")]
        end = "<im_end>" if chats else "</s>"
        assert [SPECIAL_TOKENS[token] for token in ids] == ["</s>", end, "<im_end>", "<pad>", "<unk>"]
        assert named["add_bos_token"] is not chats
        assert ("tokenizer.chat_template" in metadata) is chats
        vectors = [tensor for tensor in reader.tensors if len(tensor.shape) == 1]
        assert len(vectors) == 5 and all(tensor.tensor_type.name == "F32" for tensor in vectors)


def test_the_chat_template_renders_the_same_without_transformers(tokenizer, tmp_path):
    write_gguf(trained_model(tokenizer, chats=True), tmp_path / "model.gguf", "f16")
    template = gguf.GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.chat_template").contents()
    assert "generation %}" not in template
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=CHAT_TEMPLATE)
    compiled = jinja2.Environment().from_string(template)
    for messages, asks in ((CONVERSATION, True), (CONVERSATION[:3], False)):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        assert compiled.render(messages=messages, add_generation_prompt=asks) == expected


def test_the_tokenizer_is_restored(tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(trained_model(tokenizer), path, "f16")
    again = tokenizer_in(open_gguf(path), path)
    assert again.fingerprint == tokenizer.fingerprint
    text = "cel·la <im_end> 🐌 d'aigua\n\n  i prou"
    assert again.encode(text) == tokenizer.encode(text)


def test_rows_that_are_not_a_multiple_of_a_block_stay_in_half_precision(tokenizer, tmp_path):
    verification = write_gguf(trained_model(tokenizer, hidden_size=48), tmp_path / "model.gguf", "q8_0")
    assert verification.matrices == {"f16": 13, "q8_0": 2}  # down_proj has rows of 96
    assert "matrices: 13 f16, 2 q8_0" in str(verification)
    assert "llama.cpp against the weights of the file: not verified: it is not installed" in str(verification)


# Refusals


def test_an_unsupported_activation_or_type_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"unsupported model: model\.hidden_act=gelu \(llama\.cpp computes"):
        write_gguf(trained_model(tokenizer, hidden_act="gelu"), tmp_path / "model.gguf", "f32")
    with pytest.raises(UserError, match="there is no type q3: choose one of f32, f16, bf16, q8_0, q4_0"):
        write_gguf(trained_model(tokenizer), tmp_path / "model.gguf", "q3")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_ignore_merges_is_refused(tokenizer, tmp_path):
    described = json.loads(tokenizer._inner.to_str())
    described["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    other = Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="ignore_merges"):
        write_gguf(trained_model(other), tmp_path / "model.gguf", "f32")
    assert not list(tmp_path.glob("model*"))


def test_quantizing_needs_llama_cpp_or_its_program(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("cucafera.interop.llama_cpp.is_installed", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"q4_k_m needs llama\.cpp: pip install '\.\[llama\]', or put"):
        write_gguf(trained_model(tokenizer), tmp_path / "model.gguf", "q4_k_m")
    program = tmp_path / "llama-quantize"
    program.write_text("#!/bin/sh\necho it does not like $3 >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match="it does not like Q4_K_M"):
        write_gguf(trained_model(tokenizer), tmp_path / "model.gguf", "q4_k_m")
    assert list(tmp_path.iterdir()) == [program]


def test_a_file_with_other_logits_is_not_written(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_text("an earlier file")
    honest = export.stored_weights

    def wrong(model):
        for weight in honest(model):
            yield weight._replace(value=weight.value * (1.01 if "ffn_up" in weight.gguf_name else 1))

    monkeypatch.setattr(export, "stored_weights", wrong)
    with pytest.raises(UserError, match=r"not written, because verification failed: its weights give logits"):
        write_gguf(trained_model(tokenizer), path, "f32")
    assert path.read_text() == "an earlier file"
    assert list(tmp_path.iterdir()) == [path]


def test_nonfinite_weights_are_refused(tokenizer, tmp_path):
    trained = trained_model(tokenizer)
    trained.model.norm.weight[3] = math.nan
    with pytest.raises(UserError, match="differ from the model's by up to nan"):
        write_gguf(trained, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("type_", ["f32", "q4_0"])
def test_an_interrupted_write_leaves_nothing(tokenizer, tmp_path, monkeypatch, type_):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "verify", interrupted)
    monkeypatch.setattr(export, "quantize", interrupted)
    monkeypatch.setattr(export, "check_quantizer", lambda name: None)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(trained_model(tokenizer), tmp_path / "model.gguf", type_)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/model\.gguf cannot be written: No such file or directory"):
        write_gguf(trained_model(tokenizer), tmp_path / "nowhere" / "model.gguf", "f32")
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        write_gguf(trained_model(tokenizer), tmp_path, "f32")


def test_damaged_and_truncated_files_are_errors(tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(UserError, match=r"model\.gguf cannot be read: No such file"):
        open_gguf(path)
    path.write_text("GG")
    with pytest.raises(UserError, match=r"model\.gguf is not a GGUF file"):
        open_gguf(path)
    write_gguf(trained_model(tokenizer), path, "f32")
    content = path.read_bytes()
    for size in (4, 100, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"model\.gguf is damaged or truncated"):
            open_gguf(path)


def test_differences_are_those_of_all_texts_together():
    sums = export._DifferenceSums()
    sums.add(torch.tensor([[0.0, 3.0], [1.0, 0.0]]), torch.zeros(2, 2))
    sums.add(torch.tensor([[0.5, 0.0]]), torch.tensor([[0.0, 1.0]]))
    difference = sums.difference()
    assert (sums.positions, difference.largest) == (3, 3.0)
    assert difference.rms == pytest.approx(math.sqrt((9 + 1 + 0.25 + 1) / 6))
    assert difference.top1_agreement == pytest.approx(1 / 3)
    sums.add(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2))
    sums.add(torch.zeros(1, 2), torch.zeros(1, 2))
    assert math.isnan(sums.difference().largest)


def test_only_rounding_passes_verification():
    verification = export.Verification(
        "f16", 1, {}, 1, 2.0, LogitDifference(0.0, 0.0, 1.0), LogitDifference(0.05, 0.01, 1.0)
    )
    assert verification.problems() == []
    assert dataclasses.replace(verification, computed=LogitDifference(0.07, 0.01, 1.0)).problems()
    quantized = dataclasses.replace(verification, type_="q8_0", computed=LogitDifference(1.0, 0.19, 1.0))
    assert quantized.problems() == []
    assert dataclasses.replace(quantized, computed=LogitDifference(1.0, 0.21, 1.0)).problems()
    assert all(kind in (*export.NATIVE_TYPES, *export.LLAMA_CPP_TYPES) for kind in TYPES)


def test_a_file_whose_sizes_lie_is_damaged_and_read_in_few_steps(tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(trained_model(tokenizer, chats=True), path, "f16")
    content = path.read_bytes()
    position = content.index(b"tokenizer.ggml.token_type") + 25 + 8  # after the name, and the types of array and items
    for size in (2**62, 2**32, len(content)):
        path.write_bytes(content[:position] + size.to_bytes(8, "little") + content[position + 8 :])
        with pytest.raises(UserError, match="is damaged or truncated"):
            open_gguf(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is not a regular file"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            b"gemma.context_length\x04\0\0\0" + (48).to_bytes(4, "little"),
            b"gemma.context_length\x04\0\0\0" + b"\xff" * 4,
        ),
        (b"gemma.context_length\x04", b"gemma.context_length\x06"),  # a float
        (b"gemma.context_length", b"gemma.kontext_length"),
        (b"tokenizer.ggml.model\x08", b"tokenizer.ggml.model\x05"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez"),
    ],
)
def test_flipped_bits_in_a_header_are_an_error_in_one_line(tokenizer, tmp_path, old, new):
    path = tmp_path / "model.gguf"
    trained = trained_model(tokenizer)
    write_gguf(trained, path, "f16")
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(UserError) as refused:
        reader = open_gguf(path)
        restored = tokenizer_in(reader, path)
        context_in(reader)
        decoder_in(reader, trained.model.config)
        if restored.fingerprint != tokenizer.fingerprint:
            raise UserError("another tokenizer")
    assert "\n" not in str(refused.value)
