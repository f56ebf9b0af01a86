"""The table of TensorBoard's tab HParams: a row a run, to compare runs and the jobs of a sweep."""

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

from cucafera.config import Config, shown, value_of
from cucafera.model.flops import parameter_count
from cucafera.training.callbacks.guards import RollBack
from cucafera.training.callbacks.throughput import Throughput
from cucafera.training.callbacks.validation import Validation
from cucafera.training.events import event_logger
from cucafera.training.module import LanguageModel
from cucafera.training.run_folder import MAY_CHANGE, MAY_CHANGE_WITHIN, is_within

SHOWN = (
    "optimizer.lr", "optimizer.weight_decay", "batch_tokens", "budget_tokens", "schedule.name", "schedule.warmup_steps",
    "seed", "model.hidden_size", "model.num_hidden_layers",
)  # fmt: skip
"""Keys that every run shows."""
METRICS = ("hp/val_bpb", "hp/val_loss", "hp/train_loss", "hp/tokens_per_second")


class Hyperparameters(pl.Callback):
    """Declares the hyperparameters of a session and its end, and writes the measures to compare by.

    Emits, against steps, at each validation:
        hp/val_bpb              bits a byte
        hp/val_loss             nats a token
        hp/train_loss           of the last log step, nats; not before the first step
        hp/tokens_per_second    over the whole run so far; not before the first step
    """

    def __init__(
        self, config: Config, overrides: Sequence[str], throughput: Throughput, validation: Validation
    ) -> None:
        self.config = config
        self.overrides = overrides
        self.throughput = throughput
        self.validation = validation
        self._has_begun = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Declares what the columns of the table are, and this run's values; no measure has a value yet."""
        assert isinstance(pl_module, LanguageModel)
        if logger := event_logger(trainer):
            given = overridden_values(self.config, self.overrides)
            values = common_values(self.config) | given
            logger.declare(columns(values, given), session_start(values))
            self._has_begun = True
            if pl_module.steps_done == 0:
                self._write(trainer, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the measures after a validation."""
        assert isinstance(pl_module, LanguageModel)
        self._write(trainer, pl_module.steps_done)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says that the run is complete, if it is: one that was stopped may go on."""
        assert isinstance(pl_module, LanguageModel)
        if pl_module.steps_done == self.config.total_steps and (logger := event_logger(trainer)):
            logger.declare(session_end(Status.STATUS_SUCCESS))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Says that the run has failed; the next session takes that back."""
        failed = isinstance(exception, Exception) and not isinstance(exception, RollBack)
        if failed and self._has_begun and (logger := event_logger(trainer)):
            logger.declare(session_end(Status.STATUS_FAILURE))

    def _write(self, trainer: pl.Trainer, step: int) -> None:
        record, logger = self.validation.done_at(step), event_logger(trainer)
        if record is None or logger is None:
            return
        measures = {"hp/val_bpb": record["bpb"], "hp/val_loss": record["loss"]}
        if step:
            measures["hp/train_loss"] = self.throughput.latest["train/loss"]
            measures["hp/tokens_per_second"] = record["tokens"] / self.throughput.training_seconds
        finite = {tag: value for tag, value in measures.items() if math.isfinite(value)}  # the table can show no other
        logger.log_metrics(finite, step=step)


Cell = int | float | str


def common_values(config: Config) -> dict[str, Cell]:
    """What every run shows of its configuration."""
    values = {key: _as_cell(value_of(config, key)) for key in SHOWN} | {"parameters": parameter_count(config.model)}
    return {key: value for key, value in values.items() if value is not None}


def overridden_values(config: Config, overrides: Sequence[str]) -> dict[str, Cell]:
    """The numbers and texts that the command line changes.

    A group, such as model=tiny, stands with the name that was chosen. What may change in the life of a run, such as
    its hardware, is none of them; nor is an experiment, or what is Hydra's own.
    """
    values = {}
    for override in overrides:
        key, _, choice = override.lstrip("+~").partition("=")
        with contextlib.suppress(AttributeError, KeyError):  # no key of the configuration
            value = value_of(config, key)
            values[key] = _as_cell(choice if dataclasses.is_dataclass(value) else value)
    plumbing = (*MAY_CHANGE, *MAY_CHANGE_WITHIN)
    return {key: value for key, value in values.items() if value is not None and not is_within(key, plumbing)}


def _as_cell(value: Any) -> Cell | None:
    """A number or text as it is, true and false as texts; None for what a cell cannot show."""
    if isinstance(value, bool):
        return shown(value)
    return value if isinstance(value, int | float | str) else None


def columns(values: Mapping[str, Cell], given: Container[str]) -> Summary:
    """The event that says what the columns of the table are.

    Args:
        values: The hyperparameters of this run.
        given: Those that the command line changes: TensorBoard takes them for what tells runs apart, and shows them
            first.
    """
    infos = [
        HParamInfo(
            name=key,
            type=DataType.DATA_TYPE_STRING if isinstance(value, str) else DataType.DATA_TYPE_FLOAT64,
            differs=key in given,
        )
        for key, value in values.items()
    ]
    metrics = [MetricInfo(name=MetricName(tag=tag)) for tag in METRICS]
    experiment = Experiment(hparam_infos=infos, metric_infos=metrics)
    return _event(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))


def session_start(values: Mapping[str, Cell]) -> Summary:
    """The event that says with which hyperparameters a session begins."""
    start = SessionStartInfo(start_time_secs=time.time())
    for key, value in values.items():
        if isinstance(value, str):
            start.hparams[key].string_value = value
        else:
            start.hparams[key].number_value = value
    return _event(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))


def session_end(status: Any) -> Summary:
    """The event that says how a session has ended."""
    end = SessionEndInfo(status=status, end_time_secs=time.time())
    return _event(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def _event(tag: str, content: HParamsPluginData) -> Summary:
    return Summary(
        value=[Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content), tensor=metadata.NULL_TENSOR)]
    )
