"""Likelihoods in batches equal those of one text at a time."""

import itertools
import random

import pytest
import torch

from cucafera.config.errors import UserError
from cucafera.config.schema import ModelConfig
from cucafera.data.tokenizer import Tokenizer
from cucafera.evaluation.likelihood import DecoderScorer, _batches
from cucafera.evaluation.requests import DOCUMENT_START, encode_pair
from cucafera.model.transformer import Decoder
from tests.support import WORDS

CONTEXT = 32


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3,
    )  # fmt: skip
    return Decoder(config).eval().requires_grad_(False)


def one_by_one(model: Decoder, ids: list[int], first: int) -> tuple[list[float], list[bool]]:
    """Nats of ids[first:] from log_softmax, and if each is the top-1 prediction."""
    logits = model.logits(model(torch.tensor([ids[:-1]]))[0])[first - 1 :].double()
    targets = torch.tensor(ids[first:])
    nats = -logits.log_softmax(-1)[range(len(targets)), targets]
    return nats.tolist(), (logits.argmax(-1) == targets).tolist()


def drawn(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(300) for _ in range(length)]


def test_windows_of_any_length_score_as_one_by_one(model):
    generator = random.Random(0)
    lengths = [2, 31, CONTEXT, 7, 7, 19, 2, 23, 30]
    windows = [(drawn(generator, length), generator.randint(1, length - 1)) for length in lengths]
    for max_batch_tokens in (1, 64, 10_000):
        scores = DecoderScorer(model, max_batch_tokens).nats(windows)
        for (ids, first), nats in zip(windows, scores, strict=True):
            assert nats == pytest.approx(one_by_one(model, ids, first)[0], abs=1e-5)
    assert DecoderScorer(model).nats([]) == []


def test_continuations_of_shared_contexts_score_as_one_by_one(model):
    generator = random.Random(1)
    requests = []
    for length, ways in ((1, 3), (5, 1), (5, 2), (17, 4), (30, 2), (CONTEXT, 3), (70, 2), (12, 1), (CONTEXT, 1)):
        context = drawn(generator, length)
        requests += [(context, drawn(generator, generator.randint(1, 9))) for _ in range(ways)]
    greedy = int(model.logits(model(torch.tensor([requests[0][0]]))[0, -1]).argmax())
    requests += [(requests[0][0], [greedy]), (drawn(generator, 3), drawn(generator, CONTEXT))]
    generator.shuffle(requests)
    for max_batch_tokens in (1, 100, 10_000):
        scores = DecoderScorer(model, max_batch_tokens).score_continuations(requests)
        for (context, continuation), score in zip(requests, scores, strict=True):
            ids = (context + continuation)[-(CONTEXT + 1) :]
            nats, top1 = one_by_one(model, ids, len(ids) - len(continuation))
            assert score.log_likelihood == pytest.approx(-sum(nats), abs=1e-5)
            assert score.is_greedy == all(top1)
    assert sum(score.is_greedy for score in scores) >= 1


def test_a_continuation_is_greedy_only_if_each_of_its_tokens_is_the_most_probable(model):
    context = [1, 40, 50]
    written: list[int] = []
    for _ in range(3):
        written.append(int(model.logits(model(torch.tensor([context + written]))[0, -1]).argmax()))
    wrong = [(token + 1) % 300 for token in written]
    continuations = [written, written[:1], [*written[:2], wrong[2]], [wrong[0], *written[1:]], wrong]
    for alone in (False, True):  # each in a forward pass of its own, or all after the same context
        asked = [[continuation] for continuation in continuations] if alone else [continuations]
        scores = [s for part in asked for s in DecoderScorer(model).score_continuations([(context, c) for c in part])]
        assert [score.is_greedy for score in scores] == [True, True, False, False, False]


def test_a_shared_context_is_computed_once(model, monkeypatch):
    read = []
    forward = Decoder.forward

    def counting(self, ids, *rest, **more):
        read.append(ids.numel())
        return forward(self, ids, *rest, **more)

    monkeypatch.setattr(Decoder, "forward", counting)
    context = list(range(10, 30))
    DecoderScorer(model).score_continuations([(context, [1, 2]), (context, [3]), (context, [4, 5, 6])])
    assert sum(read) == 20 + 3 * 2


def test_batches_are_as_large_as_the_limit_allows_and_no_larger():
    sizes = [9, 9, 7, 5, 5, 5, 4, 1, 1, 1, 20]
    for limit in (1, 9, 10, 18, 27, 1000):
        batches = list(_batches(range(len(sizes)), sizes, limit))
        assert [index for batch in batches for index in batch] == list(range(len(sizes)))
        padded = [len(batch) * max(sizes[index] for index in batch) for batch in batches]
        assert all(tokens <= limit or len(batch) == 1 for tokens, batch in zip(padded, batches, strict=True))
        for batch, following in itertools.pairwise(batches):  # the first of the next one would not have fitted
            assert max(sizes[index] for index in [*batch, following[0]]) * (len(batch) + 1) > limit


def test_a_continuation_longer_than_the_context_is_refused(model):
    with pytest.raises(UserError, match="a continuation has 33 tokens, and the model's context holds 32"):
        DecoderScorer(model).score_continuations([([1], [5] * 33)])


def test_pairs_are_split_at_the_end_of_the_context():
    tokenizer = Tokenizer.train(WORDS * 20, 1000)
    context, continuation = encode_pair(tokenizer, "la mar ", "i el bosc", DOCUMENT_START)
    assert context == [1, *tokenizer.encode("la mar")] and tokenizer.decode(continuation) == " i el bosc"
    assert encode_pair(tokenizer, "", "mar", DOCUMENT_START) == ([1], tokenizer.encode("mar"))
    together = tokenizer.encode("finestra")
    assert len(together) == len(tokenizer.encode("f")) == 1
    assert encode_pair(tokenizer, "f", "inestra", ()) == (tokenizer.encode("f"), tokenizer.encode("inestra"))
