"""The texts that `cucafera.run` shows in place of running: --help and --cfg."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cucafera.config.check import documented_fields, fields_of_choices
from cucafera.config.choices import CONFIG_NAME, config_directory, config_sources, group_options, groups
from cucafera.config.fields import format_value
from cucafera.config.registry import OBJECTIVES, OPTIMIZERS

COMMANDS = """\
cucafera trains a small Catalan language model, from raw text to a chat model.

  python -m cucafera.run                                  the quickstart: minutes on a laptop, no download
  python -m cucafera.run +experiment=pretrain             the 245M model on one A100 or H100
  python -m cucafera.run data=files data.sources.files.path='texts/*.txt'     your own text
  python -m cucafera.run +experiment=pretrain --cfg job   show the configuration, run nothing
  python -m cucafera.run +experiment=finetune init_from=outputs/pretrain      a chat model from it
  python -m cucafera.run +experiment=cooldown init_from=outputs/pretrain      end a run early, from its last checkpoint
  python -m cucafera.chat outputs/finetune                chat with it
  python -m cucafera.run --multirun +experiment=lr_sweep  find the learning rate: one run per value
  python -m cucafera.compare outputs/one outputs/other    runs side by side
  tensorboard --logdir outputs                            training curves

Run the same command again to resume a run from its newest checkpoint.

Flags:
  --cfg job             show the configuration and run nothing; --resolve shows values in place of ${...}; --cfg hydra
                        shows the settings of Hydra, with the choices and where they were found
  --config-dir DIR      a folder with your own configurations, such as DIR/experiment/mine.yaml
  --multirun            a sweep: one run per value of KEY=VALUE,VALUE

Groups: GROUP=CHOICE replaces the default (*); +experiment=CHOICE changes several at once."""


def help_text() -> str:
    """Return the commands, each group with its choices, and each key with default, meaning and bounds."""
    return "\n".join([COMMANDS, *_group_lines(), "", "Keys: KEY=VALUE, shown with the default.", *_key_lines()])


def _group_lines() -> Iterator[str]:
    defaults = {
        f"{group!s}={choice!s}"
        for entry in OmegaConf.load(config_directory() / f"{CONFIG_NAME}.yaml").defaults
        if isinstance(entry, DictConfig)
        for group, choice in entry.items()
    }
    sources = config_sources()
    width = max(len(f"+experiment={option}") for option in group_options("experiment", sources)) + 2
    for group in ["experiment", *(name for name in groups(sources) if name != "experiment")]:
        yield ""
        for option in group_options(group, sources):
            chosen = f"{'+' if group == 'experiment' else ''}{group}={option}"
            yield _columns(f" {'*' if chosen in defaults else ' '}{chosen}", width + 2, _description(group, option))


def _description(group: str, option: str) -> str:
    """Return the first comment of the file of a choice, or the docstring of a registered entry."""
    path = config_directory() / group / f"{option}.yaml"
    if not path.is_file():
        registry = {each.kind: each for each in (OPTIMIZERS, OBJECTIVES)}[group]
        return (type(registry.get(option)).__doc__ or "").split("\n")[0]
    comments = (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def _key_lines() -> Iterator[str]:
    fields = documented_fields()
    for key, field in fields.items():
        meaning, limits = field.metadata.get("meaning", ""), field.metadata.get("limits")
        if any(other.startswith(f"{key}.") for other in fields):
            yield from ("", f"  {key}: {meaning}")
            continue
        bounds = f" Must be {limits.text()}." if limits and limits.text() else ""
        yield _columns(f"  {key}={_default(field)}", 48, meaning + bounds)
        for choice, own in fields_of_choices(key).items():
            own_meaning = own.metadata.get("meaning", "")
            if not key.endswith(".name") and (_default(own), own_meaning) != (_default(field), meaning):
                yield _columns(f"    {choice}: {_default(own)}", 48, own_meaning)


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _short(field.default_factory())
    return "..." if field.default is dataclasses.MISSING else _short(field.default)


def _columns(left: str, width: int, right: str) -> str:
    """Return two columns, the right one wrapped."""
    gap = " " * max(1, width - len(left))
    return textwrap.fill(right, 120, initial_indent=left + gap, subsequent_indent=" " * width, break_on_hyphens=False)


def _short(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_short, value))}]" if len(value) < 3 else f"[{_short(value[0])},...]"
    return format_value(value)


def shown_config(node: DictConfig, part: str, resolve: bool) -> str:
    """Return a part of a composed configuration as YAML: job, hydra (Hydra's own settings) or all."""
    HydraConfig.instance().set_config(node)  # for interpolations such as ${hydra:job.num}
    keys = {"job": [str(key) for key in node if key != "hydra"], "hydra": ["hydra"], "all": [*map(str, node)]}[part]
    return OmegaConf.to_yaml(OmegaConf.masked_copy(node, keys), resolve=resolve).rstrip()
