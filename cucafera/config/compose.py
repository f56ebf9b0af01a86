"""From overrides to a Config: Hydra composes conf/ once, without types, and the result is checked as a whole.

Hydra's own structured configs stop at the first typo. So the schema is given to Hydra as plain defaults, and types,
bounds and rules are checked by one walk over the dataclasses, which collects every problem; see check.py.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cucafera.config.branch import branch_name, take_settings_of_parent
from cucafera.config.check import (
    Unresolved,
    check_config,
    choices_with,
    documented_fields,
    general_key,
    suggestion,
    text_with_dollar,
)
from cucafera.config.choices import (
    CONFIG_NAME,
    config_directory,
    config_sources,
    file_that_names,
    files_with_keys,
    group_options,
    groups,
    no_such_option,
    path_of,
    search_path,
    unreadable_file,
)
from cucafera.config.errors import UserError
from cucafera.config.files import config_text
from cucafera.config.registry import OBJECTIVES, OPTIMIZERS
from cucafera.config.schema import Config, ModelConfig

PLUGINS = {
    "hydra/launcher/joblib": "parallel",
    "hydra/launcher/submitit_local": "cluster",
    "hydra/launcher/submitit_slurm": "cluster",
    "hydra/sweeper/optuna": "search",
}
"""Choices that Hydra has only with a plugin, and the extra of pyproject.toml that installs it."""

ReadModel = Callable[[str], ModelConfig | None]
"""Reads the model of an init_from that is no run of this program, such as a Hugging Face folder; None if it is one."""


class Composition(NamedTuple):
    """A composed configuration.

    Attributes:
        node: As Hydra composed it, with its own settings under `hydra`; None if it cannot be composed.
        config: The same as dataclasses, usable if there are no problems.
        problems: A sentence for each problem.
    """

    node: DictConfig | None
    config: Config
    problems: list[str]


def register(read_model: ReadModel | None = None) -> None:
    """Register the schema, the choices of registered entries, and `${inherited:KEY}` and `${run_name:}` with Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=dataclasses.asdict(Config()))
    for registry in (OPTIMIZERS, OBJECTIVES):
        for name in registry.names():
            defaults = dataclasses.asdict(registry.get(name).config()) | {"name": name}
            store.store(group=registry.kind, name=name, node=defaults)

    def inherited(key: str, *, _root_: DictConfig) -> Any:
        value: Any = OmegaConf.to_container(_config_to_inherit(_root_, read_model), resolve=False)
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        # A run writes values only: an interpolation, which could read the environment of this machine, is not from one.
        if isinstance(value, str) and "${" in value:
            raise OmegaConfBaseException(f"{key} is an interpolation in the configuration of {_root_.init_from}")
        return value

    OmegaConf.register_new_resolver("inherited", inherited, replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)


@contextmanager
def hydra_session(read_model: ReadModel | None = None) -> Iterator[None]:
    """Initialize Hydra with conf/, unless this happens within such a session already."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    register(read_model)
    with initialize_config_dir(str(config_directory()), job_name="run", version_base="1.3"):
        yield


def problem_list(problems: Sequence[str]) -> str:
    """Return the message that lists all problems."""
    if len(problems) == 1:
        return f"The configuration has a problem:\n  - {problems[0]}"
    return f"The configuration has {len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


def compose(overrides: Sequence[Override], run_mode: RunMode = RunMode.RUN) -> Composition:
    """Compose the configuration within a `hydra_session`, and check it unless it is that of a sweep.

    A setting of a source need not be in any file, which Hydra takes for a typo; so these overrides are applied
    afterwards.
    """
    now = [override.input_line or "" for override in overrides if not _changes_source(override)]
    try:
        node = GlobalHydra.instance().config_loader().load_configuration(CONFIG_NAME, now, run_mode, from_shell=False)
        problems = [] if run_mode == RunMode.MULTIRUN else take_settings_of_parent(node, overrides)
        problems += _apply_to_sources(node, [override for override in overrides if _changes_source(override)])
    except (HydraException, OmegaConfBaseException) as error:
        return Composition(None, Config(), [_hydra_message(error, overrides)])
    except YAMLError as error:
        return Composition(None, Config(), [f"a configuration file cannot be read: {' '.join(str(error).split())}"])
    except (OSError, ValueError, AttributeError, RecursionError) as error:  # of files that are no mappings
        return Composition(None, Config(), [unreadable_file(overrides) or in_one_line(error)])
    if problems or run_mode == RunMode.MULTIRUN:
        return Composition(node, Config(), problems)
    sources = config_sources(search_path(overrides))
    given = [each.key_or_group for each in overrides]

    def place_of(key: str) -> str | None:
        if any(f"{key}.".startswith(f"{each}.") and not group_options(each, sources) for each in given):
            return None
        return next((path for path, keys in files_with_keys(now, overrides) if key in keys), None)

    return Composition(node, *check_composed(node, place_of))


def check_composed(
    node: DictConfig, place_of: Callable[[str], str | None] = lambda key: None
) -> tuple[Config, list[str]]:
    """Return the Config of a composed configuration, and a sentence for each problem; see `check_config`."""
    node = node.copy()
    with open_dict(node):
        node.pop("hydra", None)
        inheritance = _inheritance_problem(node)
        if inheritance is not None:
            node.model = dataclasses.asdict(ModelConfig())  # so that the other problems are found
    raw: Any = OmegaConf.to_container(node, resolve=False)
    return check_config(_plain(node), raw, {"init_from": inheritance} if inheritance else None, place_of)


def check_job(node: DictConfig, overrides: Sequence[str], run_dir: str) -> tuple[Config, list[str]]:
    """Return the Config of a job of a sweep, as Hydra composed it for its folder, and a sentence for each problem."""
    with open_dict(node):
        node.run_dir = run_dir
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if problems := take_settings_of_parent(node, parsed):
        return Config(), problems
    return check_composed(node)


def as_typed(overrides: Any) -> list[str]:
    """Return overrides that Hydra has recorded, with interpolations and backslashes as they were given."""
    texts: Any = OmegaConf.to_container(overrides, resolve=False) if OmegaConf.is_config(overrides) else overrides
    return list(map(str, texts))


def is_source_key(key: str) -> bool:
    """True if a key is a setting of a source, data.sources.NAME.SETTING."""
    return key.startswith("data.sources.") and general_key(key) in documented_fields()


def _changes_source(override: Override) -> bool:
    return is_source_key(override.key_or_group) and not (
        override.is_add() or override.is_delete() or override.is_sweep_override()
    )


def _apply_to_sources(node: DictConfig, overrides: Sequence[Override]) -> Iterator[str]:
    for override in overrides:
        name = override.key_or_group.split(".")[2]
        if not OmegaConf.is_dict(node.data.sources) or not (override.is_force_add() or name in node.data.sources):
            yield f"{override.input_line}: there is no source {name!r}; add one with a plus: +{override.input_line}"
            continue
        OmegaConf.update(node, override.key_or_group, override.value(), merge=True, force_add=True)
        node.hydra.overrides.task.append(override.input_line)


def _hydra_message(error: Exception, overrides: Sequence[Override]) -> str:
    """Return what to do about an error of Hydra, or else its first line."""
    first = in_one_line(error)
    for override in overrides:
        value = override.value() if override.value_type is not None and not override.is_sweep_override() else None
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "${" in text and not _is_interpolation(text):
                key = override.key_or_group
                form = "\\${" if isinstance(value, list) else text_with_dollar(key, text)
                return f"{key} is {text}, which cannot be read; for the text itself, write {form}"
    for plugin, extra in PLUGINS.items():
        if f"'{plugin}'" in first:
            return f"{plugin} needs a plugin of Hydra: pip install '.[{extra}]'"
    if found := re.search(r"(In '(?P<file>.+?)': )?Could not (find|load) '(?P<group>.+)/(?P<option>[^'/]+)'", first):
        group, option = found["group"], found["option"]
        place = path_of(found["file"] or "", overrides) or file_that_names(option, overrides)
        options = group_options(group, config_sources(search_path(overrides)))
        sentence = (
            no_such_option(group, option, options)
            if options
            else f"a choice of another group is written - override /{group.split('/')[-1]}: {option}"
        )
        return f"{place}: {sentence}" if place else sentence
    if refused := re.fullmatch(r"Could not override '(hydra\.(\w+)\..*)'\.?", first):
        key, part = refused.groups()
        if part in ("launcher", "sweeper"):
            chosen = [str(each.value()) for each in overrides if each.key_or_group == f"hydra/{part}"]
            return f"{key} is not a setting of hydra/{part}={(chosen or ['basic'])[-1]}"
        return f"Hydra has no setting {key}" + (f"; add it with a plus: +{key}=..." if "env_set" in key else "")
    if refused := re.fullmatch(r"Could not override '((\w+)\..*)'\.?", first):
        chosen = [f"{refused[2]}={each.value()}" for each in overrides if each.key_or_group == refused[2]]
        choice = (chosen or [f"the chosen {refused[2]}"])[-1]
        return f"{refused[1]} is not a setting of {choice}{choices_with(refused[1])}"
    if found := re.match(r"Could not append to config. An item is already at '(.+)'", first):
        return f"there is {found[1]} already; replace it, without the plus: {found[1]}=..."
    if found := re.match(r"In '([^']+)': (.*)", first):
        return unreadable_file(overrides) or f"{path_of(found[1], overrides) or found[1]}: {_of_file(found[2], error)}"
    return unreadable_file(overrides) or first


def _is_interpolation(text: str) -> bool:
    try:
        OmegaConf.create({"key": text})
    except OmegaConfBaseException:
        return False
    return True


def _of_file(message: str, error: Exception) -> str:
    """Return what Hydra says of a file in other words, where these are better."""
    if group := re.match(r"Could not override '([^']+)'", message):
        return f"there is no group {group[1]!r}{suggestion(group[1], groups(config_sources()))}"
    if "hydra.searchpath" in message:
        return "hydra.searchpath is for the command line; --config-dir DIR adds a folder of configurations"
    if message.endswith("raised while composing config:"):
        return f"its form is not that of the settings: {[*str(error).splitlines(), ''][1].strip()}"
    return message


def _plain(node: Any) -> Any:
    """Return nested dictionaries and lists, with `Unresolved` in place of interpolations that lead nowhere."""
    try:
        return OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException:
        if OmegaConf.is_list(node):
            return [_plain_item(node, position) for position in range(len(node))]
        return {str(key): _plain_item(node, key) for key in node}


def _plain_item(node: Any, key: Any) -> Any:
    try:
        value = node[key]
    except OmegaConfBaseException:
        text = str(node._get_node(key)._value())
        return text if text == "???" else Unresolved(text)
    return _plain(value) if OmegaConf.is_config(value) else value


def in_one_line(error: BaseException) -> str:
    """Return the first line of an error, or else of its cause."""
    return " ".join(str(error).split("\n")[0].split()) or str(error.__cause__).split("\n")[0]


def _run_name(_root_: DictConfig) -> str:
    """Return the name of a run that was given none: runs on other data do not meet in one folder."""
    if name := branch_name(_root_):
        return name
    sources = OmegaConf.select(_root_, "data.sources")
    first, *others = [str(name) for name in sources] if OmegaConf.is_dict(sources) and sources else ["embedded"]
    if first == "embedded" and not others:
        return "quickstart"
    return "-and-".join([first, *others] if len(others) < 2 else [first, f"{len(others)}-more"])


def _inheritance_problem(node: DictConfig) -> str | None:
    """Say why the model cannot be inherited from init_from, if that is asked for."""
    model = OmegaConf.to_container(node.model, resolve=False) if OmegaConf.is_config(node.model) else {}
    if not isinstance(model, dict) or not any("${inherited:" in str(value) for value in model.values()):
        return None
    init_from = _plain_item(node, "init_from")
    if isinstance(init_from, Unresolved):
        return f"init_from is {init_from.text}"  # reported as any such value
    if init_from is None:
        return (
            "init_from must be given: init_from=RUN, the folder or a checkpoint of a pretrained model, or a Hugging "
            "Face folder or name (model=inherited takes its model)"
        )
    try:
        for key, value in model.items():
            if "${inherited:" in str(value):
                node.model[key]  # resolves it
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            return f"init_from: {cause}"
        return (
            f"init_from={init_from}: there is no run there whose model could be inherited (a run folder holds a "
            "config.yaml); give one, or choose the model with model=..."
        )
    return None


def _config_to_inherit(node: DictConfig, read_model: ReadModel | None) -> DictConfig:
    """Return the configuration, or only the model, of init_from.

    If that is gone, the run that was started from it still has it.
    """
    try:
        model = read_model(node.init_from) if read_model else None
        if model is not None:
            return OmegaConf.create({"model": dataclasses.asdict(model)})
        source = Path(node.init_from).expanduser()
        path = (source.parent.parent if source.is_file() else source) / "config.yaml"
        return _load_config(path, path.stat().st_mtime_ns)
    except (OSError, UserError):
        own = Path(node.run_dir).expanduser() / "config.yaml"
        started = _load_config(own, own.stat().st_mtime_ns) if own.exists() else None
        if started is not None and started.get("init_from") == node.init_from:
            return started
        raise


@functools.lru_cache(maxsize=8)
def _load_config(path: Path, changed_ns: int) -> DictConfig:
    """Load the configuration file of a run; cached, since each inherited key asks for it."""
    config = OmegaConf.create(config_text(path))
    if not isinstance(config, DictConfig):
        raise OmegaConfBaseException(f"{path} holds no configuration")
    return config
