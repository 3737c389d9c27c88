"""What watches accuracies: the checkpoint of the best step, early stopping, and several evaluations in one Trainer."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dd_lightning.callbacks import EvalCallback, EvaluationPoint
from dd_lightning.callbacks.attached import as_distillation
from dd_lightning.cli.summary import summary
from dd_lightning.functional.errors import InputError
from dd_lightning.module import DistillationModule
from dd_lightning.networks import FunctionalNetwork
from tests import small

METRIC, ALIAS = f"accuracy/{small.NETWORK}", f"accuracy_{small.NETWORK}"
RISE_AND_FALL = {0: 0.1, 2: 0.5, 4: 0.8, 6: 0.6, 8: 0.7, 10: 0.9, 11: 0.65}


class Scripted(EvalCallback):
    """Finds the accuracies that it is told."""

    def __init__(self, accuracies: dict[int, float], **options: Any) -> None:  # noqa: ANN401
        super().__init__(**({"every_n_steps": 2, "num_networks": 1, "compare_random": False} | options))
        self.accuracies = accuracies

    def _train_and_test(self, module: DistillationModule, network: FunctionalNetwork, *_: object) -> EvaluationPoint:
        return EvaluationPoint(module.global_step, network.name, (self.accuracies[module.global_step],), 0.0)


def fit(store: Path, folder: Path, *callbacks: Callback, steps: int = 11, **options: Any) -> Trainer:  # noqa: ANN401
    return small.fit(folder, small.module(store), *callbacks, steps=steps, **options)


def step_of(path: str) -> int:
    step: int = torch.load(path, weights_only=True)["global_step"]
    return step


@pytest.mark.parametrize("stop_first", [True, False], ids=["stopping-first", "evaluation-first"])
@pytest.mark.parametrize("epoch_end", [None, True, False])
def test_early_stopping_stops_and_the_checkpoint_is_the_best_step(
    store: Path, tmp_path: Path, epoch_end: bool | None, stop_first: bool
) -> None:
    best = ModelCheckpoint(
        tmp_path, monitor=METRIC, mode="max", filename="{step}-{" + ALIAS + ":.3f}", save_on_train_epoch_end=epoch_end
    )
    stopping = EarlyStopping(METRIC, mode="max", patience=2, check_on_train_epoch_end=epoch_end)
    pair = [stopping, Scripted(RISE_AND_FALL)] if stop_first else [Scripted(RISE_AND_FALL), stopping]
    distilled = small.module(store)
    small.fit(tmp_path, distilled, *pair, best, steps=11)
    assert distilled.trainer.global_step == 8  # 0.6 and 0.7 after 0.8
    # the last step is there to go on from
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"step=4-{ALIAS}=0.800.ckpt", "step=8.ckpt"}
    assert step_of(best.best_model_path) == 4
    assert float(best.best_model_score or 0) == pytest.approx(0.8)
    assert float(stopping.best_score) == pytest.approx(0.8)
    # what it holds is the set of that step
    until = small.module(store)
    small.fit(tmp_path / "until", until, steps=4)
    loaded = DistillationModule.load_from_checkpoint(best.best_model_path)
    assert torch.equal(loaded.synthetic_set.images, until.synthetic_set.images)


def test_each_of_the_best_has_its_own_accuracy(store: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor=ALIAS, mode="max", save_top_k=-1)
    trainer = fit(store, tmp_path, Scripted(RISE_AND_FALL), best)
    found = {step_of(path): round(float(score), 6) for path, score in best.best_k_models.items()}
    assert found == {step: accuracy for step, accuracy in RISE_AND_FALL.items() if step > 0}
    assert float(trainer.callback_metrics[METRIC]) == pytest.approx(0.65)
    assert float(trainer.callback_metrics[f"evaluation/{small.NETWORK}/best"]) == pytest.approx(0.9)


def test_patience_goes_on_in_a_resumed_run(store: Path, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints"
    with pytest.raises(small.KilledError):
        fit(store, tmp_path, Scripted(RISE_AND_FALL), EarlyStopping(METRIC, mode="max", patience=2), small.Kill(7),
            small.checkpoints(saved))  # fmt: skip
    stopping = EarlyStopping(METRIC, mode="max", patience=2)
    callbacks = Scripted(RISE_AND_FALL), stopping, small.checkpoints(saved)
    trainer = fit(store, tmp_path, *callbacks, ckpt_path=saved / "step=6.ckpt")
    assert trainer.global_step == 8


def test_a_checkpoint_of_steps_looks_where_it_is_measured(store: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor=METRIC, mode="max", every_n_train_steps=4, save_top_k=-1)
    fit(store, tmp_path, Scripted(RISE_AND_FALL), best)
    assert {step_of(path): round(float(score), 6) for path, score in best.best_k_models.items()} == {4: 0.8, 8: 0.7}


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (EarlyStopping("accuracy/ConvNet-9"), f"EarlyStopping's monitor is 'accuracy/ConvNet-9'; it must be {METRIC}"),
        (ModelCheckpoint(monitor="eval/x/accuracy"), f"'s monitor is 'eval/x/accuracy'; it must be {METRIC}"),
        (ModelCheckpoint(monitor=ALIAS, every_n_train_steps=3), "every_n_train_steps is 3, .* measured every 2 steps"),
    ],
    ids=["typo", "earlier-name", "between"],
)
def test_a_monitor_of_what_is_not_measured_is_refused(
    store: Path, tmp_path: Path, callback: Callback, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit(store, tmp_path, Scripted(RISE_AND_FALL), callback)


def several(**options: Any) -> list[EvalCallback]:  # noqa: ANN401
    return [
        small.evaluation(),
        small.evaluation(networks=["ConvNet-2-W4"], every_n_steps=3, **options),
        small.evaluation(recipe="idc", epochs=4),
        small.evaluation(name="longer", epochs=3, every_n_steps=4),
    ]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("accuracy/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_several_evaluations_do_not_meet(store: Path, tmp_path: Path) -> None:
    alone = small.evaluation(recipe="idc", epochs=4)
    fit(store, tmp_path, alone, steps=5)
    logger, callbacks = TensorBoardLogger(str(tmp_path), default_hp_metric=False), several()
    trainer = fit(store, tmp_path, *callbacks, steps=5, logger=logger)
    found = curves(Path(logger.log_dir))
    assert {tag: [step for step, _ in points] for tag, points in found.items()} == {
        METRIC: [0, 2, 4, 5],
        "accuracy/ConvNet-2-W4": [0, 3, 5],
        f"{METRIC}_idc": [0, 2, 4, 5],
        f"{METRIC}_longer": [0, 4, 5],
    }
    assert [point.accuracies for point in callbacks[2].points] == [point.accuracies for point in alone.points]
    result = summary(trainer, as_distillation(trainer.lightning_module))
    assert [f"accuracy/{name}" for name in result["networks"]] == [*found]
    idc = result["networks"][f"{small.NETWORK}_idc"]["last"]
    assert (idc["step"], tuple(idc["accuracies"])) == (5, alone.last().accuracies)
    assert result["seconds_evaluating"] == pytest.approx(sum(each.seconds for each in callbacks))
    files = {"": 0, "_ConvNet-2-W4": 1, "_idc": 2, "_longer": 3}
    assert {path.stem for path in Path(logger.log_dir).glob("*.csv")} == {f"evaluation{name}" for name in files}
    for name, number in files.items():
        with (Path(logger.log_dir) / f"evaluation{name}.csv").open(newline="") as file:
            steps = [int(row["step"]) for row in csv.DictReader(file)]
        assert steps == [point.step for point in callbacks[number].points]


def test_several_evaluations_resume_even_from_between_them(store: Path, tmp_path: Path) -> None:
    whole, resumed, saved = several(), several(), tmp_path / "saved"
    fit(store, tmp_path, *whole, steps=5)
    # saved at step 4, when only the first evaluation had looked at it
    best = [ModelCheckpoint(saved, monitor=METRIC, mode="max", filename="{step}", save_top_k=-1) for _ in range(2)]
    with pytest.raises(small.KilledError):
        fit(store, tmp_path, *several(), best[0], small.Kill(5), steps=5)
    fit(store, tmp_path, *resumed, best[1], steps=5, ckpt_path=saved / "step=4.ckpt")
    for first, second in zip(whole, resumed, strict=True):
        assert [(p.step, p.accuracies) for p in second.points] == [(p.step, p.accuracies) for p in first.points]


def test_two_evaluations_of_the_same_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"two evaluations have the curve {METRIC}; .* a name: "):
        fit(store, tmp_path, small.evaluation(), small.evaluation(networks=[small.NETWORK]))


def test_a_resumed_evaluation_of_other_networks_starts_anew(store: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    fit(store, tmp_path, small.evaluation(name="x"), small.checkpoints(saved), steps=3)
    other = small.evaluation(name="x", networks=["ConvNet-2-W4"])
    fit(store, tmp_path, other, small.checkpoints(saved), steps=5, ckpt_path=saved / "step=3.ckpt")
    assert [(point.step, point.network) for point in other.points] == [(4, "ConvNet-2-W4"), (5, "ConvNet-2-W4")]
