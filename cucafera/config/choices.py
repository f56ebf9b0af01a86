"""Files and choices of the configuration: where Hydra finds them, and which of the user's files a problem is in."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from yaml import YAMLError

from cucafera.config.check import nearest

CONFIG_NAME = "config"


def config_directory() -> Path:
    """Return conf/ of an installed package, or of the source tree that contains the package."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def no_such_option(group: str, option: str, options: Sequence[str]) -> str:
    """Return the sentence that a group has no such choice."""
    found = nearest(option, options)
    hint = f"; did you mean {found}?" if found else "."
    return f"there is no {group} {option!r}{hint} There are: {', '.join(options)}"


def search_path(overrides: Sequence[Override]) -> list[str]:
    """Return the folders and packages that overrides of hydra.searchpath add, as Hydra writes them."""
    given = [override.value() for override in overrides if override.key_or_group == "hydra.searchpath"]
    return [str(path) for paths in given if isinstance(paths, list) for path in paths]


def config_sources(added: Sequence[str] = ()) -> list[ConfigSource]:
    """Return where Hydra finds files and registered choices, with those of a search path."""
    kinds: dict[str, Any] = {kind.scheme(): kind for kind in Plugins.instance().discover(ConfigSource)}  # type: ignore[attr-defined]
    return [
        *GlobalHydra.instance().config_loader().get_sources(),
        *(kinds[path.partition("://")[0]]("command line", path) for path in added),
    ]


def groups(sources: Sequence[ConfigSource]) -> list[str]:
    """Return the groups of the configuration, without Hydra's own."""
    names = {name for source in sources for name in source.list("", ObjectType.GROUP)}
    return sorted(name for name in names if name != "hydra")


def group_options(group: str, sources: Sequence[ConfigSource]) -> list[str]:
    """Return the choices of a group, those in folders below it too; none if there is no such group."""
    found = set()
    for source in sources:
        if group and source.is_group(group):
            found |= set(source.list(group, ObjectType.CONFIG))
            for folder in source.list(group, ObjectType.GROUP):
                found |= {f"{folder}/{option}" for option in group_options(f"{group}/{folder}", [source])}
    return sorted(found)


def path_of(config: str, overrides: Sequence[Override]) -> str | None:
    """Return the path of a configuration that Hydra names, such as experiment/mine."""
    for source in config_sources(search_path(overrides)):
        path = Path(source.path) / f"{config.removesuffix('.yaml')}.yaml"
        if source.scheme() == "file" and path.is_file() and config_directory() not in path.parents:
            return str(path)
    return None


def _chosen_files(overrides: Sequence[Override]) -> Iterator[tuple[str, str, Path]]:
    """Yield group, choice and file of the user's own files that the overrides choose."""
    for override in overrides:
        values = override.value() if override.value_type is not None else None
        for value in values if isinstance(values, list) else [values]:
            if path := path_of(f"{override.key_or_group}/{value}", overrides):
                yield override.key_or_group, str(value), Path(path)


def file_that_names(word: str, overrides: Sequence[Override]) -> str | None:
    """Return the path of the user's own file, of those that the overrides choose, that holds a word."""
    for _, choice, path in _chosen_files(overrides):
        if choice != word and word in path.read_text(encoding="utf-8", errors="replace"):
            return str(path)
    return None


def unreadable_file(overrides: Sequence[Override]) -> str | None:
    """Say which of the user's own files is the reason that Hydra could not read them; None if none is."""
    for group, choice, path in _chosen_files(overrides):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
        except (YAMLError, ValueError) as error:
            return f"{path} cannot be read: {' '.join(str(error).split())}"
        if content is not None and not isinstance(content, dict):
            return f"{path} holds no settings, but a {type(content).__name__}: write lines such as key: value"
        defaults = (content or {}).get("defaults", [])
        if not isinstance(defaults, list):
            return f"{path}: defaults is a list of choices, one a line, such as - override /model: small"
        if any(choice == each for each in defaults):
            return f"{path}: its defaults name {group}/{choice}, the file itself"
    return None


def files_with_keys(lines: list[str], overrides: Sequence[Override]) -> Iterator[tuple[str, set[str]]]:
    """Yield each of the user's own files that is part of a composition, last first, with the dotted keys that it sets.

    An experiment without the line that makes it global sets keys below `experiment`.

    Args:
        lines: The overrides that Hydra composes.
        overrides: All of them.
    """
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(CONFIG_NAME, lines, RunMode.RUN).defaults
    for default in reversed(defaults):
        path = path_of(default.config_path or "", overrides)
        if path is None:
            continue
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        package = default.package or ""
        keys = {part for part in package.split(".")[:1] if part}
        for key in _dotted(content if isinstance(content, dict) else {}):
            keys.add(f"{package}.{key}" if package else key)
        yield path, keys


def _dotted(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
