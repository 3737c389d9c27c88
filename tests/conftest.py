"""Settings and fixtures for every test."""

import os
from pathlib import Path

import pytest
import torch

from tests import small

torch.set_num_threads(1)  # the suite runs in parallel processes; more threads than cores are slower by far
os.environ.setdefault("COLUMNS", "200")  # tables and errors are not wrapped


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four experts of three epochs; read only."""
    folder = tmp_path_factory.mktemp("experts") / "store"
    small.fit(folder.parent, small.module(folder), steps=1)
    assert len(list(folder.iterdir())) == small.EXPERTS
    return folder
