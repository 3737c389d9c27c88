"""What a run leaves in TensorBoard's event file and in evaluation.csv."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dd_lightning.callbacks import EvalCallback
from dd_lightning.callbacks.accuracy_curve import EvaluationPoint
from dd_lightning.cli.summary import summary
from dd_lightning.execution import compile as compile_module
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError
from dd_lightning.module import DistillationModule
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.training import evaluation, parallel_networks
from tests import small


def logged(
    store: Path,
    folder: Path,
    *callbacks: Callback,
    steps: int,
    ckpt_path: Path | None = None,
) -> tuple[EventAccumulator, Path, DistillationModule]:
    logger = TensorBoardLogger(str(folder), name="run", default_hp_metric=False)
    distilled = small.module(store)
    small.fit(folder, distilled, *callbacks, steps=steps, logger=logger, ckpt_path=ckpt_path)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return events, Path(logger.log_dir), distilled


def curve(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("interval", "steps", "expected"),
    [(2, 6, [0, 2, 4, 6]), (4, 6, [0, 4, 6]), (100, 3, [0, 3]), (1, 2, [0, 1, 2])],
)
def test_points_are_at_multiples_and_at_the_last_step(
    store: Path, tmp_path: Path, interval: int, steps: int, expected: list[int]
) -> None:
    networks = [small.NETWORK, "ConvNet-2-W4"]
    points = small.evaluation(every_n_steps=interval, networks=networks)
    events, folder, _ = logged(store, tmp_path, points, steps=steps)
    for network in networks:
        mine = [point for point in points.points if point.network == network]
        assert [point.step for point in mine] == expected
        for name, values in (
            (f"accuracy/{network}", [point.result.mean for point in mine]),
            (f"evaluation/{network}/std", [point.result.std for point in mine]),
            (f"evaluation/{network}/low", [point.result.mean - point.result.std for point in mine]),
            (f"evaluation/{network}/high", [point.result.mean + point.result.std for point in mine]),
            (f"evaluation/{network}/best", [max(p.result.mean for p in mine[: i + 1]) for i in range(len(mine))]),
            (f"evaluation/{network}/seconds", [point.seconds for point in mine]),
        ):
            found = curve(events, name)
            assert [step for step, _ in found] == expected
            assert [value for _, value in found] == pytest.approx(values, rel=1e-6)
    assert [(int(row["step"]), row["network"]) for row in rows(folder)] == [
        (step, network) for step in expected for network in networks
    ]


def test_csv_holds_the_raw_accuracies(store: Path, tmp_path: Path) -> None:
    points = small.evaluation(num_networks=3)
    _, folder, distilled = logged(store, tmp_path, points, steps=3)
    held_out = small.data().test
    for row, point in zip(rows(folder), points.points, strict=True):
        raw = [float(row[f"accuracy_{i}"]) for i in range(3)]
        assert tuple(raw) == point.accuracies
        assert float(row["mean"]) == point.result.mean == pytest.approx(sum(raw) / 3)
        assert float(row["std"]) == point.result.std
        counts = [accuracy * len(held_out) for accuracy in raw]
        assert counts == pytest.approx([round(count) for count in counts], abs=1e-4)
    assert distilled.distillation.skipped_steps == 0


def test_a_resumed_run_logs_the_whole_curve(store: Path, tmp_path: Path) -> None:
    whole = small.evaluation()
    events, whole_folder, _ = logged(store, tmp_path / "whole", whole, steps=5)
    saved = tmp_path / "checkpoints"
    with pytest.raises(small.KilledError):
        logged(store, tmp_path / "b", small.evaluation(), small.checkpoints(saved), small.Kill(4), steps=5)
    resumed, folder, _ = logged(
        store,
        tmp_path / "b",
        small.evaluation(),
        small.checkpoints(saved),
        steps=5,
        ckpt_path=saved / "step=3.ckpt",
    )
    assert folder.name == "version_1"
    for tag in (f"accuracy/{small.NETWORK}", *(f"evaluation/{small.NETWORK}/{name}" for name in ("std", "best"))):
        assert curve(resumed, tag) == curve(events, tag)
        assert [step for step, _ in curve(resumed, tag)] == [0, 2, 4, 5]
    unlike = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in unlike} for row in rows(folder)] == [
        {k: v for k, v in row.items() if k not in unlike} for row in rows(whole_folder)
    ]


def test_the_curve_is_on_disk_from_the_start_of_a_resumed_run(store: Path, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints"
    logged(store, tmp_path / "a", small.evaluation(), small.checkpoints(saved), steps=3)
    with pytest.raises(small.KilledError):
        logged(
            store,
            tmp_path / "a",
            small.evaluation(every_n_steps=100),
            small.checkpoints(saved),
            small.Kill(4),
            steps=6,
            ckpt_path=saved / "step=3.ckpt",
        )
    assert [int(row["step"]) for row in rows(tmp_path / "a" / "run" / "version_1")] == [0, 2]


def test_random_real_images_are_compared(store: Path, tmp_path: Path) -> None:
    points = small.evaluation(compare_random=True)
    logged(store, tmp_path, points, steps=1)
    assert isinstance(points.random_real, EvaluationPoint)
    assert len(points.random_real.accuracies) == 5
    assert points.seconds == pytest.approx(sum(p.seconds for p in points.points) + points.random_real.seconds)


def test_best_of_validations_is_logged_apart(store: Path, tmp_path: Path) -> None:
    points = small.evaluation(recipe="idc", epochs=8, compare_random=True)
    events, folder, _ = logged(store, tmp_path, points, steps=3)
    assert all(len(point.validations) == 4 and point.validations[-1] == point.accuracies for point in points.points)
    best = [sum(point.best_accuracies) / 2 for point in points.points]
    found = curve(events, f"evaluation/{small.NETWORK}/best_validation")
    assert [step for step, _ in found] == [0, 2, 3]
    assert [value for _, value in found] == pytest.approx(best, rel=1e-6)
    last = [point.result.mean for point in points.points]
    assert [value for _, value in curve(events, f"accuracy/{small.NETWORK}")] == pytest.approx(last, rel=1e-6)
    for row, point, mean in zip(rows(folder), points.points, best, strict=True):
        assert tuple(float(row[f"accuracy_{i}"]) for i in range(2)) == point.accuracies
        assert tuple(float(row[f"best_validation_{i}"]) for i in range(2)) == point.best_accuracies
        assert float(row["best_validation_mean"]) == mean
    assert points.random_real is not None
    assert len(points.random_real.validations) == 4


def test_one_validation_leaves_no_trace(store: Path, tmp_path: Path) -> None:
    points = small.evaluation()
    events, folder, _ = logged(store, tmp_path, points, steps=1)
    assert not any("validation" in tag for tag in events.Tags()["scalars"])
    assert list(rows(folder)[0]) == ["step", "network", "mean", "std", "seconds", "accuracy_0", "accuracy_1"]
    assert all(point.validations == (point.accuracies,) for point in points.points)


def test_state_round_trip() -> None:
    first, second = EvalCallback(), EvalCallback()
    first.curve.points = [
        EvaluationPoint(0, "a", (0.25, 0.5), 1.5, ((0.75, 0.0), (0.25, 0.5))),
        EvaluationPoint(7, "b", (1.0,), 2.0),
    ]
    second.load_state_dict(first.state_dict())
    assert second.points == first.points
    assert second.best("a").step == 0
    assert second.last("b").accuracies == (1.0,)


def early(count: int | None = 1, **options: object) -> EvalCallback:
    return small.evaluation(num_networks=3, num_networks_intermediate=count, **options)


@pytest.mark.parametrize("recipe", ["mtt", "idc"])
def test_early_points_are_of_the_first_networks_and_the_last_one_of_all(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    # as networks too large for one batched pass are computed
    monkeypatch.setattr(evaluation, "batching_pays", lambda *_: False)
    options = {"recipe": recipe, "epochs": 8, "compare_random": True}
    full, points = early(None, **options), early(1, **options)
    logged(store, tmp_path / "full", full, steps=5)
    events, folder, distilled = logged(store, tmp_path / "early", points, steps=5)
    assert [(point.step, len(point.accuracies)) for point in points.points] == [(0, 1), (2, 1), (4, 1), (5, 3)]
    for point, whole in zip(points.points, full.points, strict=True):
        count = len(point.accuracies)
        assert point.accuracies == whole.accuracies[:count]
        assert point.validations == tuple(each[:count] for each in whole.validations)
    assert points.last() == points.points[-1]
    assert points.random_real is not None
    assert len(points.random_real.accuracies) == 5
    tag = f"evaluation/{small.NETWORK}"
    assert curve(events, f"{tag}/num_networks") == [(0, 1), (2, 1), (4, 1), (5, 3)]
    assert [step for step, _ in curve(events, f"accuracy/{small.NETWORK}")] == [0, 2, 4, 5]
    assert [step for step, _ in curve(events, f"{tag}/seconds")] == [0, 2, 4, 5]
    assert [step for step, _ in curve(events, f"{tag}/std")] == [5]  # one network has no deviation
    # but TensorBoard draws a band of those that have both ends at each step
    for end in ("low", "high"):
        assert curve(events, f"{tag}/{end}")[:3] == curve(events, f"accuracy/{small.NETWORK}")[:3]
    for row, point in zip(rows(folder), points.points, strict=True):
        count, nothing = len(point.accuracies), [""] * (3 - len(point.accuracies))
        assert [row[f"accuracy_{i}"] for i in range(3)] == [*map(str, point.accuracies), *nothing]
        assert row["num_networks"] == str(count)
        assert row["std"] == (str(point.result.std) if count > 1 else "")
        if recipe == "idc":
            assert [row[f"best_validation_{i}"] for i in range(3)] == [*map(str, point.best_accuracies), *nothing]
            assert (row["best_validation_std"] == "") == (count == 1)
    last = summary(distilled.trainer, distilled)["networks"][small.NETWORK]["last"]
    assert (last["step"], last["accuracies"]) == (5, list(full.last().accuracies))


def test_two_early_networks_have_a_deviation(store: Path, tmp_path: Path) -> None:
    points = early(2)
    events, folder, _ = logged(store, tmp_path, points, steps=3)
    assert [row["num_networks"] for row in rows(folder)] == ["2", "2", "3"]
    deviations = [point.result.std for point in points.points]
    assert [float(row["std"]) for row in rows(folder)] == deviations
    found = curve(events, f"evaluation/{small.NETWORK}/std")
    assert [value for _, value in found] == pytest.approx(deviations, rel=1e-6)


class Stop(Callback):
    """End the run early, at a step of which nobody knew that it would be the last one."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        trainer.should_stop = trainer.global_step == 4


def test_a_run_that_ends_early_ends_with_a_full_point(store: Path, tmp_path: Path) -> None:
    points = early()
    _, folder, _ = logged(store, tmp_path, points, Stop(), steps=9)
    assert [(point.step, len(point.accuracies)) for point in points.points] == [(0, 1), (2, 1), (4, 3)]
    assert [row["num_networks"] for row in rows(folder)] == ["1", "1", "3"]


def test_a_resumed_run_goes_on_with_early_points(store: Path, tmp_path: Path) -> None:
    whole, resumed = early(), early()
    logged(store, tmp_path / "whole", whole, steps=5)
    saved = tmp_path / "checkpoints"
    with pytest.raises(small.KilledError):
        logged(store, tmp_path / "b", early(), small.checkpoints(saved), small.Kill(4), steps=5)
    last = saved / "step=3.ckpt"
    _, folder, _ = logged(store, tmp_path / "b", resumed, small.checkpoints(saved), steps=5, ckpt_path=last)
    assert [replace(p, seconds=0.0) for p in resumed.points] == [replace(p, seconds=0.0) for p in whole.points]
    assert [row["num_networks"] for row in rows(folder)] == ["1", "1", "1", "3"]
    # and one that is resumed without early points keeps those that it had
    plain = early(None)
    last = saved / "step=5.ckpt"
    _, folder, _ = logged(store, tmp_path / "b", plain, small.checkpoints(saved), steps=7, ckpt_path=last)
    assert [(point.step, len(point.accuracies)) for point in plain.points] == [(0, 1), (2, 1), (4, 1), (6, 3), (7, 3)]
    assert plain.last().step == 7
    assert [row["accuracy_2"] == "" for row in rows(folder)] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("count", [0, 4])
def test_early_networks_are_some_of_all(count: int) -> None:
    with pytest.raises(InputError, match=f"num_networks_intermediate is {count}; it must be at least 1 and at most 3"):
        early(count)


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_compiled_evaluation_is_the_same_up_to_rounding(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectorized: bool
) -> None:
    """And it compiles before its first point, for early points and for full ones, and never again."""
    compilations: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compilations.append(graph)
        return graph

    monkeypatch.setattr(evaluation, "batching_pays", lambda *_: vectorized)
    monkeypatch.setattr(parallel_networks, "BACKEND", backend)
    trained: list[torch.Tensor] = []
    known: list[int] = []
    test = evaluation.accuracies_of

    def kept(thetas: torch.Tensor, *rest: Any) -> tuple[float, ...]:  # noqa: ANN401
        trained.append(torch.stack(list(thetas)))
        known.append(len(compilations))
        return test(thetas, *rest)

    monkeypatch.setattr(evaluation, "accuracies_of", kept)
    logged(store, tmp_path / "eager", early(epochs=3), steps=3)
    assert not compilations
    logged(store, tmp_path / "compiled", early(epochs=3, execution=Execution(compile="on")), steps=3)
    # at once, 1 network is another shape than 3
    assert known == [0] * 3 + [2 if vectorized else 1] * 3
    assert [len(thetas) for thetas in trained] == [1, 1, 3] * 2
    for eager, compiled in zip(trained[:3], trained[3:], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_a_compiler_that_fails_an_evaluation(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: object) -> NoReturn:
        raise RuntimeError("no C++ compiler\nmore lines")

    eager = early()
    logged(store, tmp_path / "off", eager, steps=1)
    monkeypatch.setattr(parallel_networks, "BACKEND", backend)
    message = r"compile is 'on', but torch\.compile fails for the evaluation of .*; set execution\.compile: off$"
    with pytest.raises(InputError, match=message):
        logged(store, tmp_path / "on", early(execution=Execution(compile="on")), steps=1)
    monkeypatch.setattr(compile_module, "compiles", lambda *_: True)
    auto = early(execution=Execution(compile="auto"))
    with pytest.warns(UserWarning, match="fails for the evaluation of .*: going on without"):
        logged(store, tmp_path / "auto", auto, steps=1)
    assert [point.accuracies for point in auto.points] == [point.accuracies for point in eager.points]


def test_an_evaluation_is_compiled_for_as_many_steps_as_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(compile_module, "compiles", lambda *arguments: asked.append(arguments))
    network = FunctionalNetwork(small.NETWORK, small.SHAPE, small.CLASSES)
    images, labels = torch.zeros(9, *small.SHAPE), torch.arange(9) % 3
    recipe = evaluation.EvaluationRecipe(epochs=10, batch_size=4)  # three batches
    tested = evaluation.Evaluation(network, small.data().test, recipe, Execution(compile="auto"), 7, [5])
    for _ in range(2):
        tested(images, labels, 0.01, 1)
    assert asked == [("auto", images.device, 7 * 10 * 3)]


@pytest.mark.parametrize(("steps", "trained"), [(4, [1, 1, 3]), (3, [1, 1, 3])])
def test_the_last_step_is_evaluated_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, trained: list[int]
) -> None:
    counts: list[int] = []
    test = evaluation.accuracies_of

    def counted(thetas: torch.Tensor, *rest: Any) -> tuple[float, ...]:  # noqa: ANN401
        counts.append(len(thetas))
        return test(thetas, *rest)

    monkeypatch.setattr(evaluation, "accuracies_of", counted)
    logged(store, tmp_path, early(), steps=steps)
    assert counts == trained
