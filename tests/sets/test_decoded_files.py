"""The file of a set that is decoded: it says by itself what networks are trained on."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors
import safetensors.torch
import torch

from dd_lightning.callbacks import SyntheticSetWriter
from dd_lightning.cli.report import percent
from dd_lightning.sets.synthetic_file import load_synthetic
from dd_lightning.training import evaluation
from dd_lightning.training.evaluation import EvaluationRecipe
from tests import small
from tests.small import Cli

FILE = SyntheticSetWriter.FILE


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1, "single", "network", 2)),
        ({"factor": 2}, (2, "single", "network", 8)),
        ({"factor": 2, "image_space": "pixels"}, (2, "single", "pixels", 8)),
        ({"factor": 3, "formation": "multi", "image_space": "pixels"}, (3, "multi", "pixels", 28)),
    ],
)
@pytest.mark.parametrize("kind", ["normalized", "zca"])
def test_the_file_decodes_as_the_module_did(
    tmp_path: Path, options: dict[str, Any], expected: tuple[object, ...], kind: str
) -> None:
    distilled = small.network_module(image_lr=0.01, **options)
    small.fit(tmp_path, distilled, SyntheticSetWriter(), steps=2, datamodule=small.data(color_space=kind))
    file, synthetic = load_synthetic(tmp_path / FILE), distilled.synthetic_set
    assert (file.factor, file.formation, file.stored_as, file.effective_ipc) == expected
    assert (file.ipc, file.step, file.lr, file.objective) == (2, 2, None, "GradientMatching")
    assert file.color_space == kind
    assert torch.equal(file.images, synthetic.images)
    images, targets = file.training_set()
    assert torch.equal(images, synthetic.decoded())
    assert torch.equal(targets, synthetic.decoded_targets())


def test_a_learned_rate_is_kept(store: Path, tmp_path: Path) -> None:
    distilled = small.module(store, factor=2)
    small.fit(tmp_path, distilled, SyntheticSetWriter(), steps=2)
    file = load_synthetic(tmp_path / FILE)
    assert file.lr == distilled.distillation.student_lr != 0.05
    assert (file.factor, file.effective_ipc) == (2, 8)


def test_a_file_of_version_1_is_loaded(store: Path, tmp_path: Path) -> None:
    distilled = small.module(store)
    small.fit(tmp_path, distilled, SyntheticSetWriter(), steps=1)
    with safetensors.safe_open(str(tmp_path / FILE), framework="pt") as written:
        values = json.loads(written.metadata()["dd_lightning"])
        tensors = {name: written.get_tensor(name) for name in written.keys()}  # noqa: SIM118
    assert values.pop("format_version") == 2
    assert (values.pop("formation"), values.pop("stored_as")) == ("single", "network")
    metadata = {"dd_lightning": json.dumps(values | {"format_version": 1})}
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors", metadata)
    old = load_synthetic(tmp_path / "old.safetensors")
    assert (old.factor, old.formation, old.stored_as, old.effective_ipc) == (1, "single", "network", 2)
    assert torch.equal(old.training_set()[0], distilled.synthetic_set.decoded())
    assert torch.equal(old.training_set()[1], distilled.synthetic_set.targets)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("idc", []), ("mtt", []), ("mtt", ["--model.student_lr", "0.1"])],
    ids=["idc", "mtt", "mtt at another rate"],
)
def test_evaluate_agrees_with_the_runs_own_last_point(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, recipe: Literal["idc", "mtt"], options: list[str]
) -> None:
    monkeypatch.setitem(evaluation.RECIPES, "mtt", EvaluationRecipe(epochs=3))
    cli.fit_networks("--evaluation.recipe", recipe, "--evaluation.epochs", "3", *options)
    path = cli.version(name="networks") / FILE
    file = load_synthetic(path)
    assert (file.factor, file.stored_as, file.effective_ipc, file.lr) == (2, "pixels", 4, None)
    cli("evaluate", str(path), "--recipe", recipe, "--epochs", "3", "--num_networks", "2", "--seed", "3")
    summary = json.loads((cli.version(name="networks") / "summary.json").read_text())
    last = summary["networks"][small.NETWORK]["last"]["accuracies"]
    (row,) = re.findall(r"│ (\S+) +│ (\d+) +│ ([^│]+?) +│", cli.out)
    assert row == (small.NETWORK, "2", percent(last))
    assert len(set(last)) == 2
