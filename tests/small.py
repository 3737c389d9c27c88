"""A whole distillation run in a fraction of a second: generated data, a tiny network, few steps."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import TensorDataset

from dd_lightning.callbacks import EvalCallback, TrajectorySelectionCallback
from dd_lightning.data import DatasetDataModule
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import TrajectoryMatching
from dd_lightning.pools import TrajectoryPool
from dd_lightning.recipes import ExpertRecipe

NETWORK, CLASSES, SHAPE = "ConvNet-1-W4", 3, (1, 8, 8)
EXPERTS, EPOCHS = 4, 3
RECIPE = ExpertRecipe(lr=0.05, batch_size=30)


def dataset(count: int, seed: int) -> TensorDataset:
    """Return noise around one pattern per class, pixels in [0, 1]."""
    patterns = torch.rand(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % CLASSES
    noise = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(0.5 * patterns[labels] + 0.5 * noise, labels)


def data(seed: int = 0, **options: Any) -> DatasetDataModule:  # noqa: ANN401
    return DatasetDataModule(dataset(90, seed), dataset(60, seed + 1), name="patterns", **options)


def pool(store: Path, **options: Any) -> TrajectoryPool:  # noqa: ANN401
    settings: dict[str, Any] = {"num_experts": EXPERTS, "expert_epochs": 1, "max_start_epoch": EPOCHS}
    return TrajectoryPool(str(store), recipe=RECIPE, **(settings | options))


def module(
    store: Path,
    pool_options: dict[str, Any] | None = None,
    syn_steps: int = 2,
    **options: Any,  # noqa: ANN401
) -> DistillationModule:
    settings: dict[str, Any] = {
        "objective": TrajectoryMatching(syn_steps=syn_steps),
        "pool": pool(store, **(pool_options or {})),
        "network": NETWORK,
        "ipc": 2,
        "image_lr": 10.0,
        "student_lr": 0.05,
        "student_lr_lr": 1e-3,
        "seed": 5,
    }
    return DistillationModule(**(settings | options))


def evaluation(**options: Any) -> EvalCallback:  # noqa: ANN401
    settings: dict[str, Any] = {"every_n_steps": 2, "num_networks": 2, "epochs": 2, "compare_random": False}
    return EvalCallback(**(settings | options))


def selection(**options: Any) -> TrajectorySelectionCallback:  # noqa: ANN401
    return TrajectorySelectionCallback(**options)


def trainer(
    folder: Path,
    steps: int = 6,
    callbacks: Sequence[Callback] = (),
    logger: Logger | list[Logger] | bool = False,
    **options: Any,  # noqa: ANN401
) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "num_sanity_val_steps": 0,
        "logger": logger,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=list(callbacks), **(settings | options))


def fit(
    folder: Path,
    distilled: DistillationModule,
    *callbacks: Callback,
    steps: int = 6,
    ckpt_path: Path | None = None,
    **options: Any,  # noqa: ANN401
) -> Trainer:
    """Run a distillation and return its Trainer."""
    runner = trainer(folder, steps, callbacks, **options)
    with warnings.catch_warnings():
        # Resumed runs write beside the checkpoint they come from; skipped steps return None.
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", ".training_step. returned .None.")
        runner.fit(distilled, datamodule=data(), ckpt_path=ckpt_path, weights_only=True)
    return runner


def checkpoints(folder: Path, every_n_steps: int = 1) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every_n_steps, save_top_k=-1)


def learned(distilled: DistillationModule) -> tuple[Tensor, Tensor]:
    """Return copies of the images and the student's learning rate."""
    synthetic = distilled.synthetic_set
    return synthetic.images.detach().clone(), synthetic.student_lr.detach().clone()


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """Tell whether two runs learned the same to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class KilledError(Exception):
    """Stands for a process that is killed."""


class Kill(Callback):
    """Kill the run at the end of a step, before that step's checkpoint is written."""

    def __init__(self, after_step: int) -> None:
        self.after_step = after_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == self.after_step:
            raise KilledError
