"""What callbacks of a DistillationModule share."""

import weakref

from lightning.pytorch import Callback, LightningModule, Trainer

from dd_lightning.functional.errors import InputError
from dd_lightning.module import DistillationModule


def as_distillation(module: LightningModule) -> DistillationModule:
    """Return the module that a callback was called with, as what it must be.

    Raises:
        InputError: If it is another kind of module.
    """
    if not isinstance(module, DistillationModule):
        raise InputError(f"the callback is attached to {type(module).__name__}; it needs a DistillationModule")
    return module


class RunCallback(Callback):
    """A callback whose state belongs to one run: a fit by another Trainer starts anew, one by the same goes on.

    Lightning skips the start and end of training where a checkpoint has no steps left; they are made up for after the
    fit, so that a run that was stopped at its very end is completed.
    """

    _last_trainer: weakref.ref[Trainer] | None = None
    _trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run; a checkpoint is loaded after this."""
        del pl_module
        self._trained = False
        if stage == "fit" and (self._last_trainer is None or self._last_trainer() is not trainer):
            self._last_trainer = weakref.ref(trainer)
            self.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there are steps to take."""
        del trainer, pl_module
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete a run that had no steps left."""
        if not self._trained:
            pl_module.to(trainer.strategy.root_device)
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def reset(self) -> None:
        """Set the state to what it is before the first step."""
        raise NotImplementedError
