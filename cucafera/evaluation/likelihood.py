"""How likely a model finds text: the one thing that every measurement here is made of.

B texts, T tokens, N targets, D hidden
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from cucafera.config import UserError
from cucafera.data.tokenizer import DOCUMENT_START_ID, PAD_ID, Tokenizer
from cucafera.generation.cache import KeyValueCache
from cucafera.model.loss import token_scores
from cucafera.model.transformer import Decoder

TOKENS_IN_BATCH = {"cpu": 4096, "cuda": 65_536}
"""B * T of one forward pass, padding included."""
SECONDS_WITHOUT_BAR = 2

DOCUMENT_START = (DOCUMENT_START_ID,)
"""What stands before a plain text: in pretraining every document began with it."""

Window = tuple[list[int], int]
"""Token ids, and the place of the first one that is scored: at least 1, since nothing stands before the first."""
Request = tuple[list[int], list[int]]
"""A context, of at least one token, and its continuation."""


class Likelihood(NamedTuple):
    """Of a continuation after its context.

    Attributes:
        nats: Log-likelihood: zero or below.
        is_greedy: Whether always taking the likeliest token would write it.
    """

    nats: float
    is_greedy: bool


class Scorer(Protocol):
    """A model that says how likely it finds text."""

    context: int
    """Most tokens that it can read at a time."""

    def nats(self, windows: Sequence[Window]) -> list[list[float]]:
        """The negative log-likelihood, in nats, of each of ids[first:] given all ids before it.

        Args:
            windows: Of at most `context` ids each.
        """
        ...


class DecoderScorer:
    """Likelihoods by our decoder, in the dtype of its weights, on the device that it is on.

    Args:
        model: The decoder.
        tokens_in_batch: Most tokens of one forward pass; None: by the device.

    Attributes:
        context: Most tokens that it can read at a time.
    """

    def __init__(self, model: Decoder, tokens_in_batch: int | None = None) -> None:
        self.model = model
        self.context = model.config.max_position_embeddings
        self._device = model.embed_tokens.weight.device
        self._tokens_in_batch = tokens_in_batch or TOKENS_IN_BATCH[self._device.type]

    def nats(self, windows: Sequence[Window]) -> list[list[float]]:
        """As `Scorer.nats`; windows of similar length are read side by side."""
        scores: list[list[float]] = [[] for _ in windows]
        longest_first = sorted(range(len(windows)), key=lambda number: -len(windows[number][0]))
        for batch in _batches(longest_first, [len(ids) for ids, _ in windows], self._tokens_in_batch):
            for number, (nats, _) in zip(batch, self._read([windows[number] for number in batch]), strict=True):
                scores[number] = nats.tolist()
        return scores

    def continuations(self, requests: Sequence[Request]) -> list[Likelihood]:
        """How likely each continuation is after its context.

        What the context of the model cannot hold is cut off from the left, but for the last token, which is never
        read: the same as in lm-evaluation-harness. Contexts that several requests share are read once.

        Raises:
            UserError: a continuation alone is longer than the context.
        """
        cut = [self._cut(*request) for request in requests]
        in_order = sorted(range(len(cut)), key=lambda number: (-len(cut[number][0]), cut[number][0]))
        groups = [list(group) for _, group in groupby(in_order, key=lambda number: cut[number][0])]
        likelihoods = {}
        with progress("Comparing", len(requests)) as bar:
            for number, likelihood in chain(
                self._alone(cut, [group[0] for group in groups if len(group) == 1]),
                self._sharing(cut, [group for group in groups if len(group) > 1]),
            ):
                likelihoods[number] = likelihood
                bar.update()
        return [likelihoods[number] for number in range(len(requests))]

    def _alone(self, requests: Sequence[Request], numbers: list[int]) -> Iterator[tuple[int, Likelihood]]:
        """Those whose contexts nobody shares, each read in one go."""
        sizes = [len(context) + len(continuation) - 1 for context, continuation in requests]
        numbers.sort(key=lambda number: -sizes[number])
        for batch in _batches(numbers, sizes, self._tokens_in_batch):
            pairs = [requests[number] for number in batch]
            scores = self._read([(context + continuation, len(context)) for context, continuation in pairs])
            yield from zip(batch, (_likelihood(*both) for both in scores), strict=True)

    def _sharing(self, requests: Sequence[Request], groups: list[list[int]]) -> Iterator[tuple[int, Likelihood]]:
        """Those whose contexts are shared, group by group."""
        rooms = [len(group) * max(sum(map(len, requests[number])) for number in group) for group in groups]
        for places in _batches(range(len(groups)), rooms, self._tokens_in_batch):
            batch = [number for place in places for number in groups[place]]
            contexts = [requests[groups[place][0]][0] for place in places]
            ways = [[requests[number][1] for number in groups[place]] for place in places]
            yield from zip(batch, self._compare(contexts, ways), strict=True)

    def _cut(self, context: list[int], continuation: list[int]) -> Request:
        if not context or not continuation:
            raise ValueError("a context and a continuation need at least one token each")
        if len(continuation) > self.context:
            raise UserError(
                f"a continuation has {len(continuation):,} tokens, and the model's context holds {self.context:,}"
            )
        return context[max(0, len(context) + len(continuation) - self.context - 1) :], continuation

    @torch.inference_mode()
    def _read(self, windows: Sequence[Window]) -> list[tuple[Tensor, Tensor]]:
        """Nats of each scored token, and whether it is the likeliest one; of windows that are read side by side."""
        # Padding on the right is seen by nobody: attention is causal. The last token is only a target.
        ids = self._padded([ids[:-1] for ids, _ in windows])
        hidden = self.model(ids)
        wanted = [hidden[row, first - 1 : len(ids) - 1] for row, (ids, first) in enumerate(windows)]
        return self._scores(wanted, [ids[first:] for ids, first in windows])

    @torch.inference_mode()
    def _compare(self, contexts: Sequence[list[int]], ways: Sequence[list[list[int]]]) -> Iterator[Likelihood]:
        """The likelihood of each way to go on from each context, in order."""
        longest = max(map(len, contexts))
        missing = [longest - len(context) for context in contexts]
        padding = torch.tensor(missing, device=self._device) if any(missing) else None
        weight = self.model.embed_tokens.weight
        cache = KeyValueCache(self.model.config, len(contexts), longest, weight.device, weight.dtype, padding)
        padded = [[PAD_ID] * gap + context for gap, context in zip(missing, contexts, strict=True)]
        times = torch.tensor([len(continuations) for continuations in ways], device=self._device)
        hidden = self.model(torch.tensor(padded, device=self._device), cache=cache)[:, -1:]
        hidden = hidden.repeat_interleave(times, dim=0)
        flat = [continuation for continuations in ways for continuation in continuations]
        if room := max(map(len, flat)) - 1:
            rest = self._padded([continuation[:-1] for continuation in flat])
            hidden = torch.cat([hidden, self.model(rest, cache=cache.repeated(times, room))], dim=1)
        wanted = [row[: len(continuation)] for row, continuation in zip(hidden, flat, strict=True)]
        return (_likelihood(*scores) for scores in self._scores(wanted, flat))

    def _padded(self, texts: Sequence[list[int]]) -> Tensor:
        longest = max(map(len, texts))
        return torch.tensor([ids + [PAD_ID] * (longest - len(ids)) for ids in texts], device=self._device)

    def _scores(self, wanted: Sequence[Tensor], targets: Sequence[list[int]]) -> list[tuple[Tensor, Tensor]]:
        """What `token_scores` makes of the hidden states before some targets, text by text, on the CPU."""
        flat = torch.tensor(list(chain.from_iterable(targets)), device=self._device, dtype=torch.int64)
        nats, likeliest = token_scores(torch.cat(list(wanted)), self.model.embed_tokens.weight, flat)
        lengths = [len(part) for part in targets]
        return list(zip(nats.cpu().split(lengths), likeliest.cpu().split(lengths), strict=True))


def _likelihood(nats: Tensor, likeliest: Tensor) -> Likelihood:
    return Likelihood(-float(nats.double().sum()), bool(likeliest.all()))


def _batches(numbers: Sequence[int], sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers in batches in which the largest of their sizes, times their count, is at most so much, but for one."""
    batch: list[int] = []
    largest = 0
    for number in numbers:
        largest = max(largest, sizes[number])
        if batch and largest * (len(batch) + 1) > most:
            yield batch
            batch, largest = [], sizes[number]
        batch.append(number)
    if batch:
        yield batch


def encoded_pair(tokenizer: Tokenizer, context: str, continuation: str, start: Sequence[int]) -> Request:
    """A context and its continuation as ids, split as lm-evaluation-harness splits them.

    Both are encoded together, and cut where the context alone would end. Whitespace at the end of the context belongs
    to the continuation, as it does for tokens that begin with a space. Where a token reaches across the end, so that
    nothing is left of the continuation, it is encoded apart.

    Args:
        tokenizer: Makes the ids.
        context: Empty: only `start` stands before the continuation.
        continuation: What is scored.
        start: Ids that stand before the context.
    """
    visible = len(context.rstrip())
    context, continuation = context[:visible], context[visible:] + continuation
    before = tokenizer.encode(context)
    scored = tokenizer.encode(context + continuation)[len(before) :] or tokenizer.encode(continuation)
    return [*start, *before], scored


def progress(what: str, total: int | None) -> "tqdm[Any]":
    """A bar on stderr for what takes longer than some seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc=what, total=total, file=sys.stderr, delay=SECONDS_WITHOUT_BAR, mininterval=interval, leave=False)
