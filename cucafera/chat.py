"""The chat door: `python -m cucafera.chat RUN` talks to the model of a run, in the terminal.

A model that was trained on conversations answers; one that was not continues what it is given.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cucafera.config import SamplingConfig, UserError, sampling_problems

if TYPE_CHECKING:
    import torch

    from cucafera.data.chat import Message
    from cucafera.training.run_folder import TrainedModel

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

COMMANDS = """\
/reset          begin a new conversation
/redo           answer the last message again
/system TEXT    tell the model how to behave; without TEXT: show what it was told
/save FILE      append the conversation to a .jsonl file, in the form that finetuning reads
/quit           leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Chat:
    """A conversation with a model.

    Args:
        trained: The model.
        sampling: How it writes.
        generator: Source of randomness, on the model's device.

    Attributes:
        system: What the model was told about its behaviour; empty: nothing.
        history: The messages so far, without the system's.
    """

    def __init__(self, trained: "TrainedModel", sampling: SamplingConfig, generator: "torch.Generator") -> None:
        self.trained = trained
        self.sampling = sampling
        self.generator = generator
        self.system = ""
        self.history: list[Message] = []

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to a message in pieces. What was yielded is in the history, however it ends.

        Raises:
            UserError: the message alone leaves no room for an answer in the context; the history is then as before.
        """
        from cucafera.data.chat import Message
        from cucafera.data.conversations import ChatDataModule
        from cucafera.generation.generate import stream

        before = self.history
        self.history = [*before, Message("user", text)]
        try:
            prompt = self._prompt_that_fits()
        except UserError:
            self.history = before
            raise
        question, answer = self.history, ""
        pieces = stream(
            self.trained.model,
            self.trained.tokenizer,
            prompt,
            self.sampling,
            frozenset({ChatDataModule.stop_id}),
            self.generator,
        )
        try:
            for piece in pieces:
                answer += piece
                yield piece
        finally:
            self.history = [*question, Message("assistant", answer)] if answer.strip() else before

    def continuation(self, text: str) -> Iterator[str]:
        """Yields, in pieces, how a model that knows no conversations continues a text.

        Raises:
            UserError: the text leaves no room in the context.
        """
        from cucafera.data.packed import PackedDataModule
        from cucafera.data.tokenizer import DOCUMENT_START_ID
        from cucafera.generation.generate import stream

        prompt = [DOCUMENT_START_ID, *self.trained.tokenizer.encode(text)]
        return stream(
            self.trained.model,
            self.trained.tokenizer,
            prompt,
            self.sampling,
            frozenset({PackedDataModule.stop_id}),
            self.generator,
        )

    def undo(self) -> str | None:
        """Takes the last message of the user and its answer back; returns the message, or None if there is none."""
        if not self.history:
            return None
        *self.history, question, _ = self.history
        return question.content

    def messages(self) -> "list[Message]":
        """The whole conversation, with the system's message."""
        from cucafera.data.chat import Message

        return ([Message("system", self.system)] if self.system else []) + self.history

    def _prompt_that_fits(self) -> list[int]:
        """The prompt, after forgetting as many of the oldest turns as it takes to leave room for an answer."""
        from cucafera.data.chat import render_prompt

        context = self.trained.model.config.max_position_embeddings
        room = context - min(self.sampling.max_new_tokens, context // 4)
        while len(prompt := render_prompt(self.messages(), self.trained.tokenizer)) > room:
            if len(self.history) == 1:
                raise UserError(
                    f"this message has {len(prompt):,} tokens, with its frame and the system's message; the model's "
                    f"context of {context:,} leaves room for {room:,} beside an answer. Write a shorter one"
                )
            self.history = self.history[2:]
        return prompt


class Terminal:
    """Reads messages and commands, and prints answers as they come."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def run(self) -> None:
        """Until /quit or the end of the input."""
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit leaves)")
                continue
            if line in ("/quit", "/exit"):
                return
            if line:
                self._obey(line) if line.startswith("/") else self.show_answer(line)

    def show_answer(self, text: str) -> bool:
        """Prints the answer to a message. Returns whether it came to its end."""
        chat = self.chat
        answering = chat.answer(text) if chat.trained.chats else chat.continuation(text)
        try:
            for piece in answering:
                print(piece, end="", flush=True)
            print("\n")
        except UserError as error:
            print(error)
        except KeyboardInterrupt:
            answering.close()  # type: ignore[attr-defined]
            print(" [stopped]\n")
            return False
        return True

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/reset":
            self.chat.history = []
            print("(a new conversation)")
        elif command == "/redo":
            question = self.chat.undo()
            if question is None:
                print("There is no answer to redo.")
            else:
                self.show_answer(question)
        elif command == "/system":
            if argument:
                self.chat.system = argument
            print(f"(system: {self.chat.system or 'nothing'})")
        elif command == "/save":
            self._save(argument)
        elif command == "/help":
            print(COMMANDS)
        else:
            print(f"There is no command {command}.\n{COMMANDS}")

    def _save(self, file_name: str) -> None:
        from cucafera.training.run_folder import write_text

        if not file_name:
            print("Say where: /save FILE.jsonl")
            return
        if not self.chat.history:
            print("There is nothing to save.")
            return
        path = Path(file_name).expanduser()
        row = {"messages": [message._asdict() for message in self.chat.messages()]}
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            write_text(path, before + json.dumps(row, ensure_ascii=False) + "\n")
        except (OSError, UnicodeDecodeError) as error:
            print(f"{path} cannot be written: {error}")
            return
        print(f"(saved to {path})")


def main() -> None:
    """Loads a run and talks, or answers one prompt."""
    arguments = command_line_parser().parse_args()
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        sys.exit(_talk(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:
        sys.stderr.close()  # what reads the output has left
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _talk(arguments: argparse.Namespace) -> int:
    sampling = _sampling(arguments)

    import torch

    from cucafera.training.run_folder import load_trained

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA GPU that PyTorch can use: leave --device out")
    trained = load_trained(arguments.run)
    trained.model.to(device)
    generator = torch.Generator(device)
    if arguments.seed is None:
        generator.seed()
    else:
        generator.manual_seed(arguments.seed)
    chat = Chat(trained, sampling, generator)
    chat.system = (arguments.system or "").strip()
    terminal = Terminal(chat)
    if arguments.prompt is not None:
        if not arguments.prompt.strip():
            raise UserError("--prompt is empty")
        return 0 if terminal.show_answer(arguments.prompt) else EXIT_INTERRUPTED
    if sys.stdin.isatty():
        _begin_terminal(trained)
    terminal.run()
    return 0


def _begin_terminal(trained: "TrainedModel") -> None:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and earlier ones found again
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    print(f"{trained.checkpoint}: {parameters:,} parameters, after {trained.step:,} steps")
    if not trained.chats:
        print("It was not trained on conversations: it continues what you write.")
    print("/help shows the commands.")


def _sampling(arguments: argparse.Namespace) -> SamplingConfig:
    sampling = SamplingConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        stop=arguments.stop,
    )
    if problems := sampling_problems(sampling):
        raise UserError("\n".join(problems))
    return sampling


def command_line_parser() -> argparse.ArgumentParser:
    """The arguments of the door."""
    parser = argparse.ArgumentParser(
        prog="python -m cucafera.chat",
        description="Talks to the model of a run. One that was not trained on conversations continues a text.",
        epilog="In the terminal:\n" + COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = SamplingConfig()
    parser.add_argument("run", metavar="RUN", help="a run folder, whose best checkpoint is taken, or a checkpoint")
    parser.add_argument("--prompt", help="answer this and end")
    parser.add_argument("--system", help="what the model is told about its behaviour")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU, if there is")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=default.temperature, help="0: the likeliest token (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=default.top_k, help="0: off (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=default.top_p, help="1: off (default: %(default)s)")
    parser.add_argument("--min-p", type=float, default=default.min_p, help="0: off (default: %(default)s)")
    parser.add_argument(
        "--repetition-penalty", type=float, default=default.repetition_penalty, help="1: off (default: %(default)s)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text")
    return parser


if __name__ == "__main__":
    main()
