"""The command line of `cucafera.run`: flags, overrides, and what is wrong with them.

Typing errors are found before Hydra composes anything, so that all of them can be reported together.
"""

import argparse
import dataclasses
import functools
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig

from cucafera.config.check import documented_fields, nearest, suggestion
from cucafera.config.compose import Composition, ReadModel, compose, hydra_session, is_source_key, problem_list
from cucafera.config.errors import EXIT_USER_ERROR, UserError
from cucafera.config.fields import flat
from cucafera.config.schema import Config

REFUSED_FLAGS: dict[tuple[str, ...], str] = {
    ("--config-name", "-cn"): "a run starts from conf/config.yaml; changes to it are an experiment: +experiment=NAME",
    ("--config-path", "-cp"): "a run starts from conf/config.yaml; --config-dir DIR adds a folder of configurations",
    ("--experimental-rerun",): "the same command resumes a run, from its folder",
    ("--shell-completion", "-sc"): "there is no shell completion; --help lists groups and keys",
    ("--hydra-help",): "see --help, --cfg hydra for Hydra's own settings, and https://hydra.cc",
    ("--info", "-i"): "--cfg hydra shows the choices and the search path, under runtime",
    ("--package", "-p"): "--cfg job shows all groups",
}
"""Flags of Hydra that would start something other than the run that was checked, or that there is another way for."""

REFUSED_KEYS = {
    "hydra.job.chdir": "paths start from the folder of the command; run_dir=... names the run folder",
    "hydra.mode": "--multirun starts a sweep",
}
SWEEP_KEYS = re.compile(r"hydra[./](sweep|sweeper|launcher|callbacks)\b")
"""Keys of Hydra that only a sweep reads."""
JOB_KEYS = re.compile(r"[+~]*hydra([./]job_logging|\.verbose|\.searchpath)")
"""Keys of Hydra, as they begin an override, that each job of a sweep reads too."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(message, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def parse_command_line(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the overrides of a command line, and its flags help, multirun, cfg and resolve.

    --config-dir becomes an override of hydra.searchpath, which reaches the jobs of a sweep too. Exits with code 2 if a
    flag cannot be used.
    """
    parser = _Parser(prog="cucafera.run", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for flag in ("help", "multirun", "run"):
        parser.add_argument(f"--{flag}", f"-{flag[0]}", action="store_true")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    for flags in REFUSED_FLAGS:
        parser.add_argument(*flags, dest=flags[0], nargs="?", const="")
    given = parser.parse_intermixed_args(arguments)
    for flags, instead in REFUSED_FLAGS.items():
        if getattr(given, flags[0]) is not None:
            parser.error(f"{flags[0]} is not supported: {instead}")
    if given.multirun and (given.cfg or given.run):
        parser.error("--cfg and --run are for one run: leave --multirun out, and give each key one value")
    if given.resolve and not given.cfg:
        parser.error("--resolve needs --cfg")
    for folder in given.config_dir:
        if not Path(folder).is_dir():
            parser.error(f"--config-dir {folder}: there is no such folder")
    given.overrides = with_search_path(given.overrides, given.config_dir)
    return given


def with_search_path(overrides: Sequence[str], directories: Sequence[str]) -> list[str]:
    """Return the overrides with further folders of configurations on Hydra's search path."""
    if not directories:
        return list(overrides)
    folders = [f"file://{Path(folder).resolve()}" for folder in directories] + _search_path(overrides)
    others = [text for text in overrides if not text.startswith("hydra.searchpath=")]
    return [*others, f"hydra.searchpath=[{','.join(map(_quoted, folders))}]"]


def _search_path(overrides: Sequence[str]) -> list[str]:
    given = [text for text in overrides if text.startswith("hydra.searchpath=")]
    return [str(path) for text in given for path in OverridesParser.create().parse_override(text).value()]  # type: ignore[union-attr]


def _quoted(text: str) -> str:
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def command_line_problems(
    overrides: Sequence[str], multirun: bool = False, read_model: ReadModel | None = None
) -> list[str]:
    """Return a sentence for each problem of a command line; an empty list if it can run."""
    with hydra_session(read_model):
        return check_command_line(overrides, multirun).problems


def check_command_line(overrides: Sequence[str], multirun: bool = False) -> Composition:
    """Compose the configuration of a command line, within a `hydra_session`, and find all of its problems.

    Of a sweep, the composition is that without what is swept, and each value is checked once, before the first job.
    """
    problems, parsed = [], []
    sources = config_sources(overrides)
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(quote_paths(text, multirun))
        except HydraException:
            problems.append(f"{text!r} cannot be read; write key=value, and quote what has spaces or commas")
            continue
        if problem := _override_problem(override, sources, multirun):
            problems.append(problem)
        else:
            parsed.append(override)
    if not multirun:
        composition = compose(parsed)
        found = composition.problems
        if composition.node is not None and not (problems or found):
            found = list(_run_problems(composition.node, parsed))
        return composition._replace(problems=list(dict.fromkeys([*problems, *found])))
    for job in _sweep_jobs(parsed):
        problems += compose(job).problems
    if problems:
        return Composition(None, Config(), list(dict.fromkeys(problems)))
    composition = compose(parsed, RunMode.MULTIRUN)
    if composition.node is None or composition.problems:
        return composition
    return composition._replace(problems=list(_sweep_problems(composition.node, parsed)))


def quote_paths(argument: str, multirun: bool) -> str:
    """Return an override with its value in quotes if that holds a =, which Hydra cannot read: the path of a job."""
    key, _, value = argument.partition("=")
    if "=" not in value or value[0] in "'\"[{" or "(" in value:
        return argument
    parts = value.split(",")
    several = multirun and all(Path(part).exists() for part in parts)
    return f"{key}=" + ",".join(f"'{part}'" for part in (parts if several else [value]))


def sweep_arguments(node: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return the overrides with which Hydra composes a sweep.

    Jobs are named by what is swept, so Hydra needs to know what is not; they share one folder, whatever is swept; and
    values that an experiment sweeps give way to those of the command line.

    Args:
        node: The configuration without what is swept.
        overrides: The command line.
    """
    parsed = OverridesParser.create().parse_overrides([quote_paths(text, multirun=True) for text in overrides])
    keys = [override.key_or_group for override in parsed]
    fixed = [key for key, each in zip(keys, parsed, strict=True) if not (each.is_sweep_override() or _is_hydras(key))]
    return [
        # A setting of a source that no file mentions; Hydra would take it for a typing error.
        *(
            f"++{text.lstrip('+')}" if is_source_key(key) else text
            for key, text in zip(keys, map(_text, parsed), strict=True)
        ),
        *(f"{key}={values}" for key, values in _swept_by_experiment(node).items() if key not in keys),
        "hydra.mode=MULTIRUN",
        "hydra.sweeper.params=null",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(dict.fromkeys(fixed))}]",
        *([] if "hydra.sweep.dir" in keys else [f"hydra.sweep.dir={_quoted(str(node.hydra.sweep.dir))}"]),
    ]


def _text(override: Override) -> str:
    return override.input_line or ""


def _is_hydras(key: str) -> bool:
    return re.match(r"hydra([./]|$)", key) is not None


def _swept_by_experiment(node: DictConfig) -> dict[str, Any]:
    """The keys that the chosen experiment sweeps, with their values as they are written."""
    return dict(node.hydra.sweeper.params or {})


def _run_problems(node: DictConfig, overrides: Sequence[Override]) -> Iterator[str]:
    missing = set(_swept_by_experiment(node)) - {override.key_or_group for override in overrides}
    if missing:
        values = " ".join(f"{key}=..." for key in sorted(missing))
        yield f"this is a sweep over {', '.join(sorted(missing))}: add --multirun, or for a single run of it {values}"


def _sweep_problems(node: DictConfig, overrides: Sequence[Override]) -> Iterator[str]:
    keys = [override.key_or_group for override in overrides]
    if "run_dir" in keys:
        yield "run_dir is the folder of one run; that of a sweep is hydra.sweep.dir=..."
    if set(_swept_by_experiment(node)) <= set(keys) and not any(each.is_sweep_override() for each in overrides):
        yield "--multirun runs several values of a key, and no key has several: optimizer.lr=1e-3,3e-3"


def _sweep_jobs(overrides: Sequence[Override]) -> Iterator[list[Override]]:
    """Yield command lines that together hold every value of a sweep at least once."""
    columns = []
    for override in overrides:
        if not override.is_sweep_override():
            columns.append([override])
        elif override.is_discrete_sweep():
            key = _text(override).split("=")[0]
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
            columns.append(OverridesParser.create().parse_overrides(values))
        # A continuous sweep has no values before its sweeper runs; each job is checked when it starts.
    for row in range(max((len(column) for column in columns), default=1)):
        yield [column[min(row, len(column) - 1)] for column in columns]


def _override_problem(override: Override, sources: Sequence[ConfigSource], multirun: bool) -> str | None:
    key, text = override.key_or_group, override.input_line
    if override.is_sweep_override() and not multirun:
        return f"{text}: several values are a sweep, add --multirun; a list is written {key}=[...]"
    if _is_hydras(key):
        if key in REFUSED_KEYS:
            return f"{text} is not supported: {REFUSED_KEYS[key]}"
        if SWEEP_KEYS.match(key) and not multirun:
            return f"{text} is about sweeps: add --multirun"
        if key == "hydra/launcher" and override.value() in ("cluster", "submitit_slurm") and not shutil.which("srun"):
            return f"{text} hands the jobs to SLURM, and there is no srun on this machine"
        return None
    options = group_options(key, sources)
    if options:
        return _group_problem(override, options)
    if key in documented_fields() or is_source_key(key) or re.fullmatch(r"data\.sources\.[^.]+", key):
        return None
    known = groups(sources)
    if "." not in key and (group := nearest(key, known)) and override.is_add():
        return f"there is no group {key!r}; did you mean +{group}=...?"
    return f"there is no key {key!r}{suggestion(key, [*documented_fields(), *known])}"


def _group_problem(override: Override, options: Sequence[str]) -> str | None:
    group = override.key_or_group
    if override.is_sweep_override() and override.is_discrete_sweep():
        values = list(override.sweep_string_iterator())
    else:
        chosen = override.value()
        values = [str(value) for value in chosen] if isinstance(chosen, list) else [str(chosen)]
    for value in values:
        if value not in options:
            found = nearest(value, options)
            hint = f"; did you mean {found}?" if found else "."
            return f"there is no {group} {value!r}{hint} There are: {', '.join(options)}"
    if group == "experiment" and not override.is_add():
        return f"an experiment is added with a plus: +experiment={override.value()}"
    if group != "experiment" and override.is_add():
        return f"one {group} is chosen already; replace it, without the plus: {group}={override.value()}"
    return None


def config_sources(overrides: Sequence[str]) -> list[ConfigSource]:
    """Return where Hydra finds files and registered choices, with those of hydra.searchpath in the overrides."""
    kinds: dict[str, Any] = {kind.scheme(): kind for kind in Plugins.instance().discover(ConfigSource)}  # type: ignore[attr-defined]
    added = [kinds[path.partition("://")[0]]("command line", path) for path in _search_path(overrides)]
    return [*GlobalHydra.instance().config_loader().get_sources(), *added]


def groups(sources: Sequence[ConfigSource]) -> list[str]:
    """Return the groups of the configuration, without Hydra's own."""
    names = {name for source in sources for name in source.list("", ObjectType.GROUP)}
    return sorted(name for name in names if name != "hydra")


def group_options(group: str, sources: Sequence[ConfigSource]) -> list[str]:
    """Return the choices of a group, those in folders below it too; none if there is no such group."""
    found = set()
    for source in sources:
        if source.is_group(group):
            found |= set(source.list(group, ObjectType.CONFIG))
            for folder in source.list(group, ObjectType.GROUP):
                found |= {f"{folder}/{option}" for option in group_options(f"{group}/{folder}", [source])}
    return sorted(found)


def composed_config(overrides: Sequence[str], read_model: ReadModel | None = None) -> Config:
    """Return the Config of a command line with these overrides.

    Raises:
        UserError: The configuration has problems; the message lists all of them.
    """
    with hydra_session(read_model):
        composition = check_command_line(overrides)
    if composition.problems:
        raise UserError(problem_list(composition.problems))
    return composition.config


@functools.cache
def default_config() -> Config:
    """Return the Config of a command line without overrides. It is shared: do not change it."""
    return composed_config([])


def differences_from_defaults(config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values are not the default ones, each with the default and the value."""
    default, values = (dict(flat(dataclasses.asdict(each))) for each in (default_config(), config))
    return {
        key: (default.get(key), values.get(key))
        for key in dict.fromkeys([*values, *default])
        if default.get(key) != values.get(key)
    }
