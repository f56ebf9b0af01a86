"""The file of pairs: what is written, in which order, and what is found by the next command."""

import json
from pathlib import Path

import pytest

from cucafera.config.errors import UserError
from cucafera.config.schema import ColumnsConfig
from cucafera.data.chatml import Message
from cucafera.pairs import pair_file
from cucafera.pairs.pair_file import (
    DonePrompt,
    Pair,
    done_path_of,
    open_pair_file,
    out_path,
    weights_fingerprint,
)
from cucafera.pairs.prompts import PairPrompt, prompt_of

SETTINGS = {"model": "chat", "weights": "w", "seed": 0, "stop": [], "language": None}
PAIR = Pair("bo", "dolent", ("stop", "length"), ["does not stop"])
WRITTEN = '"chosen": [{"role": "assistant", "content": "bo"}], "rejected": [{"role": "assistant", "content": "dolent"}]'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def opened(path: Path, **changes: object):
    return open_pair_file(path, "chat", "rules", SETTINGS | changes)


def prompt(text: str) -> PairPrompt:
    return prompt_of([Message("user", text)])


def add(file, text: str, pair: Pair | None = None) -> None:
    file.add(prompt(text), DonePrompt(prompt(text).key, "pair" if pair else "skipped", 2, {"length": 1}), pair)


def keys(*texts: str) -> list[str]:
    return [prompt(text).key for text in texts]


def test_a_prompt_is_done_once_it_is_written_with_or_without_a_pair(path):
    with opened(path) as file:
        add(file, "un", PAIR)
        add(file, "dos")
    (row,) = path.read_text().splitlines()
    assert row.startswith('{"prompt": [{"role": "user", "content": "un"}], ' + WRITTEN) and '"by": "rules"' in row
    with opened(path) as file:
        assert [entry.prompt for entry in file.entries] == keys("un", "dos") and file.done == set(keys("un", "dos"))
        assert file.entries[0] == (prompt("un").key, "pair", 2, {"length": 1}) and file.notes == []


def test_the_row_is_on_the_disk_before_its_prompt_is_done(path, monkeypatch):
    with opened(path) as file, monkeypatch.context() as patched:
        append = pair_file.append_line

        def fail(target: Path, line: str) -> None:
            if target == done_path_of(path):
                raise OSError(28, "No space left on device")
            append(target, line)

        patched.setattr(pair_file, "append_line", fail)
        with pytest.raises(UserError, match=r"pairs\.done\.jsonl cannot be written: No space left on device"):
            add(file, "un", PAIR)
    assert len(path.read_text().splitlines()) == 1
    with opened(path) as file:
        assert [entry[:3] for entry in file.entries] == [(*keys("un"), "pair", 0)], "it is not answered a second time"
    with opened(path) as file:
        assert len(file.entries) == 1


def make_pairs(path: Path, texts: list[str]) -> None:
    """Write a pair for each second prompt that is not done."""
    with opened(path) as file:
        done = file.done
        for number, text in enumerate(texts):
            if prompt(text).key not in done:
                add(file, text, PAIR if number % 2 else None)


def test_a_crash_at_any_byte_leaves_what_the_next_command_completes(path, monkeypatch):
    texts = ["un", "dos", "tres", "quatre", "cinc"]
    places: list[tuple[Path, bytes]] = []
    append = pair_file.append_line

    def record(target: Path, line: str) -> None:
        places.append((target, line.encode() + b"\n"))
        append(target, line)

    with monkeypatch.context() as patched:
        patched.setattr(pair_file, "append_line", record)
        make_pairs(path, texts)
    whole = [json.loads(line) | {"time": ""} for line in path.read_text().splitlines()]
    written = sum(len(line) for _, line in places)
    for end in range(0, written + 1, 17):
        left = end
        contents = {path: b"", done_path_of(path): b""}
        for target, line in places:
            contents[target] += line[: max(left, 0)]
            left -= len(line)
        for target, content in contents.items():
            target.write_bytes(content)
        make_pairs(path, texts)
        assert [json.loads(line) | {"time": ""} for line in path.read_text().splitlines()] == whole, end
        with opened(path) as file:
            assert [entry.prompt for entry in file.entries] == keys(*texts)


def test_what_is_undone_is_written_nowhere(path):
    with opened(path) as file:
        add(file, "un", PAIR)
        before = path.read_bytes(), done_path_of(path).read_bytes()
        add(file, "dos", PAIR)
        add(file, "tres")
        file.undo()
        file.undo()
        assert (path.read_bytes(), done_path_of(path).read_bytes()) == before and file.done == set(keys("un"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "other"}, "holds pairs of another model, chat: give another --out FILE"),
        ({"seed": 5, "stop": ["a", "b"]}, "was made with --seed 0, --stop , and now it is 5, a,b: give the same, or"),
        ({"language": "ca"}, "was made with --language off, and now it is ca"),
        ({"further": 1}, "was made with --further off, and now it is 1"),
    ],
)
def test_other_settings_are_refused_but_not_another_name_of_the_model(path, changes, message):
    with opened(path) as file:
        add(file, "un", PAIR)
    with pytest.raises(UserError) as error, opened(path, **changes):
        pass
    assert message in str(error.value)
    with opened(path, model="copy") as file:
        assert len(file.entries) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.jsonl", "no JSON\n", "pairs.jsonl:3 is not JSON: "),
        ("pairs.jsonl", "[1]\n", "pairs.jsonl:3 is not a JSON object: fix it, or give another --out FILE"),
        ("pairs.jsonl", '{"id": 1}\n', "pairs.jsonl:3 is no row of a pair: no conversation is recognized"),
        ("pairs.done.jsonl", '{"prompt": "a"}\n', "pairs.done.jsonl:4 is damaged: give another --out FILE"),
    ],
)
def test_files_that_were_damaged_are_refused_with_the_line(path, name, content, message):
    with opened(path) as file:
        add(file, "un", PAIR)
    with path.with_name(name).open("a") as damaged:
        damaged.write("\n" + content)
    with pytest.raises(UserError) as error, opened(path):
        pass
    assert message in str(error.value).replace(f"{path.parent}/", "")


def test_rows_that_others_append_are_prompts_that_are_done(path):
    with opened(path) as file:
        add(file, "un", PAIR)
    with path.open("a") as added:
        added.write(json.dumps({"prompt": "dos", "chosen": "a", "rejected": "b"}))  # without a line end
    with opened(path) as file:
        assert file.done == set(keys("un", "dos"))
        add(file, "tres", PAIR)
    assert len(path.read_text().splitlines()) == 3


def test_settings_of_another_version_are_refused(path, monkeypatch):
    with opened(path):
        pass
    monkeypatch.setattr(pair_file, "VERSION", 99)
    with pytest.raises(UserError, match="has no settings of this version"), opened(path):
        pass


def test_weights_are_recognized_by_their_content(tmp_path):
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(content)
        (tmp_path / name / "README.md").write_text(name)
    same, copy, other = (weights_fingerprint(tmp_path / name) for name in "abc")
    assert same == copy != other
    assert weights_fingerprint(tmp_path / "a" / "model.safetensors") == same
    with pytest.raises(UserError, match="nowhere cannot be read: No such file"):
        weights_fingerprint(tmp_path / "nowhere")


def test_checking_a_path_leaves_no_file(tmp_path):
    assert out_path(f"{tmp_path}/new.jsonl") == tmp_path / "new.jsonl"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_file.os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match=r"pairs\.jsonl cannot be written: its folder cannot be written"):
        out_path(f"{tmp_path}/pairs.jsonl")


def test_rows_are_read_as_preferences_are(path):
    with opened(path) as file:
        add(file, "un", PAIR)
    from cucafera.data.conversation_formats import prompt_of_row

    assert prompt_of_row(json.loads(path.read_text()), ColumnsConfig())[0] == [Message("user", "un")]
