"""Batches of windows: what they hold, their transfer to the device, and the shared memory that they need."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from cucafera.config.command_line import composed_config
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.conversations import ConversationWindows, TokenizedConversations
from cucafera.data.packed import DocumentData, StreamWindows
from cucafera.data.windows import IGNORED, Batch, OpenedSource, batch_of_windows
from cucafera.model.transformer import Decoder
from cucafera.training import data_module as data_modules
from cucafera.training.data_module import WindowDataModule, free_shared_memory
from tests.support import Stream, assert_equal

TINY = ["model.vocab_size=320", "model.max_position_embeddings=32", "batch_tokens=256", "budget_tokens=2560",
        "schedule.warmup_steps=0"]  # fmt: skip


def stream_windows(length: int = 32) -> StreamWindows:
    """A hundred windows of documents of 1 to 20 tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = []
    while len(tokens) <= 100 * length:
        size = int(torch.randint(0, 20, (), generator=generator))
        tokens += [DOCUMENT_START_ID, *torch.randint(10, 320, (size,), generator=generator).tolist()]
    return StreamWindows(Stream(tokens), length)


def batch_of(count: int, document_masking: bool = True) -> Batch:
    source = stream_windows()
    return batch_of_windows([source.window(number) for number in range(count)], document_masking)


def data_in_memory(*overrides: str) -> DocumentData:
    """The data of a run, from a stream in memory."""
    source = OpenedSource(stream_windows(), stream_windows(), "fingerprint")
    return DocumentData(composed_config([*TINY, *overrides]), SimpleNamespace(fingerprint="x"), {"embedded": source})


def data_module(workers: int, *overrides: str) -> WindowDataModule:
    module = WindowDataModule(data_in_memory(*overrides), num_workers=workers)
    module.setup()
    return module


def test_documents_are_counted_window_by_window():
    batch = batch_of(5)
    assert batch.document_counts == tuple(len(set(row)) for row in batch.documents.tolist())
    assert all(type(count) is int for count in batch.document_counts)
    assert len(set(batch.document_counts)) > 1
    assert batch_of(5, document_masking=False).document_counts is None


def test_the_padding_after_conversations_is_counted_as_a_document():
    lengths = [3, 4, 5, 6, 7]
    ids = np.arange(10, 10 + sum(lengths), dtype=np.uint16)
    source = ConversationWindows(TokenizedConversations(ids, np.ones(len(ids), bool), np.cumsum(lengths)), 8)
    batch = batch_of_windows([source.window(number) for number in range(len(source))], document_masking=True)
    assert batch.document_counts == tuple(len(set(row)) for row in batch.documents.tolist())
    padded = (batch.targets[:, -1] == IGNORED).tolist()
    assert sum(batch.document_counts) == source.kept + sum(padded)
    assert True in padded and False in padded


def test_counts_are_split_with_their_windows_and_a_window_that_is_added_is_one_document():
    batch = batch_of(5)
    parts = [part.document_counts for part in batch.split(2)]
    assert parts == [batch.document_counts[:2], batch.document_counts[2:4], batch.document_counts[4:]]
    padded = batch.padded(7)
    assert padded.document_counts == (*batch.document_counts, 1, 1)
    assert padded.document_counts == tuple(len(set(row)) for row in padded.documents.tolist())
    assert (padded.targets[5:] == IGNORED).all()
    without = batch_of(5, document_masking=False)
    assert without.padded(7).document_counts is None
    assert [part.document_counts for part in without.split(3)] == [None, None]


def test_a_batch_comes_unchanged_out_of_workers_pinned_memory_and_the_transfer_to_a_device(monkeypatch):
    data = data_module(workers=2)
    given = next(iter(data.train_dataloader()))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a GPU
    wanted = data.training_steps[0]
    for batch in (given, pin_memory(given), move_data_to_device(given, torch.device("cpu"))):
        assert type(batch) is Batch
        assert batch.document_counts == wanted.document_counts
        assert all(map(torch.equal, batch[:3], wanted[:3]))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_int32_gives_the_loss_gradients_and_scores_of_int64_to_the_bit(compiled):
    config = composed_config(TINY).model
    batch = batch_of(4)
    found = []
    for dtype in (torch.int32, torch.int64):
        torch.manual_seed(0)
        model = Decoder(config)
        if compiled:
            model.compile(dynamic=False, backend="aot_eager_decomp_partition")  # without building its kernels
        arguments = batch.input_ids.to(dtype), batch.targets.to(dtype), batch.documents
        loss = model(*arguments)
        loss.backward()
        with torch.no_grad():
            nats, correct = model.loss_and_accuracy(*arguments)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append({"loss": loss.detach(), "nats": nats, "correct": correct, **gradients})
    assert_equal(*found)


def test_the_size_of_a_batch_is_that_of_its_tensors():
    for overrides in ([], ["data.document_masking=false"]):
        steps = data_module(0, *overrides).training_steps
        assert steps.batch_bytes == sum(part.nbytes for part in steps[0][:3] if part is not None)


def test_workers_whose_batches_do_not_fit_into_shared_memory_are_not_started_with_a_warning(monkeypatch, caplog):
    needed = 2 * 3 * 3 * 4 * 256  # workers, batches of each, tensors, bytes of a number, tokens
    data = data_module(workers=2)
    free = {"enough": needed, "none known": None, "too little": needed - 1}
    workers = {}
    with caplog.at_level(logging.WARNING):
        for name, size in free.items():
            monkeypatch.setattr(data_modules, "free_shared_memory", lambda folder, size=size: size)
            assert not caplog.records
            workers[name] = data.train_dataloader().num_workers
    assert workers == {"enough": 2, "none known": 2, "too little": 0}
    (record,) = caplog.records
    assert "/dev/shm has 0 MB free, and the batches of 2 data loader workers need 0 MB" in record.getMessage()
    assert torch.equal(next(iter(data.train_dataloader())).input_ids, data.training_steps[0].input_ids)


def test_the_workers_of_the_default_batch_fit_the_shared_memory_of_a_container():
    steps = data_in_memory("+experiment=pretrain", "data=embedded").training_steps(())
    assert 2 * (data_modules.PREFETCHED_BATCHES + 1) * steps.batch_bytes < 64e6


def test_shared_memory_is_measured_where_there_is_some(tmp_path):
    assert 0 < free_shared_memory(tmp_path) < 1 << 60
    assert free_shared_memory(tmp_path / "nowhere") is None
