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
        f"{name}: held-out accuracy against steps, mean ± std": [
            "Margin",
            [f"accuracy/{name}", f"evaluation/{name}/low", f"evaluation/{name}/high"],
        ]
        for name in curves
    }
    for writer in writers(trainer):
        writer.add_custom_scalars({"accuracy": charts})


def hyperparameters(module: DistillationModule) -> dict[str, Any]:
    """Return what tells one run from another: method, selection, data, network, size and seed."""
    trainer = module.trainer
    chosen = [each for each in trainer.callbacks if isinstance(each, TrajectorySelectionCallback)]  # type: ignore[attr-defined]
    options = {f"selection.{name}": getattr(each, name) for each in chosen for name in _selection_defaults()}
    return {
        "method": type(module.objective).__name__ + " + DynaDistill" * bool(chosen),
        "dataset": module.datamodule.name,
        "network": module.problem.network.name,
        "ipc": module.storage.ipc,
        "factor": module.storage.factor,
        "steps": trainer.max_steps,
        "seed": module.distillation.seed,
        **{name: value for name, value in options.items() if value is not None},
    }


def start_hparams(module: DistillationModule, metrics: Iterable[str]) -> None:
    """Describe the run for TensorBoard's hparams, which look the last values of the metrics up themselves.

    TensorBoard takes the columns from whichever run it reads first, so that each names those of a selection, too.
    """
    settings = hyperparameters(module)
    unset = {f"selection.{name}": 0 if value is None else value for name, value in _selection_defaults().items()}
    columns, *_ = hparams(unset | settings, dict.fromkeys(metrics, 0))
    _, start, _ = hparams(settings, {})
    for writer in writers(module.trainer):
        for summary in (columns, start):
            writer._get_file_writer().add_summary(summary)


def end_hparams(trainer: Trainer) -> None:
    """Tell TensorBoard's hparams that the run is finished."""
    for writer in writers(trainer):
        writer._get_file_writer().add_summary(hparams({}, {})[-1])


def _selection_defaults() -> dict[str, Any]:
    parameters = inspect.signature(TrajectorySelectionCallback).parameters
    return {name: parameter.default for name, parameter in parameters.items()}
