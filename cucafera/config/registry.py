"""Registries: named implementations of one kind, each in a module of its own.

An optimizer, an objective and a source of text are each one file in the package of its kind, or in another
distribution that names its module under the entry point group `cucafera.optimizers`, `cucafera.objectives` or
`cucafera.sources`. The file registers its entry; nothing else has to know of it. Registered modules must not import
torch at the top: a configuration is checked before anything heavy is loaded.
"""

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from cucafera.config.errors import UserError

if TYPE_CHECKING:
    from cucafera.config.schema import Config

Judge = Callable[..., bool]
"""`judge(*keys)` is True if the values of these dotted keys are usable, so that a rule about them can be checked."""


class Entry(Protocol):
    """The part of a registered entry that the configuration uses."""

    name: str
    """The choice in the configuration."""
    config: type[Any]
    """Dataclass of its settings: a group of keys with default, bounds and meaning."""

    def problems(self, config: "Config", judge: Judge) -> Iterator[str]:
        """Yield a sentence for each combination of values that the entry cannot work with."""
        ...


E = TypeVar("E", bound=Entry)


class Registry(Generic[E]):
    """The entries of one kind, by name.

    Args:
        kind: In the singular, for messages and for the entry point group `cucafera.KINDs`.
        package: Its modules are imported when the registry is first asked.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, E] = {}

    def register(self, entry: type[E]) -> type[E]:
        """Add an entry under its name; a decorator of its class.

        Raises:
            ValueError: The name is taken.
        """
        if entry.name in self._entries:
            raise ValueError(f"there are two entries {entry.name!r} of the kind {self.kind}")
        self._entries[entry.name] = entry()
        return entry

    def names(self) -> list[str]:
        """The registered names, sorted."""
        self._import_modules()
        return sorted(self._entries)

    def get(self, name: str) -> E:
        """The entry of a name.

        Raises:
            UserError: There is none; with the nearest name.
        """
        names = self.names()
        if name not in self._entries:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else "; if it comes from a plugin, install that."
            raise UserError(f"there is no {self.kind} {name!r}{hint} There are: {', '.join(names)}")
        return self._entries[name]

    @functools.cache  # noqa: B019  # registries live as long as the process
    def _import_modules(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):  # shared by entries, and not one itself
                importlib.import_module(f"{self._package}.{module.name}")
        for point in importlib.metadata.entry_points(group=f"cucafera.{self.kind}s"):
            try:
                point.load()
            except Exception as error:  # whatever a module of another distribution raises
                plugin = point.dist.name if point.dist else point.value
                raise UserError(
                    f"the plugin {plugin} cannot be loaded ({self.kind} {point.name}, {point.value}): "
                    f"{type(error).__name__}: {error}. Fix or uninstall it"
                ) from error


OPTIMIZERS: Registry[Any] = Registry("optimizer", "cucafera.optimizers")
OBJECTIVES: Registry[Any] = Registry("objective", "cucafera.objectives")
SOURCES: Registry[Any] = Registry("source", "cucafera.data.sources")
