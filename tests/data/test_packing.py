"""Best-fit packing."""

import random

import pytest

from cucafera.data.packing import best_fit


def test_each_item_goes_into_the_fullest_bin_with_room():
    assert best_fit([7, 5, 3, 2, 5], 10) == [[0, 2], [1, 4], [3]]
    assert best_fit([], 10) == []
    assert best_fit([10, 1, 10], 10) == [[0], [2], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_no_item_is_lost_no_bin_overflows_and_few_places_are_wasted(seed):
    generator = random.Random(seed)
    capacity = generator.randint(1, 300)
    lengths = [generator.randint(1, capacity) for _ in range(generator.randint(0, 400))]
    bins = best_fit(lengths, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in items) <= capacity for items in bins)
    fewest = -(-sum(lengths) // capacity)
    assert len(bins) <= max(sum(2 * length > capacity for length in lengths), fewest) * 11 / 9 + 6 / 9
    assert bins == best_fit(lengths, capacity)


def test_it_is_what_a_search_through_all_bins_finds():
    generator = random.Random(1)
    lengths = [generator.randint(1, 50) for _ in range(300)]
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        rooms = [(50 - sum(items), number) for number, items in enumerate(bins) if 50 - sum(items) >= length]
        if rooms:
            bins[min(rooms)[1]].append(length)
        else:
            bins.append([length])
    ours = best_fit(lengths, 50)
    assert sorted(sum(lengths[item] for item in items) for items in ours) == sorted(map(sum, bins))


@pytest.mark.parametrize("length", [0, 11])
def test_an_item_that_fits_no_bin_is_refused(length):
    with pytest.raises(ValueError, match="a bin takes 1 to 10"):
        best_fit([3, length], 10)
