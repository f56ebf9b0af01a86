"""Attention maps as pictures."""

import pytest

from cucafera.config.errors import UserError
from cucafera.evaluation.attention import draw_attention, token_labels


def test_a_picture_has_one_panel_per_layer_and_head(base, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *rest, **more: figures.append(self) or save(self, *rest, **more)
    )
    path = tmp_path / "attention.png"
    draw_attention(base, "la $mar$\ni l'avi", [1, 0], [3, 0], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    *panels, _ = figures[0].axes
    assert [panel.get_title() for panel in panels] == [
        f"layer {layer}, head {head}" for layer in (1, 0) for head in (3, 0)
    ]
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names[0] == "</s>" and "".join(names[1:]) == "la␣$mar$\\ni␣l'avi"
    shown = panels[0].images[0].get_array()
    assert shown.mask.sum() == len(names) * (len(names) - 1) / 2  # future tokens are blank


def test_parts_of_characters_are_shown_as_escaped_bytes(base):
    ids = base.tokenizer.encode("ñ ")
    names = token_labels(ids, base.tokenizer)
    assert "".join(names) in ("ñ␣", "\\xc3\\xb1␣")


@pytest.mark.parametrize(
    ("text", "layers", "heads", "message"),
    [
        ("la mar", [2], None, "--layers 2: the model has layers 0 to 1"),
        ("la mar", None, [-1], "--heads -1: the model has heads 0 to 3"),
        ("la mar i el bosc " * 9, None, None, r"has \d+ tokens; the limit of a picture is 48"),
    ],
)
def test_missing_layers_and_heads_and_long_texts_are_refused(base, tmp_path, text, layers, heads, message):
    with pytest.raises(UserError, match=message):
        draw_attention(base, text, layers, heads, tmp_path / "a.png")


def test_a_picture_that_cannot_be_written_is_an_error(base, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="cannot be written: No such file"):
        draw_attention(base, "la mar", None, [0], tmp_path / "no" / "a.png")
