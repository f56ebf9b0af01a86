"""Pairs in windows: none parted, none lost, only answers compared, and a prompt never on both sides."""

import json
import random
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
from cucafera.config.schema import Config
from cucafera.config.tokens import IM_END_ID, PAD_ID
from cucafera.data.chatml import Message, render, up_to_last_answer
from cucafera.data.preferences import PreferenceData, PreferenceWindows, held_out_pairs
from cucafera.data.preferences import open_preferences as opened
from cucafera.data.sources import is_held_out
from cucafera.data.split import first_question
from cucafera.data.tokenized_conversations import joined
from cucafera.data.tokenizer import Tokenizer
from cucafera.data.windows import IGNORED, batch_of_windows
from tests.support import SMALL_RUN

LENGTH = 128

PAIR_RUN = [
    *[override for override in SMALL_RUN if not override.startswith(("data", "sequence_length"))],
    *("data.prepared_dir=prepared", "data.validation_fraction=0.2", "tokenizer.path=tokenizer.json"),
    "init_from=outputs/chat",
    *(f"sequence_length={LENGTH}", f"model.max_position_embeddings={LENGTH}", "batch_tokens=1024"),
]


def random_rows(count: int, seed: int = 0, turns: int = 2) -> list[dict]:
    """Pairs whose prompts differ, of up to `turns` questions."""
    generator = random.Random(seed)
    words = "la mar i el bosc són l'avi cantava".split()

    def text() -> str:
        return " ".join(generator.choices(words, k=generator.randint(1, 4)))

    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"{number} {text()}"}]
        for _ in range(generator.randint(0, turns - 1)):
            prompt += [{"role": "assistant", "content": text()}, {"role": "user", "content": text()}]
        rows.append({"prompt": prompt, "chosen": f"si {text()}", "rejected": f"no {text()}"})
    return rows


def conversations_of(row: dict) -> list[list[Message]]:
    prompt = [Message(**message, trained=False) for message in row["prompt"]]
    return [[*prompt, Message("assistant", row[answer])] for answer in ("chosen", "rejected")]


def windows_of(rows: list[dict], tokenizer: Tokenizer, length: int = LENGTH) -> PreferenceWindows:
    rendered = render([conversation for row in rows for conversation in conversations_of(row)], tokenizer)
    return PreferenceWindows(joined([up_to_last_answer(tokens) for tokens in rendered]), length)


def documents_of(windows: PreferenceWindows, number: int) -> list[tuple[list[int], list[int]]]:
    """The documents of a window: their tokens with the last target, and their targets."""
    window = windows.window(number)
    found = []
    for document in range(2 * len(windows.pairs_of(number))):
        (positions,) = np.nonzero(window.documents == document)
        targets = window.targets[positions]
        found.append(([*window.input_ids[positions].tolist(), int(targets[-1])], targets[targets != IGNORED].tolist()))
    return found


# Windows


def test_both_answers_of_every_pair_are_neighbours_in_one_window(tokenizer):
    windows = windows_of(random_rows(60), tokenizer)
    assert windows.pairs == windows.kept + windows.left_out == 60 and windows.kept > 40
    numbers = [pair for number in range(len(windows)) for pair in windows.pairs_of(number)]
    assert sorted(numbers) == sorted({*numbers}) and len(numbers) == windows.kept
    assert any(len(windows.pairs_of(number)) > 1 for number in range(len(windows)))
    for number in range(len(windows)):
        found = [ids for ids, _ in documents_of(windows, number)]
        pairs = windows.pairs_of(number)
        assert found == [
            windows.conversations.conversation(2 * p + side).ids.tolist() for p in pairs for side in (0, 1)
        ]


def test_targets_are_exactly_the_answers_and_their_ends(tokenizer):
    rows = random_rows(60, turns=3)
    windows = windows_of(rows, tokenizer)
    targets = 0
    for number in range(len(windows)):
        documents = documents_of(windows, number)
        answers = [rows[pair][side] for pair in windows.pairs_of(number) for side in ("chosen", "rejected")]
        assert [tokenizer.decode(found) for _, found in documents] == [f"{answer}<im_end>" for answer in answers]
        assert all(found[-1] == IM_END_ID for _, found in documents)
        targets += sum(len(found) for _, found in documents)
    assert targets == windows.targets


def test_padding_is_the_last_document_and_never_a_target(tokenizer):
    windows = windows_of(random_rows(60), tokenizer)
    padding = 0
    for number in range(len(windows)):
        ids, targets, documents, logprobs = windows.window(number)
        positions = ids == PAD_ID
        assert (targets[positions] == IGNORED).all() and logprobs is None
        assert (documents[positions] == 2 * len(windows.pairs_of(number))).all()
        assert (np.diff(documents) >= 0).all() and (np.diff(documents) <= 1).all()
        padding += int(positions.sum())
    assert padding == len(windows) * LENGTH - windows.tokens


@pytest.mark.parametrize(("spare", "kept"), [(1, 1), (0, 1), (-1, 0)])
def test_a_pair_may_take_exactly_one_window(tokenizer, spare, kept):
    row = random_rows(1)
    size = sum(len(windows_of(row, tokenizer).conversations.conversation(side).ids) - 1 for side in (0, 1))
    windows = windows_of(row, tokenizer, size + spare)
    assert (len(windows), windows.kept, windows.left_out) == (kept, kept, 1 - kept)
    assert windows.lengths(10).tolist() == [size], "the positions that a pair takes"
    assert (windows.tokens, windows.targets > 0) == (kept * size, bool(kept))


def test_without_pairs_there_are_no_windows(tokenizer):
    windows = PreferenceWindows(joined([]), LENGTH)
    assert (len(windows), windows.pairs, windows.tokens, windows.targets) == (0, 0, 0, 0)


def test_a_vocabulary_of_65536_leaves_ignored_targets_ignored(tokenizer):
    windows = windows_of(random_rows(1), tokenizer)
    ids = windows.conversations.ids
    ids[windows.conversations.trained] = 65_436  # IGNORED as uint16
    targets = windows.window(0).targets
    assert int((targets == 65_436).sum()) == windows.targets and (targets == IGNORED).any()


def test_reference_logprobs_go_with_their_pairs_into_windows_and_batches(tokenizer):
    windows = windows_of(random_rows(60), tokenizer)
    windows.reference_logprobs = np.arange(120, dtype=np.float64).reshape(60, 2)
    numbers = sorted(range(len(windows)), key=lambda number: len(windows.pairs_of(number)))
    few, many = numbers[0], numbers[-1]
    expected = [[float(2 * pair + side) for pair in windows.pairs_of(n) for side in (0, 1)] for n in (few, many)]
    assert [windows.window(number).reference_logprobs.tolist() for number in (few, many)] == expected

    batch = batch_of_windows([windows.window(few), windows.window(many)], document_masking=True)
    found = batch.reference_logprobs
    assert found.dtype == torch.float64 and found.shape == (2, max(batch.document_counts))
    assert found[0].tolist() == expected[0] + [0.0] * (found.shape[1] - len(expected[0]))
    assert found[1, : len(expected[1])].tolist() == expected[1]
    assert [part.reference_logprobs.tolist() for part in batch.split(1)] == [[row] for row in found.tolist()]
    padded = batch.padded(4)
    assert torch.equal(padded.reference_logprobs[:2], found) and not padded.reference_logprobs[2:].any()
    assert padded.reference_logprobs.shape == (4, found.shape[1])


# From files, through the data of a run


@pytest.fixture
def pair_run(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Composes a run on rows of a file, with the small tokenizer."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")

    def compose(rows: list[dict], *overrides: str, path: str = "pairs.jsonl") -> Config:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return composed_config([*PAIR_RUN, "data=preference_files", f"data.sources.files.path={path}",
                                "data.validation_fraction=0.2", *overrides])  # fmt: skip

    return compose


def prompts_of(data: PreferenceData) -> list[set[str]]:
    """The last questions of training and of held-out pairs."""
    return [
        {
            data.tokenizer.decode(ids).rpartition("user\n")[2].split("<im_end>")[0]
            for windows in side
            for number in range(len(windows))
            for ids, _ in documents_of(windows, number)
        }
        for side in (data.training, data.validation)
    ]


def summary() -> dict:
    (path,) = Path("prepared").glob("preferences-*/prepared.json")
    return json.loads(path.read_text())


def test_a_prompt_is_on_one_side_whatever_its_system_message_and_the_other_rows(pair_run):
    rows = random_rows(60, turns=1)
    copies = [{"system": f"sistema {n % 3}"} | row | {"rejected": "res"} for n, row in enumerate(rows)]
    training, held_out = prompts_of(opened(pair_run(rows + copies)))
    assert training and held_out and not training & held_out
    fewer = prompts_of(opened(pair_run(rows[:20][::-1], path="fewer.jsonl")))
    assert fewer[0] <= training and fewer[1] <= held_out and fewer[1]


def test_a_question_that_finetuning_holds_out_is_held_out_of_pairs(pair_run):
    rows = random_rows(60)
    questions = {}
    for text in (row["prompt"][0]["content"] for row in rows):
        questions[text] = is_held_out(first_question([Message("user", text), Message("assistant", "x")]), 0.1)
    assert 0 < sum(questions.values()) < 60
    data = opened(pair_run(rows))
    training = {
        data.tokenizer.decode(ids).split("user\n")[1].split("<im_end>")[0]
        for number in range(len(data.training[0]))
        for ids, _ in documents_of(data.training[0], number)
    }
    assert training and not {text for text, held_out in questions.items() if held_out} & training


def test_pairs_with_one_first_question_are_split_by_the_rest_of_their_prompts(pair_run):
    greeting = [{"role": "user", "content": "hola"}, {"role": "assistant", "content": "bon dia"}]
    rows = [row | {"prompt": greeting + row["prompt"]} for row in random_rows(60, turns=1)]
    data = opened(pair_run(rows + [row | {"rejected": "res"} for row in rows]))
    training, held_out = prompts_of(data)
    assert training and held_out and not training & held_out
    assert "held out by the hash of the complete prompt: by that of the first question" in data.describe()
    assert summary()["split_by_prompt"]
    assert "of the complete prompt" not in opened(pair_run(random_rows(40), path="varied.jsonl")).describe()


def test_pairs_with_one_first_question_are_split_without_their_system_messages(pair_run):
    rows = [row | {"prompt": [{"role": "user", "content": "a"}] + row["prompt"]} for row in random_rows(60, turns=1)]
    copies = [{"system": f"s{n % 3}"} | row | {"rejected": "res"} for n, row in enumerate(rows)]
    data = opened(pair_run(rows + copies))
    training, held_out = prompts_of(data)
    assert training and held_out and not training & held_out
    assert summary()["split_by_prompt"] and data.training[0].kept > 80


def test_pairs_are_prepared_once(pair_run, monkeypatch):
    config = pair_run([row | {f"column{n}": 1} for n, row in enumerate(random_rows(40), 10)])
    first = opened(config)
    monkeypatch.setattr("cucafera.data.preferences.render", None)
    again = opened(config)
    assert again.fingerprints == first.fingerprints and again.describe() == first.describe()
    assert "columns and keys that are not used: column10, column11" in first.describe()
    assert "column29 and 20 more\n" in first.describe()


def test_the_first_pair_is_shown_with_what_is_compared(pair_run):
    shown = opened(pair_run(random_rows(40))).describe().split("the better one first:\n")[1]
    better, worse = (part.split("⟧")[0] for part in shown.split("⟦")[1:])
    assert better.startswith("si ") and worse.startswith("no ")
    assert better.endswith("<im_end>") and worse.endswith("<im_end>")


def test_an_answer_that_was_cut_is_compared_without_an_end(pair_run):
    rows = [row | {"finish_reasons": ["stop", "length"]} for row in random_rows(40)]
    data = opened(pair_run(rows))
    ends = []
    for windows in (*data.training, *data.validation):
        for number in range(len(windows)):
            ends += [(ids[-1] == IM_END_ID, targets[-1] == ids[-1]) for ids, targets in documents_of(windows, number)]
    assert ends == [(True, True), (False, True)] * 40  # the last target of a worse answer is one of its words
    assert "not used" not in data.describe()


def test_the_held_out_pairs_of_a_run_are_found_again(pair_run):
    config = pair_run(random_rows(40))
    data = opened(config)
    fingerprint = data.fingerprints["data.sources.files"]
    found = held_out_pairs(Path("prepared"), fingerprint, config.model.vocab_size)
    assert found is not None and np.array_equal(found.ids, data.validation[0].conversations.ids)
    assert held_out_pairs(Path("prepared"), "another", config.model.vocab_size) is None


def test_pairs_that_differ_only_in_what_is_held_out_have_other_fingerprints(pair_run):
    rows = random_rows(40)
    first = opened(pair_run(rows))
    held_out = next(number for number, row in enumerate(rows) if is_held_out(row["prompt"][0]["content"], 0.2))
    config = pair_run([*rows[:held_out], *rows[held_out + 1 :]])
    second = opened(config)
    assert np.array_equal(first.training[0].conversations.ids, second.training[0].conversations.ids)
    assert first.validation[0].pairs == second.validation[0].pairs + 1
    fingerprints = [data.fingerprints["data.sources.files"] for data in (first, second)]
    assert fingerprints[0] != fingerprints[1]
    for data, fingerprint in zip((first, second), fingerprints, strict=True):
        found = held_out_pairs(Path("prepared"), fingerprint, config.model.vocab_size)
        assert found is not None and np.array_equal(found.ids, data.validation[0].conversations.ids)


def test_damaged_pairs_are_refused(pair_run):
    config = pair_run(random_rows(40))
    opened(config)
    (path,) = Path("prepared").glob("preferences-*/validation.npz")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"validation\.npz is damaged: .*Delete the folder .*preferences-"):
        opened(config)


BROKEN_ROWS = [
    ({"chosen": "si", "rejected": "si", "prompt": "x"}, "the better and the worse answer are the same"),
    ({"chosen": "si", "rejected": "", "prompt": "x"}, "rejected is empty"),
    ({"chosen": "si", "rejected": "no"}, "it has no prompt, and chosen is a text"),
    ({"prompt": "x", "completion": "si", "label": True}, r"no pair is recognized .*\(KTO\)"),
    ({"prompt": "x", "chosen": "si"}, "it has chosen, and no other answer to compare with"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no pair is recognized in the columns messages"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN_ROWS)
def test_a_broken_row_is_refused_with_its_line_or_left_out_and_counted(pair_run, row, message):
    rows = random_rows(40)
    rows[7] = row
    with pytest.raises(UserError, match=rf"pairs\.jsonl:8: {message}.*skip_broken_lines=true"):
        opened(pair_run(rows))
    data = opened(pair_run(rows, "data.skip_broken_lines=true"))
    entry = next(str(entry) for entry in data.left_out if "could not be used" in str(entry))
    assert entry.startswith("files: 1 of 40 (2.5%) pairs could not be used: left out; the first: pairs.jsonl:8: ")
    assert summary()["broken"] == 1 and summary()["pairs"] + summary()["held_out"] == 39


def test_what_cannot_be_read_is_refused_with_its_line(pair_run):
    config = pair_run(random_rows(3))
    with Path("pairs.jsonl").open("a") as file:
        file.write('{"prompt": "x", \n')
    with pytest.raises(UserError, match=r"pairs\.jsonl:4: "):
        opened(config)
    Path("pairs.txt").write_text("Hola")
    config.data.sources["files"].path = "pairs.txt"
    with pytest.raises(UserError, match=r"pairs\.txt is a \.txt file, which has no columns"):
        opened(config)


def test_pairs_that_fit_no_window_are_counted_or_refused(pair_run):
    endless = [{"prompt": f"x{n}", "chosen": "mar i bosc " * 60, "rejected": "no"} for n in range(40)]
    data = opened(pair_run([*random_rows(40), *endless[:2]]))
    assert [str(entry) for entry in data.left_out if "fit a window" in str(entry)] == [
        "files: 2 of 42 (4.8%) pairs left out: both conversations do not fit a window together"
    ]
    with pytest.raises(UserError, match=r"not one of \d+ pairs fits the window of 128 tokens with both answers"):
        opened(pair_run(endless, path="long.jsonl"))
    rows = random_rows(20, turns=1)
    training = prompts_of(opened(pair_run(rows, path="short.jsonl")))[0]
    rows = [row for row in rows if row["prompt"][-1]["content"] in training]
    with pytest.raises(UserError, match="not one of the held-out pairs fits the window of 128 tokens"):
        opened(pair_run([*rows, *endless], path="mixed.jsonl"))


def test_a_source_without_pairs_for_each_side_is_refused(pair_run):
    with pytest.raises(UserError, match=r"holds no pair to train on: 1 could not be used.*pairs\.jsonl:1: no pair"):
        opened(pair_run([{"text": "x"}], "data.skip_broken_lines=true"))
    with pytest.raises(UserError, match=r"no pair is held out for validation \(data\.validation_fraction=1e-09\)"):
        opened(pair_run(random_rows(3), "data.validation_fraction=1e-9", path="few.jsonl"))


def test_pairs_whose_better_answer_repeats_itself_are_left_out_and_counted(pair_run):
    rows = random_rows(40)
    rows[3]["chosen"] = rows[4]["rejected"] = "un dos tres quatre cinc " * 3
    data = opened(pair_run(rows, "data.max_5gram_repeats=3"))
    assert "files: 1 of 40 (2.5%) pairs left out: the better answer repeats itself" in map(str, data.left_out)
    assert summary()["repetitive"] == 1


def test_pairs_whose_better_answer_is_in_another_language_are_left_out_and_counted(pair_run, monkeypatch):
    asked = []

    def language_of(text: str) -> str | None:
        asked.append(text)
        return {"s": "ca", "y": "en"}.get(text[0])

    monkeypatch.setattr("cucafera.data.language.language_of", language_of)
    rows = random_rows(40)
    rows[3]["chosen"], rows[4]["chosen"], rows[5]["rejected"] = "yes", "?", "yes"
    data = opened(pair_run(rows, "data.language=ca"))
    assert "files: 1 of 40 (2.5%) pairs left out: the better answer is in another language" in map(str, data.left_out)
    assert asked == [row["chosen"] for row in rows], "the worse answer may be worse because of its language"
    assert summary()["other_language"] == 1 and summary()["pairs"] + summary()["held_out"] == 39


def test_english_answers_are_left_out_of_catalan_pairs(pair_run):
    pytest.importorskip("py3langid")
    rows = [row | {"chosen": "El bosc és fosc i la mar és freda."} for row in random_rows(30, turns=1)]
    rows[3]["chosen"] = rows[4]["rejected"] = "The forest is dark and the sea is cold."
    opened(pair_run(rows, "data.language=ca"))
    assert summary()["other_language"] == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [("data.language=ca", "data.language=null"), ("data.max_5gram_repeats=3", "data.max_5gram_repeats=4"),
     ("data.skip_broken_lines=true", "data.skip_broken_lines=false"),
     ("data.sources.files.columns.ignore=[]", "data.sources.files.columns.ignore=[a]")],
)  # fmt: skip
def test_pairs_are_prepared_for_their_settings(pair_run, monkeypatch, first, second):
    monkeypatch.setattr("cucafera.data.language.language_of", lambda text: "ca")
    rows = random_rows(40)
    opened(pair_run(rows, first))
    opened(composed_config([*PAIR_RUN, "data=preference_files", "data.sources.files.path=pairs.jsonl", second]))
    assert len([*Path("prepared").glob("preferences-*/prepared.json")]) == 2


def test_parquet_and_datasets_give_the_same_pairs_as_jsonl(pair_run, monkeypatch):
    rows = random_rows(40, turns=3)
    for row in rows[::2]:
        row["prompt"][0]["name"] = "Pere"
    fingerprint = opened(pair_run(rows)).fingerprints["data.sources.files"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), "pairs.parquet")
    overrides = [*PAIR_RUN, "data=preference_files", "data.sources.files.path=pairs.parquet"]
    from_parquet = composed_config([*overrides, "data.validation_fraction=0.2"])
    assert opened(from_parquet).fingerprints["data.sources.files"] == fingerprint
    monkeypatch.setattr("cucafera.data.sources.hub.hub_problem", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *arguments, **settings: SimpleNamespace(sha="1"))
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **settings: Dataset.from_list(rows))
    overrides = [*PAIR_RUN, "data=preference_hub", "data.sources.hub.dataset=a/b", "data.validation_fraction=0.2"]
    assert opened(composed_config(overrides)).fingerprints["data.sources.hub"] == fingerprint


def test_two_sources_are_mixed_by_their_weights(pair_run):
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in random_rows(60, seed=2)))
    other = ("+data.sources.other.path=other.jsonl", "+data.sources.other.weight=3")
    data = opened(pair_run(random_rows(60, seed=1), *other))
    windows = [len(source) for source in data.training]
    assert data.order.windows_per_epoch == windows[0] + 3 * windows[1]


def test_a_step_is_the_same_for_one_device_and_the_shares_of_two(pair_run):
    data = opened(pair_run(random_rows(80)))
    for windows in data.training:
        windows.reference_logprobs = np.random.default_rng(0).normal(size=(windows.pairs, 2))
    steps = data.training_steps(())
    for step in range(4):
        whole = steps[step]
        shares = [data.training_steps((), rank, 2)[step] for rank in (0, 1)]
        for field in ("input_ids", "targets", "documents"):
            assert torch.equal(getattr(whole, field), torch.cat([getattr(share, field) for share in shares]))
        rows = [row for share in shares for row in share.reference_logprobs.tolist()]
        assert [[v for v in row if v] for row in whole.reference_logprobs.tolist()] == [
            [v for v in row if v] for row in rows
        ]


def test_the_embedded_pairs_are_read_and_split(pair_run):
    config = composed_config(
        [*PAIR_RUN, "data=preferences", "sequence_length=256", "model.max_position_embeddings=256"]
    )
    data = opened(config)
    (training,), (validation,) = data.training, data.validation
    assert training.kept + validation.kept >= 60 and validation.kept >= 20
    assert not [entry for entry in data.left_out if "could not be used" in str(entry)]
