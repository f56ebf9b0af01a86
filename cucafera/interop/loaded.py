"""A trained model that is ready to write, whatever it was loaded from."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.engine import Engine
from cucafera.quantities import number_of
from cucafera.runs.locate import ModelLocation


class LoadedModel(NamedTuple):
    """A model with its engine.

    Attributes:
        engine: Answers requests.
        tokenizer: Its tokenizer.
        chats: True if it was trained on conversations.
        description: One line about it.
        notes: What was changed or assumed on loading, as sentences.
        origin: The file or folder that its weights are from.
    """

    engine: Engine
    tokenizer: Tokenizer
    chats: bool
    description: str
    notes: tuple[str, ...]
    origin: Path


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread for a while.

    OpenMP keeps a team of threads for each thread that computes. If the model is loaded by another thread than that of
    its engine, there are two teams for the same cores; then none waits actively for work, and a step takes 1.4 times as
    long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_model(source: str, location: ModelLocation, device_name: str, slots: int = 1) -> LoadedModel:
    """Load a model on a device; llama.cpp places that of a GGUF file itself.

    Args:
        source: RUN, as it was given.
        location: What it refers to.
        device_name: auto, cpu or cuda.
        slots: Requests that are answered at a time.

    Raises:
        UserError: the model cannot be loaded, or there is no such device.
    """
    if location.kind == "gguf":
        from cucafera.interop.llama_cpp import LlamaCpp

        assert location.path is not None
        llama = LlamaCpp(location.path, device_name, slots)
        description = f"{llama.path}: {number_of(llama.parameters, 'parameter')}, run by llama.cpp"
        return LoadedModel(
            Engine(llama, llama.tokenizer), llama.tokenizer, llama.chats, description, llama.notes, llama.path
        )

    from cucafera.device import resolve_device

    device = resolve_device(device_name, os.environ)  # CUDA warns once: before other imports can trigger that

    from cucafera.generation.backend import TorchBackend
    from cucafera.interop.trained import load_trained

    with _one_thread():
        trained = load_trained(source)
    trained.model.to(device)
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    steps = "" if trained.step is None else f", after {number_of(trained.step, 'step')}"
    description = f"{trained.checkpoint}: {number_of(parameters, 'parameter')}{steps}"
    engine = Engine(TorchBackend(trained.model, slots), trained.tokenizer)
    return LoadedModel(engine, trained.tokenizer, trained.chats, description, trained.notes, trained.checkpoint)
