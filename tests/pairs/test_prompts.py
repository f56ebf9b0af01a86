"""Prompts from text and from rows."""

import gzip
import json
from pathlib import Path

import pytest

from cucafera.config.errors import UserError
from cucafera.data.chatml import Message
from cucafera.pairs.prompts import prompt_of, read_prompts

OUT = Path("pairs.jsonl")
USER, ASSISTANT = ({"role": role, "content": content} for role, content in (("user", "Hola"), ("assistant", "Bon dia")))


def read_rows(folder: Path, *rows: dict):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_prompts(str(path), OUT)


def contents(read) -> list[list[str]]:
    return [[message.content for message in prompt.messages] for prompt in read.prompts]


def test_each_line_of_a_text_file_is_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_bytes("Què és la mar?\r\n\n  Bon dia \nQuè és la mar?\n".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"Hola\nBon dia"))
    (tmp_path / "c.csv").write_text("prompt,answer\nCom va?,Molt be\nAdeu,\n")
    (tmp_path / "d.pdf").write_text("x")
    read = read_prompts(str(tmp_path), OUT)
    assert contents(read) == [["Què és la mar?"], ["Bon dia"], ["Hola"], ["Com va?"], ["Adeu"]]
    assert [prompt.reference for prompt in read.prompts] == [None, None, None, "Molt be", None]
    assert read.repeated == 2 and read.notes == ["1 file left out: 1 .pdf"]


@pytest.mark.parametrize(
    ("row", "messages", "reference"),
    [
        ({"prompt": "Hola"}, ["Hola"], None),
        ({"messages": [USER]}, ["Hola"], None),
        ({"messages": [USER, ASSISTANT]}, ["Hola"], "Bon dia"),
        ({"messages": [USER, ASSISTANT, USER]}, ["Hola", "Bon dia", "Hola"], None),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT], "rating": "down"}, ["Hola", "Bon dia", "Hola"], "Bon dia"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a"], "b"),
        ({"instruction": "Resumeix", "input": "un text", "output": "r"}, ["Resumeix\n\nun text"], "r"),
        ({"prompt": "a", "system": "s"}, ["s", "a"], None),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT], "score_chosen": 3}, ["Hola"], None),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, ["Hola"], "Bon dia"),
        ({"prompt": "a", "completion": " "}, ["a"], None),
    ],
)
def test_rows_hold_a_prompt_and_perhaps_its_answer(tmp_path, row, messages, reference):
    read = read_rows(tmp_path, row)
    assert contents(read) == [messages] and read.prompts[0].reference == reference


def test_rows_without_a_prompt_are_counted_and_the_first_is_named(tmp_path):
    read = read_rows(tmp_path, {"prompt": "a"}, {"id": 3}, {"messages": [ASSISTANT]}, {"prompt": " "}, {"prompt": "a"})
    assert (contents(read), read.repeated, read.unusable) == ([["a"]], 1, 3)
    assert read.first_unusable.startswith(f"{tmp_path}/rows.jsonl:2: no conversation is recognized in the columns id")
    assert "data.sources" not in read.first_unusable
    for row, problem in (
        ({"messages": [ASSISTANT]}, "it has no message of the user, so there is nothing to answer"),
        ({"prompt": " "}, "message 1, of the user, is empty"),
        ({"prompt": "a", "tools": ["x"]}, "the row has tools: tools and their calls cannot be trained on"),
    ):
        with pytest.raises(UserError) as error:
            read_rows(tmp_path, row)
        assert (
            str(error.value) == f"--prompts {tmp_path}/rows.jsonl holds no prompt: {tmp_path}/rows.jsonl:1: {problem}"
        )


def test_prompts_are_the_same_if_the_model_sees_the_same():
    def key(*messages: tuple[str, str]) -> str:
        return prompt_of([Message(*message) for message in messages]).key

    assert key(("user", "Hola")) == key(("user", " Hola\n"))
    assert len({key(("user", "a")), key(("system", "a")), key(("user", "a"), ("user", "")), key(("user", "b"))}) == 4
