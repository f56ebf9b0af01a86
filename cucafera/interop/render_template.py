"""Render a chat template in a process of its own: it is a program from elsewhere, which may loop or fill the memory.

Run as a script: JSON with `template` and its variables on standard input, the text on standard output. Nothing here
imports this package.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 3
MEMORY = 1 << 30
"""Limits of the process: CPU seconds, and bytes of its address space."""


class RenderError(Exception):
    """A template that cannot be rendered; the message is the reason."""


def render_template(template: str, variables: dict[str, Any]) -> str:
    """Return the text of a template for transformers, whose filters and functions are those of transformers.

    Raises:
        RenderError: it is wrong, raises an error, or exceeds the limits.
    """
    content = json.dumps({"template": template, "variables": variables}).encode()
    try:
        process = subprocess.run(
            [sys.executable, "-P", str(Path(__file__))],
            input=content, capture_output=True, timeout=3 * SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RenderError(
            "it takes too long" if isinstance(error, subprocess.TimeoutExpired) else str(error)
        ) from error
    if process.returncode < 0:
        raise RenderError("it takes too long, or too much memory")
    if process.returncode:
        reason = process.stderr.decode(errors="replace").strip().splitlines()
        raise RenderError(reason[-1] if reason else "it gives no reason")
    return process.stdout.decode(errors="replace")


def _render(template: str, variables: dict[str, Any]) -> str:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag `generation` of transformers, which changes nothing in the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            """Return the body of the tag."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **settings: json.dumps(value, ensure_ascii=False, **settings)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: form
    return environment.from_string(template).render(**variables)


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        text = _render(**json.loads(sys.stdin.buffer.read()))
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
    sys.stdout.buffer.write(text.encode(errors="replace"))


if __name__ == "__main__":
    _main()
