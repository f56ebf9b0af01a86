"""LoRA adapters in PEFT's form: out and in with the same bits, and what cannot be merged is refused."""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import sys
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cucafera import export
from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.interop import peft
from cucafera.interop.peft_spec import read_spec
from cucafera.interop.trained import initial_tokenizer, load_initial_weights, load_trained
from cucafera.run import read_model_elsewhere
from cucafera.runs.checkpoints import read_checkpoint
from cucafera.runs.folder import RunFolder, checkpoint_of
from tests.support import SMALL_RUN, full_tokenizer, small_llama

LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
RANK, ALPHA = 2, 5.0


@pytest.fixture(scope="module")
def place(runs, tmp_path_factory) -> Path:
    """A folder with a base model, its exports as Llama in outputs/base/hf and as Gemma, and outputs/lora on it.

    The adapters of outputs/lora are random.
    """
    place = tmp_path_factory.mktemp("peft")
    for name in ("base", "chat"):
        shutil.copytree(runs / "outputs" / name, place / "outputs" / ("lora" if name == "chat" else name))
    lora = RunFolder(place / "outputs" / "lora")
    config = lora.read_config()
    config["adapter"] |= {"rank": RANK, "alpha": ALPHA}
    config["init_from"] = "outputs/base"
    body = yaml.safe_dump(config)
    lora.config.write_text(f"{body}# crc32: {zlib.crc32(body.encode())}\n")
    state = read_checkpoint(checkpoint_of(str(lora.path), ""))
    weights = read_checkpoint(checkpoint_of(str(place / "outputs" / "base"), ""))["state_dict"]
    generator = torch.Generator().manual_seed(0)
    for layer, weight in [(name.removesuffix(".weight"), value) for name, value in weights.items() if "_proj" in name]:
        weights[f"{layer}.lora_A"] = torch.randn(RANK, weight.shape[1], generator=generator) / 5
        weights[f"{layer}.lora_B"] = torch.randn(weight.shape[0], RANK, generator=generator) / 5
    state |= {"state_dict": weights}
    state["config"]["adapter"] |= {"rank": RANK, "alpha": ALPHA}
    lora.checkpoints.remove_all()
    lora.checkpoints.write(12, state, None)
    before = Path.cwd()
    os.chdir(place)
    try:
        assert call("outputs/base", "--to", "hf", "outputs/base/hf", "--architecture", "llama") == 0
        assert call("outputs/base", "--to", "hf", "outputs/base/gemma", "--type", "bf16") == 0
    finally:
        os.chdir(before)
    return place


def call(*arguments: str) -> int:
    before, sys.argv = sys.argv, ["export", *arguments]
    try:
        export.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def command(place, monkeypatch):
    monkeypatch.chdir(place)
    return call


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A folder with a base, and in adapter/ an adapter of it as PEFT writes it."""
    place = tmp_path_factory.mktemp("made-by-peft")
    model = small_llama()
    model.save_pretrained(place / "base")
    full_tokenizer(320).save(str(place / "base" / "tokenizer.json"))
    (place / "adapter").mkdir()
    described = {
        "base_model_name_or_path": "base", "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6,
        "bias": "none", "target_modules": ["q_proj", "down_proj"], "megatron_core": "megatron.core", "loftq_config": {},
        "qalora_group_size": 16, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False,
    }  # fmt: skip
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(described))
    save_file(tensors(model, ("self_attn.q_proj", "mlp.down_proj"), lambda name: 4), weights_of(place / "adapter"))
    return place


def tensors(model, layers, rank_of) -> dict[str, torch.Tensor]:
    generator, made = torch.Generator().manual_seed(0), {}
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer.endswith(layers):
            for part, shape in (("A", (rank_of(layer), weight.shape[1])), ("B", (weight.shape[0], rank_of(layer)))):
                made[f"base_model.model.{layer}.lora_{part}.weight"] = torch.randn(shape, generator=generator)
    return made


def weights_of(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


@pytest.fixture
def adapter(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "made") / "adapter"


def describe(adapter: Path, **fields: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(adapter: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_trained(str(adapter))
    message = str(refused.value)
    assert "\n" not in message and len(message) < 900
    return message


def test_an_adapter_goes_out_and_comes_back_with_the_same_bits(command, place, capsys):
    arguments = ("outputs/lora", "--to", "peft", "outputs/lora/peft", "--overwrite")
    assert command(*arguments, "--base", "outputs/base/hf") == 0
    assert "Verified with" in (printed := capsys.readouterr().out) or "the files give the run's weights." in printed
    folder = place / "outputs" / "lora" / "peft"
    described = json.loads((folder / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["use_rslora"]) == (RANK, ALPHA, False)
    assert described["base_model_name_or_path"] == "outputs/base/hf" and described["task_type"] == "CAUSAL_LM"
    names = {f"base_model.model.model.layers.{n}.{layer}.lora_{part}.weight"
             for n in (0, 1) for layer in LAYERS for part in "AB"}  # fmt: skip
    assert load_file(weights_of(folder)).keys() == names
    ours, back = load_trained("outputs/lora"), load_trained(str(folder))
    assert back.chats and back.tokenizer.fingerprint == ours.tokenizer.fingerprint
    for name, value in ours.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], value), name
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 1.0
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft" and "base_model" not in card
    for text in (
        "# chat\n", "A LoRA adapter of rank 2. With its base, base, it is a Catalan",
        'from_pretrained("../../base/hf")', "LoRA adapters of rank 2, alpha 5 |",
    ):  # fmt: skip
        assert text in card, text
    # Its base is found from another folder too, and the adapter is a model for every other command.
    os.chdir(folder)
    assert command(".", "--to", "hf", str(place / "merged")) == 0
    merged = load_file(place / "merged" / "model.safetensors")
    assert torch.equal(merged["model.layers.1.mlp.up_proj.weight"], ours.model.layers[1].mlp.up_proj.weight)


def test_an_adapter_fits_the_rounded_base_as_a_gemma_too(command, place, tmp_path, capsys):
    arguments = ("outputs/lora", "--to", "peft", str(tmp_path / "adapter"), "--type", "bf16")
    assert command(*arguments, "--base", "outputs/base/gemma") == 0
    assert (
        "Verified with PEFT on 4 texts" if has_peft() else "differ from those of the run"
    ) in capsys.readouterr().out
    ours, back = load_trained("outputs/lora").model.state_dict(), load_trained(str(tmp_path / "adapter")).model
    for name, value in back.state_dict().items():
        torch.testing.assert_close(value, ours[name], rtol=0.01, atol=0.02)


def has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "use_rslora": True, "r": 3},
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": 1, "exclude_modules": ["up_proj"]},
        {"target_modules": ["q_proj", "gate_proj"], "rank_pattern": {"layers.1.mlp.gate_proj": 2},
         "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_that_peft_made_gives_the_logits_of_peft(original, tmp_path, settings):
    library = pytest.importorskip("peft")
    theirs = library.get_peft_model(small_llama(), library.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.add_(torch.randn_like(value) / 5 if "lora_" in name else 0)
    theirs.save_pretrained(tmp_path)
    describe(tmp_path, base_model_name_or_path=str(original / "base"))
    model, ids = load_trained(str(tmp_path)).model, torch.randint(10, 320, (2, 60))
    torch.testing.assert_close(model.logits(model(ids)), theirs(ids).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({}, {"layers.0.self_attn.q_proj": 6 / 4, "layers.1.mlp.down_proj": 6 / 4}),
        ({"use_rslora": True}, {"layers.0.self_attn.q_proj": 6 / math.sqrt(4)}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 9, "down_proj": 5}},
         {"layers.0.self_attn.q_proj": 6 / 2, "layers.0.mlp.down_proj": 5 / 4, "layers.1.mlp.down_proj": 9 / 4}),
        ({"rank_pattern": {"^q_proj": 2}}, {"layers.0.self_attn.q_proj": 6 / 4}),
        ({"lora_alpha": 0.5}, {"layers.0.self_attn.q_proj": 0.5 / 4}),
    ],
    ids=str,
)  # fmt: skip
def test_each_layer_has_the_rank_and_scale_that_the_description_gives_it(adapter, original, fields, scales):
    describe(adapter, **fields)
    spec = read_spec(str(adapter), with_weights=True)
    assert len(spec.layers) == 4
    made = tensors(small_llama(), ("q_proj", "down_proj"), lambda layer: spec.layers[layer].rank)
    save_file(made, weights_of(adapter))
    base, merged = small_llama().state_dict(), load_trained(str(adapter)).model.state_dict()
    for layer, scale in scales.items():
        change = (
            made[f"base_model.model.model.{layer}.lora_B.weight"]
            @ made[f"base_model.model.model.{layer}.lora_A.weight"]
        )
        torch.testing.assert_close(merged[f"{layer}.weight"], base[f"model.{layer}.weight"] + scale * change)
    assert torch.equal(merged["layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3 (only LORA is supported)"),
        ({"use_dora": True}, "use_dora=true (only LoRA matrices of linear layers are supported)"),
        ({"bias": "all"}, "bias=all (only none"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=[3]"),
        ({"of_a_later_version": "x" * 5000}, "of_a_later_version=xxx"),
        ({"target_modules": ["embed_tokens"]}, "target_modules has embed_tokens"),
        ({"target_modules": ["c_attn"]}, "none of the base's linear layers"),
        ({"target_modules": 3}, "target_modules=3"),
        *(({"init_lora_weights": start}, "it changes the base") for start in ("pissa_niter_4", "olora", 7, [])),
        *(({"r": value}, "r=") for value in (0, -1, 2.0, True, "8", None)),
        *(({"lora_alpha": value}, "lora_alpha=") for value in (None, "x", float("nan"), float("inf"), True)),
        ({"use_rslora": "yes"}, "use_rslora=yes"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern="),
        ({"rank_pattern": [1]}, "rank_pattern="),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"(.*.*.*)*x": 1}}, "too complex"),
        ({"base_model_name_or_path": None}, "names no base in base_model_name_or_path: write the path"),
        ({"base_model_name_or_path": "/nowhere/base"}, "is no folder with a config.json"),
        ({"base_model_name_or_path": "x" * 5000}, "is no folder with a config.json"),
        ({"base_model_name_or_path": "a\0b"}, "is no folder with a config.json"),
        ({"base_model_name_or_path": "adapter"}, "is no folder with a config.json"),
        ({"base_model_name_or_path": "run"}, "is a run, which PEFT cannot read: python -m cucafera.export"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_its_field(adapter, fields, message):
    (adapter.parent / "run" / "checkpoints").mkdir(parents=True)
    describe(adapter, **fields)
    assert message in refusal(adapter)


def test_tensors_that_do_not_fit_are_refused_by_their_name(adapter):
    path = weights_of(adapter)
    whole = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for changed, message in (
        ({key: value for key, value in whole.items() if key != name}, f"{name} is missing"),
        (whole | {"base_model.model.model.embed_tokens.weight": torch.zeros(320, 32)}, "embed_tokens.weight is unexp"),
        (whole | {name.replace("q_proj", "k_proj"): torch.zeros(4, 32)}, "k_proj.lora_A.weight is unexpected"),
        (whole | {name: torch.zeros(3, 32)}, f"{name} has shape (3, 32), but adapter_config.json and the base require"),
        (whole | {name: torch.zeros(4, 32, dtype=torch.int8)}, "has the dtype I8"),
        (whole | {name: torch.full((4, 32), math.nan)}, "holds values that are not finite"),
        (whole | {name: torch.full((4, 32), 3e38)}, "its weights are not finite"),
        ({}, "is missing (and 7 more)"),
    ):
        save_file(changed, path)
        assert message in refusal(adapter)
    save_file(whole, path)
    path.write_bytes(path.read_bytes()[:-4])
    assert "is damaged or truncated" in refusal(adapter)
    path.unlink()
    os.mkfifo(path)
    assert "is not a regular file" in refusal(adapter)
    path.unlink()
    (adapter / "adapter_model.bin").touch()
    assert "holds no adapter_model.safetensors, only adapter_model.bin, whose format can run code" in refusal(adapter)


def test_an_adapter_of_an_adapter_and_one_with_other_tokens_are_refused(adapter):
    shutil.copy(adapter / "adapter_config.json", adapter.parent / "base")
    assert "the base of an adapter must be a whole model" in refusal(adapter)
    (adapter.parent / "base" / "adapter_config.json").unlink()
    full_tokenizer(319).save(str(adapter / "tokenizer.json"))
    assert "has other tokens than the base" in refusal(adapter)


def test_a_run_begins_with_an_adapter_merged_into_its_base(adapter):
    (adapter / "tokenizer_config.json").write_text('{"eos_token": "<im_end>"}')
    assert load_trained(str(adapter)).chats and not load_trained(str(adapter.parent / "base")).chats
    settings = [setting for setting in SMALL_RUN if not setting.startswith(("data", "model."))]
    config = composed_config([*settings, "model=inherited", f"init_from={adapter}"], read_model_elsewhere)
    initial = load_initial_weights(config)
    for name, value in load_trained(str(adapter)).model.state_dict().items():
        assert torch.equal(initial.weights[f"model.{name}"], value)
    assert initial_tokenizer(config) == adapter.parent / "base" / "tokenizer.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/lora"], "python -m cucafera.export outputs/base --to hf outputs/base/hf, and give --base outputs"),
        (["outputs/base"], "outputs/base trained all weights, without adapters: export it with --to hf"),
        (["outputs/base/hf"], "outputs/base/hf: --to peft takes a run that trained adapters"),
        (["outputs/lora", "--base", "outputs/nowhere"], "outputs/nowhere: there is no such run folder"),
        (["outputs/lora", "--base", "other"], "other is not the base of this adapter: its weights are others"),
        (["outputs/lora", "--base", "MADE/base"], "is not the base of this adapter: its shape is another"),
        (["outputs/lora", "--base", "MADE/adapter"], "is an adapter itself: export it as a base with python -m"),
    ],
    ids=str,
)  # fmt: skip
def test_a_base_that_is_missing_or_another_model_is_refused(command, place, adapter, arguments, message, capsys):
    if not (place / "other").exists():
        weights = load_file(shutil.copytree(Path("outputs/base/hf"), Path("other")) / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] *= 1.01
        save_file(weights, "other/model.safetensors", metadata={"format": "pt"})
    arguments = [argument.replace("MADE", str(adapter.parent)) for argument in arguments]
    assert command(*arguments, "--to", "peft", "out") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not Path("out").exists()


def test_the_command_that_exports_a_missing_base_can_be_pasted_whatever_its_name(command, capsys):
    shutil.copytree("outputs/base", "outputs/l'avi")
    assert command("outputs/lora", "--to", "peft", "out", "--base", "outputs/l'avi") == 2
    advised = re.search("python -m cucafera.export (.*), and give (.*)", capsys.readouterr().err)
    words = [shlex.split(part) for part in advised.groups()]
    assert words == [["outputs/l'avi", "--to", "hf", "outputs/l'avi/hf"], ["--base", "outputs/l'avi/hf"]]


def test_files_that_read_back_as_something_else_are_not_exported(command, monkeypatch, capsys):
    describe = peft.adapter_description
    monkeypatch.setattr(peft, "adapter_description", lambda *arguments: describe(*arguments) | {"lora_alpha": 6})
    assert command("outputs/lora", "--to", "peft", "out", "--base", "outputs/base/hf") == 2
    assert "read back, give other weights. Nothing is exported" in capsys.readouterr().err
    assert not Path("out").exists()
