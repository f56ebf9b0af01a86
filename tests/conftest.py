"""A small corpus and a small run, made by the tests themselves."""

import functools
import json
import os
import random
from pathlib import Path

import pytest
import torch

from cucafera.composition import composed_config
from cucafera.config import Config
from cucafera.run import train

SMALL_RUN = [
    "data=files",
    "trainer=cpu",
    "data.processes=1",
    "data.validation_fraction=0.2",
    "data.prepared_dir=prepared",
    "model.vocab_size=320",
    "model.hidden_size=48",
    "model.intermediate_size=96",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=32",
    "batch_tokens=256",
    "budget_tokens=3072",
    "schedule.warmup_steps=2",
    "callbacks.log_every_steps=1",
    "callbacks.validate_every_steps=4",
    "callbacks.checkpoint_every_steps=4",
    "callbacks.sampling.max_new_tokens=8",
]
"""Twelve steps of eight windows of 32 tokens: seconds on any machine."""

CUCAFERA = composed_config(["+experiment=pretrain"]).model
"""The 245M model, from its preset."""

torch.set_num_threads(1)  # for models this small, threads only get in each other's way

WORDS = (
    "la el un una de a que i en no per amb és casa mar muntanya riu bosc gat gos nen nena avi àvia poble ciutat camí "
    "pluja sol vent núvol neu nit dia matí tarda pa vi oli tomàquet sopar taula porta finestra carrer plaça església "
    "cel·la col·legi ànima fàcil difícil corre canta menja dorm parla mira vol té va ve fa diu veu sap"
).split()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A jsonl file of 80 short documents."""
    path = tmp_path / "corpus.jsonl"
    write_corpus(path, documents=80)
    return path


def write_corpus(path: Path, documents: int, seed: int = 0) -> None:
    """Sentences of Catalan words in random order, the same for the same seed."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            sentences = [" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) + "." for _ in range(8)]
            file.write(json.dumps({"text": " ".join(sentences)}, ensure_ascii=False) + "\n")


@pytest.fixture
def small_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Composes the small run with further overrides; its run folder is outputs/NAME below the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(compose_small_run, corpus)


def compose_small_run(corpus: Path, *overrides: str) -> Config:
    """The small run on a corpus, with further overrides."""
    return composed_config([*SMALL_RUN, f"data.sources.files.path={corpus}", *overrides])


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model in outputs/base and a chat model in outputs/chat, of twelve steps; context 128."""
    folder = tmp_path_factory.mktemp("runs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, documents=80)
        shown = "callbacks.prompts=[la mar,el sol]"
        train(compose_small_run(corpus, "name=base", "model.max_position_embeddings=128", shown), [])
        train(compose_small_chat(folder, "name=chat", "init_from=outputs/base", "optimizer.lr=1e-2"), [])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def small_chat(small_run, tmp_path: Path):
    """Composes a small finetuning run with further overrides, on conversations that the test makes."""
    return functools.partial(compose_small_chat, tmp_path)


def compose_small_chat(folder: Path, *overrides: str) -> Config:
    """A run of twelve steps on conversations that it writes into a folder."""
    generator = random.Random(0)
    rows = [
        {
            "messages": [
                {"role": role, "content": " ".join(generator.choices(WORDS, k=generator.randint(1, 4)))}
                for _ in range(generator.randint(1, 2))
                for role in ("user", "assistant")
            ]
        }
        for _ in range(120)
    ]
    path = folder / "chat.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = [override for override in SMALL_RUN if not override.startswith(("data=", "model."))]
    return composed_config(
        [*settings, "model=inherited", "data=chat_files", f"data.sources.files.path={path}", "callbacks=chat",
         "callbacks.sampling.max_new_tokens=8", "batch_tokens=512", "budget_tokens=6144", *overrides]
    )  # fmt: skip
