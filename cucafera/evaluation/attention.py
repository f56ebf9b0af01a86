"""Pictures of what heads look at; they need matplotlib (pip install '.[plots]')."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cucafera.config import UserError
from cucafera.data.tokenizer import DOCUMENT_START_ID, Tokenizer
from cucafera.evaluation.subject import Subject
from cucafera.model.attention_maps import attention_probabilities

MOST_TOKENS = 48
"""More cannot be read in a picture."""
MOST_PANELS = 64
INCHES_A_TOKEN = 0.15
SMALLEST_PANEL = 2.2
"""Inches."""
TOKEN_NAMES = str.maketrans({" ": "␣", "\n": "\\n", "\t": "\\t", "\r": "\\r"})


def draw_attention(
    subject: Subject, text: str, layers: Sequence[int] | None, heads: Sequence[int] | None, path: Path
) -> None:
    """One panel a layer and head: rows are the tokens that look, columns those that they look at.

    Args:
        subject: The model.
        text: What it reads, behind a document start.
        layers: Numbers of layers, the first being 0; None: the first, the middle and the last.
        heads: Numbers of heads; None: the first four.
        path: A .png file.

    Raises:
        UserError: there is no such layer or head, the text is too long to be seen, or the file cannot be written.
    """
    ids = [DOCUMENT_START_ID, *subject.tokenizer.encode(text)]
    if len(ids) > MOST_TOKENS:
        raise UserError(
            f"--attention: the text has {len(ids):,} tokens; at most {MOST_TOKENS} can be seen in a picture"
        )
    if len(ids) > subject.model.config.max_position_embeddings:
        raise UserError(f"--attention: the text has {len(ids):,} tokens, more than the model's context")
    config = subject.model.config
    last = config.num_hidden_layers - 1
    rows = _chosen("layers", layers, sorted({0, last // 2, last}), config.num_hidden_layers)
    columns = _chosen("heads", heads, list(range(min(4, config.num_attention_heads))), config.num_attention_heads)
    if len(rows) * len(columns) > MOST_PANELS:
        raise UserError(
            f"{len(rows)} layers of {len(columns)} heads are {len(rows) * len(columns)} panels; at most {MOST_PANELS}"
        )
    device = subject.model.embed_tokens.weight.device
    maps = attention_probabilities(subject.model, torch.tensor(ids, device=device)).cpu()
    try:
        _draw(maps, rows, columns, token_names(ids, subject.tokenizer), path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def token_names(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Tokens as they can be seen: spaces and line ends by signs, parts of characters by their bytes."""
    return [tokenizer.bytes_of(token).decode(errors="backslashreplace").translate(TOKEN_NAMES) for token in ids]


def numbers_of(option: str, text: str | None) -> list[int] | None:
    """The numbers in a text such as 0,3. Raises UserError if there are others things in it."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--{option} is {text!r}; it must be numbers with commas between them, as 0,3") from error


def _chosen(what: str, numbers: Sequence[int] | None, default: list[int], count: int) -> list[int]:
    chosen = default if numbers is None else list(dict.fromkeys(numbers))
    if wrong := [number for number in chosen if not 0 <= number < count]:
        raise UserError(f"--{what} {wrong[0]}: the model has {what} 0 to {count - 1}")
    return chosen


def _draw(maps: torch.Tensor, rows: list[int], columns: list[int], names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    side = max(SMALLEST_PANEL, INCHES_A_TOKEN * len(names)) + 0.15 * min(8, max(map(len, names)))
    figure = Figure(figsize=(side * len(columns) + 0.8, side * len(rows) + 0.4), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    later = torch.ones(len(names), len(names), dtype=torch.bool).triu(1)
    image: Any = None
    for row, layer in zip(panels, rows, strict=True):
        for axes, head in zip(row, columns, strict=True):
            shown = maps[layer, head].masked_fill(later, torch.nan).numpy()
            image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"layer {layer}, head {head}", fontsize=8)
            places = range(len(names))
            axes.set_xticks(places, names, rotation=90, fontsize=6, parse_math=False)
            axes.set_yticks(places, names, fontsize=6, parse_math=False)
            axes.tick_params(length=0, pad=1)
            axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, ax=panels, label="probability", shrink=min(1, 3 / len(rows) / side), fraction=0.03)
    figure.savefig(path, dpi=150, format="png")
