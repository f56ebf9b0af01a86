"""A broken loss, optimizer or compiler stops a run in its first steps."""

from pathlib import Path

import pytest
import torch

from cucafera.config.errors import EXIT_DIVERGED, UserError
from cucafera.model import loss as loss_module
from cucafera.model.transformer import MLP, Decoder
from cucafera.optimizers import build_optimizer
from cucafera.run import train
from cucafera.runs.folder import RunFolder
from cucafera.training.callbacks.guards import GuardsError
from cucafera.training.first_steps import FirstSteps
from cucafera.training.gradient_check import _part_with_targets
from cucafera.training.module import LanguageModel
from tests.support import assert_equal, weights


def test_a_loss_whose_gradient_is_zero_stops_the_run_in_its_first_step(small_run, monkeypatch):
    backward = loss_module._LinearCrossEntropy.backward

    def zero_gradient(ctx, *upstream):  # as torch 2.11 compiled what was returned after an in-place update
        return backward(ctx, *(torch.zeros_like(gradient) for gradient in upstream))

    monkeypatch.setattr(loss_module._LinearCrossEntropy, "backward", staticmethod(zero_gradient))
    match = r"the gradient of step 1 was exactly zero, at a loss of 5\.\d+: the model is not being trained"
    with pytest.raises(GuardsError, match=match) as raised:
        train(small_run("name=run"), [])
    assert raised.value.exit_code == EXIT_DIVERGED
    assert torch.__version__ in str(raised.value)
    assert not RunFolder(Path("outputs/run")).checkpoints.complete()


def test_a_weight_without_gradient_is_named_after_three_steps(small_run, monkeypatch):
    forward = MLP.forward

    def cut_off(mlp, x):
        mlp.down_proj.weight.requires_grad_(True)
        return forward(mlp, x).detach() if mlp is first[0] else forward(mlp, x)

    first: list[MLP] = []
    build = Decoder.__init__

    def remembered(decoder, *arguments, **settings):
        build(decoder, *arguments, **settings)
        first[:] = [decoder.layers[0].mlp]

    monkeypatch.setattr(Decoder, "__init__", remembered)
    monkeypatch.setattr(MLP, "forward", cut_off)
    match = r"the gradient of layers\.0\.\S+ and 3 others was exactly zero in each of the first 3 steps"
    with pytest.raises(GuardsError, match=match):
        train(small_run("name=run"), [])


def test_updates_that_change_no_weight_stop_the_run(small_run, monkeypatch):
    def without_updates(model, config):
        optimizer = build_optimizer(model, config)
        step = optimizer.step

        def without_effect(closure=None):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            step(closure)
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), before, strict=True):
                    parameter.copy_(value)

        optimizer.step = without_effect
        return optimizer

    monkeypatch.setattr("cucafera.training.module.build_optimizer", without_updates)
    with pytest.raises(GuardsError, match="no weight has changed in the first 3 steps, although every update was"):
        train(small_run("name=run"), [])


@pytest.mark.parametrize(("rate", "message"), [(1e-3, "no weight has changed"), (1e-9, None)])
def test_unchanged_weights_are_a_fault_only_at_a_rate_that_would_change_them(rate, message):
    model = torch.nn.Linear(3, 3)
    watched = FirstSteps(model, steps_done=5)
    for step in range(3):
        assert not watched.has_seen_enough
        model.weight.grad, model.bias.grad = torch.ones(3, 3), torch.ones(3)
        watched.watch(rate if step == 0 else 0.0)  # the largest counts
    assert watched.has_seen_enough and watched.last_step == 8
    fault = watched.fault()
    assert (message in fault) if message else fault is None


def test_a_gradient_that_is_zero_in_one_step_is_no_fault_and_in_all_is_one():
    model = torch.nn.Linear(3, 3)
    watched = FirstSteps(model, steps_done=0)
    for step in range(3):
        model.weight.grad = torch.zeros(3, 3) if step < 2 else torch.ones(3, 3)
        model.bias.grad = torch.zeros(3)
        watched.watch(1e-3)
    with torch.no_grad():
        model.weight += 1
    assert watched.fault() == "the gradient of bias was exactly zero in each of the first 3 steps"


def test_a_long_log_interval_still_stops_the_run_early(small_run, monkeypatch):
    monkeypatch.setattr(MLP, "forward", lambda mlp, x: torch.zeros_like(x))
    with pytest.raises(GuardsError, match=r"gradient of layers\.0\.\S+ and \d+ others was exactly zero"):
        train(small_run("name=run", "callbacks.log_every_steps=10", "callbacks.validate_every_steps=0"), [])


@pytest.fixture
def compiled_as(monkeypatch):
    """Replace the compiled decoder by a function of the eager result."""

    def install(change) -> None:
        def compile_module(model, **how):
            model._compiled_call_impl = lambda *arguments, **settings: change(
                model, Decoder.forward(model, *arguments, **settings)
            )

        monkeypatch.setattr(Decoder, "compile", compile_module)

    return install


COMPILED = ("name=run", "trainer.compile=true")


class NoGradient(torch.autograd.Function):
    """The same value with a zero gradient, as a compiler bug produces it."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return torch.zeros_like(upstream)


@pytest.mark.parametrize(
    ("change", "away"),
    [(lambda model, loss: NoGradient.apply(loss), "100.0%"), (lambda model, loss: 1.1 * loss, r"10\.\d%")],
    ids=["no gradient", "a tenth too large"],
)
def test_a_compiled_model_with_wrong_gradients_is_not_trained(small_run, compiled_as, change, away):
    compiled_as(change)
    match = rf"20 of 20 gradients of the compiled model differ .* is {away} of its norm away .*nothing was trained"
    with pytest.raises(UserError, match=match) as raised:
        train(small_run(*COMPILED), [])
    assert "trainer.compile=false" in str(raised.value) and torch.__version__ in str(raised.value)
    assert not RunFolder(Path("outputs/run")).checkpoints.complete()


def test_one_wrong_gradient_is_enough_and_is_reported_by_name(small_run, compiled_as):
    def one_wrong(model, loss):
        weight = model.layers[1].mlp.up_proj.weight
        return loss + 5 * (weight - weight.detach()).sum() if loss.ndim == 0 else loss

    compiled_as(one_wrong)
    with pytest.raises(UserError, match=r"1 of 20 gradients .* that of layers\.1\.mlp\.up_proj\.weight is"):
        train(small_run(*COMPILED), [])


def test_the_gradient_check_can_be_turned_off(small_run, compiled_as):
    compiled_as(lambda model, loss: 1.1 * loss if loss.ndim == 0 else loss)
    train(small_run(*COMPILED, "trainer.check_gradients=false"), [])
    assert RunFolder(Path("outputs/run")).report.exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("documents", ["true", "false"])
def test_the_gradient_check_does_not_change_the_run(small_run, compiled_as, precision, documents):
    compiled_as(lambda model, result: result)
    settings = (
        f"trainer.precision={precision}", f"trainer.residual_precision={precision}",
        f"data.document_masking={documents}", "trainer.compile=true", "trainer.micro_batch_windows=4",
    )  # fmt: skip
    train(small_run("name=checked", *settings), [])
    train(small_run("name=unchecked", *settings, "trainer.check_gradients=false"), [])
    assert_equal(weights("outputs/checked"), weights("outputs/unchecked"))


def test_a_gradient_check_out_of_memory_is_skipped_with_a_warning(small_run, compiled_as, monkeypatch, caplog):
    def too_much(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    compiled_as(lambda model, result: result)
    monkeypatch.setattr("cucafera.training.module.compiled_gradient_fault", too_much)
    train(small_run(*COMPILED), [])
    assert "too little memory to compare the gradients of the compiled model" in caplog.text


def test_a_gradient_that_consists_of_rounding_errors_is_no_fault(small_run, compiled_as, tmp_path):
    # Where every token is the same, attention averages equal values: gradients of queries and keys are rounding errors.
    (tmp_path / "same").mkdir()
    for number in range(40):
        (tmp_path / "same" / f"{number}.txt").write_text("=" * 2000 + str(number))

    def summed_otherwise(model, loss):
        noise = [1e-7 * torch.randn_like(weight) * (weight - weight.detach()) for weight in model.parameters()]
        return loss + sum(part.sum() for part in noise) if loss.ndim == 0 else loss

    compiled_as(summed_otherwise)
    small_run()  # makes its own folder the current one
    settings = ("data.sources.files.path=same", "tokenizer.vocab_size=266", "schedule.warmup_steps=0")
    train(small_run(*COMPILED, *settings), [])
    assert RunFolder(Path("outputs/run")).report.exists()


def test_the_gradient_check_uses_a_window_with_targets(monkeypatch):
    targets = torch.full((3, 600), -100)
    assert _part_with_targets(targets.index_fill(1, torch.tensor([3, 4]), 5)) == (0, 512)
    targets[2, 550] = 5
    assert _part_with_targets(targets) == (2, 600)  # after the first tokens
    targets[1, 7] = 5
    assert _part_with_targets(targets) == (1, 512)


def test_a_skipped_update_of_an_earlier_session_does_not_end_the_check(small_run, monkeypatch):
    horizon = "schedule.horizon_steps=12"
    step = LanguageModel._found_nonfinite
    monkeypatch.setattr(
        LanguageModel,
        "_found_nonfinite",
        lambda module, loss, norm: step(module, loss * (torch.nan if module.steps_done == 2 else 1), norm),
    )
    train(small_run("name=run", horizon, "budget_tokens=2048"), [])
    monkeypatch.setattr(MLP, "forward", lambda mlp, x: torch.zeros_like(x))
    with pytest.raises(GuardsError, match="was exactly zero in each of the first 3 steps"):
        train(small_run("name=run", horizon), [])
