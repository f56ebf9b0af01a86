"""The chat command: `python -m cucafera.chat RUN` talks to a trained model in the terminal.

A model that was trained on conversations answers; a base model continues the text. The conversation itself is
`generation.session.ChatSession`; this file reads lines, obeys commands and prints.
"""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cucafera.config.errors import UserError
from cucafera.options import add_device, add_sampling, command_parser, sampling_of
from cucafera.output import protect_output
from cucafera.process import raise_on_interrupt
from cucafera.runs.locate import ModelLocation, locate_model

if TYPE_CHECKING:
    from cucafera.data.tokenizer import Tokenizer
    from cucafera.generation.generate import DecodingBackend, GenerationEvent
    from cucafera.generation.session import ChatSession

EXIT_INTERRUPTED = 130
REPLACED = "\N{REPLACEMENT CHARACTER}"

COMMANDS = """\
/reset          start a new conversation; the system message stays
/redo           answer the last message again
/system TEXT    set the system message; without TEXT: show it; /system - removes it
/save FILE      append the conversation to a .jsonl file, in the format that finetuning reads
/help           show this list
/quit           exit, as Ctrl-D does; Ctrl-C stops an answer"""


class Terminal:
    """Reads messages and commands, and prints answers as they are generated.

    Args:
        session: The conversation.
        chats: True if the model was trained on conversations; else each line is a text to continue.
    """

    def __init__(self, session: "ChatSession", chats: bool) -> None:
        self.session = session
        self.chats = chats

    def run(self) -> None:
        """Read lines until /quit or the end of the input."""
        while True:
            try:
                if sys.stdin is None:
                    return
                line = input("> " if _is_terminal() else "").strip()
                if REPLACED in line:
                    print(f"(what is not {sys.stdin.encoding} in this line is replaced by {REPLACED})")
                if line in ("/quit", "/exit"):
                    return
                if line.startswith("/"):
                    self.execute(line)
                elif line:
                    self.respond(line)
            except EOFError:
                return
            except UserError as error:
                print(error)
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit exits)")

    def respond(self, text: str) -> bool:
        """Print the answer to a message, or the continuation of a text; see `show`."""
        return self.show(self.session.answer(text) if self.chats else self.session.complete(text))

    def show(self, events: "Iterator[GenerationEvent]") -> bool:
        """Print a response as it is generated. Returns False if Ctrl-C cancelled it.

        Raises:
            UserError: there is nothing to respond to, or no space for a response.
        """
        from cucafera.generation.generate import TextDelta

        is_empty = True
        try:
            for event in events:
                if isinstance(event, TextDelta) and event.text:
                    print(event.text, end="", flush=True)
                    is_empty = False
        except KeyboardInterrupt:
            events.close()  # type: ignore[attr-defined]
            print(" [stopped]\n")
            return False
        print("(empty response)\n" if is_empty else "\n")
        return True

    def execute(self, line: str) -> None:
        """Execute a command line, such as `/system TEXT`. Raises UserError as `show` does."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command in ("/reset", "/redo", "/system", "/save") and not self.chats:
            print(f"{command} needs a model that was trained on conversations; this one only continues texts.")
        elif command == "/reset":
            self.session.reset()
            print("(new conversation)")
        elif command == "/redo":
            self.show(self.session.redo())
        elif command == "/system":
            if argument:
                self.session.system = "" if argument == "-" else argument
            print(f"(system: {self.session.system or 'none'})")
        elif command == "/save":
            self._save(argument)
        elif command == "/help":
            print(COMMANDS)
        else:
            print(f"There is no command {command}.\n{COMMANDS}")

    def _save(self, file_name: str) -> None:
        if not file_name:
            print("File name missing: /save FILE.jsonl")
            return
        if not self.session.history:
            print("There is nothing to save.")
            return
        messages = [{"role": message.role, "content": message.content} for message in self.session.messages()]
        row = {"messages": messages}
        try:
            path = Path(file_name).expanduser()
            _append_line(path, json.dumps(row, ensure_ascii=False))
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: a null byte; RuntimeError: no such ~USER
            print(f"{file_name} cannot be written: {error}")
            return
        print(f"(saved to {path})")


def _append_line(path: Path, line: str) -> None:
    """Append a line, after a newline if the last line has none."""
    with path.open("a+b") as file:
        unfinished = file.seek(0, 2) > 0 and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
        file.write((("\n" if unfinished else "") + line + "\n").encode())


def main() -> None:
    """Load a model, and chat with it or answer one prompt."""
    protect_output(is_required=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    arguments = command_line_parser().parse_args()
    try:
        sys.exit(chat(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def chat(arguments: argparse.Namespace) -> int:
    """Chat as the command line says; returns the exit code.

    Raises:
        UserError: an option is out of bounds, or the model cannot be loaded or used so.
    """
    sampling = sampling_of(arguments)
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError("--prompt is empty")
    location = locate_model(arguments.run)

    import torch

    model = _load(arguments.run, location, arguments.device)
    if arguments.system and not model.chats:
        raise UserError(f"--system needs a model that was trained on conversations; {arguments.run} was not")

    from cucafera.generation.session import ChatSession

    generator = torch.Generator(model.backend.device)
    if arguments.seed is None:
        generator.seed()
    else:
        generator.manual_seed(arguments.seed % 2**63)
    session = ChatSession(model.backend, model.tokenizer, sampling, generator)
    session.system = (arguments.system or "").strip()
    terminal = Terminal(session, model.chats)
    for note in model.notes:
        print(f"{note}.", file=sys.stderr)  # never among the answers
    raise_on_interrupt()
    if arguments.prompt is not None:
        return 0 if terminal.respond(arguments.prompt) else EXIT_INTERRUPTED
    if _is_terminal():
        _greet(model)
    terminal.run()
    return 0


class _LoadedModel(NamedTuple):
    """A model as the terminal uses it.

    Attributes:
        backend: Its decoding backend.
        tokenizer: Its tokenizer.
        chats: True if it was trained on conversations.
        description: One line about it.
        notes: What was changed or assumed on loading, as sentences.
    """

    backend: "DecodingBackend"
    tokenizer: "Tokenizer"
    chats: bool
    description: str
    notes: tuple[str, ...]


def _load(source: str, location: ModelLocation, device_name: str) -> _LoadedModel:
    """Load a model on a device; llama.cpp places that of a GGUF file itself.

    Raises:
        UserError: the model cannot be loaded, or there is no such device.
    """
    if location.kind == "gguf":
        from cucafera.interop.llama_cpp import LlamaCpp

        assert location.path is not None
        llama = LlamaCpp(location.path, device_name)
        description = f"{llama.path}: {llama.parameters:,} parameters, run by llama.cpp"
        return _LoadedModel(llama, llama.tokenizer, llama.chats, description, llama.notes)

    from cucafera.device import resolve_device

    device = resolve_device(device_name, os.environ)  # CUDA warns once: before other imports can trigger that

    from cucafera.generation.generate import TorchBackend
    from cucafera.interop.trained import load_trained

    trained = load_trained(source)
    trained.model.to(device)
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    steps = "" if trained.step is None else f", after {trained.step:,} steps"
    description = f"{trained.checkpoint}: {parameters:,} parameters{steps}"
    return _LoadedModel(TorchBackend(trained.model), trained.tokenizer, trained.chats, description, trained.notes)


def _greet(model: _LoadedModel) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then has line editing and history
    print(model.description)
    if not model.chats:
        print("It was not trained on conversations: it continues what you write.")
    print("/help lists the commands.")


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "chat",
        description="Chat with the model of a run, of a Hugging Face folder or of a .gguf file.\n"
        "A base model, which was not trained on conversations, continues each text.",
        epilog="Commands in the terminal:\n" + COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder (its best checkpoint), a checkpoint, a Hugging Face folder or name, or a .gguf file",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", metavar="TEXT", help="system message: how the model should behave")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed: the same seed gives the same answers")
    add_device(parser)
    add_sampling(parser, max_new_tokens=256)
    return parser


def _is_terminal() -> bool:
    """True if a person types; standard input may be closed."""
    return sys.stdin is not None and sys.stdin.isatty()


if __name__ == "__main__":
    main()
