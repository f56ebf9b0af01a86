"""The Modelfile of Ollama for a GGUF file: the prompt template, what ends an answer, and sampling.

Ollama takes the template of a GGUF file only if it is within an edit distance of one that it knows, and else sends the
bare prompt. A Modelfile states it in the syntax of Go's text/template: https://docs.ollama.com/modelfile.
"""

from typing import Any

from cucafera.config.tokens import SPECIAL_TOKENS
from cucafera.data.chatml import STOP_IDS

SUFFIX = ".Modelfile"
HEADER = "# Written by cucafera.export"
"""The beginning of a file that may be replaced."""

CHAT_TEMPLATE = """\
{{- range $index, $message := .Messages }}<im_start>{{ .Role }}
{{ .Content }}
{{- $last := eq (len (slice $.Messages $index)) 1 }}
{{- if or (ne .Role "assistant") (not $last) }}<im_end>
{{ end }}
{{- if and (ne .Role "assistant") $last }}<im_start>assistant
{{ end }}
{{- end }}"""
"""ChatML. `.Messages` begins with the system message, if there is one. An assistant's message that comes last is
continued, as in the templates of Ollama."""
BASE_TEMPLATE = "{{ .Prompt }}"

PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
"""Ollama's names of the fields of generation_config.json."""


def modelfile(file_name: str, generation: dict[str, Any], chats: bool, context: int, licence: str | None) -> str:
    """Return the content of a Modelfile.

    Args:
        file_name: Of the GGUF file, in the same folder.
        generation: The content of generation_config.json.
        chats: True if the model was trained on conversations.
        context: Of the model, in tokens.
        licence: Of the weights; None: left out.
    """
    settings = dict.fromkeys(["temperature"], 0) | generation  # a greedy model has no temperature there
    values = [("num_ctx", context), *((PARAMETERS[key], settings[key]) for key in PARAMETERS if key in settings)]
    values += [("stop", f'"{SPECIAL_TOKENS[token]}"') for token in STOP_IDS]
    lines = [
        f"{HEADER} for {file_name}",
        f"FROM ./{file_name}",
        f'TEMPLATE """{CHAT_TEMPLATE if chats else BASE_TEMPLATE}"""',
        *(f"PARAMETER {name} {value}" for name, value in values),
        *([] if licence is None else [f'LICENSE "{" ".join(licence.split())}"']),
    ]
    return "\n".join(lines) + "\n"
