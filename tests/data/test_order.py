import time

import numpy as np
import pytest

from cucafera.data.order import BLOCK, WindowOrder, permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**63 + 12345])
def test_a_permutation_reaches_each_position_once(size, key):
    assert sorted(permutation(np.arange(size), size, key)) == list(range(size))


def test_every_order_of_three_occurs():
    orders = {tuple(permutation(np.arange(3), 3, key)) for key in range(200)}
    assert len(orders) == 6


def test_a_permutation_looks_like_chance():
    size = 20_000
    places = np.arange(size)
    for key in range(3):
        shuffled = permutation(places, size, key)
        # For a random permutation the mean displacement is size / 3, the correlation and fixed points near 0 and 1.
        assert abs(np.abs(shuffled - places).mean() / size - 1 / 3) < 0.01
        assert abs(np.corrcoef(places, shuffled)[0, 1]) < 0.03
        assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.03
        assert (shuffled == places).sum() < 10


def test_each_position_of_a_small_permutation_is_equally_probable():
    counts = np.bincount(permutation(np.zeros(60_000, np.int64), 6, np.arange(60_000, dtype=np.uint64)), minlength=6)
    assert np.all(np.abs(counts - 10_000) < 500)


def test_a_billion_windows_take_no_memory_and_a_million_no_second():
    order = WindowOrder([10**9, 3 * 10**8], [1.0, 2.0], seed=1)
    start = time.perf_counter()
    sources, windows = order.windows(2 * 10**9, 1_000_000)
    assert time.perf_counter() - start < 10  # about half a second on an idle core
    assert windows[sources == 0].max() < 10**9
    assert len(set(zip(sources.tolist(), windows.tolist(), strict=True))) > 900_000


def test_a_part_of_the_order_is_the_same_however_it_is_asked_for():
    order = WindowOrder([5000, 70], [1.0, 2.0], seed=1)
    complete = pairs(order, 0, 3 * BLOCK)
    for first, count in ((BLOCK - 3, 8), (5, 1), (2 * BLOCK, 100), (BLOCK - 1, BLOCK + 2), (7, 0), (0, 3 * BLOCK)):
        assert pairs(order, first, count) == complete[first : first + count]


def test_an_epoch_shows_each_window_once():
    order = WindowOrder([13, 7, 1], [1.0, 1.0, 1.0], seed=5)
    assert order.windows_per_epoch == 21
    for epoch in range(3):
        assert sorted(pairs(order, epoch * 21, 21)) == [(s, w) for s, n in enumerate([13, 7, 1]) for w in range(n)]


def test_every_epoch_and_seed_has_another_order():
    order = WindowOrder([500], [1.0], seed=5)
    assert pairs(order, 0, 500) != pairs(order, 500, 500)
    assert pairs(order, 0, 500) != pairs(WindowOrder([500], [1.0], seed=6), 0, 500)
    assert pairs(order, 0, 500) == pairs(WindowOrder([500], [1.0], seed=5), 0, 500)


def test_sources_of_the_same_size_have_different_orders():
    sources, windows = WindowOrder([300, 300], [1.0, 1.0], seed=5).windows(0, 600)
    assert windows[sources == 0].tolist() != windows[sources == 1].tolist()


def shown_in_epoch(order: WindowOrder, epoch: int, source: int) -> set[int]:
    """The windows of a source in an epoch: with weight one half, a half that the order within the source decides."""
    pairs_of_epoch = pairs(order, epoch * order.windows_per_epoch, order.windows_per_epoch)
    return {window for own, window in pairs_of_epoch if own == source}


def test_the_order_within_a_source_depends_on_seed_pass_and_source():
    order = WindowOrder([100, 100], [0.5, 0.5], seed=1)
    first = shown_in_epoch(order, 0, source=0)
    assert len(first) == 50
    assert first != shown_in_epoch(WindowOrder([100, 100], [0.5, 0.5], seed=2), 0, source=0)
    assert first != shown_in_epoch(order, 2, source=0)  # the second pass
    assert first != shown_in_epoch(order, 0, source=1)


def test_the_mixture_of_sources_depends_on_seed_and_epoch():
    def sources(seed: int, epoch: int) -> list[int]:
        return WindowOrder([100, 100], [1.0, 1.0], seed).windows(200 * epoch, 200)[0].tolist()

    assert sources(1, 0) == sources(1, 0)
    assert sources(1, 0) != sources(2, 0)
    assert sources(1, 0) != sources(1, 1)


def test_weight_two_shows_a_source_twice_an_epoch():
    shown = pairs(WindowOrder([10, 8], [1.0, 2.0], seed=3), 0, 26)
    assert {shown.count((0, w)) for w in range(10)} == {1}
    assert {shown.count((1, w)) for w in range(8)} == {2}


def test_weight_one_half_shows_a_source_once_in_two_epochs():
    order = WindowOrder([10, 8], [1.0, 0.5], seed=3)
    assert order.windows_per_epoch == 14
    first, second = pairs(order, 0, 14), pairs(order, 14, 14)
    assert sum(source == 1 for source, _ in first) == 4
    assert sorted(window for source, window in first + second if source == 1) == list(range(8))


def test_a_weight_that_does_not_divide_still_shows_each_window_once_a_pass():
    order = WindowOrder([7], [0.3], seed=3)  # 2 of 7 windows an epoch: passes and epochs do not end together
    assert sorted(window for _, window in order_of_slots(order, epochs=7)) == sorted(list(range(7)) * 2)


def test_a_source_too_small_for_its_weight_is_still_seen():
    assert WindowOrder([100, 2], [1.0, 0.01], seed=0).windows_per_epoch == 101


def test_windows_do_not_depend_on_how_they_are_asked_for():
    order = WindowOrder([13, 7], [1.0, 0.7], seed=5)
    one_by_one = [pairs(order, n, 1)[0] for n in range(100)]
    assert one_by_one == pairs(order, 0, 100) == pairs(order, 0, 37) + pairs(order, 37, 63)


def pairs(order: WindowOrder, first: int, count: int) -> list[tuple[int, int]]:
    sources, windows = order.windows(first, count)
    return list(zip(sources.tolist(), windows.tolist(), strict=True))


def order_of_slots(order: WindowOrder, epochs: int) -> list[tuple[int, int]]:
    return pairs(order, 0, epochs * order.windows_per_epoch)
