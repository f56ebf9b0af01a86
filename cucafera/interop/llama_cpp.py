"""A GGUF file as a decoding backend, run by llama.cpp.

llama.cpp does the forward pass and holds the KV cache; tokenizer, ChatML and sampling are those of this package, so
that the same settings give the same distribution, and a message that spells a control token stays text.

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
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cucafera.config.errors import UserError
from cucafera.generation.backend import Extension
from cucafera.interop.chat_template import chat_template_notes
from cucafera.interop.gguf_format import context_in, metadata, open_gguf, tokenizer_in
from cucafera.interop.hf_spec import OTHER_NAMES
from cucafera.quantities import number_of

INSTALL = "pip install '.[llama]'"
QUANTIZER = "llama-quantize"
BATCH = 512
"""Tokens per call of llama_decode."""
ROWS = 64
"""Rows of logits that are converted to double precision at a time, which bounds the memory."""
LOG_LEVEL_ERROR = 4
"""GGML_LOG_LEVEL_ERROR."""
ALL_LAYERS = 1_000_000
"""A number of layers for the GPU that no model reaches."""


def is_installed() -> bool:
    """True if the package llama_cpp is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


@cache
def library() -> ModuleType:
    """Load llama.cpp once, and collect its log instead of printing it.

    Raises:
        UserError: it is not installed, or does not load.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise UserError(f"a GGUF file is run by llama.cpp, which is not installed: {INSTALL}") from error
    except (OSError, RuntimeError) as error:  # a shared library that it links to is missing
        raise UserError(f"llama.cpp is installed, but does not load: {error}") from error
    _logged_errors.clear()
    callback = llama_cpp.llama_log_callback(_log_callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    _referenced_by_c.append(callback)
    module: ModuleType = llama_cpp
    return module


_logged_errors: list[str] = []
"""Errors that llama.cpp logged, the cause first."""
_referenced_by_c: list[Any] = []
"""Objects that llama.cpp has pointers to: they must not be garbage collected."""


def _log_callback(level: int, text: bytes, _: Any) -> None:
    if level == LOG_LEVEL_ERROR:
        _logged_errors.append(text.decode(errors="replace").strip())


def _error_reason() -> str:
    return _logged_errors[0] if _logged_errors else "it gives no reason"


class _Weights:
    """The weights of a file, shared by contexts and freed after the last of them."""

    def __init__(self, llama: ModuleType, path: Path, device: str) -> None:
        can_offload = llama.llama_supports_gpu_offload()
        if device == "cuda" and not can_offload:
            raise UserError("this llama.cpp was built without CUDA: leave out --device")
        _logged_errors.clear()
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0 if device == "cpu" or not can_offload else ALL_LAYERS
        self.model = llama.llama_model_load_from_file(os.fsencode(path), settings)
        if not self.model:
            raise UserError(f"llama.cpp cannot load {path}: {_error_reason()}")
        weakref.finalize(self, llama.llama_model_free, self.model)


def _free_context(llama: ModuleType, batch: Any, context: Any, weights: _Weights) -> None:
    """Free a context; as an argument, the weights outlive it."""
    llama.llama_batch_free(batch)
    llama.llama_free(context)


class _BatchToken(NamedTuple):
    token: int
    position: int
    slot: int
    is_scored: bool


class LlamaCpp:
    """A GGUF file run by llama.cpp: a `DecodingBackend`.

    Args:
        path: The .gguf file.
        device: auto, cpu or cuda.
        slots: Sequences that the KV cache holds.

    Attributes:
        path: The file.
        context, capacity: Maximum number of tokens of a sequence.
        vocab_size: V.
        device: Device of the logits: the CPU.
        slots: Sequences that the KV cache holds.
        tokenizer: The tokenizer in the file.
        chats: True if the model was trained on conversations.
        parameters: Number of parameters.
        notes: What was changed or assumed on loading, as sentences for the user.

    Raises:
        UserError: the file is missing or unsupported, or llama.cpp is not installed.
    """

    def __init__(self, path: Path, device: str = "auto", slots: int = 1) -> None:
        self._library = library()
        reader = open_gguf(path)
        self.path = path
        self.tokenizer = tokenizer_in(reader, path)
        template = metadata(reader, "tokenizer.chat_template", str)
        self.chats = template is not None
        self.notes = tuple(chat_template_notes(template, {}, OTHER_NAMES))
        self.context = self.capacity = context_in(reader)
        self.slots = slots
        self.device = torch.device("cpu")
        self._weights = _Weights(self._library, path, device)
        self._vocabulary = self._library.llama_model_get_vocab(self._weights.model)
        self.vocab_size = self._library.llama_vocab_n_tokens(self._vocabulary)
        self.parameters = self._library.llama_model_n_params(self._weights.model)
        self._context = self._new_context()
        self._batch = self._library.llama_batch_init(BATCH, 0, 1)
        weakref.finalize(self, _free_context, self._library, self._batch, self._context, self._weights)

    def _new_context(self) -> Any:
        settings = self._library.llama_context_default_params()
        settings.n_ctx = self.context * self.slots
        settings.n_seq_max = self.slots
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads() or os.cpu_count() or 1
        # Flash attention sums values in half precision on a CPU.
        settings.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = self._library.llama_init_from_model(self._weights.model, settings)
        if not context:
            raise UserError(f"llama.cpp cannot allocate a context for {self.path}: {_error_reason()}")
        return context

    def extend(self, extensions: Sequence[Extension]) -> Tensor:
        """See `DecodingBackend.extend`."""
        memory = self._library.llama_get_memory(self._context)
        tokens = []
        for slot, start, ids, scored in extensions:
            if (total := start + len(ids)) > self.capacity:
                raise ValueError(f"{number_of(total, 'token')} are more than the context of {self.capacity:,}")
            self._library.llama_memory_seq_rm(memory, slot, start, -1)
            first = len(ids) - scored
            tokens += [_BatchToken(token, start + index, slot, index >= first) for index, token in enumerate(ids)]
        return torch.from_numpy(
            np.concatenate([self._decode_batch(tokens[at : at + BATCH]) for at in range(0, len(tokens), BATCH)])
        )

    def copy(self, source: int, target: int, tokens: int) -> None:
        """See `DecodingBackend.copy`."""
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_seq_rm(memory, target, -1, -1)
        self._library.llama_memory_seq_cp(memory, source, target, 0, tokens)

    def clear(self, slot: int) -> None:
        """See `DecodingBackend.clear`."""
        self._library.llama_memory_seq_rm(self._library.llama_get_memory(self._context), slot, -1, -1)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits after every token of a text, [n, V] in fp32; it takes the first slot."""
        return self.extend([Extension(0, 0, ids, len(ids))])

    def nats(self, windows: Sequence[tuple[list[int], int]]) -> list[list[float]]:
        """Return the negative log-likelihood of texts, token by token.

        Args:
            windows: Token ids of a text, at most `context`, and the position of the first one to score, at least 1.

        Returns:
            For each window, the nats of each scored token, given all tokens before it.
        """
        return [self._nats(ids, first) for ids, first in windows]

    def _nats(self, ids: list[int], first: int) -> list[float]:
        if not 1 <= first < len(ids):
            raise ValueError(
                f"position {first} of {number_of(len(ids), 'token')} cannot be scored: it must be from 1 to "
                f"{len(ids) - 1}"
            )
        logits = self.extend([Extension(0, 0, ids[:-1], len(ids) - first)])
        targets = torch.tensor(ids[first:])
        parts = [
            torch.nn.functional.cross_entropy(rows.double(), ids_of_rows, reduction="none")
            for rows, ids_of_rows in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
        ]
        nats: list[float] = torch.cat(parts).tolist()
        return nats

    def encode(self, text: str) -> list[int]:
        """Tokenize a text with llama.cpp's own tokenizer, which must give the ids of ours."""
        content = text.encode()
        ids = (ctypes.c_int32 * (len(content) + 1))()
        count = self._library.llama_tokenize(self._vocabulary, content, len(content), ids, len(ids), False, False)
        return list(ids[:count])

    def _decode_batch(self, tokens: Sequence["_BatchToken"]) -> NDArray[np.float32]:
        """Decode tokens; return the logits [n, V] of those that are scored."""
        self._batch.n_tokens = len(tokens)
        for index, (token, position, slot, is_scored) in enumerate(tokens):
            self._batch.token[index] = token
            self._batch.pos[index] = position
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = slot
            self._batch.logits[index] = is_scored
        if status := self._library.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode failed with status {status}: {_error_reason()}")
        rows = sum(token.is_scored for token in tokens)
        if not rows:
            return np.empty((0, self.vocab_size), np.float32)
        logits = np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (rows, self.vocab_size))
        return np.array(logits, dtype=np.float32)  # a copy: the next batch overwrites it


def quantize(source: Path, target: Path, name: str) -> None:
    """Quantize the weights of a GGUF file with llama.cpp.

    Args:
        source: A file with fp32 weights.
        target: The file to write.
        name: llama.cpp's name of a quantization, such as Q4_K_M.

    Raises:
        UserError: llama.cpp is not installed, or fails.
    """
    check_quantizer(name)
    if is_installed():
        _quantize_by_library(source, target, name)
        return
    result = subprocess.run([QUANTIZER, source, target, name], capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"{QUANTIZER} failed: {(result.stderr or result.stdout).strip().splitlines()[-1:]}")


def check_quantizer(name: str) -> None:
    """Raise UserError if nothing is installed that writes a quantization of this name."""
    if not is_installed() and shutil.which(QUANTIZER) is None:
        raise UserError(f"{name.lower()} needs llama.cpp: {INSTALL}, or put its {QUANTIZER} on PATH")


def _quantize_by_library(source: Path, target: Path, name: str) -> None:
    llama = library()
    _logged_errors.clear()
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name}")
    settings.nthread = torch.get_num_threads()
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings)):
        raise UserError(f"llama.cpp cannot write {name.lower()}: {_error_reason()}")
