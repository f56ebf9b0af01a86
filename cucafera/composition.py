"""From the command line to a Config: Hydra composes conf/, and every problem is told at once, in words.

Hydra stops at the first typo. So the configuration is composed once without types, walked against the dataclasses
of config.py, and only a configuration without problems goes on to Hydra's own typed composition.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Union

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cucafera.config import Config, DataConfig, ModelConfig, UserError, shown, value_problems

CONFIG_NAME = "config"
SCHEMA_NAME = "schema"
PLUGINS = {
    "hydra/launcher/joblib": "parallel",
    "hydra/launcher/submitit_local": "cluster",
    "hydra/launcher/submitit_slurm": "cluster",
    "hydra/sweeper/optuna": "search",
}
"""Choices that Hydra has only with a plugin, and the extra of pyproject.toml that brings it."""


def config_directory() -> Path:
    """conf/ of an installed package, or of the source tree that the package lies in."""
    package = Path(__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


@dataclasses.dataclass
class _OpenDataConfig(DataConfig):
    """Hydra can add no dataclass by a key below it, so it takes any source; `typed_config` checks them."""

    sources: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Schema(Config):
    data: DataConfig = dataclasses.field(default_factory=_OpenDataConfig)


def register_schema() -> None:
    """Makes the dataclasses the schema that stands first in the defaults list, and `${inherited:...}` known."""
    ConfigStore.instance().store(name=SCHEMA_NAME, node=_Schema)
    OmegaConf.register_new_resolver("inherited", _inherited, replace=True)


def _inherited(key: str, *, _root_: DictConfig) -> Any:
    """The value of a key in what init_from names."""
    return OmegaConf.select(_config_to_inherit(_root_), key, throw_on_missing=True)


def _config_to_inherit(composed: DictConfig) -> DictConfig:
    """The configuration, or only the model, that init_from names; if that is gone, of the run that began with it."""
    from cucafera.interop.layout import folder_of, is_hugging_face, read_layout  # tokenizers takes half a second

    try:
        if is_hugging_face(composed.init_from):
            layout = read_layout(folder_of(composed.init_from, with_weights=False))
            return OmegaConf.create({"model": dataclasses.asdict(layout.model)})
        return _config_of_run(composed.init_from)
    except (OSError, UserError):
        own = Path(composed.run_dir) / "config.yaml"
        begun = OmegaConf.load(own) if own.is_file() else None
        if isinstance(begun, DictConfig) and begun.get("init_from") == composed.init_from:
            return begun
        raise


def _config_of_run(init_from: str) -> DictConfig:
    """The configuration of a run folder, or of the run that a checkpoint belongs to."""
    source = Path(init_from).expanduser()
    path = (source.parent.parent if source.is_file() else source) / "config.yaml"
    return _loaded(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _loaded(path: Path, changed_ns: int) -> DictConfig:
    """A configuration file as it was at a time: each key that is inherited asks for it.

    A run writes values and nothing else: an interpolation, which could read this machine's environment, is not its.
    """
    text = path.read_text(encoding="utf-8")
    if "${" in text:
        raise OmegaConfBaseException(f"{path} holds an interpolation")
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    return config


def _inheritance_problem(composed: DictConfig) -> str | None:
    """Why the model cannot be taken from what init_from names, if that is asked for."""
    model = OmegaConf.to_container(composed.model, resolve=False) if OmegaConf.is_config(composed.model) else {}
    if not isinstance(model, dict) or not any("${inherited:" in str(value) for value in model.values()):
        return None
    if composed.init_from is None:
        return (
            "init_from must be given: init_from=RUN, the folder or a checkpoint of the run that training begins with, "
            "or a Hugging Face folder or name (model=inherited takes its model)"
        )
    try:
        _config_to_inherit(composed).model  # noqa: B018
    except UserError as error:
        return f"init_from: {error}"
    except (OSError, YAMLError, OmegaConfBaseException, AssertionError):
        return (
            f"init_from={composed.init_from}: there is no run there whose model could be taken (a run folder holds a "
            "config.yaml); name one that is, or the model with model=..."
        )
    return None


def hydra_arguments(arguments: Sequence[str], multirun: bool = False, user_directory: str | None = None) -> list[str]:
    """The arguments as Hydra needs them.

    It must be told with ++ to set a field of a source that no file mentions. The jobs of a sweep are named by what is
    swept, so it must be told what is not, and which folder they share; and what an experiment sweeps gives way to what
    the command line says.
    """
    readable = [_readable(text, multirun) for text in arguments]
    given = [f"++{text}" if _is_source_key(text.split("=")[0]) else text for text in readable]
    if not multirun:
        return given
    parsed = OverridesParser.create().parse_overrides(given)
    keys = [override.key_or_group for override in parsed]
    fixed = [
        override.key_or_group
        for override in parsed
        if not override.is_sweep_override() and not _is_hydras(override.key_or_group)
    ]
    composed = _composed_by_hydra(parsed, user_directory)
    folder = str(composed.hydra.sweep.dir).replace("'", "\\'")
    return [
        *given,
        *(f"{key}={values}" for key, values in _swept_by_experiment(composed).items() if key not in keys),
        "hydra.sweeper.params=null",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(dict.fromkeys(fixed))}]",
        *([] if "hydra.sweep.dir" in keys else [f"hydra.sweep.dir='{folder}'"]),
    ]


def _readable(argument: str, multirun: bool) -> str:
    """The argument with its value in quotes if that is a path of a job, with a = in it, which Hydra cannot read."""
    key, _, value = argument.partition("=")
    if "=" not in value or value[0] in "'\"[{" or "(" in value:
        return argument
    parts = value.split(",")
    several = multirun and all(Path(part).exists() for part in parts)
    return f"{key}=" + ",".join(f"'{part}'" for part in (parts if several else [value]))


def _composed_by_hydra(overrides: Sequence[Override], user_directory: str | None) -> DictConfig:
    """The configuration without what is swept, and with Hydra's own."""
    fixed = [override.input_line or "" for override in overrides if not override.is_sweep_override()]
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return compose(CONFIG_NAME, [*fixed, *_searchpath(user_directory)], return_hydra_config=True)


def _swept_by_experiment(composed: DictConfig) -> dict[str, Any]:
    """What the chosen experiment sweeps, under hydra.sweeper.params: keys and their values as they are written."""
    return dict(composed.hydra.sweeper.params or {})


def _searchpath(user_directory: str | None) -> list[str]:
    return [f"hydra.searchpath=[file://{Path(user_directory).resolve()}]"] if user_directory else []


def _is_hydras(key: str) -> bool:
    """Whether a key is Hydra's own, not one of a run."""
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def typed_config(composed: DictConfig) -> Config:
    """The dataclasses of a composed configuration. Raises UserError with every problem that it has."""
    values = {key: value for key, value in _plain(composed).items() if key != "hydra"}
    config, problems = _checked(values)
    if problems:
        raise UserError(listed(problems))
    return config


def composed_config(overrides: Sequence[str]) -> Config:
    """The Config that a command line with these overrides gives. Raises UserError with every problem."""
    problems = command_line_problems(overrides)
    if problems:
        raise UserError(listed(problems))
    register_schema()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return typed_config(compose(CONFIG_NAME, overrides=hydra_arguments(overrides)))


def default_config() -> Config:
    """The Config of a command line without overrides; also within a job of Hydra."""
    register_schema()
    within_job = GlobalHydra.instance().is_initialized()
    place = nullcontext() if within_job else initialize_config_dir(str(config_directory()), version_base="1.3")
    with place:
        return typed_config(compose(CONFIG_NAME))


def listed(problems: Sequence[str]) -> str:
    """The message that tells all problems together."""
    if len(problems) == 1:
        return f"The configuration has a problem:\n  - {problems[0]}"
    return f"The configuration has {len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


def command_line_problems(
    arguments: Sequence[str], multirun: bool = False, user_directory: str | None = None
) -> list[str]:
    """Every problem of a command line, in words; an empty list if it can run.

    Args:
        arguments: Hydra overrides, such as `model=tiny` or `optimizer.lr=1e-3`.
        multirun: Whether comma-separated values are a sweep; each value is then checked once.
        user_directory: A second folder of configs, Hydra's --config-dir.
    """
    if user_directory is not None and not Path(user_directory).is_dir():
        return [f"--config-dir {user_directory}: there is no such folder"]
    directories = [config_directory(), *([Path(user_directory)] if user_directory else [])]
    problems: list[str] = []
    usable: list[Override] = []
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(_readable(argument, multirun))
        except HydraException:
            problems.append(f"{argument!r} cannot be read; write key=value, and quote what has spaces or commas")
            continue
        found = _override_problem(override, directories, multirun)
        if found is None:
            usable.append(override)
        else:
            problems.append(found)
    for job in _sweep_jobs(usable):
        problems += _composition_problems([*job, *_searchpath(user_directory)])
    return list(dict.fromkeys(problems or _sweep_problems(usable, multirun, user_directory)))


def _sweep_problems(overrides: Sequence[Override], multirun: bool, user_directory: str | None) -> Iterator[str]:
    """What is wrong with a command line as a sweep, or as one that is none, where each of its jobs is right."""
    if not multirun and not any(override.key_or_group == "experiment" for override in overrides):
        return  # only an experiment sweeps something by itself
    swept = _swept_by_experiment(_composed_by_hydra(overrides, user_directory))
    missing = [key for key in swept if key not in {override.key_or_group for override in overrides}]
    if missing and not multirun:
        values = " ".join(f"{key}=..." for key in missing)
        yield f"this is a sweep over {', '.join(missing)}: add --multirun, or for a single run of it {values}"
    if multirun and any(override.key_or_group == "run_dir" for override in overrides):
        yield "run_dir is the folder of one run; that of a sweep is hydra.sweep.dir=..."
    if multirun and not missing and not any(override.is_sweep_override() for override in overrides):
        yield "--multirun runs several values of a key, and there is none with several: optimizer.lr=1e-3,3e-3"


def _unknown_sources(overrides: Sequence[str]) -> list[str]:
    """Problems of overrides that change a source which no configuration file names."""
    changed = [text for text in overrides if text.startswith("data.sources.")]
    if not changed:
        return []
    named = _compose_loosely([text for text in overrides if "data.sources." not in text]).data.sources
    return [
        f"{text}: there is no source {text.split('.')[2]!r}; add one with a plus: +{text}"
        for text in changed
        if text.split("=")[0].split(".")[2] not in named
    ]


def _sweep_jobs(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Command lines that between them hold every value of a sweep at least once."""
    columns = []
    for override in overrides:
        if not override.is_sweep_override():
            columns.append([override.input_line or ""])
        elif override.is_discrete_sweep():
            key = override.input_line.split("=")[0] if override.input_line else override.key_or_group
            columns.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        # A continuous sweep has no values before its sweeper runs; each job is checked when it starts.
    longest = max((len(column) for column in columns), default=1)
    for row in range(longest):
        yield [column[min(row, len(column) - 1)] for column in columns]


def _override_problem(override: Override, directories: Sequence[Path], multirun: bool) -> str | None:
    key, text = override.key_or_group, override.input_line
    if override.is_sweep_override() and not multirun:
        return f"{text}: several values are a sweep, add --multirun; a list is written {key}=[...]"
    if key == "hydra/launcher" and override.value() in ("cluster", "submitit_slurm") and shutil.which("srun") is None:
        return f"{text} hands the jobs to SLURM, and there is no srun on this machine"
    if _is_hydras(key):
        return None
    options = _group_options(key, directories)
    if options is not None:
        return _group_problem(override, options)
    known = field_documentation()
    if key in known or _is_source_key(key):
        return None
    if "." not in key and (group := _nearest(key, _groups(directories))) and override.is_add():
        return f"there is no group {key!r}; did you mean +{group}=...?"
    return f"there is no key {key!r}{_suggestion(key, [*known, *_groups(directories)])}"


def _group_problem(override: Override, options: Sequence[str]) -> str | None:
    group = override.key_or_group
    if override.is_sweep_override() and override.is_discrete_sweep():
        values = list(override.sweep_string_iterator())
    else:
        chosen = override.value()
        values = [str(value) for value in chosen] if isinstance(chosen, list) else [str(chosen)]
    for value in values:
        if value not in options:
            nearest = _nearest(value, options)
            hint = f"; did you mean {nearest}?" if nearest else "."
            return f"there is no {group} {value!r}{hint} There are: {', '.join(options)}"
    if group == "experiment" and not override.is_add():
        return f"an experiment is added with a plus: +experiment={override.value()}"
    if group != "experiment" and override.is_add():
        return f"one {group} is chosen already; replace it, without the plus: {group}={override.value()}"
    return None


def _composition_problems(overrides: Sequence[str]) -> list[str]:
    try:
        unknown = _unknown_sources(overrides)
        if unknown:
            return unknown
        composed = _compose_loosely(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return [_told_by_hydra(error)]
    except YAMLError as error:
        return [f"a configuration file cannot be read: {' '.join(str(error).split())}"]
    inheritance = _inheritance_problem(composed)
    if inheritance is None:
        return _checked(_plain(composed))[1]
    composed.model = OmegaConf.to_container(OmegaConf.structured(ModelConfig))  # stands in, for the other problems
    return [inheritance, *_checked(_plain(composed), {"init_from"})[1]]


def _told_by_hydra(error: Exception) -> str:
    first = " ".join(str(error).split("\n")[0].split())
    for plugin, extra in PLUGINS.items():
        if f"'{plugin}'" in first:
            return f"{plugin} needs a plugin of Hydra: pip install '.[{extra}]'"
    return first


def _compose_loosely(overrides: Sequence[str]) -> DictConfig:
    """The configuration without types, in which a key that does not exist is no error yet."""
    register_schema()
    loose_schema = OmegaConf.to_container(OmegaConf.structured(Config), resolve=False)
    ConfigStore.instance().store(name=SCHEMA_NAME, node=loose_schema)
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            return compose(CONFIG_NAME, overrides=hydra_arguments(overrides))
    finally:
        register_schema()


def _plain(composed: DictConfig) -> dict[str, Any]:
    """Plain dictionaries and lists; interpolations that lead nowhere stay as they are written."""
    try:
        container = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException:
        container = {
            key: _plain(composed[key]) if isinstance(composed._get_node(key), DictConfig) else _resolved(composed, key)
            for key in map(str, composed)
        }
    return typing.cast(dict[str, Any], container)


def _resolved(composed: DictConfig, key: str) -> Any:
    """One value, or the text of an interpolation that leads nowhere."""
    try:
        value = OmegaConf.select(composed, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return OmegaConf.to_container(composed, resolve=False)[key]  # type: ignore[index,call-overload]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _checked(values: dict[str, Any], known_to_be_wrong: Iterable[str] = ()) -> tuple[Config, list[str]]:
    """The dataclasses of plain values, and every problem of keys, types and values that is not known yet."""
    problems: list[str] = []
    unusable = set(known_to_be_wrong)
    config = _build(Config, values, "", problems, unusable)
    problems += value_problems(config, unusable)
    return config, problems


def _build(cls: type[Any], values: dict[str, Any], prefix: str, problems: list[str], unusable: set[str]) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            dotted = prefix + str(key)
            problems.append(f"there is no key {dotted!r}{_suggestion(dotted, list(field_documentation()))}")
    arguments = {}
    for name, hint in hints.items():
        if name in values:
            before = len(problems)
            built = _convert(hint, values[name], prefix + name, problems, unusable)
            if built is not None or len(problems) == before:
                arguments[name] = built
    return cls(**arguments)


def _convert(hint: Any, value: Any, key: str, problems: list[str], unusable: set[str]) -> Any:
    """The value as its type says; what does not fit is told in `problems`, and its key put into `unusable`."""
    if isinstance(value, str) and value == "???":
        problems.append(f"{key} must be given: {key}=...")
        unusable.add(key)
        return None
    if isinstance(value, str) and "${" in value:
        problems.append(f"{key} is {value!r}, which refers to a key that does not exist or has no value")
        unusable.add(key)
        return None
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _build(hint, value, key + ".", problems, unusable)
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        inner = typing.get_args(hint)[1]
        return {name: _convert(inner, item, f"{key}.{name}", problems, unusable) for name, item in value.items()}
    if typing.get_origin(hint) is list and isinstance(value, list):
        inner = typing.get_args(hint)[0]
        if all(_fits(inner, item) for item in value):
            return [_as(inner, item) for item in value]
    elif _fits(hint, value):
        return _as(hint, value)
    problems.append(f"{key} is {shown(value)!s}; it must be {_in_words(hint)}")
    unusable.add(key)
    return None


def _fits(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_fits(option, value) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)


def _as(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        options = typing.get_args(hint)
        if int in options and float in options and float(value).is_integer():
            return int(value)
        exact = [option for option in options if type(value) is option]
        return value if exact or value is None else _as(next(o for o in options if _fits(o, value)), value)
    return hint(value) if hint in (int, float, str) else value


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) in (Union, types.UnionType):
        options = typing.get_args(hint)
        if float in options:
            options = tuple(option for option in options if option is not int)
        return " or ".join(_in_words(option) for option in options)
    if typing.get_origin(hint) is list:
        return f"a list, each item {_in_words(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        return "a group of keys"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names[hint]


def _is_source_key(key: str) -> bool:
    """Whether a key is data.sources.NAME or a field below it."""
    parts = key.split(".")
    if parts[:2] != ["data", "sources"] or len(parts) > 4:
        return False
    return len(parts) < 4 or f"data.sources.NAME.{parts[3]}" in field_documentation()


def _group_options(group: str, directories: Sequence[Path]) -> list[str] | None:
    """The choices of a group, or None if there is no such group."""
    found = [directory / group for directory in directories if group and (directory / group).is_dir()]
    if not found:
        return None
    return sorted(
        {path.relative_to(root).with_suffix("").as_posix() for root in found for path in root.rglob("*.yaml")}
    )


def _groups(directories: Sequence[Path]) -> list[str]:
    return sorted(
        {path.name for root in directories for path in root.iterdir() if path.is_dir() and path.name != "hydra"}
    )


def _suggestion(key: str, known: Sequence[str]) -> str:
    if key.startswith("data.sources.") and key.count(".") == 3:
        known = [word.replace(".NAME.", f".{key.split('.')[2]}.") for word in known]
    nearest = _nearest(key, known)
    return f"; did you mean {nearest}?" if nearest else ""


def _nearest(word: str, known: Sequence[str]) -> str | None:
    same_leaf = [key for key in known if key.split(".")[-1] == word.split(".")[-1]]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close and not (same_leaf and difflib.SequenceMatcher(None, word, close[0]).ratio() < 0.8):
        return close[0]
    if same_leaf:
        return same_leaf[0]
    leaves = {key.split(".")[-1]: key for key in known}
    leaf = difflib.get_close_matches(word.split(".")[-1], list(leaves), n=1, cutoff=0.7)
    return leaves[leaf[0]] if leaf else None


@functools.cache
def field_documentation(cls: type[Any] = Config, prefix: str = "") -> dict[str, str]:
    """Each dotted key of the configuration with the sentence under its field; sources stand under NAME."""
    documentation: dict[str, str] = {}
    hints = typing.get_type_hints(cls)
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field_node, text_node in itertools.pairwise(body.body):
        if not (isinstance(field_node, ast.AnnAssign) and isinstance(field_node.target, ast.Name)):
            continue
        name = field_node.target.id
        if isinstance(text_node, ast.Expr) and isinstance(text_node.value, ast.Constant):
            documentation[prefix + name] = str(text_node.value.value)
        hint = hints[name]
        if typing.get_origin(hint) is dict:
            documentation |= field_documentation(typing.get_args(hint)[1], f"{prefix}{name}.NAME.")
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            documentation |= field_documentation(hint, f"{prefix}{name}.")
    return documentation


def help_text() -> str:
    """What --help prints: the commands, each group with its choices, and every knob with its sentence."""
    root = config_directory()
    lines = [
        "cucafera trains a small Catalan language model, from raw text to a chat model.",
        "",
        "  python -m cucafera.run                                  the quickstart: minutes on a laptop, no download",
        "  python -m cucafera.run +experiment=pretrain             the 245M model on one A100 or H100",
        "  python -m cucafera.run data=files data.sources.files.path='texts/*.txt'     your own text",
        "  python -m cucafera.run +experiment=pretrain --cfg job   show the configuration, run nothing",
        "  python -m cucafera.run +experiment=finetune init_from=outputs/pretrain      a chat model out of it",
        "  python -m cucafera.chat outputs/finetune                talk to it",
        "  python -m cucafera.run --multirun +experiment=lr_sweep  which learning rate? a run each, and the answer",
        "  python -m cucafera.compare outputs/one outputs/other    runs side by side",
        "  tensorboard --logdir outputs                            watch",
        "",
        "The same command again goes on where the run stopped. `cucafera` is short for `python -m cucafera.run`.",
        "Also: --info (how the configuration is found), --config-dir DIR (configs of your own), --hydra-help.",
        "",
        "Groups: GROUP=CHOICE replaces the default (*), +experiment=CHOICE changes several at once.",
    ]
    defaults = {
        f"{group!s}={choice!s}"
        for entry in OmegaConf.load(root / f"{CONFIG_NAME}.yaml").defaults
        if isinstance(entry, DictConfig)
        for group, choice in entry.items()
    }
    width = max(len(f"+experiment={option}") for option in _group_options("experiment", [root]) or []) + 2
    for group in ["experiment", *(name for name in _groups([root]) if name != "experiment")]:
        lines.append("")
        for option in _group_options(group, [root]) or []:
            chosen = f"{'+' if group == 'experiment' else ''}{group}={option}"
            mark = "*" if f"{group}={option}" in defaults else " "
            lines.append(f" {mark}{chosen:<{width}}{_first_comment(root / group / f'{option}.yaml')}")
    lines += ["", "Keys: KEY=VALUE on the command line."]
    documentation = field_documentation()
    for key, text in documentation.items():
        if any(other.startswith(key + ".") for other in documentation):
            lines += ["", f"  {key}: {text}"]
        else:
            lines.append(f"  {key:<41}{text}")
    return "\n".join(lines)


def _first_comment(path: Path) -> str:
    comments = (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next(comment for comment in comments if not comment.startswith("@package"))
