"""Put realistic mistakes into a copy of this checkout, one at a time, and list those that no test notices.

    python scripts/mutants.py                          # every mistake of mutants.toml
    python scripts/mutants.py lock "learning rate"     # those with one of these texts in their name or file
    python scripts/mutants.py --list                   # only check that each still fits the code

A mutant is one replacement in one file, with the tests that should notice it; see mutants.toml. Each runs in a process
of its own, forked from this one, which has imported the libraries and nothing of the package. The copy comes first on
PYTHONPATH, so that the tests and what they start import it; the checkout itself is never changed. The tests must pass
without any mutant first, or a failure would mean nothing. The exit status is 1 if a mutant was not noticed.
"""

import argparse
import compileall
import contextlib
import dataclasses
import importlib
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".toml")
LIBRARIES = (
    "torch", "torch._dynamo", "lightning.pytorch", "torchmetrics", "hydra", "datasets", "tokenizers", "transformers",
    "transformers.models.llama.modeling_llama", "tensorboard.backend.event_processing.event_accumulator",
    "torch.utils.tensorboard.writer", "matplotlib.pyplot", "pytest", "xdist.plugin",
)  # fmt: skip
"""Imported once, before the tests are forked."""
OPTIONS = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-m", "not gpu")
CAUGHT, SURVIVED, TIME_LIMIT, ERROR = "caught", "survived", "time limit", "error"


class MutantError(Exception):
    """A mutant that does not fit the code, or tests that cannot be run."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: What is wrong, in words.
        file: The file to change, relative to the checkout.
        before: The text to replace; occurs exactly once.
        after: Its replacement.
        tests: Arguments of pytest: paths, also with ::NAME.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def text(self, root: Path) -> str:
        """Return the text of the file with the mistake. Raises MutantError if it does not fit."""
        try:
            text = (root / self.file).read_text(encoding="utf-8")
        except OSError as error:
            raise MutantError(f"{self.name}: {self.file} cannot be read") from error
        if (found := text.count(self.before)) != 1:
            raise MutantError(f"{self.name}: {self.file} has {self.before!r} {found} times instead of once")
        return text.replace(self.before, self.after)

    def missing_tests(self, root: Path) -> list[str]:
        """Return the named tests that do not exist."""
        missing = []
        for test in self.tests:
            path, *names = test.split("::")
            text = (root / path).read_text(encoding="utf-8") if (root / path).is_file() else ""
            known = (root / path).exists() and all(f"{name.partition('[')[0]}(" in text for name in names[-1:])
            missing += [] if known else [test]
        return missing


@dataclasses.dataclass
class Result:
    """The outcome of the tests of a mutant; `name` is empty for the tests without any."""

    name: str
    status: str
    seconds: float
    last_line: str


def read_list(path: Path = LIST) -> list[Mutant]:
    """Return the mutants of a list."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Mutant(name, **entry | {"tests": tuple(entry["tests"])}) for name, entry in entries.items()]


def problems(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """Return a sentence for each mutant that does not fit the code, and each test that does not exist."""
    found = []
    for mutant in mutants:
        try:
            if mutant.text(root) == (root / mutant.file).read_text(encoding="utf-8"):
                found.append(f"{mutant.name}: changes nothing")
        except MutantError as error:
            found.append(str(error))
        found += [f"{mutant.name}: there is no {test}" for test in mutant.missing_tests(root)]
    return found


def copy_checkout(target: Path) -> None:
    """Copy the files that git knows, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    # Byte code that is recognized by the content of its source. By default it is by size and second of change, and the
    # byte code of a mutant could be taken for that of the next.
    compileall.compile_dir(target, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


class Copy:
    """A copy of the checkout, and the tests that run in it, if any.

    Args:
        folder: An empty folder.
        seconds: Time limit of one run of the tests.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.root = folder / "checkout"
        self.seconds = seconds
        self._temporary = folder / "tmp"
        self._output = folder / "output"
        self._changed: tuple[Path, str] | None = None
        copy_checkout(self.root)

    def start(self, name: str, mutant: Mutant | None, tests: Sequence[str]) -> None:
        """Start the tests in a process of their own, with the mistake of a mutant."""
        if mutant is not None:
            path = self.root / mutant.file
            text = mutant.text(self.root)
            self._changed = path, path.read_text(encoding="utf-8")
            path.write_text(text, encoding="utf-8")
        self._name, self._started = name, time.monotonic()
        shutil.rmtree(self._temporary, ignore_errors=True)
        sys.stdout.flush()
        self._process = os.fork()
        if not self._process:
            code = 70
            try:
                code = self._run_tests(tests)
            finally:
                os._exit(code)

    def _run_tests(self, tests: Sequence[str]) -> int:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for descriptor, standard in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
            os.dup2(descriptor, standard)
        # New objects, in case those of this process do not write to the standard streams.
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
        os.chdir(self.root)
        sys.path.insert(0, str(self.root))
        os.environ["PYTHONPATH"] = str(self.root)
        import pytest

        code = int(pytest.main([*OPTIONS, f"--basetemp={self._temporary}", *tests]))
        sys.stdout.flush()
        return code

    def stop(self) -> None:
        """Kill the tests."""
        kill_session(self._process)
        os.waitpid(self._process, 0)

    def result(self) -> Result | None:
        """Return the result once the tests have ended or overrun, and restore the file; None while they run."""
        seconds = time.monotonic() - self._started
        process, status = os.waitpid(self._process, os.WNOHANG)
        if not process and seconds < self.seconds:
            return None
        if process:
            kill_session(self._process)  # what they have left
        else:
            self.stop()
        if self._changed is not None:
            path, text = self._changed
            path.write_text(text, encoding="utf-8")
            self._changed = None
        lines = self._output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "ImportError", "E  "))]
        # 1: a test failed; 2 and 4: a test module, or conftest.py, could not even be imported.
        named = {0: SURVIVED, 1: CAUGHT, 2: CAUGHT, 4: CAUGHT}
        outcome = named.get(os.waitstatus_to_exitcode(status), ERROR) if process else TIME_LIMIT
        return Result(self._name, outcome, seconds, (failed or lines)[-1])


def kill_session(leader: int) -> None:
    """Kill what a session of processes has left."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[3] == str(leader):
                os.kill(int(path.parent.name), signal.SIGKILL)


def measure(mutants: Sequence[Mutant], copies: Sequence[Copy]) -> Iterator[Result]:
    """Yield the result of each mutant, as they come in. Raises MutantError if the tests fail without any."""
    every = sorted({test for mutant in mutants for test in mutant.tests})
    waiting: list[tuple[str, Mutant | None, Sequence[str]]] = [
        (mutant.name, mutant, mutant.tests) for mutant in mutants
    ]
    # Without a mutant, all of the tests once, each copy its part of them.
    waiting = [
        ("", None, every[part :: len(copies)]) for part in range(len(copies)) if every[part :: len(copies)]
    ] + waiting
    running: list[Copy] = []
    try:
        while waiting or running:
            for copy in [copy for copy in copies if copy not in running][: len(waiting)]:
                copy.start(*waiting.pop(0))
                running.append(copy)
            time.sleep(0.05)
            for copy in list(running):
                if result := copy.result():
                    running.remove(copy)
                    if result.name:
                        yield result
                    elif result.status != SURVIVED:
                        raise MutantError(f"the tests fail without any mutant: {result.last_line}")
    finally:
        for copy in running:
            copy.stop()


def table(results: Sequence[Result], mutants: Sequence[Mutant]) -> str:
    """Return what was not caught as a table in Markdown, after a line with the counts."""
    caught = sum(result.status == CAUGHT for result in results)
    head = f"{caught} of {len(results)} mutants were caught ({caught / len(results):.1%})."
    files = {mutant.name: mutant.file for mutant in mutants}
    rows = [f"| {r.name} | {files[r.name]} | {r.status} |" for r in results if r.status != CAUGHT]
    return "\n".join([head, *(["", "| mistake | file | result |", "|---|---|---|", *rows] if rows else [])])


def chosen(mutants: Sequence[Mutant], texts: Sequence[str]) -> list[Mutant]:
    """Return the mutants with one of the texts in their name or file; all of them without texts."""
    return [m for m in mutants if not texts or any(text in f"{m.name} {m.file}" for text in texts)]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="only mutants with a TEXT in their name or file")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time; default: one per core"
    )
    parser.add_argument("--seconds", type=float, default=600, help="time limit of one mutant")
    parser.add_argument("--list", action="store_true", help="list them, and check that each fits the code")
    parser.add_argument("--out", type=Path, help="file for the table too")
    arguments = parser.parse_args()
    mutants = chosen(read_list(), arguments.texts)
    if not mutants:
        parser.error("no mutant has such a text in its name or file")
    if unfit := problems(mutants):
        sys.exit("\n".join(unfit))
    if arguments.list:
        print("\n".join(f"{mutant.file}: {mutant.name}" for mutant in mutants))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and no test is left running
    sys.path.pop(0)  # this folder, in which a module could have the name of another
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    started = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory(prefix="cucafera-mutants-") as folder:
        copies = []
        for number in range(min(arguments.jobs, len(mutants))):
            (path := Path(folder) / str(number)).mkdir()
            copies.append(Copy(path, arguments.seconds))
        try:
            for result in measure(mutants, copies):
                results.append(result)
                print(
                    f"{result.status:<10} {result.seconds:6.1f} s  {result.name}  [{result.last_line[:100]}]",
                    flush=True,
                )
        except MutantError as error:
            sys.exit(str(error))
    text = table(results, mutants)
    print(f"\n{text}\n\n{(time.monotonic() - started) / 60:.1f} minutes")
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(any(result.status != CAUGHT for result in results))


if __name__ == "__main__":
    main()
