"""Compare training recipes by the tokens that they need for equal loss.

    python scripts/recipe.py study         tune each recipe, train it at three budgets with two seeds, and compare
    python scripts/recipe.py ablations     variants of the muon recipe, at the rates that the study found

Both print tables, and write them as Markdown into --folder; `study` also draws a figure (`pip install '.[plots]'`).
Every run is a complete one, `python -m cucafera.run` with its own end of the schedule. Finished runs in --folder are
kept: run the same command again to resume after an interruption, or to print the tables again.

The recipes, with the model, text, batch and validation of all being the same:

    original         AdamW without weight decay; warm-up over 1.8% of the run, then a cosine that would end at 1.817
                     times the run, as in conf/experiment/pretrain_original.yaml: the original was stopped at 49% of its
                     peak rate. Its rate is as far below the tuned one as the original's 3e-4 is below 4e-3, the lower
                     end of what was found best for 300M parameters at its batch of 524,288 tokens (4e-3 to 8e-3: Wen
                     et al., 2025, Fantastic Pretraining Optimizers and Where to Find Them, arXiv 2509.02046)
    original tuned   the same with a tuned rate
    adamw            AdamW with weight decay 0.1; warm-up over 2.7%, then a line to zero; tuned rate
    muon             optimizer=muon with its defaults; the same schedule; tuned rates of block matrices and embedding

Rates are tuned with seed 0 on a grid of factors of two, which is extended as long as the best is at its end (twice at
most): those of AdamW at the full budget N, those of muon at N / 2, first of the matrices, then of the embedding. The
best rate tried is used at every budget; seed 1 is independent of that choice. The seed sets weights and order. The
windows of validation are the same for all runs, and validation takes place only before and after training.

The result is the ratio of tokens: those at which a recipe reaches the loss that another has after N tokens, divided by
N, by interpolation of bits per byte in the logarithm of the tokens between complete runs. Where a loss is reached below
the smallest budget, the recipe is also trained at N / 8 and N / 16. Further beyond the budgets a ratio is extrapolated,
and marked as such, by a factor of two at most.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

from cucafera.config.command_line import composed_config
from cucafera.config.errors import EXIT_DIVERGED, EXIT_USER_ERROR, UserError
from cucafera.quantities import duration, number_of, rounded
from cucafera.runs.folder import RunFolder
from cucafera.storage import append, write_text

SEEDS = (0, 1)
"""Rates are tuned with the first."""
BUDGETS = (1 / 4, 1 / 2, 1)
"""Fractions of N."""
SMALLER_BUDGETS = (1 / 8, 1 / 16)
"""Trained only where a loss is reached below the smallest of BUDGETS."""
EXTENSIONS = 2
"""Rates that are added at most to a grid whose best is at an end."""
ORIGINAL_RATE = 3e-4 / 4e-3
"""The original's rate as a fraction of the tuned one; see the docstring of the module."""
EXTRAPOLATION = 2
"""Factor of tokens beyond the budgets at which a ratio is still given."""
VALIDATION_WINDOWS = 512
"""Spread evenly over the held-out text."""
MUON_BUDGET = 1 / 2
"""Fraction of N at which muon is tuned and its variants are compared."""
POLL_SECONDS = 0.1
"""Between two looks at the processes."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, its batch and its full budget, with the rates in the middle of each grid.

    Attributes:
        steps: Training steps of the full budget N; a multiple of 16.
        adamw_lr: Of both recipes with AdamW.
        matrix_lr, embedding_lr: Of muon.
    """

    width: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    window: int
    batch_tokens: int
    steps: int
    adamw_lr: float
    matrix_lr: float
    embedding_lr: float

    @property
    def tokens(self) -> int:
        """N: tokens of the full budget."""
        return self.steps * self.batch_tokens

    def budget(self, fraction: float) -> int:
        """Return the tokens of a fraction of N."""
        return round(self.steps * fraction) * self.batch_tokens

    def overrides(self) -> dict[str, str]:
        """Return the settings of the model."""
        return {
            "model.hidden_size": str(self.width),
            "model.num_hidden_layers": str(self.layers),
            "model.num_attention_heads": str(self.heads),
            "model.num_key_value_heads": str(self.key_value_heads),
            "model.intermediate_size": str(self.intermediate),
            "model.vocab_size": str(self.vocabulary),
            "model.max_position_embeddings": str(self.window),
        }


SMALL = Size(
    width=64, layers=3, heads=4, key_value_heads=2, intermediate=176, vocabulary=1024, window=128, batch_tokens=256,
    steps=1600, adamw_lr=8e-3, matrix_lr=1e-2, embedding_lr=4e-2,
)  # fmt: skip
"""410k tokens: three passes over the embedded corpus of 131k."""
FULL = Size(
    width=128, layers=3, heads=4, key_value_heads=2, intermediate=352, vocabulary=1024, window=256, batch_tokens=512,
    steps=2400, adamw_lr=4e-3, matrix_lr=1e-2, embedding_lr=3e-2,
)  # fmt: skip
"""1.23M tokens."""


class Shape(NamedTuple):
    """Optimizer and schedule of a recipe, without its rates.

    Attributes:
        overrides: Settings that do not depend on the length of the run.
        warmup: Fraction of the run.
        horizon: Step at which the schedule ends, as a multiple of those of the run; None: at its end.
    """

    overrides: Mapping[str, str]
    warmup: float
    horizon: float | None = None


SHAPES = {
    "original": Shape(
        {"optimizer": "adamw", "optimizer.weight_decay": "0", "schedule": "cosine", "schedule.final_lr_ratio": "0.1"},
        warmup=0.018,
        horizon=1.817,
    ),
    "adamw": Shape({"optimizer": "adamw", "optimizer.weight_decay": "0.1", "schedule": "linear"}, warmup=0.027),
    "muon": Shape({"optimizer": "muon", "schedule": "linear"}, warmup=0.027),
}
RECIPES = {"original": "original", "original tuned": "original", "adamw": "adamw", "muon": "muon"}
"""The shape of each recipe."""
BASELINES = ("original", "original tuned", "adamw")


class Variant(NamedTuple):
    """A change of the muon recipe.

    Attributes:
        overrides: Settings, in place of those of the recipe.
        batch: Factor of the tokens per step; the budget stays.
    """

    overrides: Mapping[str, str] = {}
    batch: float = 1


VARIANTS = {
    "": Variant(),
    "no row normalization": Variant({"optimizer.row_normalization": "false"}),
    "cautious decay": Variant({"optimizer.cautious": "true"}),
    "plain decay": Variant({"optimizer.cautious": "false"}),
    "no weight decay": Variant({"optimizer.matrix_weight_decay": "0"}),
    "momentum 0.9": Variant({"optimizer.momentum": "0.9"}),
    "momentum 0.98": Variant({"optimizer.momentum": "0.98"}),
    "decay over the last half": Variant({"schedule": "wsd", "schedule.decay_fraction": "0.5"}),
    "decay to 0.1": Variant({"schedule.final_lr_ratio": "0.1"}),
    "half the batch": Variant(batch=0.5),
    "twice the batch": Variant(batch=2),
    "no clipping": Variant({"optimizer.clip_norm": "null"}),
}
EMBEDDING_VARIANT = "embedding at the rate of AdamW"


class Rates(NamedTuple):
    """Peak learning rates: of AdamW, and of the matrices that Muon trains."""

    lr: float
    matrix_lr: float | None = None

    def __str__(self) -> str:
        return f"{self.lr:.4g}" if self.matrix_lr is None else f"{self.matrix_lr:.4g} / {self.lr:.4g}"


class Run(NamedTuple):
    """One run.

    Attributes:
        shape: A key of SHAPES.
        tokens: Its budget.
        seed: Seed of weights and order.
        rates: Its peak learning rates.
        variant: A key of VARIANTS.
    """

    shape: str
    tokens: int
    seed: int
    rates: Rates
    variant: str = ""

    @property
    def name(self) -> str:
        """Return the name of the run folder."""
        matrix = "" if self.rates.matrix_lr is None else f"-matrix{self.rates.matrix_lr:.4g}"
        variant = f"-{self.variant.replace(' ', '-')}" if self.variant else ""
        return f"{self.shape}{matrix}-lr{self.rates.lr:.4g}-{self.tokens}tokens-seed{self.seed}{variant}"

    def overrides(self, size: Size, text: str | None) -> list[str]:
        """Return the command line without folders: a run with the same one has been done."""
        shape, variant = SHAPES[self.shape], VARIANTS[self.variant]
        batch_tokens = round(size.batch_tokens * variant.batch)
        steps = self.tokens // batch_tokens
        settings = {
            "trainer": "cpu",
            "logger": "none",
            "data": "files" if text else "embedded",
            **({"data.sources.files.path": text} if text else {}),
            "data.validation_windows": str(VALIDATION_WINDOWS),
            **size.overrides(),
            "batch_tokens": str(batch_tokens),
            "budget_tokens": str(self.tokens),
            "seed": str(self.seed),
            **shape.overrides,
            "optimizer.lr": f"{self.rates.lr:.4g}",
            **({} if self.rates.matrix_lr is None else {"optimizer.matrix_lr": f"{self.rates.matrix_lr:.4g}"}),
            "schedule.warmup_steps": str(round(shape.warmup * steps)),
            **({} if shape.horizon is None else {"schedule.horizon_steps": str(round(shape.horizon * steps))}),
            "callbacks.log_every_steps": "50",
            "callbacks.validate_every_steps": "0",
            "callbacks.checkpoint_every_steps": "0",
            "callbacks.prompts": "[]",
            **variant.overrides,
        }
        return [f"{key}={value}" for key, value in settings.items()]


Losses = Mapping[Run, float]
"""Final validation loss of finished runs, in bits per byte; infinite if the run diverged or failed."""


# Tuning


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the rate of the lowest loss; of equal ones, the lowest rate."""
    return min(sorted(losses), key=lambda rate: losses[rate])


def grid(start: float, losses: Mapping[float, float]) -> list[float]:
    """Return the rates to try, in order, as far as the losses that are known tell.

    Args:
        start: The middle of the grid.
        losses: Of rates that were tried.
    """
    rates = [start / 2, start, start * 2]
    for _ in range(EXTENSIONS):
        if any(rate not in losses for rate in rates):
            break
        best = best_rate({rate: losses[rate] for rate in rates})
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
        else:
            break
    return rates


class Tuning(NamedTuple):
    """The search for the rates of a shape.

    Attributes:
        runs: Those known to be needed, finished or not.
        rates: The best; None as long as some are not finished.
        is_at_end: True if the best of some grid is at its end.
    """

    runs: list[Run]
    rates: Rates | None
    is_at_end: bool = False


def tune_one(start: float, run_at: Callable[[float], Run], losses: Losses) -> Tuning:
    """Search for one rate.

    Args:
        start: The middle of the grid.
        run_at: Returns the run at a rate.
        losses: Of finished runs.

    Raises:
        UserError: All runs failed.
    """
    powers = range(-1 - EXTENSIONS, 2 + EXTENSIONS)
    tried = {rate: losses[run_at(rate)] for rate in (start * 2.0**power for power in powers) if run_at(rate) in losses}
    rates = grid(start, tried)
    runs = [run_at(rate) for rate in rates]
    if any(run not in losses for run in runs):
        return Tuning(runs, None)
    best = best_rate({rate: tried[rate] for rate in rates})
    if not math.isfinite(tried[best]):
        raise UserError(f"No run of {runs[0].shape} finished at the rates {', '.join(f'{rate:g}' for rate in rates)}")
    return Tuning(runs, run_at(best).rates, best in (rates[0], rates[-1]))


def tune(size: Size, shape: str, losses: Losses) -> Tuning:
    """Search for the rates of a shape: the one of AdamW; of muon that of the matrices, then that of the embedding."""
    if shape != "muon":
        return tune_one(size.adamw_lr, lambda rate: Run(shape, size.tokens, SEEDS[0], Rates(rate)), losses)
    tokens = size.budget(MUON_BUDGET)
    first = tune_one(size.matrix_lr, lambda rate: Run(shape, tokens, SEEDS[0], Rates(size.embedding_lr, rate)), losses)
    if first.rates is None:
        return first
    matrix_lr = first.rates.matrix_lr
    second = tune_one(size.embedding_lr, lambda rate: Run(shape, tokens, SEEDS[0], Rates(rate, matrix_lr)), losses)
    runs = [*first.runs, *(run for run in second.runs if run not in first.runs)]
    return Tuning(runs, second.rates, first.is_at_end or second.is_at_end)


def rates_of(size: Size, recipe: str, losses: Losses) -> Rates | None:
    """Return the rates of a recipe; None as long as it is not tuned."""
    rates = tune(size, RECIPES[recipe], losses).rates
    return Rates(rates.lr * ORIGINAL_RATE) if rates and recipe == "original" else rates


# The study


def runs_at(size: Size, recipe: str, fraction: float, losses: Losses) -> list[Run]:
    """Return the runs of a recipe at a fraction of N, one per seed; none as long as it is not tuned."""
    rates = rates_of(size, recipe, losses)
    return [Run(RECIPES[recipe], size.budget(fraction), seed, rates) for seed in SEEDS] if rates else []


Curve = dict[int, dict[int, float]]
"""Losses by tokens and seed."""


def curve_of(size: Size, recipe: str, losses: Losses) -> Curve:
    """Return the losses of a recipe at the budgets of which all seeds are finished, from the smallest."""
    curve: Curve = {}
    for fraction in sorted((*SMALLER_BUDGETS, *BUDGETS)):
        runs = runs_at(size, recipe, fraction, losses)
        if runs and all(run in losses for run in runs):
            curve[size.budget(fraction)] = {run.seed: losses[run] for run in runs}
    return curve


def curves_of(size: Size, losses: Losses) -> dict[str, Curve]:
    """Return the curve of each recipe."""
    return {recipe: curve_of(size, recipe, losses) for recipe in RECIPES}


def plan_study(size: Size, losses: Losses) -> list[Run]:
    """Return the runs of the study that are known to be needed, finished or not, in their order."""
    runs = [run for shape in SHAPES for run in tune(size, shape, losses).runs]
    for recipe in RECIPES:
        runs += [run for fraction in BUDGETS for run in runs_at(size, recipe, fraction, losses)]
    curves = curves_of(size, losses)
    for recipe in ("original tuned", "adamw", "muon"):
        others = [curves[other] for other in RECIPES if other != recipe]
        for fraction, next_larger in zip(SMALLER_BUDGETS, (min(BUDGETS), *SMALLER_BUDGETS), strict=False):
            if not reaches_below(curves[recipe], size.budget(next_larger), others, size.tokens):
                break
            runs += runs_at(size, recipe, fraction, losses)
    return list(dict.fromkeys(runs))


def reaches_below(curve: Curve, tokens: int, others: Sequence[Curve], full: int) -> bool:
    """True if a recipe is better at some tokens, with some seed, than another at the full budget."""
    return tokens in curve and any(
        math.isfinite(other[full][seed]) and loss < other[full][seed]
        for other in others
        if full in other
        for seed, loss in curve[tokens].items()
    )


def expected_runs(size: Size, plan: Callable[[Losses], list[Run]], losses: Losses) -> list[Run]:
    """Return the runs that a plan will need if the rates in the middle of the grids are the best."""
    known = dict(losses)
    while missing := [run for run in plan(known) if run not in known]:
        known |= {run: _guess(size, run) for run in missing}
    return plan(known)


def _guess(size: Size, run: Run) -> float:
    """Return a loss above all that are measured: lowest in the middle of the grids, and falling with the tokens."""
    middle = Rates(size.embedding_lr, size.matrix_lr) if run.shape == "muon" else Rates(size.adamw_lr)
    distance = sum(abs(math.log2(rate / at)) for rate, at in zip(run.rates, middle, strict=True) if rate and at)
    return 1e3 * (1 + 0.01 * distance) / math.log(run.tokens)


# Comparison


class Reach(NamedTuple):
    """The tokens at which a curve reaches a loss.

    Attributes:
        tokens: The tokens.
        is_extrapolated: True if they are beyond those of the curve.
        bound: above or below if they are further beyond them than EXTRAPOLATION; then `tokens` is that limit.
    """

    tokens: float
    is_extrapolated: bool = False
    bound: str = ""


def reach(curve: Mapping[int, float], target: float) -> Reach | None:
    """Return where a curve first reaches a loss: a line in the logarithm of the tokens between neighbouring points.

    Beyond its ends, the curve is continued by the line through its two first or last points.

    Args:
        curve: Losses by tokens; those that are not finite are left out.
        target: The loss.

    Returns:
        None if the target is not finite, fewer than two points are, or the line that would have to be continued does
        not fall.
    """
    points = [(math.log(tokens), loss) for tokens, loss in sorted(curve.items()) if math.isfinite(loss)]
    if not math.isfinite(target) or len(points) < 2:
        return None
    is_below = points[0][1] < target
    if points[0][1] == target:
        return Reach(math.exp(points[0][0]))
    for left, right in [] if is_below else itertools.pairwise(points):
        if left[1] > target >= right[1]:
            return Reach(math.exp(_on_line(left, right, target)))
    left, right = points[:2] if is_below else points[-2:]
    if left[1] <= right[1]:
        return None
    found = _on_line(left, right, target)
    limit = points[0][0] - math.log(EXTRAPOLATION) if is_below else points[-1][0] + math.log(EXTRAPOLATION)
    if is_below and found < limit:
        return Reach(math.exp(limit), True, "below")
    if not is_below and found > limit:
        return Reach(math.exp(limit), True, "above")
    return Reach(math.exp(found), True)


def _on_line(left: tuple[float, float], right: tuple[float, float], target: float) -> float:
    """Return the logarithm of the tokens at which the line through two points of (log tokens, loss) has a loss."""
    return left[0] + (right[0] - left[0]) * (left[1] - target) / (left[1] - right[1])


class Ratio(NamedTuple):
    """Tokens that a recipe needs for the loss of another at the full budget N, as a fraction of N.

    Attributes:
        mean: Of the losses averaged over seeds; None if the loss is not reached.
        by_seed: Of the runs of each seed.
    """

    mean: Reach | None
    by_seed: dict[int, Reach | None]

    def spread(self) -> str:
        """Return the smallest and largest speed-up over seeds as text; empty if one is unknown."""
        known = [each for each in self.by_seed.values() if each and not each.bound]
        if len(known) < len(self.by_seed):
            return ""
        speedups = [1 / each.tokens for each in known]
        return f"{min(speedups):.2f} to {max(speedups):.2f}"


def compare(curve: Curve, baseline: Curve, full: int) -> Ratio | None:
    """Return the ratio of tokens of a recipe to a baseline; None as long as either has not been trained far enough.

    Args:
        curve: Of the recipe.
        baseline: Of the other.
        full: N, at which the baseline's loss is the target.
    """
    if full not in baseline or len(curve) < 2:
        return None

    def ratio(losses: Mapping[int, float], target: float) -> Reach | None:
        found = reach(losses, target)
        return found and found._replace(tokens=found.tokens / full)

    return Ratio(
        ratio(mean_of(curve), mean_of(baseline)[full]),
        {
            seed: ratio({tokens: losses[seed] for tokens, losses in curve.items()}, target)
            for seed, target in baseline[full].items()
        },
    )


def mean_of(curve: Curve) -> dict[int, float]:
    """Return the losses of a curve averaged over seeds; infinite where a run failed."""
    return {tokens: statistics.fmean(losses.values()) for tokens, losses in curve.items()}


# Tables


def markdown_table(rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Return a Markdown table whose columns are aligned as text, too.

    Args:
        rows: Its cells; the first row is the head.
        numbers: Columns at the right that are aligned to the right.
    """
    columns = len(rows[0])
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(columns)]
    is_right = [column >= columns - numbers for column in range(columns)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, is_right, strict=True)
        )
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, is_right, strict=True)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def loss_text(loss: float) -> str:
    """Return a loss for a table."""
    return f"{loss:.4f}" if math.isfinite(loss) else "failed"


def ratio_text(ratio: Reach | None, is_inverse: bool = False) -> str:
    """Return a ratio of tokens, or its inverse, the speed-up, for a table."""
    if ratio is None:
        return "unknown"
    number = f"{1 / ratio.tokens if is_inverse else ratio.tokens:.2f}"
    if ratio.bound:
        return f"{'>' if (ratio.bound == 'above') != is_inverse else '<'} {number}"
    return f"{number} (extrapolated)" if ratio.is_extrapolated else number


def tuning_table(size: Size, losses: Losses) -> str:
    """Return the table of all runs of the tuning."""
    rows = [["shape", "matrix rate", "rate", "tokens", "bits per byte", ""]]
    for shape in SHAPES:
        tuning = tune(size, shape, losses)
        for run in sorted(tuning.runs, key=lambda run: (run.rates.matrix_lr or 0, run.rates.lr)):
            matrix = "" if run.rates.matrix_lr is None else f"{run.rates.matrix_lr:.4g}"
            note = ("best, at the end of a grid" if tuning.is_at_end else "best") if run.rates == tuning.rates else ""
            loss = loss_text(losses[run]) if run in losses else ""
            rows.append([shape, matrix, f"{run.rates.lr:.4g}", rounded(run.tokens), loss, note])
    return markdown_table(rows)


def loss_table(size: Size, losses: Losses) -> str:
    """Return the table of losses of each recipe at each budget: the mean, and each seed."""
    curves = curves_of(size, losses)
    budgets = sorted({tokens for curve in curves.values() for tokens in curve})
    rows = [["recipe", "rate", *(f"{rounded(tokens)} tokens" for tokens in budgets)]]
    for recipe, curve in curves.items():
        cells = []
        for tokens in budgets:
            each = curve.get(tokens, {})
            seeds = ", ".join(loss_text(loss) for loss in each.values())
            cells.append(f"{loss_text(mean_of(curve)[tokens])} ({seeds})" if each else "")
        rows.append([recipe, str(rates_of(size, recipe, losses) or ""), *cells])
    return markdown_table(rows, len(budgets))


def ratio_table(size: Size, losses: Losses) -> str:
    """Return the table of the tokens that muon needs for the final loss of each baseline."""
    curves = curves_of(size, losses)
    seeds = [f"seed {seed}" for seed in SEEDS]
    rows = [["baseline", "loss at N", "tokens of muon / N", *seeds, "speed-up", "by seed"]]
    for baseline in BASELINES:
        ratio = compare(curves["muon"], curves[baseline], size.tokens)
        cells = [""] * (len(rows[0]) - 1)
        if ratio:
            cells = [
                loss_text(mean_of(curves[baseline])[size.tokens]),
                *map(ratio_text, (ratio.mean, *ratio.by_seed.values())),
                ratio_text(ratio.mean, is_inverse=True),
                ratio.spread(),
            ]
        rows.append([baseline, *cells])
    return markdown_table(rows, len(rows[0]) - 1)


def square_table(size: Size, losses: Losses) -> str:
    """Return the table of the tokens that each recipe needs for the final loss of each other one, divided by N."""
    curves = curves_of(size, losses)
    rows = [["", *(f"for {recipe}" for recipe in RECIPES)]]
    for recipe in RECIPES:
        ratios = [compare(curves[recipe], curves[other], size.tokens) for other in RECIPES]
        cells = [ratio_text(ratio.mean) if ratio else "" for ratio in ratios]
        rows.append([recipe, *("1" if other == recipe else cell for other, cell in zip(RECIPES, cells, strict=True))])
    return markdown_table(rows, len(RECIPES))


def ablation_table(rates: Rates, embedding_rates: Rates, tokens: int, losses: Losses, names: Sequence[str]) -> str:
    """Return the table of losses of the variants, and of their differences to the recipe in pairs by seed."""
    rows = [["variant", "bits per byte", "difference", *(f"seed {seed}" for seed in SEEDS)]]
    plain = {seed: losses.get(Run("muon", tokens, seed, rates), math.nan) for seed in SEEDS}
    for name in names:
        runs = variant_runs(name, rates, embedding_rates, tokens)
        if any(run not in losses for run in runs):
            rows.append([name or "muon", *[""] * (len(rows[0]) - 1)])
            continue
        mean = loss_text(statistics.fmean(losses[run] for run in runs))
        differences = [losses[run] - plain[run.seed] for run in runs]
        cells = [
            f"{each:+.4f}" if math.isfinite(each) else "" for each in (statistics.fmean(differences), *differences)
        ]
        rows.append([name or "muon", mean, *(cells if name else [""] * len(cells))])
    return markdown_table(rows, len(rows[0]) - 1)


# Ablations


def variant_names() -> list[str]:
    """Return the variants to compare; of the two kinds of decay, the one that is not the default."""
    is_cautious = vars(composed_config(["optimizer=muon"]).optimizer)["cautious"]
    default = "cautious decay" if is_cautious else "plain decay"
    return [*(name for name in VARIANTS if name != default), EMBEDDING_VARIANT]


def variant_runs(name: str, rates: Rates, embedding_rates: Rates, tokens: int) -> list[Run]:
    """Return the runs of a variant, one per seed."""
    if name == EMBEDDING_VARIANT:
        return [Run("muon", tokens, seed, embedding_rates) for seed in SEEDS]
    return [Run("muon", tokens, seed, rates, name) for seed in SEEDS]


# Execution


class Outcome(NamedTuple):
    """Record of a finished run.

    Attributes:
        name: Of the run.
        overrides: Its command line, without folders.
        bpb: Final validation loss in bits per byte; None if it diverged.
        tokens: Trained on.
        steps: Taken.
        seconds: Of training.
        tokens_per_second: While training.
    """

    name: str
    overrides: list[str]
    bpb: float | None
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None


class Process(NamedTuple):
    """A run that is being trained."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]


class Runner:
    """Trains runs as processes, records their results, and knows those of earlier starts.

    Args:
        folder: Of the study.
        size: Model and budget.
        text: Path of the text; None: the embedded corpus.
        jobs: Runs at a time.
    """

    def __init__(self, folder: Path, size: Size, text: str | None, jobs: int) -> None:
        self.folder, self.size, self.text, self.jobs = folder, size, text, jobs
        self.results = folder / "results.jsonl"
        self.threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self.outcomes = self._read()

    def _read(self) -> dict[str, Outcome]:
        """Return the recorded outcomes by name; a line that an interruption cut is left out."""
        outcomes = {}
        for line in self.results.read_text().splitlines() if self.results.exists() else []:
            with contextlib.suppress(ValueError, TypeError):
                outcome = Outcome(**json.loads(line))
                outcomes[outcome.name] = outcome
        return outcomes

    def overrides(self, run: Run) -> list[str]:
        """Return the command line of a run without folders."""
        return run.overrides(self.size, self.text)

    def losses(self, plan: Callable[[Losses], list[Run]]) -> dict[Run, float]:
        """Return the losses of the runs of a plan that have been done."""
        known: dict[Run, float] = {}
        while found := {
            run: outcome.bpb if outcome.bpb is not None else math.inf
            for run in plan(known)
            if run not in known
            and (outcome := self.outcomes.get(run.name))
            and outcome.overrides == self.overrides(run)
        }:
            known |= found
        return known

    def prepare(self, runs: Sequence[Run]) -> str:
        """Check the settings of runs, train the tokenizer and write the shards, so that no two runs do it at once.

        Returns:
            A sentence about the data.

        Raises:
            UserError: The text or the settings cannot be used.
        """
        from cucafera.data.packed import open_documents

        config, *_ = [composed_config(self.overrides(run)) for run in runs]
        config.data.prepared_dir = str(self.folder / "prepared")
        data = open_documents(config)
        passes = self.size.tokens / sum(len(windows) * config.sequence_length for windows in data.training)
        tokens = len(data.validation_positions()) * config.sequence_length
        repeats = "" if passes <= 1 else f": the text is seen {passes:.1f} times"
        return (
            f"N = {number_of(self.size.tokens, 'token')} in {number_of(self.size.steps, 'step')}, "
            f"{passes:.2f} of the text{repeats}; validation on {number_of(tokens, 'token')}"
        )

    def start(self, run: Run) -> Process:
        """Start a run."""
        path = self.folder / "runs" / run.name
        path.parent.mkdir(parents=True, exist_ok=True)
        output = path.with_name(f"{run.name}.out").open("w+b")
        folders = [f"run_dir={path}", f"data.prepared_dir={self.folder / 'prepared'}", "resume=overwrite"]
        process = subprocess.Popen(
            [sys.executable, "-m", "cucafera.run", *self.overrides(run), *folders],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
        )
        return Process(process, output)

    def finish(self, run: Run, started: Process) -> Outcome:
        """Return the outcome of a run whose process has ended, and record it, unless it failed by accident.

        Raises:
            UserError: The run was refused.
        """
        name, overrides = run.name, self.overrides(run)
        started.output.seek(0)
        said = started.output.read().decode(errors="replace").strip()
        started.output.close()
        code = started.process.returncode
        if code == EXIT_USER_ERROR:
            raise UserError(f"{name} could not be trained: {said[-2000:]}")
        outcome = Outcome(name, overrides, None)
        if code not in (0, EXIT_DIVERGED):
            print(f"{name} failed with exit code {code}; the same command tries it again. {said[-500:]}", flush=True)
            return outcome
        folder = RunFolder(self.folder / "runs" / name)
        folder.checkpoints.remove_all()  # they are not needed
        folder.path.with_name(f"{name}.out").unlink()
        if code == 0 and (metrics := folder.read_metrics()):
            outcome = Outcome(
                name,
                overrides,
                metrics["validation"][-1]["bpb"],
                metrics["tokens"],
                metrics["steps"],
                metrics["training_seconds"],
                metrics["tokens_per_second"],
            )
        self.outcomes[name] = outcome
        append(self.results, (json.dumps(outcome._asdict()) + "\n").encode())
        return outcome

    def execute(self, plan: Callable[[Losses], list[Run]], summary: Callable[[Losses], str]) -> dict[Run, float]:
        """Train the runs of a plan, and print a line for each.

        Args:
            plan: Returns the runs that are known to be needed, from the losses of finished ones.
            summary: Returns the result so far.

        Returns:
            The losses of all runs of the plan.
        """
        losses = self.losses(plan)
        if losses:
            print(f"{number_of(len(losses), 'run')} of earlier starts", flush=True)
        begun, trained = time.monotonic(), 0
        running: dict[Run, Process] = {}
        try:
            while True:
                waiting = [run for run in plan(losses) if run not in losses and run not in running]
                for run in waiting[: self.jobs - len(running)]:
                    running[run] = self.start(run)
                if not running:
                    return losses
                run = _first_ended(running)
                outcome = self.finish(run, running.pop(run))
                losses[run] = math.inf if outcome.bpb is None else outcome.bpb
                trained += run.tokens
                expected = expected_runs(self.size, plan, losses)
                left = sum(each.tokens for each in expected if each not in losses)
                seconds = (time.monotonic() - begun) / trained * left
                speed = f"{rounded(outcome.tokens_per_second)} tokens/s" if outcome.tokens_per_second else ""
                recipe = f"{run.shape}, {run.variant}" if run.variant else run.shape
                print(
                    f"{len(losses):>3}/{len(expected)}  about {duration(seconds)} left  {recipe}  rate {run.rates}  "
                    f"{rounded(run.tokens)} tokens  seed {run.seed}  {loss_text(losses[run])} bpb  {speed}  "
                    f"[{summary(losses)}]",
                    flush=True,
                )
        finally:
            _stop(running)


def _first_ended(running: Mapping[Run, Process]) -> Run:
    """Wait for a process to end, and return its run."""
    while True:
        for run, started in running.items():
            if started.process.poll() is not None:
                return run
        time.sleep(POLL_SECONDS)


def _stop(running: Mapping[Run, Process]) -> None:
    """Stop processes that are still running."""
    for started in running.values():
        started.process.terminate()
    for started in running.values():
        try:
            started.process.wait(60)
        except subprocess.TimeoutExpired:
            started.process.kill()
        started.output.close()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that no process is left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def study_summary(size: Size, losses: Losses) -> str:
    """Return the result so far: ratios of tokens, or else the best of each tuning."""
    curves = curves_of(size, losses)
    ratios = {baseline: compare(curves["muon"], curves[baseline], size.tokens) for baseline in BASELINES}
    if known := [f"{ratio_text(ratio.mean)} of {baseline}" for baseline, ratio in ratios.items() if ratio]:
        return f"muon needs {', '.join(known)}"
    tried = {shape: [run for run in tune(size, shape, losses).runs if run in losses] for shape in SHAPES}
    best = {shape: min(runs, key=lambda run: losses[run]) for shape, runs in tried.items() if runs}
    return "best " + ", ".join(f"{shape} {run.rates}: {loss_text(losses[run])}" for shape, run in best.items())


def study(arguments: argparse.Namespace) -> None:
    """Train what is missing of the study, and print and draw its results."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("The figure needs matplotlib: pip install '.[plots]'")
    size: Size = FULL if arguments.full else SMALL
    runner = Runner(arguments.folder, size, arguments.text, arguments.jobs)
    about = runner.prepare([tune(size, shape, {}).runs[0] for shape in SHAPES])
    print(about, flush=True)
    losses = runner.execute(lambda losses: plan_study(size, losses), lambda losses: study_summary(size, losses))
    report = study_report(size, losses, about)
    write_text(arguments.folder / "study.md", report)
    print(f"\n{report}")
    draw_study(size, losses, arguments.folder / "study.png")


def study_report(size: Size, losses: Losses, about: str) -> str:
    """Return the tables of the study as Markdown."""
    muon_tokens = rounded(size.budget(MUON_BUDGET))
    return "\n\n".join([
        f"Width {size.width}, {number_of(size.layers, 'layer')}, {number_of(size.batch_tokens, 'token')} per step. "
        f"{about}.",
        "Tokens that muon needs for the loss of a baseline after N tokens:",
        ratio_table(size, losses),
        "Bits per byte (in brackets: each seed); rates of muon: matrices / embedding:",
        loss_table(size, losses),
        "Tokens / N that the recipe of a row needs for the loss of the recipe of a column after N tokens:",
        square_table(size, losses),
        f"Tuning with seed 0, muon with a budget of {muon_tokens}:",
        tuning_table(size, losses),
    ]) + "\n"  # fmt: skip


def ablations(arguments: argparse.Namespace) -> None:
    """Train what is missing of the variants of muon, and print their differences."""
    size: Size = FULL if arguments.full else SMALL
    runner = Runner(arguments.folder, size, arguments.text, arguments.jobs)
    known = runner.losses(lambda losses: plan_study(size, losses))
    rates, adamw = (rates_of(size, recipe, known) for recipe in ("muon", "adamw"))
    if rates is None or adamw is None:
        raise UserError(f"{arguments.folder} holds no tuned rates: run the study first, with the same --text and size")
    embedding_rates = Rates(adamw.lr, rates.matrix_lr)
    names, tokens = variant_names(), size.budget(MUON_BUDGET)
    runs = [run for name in names for run in variant_runs(name, rates, embedding_rates, tokens)]
    about = runner.prepare(runs[::2])

    def table(losses: Losses) -> str:
        return ablation_table(rates, embedding_rates, tokens, losses, names)

    def summary(losses: Losses) -> str:
        last = list(losses)[-1]
        plain = losses.get(Run("muon", tokens, last.seed, rates), math.nan)
        return f"{losses[last] - plain:+.4f}"

    losses = runner.execute(lambda losses: runs, summary)
    report = f"Width {size.width}, {number_of(tokens, 'token')}, muon with rates {rates}. {about}.\n\n{table(losses)}\n"
    write_text(arguments.folder / "ablations.md", report)
    print(f"\n{report}")


def draw_study(size: Size, losses: Losses, path: Path) -> None:
    """Draw bits per byte against tokens, with a guide from each baseline's final loss to where muon reaches it.

    The ratios are in the legend: those of baselines with about the same loss would cover each other at the guides.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=200, layout="constrained")
    curves = curves_of(size, losses)
    colors = dict(zip(RECIPES, ("tab:red", "tab:orange", "tab:blue", "tab:green"), strict=True))
    for recipe, curve in curves.items():
        means, color = mean_of(curve), colors[recipe]
        ratio = compare(curves["muon"], curve, size.tokens) if recipe in BASELINES else None
        label = f"{recipe}: muon reaches it at {ratio_text(ratio.mean)} N" if ratio else recipe
        axes.plot(list(means), list(means.values()), color=color, linewidth=1.3, label=label)
        for seed in SEEDS:
            axes.plot(list(curve), [each[seed] for each in curve.values()], "o", color=color, markersize=3)
        if ratio and ratio.mean:
            ends = [ratio.mean.tokens * size.tokens, size.tokens]
            axes.plot(ends, [means[size.tokens]] * 2, ":|", color=color, linewidth=1, markersize=8, zorder=0)
    axes.set_xscale("log")
    budgets = sorted({tokens for curve in curves.values() for tokens in curve})
    axes.set_xticks(budgets, [rounded(tokens) for tokens in budgets])
    axes.minorticks_off()
    axes.set_xlabel(f"tokens of a complete run; N = {rounded(size.tokens)}")
    axes.set_ylabel("validation loss (bits per byte)")
    axes.legend(frameon=False)
    figure.savefig(path)
    print(path)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parts: dict[str, tuple[Any, str]] = {
        "study": (study, "tune each recipe, train it at three budgets with two seeds, and compare"),
        "ablations": (ablations, "variants of the muon recipe, at the rates that the study found"),
    }
    for name, (_, summary) in parts.items():
        command = commands.add_parser(name, help=summary)
        command.add_argument("--full", action="store_true", help="a larger model and budget: hours, not minutes")
        command.add_argument("--text", help="as data.sources.files.path takes it; otherwise the embedded corpus")
        command.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
        command.add_argument("--folder", type=Path, default=Path("outputs/recipe"), help="for tables, figure and runs")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with _terminated_as_interrupted():
            parts[arguments.command][0](arguments)
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("Interrupted; the same command continues.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
