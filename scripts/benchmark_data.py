"""Data throughput: text to shards, shards to batches, and a stream of ten billion tokens.

    python scripts/benchmark_data.py tokenize       a corpus to shards, against the tokenizers library alone
    python scripts/benchmark_data.py windows        shards to the batches of a run
    python scripts/benchmark_data.py ten-billion    20 GB of shards: opening, the first batch, memory

tokenize: from the compressed file to verified shards on disk, against the library's encode_batch and
encode_batch_fast on the same texts in memory. Each measurement is a separate process, which may use 1, 2, ... cores,
and a round runs every measurement once, so that other load affects all of them. The ratio is to the library's faster
call in the same round. All must give the same number of tokens, or the script fails. Without --corpus it generates one:
sentences of the embedded corpus in random order, with one word in twelve joined from two halves, so that new words
occur at the rate of the Catalan Wikipedia (275,000 different ones in 20 MB).

windows: the loader of a run on random tokens, with the given numbers of worker processes, for the default model and for
the 245M model, and how many GPUs at 400,000 tokens/s it would feed.

ten-billion: the files have the real format and the real writer's headers; their tokens are zeros in sparse files.
Windows come from the loader in the random order of a run. The checksum of every block of tokens is verified when it is
first read, so a first pass reads far more than its windows. Freed memory that the C allocator keeps is resident too,
and reported separately at the end. Needs /proc/self and malloc_trim of Linux. Fails if opening takes a second, or if
memory grows.
"""

import argparse
import ctypes
import functools
import gzip
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from cucafera.config.command_line import composed_config
from cucafera.config.schema import Config, DataConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.shards import BLOCK_TOKENS, ShardWriter, Tokens, TokenStream
from cucafera.data.sources import open_source
from cucafera.data.sources.embedded import EmbeddedConfig
from cucafera.data.sources.files import FilesConfig
from cucafera.data.tokenize import tokenize_source
from cucafera.data.tokenizer import Tokenizer
from cucafera.quantities import number_of

if TYPE_CHECKING:  # the tokenizing processes import this file, and do not need torch
    from cucafera.data.packed import StreamWindows
    from cucafera.data.windows import Batch
    from cucafera.training.data_module import StepLoader

TEXTS_IN_CALL = 100
"""With a whole corpus in one call, the encodings take gigabytes and the library is slower."""
OURS = "corpus to shards"
LIBRARY = ("encode_batch", "encode_batch_fast")
GPU_TOKENS_PER_SECOND = 400_000
ROW_WINDOWS = 10_000
MAX_GROWTH_MB = 4
"""Of memory in use."""
MAX_RESIDENT_GROWTH_MB = 64
"""Including freed memory that the allocator keeps: a few batches."""


# tokenize


def tokenize(arguments: argparse.Namespace) -> None:
    """Print one line per measurement, and the medians."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = arguments.corpus or generated_corpus(Path(folder) / "corpus.jsonl.gz", arguments.megabytes)
        path = arguments.tokenizer or trained_tokenizer(corpus, Path(folder) / "tokenizer.json")
        rounds: dict[tuple[int, str], list[dict[str, float]]] = {}
        for number in range(arguments.rounds):
            for cores in arguments.cores or core_counts():
                for work in (*LIBRARY, OURS):
                    found = measured_apart(work, corpus, path, cores)
                    rounds.setdefault((cores, work), []).append(found)
                    speed = found["megabytes"] / found["seconds"]
                    print(f"round {number + 1}: {number_of(cores, 'core')}, {work:20}{speed:8.2f} MB/s", flush=True)
    if len({found["tokens"] for results in rounds.values() for found in results}) > 1:
        raise SystemExit("the library and the shards have different numbers of tokens")
    print()
    print(tokenize_table(rounds))


def tokenize_table(rounds: dict[tuple[int, str], list[dict[str, float]]]) -> str:
    """Return a table of medians over rounds, and of ratios within a round."""
    first, *more = next(iter(rounds.values()))
    lines = [
        f"{first['megabytes']:.1f} MB of text, {number_of(round(first['tokens']), 'token')}; medians of "
        f"{1 + len(more)} rounds",
        "",
        f"{'cores':>5}  {'':20}{'MB/s':>8}{'tokens/s':>12}{'CPU seconds':>13}{'of the library':>16}",
    ]
    for (cores, work), results in rounds.items():
        seconds, cpu = (statistics.median(found[key] for found in results) for key in ("seconds", "cpu_seconds"))
        ratios = [
            min(rounds[cores, peer][number]["seconds"] for peer in LIBRARY) / found["seconds"]
            for number, found in enumerate(results)
        ]
        lines.append(
            f"{cores:>5}  {work:20}{first['megabytes'] / seconds:>8.2f}{first['tokens'] / seconds:>12,.0f}{cpu:>13.1f}"
            f"{statistics.median(ratios):>16.0%}  ({min(ratios):.0%} to {max(ratios):.0%})"
        )
    return "\n".join(lines)


def core_counts() -> list[int]:
    """Return 1, 2, 4, ... up to the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    return sorted({*(2**power for power in range(cores.bit_length()) if 2**power <= cores), cores})


def measured_apart(work: str, corpus: str, tokenizer: Path, cores: int) -> dict[str, float]:
    """Run a measurement in a new process with this many cores."""
    command = [sys.executable, __file__, "tokenize", "--corpus", corpus, "--tokenizer", str(tokenizer)]
    settings = {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false"}
    result = subprocess.run(
        [*command, "--cores", str(cores), "--only", work], stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, **settings},
    )  # fmt: skip
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def measured(work: str, corpus: str, path: Path, cores: int) -> dict[str, float]:
    """Return wall seconds, processor seconds including child processes, megabytes and tokens."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    texts = [text for text, _ in open_source("corpus", FilesConfig(path=corpus)).documents()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer.load(path)
    cpu, clock = os.times(), time.perf_counter()
    tokens = to_shards(corpus, tokenizer, cores) if work == OURS else encode_in_memory(work, texts, path)
    seconds, used = time.perf_counter() - clock, os.times()
    return {
        "seconds": seconds, "cpu_seconds": sum(used[:4]) - sum(cpu[:4]), "megabytes": megabytes, "tokens": tokens,
    }  # fmt: skip


def encode_in_memory(method: str, texts: list[str], path: Path) -> int:
    """Encode with the library alone, as the baseline. Return the number of tokens."""
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.encode_special_tokens = True
    encode = getattr(inner, method)
    parts = (texts[first : first + TEXTS_IN_CALL] for first in range(0, len(texts), TEXTS_IN_CALL))
    return sum(len(encoding) for part in parts for encoding in encode(part, add_special_tokens=False))


def to_shards(corpus: str, tokenizer: Tokenizer, cores: int) -> int:
    """Convert the compressed file to verified shards on disk. Return the number of tokens, without document starts."""
    with tempfile.TemporaryDirectory() as folder:
        found = tokenize_source(
            "corpus", FilesConfig(path=corpus), tokenizer, DataConfig(processes=cores), Path(folder) / "shards"
        )
    return found.tokens + found.held_out_tokens - found.documents - found.held_out_documents


def generated_corpus(path: Path, megabytes: float) -> str:
    """Write documents of twenty sentences of the embedded corpus, with one word in twelve joined from two halves."""
    generator = random.Random(0)
    documents = open_source("embedded", EmbeddedConfig(embedded="catalan")).documents()
    sentences = [part for text, _ in documents for part in re.split(r"(?<=[.!?»])\s+", text)]
    words = [word for sentence in sentences for word in sentence.split(" ") if len(word) > 3]

    def changed(word: str) -> str:
        if generator.random() > 1 / 12:
            return word
        begin, end = generator.choices(words, k=2)
        return begin[: len(begin) // 2] + end[len(end) // 2 :]

    written = 0
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
        while written < 1e6 * megabytes:
            text = " ".join(" ".join(map(changed, part.split(" "))) for part in generator.choices(sentences, k=20))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
    return str(path)


def trained_tokenizer(corpus: str, path: Path) -> Path:
    """Train a tokenizer of 65,536 entries on the first documents of the corpus."""

    def texts() -> Iterator[str]:
        left = 10e6
        for text, _ in open_source("corpus", FilesConfig(path=corpus)).documents():
            yield text
            left -= len(text.encode())
            if left <= 0:
                return

    Tokenizer.train(texts(), 65_536).save(path)
    return path


# windows


def windows(arguments: argparse.Namespace) -> None:
    """Print one line per model and number of workers."""
    from cucafera.data.packed import StreamWindows

    print(f"{'':16}{'T':>6}{'workers':>9}{'windows/s':>11}{'tokens/s':>14}{'GPUs fed':>10}{'first batch':>13}")
    for name, overrides in (("default", []), ("245M", ["+experiment=pretrain"])):
        config = composed_config([*overrides, "budget_tokens=1e13"])
        with tempfile.TemporaryDirectory() as directory:
            source = StreamWindows(random_stream(Path(directory) / "shards", config), config.sequence_length)
            for workers in arguments.workers:
                speeds, first = loading_speed(config, source, workers, arguments.seconds)
                per_second = speeds * config.sequence_length
                print(
                    f"{name:16}{config.sequence_length:>6}{workers:>9}{speeds:>11,.0f}{per_second:>14,.0f}"
                    f"{per_second / GPU_TOKENS_PER_SECOND:>10,.0f}{first:>11.2f} s",
                    flush=True,
                )


def random_stream(folder: Path, config: Config) -> TokenStream:
    """Write twenty million random tokens, in documents of 500 on average."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, config.model.vocab_size, 20_000_000, dtype=np.uint16, endpoint=False)
    tokens[generator.integers(0, tokens.size, tokens.size // 500)] = DOCUMENT_START_ID
    writer = ShardWriter(folder, "benchmark", config.data.shard_tokens)
    writer.append(tokens)
    writer.close()
    return TokenStream.open(folder, "benchmark", config.model.vocab_size)


def loader(config: Config, source: "StreamWindows", workers: int) -> "StepLoader":
    """Return the loader of a run on one device."""
    from types import SimpleNamespace

    from cucafera.data.packed import DocumentData
    from cucafera.data.windows import OpenedSource
    from cucafera.training.data_module import WindowDataModule

    sources = {name: OpenedSource(source, source, "benchmark") for name in config.data.sources}
    module = WindowDataModule(DocumentData(config, SimpleNamespace(fingerprint="benchmark"), sources), 0, workers)  # type: ignore[arg-type]
    module.setup()
    return module.train_dataloader()


def loading_speed(config: Config, source: "StreamWindows", workers: int, seconds: float) -> tuple[float, float]:
    """Return windows per second after the first batch, and the seconds until the first batch."""
    started = time.perf_counter()
    batches = iter(loader(config, source, workers))
    next(batches)
    first_at = now = time.perf_counter()
    steps = 0
    while now - first_at < seconds:
        next(batches)
        steps += 1
        now = time.perf_counter()
    return steps * config.windows_per_step / (now - first_at), first_at - started


# ten-billion


class SparseShardWriter(ShardWriter):
    """A ShardWriter that writes zeros as holes in the file."""

    def _write(self, tokens: Tokens) -> None:
        self._file.truncate(self._file.seek(tokens.nbytes, os.SEEK_CUR))
        self._checksums.append(checksum_of_zeros(tokens.nbytes))
        self._count += tokens.size


@functools.cache
def checksum_of_zeros(size: int) -> int:
    """Return the CRC-32 of zeros, by their size in bytes."""
    return zlib.crc32(bytes(size))


def write_zeros(folder: Path, tokens: int, shard_tokens: int = 100_000_000) -> None:
    """Write a stream of zeros, which takes no disk space on a file system with sparse files."""
    writer = SparseShardWriter(folder, "benchmark", shard_tokens)
    block = np.zeros(BLOCK_TOKENS, np.uint16)
    for first in range(0, tokens, shard_tokens):
        in_shard = min(shard_tokens, tokens - first)
        for start in range(0, in_shard, BLOCK_TOKENS):
            writer.append(block[: in_shard - start])
    writer.close()


def ten_billion(arguments: argparse.Namespace) -> None:
    """Print one line per ROW_WINDOWS windows."""
    from cucafera.data.packed import StreamWindows

    config = composed_config(
        [
            "model=cucafera", "batch_tokens=204800", f"budget_tokens={2048 * arguments.windows}",
            "schedule.warmup_steps=0",
        ]
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.folder) as directory:
        folder = Path(directory) / "shards"
        write_zeros(folder, arguments.tokens)
        sizes = [path.stat() for path in folder.iterdir()]
        on_disk = 512 * sum(size.st_blocks for size in sizes) / 1e6
        print(
            f"{sum(size.st_size for size in sizes) / 1e9:.1f} GB in {number_of(len(sizes), 'file')}, "
            f"{on_disk:.1f} MB of the disk"
        )
        read_before = bytes_read()
        started = time.perf_counter()
        stream = TokenStream.open(folder, "benchmark", config.model.vocab_size)
        opened = time.perf_counter() - started
        print(f"opened in {1000 * opened:.1f} ms, with {(bytes_read() - read_before) / 1e6:.2f} MB read")
        batches = iter(loader(config, StreamWindows(stream, config.sequence_length), workers=0))
        next(batches)
        print(
            f"first batch, of {number_of(config.windows_per_step, 'window')}, after "
            f"{time.perf_counter() - started:.3f} s\n"
        )
        first = memory_in_use()
        read_all(batches, config, read_before)
        resident, used = memory()["VmRSS"] - first, memory_in_use() - first
    print(
        f"\nafter the first batch, {resident:.1f} MB more are resident: {used:.1f} MB in use, the rest kept when freed"
    )
    if opened >= 1 or used > MAX_GROWTH_MB or resident > MAX_RESIDENT_GROWTH_MB:
        raise SystemExit(
            f"opening must take less than a second, and memory not grow by more than {MAX_GROWTH_MB} MB in use and "
            f"{MAX_RESIDENT_GROWTH_MB} MB in total"
        )


def read_all(batches: "Iterator[Batch]", config: Config, read_before: int) -> None:
    """Read all batches, and print the table."""
    started = time.perf_counter()
    print(f"{'windows':>9}{'seconds':>9}{'GB read':>9}{'own MB':>9}{'of files':>10}{'resident':>10}")
    for step, _ in enumerate(batches, start=2):
        if step * config.windows_per_step % ROW_WINDOWS == 0:
            now = memory()
            print(
                f"{step * config.windows_per_step:>9,}{time.perf_counter() - started:>9.1f}"
                f"{(bytes_read() - read_before) / 1e9:>9.2f}{now['RssAnon']:>9.1f}{now['RssFile']:>10.1f}"
                f"{now['VmRSS']:>10.1f}",
                flush=True,
            )


def memory() -> dict[str, float]:
    """Return MB of this process: VmRSS in total, of which RssAnon private and RssFile mapped from files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) / 1000 for line in lines if line[0] in ("VmRSS:", "RssAnon:", "RssFile:")}


def memory_in_use() -> float:
    """Return resident MB after the allocator has returned its freed memory."""
    ctypes.CDLL(None).malloc_trim(0)
    return memory()["VmRSS"]


def bytes_read() -> int:
    """Return the bytes that this process has read from files so far, from disk or page cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("tokenize")
    one.add_argument("--corpus", help="a .jsonl file with a column text, also compressed; default: generated")
    one.add_argument("--tokenizer", type=Path, help="a tokenizer.json; default: trained on the corpus")
    one.add_argument("--megabytes", type=float, default=20, help="size of the generated corpus (20)")
    one.add_argument("--cores", type=int, nargs="+", help="default: 1, 2, 4, ..., all")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--only", help=argparse.SUPPRESS)
    two = commands.add_parser("windows")
    two.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes (0 1 2)")
    two.add_argument("--seconds", type=float, default=3, help="duration of each measurement")
    three = commands.add_parser("ten-billion")
    three.add_argument("--tokens", type=int, default=10_000_000_000)
    three.add_argument("--windows", type=int, default=100_000, help="windows of 2,048 tokens to read")
    three.add_argument("--folder", type=Path, help="folder for shards; default: the system's temporary folder")
    arguments = parser.parse_args()
    if arguments.command == "tokenize" and arguments.only:
        (cores,) = arguments.cores
        print(json.dumps(measured(arguments.only, arguments.corpus, arguments.tokenizer, cores)))
        return
    {"tokenize": tokenize, "windows": windows, "ten-billion": ten_billion}[arguments.command](arguments)


if __name__ == "__main__":
    main()
