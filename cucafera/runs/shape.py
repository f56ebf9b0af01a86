"""Shapes of JSON and plain data that a run folder holds: files from elsewhere, or edited ones, may hold anything."""

from collections.abc import Mapping
from typing import Any

MAX_INTEGER = 2**63
"""Integers stay below it, so that they can be converted to floats and shown."""
NUMBER = (int, float)
NULLABLE_NUMBER = (int, float, type(None))


def shape_problem(value: Any, shape: Any, place: str = "") -> str | None:
    """Return what differs between a value and its shape, as a clause; None if nothing does.

    Args:
        value: Plain data.
        shape: A type, or a tuple of them; `[SHAPE]` for a list of such items; `{KEY: SHAPE}` for a mapping with these
            keys, and maybe others; `{str: SHAPE}` for a mapping of any names.
        place: Path of the value within the file.
    """
    if isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            return _differs(place, "a mapping")
        if missing := [_joined(place, key) for key in shape if key is not str and key not in value]:
            return f"it has no {', '.join(missing)}"
        inner = value if str in shape else shape
        found = (shape_problem(value[key], shape.get(key, shape.get(str)), _joined(place, key)) for key in inner)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return _differs(place, "a list")
        found = (shape_problem(item, shape[0], _joined(place, number)) for number, item in enumerate(value))
    else:
        types = shape if isinstance(shape, tuple) else (shape,)
        if type(value) in types and not (type(value) is int and abs(value) >= MAX_INTEGER):
            return None
        return _differs(place, " or ".join("null" if one is type(None) else one.__name__ for one in types))
    return next(filter(None, found), None)


def _joined(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _differs(place: str, wanted: str) -> str:
    return f"{place or 'it'} is not {wanted}"
