"""The Lightning Trainer and the callbacks of a run."""

import dataclasses
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy

from cucafera.config import Config
from cucafera.model.flops import adapter_parameter_count, parameter_count, training_flops_per_token
from cucafera.training.callbacks.checkpoints import Checkpoints
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.callbacks.progress import Progress, count
from cucafera.training.callbacks.samples import Samples
from cucafera.training.callbacks.throughput import Throughput
from cucafera.training.callbacks.validation import Validation
from cucafera.training.hardware import Hardware
from cucafera.training.run_folder import RunFolder

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run, in the order in which they run after a step."""

    throughput: Throughput
    interruption: Interruption
    validation: Validation
    samples: Samples
    checkpoints: Checkpoints
    progress: Progress

    def in_order(self) -> list[pl.Callback]:
        """Curves and signals first, before others take time; then what is measured, before it is saved."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what a checkpoint knows of the run, without training on."""
        for callback in self.in_order():
            if callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])


def build_callbacks(config: Config, hardware: Hardware, folder: RunFolder) -> Callbacks:
    """The callbacks, which know of each other what they need."""
    throughput = Throughput(config, hardware)
    validation = Validation(config)
    return Callbacks(
        throughput=throughput,
        validation=validation,
        samples=Samples(config, validation),
        checkpoints=Checkpoints(config, folder, validation),
        interruption=Interruption(throughput),
        progress=Progress(config, throughput, validation),
    )


class EventLogger(TensorBoardLogger):
    """TensorBoard events, and nothing else, in the run folder."""

    def save(self) -> None:
        """Flushes; Lightning would add a second file of hyperparameters beside config.yaml."""
        self.experiment.flush()


def build_trainer(
    config: Config, hardware: Hardware, folder: RunFolder, callbacks: Callbacks, first_step: int
) -> pl.Trainer:
    """The Trainer of a run that begins at `first_step`.

    One Lightning epoch holds all the steps that are left; validation, checkpoints and clipping are our own.
    """
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)  # the plan and the report say what they would
    # Reading is measured, and one file at a time is fast enough; see Throughput's speed/data_wait.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # lightning 2.6 with torch 2.13
    # Events after the step that a killed run goes on from would stand twice in the curves.
    logger = EventLogger(folder.path, name="", version="", purge_step=first_step + 1 if first_step else None)
    return pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=DDPStrategy(gradient_as_bucket_view=True) if hardware.world_size > 1 else "auto",
        precision=PRECISIONS[hardware.precision],
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=logger if config.logger.tensorboard else False,
        callbacks=callbacks.in_order(),
        enable_checkpointing=False,
        log_every_n_steps=1,
        enable_model_summary=False,
        use_distributed_sampler=False,
        profiler=_profiler(config, folder),
        # On SLURM, Lightning would save a checkpoint of its own on SIGUSR1, which knows nothing of the data's place.
        plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
        default_root_dir=folder.path,
    )


def _profiler(config: Config, folder: RunFolder) -> Profiler | None:
    if config.trainer.profiler == "simple":
        return SimpleProfiler(dirpath=folder.path, filename="profile")
    if config.trainer.profiler == "pytorch":
        return PyTorchProfiler(dirpath=folder.path, filename="profile")
    return None


def describe_plan(config: Config, hardware: Hardware, first_step: int) -> str:
    """What is about to be done, in figures, for the terminal."""
    windows = config.windows_per_step // hardware.world_size
    micro_batches = windows // hardware.micro_batch_windows
    flops = training_flops_per_token(config.model, config.sequence_length, config.adapter)
    adapters = adapter_parameter_count(config.model, config.adapter)
    compiled = ", compiled" if hardware.compile else ""
    devices = f"{hardware.world_size} x " if hardware.world_size > 1 else ""
    lines = [
        f"Run     {config.run_dir}" + (f", going on after step {first_step:,}" if first_step else ""),
        f"Model   {parameter_count(config.model):,} parameters, context {config.model.max_position_embeddings:,}, "
        f"{count(flops)}FLOP a token" + (f"; {adapters:,} of adapters are trained" if adapters else ""),
        f"Device  {devices}{hardware.name}, {hardware.precision}{compiled}",
        f"Budget  {config.total_steps * int(config.batch_tokens):,} tokens = {config.total_steps:,} steps x "
        f"{int(config.batch_tokens):,} tokens",
        f"Step    {config.windows_per_step} windows of {config.sequence_length:,} tokens; on each device "
        f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''} of {hardware.micro_batch_windows}",
    ]
    return "\n".join(lines)
