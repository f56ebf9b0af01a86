"""The front door: `python -m cucafera.run` trains what its configuration says.

Composes and checks the configuration, builds, fits, reports. What is heavy to import is imported once the
configuration is known to be right.
"""

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cucafera.composition import (
    CONFIG_NAME,
    command_line_problems,
    config_directory,
    help_text,
    listed,
    register_schema,
    typed_config,
)
from cucafera.config import Config, UserError

log = logging.getLogger(__name__)

EXIT_USER_ERROR = 2


def main() -> None:
    """Answers --help and wrong command lines at once; leaves the rest to Hydra and `job`."""
    # Threads that wait by spinning make a CPU run ten times slower beside another busy program, and gain nothing alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = get_args_parser().parse_args()
    if arguments.help:
        print(help_text())
        return
    problems = command_line_problems(arguments.overrides, arguments.multirun, arguments.config_dir)
    if problems:
        print(listed(problems), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    register_schema()
    application = hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=CONFIG_NAME)(job)
    try:
        application()
    except KeyboardInterrupt:
        print("Interrupted; the same command begins or goes on.", file=sys.stderr)
        sys.exit(130)


def job(composed: DictConfig) -> float | None:
    """One run. Returns its validation bpb, which Hydra's sweepers minimize."""
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    try:
        config = typed_config(composed)
        config.run_dir = os.path.relpath(hydra_config.runtime.output_dir)
        if multirun and config.trainer.devices != 1:
            raise UserError(
                "--multirun runs its jobs in one process, which cannot start the processes of several devices: "
                "set trainer.devices=1, or start the jobs one by one"
            )
        return train(config, list(hydra_config.overrides.task))
    except UserError as error:
        if multirun:
            raise  # Hydra goes on with the other jobs
        log.error("%s", error)
        sys.exit(EXIT_USER_ERROR)


def train(config: Config, overrides: list[str]) -> float | None:
    """Trains, or goes on training, the run of a configuration.

    Args:
        config: What to do; its run_dir is the run folder.
        overrides: The command line, for the record.

    Returns:
        The last validation's bpb.

    Raises:
        UserError: what the user can mend.
    """
    from cucafera.training.hardware import decide_hardware

    hardware = decide_hardware(config)  # a missing GPU is told before Lightning's import takes its seconds

    import lightning.pytorch as pl
    import torch

    from cucafera.data.packed import PackedDataModule
    from cucafera.training.module import LanguageModel
    from cucafera.training.report import collect_metrics, write_report
    from cucafera.training.run_folder import RunFolder, read_checkpoint, weights_to_begin_with
    from cucafera.training.trainer import build_callbacks, build_trainer, describe_plan

    folder = RunFolder(Path(config.run_dir))
    checkpoint = folder.checkpoint_to_resume(config)
    first_step = read_checkpoint(checkpoint)["steps_done"] if checkpoint else 0
    initial_weights = weights_to_begin_with(config) if config.init_from and not checkpoint else None

    pl.seed_everything(config.seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    module = LanguageModel(config, hardware.micro_batch_windows, hardware.compile)
    if initial_weights is not None:
        module.load_state_dict(initial_weights)
    data = PackedDataModule(config, first_step, hardware.num_workers, pin_memory=hardware.accelerator == "cuda")
    callbacks = build_callbacks(config, hardware, folder)
    trainer = build_trainer(config, hardware, folder, callbacks, first_step)
    if trainer.is_global_zero:
        folder.begin(config, overrides, resumed=checkpoint is not None)
        log.info("%s", describe_plan(config, hardware, first_step))

    if first_step < config.total_steps:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    elif checkpoint is not None:
        callbacks.restore(read_checkpoint(checkpoint))
        log.info(
            "This run is complete. Train longer with a larger budget_tokens, begin anew with resume=overwrite, "
            "or choose another name."
        )

    if callbacks.interruption.received is not None:
        log.info("Stopped and saved after step %s; the same command goes on from there.", f"{module.steps_done:,}")
        sys.exit(128 + callbacks.interruption.received)
    metrics = collect_metrics(config, hardware, callbacks)
    if trainer.is_global_zero:
        print(write_report(config, metrics, folder))
    return float(metrics["validation"][-1]["bpb"])


if __name__ == "__main__":
    main()
