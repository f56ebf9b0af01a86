"""Folders that are made once, whole or not at all."""

import pytest

from cucafera.data.prepared import PreparedDataError, prepare_once


def test_a_link_under_the_name_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "tokens.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(PreparedDataError, match="cannot write prepared tokens"):
        prepare_once("source", tmp_path / "tokens", lambda folder: folder.mkdir())
    assert (tmp_path / "precious").read_text() == "precious"
