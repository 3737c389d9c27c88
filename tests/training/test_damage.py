"""A stored expert that is damaged is noticed when it is read."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from dd_lightning.functional.errors import InputError
from dd_lightning.training.expert_store import ExpertIdentity, ExpertState, ExpertStore

WIDTH = 6
IDENTITY = ExpertIdentity("net", ["w"], [[WIDTH]], "0" * 16, "data", {"lr": 0.1})


def stored(path: Path, trajectory: torch.Tensor) -> ExpertStore:
    store = ExpertStore(path)
    store.write({0: ExpertState(trajectory, momentum=torch.ones(WIDTH))}, IDENTITY, 0)
    return store


def flip(path: Path, value: float, bit: int) -> None:
    """Flip one bit of the first float32 of a value in a file."""
    raw = bytearray(path.read_bytes())
    place = raw.index(torch.tensor(value).numpy().tobytes())
    raw[place + bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


@pytest.mark.parametrize("bit", [0, 13, 22, 30])  # of the mantissa and the exponent
def test_a_flipped_bit(tmp_path: Path, bit: int) -> None:
    trajectory = torch.arange(3 * WIDTH).view(3, WIDTH) + 0.123
    store = stored(tmp_path, trajectory)
    flip(store.file(0), float(trajectory[1, 2]), bit)
    assert torch.equal(store.rows(0, [0, 2]), trajectory[[0, 2]])  # the others are whole
    with pytest.raises(InputError, match=r"expert_00000\.safetensors: .*epoch 1.*delete it"):
        store.rows(0, [2, 1])
    with pytest.raises(InputError, match=r"expert_00000\.safetensors: .*checksum.*delete it"):
        store.read(0)


def test_a_damaged_momentum(tmp_path: Path) -> None:
    store = stored(tmp_path, torch.zeros(2, WIDTH))
    flip(store.file(0), 1.0, 3)
    with pytest.raises(InputError, match="checksum"):
        store.read(0)


def test_an_expert_that_is_not_finite(tmp_path: Path) -> None:
    store = stored(tmp_path, torch.full((2, WIDTH), float("nan")))
    with pytest.raises(InputError, match="epoch 1 is not finite"):
        store.rows(0, [1])


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    store = stored(tmp_path, torch.ones(2, WIDTH))
    with safetensors.safe_open(str(store.file(0)), framework="pt") as file:
        metadata = file.metadata()["dd_lightning"]
    old = metadata[: metadata.index(', "checksums"')] + metadata[metadata.index("}", metadata.index("checksums")) + 1 :]
    tensors = safetensors.torch.load_file(store.file(0))
    safetensors.torch.save_file(tensors, store.file(0), {"dd_lightning": old})
    assert torch.equal(store.rows(0, [1]), torch.ones(1, WIDTH))
    assert torch.equal(store.read(0).trajectory, torch.ones(2, WIDTH))
