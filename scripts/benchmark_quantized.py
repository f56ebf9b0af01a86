"""A run beside its GGUF files: size, speed of writing, and what the smaller weights cost in bits per byte.

    python scripts/benchmark_quantized.py outputs/pretrain                              all types but the rarer ones
    python scripts/benchmark_quantized.py outputs/finetune --type q8_0 --type q4_k_m    these
    python scripts/benchmark_quantized.py outputs/pretrain --text held_out.txt          bpb on another text

    fp32           the run itself, by the product's own decoder
    f32 to q4_k_m  its GGUF files, written and proved as by the export door, by llama.cpp

Needs the packages of `pip install '.[llama]'`. The files go into a folder that is removed, or stay in --files.

Writing is greedy, of one text; the prompts are taken from the text, another one each round, because llama.cpp does not
read again what it knows. The sides write in turn, round by round, and the first round is not counted. tokens/s are
those after the first token; the ratio is the time of fp32 over that of the file in the same round, so that above 1 the
file is faster. `same text` counts the prompts after which the file writes what fp32 writes, token for token.

bpb is measured on the text's documents, from --text (.txt: one document; .jsonl: a `text` each line) or the embedded
corpus, which most runs were trained on: then only the differences mean something. Each document begins with the
document-start token and is cut into windows of the context, which begin anew: the first token of a window does not
count, and is the last of the one before.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from cucafera.config import SamplingConfig, UserError
from cucafera.data.corpus import embedded_corpus
from cucafera.data.tokenizer import DOCUMENT_START_ID, Tokenizer
from cucafera.generation.generate import Reader, reader_of, token_columns
from cucafera.interop.gguf import TYPES, logits_of, write_gguf
from cucafera.interop.llama_cpp import LlamaCpp
from cucafera.interop.trained import load_trained
from cucafera.model.flops import parameter_count
from cucafera.model.transformer import Decoder

OURS = "fp32"
Window = tuple[list[int], int]
"""Token ids, and the place of the first that counts."""


class Side(NamedTuple):
    """One row of the table.

    Attributes:
        size: Bytes of its weights, or of its file.
        reader: What writes.
        nats: What measures.
    """

    size: int
    reader: Reader
    nats: Callable[[list[Window]], list[list[float]]]


class Measured(NamedTuple):
    """What one side did.

    Attributes:
        first, rest: Seconds to the first token, and from there to the last, of each round.
        texts: What it wrote, of each round.
        bpb: Bits per byte.
    """

    first: list[float]
    rest: list[float]
    texts: list[list[int]]
    bpb: float


def our_nats(model: Decoder) -> Callable[[list[Window]], list[list[float]]]:
    """Negative log-likelihoods by our decoder, in double precision as those of llama.cpp."""

    def nats(windows: list[Window]) -> list[list[float]]:
        return [
            torch.nn.functional.cross_entropy(
                logits_of(model, ids[:-1])[first - 1 :].double(), torch.tensor(ids[first:]), reduction="none"
            ).tolist()
            for ids, first in windows
        ]

    return nats


def documents(path: Path | None) -> Iterator[str]:
    """The texts of a .txt or .jsonl file, or the embedded ones."""
    if path is not None and path.suffix != ".jsonl":
        yield path.read_text(encoding="utf-8")
        return
    with (embedded_corpus() if path is None else path).open("rb") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def windows_of(texts: Iterator[str], tokenizer: Tokenizer, context: int, tokens: int) -> list[Window]:
    """Windows of texts, until so many tokens count."""
    windows: list[Window] = []
    left = tokens
    for text in texts:
        ids = [DOCUMENT_START_ID, *tokenizer.encode(text)]
        for start in range(0, len(ids) - 1, context - 1):
            window = ids[start : start + context][: left + 1]
            windows.append((window, 1))
            left -= len(window) - 1
            if not left:
                return windows
    return windows


def bits_per_byte(side: Side, windows: list[Window], tokenizer: Tokenizer) -> float:
    """Bits of the tokens that count over their bytes."""
    lengths = tokenizer.token_bytes()
    size = sum(int(lengths[ids[first:]].sum()) for ids, first in windows)
    return sum(map(sum, side.nats(windows))) / math.log(2) / size


def write(reader: Reader, prompt: list[int], tokens: int) -> tuple[float, float, list[int]]:
    """Seconds to the first token, seconds of the others, and all of them."""
    greedy = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=tokens)
    started = time.perf_counter()
    columns = token_columns(reader, [prompt], greedy, None)
    text = next(columns)
    first = time.perf_counter()
    text += [token for (token,) in columns]
    return first - started, time.perf_counter() - first, text


def measure(
    sides: dict[str, Side], windows: list[Window], tokenizer: Tokenizer, prompts: list[list[int]], tokens: int
) -> dict[str, Measured]:
    """All sides in turn, round by round; the first round is not counted."""
    results = {name: Measured([], [], [], bits_per_byte(side, windows, tokenizer)) for name, side in sides.items()}
    for number, prompt in enumerate(prompts):
        for name, side in sides.items():
            first, rest, text = write(side.reader, prompt, tokens)
            if number:
                results[name].first.append(first)
                results[name].rest.append(rest)
                results[name].texts.append(text)
    return results


def table(sides: dict[str, Side], results: dict[str, Measured], tokens: int) -> str:
    """A line a side."""
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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument("--type", action="append", choices=TYPES, help="may be repeated (f32, f16, q8_0, q4_k_m, q4_0)")
    parser.add_argument("--text", type=Path, help="a .txt or .jsonl file to measure bpb on (the embedded corpus)")
    parser.add_argument("--text-tokens", type=int, default=8192, help="most tokens of it that count (8,192)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of it, where the context allows (128)")
    parser.add_argument("--tokens", type=int, default=64, help="to write (64)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (5)")
    parser.add_argument("--files", type=Path, help="a folder for the GGUF files, which stay")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            compare(arguments, arguments.files or Path(temporary))
    except UserError as error:
        raise SystemExit(str(error)) from error


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Writes the files, measures all sides, and prints the table."""
    trained = load_trained(arguments.run)
    config, tokenizer = trained.model.config, trained.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    sides = {OURS: Side(4 * parameter_count(config), reader_of(trained.model), our_nats(trained.model))}
    for type_ in arguments.type or ("f32", "f16", "q8_0", "q4_k_m", "q4_0"):
        path = folder / f"{type_}.gguf"
        print(f"{type_}: {write_gguf(trained, path, type_)}\n", flush=True)
        llama = LlamaCpp(path, device="cpu")
        sides[type_] = Side(path.stat().st_size, llama, llama.nats)

    context = config.max_position_embeddings
    windows = windows_of(documents(arguments.text), tokenizer, context, arguments.text_tokens)
    stream = [token for text in documents(arguments.text) for token in (DOCUMENT_START_ID, *tokenizer.encode(text))]
    length = min(arguments.prompt, context - arguments.tokens)
    starts = range(0, len(stream) - length, max((len(stream) - length) // (arguments.rounds + 1), 1))
    prompts = [stream[start : start + length] for start in starts][: arguments.rounds + 1]
    print(
        f"{arguments.run}: {parameter_count(config):,} parameters, a CPU with {torch.get_num_threads()} threads; "
        f"{arguments.tokens} tokens after {length}, medians of {len(prompts) - 1} rounds; bpb of "
        f"{sum(len(ids) - first for ids, first in windows):,} tokens of {arguments.text or 'the embedded corpus'} in "
        f"{len(windows):,} windows of at most {context:,}\n"
    )
    print(table(sides, measure(sides, windows, tokenizer, prompts, arguments.tokens), arguments.tokens))


if __name__ == "__main__":
    main()
