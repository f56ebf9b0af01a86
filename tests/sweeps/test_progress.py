"""The lines that a sweep prints while its jobs run."""

import io
import os
import time

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cucafera.output import Output
from cucafera.sweeps.progress import PROGRESS_FILE, JobEvent, SweepProgress, last_lines, number_of_jobs, seconds_left

RUNNING = JobEvent(1, "optimizer.lr=0.002", "sweep/b", 1000.0)


def test_each_job_is_a_line_and_a_failed_one_shows_why(tmp_path, capsys):
    (tmp_path / PROGRESS_FILE).write_text("of an earlier sweep\n")
    progress = SweepProgress(tmp_path, 12)
    progress.start()
    JobEvent(0, "optimizer.lr=0.001", "a", time.time(), "finished", 40.0, "loss 5.000  bpb 2.500", 2.5).append(tmp_path)
    JobEvent(1, "optimizer.lr=1e9", "b", time.time(), "diverged", 20.0).append(tmp_path)
    JobEvent(2, "optimizer.lr=0.5", "c", time.time(), "crashed", 1.0, message="Killed\nby it").append(tmp_path)
    JobEvent(3, "optimizer.lr=0.25", "d", time.time(), "finished", 0.0, "loss 6.000  bpb 3.000", 3.0).append(tmp_path)
    with (tmp_path / PROGRESS_FILE).open("a") as file:
        file.write('{"number": 4')  # another job is writing
    progress.stop()
    output = capsys.readouterr().out
    assert output.splitlines()[1:] == [
        " 1/12  optimizer.lr=0.001  loss 5.000  bpb 2.500  40 s  finished",
        " 2/12  optimizer.lr=1e9  20 s  diverged",
        " 3/12  optimizer.lr=0.5  1 s  crashed",
        "    | Killed",
        "    | by it",
        " 4/12  optimizer.lr=0.25  loss 6.000  bpb 3.000  before  finished",
        "Sweep: 4 of 12 done, 1 failed, 1 diverged, best so far optimizer.lr=0.001 (loss 5.000  bpb 2.500), "
        "about 4 min 00 s left",
    ]
    assert f"Sweep of 12 jobs in {tmp_path}" in output and "\r" not in output


def test_on_a_terminal_one_line_changes_in_place(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", Output(terminal, "Standard output"))
    monkeypatch.setattr("shutil.get_terminal_size", lambda *given, **named: os.terminal_size((60, 20)))
    progress = SweepProgress(tmp_path, 2)
    (tmp_path / "job.out").write_text("step 10/100  loss 6.2\n")
    progress.start()
    JobEvent(0, "seed=1", str(tmp_path), time.time()).append(tmp_path)
    progress._show_new()
    JobEvent(0, "seed=1", str(tmp_path), time.time(), "finished", 40.0, "loss 5.000", 2.5).append(tmp_path)
    progress.stop()
    written = terminal.getvalue()
    assert "\rSweep: 0 of 2 done | 1: seed=1  step 10/100  loss 6.2" in written
    assert "\n1/2  seed=1  loss 5.000  40 s  finished\n" in written.replace("\r", "\n")
    assert max(map(len, written.replace("\r", "\n").splitlines()[2:])) < 60


def test_the_time_left_counts_jobs_that_run_at_once():
    ended = {0: JobEvent(0, "", "", 0.0, "finished", 100.0), 9: JobEvent(9, "", "", 0.0, "finished")}
    assert seconds_left({}, {1: RUNNING}, 10, 1000.0) is None
    assert seconds_left(ended, {}, 10, 1000.0) == 800.0
    two = {1: RUNNING, 2: JobEvent(2, "", "", 960.0)}
    assert seconds_left(ended, two, 10, 1000.0) == pytest.approx((100 + 60 + 6 * 100) / 2)
    assert seconds_left(ended, {1: RUNNING}, 3, 1020.0) == 80.0
    assert seconds_left(ended, {}, 2, 1000.0) is None


def test_jobs_of_a_grid_are_counted_and_trials_of_a_search_are_given():
    overrides = OverridesParser.create().parse_overrides(
        ["+experiment=x", "seed=1,2,3", "optimizer.lr=interval(1,2)", "batch_tokens=range(1,5)"]
    )
    assert number_of_jobs(overrides, None) == 12
    assert number_of_jobs(overrides, 20) == 20


def test_the_last_lines_of_an_output_are_those_of_the_last_start(tmp_path):
    output = tmp_path / "job.out"
    output.write_text("old\n" + "x" * 9000 + "\nproblem 1\n\nproblem 2\n")
    assert last_lines(output, 0, 2) == "problem 1\nproblem 2"
    assert last_lines(output, output.stat().st_size, 2) == ""
    assert last_lines(tmp_path / "none", 0, 2) == ""
