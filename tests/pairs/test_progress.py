"""Progress of the prefer command."""

from cucafera.pairs import progress
from cucafera.pairs.progress import PairProgress


def test_without_a_terminal_a_line_is_printed_every_few_seconds(monkeypatch, capsys):
    now = iter([0.0, 4.0, 11.0, 12.0, 23.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with PairProgress(8) as shown:
        for is_pair in (True, False, True, True):
            shown.advance(is_pair)
    assert capsys.readouterr().err == (
        "Prompts: 2 of 8, 1 pairs, about 33 s left\nPrompts: 4 of 8, 3 pairs, about 23 s left\n"
    )
