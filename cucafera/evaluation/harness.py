"""Tasks of EleutherAI's lm-evaluation-harness; needs pip install '.[eval]'.

Prefix of a text: in pretraining every document began with a document start token, so every plain text gets one, also
for a model that was finetuned on conversations. That equals `add_bos_token=True`, with this token as bos, in the
harness's own backend for transformers. A conversation, which --apply-chat-template makes of a text, begins with
<im_start> and gets none, as in finetuning.

Conversations are rendered to ids by data/chatml.py, never by parsing control tokens out of text. The line end after the
role of the answer is scored with the answer: the harness counts whitespace at the end of a context to what follows.
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID
from cucafera.data.chatml import CHAT_TEMPLATE, STOP_IDS, Message, stripped
from cucafera.evaluation.evaluated_model import EvaluatedModel
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.progress import progress_bar
from cucafera.evaluation.requests import DOCUMENT_START, AnswerOpening, encode_pair, open_answer
from cucafera.evaluation.results import Metric, Result
from cucafera.evaluation.tasks import quiet, reason_of
from cucafera.generation.generate import generate
from cucafera.quantities import number_of

DEFAULT_NEW_TOKENS = 256
"""Longest answer of a task that sets no limit; the harness's own default."""
MAX_GENERATION_TOKENS = 16_384
"""Texts that are written at a time, times the length of the longest, new tokens included."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """The harness's interface to a model of this package.

    Args:
        evaluated: The model.
    """

    def __init__(self, evaluated: EvaluatedModel) -> None:
        super().__init__()
        self.evaluated = evaluated
        self.scorer = DecoderScorer(evaluated.model)
        self._conversations: dict[str, AnswerOpening] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends generated text."""
        return IM_END_ID if self.evaluated.chats else DOCUMENT_START_ID

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return DOCUMENT_START_ID

    @property
    def max_length(self) -> int:
        """The model's context, in tokens."""
        return self.scorer.context

    @property
    def tokenizer_name(self) -> str:
        """A fingerprint of the tokenizer, for the harness's cache."""
        return self.evaluated.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
        """Return the ids of a conversation, or of a text after a document start; without prefix on False."""
        prefix, rest = self._split_prefix(string)
        if add_special_tokens is False:
            prefix = ()
        return [*prefix, *self.evaluated.tokenizer.encode(rest)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that `apply_chat_template` renders."""
        return CHAT_TEMPLATE if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, and remember its ids: parsing the text could give others.

        Args:
            chat_history: Messages with role and content.
            add_generation_prompt: True: the assistant's answer follows; False: the last message is the beginning of
                that answer, and stays open.
        """
        messages = [Message(message["role"], message["content"]) for message in chat_history]
        tokenizer = self.evaluated.tokenizer
        begun = "" if add_generation_prompt else stripped(messages.pop().content)
        opening = open_answer(messages, tokenizer, begun)
        text: str = tokenizer.decode(opening.prefix) + opening.text
        self._conversations[text] = opening
        return text

    def _split_prefix(self, text: str) -> tuple[Sequence[int], str]:
        """Return the ids before a text: of its conversation up to the answer's role, or the document start."""
        return self._conversations.get(text, (DOCUMENT_START, text))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        prefix, rest = self._split_prefix(context)
        return encode_pair(self.evaluated.tokenizer, rest, continuation, prefix)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **settings: Any
    ) -> list[tuple[float, bool]]:
        scores = self.scorer.score_continuations([(context, continuation) for _, context, continuation in requests])
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of complete texts, each after a document start.

        The windows are the harness's: as long as the context, and disjoint except for the last one.
        """
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.evaluated.tokenizer.encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self.scorer.score_continuations([window for of_text in windows for window in of_text]))
        return [math.fsum(next(scores).log_likelihood for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated continuation of each context; contexts are truncated from the left to fit.

        An answer has at most half of the model's context, however many tokens a task allows.
        """
        answers = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [_sampling(request.args[1], self.max_length // 2) for request in requests]
        # Equal prompts and beginnings, as of solved examples, follow each other: the KV cache has them then.
        order = sorted(range(len(requests)), key=lambda index: (repr(settings[index]), prompts[index]))
        with progress_bar("Writing", len(requests)) as bar:
            for _, group in groupby(order, key=lambda index: repr(settings[index])):
                indices = list(group)
                sampling = settings[indices[0]]
                texts = [prompts[index][-(self.max_length - sampling.max_new_tokens) :] for index in indices]
                slots = max(1, MAX_GENERATION_TOKENS // (max(map(len, texts)) + sampling.max_new_tokens))
                written = generate(
                    self.evaluated.model, self.evaluated.tokenizer, texts, sampling, frozenset(STOP_IDS), slots=slots
                )
                for index, text in zip(indices, written, strict=True):
                    answers[index] = text.text
                bar.update(len(indices))
        return answers


def _sampling(task_settings: dict[str, Any], max_new_tokens: int) -> SamplingConfig:
    """Return the sampling of a task, with at most max_new_tokens: greedy unless the task asks for sampling."""
    settings = dict(normalize_gen_kwargs(task_settings, DEFAULT_NEW_TOKENS))
    until = settings.get("until") or []
    sampling = SamplingConfig(
        max_new_tokens=min(int(settings["max_gen_toks"]), max_new_tokens),
        temperature=float(settings.get("temperature") or 0.0),
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1.0),
        min_p=float(settings.get("min_p") or 0.0),
        repetition_penalty=float(settings.get("repetition_penalty") or 1.0),
        stop=[text for text in ([until] if isinstance(until, str) else until) if text],
    )
    if settings.get("do_sample") and not sampling.temperature:
        sampling = replace(sampling, temperature=1.0)
    return sampling


@dataclass(frozen=True)
class TaskSettings:
    """Settings of the questions, with the meaning that they have in the harness.

    Attributes:
        num_fewshot: Solved examples before each question; None: the task's own number.
        limit: Maximum number of questions per task; None: all.
        as_chat: Ask in a conversation.
        system_instruction: Text before each question: the system message of a conversation, else the start of the text.
        fewshot_as_multiturn: In a conversation, each solved example is a turn of its own, not a part of the question.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    as_chat: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True


def run_tasks(evaluated: EvaluatedModel, loaded: dict[str, Any], settings: TaskSettings) -> Iterator[Result]:
    """Run tasks and groups of tasks, at the first result.

    What `lm_eval.simple_evaluate` adds to `lm_eval.evaluate` is the seeds and num_fewshot, set here, and a description
    of the machine that takes seconds.

    Args:
        evaluated: The model.
        loaded: As `tasks.load_tasks` returns it.
        settings: How to ask.

    Yields:
        One result per task, and per group that has metrics of its own.

    Raises:
        UserError: the harness cannot ask or score the questions.
    """
    with quiet():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if settings.num_fewshot is not None and own != 0:  # a task that sets 0 has no examples
                own = settings.num_fewshot
            task.set_config("num_fewshot", own or 0)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        try:
            output = lm_eval.evaluate(
                lm=HarnessModel(evaluated),
                task_dict=loaded,
                limit=settings.limit,
                apply_chat_template=settings.as_chat,
                system_instruction=settings.system_instruction,
                fewshot_as_multiturn=settings.as_chat and settings.fewshot_as_multiturn,
                log_samples=False,
            )
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            ImportError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            # From the prompts and metrics of a task; the model would raise RuntimeError.
            names = ",".join(loaded["tasks"])
            raise UserError(f"--tasks {names}: the harness cannot measure it: {reason_of(error)}") from error
    asked: dict[str, Any] = {"limit": settings.limit, "chat_template": settings.as_chat, "lm_eval": lm_eval.__version__}
    if settings.system_instruction is not None:
        asked["system_instruction"] = settings.system_instruction
    if settings.as_chat and not settings.fewshot_as_multiturn:
        asked["fewshot_as_multiturn"] = False
    for task, values in output["results"].items():
        if metrics := _metrics(values):
            shots, version = output["n-shot"].get(task), output["versions"].get(task)
            used, total = (output["n-samples"].get(task, {}).get(name) for name in ("effective", "original"))
            framing = ", in a conversation" if settings.as_chat else ""
            note = "" if used is None else f"{used:,} of {number_of(total, 'question')}, {shots or 0}-shot{framing}"
            described = {"num_fewshot": shots, "version": None if version is None else str(version), **asked}
            yield Result("harness", task, metrics, described, note)


def _metrics(values: dict[str, Any]) -> dict[str, Metric]:
    """Return the metrics of a task: `acc,none` and `acc_stderr,none` become acc; other filters stay in the name."""
    metrics = {}
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr") or isinstance(value, str | bool):
            continue
        with contextlib.suppress(TypeError, ValueError):  # not a number, so not a metric
            stderr = values.get(f"{name}_stderr,{filter_name}")
            error = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
            metrics[name if filter_name == "none" else f"{name},{filter_name}"] = Metric(float(value), error)
    return metrics
