"""From overrides to a Config: Hydra composes conf/ once, without types, and the result is checked as a whole.

Hydra's own structured configs stop at the first typo. So the schema is given to Hydra as plain defaults, and types,
bounds and rules are checked by one walk over the dataclasses, which collects every problem; see check.py.
"""

import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cucafera.config.check import check_config, documented_fields, general_key
from cucafera.config.errors import UserError
from cucafera.config.registry import OBJECTIVES, OPTIMIZERS
from cucafera.config.schema import Config, ModelConfig

CONFIG_NAME = "config"
PLUGINS = {
    "hydra/launcher/joblib": "parallel",
    "hydra/launcher/submitit_local": "cluster",
    "hydra/launcher/submitit_slurm": "cluster",
    "hydra/sweeper/optuna": "search",
}
"""Choices that Hydra has only with a plugin, and the extra of pyproject.toml that installs it."""

ReadModel = Callable[[str], ModelConfig | None]
"""Reads the model of an init_from that is no run of this program, such as a Hugging Face folder; None if it is one."""


def config_directory() -> Path:
    """Return conf/ of an installed package, or of the source tree that contains the package."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


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
    """Register the schema, the choices of registered entries, and the resolver of `${inherited:KEY}` with Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=dataclasses.asdict(Config()))
    for registry in (OPTIMIZERS, OBJECTIVES):
        for name in registry.names():
            defaults = dataclasses.asdict(registry.get(name).config()) | {"name": name}
            store.store(group=registry.kind, name=name, node=defaults)

    def inherited(key: str, *, _root_: DictConfig) -> Any:
        return OmegaConf.select(_config_to_inherit(_root_, read_model), key, throw_on_missing=True)

    OmegaConf.register_new_resolver("inherited", inherited, replace=True)


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
    now = [override for override in overrides if not _changes_source(override)]
    try:
        node = (
            GlobalHydra.instance()
            .config_loader()
            .load_configuration(
                CONFIG_NAME, [override.input_line or "" for override in now], run_mode, from_shell=False
            )
        )
        problems = list(_apply_to_sources(node, [override for override in overrides if _changes_source(override)]))
    except (HydraException, OmegaConfBaseException) as error:
        return Composition(None, Config(), [_hydra_message(error, overrides)])
    except YAMLError as error:
        return Composition(None, Config(), [f"a configuration file cannot be read: {' '.join(str(error).split())}"])
    if problems or run_mode == RunMode.MULTIRUN:
        return Composition(node, Config(), problems)
    return Composition(node, *check_composed(node))


def check_composed(node: DictConfig) -> tuple[Config, list[str]]:
    """Return the Config of a composed configuration, and a sentence for each problem."""
    node = node.copy()
    with open_dict(node):
        node.pop("hydra", None)
        inheritance = _inheritance_problem(node)
        if inheritance is not None:
            node.model = dataclasses.asdict(ModelConfig())  # so that the other problems are found
    raw: Any = OmegaConf.to_container(node, resolve=False)
    return check_config(_plain(node), raw, {"init_from": inheritance} if inheritance else None)


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
    """Return the first line of an error of Hydra, or what to do about it."""
    first = " ".join(str(error).split("\n")[0].split()) or str(error.__cause__).split("\n")[0]
    for plugin, extra in PLUGINS.items():
        if f"'{plugin}'" in first:
            return f"{plugin} needs a plugin of Hydra: pip install '.[{extra}]'"
    if refused := re.fullmatch(r"Could not override '((\w+)\..*)'\.?", first):
        chosen = [f"{refused[2]}={each.value()}" for each in overrides if each.key_or_group == refused[2]]
        return f"{refused[1]} is not a setting of {(chosen or [f'the chosen {refused[2]}'])[-1]}"
    return first


def _plain(node: DictConfig) -> dict[str, Any]:
    """Return nested dictionaries and lists; an interpolation that leads nowhere stays as it is written."""
    try:
        container = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException:
        container = {
            key: _plain(node[key]) if isinstance(node._get_node(key), DictConfig) else _resolved(node, key)
            for key in map(str, node)
        }
    return typing.cast(dict[str, Any], container)


def _resolved(node: DictConfig, key: str) -> Any:
    try:
        value = OmegaConf.select(node, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return OmegaConf.to_container(node, resolve=False)[key]  # type: ignore[index,call-overload]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _inheritance_problem(node: DictConfig) -> str | None:
    """Say why the model cannot be inherited from init_from, if that is asked for."""
    model = OmegaConf.to_container(node.model, resolve=False) if OmegaConf.is_config(node.model) else {}
    if not isinstance(model, dict) or not any("${inherited:" in str(value) for value in model.values()):
        return None
    if node.init_from is None:
        return (
            "init_from must be given: init_from=RUN, the folder or a checkpoint of a pretrained model, or a Hugging "
            "Face folder or name (model=inherited takes its model)"
        )
    try:
        node.model.vocab_size  # noqa: B018  # resolves it
    except Exception as error:
        if isinstance(error.__cause__, UserError):
            return f"init_from: {error.__cause__}"
        return (
            f"init_from={node.init_from}: there is no run there whose model could be inherited (a run folder holds a "
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
        own = Path(node.run_dir) / "config.yaml"
        started = OmegaConf.load(own) if own.is_file() else None
        if isinstance(started, DictConfig) and started.get("init_from") == node.init_from:
            return started
        raise


@functools.lru_cache(maxsize=8)
def _load_config(path: Path, changed_ns: int) -> DictConfig:
    """Load the configuration file of a run; cached, since each inherited key asks for it.

    A run writes values only: an interpolation, which could read the environment of this machine, is not from a run.
    """
    text = path.read_text(encoding="utf-8")
    if "${" in text:
        raise OmegaConfBaseException(f"{path} holds an interpolation")
    config = OmegaConf.create(text)
    if not isinstance(config, DictConfig):
        raise OmegaConfBaseException(f"{path} holds no configuration")
    return config
