"""Finds and loads tasks of lm-evaluation-harness, or refuses them with the reason.

The harness indexes all of its 14,000 task files before it knows the first task. Here only the folders are indexed whose
files define a requested name or a member of a requested group: a group may have members in any folder.
"""

import contextlib
import difflib
import functools
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from cucafera.config.errors import UserError
from cucafera.evaluation.progress import progress_bar
from cucafera.hub import hub_problem

TASKS = Path(lm_eval.__file__).parent / "tasks"
DEFINED = re.compile(r"^['\"]?(?:task|group|tag)['\"]?:[ \t]*(.+)$|^[ \t]*-[ \t]+(\S.*)$", re.MULTILINE)
"""Where a task file names what it defines; items of lists, which may be tags, also name members."""
INCLUDED = re.compile(r"^include:[ \t]*(\S+)$", re.MULTILINE)
NAME = re.compile(r"[^\s,'\"\[\]{}#]+")
FILES_OF_DATASETS = ("json", "csv", "parquet", "text", "arrow", "pandas", "xml")
"""Values of dataset_path that read files."""
GENERATION_SETTINGS = {
    "until", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens",
}  # fmt: skip
"""Of generation_kwargs; num_beams must be 1."""


def load_tasks(names: Sequence[str], include_path: str | None) -> dict[str, Any]:
    """Return tasks and groups with their data, as `lm_eval.evaluate` takes them.

    Args:
        names: Names of tasks, groups or tags, or paths of .yaml files.
        include_path: A folder with more tasks; None: only those of the harness.

    Raises:
        UserError: a task is unknown, cannot be run by this package, or cannot be loaded.
    """
    entries = [_entry_of_file(Path(name).expanduser()) if is_file_name(name) else name for name in names]
    names = [entry if isinstance(entry, str) else entry.name for entry in entries]
    manager = task_manager(names, include_path, [entry for entry in entries if isinstance(entry, Entry)])
    described = list(described_tasks(names, manager, include_path))
    for name, description in described:
        refuse_impossible(name, description)
    problem = None if all(_is_local(description) for _, description in described) else hub_problem()
    with quiet(), progress_bar("Loading tasks", len(described)) as bar:
        manager._factory = _Factory(bar, problem)
        try:
            loaded: dict[str, Any] = manager.load(names)
        except UserError:
            raise
        except Exception as error:  # a file of a user may be wrong in any way
            raise UserError(f"--tasks {','.join(names)}: a task cannot be loaded: {_advice(error, problem)}") from error
    return loaded


def is_file_name(name: str) -> bool:
    """True if a name of --tasks is the path of a task file."""
    return name.endswith((".yaml", ".yml"))


def reason_of(error: BaseException) -> str:
    """Return the class and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


def task_manager(names: Sequence[str], include_path: str | None, entries: Sequence[Entry] = ()) -> TaskManager:
    """Return a manager that knows the requested tasks and groups, the members of groups, and all of include_path.

    Args:
        names: Names of tasks, groups or tags.
        include_path: A folder with more tasks; None: only those of the harness.
        entries: Tasks and groups that are in neither.
    """
    own = None if include_path is None else str(Path(include_path).expanduser())
    manager = TaskManager(include_path=own, include_defaults=False)
    index: dict[str, Entry] = manager.task_index
    index.update((entry.name, entry) for entry in entries)
    users = index.keys() | set()
    known: set[str] = set()
    folders: set[Path] = set()
    wanted = set(names)
    while wanted:
        new = {folder for folder, defined in _defined_names().items() if not wanted.isdisjoint(defined)} - folders
        folders |= new
        for name, entry in (item for folder in sorted(new) for item in _index_of(folder).items()):
            before = index.setdefault(name, entry)
            if before.kind is entry.kind is Kind.TAG and name not in users:  # the tasks of a tag may be in many folders
                index[name] = replace(before, tags=before.tags | entry.tags)
        known |= wanted
        found = [index[name] for name in wanted if name in index]
        wanted = {member for entry in found for member in _members(entry.cfg or {})} - known
    return manager


@functools.cache
def _index_of(folder: Path) -> dict[str, Entry]:
    index: dict[str, Entry] = TaskIndex.build([folder])
    return index


def _entry_of_file(path: Path) -> Entry:
    """Return the entry of a task file for the index; the harness's own reads no groups."""
    described = _read(path)
    kind = Kind.PY_TASK if "class" in described else Kind.GROUP if "group" in described else Kind.TASK
    name = described.get("group") if kind is Kind.GROUP else described.get("task")
    if not isinstance(name, str):
        raise UserError(f"--tasks {path}: it has neither task: NAME nor group: NAME")
    return Entry(name, kind, path.resolve(), described)


@functools.cache
def _defined_names() -> dict[Path, frozenset[str]]:
    """Return the names in each folder of the harness that its files may define, found without parsing YAML."""
    return {folder: frozenset(_names_in(folder)) for folder in sorted(TASKS.iterdir()) if folder.is_dir()}


def _names_in(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.suffix in ("", ".yaml") and path.is_file():  # files that others include often have no suffix
            for definition, item in DEFINED.findall(_text_of(path)):
                yield from NAME.findall(definition or item)


def _text_of(path: Path, is_included: bool = False) -> str:
    """Return a task file with what it includes from elsewhere: tags are inherited."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for included in INCLUDED.findall(text):
        if (is_included or included.startswith("../")) and (path.parent / included).is_file():
            text += "\n" + _text_of(path.parent / included, is_included=True)
    return text


def _members(described: dict[str, Any]) -> Iterator[str]:
    """Yield the names that a group refers to, in groups that are written inside it too; none for a task."""
    members = described.get("task")
    for member in members if isinstance(members, list) else ():
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict):
            name = member.get("group") or member.get("task")
            if isinstance(name, str):
                yield name
            yield from _members(member)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a task file, without importing the functions that it names."""
    try:
        described: dict[str, Any] = load_yaml(path, resolve_func=False)
    except Exception as error:  # it may be wrong in any way
        raise UserError(f"--tasks: {path} cannot be read: {reason_of(error)}") from error
    return described


def described_tasks(names: Sequence[str], manager: TaskManager, include_path: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the name and description of each task that is asked for, those of groups and tags included.

    Args:
        names, include_path: As for `task_manager`.
        manager: Knows them.

    Raises:
        UserError: a task or a member of a group is unknown.
    """
    for name in names:
        if name not in manager.task_index:
            _refuse_unknown(name, manager, include_path)
        yield from _described_entry(name, manager)


def _refuse_unknown(name: str, manager: TaskManager, include_path: str | None) -> NoReturn:
    for path in sorted(Path(include_path).expanduser().rglob("*.yaml")) if include_path else ():
        _read(path)  # the index leaves out files that cannot be read
    everywhere = {*manager.task_index, *(known for names in _defined_names().values() for known in names)}
    similar = difflib.get_close_matches(name, sorted(everywhere), n=3)
    raise UserError(
        f"--tasks {name}: there is no such task{'; similar: ' + ', '.join(similar) if similar else ''}. "
        "`lm_eval ls tasks` lists those of the harness; --include-path FOLDER adds your own"
    )


def _described_entry(name: str, manager: TaskManager) -> Iterator[tuple[str, Any]]:
    entry = manager.task_index[name]
    if entry.kind is Kind.TAG:
        for task in sorted(entry.tags):
            yield from _described_entry(task, manager)
    else:
        yield from _described(name, entry.cfg or {}, manager)


def _described(name: str, described: dict[str, Any], manager: TaskManager) -> Iterator[tuple[str, Any]]:
    if not isinstance(described.get("task"), list):
        yield name, described
        return
    for member in described["task"]:
        inner = member.get("group") or member.get("task") if isinstance(member, dict) else member
        if isinstance(inner, str) and inner in manager.task_index:
            yield from _described_entry(inner, manager)
        elif isinstance(member, dict):
            yield from _described(f"{name}::{inner}", member, manager)
        else:
            raise UserError(
                f"--tasks {name}: its member {member} is neither a task of the harness nor of --include-path"
            )


def refuse_impossible(name: str, described: dict[str, Any]) -> None:
    """Raise UserError for a task that this package cannot run, by its description."""
    if described.get("unsafe_code"):
        raise UserError(
            f"--tasks {name}: it runs programs that the model writes, which this package does not do: export the model "
            "and use `lm_eval run --model hf --confirm_run_unsafe_code` in a container"
        )
    if described.get("doc_to_image") or described.get("doc_to_audio"):
        raise UserError(f"--tasks {name}: its questions hold images or sound, and the model reads text only")
    settings = described.get("generation_kwargs") or {}
    unknown = {key for key in settings if key not in GENERATION_SETTINGS and (key, settings[key]) != ("num_beams", 1)}
    if unknown:
        given = ", ".join(f"{key}={settings[key]}" for key in sorted(unknown))
        raise UserError(f"--tasks {name}: its generation_kwargs have {given}, which this package cannot do")


class _Factory(TaskFactory):  # type: ignore[misc]
    """Builds tasks as the harness does, and names the one that fails.

    Args:
        bar: Moves with each task.
        problem: Why the hub cannot be asked, if so.
    """

    def __init__(self, bar: Any, problem: str | None) -> None:
        super().__init__()
        self._bar = bar
        self._problem = problem

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        try:
            task = super()._build_task(entry, overrides)
        except (Exception, SystemExit) as error:  # of many classes; some task files end the program for a missing tool
            raise UserError(f"--tasks {entry.name}: it cannot be loaded: {_advice(error, self._problem)}") from error
        self._bar.update()
        return task


def _advice(error: BaseException, problem: str | None) -> str:
    if isinstance(error, ImportError):
        missing = getattr(error, "name", None)
        advice = f"pip install {missing.partition('.')[0]}" if missing else "install what it names"
        return f"{reason_of(error)}: {advice}; pip install '.[eval]' brings compatible versions of what most tasks need"
    if problem is not None:
        return f"{reason_of(error)}: its data is not among earlier downloads, and {problem}"
    return reason_of(error)


def _is_local(described: dict[str, Any]) -> bool:
    """True if neither data nor metrics of a task come from the hub."""
    path, arguments = described.get("dataset_path"), str(described.get("dataset_kwargs"))
    metrics = described.get("metric_list") or []
    if any(isinstance(metric, dict) and metric.get("hf_evaluate") for metric in metrics):
        return False
    return isinstance(path, str) and "://" not in arguments and (path in FILES_OF_DATASETS or Path(path).is_dir())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
