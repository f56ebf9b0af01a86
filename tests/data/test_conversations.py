"""Conversations in windows: none lost, none seen by another, and a window never without a target."""

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from datasets import Dataset
from pyarrow import parquet

from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.config.schema import Config, RolesConfig
from cucafera.config.tokens import IM_END_ID, PAD_ID
from cucafera.data.chatml import Message, Rendered, check_conversation, render
from cucafera.data.conversations import VERSION, ConversationWindows, TokenizedConversations
from cucafera.data.conversations import open_conversations as opened
from cucafera.data.run_data import short_hash
from cucafera.data.sources import open_source
from cucafera.data.sources.embedded import embedded_path
from cucafera.data.tokenizer import Tokenizer
from cucafera.data.windows import IGNORED, Window
from tests.support import SMALL_RUN

LENGTH = 64

CHAT_RUN = [
    *[override for override in SMALL_RUN if not override.startswith("data")],
    "data.prepared_dir=prepared",
    "data.validation_fraction=0.2",
    "tokenizer.path=tokenizer.json",
    "model.max_position_embeddings=64",
    "batch_tokens=512",
]


def tokenized(conversations: list[list[Message]], tokenizer: Tokenizer) -> TokenizedConversations:
    rendered = [Rendered(r.ids[:-1], r.trained[:-1]) for r in render(conversations, tokenizer)]
    return TokenizedConversations(
        np.concatenate([r.ids for r in rendered]),
        np.concatenate([r.trained for r in rendered]),
        np.cumsum([len(r.ids) for r in rendered]),
    )


def random_conversations(count: int, most_turns: int = 2, seed: int = 0) -> list[list[Message]]:
    generator = random.Random(seed)
    words = "la mar i el bosc són l'avi cantava".split()
    return [
        [
            Message(role, " ".join(generator.choices(words, k=generator.randint(1, 5))))
            for _ in range(generator.randint(1, most_turns))
            for role in ("user", "assistant")
        ]
        for _ in range(count)
    ]


def pieces(window: Window) -> list[list[int]]:
    """The conversations of a window: their tokens, with the last target."""
    found = []
    for document in range(int(window.documents.max()) + 1):
        positions = np.flatnonzero(window.documents == document)
        if len(positions) and (window.targets[positions] != IGNORED).any():
            found.append([*window.input_ids[positions].tolist(), int(window.targets[positions[-1]])])
    return found


def test_packing_loses_no_conversation(tokenizer):
    conversations = random_conversations(100)
    data = tokenized(conversations, tokenizer)
    windows = ConversationWindows(data, 200)
    assert (windows.kept, windows.cut, windows.left_out) == (100, 0, 0)
    packed = [piece for number in range(len(windows)) for piece in pieces(windows.window(number))]
    assert sorted(packed) == sorted(data.conversation(number).ids.tolist() for number in range(100))


def test_trained_tokens_are_exactly_the_answers(tokenizer):
    conversations = random_conversations(60)
    windows = ConversationWindows(tokenized(conversations, tokenizer), 200)
    trained = ""
    for number in range(len(windows)):
        targets = windows.window(number).targets
        trained += tokenizer.decode(targets[targets != IGNORED].tolist())
    answers = [message.content for messages in conversations for message in messages if message.role == "assistant"]
    assert sorted(trained.split("<im_end>")) == sorted(["", *answers])
    assert windows.targets == sum(
        int((windows.window(number).targets != IGNORED).sum()) for number in range(len(windows))
    )


def test_targets_are_the_next_tokens_of_the_same_conversation(tokenizer):
    windows = ConversationWindows(tokenized(random_conversations(60), tokenizer), 200)
    assert len(windows) > 5
    for number in range(len(windows)):
        ids, targets, documents, _ = windows.window(number)
        inside = np.flatnonzero((targets[:-1] != IGNORED) & (documents[:-1] == documents[1:]))
        assert len(inside)
        assert (targets[inside] == ids[inside + 1]).all()
        last = np.flatnonzero((targets[:-1] != IGNORED) & (documents[:-1] != documents[1:]))
        assert (targets[last] == IM_END_ID).all()


def test_padding_is_a_document_of_its_own_and_never_a_target(tokenizer):
    windows = ConversationWindows(tokenized(random_conversations(7), tokenizer), 200)
    padding = 0
    for number in range(len(windows)):
        ids, targets, documents, _ = windows.window(number)
        positions = ids == PAD_ID
        padding += int(positions.sum())
        assert (targets[positions] == IGNORED).all()
        assert set(documents[positions].tolist()).isdisjoint(documents[~positions].tolist())
    assert padding == len(windows) * 200 - windows.tokens


def test_a_vocabulary_of_65536_leaves_ignored_targets_ignored():
    ids = np.array([65_535, 4, 65_436, 5], dtype=np.uint16)
    windows = ConversationWindows(TokenizedConversations(ids, np.array([False, False, True, True]), np.array([4])), 8)
    assert windows.window(0).targets.tolist() == [IGNORED, 65_436, 5] + [IGNORED] * 5
    assert windows.window(0).input_ids.tolist() == [65_535, 4, 65_436] + [PAD_ID] * 5


def test_a_conversation_that_is_too_long_is_cut_after_the_last_answer_that_fits(tokenizer):
    turn = [Message("user", "mar"), Message("assistant", "bosc bosc")]
    endless = [Message("user", "mar"), Message("assistant", "bosc " * 200)]
    data = tokenized([turn * 10, turn, endless], tokenizer)
    windows = ConversationWindows(data, LENGTH)
    assert (windows.kept, windows.cut, windows.left_out) == (2, 1, 1)
    kept = sorted((piece for number in range(len(windows)) for piece in pieces(windows.window(number))), key=len)
    assert kept[0] == data.conversation(1).ids.tolist()
    long = data.conversation(0).ids.tolist()
    assert kept[1] == long[: len(kept[1])]
    assert kept[1][-1] == IM_END_ID
    fitting = [end for end in range(LENGTH + 1) if tokenizer.decode(long[: end + 1]).endswith("bosc<im_end>")]
    assert len(kept[1]) == fitting[-1] + 1


@pytest.mark.parametrize(("spare", "kept", "cut"), [(1, 1, 0), (0, 1, 0), (-1, 0, 0)])
def test_a_conversation_may_take_exactly_one_window(tokenizer, spare, kept, cut):
    data = tokenized([[Message("user", "mar"), Message("assistant", "bosc bosc")]], tokenizer)
    ids = data.conversation(0).ids.tolist()
    windows = ConversationWindows(data, len(ids) - 1 + spare)  # the last token is only a target
    assert (windows.kept, windows.cut, windows.left_out) == (kept, cut, 1 - kept)
    if kept:
        window = windows.window(0)
        assert window.input_ids[: len(ids) - 1].tolist() == ids[:-1] and window.targets[len(ids) - 2] == IM_END_ID


@pytest.mark.parametrize(("spare", "turns"), [(1, 2), (0, 2), (-1, 1)])
def test_a_conversation_is_cut_after_an_answer_that_ends_exactly_with_the_window(tokenizer, spare, turns):
    turn = [Message("user", "mar"), Message("assistant", "bosc bosc")]
    data = tokenized([turn * 3], tokenizer)
    ids = data.conversation(0).ids
    ends = np.flatnonzero(data.conversation(0).trained & (ids == IM_END_ID))
    windows = ConversationWindows(data, int(ends[1]) + spare)
    assert (windows.kept, windows.cut) == (1, 1)
    (piece,) = pieces(windows.window(0))
    assert piece == ids[: ends[turns - 1] + 1].tolist()
    assert windows.targets == turns * int(data.conversation(0).trained[: ends[0] + 1].sum())


def test_nothing_fits(tokenizer):
    endless = [[Message("user", "mar"), Message("assistant", "bosc " * 200)]] * 3
    windows = ConversationWindows(tokenized(endless, tokenizer), LENGTH)
    assert (len(windows), windows.kept, windows.left_out) == (0, 0, 3)


# From files, through the data module


@pytest.fixture
def chat_run(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Composes a run on rows of a file, with the small tokenizer."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")

    def compose(rows: list[dict], *overrides: str, path: str = "chat.jsonl") -> Config:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return composed_config([*CHAT_RUN, "data=chat_files", f"data.sources.files.path={path}", *overrides])

    return compose


def rows_of(conversations: list[list[Message]]) -> list[dict]:
    return [{"messages": [{"role": role, "content": text} for role, text, _ in messages]} for messages in conversations]


def test_the_split_is_by_the_first_question_and_does_not_depend_on_the_other_rows(chat_run):
    conversations = random_conversations(120, most_turns=1, seed=3)
    copies = [[messages[0], Message("assistant", "la mar")] for messages in conversations]
    data = opened(chat_run(rows_of(conversations + copies)))
    questions = [set(), set()]
    for side, sources in enumerate((data.training, data.validation)):
        for number in range(len(sources[0])):
            for piece in pieces(sources[0].window(number)):
                questions[side].add(data.tokenizer.decode(piece).split("<im_end>")[0])
    assert questions[0] and questions[1]
    assert not questions[0] & questions[1]
    again = opened(chat_run(rows_of(conversations[:60]), path="fewer.jsonl"))
    for number in range(len(again.validation[0])):
        for piece in pieces(again.validation[0].window(number)):
            assert data.tokenizer.decode(piece).split("<im_end>")[0] in questions[1]


def test_the_same_question_is_on_one_side_whatever_surrounds_it(chat_run):
    def rows(count: int, before) -> list[dict]:
        generator = random.Random(5)
        questions = [f"la mar {number} " + generator.choice(["bosc", "sol"]) for number in range(count)]
        return rows_of(
            [
                [*before(copy), Message("user", question), Message("assistant", "si")]
                for question in questions
                for copy in range(3)
            ]
        )

    for name, before in (
        ("systems", lambda copy: [Message("system", f"sistema {copy}")]),
        ("one-system", lambda copy: [Message("system", "sistema")]),
        ("greetings", lambda copy: [Message("assistant", "hola")]),
    ):
        data = opened(chat_run(rows(40, before), path=f"{name}.jsonl"))
        sides = []
        for source in (data.training[0], data.validation[0]):
            texts = [data.tokenizer.decode(piece) for n in range(len(source)) for piece in pieces(source.window(n))]
            sides.append({text.split("user\n")[1].split("<im_end>")[0] for text in texts})
        assert sides[0] and sides[1], name
        assert not sides[0] & sides[1], name


def test_the_first_question_decides_the_side(chat_run):
    conversations = [
        [Message(role, text) for turn in (first, second) for role, text in (("user", turn), ("assistant", "si"))]
        for first in (f"la mar {number}" for number in range(30))
        for second in ("bosc", "sol", "avi")
    ]
    data = opened(chat_run(rows_of(conversations)))
    sides = []
    for source in (data.training[0], data.validation[0]):
        texts = [data.tokenizer.decode(piece) for n in range(len(source)) for piece in pieces(source.window(n))]
        sides.append([text.split("user\n")[1].split("<im_end>")[0] for text in texts])
    assert sides[0] and sides[1] and not set(sides[0]) & set(sides[1])
    assert {sides[side].count(question) for side in (0, 1) for question in sides[side]} == {3}


def test_rows_that_cannot_even_be_read_are_left_out_and_counted(chat_run):
    rows = rows_of(random_conversations(40))
    config = chat_run(rows, "data.skip_broken_lines=true")
    with Path("chat.jsonl").open("a") as file:
        file.write('{"n": ' + "9" * 5000 + "}\n")
    opened(config)
    (summary,) = Path("prepared").glob("conversations-*/prepared.json")
    assert json.loads(summary.read_text())["broken"] == 1
    dates = pyarrow.array([2**62] * 40, pyarrow.timestamp("us"))
    table = pyarrow.Table.from_pylist(rows).append_column("when", dates)
    parquet.write_table(table, "dates.parquet")
    with pytest.raises(UserError, match=r"dates\.parquet, row 1: "):
        opened(composed_config([*CHAT_RUN, "data=chat_files", "data.sources.files.path=dates.parquet"]))


def test_prepared_conversations_are_made_once_and_described_alike(chat_run, monkeypatch):
    rows = [row | {f"column{number}": 1} for number, row in enumerate(rows_of(random_conversations(40)), 10)]
    config = chat_run(rows)
    first = opened(config)
    monkeypatch.setattr("cucafera.data.conversations.render", None)
    again = opened(config)
    assert again.fingerprints == first.fingerprints
    assert again.describe() == first.describe()
    assert "columns and keys that are not used: column10, column11" in first.describe()
    assert "column29 and 20 more\n" in first.describe()


def test_conversations_with_one_first_question_are_split_by_the_rest(chat_run):
    rest = random_conversations(60)
    alike = [[Message("user", "Explica'm un conte"), Message("assistant", "Quin?"), *messages] for messages in rest]
    data = opened(chat_run(rows_of(alike)))
    assert data.training[0].kept + data.validation[0].kept == 60
    assert data.validation[0].kept > 0
    assert "held out by the hash of the complete conversation" in data.describe()
    (summary,) = Path("prepared").glob("conversations-*/prepared.json")
    assert json.loads(summary.read_text())["split_by_conversation"]
    assert "by the hash of the complete" not in opened(chat_run(rows_of(rest), path="varied.jsonl")).describe()


def test_a_language_is_part_of_what_is_prepared_only_if_it_is_named(chat_run, tokenizer, monkeypatch):
    monkeypatch.setattr("cucafera.data.language.language_of", lambda text: "ca")
    config = chat_run(rows_of(random_conversations(40)))
    opened(config)
    source = open_source("files", config.data.sources["files"]).fingerprint()
    before_there_were_languages = short_hash(source, tokenizer.fingerprint, VERSION, 0.2, False, None)
    (folder,) = Path("prepared").glob("conversations-*[0-9a-f]")
    assert folder.name == f"conversations-{before_there_were_languages}"
    config.data.language = "ca"
    opened(config)
    assert len([*Path("prepared").glob("conversations-*/prepared.json")]) == 2


def test_a_map_of_roles_is_part_of_what_is_prepared(chat_run):
    rows = rows_of(random_conversations(40))
    config = chat_run(
        [{"messages": [turns[0] | {"role": "client"}, *turns[1:]]} for turns in (row["messages"] for row in rows)],
        "data.sources.files.columns.roles.user=[client]",
    )
    assert opened(config).training[0].kept
    source = config.data.sources["files"]
    key = open_source("files", source).fingerprint()
    source.columns.roles = RolesConfig(system=["client"])
    assert open_source("files", source).fingerprint() != key


def test_prepared_conversations_are_on_disk_before_their_summary_and_their_name(chat_run, disk_calls):
    opened(chat_run(rows_of(random_conversations(40))))
    (folder,) = Path("prepared").glob("conversations-*[0-9a-f]")
    files = ["train.npz", "validation.npz"]
    assert [call for call in disk_calls if folder.name not in call] == [
        *(f"fsync {name}" for name in files), "fsync prepared.json.partial",
        "rename prepared.json.partial prepared.json",
    ]  # fmt: skip
    assert [disk_calls.synced[name] for name in files] == [(folder / name).stat().st_size for name in files]
    assert disk_calls[-1] == f"rename {folder.name}.partial {folder.name}"


def test_damaged_conversations_are_refused(chat_run):
    config = chat_run(rows_of(random_conversations(40)))
    opened(config)
    (path,) = Path("prepared").glob("conversations-*/train.npz")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"train\.npz is damaged: .*Delete the folder .*conversations-"):
        opened(config)


def test_a_broken_row_is_refused_with_its_line_or_left_out_and_counted(chat_run):
    rows = rows_of(random_conversations(40))
    rows[7] = {"messages": [{"role": "robot", "content": "x"}]}
    with pytest.raises(UserError, match=r"chat\.jsonl:8: message 1 has the role 'robot'.*skip_broken_lines=true"):
        opened(chat_run(rows))
    data = opened(chat_run(rows, "data.skip_broken_lines=true"))
    line = str(data.left_out[0])
    assert line.startswith("files: 1 of 40 (2.5%) conversations could not be used: left out; the first: chat.jsonl:8: ")
    (summary,) = Path("prepared").glob("conversations-*/prepared.json")
    content = json.loads(summary.read_text())
    assert content["broken"] == 1
    assert "chat.jsonl:8" in content["first_broken"]
    assert content["conversations"] + content["held_out"] == 39


def test_repetitive_answers_are_left_out_and_counted(chat_run):
    rows = rows_of(random_conversations(40))
    rows[3] = {"prompt": "x", "completion": "un dos tres quatre cinc " * 20}
    data = opened(chat_run(rows, "data.max_5gram_repeats=15"))
    assert [str(entry) for entry in data.left_out] == [
        "files: 1 of 40 (2.5%) conversations left out: an answer repeats itself",
        "files: 4 of 39 (10.3%) conversations are longer than a window: cut after an answer",
    ]
    (summary,) = Path("prepared").glob("conversations-*/prepared.json")
    assert json.loads(summary.read_text())["repetitive"] == 1


def test_a_source_without_a_usable_conversation_is_refused(chat_run):
    with pytest.raises(UserError, match=r"holds no conversation to train on: 1 could not be used.*chat\.jsonl:1: no "):
        opened(chat_run([{"text": "x"}], "data.skip_broken_lines=true"))
    endless = {"prompt": "x", "completion": "mar i bosc " * 100}
    with pytest.raises(UserError, match="not one of 1 conversation has an answer that ends within the window of 64"):
        opened(chat_run([endless], "data.validation_fraction=1e-9", path="long.jsonl"))
    mixed = [{"prompt": "x", "completion": "y"}, *[endless | {"prompt": f"x{n}"} for n in range(40)]]
    with pytest.raises(UserError, match="not one of the held-out conversations has an answer that ends within"):
        opened(chat_run(mixed, path="mixed.jsonl"))
    with pytest.raises(UserError, match="no conversation is held out for validation"):
        opened(chat_run(rows_of(random_conversations(3)), "data.validation_fraction=1e-9", path="few.jsonl"))
    Path("chat.txt").write_text("Hola")
    with pytest.raises(UserError, match=r"chat\.txt is a \.txt file, which has no columns"):
        opened(chat_run([], path="chat.txt"))


def test_names_that_are_no_text_are_stored_and_printed_as_escapes(chat_run):
    rows = [row | {"\ud800\nx": 1} for row in rows_of(random_conversations(40))]
    described = opened(chat_run(rows)).describe()
    assert r"columns and keys that are not used: \ud800\nx" in described.splitlines()[1]


def test_parquet_and_datasets_give_the_same_conversations_as_jsonl(chat_run, monkeypatch):
    rows = rows_of(random_conversations(40, most_turns=3))
    for row in rows[::2]:
        row["messages"] += [{"role": "assistant", "content": "dolent", "weight": 0}, *row["messages"]]
    data = opened(chat_run(rows))
    text = "".join(
        data.tokenizer.decode(targets[targets != IGNORED].tolist())
        for targets in (data.training[0].window(number).targets for number in range(len(data.training[0])))
    )
    assert text.count("<im_end>") > 40 and "dolent" not in text
    fingerprint = data.fingerprints["data.sources.files"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), "chat.parquet")
    from_parquet = composed_config([*CHAT_RUN, "data=chat_files", "data.sources.files.path=chat.parquet"])
    assert opened(from_parquet).fingerprints["data.sources.files"] == fingerprint
    monkeypatch.setattr("cucafera.data.sources.hub.hub_problem", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *arguments, **settings: SimpleNamespace(sha="1"))
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **settings: Dataset.from_list(rows))
    from_hub = composed_config([*CHAT_RUN, "data=chat", "data.sources.patufet_conversa.dataset=a/b"])
    assert opened(from_hub).fingerprints["data.sources.patufet_conversa"] == fingerprint


def test_a_step_is_the_same_for_one_device_and_the_shares_of_two(chat_run):
    data = opened(chat_run(rows_of(random_conversations(80))))
    steps = data.training_steps(())
    for step in range(4):
        whole = steps[step]
        shares = [data.training_steps((), rank, 2)[step] for rank in (0, 1)]
        for field in ("input_ids", "targets", "documents"):
            assert torch.equal(getattr(whole, field), torch.cat([getattr(share, field) for share in shares]))


def test_two_sources_are_mixed_by_their_weights(chat_run):
    first, second = random_conversations(60, seed=1), random_conversations(60, seed=2)
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(second)))
    data = opened(chat_run(rows_of(first), "+data.sources.other.path=other.jsonl", "+data.sources.other.weight=3"))
    windows = [len(source) for source in data.training]
    assert data.order.windows_per_epoch == windows[0] + 3 * windows[1]


def test_the_first_conversation_is_shown_with_what_is_trained(chat_run):
    conversation = [Message("user", "Hola mar"), Message("assistant", "Bon dia")]
    text = opened(chat_run(rows_of([conversation] * 3 + random_conversations(30)))).describe()
    assert "conversations in" in text and "padding" in text
    shown = text.split("the text in ⟦ ⟧ is trained on:")[1]
    assert shown.count("<im_start>assistant") == shown.count("⟦") > 0
    assert all(part.split("⟧")[0].endswith("<im_end>") for part in shown.split("⟦")[1:])


# The conversations of the package


@pytest.fixture(scope="module")
def embedded() -> list[dict]:
    return [json.loads(line) for line in embedded_path("conversations").read_text(encoding="utf-8").splitlines()]


def test_the_embedded_conversations_are_many_varied_and_complete(embedded):
    assert len(embedded) >= 300
    topics = {row["topic"] for row in embedded}
    assert {"salutació", "identitat", "tasca", "correcció", "no ho sé", "refús", "preguntar", "idiomes"} < topics
    assert sum(len(row["messages"]) > 2 for row in embedded) >= 50
    assert sum(len(row["messages"]) >= 8 for row in embedded) >= 8
    assert sum(row["messages"][0]["role"] == "system" for row in embedded) >= 8
    for row in embedded:
        conversation = [Message(**message) for message in row["messages"]]
        check_conversation(conversation)
        turns = [message.role for message in conversation if message.role != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(message.content == message.content.strip() for message in conversation)


def test_no_embedded_question_is_asked_twice(embedded):
    questions = [message["content"] for row in embedded for message in row["messages"][:2] if message["role"] == "user"]
    assert len(set(questions)) == len(questions)


def test_embedded_answers_begin_in_many_ways_and_are_not_repeated(embedded):
    answers = [message["content"] for row in embedded for message in row["messages"] if message["role"] == "assistant"]
    assert Counter(answers).most_common(1)[0][1] <= 2
    first_words = Counter(answer.split()[0].strip("«.,!:") for answer in answers)
    assert max(first_words.values()) <= len(answers) // 8, first_words.most_common(3)
