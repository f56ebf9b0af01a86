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
    assert optimum.factor == pytest.approx(1.0, abs=1e-6)
    assert (optimum.best_value, optimum.edge, optimum.points) == (2e-3, None, 5)
    assert [parabola(end) for end in optimum.as_good] == pytest.approx([3.01, 3.01])
    assert optimum.at(GRID) == pytest.approx([parabola(value) for value in GRID])


@pytest.mark.parametrize(("seeds", "grid"), [(1, GRID), (1, GRID[:5]), (3, GRID)])  # 2, 1 and 12 degrees of freedom
def test_the_confidence_interval_has_its_nominal_coverage(seeds, grid):
    rng = random.Random(0)
    inside = counted = 0
    for _ in range(1000):
        optimum = find_optimum((value, parabola(value) + rng.gauss(0, 0.003)) for value in grid for _ in range(seeds))
        if optimum.factor is not None:
            counted += 1
            inside += abs(math.log(optimum.value / 1.7e-3)) < math.log(optimum.factor)
    assert counted > 900
    assert 0.63 < inside / counted < 0.73


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
    assert optimum.factor is None


def test_losses_without_a_minimum_between_them_have_only_a_best_value():
    optimum = find_optimum([(1e-3, 3.0), (2e-3, 2.9), (4e-3, 2.9001), (8e-3, 2.8), (16e-3, 2.95)])
    assert optimum.best_value == 8e-3
    flat = find_optimum([(1e-3, 3.0), (2e-3, 2.0), (4e-3, 3.0), (8e-3, 2.5), (16e-3, 1.0), (32e-3, 3.0)])
    assert flat.best_value == 16e-3


def test_the_range_of_equally_good_values_lies_within_the_values_tried():
    optimum = find_optimum((value, 3.0 + 0.001 * math.log10(value / 2e-3) ** 2) for value in GRID)
    assert optimum.as_good == pytest.approx((GRID[1], GRID[5]))


def test_noise_has_no_optimum():
    rng = random.Random(1)
    results = [[(value, rng.gauss(3, 0.01)) for value in GRID for _ in range(3)] for _ in range(200)]
    assert sum(find_optimum(noise).value is not None for noise in results) < 50


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


def test_only_two_neighbours_on_each_side_are_fitted():
    far = [(value, 9.0) for value in (1e-6, 1e-5, 1.0, 10.0)]  # no parabola reaches these
    optimum = find_optimum([(value, parabola(value)) for value in GRID[1:6]] + far)
    assert optimum.value == pytest.approx(1.7e-3, rel=1e-6)
    assert (optimum.points, optimum.fitted) == (5, pytest.approx((GRID[1], GRID[5])))


def test_one_value_is_no_edge():
    optimum = find_optimum([(1e-3, 3.0), (1e-3, 3.2)])
    assert (optimum.best_value, optimum.best_score, optimum.edge, optimum.value) == (1e-3, 3.1, None, None)


def test_of_a_metric_where_higher_is_better_the_maximum_is_found():
    lower = find_optimum((value, parabola(value)) for value in GRID)
    higher = find_optimum(((value, -parabola(value)) for value in GRID), direction="higher")
    assert (higher.value, higher.factor, higher.as_good) == (lower.value, lower.factor, lower.as_good)
    assert (higher.best_score, higher.score) == (-lower.best_score, -lower.score)
    assert higher.at(GRID) == pytest.approx([-parabola(value) for value in GRID])
    assert find_optimum([(1e-3, 0.5), (2e-3, math.inf)], direction="higher").best_score == 0.5
