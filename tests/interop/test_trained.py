"""Loading a trained model and initial weights from a run folder."""

import shutil
from pathlib import Path

import pytest
import torch

from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop.trained import _check_same_shape, load_trained
from tests.support import folder_of, weights


@pytest.fixture
def copied(runs, tmp_path, monkeypatch) -> Path:
    """A copy of the base run, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "outputs" / "base", "outputs/base")
    return Path("outputs/base")


def test_a_tokenizer_with_the_same_entries_and_other_merges_is_not_that_of_the_checkpoint(copied):
    load_trained("outputs/base")
    tokenizer = Tokenizer.load(copied / "tokenizer.json")
    merges = tokenizer.merges
    Tokenizer.from_merges(tokenizer.tokens, [*merges[:2], merges[3], merges[2], *merges[4:]]).save(
        copied / "tokenizer.json"
    )
    newest = folder_of("base").checkpoints.marked()[-1]
    for source in ("outputs/base", str(newest)):
        with pytest.raises(UserError, match=r"outputs/base/tokenizer\.json is not the tokenizer that .* was trained"):
            load_trained(source)
    (copied / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load_trained("outputs/base")


def test_a_model_has_the_weights_of_the_named_checkpoint_and_no_gradients(copied):
    newest = folder_of("base").checkpoints.marked()[-1]
    trained = load_trained(str(newest))
    assert (trained.step, trained.checkpoint, trained.chats) == (12, newest, False)
    for name, value in trained.model.named_parameters():
        assert torch.equal(value, weights(copied)[f"model.{name}"]) and not value.requires_grad
    assert not trained.model.training


@pytest.mark.parametrize("change", ["num_hidden_layers=3", "rope_theta=500", "hidden_act=silu", "rms_norm_eps=1e-6"])
def test_weights_of_a_model_that_computes_something_else_are_refused(change):
    key = change.partition("=")[0]
    config = composed_config([f"model.{change}", "init_from=outputs/base"])
    with pytest.raises(UserError, match=rf"another shape:\n  - model\.{key}: "):
        _check_same_shape(config, vars(composed_config([]).model))


def test_weights_may_be_trained_further_with_another_context_and_initial_range():
    changes = ["max_position_embeddings=512", "initializer_range=0.5", "base_hidden_size=96"]
    config = composed_config([*(f"model.{change}" for change in changes), "init_from=x", "sequence_length=256"])
    _check_same_shape(config, vars(composed_config([]).model))
