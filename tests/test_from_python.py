"""What a script may do with a module, its callbacks and a Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import TensorDataset

import dd_lightning as dd
from dd_lightning.callbacks import EvaluationPoint
from dd_lightning.functional.errors import DivergenceError, InputError
from dd_lightning.sets.real import RealSet
from tests import small
from tests.objectives.test_classwise import late_norm

RECIPE = dd.EvaluationRecipe(epochs=2, lr=0.05, batch_size=4)


def evaluation(**options: Any) -> dd.EvalCallback:  # noqa: ANN401
    return small.evaluation(**({"recipe": RECIPE, "epochs": None} | options))


def measured(module: dd.DistillationModule, held_out: RealSet) -> float:
    synthetic = module.synthetic_set
    given = synthetic.decoded().detach(), synthetic.decoded_targets(), 1.0, held_out, small.NETWORK, RECIPE, 2
    return dd.evaluate_synthetic_set(*given, seed=5).mean


@pytest.mark.parametrize("options", [{}, {"factor": 2, "image_space": "pixels"}])
def test_validate_and_test_evaluate_the_set(tmp_path: Path, options: dict[str, Any]) -> None:
    data, module = small.data(val_fraction=0.3), small.network_module(**options)
    trainer = small.fit(tmp_path, module, evaluation(), small.checkpoints(tmp_path), steps=2, datamodule=data)
    before, points = small.learned(module), [*trainer.callbacks[1].points]  # type: ignore[attr-defined]
    assert data.val is not None
    wanted = [measured(module, data.val), measured(module, data.test)]
    again = small.network_module(**options)
    path = tmp_path / "step=2.ckpt"
    found = [
        trainer.validate(module, datamodule=data, verbose=False),
        trainer.test(module, datamodule=data, verbose=False),
        small.trainer(tmp_path, callbacks=[evaluation(), small.checkpoints(tmp_path)]).test(
            again, datamodule=data, ckpt_path=path, weights_only=True, verbose=False
        ),
    ]
    accuracies = [result[f"accuracy/{small.NETWORK}"] for (result,) in found]
    assert accuracies == pytest.approx([*wanted, wanted[1]], rel=1e-6)
    assert small.same(small.learned(module), before)
    assert trainer.callbacks[1].points == points  # type: ignore[attr-defined]


def test_nothing_to_evaluate_or_nothing_that_evaluates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the synthetic set does not exist yet: fit the module, or load a checkpoint"):
        small.trainer(tmp_path, callbacks=[evaluation()]).test(small.network_module(), datamodule=small.data())
    module = small.network_module()
    small.fit(tmp_path, module, steps=1)
    with pytest.raises(InputError, match=r"nothing evaluates the set; .*callbacks=\[EvalCallback\(\)\]"):
        small.trainer(tmp_path).test(module, datamodule=small.data())
    with pytest.raises(InputError, match="split is 'val', but val_fraction is 0"):
        small.trainer(tmp_path, callbacks=[evaluation()]).validate(module, datamodule=small.data())
    wide = TensorDataset(torch.rand(9, 1, 8, 9), torch.arange(9) % 3)
    with pytest.raises(InputError, match=r"the set holds 6 images \[1, 8, 8\], .* 3 classes of \[1, 8, 9\]"):
        small.trainer(tmp_path, callbacks=[evaluation()]).test(module, datamodule=dd.DatasetDataModule(wide, wide))


def test_files_are_written_only_where_somebody_named_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**options: Any) -> None:  # noqa: ANN401
        callbacks: list[Callback] = [evaluation(), dd.SyntheticSetWriter()]
        module = small.network_module()
        small.trainer(tmp_path / "unused", 1, callbacks, **options).fit(module, datamodule=small.data(root="cache"))

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.warns(UserWarning, match="will not be saved: give the Trainer a logger or a default_root_dir") as told:
        run(default_root_dir=None)
    missing = [str(each.message).partition(" will")[0] for each in told if each.category is not FutureWarning]
    assert missing == ["evaluation.csv", "synthetic.safetensors, synthetic.png"]
    assert list(Path().iterdir()) == []
    run(default_root_dir="named")
    names = ["evaluation.csv", "synthetic.png", "synthetic.safetensors"]
    assert sorted(path.name for path in Path("named").iterdir()) == names


@pytest.mark.parametrize("order", [(CSVLogger, TensorBoardLogger), (TensorBoardLogger, CSVLogger)])
def test_loggers_of_one_folder_share_a_version(tmp_path: Path, order: tuple[type[Any], ...]) -> None:
    for number in range(2):
        loggers = [make(tmp_path / "runs", name="one") for make in order]
        small.fit(tmp_path, small.network_module(), evaluation(), logger=loggers, steps=1)
        assert [Path(each.log_dir).name for each in loggers] == [f"version_{number}"] * 2
        names = {path.name.partition(".")[0] for path in Path(loggers[0].log_dir).iterdir()}
        assert names >= {"events", "metrics", "evaluation"}
    assert len(list((tmp_path / "runs" / "one").iterdir())) == 2


def test_optimizer_groups_have_names(store: Path, tmp_path: Path) -> None:
    module, monitor = small.module(store, labels="soft", label_lr=1.0), LearningRateMonitor()
    trainer = small.fit(tmp_path, module, monitor, logger=CSVLogger(tmp_path), steps=1)
    assert [group["name"] for group in trainer.optimizers[0].param_groups] == ["images", "student_lr", "labels"]
    assert set(monitor.lrs) == {"lr-SGD/images", "lr-SGD/student_lr", "lr-SGD/labels"}


def test_parts_can_be_replaced_before_a_fit(tmp_path: Path) -> None:
    module = small.network_module()
    module.objective = objective = dd.DistributionMatching(batch_real=8)
    module.pool = pool = small.network_pool(num_networks=2)
    assert (module.distillation.objective, module.distillation.pool) == (objective, pool)
    small.fit(tmp_path, module, steps=1)
    assert len(pool) == 2
    module.objective = dd.TrajectoryMatching()
    with pytest.raises(InputError, match="TrajectoryMatching learns from TrajectorySegment, but NetworkPool gives"):
        small.fit(tmp_path, module, steps=1)


def test_a_recipe_and_networks_of_ones_own(tmp_path: Path) -> None:
    points = evaluation(networks="ConvNet-1-W8", num_networks=1)
    small.fit(tmp_path, small.network_module(), points, steps=1)
    assert points.recipe == RECIPE
    assert {point.network for point in points.points} == {"ConvNet-1-W8"}


def test_batches_that_evaluation_cannot_normalize_are_refused_before_experts_are_trained(tmp_path: Path) -> None:
    points = evaluation(networks=[late_norm], recipe=dd.EvaluationRecipe(batch_size=5))
    with pytest.raises(InputError, match=r"recipe\.batch_size is 5, which leaves 1 of 6 images to the last batch"):
        small.fit(tmp_path, small.module(tmp_path / "experts"), points, steps=1)
    assert not (tmp_path / "experts").exists()


def test_a_comparison_that_fails_leaves_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points, real = evaluation(compare_random=True), dd.EvalCallback._train_and_test

    def fail(*given: Any) -> EvaluationPoint:  # noqa: ANN401
        if "random real images" in given[5:]:
            raise DivergenceError("it diverged")
        return real(*given)

    monkeypatch.setattr(dd.EvalCallback, "_train_and_test", fail)
    with pytest.warns(UserWarning, match="there is no comparison with random real images: it diverged"):
        small.fit(tmp_path, small.network_module(), points, steps=1)
    assert points.random_real is None
    assert points.last().step == 1
