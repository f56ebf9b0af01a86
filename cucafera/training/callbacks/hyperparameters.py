"""The table of TensorBoard's tab HParams: one row per run, to compare runs and the jobs of a sweep."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Container, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import DataType, Experiment, HParamInfo, MetricInfo, MetricName, Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from cucafera.config.fields import format_value
from cucafera.config.schema import Config, value_of
from cucafera.model.flops import parameter_count
from cucafera.objectives import Objective
from cucafera.runs.compatibility import RESUMABLE_KEYS, matches_key
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.guards import RollbackRequest
from cucafera.training.callbacks.throughput import Throughput
from cucafera.training.callbacks.validation import Validation
from cucafera.training.events import event_logger
from cucafera.training.module import LanguageModel

SHOWN = (
    "optimizer.lr", "optimizer.weight_decay", "batch_tokens", "budget_tokens", "schedule.name", "schedule.warmup_steps",
    "seed", "model.hidden_size", "model.num_hidden_layers",
)  # fmt: skip
"""Keys that every run shows."""


class Hyperparameters(Callback):
    """Declare the hyperparameters of a session and how it ended, and write the metrics to compare runs by.

    Emits, against steps, at each validation:
        hp/val_NAME             the objective's primary metric (bpb), and the validation loss, if it has one
        hp/train_loss           of the last log step, nats; not before the first step
        hp/tokens_per_second    over the run so far; not before the first step
    """

    def __init__(
        self, config: Config, overrides: Sequence[str], throughput: Throughput, validation: Validation
    ) -> None:
        self.config = config
        self.overrides = overrides
        self.throughput = throughput
        self.validation = validation
        self._is_declared = False

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Declare the columns of the table and this run's values; no metric has a value yet."""
        if logger := event_logger(trainer):
            given = overridden_values(self.config, self.overrides)
            values = common_values(self.config) | given
            logger.declare(columns(values, given, measures_of(module.objective)), session_start(values))
            self._is_declared = True
            if module.steps_done == 0:
                self._write(trainer, module.objective, 0)

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Write the metrics after a validation."""
        self._write(trainer, module.objective, module.steps_done)

    def on_session_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Declare success if the run is complete: a stopped run may be resumed."""
        if module.steps_done == self.config.total_steps and (logger := event_logger(trainer)):
            logger.declare(session_end(Status.STATUS_SUCCESS))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Declare failure; the next session replaces the declaration."""
        failed = isinstance(exception, Exception) and not isinstance(exception, RollbackRequest)
        if failed and self._is_declared and (logger := event_logger(trainer)):
            logger.declare(session_end(Status.STATUS_FAILURE))

    def _write(self, trainer: pl.Trainer, objective: Objective, step: int) -> None:
        record, logger = self.validation.done_at(step), event_logger(trainer)
        if record is None or logger is None:
            return
        metrics = {f"hp/val_{name}": record[name] for name in objective.comparison_metrics}
        if step:
            metrics["hp/train_loss"] = self.throughput.latest["train/loss"]
            metrics["hp/tokens_per_second"] = record["tokens"] / self.throughput.training_seconds
        finite = {tag: value for tag, value in metrics.items() if math.isfinite(value)}  # the table shows no others
        logger.log_metrics(finite, step=step)


def measures_of(objective: Objective) -> list[str]:
    """Return the tags of the measures of a run."""
    return [*(f"hp/val_{name}" for name in objective.comparison_metrics), "hp/train_loss", "hp/tokens_per_second"]


Cell = int | float | str


def common_values(config: Config) -> dict[str, Cell]:
    """Return the values that every run shows, by key; those that a cell cannot show are left out."""
    values = {key: _as_cell(value_of(config, key)) for key in SHOWN} | {"parameters": parameter_count(config.model)}
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


def columns(values: Mapping[str, Cell], given: Container[str], measures: Sequence[str]) -> Summary:
    """Return the event that declares the columns of the table.

    Args:
        values: The hyperparameters of this run.
        given: Keys that the command line overrides. TensorBoard marks them as differing between runs and shows them
            first.
        measures: Tags of the measures to compare by.
    """
    infos = [
        HParamInfo(
            name=key,
            type=DataType.DATA_TYPE_STRING if isinstance(value, str) else DataType.DATA_TYPE_FLOAT64,
            differs=key in given,
        )
        for key, value in values.items()
    ]
    metrics = [MetricInfo(name=MetricName(tag=tag)) for tag in measures]
    experiment = Experiment(hparam_infos=infos, metric_infos=metrics)
    return _event(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))


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
