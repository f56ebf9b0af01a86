"""The tests of the package."""

import pytest

pytest.register_assert_rewrite("tests.support")  # its assertions show both sides too
