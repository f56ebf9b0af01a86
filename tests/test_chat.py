"""The chat command: its terminal, what it refuses, and what it imports."""

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
from cucafera.chat import Terminal
from cucafera.config.schema import SamplingConfig
from cucafera.data.chatml import Message
from cucafera.generation.generate import Finished, TextDelta, TorchBackend, Usage
from cucafera.generation.session import ChatSession
from cucafera.interop.trained import TrainedModel, load_trained
from cucafera.runs.folder import RunFolder


@pytest.fixture
def trained(runs: Path) -> TrainedModel:
    return load_trained(str(runs / "outputs" / "chat"))


def session_of(trained: TrainedModel) -> ChatSession:
    sampling = SamplingConfig(max_new_tokens=8, temperature=1.0)
    return ChatSession(TorchBackend(trained.model), trained.tokenizer, sampling, torch.Generator().manual_seed(0))


def test_a_model_is_loaded_from_its_path_alone(runs, trained):
    assert trained.chats
    best = RunFolder(runs / "outputs" / "chat").checkpoints.best()
    assert best is not None and trained.checkpoint == best.path
    assert not load_trained(str(runs / "outputs" / "base")).chats
    by_file = load_trained(str(best.path))
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, by_file.model.state_dict()[name])
    assert trained.model.cos.device.type == "cpu" and trained.model.cos[1, 0] == torch.tensor(1.0).cos()


def converse(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch, capsys, *lines: str) -> tuple[ChatSession, str]:
    inputs = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(inputs, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    session = session_of(trained)
    Terminal(session, trained.chats).run()
    return session, capsys.readouterr().out


def test_commands(trained, monkeypatch, capsys, tmp_path):
    lines = ("/system", "/system Sigues breu.", "/redo", "/save", "/nope", "/help", "")
    session, out = converse(trained, monkeypatch, capsys, *lines)
    assert session.system == "Sigues breu."
    assert "(system: none)" in out
    assert "(system: Sigues breu.)" in out
    assert "There is no answer to redo." in out
    assert "File name missing: /save FILE.jsonl" in out
    assert "There is no command /nope." in out
    assert out.count("/reset          start a new conversation") == 2

    session.history = [Message("user", "a"), Message("assistant", "b")]
    terminal = Terminal(session, chats=True)
    path = tmp_path / "saved.jsonl"
    for _ in range(2):
        terminal.execute(f"/save {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    messages = [{"role": message.role, "content": message.content} for message in session.messages()]
    assert rows == [{"messages": messages}] * 2
    terminal.execute(f"/save {tmp_path}/nowhere/x.jsonl")
    assert "cannot be written" in capsys.readouterr().out
    terminal.execute("/reset")
    assert session.history == []


def test_an_empty_response_is_shown_as_such(trained, capsys):
    terminal = Terminal(session_of(trained), chats=True)
    assert terminal.show(iter([TextDelta(""), Finished("stop", Usage(3, 1))]))
    assert capsys.readouterr().out == "(empty response)\n\n"
    assert terminal.show(iter([TextDelta("la "), TextDelta(""), TextDelta("mar"), Finished("length", Usage(3, 3))]))
    assert capsys.readouterr().out == "la mar\n\n"


def test_saving_appends_a_line_even_to_a_file_without_a_last_newline(trained, tmp_path, capsys):
    session = session_of(trained)
    session.history = [Message("user", "a"), Message("assistant", "b")] * 2
    terminal = Terminal(session, chats=True)
    path = tmp_path / "mine.jsonl"
    path.write_text('{"messages": []}')
    terminal.execute(f"/save {path}")
    first, second = path.read_text().splitlines()
    assert first == '{"messages": []}'
    assert len(json.loads(second)["messages"]) == 4
    for name in ("~no-such-user/x.jsonl", "a\0b"):
        terminal.execute(f"/save {name}")
        assert "cannot be written" in capsys.readouterr().out


def test_a_base_model_has_no_conversation(runs, capsys):
    terminal = Terminal(session_of(load_trained(str(runs / "outputs" / "base"))), chats=False)
    for command in ("/redo", "/system x", "/save x", "/reset"):
        terminal.execute(command)
        assert "needs a model that was trained on conversations" in capsys.readouterr().out


# The command


def run_chat(runs: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cucafera.chat", *arguments],
        cwd=runs, input=text, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_one_prompt_is_answered_and_a_base_model_continues(runs):
    settings = ("--seed", "1", "--max-new-tokens", "6")
    answered = run_chat(runs, "outputs/chat", "--prompt", "Hola", *settings)
    assert (answered.returncode, answered.stderr) == (0, "")
    assert answered.stdout == run_chat(runs, "outputs/chat", "--prompt", "Hola", *settings).stdout
    continued = run_chat(runs, "outputs/base", "--prompt", "la mar", *settings)
    assert continued.returncode == 0 and continued.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/nowhere"], "outputs/nowhere: there is no such run folder or checkpoint"),
        (["outputs"], "outputs: the folder holds no checkpoint"),
        (["corpus.jsonl"], "corpus.jsonl is not a checkpoint: checkpoint files end with .ckpt"),
        (["outputs/chat", "--temperature", "-1"], "temperature is -1; it must be 0 or at least 0.001"),
        (["outputs/chat", "--top-p", "0"], "top_p is 0; it must be above 0 and at most 1"),
        (["outputs/chat", "--temperature", "inf"], "temperature is inf; it must be a number"),
        (["outputs/chat", "--temperature", "1e-30"], "temperature is 1e-30; it must be 0 or at least 0.001"),
        (["outputs/chat", "--prompt", " "], "--prompt is empty"),
        (["outputs/chat", "--prompt", "la mar i el bosc " * 80], "Shorten it"),
        (["outputs/base", "--system", "x"], "--system needs a model that was trained on conversations"),
        (["outputs/chat/tokenizer.json"], "tokenizer.json is not a checkpoint: checkpoint files end with .ckpt"),
        (["nowhere.gguf"], "nowhere.gguf: there is no such .gguf file"),
        ([""], "RUN is empty"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_a_wrong_command_line_is_refused_with_exit_code_2(runs, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(sys, "argv", ["chat", *arguments])
    for output in ("stdout", "stderr"):  # of a program they can be reconfigured
        monkeypatch.setattr(getattr(sys, output), "reconfigure", lambda **how: None, raising=False)
    with pytest.raises(SystemExit) as exited:
        chat.main()
    assert exited.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_a_refusal_of_the_program_is_one_line_without_a_stack_trace(runs):
    result = run_chat(runs, "outputs/nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "outputs/nowhere: there is no such run folder or checkpoint\n"


HEAVY = ("lightning", "torchmetrics", "transformers", "tensorboard", "sklearn", "scipy", "hydra")
IMPORTS = """
import sys
sys.argv[0] = "chat"
from cucafera import chat
try:
    chat.main()
finally:
    print(sorted({name.partition(".")[0] for name in sys.modules} & set(%r)), file=sys.stderr)
"""


def imported(runs: Path, modules: tuple[str, ...], *arguments: str) -> str:
    """Run the chat command in a fresh interpreter; return which of these modules it imported."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS % (modules,), *arguments], cwd=runs, capture_output=True, text=True, timeout=60
    )
    return result.stderr.splitlines()[-1] if result.returncode in (0, 2) else result.stderr


def test_chatting_imports_nothing_of_training(runs):
    assert imported(runs, HEAVY, "outputs/chat", "--prompt", "Hola", "--max-new-tokens", "2") == "[]"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["outputs/nowhere"], ["nowhere.gguf"], ["outputs/chat", "--top-p", "0"], ["outputs/chat", "--nope"]],
    ids=" ".join,
)
def test_help_and_refusals_come_before_torch_is_imported(runs, arguments):
    assert imported(runs, ("torch", "tokenizers", "numpy", *HEAVY), *arguments) == "[]"


def test_lines_from_a_pipe_are_answered_until_they_end(runs):
    result = run_chat(
        runs, "outputs/chat", "--max-new-tokens", "4", text="Hola\n/system Sigues breu.\nBon dia\n/quit\nx\n"
    )
    assert result.returncode == 0
    assert "(system: Sigues breu.)" in result.stdout
    assert "> " not in result.stdout


def _become_controlling_terminal() -> None:
    """Make the input of the new process its terminal, so that Ctrl-C reaches it as from a shell."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore it


class PseudoTerminal:
    """A program in its own terminal."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=_become_controlling_terminal,
        )  # fmt: skip
        os.close(slave)
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read until a text has come after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += self._decoder.decode(os.read(self.master, 4096))
        self.text = self.text.split(text, 1)[1]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def exit_code(self) -> int:
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
        terminal.type("\x03")  # Ctrl-C at the prompt does not exit
        terminal.wait_for("(Ctrl-D or /quit exits)")
        terminal.wait_for("\n> ")
        terminal.type("/redo\n")
        terminal.wait_for("\n> ")
        terminal.type("/save saved.jsonl\n")
        terminal.wait_for("\n> ")
        terminal.type("/nope\n")
        terminal.wait_for("There is no command /nope.")
        terminal.wait_for("\n> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    finally:
        terminal.process.kill()


SLOW_MODEL = """
import time
import cucafera.generation.generate as generation
import cucafera.chat

decode_steps = generation.decode_steps
def slowly(*arguments):
    while True:
        for tokens in decode_steps(*arguments):
            time.sleep(0.05)
            yield [20]
generation.decode_steps = slowly
cucafera.chat.main()
"""


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(runs):
    terminal = PseudoTerminal(["-c", SLOW_MODEL, "outputs/chat"], runs)
    try:
        terminal.wait_for("\n> ")
        terminal.type("Hola\n")
        terminal.wait_for("Hola")
        time.sleep(1)
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("[stopped]")
        terminal.wait_for("\n> ")
        terminal.type("/quit\n")
        assert terminal.exit_code() == 0
    finally:
        terminal.process.kill()
