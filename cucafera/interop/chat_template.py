"""The chat template of a foreign model, compared with ours by what both render."""

from collections.abc import Mapping, Sequence
from typing import Any

from cucafera.data.chatml import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE
from cucafera.interop.render_template import RenderError, render_template

PROBE = (
    ("system", "Sigues breu."), ("user", "Hola!"), ("assistant", "Bon dia.\n\nQue vols?"), ("user", "Res."),
)  # fmt: skip
"""Roles and contents of a conversation that both templates render, with the opening of the next answer."""
MAX_SHOWN = 60
"""Characters of a rendering, or of an error, in a note."""


def chat_template_notes(
    template: Any, about_tokenizer: Mapping[str, Any], other_names: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return a sentence if a model's own chat template, which is not used, would render another prompt than ours.

    Args:
        template: As tokenizer_config.json has it: a text, or a list of named ones; None: the model has none.
        about_tokenizer: The content of tokenizer_config.json, which names the control tokens.
        other_names: Other names of our control tokens, which count as equal.
    """
    template = _default(template)
    if template in (None, CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE):
        return []
    if not isinstance(template, str):
        return ["Its chat template is not a text: conversations are rendered as ChatML"]
    names = {key: token_name(about_tokenizer, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    variables = {
        "messages": [{"role": role, "content": content} for role, content in PROBE],
        "add_generation_prompt": True,
        **{key: name for key, name in names.items() if name is not None},
    }
    try:
        theirs = render_template(template, variables)
    except RenderError as error:
        return [f"Its chat template is not used, and cannot be compared with ChatML: {str(error)[: 2 * MAX_SHOWN]}"]
    renamed = theirs
    for name, others in other_names.items():
        for other in others:
            renamed = renamed.replace(other, name)
    ours = "".join(f"<im_start>{role}\n{content}<im_end>\n" for role, content in PROBE) + "<im_start>assistant\n"
    if renamed == ours:
        return []
    common = next(n for n in range(len(ours) + 1) if renamed[: n + 1] != ours[: n + 1])
    return [
        "Its own chat template is not used: conversations are rendered as ChatML, with "
        f"{ours[common : common + MAX_SHOWN]!r} where it has {renamed[common : common + MAX_SHOWN]!r}"
    ]


def _default(template: Any) -> Any:
    """Return the template that transformers takes from a list of named ones."""
    if not isinstance(template, list):
        return template
    named = (part for part in template if isinstance(part, dict) and part.get("name") == "default")
    return next(named, {}).get("template", template)


def token_name(about_tokenizer: Mapping[str, Any], key: str) -> str | None:
    """Return the name of a token in tokenizer_config.json, which is a text or an object; None if there is none."""
    token = about_tokenizer.get(key)
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
