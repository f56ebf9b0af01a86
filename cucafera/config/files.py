"""The text of a configuration file, from a folder that may be another person's."""

import re
import zlib
from pathlib import Path

from yaml import AliasEvent, CollectionEndEvent, CollectionStartEvent, MappingStartEvent, NodeEvent, YAMLError, parse

from cucafera.quantities import number_of

MAX_BYTES = 1 << 24
MAX_DEPTH = 64
CHECKSUM = re.compile(r"(?P<body>.*\n)# crc32: (?P<crc32>\d+)\n", re.DOTALL)
"""The config.yaml of a run with its last line, a checksum."""


def config_text(path: Path) -> str:
    """Return the text of a YAML file: a mapping, small, not nested deeply, without aliases, which multiply its size.

    Raises:
        OSError: it cannot be read.
        ValueError, YAMLError: it is something else.
    """
    if path.exists() and not path.is_file():  # a pipe would block
        raise ValueError("it is not a regular file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"it has {number_of(size, 'byte')}, and a configuration at most {MAX_BYTES:,}")
    text = path.read_text(encoding="utf-8")
    depth = 0
    for event in parse(text):
        if not depth and isinstance(event, NodeEvent) and not isinstance(event, MappingStartEvent):
            raise YAMLError("it is not a mapping")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if isinstance(event, AliasEvent) or depth > MAX_DEPTH:
            raise YAMLError("it holds an alias" if isinstance(event, AliasEvent) else "it is nested too deeply")
    return text


def with_checksum(body: str) -> str:
    """Return the text of the config.yaml of a run with its last line, a checksum of the others."""
    return f"{body}# crc32: {zlib.crc32(body.encode())}\n"


def is_as_written(text: str) -> bool:
    """True if the config.yaml of a run is as the run wrote it."""
    match = CHECKSUM.fullmatch(text)
    return match is not None and match["crc32"] == str(zlib.crc32(match["body"].encode()))
