"""Import from and export to Hugging Face: the same weights, token ids, logits and texts."""

import json
import os
import shutil
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.config.schema import ModelConfig, SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID, IM_START_ID
from cucafera.data.chatml import CHAT_TEMPLATE, Message, render, render_prompt
from cucafera.generation.backend import TorchBackend
from cucafera.generation.engine import Engine
from cucafera.generation.generate import generate
from cucafera.generation.request import TextDelta
from cucafera.generation.session import ChatSession
from cucafera.interop import hf_spec, hugging_face
from cucafera.interop.gemma import EMBEDDING, FINAL_NORM, from_transformers_gemma, to_transformers_gemma
from cucafera.interop.hf_spec import DEFAULTS, read_hf_spec
from cucafera.interop.hugging_face import ExportMismatchError, architecture_of, write_folder
from cucafera.interop.trained import load_trained
from cucafera.run import read_model_elsewhere, train
from tests.support import SMALL_RUN, change_config, full_tokenizer, small_llama

TEXT = "La plaça del poble és plena de gent, i l'àvia canta  una cançó.\n"


def exported(runs: Path, name: str, folder: Path, dtype: str = "fp32", architecture: str | None = None) -> Path:
    trained = load_trained(str(runs / "outputs" / name))
    folder.mkdir()
    sampling = SamplingConfig(max_new_tokens=16)
    write_folder(trained.model, trained.tokenizer, trained.chats, sampling, dtype, folder, architecture)
    return folder


@pytest.mark.parametrize(("name", "architecture"), [("base", "llama"), ("chat", "gemma")])
def test_export_and_import_give_the_same_model(runs, tmp_path, name, architecture):
    ours = load_trained(str(runs / "outputs" / name))
    folder = exported(runs, name, tmp_path / "hf", architecture=architecture)
    back = load_trained(str(folder))
    assert read_hf_spec(folder).architecture == architecture
    assert back.model.config == ours.model.config
    assert back.tokenizer.fingerprint == ours.tokenizer.fingerprint
    assert back.chats == ours.chats
    for key, value in ours.model.state_dict().items():
        rounding = 2**-23 if architecture == "gemma" and key in (EMBEDDING, FINAL_NORM) else 0
        torch.testing.assert_close(back.model.state_dict()[key], value, rtol=rounding, atol=0)
    again = tmp_path / "again"
    again.mkdir()
    write_folder(back.model, back.tokenizer, back.chats, SamplingConfig(), "fp32", again, architecture)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("size", [32, 48, 64, 768])
def test_weights_of_gemma_are_rounded_once_however_often_they_are_converted(size):
    vector = 0.01 + 4 * torch.rand(4096, generator=torch.Generator().manual_seed(size))
    for name in (EMBEDDING, FINAL_NORM, "layers.0.input_layernorm.weight"):
        values = vector[None] if name == EMBEDDING else vector
        stored = to_transformers_gemma(name, values, size)
        back = from_transformers_gemma(name, stored, size)
        assert torch.equal(to_transformers_gemma(name, back, size), stored)
        torch.testing.assert_close(back, values, rtol=2**-22, atol=2**-24)


def test_the_activation_decides_what_a_model_is_written_as():
    chosen = {
        activation: architecture_of(ModelConfig(hidden_act=activation), None)
        for activation in ("gelu_pytorch_tanh", "gelu", "silu")
    }
    assert chosen == {"gelu_pytorch_tanh": "gemma", "gelu": "llama", "silu": "llama"}
    assert architecture_of(ModelConfig(), "llama") == "llama"
    for activation in ("gelu", "silu"):
        with pytest.raises(UserError, match=rf"Gemma computes gelu_pytorch_tanh, .*hidden_act={activation}: leave out"):
            architecture_of(ModelConfig(hidden_act=activation), "gemma")


def test_a_gemma_of_transformers_is_imported(folder, small_gemma):
    trained = load_trained(str(folder))
    assert trained.model.config.hidden_act == "gelu_pytorch_tanh"
    inputs = torch.randint(10, 320, (2, 60), generator=torch.Generator().manual_seed(0))
    expected = small_gemma(inputs).logits
    torch.testing.assert_close(trained.model.logits(trained.model(inputs)), expected, rtol=0, atol=1e-4)
    change_config(folder, hidden_act="gelu")  # which the first configurations of Gemma say for the tanh approximation
    assert read_hf_spec(folder).model.hidden_act == "gelu_pytorch_tanh"
    for fields, message in (
        ({"hidden_activation": "gelu"}, "hidden_activation=gelu"),
        ({"hidden_act": "silu"}, "hidden_act=silu"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
        ({"architectures": ["LlamaForCausalLM"]}, "only GemmaForCausalLM is supported"),
        ({"head_dim": 256}, "head_dim=256"),
        ({"num_key_value_heads": None}, "num_key_value_heads=null"),
        ({"attention_bias": True}, "only models without biases are supported"),
    ):
        described = (folder / "config.json").read_text()
        change_config(folder, **fields)
        with pytest.raises(UserError, match=message):
            read_hf_spec(folder)
        (folder / "config.json").write_text(described)


def test_fields_that_a_gemma_omits_are_those_of_transformers():
    theirs = GemmaConfig()
    for key, value in DEFAULTS["gemma"].items():
        assert value == (1e4 if key == "rope_theta" else getattr(theirs, key)), key


@pytest.fixture
def small_gemma(folder):
    """A random GemmaForCausalLM, in the folder."""
    shape = {
        key: getattr(small_llama().config, key)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range")
    }  # fmt: skip
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**shape, head_dim=8)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    model.save_pretrained(folder)
    return model


def test_an_export_holds_what_transformers_4_and_other_tools_read(runs, tmp_path):
    folder = exported(runs, "chat", tmp_path / "hf")
    config, about_tokenizer, generation = (
        json.loads((folder / name).read_text())
        for name in ("config.json", "tokenizer_config.json", "generation_config.json")
    )
    # transformers 5 has rope_parameters and dtype, and reads these names too.
    assert (config["rope_theta"], config["torch_dtype"]) == (config["rope_parameters"]["rope_theta"], "float32")
    assert config["hidden_act"] == config["hidden_activation"] == "gelu_pytorch_tanh"  # the second is vLLM's
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]  # mlx-lm has no default
    assert (config["tie_word_embeddings"], config["attention_bias"]) == (True, False)
    assert about_tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    assert about_tokenizer["chat_template"] == CHAT_TEMPLATE and not (folder / "chat_template.jinja").exists()
    assert (about_tokenizer["tokenizer_class"], about_tokenizer["padding_side"]) == ("PreTrainedTokenizerFast", "left")
    assert about_tokenizer["pad_token"] != about_tokenizer["eos_token"] == "<im_end>"
    assert config["eos_token_id"] == generation["eos_token_id"][0] == IM_END_ID
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~current_umask()}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", ["base", "chat"])
def test_generate_takes_what_the_tokenizer_returns(runs, tmp_path, name):
    folder = exported(runs, name, tmp_path / "hf")
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    greedy = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 4, "eos_token_id": None}
    alone = theirs.generate(**tokenizer("Hola", return_tensors="pt"), **greedy)[0]
    both = theirs.generate(**tokenizer(["Hola", TEXT], return_tensors="pt", padding=True), **greedy)
    assert both[0, -len(alone) :].tolist() == alone.tolist()  # padding stands at the left
    parts = [{"type": "text", "text": "Ho"}, {"type": "text", "text": "la"}]
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        for content in ("Hola", parts)
    ]
    assert rendered == ["<im_start>user\nHola<im_end>\n"] * 2
    with pytest.raises(jinja2.TemplateError, match="must be a text, or a list of parts of type text"):
        tokenizer.apply_chat_template([{"role": "user", "content": None}], tokenize=False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_transformers_computes_the_same_logits(runs, tmp_path, dtype):
    ours = load_trained(str(runs / "outputs" / "base"))
    folder = exported(runs, "base", tmp_path / "hf", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == hugging_face.DTYPES[dtype]
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    assert ids == [DOCUMENT_START_ID, *ours.tokenizer.encode(TEXT)]
    inputs = torch.tensor([ids])
    difference = (theirs(inputs).logits - ours.model.logits(ours.model(inputs))).abs().max().item()
    assert difference < {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.005}[dtype]


def test_the_generation_settings_are_those_of_the_sampling():
    describe = hugging_face.generation_config
    drawn = describe(SamplingConfig(temperature=0.5, top_k=7, top_p=0.8, min_p=0.1, max_new_tokens=9), chats=False)
    wanted = {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "max_new_tokens": 9}
    assert wanted.items() <= drawn.items() and drawn["repetition_penalty"] == 1.2
    greedy = describe(SamplingConfig(temperature=0.0, min_p=0.1), chats=True)
    assert greedy["do_sample"] is False and not {"temperature", "top_k", "top_p", "min_p"} & greedy.keys()
    assert greedy["repetition_penalty"] == 1.0


def test_fields_that_a_config_omits_are_those_of_transformers(folder):
    path = folder / "config.json"
    described = json.loads(path.read_text())
    for key in ("rms_norm_eps", "num_key_value_heads", "initializer_range", "hidden_act", "rope_theta"):
        described.pop(key, None)
    described |= {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    path.write_text(json.dumps(described))
    model, theirs = read_hf_spec(folder).model, LlamaConfig.from_pretrained(folder)
    for key in ("rms_norm_eps", "num_key_value_heads", "initializer_range", "hidden_act"):
        assert getattr(model, key) == getattr(theirs, key), key
    assert (model.rms_norm_eps, model.num_key_value_heads, model.rope_theta) == (1e-6, 4, 5e4)
    del described["rope_parameters"]
    path.write_text(json.dumps(described | {"rope_theta": 7e4}))
    assert read_hf_spec(folder).model.rope_theta == 7e4
    path.write_text(json.dumps(described))
    assert read_hf_spec(folder).model.rope_theta == 1e4


def test_transformers_generates_the_same_text(runs, tmp_path):
    ours = load_trained(str(runs / "outputs" / "chat"))
    folder = exported(runs, "chat", tmp_path / "hf")
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "On és el gat?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = prompt["input_ids"][0].tolist()
    assert ids == render_prompt([Message("user", "On és el gat?")], ours.tokenizer)
    written = theirs.generate(**prompt, do_sample=False, repetition_penalty=1.0, max_new_tokens=24)[0, len(ids) :]
    greedy = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=24)
    (mine,) = generate(ours.model, ours.tokenizer, [ids], greedy, frozenset(theirs.generation_config.eos_token_id))
    assert [token for token in written.tolist() if token not in theirs.generation_config.eos_token_id] == mine.ids


def test_the_pipeline_answers_a_conversation_and_stops_at_the_stop_token(runs, tmp_path):
    folder = exported(runs, "chat", tmp_path / "hf")
    write = pipeline("text-generation", str(folder))
    (written,) = write([{"role": "user", "content": "Hola"}], do_sample=False, max_new_tokens=8)
    assert [turn["role"] for turn in written["generated_text"]] == ["user", "assistant"]
    # A model whose top-1 token is always the stop token gives an empty answer.
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.register_forward_hook(lambda module, inputs, output: output.logits.__setitem__((..., IM_END_ID), 9.0))
    stopping = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(folder))
    (written,) = stopping([{"role": "user", "content": "Hola"}], max_new_tokens=8)
    assert written["generated_text"][-1]["content"] == ""


def test_an_export_that_computes_something_else_is_refused(runs, tmp_path, monkeypatch):
    trained = load_trained(str(runs / "outputs" / "base"))
    describe = hugging_face._model_config
    monkeypatch.setattr(hugging_face, "_model_config", lambda *arguments: describe(*arguments) | {"hidden_act": "silu"})
    with pytest.raises(ExportMismatchError, match="transformers computes other logits from the written files"):
        write_folder(trained.model, trained.tokenizer, False, SamplingConfig(), "fp32", tmp_path)


def test_weights_too_large_for_half_precision_are_refused(runs, tmp_path):
    trained = load_trained(str(runs / "outputs" / "base"))
    trained.model.norm.weight[0] = 1e6
    with pytest.raises(UserError, match="too large for fp16: choose --type bf16 or fp32"):
        write_folder(trained.model, trained.tokenizer, False, SamplingConfig(), "fp16", tmp_path)


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu", "silu"])
def test_a_llama_is_imported_with_the_activation_in_its_config(folder, activation):
    theirs = small_llama(hidden_act=activation)
    theirs.save_pretrained(folder)
    trained = load_trained(str(folder))
    assert trained.model.config.hidden_act == activation
    assert any("computed as the exact GELU" in note for note in trained.notes) == (activation == "gelu")
    inputs = torch.randint(10, 320, (2, 60), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trained.model.logits(trained.model(inputs)), theirs(inputs).logits, rtol=0, atol=1e-4)


def test_weights_in_several_files_and_in_bf16_are_read(folder):
    theirs = small_llama().to(torch.bfloat16)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    trained = load_trained(str(folder))
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], value.float()), name


def test_published_chat_models_get_their_control_tokens_at_ids_4_and_5(published_chat, caplog):
    theirs = AutoModelForCausalLM.from_pretrained(published_chat)
    tokenizer = AutoTokenizer.from_pretrained(published_chat)
    trained = load_trained(str(published_chat))
    assert trained.chats and trained.model.config.vocab_size == trained.tokenizer.vocab_size == 65_536
    assert "<|im_start|> from 65,536 to 4, <|im_end|> from 65,537 to 5" in trained.notes[0]
    turns = [{"role": "user", "content": "Hola, gat!"}, {"role": "assistant", "content": "Bon dia"}]
    before = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    now = render([[Message(**turn) for turn in turns]], trained.tokenizer)[0].ids.tolist()
    assert (now[0], now.count(IM_END_ID)) == (IM_START_ID, 2)
    assert now == [{65_536: IM_START_ID, 65_537: IM_END_ID}.get(token, token) for token in before]
    logits = theirs(torch.tensor([before])).logits[0]
    ours = trained.model.logits(trained.model(torch.tensor([now])))[0]
    torch.testing.assert_close(ours[:, IM_START_ID : IM_END_ID + 1], logits[:, 65_536:], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[:, 6:], logits[:, 6:65_536], rtol=0, atol=1e-4)


def test_published_chat_models_can_chat(published_chat):
    trained = load_trained(str(published_chat))
    engine = Engine(TorchBackend(trained.model), trained.tokenizer)
    session = ChatSession(engine, trained.tokenizer, SamplingConfig(max_new_tokens=4), 0)
    answer = "".join(event.text for event in session.answer("Hola") if isinstance(event, TextDelta))
    assert [message.role for message in session.history] == (["user", "assistant"] if answer.strip() else [])


def test_finetuning_starts_from_a_published_chat_model_and_resumes_without_it(published_chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conversation = {"messages": [{"role": "user", "content": "Qui ets?"}, {"role": "assistant", "content": "Un gat."}]}
    Path("chat.jsonl").write_text(
        "".join(json.dumps(conversation | {"n": number}) + "\n" for number in range(40)).replace("Qui ets", "Qui %s"),
        encoding="utf-8",
    )
    rows = Path("chat.jsonl").read_text(encoding="utf-8").splitlines()
    Path("chat.jsonl").write_text("\n".join(row % number for number, row in enumerate(rows)), encoding="utf-8")
    settings = [setting for setting in SMALL_RUN if not setting.startswith(("data=", "model.", "budget"))]
    overrides = [*settings, "model=inherited", "data=chat_files", "data.sources.files.path=chat.jsonl",
                 f"init_from={published_chat}", "name=chat"]  # fmt: skip
    config = composed_config([*overrides, "budget_tokens=512"], read_model_elsewhere)
    assert (config.model.vocab_size, config.model.hidden_act) == (65_536, "gelu")
    train(config, [])
    trained = load_trained("outputs/chat")
    assert trained.chats and trained.tokenizer.vocab_size == 65_536
    shutil.rmtree(published_chat)
    train(composed_config([*overrides, "budget_tokens=768"], read_model_elsewhere), [])
    assert load_trained("outputs/chat").step > trained.step


def test_other_tokenizers_are_reordered_and_missing_tokens_start_as_the_mean(tmp_path):
    described = json.loads(full_tokenizer(320).to_str())
    words = list(described["model"]["vocab"])[10:]
    described["model"]["vocab"] = {word: number for number, word in enumerate(["<|endoftext|>", *words])}
    described["added_tokens"] = [
        described["added_tokens"][0] | {"id": number, "content": content}
        for number, content in ((0, "<|endoftext|>"), (311, "<|im_start|>"), (312, "<|im_end|>"), (313, "<think>"))
    ]
    folder = tmp_path / "other"
    theirs = small_llama(vocab_size=320, hidden_act="silu")
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    trained = load_trained(str(folder))
    embedding, original = trained.model.embed_tokens.weight, theirs.model.embed_tokens.weight
    assert trained.model.config.vocab_size == trained.tokenizer.vocab_size == 320
    assert torch.equal(embedding[[1, 4, 5]], original[[0, 311, 312]])
    assert torch.equal(embedding[10:], original[1:311])
    torch.testing.assert_close(embedding[3], original.mean(0))
    assert any("<think>" in note for note in trained.notes)
    theirs_ids = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(TEXT)["input_ids"]
    assert trained.tokenizer.encode(TEXT) == [token + 9 for token in theirs_ids]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type=gpt2 \(only llama and gemma are supported\)"),
        ({"model_type": None}, "model_type=null"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        (
            {"attention_bias": True},
            r"unsupported model: attention_bias=true \(only models without biases are supported\)",
        ),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "relu"}, "hidden_act=relu"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ({"head_dim": 16}, r"head_dim=16 \(must be hidden_size / num_attention_heads, 8\)"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling of type llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "of type linear"),
        ({"rope_scaling": "yarn", "rope_parameters": None}, "of type yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3 \(must divide num_attention_heads, 4\)"),
        ({"hidden_size": 34}, "hidden_size=34, num_attention_heads=4"),
        ({"num_hidden_layers": "two"}, r"num_hidden_layers=two \(must be an integer, at least 1 and at most 1000\)"),
        ({"vocab_size": 300}, "has the id 319, but .* has vocab_size=300"),
    ],
)
def test_unsupported_models_are_refused_by_the_name_of_the_field(folder, fields, message):
    change_config(folder, **fields)
    with pytest.raises(UserError, match=message) as refused:
        read_hf_spec(folder)
    assert "\n" not in str(refused.value)


def test_all_unsupported_fields_are_named_together(folder):
    change_config(folder, attention_bias=True, hidden_act="relu")
    with pytest.raises(UserError, match=r"(?s)attention_bias.*|hidden_act.*") as refused:
        read_hf_spec(folder)
    assert str(refused.value).count("\n  - ") == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def reshape(path: Path) -> None:
    weights = load_file(path)
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, path)


def leave_out(path: Path) -> None:
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path)


def add_head(path: Path) -> None:
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": torch.zeros(320, 32)}, path)


def pickle(path: Path) -> None:
    path.rename(path.with_name("pytorch_model.bin"))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", cut, "model.safetensors is damaged or truncated"),
        ("model.safetensors", Path.unlink, "holds no model.safetensors"),
        ("model.safetensors", pickle, "only pytorch_model.bin, whose format can run code"),
        ("model.safetensors", reshape, r"model.norm.weight has shape \(31,\), but config.json requires \(32,\)"),
        ("model.safetensors", leave_out, "model.layers.1.mlp.up_proj.weight is missing"),
        ("model.safetensors", add_head, "lm_head.weight differs from the embedding"),
        ("tokenizer.json", Path.unlink, "tokenizer.json cannot be read: No such file"),
        ("tokenizer.json", cut, "tokenizer.json is not JSON"),
        ("config.json", cut, "config.json is not JSON"),
    ],
)
def test_damaged_files_are_errors_of_one_line(folder, name, damage, message):
    damage(folder / name)
    with pytest.raises(UserError, match=message) as refused:
        load_trained(str(folder))
    assert "\n" not in str(refused.value)


def test_an_index_that_names_a_file_outside_its_folder_is_refused(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="it names a file outside its folder"):
        load_trained(str(folder))


def test_an_unsupported_tokenizer_is_refused_with_the_reason(folder):
    described = json.loads((folder / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": []}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="its pre-tokenizer must be ByteLevel with the GPT-2 pattern"):
        load_trained(str(folder))


def test_a_hub_name_is_downloaded_once_for_its_shape_and_once_for_its_weights(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision, "*.safetensors" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(hf_spec, "hub_problem", lambda: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    settings = ["data=files", "data.sources.files.path=x.jsonl", "batch_tokens=256", "schedule.warmup_steps=0"]
    config = composed_config(["model=inherited", "init_from=owner/model@v1", *settings], read_model_elsewhere)
    assert config.model.hidden_size == 32
    assert set(asked) == {("owner/model", "v1", False)}
    assert load_trained("owner/model@v1").model.config.hidden_size == 32
    assert asked[-1] == ("owner/model", "v1", True)


def test_a_name_that_is_neither_local_nor_on_the_hub_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def unreachable(*arguments, **settings):
        raise OSError("no network\nand more")

    monkeypatch.setattr(hf_spec, "hub_problem", lambda: None)
    monkeypatch.setattr(hf_spec, "_announce_download", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        UserError, match=r"owner/model: there is no such run folder, .* the download .* failed: no network$"
    ):
        load_trained("owner/model")
    Path("outputs").mkdir()
    with pytest.raises(UserError, match="outputs/model: there is no such run folder or checkpoint"):
        load_trained("outputs/model")
