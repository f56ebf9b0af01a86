"""Overrides as people type them, as Hydra can read them: plain texts get their quotes here.

Hydra reads a value by a grammar of its own: `name=català`, `path=~/texts` and `path=texts/[ab].jsonl` are errors to it,
`name=2026_11` is a number, `name=[a]` a list, and a space at an end is dropped. The type of a setting says where a text
is meant.
"""

import functools
import re
import shlex
import typing
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from cucafera.config.check import hint_of
from cucafera.config.fields import options_of

FUNCTION = re.compile(r"\w+\(.*\)", re.DOTALL)
"""A function of Hydra, such as choice(...) or range(...)."""


def quoted(text: str) -> str:
    """Return a text as one value of Hydra's override grammar, whatever characters it contains."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def parse(argument: str) -> Override | None:
    """Return an override as Hydra reads it; None if it cannot."""
    try:
        return OverridesParser.create().parse_override(argument)
    except (HydraException, ValueError, RecursionError):  # a number of thousands of digits; a thousand brackets
        return None


def readable(argument: str, multirun: bool) -> str:
    """Return an override with quotes where Hydra would read something else than the text that was typed, or nothing.

    Args:
        argument: `key=value`, as it was typed. What has quotes or a sweep of Hydra, such as range(1,5), is returned
            unchanged; so are lists, dictionaries, functions and null where the setting is no text.
        multirun: Commas separate the values of a sweep.
    """
    key, equals, value = argument.partition("=")
    hint = hint_of(key.lstrip("+"))
    if not equals or not value or _is_function(argument, value, is_text=_is_text(hint)):
        return argument
    parts = split(value)
    if any(map(_is_list, options_of(hint))) and all(_has_brackets(part) for part in parts):
        if list[str] not in options_of(hint) or (len(parts) > 1 and not multirun):
            return argument
        return f"{key}=" + ",".join(_as_list(part.strip()) for part in parts)
    as_written = functools.partial(_as_text, hint=hint) if _is_text(hint) else _as_value
    if len(parts) > 1 and ("=" in value or _exists(value)):
        whole = _exists(value) or not (multirun and all(map(_exists, parts)))
        parts = [value] if whole else parts
    elif len(parts) > 1 and not multirun:
        return argument  # several values: refused, with the forms that are possible
    return f"{key}=" + ",".join(as_written(part.strip() if len(parts) > 1 else part) for part in parts)


def unescaped(argument: str) -> str:
    """Return an override that Hydra wrote for a job, with quotes in place of its backslashes.

    `readable` takes those for what was typed.
    """
    key, _, value = argument.partition("=")
    override = parse(argument) if "\\" in value and value[:1] not in "'\"[{" else None
    read = override.value() if override is not None else None
    return f"{key}={quoted(read)}" if isinstance(read, str) else argument


def split(text: str) -> list[str]:
    """Split at the commas outside of quotes and brackets; an apostrophe within a word is no quote."""
    parts, depth, quote, start = [], 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[position - 1] != "\\" else quote
        elif character in "'\"" and not text[start:position].strip():
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth <= 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def exact_form(key: str, value: str) -> str:
    """Return how a value that is one text is written for a shell, whatever characters it contains."""
    return shlex.quote(f"{key}={QuotedString(text=value, quote=Quote.double).with_quotes()}")


def forms(key: str, value: str) -> str:
    """Return the ways to write what is read as several values, in words, with the exact text for a shell."""
    hint = hint_of(key.lstrip("+~"))
    possible = []
    if float in options_of(hint) and re.fullmatch(r"\d+,\d+", value):
        possible.append(f"the decimal sign is a dot, {key}={value.replace(',', '.')}")
    if any(map(_is_list, options_of(hint))):
        possible.append(f"a list is {shlex.quote(f'{key}=[{value}]')}")
    if hint is None or str in options_of(hint):
        possible.append(f"one text is {exact_form(key, value)}")
    return "; ".join(possible)


def _as_text(item: str, hint: object = str) -> str:
    """Return an item that is meant as text: as it is if Hydra reads exactly that, a text in quotes, or null or a list
    where the setting may be one. The only escapes without quotes are that of a comma, and of ${ by OmegaConf."""
    override = parse(f"key={item}")
    if override is None:
        return _as_value(item)
    read = override.value()
    if isinstance(read, str):
        is_meant = item[:1] in ("'", '"', "") or read == item.replace("\\,", ",")
    else:
        is_meant = (read is None and type(None) in options_of(hint)) or (
            isinstance(read, list) and any(map(_is_list, options_of(hint)))
        )
    return item if is_meant else quoted(item)


def _as_list(text: str) -> str:
    """Return a list of texts, [a,b]: as it is if Hydra reads exactly these texts."""
    override = parse(f"key={text}")
    value = override.value() if override else None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return text
    items = [item.strip() for item in split(text[1:-1])]
    if len(items) > 1 and not items[-1]:  # [a,]
        items.pop()
    return f"[{','.join(map(_as_text, items))}]" if text[1:-1].strip() else text


def _as_value(item: str) -> str:
    """Return an item of any type: in quotes if Hydra cannot read it, unless an opening quote shows another intent."""
    return item if item[:1] in ("'", '"', "") or parse(f"key={item}") else quoted(item)


def _is_function(argument: str, value: str, is_text: bool) -> bool:
    """True for a function of Hydra; where a text is meant, only for one that gives the values of a sweep."""
    override = parse(argument) if FUNCTION.fullmatch(value) else None
    return override is not None and (override.is_sweep_override() or not is_text)


def _is_list(hint: object) -> bool:
    return typing.get_origin(hint) is list


def _is_text(hint: object) -> bool:
    return str in options_of(hint) and not {int, float, bool} & set(options_of(hint))


def _has_brackets(text: str) -> bool:
    return text.strip()[:1] == "[" and text.strip()[-1:] == "]"


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long; a null byte; ~USER without such a user
        return False
