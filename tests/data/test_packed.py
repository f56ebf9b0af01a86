"""Windows of a token stream, and batches of them."""

import torch

from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.packed import StreamWindows
from cucafera.data.windows import batch_of_windows
from tests.support import Stream

START = DOCUMENT_START_ID


def test_targets_are_the_next_tokens_and_documents_are_numbered_from_their_start_tokens():
    windows = StreamWindows(Stream([7, 8, START, 9, 10, START, 11, 12]), 6)
    assert len(windows) == 1
    window = windows.window(0)
    assert window.input_ids.tolist() == [7, 8, START, 9, 10, START]
    assert window.targets.tolist() == [8, START, 9, 10, START, 11]
    assert window.documents.tolist() == [0, 0, 1, 1, 1, 2]


def test_each_window_begins_with_the_last_target_of_the_one_before():
    windows = StreamWindows(Stream(list(range(10, 65_536, 3))), 128)
    for number in range(len(windows) - 1):
        assert windows.window(number).targets[-1] == windows.window(number + 1).input_ids[0]


def test_a_batch_holds_windows_side_by_side_and_splits_into_parts_that_hold_each_once():
    windows = StreamWindows(Stream([START, *range(10, 40)]), 6)
    batch = batch_of_windows([windows.window(number) for number in range(5)], document_masking=True)
    assert batch.input_ids.shape == batch.targets.shape == batch.documents.shape == (5, 6)
    assert batch.input_ids.dtype == batch.targets.dtype == batch.documents.dtype == torch.int32
    parts = list(batch.split(2))
    assert [len(part.input_ids) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert batch_of_windows([windows.window(0)], document_masking=False).documents is None
