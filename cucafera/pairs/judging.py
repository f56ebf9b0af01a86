"""A person says in the terminal which of two answers is better."""

import random
from collections import deque
from collections.abc import Iterator

from cucafera.pairs.answers import AnsweredPrompt
from cucafera.pairs.outcomes import SKIPPED, entry_of, undecidable
from cucafera.pairs.pair_file import PAIR, Pair, PairFile
from cucafera.pairs.rules import Rules

QUESTION = "a, b, s(kip), u(ndo) or q(uit)> "
HELP = "a or b: that answer is better; s: neither, and do not ask again; u: ask the last one again; q: stop here"
WORDS = {"skip": "s", "undo": "u", "quit": "q"}


class Judging:
    """Shows prompts with two answers, and writes what a person says.

    Args:
        answered: Prompts with two answers each, or none.
        file: Receives pairs and skipped prompts.
        rules: What is counted of the answers.
        total: Number of prompts, those that are done included.
        seed: Decides which answer is shown as a.
    """

    def __init__(self, answered: Iterator[AnsweredPrompt], file: PairFile, rules: Rules, total: int, seed: int) -> None:
        self._answered = answered
        self._file = file
        self._rules = rules
        self._total = total
        self._seed = seed
        self._again: deque[AnsweredPrompt] = deque()
        self._history: list[tuple[AnsweredPrompt, bool]] = []
        """Prompts that were added to the file, the last one at the end, and whether the person was asked."""

    def run(self) -> None:
        """Ask until there is no prompt left, the person quits, or the input ends."""
        while (item := self._next()) is not None:
            if (reason := undecidable(item)) is not None:
                self._add(item, reason, None, asked=False)
            elif not self._judge(item):
                return

    def _next(self) -> AnsweredPrompt | None:
        return self._again.popleft() if self._again else next(self._answered, None)

    def _judge(self, item: AnsweredPrompt) -> bool:
        """Ask about two answers until the person decides; False if they quit."""
        order = [0, 1]
        random.Random(f"{self._seed} {item.prompt.key}").shuffle(order)
        self._show(item, order)
        while True:
            try:
                typed = input(QUESTION).strip().lower()
            except EOFError:
                print()
                return False
            match WORDS.get(typed, typed):
                case "a" | "b" as better:
                    chosen, rejected = (item.answers[number] for number in (order if better == "a" else order[::-1]))
                    finish_reasons = (chosen.finish_reason, rejected.finish_reason)
                    self._add(item, PAIR, Pair(chosen.text, rejected.text, finish_reasons), asked=True)
                    return True
                case "s":
                    self._add(item, SKIPPED, None, asked=True)
                    return True
                case "u" if any(asked for _, asked in self._history):
                    self._again.appendleft(item)
                    self._undo()
                    return True
                case "u":
                    print("There is nothing to undo: what was judged before this start stays")
                case "q":
                    return False
                case _:
                    print(HELP)

    def _show(self, item: AnsweredPrompt, order: list[int]) -> None:
        """Print the messages of a prompt, and its answers as a and b."""
        print(f"\n[{len(self._file.entries) + 1:,} of {self._total:,}]")
        for message in item.prompt.messages:
            print(f"{message.role}: {message.content.strip()}")
        for name, number in zip("ab", order, strict=True):
            cut = "" if item.answers[number].finish_reason == "stop" else " [cut]"
            print(f"\n{name}) {item.answers[number].text}{cut}")
        print()

    def _add(self, item: AnsweredPrompt, outcome: str, pair: Pair | None, asked: bool) -> None:
        self._file.add(item.prompt, entry_of(item, outcome, self._rules), pair)
        self._history.append((item, asked))

    def _undo(self) -> None:
        """Remove the last prompt that the person was asked about, and those after it; they come again."""
        asked = False
        while not asked:
            item, asked = self._history.pop()
            self._file.undo()
            self._again.appendleft(item)
