"""Checks of the README files: commands, paths, links, tests and figures that they name."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cucafera.config.command_line import command_line_problems, composed_config
from cucafera.runs.report import terminal_report
from tests.support import README, README_FILES, ROOT, load_script, write_run_folder

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in README_FILES}
TEXT = "\n".join(PAGES.values())
JOINED = TEXT.replace("\\\n", "")  # commands over several lines
COMMANDS = sorted(set(re.findall(r"(?:python -m cucafera\.|cucafera )run(?= )(?![^\n]*--help)([^\n#`]*)", JOINED)))
OTHER_COMMANDS = sorted(
    set(re.findall(r"python -m cucafera\.(chat|serve|evaluate|prefer|export|compare)( [^\n#`]*)", JOINED))
)
REFUSED = re.findall(r"^\$ python -m cucafera\.run (.*)\nThe configuration has ([^`]*)^```", TEXT, re.MULTILINE)
LINKS = [(page, target) for page, text in PAGES.items() for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)]


def test_the_first_page_is_short_and_links_to_every_other_page():
    assert len(README.splitlines()) <= 250
    linked = {target for page, target in LINKS if page == "README.md"}
    assert PAGES.keys() - {"README.md"} <= linked


def test_the_table_of_models_is_what_the_code_computes():
    assert load_script("model_table").model_table() in TEXT


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_run_commands_compose(command, tmp_path, monkeypatch):
    if any(command.strip() == refused.strip() for refused, _ in REFUSED):
        return
    monkeypatch.chdir(tmp_path)
    for run_dir in re.findall(r"init_from=(\S+)", command):  # the runs that earlier commands leave
        write_run_folder(tmp_path / run_dir.split("/checkpoints/")[0], composed_config(["schedule=constant"]))
    command = re.sub(r"--cfg \w+", "", command)
    arguments = [word for word in shlex.split(command) if not word.startswith("--")]
    assert command_line_problems(arguments, multirun="--multirun" in command) == []


@pytest.mark.parametrize(("name", "command"), OTHER_COMMANDS)
def test_other_documented_commands_are_parsed(name, command, monkeypatch):
    module = importlib.import_module(f"cucafera.{name}")
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(command)])
    if hasattr(module, "command_line_parser"):
        module.command_line_parser().parse_args()
    else:
        monkeypatch.setattr(module, name, lambda *arguments: "")
        module.main()


def test_documented_refusals_are_what_is_printed():
    assert REFUSED
    for command, printed in REFUSED:
        problems = [line.removeprefix("  - ") for line in printed.splitlines() if line.startswith("  - ")]
        assert problems == command_line_problems(shlex.split(command))


def test_the_output_of_the_quickstart_has_the_lines_that_a_report_has():
    checkpoint = SimpleNamespace(path="outputs/quickstart/checkpoints/step-00001953.ckpt")
    path = Path("outputs/quickstart")
    folder = SimpleNamespace(
        path=path, report=path / "report.md", checkpoints=SimpleNamespace(complete=lambda: [checkpoint])
    )
    metrics = {
        "objective": "pretraining",
        "parameters": 1_771_200,
        "adapter_parameters": 0,
        "tokens": 999_936,
        "steps": 1953,
        "skipped_updates": 0,
        "left_out": [],
        "skipped_batches": [],
        "training_seconds": 149,
        "tokens_per_second": 6730,
        "device": "CPU (2 cores in use)",
        "devices": 1,
        "precision": "fp32",
        "mfu": None,
        "data_wait": 0.0101,
        "train_loss": 2.541,
        "validation": [
            {"loss": 6.962, "perplexity": 1056.0, "accuracy": 0.005, "bpb": 3.863},
            {"loss": 3.523, "perplexity": 33.9, "accuracy": 0.277, "bpb": 1.955},
        ],
        "best_bpb": 1.955,
        "samples": [],
    }
    report, _, _ = terminal_report(metrics, folder).strip("\n").partition("\n\n")
    assert report in README


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", TEXT))))
def test_named_tests_exist(test):
    path, name = test.split("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\b((?:conf|cucafera|scripts|tests)/[\w/]*[\w/.]*\b/?)", TEXT)))
)
def test_named_paths_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("page", "target"), sorted(set(LINKS)))
def test_links_lead_to_files_and_headings(page, target):
    path, _, anchor = target.partition("#")
    linked = (ROOT / page).parent / path if path else ROOT / page
    assert linked.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_picture_is_shown_on_a_page():
    shown = {((ROOT / page).parent / target).resolve() for page, target in LINKS}
    assert set((ROOT / ".readme").iterdir()) <= shown
