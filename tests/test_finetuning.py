"""Finetuning: whole runs on conversations, in one process."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID
from cucafera.data.chatml import Message, render
from cucafera.data.conversations import ConversationData, open_conversations
from cucafera.data.windows import IGNORED
from cucafera.export import checked_target, command_line_parser
from cucafera.interop.model_card import _recipe, read_lineage
from cucafera.interop.trained import load_trained
from cucafera.run import train
from cucafera.runs.checkpoints import read_checkpoint
from cucafera.runs.folder import checkpoint_of
from tests.support import assert_close, assert_equal, assert_same_curve, folder_of, scalars, weights

BASE = "model.max_position_embeddings=128"
FINETUNE = "init_from=outputs/base"


@pytest.fixture
def base(small_run) -> None:
    """A base model in outputs/base."""
    train(small_run("name=base", BASE), [])


def metrics_of(name: str) -> dict:
    return json.loads(Path(f"outputs/{name}/metrics.json").read_text())


def held_out_conversations(data: ConversationData) -> list[list[int]]:
    (source,) = data.validation
    tokens = source.conversations
    return [tokens.conversation(number).ids.tolist() for number in range(len(tokens))]


def test_a_base_model_becomes_a_chat_model(base, small_chat, caplog):
    caplog.set_level("INFO")
    config = small_chat("name=chat", FINETUNE)
    bpb = train(config, [])
    metrics = metrics_of("chat")
    assert metrics["objective"] == "finetuning"
    assert metrics["validation"][-1]["bpb"] == bpb < metrics["validation"][0]["bpb"]
    assert [sample["prompt"] for sample in metrics["samples"]] == config.callbacks.prompts
    for text in ("conversations in", "padding", "⟦", "ended by themselves", "python -m cucafera.chat outputs/chat"):
        assert text in caplog.text
    assert "ended by themselves" in Path("outputs/chat/report.md").read_text()
    assert [step for step, _ in scalars("outputs/chat", "val/accuracy")] == [0, 4, 8, 12]
    assert load_trained("outputs/chat").chats


def test_the_loss_is_that_of_the_answers_alone_and_packing_changes_nothing(base, small_chat):
    config = small_chat("name=chat", FINETUNE)
    train(config, [])
    data = open_conversations(config)
    base_model = load_trained("outputs/base").model
    nats, correct, targets, text_bytes = 0.0, 0, 0, 0
    token_bytes = data.tokenizer.token_bytes()
    for ids in held_out_conversations(data):
        with torch.no_grad():
            logits = base_model.logits(base_model(torch.tensor([ids[:-1]])))[0]
        text = data.tokenizer.decode(ids)
        messages = [Message(*part.split("\n", 1)) for part in text.split("<im_start>")[1:]]
        conversation = [Message(message.role, message.content.split("<im_end>")[0]) for message in messages]
        (rendered,) = render([conversation], data.tokenizer)
        trained = np.flatnonzero(rendered.trained)
        wanted = torch.tensor(rendered.ids[trained].astype(np.int64))
        predicted = logits[torch.from_numpy(trained) - 1]
        nats += float(F.cross_entropy(predicted, wanted, reduction="sum"))
        correct += int((predicted.argmax(1) == wanted).sum())
        targets += len(wanted)
        text_bytes += int(token_bytes[wanted.numpy()].sum())
    first = metrics_of("chat")["validation"][0]
    assert first["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert first["accuracy"] == pytest.approx(correct / targets)
    assert first["bpb"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_changing_one_conversation_changes_no_logit_of_another(base, small_chat):
    data = open_conversations(small_chat("name=chat", FINETUNE, "tokenizer.path=outputs/base/tokenizer.json"))
    model = load_trained("outputs/base").model
    batch = data.training_steps(())[0]
    changed = batch.input_ids.clone()
    second = batch.documents == 1
    assert second.any()
    changed[second] = (changed[second] * 7 + 11) % 300 + 10
    with torch.no_grad():
        before = model.logits(model(batch.input_ids, documents=batch.documents))
        after = model.logits(model(changed, documents=batch.documents))
    assert torch.equal(before[~second], after[~second])
    assert not torch.allclose(before[second], after[second])


@pytest.mark.parametrize("other", ["micro_batch_windows=2", "micro_batch_windows=1", "num_workers=2"])
def test_micro_batches_and_workers_do_not_change_the_trajectory(base, small_chat, other):
    train(small_chat("name=first", FINETUNE), [])
    train(small_chat("name=second", FINETUNE, f"trainer.{other}"), [])
    assert_same_curve("outputs/first", "outputs/second", "loss/train")
    assert_close(weights("outputs/first"), weights("outputs/second"))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_run_in_two_parts_ends_bit_equal_to_one(base, small_chat, adapter):
    settings = (FINETUNE, "schedule.horizon_steps=12", f"adapter={adapter}")
    train(small_chat("name=whole", *settings), [])
    train(small_chat("name=parts", *settings, "budget_tokens=3072"), [])
    train(small_chat("name=parts", *settings), [])
    assert_equal(weights("outputs/whole"), weights("outputs/parts"))
    assert scalars("outputs/whole", "loss/train") == scalars("outputs/parts", "loss/train")


def test_epochs_are_turned_into_whole_steps(base, small_chat):
    config = small_chat("name=epochs", FINETUNE, "epochs=2")
    train(config, [])
    data = open_conversations(config)
    steps = metrics_of("epochs")["steps"]
    assert data.epochs_at(steps - 1) < 2 <= data.epochs_at(steps)
    train(small_chat("name=epochs", FINETUNE, "epochs=3"), [])
    assert metrics_of("epochs")["steps"] > steps
    with pytest.raises(
        UserError, match=r"epochs=2 give \d+ steps of 512 tokens, fewer than schedule\.warmup_steps=500"
    ):
        train(small_chat("name=short", FINETUNE, "epochs=2", "schedule.warmup_steps=500"), [])


def test_a_run_resumes_when_the_base_run_is_gone(base, small_chat):
    train(small_chat("name=chat", FINETUNE, "budget_tokens=3072", "schedule.horizon_steps=12"), [])
    shutil.rmtree("outputs/base")
    train(small_chat("name=chat", FINETUNE, "schedule.horizon_steps=12"), [])
    assert metrics_of("chat")["steps"] == 12
    with pytest.raises(UserError, match="there is no run there whose model could be inherited"):
        small_chat("name=another", FINETUNE)


def test_adapters_leave_the_weights_as_they_are_and_are_merged_when_the_model_is_used(base, small_chat):
    train(small_chat("name=lora", FINETUNE, "adapter=lora", "optimizer.lr=0.03"), [])
    base_weights = read_checkpoint(checkpoint_of("outputs/base", ""))["state_dict"]
    adapted = weights("outputs/lora")
    for name, value in base_weights.items():
        assert torch.equal(adapted[name], value)
    assert any(".lora_B" in name and value.abs().sum() > 0 for name, value in adapted.items())
    metrics = metrics_of("lora")
    assert metrics["adapter_parameters"] == sum(v.numel() for n, v in adapted.items() if ".lora_" in n)
    assert metrics["validation"][-1]["loss"] < metrics["validation"][0]["loss"]

    merged = load_trained("outputs/lora").model.state_dict()
    assert merged.keys() == load_trained("outputs/base").model.state_dict().keys()
    train(small_chat("name=next", "init_from=outputs/lora"), [])
    best = min(record["loss"] for record in metrics["validation"])
    assert metrics_of("next")["validation"][0]["loss"] == pytest.approx(best, rel=1e-4)


def test_a_cooldown_continues_the_adapters_of_its_run(base, small_chat):
    train(small_chat("name=lora", FINETUNE, "adapter=lora", "optimizer.lr=0.03", "epochs=1", "schedule=constant"), [])
    steps = metrics_of("lora")["steps"]
    train(composed_config(["+experiment=cooldown", "init_from=outputs/lora", "schedule.cooldown_steps=2"]), [])
    assert metrics_of("lora-cooldown")["steps"] == steps + 2
    before, after = weights("outputs/lora"), weights("outputs/lora-cooldown")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".lora_" in name}
    card = _recipe(read_lineage(folder_of("lora-cooldown")), is_merged=False)
    assert "| trained | all weights | LoRA adapters of rank 16, alpha 32 | LoRA adapters of rank 16, alpha 32 |" in card
    with pytest.raises(UserError, match="outputs/base is not in a form that PEFT can load"):
        checked_target(command_line_parser().parse_args(["outputs/lora-cooldown", "--to", "peft", "adapter"]))


def test_the_run_folder_is_a_tokenizer_for_transformers_with_the_same_template(base, small_chat):
    train(small_chat("name=chat", FINETUNE, "budget_tokens=512", "schedule.warmup_steps=0"), [])
    theirs = AutoTokenizer.from_pretrained("outputs/chat")
    conversation = [Message("user", "la mar"), Message("assistant", "el bosc"), Message("user", "sol")]
    ours = load_trained("outputs/chat").tokenizer
    (rendered,) = render([conversation], ours)
    applied = theirs.apply_chat_template([message._asdict() for message in conversation], return_dict=True)
    assert applied["input_ids"] == rendered.ids.tolist()
    assert (theirs.eos_token_id, theirs.pad_token_id) == (IM_END_ID, 3)
    assert AutoTokenizer.from_pretrained("outputs/base").eos_token_id == DOCUMENT_START_ID


def test_a_tokenizer_other_than_that_of_the_weights_is_refused(base, small_run, small_chat, corpus):
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join(lines[:40]) + "\n")
    train(small_run("name=stranger", BASE), [])
    with pytest.raises(UserError, match="tokenizer is not what these weights were trained with"):
        train(small_chat("name=chat", FINETUNE, "tokenizer.path=outputs/stranger/tokenizer.json"), [])


def test_every_step_has_something_to_train_on(base, small_chat):
    data = open_conversations(small_chat("name=chat", FINETUNE, "tokenizer.path=outputs/base/tokenizer.json"))
    for step in range(30):
        assert ((data.training_steps(())[step].targets != IGNORED).sum(1) > 0).all()
