"""Tables on the terminal."""

import sys

import pytest

from cucafera.terminal_table import NARROWEST, NARROWEST_TERMINAL, shortened, terminal_table, terminal_width

SWEEP = [f"outputs/lr_sweep/optimizer.lr={rate},seed={seed}" for rate in ("0.001", "0.002") for seed in range(15)]


def table(names):
    head = ["run", "status", "loss", "bpb", "best loss", "best bpb", "steps", "tokens", "tokens/s"]
    return [
        head,
        *([name, "finished", "3.120", "1.500", "3.120", "1.500", "341", "2,793,472", "543"] for name in names),
    ]


@pytest.mark.parametrize("width", [NARROWEST_TERMINAL, 40, 80, 200])
@pytest.mark.parametrize("names", [["a"], SWEEP[:2], SWEEP])
def test_tables_fit_the_width_with_all_cells_and_each_name_once(width, names):
    text = terminal_table(table(names), width)
    assert max(map(len, text.split("\n"))) <= width
    blocks = [[line.split() for line in block.split("\n")] for block in text.split("\n\n")]
    for block in blocks:
        assert len({row[0] for row in block[1:]}) == len(names)
    assert sum(row.count("2,793,472") for block in blocks for row in block) == len(names)
    assert " ".join(cell for block in blocks for cell in block[0]).replace("run ", "").count("best") == 2
    assert (text == terminal_table(table(names), None)) == (width == 200 or (names == ["a"] and width == 80))


def test_a_table_of_runs_as_columns_fits_too():
    rows = [["", *SWEEP], *([key, *["0.001"] * len(SWEEP)] for key in ("optimizer.lr", "seed"))]
    text = terminal_table(rows, 80)
    assert max(map(len, text.split("\n"))) <= 80
    assert len({name for line in text.split("\n")[::4] for name in line.split()}) == len(SWEEP)


def test_names_lose_their_middle_and_stay_unique():
    assert shortened(["short"], 12) == ["short"]
    assert shortened(["outputs/a-long-name-of-a-run"], 13) == ["output…-a-run"]
    assert shortened(["outputs/first-lr-1e-3-seed", "outputs/first-lr-2e-3-seed"], 14) == [
        "…-lr-1e-3-seed",
        "…-lr-2e-3-seed",
    ]
    names = shortened([*SWEEP, SWEEP[0]], NARROWEST)
    assert len(set(names)) == len(SWEEP) and names[0] == names[-1]
    assert max(map(len, names)) <= NARROWEST


def test_the_width_is_that_of_the_terminal_or_of_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert terminal_width() is None
    monkeypatch.setenv("COLUMNS", "40")
    assert terminal_width() == 40
    monkeypatch.setenv("COLUMNS", "1")
    assert terminal_width() == NARROWEST_TERMINAL
