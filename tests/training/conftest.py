"""Fixtures of the training tests."""

import os

import pytest


@pytest.fixture
def set_umask():
    """Set the umask; it is set back after the test."""
    if os.name != "posix":
        pytest.skip("files have other permissions")
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)
