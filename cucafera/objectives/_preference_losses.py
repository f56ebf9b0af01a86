"""Losses of preference tuning, as functions of the log-probabilities of a pair's two answers.

    c, r   the better (chosen) and the worse (rejected) answer of a pair
    pi     log-probability of an answer's tokens, the one that ends it included, given the prompt, in nats
    ref    the same under the reference: the model before preference tuning
    |.|    number of these tokens
    a      pi / |.|, the mean per token; a_ref likewise
    beta   strength: small values let the model move far from the reference

    loss          formula                                              source
    sigmoid       -log s(beta d), d = (pi_c - ref_c) - (pi_r - ref_r)  Rafailov et al. (2023), DPO, eq. 7
    robust        [e log s(-beta d) - (1 - e) log s(beta d)] / (1 - 2 e)
                  e: label_smoothing, the share of wrong labels        Chowdhury et al. (2024), robust DPO
    ipo           ((a_c - a_ref_c) - (a_r - a_ref_r) - 1 / (2 beta))^2 Azar et al. (2023), eq. 17, here per token
    apo_zero      1 - s(beta (pi_c - ref_c)) + s(beta (pi_r - ref_r))  D'Oosterlinck et al. (2024), APO
    sigmoid_norm  -log s(beta ((a_c - a_ref_c) - (a_r - a_ref_r)))     Lambert et al. (2024), Tulu 3
    simpo         -log s(beta (a_c - a_r) - gamma)                     Meng et al. (2024), SimPO, eq. 6
    orpo          -a_c - beta log s(o_c - o_r)                         Hong et al. (2024), ORPO, eq. 6 and 7
                  o: log odds, a - log(1 - exp(a))

To any of them, nll_weight adds its multiple of -a_c (Pang et al., 2024). s is the logistic function.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cucafera.data.windows import IGNORED
from cucafera.objectives._metrics import ValidationMetrics
from cucafera.objectives._preference_config import PreferenceConfig

if TYPE_CHECKING:
    from cucafera.data.windows import Batch
    from cucafera.model.transformer import Decoder


class AnswerLogprobs(NamedTuple):
    """One answer of each of P pairs: either the better or the worse ones.

    Attributes:
        logprobs: Log-probability of its tokens under the model, in nats, [P] float64.
        reference: The same under the reference, [P]; zeros for a loss without one.
        tokens: Number of these tokens, [P].
    """

    logprobs: Tensor
    reference: Tensor
    tokens: Tensor

    @property
    def gain(self) -> Tensor:
        """Log-probability above the reference, [P]."""
        return self.logprobs - self.reference

    @property
    def mean(self) -> Tensor:
        """Log-probability per token, [P]."""
        return self.logprobs / self.tokens


def preference_losses(settings: PreferenceConfig, chosen: AnswerLogprobs, rejected: AnswerLogprobs) -> Tensor:
    """Return the loss of each pair, [P]: the formulas of this module."""
    beta = settings.beta
    gain = rewards(settings, chosen) - rewards(settings, rejected)
    if settings.loss in ("sigmoid", "sigmoid_norm"):
        losses = -F.logsigmoid(gain)
    elif settings.loss == "robust":
        wrong = settings.label_smoothing
        losses = (wrong * F.logsigmoid(-gain) - (1 - wrong) * F.logsigmoid(gain)) / (1 - 2 * wrong)
    elif settings.loss == "ipo":
        losses = (gain / beta - 1 / (2 * beta)) ** 2
    elif settings.loss == "apo_zero":
        losses = 1 - torch.sigmoid(rewards(settings, chosen)) + torch.sigmoid(rewards(settings, rejected))
    elif settings.loss == "simpo":
        losses = -F.logsigmoid(gain - settings.gamma)
    else:
        losses = -chosen.mean - beta * F.logsigmoid(_log_odds(chosen.mean) - _log_odds(rejected.mean))
    return losses - settings.nll_weight * chosen.mean if settings.nll_weight else losses


def rewards(settings: PreferenceConfig, answers: AnswerLogprobs) -> Tensor:
    """Return what the loss takes as the reward of each answer, [P]: beta times its log-probability.

    It is counted from the reference, if the loss has one, and per token, if the loss does so.
    """
    gain = answers.gain if settings.has_reference else answers.logprobs
    return settings.beta * (gain / answers.tokens if settings.is_per_token else gain)


def _log_odds(mean: Tensor) -> Tensor:
    """Return log(p / (1 - p)) for p = exp(mean), where the mean log-probability of tokens is below 0."""
    return mean - torch.log(-torch.expm1(mean))


def document_logprobs(model: "Decoder", batch: "Batch", document_limit: int | None) -> tuple[Tensor, Tensor]:
    """Return the log-probability of the targets of each document, and their number.

    Returns:
        [n, D] float64 and [n, D] int64, for the D documents of the window that has most.
    """
    assert batch.documents is not None and batch.document_counts is not None
    logprobs = model.target_logprobs(batch.input_ids, batch.targets, batch.documents, document_limit)
    # Sums of a row, and no scattered additions, whose order would differ from run to run on a GPU.
    numbers = torch.arange(max(batch.document_counts), device=logprobs.device)
    belongs = batch.documents[:, None] == numbers[:, None]
    sums = (belongs * logprobs[:, None].double()).sum(2)
    return sums, target_counts(batch)


def target_counts(batch: "Batch") -> Tensor:
    """Return the number of targets of each document, [n, D] int64."""
    assert batch.documents is not None and batch.document_counts is not None
    numbers = torch.arange(max(batch.document_counts), device=batch.documents.device)
    return ((batch.documents[:, None] == numbers[:, None]) & (batch.targets != IGNORED)[:, None]).sum(2)


def pairs_of(
    model: "Decoder", batch: "Batch", document_limit: int | None, reference: bool
) -> tuple[AnswerLogprobs, AnswerLogprobs]:
    """Return the better and the worse answers of the pairs of a micro-batch.

    Args:
        model, batch, document_limit: As for `Objective.loss`.
        reference: True if the loss has one.
    """
    logprobs, tokens = document_logprobs(model, batch, document_limit)
    known = torch.zeros_like(logprobs)
    if reference:
        assert batch.reference_logprobs is not None
        # A micro-batch may have fewer documents than the batch that it is a part of.
        known = batch.reference_logprobs[:, : logprobs.shape[1]]
    if logprobs.shape[1] % 2:  # the last document is padding
        logprobs, known, tokens = (F.pad(values, (0, 1)) for values in (logprobs, known, tokens))
    is_pair = tokens[:, ::2].flatten() > 0
    answers = (
        AnswerLogprobs(*(values[:, side::2].flatten()[is_pair] for values in (logprobs, known, tokens)))
        for side in (0, 1)
    )
    chosen, rejected = answers
    return chosen, rejected


class PreferenceMetrics(ValidationMetrics):
    """Means over the held-out pairs.

    Args:
        settings: Of the objective.
    """

    NAMES = (
        *("loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected"),
        *("chosen_logprob", "rejected_logprob", "logprob_accuracy"),
    )
    sums: Tensor
    pairs: Tensor

    def __init__(self, settings: PreferenceConfig) -> None:
        super().__init__()
        self.settings = settings
        self.add_state("sums", torch.zeros(len(self.NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, model: "Decoder", batch: "Batch", document_limit: int | None) -> None:
        """Add the sums of one micro-batch."""
        settings = self.settings
        chosen, rejected = pairs_of(model, batch, document_limit, settings.has_reference)
        of_chosen, of_rejected = rewards(settings, chosen), rewards(settings, rejected)
        measures = (
            preference_losses(settings, chosen, rejected),
            _wins(of_chosen, of_rejected),
            of_chosen - of_rejected,
            of_chosen,
            of_rejected,
            chosen.mean,
            rejected.mean,
            _wins(chosen.mean, rejected.mean),
        )
        self.sums += torch.stack(measures).sum(1)
        self.pairs += len(of_chosen)

    def compute(self) -> dict[str, Tensor]:
        """Return the means by name."""
        return dict(zip(self.NAMES, self.sums / self.pairs, strict=True))


def _wins(better: Tensor, worse: Tensor) -> Tensor:
    """Return 1 where the first is larger, one half where they are equal, as before any training, and else 0."""
    return (better > worse).double() + 0.5 * (better == worse)
