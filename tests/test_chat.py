"""The chat door: a conversation, its commands, and a real terminal."""

import codecs
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from cucafera import chat
from cucafera.chat import Chat, Terminal
from cucafera.config import SamplingConfig, UserError
from cucafera.data.chat import Message, render_prompt
from cucafera.interop.trained import TrainedModel, load_trained
from cucafera.run import train
from cucafera.training.run_folder import RunFolder
from tests.conftest import compose_small_chat, compose_small_run, write_corpus


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model in outputs/base and a chat model in outputs/chat, both of a few steps."""

    folder = tmp_path_factory.mktemp("runs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_corpus(folder / "corpus.jsonl", documents=80)
        train(compose_small_run(folder / "corpus.jsonl", "name=base", "model.max_position_embeddings=64"), [])
        train(compose_small_chat(folder, "name=chat", "init_from=outputs/base"), [])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def trained(runs: Path) -> TrainedModel:
    return load_trained(str(runs / "outputs" / "chat"))


def chat_with(trained: TrainedModel, **sampling) -> Chat:
    settings = {"max_new_tokens": 8, "temperature": 1.0} | sampling
    return Chat(trained, SamplingConfig(**settings), torch.Generator().manual_seed(0))


def say(chat: Chat, text: str) -> str:
    return "".join(chat.answer(text))


def test_a_model_is_loaded_from_its_path_alone(runs, trained):
    assert trained.chats
    best = RunFolder(runs / "outputs" / "chat").checkpoints.best()
    assert best is not None and trained.checkpoint == best.path
    assert not load_trained(str(runs / "outputs" / "base")).chats
    by_file = load_trained(str(best.path))
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, by_file.model.state_dict()[name])
    assert trained.model.cos.device.type == "cpu" and trained.model.cos[1, 0] == torch.tensor(1.0).cos()


def test_answers_go_into_the_history_and_the_history_into_the_prompt(trained):
    chat = chat_with(trained, max_new_tokens=4)
    first = say(chat, "Hola")
    assert chat.history == [Message("user", "Hola"), Message("assistant", first)] if first.strip() else []
    chat.history = [Message("user", "a"), Message("assistant", "b")]
    chat.system = "Sigues breu."
    assert chat.messages() == [Message("system", "Sigues breu."), Message("user", "a"), Message("assistant", "b")]


def test_the_same_seed_gives_the_same_conversation(trained):
    conversations = []
    for _ in range(2):
        chat = chat_with(trained)
        conversations.append([say(chat, "Hola"), say(chat, "Bon dia")])
    assert conversations[0] == conversations[1]


def test_the_oldest_turns_are_not_shown_when_the_context_is_full_but_stay_in_the_history(trained, monkeypatch):
    chat = chat_with(trained)
    chat.system = "mar"
    old = [Message(role, text) for text in ("un", "dos", "tres") for role in ("user", "assistant")]
    chat.history = list(old)
    prompts = []
    monkeypatch.setattr(chat, "_written", lambda prompt: prompts.append(prompt) or iter(["bosc"]))
    assert say(chat, "sol") == "bosc"
    (prompt,) = prompts
    assert len(prompt) <= 64 - 8
    fitting = [
        shown
        for forgotten in range(4)
        if (shown := render_prompt(
            [Message("system", "mar"), *old[2 * forgotten :], Message("user", "sol")], trained.tokenizer
        )) and len(shown) <= 64 - 8
    ]  # fmt: skip
    assert prompt == fitting[0]
    assert chat.history == [*old, Message("user", "sol"), Message("assistant", "bosc")]


def test_a_message_that_is_too_long_is_refused_and_forgotten(trained):
    chat = chat_with(trained)
    chat.history = [Message("user", "a"), Message("assistant", "b")]
    with pytest.raises(UserError, match=r"this message has \d+ tokens.*context of 64 leaves room for 56"):
        say(chat, "la mar i el bosc " * 20)
    chat.system = "la mar " * 30
    with pytest.raises(UserError, match="the system's message, which /system - takes back"):
        "".join(chat.redo())
    assert chat.history == [Message("user", "a"), Message("assistant", "b")]


def test_what_is_no_text_is_asked_about_all_the_same(trained):
    chat = chat_with(trained)
    say(chat, "hola \udcff")
    assert all("\udcff" not in message.content for message in chat.messages())


def test_an_answer_that_is_left_early_keeps_what_was_said(trained):
    chat = chat_with(trained, max_new_tokens=30)
    for seed in range(20):
        chat.history, answering = [], chat.answer("Hola")
        chat.generator.manual_seed(seed)
        piece = next(answering, "")
        if piece.strip():
            answering.close()
            assert chat.history == [Message("user", "Hola"), Message("assistant", piece)]
            return
    pytest.fail("the model never said anything")


def converse(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch, capsys, *lines: str) -> tuple[Chat, str]:
    answers = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(answers, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    chat = chat_with(trained)
    Terminal(chat).run()
    return chat, capsys.readouterr().out


def test_commands(trained, monkeypatch, capsys, tmp_path):
    chat, out = converse(trained, monkeypatch, capsys, "/system Sigues breu.", "/redo", "/save", "/nope", "/help", "")
    assert chat.system == "Sigues breu."
    assert "(system: Sigues breu.)" in out
    assert "There is no answer to redo." in out
    assert "Say where: /save FILE.jsonl" in out
    assert "There is no command /nope." in out
    assert out.count("/reset          begin a new conversation") == 2

    chat.history = [Message("user", "a"), Message("assistant", "b")]
    terminal = Terminal(chat)
    path = tmp_path / "saved.jsonl"
    for _ in range(2):
        terminal._obey(f"/save {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"messages": [message._asdict() for message in chat.messages()]}] * 2
    terminal._obey(f"/save {tmp_path}/nowhere/x.jsonl")
    assert "cannot be written" in capsys.readouterr().out
    terminal._obey("/reset")
    assert chat.history == []


@pytest.fixture
def scripted(trained, monkeypatch):
    """A chat whose answers are given; an exception among them is raised."""
    chat = chat_with(trained)
    answers: list = []

    def written(prompt):
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return iter([answer] if answer else [])

    monkeypatch.setattr(chat, "_written", written)
    chat.history = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    return chat, answers


def contents(chat: Chat) -> str:
    return "".join(message.content for message in chat.history)


def test_redo_replaces_the_last_answer_and_keeps_it_when_nothing_is_said(scripted):
    chat, answers = scripted
    answers += ["e", "", KeyboardInterrupt(), "f"]
    assert "".join(chat.redo()) == "e"
    assert contents(chat) == "abce"
    assert "".join(chat.redo()) == ""
    with pytest.raises(KeyboardInterrupt):
        "".join(chat.redo())
    assert contents(chat) == "abce"
    assert "".join(chat.redo()) == "f"
    assert contents(chat) == "abcf"


def test_redo_asks_again_what_was_not_answered(scripted):
    chat, answers = scripted
    answers += ["", KeyboardInterrupt(), "h"]
    assert say(chat, "g") == ""
    with pytest.raises(KeyboardInterrupt):
        "".join(chat.redo())
    assert contents(chat) == "abcd"
    "".join(chat.redo())
    assert contents(chat) == "abcdgh"
    chat.reset()
    with pytest.raises(UserError, match="There is no answer to redo"):
        "".join(chat.redo())


def test_saving_appends_a_line_even_to_a_file_without_a_last_line_end(scripted, tmp_path, capsys):
    chat, _ = scripted
    path = tmp_path / "mine.jsonl"
    path.write_text('{"messages": []}')
    Terminal(chat)._obey(f"/save {path}")
    first, second = path.read_text().splitlines()
    assert first == '{"messages": []}'
    assert len(json.loads(second)["messages"]) == 4
    for name in ("~nobody-here/x.jsonl", "a\0b"):
        Terminal(chat)._obey(f"/save {name}")
        assert "cannot be written" in capsys.readouterr().out


def test_a_base_model_has_no_conversation(runs, capsys):
    terminal = Terminal(chat_with(load_trained(str(runs / "outputs" / "base"))))
    for command in ("/redo", "/system x", "/save x", "/reset"):
        terminal._obey(command)
        assert "needs a model that was trained on conversations" in capsys.readouterr().out


# The door itself


def chat_door(runs: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cucafera.chat", *arguments],
        cwd=runs, input=text, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_one_prompt_is_answered_and_a_base_model_continues(runs):
    settings = ("--seed", "1", "--max-new-tokens", "6")
    answered = chat_door(runs, "outputs/chat", "--prompt", "Hola", *settings)
    assert (answered.returncode, answered.stderr) == (0, "")
    assert answered.stdout == chat_door(runs, "outputs/chat", "--prompt", "Hola", *settings).stdout
    continued = chat_door(runs, "outputs/base", "--prompt", "la mar", *settings)
    assert continued.returncode == 0 and continued.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/nowhere"], "outputs/nowhere: there is no such run folder or checkpoint"),
        (["outputs"], "outputs: the folder holds no checkpoint"),
        (["corpus.jsonl"], "corpus.jsonl is not a checkpoint"),
        (["outputs/chat", "--temperature", "-1"], "temperature is -1; it must be at least 0"),
        (["outputs/chat", "--top-p", "0"], "top_p is 0; it must be above zero"),
        (["outputs/chat", "--temperature", "inf"], "temperature is inf; it must be a number"),
        (["outputs/chat", "--temperature", "1e-30"], "temperature is 1e-30; it must be 0 or at least 0.001"),
        (["outputs/chat", "--prompt", " "], "--prompt is empty"),
        (["outputs/chat", "--prompt", "la mar i el bosc " * 20], "Write a shorter one"),
        (["outputs/base", "--system", "x"], "--system needs a model that was trained on conversations"),
        (["outputs/chat/tokenizer.json"], "tokenizer.json is not a checkpoint: those end with .ckpt"),
        ([""], "RUN is empty"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_what_the_user_can_mend_is_told_with_code_2(runs, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(sys, "argv", ["chat", *arguments])
    for output in ("stdout", "stderr"):  # of a program they can be reconfigured
        monkeypatch.setattr(getattr(sys, output), "reconfigure", lambda **how: None, raising=False)
    with pytest.raises(SystemExit) as ended:
        chat.main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_a_refusal_of_the_program_is_one_line_without_a_stack_trace(runs):
    result = chat_door(runs, "outputs/nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "outputs/nowhere: there is no such run folder or checkpoint\n"


def test_lines_from_a_pipe_are_answered_until_they_end(runs):
    result = chat_door(
        runs, "outputs/chat", "--max-new-tokens", "4", text="Hola\n/system Sigues breu.\nBon dia\n/quit\nx\n"
    )
    assert result.returncode == 0
    assert "(system: Sigues breu.)" in result.stdout
    assert "> " not in result.stdout


def _take_the_terminal() -> None:
    """Runs in the new process: its input becomes its terminal, and Ctrl-C reaches it, as from a shell."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore it


class PseudoTerminal:
    """A program in a terminal of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=_take_the_terminal,
        )  # fmt: skip
        os.close(slave)
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Reads until a text has come after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += self._decoder.decode(os.read(self.master, 4096))
        self.text = self.text.split(text, 1)[1]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def ended(self) -> int:
        code = self.process.wait(timeout=30)
        os.close(self.master)
        return code


@pytest.mark.slow
def test_a_session_in_a_real_terminal(runs):
    terminal = PseudoTerminal(["-m", "cucafera.chat", "outputs/chat", "--max-new-tokens", "40", "--seed", "3"], runs)
    try:
        terminal.wait_for("parameters, after 12 steps")
        terminal.wait_for("\n> ")
        terminal.type("Hola, què tal?\n")
        terminal.wait_for("Hola, què tal?")
        terminal.wait_for("\n> ")
        time.sleep(0.5)  # as a person would; readline must be waiting
        terminal.type("\x03")  # Ctrl-C at the prompt does not leave
        terminal.wait_for("(Ctrl-D or /quit leaves)")
        terminal.wait_for("\n> ")
        terminal.type("/redo\n")
        terminal.wait_for("\n> ")
        terminal.type("/save saved.jsonl\n")
        terminal.wait_for("\n> ")
        terminal.type("/nope\n")
        terminal.wait_for("There is no command /nope.")
        terminal.wait_for("\n> ")
        terminal.type("\x04")
        assert terminal.ended() == 0
    finally:
        terminal.process.kill()


SLOW_WRITER = """
import time
import cucafera.generation.generate as generation
import cucafera.chat

columns = generation.token_columns
def slowly(*arguments):
    while True:
        for column in columns(*arguments):
            time.sleep(0.05)
            yield [20]
generation.token_columns = slowly
cucafera.chat.main()
"""


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(runs):
    terminal = PseudoTerminal(["-c", SLOW_WRITER, "outputs/chat"], runs)
    try:
        terminal.wait_for("\n> ")
        terminal.type("Hola\n")
        terminal.wait_for("Hola")
        time.sleep(1)
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("[stopped]")
        terminal.wait_for("\n> ")
        terminal.type("/quit\n")
        assert terminal.ended() == 0
    finally:
        terminal.process.kill()
