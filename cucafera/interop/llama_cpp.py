"""A model in a GGUF file, computed by llama.cpp.

llama.cpp computes and keeps the keys and values; tokenizer, ChatML and sampling are ours, so that the same settings
mean the same, and a message that spells a control token stays text.

V vocabulary, n tokens
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cucafera.config import UserError
from cucafera.interop.gguf_format import metadata, open_gguf, tokenizer_in

INSTALL = "pip install '.[llama]'"
BATCH = 512
"""Tokens that are read at once."""
ROWS = 64
"""Rows of logits that are in memory in double precision at once."""
LOG_LEVEL_ERROR = 4
"""GGML_LOG_LEVEL_ERROR."""


def is_there() -> bool:
    """Whether the package llama_cpp is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


@cache
def library() -> ModuleType:
    """llama.cpp, which says nothing on the terminal any more.

    Raises:
        UserError: it is not installed, or does not load.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise UserError(f"a GGUF file is computed by llama.cpp, which is not installed: {INSTALL}") from error
    except (OSError, RuntimeError) as error:  # a library that it needs is not there
        raise UserError(f"llama.cpp is installed, and does not load: {error}") from error
    _errors.clear()
    callback = llama_cpp.llama_log_callback(_hear)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    _kept.append(callback)
    module: ModuleType = llama_cpp
    return module


_errors: list[str] = []
"""What llama.cpp complained about, the cause first."""
_kept: list[Any] = []
"""What it calls, which must not be collected."""


def _hear(level: int, text: bytes, _: Any) -> None:
    if level == LOG_LEVEL_ERROR:
        _errors.append(text.decode(errors="replace").strip())


def _complaint() -> str:
    return _errors[0] if _errors else "it does not say why"


def _free(llama: ModuleType, batch: Any, context: Any, model: Any) -> None:
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)


class LlamaCpp:
    """A model that llama.cpp computes, one text at a time: a `Reader` of generation.

    What it has read stays: of a text that begins like the one before, only the rest is read.

    Args:
        path: The .gguf file.
        device: auto, cpu or cuda.

    Attributes:
        path: The file.
        context: Most tokens of a text.
        vocab_size: V.
        device: Where its logits are: the CPU.
        tokenizer: Out of the file.
        chats: Whether it was trained on conversations.
        parameters: Their number.

    Raises:
        UserError: the file is not there, is none that it can use, or llama.cpp is not installed.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        self._library = library()
        reader = open_gguf(path)
        self.path = path
        self.tokenizer = tokenizer_in(reader, path)
        self.chats = metadata(reader, "tokenizer.chat_template") is not None
        self.context = int(metadata(reader, "ARCH.context_length"))
        self.device = torch.device("cpu")
        _errors.clear()
        settings = self._library.llama_model_default_params()
        settings.n_gpu_layers = self._layers_on_gpu(device)
        self._model = self._library.llama_model_load_from_file(os.fsencode(path), settings)
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path}: {_complaint()}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.vocab_size = self._library.llama_vocab_n_tokens(self._vocabulary)
        self.parameters = self._library.llama_model_n_params(self._model)
        self._context = self._new_context()
        self._batch = self._library.llama_batch_init(BATCH, 0, 1)
        weakref.finalize(self, _free, self._library, self._batch, self._context, self._model)
        self._read: list[int] = []

    def _layers_on_gpu(self, device: str) -> int:
        can = self._library.llama_supports_gpu_offload()
        if device == "cuda" and not can:
            raise UserError("this llama.cpp was built without CUDA: leave --device out")
        return 0 if device == "cpu" or not can else 1_000_000  # as many as there are

    def _new_context(self) -> Any:
        settings = self._library.llama_context_default_params()
        settings.n_ctx = self.context
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads() or os.cpu_count() or 1
        # Flash attention sums values in half precision on a CPU.
        settings.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = self._library.llama_init_from_model(self._model, settings)
        if not context:
            self._library.llama_model_free(self._model)
            raise UserError(f"llama.cpp cannot begin with {self.path}: {_complaint()}")
        return context

    def begin(self, prompts: Sequence[list[int]], steps: int) -> Tensor:
        """Reads one prompt; logits [1, V] in fp32 of what comes next. Raises ValueError: there are more."""
        if len(prompts) != 1:
            raise ValueError("llama.cpp reads one text at a time here")
        return torch.from_numpy(self._logits(prompts[0], len(prompts[0]) - 1))

    def read(self, tokens: Tensor) -> Tensor:
        """Reads the next token, [1, 1]; logits [1, V] in fp32 of what comes then."""
        ids = [*self._read, int(tokens)]
        return torch.from_numpy(self._logits(ids, len(ids) - 1))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits behind every token of a text, [n, V] in fp32."""
        return torch.from_numpy(self._logits(ids, 0))

    def nats(self, windows: Sequence[tuple[list[int], int]]) -> list[list[float]]:
        """How unlikely texts are.

        Args:
            windows: Token ids of a text, and the place of the first of them that counts, at least 1; each has at most
                `context` tokens.

        Returns:
            For each, the negative log-likelihood in nats of each token that counts, given all those before it.
        """
        return [self._nats(ids, first) for ids, first in windows]

    def _nats(self, ids: list[int], first: int) -> list[float]:
        if not 1 <= first < len(ids):
            raise ValueError(f"of {len(ids)} tokens, the one at {first} has none before it, or is not there")
        logits = torch.from_numpy(self._logits(ids[:-1], first - 1))
        targets = torch.tensor(ids[first:])
        parts = [
            torch.nn.functional.cross_entropy(some.double(), wanted, reduction="none")
            for some, wanted in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
        ]
        nats: list[float] = torch.cat(parts).tolist()
        return nats

    def encode(self, text: str) -> list[int]:
        """The ids that llama.cpp's own tokenizer gives a text: the same as ours."""
        content = text.encode()
        ids = (ctypes.c_int32 * (len(content) + 1))()
        count = self._library.llama_tokenize(self._vocabulary, content, len(content), ids, len(ids), False, False)
        return list(ids[:count])

    def _logits(self, ids: Sequence[int], first: int) -> NDArray[np.float32]:
        """Logits [n, V] behind the tokens from `first` on, of a text that is read as far as it has not been."""
        if len(ids) > self.context:
            raise ValueError(f"{len(ids):,} tokens are more than the context of {self.context:,}")
        known = min(_common(ids, self._read), first)
        self._library.llama_memory_seq_rm(self._library.llama_get_memory(self._context), 0, known, -1)
        self._read = self._read[:known]
        parts = []
        for start in range(known, len(ids), BATCH):
            parts.append(self._logits_of_batch(ids[start : start + BATCH], start, first))
        return np.concatenate(parts)

    def _logits_of_batch(self, ids: Sequence[int], start: int, first: int) -> NDArray[np.float32]:
        self._batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            self._batch.token[place] = token
            self._batch.pos[place] = start + place
            self._batch.n_seq_id[place] = 1
            self._batch.seq_id[place][0] = 0
            self._batch.logits[place] = start + place >= first
        if problem := self._library.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama.cpp could not go on ({problem}): {_complaint()}")
        self._read += ids
        wanted = min(len(ids), max(start + len(ids) - first, 0))
        if not wanted:
            return np.empty((0, self.vocab_size), np.float32)
        rows = np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (wanted, self.vocab_size))
        return np.array(rows, dtype=np.float32)  # a copy: the next batch is written over it


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """Tokens that two texts begin with."""
    pairs = zip(ids, others, strict=False)
    differs = (place for place, (one, other) in enumerate(pairs) if one != other)
    return next(differs, min(len(ids), len(others)))


def quantize(source: Path, target: Path, name: str) -> None:
    """Writes a file anew with quantized weights, by llama.cpp.

    Args:
        source: A file with fp32 weights.
        target: Where to.
        name: One of llama.cpp's names of a mixture, such as Q4_K_M.

    Raises:
        UserError: llama.cpp is not installed, or fails.
    """
    if is_there():
        _quantize_by_library(source, target, name)
    elif program := shutil.which("llama-quantize"):
        result = subprocess.run([program, source, target, name], capture_output=True, text=True, check=False)
        if result.returncode:
            raise UserError(f"{program} failed: {(result.stderr or result.stdout).strip().splitlines()[-1:]}")
    else:
        raise UserError(f"{name.lower()} is made by llama.cpp. {INSTALL}, or put its llama-quantize on PATH")


def _quantize_by_library(source: Path, target: Path, name: str) -> None:
    llama = library()
    _errors.clear()
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name}")
    settings.nthread = torch.get_num_threads()
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings)):
        raise UserError(f"llama.cpp cannot write {name.lower()}: {_complaint()}")
