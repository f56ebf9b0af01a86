"""Test whether a learning rate found on a narrow model holds on a wide one, with and without model.base_hidden_size.

    OMP_WAIT_POLICY=PASSIVE python scripts/transfer.py coordinates   change of activations in a few steps, by width
    OMP_WAIT_POLICY=PASSIVE python scripts/transfer.py study         best learning rate of each width
    ... study --optimizer muon --rate matrix_lr                      the same for a rate of another optimizer

Both print a table and draw a figure (`pip install '.[plots]'`), on the embedded corpus. The narrowest width is the
base; there the two parametrizations are the same network, which is trained once for both.

`coordinates` is the check of Yang et al., 2022 (Tensor Programs V, appendix D): after a few steps at one learning rate,
the root mean square of the change of activations should not depend on the width. The slope is that of a line through
the logarithms of both: 0 for no dependence, 1 for growth in proportion.

`study` trains every width at every learning rate of a grid with `cucafera.run`, and validates at the end. The optimum
is found as at the end of a sweep (cucafera/sweeps/optimum.py), with its uncertainty: "moved" has that of both optima.
Other settings, such as the rate that is not swept, are given by --override. Finished runs in --folder are kept: run
the same command again to resume after an interruption, or to extend the grid.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import ModelConfig
from cucafera.data.packed import open_documents
from cucafera.model.transformer import Decoder
from cucafera.optimizers import build_optimizer
from cucafera.optimizers.adamw import AdamWConfig
from cucafera.quantities import number_of
from cucafera.run import train
from cucafera.runs.folder import RunFolder
from cucafera.sweeps.optimum import Optimum, find_optimum

HEAD_WIDTH = 16
BATCH_TOKENS = 1024
SETTINGS = [
    "trainer=cpu",
    "logger=none",
    "resume=overwrite",
    "model.vocab_size=512",
    "model.num_hidden_layers=2",
    "model.max_position_embeddings=64",
    f"batch_tokens={BATCH_TOKENS}",
    "schedule=cosine",
    "optimizer.weight_decay=0.1",
    "data.processes=1",
    "callbacks.validate_every_steps=0",
    "callbacks.checkpoint_every_steps=0",
    "callbacks.prompts=[]",
]
PARAMETRIZATIONS = {False: "standard", True: "width-aware"}
ACTIVATIONS = ("residual stream", "attention output", "logits")


def model_overrides(width: int, base: int | None) -> list[str]:
    """Return overrides for a width: constant head dim, everything else in proportion."""
    heads = width // HEAD_WIDTH
    return [
        f"model.hidden_size={width}",
        f"model.intermediate_size={3 * width}",
        f"model.num_attention_heads={heads}",
        f"model.num_key_value_heads={heads // 2}",
        f"model.base_hidden_size={'null' if base is None else base}",
    ]


def initializer_range(base: int) -> str:
    """Return the override of the initial weights' scale: that at which 0.02 belongs to a width of 400."""
    return f"model.initializer_range={0.4 / base**0.5:.1g}"


Batch = tuple[Tensor, Tensor, Tensor | None]
"""Token ids, targets and documents, each [B, T]."""


@torch.no_grad()
def activations(decoder: Decoder, batch: Batch) -> dict[str, Tensor]:
    """Return the residual stream after the last block, the output of its attention, and the logits."""
    outputs: dict[str, Tensor] = {}
    last = decoder.layers[-1]
    hooks = [
        last.register_forward_hook(lambda module, inputs, output: outputs.update({"residual stream": output})),
        last.self_attn.register_forward_hook(
            lambda module, inputs, output: outputs.update({"attention output": output})
        ),
    ]
    outputs["logits"] = decoder.logits(decoder(batch[0], documents=batch[2]))
    for hook in hooks:
        hook.remove()
    return outputs


def changes(config: ModelConfig, batches: Sequence[Batch], learning_rate: float, seed: int = 0) -> dict[str, float]:
    """Return the root mean square of the change of activations on the first batch after one step on each batch."""
    torch.manual_seed(seed)
    decoder = Decoder(config)
    optimizer = build_optimizer(decoder, AdamWConfig(lr=learning_rate))
    before = activations(decoder, batches[0])
    for input_ids, targets, documents in batches:
        (decoder(input_ids, targets, documents) / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = activations(decoder, batches[0])
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in ACTIVATIONS}


def slopes(measured: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Return the slope of the line through the logarithms of widths and changes, by activation."""
    widths = np.log(list(measured))
    return {
        name: float(np.polyfit(widths, np.log([row[name] for row in measured.values()]), 1)[0]) for name in ACTIVATIONS
    }


def coordinates(arguments: argparse.Namespace) -> None:
    """Measure, print and draw the change of activations in a few steps."""
    base = min(arguments.widths)
    settings = [*SETTINGS, initializer_range(base)]
    config = composed_config(settings)
    config.data.prepared_dir = str(arguments.folder / "prepared")
    steps = open_documents(config).training_steps(())
    batches: list[Batch] = [tuple(steps[step]) for step in range(arguments.steps)]
    measured: dict[bool, dict[int, dict[str, float]]] = {False: {}, True: {}}
    for scaled, width in itertools.product(measured, sorted(arguments.widths)):
        model = composed_config([*settings, *model_overrides(width, base if scaled else None)]).model
        rows = [changes(model, batches, 2.0**arguments.exponent, seed) for seed in range(arguments.seeds)]
        measured[scaled][width] = {name: math.fsum(row[name] for row in rows) / len(rows) for name in ACTIVATIONS}
    print(f"RMS change after {number_of(arguments.steps, 'step')} at 2^{arguments.exponent}, base width {base}\n")
    print(f"{'':12}{'width':>8}" + "".join(f"{name:>18}" for name in ACTIVATIONS))
    for scaled, row_of in measured.items():
        for width, row in row_of.items():
            print(f"{PARAMETRIZATIONS[scaled]:12}{width:>8}" + "".join(f"{row[name]:>18.4f}" for name in ACTIVATIONS))
        print(f"{'':12}{'slope':>8}" + "".join(f"{slope:>18.2f}" for slope in slopes(row_of).values()) + "\n")
    draw_coordinates(
        measured, f"RMS change after {number_of(arguments.steps, 'step')}", arguments.folder / "coordinates.png"
    )


class Study(NamedTuple):
    """The settings that all runs of a study have in common.

    Attributes:
        optimizer: A registered optimizer.
        rate: The setting of it that is swept.
        base: The base width.
        steps: Training steps of a run.
        overrides: Further overrides.
        folder: Of the runs.
    """

    optimizer: str
    rate: str
    base: int
    steps: int
    overrides: tuple[str, ...]
    folder: Path


class Run(NamedTuple):
    """One run of the study.

    Attributes:
        scaled: True with a base width.
        width: Hidden size.
        exponent: The peak learning rate is 2 ** exponent.
        seed: Seed of weights and order.
    """

    scaled: bool
    width: int
    exponent: float
    seed: int

    def overrides(self, study: Study) -> list[str]:
        """Return the overrides of the run."""
        swept = f"{study.optimizer}.{study.rate}"
        return [
            *SETTINGS,
            initializer_range(study.base),
            *model_overrides(self.width, study.base if self.scaled else None),
            f"name={swept}-{PARAMETRIZATIONS[self.scaled]}-width{self.width}-rate{self.exponent:g}-seed{self.seed}",
            f"seed={self.seed}",
            f"optimizer={study.optimizer}",
            f"budget_tokens={BATCH_TOKENS * study.steps}",
            f"schedule.warmup_steps={study.steps // 5}",
            *study.overrides,
            f"optimizer.{study.rate}={2.0**self.exponent}",
        ]

    def loss(self, study: Study) -> float:
        """Return the last validation loss in nats per token, training the run unless it is complete.

        Infinity if the guards stopped the run.
        """
        overrides = self.overrides(study)
        config = composed_config(overrides)
        config.data.prepared_dir = str(study.folder / "prepared")
        config.run_dir = str(study.folder / config.name)
        run = RunFolder(Path(config.run_dir))
        if not (run.metrics.exists() and OmegaConf.load(run.overrides) == overrides):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    train(config, overrides)
            except UserError as error:
                print(f"{config.name}: {error}")
                return math.inf
            run.checkpoints.remove_all()  # they are not needed, and those of a large grid would fill a disk
        return float(json.loads(run.metrics.read_text())["validation"][-1]["loss"])


def study(arguments: argparse.Namespace) -> None:
    """Train the grid, and print and draw the optimum of each width."""
    started = time.monotonic()
    widths = sorted(arguments.widths)
    first, last = arguments.exponents
    parametrizations = [scaled for scaled, name in PARAMETRIZATIONS.items() if name in arguments.parametrization]
    exponents = [float(exponent) for exponent in np.arange(first, last + arguments.spacing / 2, arguments.spacing)]
    common = Study(
        arguments.optimizer, arguments.rate, widths[0], arguments.steps, tuple(arguments.override), arguments.folder
    )
    runs = [
        Run(scaled, width, exponent, seed)
        for width in widths
        for scaled in (parametrizations if width > widths[0] else (False,))
        for exponent, seed in itertools.product(exponents, range(arguments.seeds))
    ]
    losses: dict[Run, float] = {}
    for number, run in enumerate(runs, 1):
        losses[run] = run.loss(common)
        print(
            f"{number:>3}/{len(runs)}  {time.monotonic() - started:>5.0f} s  {PARAMETRIZATIONS[run.scaled]:12}"
            f"width {run.width:>4}  rate 2^{run.exponent:<6g}seed {run.seed}  validation loss {losses[run]:.3f}",
            flush=True,
        )
    curves: dict[bool, dict[int, dict[float, float]]] = {scaled: {} for scaled in parametrizations}
    for scaled, width in itertools.product(curves, widths):
        trained = scaled and width > widths[0]
        curves[scaled][width] = {
            exponent: statistics.fmean(losses[Run(trained, width, exponent, seed)] for seed in range(arguments.seeds))
            for exponent in exponents
        }
    print_study(curves, arguments.rate)
    name = "study.png" if arguments.rate == "lr" and arguments.optimizer == "adamw" else f"study-{arguments.rate}.png"
    draw_study(curves, arguments.rate, arguments.folder / name)


def moved(found: Optimum | None, first: Optimum | None) -> str:
    """Return by how many factors of two an optimum has moved, with the half width of its 68% interval."""
    if not (found and first and found.value and first.value):
        return "unknown"
    text = f"{math.log2(found.value / first.value):+.2f}"
    if found.interval and first.interval:
        halves = [math.log2(high / low) / 2 for low, high in (found.interval, first.interval)]
        text += f" ± {math.hypot(*halves):.2f}"
    return text


def optimum(curve: Mapping[float, float]) -> Optimum | None:
    """Return the optimum of a width from the loss of each exponent; None if the best is at the end of the grid."""
    found = find_optimum((2.0**exponent, loss) for exponent, loss in curve.items())
    return found if found and found.value else None


def print_study(curves: Mapping[bool, Mapping[int, Mapping[float, float]]], rate: str) -> None:
    """Print losses, optima, and the cost of training a width at the best rate of the base."""
    of_base = next(iter(curves.values()))
    base, widest = min(of_base), max(of_base)
    exponents = list(of_base[base])
    best_of_base = min(exponents, key=lambda exponent: of_base[base][exponent])
    print(f"\nvalidation loss (nats per token) by optimizer.{rate}; base width {base}\n")
    print(f"{'':12}{'width':>6}" + "".join(f"{f'2^{exponent:g}':>8}" for exponent in exponents), end="")
    print(f"{'optimum':>10}{'moved':>14}{'cost':>8}")
    movements: dict[tuple[bool, int], str] = {}
    for scaled, curve_of in curves.items():
        first = optimum(curve_of[base])
        for width, curve in curve_of.items():
            found = optimum(curve)
            movements[scaled, width] = moved(found, first)
            print(f"{PARAMETRIZATIONS[scaled]:12}{width:>6}", end="")
            print("".join(f"{loss:>8.3f}" for loss in curve.values()), end="")
            print(
                f"{f'2^{math.log2(found.value):.2f}' if found else 'outside':>10}{movements[scaled, width]:>14}", end=""
            )
            print(f"{curve[best_of_base] - min(curve.values()):>8.3f}")
    print("\nmoved: factors of two from the optimum of the base, with the 68% interval of both")
    print(f"cost: loss at the best rate of the base, 2^{best_of_base:g}, above that at the best rate of the width")
    print(f"\nFrom width {base} to {widest} the best learning rate moved by this many factors of two:")
    for scaled in curves:
        print(f"  {PARAMETRIZATIONS[scaled]:12}{movements[scaled, widest]}")


def panels_of(count: int) -> tuple[Any, Any]:
    """Return a figure of page width with a panel per parametrization."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(7.2, 3.2), dpi=200, layout="constrained", sharey=True, squeeze=False)
    return figure, axes[0]


def title(scaled: bool, base: int) -> str:
    """Return the title of a panel."""
    return f"{PARAMETRIZATIONS[scaled]}, base width {base}" if scaled else PARAMETRIZATIONS[scaled]


def draw_study(curves: Mapping[bool, Mapping[int, Mapping[float, float]]], rate: str, path: Path) -> None:
    """Draw loss against learning rate: one line per width, with a star at its optimum."""
    import matplotlib

    figure, panels = panels_of(len(curves))
    base, *others = next(iter(curves.values()))
    colors = dict(
        zip((base, *others), matplotlib.colormaps["viridis"](np.linspace(0.9, 0, 1 + len(others))), strict=True)
    )
    for axes, (scaled, curve_of) in zip(panels, curves.items(), strict=True):
        for width, curve in curve_of.items():
            rates = 2.0 ** np.array(list(curve))
            axes.plot(rates, list(curve.values()), "o-", color=colors[width], markersize=3, linewidth=1.2, label=width)
            if found := optimum(curve):
                axes.plot(
                    found.value, found.score, "*", color=colors[width], markersize=11, markeredgecolor="black",
                    markeredgewidth=0.6, zorder=3,
                )  # fmt: skip
        if found := optimum(curve_of[base]):
            axes.axvline(found.value, color="grey", linestyle=":", linewidth=1, zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks([2.0**exponent for exponent in curve_of[base] if exponent == round(exponent)])
        axes.set_xlabel("peak learning rate" if rate == "lr" else f"optimizer.{rate}")
        axes.set_title(title(scaled, base), fontsize=10)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].plot([], [], "*", color="white", markersize=10, markeredgecolor="black", label="optimum")
    panels[0].plot([], [], ":", color="grey", label=f"optimum at {base}")
    figure.legend(*panels[0].get_legend_handles_labels(), title="width", loc="outside right center", frameon=False)
    figure.savefig(path)
    print(path)


def draw_coordinates(measured: Mapping[bool, Mapping[int, Mapping[str, float]]], label: str, path: Path) -> None:
    """Draw change against width: one line per activation."""
    figure, panels = panels_of(len(measured))
    for axes, (scaled, row_of) in zip(panels, measured.items(), strict=True):
        for name, marker in zip(ACTIVATIONS, "os^", strict=True):
            axes.plot(list(row_of), [row[name] for row in row_of.values()], f"{marker}-", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(row_of), [str(width) for width in row_of])
        axes.minorticks_off()
        axes.set_xlabel("width")
        axes.set_title(title(scaled, min(row_of)), fontsize=10)
    panels[0].set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path)
    print(path)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {
        "coordinates": (coordinates, "change of activations in a few steps", [32, 64, 128, 256, 512], 4, 3),
        "study": (study, "best learning rate of each width", [32, 64, 128, 256], 200, 1),
    }
    for name, (_, summary, widths, steps, seeds) in parts.items():
        command = commands.add_parser(name, help=summary)
        command.add_argument("--folder", type=Path, default=Path("outputs/transfer"), help="for figure and runs")
        command.add_argument("--widths", type=int, nargs="+", default=widths, help=f"multiples of {2 * HEAD_WIDTH}")
        command.add_argument("--steps", type=int, default=steps, help="training steps of a run")
        command.add_argument("--seeds", type=int, default=seeds, help="runs to average over")
    commands.choices["coordinates"].add_argument("--exponent", type=int, default=-7, help="learning rate 2^EXPONENT")
    of_study = commands.choices["study"]
    of_study.add_argument("--optimizer", choices=OPTIMIZERS.names(), default="adamw", help="default: adamw")
    of_study.add_argument("--rate", default="lr", help="the setting of the optimizer that is swept; default: lr")
    of_study.add_argument(
        "--exponents", type=float, nargs=2, default=[-9, -4], metavar=("FIRST", "LAST"), help="grid, in factors of two"
    )
    of_study.add_argument("--spacing", type=float, default=1.0, help="of the grid, in factors of two; default: 1")
    of_study.add_argument(
        "--parametrization", nargs="+", choices=PARAMETRIZATIONS.values(), default=list(PARAMETRIZATIONS.values())
    )
    of_study.add_argument("--override", action="append", default=[], help="KEY=VALUE of all runs; may be repeated")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger().setLevel(logging.ERROR)
    try:
        parts[arguments.command][0](arguments)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
