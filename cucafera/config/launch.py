"""Start of a run or a sweep by Hydra's public interface.

`hydra.main` would read sys.argv and compose the configuration again; here it has been composed and checked.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig

from cucafera.config.choices import CONFIG_NAME
from cucafera.config.errors import UserError

NO_CALLBACKS: Any = SimpleNamespace(on_job_start=lambda **_: None, on_job_end=lambda **_: None)


def start_run(node: DictConfig, run_dir: str, run: Callable[[str], float]) -> None:
    """Call a function with the path of the run folder, with the log and environment of a composed configuration."""
    node.hydra.mode = RunMode.RUN
    node.hydra.run.dir = run_dir
    raised: list[Exception] = []

    def task(_: DictConfig) -> float | None:
        try:
            return run(HydraConfig.get().runtime.output_dir)
        except Exception as error:  # Hydra would print a line of its own before it raises it again
            raised.append(error)
            return None

    try:
        run_job(
            task_function=task,
            config=node,
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
            hydra_context=HydraContext(GlobalHydra.instance().config_loader(), NO_CALLBACKS),
        )
    except ValueError as error:  # of logging.config
        raise UserError(f"hydra.job_logging cannot be used: {error.__cause__ or error}") from error
    if raised:
        raise raised[0]


def start_sweep(arguments: Sequence[str], job: TaskFunction) -> None:
    """Start a sweep with the overrides of `sweep_arguments`; launchers pickle `job` by its name."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    hydra.multirun(
        CONFIG_NAME, job, list(arguments)
    )  # the only use of Hydra's own object: nothing public starts sweepers
