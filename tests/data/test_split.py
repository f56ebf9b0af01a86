"""Held-out documents, and the stretch of a text that has no other documents."""

import pytest

from cucafera.config.schema import DataConfig
from cucafera.data.packed import open_documents
from cucafera.data.sources import is_held_out, open_source
from cucafera.data.sources.files import FilesConfig
from cucafera.data.split import Split, find_split
from cucafera.data.tokenize import tokenize_source
from cucafera.data.tokenizer import Tokenizer

PARAGRAPHS = [f"El paràgraf {number} parla de la mar.\nI del bosc." for number in range(100)]


def split_of(path, fraction: float = 0.1) -> Split:
    return find_split(open_source("web", FilesConfig(path=str(path))), fraction)


def test_documents_of_both_sides_are_split_by_their_hash(write_jsonl, make_documents):
    documents = make_documents(200)
    split = split_of(write_jsonl("a.jsonl", documents))
    assert split == Split(0.1)
    assert [split.parts(text) for text in documents] == [[(text, is_held_out(text, 0.1))] for text in documents]


@pytest.mark.parametrize(("joint", "tolerance"), [("\n\n", 60), ("\n", 60), (" ", 40), ("", 1)])
def test_the_end_of_the_only_document_is_held_out_from_where_a_part_of_it_begins(tmp_path, joint, tolerance):
    text = joint.join(PARAGRAPHS).replace("\n", joint) if joint in (" ", "") else joint.join(PARAGRAPHS)
    text = text if joint else text.replace(" ", "_")
    (tmp_path / "input.txt").write_text(text)
    split = split_of(tmp_path / "input.txt")
    (training, first), (held_out, second) = split.parts(text)
    assert (first, second, training + held_out) == (False, True, text)
    assert training.endswith(joint)
    assert 0.1 * len(text) - 1 <= len(held_out) <= 0.1 * len(text) + tolerance
    assert split.note == (f"the last {len(held_out):,} of {len(text):,} characters of its only document are held out")


@pytest.mark.parametrize("fraction", [1e-3, 0.999])
def test_of_documents_that_are_all_on_one_side_the_end_of_the_longest_is_held_out(write_jsonl, fraction):
    documents = ["la mar", "\n\n".join(PARAGRAPHS), "el bosc"]
    assert len({is_held_out(text, fraction) for text in documents}) == 1
    split = split_of(write_jsonl("a.jsonl", documents), fraction)
    parts = [split.parts(text) for text in documents]
    assert parts[0] == [("la mar", False)] and parts[2] == [("el bosc", False)]
    assert [held_out for _, held_out in parts[1]] == [False, True]
    assert "of the longest of its 3 documents are held out" in split.note


@pytest.mark.parametrize("text", ["mar", "\n\n\nmar\n\n\n\n\n\n"])
def test_a_text_too_short_to_cut_is_not_cut(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert split_of(tmp_path / "a.txt") == Split(0.1)


def test_what_is_held_out_of_a_text_is_neither_in_its_shards_nor_known_to_the_tokenizer(
    small_run, tmp_path, monkeypatch
):
    text = "\n\n".join(PARAGRAPHS)
    (tmp_path / "input.txt").write_text(text)
    config = small_run("data=files", "data.sources.files.path=input.txt", "data.validation_fraction=0.2")
    seen = []
    train = Tokenizer.train.__func__
    monkeypatch.setattr(
        Tokenizer,
        "train",
        classmethod(lambda cls, texts, *rest, **named: train(cls, collect(texts, seen), *rest, **named)),
    )
    data = open_documents(config)
    (training, _), (held_out, _) = split_of(tmp_path / "input.txt", 0.2).parts(text)
    assert seen == [training]
    for windows, part in ((data.training[0], training), (data.validation[0], held_out)):
        ids = windows.stream.read(1, len(windows.stream) - 1)
        assert data.tokenizer.decode(ids) == part
    assert "files: the last" in data.describe()


def collect(texts, into: list[str]):
    for text in texts:
        into.append(text)
        yield text


def test_the_notes_on_a_source_are_part_of_what_is_prepared(tokenizer, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n\n".join(PARAGRAPHS))
    config = FilesConfig(path=str(tmp_path / "?.txt"), document_separator="##")
    data = DataConfig(validation_fraction=0.1, processes=1)
    summary = tokenize_source("web", config, tokenizer, data, tmp_path / "p")
    assert summary.documents == summary.held_out_documents == 2
    assert [note[:22] for note in summary.notes] == ["no document_separator ", "the last 493 of 4,488 "]
    assert tokenize_source("web", config, tokenizer, data, tmp_path / "p") == summary
