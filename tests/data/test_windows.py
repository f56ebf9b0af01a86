"""Batches of windows: what they hold, and their transfer to the device."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from cucafera.config.command_line import composed_config
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.conversations import ConversationWindows, TokenizedConversations
from cucafera.data.packed import DocumentData, StreamWindows
from cucafera.data.windows import IGNORED, Batch, OpenedSource, batch_of_windows
from cucafera.model.transformer import Decoder
from cucafera.training.data_module import WindowDataModule
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
    config = composed_config([*TINY, *overrides])
    return DocumentData(config, SimpleNamespace(fingerprint="x"), {"embedded": source}, [])


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
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())  # needs a GPU
    wanted = data.training_steps[0]
    for data.pin_memory in (False, True):
        given = next(iter(data.train_dataloader()))
        for batch in (given, move_data_to_device(given, torch.device("cpu"))):
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


def test_held_out_windows_are_spread_evenly_over_all():
    assert len(data_in_memory().validation[0]) == 100
    for wanted, expected in ((10, range(0, 100, 10)), (3, [0, 33, 66]), (100, range(100)), (500, range(100))):
        data = data_in_memory(f"data.validation_windows={wanted}")
        assert data.validation_positions() == [(0, number) for number in expected]
    assert len(data_in_memory("data.validation_windows=null").validation_positions()) == 100


@pytest.mark.parametrize(("devices", "windows"), [(1, 10), (2, 10), (4, 10), (8, 10), (2, 9), (4, 1)])
def test_each_held_out_window_is_evaluated_once_on_any_number_of_devices(devices, windows):
    data = data_in_memory(f"data.validation_windows={windows}")
    shares = [list(data.validation_batches(rank, devices)) for rank in range(devices)]
    assert len({len(share) for share in shares}) == 1  # every device takes part in every forward pass
    evaluated = [row.tolist() for share in shares for batch in share for row in batch.targets if (row != IGNORED).any()]
    expected = [data.validation[0].window(number).targets.tolist() for _, number in data.validation_positions()]
    assert sorted(evaluated) == sorted(expected) and len(expected) == windows
    assert all(len(batch.input_ids) <= 8 // devices for share in shares for batch in share)


def test_epochs_are_passes_over_the_mixture_of_sources():
    data = data_in_memory()  # 100 windows, 8 of them per step
    assert [data.epochs_at(step) for step in (0, 25, 50)] == [0.0, 2.0, 4.0]
    assert [data.steps_of(epochs) for epochs in (0.08, 0.081, 1, 2, 2.5)] == [1, 2, 13, 25, 32]
    twice = data_in_memory("data.sources.embedded.weight=2")
    assert (twice.epochs_at(25), twice.steps_of(1)) == (1.0, 25)


def test_overfitting_repeats_the_first_steps():
    steps = data_in_memory("data.overfit_steps=2").training_steps(())
    ids = [steps[step].input_ids for step in range(5)]
    assert torch.equal(ids[0], ids[2]) and torch.equal(ids[2], ids[4]) and torch.equal(ids[1], ids[3])
    assert not torch.equal(ids[0], ids[1])
    free = data_in_memory().training_steps(())
    assert torch.equal(ids[1], free[1].input_ids) and not torch.equal(ids[2], free[2].input_ids)


@pytest.mark.parametrize("skipped", [(5, 3, 4, 0), (0, 3, 4, 5), (3, 0, 5, 4)])
def test_skipped_batches_are_never_shown_in_whatever_order_they_were_skipped(skipped):
    data = data_in_memory()
    steps = data.training_steps(skipped)
    assert [steps.batch_at(step) for step in range(5)] == [1, 2, 6, 7, 8]
    assert torch.equal(steps[2].input_ids, data.training_steps(())[6].input_ids)


def test_a_step_has_the_windows_of_its_number_in_the_order_of_the_run():
    data = data_in_memory()
    for step in (0, 3):
        sources, numbers = data.order.windows(8 * step, 8)
        expected = [
            data.training[source].window(number).input_ids for source, number in zip(sources, numbers, strict=True)
        ]
        assert torch.equal(data.training_steps(())[step].input_ids, torch.from_numpy(np.stack(expected)))
