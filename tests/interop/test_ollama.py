"""The Modelfile of Ollama."""

import re

from cucafera.data.chatml import PLAIN_CHAT_TEMPLATE
from cucafera.interop.ollama import BASE_TEMPLATE, CHAT_TEMPLATE, modelfile
from cucafera.interop.render_template import render_template

TRIMMED = re.compile(r"\s*\{\{-(.*?)\}\}", re.DOTALL)


def rendered(messages: list[dict[str, str]]) -> str:
    """Evaluate the template by hand: each action is replaced by its value, as Go's text/template defines them."""
    text = TRIMMED.sub(r"{{\1}}", CHAT_TEMPLATE)
    opening, last, closing, asking = (
        "{{ range $index, $message := .Messages }}", "{{ $last := eq (len (slice $.Messages $index)) 1 }}",
        '{{ if or (ne .Role "assistant") (not $last) }}<im_end>\n{{ end }}',
        '{{ if and (ne .Role "assistant") $last }}<im_start>assistant\n{{ end }}',
    )  # fmt: skip
    assert text == opening + "<im_start>{{ .Role }}\n{{ .Content }}" + last + closing + asking + "{{ end }}"
    parts = []
    for index, message in enumerate(messages):
        is_last, answers = len(messages[index:]) == 1, message["role"] == "assistant"
        parts.append(f"<im_start>{message['role']}\n{message['content']}")
        parts.append("<im_end>\n" if not answers or not is_last else "")
        parts.append("<im_start>assistant\n" if not answers and is_last else "")
    return "".join(parts)


def test_the_template_renders_conversations_as_the_one_of_transformers():
    conversation = [("system", "Sigues breu."), ("user", "Hola"), ("assistant", "Bon dia.\n\nI tu?"), ("user", "Bé")]
    messages = [{"role": role, "content": content} for role, content in conversation]
    for count in (1, 2, 4):
        asked = {"messages": messages[:count], "add_generation_prompt": True}
        assert rendered(messages[:count]) == render_template(PLAIN_CHAT_TEMPLATE, asked)
    assert rendered(messages[1:3]).endswith("<im_start>assistant\nBon dia.\n\nI tu?")  # which Ollama continues


def test_a_greedy_base_model_gets_its_bare_prompt_and_temperature_0():
    text = modelfile("a.gguf", {"do_sample": False, "repetition_penalty": 1.2, "max_new_tokens": 8}, False, 64, None)
    assert text.splitlines() == [
        "# Written by cucafera.export for a.gguf", "FROM ./a.gguf", f'TEMPLATE """{BASE_TEMPLATE}"""',
        "PARAMETER num_ctx 64", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1.2", "PARAMETER num_predict 8",
        'PARAMETER stop "<im_end>"', 'PARAMETER stop "<im_start>"', 'PARAMETER stop "</s>"',
    ]  # fmt: skip
