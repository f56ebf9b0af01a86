"""Generated texts side by side."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.evaluation.samples import CucaferaGenerator, TransformersGenerator, load_generator, write_samples
from cucafera.evaluation.samples_page import GeneratedText, ModelColumn, read_prompts, samples_page

CPU = torch.device("cpu")
SAMPLING = SamplingConfig(max_new_tokens=6, temperature=1.0)


@pytest.fixture
def foreign(base, tmp_path: Path) -> Path:
    """A GPT-2 of random weights in a Hugging Face folder."""
    folder = tmp_path / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_positions=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1)
    ).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(base.run.tokenizer), eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


class Page(HTMLParser):
    """The tags of a page, and the texts between them."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {"src", "href", "onclick"} & dict(attrs).keys()

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_has_prompts_as_rows_and_models_as_columns(base, chat, foreign, tmp_path):
    generators = [CucaferaGenerator(base), load_generator("outputs/chat", CPU), load_generator(str(foreign), CPU)]
    path = tmp_path / "samples.html"
    figures = write_samples(generators, ["la mar", "el <b>sol</b> & més"], SAMPLING, 3, path)
    content = path.read_text(encoding="utf-8")
    read = Page(content)
    assert [read.tags.count(tag) for tag in ("tr", "th", "td", "script", "b", "link", "img")] == [3, 6, 6, 0, 0, 0, 0]
    assert "el <b>sol</b> & més" in read.texts
    assert "continues" in content and "step-00000012.ckpt, after 12 steps; answers" in content
    assert "GPT2LMHeadModel of transformers" in content
    assert "temperature 1, top_k 50, top_p 0.9, min_p 0, seed 3 for each text" in content
    assert "cut at max_new_tokens, 6 tokens" in content
    assert [line.split()[0] for line in figures] == ["outputs/base", "outputs/chat", str(foreign)]
    for line in figures:
        assert line.split("  ")[-1].strip() in read.texts and " of 2 ended by themselves, " in line


def test_the_same_seed_gives_the_same_texts_in_any_order(base, foreign):
    for generator in (CucaferaGenerator(base), TransformersGenerator(str(foreign), CPU)):
        first = generator.write("la mar", SAMPLING, 0)
        generator.write("el sol", SAMPLING, 5)
        assert generator.write("la mar", SAMPLING, 0) == first
        assert len({generator.write("la mar", SAMPLING, seed).text for seed in range(5)}) > 1
        greedy = SamplingConfig(max_new_tokens=6, temperature=0.0)
        assert generator.write("la mar", greedy, 0) == generator.write("la mar", greedy, 1)


def test_a_long_prompt_is_truncated_from_the_left(base, foreign):
    greedy = SamplingConfig(max_new_tokens=6, temperature=0.0, repetition_penalty=1.0)
    for generator in (CucaferaGenerator(base), TransformersGenerator(str(foreign), CPU)):
        long = generator.write("el sol " * 300 + "la mar i el bosc " * 80, greedy, 0)
        assert long == generator.write("la mar i el bosc " * 80, greedy, 0)  # the beginning makes no difference
        assert long.finish_reason == "context"  # there is room for one token


def test_a_stop_text_ends_generation_of_either_backend(base, foreign):
    for generator in (CucaferaGenerator(base), TransformersGenerator(str(foreign), CPU)):
        complete = generator.write("la mar", SAMPLING, 0)
        stop = complete.text[2:4]
        stopped = generator.write("la mar", SamplingConfig(max_new_tokens=6, temperature=1.0, stop=[stop]), 0)
        assert (stopped.text, stopped.finish_reason) == (complete.text[: complete.text.index(stop)], "stop")


def test_an_empty_text_is_marked(base):
    assert "(empty)" in samples_page(
        [CucaferaGenerator(base).column], [("x", [GeneratedText(" ", "stop", 1)])], SAMPLING, 0
    )


def test_the_head_of_a_column_has_the_figures_of_all_its_texts():
    loop = GeneratedText("i la mar i el sol, " * 3, "length", 30)
    rows = [("p", [loop, GeneratedText("la mar", "stop", 2)]), ("q", [GeneratedText("el sol", "stop", 3)] * 2)]
    page = samples_page([ModelColumn("before", "f"), ModelColumn("after", "f")], rows, SAMPLING, 0)
    before, after = (
        "1 of 2 ended by themselves, 1 with a repeated 5-gram, 16 tokens on average",
        "2 of 2 ended by themselves, 0 with a repeated 5-gram, 2 tokens on average",
    )
    assert page.index(">before<") < page.index(before) < page.index(">after<") < page.index(after)
    assert page.count("repeated 5-gram</div>") == 1
    assert "cut at max_new_tokens, 30 tokens, repeated 5-gram</div>" in page


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("outputs/nowhere", "outputs/nowhere: there is no such run folder or checkpoint"),
        ("nowhere", "nowhere: there is no such run folder or checkpoint"),
        ("broken", "--compare broken: transformers cannot load it: "),
    ],
)
def test_a_model_that_cannot_be_loaded_is_an_error_of_one_line(base, tmp_path, monkeypatch, source, message):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        load_generator(source, CPU)
    assert "\n" not in str(raised.value)


def test_prompts_are_the_non_empty_lines_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffla mar \n\n el sol\n".encode())
    assert read_prompts(str(path)) == ["la mar", "el sol"]
    for content, message in ((b"\n", "holds no prompt"), (b"\xff", "is not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_prompts(str(path))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_prompts(str(tmp_path / "none"))


def test_the_page_keeps_the_indentation_of_a_text_and_shows_control_characters():
    page = samples_page(
        [ModelColumn("x\x1b[0m", "facts")], [("p", [GeneratedText("    f()\n", "stop", 3)])], SAMPLING, 0
    )
    assert '<div class="text">    f()\n</div>' in page
    assert "\x1b" not in page and "x\\x1b[0m" in page
