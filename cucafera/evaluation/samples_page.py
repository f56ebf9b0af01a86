"""Prompts in, one page of HTML out: generated texts of several models side by side, for a person to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.data.repetition import repeats_words
from cucafera.markup import html_text
from cucafera.quantities import number_of

DEFAULT_PROMPTS = ("Catalunya és", "La meva àvia sempre deia que", "Per fer pa amb tomàquet,", "El dia que va ploure,")
"""For a model whose run names no prompts."""
FINISH_REASONS = {"stop": "finished", "length": "cut at max_new_tokens", "context": "cut: context full"}

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; margin: 2rem; color: #1b1b1b; background: #fff; }
h1 { font-size: 1.3rem; } p { max-width: 60rem; color: #444; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; min-width: 48rem; }
th, td { border: 1px solid #ccc; padding: .6rem .7rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
thead th { position: sticky; top: 0; background: #f2f2f2; }
thead th:first-child { width: 16%; } tbody th { background: #fafafa; }
.text { white-space: pre-wrap; } .facts, .finish { font-size: .8rem; font-weight: normal; color: #666; }
.figures { font-size: .85rem; font-weight: normal; }
"""


class GeneratedText(NamedTuple):
    """A model's continuation of a prompt, or its answer.

    Attributes:
        text: Without the prompt.
        finish_reason: stop, length or context, as in `generation.generate`.
        tokens: Its length, without the token that ends it.
    """

    text: str
    finish_reason: str
    tokens: int


class ModelColumn(NamedTuple):
    """The head of a model's column: its name on the command line, and a line of facts."""

    name: str
    facts: str


def read_prompts(path: str) -> list[str]:
    """Return the non-empty lines of a file. Raises UserError if there are none."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8 (byte 0x{error.object[error.start]:02x})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt: write one per line")
    return prompts


def samples_page(
    models: Sequence[ModelColumn],
    rows: Sequence[tuple[str, Sequence[GeneratedText]]],
    sampling: SamplingConfig,
    seed: int,
) -> str:
    """Return the page: one row per prompt, one column per model, without scripts or links.

    Args:
        models: The columns.
        rows: Each prompt with one text per model.
        sampling, seed: How the texts were generated.
    """
    names = ", ".join(model.name for model in models)
    columns = zip(*(texts for _, texts in rows), strict=True)
    heads = "".join(
        f'<th scope="col">{html_text(model.name)}<div class="facts" lang="en">{html_text(model.facts)}</div>'
        f'<div class="figures" lang="en">{describe_texts(texts)}</div></th>'
        for model, texts in zip(models, columns, strict=True)
    )
    body = "\n".join(
        f'<tr><th scope="row">{html_text(prompt)}</th>{"".join(map(_cell, texts))}</tr>' for prompt, texts in rows
    )
    return (
        '<!DOCTYPE html>\n<html lang="ca">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Samples of {html_text(names)}</title>\n<style>{STYLE}</style>\n"
        f'</head>\n<body>\n<h1 lang="en">Samples</h1>\n<p lang="en">{html_text(_describe(sampling, seed))}.</p>\n'
        f'<table>\n<thead><tr><th scope="col" lang="en">prompt</th>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table>\n</body>\n</html>\n"
    )


def describe_texts(texts: Sequence[GeneratedText]) -> str:
    """Return figures of a model's texts: how many ended by themselves, how many have a repeated 5-gram, mean length."""
    ended = sum(text.finish_reason == "stop" for text in texts)
    repeated = sum(repeats_words(text.text) for text in texts)
    mean = sum(text.tokens for text in texts) / len(texts)
    return (
        f"{ended} of {len(texts)} ended by themselves, {repeated} with a repeated 5-gram, "
        f"{number_of(round(mean), 'token')} on average"
    )


def _cell(generated: GeneratedText) -> str:
    facts = [
        FINISH_REASONS.get(generated.finish_reason, html_text(generated.finish_reason)),
        number_of(generated.tokens, "token"),
        *(["repeated 5-gram"] if repeats_words(generated.text) else []),
    ]
    text = html_text(generated.text) if generated.text.strip() else "(empty)"
    return f'<td><div class="text">{text}</div><div class="finish" lang="en">{", ".join(facts)}</div></td>'


def _describe(sampling: SamplingConfig, seed: int) -> str:
    method = (
        "greedy decoding"
        if sampling.temperature == 0
        else f"temperature {sampling.temperature:g}, top_k {sampling.top_k}, top_p {sampling.top_p:g}, "
        f"min_p {sampling.min_p:g}, seed {seed} for each text"
    )
    most = number_of(sampling.max_new_tokens, "token")
    return f"{method}; repetition_penalty {sampling.repetition_penalty:g}; at most {most}"
