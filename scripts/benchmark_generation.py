"""Generation speed against peers: time to first token, and tokens per second after it, by prompt and batch size.

    python scripts/benchmark_generation.py                                    the quickstart's model
    python scripts/benchmark_generation.py --model cucafera --prompt 512      the 245M model after 512 tokens
    python scripts/benchmark_generation.py --batch 1 --out generation.json    one text at a time; also as JSON

    cucafera                  the KV cache and decode loop of this package
    Hugging Face              `generate` of LlamaForCausalLM with its dynamic cache
    Hugging Face, compiled    the same with a static cache and its forward pass compiled
    llama.cpp                 its `generate`, with the weights of --gguf FILE, which has a model of the same shape

The first three have the same weights. These are random: they affect the text, not the time. All decode greedily and
never stop early. All must generate the same tokens; where one differs, the position is reported, and the script fails
unless the logits of the two tokens, recomputed from the text before, differ by no more than rounding.

A prompt longer than the context allows is shortened by the tokens to generate. The peers run in turn, round by round;
the first round is a warm-up that includes compilation, and its time is reported. tokens/s count all texts together,
after the first token; the ratios are the peer's time over cucafera's in the same round. A peer that is not installed,
or does not support a case, is reported as missing.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from cucafera.config.command_line import composed_config
from cucafera.config.schema import ModelConfig, SamplingConfig
from cucafera.config.tokens import PAD_ID
from cucafera.generation.backend import TorchBackend
from cucafera.generation.engine import PREFILL_TOKENS, Engine
from cucafera.generation.request import Request
from cucafera.model.flops import parameter_count
from cucafera.model.transformer import Decoder
from cucafera.quantities import number_of

OURS = "cucafera"
PROMPTS = (128, 512, 1024, 2048)
ROUNDING = 1e-3
"""Largest difference of two logits that rounding can swap; the standard deviation of logits is about 0.5."""


class Generated(NamedTuple):
    """Result of a peer.

    Attributes:
        first: Seconds to the first token.
        rest: Seconds from there to the last.
        texts: Token ids of each text.
    """

    first: float
    rest: float
    texts: list[list[int]]


class MissingPeerError(Exception):
    """A peer cannot be measured; the message says why."""


Generate = Callable[[list[list[int]], int], Generated]
"""Continue prompts of one length by a number of tokens."""


class NoText:
    """A tokenizer for random weights, whose tokens mean nothing."""

    def bytes_of(self, token: int) -> bytes:
        """Return nothing."""
        return b""


def ours(model: Decoder) -> Generate:
    """cucafera's decode loop."""

    def write(prompts: list[list[int]], tokens: int) -> Generated:
        greedy = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=tokens)
        started = now(model.cos.device)
        engine = Engine(TorchBackend(model, len(prompts), len(prompts[0]) + tokens), NoText(), PREFILL_TOKENS["cuda"])
        generations = [engine.add(Request(prompt, greedy, frozenset())) for prompt in prompts]
        while not all(generation.ids for generation in generations):
            engine.step()
        first = now(model.cos.device)
        while engine.running:
            engine.step()
        return Generated(first - started, now(model.cos.device) - first, [generation.ids for generation in generations])

    return write


class FirstTokenClock:
    """A logits processor that records the time of the first logits, and changes nothing."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        self.first = self.first or now(logits.device)
        return logits


def hugging_face(model: LlamaForCausalLM, compiled: bool) -> Generate:
    """transformers' generate; compiled also on a CPU, which is not its default."""
    more: dict[str, Any] = {}
    if compiled:
        settings = CompileConfig()
        settings._compile_all_devices = True
        more = {"cache_implementation": "static", "compile_config": settings}

    def write(prompts: list[list[int]], tokens: int) -> Generated:
        clock = FirstTokenClock()
        started = now(model.device)
        with torch.inference_mode():
            written = model.generate(
                torch.tensor(prompts, device=model.device), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
                pad_token_id=PAD_ID, logits_processor=LogitsProcessorList([clock]), **more,
            )  # fmt: skip
        assert clock.first is not None
        ended = now(model.device)
        return Generated(clock.first - started, ended - clock.first, written[:, len(prompts[0]) :].tolist())

    return write


def llama_cpp(gguf: Path | None, config: ModelConfig, device: torch.device) -> Generate:
    """llama.cpp through its Python package. Raises MissingPeerError."""
    if gguf is None:
        raise MissingPeerError("no --gguf FILE")
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise MissingPeerError("the package llama-cpp-python is not installed") from error
    model = Llama(
        str(gguf), n_ctx=config.max_position_embeddings, n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(), n_gpu_layers=-1 if device.type == "cuda" else 0, verbose=False,
    )  # fmt: skip
    if (model.n_vocab(), model.n_embd()) != (config.vocab_size, config.hidden_size):
        raise MissingPeerError(
            f"{gguf} has {number_of(model.n_vocab(), 'entry')} of width {model.n_embd():,}: another model"
        )

    def write(prompts: list[list[int]], tokens: int) -> Generated:
        if len(prompts) > 1:
            raise MissingPeerError("one text at a time only")
        model.reset()  # or it would reuse the KV cache of the prompt
        started = now(device)
        stream = model.generate(prompts[0], temp=0.0, repeat_penalty=1.0)
        text = [next(stream)]
        first = now(device)
        text += [next(stream) for _ in range(tokens - 1)]
        return Generated(first - started, now(device) - first, [text])

    return write


def now(device: torch.device) -> float:
    """Return the time, after waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def agreement(model: Decoder, prompts: list[list[int]], texts: list[list[int]], others: list[list[int]]) -> str:
    """Return how two sides agree: the same tokens, or a difference by rounding. Exits for any other difference."""
    for number, (prompt, text, other) in enumerate(zip(prompts, texts, others, strict=True)):
        if text == other:
            continue
        position = next(position for position, pair in enumerate(zip(text, other, strict=True)) if pair[0] != pair[1])
        before = torch.tensor([prompt + text[:position]], device=model.cos.device)
        logits = model.logits(model(before)[0, -1]).float()
        difference = (logits[text[position]] - logits[other[position]]).item()
        description = f"text {number + 1} differs from token {position + 1} on, logits {difference:.1e} apart"
        if abs(difference) > ROUNDING:
            raise SystemExit(f"not the same model: {description}")
        return description
    return "the same tokens"


class Measured(NamedTuple):
    """A peer at one batch size and prompt length, over the measured rounds."""

    batch: int
    prompt: int
    peer: str
    warm_up: float
    first: list[float]
    rest: list[float]
    agreement: str


def measure(
    peers: dict[str, Generate], model: Decoder, batch: int, length: int, tokens: int, rounds: int
) -> tuple[list[Measured], dict[str, str]]:
    """Run all peers in turn, cucafera first. Return their measurements, and the missing ones with the reason."""
    generator = torch.Generator().manual_seed(length)
    prompts = torch.randint(10, model.config.vocab_size, (batch, length), generator=generator).tolist()
    torch.compiler.reset()  # or it would reach the limit of recompilations
    results: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    reference: list[list[int]] = []
    for number in range(rounds + 1):
        for peer, write in peers.items():
            if peer in missing:
                continue
            try:
                written = write(prompts, tokens)
            except MissingPeerError as error:
                missing[peer] = f"batch {batch}: {error}"
                continue
            if peer == OURS:
                reference = written.texts
            agrees = "its own weights" if peer == "llama.cpp" else agreement(model, prompts, reference, written.texts)
            if number:
                results[peer].first.append(written.first)
                results[peer].rest.append(written.rest)
            else:
                results[peer] = Measured(batch, length, peer, written.first + written.rest, [], [], agrees)
    return list(results.values()), missing


def table(rows: list[Measured], tokens: int) -> str:
    """Return a table with one line per peer."""
    own = {(row.batch, row.prompt): row for row in rows if row.peer == OURS}
    lines = [
        f"{'batch':>5}{'prompt':>8}  {'':22}{'first token':>13}{'ratio':>7}{'tokens/s':>11}{'ratio':>7}"
        f"{'(rounds)':>16}{'first call':>12}"
    ]
    for row in rows:
        base = own[row.batch, row.prompt]
        first = statistics.median(theirs / ours for theirs, ours in zip(row.first, base.first, strict=True))
        ratios = [theirs / ours for theirs, ours in zip(row.rest, base.rest, strict=True)]
        speed = row.batch * (tokens - 1) / statistics.median(row.rest)
        lines.append(
            f"{row.batch:>5}{row.prompt:>8}  {row.peer:22}{1000 * statistics.median(row.first):>10,.1f} ms{first:>7.2f}"
            f"{speed:>11,.1f}{statistics.median(ratios):>7.2f}{f'{min(ratios):.2f} to {max(ratios):.2f}':>16}"
            f"{row.warm_up:>10.1f} s  {row.agreement}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, and run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a preset of conf/model (tiny)")
    parser.add_argument("--batch", type=int, action="append", help="batch size; may be repeated (1 and 16)")
    parser.add_argument("--prompt", type=int, action="append", help=f"tokens of the prompt; may be repeated {PROMPTS}")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gguf", type=Path, help="a model of the same shape, for llama.cpp")
    parser.add_argument("--out", type=Path, help="path of a JSON file with every measurement")
    parser.add_argument("overrides", nargs="*", help="overrides, such as model.max_position_embeddings=2048")
    arguments = parser.parse_intermixed_args()

    config = composed_config(
        [f"model={arguments.model}", "batch_tokens=65536", "budget_tokens=65536", "schedule.warmup_steps=0",
         *arguments.overrides]
    ).model  # fmt: skip
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**dataclasses.asdict(config), tie_word_embeddings=True)).eval().to(device)
    model = Decoder(config).eval().to(device)
    model.load_state_dict(theirs.model.state_dict())
    peers = {
        OURS: ours(model),
        "Hugging Face": hugging_face(theirs, compiled=False),
        "Hugging Face, compiled": hugging_face(theirs, compiled=True),
    }
    missing: dict[str, str] = {}
    try:
        peers["llama.cpp"] = llama_cpp(arguments.gguf, config, device)
    except MissingPeerError as error:
        missing["llama.cpp"] = str(error)

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU with {torch.get_num_threads()} threads"
    print(
        f"{arguments.model}: {number_of(parameter_count(config), 'parameter')}, fp32, on {name}; "
        f"{number_of(arguments.tokens, 'token')} "
        f"generated, medians of {arguments.rounds} rounds\n"
    )
    max_prompt = config.max_position_embeddings - arguments.tokens
    rows: list[Measured] = []
    for batch in arguments.batch or (1, 16):
        for length in sorted({min(prompt, max_prompt) for prompt in arguments.prompt or PROMPTS}):
            found, not_measured = measure(peers, model, batch, length, arguments.tokens, arguments.rounds)
            lines = table(found, arguments.tokens).splitlines()
            print("\n".join(lines[1:] if rows else lines), flush=True)
            rows += found
            missing |= not_measured
    for peer, why in missing.items():
        print(f"{'':15}{peer:22}missing: {why}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "model": dataclasses.asdict(config), "device": name, "tokens": arguments.tokens,
            "measured": [row._asdict() for row in rows], "missing": missing,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
