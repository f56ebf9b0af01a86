"""From plain values to a Config: one walk over the dataclasses converts, judges, and collects every problem."""

import dataclasses
import difflib
import functools
import os
import re
import shlex
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cucafera.config.fields import Limits, convert, format_value, options_of, type_in_words
from cucafera.config.registry import OBJECTIVES, OPTIMIZERS, SOURCES, Registry
from cucafera.config.rules import rule_problems
from cucafera.config.schema import Config, ObjectiveConfig, OptimizerConfig, SourceConfig
from cucafera.config.synonyms import synonym

Problems = dict[str, str]
"""Dotted keys, each with a sentence that says what is wrong with it."""

REGISTRIES: dict[type[Any], Registry[Any]] = {OptimizerConfig: OPTIMIZERS, ObjectiveConfig: OBJECTIVES}
"""Groups whose dataclass is chosen by their `name`."""


@dataclasses.dataclass(frozen=True)
class Unresolved:
    """Stands for a value with an interpolation that leads nowhere, as it is written."""

    text: str


REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def check_config(
    values: Mapping[str, Any],
    raw: Mapping[str, Any],
    known: Mapping[str, str] | None = None,
    place_of: Callable[[str], str | None] = lambda key: None,
) -> tuple[Config, list[str]]:
    """Return the Config of nested plain values, and a sentence for each problem.

    Args:
        values: The values.
        raw: The same before interpolations were resolved. A key that follows another one with a problem is not
            reported a second time.
        known: Problems that are known already, by dotted key.
        place_of: Returns the file that sets a key, for the message; None if that is not worth saying.

    Returns:
        The Config, in which unusable values are replaced by defaults, and the problems.
    """
    problems: Problems = dict(known or {})
    config = build(Config, values, "", problems)
    config.run_dir, config.data.prepared_dir = map(os.path.expanduser, (config.run_dir, config.data.prepared_dir))
    sentences = []
    for key, sentence in problems.items():
        if _followed(key, raw, problems) == key:
            place = place_of(key)
            sentences.append(f"{place}: {sentence}" if place else sentence)
    return config, [*sentences, *rule_problems(config, set(problems))]


def _followed(key: str, raw: Mapping[str, Any], problems: Problems) -> str:
    """Return the key with a problem that this one follows at last; itself if it follows none, or is one of a ring."""
    seen = [key]
    while reference := REFERENCE.search(str(_select(raw, seen[-1]))):
        parents = [reference[1].rsplit(".", depth)[0] for depth in range(reference[1].count(".") + 1)]
        followed = next((parent for parent in parents if parent in problems), None)
        if followed is None:
            break
        if followed in seen:
            return followed
        seen.append(followed)
    return seen[-1]


def build(cls: Any, values: Mapping[str, Any], prefix: str, problems: Problems) -> Any:
    """Return a dataclass of plain values, and add what is wrong with them to `problems`.

    Args:
        cls: A dataclass whose fields are made by `setting`.
        values: Plain values by field name.
        prefix: Of the dotted keys, with a dot at its end if it is not empty.
        problems: Receives keys and sentences.
    """
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, type_hints(cls)
    for key in values:
        if key not in fields:
            problems[prefix + str(key)] = _unknown_key(prefix + str(key), values)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            limits = field.metadata.get("limits", Limits())
            arguments[name] = _value(hints[name], limits, values[name], prefix + name, problems)
            if prefix + name in problems:
                del arguments[name]
        if name not in arguments and field.default is field.default_factory is dataclasses.MISSING:
            problems.setdefault(prefix + name, f"{prefix}{name} must be given: {prefix}{name}=...")
            arguments[name] = None
    return cls(**arguments)


def _value(hint: Any, limits: Limits, value: Any, key: str, problems: Problems) -> Any:
    if value == "???":
        problems[key] = f"{key} must be given: {key}=..."
    elif unresolved := next((item for item in _items(value) if isinstance(item, Unresolved)), None):
        advice = ""
        if str in options_of(hint) and limits.allow(unresolved.text):
            advice = f"; for the text itself, write {text_with_dollar(key, unresolved.text)}"
        elif hint == list[str]:
            advice = "; for the text itself, write \\${"
        problems[key] = (
            f"{key} is {format_value(unresolved.text)}, which refers to a key that does not exist, has no value or "
            f"refers back to this one{advice}"
        )
    elif typing.get_origin(hint) is dict and isinstance(value, dict):
        inner = typing.get_args(hint)[1]
        return {name: _value(inner, limits, item, f"{key}.{name}", problems) for name, item in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        if hint in REGISTRIES:
            return _registered(hint, value, key, problems)
        return _source(value, key, problems) if hint is SourceConfig else build(hint, value, f"{key}.", problems)
    else:
        try:
            converted = convert(hint, value)
        except TypeError:
            quotes = ", in quotes" if isinstance(value, int | float) and str in options_of(hint) else ""
            advice = number_advice(key, hint, value)
            problems[key] = f"{key} is {format_value(value)}; it must be {type_in_words(hint)}{quotes}{advice}"
        else:
            if limits.allow(converted):
                return converted
            form = "a list of at least one item, each " if isinstance(converted, list) and limits.choices else ""
            null = "null or " if type(None) in typing.get_args(hint) and limits.choices else ""
            problems[key] = f"{key} is {format_value(converted)}; it must be {null}{form}{limits.text()}"
    return None


def text_with_dollar(key: str, text: str) -> str:
    """Return the override, for a shell, of a text in which ${ is no interpolation."""
    return shlex.quote(f"{key}={text.replace('${', chr(92) + '${')}")


def number_advice(key: str, hint: Any, value: Any) -> str:
    """Return how a number such as 5M or 1,5 is written."""
    if not {int, float} & set(options_of(hint)) or not isinstance(value, str):
        return ""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGbB])", value):
        exponent = {"k": 3, "m": 6, "g": 9, "b": 9}[found[2].lower()]
        return f", {key}={found[1]}e{exponent}"
    if re.fullmatch(r"\d{1,3}([.,' ]\d{3}){2,}", value):
        return f", {key}={re.sub('[^0-9]', '_', value)}"
    return ""


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _registered(base: type[Any], values: Mapping[str, Any], key: str, problems: Problems) -> Any:
    """Build a group with the dataclass of the entry that its `name` chooses."""
    registry, name = REGISTRIES[base], values.get("name")
    if name in registry.names():
        return build(registry.get(str(name)).config, values, f"{key}.", problems)
    problems[f"{key}.name"] = f"{key}.name is {name}; it must be one of {', '.join(registry.names())}"
    return base()


def _source(values: Mapping[str, Any], key: str, problems: Problems) -> Any:
    """Build a source with the dataclass of the entry whose key is given; None if that key has no usable value."""
    kinds = source_kinds()
    given = [kind for kind in kinds if values.get(kind)]
    if len(given) != 1:
        what = " and ".join(given) or "no source"
        problems[key] = f"{key} gives {what}; it must give exactly one of {', '.join(kinds)}"
        return None
    kept = {name: value for name, value in values.items() if name in given or name not in kinds}
    source = build(kinds[given[0]], kept, f"{key}.", problems)
    return None if f"{key}.{given[0]}" in problems else source


def source_kinds() -> dict[str, type[Any]]:
    """The kinds of source: the key that chooses each, and the dataclass of its settings."""
    return {name: SOURCES.get(name).config for name in SOURCES.names()}


def _unknown_key(key: str, values: Mapping[str, Any]) -> str:
    if key == "experiment":  # the group, as a key
        return "the file of an experiment begins with the line # @package _global_"
    if general_key(key) in documented_fields():  # of another entry
        chosen = values.get("name") or next((kind for kind in source_kinds() if values.get(kind)), "this choice")
        return f"{key} is not a setting of {chosen}{choices_with(key)}"
    return f"there is no key {key!r}{suggestion(key, list(documented_fields()))}"


def choices_with(key: str) -> str:
    """Return "; it is one of optimizer=NAME" for a key of other choices of its group, or nothing."""
    owners = fields_of_choices(key)
    return f"; it is one of {' and '.join(owners)}" if owners else ""


def general_key(key: str) -> str:
    """Return a dotted key with NAME in place of the name of a source."""
    return re.sub(r"^(data\.sources\.)[^.]+", r"\1NAME", key)


def suggestion(key: str, known: Sequence[str]) -> str:
    """Return "; did you mean ...?" with the key of that name elsewhere, or the nearest known one; or nothing."""
    if not key.startswith("data.sources.") and (meant := synonym(key)):
        return f"; did you mean {meant}?"
    if key.startswith("data.sources.") and key.count(".") >= 3:
        known = [word.replace(".NAME.", f".{key.split('.')[2]}.") for word in known]
    found = nearest(key, known)
    return f"; did you mean {found}?" if found else ""


def nearest(word: str, known: Sequence[str]) -> str | None:
    """Return the known word that is nearest; a key with the same last part counts as near."""
    same_leaf = [key for key in known if key.split(".")[-1] == word.split(".")[-1]]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close and not (same_leaf and difflib.SequenceMatcher(None, word, close[0]).ratio() < 0.8):
        return close[0]
    if same_leaf:
        return same_leaf[0]
    leaves = {key.split(".")[-1]: key for key in known}
    leaf = difflib.get_close_matches(word.split(".")[-1], list(leaves), n=1, cutoff=0.7)
    return leaves[leaf[0]] if leaf else None


def documented_fields() -> "dict[str, dataclasses.Field[Any]]":
    """Return the field of each dotted key, of all registered entries too; sources stand under NAME."""
    return {key: field for key, (field, _) in _typed_fields(Config, "", _registered_names()).items()}


def fields_of_choices(key: str) -> "dict[str, dataclasses.Field[Any]]":
    """Return the field of a dotted key in each registered choice of its group that has it, by GROUP=NAME."""
    group, _, name = key.partition(".")
    fields = {}
    for registry in (registry for registry in REGISTRIES.values() if registry.kind == group):
        for choice in registry.names():
            of_choice = {field.name: field for field in dataclasses.fields(registry.get(choice).config)}
            if name in of_choice:
                fields[f"{group}={choice}"] = of_choice[name]
    return fields


def hint_of(key: str) -> Any:
    """Return the type of the setting of a dotted key; None if there is no such setting."""
    return _typed_fields(Config, "", _registered_names()).get(general_key(key), (None, None))[1]


def _registered_names() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(registry.names()) for registry in (OPTIMIZERS, OBJECTIVES, SOURCES))


@functools.cache
def _typed_fields(cls: Any, prefix: str, registered: Any) -> "dict[str, tuple[dataclasses.Field[Any], Any]]":
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for field in dataclasses.fields(cls):
        key, hint = prefix + field.name, type_hints(cls)[field.name]
        found.setdefault(key, (field, hint))
        choices: list[Any] = []
        if typing.get_origin(hint) is dict:
            key, choices = f"{key}.NAME", list(source_kinds().values())
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            registry = REGISTRIES.get(hint)
            choices = [hint, *([registry.get(name).config for name in registry.names()] if registry else [])]
        for choice in choices:
            for inner, typed in _typed_fields(choice, f"{key}.", registered).items():
                found.setdefault(inner, typed)
    return found


@functools.cache
def type_hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(cls)


def _select(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
