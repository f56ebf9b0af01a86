"""A machine without a GPU: the advised command works there, and does what was asked for as far as it can."""

import shlex

import pytest

from cucafera.config.command_line import composed_config
from cucafera.training.without_gpu import cpu_advice


def advised(*overrides: str) -> list[str]:
    (command,) = [line for line in cpu_advice(composed_config(overrides), overrides).splitlines() if "python" in line]
    return shlex.split(command.split("cucafera.run ")[1])


@pytest.mark.parametrize(
    ("overrides", "command"),
    [
        (["trainer=a100"], ["trainer=cpu"]),
        (["trainer=ddp", "seed=3", "trainer.devices=2"], ["seed=3", "trainer=cpu"]),
        (
            ["data=chat_files", "data.sources.files.path=it's.jsonl", "tokenizer.path=t", "trainer=a100", "epochs=1"],
            ["data=chat_files", "data.sources.files.path=it's.jsonl", "tokenizer.path=t", "epochs=1", "trainer=cpu"],
        ),
    ],
)
def test_a_small_run_is_advised_as_it_is(overrides, command):
    assert advised(*overrides) == command
    assert composed_config(command).trainer.accelerator == "cpu"


@pytest.mark.parametrize(
    ("overrides", "source"),
    [
        (["+experiment=pretrain", "budget_tokens=5e9", "callbacks.prompts=[a]"], "embedded"),
        (["+experiment=own_text", "data.sources.files.path=texts", "name=mine", "trainer=a100"], "files"),
    ],
)
def test_a_run_of_years_is_advised_small_and_under_another_name(overrides, source):
    asked, small = composed_config(overrides), composed_config(advised(*overrides))
    assert small.trainer.accelerator == "cpu" and list(small.data.sources) == [source]
    assert small.model.hidden_size == 192 and small.total_steps < 100
    assert small.name == f"{asked.name}-small" and small.optimizer.lr == asked.optimizer.lr
    assert " days. " in cpu_advice(asked, overrides)
