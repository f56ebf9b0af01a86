"""The importance of the parameters of a search."""

import math
import random

import pytest

from cucafera.sweeps.importance import importance, is_logarithmic


def searched(jobs: int, seed: int = 0) -> tuple[dict[str, list[str]], list[float]]:
    """A search whose results have a valley in `valley`, a slope in `slope`, and nothing in `nothing`."""
    rng = random.Random(seed)
    rows = [(rng.random(), rng.choice("ab"), rng.random()) for _ in range(jobs)]
    columns = zip(*rows, strict=True)
    parameters = {
        name: [str(value) for value in column]
        for name, column in zip(("valley", "slope", "nothing"), columns, strict=True)
    }
    costs = [4 * (valley - 0.5) ** 2 + 0.3 * (slope == "b") + rng.gauss(0, 0.05) for valley, slope, _ in rows]
    return parameters, costs


def test_a_valley_and_a_category_explain_and_what_has_no_effect_does_not():
    found = importance(*searched(150))
    assert list(found) == ["valley", "slope", "nothing"]
    assert [each.is_clear for each in found.values()] == [True, True, False]
    assert 0.4 < found["valley"].share < 0.9 and found["nothing"].share < 0.05


def test_a_parameter_without_effect_counts_as_clear_in_one_search_of_twenty():
    clear = sum(importance(*searched(20, seed))["nothing"].is_clear for seed in range(100))
    assert clear <= 10


def test_a_job_without_a_result_is_the_worst_and_few_jobs_say_nothing():
    parameters, costs = searched(40)
    order = sorted(range(40), key=costs.__getitem__)
    finite = importance(parameters, costs)
    worst = [math.inf if number == order[-1] else cost for number, cost in enumerate(costs)]
    assert importance(parameters, worst) == finite
    assert importance({key: values[:8] for key, values in parameters.items()}, costs[:8]) == {}
    assert importance(parameters, [1.0] * 40) == {}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([2.5e-4 * 2**power for power in range(7)], True), ([512, 1024, 2048, 4096, 8192, 16384], True),
     ([0.02 * number for number in range(1, 16)], False), ([0, 0.1, 1], False), ([1, 2, 3], False)],
)  # fmt: skip
def test_what_is_spread_by_ratios_is_logarithmic(numbers, expected):
    assert is_logarithmic(numbers) is expected
