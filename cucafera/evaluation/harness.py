"""Tasks of lm-evaluation-harness (EleutherAI), on a model of ours; needs it installed: pip install '.[eval]'.

What stands before a text. In pretraining every document began with a document start, so every plain text gets one in
front, whether the model has learned conversations since or not: that is what `add_bos_token=True` with this token as
bos does in the harness's own backend for transformers. A conversation, which --apply-chat-template makes of a text,
begins with <im_start> and gets none: finetuning never has one there.

A conversation is framed by data/chat.py, never by parsing control tokens out of text; and what a template has put in
front is not part of what is scored, down to its last line end.
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

from cucafera.config import SamplingConfig, UserError
from cucafera.data.chat import CHAT_TEMPLATE, STOP_IDS, Message, render_prompt
from cucafera.data.tokenizer import DOCUMENT_START_ID, IM_END_ID
from cucafera.evaluation.likelihood import DOCUMENT_START, DecoderScorer, encoded_pair, progress
from cucafera.evaluation.results import Metric, Result
from cucafera.evaluation.subject import Subject
from cucafera.generation.generate import generate

DEFAULT_NEW_TOKENS = 256
"""Longest answer of a task that does not say; the harness's own default."""
TOKENS_WRITTEN_AT_A_TIME = 16_384
"""Texts that are written side by side, times the length of the longest, answer included."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model of ours as the harness sees one.

    Args:
        subject: The model.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject
        self.scorer = DecoderScorer(subject.model)
        self._conversations: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends what the model writes."""
        return IM_END_ID if self.subject.chats else DOCUMENT_START_ID

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        return DOCUMENT_START_ID

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.scorer.context

    @property
    def tokenizer_name(self) -> str:
        """Tells one tokenizer from another."""
        return self.subject.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
        """The ids of a text behind a document start, or of a conversation; without the start if it is not wanted."""
        framed, rest = self._split(string)
        if add_special_tokens is False:
            framed = []
        return [*framed, *self.subject.tokenizer.encode(rest)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` renders as."""
        return CHAT_TEMPLATE if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, behind which its ids are remembered.

        Args:
            chat_history: Messages with role and content.
            add_generation_prompt: Whether the assistant's answer begins behind it; else the last message is its
                beginning, and stays open.
        """
        messages = [Message(message["role"], message["content"]) for message in chat_history]
        tokenizer = self.subject.tokenizer
        if add_generation_prompt:
            ids = render_prompt(messages, tokenizer)
        else:
            ids = render_prompt(messages[:-1], tokenizer) + tokenizer.encode(messages[-1].content.strip())
        text = tokenizer.decode(ids)
        self._conversations[text] = ids
        return text

    def _split(self, text: str) -> tuple[list[int], str]:
        """What frames a text, as ids, and the rest of it: a conversation, or a document start."""
        for conversation in self._conversations if text.startswith("<im_start>") else ():
            if text.startswith(conversation):
                return self._conversations[conversation], text[len(conversation) :]
        return list(DOCUMENT_START), text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        framed, rest = self._split(context)
        return encoded_pair(self.subject.tokenizer, rest, continuation, framed)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **settings: Any
    ) -> list[tuple[float, bool]]:
        likelihoods = self.scorer.continuations([(context, continuation) for _, context, continuation in requests])
        return [(likelihood.nats, likelihood.is_greedy) for likelihood in likelihoods]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each behind a document start.

        The windows are the harness's: as long as the context, and but for the last they do not overlap.
        """
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.subject.tokenizer.encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        likelihoods = iter(self.scorer.continuations([window for of_text in windows for window in of_text]))
        return [math.fsum(next(likelihoods).nats for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after contexts, which are cut from the left to leave room for it.

        An answer has at most half of the model's context, however many tokens a task allows.
        """
        answers = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [_sampling(request.args[1], self.max_length // 2) for request in requests]
        order = sorted(range(len(requests)), key=lambda number: (repr(settings[number]), -len(prompts[number])))
        with progress("Writing", len(requests)) as bar:
            for _, group in groupby(order, key=lambda number: repr(settings[number])):
                numbers = list(group)
                sampling = settings[numbers[0]]
                room = self.max_length - sampling.max_new_tokens
                cut = {number: prompts[number][-room:] for number in numbers}
                while numbers:
                    size = len(cut[numbers[0]]) + sampling.max_new_tokens
                    batch = numbers[: max(1, TOKENS_WRITTEN_AT_A_TIME // size)]
                    numbers = numbers[len(batch) :]
                    texts = [cut[number] for number in batch]
                    written = generate(self.subject.model, self.subject.tokenizer, texts, sampling, frozenset(STOP_IDS))
                    for number, text in zip(batch, written, strict=True):
                        answers[number] = text.text
                    bar.update(len(batch))
        return answers


def _sampling(asked: dict[str, Any], most: int) -> SamplingConfig:
    """How a task wants its answers to be written: greedily, unless it asks for sampling."""
    settings = dict(normalize_gen_kwargs(asked, DEFAULT_NEW_TOKENS))
    until = settings.get("until") or []
    sampling = SamplingConfig(
        max_new_tokens=min(int(settings["max_gen_toks"]), most),
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
    subject: Subject,
    names: Sequence[str],
    include: str | None,
    examples: int | None,
    limit: int | None,
    as_chat: bool,
) -> list[Result]:
    """Runs tasks, and groups of them.

    Args:
        subject: The model.
        names: Of tasks, groups or tags, or paths of yaml files.
        include: A folder with more tasks; None: those of the harness.
        examples: Solved examples that stand before each question; None: what the task says.
        limit: Questions of each task; None: all.
        as_chat: Put questions as a conversation.

    Returns:
        One for each task, and for each group that has figures of its own.

    Raises:
        UserError: there is no such task, or its data cannot be had.
    """
    with _quiet():
        manager = _manager(names, include)
        found = lm_eval.simple_evaluate(
            model=HarnessModel(subject),
            tasks=_load(names, manager),
            task_manager=manager,
            num_fewshot=examples,
            limit=limit,
            apply_chat_template=as_chat,
            log_samples=False,
        )
    settings = {"limit": limit, "chat_template": as_chat, "lm_eval": lm_eval.__version__}
    results = []
    for task, figures in found["results"].items():
        if metrics := _metrics(figures):
            shots, version = found["n-shot"].get(task), found["versions"].get(task)
            asked, of = (found["n-samples"].get(task, {}).get(name) for name in ("effective", "original"))
            note = "" if asked is None else f"{asked:,} of {of:,} questions, {shots or 0} examples before each"
            more = {"num_fewshot": shots, "version": None if version is None else str(version), **settings}
            results.append(Result("harness", task, metrics, more, note))
    return results


def _load(names: Sequence[str], manager: TaskManager) -> list[Any]:
    """Tasks and groups with their data."""
    try:
        loaded = manager.load([str(Path(name).expanduser()) if _is_file_name(name) else name for name in names])
    except Exception as error:  # whatever a data set, the hub or a metric raises
        advice = ". pip install '.[eval]' brings versions that go together" if isinstance(error, ImportError) else ""
        raise UserError(f"--tasks {','.join(names)}: a task cannot be loaded: {_line(error)}{advice}") from error
    groups: dict[str, Any] = loaded["groups"]
    within = {name for group in groups.values() for name in group.child_names}
    within |= {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return [item for part in (groups, loaded["tasks"]) for name, item in part.items() if name not in within]


def _manager(names: Sequence[str], include: str | None) -> TaskManager:
    """What knows all tasks that are asked for: those of a folder and catalan_bench, or else all of the harness too."""
    for name in names:
        if _is_file_name(name) and not Path(name).expanduser().is_file():
            raise UserError(f"--tasks {name}: there is no such file")
    folders = [Path(lm_eval.__file__).parent / "tasks" / "catalan_bench"]
    if include is not None:
        folders.append(Path(include).expanduser())
        if not folders[-1].is_dir():
            raise UserError(f"--include-path {include}: there is no such folder")
    wanted = [name for name in names if not _is_file_name(name)]
    for everything in (False, True):
        if everything:
            print("Looking through all tasks of the harness, which takes a while", file=sys.stderr)
        try:
            manager = TaskManager(include_path=list(map(str, folders)), include_defaults=everything)
        except Exception as error:  # a yaml file may be wrong in any way
            raise UserError(f"--include-path {include}: its tasks cannot be read: {_line(error)}") from error
        unknown = [name for name in wanted if name not in manager.all_tasks]
        if not unknown:
            return manager
    near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
    raise UserError(
        f"--tasks {unknown[0]}: there is no such task{': perhaps ' + ', '.join(near) if near else ''}. "
        "`lm_eval ls tasks` lists those of the harness; --include-path FOLDER adds your own"
    )


def _is_file_name(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _metrics(figures: dict[str, Any]) -> dict[str, Metric]:
    """The figures of a task: `acc,none` and `acc_stderr,none` become acc; other filters stay in the name."""
    metrics = {}
    for key, value in figures.items():
        name, _, chosen = key.partition(",")
        if not chosen or name.endswith("_stderr") or isinstance(value, str | bool):
            continue
        with contextlib.suppress(TypeError, ValueError):  # what is no number is no figure
            stderr = figures.get(f"{name}_stderr,{chosen}")
            error = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
            metrics[name if chosen == "none" else f"{name},{chosen}"] = Metric(float(value), error)
    return metrics


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness and its data sets tell beside errors; torch's generator is put back afterwards."""
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
