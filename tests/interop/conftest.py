"""Models of Hugging Face, made by the tests with transformers."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cucafera.config import SPECIAL_TOKENS
from cucafera.data.tokenizer import BYTE_OF_CHARACTER

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def full_tokenizer(entries: int) -> tokenizers.Tokenizer:
    """A byte-level BPE with the package's control tokens and so many entries; its merges are pairs of bytes."""
    letters = list(BYTE_OF_CHARACTER)
    pairs = [(first, second) for first in letters for second in letters][: entries - len(SPECIAL_TOKENS) - len(letters)]
    words = [*SPECIAL_TOKENS, *letters, *(first + second for first, second in pairs)]
    assert len(words) == entries
    tokenizer = tokenizers.Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    return tokenizer


def small_llama(**changes) -> LlamaForCausalLM:
    """A random model of transformers."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.fixture
def published_chat(tmp_path: Path) -> Path:
    """A folder laid out like the published chat model: ChatML's tokens stand behind a full vocabulary."""
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


def change_config(folder: Path, **fields) -> None:
    """Sets fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
