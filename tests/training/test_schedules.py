"""Learning-rate schedules."""

import math

import pytest

from cucafera.config.schema import ScheduleConfig
from cucafera.training.schedules import lr_ratio


def ratios(horizon=100, **settings):
    schedule = ScheduleConfig(**settings)
    return [lr_ratio(step, schedule, horizon) for step in range(horizon + 50)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak_at_its_end(name):
    values = ratios(name=name, warmup_steps=9)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(values) == 1.0


def test_cosine_ends_at_the_final_ratio_and_stays_there():
    values = ratios(name="cosine", warmup_steps=0, final_lr_ratio=0.1)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.55)
    assert values[25] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert values[100:] == pytest.approx([0.1] * 50)


def test_the_original_recipe_ends_at_the_learning_rate_of_its_log():
    schedule = ScheduleConfig(name="cosine", warmup_steps=200, final_lr_ratio=0.1)
    assert 3e-4 * lr_ratio(11_006, schedule, 20_000) == pytest.approx(1.46e-4, abs=1e-6)


def test_wsd_is_constant_and_then_decays_linearly():
    values = ratios(name="wsd", warmup_steps=10, decay_fraction=0.2, final_lr_ratio=0.0)
    assert values[10:81] == [1.0] * 71
    assert values[90] == pytest.approx(0.5)
    assert values[100:] == pytest.approx([0.0] * 50)


@pytest.mark.parametrize("final", [0.0, 0.1, 0.5, 1.0])
def test_a_decay_goes_linearly_or_by_half_a_cosine_to_the_final_ratio(final):
    wsd = ratios(name="wsd", warmup_steps=40, decay_fraction=0.5, final_lr_ratio=final)
    # Half of the horizon, 50 steps, not of the 60 that follow the warm-up.
    assert wsd[40:51] == [1.0] * 11
    assert wsd[50:101] == pytest.approx([1 - (1 - final) * step / 50 for step in range(51)])
    assert wsd[100:] == pytest.approx([final] * 50)
    cosine = ratios(name="cosine", warmup_steps=40, final_lr_ratio=final)
    assert cosine[40:101] == pytest.approx(
        [final + (1 - final) * (1 + math.cos(math.pi * step / 60)) / 2 for step in range(61)]
    )
    assert cosine[100:] == pytest.approx([final] * 50)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_linear_is_wsd_without_a_stable_part(final):
    linear = ratios(name="linear", warmup_steps=40, final_lr_ratio=final)
    assert linear[40:101] == pytest.approx([1 - (1 - final) * step / 60 for step in range(61)])
    assert linear == pytest.approx(ratios(name="wsd", warmup_steps=40, decay_fraction=1.0, final_lr_ratio=final))


def test_a_decay_never_begins_before_the_end_of_the_warm_up():
    values = ratios(name="wsd", warmup_steps=90, decay_fraction=0.5, final_lr_ratio=0.0)
    assert values[89] == pytest.approx(90 / 91) and values[90] == 1.0 and values[95] == pytest.approx(0.5)
    assert ratios(name="wsd", warmup_steps=0, decay_fraction=0.0)[99] == 1.0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_a_warm_up_as_long_as_the_horizon_is_possible(name):
    assert all(0 <= value <= 1 for value in ratios(horizon=10, name=name, warmup_steps=10))
