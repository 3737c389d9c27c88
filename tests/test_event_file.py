"""What a run leaves in TensorBoard's event file and in evaluation.csv."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from dd_lightning.callbacks import EvalCallback, SyntheticSetWriter
from dd_lightning.callbacks.evaluation import EvaluationPoint
from dd_lightning.module import DistillationModule
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
            ("accuracy", [point.result.mean for point in mine]),
            ("accuracy_std", [point.result.std for point in mine]),
            ("accuracy_best", [max(p.result.mean for p in mine[: i + 1]) for i in range(len(mine))]),
            ("seconds", [point.seconds for point in mine]),
        ):
            found = curve(events, f"eval/{network}/{name}")
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
    assert distilled.skipped_steps == 0


def test_names_of_all_scalars_and_the_picture(store: Path, tmp_path: Path) -> None:
    callbacks: Sequence[Callback] = (small.selection(), small.evaluation(), SyntheticSetWriter(every_n_steps=2))
    events, _, _ = logged(store, tmp_path, *callbacks, steps=3)
    every_step = {
        "distill/loss",
        "distill/student_lr",
        "selection/loss_mean",
        "selection/loss_chosen",
        "selection/entropy",
        "selection/probability_chosen",
        "selection/seconds",
        "selection/loss_0",
        "selection/loss_1",
        "selection/loss_2",
        "cost/seconds",
        "cost/candidate_evaluations",
        "cost/peak_memory_mb",
    }
    evaluations = {f"eval/{small.NETWORK}/{name}" for name in ("accuracy", "accuracy_std", "accuracy_best", "seconds")}
    final = {f"hp/{small.NETWORK}/accuracy_{name}" for name in ("last", "best")}
    tags = events.Tags()
    assert every_step | evaluations | final <= set(tags["scalars"])
    assert {tag for tag in every_step if [step for step, _ in curve(events, tag)] != [0, 1, 2]} == set()
    assert [value for _, value in curve(events, "cost/candidate_evaluations")] == [3, 6, 9]
    losses = [[value for _, value in curve(events, f"selection/loss_{i}")] for i in range(3)]
    chosen = [value for _, value in curve(events, "selection/loss_chosen")]
    assert chosen == [value for _, value in curve(events, "distill/loss")]
    assert all(value in candidates for value, *candidates in zip(chosen, *losses, strict=True))
    means = [sum(values) / 3 for values in zip(*losses, strict=True)]
    assert [value for _, value in curve(events, "selection/loss_mean")] == pytest.approx(means)
    assert tags["images"] == ["synthetic"]
    assert [event.step for event in events.Images("synthetic")] == [0, 2, 3]


def test_hparams_hold_settings_and_final_accuracy(store: Path, tmp_path: Path) -> None:
    points = small.evaluation()
    events, _, _ = logged(store, tmp_path, points, steps=3)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    parsed = plugin_data_pb2.HParamsPluginData.FromString(content)
    settings = {k: v.string_value or v.number_value for k, v in parsed.session_start_info.hparams.items()}
    assert settings["network"] == small.NETWORK
    assert settings["objective"] == "TrajectoryMatching"
    assert (settings["ipc"], settings["seed"], settings["steps"], settings["syn_steps"]) == (2, 5, 3, 2)
    for name, value in (("last", points.last().result.mean), ("best", points.best().result.mean)):
        assert [v for _, v in curve(events, f"hp/{small.NETWORK}/accuracy_{name}")] == pytest.approx([value])
    assert points.last().step == 3


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
    for name in ("accuracy", "accuracy_std", "accuracy_best"):
        tag = f"eval/{small.NETWORK}/{name}"
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
    assert len(points.random_real.accuracies) == points.num_networks
    assert points.seconds == pytest.approx(sum(p.seconds for p in points.points) + points.random_real.seconds)


def test_best_of_validations_is_logged_apart(store: Path, tmp_path: Path) -> None:
    points = small.evaluation(recipe="idc", epochs=8, compare_random=True)
    events, folder, _ = logged(store, tmp_path, points, steps=3)
    assert all(len(point.validations) == 4 and point.validations[-1] == point.accuracies for point in points.points)
    best = [sum(point.best_accuracies) / 2 for point in points.points]
    found = curve(events, f"eval/{small.NETWORK}/accuracy_best_validation")
    assert [step for step, _ in found] == [0, 2, 3]
    assert [value for _, value in found] == pytest.approx(best, rel=1e-6)
    last = [point.result.mean for point in points.points]
    assert [value for _, value in curve(events, f"eval/{small.NETWORK}/accuracy")] == pytest.approx(last, rel=1e-6)
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


def test_a_state_without_validations_is_loaded() -> None:
    points = EvalCallback(recipe="idc")
    points.load_state_dict({"points": [(3, "a", [0.25, 0.5], 1.5)]})
    assert points.points == [EvaluationPoint(3, "a", (0.25, 0.5), 1.5)]
    assert points.points[0].best_accuracies == (0.25, 0.5)


def test_state_round_trip() -> None:
    first, second = EvalCallback(), EvalCallback()
    first.points = [
        EvaluationPoint(0, "a", (0.25, 0.5), 1.5, ((0.75, 0.0), (0.25, 0.5))),
        EvaluationPoint(7, "b", (1.0,), 2.0),
    ]
    second.load_state_dict(first.state_dict())
    assert second.points == first.points
    assert second.best("a").step == 0
    assert second.last("b").accuracies == (1.0,)
