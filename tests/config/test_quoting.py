"""Values as people type them arrive unchanged, or are refused with a form that arrives unchanged."""

import itertools
import random
import shlex

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cucafera.config.check import text_with_dollar
from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.config.quoting import exact_form, forms, parse, readable

TEXT, NULLABLE, MIXED = "name", "init_from", "data.sources.files.path"
"""Settings that are a text; a text or null; a text or a list of texts."""
PIECES = [
    *"aZ07çé·😀 '\"\\$*?[]{}(),:=#!~%&|;<>@+-_./^`\t\n", "${", "${a}", "null", "true", "1e3", "choice(", "range(1,5)",
    "\\,", "\\'", "a\\", "[a]", "l'avi", "..",
]  # fmt: skip


def value_of(argument: str) -> object:
    """The value that a setting gets from an override; ValueError if it gets none, or several."""
    override = parse(readable(argument, multirun=False))
    if override is None or override.is_sweep_override():
        return ValueError
    try:
        return OmegaConf.to_container(OmegaConf.create({"key": override.value()}), resolve=True)["key"]
    except OmegaConfBaseException:
        return ValueError


def advised(key: str, typed: str) -> str:
    """The override that a refusal of a text advises, as the shell passes it on."""
    form = exact_form(key, typed)
    assert form in forms(key, typed)
    (argument,) = shlex.split(form)
    return argument


def is_meant_otherwise(key: str, typed: str) -> bool:
    """True for what has a meaning of its own: quotes around the whole, an escape, a list, null, another key's value."""
    is_list = key == MIXED and typed.strip()[:1] == "[" and typed.strip()[-1:] == "]"
    is_null = typed == "null" and key != TEXT
    has_quotes = typed[0] in "'\"" and typed[-1] == typed[0]
    return is_list or is_null or has_quotes or "\\," in typed or "${" in typed


PLAIN = (
    """
català|[ab]|{a,b}|~/texts|l'avi|train[:1%]|a b| a|a |#a|a#b|a:b|a: b|a=b|=a|a!|!a|a"b|a'b'c|😀|\\a|a\\|a\\\\b
$a|$HOME|~|None|none|007
1e3|true|True|yes|no|1_000|0x10|1.10|1.0|nan|inf|-inf|-5|+5|-a|--a|2026-11-27|12:30|12:30:00|[]|{}|{a}|{a:b}|[a,b]|(a)|f(a)|*
*.txt|?|a?b|a&b|a;b|a<b|a>b|`a`|a^b|a@b|a%b|100%|@a|/|/tmp/x|./a|../a|a/|a//b|C:\\a|é|·|l·l|«a»|“a”|a…|日本|{|(|)|a(b|a)b|()|a()
f(x)=1|x(1,2)|tag(a,b)|cast(a)|int(a)|str(a)|float(3)|bool(1)|a\\=b|a\\ b|..|.|.a|a.|%a|~root/x|!!str a|&a|*a|- a
a - b|? a|a: |>
""".strip("\n")
    .replace("\n", "|")
    .split("|")
)


@pytest.mark.parametrize("key", [TEXT, NULLABLE])
def test_plain_texts_need_no_quotes(key):
    assert len(PLAIN) > 100
    assert [typed for typed in PLAIN if value_of(f"{key}={typed}") != typed] == []
    assert value_of("name=null") == "null" and value_of("init_from=null") is None


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("a,b", ValueError), ("range(1,5)", ValueError), ("'a,b'", "a,b"), ('"a\'b"', "a'b"), (r"a\,b", "a,b"),
        (r"\${x}", "${x}"), ("''", ""),
    ],
)  # fmt: skip
def test_what_has_a_meaning_of_its_own_keeps_it(typed, value):
    assert value_of(f"init_from={typed}") == value


@pytest.mark.parametrize(
    ("typed", "values"),
    [("[null,7,'x, y']", ["null", "7", "x, y"]), ("[a,]", ["a"]), ("[a,[b]]", ["a", "[b]"]), ("[]", [])],
)
def test_items_of_a_list_of_texts_are_texts(typed, values):
    assert value_of(f"callbacks.prompts={typed}") == values


@pytest.mark.parametrize("text", ["${a}", "a${b}'c", "${", "a$b${"])
def test_a_text_with_an_interpolation_has_a_form_that_works(text):
    with pytest.raises(UserError, match="for the text itself, write ") as refused:
        composed_config([f"init_from={text}"])
    assert str(refused.value).endswith(f"write {text_with_dollar('init_from', text)}")
    (argument,) = shlex.split(text_with_dollar("init_from", text))
    assert composed_config([argument]).init_from == text


@pytest.mark.parametrize("key", [TEXT, NULLABLE, MIXED])
def test_any_text_arrives_unchanged_or_is_refused_with_a_form_that_does(key):
    generator = random.Random(7)
    texts = [*PIECES, *map("".join, itertools.product(PIECES, repeat=2))]
    texts = generator.sample(texts, 120) + [
        "".join(generator.choices(PIECES, k=generator.randint(3, 8))) for _ in range(120)
    ]
    unchanged = 0
    for typed in texts:
        value = value_of(f"{key}={typed}")
        if value == typed:
            unchanged += 1
        elif not is_meant_otherwise(key, typed):
            assert value is ValueError, (typed, value)
        if value is ValueError and "${" not in typed:
            assert value_of(advised(key, typed)) == typed, typed
    assert unchanged > 120
