"""Logging at exactly one step, to every logger."""

from collections.abc import Mapping

from lightning.pytorch import Trainer


def log_scalars(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Write values to all loggers at x = ``step``.

    ``LightningModule.log`` would write them at the next logging interval's x, and repeat them at later ones.
    """
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)


def logs_now(trainer: Trainer) -> bool:
    """Tell whether the Trainer's ``log_every_n_steps`` asks for this step's values."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # one of Lightning's connectors sets it
    return every > 0 and trainer.global_step % every == 0
