"""Generated texts of several models, side by side: of this package, and of what transformers loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.chatml import STOP_IDS, Message, render_prompt
from cucafera.evaluation.evaluated_model import EvaluatedModel, load_evaluated_model
from cucafera.evaluation.progress import progress_bar
from cucafera.evaluation.samples_page import GeneratedText, ModelColumn, describe_texts, samples_page
from cucafera.generation.generate import generate
from cucafera.interop.hf_spec import folder_of
from cucafera.quantities import number_of
from cucafera.runs.locate import is_hugging_face
from cucafera.storage import write_text


class TextGenerator(Protocol):
    """A model that generates text.

    Attributes:
        column: Its name on the command line; its parameters, checkpoint, and if it answers or continues.
    """

    column: ModelColumn

    def write(self, prompt: str, sampling: SamplingConfig, seed: int) -> GeneratedText:
        """Continue a prompt, or answer it if the model was trained on conversations."""
        ...


class CucaferaGenerator:
    """A `TextGenerator` of this package."""

    def __init__(self, evaluated: EvaluatedModel) -> None:
        self.evaluated = evaluated
        mode = "answers" if evaluated.chats else "continues"
        self.column = ModelColumn(evaluated.source, f"{evaluated.facts}; {mode}")

    def write(self, prompt: str, sampling: SamplingConfig, seed: int) -> GeneratedText:
        """See `TextGenerator.write`; a prompt that is too long is truncated from the left."""
        model, tokenizer = self.evaluated.model, self.evaluated.tokenizer
        if self.evaluated.chats:
            ids = render_prompt([Message("user", prompt)], tokenizer)
        else:
            ids = [DOCUMENT_START_ID, *tokenizer.encode(prompt)]
        ids = ids[-(model.config.max_position_embeddings - 1) :]  # one position is left for the first new token
        (written,) = generate(model, tokenizer, [ids], sampling, frozenset(STOP_IDS), seed)
        return GeneratedText(written.text, written.finish_reason, len(written.ids))


class TransformersGenerator:
    """A `TextGenerator` that transformers loads: any architecture, with its own tokenizer.

    Args:
        name: A folder, or a name on the Hugging Face hub.
        device: Where it runs.

    Raises:
        UserError: transformers is not installed, or cannot load it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise UserError(f"--compare {name} needs transformers: pip install '.[hf]'") from error
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        except Exception as error:  # files, the hub and the network raise many classes
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise UserError(f"--compare {name}: transformers cannot load it: {reason}") from error
        self.model = model.to(device).eval()
        self.chats = bool(getattr(self.tokenizer, "chat_template", None))
        architecture, mode = type(self.model).__name__, "answers" if self.chats else "continues"
        facts = f"{number_of(self.model.num_parameters(), 'parameter')}; {architecture} of transformers; {mode}"
        self.column = ModelColumn(name, facts)

    @torch.inference_mode()
    def write(self, prompt: str, sampling: SamplingConfig, seed: int) -> GeneratedText:
        """See `TextGenerator.write`; a prompt that is too long is truncated from the left."""
        ids = self._encode(prompt)
        context = getattr(self.model.config, "max_position_embeddings", None) or ids.shape[1] + sampling.max_new_tokens
        ids = ids[:, -(context - 1) :].to(self.model.device)
        max_new_tokens = min(sampling.max_new_tokens, context - ids.shape[1])
        greedy = sampling.temperature == 0
        drawing: dict[str, float | None] = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }
        # generate() draws from torch's global generator only.
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=not greedy,
                repetition_penalty=sampling.repetition_penalty,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
                **({} if greedy else drawing),
            )[0, ids.shape[1] :]
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        if positions := [text.index(stop) for stop in sampling.stop if stop in text]:
            text = text[: min(positions)]
            return GeneratedText(text, "stop", len(self.tokenizer(text, add_special_tokens=False).input_ids))
        is_ended = self._is_eos(int(written[-1]))
        tokens = len(written) - is_ended
        if is_ended or len(written) < max_new_tokens:
            return GeneratedText(text, "stop", tokens)
        return GeneratedText(text, "length" if max_new_tokens == sampling.max_new_tokens else "context", tokens)

    def _encode(self, prompt: str) -> torch.Tensor:
        if not self.chats:
            ids: torch.Tensor = self.tokenizer(prompt, return_tensors="pt").input_ids
            return ids
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return ids

    def _is_eos(self, token: int) -> bool:
        eos = self.model.generation_config.eos_token_id
        return token in (eos if isinstance(eos, list) else [eos])


def load_generator(source: str, device: torch.device) -> TextGenerator:
    """Load the model that --compare names: one of this package, else one that transformers loads.

    Raises:
        UserError: it is neither.
    """
    try:
        return CucaferaGenerator(load_evaluated_model(source, device))
    except UserError:
        if not is_hugging_face(source):
            raise
        folder_of(source, with_weights=False)  # raises for a name that is not there, before transformers is imported
        return TransformersGenerator(source, device)


def write_samples(
    generators: Sequence[TextGenerator], prompts: Sequence[str], sampling: SamplingConfig, seed: int, path: Path
) -> list[str]:
    """Let each model write after each prompt, with the same seed, and write the page.

    Returns:
        A line per model: its name, and figures of its texts.

    Raises:
        UserError: the page cannot be written.
    """
    rows: list[tuple[str, list[GeneratedText]]] = []
    with progress_bar("Writing", len(prompts) * len(generators)) as bar:
        for prompt in prompts:
            texts = []
            for generator in generators:
                texts.append(generator.write(prompt, sampling, seed))
                bar.update()
            rows.append((prompt, texts))
    try:
        write_text(path, samples_page([generator.column for generator in generators], rows, sampling, seed))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    width = max(len(generator.column.name) for generator in generators)
    return [
        f"{generator.column.name:<{width}}  {describe_texts([texts[number] for _, texts in rows])}"
        for number, generator in enumerate(generators)
    ]
