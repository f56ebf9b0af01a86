"""How fast a corpus becomes shards, compared with the tokenizer alone on the same texts already in memory.

    python scripts/benchmark_data.py --corpus corpus.jsonl.gz --tokenizer tokenizer.json

The two are timed in turns, so that a machine that is busy with other things slows both.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers

from cucafera.config import SourceConfig
from cucafera.data.corpus import ReadCounts, read_documents
from cucafera.data.shards import prepare_source
from cucafera.data.tokenizer import Tokenizer

TEXTS_IN_CALL = 100
"""With a whole corpus in one call, the encodings take gigabytes and the tokenizer is slower."""


def encode_in_memory(texts: list[str], path: Path) -> None:
    """The yardstick: nothing but the tokenizers library."""
    inner = tokenizers.Tokenizer.from_file(str(path))
    for first in range(0, len(texts), TEXTS_IN_CALL):
        inner.encode_batch(texts[first : first + TEXTS_IN_CALL], add_special_tokens=False)


def prepare(source: SourceConfig, tokenizer: Tokenizer) -> None:
    """From the packed file to verified shards on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_source(
            "corpus",
            source,
            tokenizer,
            Path(folder) / "shards",
            validation_fraction=0.01,
            shard_tokens=100_000_000,
            skip_broken_lines=False,
            processes=None,
        )


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and seconds of processor time with those of the processes it started."""
    cpu, clock = os.times(), time.perf_counter()
    work()
    used = os.times()
    return time.perf_counter() - clock, sum(used[:4]) - sum(cpu[:4])


def main() -> None:
    """Prints a line a round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a .jsonl file with a column text, also packed")
    parser.add_argument("--tokenizer", required=True, type=Path, help="a tokenizer.json")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (3)")
    arguments = parser.parse_args()

    source = SourceConfig(path=arguments.corpus)
    texts = [text for text, _ in read_documents("corpus", source, False, ReadCounts())]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer.load(arguments.tokenizer)
    works = {
        "encode_batch in memory": lambda: encode_in_memory(texts, arguments.tokenizer),
        "corpus to shards": lambda: prepare(source, tokenizer),
    }
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}

    print(f"{megabytes:.1f} MB of text in {len(texts):,} documents\n")
    print(f"{'':24}{'seconds':>10}{'MB/s':>10}{'CPU seconds':>14}")
    for _ in range(arguments.repeat):
        for name, work in works.items():
            clock, cpu = measured(work)
            rounds[name].append((clock, cpu))
            print(f"{name:24}{clock:10.2f}{megabytes / clock:10.2f}{cpu:14.2f}", flush=True)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in rounds.items()}
    print("\nmedians")
    for name, (clock, cpu) in medians.items():
        print(f"{name:24}{clock:10.2f}{megabytes / clock:10.2f}{cpu:14.2f}")
    (yardstick, yardstick_cpu), (ours, ours_cpu) = medians.values()
    print(f"\nfrom corpus to shards: {yardstick / ours:.0%} of that speed, {ours_cpu / yardstick_cpu:.0%} of the CPU")


if __name__ == "__main__":
    main()
