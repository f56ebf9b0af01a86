"""Rows that people's choices on the page become."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from datasets import load_dataset

from cucafera.config.errors import UserError
from cucafera.config.schema import ColumnsConfig
from cucafera.data.chatml import ConversationError
from cucafera.data.conversation_formats import conversation_of_row
from cucafera.serving.collected import MAX_CHARACTERS, CollectedRows
from cucafera.serving.openai_api import ApiError

PROMPT = [{"role": "system", "content": "Breu."}, {"role": "user", "content": "Com va, 🙂?"}]


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


PREFERENCE = {"prompt": PROMPT, "chosen": answer("Bé."), "rejected": answer("Malament.\nMolt.")}
RATING = {"messages": [*PROMPT, *answer("Bé.")], "rating": "down"}


def test_rows_load_with_datasets_and_have_the_columns_of_trl(tmp_path):
    rows = CollectedRows(tmp_path / "mine.jsonl", "chat")
    assert list(tmp_path.iterdir()) == []  # nothing before the first row
    for _ in range(2):
        rows.write_preference(PREFERENCE | {"other": 1})
        rows.write_rating(RATING)
    cache = str(tmp_path / "cache")
    loaded = load_dataset("json", data_files=str(tmp_path / "mine.jsonl"), split="train", cache_dir=cache)
    assert loaded.column_names == ["prompt", "chosen", "rejected", "model", "time"] and len(loaded) == 2
    for name in ("prompt", "chosen", "rejected"):
        assert loaded[1][name] == PREFERENCE[name]
    # TRL's conversational preference format: each column a list of messages with role and content.
    assert all(set(message) == {"role", "content"} for message in loaded[0]["prompt"] + loaded[0]["chosen"])
    ratings = (tmp_path / "mine.ratings.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(ratings[0])
    with pytest.raises(ConversationError, match="an answer that was rated bad is not for finetuning"):
        conversation_of_row(row, ColumnsConfig(), set())
    assert len(ratings) == 2 and row.keys() == {"messages", "rating", "model", "time"}
    assert (row["messages"], row["rating"], row["model"]) == (RATING["messages"], "down", "chat")
    assert abs(datetime.now(UTC) - datetime.fromisoformat(row["time"])) < timedelta(minutes=1)


def test_of_a_conversation_rated_good_the_rated_answer_is_trained(tmp_path):
    rows = CollectedRows(tmp_path / "mine.jsonl", "chat")
    rows.write_rating({"messages": [*PROMPT, *answer("Bé."), *PROMPT[1:], *answer("Molt bé.")], "rating": "up"})
    loaded = load_dataset(
        "json", data_files=str(tmp_path / "mine.ratings.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    conversation = conversation_of_row(loaded[0], ColumnsConfig(), set())
    answers = [(message.content, message.trained) for message in conversation if message.role == "assistant"]
    assert answers == [("Bé.", False), ("Molt bé.", True)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": []}, {"prompt": None}, {"prompt": answer("x")}, {"chosen": PROMPT}, {"chosen": answer(" ")},
        {"chosen": [*PROMPT, *answer("x")]}, {"rejected": answer("Bé.")}, {"rejected": [1]},
        {"prompt": [{"role": "tool"}]}, {"prompt": [{"role": "user", "content": "x" * MAX_CHARACTERS}]},
        {"chosen": [{"role": "assistant", "content": 1}]},
    ],
)  # fmt: skip
def test_what_is_no_preference_is_refused_and_not_written(tmp_path, wrong):
    with pytest.raises(ApiError) as caught:
        CollectedRows(tmp_path / "mine.jsonl", "chat").write_preference(PREFERENCE | wrong)
    assert caught.value.status in (400, 413) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"rating": "good"}, {"rating": None}, {"rating": ["up"]}, {"messages": PROMPT}])
def test_what_is_no_rating_is_refused_and_not_written(tmp_path, wrong):
    with pytest.raises(ApiError):
        CollectedRows(tmp_path / "mine.jsonl", "chat").write_rating(RATING | wrong)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_threads_are_whole_lines_after_a_partial_one(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": [{"ro')  # a process that was killed
    rows = CollectedRows(path, "chat")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: rows.write_preference(PREFERENCE), range(40)))
    first, *others = path.read_text(encoding="utf-8").splitlines()
    assert first == '{"prompt": [{"ro' and len(others) == 40
    assert all(json.loads(line)["chosen"] == PREFERENCE["chosen"] for line in others)


def test_each_row_is_flushed_to_disk(tmp_path, disk_calls):
    CollectedRows(tmp_path / "mine.jsonl", "chat").write_rating(RATING)
    size = (tmp_path / "mine.ratings.jsonl").stat().st_size
    assert disk_calls.synced["mine.ratings.jsonl"] == size > 0


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "other.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("mine.json", "mine", "mine.txt"):
        with pytest.raises(UserError, match=r"give the name of a \.jsonl file"):
            CollectedRows(tmp_path / name, "chat")
    for name in ("nowhere/mine.jsonl", "link.jsonl", "folder.jsonl", "a\0b.jsonl"):
        with pytest.raises(UserError, match="cannot be written"):
            CollectedRows(tmp_path / name, "chat")


def test_a_disk_that_is_full_is_an_error_of_the_request(tmp_path, monkeypatch):
    def full(path: Path, line: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    rows = CollectedRows(tmp_path / "mine.jsonl", "chat")
    monkeypatch.setattr("cucafera.serving.collected.append_line", full)
    with pytest.raises(ApiError, match="No space left") as caught:
        rows.write_rating(RATING)
    assert caught.value.status == 503 and str(tmp_path) not in str(caught.value)


def test_the_page_posts_rows_that_the_server_writes(chat, base):
    path = chat.service._collected.preferences
    for address, body in (("/page/preference", PREFERENCE), ("/page/rating", RATING)):
        assert chat.post(address, json=body).status_code == 204
        assert base.post(address, json=body).json()["error"]["code"] == "not_collecting"
        assert base.post(address, json=body).status_code == 404
        assert chat.post(address, json=[]).status_code == 400
        assert chat.post(address, data=json.dumps(body)).status_code == 415  # what a form of another site could post
        assert chat.get(address).status_code == 405
    assert len(path.read_text().splitlines()) == len(path.with_suffix(".ratings.jsonl").read_text().splitlines()) == 1
