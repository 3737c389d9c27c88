from pathlib import Path

import pytest

from dd_lightning.cli import main
from tests import small
from tests.small import Cli


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
