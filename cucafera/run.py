"""The front door: `python -m cucafera.run` trains what its configuration says.

Composes and checks the configuration, builds, fits, reports. What is heavy to import is imported once the
configuration is known to be right.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    hydra_arguments,
    listed,
    register_schema,
    typed_config,
)
from cucafera.config import Config, UserError

if TYPE_CHECKING:
    from cucafera.data.windows import WindowDataModule

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
    sys.argv[1:] = hydra_arguments(sys.argv[1:])
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

    from cucafera.data.conversations import ChatDataModule
    from cucafera.data.packed import PackedDataModule
    from cucafera.training.module import LanguageModel
    from cucafera.training.report import collect_metrics, terminal_report, write_report
    from cucafera.training.run_folder import (
        RunFolder,
        checkpoint_to_begin_with,
        read_checkpoint,
        tokenizer_to_begin_with,
    )
    from cucafera.training.trainer import build_callbacks, build_trainer, describe_plan

    folder = RunFolder(Path(config.run_dir))
    resumed_path = folder.checkpoint_to_resume(config)
    resumed = read_checkpoint(resumed_path) if resumed_path else None
    if config.init_from and config.tokenizer.path is None:
        # A run that has begun needs nothing any more of the run that it began with.
        config.tokenizer.path = str(folder.tokenizer) if resumed else tokenizer_to_begin_with(config.init_from)
    initial = checkpoint_to_begin_with(config) if config.init_from and not resumed else None
    first_step, expected = 0, {}
    if resumed:
        first_step, expected = resumed["steps_done"], resumed["identity"]
    elif initial:
        expected = {"tokenizer": initial["identity"]["tokenizer"]}
    data_module = ChatDataModule if config.data.kind == "conversations" else PackedDataModule
    data = data_module(config, first_step, hardware.num_workers, hardware.accelerator == "cuda", expected)
    if config.epochs is not None:
        if resumed and resumed["config"]["epochs"] == config.epochs:
            config.budget_tokens = resumed["config"]["budget_tokens"]
        else:
            config.budget_tokens = budget_of_epochs(config, data)
    callbacks = build_callbacks(config, hardware, folder)
    if resumed and first_step >= config.total_steps:
        callbacks.restore(resumed)
        log.info(
            "This run is complete. Train longer with a larger budget_tokens or epochs, begin anew with "
            "resume=overwrite, or choose another name."
        )
        if not folder.metrics.exists():  # it was killed between its last checkpoint and its report
            write_report(collect_metrics(config, hardware, callbacks), folder)
        metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
        log.info("%s", terminal_report(metrics, folder))
        return float(metrics["validation"][-1]["bpb"])

    pl.seed_everything(config.seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    module = LanguageModel(config, hardware.micro_batch_windows, hardware.compile)
    if initial:
        adapters = {name: value for name, value in module.state_dict().items() if ".lora_" in name}
        module.load_state_dict(adapters | initial["state_dict"])
    trainer = build_trainer(config, hardware, folder, callbacks, first_step)
    if trainer.is_global_zero:
        log.info("%s", describe_plan(config, hardware, first_step))
        if resumed:
            warn_of_another_horizon(config, resumed["config"])
    if trainer.world_size == 1:
        data.prepare_data()  # Lightning would do it in `fit`, and end Ctrl-C with code 1 and no word
        data.setup()  # what is wrong with the text is known before an earlier run is erased
    if trainer.is_global_zero:
        folder.begin(config, overrides, resumed=resumed is not None)
    try:
        trainer.fit(module, data, ckpt_path=resumed_path, weights_only=True)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU has too little memory for {hardware.micro_batch_windows} windows at a time: set "
            f"trainer.micro_batch_windows={max(1, hardware.micro_batch_windows // 2)}. The result stays the same"
        ) from error

    if callbacks.interruption.received is not None:
        log.info("Stopped and saved after step %s; the same command goes on from there.", f"{module.steps_done:,}")
        sys.exit(128 + callbacks.interruption.received)
    metrics = collect_metrics(config, hardware, callbacks)
    if trainer.is_global_zero:
        write_report(metrics, folder)
        log.info("%s", terminal_report(metrics, folder))
    return float(metrics["validation"][-1]["bpb"])


def budget_of_epochs(config: Config, data: "WindowDataModule[Any]") -> int:
    """Tokens of the whole steps that show the training data `epochs` times at least."""
    data.prepare_data()
    data.setup()
    assert config.epochs is not None
    steps = data.steps_of(config.epochs)
    if config.schedule.warmup_steps > (config.schedule.horizon_steps or steps):
        raise UserError(
            f"epochs={config.epochs:g} come to {steps:,} steps of {int(config.batch_tokens):,} tokens, fewer than "
            f"schedule.warmup_steps={config.schedule.warmup_steps}: lower it or batch_tokens, or train for more epochs"
        )
    return steps * int(config.batch_tokens)


def warn_of_another_horizon(config: Config, before: dict[str, Any]) -> None:
    """Says so if a run goes on with another budget whose end the learning rate follows."""
    steps_before = int(before["budget_tokens"]) // int(before["batch_tokens"])
    follows_budget = config.schedule.horizon_steps is None and config.schedule.name != "constant"
    if follows_budget and steps_before != config.total_steps:
        log.warning(
            "The budget was %s steps and is %s now, and the learning rate follows it: it does not go on from where it "
            "was, but as if this budget had been given from the start. schedule.horizon_steps=%s keeps it.",
            f"{steps_before:,}", f"{config.total_steps:,}", steps_before,
        )  # fmt: skip


if __name__ == "__main__":
    main()
