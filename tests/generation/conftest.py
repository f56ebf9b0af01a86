"""A small tokenizer, and a small model of transformers and of this package with the same weights."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cucafera.data.tokenizer import Tokenizer
from cucafera.model.transformer import Decoder
from tests.generation.models import CONFIG


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    texts = ["la mar i el bosc, l'avi cantava cançons 🐌 € " * 5] * 20
    return Tokenizer.train(texts, vocab_size=300)


@pytest.fixture(scope="package")
def theirs() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**dataclasses.asdict(CONFIG), tie_word_embeddings=True)).eval()


@pytest.fixture(scope="package")
def model(theirs: LlamaForCausalLM) -> Decoder:
    decoder = Decoder(CONFIG)
    decoder.load_state_dict(theirs.model.state_dict())
    return decoder.requires_grad_(False)
