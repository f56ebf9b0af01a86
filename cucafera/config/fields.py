"""Fields of the configuration: default, bounds, choices and meaning of a setting, in one place."""

import copy
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The values that a setting may have; for a list, its items. null is left to the type.

    `must_be`, any other condition in words and as a predicate of the value, stands alone.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[Any, ...] = ()
    must_be: tuple[str, Callable[[Any], bool]] | None = None

    def allow(self, value: Any) -> bool:
        """True if a value of the right type is within the limits."""
        if value is None:
            return True
        if self.must_be is not None:
            return self.must_be[1](value)
        if isinstance(value, list):
            return bool(value or not self.choices) and all(self.allow(item) for item in value)
        if value in self.choices:
            return True
        if isinstance(value, str | bool) or not self._range():
            return not self.choices
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def text(self) -> str:
        """The limits in words, as in "it must be ..."; empty if there are none."""
        if self.must_be is not None:
            return self.must_be[0]
        choices = ", ".join(format_value(choice) for choice in self.choices)
        if not self._range():
            return f"one of {choices}" if choices else ""
        return f"a number of {self._range()}, or {choices}" if choices else self._range()

    def _range(self) -> str:
        bounds = (("above", self.above), ("at least", self.at_least), ("below", self.below), ("at most", self.at_most))
        return " and ".join(f"{word} {format_value(bound)}" for word, bound in bounds if bound is not None)


def setting(
    default: Any,
    meaning: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Sequence[Any] = (),
    must_be: tuple[str, Callable[[Any], bool]] | None = None,
) -> Any:
    """Return the field of a setting.

    Args:
        default: Its default; a class for a group of settings. A text `${key}` follows another key.
        meaning: What it is, with its unit: one sentence for `--help`.
        above, at_least, below, at_most: Bounds of a number.
        choices: The values that are allowed, in addition to the numbers within the bounds, if any.
        must_be: Any other condition, in words and as a predicate, in place of bounds and choices.
    """
    metadata = {"meaning": meaning, "limits": Limits(above, at_least, below, at_most, tuple(choices), must_be)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def convert(hint: Any, value: Any) -> Any:
    """Return a plain value as its type: 5e9 is a whole number.

    Raises:
        TypeError: It does not fit.
    """
    options = options_of(hint)
    if isinstance(value, list):
        items = [typing.get_args(option)[0] for option in options if typing.get_origin(option) is list]
        if not items:
            raise TypeError
        return [convert(items[0], item) for item in value]
    if value is None or isinstance(value, bool):
        if type(value) in options:
            return value
        raise TypeError
    if isinstance(value, int | float):
        if int in options and math.isfinite(value) and value == int(value):
            return int(value)
        if float in options and math.isfinite(value):
            return float(value)
    if str in options and (isinstance(value, str) or {int, float} & set(options)):
        return str(value)
    raise TypeError  # a number for a text: 1.10 and 2026_11 are no longer what was written


def type_in_words(hint: Any) -> str:
    """A type, as in "it must be ..."."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return " or ".join(
        f"a list, each item {type_in_words(typing.get_args(option)[0])}"
        if typing.get_origin(option) is list
        else names.get(option, "a group of keys")
        for option in options_of(hint)
    )


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of any other type, itself."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def format_value(value: Any) -> str:
    """Return a value as the user would type it; long whole numbers with separators."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) > 10**18:
        return f"{float(value):g}" if abs(value) < 10**300 else "a number of more than 300 digits"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):_}" if abs(value) >= 10_000 else str(int(value))
    if isinstance(value, str) and value == value.strip() and value.isprintable():
        return value or "''"
    return str(value) if isinstance(value, float) else repr(value)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf of nested dictionaries with its dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
