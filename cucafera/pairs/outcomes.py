"""From a prompt and its answers to a pair or the reason why there is none, and the summary of all prompts."""

from collections import Counter
from collections.abc import Sequence

from cucafera.pairs.answers import AnsweredPrompt
from cucafera.pairs.pair_file import PAIR, DonePrompt, Pair
from cucafera.pairs.prompts import ReadPrompts
from cucafera.pairs.rules import ALIKE, ALL_GOOD, LANGUAGE, LENGTH, REPEATS, RULES, STOPS, Rules, best_and_worst
from cucafera.quantities import number_of

NO_ROOM = "no room for an answer in the context"
EMPTY = "the answer is empty"
SAME = "the answer is the one of the row"
SKIPPED = "skipped by the person"
FEW_PAIRS = 0.1
"""Share of prompts with a pair below which the rules have little to choose between."""
ADVICE = (
    "the rules find few better and worse answers: more --answers, a higher --temperature or a narrower --length finds "
    "more (in another --out), --by reference and --by person need no broken rule"
)


def ranked(answered: AnsweredPrompt, rules: Rules) -> tuple[DonePrompt, Pair | None]:
    """Return the best answer of a prompt against the worst one, by rules."""
    broken = [rules.broken_by(answer) for answer in answered.answers]
    if not answered.answers:
        return entry_of(answered, NO_ROOM, rules), None
    ranking = best_and_worst(answered.answers, broken)
    if isinstance(ranking, str):
        return entry_of(answered, ranking, rules), None
    chosen, rejected = (answered.answers[number] for number in (ranking.chosen, ranking.rejected))
    finish_reasons = (chosen.finish_reason, rejected.finish_reason)
    pair = Pair(chosen.text, rejected.text, finish_reasons, ranking.reasons)
    return entry_of(answered, PAIR, rules), pair


def against_reference(answered: AnsweredPrompt, rules: Rules) -> tuple[DonePrompt, Pair | None]:
    """Return the answer of a row against the model's own (SPIN, Chen et al., 2024)."""
    reference = (answered.prompt.reference or "").strip()
    if not answered.answers:
        return entry_of(answered, NO_ROOM, rules), None
    (own,) = answered.answers
    if not own.text or own.text == reference:
        return entry_of(answered, SAME if own.text else EMPTY, rules), None
    return entry_of(answered, PAIR, rules), Pair(reference, own.text, ("stop", own.finish_reason))


def undecidable(answered: AnsweredPrompt) -> str | None:
    """Return why no person can choose between the two answers of a prompt; None if one can."""
    texts = [answer.text for answer in answered.answers]
    if not texts:
        return NO_ROOM
    if not all(texts):
        return EMPTY
    return ALIKE if texts[0] == texts[1] else None


def entry_of(answered: AnsweredPrompt, outcome: str, rules: Rules) -> DonePrompt:
    """Return the entry of a prompt that is done."""
    broken = Counter(rule for answer in answered.answers for rule in rules.broken_by(answer))
    counted = {rule: broken[rule] for rule in RULES if broken[rule]}
    return DonePrompt(answered.prompt.key, outcome, len(answered.answers), counted)


def summary(
    read: ReadPrompts, entries: Sequence[DonePrompt], out: str, rules: Rules, needs_reference: bool = False
) -> list[str]:
    """Return what became of the prompts, as lines for the terminal.

    Args:
        read: The prompts of this command.
        entries: All that are done, those of earlier commands included.
        out: The file of pairs, as it was given.
        rules: The rules that are counted.
        needs_reference: Prompts without an answer in their row are left out.
    """
    outcomes = Counter(entry.outcome for entry in entries)
    pairs = outcomes.pop(PAIR, 0)
    lines = [
        ("Prompts", _of_prompts(read, {entry.prompt for entry in entries}, needs_reference)),
        ("Pairs", f"{pairs:,} in {out}"),
    ]
    if outcomes:
        reasons = ", ".join(f"{count:,} ({outcome})" for outcome, count in outcomes.most_common())
        lines.append(("No pair", reasons))
    if answers := sum(entry.answers for entry in entries):
        broken = Counter[str]()
        for entry in entries:
            broken.update(entry.broken)
        kept = {rule: 1 - broken[rule] / answers for rule in RULES}
        shares = [f"{kept[STOPS]:.1%} stop"]
        if rules.language is not None:
            shares.append(f"{kept[LANGUAGE]:.1%} are not in another language than {rules.language}")
        shares.append(f"{1 - kept[REPEATS]:.1%} repeat themselves")
        if rules.words is not None:
            shares.append(f"{kept[LENGTH]:.1%} are {rules.words[0]} to {number_of(rules.words[1], 'word')} long")
        lines.append(("Answers", f"{number_of(answers, 'answer')}: {', '.join(shares)}"))
    if outcomes[ALL_GOOD] and pairs < FEW_PAIRS * len(entries):
        lines.append(("Advice", ADVICE))
    return [f"{label:<9}{text}" for label, text in lines]


def _of_prompts(read: ReadPrompts, done: set[str], needs_reference: bool) -> str:
    parts = [f"{len(read.prompts):,}"]
    without = [prompt for prompt in read.prompts if needs_reference and prompt.reference is None]
    if left := sum(prompt.key not in done for prompt in read.prompts) - sum(
        prompt.key not in done for prompt in without
    ):
        parts.append(f"{left:,} are not done: the same command continues")
    if without:
        parts.append(f"{len(without):,} have no answer in their row")
    if read.repeated:
        parts.append(f"{read.repeated:,} more are the same as an earlier one")
    if read.unusable:
        parts.append(f"{number_of(read.unusable, 'row')} not usable, the first: {read.first_unusable}")
    return "; ".join(parts)
