"""The chat command: `python -m cucafera.chat RUN` talks to a trained model in the terminal.

A model that was trained on conversations answers; a base model continues the text. The conversation itself is
`generation.session.ChatSession`; this file reads lines, obeys commands and prints.
"""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import argparse
import contextlib
import difflib
import functools
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cucafera.config.errors import UserError
from cucafera.generation.keyboard import QUOTES, Keyboard, UnclosedMessageError
from cucafera.options import (
    add_device,
    add_run,
    add_sampling,
    checked_sampling,
    choose_run,
    command_parser,
    loading_line,
    number,
    sampling_of,
    sampling_settings,
    shown_log,
)
from cucafera.output import announced, is_terminal, protect_output
from cucafera.process import raise_on_interrupt
from cucafera.runs.locate import ModelLocation, locate_model
from cucafera.storage import append_line

if TYPE_CHECKING:
    from cucafera.generation.request import GenerationEvent
    from cucafera.generation.session import ChatSession

EXIT_INTERRUPTED = 130
REPLACED = "\N{REPLACEMENT CHARACTER}"
NOTHING = "-"
"""The value of a command that removes what was set."""

CONVERSATION_COMMANDS = {
    "/reset": "start a new conversation; the system message stays",
    "/redo, /retry": "answer the last message again",
    "/undo": "remove the last message and its answer",
    "/system TEXT": "set the system message; without TEXT: show it; /system - removes it",
    "/save FILE.jsonl": "append the conversation to a file, in the format that finetuning reads",
}
"""Those that only a model trained on conversations has."""
OTHER_COMMANDS = {
    **{f"/{name} {'TEXT' if name == 'stop' else 'X'}": meaning for name, meaning in sampling_settings().items()},
    "/seed N": "the same seed gives the same answers",
    "/help": "show this list",
    "/quit, /exit": "exit, as Ctrl-D does, or Ctrl-C twice; Ctrl-C stops an answer, and keeps it as far as it came",
    "//TEXT": "send /TEXT",
    QUOTES: "begins and ends a message of several lines",
}
COMMANDS = "\n".join(
    f"{name:<{max(map(len, OTHER_COMMANDS))}}  {meaning}"
    for name, meaning in (CONVERSATION_COMMANDS | OTHER_COMMANDS).items()
)
ABBREVIATIONS = {"max_tokens": "max_new_tokens", "retry": "redo", "exit": "quit"}
"""Other names of commands, without their slash."""


def _words(commands: dict[str, str]) -> list[str]:
    """Return the names of commands, without slash and argument."""
    names = [name.split()[0].removeprefix("/") for title in commands for name in title.split(", ")]
    return [name for name in names if name.isidentifier()]


class Terminal:
    """Reads messages and commands, and prints answers as they are generated.

    Args:
        session: The conversation.
        chats: True if the model was trained on conversations; else each message is a text to continue.
        keyboard: Where messages come from.
        seed: The random seed that the session began with; None: random.
    """

    def __init__(self, session: "ChatSession", chats: bool, keyboard: Keyboard, seed: int | None = None) -> None:
        self.session = session
        self.chats = chats
        self.keyboard = keyboard
        self.seed = seed

    def run(self) -> int:
        """Read messages until /quit, the end of the input or a second Ctrl-C; return the exit code.

        Raises:
            UnclosedMessageError: a pipe ended within a message of several lines.
        """
        with self.keyboard.session():
            return self._run()

    def _run(self) -> int:
        is_interrupted = False
        while sys.stdin is not None:
            try:
                text, is_command = self.keyboard.read()
                is_interrupted = False
                if REPLACED in text:
                    print(f"(what is not {sys.stdin.encoding} in this message is replaced by {REPLACED})")
                if is_command and text.lower() in ("/quit", "/exit"):
                    return 0
                if is_command:
                    self.execute(text)
                elif text:
                    self.respond(text)
            except EOFError:
                print(end="\n" if self.keyboard.is_terminal else "")
                return 0
            except UserError as error:
                if isinstance(error, UnclosedMessageError) and not self.keyboard.is_terminal:
                    raise
                print(error)
            except KeyboardInterrupt:
                if is_interrupted or not self.keyboard.is_terminal:
                    print()
                    return EXIT_INTERRUPTED
                is_interrupted = True
                print("\n(Ctrl-C again, Ctrl-D or /quit exits)")
        return 0

    def respond(self, text: str) -> None:
        """Print the answer to a message, or the continuation of a text; see `show`."""
        self.show(self.session.answer(text) if self.chats else self.session.complete(text))

    def show(self, events: "Iterator[GenerationEvent]") -> None:
        """Print a response as it is generated; Ctrl-C in a terminal cancels it.

        Raises:
            UserError: there is nothing to respond to, or no space for a response.
            KeyboardInterrupt: Ctrl-C, where no message follows that could be typed.
        """
        from cucafera.generation.request import TextDelta

        is_empty = True
        with self.keyboard.unshown():
            try:
                for event in events:
                    if isinstance(event, TextDelta) and event.text:
                        print(event.text, end="", flush=True)
                        is_empty = False
            except KeyboardInterrupt:
                events.close()  # type: ignore[attr-defined]
                print(" [stopped]\n")
                if not self.keyboard.is_terminal:
                    raise
            else:
                print("(empty response)\n" if is_empty else "\n")

    def execute(self, line: str) -> None:
        """Execute a command, such as `/system TEXT`. Raises UserError as `show` does, and for wrong values."""
        first, *rest = line.split(maxsplit=1)
        name, argument = first.removeprefix("/").replace("-", "_").lower(), "".join(rest).strip()
        name = ABBREVIATIONS.get(name, name)
        commands: dict[str, Callable[[], None]] = {
            "reset": self._reset,
            "redo": lambda: self.show(self.session.redo()),
            "undo": self._undo,
            "system": lambda: self._set_system(argument),
            "save": lambda: self._save(argument),
            "seed": lambda: self._set_seed(argument),
            "help": lambda: print(COMMANDS),
            **{key: functools.partial(self._set, key, argument) for key in vars(self.session.sampling)},
        }
        if name in _words(CONVERSATION_COMMANDS) and not self.chats:
            raise UserError(f"{first} needs a model that was trained on conversations; this one only continues texts.")
        if name not in commands:
            nearest = difflib.get_close_matches(name, _words(CONVERSATION_COMMANDS | OTHER_COMMANDS), n=1)
            advice = f"Did you mean /{nearest[0]}?" if nearest else "/help lists the commands."
            raise UserError(f"There is no command {first}. {advice} A message that begins with / is sent by //")
        commands[name]()

    def _reset(self) -> None:
        self.session.reset()
        print("(new conversation)")

    def _undo(self) -> None:
        print(f"(removed: {self.session.undo()})")

    def _set_system(self, text: str) -> None:
        if text:
            self.session.system = "" if text == NOTHING else text
        print(f"(system: {self.session.system or 'none'})")

    def _set(self, name: str, text: str) -> None:
        """Set a setting of the sampling, within the bounds of the command line's option; without a text, show it."""
        sampling = self.session.sampling
        if text:
            value = number(text) if name != "stop" else [] if text == NOTHING else [text]
            self.session.sampling = sampling = checked_sampling(vars(sampling) | {name: value})
        shown = getattr(sampling, name)
        print(f"({name}: {', '.join(shown) or 'none' if isinstance(shown, list) else shown})")

    def _set_seed(self, text: str) -> None:
        if text:
            value = number(text)
            if not isinstance(value, int):
                raise UserError(f"seed is {text}; it must be a whole number")
            self.seed = value
            self.session.seed(value)
        print(f"(seed: {'random' if self.seed is None else self.seed})")

    def _save(self, file_name: str) -> None:
        if not file_name:
            raise UserError("File name missing: /save FILE.jsonl")
        if not file_name.endswith(".jsonl"):
            raise UserError(f"{file_name} is not the name of a .jsonl file, which finetuning reads: /save FILE.jsonl")
        if not self.session.history:
            raise UserError("There is nothing to save.")
        messages = [{"role": message.role, "content": message.content} for message in self.session.messages()]
        row = {"messages": messages}
        try:
            path = Path(file_name).expanduser()
            append_line(path, json.dumps(row, ensure_ascii=False))
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: a null byte; RuntimeError: no such ~USER
            raise UserError(f"{file_name} cannot be written: {error}") from error
        print(f"(saved to {path})")


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
        KeyboardInterrupt: Ctrl-C, where no message can be typed.
    """
    sampling = sampling_of(arguments)
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError("--prompt is empty")
    choose_run("chat", arguments)
    location = locate_model(arguments.run)
    with _progress(loading_line(arguments.run, location)):
        from cucafera.generation.session import ChatSession
        from cucafera.interop.loaded import load_model

        model = load_model(arguments.run, location, arguments.device)
    if arguments.system and not model.chats:
        raise UserError(f"--system needs a model that was trained on conversations; {arguments.run} was not")
    session = ChatSession(model.engine, model.tokenizer, sampling, arguments.seed)
    session.system = (arguments.system or "").strip()
    is_typed = arguments.prompt is None and is_terminal(sys.stdin) and is_terminal(sys.stdout)
    terminal = Terminal(session, model.chats, Keyboard(is_typed), arguments.seed)
    about = () if model.chats else (_about_base_model(arguments.run, location),)
    for note in (*model.notes, *about):
        print(f"{note}.", file=sys.stderr)  # never among the answers
    raise_on_interrupt()
    if arguments.prompt is not None:
        terminal.respond(arguments.prompt)
        return 0
    if is_typed:
        print(f"{model.description}\n/help lists the commands.")
    return terminal.run()


def _about_base_model(run: str, location: ModelLocation) -> str:
    """Return the sentence that says what a model that was not trained on conversations does."""
    about = "This is a base model: it continues a text, and does not answer"
    if location.kind == "gguf":
        return about
    return f"{about}; `cucafera run +experiment=finetune {shlex.quote(f'init_from={run}')}` makes a chat model of it"


@contextlib.contextmanager
def _progress(line: str) -> Iterator[None]:
    """Print what is loaded, for a person: standard error of a script has only what needs attention."""
    if is_terminal(sys.stderr):
        with announced(line, sys.stderr), shown_log(sys.stderr):
            yield
    else:
        yield


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "chat",
        description="Chat with the model of a run, of a Hugging Face folder or of a .gguf file.\n"
        "A base model, which was not trained on conversations, continues each text.",
        epilog="Commands in the terminal:\n" + COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser, "a run folder (its best checkpoint), a checkpoint, a Hugging Face folder or name, or a .gguf file")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", metavar="TEXT", help="system message: how the model should behave")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed: the same seed gives the same answers")
    add_device(parser)
    add_sampling(parser, max_new_tokens=256)
    return parser


if __name__ == "__main__":
    main()
