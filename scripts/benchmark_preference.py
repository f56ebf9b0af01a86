"""Speed and memory of preference tuning (DPO) next to TRL's DPOTrainer: the same model, pairs, batches and optimizer.

    python scripts/benchmark_preference.py                               `tiny` with a vocabulary of 65,536
    python scripts/benchmark_preference.py --model cucafera --pairs 16 --steps 1 --rounds 1

    cucafera        our objective on packed windows, with micro-batches as in training, and of 1 window
    TRL             DPOTrainer as it is, at the fastest of the batch sizes of --batches
    TRL, helped     the same with less to compute: pairs of similar length share a batch, which TRL pads to its longest
                    answer, and only the tokens of answers go through the head, as in TRL on a GPU

All train in fp32 and in eager mode, with AdamW, the same clipping, and reference log-probabilities computed before.
Each measurement is a separate process, and the sides run in turn, so that other load affects all of them. The lengths
of the pairs are drawn so that they look like those of a Catalan set of preferences; the tokens are random. Every step
has the same pairs, so that the longest is always part of the measurement.

Tokens/s counts the prompt and answer of both conversations of a pair, without padding. Core seconds are processor time
summed over threads, which depends least on other programs. Memory is the peak of the process during training beyond
imports and state, which is weights, gradients and moments. The losses of every step must agree: then all sides compute
the same.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cucafera.config.command_line import composed_config
from cucafera.config.schema import Config
from cucafera.data.chatml import Rendered
from cucafera.data.preferences import PreferenceWindows
from cucafera.data.tokenized_conversations import joined
from cucafera.data.windows import Batch, batch_of_windows
from cucafera.model.flops import parameter_count
from cucafera.model.transformer import Decoder
from cucafera.objectives._preference_config import PreferenceConfig
from cucafera.objectives.preference import PreferenceTuning
from cucafera.optimizers import build_optimizer
from cucafera.process import keep_freed_memory, let_threads_wait_briefly
from cucafera.quantities import number_of
from cucafera.training.callbacks.throughput import peak_memory_bytes
from cucafera.training.hardware import decide_hardware
from cucafera.training.module import build_decoder

OURS, TRL, HELPED = SIDES = ("cucafera", "TRL", "TRL, helped")
SHORT = ((3.13, 0.26), (2.52, 0.48), (2.47, 0.46))
LONG = ((3.99, 0.18), (5.12, 0.80), (4.39, 1.13))
"""Mean and standard deviation of the natural logarithm of the tokens of prompt, better and worse answer."""
LONG_SHARE = 0.09
"""In a Catalan set of 1,354 pairs, tokenized with a vocabulary of 65,536: 91% are short answers to questions, with a
median of 22 tokens of prompt, and 13 and 12 of the answers; 9% are long, with 52, 156 and 88."""
LEAST_TOKENS = 3
UNCOUNTED_STEPS = 1
STATE_BYTES = 16
"""Per parameter: weight, gradient and two moments, in fp32."""
SMALL = {"model": "tiny", "vocabulary": 320, "context": 128}
"""What each process trains first, so that its memory before the measurement includes all that it imports."""
TOLERANCE = 1e-3
"""Between the losses of a step of two sides: after some steps of AdamW, rounding has grown."""
LEARNING_RATE = 1e-4
"""Large, so that the losses of the steps differ."""


class Row(NamedTuple):
    """A side, and the windows or pairs of its forward passes."""

    side: str
    batch: int

    def __str__(self) -> str:
        return f"{self.side}, {number_of(self.batch, 'window' if self.side == OURS else 'pair')} at a time"


class Pair(NamedTuple):
    """Token ids of a prompt and its two answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Tokens of both conversations."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def random_pairs(count: int, vocab_size: int, longest: int) -> list[Pair]:
    """Return pairs of which both conversations fit a window of `longest` positions; the same for the same arguments."""
    random = np.random.default_rng(0)
    pairs: list[Pair] = []
    while len(pairs) < count:
        means, deviations = np.array(LONG if random.random() < LONG_SHARE else SHORT).T
        lengths = np.maximum(np.exp(random.normal(means, deviations)).astype(int), LEAST_TOKENS)
        if lengths @ (2, 1, 1) <= longest:
            pairs.append(Pair(*(random.integers(vocab_size, size=length).tolist() for length in lengths)))
    return pairs


class Step(NamedTuple):
    """One optimizer step, until the weights are updated.

    Attributes:
        seconds: Of the step, its batch included.
        core_seconds: Processor time, summed over threads.
        loss: Mean over its pairs.
    """

    seconds: float
    core_seconds: float
    loss: float


class Clock:
    """Times of steps."""

    def __init__(self) -> None:
        self.since = (time.perf_counter(), time.process_time())

    def lap(self) -> tuple[float, float]:
        """Return seconds and core seconds since the last call, or since the clock was made."""
        now = (time.perf_counter(), time.process_time())
        before, self.since = self.since, now
        return now[0] - before[0], now[1] - before[1]


# The sides. Each trains on the same pairs in every step, and returns its steps.


def train(side: str, config: Config, pairs: Sequence[Pair], steps: int, batch: int) -> list[Step]:
    """Train one side; `batch` are windows or pairs per forward pass."""
    if side == OURS:
        return our_steps(config, pairs, steps, batch)
    return trl_steps(config, pairs, steps, batch, side == HELPED)


def our_steps(config: Config, pairs: Sequence[Pair], steps: int, windows: int) -> list[Step]:
    """Train our model with micro-batches of `windows` windows."""
    objective, settings = PreferenceTuning(), PreferenceConfig()
    torch.manual_seed(config.seed)
    model = build_decoder(config.model, decide_hardware(config))
    optimizer = build_optimizer(model, config.optimizer)
    packed = packed_pairs(pairs, config.sequence_length)
    packed.reference_logprobs = reference_logprobs(model, packed, windows)
    done = []
    clock = Clock()
    for _ in range(steps):
        total = 0.0
        for batch in micro_batches(packed, windows):
            loss = objective.loss(settings, model, batch, None) / len(pairs)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done.append(Step(*clock.lap(), total))
    return done


def packed_pairs(pairs: Sequence[Pair], length: int) -> PreferenceWindows:
    """Return pairs packed into windows of a length."""
    conversations = []
    for pair, answer in itertools.product(pairs, ("chosen", "rejected")):
        ids = np.array(pair.prompt + getattr(pair, answer), dtype=np.uint16)
        conversations.append(Rendered(ids, np.arange(len(ids)) >= len(pair.prompt)))
    return PreferenceWindows(joined(conversations), length)


def micro_batches(packed: PreferenceWindows, windows: int) -> Iterator[Batch]:
    """Yield the batches of at most `windows` windows."""
    yield from batch_of_windows([packed.window(number) for number in range(len(packed))], True).split(windows)


def reference_logprobs(model: Decoder, packed: PreferenceWindows, windows: int) -> NDArray[np.float64]:
    """Return the log-probabilities of both answers of each pair under the model as it is now, [pairs, 2]."""
    known = np.zeros((packed.pairs, 2))
    number = 0
    with torch.no_grad():
        for batch in micro_batches(packed, windows):
            for row in PreferenceTuning().reference_logprobs(model, batch, None):
                found = packed.pairs_of(number)
                known[found] = row[: 2 * len(found)].view(-1, 2).numpy()
                number += 1
    return known


def trl_steps(config: Config, pairs: Sequence[Pair], steps: int, batch: int, helped: bool) -> list[Step]:
    """Train the same model with TRL, in batches of `batch` pairs."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    if helped:
        pairs = sorted(pairs, key=lambda pair: -max(len(pair.chosen), len(pair.rejected)) - len(pair.prompt))
    losses: list[float] = []
    laps: list[tuple[float, float]] = []

    class InOrder(trl.DPOTrainer):
        """TRL's trainer for tokenized pairs, in their order; it keeps the loss of each batch, which it logs rounded."""

        def _prepare_dataset(self, dataset: Dataset, *rest: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *rest: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *rest: Any, **others: Any) -> Any:
            loss = super().compute_loss(*rest, **others)
            losses.append(loss.item())
            return loss

    class Laps(TrainerCallback):
        def on_train_begin(self, *rest: Any, **others: Any) -> None:
            self.clock = Clock()

        def on_step_end(self, *rest: Any, **others: Any) -> None:
            laps.append(self.clock.lap())

    accumulated = len(pairs) // batch
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    optimizer = config.optimizer
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if helped:  # in this module, the function decides only whether the tokens of answers are selected
            stack.enter_context(unittest.mock.patch("trl.trainer.utils._use_triton", lambda device: True))
        trainer = InOrder(
            model=hugging_face(config),
            args=trl.DPOConfig(
                output_dir=folder, loss_type=["sigmoid"], beta=PreferenceConfig().beta, precompute_ref_log_probs=True,
                per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
                max_steps=steps, learning_rate=optimizer.lr, lr_scheduler_type="constant",
                warmup_steps=0, optim="adamw_torch_fused", adam_beta1=optimizer.betas[0],
                adam_beta2=optimizer.betas[1], adam_epsilon=optimizer.eps, weight_decay=optimizer.weight_decay,
                max_grad_norm=optimizer.clip_norm or 0.0, max_length=None, use_cpu=True, bf16=False,
                gradient_checkpointing=False, dataloader_pin_memory=False, report_to="none", save_strategy="no",
                logging_strategy="no", disable_tqdm=True,
            ),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(WordLevel({"pad": 0}, unk_token="pad")), pad_token="pad", eos_token="pad"
            ),
            train_dataset=Dataset.from_list([dict(zip(columns, pair, strict=True)) for pair in pairs]),
            callbacks=[Laps()],
        )  # fmt: skip
        trainer.train()
    means = [statistics.fmean(losses[first : first + accumulated]) for first in range(0, len(losses), accumulated)]
    return [Step(*lap, loss) for lap, loss in zip(laps, means, strict=True)]


def hugging_face(config: Config) -> nn.Module:
    """Return the model of transformers with the weights that ours starts with."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    weights = build_decoder(config.model, decide_hardware(config)).state_dict()
    model = LlamaForCausalLM(LlamaConfig(**vars(config.model), tie_word_embeddings=True, attn_implementation="sdpa"))
    model.model.load_state_dict(weights)
    model.tie_weights()
    return model


# One measurement, in a separate process.


def measured(side: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second, bytes above the state and the losses of a side; for `batch` see `train`."""
    torch.set_num_threads(arguments.threads)
    config, small = configured(arguments), configured(argparse.Namespace(**vars(arguments) | SMALL))
    pairs = random_pairs(arguments.pairs, config.model.vocab_size, config.sequence_length)
    if side == OURS:
        keep_freed_memory()  # as in training
    train(side, small, random_pairs(1, small.model.vocab_size, small.sequence_length), 1, 1)  # imports, starts threads
    before = peak_memory_bytes(torch.device("cpu"))
    done = train(side, config, pairs, UNCOUNTED_STEPS + arguments.steps, batch)
    above = peak_memory_bytes(torch.device("cpu")) - before - STATE_BYTES * parameter_count(config.model)
    tokens, counted = sum(pair.tokens for pair in pairs), done[UNCOUNTED_STEPS:]
    return {
        "tokens_per_second": tokens / statistics.median(step.seconds for step in counted),
        "tokens_per_core_second": tokens / statistics.median(step.core_seconds for step in counted),
        "bytes_above_state": above,
        "losses": [step.loss for step in done],
    }


def configured(arguments: argparse.Namespace) -> Config:
    """Return the model and the optimizer of all sides."""
    shape = [f"model={arguments.model}", f"model.vocab_size={arguments.vocabulary}"]
    shape.append(f"model.max_position_embeddings={arguments.context}")
    optimizer = [f"optimizer.lr={LEARNING_RATE}", "optimizer.weight_decay=0"]
    return composed_config([*shape, *optimizer, "trainer=cpu", f"batch_tokens={16 * arguments.context}"])


def fastest_batch(side: str, batches: Sequence[int]) -> int:
    """Return the fastest of TRL's batch sizes, by a step with two batches of the largest; if there is a choice."""
    if len(batches) == 1:
        return batches[0]
    pairs = 2 * max(batches)
    speed = {}
    for batch in batches:
        row = Row(side, batch)
        speed[batch] = measure_apart(row, "--steps=1", f"--pairs={pairs}")["tokens_per_second"]
        print(f"trying {row}".ljust(32) + f"{speed[batch]:>12,.0f} tokens/s", flush=True)
    return max(speed, key=lambda batch: speed[batch])


def measure_apart(row: Row, *changes: str) -> dict[str, Any]:
    """Run a measurement in a new process, with the arguments of this one and changes to them."""
    command = [sys.executable, __file__, *sys.argv[1:], *changes, "--only", row.side, str(row.batch)]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    let_threads_wait_briefly(environment)  # as in our training; the same for all
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if process.returncode:
        sys.exit(f"{row} could not be measured, exit status {process.returncode}:\n{process.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


# All measurements, and their table.


def largest_difference(measurements: dict[Row, list[dict[str, Any]]]) -> float:
    """Return the largest difference between the losses of a step, over all rows and rounds."""
    runs = [found["losses"] for rounds in measurements.values() for found in rounds]
    return max(max(losses) - min(losses) for losses in zip(*runs, strict=True))


def table(measurements: dict[Row, list[dict[str, Any]]]) -> str:
    """Return the medians of each row, and its ratios to TRL as it is, as medians of the rounds."""
    base = next(rounds for row, rounds in measurements.items() if row.side == TRL)
    head = "".join(f"{name:>12}{'of TRL':>8}" for name in ("tokens/s", "per core s", "above state"))
    lines = [f"{'':32}{head}{'first loss':>12}{'last loss':>12}"]
    for row, rounds in measurements.items():
        columns = ""
        for key, unit in (("tokens_per_second", 1), ("tokens_per_core_second", 1), ("bytes_above_state", 2**20)):
            value = f"{statistics.median(found[key] for found in rounds) / unit:,.0f}{' MiB' if unit > 1 else ''}"
            columns += f"{value:>12}{ratio(rounds, base, key):>7.2f}x"
        losses = rounds[0]["losses"]
        lines.append(f"{row!s:32}{columns}{losses[0]:>12.6f}{losses[-1]:>12.6f}")
    return "\n".join(lines)


def ratio(rounds: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> float:
    """Return the median over the rounds of a value over that of the base."""
    return statistics.median(found[key] / other[key] for found, other in zip(rounds, base, strict=True))


def main() -> None:
    """Choose TRL's batch size, measure all sides in turn, and print the table; or measure one side in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a preset of conf/model")
    parser.add_argument("--vocabulary", type=int, default=65_536)
    parser.add_argument("--context", type=int, default=1024, help="positions of a window")
    parser.add_argument("--pairs", type=int, default=32, help="pairs per step")
    parser.add_argument("--steps", type=int, default=2, help="measured steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="pairs per batch of TRL to try")
    parser.add_argument(
        "--windows", type=int, nargs="+", help="windows per micro-batch of cucafera (default: as in training, and 1)"
    )
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        side, batch = arguments.only
        print(json.dumps(measured(side, int(batch), arguments)))
        return
    if uneven := [batch for batch in arguments.batches if arguments.pairs % batch]:
        parser.error(f"--pairs {arguments.pairs} is not a multiple of the batch {uneven[0]} of --batches")
    config = configured(arguments)
    windows = arguments.windows or [decide_hardware(config).micro_batch_windows, 1]
    rows = [Row(OURS, number) for number in dict.fromkeys(windows)]
    rows += [Row(side, fastest_batch(side, arguments.batches)) for side in (TRL, HELPED)]
    measurements: dict[Row, list[dict[str, Any]]] = {row: [] for row in rows}
    for _ in range(arguments.rounds):
        for row, rounds in measurements.items():
            rounds.append(measure_apart(row))
            speed, of_core = rounds[-1]["tokens_per_second"], rounds[-1]["tokens_per_core_second"]
            above = f"{rounds[-1]['bytes_above_state'] / 2**20:,.0f} MiB"
            print(f"{row!s:32}{speed:>12,.0f} tokens/s{of_core:>12,.0f} per core second{above:>12}", flush=True)
    pairs = random_pairs(arguments.pairs, config.model.vocab_size, config.sequence_length)
    packed = packed_pairs(pairs, config.sequence_length)
    print(
        f"\n{arguments.model}, vocabulary {arguments.vocabulary:,}, "
        f"{number_of(parameter_count(config.model), 'parameter')}; {number_of(arguments.pairs, 'pair')} and "
        f"{number_of(sum(pair.tokens for pair in pairs), 'token')} per step, in {number_of(len(packed), 'window')} "
        f"with {1 - packed.tokens / len(packed) / config.sequence_length:.1%} padding\n"
    )
    print(table(measurements))
    if (difference := largest_difference(measurements)) > TOLERANCE:
        sys.exit(f"The losses of a step differ by {difference:.1e}: the sides do not compute the same.")
    print(f"\nThe losses of all steps agree within {difference:.1e}.")


if __name__ == "__main__":
    main()
