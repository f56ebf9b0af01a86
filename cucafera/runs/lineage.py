"""The runs on this machine that the initial weights of a run come from."""

from pathlib import Path
from typing import NamedTuple

from cucafera.config.errors import UserError
from cucafera.config.schema import Config
from cucafera.runs.folder import RunFolder


class Stage(NamedTuple):
    """A run and its configuration."""

    folder: RunFolder
    config: Config


def stages_back(folder: RunFolder) -> list[Stage]:
    """Return a run, then the one that its init_from names, and so on, as far as they are on this machine.

    Raises:
        UserError: a configuration cannot be read, or the runs lead in a ring.
    """
    stages: list[Stage] = []
    places: list[Path] = []
    source: RunFolder | None = folder
    while source is not None:
        place = source.path.resolve()
        if place in places:
            ring = " <- ".join(path.name for path in (place, *reversed(places)))
            raise UserError(
                f"{source.path}: the init_from of these runs lead in a ring, {ring}, so one of the folders was "
                "overwritten since: rename the one that is no longer what the others began with, and its lineage ends "
                "there"
            )
        config = source.checked_config()
        stages.append(Stage(source, config))
        places.append(place)
        source = _initial_run(config, place)
    return stages


def _initial_run(config: Config, place: Path) -> RunFolder | None:
    """Return the run that init_from names; None if there is none here, or if it is the run itself, started again."""
    if not config.init_from:
        return None
    path = Path(config.init_from).expanduser()
    source = RunFolder(path.parent.parent if path.is_file() else path)
    return source if source.config.is_file() and source.path.resolve() != place else None
