"""Decode speed against Hugging Face `generate`: the same weights, machine, run and greedy tokens, in turn.

    python scripts/benchmark_generation.py [--model cucafera] [--prompt 32] [--tokens 64] [--rounds 7]

The time of the first token, which reads the prompt, is measured apart and left out of tokens/s. Weights are random:
they decide the text, not the time. Neither side stops early, and both must write the same tokens, or the script fails.
"""

import argparse
import dataclasses
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cucafera.composition import composed_config
from cucafera.config import SamplingConfig
from cucafera.data.tokenizer import PAD_ID
from cucafera.generation.generate import token_columns
from cucafera.model.transformer import Decoder


def main() -> None:
    """Prints a line a round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cucafera", help="a preset of conf/model")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    config = composed_config([f"model={arguments.model}", "batch_tokens=65536", "budget_tokens=65536",
                              "schedule.warmup_steps=0"]).model  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**dataclasses.asdict(config), tie_word_embeddings=True))
    theirs = theirs.eval().to(arguments.device)
    ours = Decoder(config).eval().to(arguments.device)
    ours.load_state_dict(theirs.model.state_dict())
    prompt = torch.randint(10, config.vocab_size, (arguments.prompt,)).tolist()

    def write_with_theirs(tokens: int) -> list[int]:
        with torch.inference_mode():
            written = theirs.generate(
                torch.tensor([prompt], device=arguments.device), max_new_tokens=tokens, do_sample=False,
                eos_token_id=None, pad_token_id=PAD_ID,
            )  # fmt: skip
        return written[0, len(prompt) :].tolist()

    def write_with_ours(tokens: int) -> list[int]:
        greedy = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=tokens)
        return [token for (token,) in token_columns(ours, [prompt], greedy, None)]

    ratios, speeds = [], {"Hugging Face": [], "cucafera": []}
    for number in range(arguments.rounds + 1):
        texts, seconds = [], {}
        for name, write in (("Hugging Face", write_with_theirs), ("cucafera", write_with_ours)):
            first = timed(lambda write=write: write(1), arguments.device)[0]
            whole, text = timed(lambda write=write: write(arguments.tokens), arguments.device)
            seconds[name] = whole - first
            texts.append(text)
        if texts[0] != texts[1]:
            raise SystemExit("the two sides wrote different tokens")
        if not number:
            continue  # the first round warms up
        for name, spent in seconds.items():
            speeds[name].append((arguments.tokens - 1) / spent)
        ratios.append(seconds["Hugging Face"] / seconds["cucafera"])
        print(f"round {number}: " + ", ".join(f"{name} {values[-1]:.1f} tokens/s" for name, values in speeds.items()))
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.model}, fp32, {device}, prompt of {arguments.prompt}, {arguments.tokens} tokens written")
    for name, values in speeds.items():
        print(
            f"  {name:<13} {statistics.median(values):6.2f} tokens/s (median; {min(values):.2f} to {max(values):.2f})"
        )
    print(
        f"  ratio         {statistics.median(ratios):6.2f} (median of rounds; {min(ratios):.2f} to {max(ratios):.2f})"
    )


def timed(action, device: str):
    """Seconds that an action takes, and its result."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
