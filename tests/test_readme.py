"""What the README and the performance page say is true of the code."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cucafera.composition import command_line_problems, composed_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "scripts" / "PERFORMANCE.md").read_text(encoding="utf-8")
JOINED = PAGES.replace("\\\n", "")  # commands over several lines
COMMANDS = re.findall(r"python -m cucafera\.run(?![^\n]*--help)([^\n#`]*)", JOINED)
REFUSED = re.findall(r"^\$ python -m cucafera\.run ([^\n]*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_models_is_what_the_code_computes():
    assert load_script("model_table").model_table() in README


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_compose(command, tmp_path, monkeypatch):
    if any(command.strip() == refused.strip() for refused, _ in REFUSED):
        return
    monkeypatch.chdir(tmp_path)
    for run_dir in re.findall(r"init_from=(\S+)", command):  # the runs that commands before it leave
        run = tmp_path / run_dir / "config.yaml"
        run.parent.mkdir(parents=True)
        run.write_text(OmegaConf.to_yaml(OmegaConf.structured(composed_config([]))))
    arguments = [word for word in shlex.split(command) if not word.startswith("--") and word != "job"]
    assert command_line_problems(arguments, multirun="--multirun" in command) == []


@pytest.mark.parametrize(
    ("door", "command"), re.findall(r"python -m cucafera\.(chat|evaluate|export)( [^\n#`]*)", JOINED)
)
def test_the_commands_of_its_other_doors_are_understood(door, command):
    importlib.import_module(f"cucafera.{door}").command_line_parser().parse_args(shlex.split(command))


def test_its_example_of_a_refusal_is_what_is_printed():
    (refused,) = REFUSED
    command, printed = refused
    told = [line.removeprefix("  - ") for line in printed.splitlines() if line.startswith("  - ")]
    assert told == command_line_problems(shlex.split(command))


@pytest.mark.parametrize("test", re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", PAGES))
def test_the_tests_it_names_exist(test):
    path, name = test.split("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", re.findall(r"`((?:conf|cucafera|scripts|tests)/[\w/.]*)`", PAGES))
def test_the_places_it_names_exist(path):
    assert (ROOT / path).exists()
