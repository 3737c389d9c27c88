"""Experts of MTT's replay buffers in our store."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
from dd_lightning.training.replay_buffers import UNKNOWN_SEED, import_replay_buffers
from tests import small
from tests.small import Cli

EPOCHS = small.EPOCHS


def as_buffer(rows: Tensor, network: FunctionalNetwork) -> list[list[Tensor]]:
    """Cut the rows of a trajectory into parameters."""
    sizes = [torch.Size(shape).numel() for shape in network.parameter_shapes]
    return [
        [part.view(shape).clone() for part, shape in zip(row.split(sizes), network.parameter_shapes, strict=True)]
        for row in rows
    ]


@pytest.fixture
def network() -> FunctionalNetwork:
    return FunctionalNetwork(small.NETWORK, small.SHAPE, small.CLASSES)


@pytest.fixture
def buffers(store: Path, network: FunctionalNetwork, tmp_path: Path) -> list[str]:
    """Two files of the experts of the store, three and one."""
    experts = [as_buffer(ExpertStore(store).read(id).trajectory, network) for id in range(small.EXPERTS)]
    for number, part in enumerate((experts[:3], experts[3:])):
        torch.save(part, tmp_path / f"replay_buffer_{number}.pt")
    return [str(tmp_path / f"replay_buffer_{number}.pt") for number in range(2)]


def imported(files: list[str], network: FunctionalNetwork, target: ExpertStore, epochs: int = EPOCHS) -> list[float]:
    data = small.data()
    identity = ExpertIdentity.of(network, small.RECIPE, EPOCHS, fingerprint=data.fingerprint, dataset=data.name)
    return import_replay_buffers(files, network, target, identity, epochs, data.test)


def test_a_run_on_imported_experts_is_the_run_on_the_originals(
    store: Path, network: FunctionalNetwork, buffers: list[str], tmp_path: Path
) -> None:
    target = ExpertStore(tmp_path / "imported")
    accuracies = imported(buffers, network, target)
    original = ExpertStore(store)
    assert target.ids() == original.ids()
    for id in original.ids():
        assert torch.equal(target.read(id).trajectory, original.read(id).trajectory)
        assert original.metadata(id).accuracies.held_out[-1] == accuracies[id]
        assert target.metadata(id).accuracies.held_out == [None] * (EPOCHS - 1) + [accuracies[id]]
        assert target.metadata(id).seed == UNKNOWN_SEED
    learned = []
    for path in (store, target.path):
        distilled = small.module(path, {"train_missing": False})
        small.fit(tmp_path / path.name, distilled, steps=2)
        learned.append(small.learned(distilled))
    assert small.same(*learned)


def test_experts_of_another_color_space_are_warned_of(
    network: FunctionalNetwork, tmp_path: Path, buffers: list[str]
) -> None:
    torch.save([as_buffer(torch.zeros(EPOCHS + 1, network.num_parameters), network)], tmp_path / "zeros.pt")
    with pytest.warns(UserWarning, match=r"right about .*% of the test images; .*--data.color_space"):
        imported([str(tmp_path / "zeros.pt")], network, ExpertStore(tmp_path / "imported"))


def test_bad_buffers(network: FunctionalNetwork, buffers: list[str], tmp_path: Path, store: Path) -> None:
    def refused(message: str, **changes: Any) -> None:  # noqa: ANN401
        new = ExpertStore(tmp_path / "new")
        options: dict[str, Any] = {"files": buffers, "network": network, "target": new} | changes
        with pytest.raises(InputError, match=message) as error:
            imported(**options)
        assert "\n" not in str(error.value)
        assert new.ids() == []

    refused("has 4 experts; give another path", target=ExpertStore(store))
    refused("experts of 3 epochs, but epochs is 5", epochs=5)
    other = FunctionalNetwork("ConvNet-1-W5", small.SHAPE, small.CLASSES)
    refused(r"parameters \(4, 1, 3, 3\), .* but ConvNet-1-W5 has \(5, 1, 3, 3\)", network=other)
    normed = FunctionalNetwork("ConvNet-1-W4-BN", small.SHAPE, small.CLASSES)
    refused("batch norm", network=normed)
    odd: list[Any] = [{}, [], [[]], [[[1], [2]]], torch.zeros(3), [torch.zeros(3)]]
    for content in odd:
        torch.save(content, tmp_path / "odd.pt")
        refused("is no list of experts", files=[str(tmp_path / "odd.pt")])
    refused("there is no file", files=[str(tmp_path / "none.pt")])


@pytest.mark.slow
def test_from_the_command_line(cli: Cli, digits_store: Path, tmp_path: Path) -> None:
    network = FunctionalNetwork(small.NETWORK, (1, 8, 8), 10)
    original = ExpertStore(digits_store)
    torch.save([as_buffer(original.read(id).trajectory, network) for id in original.ids()], tmp_path / "buffer.pt")
    recipe = original.metadata(0).identity.recipe
    options = ["--network", small.NETWORK, "--data", "DigitsDataModule", "--epochs", str(original.epochs(0))]
    options += [f"--recipe.{name}={recipe[name]}" for name in ("lr", "batch_size")]
    cli("experts", "--buffers", str(tmp_path / "buffer.pt"), "--path", str(tmp_path / "new"), *options)
    assert " % on the test images after 3 epochs" in cli.out
    assert "4 experts in " in cli.out
    cli.fit("--model.pool.path", str(tmp_path / "new"), "--model.pool.train_missing", "false", "--trainer.max_steps=1")
