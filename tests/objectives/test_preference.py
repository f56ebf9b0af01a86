"""Preference tuning: the losses, what of a window is compared, and that packing changes nothing."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cucafera.config.schema import ModelConfig
from cucafera.data.windows import IGNORED, Batch, Window, batch_of_windows
from cucafera.model.transformer import Decoder
from cucafera.objectives._preference_config import LOSSES, WITHOUT_REFERENCE, PreferenceConfig
from cucafera.objectives._preference_losses import (
    AnswerLogprobs,
    PreferenceMetrics,
    document_logprobs,
    pairs_of,
    preference_losses,
    rewards,
)
from cucafera.objectives.preference import PreferenceTuning

PREFERENCE = PreferenceTuning()
LENGTH = 48
GIVEN = {"simpo": {"gamma": 0.3}, "robust": {"label_smoothing": 0.1}}


def settings_of(loss: str, **others: float) -> PreferenceConfig:
    return PreferenceConfig(loss=loss, **(GIVEN.get(loss, {}) | others))


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def random_pairs(count: int) -> list[Pair]:
    generator = np.random.default_rng(0)

    def ids(least: int, most: int) -> list[int]:
        return generator.integers(6, 90, generator.integers(least, most + 1)).tolist()

    return [Pair(ids(2, 5), ids(1, 6), ids(1, 6)) for _ in range(count)]


def window_of(pairs: list[Pair], reference: list[float] | None = None) -> Window:
    input_ids, targets, documents = [], [], []
    for number, (prompt, answer) in enumerate((pair.prompt, answer) for pair in pairs for answer in pair[1:]):
        text = prompt + answer
        input_ids += text[:-1]
        targets += [IGNORED] * (len(prompt) - 1) + answer
        documents += [number] * (len(text) - 1)
    padding = LENGTH - len(input_ids)
    arrays = (input_ids + [2] * padding, targets + [IGNORED] * padding, documents + [2 * len(pairs)] * padding)
    known = None if reference is None else np.array(reference)
    return Window(*(np.array(array, dtype=np.int32) for array in arrays), known)


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, initializer_range=0.2,
    )  # fmt: skip
    return Decoder(config)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # pi_c -6 of 3 tokens, pi_r -10 of 4; ref_c -7, ref_r -8: gains of 1 and -2, per token 1/3 and -1/2
        (settings_of("sigmoid", beta=0.5), -math.log(sigmoid(0.5 * 3))),
        (settings_of("robust", beta=0.5), (0.1 * math.log(sigmoid(-1.5)) - 0.9 * math.log(sigmoid(1.5))) / 0.8),
        (settings_of("ipo", beta=0.5), (1 / 3 + 1 / 2 - 1) ** 2),
        (settings_of("apo_zero", beta=0.5), 1 - sigmoid(0.5) + sigmoid(-1)),
        (settings_of("sigmoid_norm", beta=2), -math.log(sigmoid(2 * (1 / 3 + 1 / 2)))),
        (settings_of("simpo", beta=2), -math.log(sigmoid(2 * (-2 + 2.5) - 0.3))),
        (
            settings_of("orpo", beta=0.5),
            2 - 0.5 * math.log(sigmoid(logit(math.exp(-2)) - logit(math.exp(-2.5)))),
        ),
        (settings_of("sigmoid", beta=0.5, nll_weight=0.2), -math.log(sigmoid(1.5)) + 0.2 * 2),
    ],
    ids=lambda value: value.loss if isinstance(value, PreferenceConfig) else "",
)  # fmt: skip
def test_a_loss_is_its_formula(settings, expected):
    chosen, rejected = (
        AnswerLogprobs(torch.tensor([logprob], dtype=torch.float64), torch.tensor([known]), torch.tensor([tokens]))
        for logprob, known, tokens in ((-6, -7, 3), (-10, -8, 4))
    )
    assert preference_losses(settings, chosen, rejected).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("sigmoid", math.log(2)), ("robust", math.log(2)), ("sigmoid_norm", math.log(2)), ("apo_zero", 1), ("ipo", 25)],
)
def test_before_the_first_step_a_loss_with_a_reference_is_a_constant(model, loss, expected):
    pairs = random_pairs(3)
    batch = batch_of_windows([window_of(pairs)], True)
    with torch.no_grad():
        batch = batch._replace(reference_logprobs=PREFERENCE.reference_logprobs(model, batch, None))
    value = PREFERENCE.loss(settings_of(loss), model, batch, None)
    assert value.item() / 3 == pytest.approx(expected, rel=1e-9)


def test_the_log_probability_of_an_answer_is_that_of_its_tokens_after_the_prompt(model):
    (pair,) = random_pairs(1)
    logprobs, tokens = document_logprobs(model, batch_of_windows([window_of([pair])], True), None)
    for document, answer in enumerate((pair.chosen, pair.rejected)):
        text = torch.tensor([pair.prompt + answer])
        of_all = model.logits(model(text)).log_softmax(-1)[0]
        expected = sum(of_all[len(pair.prompt) - 1 + index, token] for index, token in enumerate(answer))
        assert logprobs[0, document].item() == pytest.approx(expected.item(), rel=1e-5)
        assert tokens[0, document] == len(answer)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_does_not_depend_on_packing_or_micro_batches(model, loss):
    pairs = random_pairs(5)
    reference = np.random.default_rng(1).uniform(-20, -10, 10).tolist()
    settings = settings_of(loss, beta=0.5, nll_weight=0.1)

    def loss_and_gradients(groups: list[list[int]], micro_batch: int) -> tuple[float, list[torch.Tensor]]:
        windows = [
            window_of(
                [pairs[number] for number in group],
                [value for number in group for value in reference[2 * number : 2 * number + 2]],
            )
            for group in groups
        ]
        batch = batch_of_windows(windows, True)
        assert PREFERENCE.units(batch) == 5
        model.zero_grad()
        total = 0.0
        for part in batch.split(micro_batch):
            value = PREFERENCE.loss(settings, model, part, None) / 5
            value.backward()
            total += value.item()
        return total, [parameter.grad.clone() for parameter in model.parameters()]

    expected, wanted = loss_and_gradients([[0], [1], [2], [3], [4]], 1)
    for groups, micro_batch in (([[0], [1], [2], [3], [4]], 5), ([[3, 0], [2, 4], [1]], 2), ([[1, 2], [0, 3], [4]], 3)):
        total, gradients = loss_and_gradients(groups, micro_batch)
        assert total == pytest.approx(expected, rel=1e-6)
        for gradient, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4)


def test_the_first_conversation_of_a_pair_has_the_better_answer(model):
    batch = batch_of_windows([window_of(random_pairs(2), [-9.0, -8.0, -7.0, -6.0])], True)
    chosen, rejected = pairs_of(model, batch, None, True)
    logprobs, tokens = document_logprobs(model, batch, None)
    assert (chosen.reference.tolist(), rejected.reference.tolist()) == ([-9, -7], [-8, -6])
    assert (chosen.logprobs.tolist(), rejected.logprobs.tolist()) == (
        logprobs[0, :4:2].tolist(),
        logprobs[0, 1:4:2].tolist(),
    )
    assert (chosen.tokens.tolist(), rejected.tokens.tolist()) == (tokens[0, :4:2].tolist(), tokens[0, 1:4:2].tolist())


def test_a_window_of_padding_holds_no_pair(model):
    pairs = random_pairs(2)
    batch = batch_of_windows([window_of(pairs, [-9.0, -8.0, -7.0, -6.0])], True)
    padded = batch.padded(3)
    settings = settings_of("sigmoid")
    assert PREFERENCE.units(padded) == PREFERENCE.units(batch) == 2
    for side, other in zip(pairs_of(model, batch, None, True), pairs_of(model, padded, None, True), strict=True):
        for value, padded_value in zip(side, other, strict=True):
            torch.testing.assert_close(value, padded_value)
    expected = PREFERENCE.loss(settings, model, batch, None).item()
    assert PREFERENCE.loss(settings, model, padded, None).item() == pytest.approx(expected, rel=1e-6)
    empty = batch._replace(targets=torch.full_like(batch.targets, IGNORED))
    assert PREFERENCE.units(empty) == 0 and PREFERENCE.loss(settings, model, empty, None).item() == 0


def test_the_prompt_is_not_trained(model):
    """A gradient reaches the hidden states at the positions that predict the answers, and no others."""
    batch = batch_of_windows([window_of(random_pairs(2), [-9.0, -8.0, -7.0, -6.0])], True)
    kept = []

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    model.norm.register_forward_hook(keep)
    PREFERENCE.loss(settings_of("sigmoid"), model, batch, None).backward()
    assert torch.equal(kept[0].grad.abs().sum(-1) > 0, batch.targets != IGNORED)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_gradient_step_widens_the_margin(model, loss):
    batch = batch_of_windows([window_of(random_pairs(3))], True)
    with torch.no_grad():
        batch = batch._replace(reference_logprobs=PREFERENCE.reference_logprobs(model, batch, None))
    settings = settings_of(loss)

    def measured() -> dict[str, float]:
        metrics = PreferenceMetrics(settings)
        with torch.no_grad():
            metrics.update(model, batch, None)
        return {name: value.item() for name, value in metrics.compute().items()}

    before = measured()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (PREFERENCE.loss(settings, model, batch, None) / 3).backward()
        optimizer.step()
    after = measured()
    assert after["loss"] < before["loss"] and after["reward_margin"] > before["reward_margin"]
    if loss not in WITHOUT_REFERENCE:
        assert before["reward_accuracy"] == 0.5 and before["reward_margin"] == 0  # every pair is a tie
        assert after["reward_accuracy"] > 0.5


def test_metrics_are_means_over_all_pairs(model):
    pairs = random_pairs(5)
    windows = [
        window_of(pairs[:2], [-9.0, -8.0, -7.0, -6.0]),
        window_of(pairs[2:], [-5.0, -4.0, -3.0, -2.0, -9.0, -8.0]),
    ]
    settings = settings_of("sigmoid", beta=0.2)
    batch = batch_of_windows(windows, True)
    metrics = PreferenceMetrics(settings)
    with torch.no_grad():
        for part in batch.split(1):
            metrics.update(model, part, None)
        chosen, rejected = pairs_of(model, batch, None, True)
        found = metrics.compute()
        losses = preference_losses(settings, chosen, rejected)
        of_chosen, of_rejected = rewards(settings, chosen), rewards(settings, rejected)
    expected = {
        "loss": losses.mean(),
        "reward_accuracy": (of_chosen > of_rejected).double().mean(),
        "reward_margin": (0.2 * (chosen.gain - rejected.gain)).mean(),
        "reward_chosen": (0.2 * chosen.gain).mean(),
        "reward_rejected": (0.2 * rejected.gain).mean(),
        "chosen_logprob": (chosen.logprobs / chosen.tokens).mean(),
        "rejected_logprob": (rejected.logprobs / rejected.tokens).mean(),
        "logprob_accuracy": (chosen.mean > rejected.mean).double().mean(),
    }
    assert found.keys() == expected.keys() == {metric.name for metric in PREFERENCE.metrics}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-6), name


def test_the_cross_entropy_for_the_gradient_check_is_that_of_the_targets(model):
    batch: Batch = batch_of_windows([window_of(random_pairs(2))], True)
    expected = model(batch.input_ids, batch.targets, batch.documents)
    torch.testing.assert_close(PREFERENCE.cross_entropy(model, batch, None), expected)
