"""Where the published data sets lie, when this machine has them."""

import os
from pathlib import Path

import pytest


def real_root(folder: str) -> str:
    """Return the root that holds ``folder``, or skip the test that asks."""
    root = os.environ.get("DD_LIGHTNING_DATA")
    if root is None or not (Path(root) / folder).exists():
        pytest.skip(f"DD_LIGHTNING_DATA does not name a folder that holds {folder}")
    return root
