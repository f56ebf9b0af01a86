"""A run against its GGUF files: size, generation speed, and the cost of quantization in bits per byte.

    python scripts/benchmark_quantized.py outputs/pretrain                              the common types
    python scripts/benchmark_quantized.py outputs/finetune --type q8_0 --type q4_k_m    these types
    python scripts/benchmark_quantized.py outputs/pretrain --text held_out.txt          bpb on another text

    fp32           the run itself, by cucafera's decoder
    f32 to q4_k_m  its GGUF files, written and verified as by the export command, by llama.cpp

Needs the packages of `pip install '.[llama]'`. The files are written to a temporary folder, or kept in --files.

Decoding is greedy, of one text. The prompts are taken from the text, a new one in each round, because llama.cpp reuses
its KV cache for a known prefix. The sides run in turn, round by round, and the first round is a warm-up. tokens/s are
those after the first token; the ratio is the time of fp32 over that of the file in the same round, so above 1 the file
is faster. `same text` counts the prompts after which the file gives the same tokens as fp32.

bpb is that of `python -m cucafera.evaluate RUN --text`, on documents of --text, or of the embedded corpus, which most
runs were trained on; then only differences are meaningful.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.tokenizer import Tokenizer
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.perplexity import score_texts
from cucafera.evaluation.requests import Scorer
from cucafera.evaluation.texts import EncodedText, read_texts
from cucafera.generation.backend import TorchBackend
from cucafera.generation.engine import Engine
from cucafera.generation.request import Request
from cucafera.interop.gguf import TYPES, write_gguf
from cucafera.interop.llama_cpp import LlamaCpp
from cucafera.interop.real_text import documents
from cucafera.interop.trained import load_trained
from cucafera.model.flops import parameter_count
from cucafera.quantities import number_of

OURS = "fp32"


class Side(NamedTuple):
    """One row of the table.

    Attributes:
        size: Bytes of its weights, or of its file.
        engine: Decodes.
        scorer: Measures.
    """

    size: int
    engine: Engine
    scorer: Scorer


class Measured(NamedTuple):
    """Measurements of one side.

    Attributes:
        first, rest: Seconds to the first token, and from there to the last, of each round.
        texts: Generated tokens of each round.
        bpb: Bits per byte.
    """

    first: list[float]
    rest: list[float]
    texts: list[list[int]]
    bpb: float


def write(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, float, list[int]]:
    """Return seconds to the first token, seconds of the others, and all tokens."""
    greedy = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=tokens)
    started = time.perf_counter()
    generation = engine.add(Request(prompt, greedy, frozenset()))
    while not generation.ids:
        engine.step()
    first = time.perf_counter()
    while engine.running:
        engine.step()
    return first - started, time.perf_counter() - first, generation.ids


def compared(
    sides: dict[str, Side], texts: list[EncodedText], prompts: list[list[int]], tokens: int
) -> dict[str, Measured]:
    """Measure all sides in turn, round by round, without the first round."""
    results = {}
    for name, side in sides.items():
        score = score_texts(side.scorer, texts, side.scorer.context // 2)
        results[name] = Measured([], [], [], score.metrics()["bpb"].value)
    for number, prompt in enumerate(prompts):
        for name, side in sides.items():
            first, rest, text = write(side.engine, prompt, tokens)
            if number:
                results[name].first.append(first)
                results[name].rest.append(rest)
                results[name].texts.append(text)
    return results


def table(sides: dict[str, Side], results: dict[str, Measured], tokens: int) -> str:
    """Return a table with one line per side."""
    ours = results[OURS]
    lines = [
        f"{'':8}{'MB':>9}{'first token':>14}{'tokens/s':>11}{'ratio':>7}{'(rounds)':>16}{'same text':>11}{'bpb':>9}"
        f"{'difference':>12}"
    ]
    for name, side in sides.items():
        row = results[name]
        ratios = [own / theirs for own, theirs in zip(ours.rest, row.rest, strict=True)]
        same = sum(text == own for text, own in zip(row.texts, ours.texts, strict=True))
        lines.append(
            f"{name:8}{side.size / 1e6:>9,.1f}{1000 * statistics.median(row.first):>11,.1f} ms"
            f"{(tokens - 1) / statistics.median(row.rest):>11,.1f}{statistics.median(ratios):>7.2f}"
            f"{f'{min(ratios):.2f} to {max(ratios):.2f}':>16}{f'{same} of {len(row.texts)}':>11}"
            f"{row.bpb:>9.4f}{row.bpb - ours.bpb:>+12.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument("--type", action="append", choices=TYPES, help="may be repeated (f32, f16, q8_0, q4_k_m, q4_0)")
    parser.add_argument("--text", help="files to measure bpb on (the embedded corpus)")
    parser.add_argument("--documents", type=int, default=40, help="maximum number of documents (40)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt, where the context allows (128)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (5)")
    parser.add_argument("--files", type=Path, help="folder to keep the GGUF files in")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            compare(arguments, arguments.files or Path(temporary))
    except UserError as error:
        raise SystemExit(str(error)) from error


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the files, measure all sides, and print the table."""
    trained = load_trained(arguments.run)
    config, tokenizer = trained.model.config, trained.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(TorchBackend(trained.model), tokenizer)
    sides = {OURS: Side(4 * parameter_count(config), engine, DecoderScorer(trained.model))}
    for type_ in arguments.type or ("f32", "f16", "q8_0", "q4_k_m", "q4_0"):
        path = folder / f"{type_}.gguf"
        print(f"{type_}: {write_gguf(trained, path, type_)}\n", flush=True)
        llama = LlamaCpp(path, device="cpu")
        sides[type_] = Side(path.stat().st_size, Engine(llama, tokenizer), llama)

    texts = list(texts_of(arguments.text, arguments.documents, tokenizer))
    stream = [token for text in texts for token in text.ids]
    length = min(arguments.prompt, config.max_position_embeddings - arguments.tokens)
    starts = range(0, len(stream) - length, max((len(stream) - length) // (arguments.rounds + 1), 1))
    prompts = [stream[start : start + length] for start in starts][: arguments.rounds + 1]
    print(
        f"{arguments.run}: {number_of(parameter_count(config), 'parameter')}, a CPU with "
        f"{torch.get_num_threads()} threads; "
        f"{number_of(arguments.tokens, 'token')} after {length}, medians of {len(prompts) - 1} rounds; bpb of "
        f"{len(stream):,} "
        f"tokens in {number_of(len(texts), 'document')} of {arguments.text or 'the embedded corpus'}\n"
    )
    print(table(sides, compared(sides, texts, prompts, arguments.tokens), arguments.tokens))


def texts_of(path: str | None, most: int, tokenizer: Tokenizer) -> Iterator[EncodedText]:
    """Return the documents of files, or the embedded ones."""
    if path is not None:
        yield from read_texts(path, "text", most, tokenizer)
        return
    for text in islice(documents(), most):
        yield EncodedText([DOCUMENT_START_ID, *tokenizer.encode(text)], None, len(text.encode()))


if __name__ == "__main__":
    main()
