from pathlib import Path

import pytest

from tests import small


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four experts of three epochs; read only."""
    folder = tmp_path_factory.mktemp("experts") / "store"
    small.fit(folder.parent, small.module(folder), steps=1)
    assert len(list(folder.iterdir())) == small.EXPERTS
    return folder
