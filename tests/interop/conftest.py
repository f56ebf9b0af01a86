"""Models of Hugging Face, made by the tests with transformers."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.support import full_tokenizer, small_llama

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def published_chat(tmp_path: Path) -> Path:
    """A folder laid out like the published chat model: ChatML's tokens come after a full vocabulary."""
    folder = tmp_path / "published"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=full_tokenizer(65_536))
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
        }
    )
    tokenizer.chat_template = CHATML
    model = small_llama(vocab_size=65_536, hidden_act="gelu")
    model.resize_token_embeddings(65_538)
    model.config.eos_token_id = 65_537
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of transformers that can be taken as it stands."""
    path = tmp_path / "model"
    small_llama().save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=full_tokenizer(320), eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(path)
    return path
