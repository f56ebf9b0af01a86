"""Preference pairs: log-probabilities of the better and the worse answers."""

import json
import math
import statistics

import numpy as np
import pytest
import torch

from cucafera.config.errors import UserError
from cucafera.data.chatml import Message, Rendered, render
from cucafera.data.sources import CorpusError
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.pairs import RenderedPair, compare_answers, measure_pairs, read_pairs

ROWS = [
    {"prompt": "la mar", "chosen": "el bosc i el riu", "rejected": "no"},
    {"prompt": "casa", "chosen": "porta", "rejected": "porta finestra porta finestra porta"},
    {
        "prompt": [
            {"role": "user", "content": "la neu"},
            {"role": "assistant", "content": "i el vent"},
            {"role": "user", "content": "i el sol?"},
        ],
        "chosen": [{"role": "assistant", "content": "el dia"}],
        "rejected": [{"role": "assistant", "content": "la nit la nit"}],
    },
]


def write_pairs(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain_logprobs(evaluated, prompt, answer):
    """Return the log-probability of each token of an answer and of its stop token, by one pass over all."""
    if isinstance(prompt, str):
        prompt, answer = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    context, complete = (
        render([[Message(**message) for message in messages]], evaluated.tokenizer)[0].ids.astype("int64")
        for messages in (prompt, [*prompt, *answer])
    )
    opening = len(evaluated.tokenizer.encode("assistant")) + 2  # <im_start> before it, a line end after it
    with torch.no_grad():
        logits = evaluated.model.logits(evaluated.model(torch.from_numpy(complete)[None]))[0]
    answered = range(len(context) + opening, len(complete) - 1)  # a line end after the stop token
    return [float(logits[position - 1].log_softmax(-1)[complete[position]]) for position in answered]


@pytest.mark.parametrize("model", ["base", "chat"])
def test_pairs_score_as_a_plain_computation(request, model, tmp_path):
    evaluated = request.getfixturevalue(model)
    path = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    result = measure_pairs(DecoderScorer(evaluated.model), evaluated.tokenizer, path, None)
    chosen, rejected = (
        [plain_logprobs(evaluated, row["prompt"], row[key]) for row in ROWS] for key in ("chosen", "rejected")
    )
    both = list(zip(chosen, rejected, strict=True))
    expected = {
        "logprob_accuracy": [float(statistics.mean(one) > statistics.mean(other)) for one, other in both],
        "logprob_sum_accuracy": [float(sum(one) > sum(other)) for one, other in both],
        "chosen_logprob": list(map(statistics.mean, chosen)),
        "rejected_logprob": list(map(statistics.mean, rejected)),
    }
    assert list(result.metrics) == list(expected)
    for name, values in expected.items():
        assert result.metrics[name].value == pytest.approx(statistics.mean(values), rel=1e-5)
        assert result.metrics[name].stderr == pytest.approx(statistics.stdev(values) / math.sqrt(3), rel=1e-4)
    assert (result.kind, result.task, result.note) == ("pairs", "pairs", "3 pairs")
    assert result.settings == {"pairs": path, "documents": None, "context": 128}


class Coin:
    """Gives a token the probability 1/2, and one with the id 9 the probability 1/8."""

    context = 8

    def nats(self, windows):
        return [[math.log(8 if token == 9 else 2) for token in ids[first:]] for ids, first in windows]


def answer(*ids, prompt=2):
    return Rendered(np.array([1] * prompt + list(ids), np.uint16), np.array([False] * prompt + [True] * len(ids)))


def test_accuracy_is_per_token_and_of_sums_and_a_tie_counts_one_half():
    pairs = [
        RenderedPair(answer(5, 5, 5, 5), answer(9)),  # better per token, and worse in the sum: 4 against 3 bits
        RenderedPair(answer(9), answer(5, 5, 5, 5)),  # the other way round
        RenderedPair(answer(5), answer(6)),  # a tie in both
        RenderedPair(answer(5), answer(6, 6)),  # a tie per token
    ]
    metrics = compare_answers(Coin(), "pairs", pairs, None, {}).metrics
    assert metrics["logprob_accuracy"].value == (1 + 0 + 0.5 + 0.5) / 4
    assert metrics["logprob_sum_accuracy"].value == (0 + 1 + 0.5 + 1) / 4
    assert metrics["chosen_logprob"].value == pytest.approx(-math.log(2) * (1 + 3 + 1 + 1) / 4)
    assert metrics["rejected_logprob"].value == pytest.approx(-math.log(2) * (3 + 1 + 1 + 1) / 4)


def test_what_the_user_says_in_an_answer_of_several_turns_is_not_scored():
    turns = Rendered(np.array([1, 1, 5, 9, 9, 5], np.uint16), np.array([False, False, True, False, False, True]))
    metrics = compare_answers(Coin(), "pairs", [RenderedPair(turns, answer(9))], None, {}).metrics
    assert metrics["chosen_logprob"].value == pytest.approx(-math.log(2))


def test_pairs_longer_than_the_context_are_left_out_and_counted():
    fits, too_long = answer(*[5] * 6), answer(*[5] * 7)
    pairs = [RenderedPair(fits, answer(9)), RenderedPair(too_long, answer(5)), RenderedPair(answer(5), too_long)]
    result = compare_answers(Coin(), "pairs", pairs, None, {})
    assert result.note == "1 pair; 2 left out, longer than the context of 8 tokens"
    with pytest.raises(UserError, match=r"^x: there is no pair to compare: 2 left out, longer than the context"):
        compare_answers(Coin(), "x", pairs[1:], None, {})
    assert compare_answers(Coin(), "pairs", pairs[::-1], 1, {}).note.startswith("1 pair; 2 left out")


def test_only_the_given_number_of_pairs_is_measured(base, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    result = measure_pairs(DecoderScorer(base.model), base.tokenizer, path, 2)
    assert result.note == "2 pairs" and result.settings["documents"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--pairs: there is no file .*pairs\.jsonl$"),
        ("", "holds no preference pair$"),
        ('{"prompt": "a", "chosen": "b"', r"pairs\.jsonl:1: not JSON"),
        ('{"text": "a"}\n', r"pairs\.jsonl:1: no pair is recognized .*, documents with --text$"),
        ('{"prompt": "a", "completion": "b"}\n', r"pairs\.jsonl:1: .*; conversations are measured with --chats"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', r"pairs\.jsonl:1: .*are measured with --chats"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', r"pairs\.jsonl:1: .*the same"),
    ],
)
def test_pairs_that_cannot_be_read_are_an_error_with_their_position(base, tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        list(read_pairs(str(path), base.tokenizer))
