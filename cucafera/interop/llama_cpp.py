"""A GGUF file as a decoding backend, run by llama.cpp.

llama.cpp does the forward pass and holds the KV cache; tokenizer, ChatML and sampling are those of this package, so
that the same settings give the same distribution, and a message that spells a control token stays text.

V vocabulary, n tokens
"""

import copy
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

from cucafera.config.errors import UserError
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


class LlamaCpp:
    """A GGUF file run by llama.cpp, one sequence at a time: a `DecodingBackend`.

    The KV cache keeps the last sequence: of the next one, only what follows their common prefix is decoded.

    Args:
        path: The .gguf file.
        device: auto, cpu or cuda.

    Attributes:
        path: The file.
        context: Maximum number of tokens of a sequence.
        vocab_size: V.
        device: Device of the logits: the CPU.
        tokenizer: The tokenizer in the file.
        chats: True if the model was trained on conversations.
        parameters: Number of parameters.
        notes: What was changed or assumed on loading, as sentences for the user.

    Raises:
        UserError: the file is missing or unsupported, or llama.cpp is not installed.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        self._library = library()
        reader = open_gguf(path)
        self.path = path
        self.tokenizer = tokenizer_in(reader, path)
        template = metadata(reader, "tokenizer.chat_template", str)
        self.chats = template is not None
        self.notes = tuple(chat_template_notes(template, {}, OTHER_NAMES))
        self.context = context_in(reader)
        self.device = torch.device("cpu")
        self._weights = _Weights(self._library, path, device)
        self._vocabulary = self._library.llama_model_get_vocab(self._weights.model)
        self.vocab_size = self._library.llama_vocab_n_tokens(self._vocabulary)
        self.parameters = self._library.llama_model_n_params(self._weights.model)
        self._allocate()

    def new_backend(self) -> "LlamaCpp":
        """Return a backend with the same weights and a KV cache of its own, for another session."""
        backend = copy.copy(self)
        backend._allocate()
        return backend

    def _allocate(self) -> None:
        """Allocate the KV cache and the batch, freed with this object."""
        self._context = self._new_context()
        self._batch = self._library.llama_batch_init(BATCH, 0, 1)
        weakref.finalize(self, _free_context, self._library, self._batch, self._context, self._weights)
        self._cached_ids: list[int] = []

    def _new_context(self) -> Any:
        settings = self._library.llama_context_default_params()
        settings.n_ctx = self.context
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads() or os.cpu_count() or 1
        # Flash attention sums values in half precision on a CPU.
        settings.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = self._library.llama_init_from_model(self._weights.model, settings)
        if not context:
            raise UserError(f"llama.cpp cannot allocate a context for {self.path}: {_error_reason()}")
        return context

    def prefill(self, prompts: Sequence[list[int]], max_new_tokens: int) -> Tensor:
        """See `DecodingBackend.prefill`; logits [1, V]. Raises ValueError for more than one prompt."""
        if len(prompts) != 1:
            raise ValueError("llama.cpp decodes one sequence at a time here")
        return torch.from_numpy(self._logits(prompts[0], len(prompts[0]) - 1))

    def decode_step(self, tokens: Tensor) -> Tensor:
        """See `DecodingBackend.decode_step`; token [1, 1], logits [1, V]."""
        ids = [*self._cached_ids, int(tokens)]
        return torch.from_numpy(self._logits(ids, len(ids) - 1))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits after every token of a text, [n, V] in fp32."""
        return torch.from_numpy(self._logits(ids, 0))

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
        logits = torch.from_numpy(self._logits(ids[:-1], first - 1))
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

    def _logits(self, ids: Sequence[int], first: int) -> NDArray[np.float32]:
        """Return the logits [n, V] after the tokens from position `first` on, decoding only what is not cached."""
        if len(ids) > self.context:
            raise ValueError(f"{number_of(len(ids), 'token')} are more than the context of {self.context:,}")
        # The cache holds no logits, so the tokens from `first` on are decoded again even if they are cached.
        cached = min(_common_prefix(ids, self._cached_ids), first)
        self._library.llama_memory_seq_rm(self._library.llama_get_memory(self._context), 0, cached, -1)
        self._cached_ids = self._cached_ids[:cached]
        parts = []
        for start in range(cached, len(ids), BATCH):
            parts.append(self._decode_batch(ids[start : start + BATCH], start, first))
        return np.concatenate(parts)

    def _decode_batch(self, ids: Sequence[int], start: int, first: int) -> NDArray[np.float32]:
        """Decode tokens at positions from `start` on; return the logits of those from position `first` on."""
        self._batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            self._batch.token[index] = token
            self._batch.pos[index] = start + index
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = 0
            self._batch.logits[index] = start + index >= first
        if status := self._library.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode failed with status {status}: {_error_reason()}")
        self._cached_ids += ids
        rows = min(len(ids), max(start + len(ids) - first, 0))
        if not rows:
            return np.empty((0, self.vocab_size), np.float32)
        logits = np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (rows, self.vocab_size))
        return np.array(logits, dtype=np.float32)  # a copy: the next batch overwrites it


def _common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    pairs = zip(ids, others, strict=False)
    differing = (position for position, (one, other) in enumerate(pairs) if one != other)
    return next(differing, min(len(ids), len(others)))


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
