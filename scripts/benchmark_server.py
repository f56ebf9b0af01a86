"""Throughput of the server by number of clients: tokens per second, and time to first token, through HTTP.

    python scripts/benchmark_server.py outputs/finetune                                   a run
    python scripts/benchmark_server.py --model cucafera --tokenizer TOKENIZER.json        245M random weights
    python scripts/benchmark_server.py outputs/finetune --llama-server PATH               next to llama.cpp's server

Each server is a process of its own. Clients ask for completions of different prompts, one after another, each as a
stream; a round is over when each has had its answers. Servers and numbers of clients run in turn, round by round,
after a warm-up, and the table has medians:

    tokens/s       generated tokens of all clients, over the time of the round
    of one client  the same, relative to one client in the same round
    first token    from sending a request to the first chunk with text

Random weights affect the text, not the time. llama.cpp's server gets the same weights as a GGUF file in fp32, and as
many slots. The clients use the same cores as the servers; so does everything else on the machine.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import aiohttp
import torch

from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.data.tokenizer import Tokenizer
from cucafera.interop.gguf import write_gguf
from cucafera.interop.hugging_face import write_folder
from cucafera.interop.trained import load_trained
from cucafera.model.transformer import Decoder
from cucafera.quantities import number_of

OURS, LLAMA = "cucafera", "llama.cpp"
START_SECONDS = 300


class Answer(NamedTuple):
    """Measurements of one request.

    Attributes:
        first: Seconds to the first text.
        tokens: Number of tokens generated.
    """

    first: float
    tokens: int


class Round(NamedTuple):
    """Measurements of one round.

    Attributes:
        rate: Tokens per second of all clients together.
        first: Median of the seconds to the first text.
    """

    rate: float
    first: float


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[str]:
    """Start a server, wait until it answers, and yield its address; {port} in the command becomes a free port.

    Raises:
        UserError: it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        command = [part.replace("{port}", str(port)) for part in command]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"NO_PROXY": "*"})
    try:
        deadline = time.monotonic() + START_SECONDS
        while not asyncio.run(is_ready(port)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"{command[0]} does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def is_ready(port: int) -> bool:
    """Return True once a server says that it is healthy."""
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/health") as response:
            return response.status == 200
    return False


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], tokens: int, seed: int
) -> Answer:
    """Send a request, and read its stream."""
    started, first, counted = time.perf_counter(), None, 0
    body = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "seed": seed, "temperature": 0.8, "top_k": 50,
        "top_p": 0.95, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise UserError(f"{url} answers {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if first is None and any(choice.get("text") for choice in chunk["choices"]):
                first = time.perf_counter() - started
            if chunk.get("usage"):
                counted = chunk["usage"]["completion_tokens"]
    return Answer(first if first is not None else time.perf_counter() - started, counted)


async def measured(url: str, clients: int, prompts: list[list[int]], tokens: int, seed: int) -> Round:
    """Let each client send its share of the prompts, one after another."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # llama.cpp's server closes idle connections
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]

        async def client(number: int) -> list[Answer]:
            own = range(number, len(prompts), clients)
            return [await ask(session, url, model, prompts[index], tokens, seed + index) for index in own]

        started = time.perf_counter()
        answers = [answer for part in await asyncio.gather(*map(client, range(clients))) for answer in part]
        seconds = time.perf_counter() - started
    return Round(sum(answer.tokens for answer in answers) / seconds, statistics.median(a.first for a in answers))


def prompts_of(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return random prompts without control tokens: nothing that the cache of earlier rounds could hold."""
    draw = random.Random(seed)
    return [[draw.randrange(300, vocab_size) for _ in range(length)] for _ in range(count)]


def table(results: dict[tuple[str, int], list[Round]]) -> str:
    """Return the table."""
    lines = [f"{'':10}{'clients':>8}{'tokens/s':>10}{'of one client':>15}{'(rounds)':>16}{'first token':>14}"]
    for (name, clients), rounds in results.items():
        fewest = min(count for other, count in results if other == name)
        ratios = [own.rate / one.rate for own, one in zip(rounds, results[name, fewest], strict=True)]
        lines.append(
            f"{name:10}{clients:>8}{statistics.median(r.rate for r in rounds):>10,.1f}"
            f"{statistics.median(ratios):>15.2f}{f'{min(ratios):.2f} to {max(ratios):.2f}':>16}"
            f"{1000 * statistics.median(r.first for r in rounds):>11,.0f} ms"
        )
    return "\n".join(lines)


def random_model(name: str, tokenizer: Path | None, folder: Path) -> Path:
    """Write random weights as a Hugging Face folder. Raises UserError."""
    if tokenizer is None:
        raise UserError("--model needs --tokenizer FILE, with as many entries as the model")
    torch.manual_seed(0)
    model = (
        Decoder(
            composed_config(
                [f"model={name}", "batch_tokens=65536", "budget_tokens=65536", "schedule.warmup_steps=0"]
            ).model
        )
        .eval()
        .requires_grad_(False)
    )
    source = folder / name
    source.mkdir()
    write_folder(model, Tokenizer.load(tokenizer), False, SamplingConfig(), "fp32", source)
    return source


def commands_of(arguments: argparse.Namespace, source: str, context: int, folder: Path) -> dict[str, list[str]]:
    """Return the command that starts each server."""
    slots = str(max(arguments.clients))
    serve = [sys.executable, "-m", "cucafera.serve", source, "--device", arguments.device, "--slots", slots]
    commands = {OURS: [*serve, "--port", "{port}", "--queue", "100"]}
    if arguments.llama_server is not None:
        path = folder / "model.gguf"
        print(write_gguf(load_trained(source), path, "f32"), flush=True)
        commands[LLAMA] = [
            str(arguments.llama_server), "-m", str(path), "--port", "{port}", "-np", slots,
            "-c", str(int(slots) * context), "-t", str(torch.get_num_threads()), "--no-webui",
        ]  # fmt: skip
    return commands


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Start the servers, measure them in turn, and print the table. Raises UserError."""
    source = arguments.run or str(random_model(arguments.model, arguments.tokenizer, folder))
    trained = load_trained(source)
    config = trained.model.config
    del trained
    length = min(arguments.prompt, config.max_position_embeddings - arguments.tokens - 1)
    results: dict[tuple[str, int], list[Round]] = {}
    with contextlib.ExitStack() as stack:
        urls = {
            name: stack.enter_context(running(command, folder / f"{re.sub('[^a-z]', '', name)}.log"))
            for name, command in commands_of(arguments, source, config.max_position_embeddings, folder).items()
        }
        for number in range(arguments.rounds + 1):
            for name, url in urls.items():
                for clients in arguments.clients:
                    requests = clients * arguments.requests if number else clients
                    prompts = prompts_of(requests, length, config.vocab_size, 1000 * number + clients)
                    round_ = asyncio.run(measured(url, clients, prompts, arguments.tokens, number))
                    if number:
                        results.setdefault((name, clients), []).append(round_)
    print(
        f"{source if arguments.run else arguments.model}: a {arguments.device} with {torch.get_num_threads()} threads; "
        f"{number_of(arguments.tokens, 'token')} after {length}, "
        f"{number_of(arguments.requests, 'request')} per client, "
        f"medians of {arguments.rounds} rounds\n\n{table(results)}"
    )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run folder, a checkpoint or a Hugging Face folder")
    parser.add_argument("--model", help="instead of RUN: a size in conf/model, with random weights")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json for --model")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, to compare with")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="numbers of clients (1 4 16)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate (128)")
    parser.add_argument("--requests", type=int, default=2, help="requests of each client per round (2)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (3)")
    arguments = parser.parse_args()
    if (arguments.run is None) == (arguments.model is None):
        parser.error("give RUN, or --model NAME")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            compare(arguments, Path(temporary))
    except UserError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
