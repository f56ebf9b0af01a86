"""Texts of the package that an objective cannot read are refused before anything is loaded."""

import pytest

from cucafera.config.registry import OBJECTIVES
from cucafera.config.schema import Config
from cucafera.data.sources.embedded import EmbeddedConfig
from cucafera.data.sources.files import FilesConfig
from cucafera.objectives._embedded import embedded_problems

READS = {"pretraining": "documents", "finetuning": "conversations", "preference": "pairs of answers"}
OWN = {"pretraining": "catalan", "finetuning": "conversations", "preference": "preferences"}


def problems(objective: str, source: object) -> list[str]:
    config = Config()
    config.data.sources = {"mine": source}
    return [line for line in OBJECTIVES.get(objective).problems(config, lambda *keys: True) if "mine" in line]


@pytest.mark.parametrize("objective", READS)
@pytest.mark.parametrize("name", OWN.values())
def test_an_objective_reads_its_own_texts_and_refuses_the_others_with_the_right_choice(objective, name):
    found = problems(objective, EmbeddedConfig(embedded=name))
    if name == OWN[objective]:
        assert found == []
    else:
        [problem] = found
        assert problem.startswith(f"data.sources.mine.embedded is {name}, which holds ")
        choice = {"catalan": "embedded"}.get(OWN[objective], OWN[objective])
        assert f"objective={objective} reads {READS[objective]}; use data={choice}" in problem


def test_better_answers_alone_are_conversations():
    source = EmbeddedConfig(embedded="preferences")
    [problem] = problems("finetuning", source)
    assert problem.endswith("or data.sources.mine.columns.answer=chosen for the better answers")
    source.columns.answer = "chosen"
    assert problems("finetuning", source) == []
    assert len(problems("pretraining", source)) == 1
    source.columns.answer = "rejected"
    assert len(problems("finetuning", source)) == 1


def test_files_texts_that_do_not_exist_and_wrong_values_are_left_to_others():
    for source in (FilesConfig(path="x"), EmbeddedConfig(embedded="mine")):
        assert problems("finetuning", source) == []
    config = Config()
    config.data.sources = {"mine": EmbeddedConfig(embedded="catalan")}
    assert list(embedded_problems(config, lambda *keys: False, "finetuning", "conversations")) == []
