"""The training step: clipping, the reported norm and loss, the learning rate, and what it keeps in memory."""

import dataclasses

import pytest
import torch

from cucafera.config.command_line import composed_config
from cucafera.run import train
from cucafera.training.hardware import decide_hardware
from cucafera.training.module import LanguageModel, build_decoder
from cucafera.training.schedules import lr_ratio
from tests.support import scalars, weights

CLIP = 0.05


def test_an_update_has_the_clipped_gradient_and_the_curve_the_norm_before(small_run, monkeypatch):
    applied, losses = [], []
    apply_update, found_nonfinite = LanguageModel._apply_update, LanguageModel._found_nonfinite

    def watched_update(module, optimizer, found):
        gradients = [parameter.grad for parameter in module.model.parameters()]
        applied.append(torch.nn.utils.get_total_norm(gradients).item())
        apply_update(module, optimizer, found)

    def watched_loss(module, loss, norm):
        losses.append(loss)
        return found_nonfinite(module, loss, norm)

    monkeypatch.setattr(LanguageModel, "_apply_update", watched_update)
    monkeypatch.setattr(LanguageModel, "_found_nonfinite", watched_loss)
    parts = "trainer.micro_batch_windows=2"
    train(small_run("name=free", "optimizer.clip_norm=null", parts), [])
    free = [value for _, value in scalars("outputs/free", "train/gradient_norm")]
    assert applied == pytest.approx(free) and min(free) > 2 * CLIP

    applied.clear()
    train(small_run("name=clipped", f"optimizer.clip_norm={CLIP}", parts), [])
    assert applied == pytest.approx([CLIP] * 12, rel=1e-4)
    before = [value for _, value in scalars("outputs/clipped", "train/gradient_norm")]
    assert before[0] == free[0] and min(before) > 2 * CLIP
    assert not any(loss.requires_grad for loss in losses)  # or the graph of every micro-batch would be kept


def test_a_limit_above_the_norm_changes_no_gradient(small_run):
    train(small_run("name=free", "optimizer.clip_norm=null", "budget_tokens=1024"), [])
    train(small_run("name=limited", "optimizer.clip_norm=1e6", "budget_tokens=1024"), [])
    assert all(torch.equal(value, weights("outputs/free")[name]) for name, value in weights("outputs/limited").items())


def test_the_learning_rate_follows_the_horizon_and_not_the_budget(small_run):
    config = small_run("name=run", "schedule.horizon_steps=24", "budget_tokens=2048")
    train(config, [])
    expected = [config.optimizer.lr * lr_ratio(step, config.schedule, 24) for step in range(8)]
    assert [value for _, value in scalars("outputs/run", "train/lr/embedding")] == pytest.approx(expected)


def test_a_decoder_is_built_with_the_settings_of_the_hardware():
    config = composed_config(["trainer=cpu"])
    plain = decide_hardware(config)
    decoder = build_decoder(config.model, plain)
    assert (decoder.activation_checkpointing, decoder.residual_dtype, decoder.document_attention) == (
        False, None, "dense"
    )  # fmt: skip
    other = dataclasses.replace(
        plain, activation_checkpointing=True, residual_precision="bf16", document_attention="flex"
    )
    decoder = build_decoder(config.model, other)
    assert (decoder.activation_checkpointing, decoder.residual_dtype, decoder.document_attention) == (
        True, torch.bfloat16, "flex"
    )  # fmt: skip
