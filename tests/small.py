"""A whole distillation run in a fraction of a second: generated data, a tiny network, few steps."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import TensorDataset

from dd_lightning.callbacks import EvalCallback, TrajectorySelectionCallback
from dd_lightning.cli.main import main
from dd_lightning.datamodules import DatasetDataModule
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import GradientMatching, TrajectoryMatching
from dd_lightning.pools import NetworkPool, TrajectoryPool
from dd_lightning.sets.synthetic_file import load_synthetic
from dd_lightning.training.recipes import ExpertRecipe, NetworkRecipe

NETWORK, CLASSES, SHAPE = "ConvNet-1-W4", 3, (1, 8, 8)
EXPERTS, EPOCHS = 4, 3
RECIPE = ExpertRecipe(lr=0.05, batch_size=30)
# 90 images are six batches, the last one of 10; 40 images are three
LIVE_RECIPE = NetworkRecipe(lr=0.05, batch_size=16, images_per_update=40)


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


def network_pool(**options: Any) -> NetworkPool:  # noqa: ANN401
    settings: dict[str, Any] = {"age_limit": 3, "recipe": LIVE_RECIPE}
    return NetworkPool(**(settings | options))


def network_module(pool_options: dict[str, Any] | None = None, **options: Any) -> DistillationModule:  # noqa: ANN401
    """Like ``module``, on live networks."""
    settings: dict[str, Any] = {
        "objective": GradientMatching(batch_real=8),
        "pool": network_pool(**(pool_options or {})),
        "network": NETWORK,
        "ipc": 2,
        "image_lr": 0.1,
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
    datamodule: DatasetDataModule | None = None,
    **options: Any,  # noqa: ANN401
) -> Trainer:
    """Run a distillation and return its Trainer."""
    runner = trainer(folder, steps, callbacks, **options)
    with warnings.catch_warnings():
        # Resumed runs write beside the checkpoint they come from; skipped steps return None.
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", ".training_step. returned .None.")
        runner.fit(distilled, datamodule=datamodule or data(), ckpt_path=ckpt_path, weights_only=True)
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
    """Kill the run at the end of a step, before that step's checkpoint is written, and without a chance to save."""

    def __init__(self, after_step: int) -> None:
        self.after_step = after_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == self.after_step:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_exception = lambda *_: None
            raise KilledError


def command_line(folder: Path, store: Path) -> list[str]:
    """Write a configuration of a small run on the digits, and return the options that use it."""
    path = folder / "small.yaml"
    pool_options = {
        "path": str(store),
        "num_experts": EXPERTS,
        "expert_epochs": 1,
        "max_start_epoch": EPOCHS,
        "recipe": {"lr": 0.05, "batch_size": 256},
    }
    config = {
        "seed_everything": 3,
        "name": "small",  # typed as well: with a selection it would end in _dynadistill
        "runs": str(folder / "runs"),
        "model": {
            "network": NETWORK,
            "image_lr": 10.0,
            "student_lr": 0.05,
            "student_lr_lr": 1e-3,
            "objective": {"class_path": "TrajectoryMatching", "init_args": {"syn_steps": 2}},
            "pool": {"class_path": "TrajectoryPool", "init_args": pool_options},
        },
        "data": {"class_path": "DigitsDataModule"},
        "evaluation": {"every_n_steps": 4, "epochs": 2, "num_networks": 2},
        "checkpoint": {"every_n_train_steps": 2},
        "trainer": {"accelerator": "cpu", "max_steps": 6, "log_every_n_steps": 1, "enable_progress_bar": False},
    }
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path), "--name", str(config["name"])]


def network_command_line(folder: Path) -> list[str]:
    """Like ``command_line``, on live networks, with tiles stored as pixels."""
    path = folder / "networks.yaml"
    recipe = {"lr": 0.05, "batch_size": 64, "images_per_update": 64}
    config = {
        "seed_everything": 3,
        "name": "networks",
        "runs": str(folder / "runs"),
        "model": {
            "network": NETWORK,
            "factor": 2,
            "image_space": "pixels",
            "image_lr": 0.02,
            "inner_loop": 2,
            "clamp": True,
            "objective": {"class_path": "GradientMatching", "init_args": {"batch_real": 8}},
            "pool": {"class_path": "NetworkPool", "init_args": {"age_limit": 2, "recipe": recipe}},
        },
        "data": {"class_path": "DigitsDataModule"},
        "evaluation": {"every_n_steps": 4, "epochs": 2, "num_networks": 2},
        "checkpoint": {"every_n_train_steps": 2},
        "trainer": {"accelerator": "cpu", "max_steps": 3, "log_every_n_steps": 1, "enable_progress_bar": False},
    }
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path), "--name", str(config["name"])]


@dataclass
class Cli:
    """Runs commands in this process, and keeps what they printed."""

    folder: Path
    store: Path
    capsys: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    def __call__(self, *arguments: str) -> None:
        try:
            main(arguments)
        finally:
            self.out, self.err = self.capsys.readouterr()

    def fit(self, *options: str, before: tuple[str, ...] = ()) -> None:
        """Run the small configuration, with options after it, or before it."""
        self("fit", *before, *command_line(self.folder, self.store), *options)

    def fit_networks(self, *options: str) -> None:
        """Run the small configuration on live networks, with options after it."""
        self("fit", *network_command_line(self.folder), *options)

    def kill(self, after_step: int, *options: str) -> None:
        """Run it until it is killed."""
        killer = ["--trainer.callbacks+=tests.small.Kill", f"--trainer.callbacks.after_step={after_step}"]
        with pytest.raises(KilledError):
            self.fit(*options, *killer)

    def refused(self, *arguments: str, status: int = 1) -> str:
        """Run a command that must fail with one line, and return that line."""
        with pytest.raises(SystemExit) as stopped:
            self(*arguments)
        assert stopped.value.code == status
        lines = [line for line in self.err.splitlines() if line.startswith("dd-lightning: error: ")]
        assert len(lines) == 1
        assert self.err.splitlines()[-1] == lines[0]
        assert "Traceback" not in self.err
        assert "usage:" not in self.err
        assert self.out == ""
        return lines[0]

    def fit_refused(self, *options: str, status: int = 1) -> str:
        return self.refused("fit", *command_line(self.folder, self.store), *options, status=status)

    def networks_refused(self, *options: str, status: int = 1) -> str:
        return self.refused("fit", *network_command_line(self.folder), *options, status=status)

    def version(self, number: int = 0, name: str = "small") -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / name / f"version_{number}"

    def learned(self, number: int = 0, name: str = "small") -> tuple[Tensor, ...]:
        """Return the images that a run wrote, and the student's learning rate if it learned one."""
        file = load_synthetic(self.version(number, name) / "synthetic.safetensors")
        return (file.images,) if file.lr is None else (file.images, torch.tensor(file.lr))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files directly in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
