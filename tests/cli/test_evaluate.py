"""``dd-lightning evaluate``: what it compares a set with, what it writes, and how it goes on."""

import csv
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dd_lightning.cli import measured
from dd_lightning.cli.measured import Results
from dd_lightning.datamodules import DigitsDataModule
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.coresets import Coreset, coreset
from dd_lightning.sets.synthetic_file import load_synthetic, save_synthetic
from dd_lightning.training import evaluation
from dd_lightning.training.evaluation import RECIPES, Evaluation, EvaluationRecipe
from dd_lightning.training.scores import augmentation_robust_score, label_robust_score
from tests import small
from tests.small import Cli

RECIPE = EvaluationRecipe(epochs=2)
OPTIONS = ["--recipe", "mtt", "--epochs", "2", "--num_networks", "2", "--seed", "3", "--device", "cpu"]


@pytest.fixture
def file(cli: Cli) -> Path:
    cli.fit("--evaluation", "null", "--trainer.max_steps", "1", "--model.ipc", "2")
    return cli.version() / "synthetic.safetensors"


def written(cli: Cli, name: str = "out/evaluate.json") -> dict[str, Any]:
    values: dict[str, Any] = json.loads((cli.folder / name).read_text())
    return values


def accuracies(values: dict[str, Any]) -> dict[tuple[str, int, str], list[float]]:
    """Return all that was measured, by what the networks were trained on, draw and architecture."""
    return {(row["trained_on"], row["draw"], row["network"]): row["accuracies"] for row in values["measured"]}


def test_baselines_are_real_images_by_the_same_recipe(cli: Cli, file: Path) -> None:
    networks, kinds = [small.NETWORK, "ConvNet-2-W4"], ["random", "kmeans", "herding"]
    baselines = ["--baselines", *kinds, "--draws", "3", "--full_data", "1", "--out", "out"]
    cli("evaluate", str(file), "--networks", *networks, *OPTIONS, *baselines)
    found = accuracies(values := written(cli))
    synthetic, real, test = load_synthetic(file), DigitsDataModule().train, DigitsDataModule().test
    trials: dict[tuple[str, int], Any] = {("distilled", 0): synthetic.training_set()}
    whats: list[tuple[Coreset, int]] = [("random", 0), ("random", 1), ("random", 2), ("kmeans", 0), ("herding", 0)]
    for coreset_kind, draw in whats:
        chosen = coreset(real, 2, coreset_kind, 3, draw)
        trials[coreset_kind, draw] = real.images[chosen], real.labels[chosen]
    expected: dict[tuple[str, int, str], list[float]] = {}
    for spec in networks:
        network = FunctionalNetwork(spec, real.image_shape, real.num_classes)
        for (kind, draw), (images, targets) in trials.items():
            result = Evaluation(network, test, RECIPE)(images, targets, synthetic.evaluation_lr, 2, 3)
            expected[kind, draw, spec] = list(result.accuracies)
        full = Evaluation(network, test, replace(RECIPE, epochs=1, lr=0.01))
        expected["full", 0, spec] = list(full(real.images, real.labels, 1.0, 2, 3).accuracies)
    assert found == expected
    summary = {(row["trained_on"], row["network"]): row for row in values["summary"]}
    assert list(summary) == [(kind, spec) for spec in networks for kind in ("distilled", *kinds, "full")]
    for (kind, spec), row in summary.items():
        draws = [each for (name, _, network), each in expected.items() if (name, network) == (kind, spec)]
        means = [statistics.fmean(each) for each in draws]
        assert (row["draws"], row["networks_per_draw"]) == (len(draws), 2)
        assert row["images"] == (len(real) if kind == "full" else 20)
        assert row["mean"] == pytest.approx(statistics.fmean(means))
        spread = statistics.fmean([statistics.pvariance(each) for each in draws]) ** 0.5
        assert row["std_networks"] == pytest.approx(spread)
        assert row["std_draws"] == (pytest.approx(statistics.pstdev(means)) if kind == "random" else None)
        said = f"{100 * row['mean']:.1f} ± {100 * row['std_networks']:.1f} %"
        assert said in next(
            line for line in cli.out.splitlines() if f" {row['images']} {kind} " in line and spec in line
        )
    with (cli.folder / "out" / "evaluate.csv").open() as lines:
        rows = [((r["trained_on"], int(r["draw"]), r["network"]), float(r["accuracy"])) for r in csv.DictReader(lines)]
    assert rows == [(key, accuracy) for key, each in found.items() for accuracy in each]
    assert values["command"].startswith(f"dd-lightning evaluate {file} --networks")
    assert values["set"]["images"] == 20
    assert values["hardware"] == values["measured"][0]["devices"][1]


class StopError(Exception):
    """Stands for a process that is killed."""


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the first number and the count of the networks of each training to come."""
    made: list[tuple[int, int]] = []
    call = Evaluation.__call__

    def counted(self: Evaluation, *arguments: Any) -> Any:  # noqa: ANN401
        made.append((arguments[6], arguments[3]))
        return call(self, *arguments)

    monkeypatch.setattr(Evaluation, "__call__", counted)
    return made


def without_seconds(values: dict[str, Any]) -> Any:  # noqa: ANN401
    def kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    return kept(values["summary"]), kept(values["measured"]), values["scores"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_killed_evaluation_trains_only_what_is_missing(
    cli: Cli, file: Path, trainings: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr(evaluation, "batching_pays", lambda *_: at_once)
    command = ["evaluate", str(file), "--networks", small.NETWORK, "ConvNet-2-W4", *OPTIONS, "--baselines", "random"]
    command += ["--draws", "2", "--out"]
    cli(*command, "whole")
    each = [(0, 2)] if at_once else [(0, 1), (1, 1)]
    assert trainings == each * 6
    trainings.clear()
    save: Callable[[Results], None] = Results.save

    def killed(results: Results) -> None:
        save(results)
        if len(trainings) == 3:
            raise StopError

    monkeypatch.setattr(Results, "save", killed)
    with pytest.raises(StopError):
        cli(*command, "out.json")
    assert f"to go on: dd-lightning {' '.join(command)} out.json" in cli.err
    assert sum(map(len, accuracies(written(cli, "out.json")).values())) == (6 if at_once else 3)
    monkeypatch.setattr(Results, "save", save)
    cli(*command, "out.json")
    assert trainings == each * 6
    assert without_seconds(written(cli, "out.json")) == without_seconds(written(cli, "whole/evaluate.json"))
    assert (cli.folder / "out.csv").exists()
    cli(*command, "out.json")  # all is known
    assert trainings == each * 6


def test_more_networks_go_on_and_anything_else_is_kept_beside(
    cli: Cli, file: Path, trainings: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "batching_pays", lambda *_: False)
    command = ["evaluate", str(file), *OPTIONS, "--out", "out"]
    cli(*command)
    first = accuracies(written(cli))["distilled", 0, small.NETWORK]
    cli(*command, "--num_networks", "3")
    assert trainings == [(0, 1), (1, 1), (2, 1)]
    assert accuracies(written(cli))["distilled", 0, small.NETWORK][:2] == first
    cli(*command)  # the summary is of two again
    assert written(cli)["summary"][0]["mean"] == statistics.fmean(first)
    assert len(trainings) == 3
    others = [
        ["--epochs", "3"], ["--recipe", "idc"], ["--seed", "4"], ["--execution.precision", "bfloat16"],
        ["--networks", "ConvNet-2-W4"],
    ]  # fmt: skip
    for number, other in enumerate(others, 2):
        cli(*command, *other)
        assert len(trainings) == 1 + 2 * number
        assert len(written(cli)["measured"]) == number
        assert len(written(cli)["summary"]) == 1
    save_synthetic(file, replace(load_synthetic(file), step=7))  # another set
    cli(*command)
    assert len(written(cli)["measured"]) == 2 + len(others)
    assert written(cli)["set"]["step"] == 7


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_scores_are_of_the_accuracies(cli: Cli, labels: str) -> None:
    cli.fit("--evaluation", "null", "--trainer.max_steps", "1", "--model.labels", labels)
    command = ["evaluate", str(cli.version()), *OPTIONS, "--scores", "--full_data", "1", "--draws", "2"]
    cli(*command, "--recipe", "idc", "--out", "out")
    values = written(cli)
    mean = {row["trained_on"]: row["mean"] for row in values["summary"]}
    hard = mean["distilled, hard labels"] if labels == "soft" else mean["distilled"]
    assert ("distilled, hard labels" in mean) == (labels == "soft")
    own, random = mean["distilled"], mean["random"]
    plain = mean["distilled, no augmentation"], mean["random, no augmentation"]
    assert values["scores"][small.NETWORK] == {
        "lrs": label_robust_score(mean["full"], hard, own, random),
        "ars": augmentation_robust_score(own, random, *plain),
        "hard_label_recovery": mean["full"] - hard,
        "improvement_over_random": own - random,
    }
    assert f"│ {values['scores'][small.NETWORK]['lrs']:.3f} " in cli.out
    recipes = {row["trained_on"]: row["recipe"] for row in values["measured"]}
    for name in ("distilled, no augmentation", "random, no augmentation"):
        without = {"augmentation": "none", "cutmix": 0.0}
        assert recipes[name] == recipes["distilled"] | without
    synthetic, data = load_synthetic(cli.version() / "synthetic.safetensors"), DigitsDataModule()
    images, targets = synthetic.training_set()
    targets = targets.argmax(1) if labels == "soft" else targets
    network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
    recipe = replace(RECIPES["idc"], epochs=2)
    result = Evaluation(network, data.test, recipe)(images, targets, 1.0, 2, 3)
    assert hard == pytest.approx(result.mean)


def test_a_recipe_from_yaml(cli: Cli, file: Path) -> None:
    own = {"epochs": 3, "lr": 1e-2, "milestones": [0.5, 0.75], "augmentation": "color_crop", "validations": 2}
    (cli.folder / "own.yaml").write_text(yaml.safe_dump(own))
    cli("evaluate", str(file), *OPTIONS[4:], "--recipe", "own.yaml", "--out", "out")
    (row,) = written(cli)["measured"]
    recipe = EvaluationRecipe(**own | {"milestones": (0.5, 0.75)})  # type: ignore[arg-type]
    assert row["recipe"] == measured.plain(recipe)
    assert row["lr"] == 0.01
    assert written(cli)["summary"][0]["recipe"] == "custom"
    synthetic, data = load_synthetic(file), DigitsDataModule()
    network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
    result = Evaluation(network, data.test, recipe)(*synthetic.training_set(), 1.0, 2, 3)
    assert row["accuracies"] == list(result.accuracies)
    assert row["validations"] == [list(each) for each in zip(*result.validations, strict=True)]
    cli("evaluate", str(file), *OPTIONS[4:], "--recipe", "own.yaml", "--epochs", "2", "--out", "out")
    assert written(cli)["measured"][1]["recipe"]["epochs"] == 2


def test_published_recipes_differ_from_mtt() -> None:
    assert RECIPES["dm"] == replace(RECIPES["mtt"], lr=0.01)
    assert RECIPES["ddranking"] == replace(RECIPES["mtt"], reset_momentum=False, validations=100)


REFUSED = [
    ("--networks Foo", 1, "unknown network 'Foo'"),
    ("--recipe foo", 1, "unknown evaluation recipe 'foo'"),
    ("--recipe nowhere.yaml", 1, "recipe is 'nowhere.yaml', but No such file"),
    ("--recipe typo.yaml", 2, "recipe.epoch is no option; did you mean recipe.epochs?"),
    ("--recipe word.yaml", 1, "'word.yaml', which must be a YAML mapping"),
    ("--recipe broken.yaml", 1, "'broken.yaml', which is not YAML"),
    ("--recipe range.yaml", 1, "recipe.epochs is 0; it must be at least 1"),
    ("--baselines random best", 1, "baselines is 'best'; use one of random, kmeans, herding"),
    ("--baselines random --draws 0", 1, "draws is 0; it must be at least 1"),
    ("--full_data 0", 1, "full_data is 0; it must be at least 1"),
    ("--scores", 1, "--full_data"),
    ("--scores --full_data 1 --augmentation none", 1, "--scores compares with and without augmentation"),
    ("--data tests.cli.test_bad_options.Wide", 1, "10 classes of (1, 8, 8) images, but wide has 3 of (1, 8, 9)"),
    ("--data tests.cli.test_evaluate.Nine --baselines random", 1, "class 9 of 10 has no image"),
    ("--data CIFAR10DataModule --data.download false --baselines random", 1, "CIFAR-10 is not in"),
    ("--out=", 1, "--out is ''"),
    ("--out other.json", 1, "'other.json', which is not an evaluation"),
    ("--out old.json", 1, "'old.json', which is not an evaluation"),
    ("--out typo.yaml", 1, "the output folder"),
]


class Nine(DigitsDataModule):
    """Digits that lack the last class among the training images."""

    def load(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = super().load(train)
        return (images[labels < 9], labels[labels < 9]) if train else (images, labels)


@pytest.mark.parametrize(("options", "status", "said"), REFUSED, ids=[options for options, *_ in REFUSED])
def test_bad_input_is_one_line_and_leaves_nothing(
    cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch, options: str, status: int, said: str
) -> None:
    texts = {
        "typo.yaml": "epoch: 3", "word.yaml": "mtt", "broken.yaml": "{epochs: 3", "range.yaml": "epochs: 0",
        "other.json": "{}", "old.json": '{"format": "evaluation", "measured": [{"accuracy": 1}]}',
    }  # fmt: skip
    for name, text in texts.items():
        (cli.folder / name).write_text(text)
    before = sorted(cli.folder.rglob("*"))

    def nothing(*_: object) -> None:
        raise AssertionError("a network was trained")

    monkeypatch.setattr(Evaluation, "__call__", nothing)
    out = [] if "--out" in options else ["--out", "new"]
    assert said in cli.refused("evaluate", str(file), *options.split(), *out, status=status)
    assert sorted(cli.folder.rglob("*")) == before
