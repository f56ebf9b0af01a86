"""The inspect command: what is shown of a run's data is what the model is trained on."""

import sys
from pathlib import Path

import pytest

import cucafera.inspect
from cucafera.inspect import described_run, main
from cucafera.objectives import objective_of
from tests.support import small_preferences


@pytest.fixture
def inspected(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Calls the command in the folder of the runs; returns what it prints."""
    monkeypatch.chdir(runs)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["inspect", *arguments])
        main()
        return capsys.readouterr().out

    return call


def test_the_measures_of_conversations_count_padding_and_what_is_trained(inspected):
    shown = inspected("outputs/chat", "--windows", "0")
    cells = dict(line.strip().rsplit("  ", 1) for line in shown.split("\n") if "%" in line)
    assert all(0 < float(value.strip().rstrip("%")) < 100 for value in cells.values()), shown


def test_a_run_folder_shows_what_the_run_was_trained_on(inspected):
    shown = inspected("outputs/chat", "--windows", "1").replace("what stands in ⟦ ⟧ is trained on", "")
    assert "finetuning: 12 steps" in shown and "in its own conversation." in shown
    assert "  -- conversation 1: " in shown
    assert shown.count("⟦") == shown.count("<im_end>⟧") == shown.count("<im_start>assistant") > 0


def test_pairs_are_shown_as_the_better_and_the_worse_answer_that_are_compared(inspected, tmp_path: Path):
    overrides = (*small_preferences(tmp_path), "init_from=outputs/chat")
    shown = inspected(*overrides, "--windows", "1")
    assert "pairs  " in shown and "  tokens of a training pair" in shown and "\n  compared  " in shown
    assert "in its own conversation." in shown
    _, window = shown.split("; what stands in ⟦ ⟧ is compared\n")
    names = [line.split(":")[0].removeprefix("  -- ") for line in window.split("\n") if line.startswith("  -- pair")]
    assert names[:2] == ["pair 1, better answer", "pair 1, worse answer"] and len(names) % 2 == 0
    assert window.count("⟦") == window.count("<im_end>⟧") == len(names)
    held_out = inspected(*overrides, "--windows", "1", "--held-out")
    assert "what stands in ⟦ ⟧ is measured" in held_out and "-- pair 1, worse answer" in held_out


def test_overrides_show_what_a_run_would_be_trained_on(inspected, runs: Path):
    command = ("data=files", "data.sources.files.path=corpus.jsonl", "tokenizer.path=outputs/base/tokenizer.json")
    sizes = ("model.vocab_size=400", "sequence_length=64", "batch_tokens=256", "budget_tokens=2560")
    before = {path.name for path in (runs / "outputs").iterdir()}
    shown = inspected(*command, *sizes, "schedule.warmup_steps=1", "--step", "10", "--windows", "9")
    assert "pretraining: 10 steps of 4 windows of 64 tokens" in shown
    assert [line.split(":")[0] for line in shown.split("\n") if line.startswith("Step")] == [
        f"Step 10, window {number} of 4" for number in range(1, 5)
    ]
    assert {path.name for path in (runs / "outputs").iterdir()} - before <= {"prepared"}, "it makes no run folder"


def test_the_windows_of_a_step_are_those_that_training_gets(inspected, runs: Path):
    config = described_run(["outputs/base"]).config
    data = objective_of(config).open_data(config)
    batch = data.training_steps(())[2]
    shown = inspected("outputs/base", "--step", "3", "--windows", "1").split("Step 3, window 1 of ")[1]
    first = data.tokenizer.decode(batch.input_ids[0].tolist())
    lines = [line.removeprefix("  ") for line in shown.split("\n")[1:] if not line.startswith("  -- document")]
    assert "".join(lines) == first.replace("\n", "")


def test_windows_are_those_of_the_step_also_if_batches_are_repeated_or_skipped(inspected, monkeypatch):
    def titles(step: int) -> list[str]:
        lines = inspected("outputs/base", "--step", str(step), "--windows", "9").split("\n")
        return [line.split(": window ")[1] for line in lines if line.startswith(f"Step {step}, window")]

    first, second, third = titles(1), titles(2), titles(3)
    assert len({*first, *second, *third}) == len(first + second + third)
    run = described_run(["outputs/base"])
    monkeypatch.setattr(cucafera.inspect, "described_run", lambda _: run._replace(skipped_batches=[0]))
    assert titles(1) == second and titles(2) == third
    run.config.data.overfit_steps = 2
    monkeypatch.setattr(cucafera.inspect, "described_run", lambda _: run)
    assert titles(3) == first and "the data are seen" not in inspected("outputs/base", "--windows", "0")


def test_held_out_windows_are_those_of_validation(inspected):
    shown = inspected("outputs/base", "--held-out", "--windows", "1", "--tokens")
    assert "Held out: window 1 of " in shown and "|" in shown.split("Held out")[1]
    assert "all of it is measured" in shown


def test_what_is_being_done_is_printed_before_what_is_shown(inspected, caplog):
    with caplog.at_level("INFO"):
        inspected("outputs/base", "--windows", "0")
    lines = [record.message for record in caplog.records if record.name == "cucafera.inspect"]
    assert lines == ["Reading the configuration", "Opening the data of outputs/base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such run folder, and it is not an override, key=value"),
        (["outputs/base", "seed=1"], "a run folder stands alone"),
        (["outputs"], "outputs is not a run folder: it has no config.yaml"),
        (["batch_token=1"], "did you mean batch_tokens?"),
        (["--step", "0"], "--step is 0; it must be at least 1"),
        (["--windows", "-1"], "--windows is -1; it must be at least 0"),
        (["outputs/base", "--step", "13"], "--step is 13; the run has 12 steps"),
    ],
)
def test_what_cannot_be_shown_is_refused(inspected, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        inspected(*arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_other_data_than_the_run_was_trained_on_are_refused(inspected, runs: Path, capsys):
    corpus = runs / "corpus.jsonl"
    content = corpus.read_bytes()
    try:
        corpus.write_bytes(content + b'{"text": "un altre document"}\n')
        with pytest.raises(SystemExit):
            inspected("outputs/base")
    finally:
        corpus.write_bytes(content)
    assert "is not what these weights were trained with" in capsys.readouterr().err
