"""Attention maps: which tokens each head attends to, as a picture; needs pip install '.[plots]' (matplotlib)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cucafera.config.errors import UserError
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.tokenizer import Tokenizer
from cucafera.evaluation.evaluated_model import EvaluatedModel
from cucafera.model.attention_maps import attention_probabilities
from cucafera.quantities import number_of

MAX_TOKENS = 48
"""More labels cannot be read in a picture."""
MAX_PANELS = 64
INCHES_PER_TOKEN = 0.15
MIN_PANEL_INCHES = 2.2
VISIBLE = str.maketrans({" ": "␣", "\n": "\\n", "\t": "\\t", "\r": "\\r"})


def draw_attention(
    evaluated: EvaluatedModel, text: str, layers: Sequence[int] | None, heads: Sequence[int] | None, path: Path
) -> None:
    """Draw one panel per layer and head: rows are queries, columns are keys.

    Args:
        evaluated: The model.
        text: The text it reads, after a document start token.
        layers: Indices of layers, the first being 0; None: the first, the middle and the last.
        heads: Indices of heads; None: the first four.
        path: A .png file.

    Raises:
        UserError: a layer or head does not exist, the text is too long for a picture, or the file cannot be written.
    """
    config = evaluated.model.config
    ids = [DOCUMENT_START_ID, *evaluated.tokenizer.encode(text)]
    limit = min(MAX_TOKENS, config.max_position_embeddings)
    if len(ids) > limit:
        raise UserError(f"--attention: the text has {number_of(len(ids), 'token')}; the limit of a picture is {limit}")
    last = config.num_hidden_layers - 1
    rows = _selected("layers", layers, sorted({0, last // 2, last}), config.num_hidden_layers)
    columns = _selected("heads", heads, list(range(min(4, config.num_attention_heads))), config.num_attention_heads)
    if len(rows) * len(columns) > MAX_PANELS:
        raise UserError(
            f"{number_of(len(rows), 'layer')} of {number_of(len(columns), 'head')} are "
            f"{number_of(len(rows) * len(columns), 'panel')}; at most {MAX_PANELS}"
        )
    device = evaluated.model.embed_tokens.weight.device
    maps = attention_probabilities(evaluated.model, torch.tensor(ids, device=device)).cpu()
    try:
        _draw(maps, rows, columns, token_labels(ids, evaluated.tokenizer), path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def token_labels(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return visible labels of tokens: symbols for spaces and line ends, escaped bytes for parts of characters."""
    return [tokenizer.bytes_of(token).decode(errors="backslashreplace").translate(VISIBLE) for token in ids]


def _selected(name: str, indices: Sequence[int] | None, default: list[int], count: int) -> list[int]:
    selected = default if indices is None else list(dict.fromkeys(indices))
    if wrong := [index for index in selected if not 0 <= index < count]:
        raise UserError(f"--{name} {wrong[0]}: the model has {name} 0 to {count - 1}")
    return selected


def _draw(maps: torch.Tensor, rows: list[int], columns: list[int], labels: list[str], path: Path) -> None:
    """Draw maps [layers, heads, T, T] of the selected layers (rows) and heads (columns)."""
    from matplotlib.figure import Figure

    side = max(MIN_PANEL_INCHES, INCHES_PER_TOKEN * len(labels)) + 0.15 * min(8, max(map(len, labels)))
    figure = Figure(figsize=(side * len(columns) + 0.8, side * len(rows) + 0.4), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    future = torch.ones(len(labels), len(labels), dtype=torch.bool).triu(1)
    ticks = range(len(labels))
    image: Any = None
    for row, layer in zip(panels, rows, strict=True):
        for axes, head in zip(row, columns, strict=True):
            # NaN is drawn blank: a causal model cannot attend to the future, which is not the same as attending little.
            shown = maps[layer, head].masked_fill(future, torch.nan).numpy()
            image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"layer {layer}, head {head}", fontsize=8)
            axes.set_xticks(ticks, labels, rotation=90, fontsize=6, parse_math=False)
            axes.set_yticks(ticks, labels, fontsize=6, parse_math=False)
            axes.tick_params(length=0, pad=1)
            axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, ax=panels, label="probability", shrink=min(1, 3 / len(rows) / side), fraction=0.03)
    figure.savefig(path, dpi=150, format="png")
