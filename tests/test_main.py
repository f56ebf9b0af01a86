"""The console command: it lists the commands, starts them, and refuses what is none."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cucafera import __version__
from cucafera.__main__ import COMMANDS, overview, refusal

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_each_command_is_a_module_with_main():
    for name in COMMANDS:
        assert callable(importlib.import_module(f"cucafera.{name}").main)


def test_the_console_command_of_the_package_is_this_one():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"cucafera": "cucafera.__main__:main"}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_name_the_commands_are_listed(arguments):
    result = run("-m", "cucafera", *arguments)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", overview() + "\n")
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


def test_the_version_is_that_of_the_package():
    assert run("-m", "cucafera", "--version").stdout == f"cucafera {__version__}\n"


def test_a_command_gets_the_arguments_after_its_name():
    by_name, by_module = (run("-m", *command, "nowhere") for command in (("cucafera", "chat"), ("cucafera.chat",)))
    assert by_name.returncode == by_module.returncode == 2
    assert by_name.stderr == by_module.stderr == "nowhere: there is no such run folder or checkpoint\n"


def test_a_command_started_by_name_is_what_python_m_starts(tmp_path):
    """Launchers of several processes start `python -m` with the name in __main__.__spec__ and the rest of sys.argv."""
    program = (
        "import runpy, sys\n"
        "runpy.run_module = lambda *names, **options: print(names, options, sys.argv)\n"
        "from cucafera.__main__ import main\n"
        "main()\n"
    )
    result = run("-c", program, "run", "+experiment=pretrain", "--multirun")
    expected = (
        ("cucafera.run",),
        {"run_name": "__main__", "alter_sys": True},
        ["-c", "+experiment=pretrain", "--multirun"],
    )
    assert result.stdout == " ".join(map(str, expected)) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chta", "RUN"], "cucafera has no command chta. Did you mean chat?"),
        (
            ["zzz"],
            "cucafera has no command zzz. The commands are run, inspect, chat, serve, telegram, evaluate, prefer, ",
        ),
        (["+experiment=pretrain"], "+experiment=pretrain needs a command before it; to train: cucafera run +exper"),
        (["name=dos mots"], "name=dos mots needs a command before it; to train: cucafera run 'name=dos mots'"),
        (["seed=1"], "seed=1 needs a command before it; to train: cucafera run seed=1"),
        (
            ["--multirun", "seed=1,2"],
            "--multirun needs a command before it; to train: cucafera run --multirun seed=1,2",
        ),
    ],
)
def test_what_is_no_command_is_refused_with_advice(arguments, message):
    assert refusal(arguments).startswith(message)
    result = run("-m", "cucafera", *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", refusal(arguments) + "\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_version(name):
    assert run("-m", "cucafera", name, "--version").stdout == f"cucafera {__version__}\n"


@pytest.mark.parametrize(
    ("started", "shown"), [(["cucafera", "chat"], "cucafera chat"), (["cucafera.chat"], "python -m")]
)
def test_the_usage_of_a_command_is_the_one_that_was_typed(started, shown):
    assert run("-m", *started, "--nope").stderr.startswith(f"usage: {shown}")


INTERRUPTED = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, *rest):
        if name == {during!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "during", "arguments"),
    [
        ("cucafera", "cucafera.options", ["chat", "x"]),
        ("cucafera.run", "hydra", []),
        ("cucafera.run", "torch", []),
        ("cucafera.chat", "cucafera.options", ["x"]),
        ("cucafera.serve", "cucafera.options", ["x"]),
        ("cucafera.telegram", "cucafera.options", ["x"]),
        ("cucafera.evaluate", "cucafera.options", ["x"]),
        ("cucafera.prefer", "cucafera.options", ["x"]),
        ("cucafera.export", "cucafera.config.schema", ["x"]),
        ("cucafera.compare", "cucafera.options", ["x"]),
    ],
)
def test_ctrl_c_during_imports_ends_in_one_line(tmp_path, monkeypatch, module, during, arguments):
    monkeypatch.chdir(tmp_path)
    result = run("-c", INTERRUPTED.format(module=module, during=during), *arguments)
    assert (result.returncode, result.stderr) == (130, "\nInterrupted.\n")


def test_listing_and_refusing_import_nothing_heavy():
    program = (
        "import sys; from cucafera.__main__ import overview, refusal; overview(), refusal(['x'])\n"
        "print({'torch', 'numpy', 'hydra', 'omegaconf', 'lightning'} & set(sys.modules))"
    )
    assert run("-c", program).stdout == "set()\n"


@pytest.mark.parametrize("module", ["cucafera", *(f"cucafera.{name}" for name in COMMANDS)])
def test_on_windows_one_line_says_what_is_missing(module):
    program = (
        f"import runpy, sys; sys.platform = 'win32'; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    result = run("-c", program)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "cucafera needs Linux or macOS; on Windows, run it in WSL (Windows Subsystem for Linux).\n"
