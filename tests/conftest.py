"""Settings and fixtures for every test."""

import os
from pathlib import Path

import pytest
import torch

from dd_lightning.cli.main import main
from tests import small
from tests.small import Cli

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


@pytest.fixture(scope="session")
def digits_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like ``store``, of the digits; made by the command line."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards: the command sets it
        main(["fit", *small.command_line(folder, folder / "store"), "--trainer.max_steps", "1", "--evaluation", "null"])
    assert len(list((folder / "store").iterdir())) == small.EXPERTS
    return folder / "store"


@pytest.fixture
def cli(tmp_path: Path, digits_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line, in a folder of its own."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("COLUMNS", "300")  # tables in whole lines
    monkeypatch.chdir(tmp_path)
    return Cli(tmp_path, digits_store, capsys)
