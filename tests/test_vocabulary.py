"""The field's vocabulary: words of an older dialect stay out of names, keys, messages and documentation."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("cucafera", "conf", "scripts", "tests", ".github") for path in (ROOT / folder).rglob("*")
]
TEXTS = sorted(
    path
    for path in [*SOURCES, ROOT / "README.md", ROOT / "pyproject.toml"]
    if path.suffix in (".py", ".yaml", ".md", ".toml", ".sh") and path != Path(__file__)
)
CODE = [path for path in TEXTS if path.suffix == ".py"]

REPLACEMENTS = {
    "told": "reported, refused, printed",
    "doors?": "command",
    "the house": "project layout",
    "anew": "again, from scratch",
    "(the )?likeliest": "most probable, top-1",
    "whence|lest": "from where, or else",
    "go(es|ing)? on|went on|gone on": "continue, resume",
    "nobody|somebody": "no one, a user",
    "beside": "next to, in addition to",
    "mend(s|ed)?": "fix",
    "bits a byte|nats a token|tokens a (second|step|token)|one a (core|device)": "per",
    "is not what was written": "checksum mismatch",
    "for want of": "for lack of",
    "one likes|of one's own": "any, its own",
    "written whole|replaced whole": "atomic",
    "begins? anew|resume despite|most in a row": "start from scratch, resume_allow_changed, max_consecutive",
}
"""Each a pattern of whole words, in which an underscore counts as a space, and the words to use."""


@pytest.mark.parametrize("pattern", REPLACEMENTS, ids=[re.sub(r"\W+", "_", pattern) for pattern in REPLACEMENTS])
def test_old_words_do_not_come_back(pattern: str):
    words = re.compile(rf"(?<![a-z])({pattern})(?![a-z])", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line.replace("_", " "))
    ]
    assert not found, f"use {REPLACEMENTS[pattern]} instead:\n" + "\n".join(found)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_an_imperative_or_a_noun_phrase(path: Path):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, documented)]
    first_words = {(ast.get_docstring(node) or "").split(" ")[0] for node in nodes}
    assert not first_words & {"What", "Whether", "Where", "Why", "How", "Says", "Tells", "Which"}


def test_field_terms_are_found_where_an_engineer_greps_for_them():
    code = "\n".join(path.read_text(encoding="utf-8") for path in CODE if "cucafera" in path.parts)
    terms = [
        "atomic", "symlink", "prefill", "decode_step", "KV cache", "collate", "retry", "fallback", "checksum",
        "gradient accumulation", "finish_reason", "detokenize", "deadlock", "top-1 accuracy", "greedy",
    ]  # fmt: skip
    assert [term for term in terms if term.lower() not in code.lower()] == []


def test_no_two_classes_share_a_name():
    names: dict[str, list[str]] = {}
    for path in CODE:
        if "cucafera" in path.relative_to(ROOT).parts[:1]:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    names.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in names.items() if len(paths) > 1} == {}
