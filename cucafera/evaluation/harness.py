"""Tasks of EleutherAI's lm-evaluation-harness; needs pip install '.[eval]'.

Prefix of a text: in pretraining every document began with a document start token, so every plain text gets one, also
for a model that was finetuned on conversations. That equals `add_bos_token=True`, with this token as bos, in the
harness's own backend for transformers. A conversation, which --apply-chat-template makes of a text, begins with
<im_start> and gets none, as in finetuning.

Conversations are rendered to ids by data/chatml.py, never by parsing control tokens out of text. The template up to its
last line end is part of the context, never of what is scored.
"""

import contextlib
import difflib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID
from cucafera.data.chatml import CHAT_TEMPLATE, STOP_IDS, Message, render_prompt, stripped
from cucafera.evaluation.evaluated_model import EvaluatedModel
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.progress import progress_bar
from cucafera.evaluation.requests import DOCUMENT_START, encode_pair
from cucafera.evaluation.results import Metric, Result
from cucafera.generation.generate import generate

DEFAULT_NEW_TOKENS = 256
"""Longest answer of a task that sets no limit; the harness's own default."""
MAX_GENERATION_TOKENS = 16_384
"""Rows of a generation batch times the length of the longest, new tokens included."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """The harness's interface to a model of this package.

    Args:
        evaluated: The model.
    """

    def __init__(self, evaluated: EvaluatedModel) -> None:
        super().__init__()
        self.evaluated = evaluated
        self.scorer = DecoderScorer(evaluated.model)
        self._conversations: dict[str, list[int]] = {}

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
            prefix = []
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
        if add_generation_prompt:
            ids = render_prompt(messages, tokenizer)
        else:
            ids = render_prompt(messages[:-1], tokenizer) + tokenizer.encode(stripped(messages[-1].content))
        text = tokenizer.decode(ids)
        self._conversations[text] = ids
        return text

    def _split_prefix(self, text: str) -> tuple[list[int], str]:
        """Return the ids of a text's prefix (a rendered conversation, or the document start), and the rest."""
        for conversation in self._conversations if text.startswith("<im_start>") else ():
            if text.startswith(conversation):
                return self._conversations[conversation], text[len(conversation) :]
        return list(DOCUMENT_START), text

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
        # Batches share their sampling settings; the longest prompts first, so that a batch has little padding.
        order = sorted(range(len(requests)), key=lambda index: (repr(settings[index]), -len(prompts[index])))
        with progress_bar("Writing", len(requests)) as bar:
            for _, group in groupby(order, key=lambda index: repr(settings[index])):
                remaining = list(group)
                sampling = settings[remaining[0]]
                prompt_tokens = self.max_length - sampling.max_new_tokens
                while remaining:
                    longest = len(prompts[remaining[0]][-prompt_tokens:]) + sampling.max_new_tokens
                    rows = max(1, MAX_GENERATION_TOKENS // longest)
                    batch, remaining = remaining[:rows], remaining[rows:]
                    texts = [prompts[index][-prompt_tokens:] for index in batch]
                    written = generate(
                        self.evaluated.model, self.evaluated.tokenizer, texts, sampling, frozenset(STOP_IDS)
                    )
                    for index, text in zip(batch, written, strict=True):
                        answers[index] = text.text
                    bar.update(len(batch))
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


def run_tasks(
    evaluated: EvaluatedModel,
    names: Sequence[str],
    include_path: str | None,
    num_fewshot: int | None,
    limit: int | None,
    as_chat: bool,
) -> list[Result]:
    """Run tasks and groups of tasks.

    Args:
        evaluated: The model.
        names: Names of tasks, groups or tags, or paths of .yaml files.
        include_path: A folder with more tasks; None: only those of the harness.
        num_fewshot: Solved examples before each question; None: the task's own number.
        limit: Maximum number of questions per task; None: all.
        as_chat: Ask in a conversation.

    Returns:
        One result per task, and per group that has metrics of its own.

    Raises:
        UserError: a task is unknown, or its data cannot be loaded.
    """
    with _quiet():
        manager = _task_manager(names, include_path)
        output = lm_eval.simple_evaluate(
            model=HarnessModel(evaluated),
            tasks=_load(names, manager),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=as_chat,
            log_samples=False,
        )
    common = {"limit": limit, "chat_template": as_chat, "lm_eval": lm_eval.__version__}
    results = []
    for task, values in output["results"].items():
        if metrics := _metrics(values):
            shots, version = output["n-shot"].get(task), output["versions"].get(task)
            used, total = (output["n-samples"].get(task, {}).get(name) for name in ("effective", "original"))
            note = "" if used is None else f"{used:,} of {total:,} questions, {shots or 0}-shot"
            settings = {"num_fewshot": shots, "version": None if version is None else str(version), **common}
            results.append(Result("harness", task, metrics, settings, note))
    return results


def _load(names: Sequence[str], manager: TaskManager) -> list[Any]:
    """Return the tasks and groups with their data; what a group contains is not repeated."""
    try:
        loaded = manager.load([str(Path(name).expanduser()) if _is_file_name(name) else name for name in names])
    except Exception as error:  # data sets, the hub and metrics raise many classes
        advice = ". pip install '.[eval]' brings compatible versions" if isinstance(error, ImportError) else ""
        raise UserError(f"--tasks {','.join(names)}: a task cannot be loaded: {_first_line(error)}{advice}") from error
    groups: dict[str, Any] = loaded["groups"]
    within = {name for group in groups.values() for name in group.child_names}
    within |= {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return [item for part in (groups, loaded["tasks"]) for name, item in part.items() if name not in within]


def _task_manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """Return a manager that knows all requested tasks.

    Indexing all of the harness's thousands of task files takes long, so catalan_bench and include_path come first.
    """
    folders = [Path(lm_eval.__file__).parent / "tasks" / "catalan_bench"]
    if include_path is not None:
        folders.append(Path(include_path).expanduser())
    requested = [name for name in names if not _is_file_name(name)]
    for include_defaults in (False, True):
        if include_defaults:
            print("Searching all tasks of the harness, which takes a while", file=sys.stderr)
        try:
            manager = TaskManager(include_path=list(map(str, folders)), include_defaults=include_defaults)
        except Exception as error:  # a yaml file may be wrong in any way
            raise UserError(f"--include-path {include_path}: its tasks cannot be read: {_first_line(error)}") from error
        unknown = [name for name in requested if name not in manager.all_tasks]
        if not unknown:
            return manager
    similar = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
    raise UserError(
        f"--tasks {unknown[0]}: there is no such task{'; similar: ' + ', '.join(similar) if similar else ''}. "
        "`lm_eval ls tasks` lists those of the harness; --include-path FOLDER adds your own"
    )


def _is_file_name(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


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


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence everything but errors of the harness and its data sets; restore torch's random state afterwards."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "httpx", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            torch.random.set_rng_state(state)
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
