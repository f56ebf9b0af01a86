"""Names that settings have in other programs lead to those here."""

import pytest

from cucafera.config.check import documented_fields, suggestion
from cucafera.config.command_line import parse_command_line
from cucafera.config.synonyms import NOTES, SYNONYMS


def test_every_synonym_leads_to_a_setting_and_is_none_itself():
    fields = documented_fields()
    assert {meant for meant in SYNONYMS.values() if meant not in fields} == set()
    assert set(NOTES) <= set(SYNONYMS.values())
    assert not {key for key in fields if "." not in key} & set(SYNONYMS)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learning_rate", "optimizer.lr"), ("lr", "optimizer.lr"), ("optimizer.learning_rate", "optimizer.lr"),
        ("batch_size", "batch_tokens (in tokens)"), ("max_steps", "budget_tokens (steps x batch_tokens)"),
        ("trainer.max_epochs", "epochs"), ("seq-len", "sequence_length"), ("model_size", "model"),
        ("vocab", "model.vocab_size"), ("device", "trainer.accelerator"), ("gpus", "trainer.devices"),
        ("precision", "trainer.precision"), ("output", "run_dir"), ("random_seed", "seed"),
        ("data.sources.mine.pth", "data.sources.mine.path"),
    ],
)  # fmt: skip
def test_a_name_of_another_program_is_understood(written, meant):
    assert suggestion(written, list(documented_fields())) == f"; did you mean {meant}?"


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--lr=1e-3", "settings have no dashes: optimizer.lr=1e-3"), ("--epochs", "no dashes: epochs=..."),
        ("--resume", "no dashes: resume=..."), ("--learning-rate=1", "no dashes: optimizer.lr=1"),
        ("--max_steps=5", "budget_tokens=... (steps x batch_tokens)"), ("--experiment=x", "with a plus: +experiment=x"),
        ("--multirn", "did you mean --multirun?"),
    ],
)  # fmt: skip
def test_a_setting_written_as_a_flag_is_refused_with_its_form(flag, advice, capsys):
    with pytest.raises(SystemExit):
        parse_command_line([flag])
    assert advice in capsys.readouterr().err
