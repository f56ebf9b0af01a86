"""The chat door: `python -m cucafera.chat RUN` talks to the model of a run, or of a GGUF file, in the terminal.

A model that was trained on conversations answers; one that was not continues what it is given.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cucafera.config import SamplingConfig, UserError
from cucafera.options import add_device, add_sampling, sampling_of

if TYPE_CHECKING:
    import torch

    from cucafera.data.chat import Message
    from cucafera.generation.generate import Reader
    from cucafera.interop.llama_cpp import LlamaCpp
    from cucafera.interop.trained import TrainedModel

EXIT_INTERRUPTED = 130

COMMANDS = """\
/reset          begin a new conversation
/redo           answer the last message again
/system TEXT    tell the model how to behave; without TEXT: show what it was told; /system - takes it back
/save FILE      append the conversation to a .jsonl file, in the form that finetuning reads
/quit           leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Chat:
    """A conversation with a model.

    Args:
        trained: The model, out of a run or a GGUF file.
        sampling: How it writes.
        generator: Source of randomness, on the model's device.

    Attributes:
        system: What the model was told about its behaviour; empty: nothing.
        history: The messages so far, without the system's: what the user said and what was answered, in turn. When the
            context is full, the model is not shown the oldest turns any more; here they stay.
    """

    def __init__(
        self, trained: "TrainedModel | LlamaCpp", sampling: SamplingConfig, generator: "torch.Generator"
    ) -> None:
        self.trained = trained
        self._reader = _reader_of(trained)
        self.sampling = sampling
        self.generator = generator
        self.system = ""
        self.history: list[Message] = []
        self._unanswered: str | None = None

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to a message in pieces. Both go into the history, unless nothing was said.

        Raises:
            UserError: the message alone leaves no room for an answer in the context.
        """
        self._unanswered = text
        yield from self._answer(self.history, text)

    def redo(self) -> Iterator[str]:
        """Yields another answer to the last message; it replaces the one before, unless nothing was said.

        Raises:
            UserError: there is no message, or it leaves no room.
        """
        if self._unanswered is not None:
            yield from self._answer(self.history, self._unanswered)
        elif self.history:
            yield from self._answer(self.history[:-2], self.history[-2].content)
        else:
            raise UserError("There is no answer to redo.")

    def continuation(self, text: str) -> Iterator[str]:
        """Yields, in pieces, how a model that knows no conversations continues a text.

        Raises:
            UserError: the text leaves no room in the context.
        """
        from cucafera.data.tokenizer import DOCUMENT_START_ID

        prompt = [DOCUMENT_START_ID, *self.trained.tokenizer.encode(_encodable(text))]
        yield from self._written(prompt)

    def reset(self) -> None:
        """Begins a new conversation; what the model was told stays."""
        self.history = []
        self._unanswered = None

    def messages(self) -> "list[Message]":
        """The whole conversation, with the system's message."""
        return self._with_system(self.history)

    def _answer(self, before: "list[Message]", text: str) -> Iterator[str]:
        from cucafera.data.chat import Message

        question = Message("user", _encodable(text))
        prompt = self._prompt_that_fits([*before, question])
        answer = ""
        try:
            for piece in self._written(prompt):
                answer += piece
                yield piece
        finally:
            if answer.strip():
                self.history = [*before, question, Message("assistant", answer)]
                self._unanswered = None

    def _written(self, prompt: list[int]) -> Iterator[str]:
        from cucafera.data.chat import STOP_IDS
        from cucafera.generation.generate import stream

        tokenizer, stop_ids = self.trained.tokenizer, frozenset(STOP_IDS)
        return stream(self._reader, tokenizer, prompt, self.sampling, stop_ids, self.generator)

    def _prompt_that_fits(self, messages: "list[Message]") -> list[int]:
        """The prompt, without as many of the oldest turns as it takes to leave room for an answer."""
        from cucafera.data.chat import render_prompt

        context = self._reader.context
        room = context - min(self.sampling.max_new_tokens, context // 4)
        while len(prompt := render_prompt(self._with_system(messages), self.trained.tokenizer)) > room:
            if len(messages) == 1:
                beside = " and the system's message, which /system - takes back" if self.system else ""
                raise UserError(
                    f"this message has {len(prompt):,} tokens, with its frame{beside}; the model's context of "
                    f"{context:,} leaves room for {room:,} beside an answer. Write a shorter one"
                )
            messages = messages[2:]
        return prompt

    def _with_system(self, messages: "list[Message]") -> "list[Message]":
        from cucafera.data.chat import Message

        return [Message("system", _encodable(self.system)), *messages] if self.system else messages


def _reader_of(trained: "TrainedModel | LlamaCpp") -> "Reader":
    from cucafera.generation.generate import DecoderReader
    from cucafera.interop.llama_cpp import LlamaCpp

    return trained if isinstance(trained, LlamaCpp) else DecoderReader(trained.model)


def _encodable(text: str) -> str:
    """The text with a question mark for what is no character, as bytes from a terminal that are no UTF-8."""
    return text.encode(errors="replace").decode()


class Terminal:
    """Reads messages and commands, and prints answers as they come."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def run(self) -> None:
        """Until /quit or the end of the input."""
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
                if line in ("/quit", "/exit"):
                    return
                if line:
                    self._obey(line)
            except EOFError:
                return
            except UserError as error:
                print(error)
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit leaves)")

    def show(self, pieces: Iterator[str]) -> bool:
        """Prints what is written, as it comes. Returns whether it came to its end.

        Raises:
            UserError: nothing can be written.
        """
        nothing = True
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
                nothing = False
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            print(" [stopped]\n")
            return False
        print("(it said nothing)\n" if nothing else "\n")
        return True

    def say(self, text: str) -> bool:
        """Prints the answer to a message, or the continuation of a text."""
        return self.show(self.chat.answer(text) if self.chat.trained.chats else self.chat.continuation(text))

    def _obey(self, line: str) -> None:
        if not line.startswith("/"):
            self.say(line)
            return
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command in ("/reset", "/redo", "/system", "/save") and not self.chat.trained.chats:
            print(f"{command} needs a model that was trained on conversations; this one continues each text anew.")
        elif command == "/reset":
            self.chat.reset()
            print("(a new conversation)")
        elif command == "/redo":
            self.show(self.chat.redo())
        elif command == "/system":
            if argument:
                self.chat.system = "" if argument == "-" else argument
            print(f"(system: {self.chat.system or 'nothing'})")
        elif command == "/save":
            self._save(argument)
        elif command == "/help":
            print(COMMANDS)
        else:
            print(f"There is no command {command}.\n{COMMANDS}")

    def _save(self, file_name: str) -> None:
        if not file_name:
            print("Say where: /save FILE.jsonl")
            return
        if not self.chat.history:
            print("There is nothing to save.")
            return
        row = {"messages": [message._asdict() for message in self.chat.messages()]}
        try:
            path = Path(file_name).expanduser()
            _append_line(path, json.dumps(row, ensure_ascii=False))
        except (OSError, ValueError, RuntimeError) as error:
            print(f"{file_name} cannot be written: {error}")
            return
        print(f"(saved to {path})")


def _append_line(path: Path, line: str) -> None:
    with path.open("a+b") as file:
        unfinished = file.seek(0, 2) > 0 and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
        file.write((("\n" if unfinished else "") + line + "\n").encode())


def main() -> None:
    """Loads a run and talks, or answers one prompt."""
    arguments = command_line_parser().parse_args()
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        sys.exit(_talk(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # what reads the output has left
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _talk(arguments: argparse.Namespace) -> int:
    sampling = sampling_of(arguments)

    import torch

    if not arguments.run:
        raise UserError("RUN is empty: name a run folder, a checkpoint, a Hugging Face folder or a .gguf file")
    trained = _loaded(arguments.run, arguments.device)
    if arguments.system and not trained.chats:
        raise UserError(f"--system needs a model that was trained on conversations; {arguments.run} was not")
    generator = torch.Generator(_reader_of(trained).device)
    if arguments.seed is None:
        generator.seed()
    else:
        generator.manual_seed(arguments.seed % 2**63)
    chat = Chat(trained, sampling, generator)
    chat.system = (arguments.system or "").strip()
    terminal = Terminal(chat)
    if arguments.prompt is not None:
        if not arguments.prompt.strip():
            raise UserError("--prompt is empty")
        return 0 if terminal.say(arguments.prompt) else EXIT_INTERRUPTED
    if sys.stdin.isatty():
        _begin_terminal(trained)
    terminal.run()
    return 0


def _loaded(source: str, device: str) -> "TrainedModel | LlamaCpp":
    """The model of a run, on a device; or that of a GGUF file, which llama.cpp puts where it can.

    Raises:
        UserError: it cannot be loaded, or there is no such device.
    """
    if source.endswith(".gguf"):
        from cucafera.interop.llama_cpp import LlamaCpp

        return LlamaCpp(Path(source).expanduser(), device)

    from cucafera.training.hardware import device_called

    where = device_called(device, os.environ)  # before other imports can use up what CUDA warns of once

    from cucafera.interop.trained import load_trained

    trained = load_trained(source)
    trained.model.to(where)
    return trained


def _begin_terminal(trained: "TrainedModel | LlamaCpp") -> None:
    from cucafera.interop.llama_cpp import LlamaCpp

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and earlier ones found again
    if isinstance(trained, LlamaCpp):
        print(f"{trained.path}: {trained.parameters:,} parameters, computed by llama.cpp")
    else:
        parameters = sum(parameter.numel() for parameter in trained.model.parameters())
        steps = "" if trained.step is None else f", after {trained.step:,} steps"
        print(f"{trained.checkpoint}: {parameters:,} parameters{steps}")
        for note in trained.notes:
            print(f"{note}.")
    if not trained.chats:
        print("It was not trained on conversations: it continues what you write.")
    print("/help shows the commands.")


def command_line_parser() -> argparse.ArgumentParser:
    """The arguments of the door."""
    parser = argparse.ArgumentParser(
        prog="python -m cucafera.chat",
        description="Talks to the model of a run, of a Hugging Face folder or of a .gguf file. One that was not "
        "trained on conversations continues a text.",
        epilog="In the terminal:\n" + COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder, whose best checkpoint is taken, a checkpoint, a Hugging Face folder or name, a .gguf file",
    )
    parser.add_argument("--prompt", help="answer this and end")
    parser.add_argument("--system", help="what the model is told about its behaviour")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    add_device(parser)
    add_sampling(parser, max_new_tokens=256)
    return parser


if __name__ == "__main__":
    main()
