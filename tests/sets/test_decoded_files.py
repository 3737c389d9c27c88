"""The file of a set that is decoded: it says by itself what networks are trained on."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from dd_lightning.callbacks import SyntheticSetWriter
from dd_lightning.datamodules import evaluation_data
from dd_lightning.sets.synthetic_file import load_synthetic
from dd_lightning.training import evaluation
from dd_lightning.training.evaluation import EvaluationRecipe, percent
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
    assert (file.formation.factor, file.formation.kind, file.stored_as, file.effective_ipc) == expected
    assert (file.ipc, file.step, file.lr, file.objective) == (2, 2, None, "GradientMatching")
    assert file.space.kind == kind
    assert torch.equal(file.images, synthetic.images)
    if kind == "zca":
        file, _ = evaluation_data(file, small.data())
    images, targets = file.training_set()
    assert torch.equal(images, synthetic.decoded())
    assert torch.equal(targets, synthetic.decoded_targets())


def test_a_learned_rate_is_kept(store: Path, tmp_path: Path) -> None:
    distilled = small.module(store, factor=2)
    small.fit(tmp_path, distilled, SyntheticSetWriter(), steps=2)
    file = load_synthetic(tmp_path / FILE)
    assert file.lr == distilled.distillation.student_lr != 0.05
    assert file.evaluation_lr == file.lr
    assert (file.formation.factor, file.effective_ipc) == (2, 8)


def test_the_rate_and_recipe_of_a_run_that_learns_no_rate_are_kept(tmp_path: Path) -> None:
    distilled = small.network_module(student_lr=0.07)
    evaluation = small.evaluation(recipe="idc", epochs=3, augmentation="none")
    small.fit(tmp_path, distilled, SyntheticSetWriter(), evaluation, steps=1)
    file = load_synthetic(tmp_path / FILE)
    assert file.lr is None
    assert file.evaluation_lr == pytest.approx(0.07)
    recipe = file.evaluation_recipe | {"milestones": tuple(file.evaluation_recipe["milestones"])}
    assert EvaluationRecipe(**recipe) == evaluation.recipe
    small.fit(tmp_path, small.network_module(student_lr=0.07), SyntheticSetWriter(), steps=1)
    file = load_synthetic(tmp_path / FILE)
    assert file.evaluation_lr == pytest.approx(0.07)
    assert file.evaluation_recipe == {}  # none was used


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
    assert (file.formation.factor, file.stored_as, file.effective_ipc, file.lr) == (2, "pixels", 4, None)
    cli("evaluate", str(path), "--recipe", recipe, "--epochs", "3", "--num_networks", "2", "--seed", "3")
    summary = json.loads((cli.version(name="networks") / "summary.json").read_text())
    last = summary["networks"][small.NETWORK]["last"]["accuracies"]
    (row,) = re.findall(r"│ (\S+) +│ (\d+) +│ ([^│]+?) +│", cli.out)
    assert row == (small.NETWORK, "2", percent(last))
    assert len(set(last)) == 2
