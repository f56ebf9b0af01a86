"""Bin packing: the conversations that share a window."""

from collections import defaultdict
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins by best-fit decreasing: the longest first, each into the fullest bin that it fits.

    It needs at most 11/9 of the fewest possible bins, and one more (Johnson, 1974).

    Args:
        lengths: Size of each item, from 1 to capacity.
        capacity: Size of a bin.

    Returns:
        The indices of the items in each bin; every item is in exactly one. The same for the same lengths.

    Raises:
        ValueError: An item does not fit an empty bin.
    """
    bins: list[list[int]] = []
    # Bins by the space left in them, and a bit mask of these spaces (bit s: a bin with exactly s left). The lowest
    # set bit at or above a length is the best fit: an item takes a few operations, not a search of all bins.
    bins_with: defaultdict[int, list[int]] = defaultdict(list)
    spaces = 0
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        if not 1 <= length <= capacity:
            raise ValueError(f"item {item} has the length {length}; a bin takes 1 to {capacity}")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            number = bins_with[space].pop()
            if not bins_with[space]:
                spaces &= ~(1 << space)
        else:
            space, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        left = space - length
        if left:
            bins_with[left].append(number)
            spaces |= 1 << left
    return bins
