"""The Lightning Trainer and the callbacks of a run."""

import dataclasses
import functools
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from cucafera.config.errors import UserError
from cucafera.config.schema import Config
from cucafera.model.flops import adapter_parameter_count, parameter_count, training_flops_per_token
from cucafera.objectives import objective_of
from cucafera.quantities import data_size, flops, number_of
from cucafera.runs.folder import RunFolder, StartingPoint
from cucafera.training.callbacks.answers_guard import AnswersGuard
from cucafera.training.callbacks.checkpoints import Checkpoints
from cucafera.training.callbacks.dashboard_layout import DashboardLayout
from cucafera.training.callbacks.guards import Guards
from cucafera.training.callbacks.hyperparameters import Hyperparameters
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.callbacks.layers import Layers
from cucafera.training.callbacks.profile import Profile
from cucafera.training.callbacks.progress import Progress
from cucafera.training.callbacks.reference import ReferenceCurve
from cucafera.training.callbacks.reference_logprobs import ReferenceLogprobs
from cucafera.training.callbacks.samples import Samples
from cucafera.training.callbacks.system import System
from cucafera.training.callbacks.throughput import Throughput
from cucafera.training.callbacks.validation import Validation
from cucafera.training.checkpoint_writer import CheckpointWriter
from cucafera.training.events import EventLogger
from cucafera.training.hardware import Hardware
from cucafera.training.memory import free_memory_bytes
from cucafera.training.module import LanguageModel
from cucafera.training.schedules import lr_ratio
from cucafera.training.sharding import FullySharded

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}
SHARES = {"ddp": "the full model", "fsdp": "a shard of the model"}
"""What each device holds, by trainer.strategy."""


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run, in the order in which they run after a step.

    Attributes:
        profile: The profiler, if one is wanted.
        reference: What computes log-probabilities of the initial model, if the objective needs them.
        dashboard: Those that write only TensorBoard events; none if no events are written.
    """

    profile: tuple[pl.Callback, ...]
    interruption: Interruption
    reference: tuple[ReferenceLogprobs, ...]
    guards: Guards
    throughput: Throughput
    validation: Validation
    dashboard: tuple[pl.Callback, ...]
    samples: Samples
    answers: AnswersGuard
    checkpoints: Checkpoints
    progress: Progress

    def in_order(self) -> list[pl.Callback]:
        """Return the callbacks: signals and guards before anything is written, validation before checkpoints."""
        callbacks: list[pl.Callback] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            callbacks += value if isinstance(value, tuple) else (value,)
        return callbacks

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Load the callbacks' state from a checkpoint, without training."""
        for callback in self.in_order():
            if callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])


def build_callbacks(
    config: Config,
    hardware: Hardware,
    folder: RunFolder,
    start: StartingPoint | None,
    skipped_batches: list[int],
    interruption: Interruption,
    overrides: Sequence[str],
    changes: Mapping[str, tuple[Any, Any]],
) -> Callbacks:
    """Return the callbacks, each with references to those that it reads.

    Args:
        config: The run.
        hardware: Where it trains.
        folder: Its folder.
        start: The checkpoint that it resumes from or begins with, if any.
        skipped_batches: Numbers of the batches that rollbacks skip.
        interruption: The signal handler.
        overrides: The command line.
        changes: Keys that differ from the defaults, with the default and the value of the run.
    """
    guards = Guards(config, interruption, skipped_batches)
    throughput = Throughput(config, hardware, guards)
    validation = Validation(config)
    samples = Samples(config, validation)
    settings = config.callbacks
    writer = CheckpointWriter(
        folder.checkpoints, start, settings.keep_last, settings.keep_every_steps, free_memory_bytes
    )
    return Callbacks(
        profile=(Profile(hardware, folder.path, config.total_steps),) if config.trainer.profile else (),
        interruption=interruption,
        reference=(ReferenceLogprobs(config, hardware, interruption),)
        if objective_of(config).needs_reference(config.objective)
        else (),
        guards=guards,
        throughput=throughput,
        validation=validation,
        dashboard=_dashboard(config, hardware, overrides, changes, guards, validation),
        samples=samples,
        answers=AnswersGuard(config, folder, validation, samples, interruption),
        checkpoints=Checkpoints(config, folder, writer, interruption, validation),
        progress=Progress(config, throughput, validation),
    )


def _dashboard(
    config: Config,
    hardware: Hardware,
    overrides: Sequence[str],
    changes: Mapping[str, tuple[Any, Any]],
    guards: Guards,
    validation: Validation,
) -> tuple[pl.Callback, ...]:
    if not config.logger.tensorboard:
        return ()
    settings = config.callbacks
    always = (
        DashboardLayout(hardware),
        System(config, hardware, overrides, changes),
        Layers(config, guards, validation),
        Hyperparameters(config, overrides),
    )
    reference = (ReferenceCurve(config),) if settings.reference_curve else ()
    return (*always, *reference)


def build_trainer(
    config: Config, hardware: Hardware, folder: RunFolder, callbacks: Callbacks, first_step: int
) -> pl.Trainer:
    """Return the Trainer of a run that starts or resumes at `first_step`.

    One Lightning epoch holds all remaining steps; validation, checkpoints and gradient clipping are our own. Raises
    UserError if the number of devices is not that of the processes that torchrun or SLURM has started.
    """
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)  # the plan and the report replace their messages
    # Reading is measured, and one file at a time is fast enough; see Throughput's speed/data_wait.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # lightning 2.6 with torch 2.13
    warnings.filterwarnings("ignore", ".*Mismatch dtype between input and weight.*")  # under fsdp; see BF16_BLOCKS
    plugins: list[Any] = [callbacks.checkpoints.writer]
    if environment := _started_by(hardware.devices, config.trainer.num_nodes):
        plugins.append(environment)
    return pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=_strategy(config, hardware),
        precision=PRECISIONS[hardware.precision],
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=EventLogger(folder.path, first_step) if config.logger.tensorboard else False,
        callbacks=callbacks.in_order(),
        enable_checkpointing=False,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        plugins=plugins,
        default_root_dir=folder.path,
    )


def _strategy(config: Config, hardware: Hardware) -> Strategy | str:
    if hardware.world_size == 1:
        return "auto"
    if config.trainer.strategy == "fsdp":
        return FullySharded(hardware.world_size)
    return DDPStrategy(gradient_as_bucket_view=True)


def _started_by(devices: int, num_nodes: int) -> ClusterEnvironment | None:
    """Return what has started the processes of this job, one per device; None if Lightning is to start them."""
    build: Callable[[], ClusterEnvironment]
    if TorchElasticEnvironment.detect():
        build = TorchElasticEnvironment
        command = f"torchrun --nnodes={num_nodes} --nproc-per-node={devices}"
    elif SLURMEnvironment.detect():
        # By itself, Lightning would save a checkpoint of its own on SIGUSR1, without the position in the data.
        build = functools.partial(SLURMEnvironment, auto_requeue=False)
        command = f"sbatch --nodes={num_nodes} --ntasks-per-node={devices}"
    else:
        return None
    try:
        environment = build()
        environment.validate_settings(devices, num_nodes)
        if environment.world_size() != devices * num_nodes or environment.global_rank() >= environment.world_size():
            raise ValueError(
                f"This is process {environment.global_rank()} of {environment.world_size()}, for "
                f"{number_of(devices * num_nodes, 'device')}."
            )
    except (ValueError, RuntimeError, KeyError) as error:
        problem = f"The environment variable {error} is missing." if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{problem} The job needs one process per device: {command}, or other values of trainer.num_nodes and "
            "trainer.devices"
        ) from None
    return environment


def disk_problem(config: Config, folder: RunFolder, module: LanguageModel) -> str | None:
    """Return a warning if the disk has too little space for the checkpoints of a run.

    A checkpoint holds each weight, and the optimizer's state of those that are trained.
    """
    size = sum(weight.nbytes for weight in module.parameters()) + module.optimizer_spec.state_bytes(config)
    settings = config.callbacks
    first, last, kept = config.schedule.cooldown_start_step or 0, config.total_steps, settings.keep_every_steps
    saves = math.ceil((last - first) / (settings.checkpoint_every_steps or last))
    for_good = last // kept - first // kept if kept else 0
    at_once = min(saves, settings.keep_last + for_good + 2)  # and two: the best, and the one that is being written
    existing = sum(checkpoint.size for checkpoint in folder.checkpoints.complete())
    parent = next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if at_once * size - existing <= free:
        return None
    return (
        f"THE DISK MAY BECOME FULL: {number_of(at_once, 'checkpoint')} of {data_size(size)}, "
        f"{data_size(at_once * size)} in all, will be in {folder.path}, and {data_size(free + existing)} are free for "
        "them. Lower callbacks.keep_last"
        + (", raise callbacks.keep_every_steps" if for_good else "")
        + " or set run_dir to a folder on a larger disk"
    )


def describe_cooldown(config: Config) -> str | None:
    """Return in words what a cooldown is of, and its learning rate; None for any other run."""
    start = config.schedule.cooldown_start_step
    if start is None:
        return None
    rate = config.optimizer.lr * lr_ratio(start, config.schedule, config.horizon_steps)
    steps = number_of(config.total_steps - start, "step")
    return f"cooldown of {config.init_from} after step {start:,}: {steps}, learning rate {rate:.3g} to 0"


def describe_plan(config: Config, hardware: Hardware, first_step: int) -> str:
    """Return the plan of a run in figures, for the terminal."""
    windows = config.windows_per_step // hardware.world_size
    micro_batches = math.ceil(windows / hardware.micro_batch_windows)
    flops_per_token = training_flops_per_token(config.model, config.sequence_length, config.adapter)
    adapters = adapter_parameter_count(config.model, config.adapter)
    compiled = ", compiled" if hardware.compile else ""
    recomputed = ", activation checkpointing" if hardware.activation_checkpointing else ""
    devices, sharing = "", ""
    if hardware.world_size > 1:
        devices = f"{hardware.world_size} x "
        sharing = f"; {config.trainer.strategy}: each has {SHARES[config.trainer.strategy]}"
    lines = [
        f"Run     {config.run_dir}" + (f", resuming after step {first_step:,}" if first_step else ""),
        *([f"Start   {cooldown}"] if (cooldown := describe_cooldown(config)) else []),
        f"Model   {number_of(parameter_count(config.model), 'parameter')}, context "
        f"{config.model.max_position_embeddings:,}, "
        f"{flops(flops_per_token)} per token" + (f"; {adapters:,} of adapters are trained" if adapters else ""),
        f"Device  {devices}{hardware.name}, {hardware.precision}{compiled}{recomputed}{sharing}",
        f"Budget  {number_of(config.total_steps * config.batch_tokens, 'token')} = "
        f"{number_of(config.total_steps, 'step')} x "
        f"{number_of(config.batch_tokens, 'token')}",
        f"Step    {number_of(config.windows_per_step, 'window')} of {number_of(config.sequence_length, 'token')}, "
        f"{'on each device ' if hardware.world_size > 1 else ''}in {number_of(micro_batches, 'micro-batch')} of "
        f"{hardware.micro_batch_windows:,}",
    ]
    return "\n".join(lines)
