"""What a run asks of its Trainer: settings, logging at a step, and the other processes."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.distillation import Demand, Distillation
from dd_lightning.execution.options import Execution
from dd_lightning.execution.process import DistributedProcess, Process, SingleProcess, holds_anywhere
from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives import ScoredCandidate
from dd_lightning.pools import PoolSetup
from dd_lightning.version import __version__

DEFAULT_STEPS = 2000
"""Distillation steps when the Trainer is given no ``max_steps``: the paper's number for trajectory matching."""


def check_trainer(trainer: Trainer) -> Trainer:
    """Refuse settings under which a batch would not be a distillation step; without ``max_steps``, set the paper's.

    Returns:
        The same Trainer.

    Raises:
        InputError: If a setting is refused.
    """
    for name, value in (
        ("max_steps", trainer.max_steps),
        ("max_epochs", trainer.max_epochs),
        ("limit_train_batches", trainer.limit_train_batches),
    ):
        if value == 0:
            raise InputError(f"trainer.{name} is 0; a run needs at least 1 step")
    check_range("trainer.gradient_clip_val", trainer.gradient_clip_val, low=0, hint="null for no clipping")
    steps_between: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # one of Lightning's connectors sets it
    check_range("trainer.log_every_n_steps", steps_between, low=0, hint="10 is usual")
    if steps_between == 0 and trainer.loggers:
        rank_zero_warn("trainer.log_every_n_steps is 0: nothing but evaluations is logged")
    for timer in (each for each in trainer.callbacks if isinstance(each, Timer)):  # type: ignore[attr-defined]
        check_range("trainer.max_time", timer._duration, low=0, exclude_low=True, hint="seconds")
    check_monitors(trainer)
    for callback in (each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)):
        if callback.save_weights_only:
            raise InputError("checkpoint.save_weights_only is true; it must be false, or the run cannot be resumed")
        if callback.save_top_k == 0:
            raise InputError("checkpoint.save_top_k is 0, which saves nothing; set 1 or more, or -1 for all")
        if not (callback._every_n_train_steps or callback._every_n_epochs or callback._train_time_interval):
            raise InputError("checkpoint.every_n_train_steps is 0, which saves nothing on the way; set 1 or more")
    if overfit := vars(trainer)["overfit_batches"]:  # which Lightning declares nowhere
        raise InputError(f"trainer.overfit_batches is {overfit}; it must be 0: a batch is one step")
    if trainer.precision != "32-true":
        raise InputError(
            f"trainer.precision is {trainer.precision!r}; it must be '32-true', since autocast would reach the step, "
            "not the selection (use model.execution.precision)"
        )
    if trainer.accumulate_grad_batches != 1:
        raise InputError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; it must be 1: one batch is one "
            "distillation step"
        )
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        name = type(trainer.strategy).__name__
        raise InputError(f"trainer.strategy is {name}; it must be ddp for {trainer.world_size} processes")
    if trainer.max_steps == -1:
        trainer.fit_loop.epoch_loop.max_steps = DEFAULT_STEPS
        rank_zero_info(f"max_steps is not set: running the paper's {DEFAULT_STEPS} distillation steps")
    check_range("trainer.min_steps", trainer.min_steps, low=1, high=trainer.max_steps, hint="null for none")
    return trainer


def monitors(trainer: Trainer) -> list[EarlyStopping | ModelCheckpoint]:
    """Return the callbacks that may watch a metric."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # one of Lightning's connectors sets it
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping | ModelCheckpoint)]


def check_monitors(trainer: Trainer) -> None:
    """Refuse to monitor what nothing measures, or not when the callback looks.

    Raises:
        InputError: It names the metrics that there are, unless somebody's own callback or module may log another.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    intervals: dict[str, int] = {}
    for each in callbacks:
        intervals |= getattr(each, "metrics", {})  # an evaluation's
    ours = all(
        type(each).__module__.startswith(("dd_lightning.", "lightning."))
        for each in (*callbacks, trainer.lightning_module)
    )
    for callback in monitors(trainer):
        monitor, what = callback.monitor, type(callback).__name__
        # early stopping looks at evaluations alone
        others = ["loss", "step", "epoch"] if isinstance(callback, ModelCheckpoint) else []
        if monitor is None or monitor in others:
            continue
        if monitor not in intervals and (ours or monitor.startswith(("accuracy", "eval/"))):
            known = [metric for metric in intervals if metric.startswith("accuracy/")] + others[:1]
            use = f"it must be {' or '.join(known)}" if known else "give the Trainer an EvalCallback that measures it"
            raise InputError(f"{what}'s monitor is {monitor!r}; {use}")
        looks = getattr(callback, "_every_n_train_steps", 0)  # 0: at each evaluation
        if monitor in intervals and looks % intervals[monitor] != 0:
            raise InputError(
                f"{what}'s every_n_train_steps is {looks}, but its monitor {monitor} is measured every "
                f"{intervals[monitor]} steps; set a multiple of that, or null to look at each measurement"
            )


def share_version(trainer: Trainer) -> None:
    """Let the loggers that write to one folder write to one version of it."""
    files = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger | TensorBoardLogger)]
    for logger in files[1:]:
        if logger.root_dir == files[0].root_dir:
            logger._version = files[0].version
    for logger in files:
        if isinstance(logger, CSVLogger) and trainer.is_global_zero:
            _ = logger.experiment  # it would complain about files of the others


def run_folder(trainer: Trainer, *files: str) -> Path | None:
    """Return the folder of a run's files: the first logger's, or the ``default_root_dir`` that the Trainer was given.

    All processes must ask for it.

    Args:
        trainer: The run's.
        files: What is not saved without a folder: a warning says so.

    Returns:
        The folder; None if there is none but the current one, where nobody has asked for files.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if folder.resolve() != Path.cwd():
        return folder
    if files:
        rank_zero_warn(f"{', '.join(files)} will not be saved: give the Trainer a logger or a default_root_dir")
    return None


def attached_data(trainer: Trainer) -> DistillationDataModule:
    """Return the data that a Trainer was given.

    Raises:
        InputError: If it is not a DistillationDataModule.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, DistillationDataModule):
        trainer.datamodule = None  # type: ignore[attr-defined]  # Lightning asks it for hooks once more
        raise InputError(
            f"{'there is no data module' if data is None else f'the data module is a {type(data).__name__}'}; pass "
            "datamodule=DatasetDataModule(train_dataset, test_dataset), or another one of dd_lightning"
        )
    return data


def pool_setup(
    trainer: Trainer,
    run: Distillation,
    network: FunctionalNetwork,
    demand: Demand,
    execution: Execution,
    continues: bool,
) -> PoolSetup:
    """Return what a run's pool is given before the first step of a fit."""
    check_processes(process_of(trainer))
    data = attached_data(trainer)
    return PoolSetup(
        network,
        data.train,
        data.name,
        data.fingerprint,
        held_out=data.test,
        seed=run.seed,
        steps=trainer.max_steps,
        size=demand.pool_size,
        keeps_candidates=demand.keeps_candidates,
        soft_labels=run.storage.labels == "soft",
        continues=continues,
        execution=execution,
        process=process_of(trainer),
        progress_bar=trainer.progress_bar_callback is not None,
    )


def logs_now(trainer: Trainer) -> bool:
    """Tell whether the Trainer's ``log_every_n_steps`` asks for this step's values."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # one of Lightning's connectors sets it
    return every > 0 and trainer.global_step % every == 0


def log_scalars(trainer: Trainer, values: Mapping[str, float], step: int | None = None) -> None:
    """Write values to all loggers at exactly x = ``step``, the distillation step by default.

    ``LightningModule.log`` would write them at the next logging interval's x, and repeat them at later ones.
    """
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=trainer.global_step if step is None else step)


def log_step(trainer: Trainer, run: Distillation, scored: ScoredCandidate) -> None:
    """Write what a step has to report if it is its turn, at the end of an outer iteration against these, too."""
    if logs_now(trainer):
        log_scalars(trainer, run.scalars(scored))
        if run.outer_iteration is not None:
            log_scalars(trainer, {"outer/loss": float(scored.loss)}, run.outer_iteration)


def process_of(trainer: Trainer) -> Process:
    """Return this process among those of the Trainer."""
    return SingleProcess() if trainer.world_size == 1 else DistributedProcess(trainer.strategy.root_device)


def check_processes(process: Process) -> None:
    """Refuse processes that run other code.

    Raises:
        InputError: If the versions of this package or of torch differ.
    """
    own = f"dd_lightning {__version__} with torch {torch.__version__}"
    first = process.broadcast(own)
    if holds_anywhere(process, own != first):
        raise InputError(f"process {process.rank} runs {own}, process 0 {first}: install the same on all machines")


def sum_gradients(trainer: Trainer, run: Distillation) -> None:
    """Let gradients be summed over processes that share a step: each has a part, or one has all and the others 0."""
    if run.shared and isinstance(model := trainer.strategy.model, DistributedDataParallel):
        model.register_comm_hook(None, _summed)


def _summed(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    del state
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
