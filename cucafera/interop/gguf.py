"""Write a model as GGUF, and verify that the file computes the same before it gets its final name.

Two differences of logits are measured on real text, at every position and over the full vocabulary:

    computed    llama.cpp on the file against our decoder with the weights of the file. Only rounding may differ: a
                wrong graph, order of rows or hyperparameter differs far more.
    stored      Our decoder with the weights of the file against the model: the loss by the type of the weights.

Without llama.cpp the file is read with the package gguf, and only `stored` is measured.
"""

import importlib.util
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cucafera.config.errors import UserError
from cucafera.config.fields import format_value
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.chatml import render
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop.gguf_format import (
    INSTALL_GGUF,
    add_metadata,
    architecture_of,
    decoder_in,
    open_gguf,
    stored_weights,
    tokenizer_in,
)
from cucafera.interop.llama_cpp import LlamaCpp, check_quantizer, is_installed, quantize
from cucafera.interop.real_text import conversations, documents
from cucafera.model.transformer import Decoder
from cucafera.quantities import number_of
from cucafera.runs.averaging import steps_in_words
from cucafera.storage import atomic_replace

if TYPE_CHECKING:
    from gguf import GGUFReader

    from cucafera.interop.trained import TrainedModel

log = logging.getLogger(__name__)

NATIVE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Types that are written without llama.cpp, and their names in the file. Vectors are fp32 in every type."""
LLAMA_CPP_TYPES = ("q4_0", "q4_k_m", "q5_k_m", "q6_k")
"""Mixtures of types, written by llama.cpp's quantizer."""
TYPES = (*NATIVE_TYPES, *LLAMA_CPP_TYPES)

MAX_STORED = {"f32": 1e-4, "f16": 0.03, "bf16": 0.2}
MAX_COMPUTED = {"f32": 0.03, "f16": 0.03, "bf16": 0.2}
"""Largest differences of logits that rounding explains, in standard deviations of the logits. llama.cpp rounds
activations to the type of the weights, and keys, values and GELU to fp16. Measured: 0.003 with trained models, 0.02 in
bf16; 0.02 and 0.1 with random models of large weights. Errors differ far more: 0.9 with SiLU instead of GELU, 1.7 with
one layer's queries rotated wrongly, 0.2 with rope_theta 10% too large."""
MAX_COMPUTED_RMS = 0.1
"""The same for quantized types, for the root mean square: there llama.cpp rounds activations to 8 bits, block by block.
Measured: 0.01 with trained models, 0.02 with random ones, and 0.17 with SiLU instead of GELU."""

DOCUMENT_TOKENS, CONVERSATION_TOKENS = 384, 128
"""Tokens of the text that a file is verified on."""


@dataclass(frozen=True)
class LogitDifference:
    """The difference of the logits of two models on the same text.

    Attributes:
        largest: The largest absolute difference.
        rms: The root mean square.
        top1_agreement: Share of positions with the same top-1 token.
    """

    largest: float
    rms: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.largest:.2g} (RMS {self.rms:.2g}); top-1 agreement "
            f"{self.top1_agreement:.1%}"
        )


@dataclass(frozen=True)
class Verification:
    """The comparison of a file with the model that it was written from.

    Attributes:
        type_: The type of the weights.
        size: Bytes of the file.
        matrices: Number of matrices by type.
        positions: Number of positions at which logits were compared.
        deviation: Standard deviation of the model's logits.
        stored: Our decoder with the file's weights, against the model.
        computed: llama.cpp on the file, against our decoder with the file's weights; None if it is not installed.
    """

    type_: str
    size: int
    matrices: dict[str, int]
    positions: int
    deviation: float
    stored: LogitDifference
    computed: LogitDifference | None

    def problems(self) -> list[str]:
        """Return the reasons not to use the file; empty if there are none."""
        found = []
        # `not <=` is true of NaN too.
        if not self.stored.largest <= MAX_STORED.get(self.type_, math.inf) * self.deviation:
            found.append(f"its weights give logits that differ from the model's by up to {self.stored.largest:.2g}")
        if self.computed and not self._is_rounding(self.computed):
            found.append(
                f"llama.cpp computes logits that differ from those of its weights by up to "
                f"{self.computed.largest:.2g} (RMS {self.computed.rms:.2g})"
            )
        if found:
            found.append(f"the standard deviation of the logits is {self.deviation:.2g}")
        return found

    def _is_rounding(self, computed: LogitDifference) -> bool:
        if self.type_ in MAX_COMPUTED:
            return computed.largest <= MAX_COMPUTED[self.type_] * self.deviation
        return computed.rms <= MAX_COMPUTED_RMS * self.deviation

    def __str__(self) -> str:
        matrices = ", ".join(f"{count} {kind}" for kind, count in self.matrices.items())
        computed = self.computed or "not verified: it is not installed, so only the package gguf has read the file"
        return (
            f"{self.size / 1e6:,.1f} MB, matrices: {matrices}; verified at "
            f"{number_of(self.positions, 'position')}, where the "
            f"standard deviation of the logits is {self.deviation:.2f}\n"
            f"Weights of the file against the model: {self.stored}\n"
            f"llama.cpp against the weights of the file: {computed}"
        )


def write_gguf(
    trained: "TrainedModel", path: Path, type_: str, name: str | None = None, licence: str | None = None
) -> Verification:
    """Write a model as a GGUF file, which gets its name only if its verification succeeds.

    Args:
        trained: The model.
        path: The file; an existing one is replaced.
        type_: One of TYPES.
        name: Name of the model; None: that of the file.
        licence: Of the weights, as an identifier of the hub; None: not stated in the file.

    Raises:
        UserError: GGUF cannot represent this model, the file does not compute the same, it cannot be written, or a
            package is not installed.
    """
    check_type(type_)
    architecture_of(trained.model.config)
    try:
        with atomic_replace(path) as partial:
            if type_ in NATIVE_TYPES:
                _write(trained, partial, type_, name or path.stem, licence)
            else:
                _write_by_llama_cpp(trained, partial, type_, name or path.stem, licence)
            log.info("Verifying %s", path)
            verification = verify(trained, partial, type_)
            if problems := verification.problems():
                raise UserError(f"{path} is not written, because verification failed: {'; '.join(problems)}")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return verification


def check_type(type_: str) -> None:
    """Raise UserError if a type does not exist, or something is not installed that writes it."""
    if type_ not in TYPES:
        raise UserError(f"there is no type {format_value(type_)}: choose one of {', '.join(TYPES)}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(INSTALL_GGUF)
    if type_ in LLAMA_CPP_TYPES:
        check_quantizer(type_)


def _write_by_llama_cpp(trained: "TrainedModel", path: Path, type_: str, name: str, licence: str | None) -> None:
    full = path.with_name(f"{path.name}.f32")
    try:
        _write(trained, full, "f32", name, licence)
        log.info("Quantizing to %s with llama.cpp", type_)
        quantize(full, path, type_.upper())
    finally:
        full.unlink(missing_ok=True)


def _write(trained: "TrainedModel", path: Path, type_: str, name: str, licence: str | None) -> None:
    import gguf
    from gguf import GGMLQuantizationType as Type

    config = trained.model.config
    writer = gguf.GGUFWriter(path, architecture_of(config))
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_languages(["ca"])
        if licence is not None:
            writer.add_license(licence)
        if trained.averaged:
            writer.add_description(f"The mean of the weights after the {steps_in_words(trained.averaged)}")
        writer.add_file_type(gguf.LlamaFileType[NATIVE_TYPES[type_]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_metadata(writer, config, trained.tokenizer, trained.chats)
        total = len(trained.model.state_dict())
        weights = stored_weights(trained.model)
        for _, gguf_name, value in tqdm(weights, desc=f"Converting to {type_}", total=total, leave=False, disable=None):
            kind = Type[_kind(type_, value)]
            writer.add_tensor(gguf_name, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _kind(type_: str, value: Tensor) -> str:
    """Return the type of one tensor; llama.cpp requires vectors in fp32."""
    if value.ndim < 2:
        return "F32"
    if type_ == "q8_0" and value.shape[1] % 32:  # its blocks are 32 values of a row
        return "F16"
    return type_.upper()


def verify(trained: "TrainedModel", path: Path, type_: str) -> Verification:
    """Compare what a file computes with the model that it was written from.

    Raises:
        UserError: the file cannot be read, or its tokenizer differs.
    """
    reader = open_gguf(path)
    if tokenizer_in(reader, path).fingerprint != trained.tokenizer.fingerprint:
        raise UserError(f"the tokenizer read back from {path} differs from the one written")
    decoder = decoder_in(reader, trained.model.config)
    llama = LlamaCpp(path, device="cpu") if is_installed() else None
    stored, computed, squares = _DifferenceSums(), _DifferenceSums(), 0.0
    for ids in verification_texts(trained):
        expected, from_file = (logits_of(model, ids) for model in (trained.model, decoder))
        stored.add(from_file, expected)
        squares += (expected - expected.mean()).double().square().mean().item() * len(ids)
        if llama:
            computed.add(llama.logits(ids), from_file)
    if llama:
        _compare_tokenizers(llama, trained.tokenizer)
    return Verification(
        type_=type_,
        size=path.stat().st_size,
        matrices=_matrices(reader),
        positions=stored.positions,
        deviation=math.sqrt(squares / stored.positions),
        stored=stored.difference(),
        computed=computed.difference() if llama else None,
    )


class _DifferenceSums:
    """Sums of the differences of logits over texts."""

    def __init__(self) -> None:
        self.positions = 0
        self._largest = 0.0
        self._squares = 0.0
        self._agreements = 0

    def add(self, logits: Tensor, others: Tensor) -> None:
        """Add the logits of a text, [n, V] each."""
        self.positions += len(logits)
        differences = (logits - others).abs()
        self._largest = float(
            np.maximum(self._largest, differences.max().item())
        )  # propagates NaN; max() would drop it
        self._squares += differences.double().square().mean().item() * len(logits)
        self._agreements += int((logits.argmax(-1) == others.argmax(-1)).sum())

    def difference(self) -> LogitDifference:
        rms = math.sqrt(self._squares / self.positions)
        return LogitDifference(self._largest, rms, self._agreements / self.positions)


def verification_texts(trained: "TrainedModel") -> Iterator[list[int]]:
    """Yield token ids of embedded documents, and of conversations for a model that was trained on some."""
    context = trained.model.config.max_position_embeddings
    encoded = ([DOCUMENT_START_ID, *trained.tokenizer.encode(text)] for text in documents())
    yield list(islice(chain.from_iterable(encoded), min(DOCUMENT_TOKENS, context)))
    if trained.chats:
        turns = (render([messages], trained.tokenizer)[0].ids.tolist() for messages in conversations())
        yield list(islice(chain.from_iterable(turns), min(CONVERSATION_TOKENS, context)))


@torch.inference_mode()
def logits_of(model: Decoder, ids: list[int]) -> Tensor:
    """Return the logits after every token of a text, [n, V], in fp32 on the CPU."""
    return model.logits(model(torch.tensor([ids]))[0]).float()


def _compare_tokenizers(llama: LlamaCpp, tokenizer: Tokenizer) -> None:
    for text in islice(documents(), 20):
        if llama.encode(text) != tokenizer.encode(text):
            raise UserError(f"llama.cpp tokenizes {text[:60]!r}... differently")


def _matrices(reader: "GGUFReader") -> dict[str, int]:
    kinds = Counter(tensor.tensor_type.name.lower() for tensor in reader.tensors if len(tensor.shape) > 1)
    return dict(kinds.most_common())
