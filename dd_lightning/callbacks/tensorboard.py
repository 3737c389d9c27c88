"""What TensorBoard shows of a run beside its curves: hparams, charts with bands, texts."""

import inspect
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from dd_lightning.callbacks.selection import TrajectorySelectionCallback
from dd_lightning.module import DistillationModule


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """Return the writers of the Trainer's TensorBoard loggers; none on processes other than the first."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def log_texts(trainer: Trainer, **texts: str) -> None:
    """Show texts as they are, each under its name; empty ones are left out."""
    for writer in writers(trainer):
        for name, text in texts.items():
            if text:
                indented = text.replace("\n", "\n    ")  # a code block in Markdown
                writer.add_text(name, f"    {indented}", 0)


def lay_out_bands(trainer: Trainer, curves: Iterable[str]) -> None:
    """Let the tab of custom scalars show accuracy curves with bands; runs that have the same curve share its chart.

    Args:
        trainer: Its loggers are written to.
        curves: Names of the curves, of all evaluations: a run has one layout.
    """
    charts = {
        f"{name}, mean ± std": ["Margin", [f"accuracy/{name}", f"evaluation/{name}/low", f"evaluation/{name}/high"]]
        for name in curves
    }
    for writer in writers(trainer):
        writer.add_custom_scalars({"held-out accuracy against distillation steps": charts})


def hyperparameters(module: DistillationModule) -> dict[str, Any]:
    """Return what tells one run from another: method, selection, data, network, size and seed."""
    trainer = module.trainer
    selection = next((c for c in trainer.callbacks if isinstance(c, TrajectorySelectionCallback)), None)  # type: ignore[attr-defined]
    names = inspect.signature(TrajectorySelectionCallback).parameters if selection is not None else ()
    return {
        "method": "DynaDistill + " * (selection is not None) + type(module.objective).__name__,  # columns are narrow
        "selection.num_candidates": 1,  # so is the base method; TensorBoard shows first what differs among the runs
        **{f"selection.{name}": value for name in names if (value := getattr(selection, name)) is not None},
        "dataset": module.datamodule.name,
        "network": module.problem.network.name,
        "ipc": module.storage.ipc,
        "steps": trainer.max_steps,
        "seed": module.distillation.seed,
    }


def log_hyperparameters(module: DistillationModule, finished: bool = False) -> None:
    """Describe the run to its loggers at its start; for TensorBoard's hparams, also tell when it is finished.

    The values of metrics are those of its curves, which TensorBoard looks up itself; its logger would chart one point
    for each.
    """
    settings = hyperparameters(module)
    _, start, end = hparams(settings, {})
    for writer in writers(module.trainer):
        writer._get_file_writer().add_summary(end if finished else start)
    for logger in module.trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(settings)
