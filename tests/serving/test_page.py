"""The web page: its text, and its behaviour in a real browser, with a server that has no model."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cucafera.config.schema import ColumnsConfig
from cucafera.data.chatml import check_conversation
from cucafera.data.conversation_formats import conversation_of_row
from tests.serving.browser import Browser, Page, find_chromium
from tests.serving.conftest import loaded, serving
from tests.serving.fake_server import PAGE, FakeServer

HTML = PAGE.read_text(encoding="utf-8")
CHROMIUM = find_chromium()
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on PATH")
ROLES = ("user", "assistant")
ATTACK = "<img src=x onerror=\"document.title='attacked'\"><script>document.title='attacked'</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(str(CHROMIUM), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: FakeServer) -> Iterator[Page]:
    """The page in a desktop window, ready to write; at the end without errors of scripts or of the content policy."""
    page = browser.open(server.url)
    page.wait("server")
    yield page
    problems = page.problems()
    page.close()
    assert [problem for problem in problems if "Failed to load resource" not in problem] == []


def say(page: Page, text: str) -> None:
    """Send a message and wait for the end of its answer."""
    write(page, text)
    page.wait("!runs.size")


def wait_until(is_true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write(page: Page, text: str) -> None:
    page.click("#message")
    page.type(text)
    page.key("Enter")
    page.wait("document.getElementById('message').value === ''")


def label(text: str) -> str:
    return f'[aria-label="{text}"]'


def contents(request: dict[str, Any]) -> list[str]:
    return [message["content"] for message in request["messages"]]


def press(page: Page, title: str, number: int = 0) -> None:
    """Press a button that may be shown only under the pointer."""
    page.evaluate(f"document.querySelectorAll('button[title=\"{title}\"]')[{number}].click()")


def replace_text(page: Page, text: str) -> None:
    """Replace the text of the field that has the focus."""
    page.evaluate("document.activeElement.select()")
    page.type(text)


def set_system_message(page: Page, text: str) -> None:
    page.click("#open-settings")
    page.click("#system-text")
    page.type(text)
    page.key("Escape")
    page.wait("!document.querySelector('dialog[open]')")


# The text of the page


def test_no_text_can_become_markup_or_code():
    forbidden = ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser",
                 "createContextualFragment", "srcdoc", "javascript:"]  # fmt: skip
    assert [word for word in forbidden if word in HTML] == []


def test_the_page_is_one_file_that_a_strict_content_policy_allows():
    assert len(re.findall("<script", HTML)) == len(re.findall("<script>", HTML)) == 1
    assert len(re.findall("<style", HTML)) == len(re.findall("<style>", HTML)) == 1
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.[a-z]+[^\"' ]*", HTML)) - {"http://www.w3.org/2000/svg"}
    markup = re.sub("<(script|style)>.*?</\\1>", "", HTML, flags=re.DOTALL)
    assert not addresses
    assert not re.search(r"\s(on\w+|style)=", markup)


def texts() -> dict[str, dict[str, str]]:
    """The tables of texts by language."""
    tables = re.search(r"const TEXTS = \{(.*?)\n\};", HTML, re.DOTALL).group(1)
    return {
        name: {key: json.loads(text) for key, text in re.findall(r'^    (\w+): (".*"),$', table, re.MULTILINE)}
        for name, table in re.findall(r"^  (\w+): \{\n(.*?)^  \},$", tables, re.DOTALL | re.MULTILINE)
    }


def test_both_languages_have_the_same_texts_with_the_same_values():
    tables = texts()
    assert list(tables) == ["ca", "en"]
    assert list(tables["ca"]) == list(tables["en"]) and len(tables["ca"]) > 80
    for key, text in tables["ca"].items():
        assert re.findall(r"\{\w+\}", text) == re.findall(r"\{\w+\}", tables["en"][key]), key


def test_each_text_is_used_and_each_used_text_exists():
    code = HTML.partition("let language")[2]
    dials = re.findall(r'\{ name: "(\w+)"', code)
    used = {key for key in texts()["ca"] if re.search(rf'"{key}"', code)} | {f"{name}_help" for name in dials}
    used |= set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', HTML))
    direct = set(re.findall(r'\bt\("(\w+)"|new Failure\("(\w+)"|data-(?:text|label|placeholder)="(\w+)"', HTML))
    assert used == set(texts()["ca"])
    assert {key for keys in direct for key in keys if key} <= set(texts()["ca"])


def test_texts_contrast_with_their_backgrounds_as_wcag_aa_asks():
    colours = re.findall(r"--([\w-]+): light-dark\(#(\w{6}), #(\w{6})\)", HTML)
    assert len(colours) > 10

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (1, 2):
        table = {colour[0]: luminance(colour[theme]) for colour in colours}

        def ratio(one: str, other: str, table: dict[str, float] = table) -> float:
            high, low = sorted((table[one], table[other]), reverse=True)
            return (high + 0.05) / (low + 0.05)

        backgrounds = ("paper", "surface", "side", "hover", "tint", "ember-tint")
        pairs = [(text, background) for text in ("ink", "muted") for background in backgrounds]
        pairs += [("accent", "paper"), ("accent", "surface"), ("accent", "tint"), ("on-accent", "accent")]
        assert {pair: ratio(*pair) for pair in pairs if ratio(*pair) < 4.5} == {}
        borders = [(line, background) for line in ("field", "ember") for background in ("paper", "surface")]
        assert {pair: ratio(*pair) for pair in borders if ratio(*pair) < 3} == {}


# Conversations


@in_browser
def test_a_conversation_streams_stops_answers_again_and_is_there_after_a_reload(page: Page, server: FakeServer):
    server.delay = 0.05
    server.answer = lambda body: "Una bèstia **fantàstica** que treu foc i espanta la mainada per les festes"
    write(page, "Què és una cucafera?")
    page.wait("document.querySelector('.text')?.textContent.includes('fantàstica')")
    assert "espanta" not in page.text("#thread")  # the text comes while it is written
    assert page.is_visible("#stop") and not page.is_visible("#send")
    page.click("#stop")
    page.wait("!runs.size")
    stopped = page.text(".answer .text")
    assert stopped.startswith("Una bèstia fantàstica") and "festes" not in stopped
    assert "Aturada" in page.text(".answer .note")
    wait_until(lambda: server.cancelled == 1)  # the slot is free

    server.delay = 0
    server.answer = lambda body: f"Resposta número {len(server.requests)}."
    page.click(label("Torna a respondre"))
    page.wait("!runs.size")
    assert page.texts(".answer .text") == ["Resposta número 2."]
    say(page, "I on viu?")
    say(page, "Gràcies")
    assert page.texts(".bubble") == ["Què és una cucafera?", "I on viu?", "Gràcies"]
    assert server.requests[-1]["messages"] == [
        {"role": "user", "content": "Què és una cucafera?"},
        {"role": "assistant", "content": "Resposta número 2."},
        {"role": "user", "content": "I on viu?"},
        {"role": "assistant", "content": "Resposta número 3."},
        {"role": "user", "content": "Gràcies"},
    ]
    assert server.requests[0]["stream"] and server.requests[0]["stream_options"] == {"include_usage": True}
    assert server.requests[0]["model"] == "cucafera"
    assert server.requests[0]["seed"] != server.requests[1]["seed"]

    page.reload()
    page.wait("server && document.querySelectorAll('.bubble').length === 3")
    assert page.texts(".answer .text") == ["Resposta número 2.", "Resposta número 3.", "Resposta número 4."]
    assert page.text("#title") == "Què és una cucafera?"


@in_browser
def test_an_edited_message_is_answered_and_what_followed_can_come_back(page: Page, server: FakeServer):
    server.answer = lambda body: "Sobre " + body["messages"][-1]["content"]
    for text in ("el mar", "el bosc", "el cel"):
        say(page, text)
    press(page, "Edita el missatge")
    page.wait("document.activeElement.closest('.editor')")
    page.key("Escape")
    assert page.texts(".bubble") == ["el mar", "el bosc", "el cel"]
    press(page, "Edita el missatge", 1)
    page.wait("document.activeElement.closest('.editor')")
    replace_text(page, "la pluja")
    page.key("Enter")
    page.wait("!runs.size && !document.querySelector('.editor')")
    assert page.texts(".bubble") == ["el mar", "la pluja"]
    assert page.texts(".answer .text") == ["Sobre el mar", "Sobre la pluja"]
    assert contents(server.requests[-1]) == ["el mar", "Sobre el mar", "la pluja"]
    page.click("#toast button", "Desfés")
    page.wait("document.querySelectorAll('.bubble').length === 3")
    assert page.texts(".answer .text") == ["Sobre el mar", "Sobre el bosc", "Sobre el cel"]


@in_browser
def test_the_better_of_two_answers_continues_and_is_sent_as_a_preference(page: Page, server: FakeServer):
    server.answer = lambda body: f"Llavor {body['seed']}"
    set_system_message(page, "Sigues breu.")
    page.evaluate("sampling.seed = 7")
    page.click("#two")
    say(page, "Hola")
    assert page.texts(".card .text") == ["Llavor 7", "Llavor 8"]
    assert page.is_visible("#send") and page.evaluate("document.querySelector('#send').disabled")
    page.evaluate("[...document.querySelectorAll('.card button')][1].click()")
    page.wait("document.querySelectorAll('.answer').length === 1")
    page.wait("!document.querySelector('#toast').hidden")
    assert server.preferences == [
        {
            "prompt": [{"role": "system", "content": "Sigues breu."}, {"role": "user", "content": "Hola"}],
            "chosen": [{"role": "assistant", "content": "Llavor 8"}],
            "rejected": [{"role": "assistant", "content": "Llavor 7"}],
        }
    ]
    page.click("#two")
    say(page, "I doncs?")
    assert contents(server.requests[-1]) == ["Sigues breu.", "Hola", "Llavor 8", "I doncs?"]
    page.click(".message:last-child " + label("Bona resposta"))
    page.wait("document.querySelector('[title=\"Bona resposta\"][aria-pressed=true]')")
    page.wait("document.querySelector('#toast span').textContent.includes('valoració')")
    assert server.ratings == [
        {"messages": [*server.requests[-1]["messages"], {"role": "assistant", "content": "Llavor 7"}], "rating": "up"}
    ]


@in_browser
def test_a_choice_without_an_end_is_not_sent_nor_one_between_equal_answers(page: Page, server: FakeServer):
    page.click("#two")
    say(page, "Hola")  # two equal answers
    assert page.texts(".answer .text") == ["Bon dia!"]
    server.delay = 0.05
    server.answer = lambda body: f"{body['seed']} " + "i més " * 50
    write(page, "I més?")
    page.wait("[...document.querySelectorAll('.card .text')].filter((n) => n.textContent.includes('més')).length === 2")
    page.key("Escape")
    page.wait("!runs.size")
    page.click(".card button")
    page.wait("document.querySelectorAll('.answer').length === 2")
    assert "no s'ha desat" in page.text("#toast")
    assert server.preferences == []
    server.delay = 0
    page.click("#two")
    say(page, "Adeu")
    assert "i més" in contents(server.requests[-1])[3]


@in_browser
def test_choices_and_ratings_are_offered_only_where_they_are_collected(browser: Browser, server: FakeServer):
    for collects in (True, False):
        with server.changed(collects=collects):
            page = browser.open(server.url)
            page.wait("server")
            say(page, "Hola")
            for selector in ("#two", "#collects", label("Bona resposta"), label("Mala resposta")):
                assert page.is_visible(selector) == collects, selector
            page.close()


@in_browser
def test_what_is_written_and_what_is_to_be_chosen_survive_a_reload(page: Page, server: FakeServer):
    server.delay = 0.05
    server.answer = lambda body: f"{body['seed']} " + "paraula " * 100
    write(page, "Hola")
    page.wait("document.querySelector('.text')?.textContent.includes('paraula')")
    page.reload()
    page.wait("server && document.querySelector('.answer')")
    assert "paraula" in page.text(".answer .text") and page.texts(".note") == ["Incompleta."]
    server.delay = 0
    page.click("#two")
    say(page, "I ara?")
    answers = page.texts(".card .text")
    page.reload()
    page.wait("server && document.querySelector('.card button')")
    assert page.texts(".card .text") == answers
    page.click(".neither")
    page.wait("!document.querySelector('.card')")
    assert page.texts(".answer .text")[-1] == answers[0] and server.preferences == []


@in_browser
def test_an_answer_again_that_fails_or_is_empty_leaves_the_earlier_one(page: Page, server: FakeServer):
    say(page, "Hola")
    server.failures = [(503, {}, {})]
    press(page, "Torna a respondre")
    page.wait("document.querySelector('.trouble') && !runs.size")
    assert page.texts(".answer .text") == ["Bon dia!"]
    server.answer = lambda body: ""
    press(page, "Torna a respondre")
    page.wait("document.querySelector('.trouble')?.textContent.includes('res') && !runs.size")
    assert "no ha respost res" in page.text(".trouble") and page.texts(".answer .text") == ["Bon dia!"]


@in_browser
def test_a_system_message_of_the_server_can_be_changed_and_removed(browser: Browser, server: FakeServer):
    with server.changed(system="Parla com un drac."):
        page = browser.open(server.url)
        page.wait("server")
        assert "Parla com un drac." in page.text(".empty .system")
        say(page, "Hola")
        assert contents(server.requests[-1]) == ["Parla com un drac.", "Hola"]
        assert "Parla com un drac." in page.text(".system")
        page.click("#open-settings")
        page.click("#system-text")
        replace_text(page, " ")
        page.key("Escape")
        say(page, "Adeu")
        assert server.requests[-1]["messages"][0] == {"role": "system", "content": ""}
        assert page.evaluate("row(conversation).messages[0]") == {"role": "user", "content": "Hola"}
        page.close()


@in_browser
def test_two_tabs_share_their_conversations(browser: Browser, server: FakeServer):
    page = browser.open(server.url)
    page.wait("server")
    say(page, "Hola")
    other = Page(browser, page.context, 1280, 800, touch=False)
    other.go(server.url)
    other.wait("server")
    other.click("#list .open", "Hola")
    say(other, "Una altra")
    page.wait("document.querySelectorAll('.bubble').length === 2")
    press(page, "Esborra")
    other.wait("document.querySelectorAll('#list li').length === 0")
    page.close()


@in_browser
def test_texts_of_people_model_and_server_stay_text(page: Page, server: FakeServer):
    server.answer = lambda body: f"{ATTACK} **{ATTACK}** `{ATTACK}`\n\n- {ATTACK}\n\n```{ATTACK}\n{ATTACK}\n```"
    set_system_message(page, ATTACK)
    say(page, ATTACK)
    server.failures = [(400, {}, {"message": ATTACK})]
    say(page, "Hola")
    assert ATTACK in page.text(".trouble")
    assert page.texts(".bubble")[0] == ATTACK
    assert all(ATTACK in page.text(selector) for selector in (".system", ".answer .text", ".answer .text li"))
    press(page, "Canvia el nom")
    page.wait("document.activeElement.closest('#list')")
    replace_text(page, ATTACK)
    page.key("Enter")
    page.wait(f"document.querySelector('#title').textContent === {json.dumps(ATTACK)}")
    assert page.evaluate("document.querySelectorAll('img, #main script, #side script').length") == 0
    assert page.evaluate("document.title") == f"{ATTACK} · cucafera"


@in_browser
def test_markdown_becomes_elements_and_code_can_be_copied(page: Page, server: FakeServer):
    paragraph = "Un **fort** i un *èmfasi* amb `codi`, 2 * 3 * 4, snake_case.\n\n"
    rest = "1. u\n2. dos\n   - dins\n\n# Títol\n```py\nx = 1\n\nprint(x)\n```\nFinal"
    server.answer = lambda body: paragraph + rest
    say(page, "Hola")
    shown = page.evaluate("""[...document.querySelector('.answer .text').querySelectorAll('*')]
        .filter((n) => !n.closest('header, svg')).map((n) => n.tagName + ':' + n.textContent)""")
    assert shown == [
        "P:Un fort i un èmfasi amb codi, 2 * 3 * 4, snake_case.", "STRONG:fort", "EM:èmfasi", "CODE:codi",
        "OL:udosdins", "LI:u", "LI:dosdins", "UL:dins", "LI:dins", "H2:Títol",
        "DIV:pyCopiax = 1\n\nprint(x)", "PRE:x = 1\n\nprint(x)", "CODE:x = 1\n\nprint(x)", "P:Final",
    ]  # fmt: skip
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click(".code button")
    assert page.wait("window.copied") == "x = 1\n\nprint(x)"


@in_browser
def test_with_a_model_the_page_stops_continues_and_collects(browser: Browser, runs: Path, tmp_path: Path):
    collect = tmp_path / "mine.jsonl"
    with serving(loaded(runs, "chat"), "chat", collect=collect, step_seconds=0.01) as served:
        page = browser.open(f"{served.url}/")
        page.wait("server")
        page.evaluate("Object.assign(sampling, {temperature: 0, repetition_penalty: 1})")  # repeats one token
        write(page, "la mar")
        page.wait("document.querySelector('.text')?.textContent")
        page.key("Escape")
        page.wait("!runs.size")
        served.wait_until(lambda: served.running() == 0)
        stopped = page.text(".answer .text")
        assert "Aturada" in page.text(".note")
        page.click(label("Torna a respondre"))
        page.wait("!runs.size")
        cut = page.text(".answer .text")
        assert len(cut) == 64 and cut.startswith(stopped) and stopped != cut
        page.click(".note button", "Continua")
        page.wait("!runs.size")
        assert page.text(".answer .text").startswith(cut) and len(page.text(".answer .text")) > 64
        assert "El context del model és ple" in page.text(".note")
        page.click(".note button", "Conversa nova")
        page.evaluate("sampling = {seed: 5}")
        page.click("#two")
        say(page, "el bosc")
        answers = page.evaluate("lastMessage().choices.map(({content, finish}) => [content, finish])")
        chosen = [finish for _, finish in answers].index("stop")
        page.click(f".card:nth-child({chosen + 1}) > button")
        page.wait("document.querySelector('#toast span').textContent.includes('desat')")
        (row,) = map(json.loads, collect.read_text(encoding="utf-8").splitlines())
        assert row["prompt"] == [{"role": "user", "content": "el bosc"}] and row["model"] == "chat"
        assert [row["chosen"][0]["content"], row["rejected"][0]["content"]] == [
            answers[chosen][0],
            answers[1 - chosen][0],
        ]
        assert page.problems() == []
        page.close()


# Limits and failures


@in_browser
def test_failures_are_explained_and_a_retry_repeats_the_request(page: Page, server: FakeServer):
    failures: list[tuple[int, dict[str, str], dict[str, Any], str]] = [
        (429, {"Retry-After": "7"}, {"message": "full"}, "d'aquí a 7 s"),
        (503, {}, {"message": "stopping"}, "s'està aturant"),
        (500, {}, {}, "(codi 500)"),
        (500, {}, {"message": "see the log", "code": "model_failed"}, "avisa qui porta el servidor"),
        (400, {}, {"message": "temperature must be positive"}, "temperature must be positive"),
        (413, {}, {"message": "body"}, "massa llarg"),
    ]
    server.failures = [(status, headers, error) for status, headers, error, _ in failures[:1]]
    say(page, "Hola")
    for number, (_, _, _, sentence) in enumerate(failures):
        assert sentence in page.text(".trouble"), sentence
        server.failures = [failure[:3] for failure in failures[number + 1 : number + 2]]
        if page.is_visible(".trouble button"):
            page.click(".trouble button")
            page.wait("!runs.size")
    say(page, "Hi ets?")  # the message without an answer and this one become one
    assert page.texts(".bubble") == ["Hola\n\nHi ets?"] and page.texts(".answer .text") == ["Bon dia!"]
    assert len(server.requests) == 1


@in_browser
def test_an_answer_that_breaks_off_is_kept_and_a_server_that_is_gone_is_reported(browser: Browser, server: FakeServer):
    page = browser.open(server.url)
    page.wait("server")
    server.breaks_after = 2
    server.answer = lambda body: "u dos tres"
    say(page, "Compta")
    assert page.texts(".answer .text") == ["u dos"] and "S'ha perdut la connexió" in page.text(".trouble")
    assert page.texts(".note") == ["Incompleta."]
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    page.click(".trouble button")
    page.wait("!runs.size")
    assert page.texts(".answer .text") == ["u dos"] and "No s'arriba al servidor" in page.text(".trouble")
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    server.breaks_after = None
    page.click(".trouble button")
    page.wait("!runs.size")
    assert page.texts(".answer .text") == ["u dos tres"] and not page.is_visible(".trouble")
    page.close()


@in_browser
def test_a_key_is_asked_for_and_kept_for_the_tab_only(browser: Browser, server: FakeServer):
    server.key = "clau bona"
    page = browser.open(server.url)
    page.wait("document.activeElement.id === 'key-value'")
    for wrong in ("dolenta", "do\u2026lenta"):  # no header can have the second
        page.evaluate("document.querySelector('#key-why').textContent = ''")
        page.type(wrong)
        page.key("Enter")
        page.wait("document.querySelector('#key-why').textContent.includes('no accepta')")
    page.type("clau bona")
    page.key("Enter")
    page.wait("server && !document.querySelector('#key').open")
    say(page, "Hola")
    assert page.texts(".answer .text") == ["Bon dia!"]
    assert page.evaluate("JSON.stringify(localStorage).includes('clau bona')") is False
    page.reload()
    page.wait("server")
    server.key = "una altra"
    page.evaluate("void request('/page/settings').catch((error) => { window.refused = error.key; })")
    page.wait("document.querySelector('#key').open")
    page.click("#key button", "Cancel·la")
    assert page.wait("window.refused") == "error_key"
    page.close()


@in_browser
def test_the_oldest_turns_are_left_out_of_a_full_context_and_the_page_says_so(browser: Browser, server: FakeServer):
    with server.changed(context=16):
        server.answer = lambda body: f"{len(body['messages'])} missatges"
        page = browser.open(server.url)
        page.wait("server")
        page.evaluate("sampling.max_tokens = 4")
        for _ in range(4):
            say(page, "u dos tres quatre")
        assert page.texts(".answer .text")[-1] == "3 missatges"
        assert contents(server.requests[-1]) == ["u dos tres quatre", "3 missatges", "u dos tres quatre"]
        assert "ja no llegeix" in page.text(".divider") and len(page.texts(".bubble")) == 4
        assert page.evaluate("document.querySelector('.divider').nextSibling === document.querySelectorAll('.user')[2]")
        page.evaluate("document.querySelector('#new').click()")
        say(page, "molt " * 40)
        assert "massa llarg" in page.text(".trouble") and "16 tokens" in page.text(".trouble")
        assert page.is_visible(label("Edita el missatge")) and not page.is_visible(".trouble button")
        page.close()


@in_browser
def test_a_short_beginning_does_not_make_the_page_forget_it(page: Page, server: FakeServer):
    server.frame = 20
    say(page, "Hola")
    say(page, "sí " * 600)
    assert contents(server.requests[-1])[:2] == ["Hola", "Bon dia!"]


@in_browser
def test_an_uncounted_conversation_is_cut_as_the_server_refuses_it(browser: Browser, server: FakeServer):
    with server.changed(context=1200):
        server.answer = lambda body: f"Llavor {body['seed']}"
        page = browser.open(server.url)
        page.wait("server")
        turns = [{"role": role, "content": f"{number} " + "mot " * 99} for number in range(20) for role in ROLES]
        page.evaluate(f"conversation.messages = {json.dumps(turns)}")
        page.click("#two")
        say(page, "I doncs?")
        assert len(server.requests) == 4  # two answers, each refused once
        sent = server.requests[-1]["messages"]
        assert 700 < sum(len(message["content"].split()) for message in sent) <= 1200 - 256
        set_system_message(page, "Breu.")  # from the next answer on
        page.click(".card button")
        page.wait("!document.querySelector('.card') && !lastMessage().unsent")
        assert server.preferences[0]["prompt"] == sent
        page.click(".message:last-child " + label("Mala resposta"))
        page.wait("lastMessage().rating === 'down'")
        assert server.ratings[0]["messages"] == [*sent, server.preferences[0]["chosen"][0]]
        page.close()


@in_browser
def test_a_rating_or_choice_that_was_not_saved_says_so_and_is_sent_again(page: Page, server: FakeServer):
    server.answer = lambda body: f"Llavor {body['seed']}"
    page.click("#two")
    say(page, "Hola")
    server.failures = [(503, {}, {})]
    page.click(".card button")
    page.wait("document.querySelector('.note')")
    assert server.preferences == []
    page.reload()
    page.wait("server && document.querySelector('.note')")
    assert "encara no s'ha desat" in page.text(".note")
    page.click(".note button")
    page.wait("!document.querySelector('.note')")
    assert len(server.preferences) == 1
    server.failures = [(503, {}, {})]
    thumb = label("Bona resposta")
    page.click(thumb)
    page.wait("document.querySelector('#toast').textContent.includes('La valoració no s')")
    assert page.evaluate(f"document.querySelector('{thumb}').ariaPressed") == "false"
    page.click(thumb)
    page.wait(f"document.querySelector('{thumb}').ariaPressed === 'true'")
    assert [row["rating"] for row in server.ratings] == ["up"]
    page.click("#languages button", "English")
    assert page.text("#toast").strip() == "Your rating was saved."
    toast = "document.querySelector('#toast').getBoundingClientRect()"
    assert page.evaluate(f"{toast}.top >= document.querySelector('#composer').getBoundingClientRect().bottom")


@in_browser
def test_a_cut_answer_is_continued_with_the_same_seed_and_twice_the_space(page: Page, server: FakeServer):
    server.answer = lambda body: " ".join(map(str, range(10)))
    page.evaluate("sampling.max_tokens = 4")
    say(page, "Compta")
    assert page.texts(".answer .text") == ["0 1 2 3"] and "4 tokens" in page.text(".note")
    page.click(".note button", "Continua")
    page.wait("!runs.size")
    assert page.texts(".answer .text") == ["0 1 2 3 4 5 6 7"]
    first, second = server.requests
    assert second == first | {"max_tokens": 8}


@in_browser
def test_a_base_model_continues_a_text(browser: Browser, server: FakeServer):
    with server.changed(chats=False, collects=False):
        server.answer = lambda body: f" i {len(body['prompt'])}"
        page = browser.open(server.url)
        page.wait("server && document.activeElement.id === 'text'")
        assert not page.is_visible("#composer")
        page.type("Vet aquí")
        page.click("#continue")
        page.wait("!runs.size")
        assert page.evaluate("document.querySelector('#text').value") == "Vet aquí i 8"
        page.click("#continue")
        page.wait("!runs.size && conversation.text === 'Vet aquí i 8 i 12'")
        assert server.requests[-1]["prompt"] == "Vet aquí i 8"
        page.click("#undo-text")
        assert page.evaluate("document.querySelector('#text').value") == "Vet aquí i 8"
        page.reload()
        page.wait("server && document.querySelector('#text').value === 'Vet aquí i 8'")
        assert page.evaluate("row(conversation)") == {"text": "Vet aquí i 8"}
        page.close()


@in_browser
def test_a_base_model_that_adds_nothing_says_so_and_reads_the_end_of_a_long_text(browser: Browser, server: FakeServer):
    with server.changed(chats=False, collects=False, context=100):
        server.answer = lambda body: ""
        page = browser.open(server.url)
        page.wait("server && document.activeElement.id === 'text'")
        page.type(" ".join(f"mot{number}" for number in range(300)))
        page.click("#continue")
        page.wait("!runs.size && document.querySelector('.trouble')")
        assert "no hi ha afegit res" in page.text(".trouble")
        server.answer = lambda body: " i prou"
        page.click("#again-text")
        page.wait("!runs.size && conversation.text.endsWith('mot299 i prou')")
        words = server.requests[-1]["prompt"].split()
        assert words[-1] == "mot299" and 60 < len(words) <= 75 and not page.is_visible(".trouble")
        assert f"des de «{words[0]} " in page.text("#text-trouble")
        requests = len(server.requests)
        page.click("#continue")
        page.wait("!runs.size && conversation.text.endsWith('i prou i prou')")
        assert len(server.requests) == requests + 1
        page.close()


@in_browser
def test_a_full_storage_is_reported_and_the_conversation_continues(page: Page, server: FakeServer):
    fill = (
        "for (let size = 1 << 22; size >= 16; size /= 2) try { localStorage.setItem(size, 'x'.repeat(size)); } catch {}"
    )
    page.evaluate(f"(() => {{ {fill} }})()")
    say(page, "Hola")
    assert "L'espai del navegador és ple" in page.text("#banner")
    say(page, "Encara?")
    assert page.texts(".answer .text") == ["Bon dia!", "Bon dia!"]


# Settings, files, languages, sizes


@in_browser
def test_settings_are_sent_kept_and_reset_to_the_servers(page: Page, server: FakeServer):
    page.click("#open-settings")
    assert page.evaluate("document.querySelector('#dial-temperature').value") == "0.6"
    chosen = {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1, "max_tokens": 9}
    for name, value in chosen.items():
        page.evaluate(f"document.querySelector('#dial-{name}').focus()")
        replace_text(page, str(value))
    page.evaluate("document.querySelector('#dial-top_p').focus()")
    replace_text(page, "1.5")
    assert page.evaluate("document.querySelector('#dial-top_p').getAttribute('aria-invalid')") == "true"
    assert page.is_visible(".problem", "Ha de ser un nombre de 0,01 a 1.")
    page.key("Escape")
    page.reload()
    page.wait("server")
    say(page, "Hola")
    assert {name: server.requests[-1][name] for name in chosen} == chosen
    page.click("#open-settings")
    page.click("#reset")
    page.key("Escape")
    say(page, "Hola")
    assert {name: server.requests[-1][name] for name in server.settings["sampling"]} == server.settings["sampling"]


@in_browser
def test_downloaded_conversations_are_what_finetuning_reads_and_can_be_imported(
    page: Page, server: FakeServer, browser: Browser, tmp_path: Path
):
    page.save_downloads(tmp_path)
    server.answer = lambda body: 'És l\'animal\n\n```\n"codi"\n```'
    say(page, 'Què és això?\u2028"Això"')
    set_system_message(page, "Breu.")
    say(page, "I allò?")
    page.key("o", "Control", "Shift")
    page.wait("document.querySelector('.empty') && document.activeElement.id === 'message'")
    say(page, "Una altra")
    page.click("#save-all")
    wait_until(lambda: any(file.read_bytes().endswith(b"\n") for file in tmp_path.glob("cucafera-*.jsonl")))
    path = next(tmp_path.glob("cucafera-*.jsonl"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]
    assert [set(row) for row in rows] == [{"messages"}, {"messages"}]
    assert [message["role"] for message in rows[1]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    for row in rows:
        unused: set[str] = set()
        conversation = conversation_of_row(row, ColumnsConfig(), unused)
        check_conversation(conversation)
        assert not unused and [message.content for message in conversation] == [m["content"] for m in row["messages"]]

    with path.open("a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "user", "content": 3}]}\nno és JSON\n')
    other = browser.open(server.url)
    other.wait("server")
    other.choose_file("#file", path)
    other.wait("conversations.size === 2")
    assert "importades: 2. Línies que no s'han pogut llegir: 2" in other.text("#toast")
    assert other.evaluate("listed().map(row)") == rows
    other.close()


@in_browser
def test_only_whole_answers_are_downloaded_to_be_trained_on(page: Page, server: FakeServer):
    page.evaluate("sampling.max_tokens = 1")
    say(page, "Un")
    assert page.evaluate("row(conversation)") == {"messages": []}
    page.click("#save-one")
    page.wait("document.querySelector('#toast').textContent.includes('cap resposta sencera')")
    page.evaluate("sampling.max_tokens = 9")
    say(page, "Dos")
    page.evaluate("sampling.max_tokens = 1")
    say(page, "Tres")
    row = page.evaluate("row(conversation)")
    contents = [("Un", None), ("Bon", 0), ("Dos", None), ("Bon dia!", None)]
    assert [(message["content"], message.get("weight")) for message in row["messages"]] == contents
    read = conversation_of_row(row, ColumnsConfig(), set())
    assert [message.content for message in read if message.role == "assistant" and message.trained] == ["Bon dia!"]
    assert page.evaluate(f"row(conversationOfLine({json.dumps(json.dumps(row))}))") == row


@in_browser
def test_files_of_chat_and_base_models_are_not_mixed_and_keep_their_order(
    browser: Browser, server: FakeServer, tmp_path: Path
):
    path = tmp_path / "tot.jsonl"
    chats = [{"messages": [{"role": role, "content": f"C{n}"} for role in ROLES]} for n in range(60)]
    rows = [{"text": "Vet aquí"}, *chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = browser.open(server.url)
    page.wait("server")
    page.choose_file("#file", path)
    page.wait("conversations.size === 60")
    assert "importades: 60. Textos que no s'han importat" in page.text("#toast")
    page.reload()
    page.wait("server")
    assert page.texts("#list .open") == [f"C{n}" for n in range(60)]
    with server.changed(chats=False):
        page.reload()
        page.wait("server && !document.querySelector('#text').hidden")
        page.choose_file("#file", path)
        page.wait("conversations.size === 61")
        assert "importades: 1. Converses que no s'han importat" in page.text("#toast")
        assert page.evaluate("listed().map(row)") == rows[:1]
    page.close()


@in_browser
def test_conversations_can_be_renamed_deleted_and_brought_back(page: Page, server: FakeServer):
    say(page, "Primera")
    page.click("#new")
    say(page, "Segona")
    assert page.texts("#list .open") == ["Segona", "Primera"]
    press(page, "Canvia el nom", 1)
    page.wait("document.activeElement.closest('#list')")
    replace_text(page, "La meva")
    page.key("Enter")
    page.wait("document.querySelectorAll('#list .open').length === 2")
    assert page.texts("#list .open") == ["Segona", "La meva"]
    press(page, "Esborra")
    assert page.texts("#list .open") == ["La meva"] and page.is_visible(".empty")
    page.click("#toast button")
    assert page.texts("#list .open") == ["Segona", "La meva"] and page.texts(".bubble") == ["Segona"]
    page.click("#list .open", "La meva")
    assert page.texts(".bubble") == ["Primera"]


@in_browser
def test_an_answer_continues_while_another_conversation_is_open(page: Page, server: FakeServer):
    server.delay = 0.02
    server.answer = lambda body: " ".join(["paraula"] * 20)
    write(page, "Llarga")
    page.wait("document.querySelector('.text')?.textContent")
    page.click("#new")
    assert page.is_visible("#send") and page.texts("#list .running .open") == ["Llarga"]
    page.wait("!runs.size")
    page.click("#list .open", "Llarga")
    assert page.texts(".answer .text") == [" ".join(["paraula"] * 20)]


@in_browser
def test_the_language_and_the_theme_are_a_click_away_and_kept(page: Page, server: FakeServer):
    assert page.evaluate("document.documentElement.lang") == "ca" and "De què parlem?" in page.text()
    page.click("#languages button", "English")
    page.click(label("Dark"))
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 24, 22)"
    page.reload()
    page.wait("server")
    assert page.evaluate("[document.documentElement.lang, document.documentElement.dataset.theme]") == ["en", "dark"]
    say(page, "Hola")
    assert page.is_visible(label("Answer again")) and page.text("#new").strip() == "New conversation"
    assert page.evaluate("document.querySelector('#message').placeholder") == "Write a message"
    page.click(label("As the device"))
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(247, 248, 245)"
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 24, 22)"


@in_browser
def test_keys_send_break_lines_and_leave_composed_characters_alone(page: Page, server: FakeServer):
    page.click("#message")
    page.type("a")
    page.key("Enter", "Shift")
    page.type("b")
    page.call("Input.imeSetComposition", text="に", selectionStart=1, selectionEnd=1)
    page.evaluate("""document.querySelector('#message').dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))""")
    assert server.requests == []
    page.type("日")
    page.key("Enter")
    page.wait("document.querySelector('.answer') && !runs.size")
    assert page.texts(".bubble") == ["a\nb日"]
    assert page.evaluate("document.activeElement.id") == "message"
    assert page.text("#status").strip() == "Bon dia!"  # read to people who do not see the page
    page.key("ArrowUp")
    page.wait("document.activeElement.closest('.editor')")


@in_browser
def test_each_control_has_a_name(page: Page, server: FakeServer):
    say(page, "Hola")
    page.click("#open-settings")
    controls = "[...document.querySelectorAll('button, input, textarea')].filter((node) => node.checkVisibility())"
    named = "node.textContent.trim() || node.ariaLabel || node.labels?.length"
    assert page.evaluate(f"{controls}.filter((node) => !({named})).map((node) => node.id || node.className)") == []
    assert page.evaluate(f"{controls}.length") > 20


@in_browser
def test_a_phone_has_a_drawer_and_nothing_wider_than_its_screen(browser: Browser, server: FakeServer):
    server.answer = lambda body: "paraulallarguíssima" * 30 + "\n\n```\n" + "codi " * 100 + "\n```"
    page = browser.open(server.url, 390, 844, touch=True)
    page.wait("server")
    assert not page.is_visible("#side")
    page.click("#message")
    page.type("llarguíssim" * 20)
    page.key("Enter")  # a touch keyboard has no Shift: Enter is a new line
    page.click("#send")
    page.wait("!runs.size")
    assert page.evaluate("document.querySelector('#scroll').scrollWidth") == 390
    page.click("#two")
    say_on_touch(page, "Hola")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.click("#menu")
    page.wait("document.querySelector('#side').getBoundingClientRect().x === 0")
    assert page.evaluate("[document.activeElement.id, document.querySelector('#main').inert]") == ["close-side", True]
    press(page, "Esborra")
    page.click("#side #toast button")  # in the drawer, which would cover it
    page.wait("document.querySelector('#list li')")
    page.key("Escape")
    page.wait("getComputedStyle(document.querySelector('#side')).visibility === 'hidden'")
    assert page.evaluate("[document.activeElement.id, document.querySelector('#main').inert]") == ["menu", False]
    page.click("#menu")
    page.click("#new")
    page.wait("document.querySelector('.empty') && !document.querySelector('#side').classList.contains('open')")
    page.click("#open-settings")
    assert page.evaluate("document.querySelector('#settings').getBoundingClientRect().width") <= 390
    page.close()


def say_on_touch(page: Page, text: str) -> None:
    page.click("#message")
    page.type(text)
    page.click("#send")
    page.wait("!runs.size")
