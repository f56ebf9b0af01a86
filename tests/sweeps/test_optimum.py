"""The best value of a knob, from a few losses."""

import math
import random

import pytest

from cucafera.sweeps.optimum import find_optimum

GRID = [2.5e-4 * 2**power for power in range(8)]


def parabola(value: float, best: float = 1.7e-3) -> float:
    return 3.0 + 0.4 * math.log10(value / best) ** 2


def test_the_minimum_of_a_parabola_is_found_between_the_values_that_were_tried():
    optimum = find_optimum((value, parabola(value)) for value in GRID)
    assert optimum.value == pytest.approx(1.7e-3, rel=1e-6)
    assert optimum.loss == pytest.approx(3.0)
    assert optimum.factor == pytest.approx(1.0, abs=1e-6)
    assert (optimum.best_value, optimum.edge, optimum.points) == (2e-3, None, 5)
    assert [parabola(end) for end in optimum.as_good] == pytest.approx([3.01, 3.01])
    assert optimum.at(GRID) == pytest.approx([parabola(value) for value in GRID])


@pytest.mark.parametrize(("seeds", "grid"), [(1, GRID), (1, GRID[:5]), (3, GRID)])  # 2, 1 and 12 degrees of freedom
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds, grid):
    dice = random.Random(0)
    inside = told = 0
    for _ in range(1000):
        optimum = find_optimum((value, parabola(value) + dice.gauss(0, 0.003)) for value in grid for _ in range(seeds))
        if optimum.factor is not None:
            told += 1
            inside += abs(math.log(optimum.value / 1.7e-3)) < math.log(optimum.factor)
    assert told > 900
    assert 0.63 < inside / told < 0.73


@pytest.mark.parametrize(("best", "edge"), [(1e-5, "lowest"), (1.0, "highest")])
def test_a_best_value_at_the_edge_is_told_and_nothing_is_extrapolated(best, edge):
    optimum = find_optimum((value, parabola(value, best)) for value in GRID)
    assert (optimum.edge, optimum.value, optimum.diverged) == (edge, None, None)


def test_losses_that_are_not_finite_poison_nothing():
    results = [(value, parabola(value)) for value in GRID[:5]] + [(value, math.inf) for value in GRID[5:]]
    optimum = find_optimum(results)
    assert optimum.value == pytest.approx(1.7e-3, rel=1e-6)
    assert (optimum.edge, optimum.diverged) == (None, None)
    top = find_optimum([(1e-3, 3.2), (2e-3, 3.1), (4e-3, 3.0), (8e-3, math.inf), (16e-3, math.inf)])
    assert (top.best_value, top.edge, top.diverged, top.value) == (4e-3, None, 8e-3, None)
    assert find_optimum([(1e-3, math.inf), (2e-3, math.nan)]) is None


def test_three_losses_fix_a_parabola_and_say_nothing_of_its_error():
    optimum = find_optimum((value, parabola(value)) for value in GRID[2:5])
    assert optimum.value == pytest.approx(1.7e-3, rel=1e-6)
    assert optimum.factor is None


def test_losses_without_a_minimum_between_them_have_only_a_best_value():
    optimum = find_optimum([(1e-3, 3.0), (2e-3, 2.9), (4e-3, 2.9001), (8e-3, 2.8), (16e-3, 2.95)])
    assert optimum.best_value == 8e-3
    flat = find_optimum([(1e-3, 3.0), (2e-3, 2.0), (4e-3, 3.0), (8e-3, 2.5), (16e-3, 1.0), (32e-3, 3.0)])
    assert flat.best_value == 16e-3


def test_what_is_as_good_lies_within_what_was_tried():
    optimum = find_optimum((value, 3.0 + 0.001 * math.log10(value / 2e-3) ** 2) for value in GRID)
    assert optimum.as_good == pytest.approx((GRID[1], GRID[5]))


def test_noise_has_no_optimum():
    dice = random.Random(1)
    results = [[(value, dice.gauss(3, 0.01)) for value in GRID for _ in range(3)] for _ in range(200)]
    assert sum(find_optimum(noise).value is not None for noise in results) < 50


def test_one_value_is_no_edge():
    optimum = find_optimum([(1e-3, 3.0), (1e-3, 3.2)])
    assert (optimum.best_value, optimum.best_loss, optimum.edge, optimum.value) == (1e-3, 3.1, None, None)
