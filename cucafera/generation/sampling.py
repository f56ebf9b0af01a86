"""Sampling: from logits to the next tokens, each row with settings and random numbers of its own.

R rows, V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import SPECIAL_TOKENS


@dataclass(frozen=True)
class Candidates:
    """The tokens that may come next, and their probabilities.

    Attributes:
        probabilities: [R, N]; the candidates of a row add up to less than 1 where others were left out.
        ids: Token of each, [R, N]; None: N is V, and each is its position.
    """

    probabilities: Tensor
    ids: Tensor | None

    def draw(self, uniform: Sequence[float]) -> Tensor:
        """Return a token per row, int64 [R], where the cumulative probability exceeds a random number from [0, 1)."""
        cumulative = self.probabilities.cumsum(-1, dtype=torch.float64)
        levels = torch.tensor(uniform, dtype=torch.float64, device=cumulative.device)[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, levels, right=True)[:, 0]
        return chosen if self.ids is None else self.ids.gather(1, chosen[:, None])[:, 0]


class SamplingBatch:
    """The sampling settings of several rows, as tensors.

    Rows that draw are computed in up to three groups, because ordering a large vocabulary costs more than all the rest:
    those with a top_k order only so many tokens, those with a top_p order all, others need no order.

    Args:
        settings: One per row.
        device: Device of the logits.

    Attributes:
        settings: The settings.
    """

    def __init__(self, settings: Sequence[SamplingConfig], device: torch.device) -> None:
        self.settings = settings
        penalties = [sampling.repetition_penalty for sampling in settings]
        self._penalties = torch.tensor(penalties, device=device)[:, None] if set(penalties) != {1.0} else None
        groups: dict[str, list[int]] = {}
        for row, sampling in enumerate(settings):
            groups.setdefault(_group(sampling), []).append(row)
        self._greedy = groups.pop("greedy", [])
        self._groups = [_Group(rows, [settings[row] for row in rows], device) for rows in groups.values()]

    def next_tokens(self, logits: Tensor, present: Tensor, uniform: Callable[[int], float]) -> list[int]:
        """Return the next token of each row: drawn, or at temperature 0 the most probable one (greedy decoding).

        Args:
            logits: [R, V].
            present: True for tokens that the row's text contains, bool [R, V].
            uniform: Returns a random number from [0, 1) for a row; called once for each row that draws.
        """
        tokens = [0] * len(logits)
        if self._greedy:
            most_probable = self._penalized(logits, present)[self._greedy].argmax(-1)
            for row, token in zip(self._greedy, most_probable.tolist(), strict=True):
                tokens[row] = token
        for rows, candidates in self.candidates(logits, present):
            drawn = candidates.draw([uniform(row) for row in rows])
            for row, token in zip(rows, drawn.tolist(), strict=True):
                tokens[row] = token
        return tokens

    def candidates(self, logits: Tensor, present: Tensor) -> Iterator[tuple[list[int], Candidates]]:
        """Yield the tokens that rows may draw, and which rows; arguments are those of `next_tokens`."""
        penalized = self._penalized(logits, present)
        for group in self._groups:
            yield group.rows, group.candidates(penalized)

    def _penalized(self, logits: Tensor, present: Tensor) -> Tensor:
        """Make tokens of the text less probable (Keskar et al., 2019, CTRL, section 4.1)."""
        if self._penalties is None:
            return logits
        # Dividing a negative logit would make its token more probable, so negative ones are multiplied.
        penalized = torch.where(logits > 0, logits / self._penalties, logits * self._penalties)
        return torch.where(present, penalized, logits)


def _group(sampling: SamplingConfig) -> str:
    if sampling.temperature == 0:
        return "greedy"
    return "top_k" if sampling.top_k > 0 else "top_p" if sampling.top_p < 1 else "all"


class _Group:
    """Rows that draw, from tokens that are found in the same way.

    The order of the filters is that of transformers' logits processors, so that the same settings mean the same
    distribution: temperature, top_k, top_p, min_p.
    """

    def __init__(self, rows: list[int], settings: Sequence[SamplingConfig], device: torch.device) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        self.rows = rows
        self._temperature = column([sampling.temperature for sampling in settings])
        self._largest_k = max(sampling.top_k for sampling in settings)
        self._top_k = torch.tensor([sampling.top_k for sampling in settings], device=device)[:, None]
        self._top_p = column([sampling.top_p for sampling in settings]) if any(s.top_p < 1 for s in settings) else None
        self._min_p = column([sampling.min_p for sampling in settings]) if any(s.min_p > 0 for s in settings) else None

    def candidates(self, logits: Tensor) -> Candidates:
        """Return the tokens that each row draws from; logits are those of all rows, [R, V]."""
        logits = logits[self.rows] / self._temperature
        ids = None
        if self._largest_k:
            count = min(self._largest_k, logits.shape[-1])
            logits, ids = logits.topk(count, dim=-1)
            logits = logits.masked_fill(torch.arange(count, device=logits.device) >= self._top_k, -torch.inf)
        elif self._top_p is not None:
            logits, ids = logits.sort(dim=-1, descending=True)
        probabilities = logits.softmax(-1)
        if self._top_p is not None:
            # Nucleus sampling (Holtzman et al., 2019): the token that crosses top_p is still kept.
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill((before >= self._top_p) & (self._top_p < 1), 0.0)
        if self._min_p is not None:
            # Nguyen et al., 2024: the threshold rises with the confidence of the model.
            threshold = self._min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
        return Candidates(probabilities, ids)


class TokenPresence:
    """The tokens that the text of each slot contains, for the repetition penalty.

    Control tokens are never marked: otherwise each turn of a conversation would make the end-of-turn token less
    probable.

    Args:
        slots: Number of slots.
        vocab_size: V.
        device: Device of the logits.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._mask = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)

    def start(self, slot: int, ids: Sequence[int]) -> None:
        """Mark the tokens of a new text, and no others."""
        self._mask[slot] = False
        self._mask[slot, torch.tensor(ids, dtype=torch.int64, device=self._mask.device)] = True
        self._mask[slot, : len(SPECIAL_TOKENS)] = False

    def add(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Mark a new token of each of these slots."""
        pairs = [(slot, token) for slot, token in zip(slots, tokens, strict=True) if token >= len(SPECIAL_TOKENS)]
        if pairs:
            rows, columns = torch.tensor(pairs, device=self._mask.device).unbind(1)
            self._mask[rows, columns] = True

    def of(self, slots: Sequence[int]) -> Tensor:
        """Return the mask of these slots, bool [R, V]."""
        return self._mask[list(slots)]
