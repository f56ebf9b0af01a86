"""Shared by the tests: the small run and its corpus, commands as processes, comparisons, small models."""

import codecs
import contextlib
import copy
import dataclasses
import fcntl
import functools
import importlib.util
import json
import os
import pty
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pytest
import tokenizers
import torch
from omegaconf import OmegaConf
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from cucafera.config.command_line import composed_config
from cucafera.config.files import with_checksum
from cucafera.config.schema import Config, ModelConfig
from cucafera.config.tokens import SPECIAL_TOKENS
from cucafera.data.tokenizer import BYTE_OF_CHARACTER
from cucafera.model.transformer import Decoder
from cucafera.runs.checkpoints import read_checkpoint
from cucafera.runs.folder import RunFolder
from cucafera.runs.results import METRICS
from cucafera.runs.results import write_metrics as write_results

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
README_FILES = [
    ROOT / "README.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    *sorted(path for folder in ("conf", "cucafera", "scripts", "tests") for path in (ROOT / folder).rglob("README.md")),
]
"""The pages of documentation, the first page first."""

# The small run

SMALL_RUN = [
    "data=files",
    "trainer=cpu",
    "data.processes=1",
    "data.validation_fraction=0.2",
    "data.validation_windows=21",
    "data.prepared_dir=prepared",
    "model.vocab_size=320",
    "model.hidden_size=48",
    "model.intermediate_size=96",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=32",
    "batch_tokens=256",
    "budget_tokens=3072",
    "schedule.warmup_steps=2",
    "optimizer.lr=3e-3",
    "callbacks.log_every_steps=1",
    "callbacks.validate_every_steps=4",
    "callbacks.checkpoint_every_steps=4",
    "callbacks.sampling.max_new_tokens=8",
]
"""Twelve steps of eight windows of 32 tokens: seconds on any machine. Validations have an incomplete last batch."""

CUCAFERA = composed_config(["+experiment=pretrain"]).model
"""The 245M model, from its preset."""

WORDS = (
    "la el un una de a que i en no per amb és casa mar muntanya riu bosc gat gos nen nena avi àvia poble ciutat camí "
    "pluja sol vent núvol neu nit dia matí tarda pa vi oli tomàquet sopar taula porta finestra carrer plaça església "
    "cel·la col·legi ànima fàcil difícil corre canta menja dorm parla mira vol té va ve fa diu veu sap"
).split()


def write_corpus(path: Path, documents: int, seed: int = 0) -> None:
    """Write sentences of Catalan words in random order, the same for the same seed."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            sentences = [" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) + "." for _ in range(8)]
            file.write(json.dumps({"text": " ".join(sentences)}, ensure_ascii=False) + "\n")


_composed = functools.cache(lambda *overrides: composed_config(overrides))


def compose_small_run(corpus: Path, *overrides: str) -> Config:
    """Compose the small run on a corpus, with further overrides; the same overrides are composed once."""
    anywhere = "corpus.jsonl"
    # Only initial weights bring files into a configuration, those of the run that they are from.
    compose = _composed.__wrapped__ if any(override.startswith("init_from=") for override in overrides) else _composed
    config = copy.deepcopy(compose(*SMALL_RUN, f"data.sources.files.path={anywhere}", *overrides))
    for source in config.data.sources.values():
        if source.path == anywhere:
            source.path = str(corpus)
    return config


def write_run_folder(folder: Path, config: Config, step: int = 1000) -> None:
    """Write what a configuration looks for in a run folder: its own configuration, and names of a checkpoint."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    for path in (checkpoint, checkpoint.with_suffix(".json")):
        path.touch()
    (folder / "config.yaml").write_text(with_checksum(OmegaConf.to_yaml(dataclasses.asdict(config))))


def compose_small_chat(folder: Path, *overrides: str) -> Config:
    """Compose a finetuning run of twelve steps on conversations, which it writes into a folder."""
    generator = random.Random(0)
    rows = [
        {
            "messages": [
                {"role": role, "content": " ".join(generator.choices(WORDS, k=generator.randint(1, 4)))}
                for _ in range(generator.randint(1, 2))
                for role in ("user", "assistant")
            ]
        }
        for _ in range(120)
    ]
    path = folder / "chat.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = [override for override in SMALL_RUN if not override.startswith(("data=", "model."))]
    return composed_config(
        [*settings, "model=inherited", "data=chat_files", f"data.sources.files.path={path}", "callbacks=chat",
         "callbacks.sampling.max_new_tokens=8", "batch_tokens=512", "budget_tokens=6144", *overrides]
    )  # fmt: skip


def write_pairs(path: Path, count: int = 60, seed: int = 0) -> None:
    """Write preference pairs of Catalan words: better answers have other words than worse ones."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"{generator.choice(WORDS)} {generator.choice(WORDS)} {number}"
            better, worse = (
                " ".join(generator.choices(words, k=generator.randint(2, 4))) for words in (WORDS[:12], WORDS[40:])
            )
            file.write(json.dumps({"prompt": prompt, "chosen": better, "rejected": worse}, ensure_ascii=False) + "\n")


def small_preferences(folder: Path) -> list[str]:
    """Return the overrides of preference tuning of twelve steps, on pairs that it writes into a folder.

    It needs init_from=RUN.
    """
    path = folder / "pairs.jsonl"
    if not path.exists():
        write_pairs(path)
    settings = [override for override in SMALL_RUN if not override.startswith(("data=", "model."))]
    changed = ("batch_tokens", "budget_tokens", "optimizer.lr", "callbacks.sampling.max_new_tokens")
    return [
        *(override for override in settings if override.partition("=")[0] not in changed),
        *("model=inherited", "data=preference_files", f"data.sources.files.path={path}", "callbacks=chat"),
        *("callbacks.sampling.max_new_tokens=8", "batch_tokens=1024", "budget_tokens=12288", "optimizer.lr=1e-3"),
    ]


def compose_small_preferences(folder: Path, *overrides: str) -> Config:
    """Compose preference tuning of twelve steps on pairs, which it writes into a folder; it needs init_from=RUN."""
    return composed_config([*small_preferences(folder), *overrides])


# Commands as processes

FORK_SERVER = "CUCAFERA_TESTS_FORK_SERVER"
"""Name of the variable that holds the path of the fork server's socket."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For models this small, threads only get in each other's way."""


class Process:
    """A command forked by the server of fork_server.py, with the part of subprocess.Popen's interface that tests use.

    Args:
        arguments: What would follow `python`: `-m MODULE ...` or `PROGRAM ...`.
        cwd: Its folder.
        new_session: Make it the leader of a session and process group.
        merged: Send its stderr to its stdout.
    """

    def __init__(
        self, arguments: Sequence[str | Path], cwd: Path, new_session: bool = False, merged: bool = True
    ) -> None:
        self.args = [str(argument) for argument in arguments]
        self.returncode: int | None = None
        reads, writes = zip(*(os.pipe() for _ in range(2 if merged else 3)), strict=True)
        self.stdin = os.fdopen(writes[0], "w")
        self.outputs = [os.fdopen(descriptor) for descriptor in reads[1:]]
        request = {
            "arguments": self.args,
            "cwd": str(cwd),
            "env": dict(os.environ) | ONE_THREAD,
            "new_session": new_session,
        }
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(os.environ[FORK_SERVER])
        ends = [reads[0], writes[1], writes[-1]]
        socket.send_fds(self.connection, [b"."], ends)
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        for descriptor in set(ends):
            os.close(descriptor)
        number = self._received()
        assert number is not None, "the fork server could not import the package: see its output above"
        self.pid = number

    def _received(self) -> int | None:
        try:
            content = self.connection.recv(4)
        except ConnectionResetError:
            return None
        return struct.unpack("i", content)[0] if content else None

    def poll(self) -> int | None:
        """Return its status, or None while it runs."""
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.returncode = self._received()
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait until it has ended; kill it after that many seconds."""
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._received()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, text: str = "", timeout: float = 180) -> tuple[str, str]:
        """Send a text to its stdin and return its stdout and stderr after its end; kill it after that many seconds."""
        contents = {}

        def read(output: IO[str]) -> None:
            with output:
                contents[output] = output.read()

        threads = [threading.Thread(target=read, args=(output,), daemon=True) for output in self.outputs]
        for thread in threads:
            thread.start()
        with contextlib.suppress(BrokenPipeError), self.stdin:
            self.stdin.write(text)
        self.wait(timeout)
        for thread in threads:
            thread.join(timeout)
        stdout, *stderr = (contents[output] for output in self.outputs)
        return stdout, "".join(stderr)

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run_command(
    *arguments: str | Path, cwd: Path | None = None, text: str = "", timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` by the fork server, like subprocess.run(capture_output=True, text=True)."""
    process = Process(arguments, cwd or Path.cwd(), merged=False)
    output, error = process.communicate(text, timeout)
    return subprocess.CompletedProcess(process.args, process.wait(0), output, error)


def _become_controlling_terminal() -> None:
    """Make the input of the new process its terminal, so that Ctrl-C reaches it as from a shell."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore it


class PseudoTerminal:
    """A program in its own terminal."""

    def __init__(self, arguments: Sequence[str], folder: Path, **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=_become_controlling_terminal, env=os.environ | {"TERM": "xterm"} | environment,
        )  # fmt: skip
        os.close(slave)
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until a text has come after what was waited for before; return what came in between."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += self._decoder.decode(os.read(self.master, 4096))
        before, self.text = self.text.split(text, 1)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def exit_code(self) -> int:
        code = self.process.wait(timeout=30)
        os.close(self.master)
        return code


class Command:
    """`python -m cucafera.run` on the small run, in the test's own folder."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.arguments = [*SMALL_RUN, f"data.sources.files.path={corpus}"]
        self.folder = folder

    def start(
        self, *overrides: str, program: Sequence[str] = ("-m", "cucafera.run"), new_group: bool = False
    ) -> Process:
        """Start it with further overrides and flags.

        Args:
            overrides: Of the configuration; flags before or between them.
            program: Another program that calls the command.
            new_group: Make it the leader of a process group.
        """
        flags = [override for override in overrides if override.startswith("-")]
        values = [override for override in overrides if not override.startswith("-")]
        given = {override.partition("=")[0] for override in values}  # a sweep refuses a key that is given twice
        small = [argument for argument in self.arguments if argument.partition("=")[0] not in given]
        return Process([*program, *flags, *small, *values], self.folder, new_group)

    def run(self, *overrides: str) -> tuple[int, str]:
        """Run it to its end; return its status and what it printed."""
        process = self.start(*overrides)
        output, _ = process.communicate(timeout=180)
        return process.wait(0), output


def wait_for(path: Path, process: Process | subprocess.Popen[str]) -> None:
    """Wait until a process has written a file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


class DiskCalls(list[str]):
    """The system calls that decide what is on the disk after a power cut, in their order.

    They are "fsync NAME", "rename OLD NEW" and "unlink NAME", of files and folders; those that failed are left out.

    Attributes:
        synced: Bytes of each file when it was last flushed to disk, by name.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.synced: dict[str, int] = {}
        fsync, unlink = os.fsync, os.unlink

        def recorded_fsync(descriptor: int) -> None:
            fsync(descriptor)
            name = Path(f"/proc/self/fd/{descriptor}").readlink().name
            self.synced[name] = os.fstat(descriptor).st_size
            self.append(f"fsync {name}")

        def recorded_unlink(path: Any, **settings: Any) -> None:
            unlink(path, **settings)
            self.append(f"unlink {Path(path).name}")

        def recorded(move: Any) -> Any:
            def recorded_move(old: Any, new: Any, **settings: Any) -> None:
                move(old, new, **settings)
                self.append(f"rename {Path(old).name} {Path(new).name}")

            return recorded_move

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "unlink", recorded_unlink)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, recorded(getattr(os, name)))


# What a run leaves


def folder_of(name: str) -> RunFolder:
    """Return the folder of the run outputs/NAME."""
    return RunFolder(Path("outputs") / name)


def history_of(name: str) -> list[dict]:
    """Return the events of the run outputs/NAME."""
    return [json.loads(line) for line in folder_of(name).history.read_text().splitlines()]


def write_metrics(folder: Path, validation: Sequence[Mapping[str, float]], **changes: object) -> None:
    """Write the metrics.json of a pretraining run; metrics that its validations do not give are 1."""
    others = dict.fromkeys(("loss", "perplexity", "accuracy", "bpb"), 1.0)
    records = [{"step": step, "tokens": 100 * step} | others | given for step, given in enumerate(validation)]
    metrics = dict.fromkeys(METRICS, 1) | {
        "name": "run", "objective": "pretraining", "device": "CPU", "precision": "fp32", "skipped_batches": [],
        "samples": [], "best_bpb": 1.0, "steps": len(records) - 1, "validation": records,
    }  # fmt: skip
    write_results(RunFolder(folder).metrics, metrics | changes)


def weights(run_dir: str | Path) -> dict[str, torch.Tensor]:
    """Return the weights of the newest checkpoint of a run."""
    return read_checkpoint(RunFolder(Path(run_dir)).checkpoints.marked()[-1])["state_dict"]


def scalars(run_dir: str | Path, tag: str) -> list[tuple[int, float]]:
    """Return the steps and values of a curve of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Compare tensors by name, bit by bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Compare tensors by name, within the rounding of sums in another order."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=2e-5)


def assert_same_curve(left: str | Path, right: str | Path, tag: str) -> None:
    """Compare curves: the same steps, and values within the rounding of sums in another order."""
    steps, values = zip(*scalars(left, tag), strict=True)
    other_steps, other_values = zip(*scalars(right, tag), strict=True)
    assert steps == other_steps
    assert values == pytest.approx(other_values, rel=1e-5)


# Small models and their inputs

DOCUMENT_START = 1


def documents_of(input_ids: Tensor) -> Tensor:
    """Return the number of each token's document within its window."""
    return (input_ids == DOCUMENT_START).cumsum(1, dtype=torch.int32)


def random_ids(*shape: int) -> Tensor:
    """Return token ids without a document start."""
    return torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(1))


class Stream:
    """Tokens in memory."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.array(tokens, dtype=np.uint16)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length].copy()


def small_config(**changes: object) -> ModelConfig:
    """Return the architecture of a model of two layers."""
    settings = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    return ModelConfig(**(settings | changes))  # type: ignore[arg-type]


def small_decoder(**changes: object) -> Decoder:
    """Return a random model of two layers."""
    torch.manual_seed(0)
    return Decoder(small_config(**changes))


class Holder(torch.nn.Module):
    """Holds the decoder as the LightningModule does."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Decoder(config)


def hugging_face(config: ModelConfig) -> "LlamaForCausalLM":
    """Return the model of transformers with the same architecture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.rms_norm_eps,
            hidden_act=config.hidden_act,
            tie_word_embeddings=True,
        )
    )


def small_llama(**changes) -> "LlamaForCausalLM":
    """Return a random model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def full_tokenizer(entries: int) -> tokenizers.Tokenizer:
    """Return a byte-level BPE of that size, with the package's control tokens; its merges are pairs of bytes."""
    letters = list(BYTE_OF_CHARACTER)
    pairs = [(first, second) for first in letters for second in letters][: entries - len(SPECIAL_TOKENS) - len(letters)]
    words = [*SPECIAL_TOKENS, *letters, *(first + second for first, second in pairs)]
    assert len(words) == entries
    tokenizer = tokenizers.Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    return tokenizer


def change_config(folder: Path, **fields) -> None:
    """Set fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Scripts


def load_script(name: str) -> Any:
    """Import scripts/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
