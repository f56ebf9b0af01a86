"""Texts of several models side by side, for a person to read: one page of HTML that needs nothing else."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from cucafera.config import SamplingConfig, UserError
from cucafera.data.chat import STOP_IDS, Message, render_prompt
from cucafera.data.files import write_text
from cucafera.data.tokenizer import DOCUMENT_START_ID
from cucafera.evaluation.likelihood import progress
from cucafera.evaluation.subject import Subject, load_subject
from cucafera.generation.generate import generate
from cucafera.interop.layout import is_hugging_face

PROMPTS = ("Catalunya és", "La meva àvia sempre deia que", "Per fer pa amb tomàquet,", "El dia que va ploure,")
"""For a model whose run shows nothing of itself."""
ENDINGS = {"stop": "ended by itself", "length": "cut at its longest", "context": "cut: the context is full"}

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; margin: 2rem; color: #1b1b1b; background: #fff; }
h1 { font-size: 1.3rem; } p { max-width: 60rem; color: #444; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; min-width: 48rem; }
th, td { border: 1px solid #ccc; padding: .6rem .7rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
thead th { position: sticky; top: 0; background: #f2f2f2; }
thead th:first-child { width: 16%; } tbody th { background: #fafafa; }
.text { white-space: pre-wrap; } .facts, .ended { font-size: .8rem; font-weight: normal; color: #666; }
"""


class Text(NamedTuple):
    """What a model wrote after a prompt.

    Attributes:
        text: The text, without the prompt.
        ended: Why it ended; see `generation.generate.Written`.
    """

    text: str
    ended: str


class Author(Protocol):
    """A model that writes.

    Attributes:
        name: What it was called on the command line.
        facts: What it is: parameters, checkpoint, and how it is asked.
    """

    name: str
    facts: str

    def write(self, prompt: str, sampling: SamplingConfig, seed: int) -> Text:
        """Continues a prompt, or answers it, if the model was trained on conversations."""
        ...


class OurAuthor:
    """A model of ours."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.name = subject.source
        self.facts = f"{subject.facts}; {'answers' if subject.chats else 'continues'}"

    def write(self, prompt: str, sampling: SamplingConfig, seed: int) -> Text:
        """See `Author.write`; of a prompt that is too long, the end is read."""
        model, tokenizer = self.subject.model, self.subject.tokenizer
        if self.subject.chats:
            ids = render_prompt([Message("user", prompt)], tokenizer)
        else:
            ids = [DOCUMENT_START_ID, *tokenizer.encode(prompt)]
        generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
        room = model.config.max_position_embeddings - 1
        (written,) = generate(model, tokenizer, [ids[-room:]], sampling, frozenset(STOP_IDS), generator)
        return Text(written.text, written.ended)


class TransformersAuthor:
    """A model that transformers loads: of another architecture, with another tokenizer.

    Args:
        name: A folder, or a name on the Hugging Face hub.
        device: Where it writes.

    Raises:
        UserError: transformers is missing, or cannot load it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise UserError(f"--beside {name} needs transformers: pip install '.[hf]'") from error
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        except Exception as error:  # whatever a file, the hub or a lost network raises
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise UserError(f"--beside {name}: transformers cannot load it: {reason}") from error
        self.model = model.to(device).eval()
        self.name = name
        self.chats = bool(getattr(self.tokenizer, "chat_template", None))
        kind, asked = type(self.model).__name__, "answers" if self.chats else "continues"
        self.facts = f"{self.model.num_parameters():,} parameters; {kind} of transformers; {asked}"

    @torch.inference_mode()
    def write(self, prompt: str, sampling: SamplingConfig, seed: int) -> Text:
        """See `Author.write`."""
        if self.chats:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        greedy = sampling.temperature == 0
        drawing: dict[str, float | None] = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
        context = getattr(self.model.config, "max_position_embeddings", None) or ids.shape[1] + sampling.max_new_tokens
        ids = ids[:, -(context - 1) :].to(self.model.device)
        room = min(sampling.max_new_tokens, context - ids.shape[1])
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=not greedy,
                repetition_penalty=sampling.repetition_penalty,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
                **({} if greedy else drawing | {"min_p": sampling.min_p or None}),
            )[0, ids.shape[1] :]
        if len(written) < room or self._is_end(int(written[-1])):
            ended = "stop"
        else:
            ended = "length" if room == sampling.max_new_tokens else "context"
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        if places := [text.index(stop) for stop in sampling.stop if stop in text]:
            return Text(text[: min(places)], "stop")
        return Text(text, ended)

    def _is_end(self, token: int) -> bool:
        ends = self.model.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends])


def author_called(source: str, device: torch.device) -> Author:
    """The model that --beside names: one of ours, or else one that transformers loads.

    Raises:
        UserError: it is neither.
    """
    try:
        return OurAuthor(load_subject(source, device))
    except UserError:
        if is_hugging_face(source):
            return TransformersAuthor(source, device)
        raise


def prompts_of_file(path: str) -> list[str]:
    """The lines of a file that are not empty. Raises UserError if there are none."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8 (byte 0x{error.object[error.start]:02x})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt: one stands on each line")
    return prompts


def write_page(
    authors: Sequence[Author], prompts: Sequence[str], sampling: SamplingConfig, seed: int, path: Path
) -> None:
    """Has each model write after each prompt, with the same seed, and writes the page.

    Raises:
        UserError: it cannot be written.
    """
    rows = []
    with progress("Writing", len(prompts) * len(authors)) as bar:
        for prompt in prompts:
            texts = []
            for author in authors:
                texts.append(author.write(prompt, sampling, seed))
                bar.update()
            rows.append((prompt, texts))
    try:
        write_text(path, page(authors, rows, sampling, seed))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def page(
    authors: Sequence[Author], rows: Sequence[tuple[str, Sequence[Text]]], sampling: SamplingConfig, seed: int
) -> str:
    """The page: prompts are rows, models are columns; all texts are escaped."""
    said: Callable[[str], str] = html.escape
    drawn = (
        "always the likeliest token"
        if sampling.temperature == 0
        else f"temperature {sampling.temperature:g}, top_k {sampling.top_k}, top_p {sampling.top_p:g}, "
        f"min_p {sampling.min_p:g}, seed {seed} for each text"
    )
    how = f"{drawn}; repetition_penalty {sampling.repetition_penalty:g}; at most {sampling.max_new_tokens:,} tokens"
    heads = "".join(
        f'<th scope="col">{said(author.name)}<div class="facts">{said(author.facts)}</div></th>' for author in authors
    )
    body = "\n".join(
        f'<tr><th scope="row">{said(prompt)}</th>'
        + "".join(
            f'<td><div class="text">{said(text.text.strip()) or "(nothing)"}</div>'
            f'<div class="ended">{ENDINGS.get(text.ended, said(text.ended))}</div></td>'
            for text in texts
        )
        + "</tr>"
        for prompt, texts in rows
    )
    return (
        '<!DOCTYPE html>\n<html lang="ca">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Samples of {said(', '.join(author.name for author in authors))}</title>\n<style>{STYLE}</style>\n"
        f'</head>\n<body>\n<h1 lang="en">Samples</h1>\n<p lang="en">{said(how)}.</p>\n'
        f'<table>\n<thead><tr><th scope="col" lang="en">prompt</th>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table>\n</body>\n</html>\n"
    )
