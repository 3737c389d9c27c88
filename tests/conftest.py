"""Settings for every test."""

import os

import pytest
import torch

torch.set_num_threads(1)  # the suite runs in parallel processes; more threads than cores are slower by far
os.environ.setdefault("COLUMNS", "200")  # tables and errors are not wrapped


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
