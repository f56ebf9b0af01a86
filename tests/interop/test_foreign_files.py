"""Hugging Face folders from elsewhere: whatever their files hold, one line says what is wrong, soon."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cucafera.config.errors import UserError
from cucafera.data.chatml import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE
from cucafera.interop.chat_template import chat_template_notes
from cucafera.interop.hf_spec import OTHER_NAMES, read_hf_spec
from cucafera.interop.trained import load_trained
from tests.interop.conftest import CHATML
from tests.support import change_config, full_tokenizer, small_llama

NAN, HUGE = float("nan"), 10**400


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    small_llama().save_pretrained(path)
    full_tokenizer(320).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def change_json(path: Path, **fields) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_trained(str(folder))
    message = str(refused.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({"hidden_size": value}, "hidden_size=") for value in (None, [32], "32", True, -32, 0, 32.0, NAN, HUGE)),
        *(({"rms_norm_eps": value}, "rms_norm_eps=") for value in (None, "x", NAN, -1.0, 5, float("inf"))),
        *(({"rope_parameters": {"rope_theta": value}}, "rope_theta=") for value in (None, "x", NAN, 0, -5, HUGE)),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings=1_000_000_000 (must be an integer, at least 2"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10_000_000 (must be an integer, at least 1 and at most"),
        ({"vocab_size": 10**9}, "vocab_size=1_000_000_000"),
        ({"hidden_size": 65_536, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": None,
          "max_position_embeddings": 10**6}, "too many for heads of 65536"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"hidden_act": ["silu"]}, "hidden_act=['silu']"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings=false (only tied"),
        ({"architectures": {"x": "\n" * 9}}, "architectures="),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "only one RoPE for all layers"),
        ({"model_type": "\x1b" * 9000}, "model_type="),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_in_config_json_is_refused_by_its_name(folder, fields, message):
    change_config(folder, **fields)
    assert message in refusal(folder)


def test_no_value_of_config_json_is_the_default_where_null_means_it(folder):
    change_config(folder, num_key_value_heads=None, head_dim=None, rope_scaling=None)
    assert read_hf_spec(folder).model.num_key_value_heads == 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")], ids="pipe folder device".split()
)
def test_what_is_no_regular_file_is_refused_without_reading_it(folder, name, make):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(UserError, match=r"is not a regular file|no checkpoint"):
        load_trained(str(folder))


def test_a_description_of_an_impossible_size_is_not_read(folder):
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 40)
    assert "tokenizer.json has 1,099,511,627,776 bytes; such a file has at most" in refusal(folder)


def test_a_missing_file_and_an_empty_adapter_are_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json: unsupported adapter: peft_type=null (only LORA is supported)" in refusal(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json cannot be read: No such file or directory" in refusal(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": None}, {"model": {"type": "BPE"}}, {"added_tokens": 3}, {"added_tokens": [None]},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0.5, "b": 1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 10**9}, "merges": []}, "added_tokens": []},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}},
        {"model": {"type": "BPE", "vocab": [], "merges": []}}, {"pre_tokenizer": 7}, {"decoder": "\ud800"},
        {"model": {"type": "x" * 9000}},
    ],
    ids=lambda fields: str(fields)[:60],
)  # fmt: skip
def test_a_wrong_value_in_tokenizer_json_is_refused(folder, fields):
    change_json(folder / "tokenizer.json", **fields)
    assert "tokenizer.json: unsupported tokenizer: " in refusal(folder)


@pytest.mark.parametrize("eos", [None, 3, ["<im_end>"], {"content": None}, {}])
def test_an_end_of_sequence_token_of_a_wrong_type_is_none(folder, eos):
    change_json(folder / "tokenizer_config.json", eos_token=eos)
    assert not load_trained(str(folder)).chats


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2**40]}, "is damaged or truncated"),
        ({"shape": [-32]}, "is damaged or truncated"),
        ({"data_offsets": [0, 2**62]}, "is damaged or truncated"),
        ({"dtype": "I32"}, "model.norm.weight has the dtype I32 (supported are F64, F32, F16, BF16)"),
        ({"shape": [4, 8]}, "model.norm.weight has shape (4, 8), but config.json requires (32,)"),
    ],
)
def test_a_header_of_weights_that_lies_is_refused(folder, change, message):
    path = folder / "model.safetensors"
    header, rest = header_of(path)
    header["model.norm.weight"] |= change
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + rest)
    assert message in refusal(folder)


@pytest.mark.parametrize("size", [0, 2**63, 10**9])
def test_a_header_of_an_impossible_size_is_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    assert "model.safetensors is damaged or truncated" in refusal(folder)


def test_weights_that_are_not_finite_or_stand_twice_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors")
    assert "model.norm.weight holds values that are not finite" in refusal(folder)
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    names = {"a": "model.safetensors", "b": "other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "which another file of the folder holds too" in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, {"a": None}, {"a": "x" * 5000}, {"a": ".."}])
def test_a_wrong_index_of_weights_is_refused(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refusal(folder)


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (CHAT_TEMPLATE, None),
        (PLAIN_CHAT_TEMPLATE, None),
        (CHATML, None),  # of the published models, whose control tokens have other names
        ([{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}], None),
        ("{% generation %}{% endgeneration %}" + CHATML, None),
        ("{{ bos_token }}" + CHATML, "where it has 's><im_start>system"),
        ("{% for m in messages %}[INST] {{ m.content }}{% endfor %}", "where it has '[INST] Sigues breu."),
        ("{{ raise_exception('no system message') }}", "TemplateError: no system message"),
        ("{% x", "cannot be compared with ChatML: TemplateSyntaxError"),
        ("{{ 'a' * 10**11 }}", "cannot be compared with ChatML: MemoryError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        (3, "is not a text"),
        ([{"name": []}, None], "is not a text"),
    ],
)  # fmt: skip
def test_a_chat_template_that_renders_another_prompt_is_noted(template, note):
    notes = chat_template_notes(template, {"bos_token": {"content": "<s>"}}, OTHER_NAMES)
    assert len(notes) == (note is not None)
    assert note is None or (note in notes[0] and "\n" not in notes[0])


def test_a_folder_with_another_chat_template_says_so_on_loading(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert [note for note in load_trained(str(folder)).notes if "Its own chat template is not used" in note]
