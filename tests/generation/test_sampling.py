"""From logits to tokens: the distributions of transformers, each row with settings and random numbers of its own."""

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import IM_END_ID, SPECIAL_TOKENS
from cucafera.generation.sampling import SamplingBatch, TokenPresence
from tests.generation.models import GREEDY

CPU = torch.device("cpu")
PLAIN = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
SETTINGS = [
    {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
    {"top_k": 5, "top_p": 1.0, "repetition_penalty": 1.0},
    {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.3},  # negative logits too, which the other filters drop
    {"top_k": 0, "top_p": 0.7, "repetition_penalty": 1.0},
    {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_p": 0.05},
    {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2},
    {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "min_p": 0.1},
]


def distributions(logits: Tensor, present: Tensor, settings: Sequence[SamplingConfig]) -> Tensor:
    """The distribution over the vocabulary that each row draws from."""
    result = torch.zeros_like(logits)
    for rows, candidates in SamplingBatch(settings, CPU).candidates(logits, present):
        weights = candidates.probabilities
        if candidates.ids is not None:
            weights = torch.zeros(len(rows), logits.shape[1]).scatter(1, candidates.ids, weights)
        result[rows] = weights / weights.sum(-1, keepdim=True)
    return result


def presence_of(texts: list[list[int]]) -> Tensor:
    presence = TokenPresence(len(texts), 300, CPU)
    for slot, ids in enumerate(texts):
        presence.start(slot, ids)
    return presence.of(range(len(texts)))


def of_transformers(logits: Tensor, ids: Tensor, settings: dict) -> Tensor:
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]), TemperatureLogitsWarper(0.6)]
    )
    if settings["top_k"]:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    if settings.get("min_p"):
        processors.append(MinPLogitsWarper(settings["min_p"]))
    return processors(ids, logits.clone()).softmax(-1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(settings):
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 300) * 3, torch.randint(10, 300, (3, 12))
    ours = distributions(logits, presence_of(ids.tolist()), [SamplingConfig(temperature=0.6, **settings)] * 3)
    torch.testing.assert_close(ours, of_transformers(logits, ids, settings))


def test_each_row_has_settings_of_its_own():
    torch.manual_seed(1)
    rows = len(SETTINGS)
    logits, ids = torch.randn(rows, 300) * 3, torch.randint(10, 300, (rows, 12))
    ours = distributions(
        logits, presence_of(ids.tolist()), [SamplingConfig(temperature=0.6, **settings) for settings in SETTINGS]
    )
    for row, settings in enumerate(SETTINGS):
        expected = of_transformers(logits[row : row + 1], ids[row : row + 1], settings)
        torch.testing.assert_close(ours[row : row + 1], expected)


def test_a_penalty_makes_every_seen_token_less_probable_and_no_other():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, 0.5]])
    present = torch.tensor([[True, False, True, True, False, False]])
    penalized = torch.tensor([[1.0, 1.0, 0.0, -2.0, -2.0, 0.5]])
    sampling = dataclasses.replace(PLAIN, repetition_penalty=2.0)
    torch.testing.assert_close(distributions(logits, present, [sampling]), penalized.softmax(-1))
    greedy = dataclasses.replace(GREEDY, repetition_penalty=2.0)
    negative, seen = torch.tensor([[-3.0, -1.0, -1.5]]), torch.tensor([[False, True, False]])
    assert SamplingBatch([greedy], CPU).next_tokens(negative, seen, lambda row: 0.0) == [2]


def test_top_k_keeps_exactly_so_many_tokens_and_top_p_the_one_that_crosses_it():
    logits = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0]])
    absent = torch.zeros(1, 5, dtype=torch.bool)
    for top_k in (1, 2, 4, 5, 9):
        kept = distributions(logits, absent, [dataclasses.replace(PLAIN, top_k=top_k)])
        assert int((kept > 0).sum()) == min(top_k, 5)
    probabilities = logits.softmax(-1)[0].sort(descending=True).values
    for count in (1, 2, 3):
        top_p = float(probabilities[:count].sum()) - 1e-3
        assert int((distributions(logits, absent, [dataclasses.replace(PLAIN, top_p=top_p)]) > 0).sum()) == count


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.999}], ids=str)
def test_tokens_are_drawn_with_their_probabilities(settings):
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20_000, 4)
    batch = SamplingBatch([dataclasses.replace(PLAIN, **settings)] * 20_000, CPU)
    generator = random.Random(0)
    drawn = batch.next_tokens(logits, torch.zeros(20_000, 4, dtype=torch.bool), lambda row: generator.random())
    frequencies = torch.bincount(torch.tensor(drawn), minlength=4) / 20_000
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_no_random_number_draws_a_token_that_was_left_out(uniform):
    torch.manual_seed(0)
    logits = torch.randn(6, 300) * 3
    settings = [SamplingConfig(temperature=0.6, **settings) for settings in SETTINGS[:5]] + [PLAIN]
    logits[5, :100] = logits[5, 200:] = -torch.inf
    absent = torch.zeros(6, 300, dtype=torch.bool)
    tokens = SamplingBatch(settings, CPU).next_tokens(logits, absent, lambda row: uniform)
    assert (distributions(logits, absent, settings).gather(1, torch.tensor(tokens)[:, None]) > 0).all()


def test_temperature_zero_takes_the_most_probable_token_after_the_penalty():
    logits = torch.tensor([[0.0, 3.0, 2.9], [2.0, 0.0, 1.0]])
    present = torch.tensor([[False, True, False], [False, False, False]])
    penalized = dataclasses.replace(GREEDY, repetition_penalty=1.2)
    assert SamplingBatch([GREEDY] * 2, CPU).next_tokens(logits, present, lambda row: 0.0) == [1, 0]
    assert SamplingBatch([penalized] * 2, CPU).next_tokens(logits, present, lambda row: 0.0) == [2, 0]
    assert SamplingBatch([GREEDY, PLAIN], CPU).next_tokens(logits, present, lambda row: 0.999999) == [1, 2]


def test_control_tokens_are_never_penalized_and_a_new_text_begins_without_marks():
    presence = TokenPresence(2, 300, CPU)
    presence.start(0, [4, 5, 20, 5])
    presence.start(1, [21])
    presence.add([0, 1], [IM_END_ID, 30])
    assert [mask.nonzero()[:, 0].tolist() for mask in presence.of([0, 1])] == [[20], [21, 30]]
    presence.start(1, [40])
    assert [mask.nonzero()[:, 0].tolist() for mask in presence.of([1, 0])] == [[40], [20]]
    assert not presence.of([0, 1])[:, : len(SPECIAL_TOKENS)].any()
