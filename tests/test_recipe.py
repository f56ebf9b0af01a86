"""scripts/recipe.py: tuning, the runs of a study, ratios of tokens, and the processes that train."""

import dataclasses
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest

from cucafera.config.command_line import composed_config
from cucafera.config.errors import EXIT_DIVERGED, UserError
from cucafera.training.schedules import lr_ratio
from tests.support import ROOT, load_script, run_command, write_metrics

recipe = load_script("recipe")


@pytest.fixture(autouse=True)
def same_log_level():
    """The script logs errors only; the tests that follow in this process need warnings."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


SIZE = recipe.FULL
EFFICIENCY = {"original": 1.0, "adamw": 1.25, "muon": 2.0}


def simulated(efficiency=EFFICIENCY, best=None, slope=0.2, failing=()):
    """Return a function from a run to its loss: a line in the logarithm of tokens times efficiency.

    Args:
        efficiency: Of each shape.
        best: Best rates of each shape; without, the middle of the grids. Each factor of two costs 0.01.
        slope: Of the line.
        failing: Runs that diverge.
    """
    best = {
        "original": recipe.Rates(SIZE.adamw_lr),
        "adamw": recipe.Rates(SIZE.adamw_lr),
        "muon": recipe.Rates(SIZE.embedding_lr, SIZE.matrix_lr),
    } | (best or {})

    def loss(run):
        if run in failing:
            return math.inf
        distances = [math.log2(rate / at) for rate, at in zip(run.rates, best[run.shape], strict=True) if rate]
        effective = run.tokens * efficiency[run.shape]
        return 4 - slope * math.log(effective) + 0.01 * sum(map(abs, distances)) + 0.03 * run.seed

    return loss


def finished(loss, plan=None):
    """Return the losses of all runs of a study."""
    plan = plan or (lambda losses: recipe.plan_study(SIZE, losses))
    losses = {}
    while missing := [run for run in plan(losses) if run not in losses]:
        losses |= {run: loss(run) for run in missing}
    return losses


def ratios(losses, challenger="muon"):
    """Return the ratio of tokens to each baseline."""
    curves = recipe.curves_of(SIZE, losses)
    return {baseline: recipe.compare(curves[challenger], curves[baseline], SIZE.tokens) for baseline in recipe.RECIPES}


# Tuning


def test_of_equal_losses_the_lowest_rate_is_the_best_and_failed_runs_are_never():
    assert recipe.best_rate({4.0: 2.0, 1.0: 2.0, 2.0: 3.0}) == 1
    assert recipe.best_rate({4.0: 2.0, 1.0: math.inf, 2.0: math.inf}) == 4


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (0.1, [0.05, 0.1, 0.2]),
        (0.2, [0.05, 0.1, 0.2, 0.4]),
        (0.4, [0.05, 0.1, 0.2, 0.4, 0.8]),
        (3.2, [0.05, 0.1, 0.2, 0.4, 0.8]),
        (0.0125, [0.0125, 0.025, 0.05, 0.1, 0.2]),
    ],
)
def test_a_grid_is_extended_until_its_best_is_inside_or_twice(best, expected):
    losses = {}
    while missing := [rate for rate in recipe.grid(0.1, losses) if rate not in losses]:
        losses |= {rate: abs(math.log(rate / best)) for rate in missing}
    assert recipe.grid(0.1, losses) == expected


def test_a_grid_waits_for_all_its_losses():
    assert recipe.grid(0.1, {0.05: 1.0, 0.1: 2.0}) == [0.05, 0.1, 0.2]
    assert recipe.grid(0.1, {0.05: 1.0, 0.1: 2.0, 0.2: 3.0}) == [0.025, 0.05, 0.1, 0.2]


def test_adamw_is_tuned_at_the_full_budget_and_muon_by_coordinates_at_half_of_it():
    best = {"adamw": recipe.Rates(4 * SIZE.adamw_lr), "muon": recipe.Rates(SIZE.embedding_lr / 2, SIZE.matrix_lr * 2)}
    losses = finished(simulated(best=best))
    adamw, muon = (recipe.tune(SIZE, shape, losses) for shape in ("adamw", "muon"))
    assert (adamw.rates, muon.rates) == (best["adamw"], best["muon"])
    assert not adamw.is_at_end and not muon.is_at_end
    assert {(run.tokens, run.seed) for run in adamw.runs} == {(SIZE.tokens, 0)}
    assert {(run.tokens, run.seed) for run in muon.runs} == {(SIZE.tokens // 2, 0)}
    matrices = [run.rates.matrix_lr / SIZE.matrix_lr for run in muon.runs if run.rates.lr == SIZE.embedding_lr]
    embeddings = [run.rates.lr / SIZE.embedding_lr for run in muon.runs if run.rates.matrix_lr == 2 * SIZE.matrix_lr]
    assert (matrices, sorted(embeddings)) == ([0.5, 1, 2, 4], [0.25, 0.5, 1, 2])
    assert len(muon.runs) == len(set(muon.runs)) == 7


def test_a_best_rate_at_the_end_of_an_extended_grid_is_marked():
    losses = finished(simulated(best={"adamw": recipe.Rates(64 * SIZE.adamw_lr)}))
    assert recipe.tune(SIZE, "adamw", losses).is_at_end
    assert "| best, at the end of a grid |" in recipe.tuning_table(SIZE, losses)


def test_a_recipe_of_which_no_rate_trains_ends_the_study():
    runs = recipe.tune(SIZE, "adamw", {}).runs
    wider = [run._replace(rates=recipe.Rates(run.rates.lr / 4)) for run in runs]
    with pytest.raises(UserError, match=r"No run of adamw finished at the rates 0\.0005, 0\.001, .*, 0\.008"):
        finished(simulated(failing=[*runs, *wider]))


# The runs of a study


def test_a_study_trains_every_recipe_at_every_budget_with_both_seeds_once():
    runs = recipe.plan_study(SIZE, finished(simulated()))
    assert len(runs) == len(set(runs)) == len({run.name for run in runs})
    tuned = recipe.Rates(SIZE.adamw_lr)
    for shape, rates in [
        ("original", recipe.Rates(SIZE.adamw_lr * 0.075)),
        ("original", tuned),
        ("adamw", tuned),
        ("muon", recipe.Rates(SIZE.embedding_lr, SIZE.matrix_lr)),
    ]:
        found = {(run.tokens, run.seed) for run in runs if (run.shape, run.rates) == (shape, rates)}
        assert {(SIZE.tokens // 4 * part, seed) for part in (1, 2, 4) for seed in (0, 1)} <= found
    assert len(runs) == 6 * 4 + 2 * 2 + 4  # budgets; the other rates of AdamW; those of muon


def test_a_loss_that_is_reached_below_the_smallest_budget_is_interpolated_from_smaller_ones():
    losses = finished(simulated({"original": 1.0, "adamw": 1.25, "muon": 10.0}))
    assert min(recipe.curve_of(SIZE, "muon", losses)) == SIZE.tokens // 16
    assert min(recipe.curve_of(SIZE, "adamw", losses)) <= SIZE.tokens // 4
    ratio = ratios(losses)["original tuned"]
    assert ratio.mean.tokens == pytest.approx(0.1) and not ratio.mean.is_extrapolated


def test_the_runs_to_come_are_estimated_before_and_during_the_tuning():
    def plan(losses):
        return recipe.plan_study(SIZE, losses)

    losses = finished(simulated())
    assert set(recipe.expected_runs(SIZE, plan, {})) == set(losses)
    half = dict(list(losses.items())[:20])
    assert len(losses) <= len(recipe.expected_runs(SIZE, plan, half)) <= len(losses) + 2


# Settings of runs


def run_of(shape, seed=0, variant="", tokens=SIZE.tokens):
    return recipe.Run(shape, tokens, seed, recipe.Rates(1e-3, 1e-2 if shape == "muon" else None), variant)


def flat_settings(run):
    """Return the settings of a run as the product reads them."""
    return dataclasses.asdict(composed_config(run.overrides(SIZE, None)))


def test_recipes_differ_in_optimizer_and_schedule_only():
    settings = {shape: flat_settings(run_of(shape)) for shape in recipe.SHAPES}
    for each in settings.values():
        del each["optimizer"], each["schedule"]
    assert settings["original"] == settings["adamw"] == settings["muon"]
    assert settings["muon"]["budget_tokens"] == SIZE.tokens and settings["muon"]["data"]["validation_windows"] == 512


def test_the_original_stops_at_half_of_its_peak_and_the_others_at_zero():
    ratio_at = {}
    for shape in recipe.SHAPES:
        config = composed_config(run_of(shape).overrides(SIZE, None))
        ratio_at[shape] = [
            lr_ratio(step, config.schedule, config.horizon_steps)
            for step in (config.schedule.warmup_steps, SIZE.steps - 1)
        ]
        assert config.optimizer.weight_decay == {"original": 0, "adamw": 0.1}.get(shape, config.optimizer.weight_decay)
    assert ratio_at["original"] == [1, pytest.approx(1.46e-4 / 3e-4, abs=2e-3)]  # pretrain_original.yaml
    assert ratio_at["adamw"] == ratio_at["muon"] == [1, pytest.approx(0, abs=1e-3)]


def test_a_variant_changes_what_its_name_says_and_keeps_the_tokens():
    plain = flat_settings(run_of("muon"))
    names = recipe.variant_names()
    assert ("plain decay" in names) != ("cautious decay" in names) and names[0] == ""
    for name in names[1:-1]:
        changed = flat_settings(run_of("muon", variant=name))
        assert changed != plain, name
        assert changed["budget_tokens"] == plain["budget_tokens"]
    twice = flat_settings(run_of("muon", variant="twice the batch"))
    assert (twice["batch_tokens"], twice["schedule"]["warmup_steps"]) == (1024, plain["schedule"]["warmup_steps"] // 2)


def test_the_text_is_that_of_the_command_line_or_the_embedded_corpus():
    assert "data=embedded" in run_of("adamw").overrides(SIZE, None)
    assert {"data=files", "data.sources.files.path=some.jsonl"} <= set(run_of("adamw").overrides(SIZE, "some.jsonl"))


# Ratios of tokens


def test_a_known_ratio_is_found_in_the_mean_and_in_each_seed():
    found = ratios(finished(simulated()))
    for baseline, expected in {"original tuned": 1 / 2, "adamw": 1.25 / 2}.items():
        ratio = found[baseline]
        assert [each.tokens for each in (ratio.mean, *ratio.by_seed.values())] == pytest.approx([expected] * 3)
        assert not ratio.mean.is_extrapolated
    assert found["adamw"].spread() == "1.60 to 1.60"
    assert recipe.ratio_text(found["original tuned"].mean, is_inverse=True) == "2.00"


def test_a_loss_is_found_between_the_points_of_a_curve_and_beyond_them():
    curve = {100: 3.0, 200: 2.0, 400: 1.5}
    assert recipe.reach(curve, 3.0) == recipe.Reach(pytest.approx(100))
    assert recipe.reach(curve, 1.5) == recipe.Reach(pytest.approx(400))
    assert recipe.reach(curve, 2.5) == recipe.Reach(pytest.approx(100 * math.sqrt(2)))
    assert recipe.reach(curve, 1.25) == recipe.Reach(pytest.approx(400 * math.sqrt(2)), True)
    assert recipe.reach(curve, 3.5) == recipe.Reach(pytest.approx(100 / math.sqrt(2)), True)
    assert recipe.reach(curve, 0.5) == recipe.Reach(pytest.approx(800), True, "above")
    assert recipe.reach(curve, 4.5) == recipe.Reach(pytest.approx(50), True, "below")


def test_a_loss_is_not_reached_by_a_curve_that_does_not_fall_or_has_failed():
    assert recipe.reach({100: 3.0, 200: 3.0}, 2.0) is None
    assert recipe.reach({100: 2.0, 200: 3.0}, 1.5) is None
    assert recipe.reach({100: 2.0, 200: 3.0}, 2.5) is None  # below its first point, and rising
    assert recipe.reach({100: 3.0, 200: 2.0}, math.inf) is None
    assert recipe.reach({100: 3.0, 200: math.inf}, 2.0) is None
    assert recipe.reach({100: 3.0, 200: math.inf, 400: 2.0}, 2.5) == recipe.Reach(pytest.approx(200))


def test_a_curve_that_rises_in_between_reaches_a_loss_the_first_time():
    assert recipe.reach({100: 3.0, 200: 2.0, 400: 2.6, 800: 1.0}, 2.5).tokens == pytest.approx(100 * math.sqrt(2))
    assert recipe.reach({100: 3.0, 200: 3.0, 400: 2.0}, 3.0).tokens == pytest.approx(100)


def test_extrapolated_ratios_are_marked_and_end_at_a_factor_of_two():
    losses = finished(simulated({"original": 1.0, "adamw": 1.5, "muon": 40.0}))
    found = ratios(losses)
    assert recipe.ratio_text(found["original tuned"].mean) == "< 0.03"  # half of N / 16
    assert recipe.ratio_text(found["original tuned"].mean, is_inverse=True) == "> 32.00"
    assert recipe.ratio_text(found["adamw"].mean) == "0.04 (extrapolated)" and found["original tuned"].spread() == ""
    backwards = ratios(losses, "original tuned")
    assert recipe.ratio_text(backwards["adamw"].mean) == "1.50 (extrapolated)"
    assert recipe.ratio_text(backwards["muon"].mean) == "> 2.00"
    assert recipe.ratio_text(None) == "unknown"


def test_a_failed_run_counts_as_infinite_loss_and_is_shown():
    failing = [
        recipe.Run("muon", SIZE.tokens // 4, 1, recipe.Rates(SIZE.embedding_lr, SIZE.matrix_lr)),
        recipe.Run("adamw", SIZE.tokens, 1, recipe.Rates(SIZE.adamw_lr)),
    ]
    losses = finished(simulated(failing=failing))
    found = ratios(losses)
    assert found["original tuned"].mean.tokens == pytest.approx(0.5)  # of the budgets without a failed run
    assert found["adamw"].mean is None and found["adamw"].by_seed[0].tokens == pytest.approx(1.25 / 2)
    assert recipe.loss_table(SIZE, losses).count("failed (") == 2
    assert recipe.ratio_table(SIZE, losses).count(" unknown |") == 3


def test_the_report_has_every_ratio_and_every_run_of_the_tuning():
    losses = finished(simulated())
    report = recipe.study_report(SIZE, losses, "About the data")
    assert "| original tuned |" in report and "2.00 to 2.00" in report and "1.60 to 1.60" in report
    for shape in recipe.SHAPES:
        for run in recipe.tune(SIZE, shape, losses).runs:
            assert f"{losses[run]:.4f}" in report
    widths = {len(line) for line in recipe.square_table(SIZE, losses).splitlines()}
    assert len(widths) == 1  # aligned
    assert recipe.study_summary(SIZE, losses).startswith("muon needs ")
    tuned = {run: losses[run] for run in recipe.tune(SIZE, "adamw", losses).runs}
    assert recipe.study_summary(SIZE, tuned).startswith("best adamw 0.004: ")


def test_ablations_are_compared_in_pairs_by_seed():
    rates, embedding_rates = recipe.Rates(0.03, 0.01), recipe.Rates(0.004, 0.01)
    runs = [
        run
        for name in ("", "no clipping", recipe.EMBEDDING_VARIANT)
        for run in recipe.variant_runs(name, rates, embedding_rates, 1000)
    ]
    losses = dict(zip(runs, [2.0, 2.1, 2.01, 2.13, 2.2, math.inf], strict=True))
    names = ["", "no clipping", recipe.EMBEDDING_VARIANT, "twice the batch"]
    rows = recipe.ablation_table(rates, embedding_rates, 1000, losses, names).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == ["muon", "2.0500", "", "", ""]
    assert cells[1] == ["no clipping", "2.0700", "+0.0200", "+0.0100", "+0.0300"]
    assert cells[2] == [recipe.EMBEDDING_VARIANT, "failed", "", "+0.2000", ""]
    assert cells[3] == ["twice the batch", "", "", "", ""]


# Processes


class SimulatedRunner(recipe.Runner):
    """Starts processes that end at once, and writes the results of a simulation into the folders of their runs."""

    loss = staticmethod(simulated())
    code = 0

    def start(self, run):
        path = self.folder / "runs" / run.name
        path.mkdir(parents=True, exist_ok=True)
        write_metrics(path, [{"bpb": 8.0}, {"bpb": self.loss(run)}])
        output = path.with_name(f"{run.name}.out").open("w+b")
        return recipe.Process(subprocess.Popen([sys.executable, "-c", f"exit({self.code})"], stdout=output), output)


def started(tmp_path: Path, runner=SimulatedRunner, size=SIZE):
    return runner(tmp_path, size, None, jobs=4)


def adamw_plan(losses):
    """Return the runs of a small plan."""
    return recipe.tune(SIZE, "adamw", losses).runs


def test_finished_runs_are_recorded_and_not_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "POLL_SECONDS", 0.01)
    losses = started(tmp_path).execute(adamw_plan, lambda losses: "so far")
    assert losses == finished(SimulatedRunner.loss, adamw_plan)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("  3/3  about 0 s left  adamw  rate ") and "so far" in lines[-1]
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {record["bpb"] for record in records} == set(losses.values())
    assert list((tmp_path / "runs").glob("*.out")) == []

    (tmp_path / "results.jsonl").open("a").write('{"name": "cut')
    again = started(tmp_path)
    monkeypatch.setattr(again, "start", None)
    assert again.execute(adamw_plan, lambda losses: "") == losses
    assert started(tmp_path, size=dataclasses.replace(SIZE, layers=4)).losses(adamw_plan) == {}  # another model


def test_a_diverged_run_is_recorded_and_a_killed_one_tried_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "POLL_SECONDS", 0.01)
    run = run_of("adamw")

    def one(losses):
        return [run]

    for code, known in ((137, {}), (EXIT_DIVERGED, {run: math.inf})):
        monkeypatch.setattr(SimulatedRunner, "code", code)
        assert started(tmp_path).execute(one, lambda losses: "") == {run: math.inf}
        assert started(tmp_path).losses(one) == known
    assert "failed with exit code 137; the same command tries it again" in capsys.readouterr().out
    monkeypatch.setattr(SimulatedRunner, "code", 2)
    with pytest.raises(UserError, match="could not be trained"):
        started(tmp_path).execute(lambda losses: [run_of("original")], lambda losses: "")


def test_an_interruption_stops_the_processes(tmp_path, monkeypatch):
    processes = []

    class SlowRunner(SimulatedRunner):
        def start(self, run):
            output = (tmp_path / f"{run.name}.out").open("w+b")
            processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
            return recipe.Process(processes[-1], output)

    def interrupt(running):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "_first_ended", interrupt)
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path, SlowRunner).execute(adamw_plan, lambda losses: "")
    assert len(processes) == 3 and all(process.poll() is not None for process in processes)


def test_ablations_need_a_finished_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "ablations", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        recipe.main()
    assert stopped.value.code == 2
    assert "holds no tuned rates: run the study first" in capsys.readouterr().err


TINY_STUDY = """
import dataclasses, sys
sys.path.insert(0, sys.argv.pop(1))
import recipe

tiny = dataclasses.replace(
    recipe.SMALL, width=32, layers=1, heads=2, key_value_heads=1, intermediate=64, vocabulary=320, window=32,
    batch_tokens=64, steps=16,
)
variants = {name: recipe.VARIANTS[name] for name in ("", "cautious decay", "plain decay")}
for name, value in {
    "SMALL": tiny, "SEEDS": (0,), "BUDGETS": (1 / 2, 1), "SMALLER_BUDGETS": (), "EXTENSIONS": 0,
    "VALIDATION_WINDOWS": 8, "VARIANTS": variants,
}.items():
    setattr(recipe, name, value)
if sys.argv.pop(1) == "again":
    recipe.Runner.start = None
recipe.main()
"""


@pytest.mark.slow
def test_a_tiny_study_trains_through_the_command_and_prints_the_same_again(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "tiny.py").write_text(TINY_STUDY)
    folder = tmp_path / "study"
    for command in ("study", "ablations"):
        reports = []
        for start in ("first", "again"):
            arguments = (ROOT / "scripts", start, command, "--jobs", "2", "--folder", folder)
            ended = run_command("tiny.py", *arguments, cwd=tmp_path)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            reports.append(ended.stdout)
        _, _, report = reports[0].partition("\n\n")
        assert report.startswith((folder / f"{command}.md").read_text()) and reports[1].endswith(report)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len(records) == 18 and all(2 < record["bpb"] < 9 for record in records)
    assert {record["steps"] for record in records} == {8, 16}
    assert (folder / "study.png").stat().st_size > 10_000
    assert not list((folder / "runs").rglob("*.ckpt"))
