"""The summary of a sweep, from folders that the tests write."""

import csv
import dataclasses
import math
import os
import pickle
import random
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from cucafera.compare import compare
from cucafera.config.command_line import GENERATED
from cucafera.config.errors import UserError
from cucafera.config.folders import job_folder_name
from cucafera.objectives import MetricSpec
from cucafera.sweeps.jobs import JobRecord
from cucafera.sweeps.pictures import draw_curves, labels_of
from cucafera.sweeps.progress import SweepProgress
from cucafera.sweeps.records import RunRecord, read_records, units_of
from cucafera.sweeps.summary import SweepSummary, SweepSummaryCallback, summarize_sweep
from cucafera.training.events import EventLogger
from tests.support import write_metrics


def write_job(sweep: Path, status: str, losses: list[float], exit_code: int = 0, **settings: object) -> None:
    """A job's folder, as a sweep leaves it; without losses, as one that was refused before it started."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    folder = sweep / ",".join(overrides)
    folder.mkdir(parents=True)
    JobRecord(status, exit_code, ["+experiment=lr_sweep", *overrides], "identity").write(folder)
    if not losses:
        return
    lines = [f"batch_tokens: 100\noptimizer:\n  lr: {settings.get('optimizer__lr', 0.003)}\nseed: 1\n"]
    (folder / "config.yaml").write_text("".join(lines))
    curve = [{"step": step, "tokens": 100 * step, "loss": loss, "bpb": loss / 2} for step, loss in enumerate(losses)]
    if status == "finished":
        write_metrics(folder, curve, tokens_per_second=12345.6, training_seconds=9.5)
        return
    logger = EventLogger(folder, 0)
    for point in curve:
        logger.log_metrics({"loss/val": point["loss"], "bpb/val": point["bpb"]}, point["step"])
    logger.save()


def write_sweep(sweep: Path, rates: list[float], best: float = 2e-3, **settings: object) -> None:
    for rate in rates:
        loss = 3 + 0.3 * math.log10(rate / best) ** 2
        write_job(sweep, "finished", [7.0, loss + 0.5, loss], optimizer__lr=rate, **settings)


def summarized(sweep: Path, *overrides: str, others: tuple[str, ...] = ()) -> SweepSummary:
    return summarize_sweep(sweep, ["+experiment=lr_sweep", *overrides], {"experiment"}, others)


def ended(config: DictConfig) -> None:
    """The end of a sweep that started no job."""
    callback = SweepSummaryCallback()
    callback.progress = SweepProgress(Path(config.hydra.sweep.dir), 1)
    callback.progress.start()
    pickle.dumps(callback)  # as launchers do
    callback.on_multirun_end(config)


RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
SWEPT = "optimizer.lr=5e-4,1e-3,2e-3,4e-3,8e-3"


def test_the_best_learning_rate_is_reported_with_its_uncertainty(tmp_path):
    write_sweep(tmp_path, RATES)
    text = summarized(tmp_path, SWEPT).text
    assert "The best learning rate is 0.002; with 68% confidence between 0.002 and 0.002 (5 runs)." in text
    assert "Best value tried: 0.002 (validation loss 3.000)." in text
    assert summarized(tmp_path, SWEPT).exit_code == 0
    assert "The best learning rate is 0.002" in (tmp_path / "summary.md").read_text()
    assert "![Results and curves](sweep.png)" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sweep.pdf").read_bytes().startswith(b"%PDF")


def test_results_csv_has_a_row_per_job(tmp_path):
    write_sweep(tmp_path, RATES)
    write_job(tmp_path, "refused", [], exit_code=2, optimizer__lr="1e-2")
    summarized(tmp_path, SWEPT)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 6
    assert rows[0]["optimizer.lr"] == "0.002" and float(rows[0]["loss"]) == 3.0 and float(rows[0]["bpb"]) == 1.5
    assert float(rows[0]["tokens/s"]) == 12345.6 and float(rows[0]["seconds"]) == 9.5
    assert (rows[-1]["status"], rows[-1]["exit code"], rows[-1]["loss"]) == ("refused", "2", "")


def test_jobs_that_diverged_or_failed_are_named_and_left_out_of_the_fit(tmp_path):
    write_sweep(tmp_path, RATES)
    write_job(tmp_path, "diverged", [7.0, 9.0, math.nan], exit_code=3, optimizer__lr=0.1)
    text = summarized(tmp_path, SWEPT).text
    assert "The best learning rate is 0.002" in text
    assert "Diverged: optimizer.lr=0.1." in text
    assert summarized(tmp_path, SWEPT).exit_code == 0
    write_job(tmp_path, "refused", [], exit_code=2, optimizer__lr=0.2)
    assert summarized(tmp_path, SWEPT).exit_code == 2
    write_job(tmp_path, "crashed", [7.0], exit_code=-9, optimizer__lr=0.3)
    assert (
        "Crashed (run the same command again to retry): optimizer.lr=0.3 (exit code -9)."
        in summarized(tmp_path, SWEPT).text
    )
    assert summarized(tmp_path, SWEPT).exit_code == 1


@pytest.mark.parametrize(
    ("best", "edge", "further"), [(1e-5, "lowest", "0.00025,0.000125,6.25e-05"), (1, "highest", "0.016,0.032,0.064")]
)
def test_at_the_edge_of_the_grid_the_next_command_is_printed(tmp_path, best, edge, further):
    write_sweep(tmp_path, RATES, best)
    text = summarized(tmp_path, SWEPT, others=("--config-dir mine", "hydra/launcher=parallel")).text
    assert f"it is the {edge} value tried" in text
    options = "--config-dir mine hydra/launcher=parallel +experiment=lr_sweep"
    assert f"python -m cucafera.run --multirun {options} optimizer.lr={further}" in text
    assert "optimum" not in text


def test_values_between_the_best_and_one_that_diverged_are_proposed(tmp_path):
    write_sweep(tmp_path, RATES[:3], best=1.0)
    write_job(tmp_path, "diverged", [7.0, 9.0], exit_code=3, optimizer__lr=0.032)
    text = summarized(tmp_path, SWEPT).text
    assert "The best learning rate so far is 0.002" in text
    assert "0.032 has no result, so a better one may lie between the two" in text
    assert "optimizer.lr=0.004,0.008,0.016" in text


def test_tokenizers_are_compared_by_bits_per_byte(tmp_path):
    write_job(tmp_path, "finished", [7.0, 3.0], model__vocab_size=320)
    write_job(tmp_path, "finished", [7.0, 3.5], model__vocab_size=1024)
    write_metrics(tmp_path / "model.vocab_size=1024", [{"loss": 7.0, "bpb": 3.5}, {"loss": 3.5, "bpb": 1.25}])
    text = summarized(tmp_path, "model.vocab_size=320,1024").text
    assert (
        "The best of 2 settings is model.vocab_size=1024: validation bpb 1.250 bits per byte (validation loss 3.500)."
        in text
    )


def test_jobs_of_earlier_sweeps_count_if_their_other_settings_are_equal(tmp_path):
    write_sweep(tmp_path, RATES)
    write_job(tmp_path, "finished", [7.0, 2.0], optimizer__lr=1e-2, batch_tokens=99)
    write_job(tmp_path, "crashed", [7.0], exit_code=1, batch_tokens=98)
    write_job(tmp_path, "started", [7.0, 5.0], exit_code=None, optimizer__lr=3e-2)
    text, exit_code = summarized(tmp_path, "optimizer.lr=4e-3,8e-3")
    assert "The best learning rate is 0.002" in text
    assert "Not counted, since their sweeps had other settings: " in text
    assert "batch_tokens=98" in text and "Crashed" not in text
    assert "Unfinished (run the same command again to resume): optimizer.lr=0.03." in text
    assert exit_code == 124
    with pytest.raises(UserError, match="holds only jobs of other sweeps"):
        summarize_sweep(tmp_path, ["seed=1,2"], set())


def test_a_job_that_could_not_run_where_another_one_is_makes_the_sweep_fail(tmp_path):
    write_sweep(tmp_path, RATES)
    write_job(tmp_path, "finished", [7.0, 2.0], optimizer__lr=1e-2, batch_tokens=99)
    text, exit_code = summarized(tmp_path, "optimizer.lr=4e-3,1e-2")
    assert "Not run, since their folders hold jobs with other settings: optimizer.lr=0.01,batch_tokens=99." in text
    assert exit_code == 2
    assert summarized(tmp_path, "optimizer.lr=4e-3,8e-3").exit_code == 0


def test_a_summary_that_fails_exits_with_an_error(tmp_path, capsys, monkeypatch):
    hydra = {
        "sweep": {"dir": str(tmp_path)}, "runtime": {"config_sources": []},
        "overrides": {"hydra": [], "task": ["seed=1,2"]},
        "job": {"config": {"override_dirname": {"exclude_keys": []}}},
    }  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        ended(OmegaConf.create({"hydra": hydra}))
    assert stop.value.code == 2
    assert "there is no run" in capsys.readouterr().err
    write_sweep(tmp_path, RATES[:1])
    hydra["overrides"]["task"] = ["+experiment=lr_sweep", "optimizer.lr=1e-3,2e-3"]
    metrics = tmp_path / "optimizer.lr=0.0005" / "metrics.json"
    written = metrics.read_text()
    metrics.write_text(written.replace("9.5", "1.5"))
    with pytest.raises(SystemExit) as stop:
        ended(OmegaConf.create({"hydra": hydra}))
    assert stop.value.code == 2
    assert "metrics.json is damaged, or was edited (checksum mismatch)" in capsys.readouterr().err
    metrics.write_text(written)
    monkeypatch.setattr("cucafera.sweeps.records.as_text", lambda rows: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        ended(OmegaConf.create({"hydra": hydra}))
    assert stop.value.code == 1
    assert "Traceback" in capsys.readouterr().err


def test_each_model_of_a_sweep_has_its_own_best_learning_rate(tmp_path):
    write_sweep(tmp_path, RATES, 2e-3, model="tiny")
    write_sweep(tmp_path, RATES, 1e-3, model="small")
    text = summarized(tmp_path, SWEPT, "model=tiny,small").text
    assert "With model=small, the best learning rate is 0.001;" in text
    assert "With model=tiny, the best learning rate is 0.002;" in text


def test_runs_are_ranked_by_their_last_value_and_show_their_best_too(tmp_path):
    write_job(tmp_path, "finished", [7.0, 2.0, 4.0], batch_tokens=256)
    write_job(tmp_path, "finished", [7.0, 3.5, 3.0], batch_tokens=512)
    write_job(tmp_path, "stopped", [7.0, 1.0], exit_code=124, batch_tokens=1024)
    text = summarized(tmp_path, "batch_tokens=256,512,1024").text
    assert (
        "The best of 3 settings is batch_tokens=512: validation bpb 1.500 bits per byte (validation loss 3.000)."
        in text
    )
    rows = {row["batch_tokens"]: row for row in csv.DictReader((tmp_path / "results.csv").open())}
    assert list(rows) == ["512", "256", "1024"]
    assert [float(rows["256"][key]) for key in ("loss", "best loss", "bpb", "best bpb")] == [4.0, 2.0, 2.0, 1.0]
    assert (rows["1024"]["tokens"], rows["1024"]["steps"], float(rows["1024"]["loss"])) == ("100", "1", 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_that_ended_without_a_finite_value_ranks_last(tmp_path, value):
    write_job(tmp_path, "finished", [7.0, value], batch_tokens=128)
    write_job(tmp_path, "finished", [7.0, 6.0], batch_tokens=256)
    assert "The best of 2 settings is batch_tokens=256:" in summarized(tmp_path, "batch_tokens=128,256").text
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["batch_tokens"] for row in rows] == ["256", "128"]


def test_a_sweep_over_another_key_is_ranked(tmp_path):
    for batch, loss in ((256, 3.5), (512, 3.25)):
        write_job(tmp_path, "finished", [7.0, loss], batch_tokens=batch)
    text = summarized(tmp_path, "batch_tokens=256,512").text
    assert (
        "The best of 2 settings is batch_tokens=512: validation bpb 1.625 bits per byte (validation loss 3.250)."
        in text
    )
    assert (tmp_path / "sweep.png").exists()


def test_a_sweep_without_a_result_says_so(tmp_path):
    write_job(tmp_path, "diverged", [7.0, 8.0], exit_code=3, optimizer__lr=1.0)
    write_job(tmp_path, "crashed", [], exit_code=1, optimizer__lr=2.0)
    assert "The runs have no result; try lower learning rates." in summarized(tmp_path, SWEPT).text


def test_without_matplotlib_there_is_a_summary_without_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("cucafera.sweeps.pictures.has_matplotlib", lambda: False)
    write_sweep(tmp_path, RATES)
    assert "pip install '.[plots]'" in summarized(tmp_path, SWEPT).text
    assert not (tmp_path / "sweep.png").exists()
    assert "sweep.png" not in (tmp_path / "summary.md").read_text()
    with pytest.raises(UserError, match="--plot needs matplotlib"):
        compare([tmp_path], tmp_path / "curves")


def test_runs_are_compared_by_configuration_differences_and_results(tmp_path):
    write_sweep(tmp_path, [1e-3, 2e-3])
    text = compare([tmp_path], tmp_path / "curves.png")
    head, rest = text.split("Results (loss in nats per token, bpb in bits per byte)")
    assert "optimizer.lr" in head and "0.001" in head and "seed" not in head
    assert "3.000  1.500" in rest and "12,346" in rest
    assert (tmp_path / "curves.png").exists() and (tmp_path / "curves.pdf").exists()
    (one, _) = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert "The configurations are equal." in compare([one, one], None)


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no run"):
        compare([tmp_path / "nowhere"], None)


def test_a_metric_where_higher_is_better_ranks_and_fits_in_its_direction(tmp_path, monkeypatch):
    accuracy = MetricSpec("bpb", "preference accuracy", "of the pairs", "higher", ".2f", 0.01)
    monkeypatch.setattr("cucafera.sweeps.metrics.primary_metric", lambda config: accuracy)
    monkeypatch.setattr("cucafera.sweeps.records.primary_metric", lambda config: accuracy)
    monkeypatch.setattr("cucafera.sweeps.metrics.fitted_metric", lambda config: accuracy)
    monkeypatch.setattr("cucafera.sweeps.pictures.fitted_metric", lambda config: accuracy)
    for rate in RATES:
        score = 0.9 - 0.1 * math.log10(rate / 2e-3) ** 2
        write_job(tmp_path, "finished", [1.0, 2 * score], optimizer__lr=rate)
    text = summarized(tmp_path, SWEPT).text
    assert "The best learning rate is 0.002; with 68% confidence between 0.002 and 0.002 (5 runs)." in text
    assert "Best value tried: 0.002 (preference accuracy 0.90)." in text
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert rows[0]["optimizer.lr"] == "0.002" and float(rows[0]["bpb"]) == pytest.approx(0.9)
    assert (tmp_path / "sweep.png").exists()


def test_settings_with_the_same_accuracy_are_named(tmp_path, monkeypatch):
    accuracy = MetricSpec("bpb", "reward accuracy", "", "higher", ".1%", 0.005)
    for place in ("metrics.primary_metric", "records.primary_metric", "metrics.fitted_metric"):
        monkeypatch.setattr(f"cucafera.sweeps.{place}", lambda config: accuracy)
    for smoothing, score in ((0.1, 0.75), (0.2, 0.875), (0.3, 0.875), (0.4, 0.5)):
        write_job(tmp_path, "finished", [1.0, 2 * score], objective__label_smoothing=smoothing)
    text = summarized(tmp_path, "objective.label_smoothing=0.1,0.2,0.3,0.4").text
    assert "The best of 4 settings is objective.label_smoothing=0.2: reward accuracy 87.5%." in text
    assert "It is as good with objective.label_smoothing=0.3." in text


def test_a_metric_without_a_unit_leaves_no_gap_in_a_sentence_or_heading(tmp_path, monkeypatch):
    accuracy = MetricSpec("bpb", "reward accuracy", "", "higher", ".1%", 0.005)
    for place in ("metrics.primary_metric", "records.primary_metric", "metrics.fitted_metric"):
        monkeypatch.setattr(f"cucafera.sweeps.{place}", lambda config: accuracy)
    for rate in RATES:
        write_job(tmp_path, "finished", [1.0, 1.75], optimizer__lr=rate)
    assert "differ by no more than 0.005: any of them is as good" in summarized(tmp_path, SWEPT).text
    assert accuracy.label_with_unit == "reward accuracy"
    assert units_of([accuracy]) == ""
    assert units_of([MetricSpec("loss", "loss", "per pair"), accuracy, MetricSpec("bpb", "bpb", "bits")]) == (
        "loss per pair, bpb in bits"
    )
    assert "Results:" in compare([tmp_path], None)


def test_runs_behind_symlinks_are_compared_and_lost_ones_are_not_left_out_silently(tmp_path):
    sweep, disk = tmp_path / "sweep", tmp_path / "disk"
    write_job(sweep, "finished", [7.0, 3.0], seed=1)
    write_job(disk, "finished", [7.0, 4.0], seed=2)
    (sweep / "linked").symlink_to(disk / "seed=2")
    (sweep / "round").symlink_to(sweep)
    assert "linked" in compare([sweep], None) and "4.000" in compare([sweep], None)
    disk.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"linked cannot be read: it is a symlink to .*, which is not there"):
        compare([sweep], None)


def test_a_damaged_record_of_a_job_is_refused_by_name(tmp_path):
    write_job(tmp_path, "finished", [7.0, 3.0], seed=1)
    record = tmp_path / "seed=1" / "job.json"
    for content in ("", "[]", record.read_text().replace("finished", "diverged")):
        record.write_text(content)
        with pytest.raises(UserError, match=r"job\.json cannot be used: checksum mismatch. Delete it"):
            summarized(tmp_path, "seed=1")


def test_a_pipe_among_the_events_is_not_waited_for(tmp_path):
    write_job(tmp_path, "stopped", [7.0, 3.0], seed=1)
    os.mkfifo(tmp_path / "seed=1" / "events.out.tfevents.9")
    with pytest.raises(UserError, match=r"events\.out\.tfevents\.9 cannot be read: it is not a regular file"):
        compare([tmp_path], None)


def test_the_next_command_keeps_the_settings_of_hydra_that_were_given(tmp_path, capsys):
    sweep = tmp_path / "elsewhere"
    write_sweep(sweep, [1e-3, 2e-3, 4e-3], best=1e-2)
    given = [f"hydra.sweep.dir={sweep}", "hydra.searchpath=['file:///my configurations']"]
    config = OmegaConf.create(
        {
            "hydra": {
                "sweep": {"dir": str(sweep)},
                "overrides": {
                    "hydra": [*given, GENERATED, "hydra.sweeper.params=null", f"hydra.sweep.dir='{sweep}'"],
                    "task": ["+experiment=lr_sweep", "optimizer.lr=1e-3,2e-3,4e-3"],
                },
                "job": {"config": {"override_dirname": {"exclude_keys": ["experiment"]}}},
            }
        }
    )
    ended(config)
    (command,) = [line for line in capsys.readouterr().out.splitlines() if "--multirun" in line]
    assert shlex.split(command)[3:-1] == ["--multirun", *given, "+experiment=lr_sweep"]


def write_search(sweep: Path, jobs: int) -> list[str]:
    """A search of three parameters, of which the learning rate alone has an effect. Returns its overrides."""
    rng = random.Random(0)
    for number in range(jobs):
        rate, decay = 10 ** rng.uniform(-3.5, -1.5), rng.uniform(0, 0.3)
        settings = {"optimizer.lr": rate, "optimizer.weight_decay": decay, "model": f"_m$x$,ñ {number % 2}"}
        loss = 4 + math.log10(rate / 2e-3) ** 2 + rng.gauss(0, 0.01)
        overrides = [f"{key}={value!r}" for key, value in settings.items()]
        folder = sweep / job_folder_name(overrides, [])
        folder.mkdir(parents=True)
        status = "diverged" if rate > 2e-2 else "finished"
        JobRecord(status, 0, ["+experiment=search", *overrides], "identity").write(folder)
        (folder / "config.yaml").write_text("batch_tokens: 100\n")
        curve = [{"loss": 7.0, "bpb": 3.5}, {"loss": loss, "bpb": loss / 2}]
        if status == "finished":
            write_metrics(folder, curve)
    return ["+experiment=search", "optimizer.lr=tag(log, interval(3e-4, 3e-2))",
            "optimizer.weight_decay=interval(0, 0.3)", "model=a,b"]  # fmt: skip


def test_a_search_has_one_conclusion_and_the_next_search(tmp_path):
    overrides = write_search(tmp_path, 40)
    text = summarize_sweep(tmp_path, overrides, {"experiment"}).text
    assert text.count("The best of 40 settings is optimizer.lr=0.00") == 1 and "With " not in text
    (explained,) = re.findall(r"each alone explains: optimizer.lr (\d+)%; no more than chance: ", text)
    assert 60 < int(explained) <= 100
    (command,) = [line for line in text.splitlines() if "--multirun" in line]
    (interval,) = [word for word in shlex.split(command) if word.startswith("optimizer.lr=")]
    low, high = map(float, re.fullmatch(r"optimizer.lr=tag\(log, interval\((.*), (.*)\)\)", interval).groups())
    assert 3e-4 < low < 2e-3 < high < 2e-2
    assert "0.0000" not in text and not re.search(r"0\.\d{8}", text)
    assert re.search(r"0\.\d{12}", (tmp_path / "results.csv").read_text())  # the exact values
    assert (tmp_path / "sweep.png").exists() and "_m$x$,ñ 1" in text


def test_the_seeds_of_one_setting_have_a_mean_and_a_spread(tmp_path):
    for seed, loss in enumerate((4.0, 4.2, 4.4)):
        write_job(tmp_path, "finished", [7.0, loss], seed=seed)
    text = summarized(tmp_path, "seed=0,1,2").text
    assert (
        "The result is validation bpb 2.100 ± 0.1 bits per byte (mean and standard deviation of 3 seeds; "
        "validation loss 4.200)." in text
    )


def test_settings_are_compared_with_the_noise_of_their_seeds(tmp_path):
    for seed in (1, 2):
        for batch, loss in ((256, 4.0), (512, 4.01), (1024, 5.0)):
            write_job(tmp_path, "finished", [7.0, loss + 0.1 * seed], batch_tokens=batch, seed=seed)
    text = summarized(tmp_path, "batch_tokens=256,512,1024", "seed=1,2").text
    assert "The best of 3 settings is batch_tokens=256: validation bpb 2.075 ± 0.035 bits per byte" in text
    assert "The next, batch_tokens=512, is 0.005 worse, which may be noise of the seeds (0.035)." in text


def test_one_seed_of_a_grid_is_followed_by_more_of_the_best(tmp_path):
    for batch, loss in ((256, 3.5), (512, 3.25), (1024, 3.3)):
        write_job(tmp_path, "finished", [7.0, loss], batch_tokens=batch)
    text = summarized(tmp_path, "batch_tokens=256,512,1024").text
    assert "--multirun +experiment=lr_sweep batch_tokens=512 seed=1,2,3" in text


def test_learning_rates_that_make_no_difference_are_all_as_good(tmp_path):
    for rate in RATES:
        write_job(tmp_path, "finished", [7.0, 3.0], optimizer__lr=rate)
    assert "learning rates from 0.0005 to 0.008 differ by no more than 0.01 nats" in summarized(tmp_path, SWEPT).text


@pytest.mark.parametrize("count", [1, 5, 30, 200])
def test_names_in_pictures_are_short_different_and_show_only_what_differs(tmp_path, count):
    records = [
        RunRecord(tmp_path, "run", {}, JobRecord("finished", 0, ["seed=1", f"optimizer.lr={0.001 + number / 1e7!r}",
                  f"name='_{'llarg' * 30}$x$ñ'"], None), None, [])
        for number in range(count)
    ]  # fmt: skip
    labels = labels_of(records)
    assert len(set(labels)) == count
    assert all(len(line) <= 48 for label in labels for line in label.splitlines())
    assert count == 1 or all(label.startswith("lr=0.001") and "seed" not in label for label in labels)


def test_pictures_show_texts_as_they_are(tmp_path, recwarn):
    names = ["_first", "$a_b$ ${x}", "l'avi ñ 漢", "a\x1b[31m"]
    for number in range(len(names)):
        write_job(tmp_path / "sweep", "finished", [7.0, 3.0 + number], seed=number)
    records = [
        dataclasses.replace(record, name=name, job=None)
        for record, name in zip(read_records(tmp_path / "sweep", tmp_path), names, strict=True)
    ]
    records = [dataclasses.replace(record, metrics={"tokens_per_second": 1}) for record in records]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cucafera.sweeps.pictures._save", lambda figure, *rest: drawn.append(figure))
        draw_curves(records, tmp_path / "curves")
    texts = [text for axes in drawn[0].axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    assert [text.get_text() for text in texts[:4]] == ["_first", "$a_b$ ${x}", "l'avi ñ 漢", "a\\x1b[31m"]
    assert not any(text.get_parse_math() for text in texts)
