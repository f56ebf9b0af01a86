"""Log-likelihood scoring shared by all evaluations.

B texts, T tokens, N targets, D hidden
"""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor

from cucafera.config.errors import UserError
from cucafera.config.tokens import PAD_ID
from cucafera.evaluation.progress import progress_bar
from cucafera.evaluation.requests import ContinuationRequest, ContinuationScore, ScoringWindow
from cucafera.generation.cache import SlotCache
from cucafera.model.loss import per_token_loss
from cucafera.model.transformer import Decoder
from cucafera.quantities import number_of

MAX_BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""B * T of one forward pass, padding included."""


class DecoderScorer:
    """A `Scorer` on a decoder, in the dtype and on the device of its weights.

    Args:
        model: The decoder.
        max_batch_tokens: Limit of one forward pass; None: by the device.

    Attributes:
        context: Longest window, in tokens.
    """

    def __init__(self, model: Decoder, max_batch_tokens: int | None = None) -> None:
        self.model = model
        self.context = model.config.max_position_embeddings
        self._device = model.embed_tokens.weight.device
        self._max_batch_tokens = max_batch_tokens or MAX_BATCH_TOKENS[self._device.type]

    def nats(self, windows: Sequence[ScoringWindow]) -> list[list[float]]:
        """Score windows as `Scorer.nats` does; windows of similar length share a batch, to save padding."""
        scores: list[list[float]] = [[] for _ in windows]
        longest_first = sorted(range(len(windows)), key=lambda index: -len(windows[index][0]))
        for batch in _batches(longest_first, [len(ids) for ids, _ in windows], self._max_batch_tokens):
            for index, (nats, _) in zip(batch, self._score_windows([windows[i] for i in batch]), strict=True):
                scores[index] = nats.tolist()
        return scores

    def score_continuations(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationScore]:
        """Return the likelihood of each continuation after its context.

        Contexts are truncated from the left to fit the model, as lm-evaluation-harness does: the last token of the
        continuation is only a target, so it needs no position. A context that several requests share is computed once.

        Raises:
            UserError: a continuation alone is longer than the model's context.
        """
        fitted = [self._truncate(*request) for request in requests]
        order = sorted(range(len(fitted)), key=lambda index: (-len(fitted[index][0]), fitted[index][0]))
        groups = [list(group) for _, group in groupby(order, key=lambda index: fitted[index][0])]
        scores = {}
        with progress_bar("Scoring", len(requests)) as bar:
            for index, score in chain(
                self._score_single(fitted, [group[0] for group in groups if len(group) == 1]),
                self._score_shared(fitted, [group for group in groups if len(group) > 1]),
            ):
                scores[index] = score
                bar.update()
        return [scores[index] for index in range(len(requests))]

    def _truncate(self, context: list[int], continuation: list[int]) -> ContinuationRequest:
        if not context or not continuation:
            raise ValueError("a context and a continuation need at least one token each")
        if len(continuation) > self.context:
            raise UserError(
                f"a continuation has {number_of(len(continuation), 'token')}, and the model's context holds "
                f"{self.context:,}"
            )
        return context[max(0, len(context) + len(continuation) - self.context - 1) :], continuation

    def _score_single(
        self, requests: Sequence[ContinuationRequest], indices: list[int]
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """Score requests whose contexts are unique, each in one forward pass over context and continuation."""
        sizes = [len(context) + len(continuation) - 1 for context, continuation in requests]
        indices.sort(key=lambda index: -sizes[index])
        for batch in _batches(indices, sizes, self._max_batch_tokens):
            pairs = [requests[index] for index in batch]
            scores = self._score_windows([(context + continuation, len(context)) for context, continuation in pairs])
            yield from zip(batch, (_continuation_score(*score) for score in scores), strict=True)

    def _score_shared(
        self, requests: Sequence[ContinuationRequest], groups: list[list[int]]
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """Score groups of requests that share a context: prefill each context once, then try its continuations."""
        sizes = [len(group) * max(sum(map(len, requests[index])) for index in group) for group in groups]
        for batch in _batches(range(len(groups)), sizes, self._max_batch_tokens):
            contexts = [requests[groups[number][0]][0] for number in batch]
            continuations = [[requests[index][1] for index in groups[number]] for number in batch]
            indices = [index for number in batch for index in groups[number]]
            yield from zip(indices, self._score_with_cache(contexts, continuations), strict=True)

    @torch.inference_mode()
    def _score_windows(self, windows: Sequence[ScoringWindow]) -> list[tuple[Tensor, Tensor]]:
        """Return, for each window of one batch, the nats of its scored tokens and if each is the top-1 prediction."""
        # Attention is causal, so no scored token sees the padding on the right. The last token is only a target.
        ids = self._padded([ids[:-1] for ids, _ in windows])
        hidden = self.model(ids)
        selected = [hidden[row, first - 1 : len(ids) - 1] for row, (ids, first) in enumerate(windows)]
        return self._score_targets(selected, [ids[first:] for ids, first in windows])

    @torch.inference_mode()
    def _score_with_cache(
        self, contexts: Sequence[list[int]], continuations: Sequence[list[list[int]]]
    ) -> Iterator[ContinuationScore]:
        """Return the score of each continuation of each context, in order."""
        flat = [continuation for group in continuations for continuation in group]
        starts = [len(context) for context, group in zip(contexts, continuations, strict=True) for _ in group]
        longest, new_tokens = max(starts), max(map(len, flat)) - 1
        weight = self.model.embed_tokens.weight
        cache = SlotCache(self.model.config, len(flat), longest + new_tokens, weight.device, weight.dtype)
        cache.begin(range(len(contexts)), [0] * len(contexts), longest)
        hidden = self.model(self._padded(contexts), cache=cache)
        # The last hidden state of a context predicts the first token of each of its continuations.
        hidden = torch.cat(
            [
                row[None, len(context) - 1 : len(context)].expand(len(group), 1, -1)
                for row, context, group in zip(hidden, contexts, continuations, strict=True)
            ]
        )
        if new_tokens:
            end = len(flat)
            for number in reversed(range(len(contexts))):  # so that no context is overwritten before it is copied
                first = end - len(continuations[number])
                cache.copy(number, range(first, end), len(contexts[number]))
                end = first
            cache.begin(range(len(flat)), starts, new_tokens)
            inputs = self._padded([continuation[:-1] for continuation in flat])
            hidden = torch.cat([hidden, self.model(inputs, cache=cache)], dim=1)
        selected = [row[: len(continuation)] for row, continuation in zip(hidden, flat, strict=True)]
        return (_continuation_score(*score) for score in self._score_targets(selected, flat))

    def _padded(self, texts: Sequence[list[int]]) -> Tensor:
        longest = max(map(len, texts))
        return torch.tensor([ids + [PAD_ID] * (longest - len(ids)) for ids in texts], device=self._device)

    def _score_targets(self, hidden: Sequence[Tensor], targets: Sequence[list[int]]) -> list[tuple[Tensor, Tensor]]:
        """Return the results of `per_token_loss` on the CPU, text by text; hidden states are [N, D] each."""
        flat = torch.tensor(list(chain.from_iterable(targets)), device=self._device, dtype=torch.int64)
        nats, is_top1 = per_token_loss(torch.cat(list(hidden)), self.model.embed_tokens.weight, flat)
        lengths = [len(part) for part in targets]
        return list(zip(nats.cpu().split(lengths), is_top1.cpu().split(lengths), strict=True))


def _continuation_score(nats: Tensor, is_top1: Tensor) -> ContinuationScore:
    return ContinuationScore(-float(nats.double().sum()), bool(is_top1.all()))


def _batches(indices: Sequence[int], sizes: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices whose largest size, times their number, is at most max_tokens, or that have one item."""
    batch: list[int] = []
    largest = 0
    for index in indices:
        largest = max(largest, sizes[index])
        if batch and largest * (len(batch) + 1) > max_tokens:
            yield batch
            batch, largest = [], sizes[index]
        batch.append(index)
    if batch:
        yield batch
