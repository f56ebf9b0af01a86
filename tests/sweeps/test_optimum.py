"""The best value of a hyperparameter, from a few losses."""

import math
import random

import pytest

from cucafera.sweeps.optimum import find_optimum

GRID = [2.5e-4 * 2**power for power in range(8)]


def parabola(value: float, best: float = 1.7e-3) -> float:
    return 3.0 + 0.4 * math.log10(value / best) ** 2


def test_the_minimum_of_a_parabola_is_found_between_the_values_tried():
    optimum = find_optimum((value, parabola(value)) for value in GRID)
    assert optimum.value == pytest.approx(1.7e-3, rel=1e-6)
    assert optimum.score == pytest.approx(3.0)
    assert optimum.interval == pytest.approx((1.7e-3, 1.7e-3)) and optimum.misfit == pytest.approx(0, abs=1e-9)
    assert (optimum.best_value, optimum.edge, optimum.points) == (2e-3, None, 5)
    assert [parabola(end) for end in optimum.as_good] == pytest.approx([3.01, 3.01])
    assert optimum.at(GRID) == pytest.approx([parabola(value) for value in GRID])


CURVES = {
    "parabola": lambda x: 0.4 * x**2,
    "sharp parabola": lambda x: 2 * x**2,
    "steep to the right": lambda x: 0.6 * x**2 if x < 0 else 3 * x**2,
    "flat to the left": lambda x: 0.8 * abs(x) ** 1.5 if x < 0 else 2.5 * x**2,
    "pointed": lambda x: 0.8 * abs(x),
    "pointed and steep to the right": lambda x: -0.6 * x if x < 0 else 1.2 * x,
    "exponential": lambda x: 0.15 * math.expm1(3 * x) - 0.45 * x,
    "of the fourth power": lambda x: 2 * x**4,
}
"""Losses by decades of the learning rate from the optimum, at 0."""


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("noise", [0.002, 0.02, 0.05])
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES.keys())
def test_the_interval_contains_the_optimum_at_least_as_often_as_it_says(curve, noise, seeds):
    rng = random.Random(0)
    inside = counted = 0
    for _ in range(200):
        best = math.exp(rng.uniform(math.log(GRID[1] * 1.2), math.log(GRID[5] / 1.2)))
        optimum = find_optimum(
            (value, curve(math.log10(value / best)) + rng.gauss(0, noise)) for value in GRID[:7] for _ in range(seeds)
        )
        if optimum.interval is not None:
            counted += 1
            inside += optimum.interval[0] <= best <= optimum.interval[1]
    assert counted > 100
    assert inside / counted >= 0.68


def test_a_parabola_that_misses_the_best_value_does_not_move_the_optimum_away_from_it():
    losses = [5.682, 5.376, 5.019, 4.839, 5.119, 5.142, 5.353]  # a sweep of the quickstart's model
    optimum = find_optimum(zip(GRID, losses, strict=False))
    assert optimum.score == pytest.approx(4.839, abs=0.01) and optimum.value == pytest.approx(1.85e-3, rel=0.01)
    low, high = optimum.interval
    assert low < 1.3e-3 and high > 2.3e-3  # the minimum of the wide parabola is 0.0023
    assert optimum.misfit == pytest.approx(0.129, abs=0.001) == optimum.resolved
    assert optimum.as_good[0] < low  # and not the 0.01 nats that the results cannot show


def test_values_that_differ_by_nothing_have_no_best():
    for losses in ([3.0] * 5, [3.0, 3.002, 2.999, 3.001, 3.0]):
        optimum = find_optimum(zip(GRID, losses, strict=False))
        assert optimum.is_flat and (optimum.edge, optimum.value) == (None, None)
    assert not find_optimum([*zip(GRID, [3.0] * 5, strict=False), (1.0, math.inf)]).is_flat
    assert not find_optimum([(1e-3, 3.0)]).is_flat


def test_two_values_have_an_edge_and_no_optimum():
    optimum = find_optimum([(1e-3, 3.0), (2e-3, 2.9)])
    assert (optimum.edge, optimum.value, optimum.interval) == ("highest", None, None)


def test_a_fine_grid_is_fitted_by_distance_and_not_by_number():
    fine = [1e-3 * 1.1**power for power in range(-20, 21)]
    optimum = find_optimum((value, parabola(value)) for value in fine)
    assert optimum.value == pytest.approx(1.7e-3, rel=1e-6) and optimum.points > 25
    assert optimum.fitted[1] / optimum.fitted[0] > 3


@pytest.mark.parametrize(("best", "edge"), [(1e-5, "lowest"), (1.0, "highest")])
def test_a_best_value_at_the_edge_is_reported_without_extrapolation(best, edge):
    optimum = find_optimum((value, parabola(value, best)) for value in GRID)
    assert (optimum.edge, optimum.value, optimum.diverged) == (edge, None, None)


def test_non_finite_losses_are_left_out_of_the_fit():
    results = [(value, parabola(value)) for value in GRID[:5]] + [(value, math.inf) for value in GRID[5:]]
    optimum = find_optimum(results)
    assert optimum.value == pytest.approx(1.7e-3, rel=1e-6)
    assert (optimum.edge, optimum.diverged) == (None, None)
    top = find_optimum([(1e-3, 3.2), (2e-3, 3.1), (4e-3, 3.0), (8e-3, math.inf), (16e-3, math.inf)])
    assert (top.best_value, top.edge, top.diverged, top.value) == (4e-3, None, 8e-3, None)
    assert find_optimum([(1e-3, math.inf), (2e-3, math.nan)]) is None


def test_three_losses_give_a_parabola_without_an_uncertainty():
    optimum = find_optimum((value, parabola(value)) for value in GRID[2:5])
    assert optimum.value == pytest.approx(1.7e-3, rel=1e-6)
    assert optimum.interval is None
    noisy = [(value, parabola(value) + noise) for value in GRID[2:5] for noise in (-0.01, 0.01)]
    low, high = find_optimum(noisy).interval  # from the seeds
    assert GRID[2] < low < 1.7e-3 < high < GRID[4]


def test_losses_without_a_minimum_between_them_have_only_a_best_value():
    optimum = find_optimum([(1e-3, 3.0), (2e-3, 2.9), (4e-3, 2.9001), (8e-3, 2.8), (16e-3, 2.95)])
    assert optimum.best_value == 8e-3
    flat = find_optimum([(1e-3, 3.0), (2e-3, 2.0), (4e-3, 3.0), (8e-3, 2.5), (16e-3, 1.0), (32e-3, 3.0)])
    assert flat.best_value == 16e-3


def test_the_range_of_equally_good_values_lies_within_the_values_tried():
    optimum = find_optimum((value, 3.0 + 0.01 * math.log10(value / 2e-3) ** 2) for value in GRID)
    assert optimum.as_good == pytest.approx((GRID[2], GRID[4]))


def test_noise_has_no_optimum():
    rng = random.Random(1)
    results = [[(value, rng.gauss(3, 0.01)) for value in GRID for _ in range(3)] for _ in range(200)]
    assert sum(find_optimum(noise).value is not None for noise in results) < 64  # the rest of 68%


def test_the_mean_over_seeds_decides_which_value_is_best():
    optimum = find_optimum([(1e-3, 3.0), (1e-3, 3.4), (2e-3, 3.1), (2e-3, 3.15), (4e-3, 2.9), (4e-3, 3.9)])
    assert (optimum.best_value, optimum.best_score) == (2e-3, pytest.approx(3.125))


def test_a_lower_value_without_a_result_makes_the_next_no_edge():
    results = [(5e-4, math.inf), (1e-3, 3.0), (2e-3, 3.1), (4e-3, 3.3)]
    assert find_optimum(results).edge is None
    assert find_optimum(results[1:]).edge == "lowest"


def test_the_next_larger_value_is_the_one_that_diverged():
    results = [(1e-3, 3.2), (2e-3, 3.1), (4e-3, math.inf), (8e-3, math.inf), (16e-3, 3.5)]
    assert find_optimum(results).diverged == 4e-3
    results = [(1e-3, 3.2), (2e-3, 3.1), (4e-3, 3.15), (8e-3, math.inf)]
    assert find_optimum(results).diverged is None


def test_only_the_nearest_values_are_fitted():
    far = [(value, 9.0) for value in (1e-6, 1e-5, 1.0, 10.0)]  # no parabola reaches these
    optimum = find_optimum([(value, parabola(value)) for value in GRID[1:6]] + far)
    assert optimum.value == pytest.approx(1.7e-3, rel=1e-6)
    assert (optimum.points, optimum.fitted) == (5, pytest.approx((GRID[2], GRID[4])))
    outer = find_optimum((value, parabola(value) + 0.1 * (value in (GRID[1], GRID[5]))) for value in GRID)
    assert outer.value == pytest.approx(1.7e-3, rel=1e-6)  # the outer two decide only how certain it is
    assert outer.interval[1] / outer.interval[0] > 1.2


def test_one_value_is_no_edge():
    optimum = find_optimum([(1e-3, 3.0), (1e-3, 3.2)])
    assert (optimum.best_value, optimum.best_score, optimum.edge, optimum.value) == (1e-3, 3.1, None, None)


def test_of_a_metric_where_higher_is_better_the_maximum_is_found():
    lower = find_optimum((value, parabola(value)) for value in GRID)
    higher = find_optimum(((value, -parabola(value)) for value in GRID), direction="higher")
    assert (higher.value, higher.interval, higher.as_good) == (lower.value, lower.interval, lower.as_good)
    assert (higher.best_score, higher.score) == (-lower.best_score, -lower.score)
    assert higher.at(GRID) == pytest.approx([-parabola(value) for value in GRID])
    assert find_optimum([(1e-3, 0.5), (2e-3, math.inf)], direction="higher").best_score == 0.5
