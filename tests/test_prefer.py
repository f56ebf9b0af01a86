"""The prefer command: pairs by rules, by reference and by a person; stops, resumes and refusals."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cucafera import prefer
from cucafera.config.errors import UserError
from cucafera.pairs.pair_file import PairFile, open_pair_file
from tests.imports import HEAVY, imported_packages
from tests.support import Process, PseudoTerminal, run_command

PROMPTS = ["Hola", "la mar", "el sol i la lluna", "Bon dia", "un gos", "què és un riu", "una casa blanca", "pa", "vent"]
QUICK = ("--max-new-tokens", "12", "--answers", "3", "--language", "any", "--temperature", "1", "--length", "1,8")


@pytest.fixture
def folder(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the runs, and prompts.txt."""
    (tmp_path / "outputs").symlink_to(runs / "outputs")
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Run the command on the chat model; returns its exit code, stdout and stderr."""

    def run(*arguments: str, model: str = "outputs/chat") -> tuple[int, str, str]:
        given = [*arguments]
        for option, value in (("--prompts", "prompts.txt"), ("--out", "pairs.jsonl")):
            given += [] if option in given else [option, value]
        monkeypatch.setattr(sys, "argv", ["prefer", model, *given])
        code = 0
        try:
            prefer.main()
        except SystemExit as exited:
            code = int(exited.code or 0)
        return code, *capsys.readouterr()

    return run


def rows(path: str | Path = "pairs.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def without_time(path: str | Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "time"} for row in rows(path)]


def test_the_best_answer_of_a_prompt_is_written_against_the_worst(command):
    code, out, _ = command(*QUICK)
    assert code == 0
    made = rows()
    assert made, "the model writes answers that stop and answers that do not"
    for row in made:
        assert list(row) == ["prompt", "chosen", "rejected", "model", "time", "by", "reasons", "finish_reasons"]
        assert [message["role"] for name in ("prompt", "chosen", "rejected") for message in row[name]] == [
            "user", "assistant", "assistant"
        ]  # fmt: skip
        assert row["model"] == "chat" and row["by"] == "rules" and row["reasons"]
        assert row["chosen"] != row["rejected"]
        if "does not stop" in row["reasons"]:
            assert row["finish_reasons"] == ["stop", "length"]
    settings, *done = rows("pairs.done.jsonl")
    assert settings["settings"]["answers"] == 3
    assert len(done) == len(PROMPTS) and {entry["answers"] for entry in done} == {3}
    assert [entry["outcome"] for entry in done].count("pair") == len(made)
    assert [row["prompt"][0]["content"] for row in made] == [
        prompt for prompt, entry in zip(PROMPTS, done, strict=True) if entry["outcome"] == "pair"
    ]
    assert f"Prompts  {len(PROMPTS)}\nPairs    {len(made)} in pairs.jsonl\n" in out
    assert "Answers  27 answers: " in out and " stop, " in out and " repeat themselves, " in out
    assert out.endswith(
        "Next     python -m cucafera.run +experiment=prefer init_from=outputs/chat data=preference_files "
        "data.sources.files.path=pairs.jsonl\n"
    )


def test_an_interrupted_command_continues_to_the_same_file(command, monkeypatch):
    assert command(*QUICK, "--out", "whole.jsonl")[0] == 0
    add, written = PairFile.add, []

    def add_until_interrupted(self, *arguments):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(arguments)
        add(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(PairFile, "add", add_until_interrupted)
        code, out, err = command(*QUICK)
    assert code == 130 and "Interrupted: what is done is in pairs.jsonl; the same command continues" in err
    assert f"Prompts  {len(PROMPTS)}; {len(PROMPTS) - 4} are not done: the same command continues\n" in out
    assert len(rows("pairs.done.jsonl")) == 5
    code, out, err = command(*QUICK)
    assert code == 0 and "4 prompts done before: pairs.jsonl is continued" in out
    assert without_time("pairs.jsonl") == without_time("whole.jsonl")
    assert Path("pairs.done.jsonl").read_bytes() == Path("whole.done.jsonl").read_bytes()
    before = Path("pairs.jsonl").read_bytes()
    assert command(*QUICK, "--slots", "2")[0] == 0
    assert Path("pairs.jsonl").read_bytes() == before


def test_answers_do_not_depend_on_slots_or_on_the_other_prompts(command):
    command(*QUICK, "--out", "all.jsonl")
    Path("some.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS[::-2]), encoding="utf-8")
    command(*QUICK, "--out", "some.jsonl", "--prompts", "some.txt", "--slots", "2")
    everything = {row["prompt"][0]["content"]: row for row in without_time("all.jsonl")}
    assert without_time("some.jsonl") == [everything[prompt] for prompt in PROMPTS[::-2] if prompt in everything]
    command(*QUICK, "--out", "other.jsonl", "--seed", "1")
    assert without_time("other.jsonl") != without_time("all.jsonl")


@pytest.mark.parametrize("cut", ["pairs.jsonl", "pairs.done.jsonl"])
def test_a_line_that_a_crash_has_cut_is_written_again(command, cut):
    """A crash after three prompts, in the middle of the row or of the entry of the next one that gives a pair."""
    command(*QUICK, "--out", "whole.jsonl")
    made, (header, *done) = (Path(name).read_bytes().splitlines(True) for name in ("whole.jsonl", "whole.done.jsonl"))
    is_pair = [json.loads(entry)["outcome"] == "pair" for entry in done]
    next_pair = is_pair.index(True, 3)
    before = sum(is_pair[:next_pair])
    if cut == "pairs.jsonl":
        made = [*made[:before], made[before][:30]]
        done = done[:next_pair]
    else:
        made = made[: before + 1]
        done = [*done[:next_pair], done[next_pair][:30]]
    Path("pairs.jsonl").write_bytes(b"".join(made))
    Path("pairs.done.jsonl").write_bytes(b"".join([header, *done]))
    code, out, _ = command(*QUICK)
    assert code == 0 and f"The last line of {cut} was cut, as by a crash: removed" in out
    assert without_time("pairs.jsonl") == without_time("whole.jsonl")
    assert len(rows("pairs.done.jsonl")) == len(rows("whole.done.jsonl"))


def test_the_answers_of_rows_are_written_against_the_models_own(command):
    conversation = [
        {"role": "system", "content": "Sigues breu."}, {"role": "user", "content": "Hola"},
        {"role": "assistant", "content": "Bon dia"}, {"role": "user", "content": "Com va?"},
        {"role": "assistant", "content": " Molt bé. "},
    ]  # fmt: skip
    content = [{"messages": conversation}, {"prompt": "la mar", "answer": "és blava"}, {"prompt": "el sol"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    code, out, _ = command("--by", "reference", "--prompts", "rows.jsonl", "--max-new-tokens", "4")
    assert code == 0
    first, second = rows()
    assert first["prompt"] == conversation[:-1] and first["chosen"] == [{"role": "assistant", "content": "Molt bé."}]
    assert second["chosen"][0]["content"] == "és blava" and "reasons" not in second and second["by"] == "reference"
    assert "Prompts  3; 1 have no answer in their row\n" in out
    own = second["rejected"][0]["content"]
    Path("rows.jsonl").write_text(json.dumps({"prompt": "la mar", "answer": own}) + "\n", encoding="utf-8")
    out = command("--by", "reference", "--prompts", "rows.jsonl", "--max-new-tokens", "4", "--out", "same.jsonl")[1]
    assert "No pair  1 (the answer is the one of the row)\n" in out and rows("same.jsonl") == []
    assert "Next " not in out


def test_prompts_that_leave_no_room_in_the_context_are_counted(command):
    Path("prompts.txt").write_text("Hola\n" + "la mar i el bosc " * 80 + "\nHola\n\n")
    code, out, _ = command(*QUICK)
    assert code == 0
    assert "Prompts  2; 1 more are the same as an earlier one\n" in out
    assert "1 (no room for an answer in the context)" in out


def test_languages_are_recognized_by_the_rule(command, monkeypatch):
    texts = []

    def recognize(text: str) -> str:
        texts.append(text)
        return "ca" if len(text) % 2 else "en"

    monkeypatch.setattr(prefer, "language_recognizer", lambda: recognize)
    options = [option if option != "any" else "ca" for option in QUICK]
    code, out, _ = command(*options)
    assert code == 0 and texts and "are not in another language than ca" in out
    assert any("another language" in row["reasons"] for row in rows())


PERSON = ("--by", "person", "--max-new-tokens", "12", "--temperature", "1.5")


def answers_typed(monkeypatch: pytest.MonkeyPatch, *typed: str) -> None:
    """Let a person type lines, and then Ctrl-D; "^C" is Ctrl-C."""
    lines = iter(typed)

    def read(question: str = "") -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)


def test_a_person_chooses_skips_and_undoes(command, monkeypatch):
    answers_typed(monkeypatch, "u", "x", "A", "skip", "u", "b", "q")
    code, out, _ = command(*PERSON)
    assert code == 0
    assert "There is nothing to undo" in out and "a or b: that answer is better" in out
    first, second = rows()
    assert [row["prompt"][0]["content"] for row in (first, second)] == PROMPTS[:2]
    shown = out.split("\n[2 of 9]\n")[0].split("\na) ")[1].split("\nb) ")
    assert shown[0].startswith(first["chosen"][0]["content"]) and first["by"] == "person"
    assert out.count("[2 of 9]") == 2
    assert [entry["outcome"] for entry in rows("pairs.done.jsonl")[1:]] == ["pair", "pair"]

    answers_typed(monkeypatch, "s", "^C")
    code, out, _ = command(*PERSON)
    assert (
        code == 130 and "2 prompts done before" in out and "user: el sol i la lluna" in out and "user: Hola" not in out
    )
    answers_typed(monkeypatch)
    code, out, _ = command(*PERSON)
    assert code == 0 and "user: Bon dia" in out and "el sol i la lluna" not in out
    assert [entry["outcome"] for entry in rows("pairs.done.jsonl")[1:]] == ["pair", "pair", "skipped by the person"]


@pytest.mark.slow
def test_a_person_chooses_in_a_real_terminal(folder):
    arguments = ["-m", "cucafera.prefer", "outputs/chat", "--prompts", "prompts.txt", "--out", "pairs.jsonl", *PERSON]
    terminal = PseudoTerminal(arguments, folder)
    terminal.wait_for("[1 of 9]")
    terminal.wait_for("q(uit)> ")
    terminal.type("a\n")
    terminal.wait_for("[2 of 9]")
    terminal.wait_for("q(uit)> ")
    assert len(rows(folder / "pairs.jsonl")) == 1, "a judgement is on the disk before the next question"
    terminal.type("\x03")
    terminal.wait_for("Interrupted: what is done is in pairs.jsonl; the same command continues")
    assert terminal.exit_code() == 130
    assert len(rows(folder / "pairs.jsonl")) == 1


@pytest.mark.slow
def test_a_killed_command_continues_to_the_same_file(folder):
    many = folder / "many.txt"
    many.write_text("".join(f"{first} {second}\n" for first in PROMPTS for second in PROMPTS), encoding="utf-8")
    arguments = ("-m", "cucafera.prefer", "outputs/chat", "--prompts", "many.txt", *QUICK, "--out")
    assert run_command(*arguments, "whole.jsonl", cwd=folder).returncode == 0
    for lines, number in ((5, signal.SIGINT), (30, signal.SIGKILL)):
        process = Process([*arguments, "pairs.jsonl"], folder)
        path, end = folder / "pairs.done.jsonl", time.monotonic() + 60
        while not path.exists() or len(path.read_bytes().splitlines()) < lines:
            assert time.monotonic() < end and process.poll() is None
        process.send_signal(number)
        assert process.wait(30) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert run_command(*arguments, "pairs.jsonl", cwd=folder).returncode == 0
    assert without_time(folder / "pairs.jsonl") == without_time(folder / "whole.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nowhere.txt"], "--prompts: there is no file nowhere.txt"),
        (["--prompts", "empty.txt"], "--prompts empty.txt holds no prompt: write one per line, or rows with a column"),
        (["--prompts", " "], "--prompts is empty"),
        (["--prompts", "rows.jsonl"], "--prompts rows.jsonl holds no prompt: "),
        (["--prompts", "page.pdf"], "--prompts: page.pdf has a format that cannot be read: extract its text"),
        (["--prompts", "texts", "--out", "texts/pairs.jsonl"], "--out texts/pairs.jsonl is one of the files of --pro"),
        (["--prompts", "mine.jsonl", "--out", "mine.jsonl"], "--out mine.jsonl is one of the files of --prompts"),
        (["--out", "pairs.json"], "--out pairs.json: give the name of a .jsonl file, which preference tuning reads"),
        (["--out", "nowhere/pairs.jsonl"], "--out nowhere/pairs.jsonl: there is no folder nowhere"),
        (["--out", "~no-such-user/x.jsonl"], "--out: ~no-such-user/x.jsonl cannot be written: "),
        (["--out", f"{'x' * 300}.jsonl"], "x.jsonl cannot be written: File name too long"),
        (["--prompts", "~no-such-user/x.txt"], "--prompts: there is no file ~no-such-user/x.txt"),
        (["--out", "link.jsonl"], "link.jsonl cannot be written: it is a symlink, which is not followed"),
        (["--out", "folder.jsonl"], "folder.jsonl cannot be written: "),
        (["--out", "mine.jsonl"], "--out mine.jsonl has 1 row, and there is no mine.done.jsonl that says how they"),
        (["--answers", "1"], "--answers is 1; it must be from 2 to 64: a pair has two answers"),
        (["--length", "9"], "--length is '9'; it must be the fewest and the most words of an answer, such as 1,150"),
        (["--length", "9,2"], "--length is '9,2'; it must be the fewest and the most words"),
        (["--language", "cat"], "--language is 'cat'; it must be one of ca, es, en, fr, "),
        (["--slots", "0"], "--slots is 0; it must be from 1 to 1,024"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["--temperature", "0"], "temperature is 0, with which all answers to a prompt are the same"),
        (["--top-p", "0"], "top_p is 0; it must be above 0 and at most 1"),
        (["--by", "person", "--answers", "2"], "--answers has no effect with --by person: only rules compare several"),
        (["--by", "reference", "--length", "1,9"], "--length has no effect with --by reference: only rules compare"),
        (["--by", "reference"], "--by reference needs an answer in the rows of prompts.txt, and no row has one"),
        (["--by", "dice"], "argument --by: invalid choice: 'dice'"),
        (["--promts", "x.txt"], "there is no option --promts; did you mean --prompts?"),
    ],
)
def test_a_wrong_command_line_is_refused_with_exit_code_2(command, arguments, message):
    Path("empty.txt").write_text("\n\n")
    Path("page.pdf").write_text("x")
    Path("rows.jsonl").write_text('{"id": 1}\n')
    Path("mine.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("link.jsonl").symlink_to("elsewhere.jsonl")
    Path("folder.jsonl").mkdir()
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("Hola")
    any_language = [] if "--language" in arguments or "--by" in arguments else ["--language", "any"]
    code, _, err = command(*arguments, *any_language)
    assert code == 2 and message in err and "Traceback" not in err
    assert not Path("pairs.jsonl").exists() and not Path("pairs.done.jsonl").exists()


def test_a_model_without_conversations_is_refused(command):
    code, _, err = command(*QUICK, model="outputs/base")
    assert code == 2 and "outputs/base was not trained on conversations, so it gives no answers to compare" in err
    assert "+experiment=finetune init_from=outputs/base` makes a chat model of it" in err


def test_a_file_made_with_other_settings_or_another_model_is_refused(command, runs):
    command(*QUICK)
    code, _, err = command(*QUICK, "--seed", "3", "--top-p", "0.5")
    assert code == 2
    assert "--out pairs.jsonl was made with --seed 0, --top-p 0.95, and now it is 3, 0.5: give the same, or" in err
    first = sorted((runs / "outputs" / "chat" / "checkpoints").glob("*.ckpt"))[0]
    code, _, err = command(*QUICK, model=str(first))
    assert code == 2 and "--out pairs.jsonl holds pairs of another model, chat: give another --out FILE" in err
    Path("pairs.jsonl").unlink()
    code, _, err = command(*QUICK)
    assert code == 2 and "pairs.done.jsonl lists pairs, and pairs.jsonl has none: delete pairs.done.jsonl" in err


def test_two_commands_do_not_write_into_one_file(command, monkeypatch):
    with open_pair_file(Path("pairs.jsonl"), "chat", "rules", {}):
        code, _, err = command(*QUICK)
    assert code == 2 and "--out pairs.jsonl: another command is writing pairs to it" in err


def test_a_missing_package_for_languages_is_reported_before_the_model_is_loaded(command, monkeypatch):
    def missing():
        raise UserError("recognizing languages needs py3langid: pip install '.[language]'")

    monkeypatch.setattr(prefer, "language_recognizer", missing)
    code, _, err = command()
    assert (code, err) == (2, "recognizing languages needs py3langid: pip install '.[language]'\n")


def test_pairs_of_an_exported_model(command, folder):
    pytest.importorskip("transformers")
    exported = run_command("-m", "cucafera.export", "outputs/chat", "--to", "hf", "hf", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    command(*QUICK, "--out", "of_run.jsonl")
    code, _, err = command(*QUICK, "--out", "of_export.jsonl", model="hf")
    assert code == 0, err
    of_run, of_export = (without_time(name) for name in ("of_run.jsonl", "of_export.jsonl"))
    assert [row | {"model": ""} for row in of_run] == [row | {"model": ""} for row in of_export]


def test_refusals_import_nothing_heavy(folder):
    arguments = ["outputs/nowhere", "--prompts", "prompts.txt", "--out", "pairs.jsonl", "--language", "any"]
    assert not imported_packages("prefer", arguments, folder, 2) & {"torch", *HEAVY}
    arguments[0] = "outputs/chat"
    assert not imported_packages("prefer", arguments, folder, 0) & HEAVY


def test_rules_that_find_nothing_to_choose_between_are_reported_with_advice(command, monkeypatch):
    monkeypatch.setattr("cucafera.pairs.rules.Rules.broken_by", lambda rules, answer: frozenset())
    code, out, _ = command(*QUICK)
    assert code == 0 and f"No pair  {len(PROMPTS)} (all answers keep the rules)\n" in out
    assert "\nAdvice   the rules find few better and worse answers: more --answers" in out and "Next" not in out


@pytest.mark.parametrize(("text", "code"), [("a\nb\n", 0), ("\udcff\n", 0)])
def test_a_pipe_may_answer_for_the_person(folder, text, code):
    arguments = ["-m", "cucafera.prefer", "outputs/chat", "--prompts", "prompts.txt", "--out", "pairs.jsonl", *PERSON]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, input=text.encode(errors="surrogateescape"), capture_output=True
    )
    assert done.returncode == code, done.stderr
    assert len(rows(folder / "pairs.jsonl")) == text.count("\n") - ("\udcff" in text)


def test_output_that_no_one_reads_does_not_end_the_command(folder):
    arguments = ["-m", "cucafera.prefer", "outputs/chat", "--prompts", "prompts.txt", "--out", "pairs.jsonl", *QUICK]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, *arguments], cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert len(rows(folder / "pairs.done.jsonl")) == len(PROMPTS) + 1
