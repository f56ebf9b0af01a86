"""Batches of windows."""

import numpy as np
import torch

from cucafera.data.packed import batch_of_windows
from cucafera.data.tokenizer import DOCUMENT_START_ID

WINDOWS = np.array([[7, 8, DOCUMENT_START_ID, 9, 10, DOCUMENT_START_ID, 11]] * 5, dtype=np.uint16)


def test_targets_are_the_next_tokens_and_documents_are_numbered_from_their_start_tokens():
    batch = batch_of_windows(WINDOWS, document_masking=True)
    assert batch.input_ids[0].tolist() == [7, 8, 1, 9, 10, 1]
    assert batch.targets[0].tolist() == [8, 1, 9, 10, 1, 11]
    assert batch.documents is not None
    assert batch.documents[0].tolist() == [0, 0, 1, 1, 1, 2]
    assert batch_of_windows(WINDOWS, document_masking=False).documents is None


def test_a_split_batch_holds_every_window_once():
    batch = batch_of_windows(WINDOWS, document_masking=True)
    parts = list(batch.split(2))
    assert [len(part.input_ids) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
