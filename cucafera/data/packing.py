"""Which conversations share a window."""

from collections import defaultdict
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into bins, each whole, the longest first, into the fullest bin that still has room.

    Best-fit decreasing needs at most 11/9 of the fewest possible bins, and one more (Johnson, 1974). The bins of each
    remaining room are kept together, and a bit mask tells which rooms there are, so an item takes a few operations.

    Args:
        lengths: Size of each item, from 1 to capacity.
        capacity: Size of a bin.

    Returns:
        The numbers of the items in each bin; every item is in exactly one. The same for the same lengths.

    Raises:
        ValueError: an item does not fit any bin.
    """
    bins: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r is set when a bin has room for exactly r
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        if not 1 <= length <= capacity:
            raise ValueError(f"item {item} has the length {length}; a bin takes 1 to {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        left = room - length
        if left:
            with_room[left].append(number)
            rooms |= 1 << left
    return bins
