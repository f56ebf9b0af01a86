"""The table of TensorBoard's tab HParams: one row per run, to compare runs and the jobs of a sweep."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from cucafera.config.fields import format_value
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config, value_of
from cucafera.model.flops import parameter_count
from cucafera.runs.compatibility import RESUMABLE_KEYS, matches_key
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.guards import RollbackRequest
from cucafera.training.events import event_logger
from cucafera.training.module import LanguageModel

SHOWN = (
    "optimizer.weight_decay", "batch_tokens", "budget_tokens", "schedule.name", "schedule.warmup_steps",
    "seed", "model.hidden_size", "model.num_hidden_layers",
)  # fmt: skip
"""Keys that every run shows, after its peak learning rates."""


class Hyperparameters(Callback):
    """Declare the hyperparameters of a session, and how it ended; emits no curve.

    TensorBoard takes the columns from the runs that it shows: it selects the hyperparameters in which they differ, and
    the first of the curves, whose last values stand in the table.
    """

    def __init__(self, config: Config, overrides: Sequence[str]) -> None:
        self.config = config
        self.overrides = overrides
        self._is_declared = False

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Declare this run's values."""
        if logger := event_logger(trainer):
            logger.declare(session_start(common_values(self.config) | overridden_values(self.config, self.overrides)))
            self._is_declared = True

    def on_session_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Declare success if the run is complete: a stopped run may be resumed."""
        if module.steps_done == self.config.total_steps and (logger := event_logger(trainer)):
            logger.declare(session_end(Status.STATUS_SUCCESS))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Declare failure; the next session replaces the declaration."""
        failed = isinstance(exception, Exception) and not isinstance(exception, RollbackRequest)
        if failed and self._is_declared and (logger := event_logger(trainer)):
            logger.declare(session_end(Status.STATUS_FAILURE))


Cell = int | float | str


def common_values(config: Config) -> dict[str, Cell]:
    """Return the values that every run shows, by key; those that a cell cannot show are left out."""
    shown = (*OPTIMIZERS.get(config.optimizer.name).learning_rate_keys, *SHOWN)
    values = {key: _as_cell(value_of(config, key)) for key in shown} | {"parameters": parameter_count(config.model)}
    return {key: value for key, value in values.items() if value is not None}


def overridden_values(config: Config, overrides: Sequence[str]) -> dict[str, Cell]:
    """Return the numbers and strings that the command line overrides, by key.

    A group, such as model=tiny, has the chosen name as its value. Left out are keys that may change when a run is
    resumed, such as its hardware, the experiment, and Hydra's own keys.
    """
    values = {}
    for override in overrides:
        key, _, choice = override.lstrip("+~").partition("=")
        with contextlib.suppress(AttributeError, KeyError):  # not a key of the configuration
            value = value_of(config, key)
            values[key] = _as_cell(choice if dataclasses.is_dataclass(value) else value)
    return {key: value for key, value in values.items() if value is not None and not matches_key(key, RESUMABLE_KEYS)}


def _as_cell(value: Any) -> Cell | None:
    """Return a number or string unchanged and a boolean as a string; None for what a cell cannot show."""
    if isinstance(value, bool):
        return format_value(value)
    return value if isinstance(value, int | float | str) else None


def session_start(values: Mapping[str, Cell]) -> Summary:
    """Return the event that declares the start of a session with its hyperparameters."""
    start = SessionStartInfo(start_time_secs=time.time())
    for key, value in values.items():
        if isinstance(value, str):
            start.hparams[key].string_value = value
        else:
            start.hparams[key].number_value = value
    return _event(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))


def session_end(status: Any) -> Summary:
    """Return the event that declares the end of a session with its status."""
    end = SessionEndInfo(status=status, end_time_secs=time.time())
    return _event(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def _event(tag: str, content: HParamsPluginData) -> Summary:
    return Summary(
        value=[Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content), tensor=metadata.NULL_TENSOR)]
    )
