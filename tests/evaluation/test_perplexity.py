"""Bits per byte: each token counts once, with enough context."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from cucafera.config.errors import UserError
from cucafera.data.chatml import Message, render
from cucafera.data.sources import CorpusError, is_held_out
from cucafera.evaluation.held_out import held_out_texts
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.perplexity import measure_conversations, score_texts, sliding_windows
from cucafera.evaluation.texts import EncodedText, read_conversations, read_texts
from cucafera.runs.folder import RunFolder

ROLES = ("user", "assistant")


@pytest.mark.parametrize(("length", "context", "stride"), [
    (length, context, stride)
    for length, context in itertools.product((1, 2, 7, 8, 9, 15, 16, 17, 40), (8, 16))
    for stride in (1, 3, context // 2, context - 1)
])  # fmt: skip
def test_each_token_is_scored_once_with_enough_context(length, context, stride):
    scored = []
    for ids, first in sliding_windows(list(range(length)), context, stride):
        assert len(ids) <= context
        assert ids == list(range(ids[0], ids[-1] + 1))
        scored += ids[first:]
        assert first >= min(context - stride, ids[first])
    assert scored == list(range(1, length))


class Coin:
    """Gives each token probability 1/2."""

    context = 8

    def nats(self, windows):
        return [[math.log(2)] * (len(ids) - first) for ids, first in windows]


def test_bits_per_byte_are_bits_over_bytes():
    texts = [EncodedText(list(range(30)), None, 58), EncodedText([1, 2, 3], [False, False, True], 2)]
    score = score_texts(Coin(), texts, stride=4)
    assert (score.tokens, score.text_bytes, score.texts) == (29 + 1, 60, 2)
    metrics = score.metrics()
    assert metrics["bpb"].value == pytest.approx(0.5)
    assert metrics["loss"].value == pytest.approx(math.log(2))
    assert metrics["perplexity"].value == pytest.approx(2)


def test_a_document_that_fits_is_one_window(base):
    ids = [1, *base.tokenizer.encode("la mar i el bosc")]
    assert len(ids) < 128
    score = score_texts(DecoderScorer(base.model), [EncodedText(ids, None, 16)], stride=4)
    tokens = torch.tensor([ids])
    assert score.nats == pytest.approx(float(base.model(tokens[:, :-1], targets=tokens[:, 1:])), rel=1e-5)


def test_held_out_documents_are_those_left_out_of_training(base):
    (texts,) = held_out_texts(base).values()
    found = [(base.tokenizer.decode(text.ids[1:]), text.text_bytes) for text in texts]
    corpus = [json.loads(line)["text"] for line in open("corpus.jsonl", encoding="utf-8")]  # noqa: PTH123, SIM115
    expected = [(text, len(text.encode())) for text in corpus if is_held_out(text, 0.2)]
    assert sorted(found) == sorted(expected) and expected


def test_the_loss_of_held_out_answers_equals_validation(chat):
    (texts,) = held_out_texts(chat).values()
    metrics = score_texts(DecoderScorer(chat.model), texts, stride=32).metrics()
    folder = chat.run
    assert isinstance(folder, RunFolder)
    (validation,) = (record for record in folder.read_metrics()["validation"] if record["step"] == chat.step)
    assert metrics["loss"].value == pytest.approx(validation["loss"], rel=1e-4)
    assert metrics["bpb"].value == pytest.approx(validation["bpb"], rel=1e-4)


def test_held_out_texts_are_empty_without_prepared_data(base, tmp_path, monkeypatch):
    outputs = tmp_path / "outputs"
    outputs.symlink_to(Path("outputs").resolve())
    monkeypatch.chdir(tmp_path)
    assert held_out_texts(base) == {}


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        (None, "text", r"--text: there is no file .*text\.jsonl$"),
        ("", "text", "holds no document$"),
        ('{"text": "a"}\n{"text"\n', "text", r"text\.jsonl:2: not JSON: .* Fix it, or name another column"),
        ('{"text": "a"}\n', "words", r"text\.jsonl:1: no column 'words'; it has text\. .*--column$"),
    ],
)
def test_text_that_cannot_be_read_is_an_error_with_its_position(base, tmp_path, content, column, message):
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        list(read_texts(str(path), column, None, base.tokenizer))


def test_only_the_given_number_of_documents_is_read(base):
    assert len(list(read_texts("corpus.jsonl", "text", 3, base.tokenizer))) == 3


def messages_of(texts):
    return [Message(role, text) for text, role in zip(texts, itertools.cycle(ROLES), strict=False)]


def write_conversations(path, *conversations):
    rows = [
        {
            "messages": [
                {"role": role, "content": text} for text, role in zip(texts, itertools.cycle(ROLES), strict=False)
            ]
        }
        for texts in conversations
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("model", ["base", "chat"])
def test_the_answers_of_a_file_score_as_a_plain_computation(request, model, tmp_path):
    evaluated = request.getfixturevalue(model)
    texts = [("la mar", "el bosc", "i el riu?", "la neu i el vent"), ("casa", "porta")]
    result = measure_conversations(
        DecoderScorer(evaluated.model), evaluated.tokenizer, write_conversations(tmp_path / "a.jsonl", *texts), None, 32
    )
    nats = tokens = 0
    for contents in texts:
        ids, trained = render([messages_of(contents)], evaluated.tokenizer)[0]
        with torch.no_grad():
            logits = evaluated.model.logits(evaluated.model(torch.from_numpy(ids.astype("int64"))[None]))[0]
        for position in range(1, len(ids)):
            if trained[position]:
                nats -= float(logits[position - 1].log_softmax(-1)[int(ids[position])])
                tokens += 1
    answered = sum(len(text.encode()) for contents in texts for text in contents[1::2])
    assert (result.kind, result.task) == ("answers", "a")
    assert result.metrics["loss"].value == pytest.approx(nats / tokens, rel=1e-5)
    assert result.metrics["bpb"].value == pytest.approx(nats / math.log(2) / answered, rel=1e-5)
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert result.settings == {"chats": str(tmp_path / "a.jsonl"), "documents": None, "stride": 32, "context": 128}


def test_the_answers_of_a_file_score_as_those_that_a_run_held_out(chat, tmp_path):
    rows = [json.loads(line) for line in open("chat.jsonl", encoding="utf-8")]  # noqa: PTH123, SIM115
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if is_held_out(row["messages"][0]["content"], 0.2)))
    (texts,) = held_out_texts(chat).values()
    expected = score_texts(DecoderScorer(chat.model), texts, stride=64)
    result = measure_conversations(DecoderScorer(chat.model), chat.tokenizer, str(path), None, None)
    assert {name: metric.value for name, metric in result.metrics.items()} == {
        name: pytest.approx(metric.value, rel=1e-6) for name, metric in expected.metrics().items()
    }


def test_conversations_longer_than_the_context_are_cut_after_an_answer_or_left_out_and_counted(chat, tmp_path):
    long = "la mar i el bosc " * 40
    path = write_conversations(
        tmp_path / "a.jsonl", ("la mar", "el sol"), ("la mar", "el sol", long, "no"), (long, "no")
    )
    result = measure_conversations(DecoderScorer(chat.model), chat.tokenizer, path, None, None)
    assert result.note.endswith(
        "; longer than the context: 1 cut after an answer and 1 left out, since no answer ends within it"
    )
    assert "2 conversations, answers only" in result.note
    first = measure_conversations(DecoderScorer(chat.model), chat.tokenizer, path, 1, None)
    assert first.metrics["loss"].value == pytest.approx(result.metrics["loss"].value, rel=1e-6)
    assert "1 conversation, answers only" in first.note and "longer" not in first.note
    with pytest.raises(UserError, match=r"^b: there is no text to measure: longer than the context: 1 left out"):
        alone = write_conversations(tmp_path / "b.jsonl", (long, "no"))
        measure_conversations(DecoderScorer(chat.model), chat.tokenizer, alone, None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--chats: there is no file .*chats\.jsonl$"),
        ("", "holds no conversation$"),
        ('{"messages": []}\n', r"chats\.jsonl:1: the conversation has no messages\. Fix it, or remove it; documents"),
        ('{"text": "a"}\n', r"chats\.jsonl:1: no conversation is recognized .*; documents are measured with --text"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
            r"chats\.jsonl:1: .*preference.*; documents are measured with --text, preference pairs with --pairs$",
        ),
    ],
)
def test_conversations_that_cannot_be_read_are_an_error_with_their_position(chat, tmp_path, content, message):
    path = tmp_path / "chats.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        list(read_conversations(str(path), chat.tokenizer))
