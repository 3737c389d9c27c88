"""A damaged expert is an error, or left out where that is allowed."""

import shutil
from pathlib import Path

import pytest

from dd_lightning.functional.errors import InputError
from tests import small


@pytest.fixture
def damaged(store: Path, tmp_path: Path) -> Path:
    """A store with one expert whose numbers are damaged, and one that is cut off."""
    copy = tmp_path / "damaged"
    shutil.copytree(store, copy)
    flipped = bytearray((copy / "expert_00001.safetensors").read_bytes())
    start = 8 + int.from_bytes(flipped[:8], "little")
    for place in range(start, len(flipped), 16):
        flipped[place] ^= 1
    (copy / "expert_00001.safetensors").write_bytes(flipped)
    cut = (copy / "expert_00003.safetensors").read_bytes()
    (copy / "expert_00003.safetensors").write_bytes(cut[:-10])
    return copy


def test_damaged_experts_are_errors(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expert_00003\.safetensors.*damaged.*delete it"):
        small.fit(tmp_path, small.module(damaged))
    (damaged / "expert_00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"expert_00001\.safetensors.*checksum.*delete it"):
        small.fit(tmp_path, small.module(damaged, {"num_experts": 3}), small.selection())


def test_or_left_out(damaged: Path, store: Path, tmp_path: Path) -> None:
    module = small.module(damaged, {"skip_damaged": True})
    with pytest.warns(UserWarning, match=r"2 of 4 experts are left out: .*expert_00001.*; .*expert_00003"):
        small.fit(tmp_path, module)
    assert len(module.pool) == 2
    assert {module.pool.load((place, 0)).key for place in range(2)} == {(0, 0), (1, 0)}
    with (
        pytest.warns(UserWarning, match="are left out"),
        pytest.raises(InputError, match="experts that are whole is 2; it must be at least 3"),
    ):
        small.fit(tmp_path, small.module(damaged, {"skip_damaged": True}), small.selection(pool_size=3))
    whole, allowed = small.module(store), small.module(store, {"skip_damaged": True})
    small.fit(tmp_path, whole)
    small.fit(tmp_path, allowed)
    assert small.same(small.learned(whole), small.learned(allowed))
