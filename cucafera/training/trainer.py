"""The Lightning Trainer and the callbacks of a run."""

import dataclasses
import logging
import math
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from cucafera.config import Config, UserError
from cucafera.model.flops import adapter_parameter_count, parameter_count, training_flops_per_token
from cucafera.training.callbacks.checkpoints import Checkpoints
from cucafera.training.callbacks.guards import Guards
from cucafera.training.callbacks.histograms import Histograms
from cucafera.training.callbacks.hyperparameters import Hyperparameters
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.callbacks.layers import Layers
from cucafera.training.callbacks.layout import Layout
from cucafera.training.callbacks.plan import Plan
from cucafera.training.callbacks.profile import Profile
from cucafera.training.callbacks.progress import Progress, count
from cucafera.training.callbacks.reference import ReferenceCurve
from cucafera.training.callbacks.samples import Samples
from cucafera.training.callbacks.system import System
from cucafera.training.callbacks.throughput import Throughput
from cucafera.training.callbacks.validation import Validation
from cucafera.training.checkpoint_files import CheckpointWriter
from cucafera.training.events import EventLogger
from cucafera.training.hardware import Hardware, free_memory_bytes
from cucafera.training.module import LanguageModel
from cucafera.training.run_folder import RunFolder
from cucafera.training.sharding import FullySharded

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}
SHARES = {"ddp": "the whole model", "fsdp": "a share of the model"}
"""What a device holds, by trainer.strategy."""


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run, in the order in which they run after a step.

    Attributes:
        profile: The profiler, if one is wanted.
        dashboard: Those that write nothing but TensorBoard events; none where no events are written.
    """

    profile: tuple[pl.Callback, ...]
    interruption: Interruption
    guards: Guards
    throughput: Throughput
    validation: Validation
    dashboard: tuple[pl.Callback, ...]
    samples: Samples
    checkpoints: Checkpoints
    progress: Progress

    def in_order(self) -> list[pl.Callback]:
        """Signals and guards first, lest something broken be written; then what is measured, before it is saved."""
        callbacks: list[pl.Callback] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            callbacks += value if isinstance(value, tuple) else (value,)
        return callbacks

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what a checkpoint knows of the run, without training on."""
        for callback in self.in_order():
            if callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])


def build_callbacks(
    config: Config,
    hardware: Hardware,
    folder: RunFolder,
    resumed: dict[str, Any] | None,
    left_out_batches: list[int],
    interruption: Interruption,
    overrides: Sequence[str],
) -> Callbacks:
    """The callbacks, which know of each other what they need.

    Args:
        config: The run.
        hardware: Where it trains.
        folder: Its folder.
        resumed: The checkpoint that it goes on from, if any.
        left_out_batches: Numbers of the batches that rollbacks have left out.
        interruption: What answers signals.
        overrides: The command line.
    """
    guards = Guards(config, interruption, left_out_batches)
    throughput = Throughput(config, hardware, guards)
    validation = Validation(config)
    settings = config.callbacks
    writer = CheckpointWriter(
        folder.checkpoints, resumed, settings.keep_last, settings.keep_every_steps, free_memory_bytes
    )
    return Callbacks(
        profile=(Profile(hardware, folder.path, config.total_steps),) if config.trainer.profile else (),
        interruption=interruption,
        guards=guards,
        throughput=throughput,
        validation=validation,
        dashboard=_dashboard(config, hardware, overrides, guards, throughput, validation),
        samples=Samples(config, validation),
        checkpoints=Checkpoints(config, folder, writer, interruption, validation),
        progress=Progress(config, throughput, validation),
    )


def _dashboard(
    config: Config,
    hardware: Hardware,
    overrides: Sequence[str],
    guards: Guards,
    throughput: Throughput,
    validation: Validation,
) -> tuple[pl.Callback, ...]:
    if not config.logger.tensorboard:
        return ()
    settings = config.callbacks
    always = (
        Layout(hardware),
        System(config, hardware, overrides),
        Plan(config),
        Layers(config, guards, validation),
        Hyperparameters(config, overrides, throughput, validation),
    )
    reference = (ReferenceCurve(config),) if settings.reference_curve else ()
    histograms = (Histograms(config),) if settings.histogram_every_steps else ()
    return (*always, *reference, *histograms)


def build_trainer(
    config: Config, hardware: Hardware, folder: RunFolder, callbacks: Callbacks, first_step: int
) -> pl.Trainer:
    """The Trainer of a run that begins at `first_step`.

    One Lightning epoch holds all the steps that are left; validation, checkpoints and clipping are our own.
    Raises UserError if the devices are others than those that torchrun or a SLURM job has processes for.
    """
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)  # the plan and the report say what they would
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
    """What has started the processes of this job, one a device; None: Lightning starts them."""
    environment: ClusterEnvironment
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
        command = f"torchrun --nnodes={num_nodes} --nproc-per-node={devices}"
    elif SLURMEnvironment.detect():
        # Lightning would save a checkpoint of its own on SIGUSR1, which knows nothing of the data's place.
        environment = SLURMEnvironment(auto_requeue=False)
        command = f"sbatch --nodes={num_nodes} --ntasks-per-node={devices}"
    else:
        return None
    try:
        environment.validate_settings(devices, num_nodes)
    except ValueError as error:
        raise UserError(
            f"{error} The job has one process a device: {command}, or other values of trainer.num_nodes and "
            "trainer.devices"
        ) from None
    return environment


def disk_problem(config: Config, folder: RunFolder, module: LanguageModel) -> str | None:
    """Says so if the disk has too little room for the checkpoints of a run.

    A checkpoint holds each weight, and both moments of AdamW for those that are trained.
    """
    size = sum(weight.nbytes * (3 if weight.requires_grad else 1) for weight in module.parameters())
    settings = config.callbacks
    saves = math.ceil(config.total_steps / (settings.checkpoint_every_steps or config.total_steps))
    for_good = config.total_steps // settings.keep_every_steps if settings.keep_every_steps else 0
    at_once = min(saves, settings.keep_last + for_good + 2)  # two for the best, and the one that is being written
    there = sum(checkpoint.size for checkpoint in folder.checkpoints.complete())
    place = next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if at_once * size - there <= free:
        return None
    return (
        f"THE DISK MAY BECOME FULL: {at_once} checkpoints of {size / 1e9:.2g} GB need {at_once * size / 1e9:.2g} GB in "
        f"{folder.path}, and {(free + there) / 1e9:.2g} GB are free for them. Lower callbacks.keep_last"
        + (", raise callbacks.keep_every_steps" if for_good else "")
        + " or set run_dir to a folder on a larger disk"
    )


def describe_plan(config: Config, hardware: Hardware, first_step: int) -> str:
    """What is about to be done, in figures, for the terminal."""
    windows = config.windows_per_step // hardware.world_size
    micro_batches = math.ceil(windows / hardware.micro_batch_windows)
    flops = training_flops_per_token(config.model, config.sequence_length, config.adapter)
    adapters = adapter_parameter_count(config.model, config.adapter)
    compiled = ", compiled" if hardware.compile else ""
    recomputed = ", activations computed again" if hardware.activation_checkpointing else ""
    devices, sharing = "", ""
    if hardware.world_size > 1:
        devices = f"{hardware.world_size} x "
        sharing = f"; {config.trainer.strategy}: each has {SHARES[config.trainer.strategy]}"
    lines = [
        f"Run     {config.run_dir}" + (f", going on after step {first_step:,}" if first_step else ""),
        f"Model   {parameter_count(config.model):,} parameters, context {config.model.max_position_embeddings:,}, "
        f"{count(flops)}FLOP a token" + (f"; {adapters:,} of adapters are trained" if adapters else ""),
        f"Device  {devices}{hardware.name}, {hardware.precision}{compiled}{recomputed}{sharing}",
        f"Budget  {config.total_steps * int(config.batch_tokens):,} tokens = {config.total_steps:,} steps x "
        f"{int(config.batch_tokens):,} tokens",
        f"Step    {config.windows_per_step} windows of {config.sequence_length:,} tokens; on each device "
        f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''} of {hardware.micro_batch_windows}",
    ]
    return "\n".join(lines)
