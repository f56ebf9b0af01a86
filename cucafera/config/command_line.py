"""The command line of `cucafera.run`: flags, overrides, and what is wrong with them.

Typing errors are found before Hydra composes anything, so that all of them can be reported together.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cucafera import __version__
from cucafera.config.check import documented_fields, nearest, suggestion
from cucafera.config.choices import config_sources, group_options, groups, no_such_option, search_path
from cucafera.config.compose import (
    PLUGINS,
    Composition,
    ReadModel,
    compose,
    hydra_session,
    in_one_line,
    is_source_key,
    problem_list,
)
from cucafera.config.errors import EXIT_USER_ERROR, UserError
from cucafera.config.fields import flat, format_value
from cucafera.config.folders import UNIQUE_NAMES, folder_problem
from cucafera.config.quoting import exact_form, forms, parse, quoted, readable
from cucafera.config.schema import Config
from cucafera.config.synonyms import synonym

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

FLAGS = ("--help", "--version", "--multirun", "--run", "--cfg", "--resolve", "--config-dir")

REFUSED_KEYS = {
    "hydra.job.chdir": "paths start from the folder of the command; run_dir=... names the run folder",
    "hydra.mode": "--multirun starts a sweep",
    "hydra.run.dir": "run_dir=... names the run folder",
    "hydra.output_subdir": "the run folder holds config.yaml and overrides.yaml",
}
RUN_KEYS = re.compile(r"hydra([./]job_logging|\.verbose|\.searchpath|\.job\.env_set)\b")
"""Keys of Hydra that a single run reads, and each job of a sweep."""
SWEEP_KEYS = re.compile(r"hydra([./](sweep|sweeper|launcher|callbacks|hydra_logging)|\.job\.env_copy)\b")
"""Keys of Hydra that only a sweep reads."""
JOB_KEYS = re.compile(r"[+~]*hydra([./]job_logging|\.verbose|\.searchpath)")
"""Keys of Hydra, as they begin an override, that the command of each job needs; the environment reaches it anyway."""
GENERATED = "hydra.mode=MULTIRUN"
"""The first override that `sweep_arguments` adds to those of the user."""
MOST_JOBS = 10_000
"""Jobs of the largest sweep: a larger number is a typing error."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized arguments: "):
            message = f"there is no flag {unknown}{_flag_advice(unknown)}"
        print(message, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _flag_advice(flag: str) -> str:
    """Return what to write in place of a flag that does not exist."""
    word, _, value = flag.lstrip("-").partition("=")
    word = word.replace("-", "_")
    leaves = {key.split(".")[-1]: key for key in documented_fields()}
    if word == "experiment":
        return f"; experiments are added with a plus: +experiment={value or '...'}"
    if word in documented_fields() or synonym(word) or word in leaves:
        key = word if word in documented_fields() else synonym(word) or leaves[word]
        key, _, remark = key.partition(" ")
        written = f"{key}=... {remark}" if remark else f"{key}={value or '...'}"
        return f"; settings have no dashes: {written}"
    found = nearest(flag, [*FLAGS, *(flags[0] for flags in REFUSED_FLAGS)])
    return f"; did you mean {found}?" if found else ", see --help"


def parse_command_line(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the overrides of a command line, and its flags help, multirun, cfg and resolve.

    --config-dir becomes an override of hydra.searchpath, which reaches the jobs of a sweep too. Exits with code 2 if a
    flag cannot be used.
    """
    parser = _Parser(prog="cucafera.run", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for flag in ("help", "multirun", "run"):
        parser.add_argument(f"--{flag}", f"-{flag[0]}", action="store_true")
    parser.add_argument("--version", action="version", version=f"cucafera {__version__}")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    for flags in REFUSED_FLAGS:
        parser.add_argument(*flags, dest=flags[0], nargs="?", const="")
    for argument in arguments:
        if not argument.isascii() and any("\udc80" <= character <= "\udcff" for character in argument):
            parser.error(f"{argument!r} is not UTF-8, as texts and file names must be")
    given = parser.parse_intermixed_args(arguments)
    for flags, instead in REFUSED_FLAGS.items():
        if getattr(given, flags[0]) is not None:
            parser.error(f"{flags[0]} is not supported: {instead}")
    if given.multirun and (given.cfg or given.run):
        parser.error("--cfg and --run are for one run: leave --multirun out, and give each key one value")
    if given.resolve and not given.cfg:
        parser.error("--resolve needs --cfg")
    for folder in given.config_dir:
        if not Path(folder).expanduser().is_dir():
            parser.error(f"--config-dir {folder}: there is no such folder")
    try:
        given.overrides = with_search_path(given.overrides, given.config_dir)
    except UserError as error:
        parser.error(str(error))
    return given


def with_search_path(overrides: Sequence[str], directories: Sequence[str]) -> list[str]:
    """Return the overrides with further folders of configurations on Hydra's search path.

    Hydra reads only the first override of hydra.searchpath; here all become one, with absolute paths, since jobs of a
    sweep may start in other folders.

    Raises:
        UserError: A path cannot be searched.
    """
    others, folders = [], [f"file://{Path(folder).expanduser().resolve()}" for folder in directories]
    for text in overrides:
        if text.partition("=")[0].strip("+~ ") != "hydra.searchpath":
            others.append(text)
            continue
        override = parse(readable(text, multirun=False))
        paths = override.value() if override is not None and not override.is_delete() else None
        if not isinstance(paths, list):
            raise UserError(f"{text}: it is a list, [file:///DIR,pkg://PACKAGE]; --config-dir DIR does the same")
        folders += [_search_folder(str(path)) for path in paths]
    return [*others, f"hydra.searchpath=[{','.join(map(quoted, folders))}]"] if folders else others


def _search_folder(path: str) -> str:
    kind, _, place = path.partition("://")
    if kind == "file" and Path(place).expanduser().is_dir():
        return f"file://{Path(place).expanduser().resolve()}"
    if kind == "pkg" and _is_package(place):
        return path
    raise UserError(
        f"hydra.searchpath: there is no {path}; a folder is file:///DIR, or --config-dir DIR, and a package pkg://PACKAGE"
    )


def _is_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name.replace("/", ".")) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def command_line_problems(
    overrides: Sequence[str], multirun: bool = False, read_model: ReadModel | None = None
) -> list[str]:
    """Return a sentence for each problem of a command line; an empty list if it can run."""
    with hydra_session(read_model):
        return check_command_line(overrides, multirun).problems


FurtherCheck = Callable[[Config, Path], Iterable[str]]
"""Yields a sentence for each problem outside of a configuration, which may have problems of its own; also given is the
folder of the run or sweep."""


def check_command_line(
    overrides: Sequence[str], multirun: bool = False, further: FurtherCheck | None = None
) -> Composition:
    """Compose the configuration of a command line, within a `hydra_session`, and find all of its problems.

    Of a sweep, the composition is that without what is swept, and each value is checked once, before the first job.

    Args:
        overrides: The command line without its flags.
        multirun: True for a sweep.
        further: Checks what the configuration refers to.
    """
    problems: list[str] = []
    parsed: list[Override] = []
    read = [(text, parse(readable(text, multirun))) for text in overrides]
    sources = config_sources(search_path([override for _, override in read if override]))
    for text, override in read:
        problem = _override_problem(override, sources, multirun) if override else _unreadable(text, sources)
        if problem:
            problems.append(problem)
        elif override:
            parsed.append(_with_listed_choices(override, sources))
    if not multirun:
        composition = compose(parsed)
        refused = {override.key_or_group for _, override in read if override} - {each.key_or_group for each in parsed}
        found = [text for text in composition.problems if not any(text.startswith(f"{key} must") for key in refused)]
        if composition.node is not None and not (problems or found):
            found = [*_hydra_problems(composition.node), *_run_problems(composition.node, parsed)]
        if composition.node is not None and further:
            found += [
                text
                for text in further(composition.config, Path(composition.config.run_dir))
                if not any(known.startswith(text.split(":")[0]) for known in [*problems, *found])
            ]
        return composition._replace(problems=list(dict.fromkeys([*problems, *found])))
    sizes = list(_size_problems(parsed))
    problems += sizes
    if not sizes:
        for job in _sweep_jobs(parsed):
            composed = compose(job)
            problems += composed.problems
            if further and composed.node is not None and not composed.problems:
                with contextlib.suppress(OmegaConfBaseException):  # of the folder, which _sweep_problems reports
                    problems += further(composed.config, _sweep_folder(composed.node))
    if problems:
        return Composition(None, Config(), list(dict.fromkeys(problems)))
    composition = compose(parsed, RunMode.MULTIRUN)
    if composition.node is None or composition.problems:
        return composition
    found = [*_hydra_problems(composition.node), *_sweep_problems(composition.node, parsed)]
    return composition._replace(problems=found)


def _unreadable(text: str, sources: Sequence[ConfigSource]) -> str:
    """Say how an override is written that Hydra cannot read even with quotes."""
    key, equals, value = text.partition("=")
    if not equals:
        experiment = text in group_options("experiment", sources)
        advice = f"to run this experiment: +experiment={text}" if experiment else "write key=value"
        return f"{text!r} cannot be read; {advice}"
    if parse(f"{key}=1") is None:
        return f"{text!r} cannot be read; a key has only letters without accents, digits, _, - and dots: key=value"
    return f"{text!r} cannot be read; as one text it is {exact_form(key, value)}"


def _with_listed_choices(override: Override, sources: Sequence[ConfigSource]) -> Override:
    """Return an override with the choices that a glob(...) matches, those of folders of the command line too."""
    pattern = override.value()
    if not isinstance(pattern, Glob):
        return override
    choices = ",".join(pattern.filter(group_options(override.key_or_group, sources)))
    argument = readable(f"{override.get_key_element()}={choices}", multirun=True)
    return OverridesParser.create().parse_override(argument)


def sweep_arguments(node: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return the overrides with which Hydra composes a sweep.

    Jobs are named by what is swept, so Hydra needs to know what is not; they share one folder, whatever is swept; and
    values that an experiment sweeps give way to those of the command line.

    Args:
        node: The configuration without what is swept.
        overrides: The command line.
    """
    read = OverridesParser.create().parse_overrides([readable(text, multirun=True) for text in overrides])
    sources = config_sources(search_path(read))
    parsed = [_with_listed_choices(override, sources) for override in read]
    keys = [override.key_or_group for override in parsed]
    fixed = [key for key, each in zip(keys, parsed, strict=True) if not (each.is_sweep_override() or _is_hydras(key))]
    return [
        # A setting of a source that no file mentions; Hydra would take it for a typing error.
        *(
            f"++{text.lstrip('+')}" if is_source_key(key) else text
            for key, text in zip(keys, map(_text, parsed), strict=True)
        ),
        *(
            readable(f"{key}={values}", multirun=True)
            for key, values in _swept_by_experiment(node).items()
            if key not in keys
        ),
        GENERATED,
        "hydra.sweeper.params=null",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(dict.fromkeys(fixed))}]",
        f"hydra.sweep.dir={quoted(str(Path(str(node.hydra.sweep.dir)).expanduser()))}",
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


def _hydra_problems(node: DictConfig) -> Iterator[str]:
    """Yield what an experiment sets of Hydra and must not, as `REFUSED_KEYS` of the command line."""
    as_written: Any = OmegaConf.to_container(node.hydra, resolve=False)
    usual = {
        "hydra.job.chdir": (as_written["job"]["chdir"], (None, False)),
        "hydra.run.dir": (as_written["run"]["dir"], ("${run_dir}",)),
        "hydra.output_subdir": (as_written["output_subdir"], (None,)),
        "hydra.mode": (as_written["mode"], (None,)),
    }
    for key, (value, allowed) in usual.items():
        if value not in allowed:
            yield f"{key} is set in an experiment, which is not supported: {REFUSED_KEYS[key]}"


def _sweep_problems(node: DictConfig, overrides: Sequence[Override]) -> Iterator[str]:
    keys = [override.key_or_group for override in overrides]
    swept = {each.key_or_group for each in overrides if each.is_sweep_override()}
    swept |= set(_swept_by_experiment(node)) - set(keys)
    if "run_dir" in keys:
        yield "run_dir is the folder of one run; that of a sweep is hydra.sweep.dir=..."
    if not swept:
        yield "--multirun runs several values of a key, and no key has several: optimizer.lr=1e-3,3e-3"
    for override in overrides:
        if override.is_interval_sweep() and node.hydra.runtime.choices["hydra/sweeper"] == "basic":
            yield (
                f"{_text(override)}: an interval is for a search, +experiment=search or hydra/sweeper=optuna; a grid "
                f"has values, {override.key_or_group}=1e-3,3e-3"
            )
    try:
        folder = _sweep_folder(node)
        subdir = str(OmegaConf.to_container(node.hydra.sweep, resolve=False)["subdir"])  # type: ignore[index,call-overload]
    except OmegaConfBaseException as error:
        yield f"hydra.sweep.dir: {in_one_line(error)}"
        return
    if problem := folder_problem(folder, is_sweep=True):
        yield problem
    named_by = set(re.findall(r"\$\{([\w.:]+)", subdir))
    if subdir.startswith(("/", "~")) or ".." in subdir.split("/"):
        yield f"hydra.sweep.subdir is {subdir}; it must be a folder within that of the sweep, hydra.sweep.dir"
    elif not (named_by & UNIQUE_NAMES or swept <= named_by):
        yield (
            f"hydra.sweep.subdir is {subdir}, which may be one folder for several jobs; leave it out, or number them: "
            "hydra.sweep.subdir='${hydra.job.num}'"
        )


def _sweep_folder(node: DictConfig) -> Path:
    return Path(str(node.hydra.sweep.dir)).expanduser()


def _values(override: Override) -> list[str]:
    """Return the values of a discrete sweep, at most one more than the largest sweep has."""
    return list(itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1))


def _size_problems(overrides: Sequence[Override]) -> Iterator[str]:
    """Yield what is wrong with the number of jobs: none, one twice, or too many."""
    jobs = 1
    given = Counter(override.key_or_group for override in overrides)
    for key in dict.fromkeys(each.key_or_group for each in overrides if each.is_sweep_override()):
        if given[key] > 1:  # one of them wins in every job, so several jobs would be the same
            texts = " and ".join(_text(override) for override in overrides if override.key_or_group == key)
            yield f"{key} is swept and given more than once, {texts}: keep one of them"
    for override in overrides:
        if not override.is_discrete_sweep():
            continue
        try:
            values = _values(override)
        except (HydraException, ArithmeticError, ValueError, MemoryError) as error:
            yield f"{_text(override)}: {in_one_line(error)}"
            continue
        jobs *= len(values)
        twice = next((value for number, value in enumerate(values[:100]) if value in values[:number]), None)
        if not values:
            yield f"{_text(override)} has no values"
        if twice is not None:
            yield f"{_text(override)} gives {twice} twice; both would be the same job"
    if jobs > MOST_JOBS:
        yield f"this sweep has more than {MOST_JOBS:,} jobs; give fewer values"


def _sweep_jobs(overrides: Sequence[Override]) -> Iterator[list[Override]]:
    """Yield command lines that together hold every value of a sweep at least once."""
    columns = []
    for override in overrides:
        if not override.is_sweep_override():
            columns.append([override])
        elif override.is_discrete_sweep():
            key = _text(override).split("=")[0]
            columns.append(OverridesParser.create().parse_overrides([f"{key}={value}" for value in _values(override)]))
        # A continuous sweep has no values before its sweeper runs; each job is checked when it starts.
    for row in range(max((len(column) for column in columns), default=1)):
        yield [column[min(row, len(column) - 1)] for column in columns]


def _override_problem(override: Override, sources: Sequence[ConfigSource], multirun: bool) -> str | None:
    key, text = override.key_or_group, _text(override)
    if not key or override.package is not None:
        return f"{text!r} cannot be read; write key=value, or group=choice"
    if override.is_delete():
        is_source = re.fullmatch(r"data\.sources\.[^.]+", key) and "=" not in text
        return None if is_source else f"{text}: a setting cannot be removed, but set: {key}=VALUE, or null for none"
    if override.is_interval_sweep() and not multirun:
        return f"{text}: an interval is for a search: --multirun +experiment=search {text}"
    if override.is_sweep_override() and not multirun:
        possible = forms(key, text.partition("=")[2])
        return f"{text}: several values are a sweep, add --multirun" + (f"; {possible}" if possible else "")
    if _is_hydras(key):
        return _hydra_override_problem(override, sources, multirun)
    options = group_options(key, sources)
    if options:
        return _group_problem(override, options)
    if isinstance(override.value(), Glob):
        return f"{text}: glob(...) matches the choices of a group, and {key} is none"
    if key in documented_fields() or is_source_key(key) or re.fullmatch(r"data\.sources\.[^.]+", key):
        return None
    known = groups(sources)
    if "." not in key and not synonym(key) and (group := nearest(key, known)) and override.is_add():
        return f"there is no group {key!r}; did you mean +{group}=...?"
    return f"there is no key {key!r}{suggestion(key, [*documented_fields(), *known])}"


def _hydra_override_problem(override: Override, sources: Sequence[ConfigSource], multirun: bool) -> str | None:
    key, text = override.key_or_group, _text(override)
    if key in REFUSED_KEYS:
        return f"{text} is not supported: {REFUSED_KEYS[key]}"
    if SWEEP_KEYS.match(key) and not multirun:
        return f"{text} is about sweeps: add --multirun"
    if not (SWEEP_KEYS.match(key) or RUN_KEYS.match(key)):
        return f"{text} is not supported: nothing here reads it; --cfg hydra shows the settings of Hydra"
    if override.is_sweep_override():
        return f"{text}: settings of Hydra are those of the whole sweep, and have one value"
    value = str(override.value())
    if "/" in key and value not in (options := group_options(key, sources)) and f"{key}/{value}" not in PLUGINS:
        return no_such_option(key, value, options)
    if key == "hydra/launcher" and value in ("cluster", "submitit_slurm") and not shutil.which("srun"):
        return f"{text} hands the jobs to SLURM, and there is no srun on this machine"
    return None


def _group_problem(override: Override, options: Sequence[str]) -> str | None:
    group, chosen = override.key_or_group, override.value()
    if isinstance(chosen, dict):
        return f"{_text(override)}: a choice has a name, {group}={options[0]}; a setting of it is {group}.KEY=VALUE"
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            return f"{_text(override)}: {group} is one of {', '.join(options)}"
        values = _values(override) if not isinstance(chosen, Glob) else chosen.filter(list(options))
        if not values:
            return f"{_text(override)} matches none of {', '.join(options)}"
    else:
        values = [format_value(value) for value in (chosen if isinstance(chosen, list) else [chosen])]
    for value in values:
        if (bare := value.strip("'\"")) not in options:
            return no_such_option(group, bare, options)
    if isinstance(chosen, list) and group != "experiment":
        return f"{_text(override)}: one {group} is chosen, {group}={values[0] if values else options[0]}"
    if group == "experiment" and not override.is_add():
        return f"an experiment is added with a plus: +experiment={format_value(chosen)}"
    if group != "experiment" and override.is_add():
        return f"one {group} is chosen already; replace it, without the plus: {group}={format_value(chosen)}"
    return None


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
