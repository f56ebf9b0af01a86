"""Writes a model as GGUF, and proves that the file computes the same before it takes its name.

Two differences of logits are measured on real text, at every position and over the whole vocabulary:

    computed    What llama.cpp makes of the file, beside our decoder with the weights that the file holds. Only rounding
                may differ: a wrong graph, order of rows or number is far above it.
    stored      Our decoder with the weights that the file holds, beside the model itself: what the type costs.

Without llama.cpp the package gguf reads the file back, and only the second is measured.
"""

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

from cucafera.config import UserError, shown
from cucafera.data.chat import render
from cucafera.data.files import replaced_whole
from cucafera.data.tokenizer import DOCUMENT_START_ID, Tokenizer
from cucafera.interop.gguf_format import (
    INSTALL_GGUF,
    add_metadata,
    architecture_of,
    decoder_in,
    open_gguf,
    stored_weights,
    tokenizer_in,
)
from cucafera.interop.llama_cpp import LlamaCpp, is_there, quantize
from cucafera.interop.real_text import conversations, documents
from cucafera.model.transformer import Decoder

if TYPE_CHECKING:
    from gguf import GGUFReader

    from cucafera.interop.trained import TrainedModel

log = logging.getLogger(__name__)

WRITTEN_HERE = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Types of weights, and what the file says of itself. Vectors are in fp32 in all of them."""
BY_LLAMA_CPP = ("q4_0", "q4_k_m", "q5_k_m", "q6_k")
"""Mixtures of types, which llama.cpp makes."""
TYPES = (*WRITTEN_HERE, *BY_LLAMA_CPP)

MOST_STORED = {"f32": 1e-4, "f16": 0.03, "bf16": 0.2}
MOST_COMPUTED = {"f32": 0.03, "f16": 0.03, "bf16": 0.2}
"""Largest differences that rounding explains, in standard deviations of the logits. llama.cpp rounds activations to the
type of the weights, and keys, values and GELU to fp16. Of trained models 0.003 was measured, 0.02 in bf16; of random
ones with large weights 0.02 and 0.1. What is not the same is far above: 0.9 with SiLU for GELU, 1.7 with the queries of
one layer turned wrongly, 0.2 with a tenth more of rope_theta."""
MOST_COMPUTED_TYPICALLY = 0.1
"""The same for quantized types, of typical differences: there llama.cpp rounds activations to 8 bits, block by block.
0.01 was measured of trained models, 0.02 of random ones, and 0.17 with SiLU for GELU."""

DOCUMENT_TOKENS, CONVERSATION_TOKENS = 384, 128
"""How much text the proof reads."""


@dataclass(frozen=True)
class Difference:
    """Logits beside logits.

    Attributes:
        largest: The largest of all differences.
        typical: Their root mean square.
        same_choice: At which share of positions the likeliest token is the same.
    """

    largest: float
    typical: float
    same_choice: float

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.largest:.2g}, typically by {self.typical:.2g}; the likeliest token is the "
            f"same at {self.same_choice:.1%}"
        )


@dataclass(frozen=True)
class Proof:
    """What was measured of a file.

    Attributes:
        type_: Its type.
        size: Bytes.
        matrices: How many of its matrices have which type.
        positions: Where logits were compared.
        deviation: Standard deviation of the model's logits.
        stored: The file's weights beside the model's.
        computed: llama.cpp beside the file's weights; None: it is not installed.
    """

    type_: str
    size: int
    matrices: dict[str, int]
    positions: int
    deviation: float
    stored: Difference
    computed: Difference | None

    def problems(self) -> list[str]:
        """Why the file must not be used."""
        found = []
        # `not <=`, which is true of NaN as well.
        if not self.stored.largest <= MOST_STORED.get(self.type_, math.inf) * self.deviation:
            found.append(f"its weights give logits that differ by up to {self.stored.largest:.2g} from the model's")
        if self.computed and not self._is_rounding(self.computed):
            found.append(
                f"llama.cpp computes logits that differ by up to {self.computed.largest:.2g}, typically "
                f"{self.computed.typical:.2g}, from what its weights give"
            )
        if found:
            found.append(f"the standard deviation of the logits is {self.deviation:.2g}")
        return found

    def _is_rounding(self, computed: Difference) -> bool:
        if self.type_ in MOST_COMPUTED:
            return computed.largest <= MOST_COMPUTED[self.type_] * self.deviation
        return computed.typical <= MOST_COMPUTED_TYPICALLY * self.deviation

    def __str__(self) -> str:
        matrices = ", ".join(f"{count} {kind}" for kind, count in self.matrices.items())
        read_by = (
            f"llama.cpp beside its weights: {self.computed}"
            if self.computed
            else "llama.cpp is not installed, so the file was read back by the package gguf alone"
        )
        return (
            f"{self.size / 1e6:,.1f} MB, matrices: {matrices}; logits of {self.positions:,} positions with a standard "
            f"deviation of {self.deviation:.2f}\n"
            f"its weights beside the run's: {self.stored}\n{read_by}"
        )


def write_gguf(
    trained: "TrainedModel", path: Path, type_: str, name: str | None = None, licence: str | None = None
) -> Proof:
    """Writes a model, and proves the file; without a proof there is none.

    Args:
        trained: The model.
        path: The file; one that is there is replaced.
        type_: One of TYPES.
        name: What the model is called; None: as the file.
        licence: Of the weights, as the hub calls it; None: the file does not say.

    Returns:
        What was measured.

    Raises:
        UserError: GGUF cannot hold this model; the file does not compute the same; it cannot be written; or a package
            is not installed.
    """
    if type_ not in TYPES:
        raise UserError(f"there is no type {shown(type_)}: choose among {', '.join(TYPES)}")
    architecture_of(trained.model.config)
    try:
        with replaced_whole(path) as partial:
            if type_ in WRITTEN_HERE:
                _write(trained, partial, type_, name or path.stem, licence)
            else:
                _write_by_llama_cpp(trained, partial, type_, name or path.stem, licence)
            log.info("Comparing what %s computes with the model", path)
            proof = prove(trained, partial, type_)
            if problems := proof.problems():
                raise UserError(f"{path} is not written, because it would not be the same model: {'; '.join(problems)}")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return proof


def _write_by_llama_cpp(trained: "TrainedModel", path: Path, type_: str, name: str, licence: str | None) -> None:
    full = path.with_name(f"{path.name}.f32")
    try:
        _write(trained, full, "f32", name, licence)
        log.info("llama.cpp makes %s of it", type_)
        quantize(full, path, type_.upper())
    finally:
        full.unlink(missing_ok=True)


def _write(trained: "TrainedModel", path: Path, type_: str, name: str, licence: str | None) -> None:
    try:
        import gguf
        from gguf import GGMLQuantizationType as Type
    except ImportError as error:
        raise UserError(INSTALL_GGUF) from error

    config = trained.model.config
    writer = gguf.GGUFWriter(path, architecture_of(config))
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_languages(["ca"])
        if licence is not None:
            writer.add_license(licence)
        writer.add_file_type(gguf.LlamaFileType[WRITTEN_HERE[type_]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_metadata(writer, config, trained.tokenizer, trained.chats)
        total = len(trained.model.state_dict())
        weights = stored_weights(trained.model)
        for _, theirs, value in tqdm(weights, desc=f"Converting to {type_}", total=total, leave=False, disable=None):
            kind = Type[_kind(type_, value)]
            writer.add_tensor(theirs, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _kind(type_: str, value: Tensor) -> str:
    """The type of one tensor: vectors are small, and llama.cpp wants them in fp32."""
    if value.ndim < 2:
        return "F32"
    if type_ == "q8_0" and value.shape[1] % 32:  # a block has 32 numbers of a row
        return "F16"
    return type_.upper()


def prove(trained: "TrainedModel", path: Path, type_: str) -> Proof:
    """Compares what a file computes with a model.

    Raises:
        UserError: the file cannot be read, or holds another tokenizer.
    """
    reader = open_gguf(path)
    if tokenizer_in(reader, path).fingerprint != trained.tokenizer.fingerprint:
        raise UserError(f"the tokenizer in {path} is not the one that was written")
    decoder = decoder_in(reader, trained.model.config)
    llama = LlamaCpp(path, device="cpu") if is_there() else None
    stored, computed, squares = _Compared(), _Compared(), 0.0
    for ids in proof_texts(trained):
        of_model, of_file = (logits_of(model, ids) for model in (trained.model, decoder))
        stored.add(of_file, of_model)
        squares += (of_model - of_model.mean()).double().square().mean().item() * len(ids)
        if llama:
            computed.add(llama.logits(ids), of_file)
    if llama:
        _compare_tokenizers(llama, trained.tokenizer)
    return Proof(
        type_=type_,
        size=path.stat().st_size,
        matrices=_matrices(reader),
        positions=stored.positions,
        deviation=math.sqrt(squares / stored.positions),
        stored=stored.difference(),
        computed=computed.difference() if llama else None,
    )


class _Compared:
    """Logits beside logits, text by text."""

    def __init__(self) -> None:
        self.positions = 0
        self._largest = 0.0
        self._squares = 0.0
        self._same = 0

    def add(self, logits: Tensor, others: Tensor) -> None:
        """Logits of a text, [n, V] each."""
        self.positions += len(logits)
        differences = (logits - others).abs()
        self._largest = float(np.maximum(self._largest, differences.max().item()))  # NaN stays NaN
        self._squares += differences.double().square().mean().item() * len(logits)
        self._same += int((logits.argmax(-1) == others.argmax(-1)).sum())

    def difference(self) -> Difference:
        return Difference(self._largest, math.sqrt(self._squares / self.positions), self._same / self.positions)


def proof_texts(trained: "TrainedModel") -> Iterator[list[int]]:
    """What the proof reads: embedded documents, and conversations for a model that was trained on some."""
    context = trained.model.config.max_position_embeddings
    starts = ([DOCUMENT_START_ID, *trained.tokenizer.encode(text)] for text in documents())
    yield list(islice(chain.from_iterable(starts), min(DOCUMENT_TOKENS, context)))
    if trained.chats:
        turns = (render([messages], trained.tokenizer)[0].ids.tolist() for messages in conversations())
        yield list(islice(chain.from_iterable(turns), min(CONVERSATION_TOKENS, context)))


@torch.inference_mode()
def logits_of(model: Decoder, ids: list[int]) -> Tensor:
    """Logits behind every token of a text, [n, V], in fp32 on the CPU."""
    return model.logits(model(torch.tensor([ids]))[0]).float()


def _compare_tokenizers(llama: LlamaCpp, tokenizer: Tokenizer) -> None:
    for text in islice(documents(), 20):
        if llama.encode(text) != tokenizer.encode(text):
            raise UserError(f"llama.cpp's tokenizer would give other ids than ours to the text {text[:60]!r}...")


def _matrices(reader: "GGUFReader") -> dict[str, int]:
    kinds = Counter(tensor.tensor_type.name.lower() for tensor in reader.tensors if len(tensor.shape) > 1)
    return dict(kinds.most_common())
