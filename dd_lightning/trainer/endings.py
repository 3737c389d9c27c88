"""Orderly endings: however a run stops, a checkpoint of its last finished step is left."""

import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from dd_lightning.execution.process import holds_anywhere
from dd_lightning.functional.errors import DistillationError, DivergenceError
from dd_lightning.trainer.checkpoints import AtomicCheckpointIO
from dd_lightning.trainer.run import process_of

_SAVES = getattr(signal, "SIGUSR1", None)  # what schedulers send before they stop a job; not on Windows


class Endings(Callback):
    """Save at the end, at Ctrl-C, SIGTERM, SIGUSR1 (and go on), and at an exception.

    A signal that arrives within a step takes effect at its end, otherwise at once; a second Ctrl-C always does. The
    process then exits with 128 + the signal's number. Where SIGUSR1 has a handler, such as that of Lightning's SLURM
    requeue, that one and the one of SIGTERM stay.
    A run that diverged keeps the checkpoints that it has.
    """

    def __init__(self) -> None:
        self.last_checkpoint: Path | None = None
        """The newest checkpoint that was written here."""
        self._handlers: dict[int, Any] = {}
        self._holds = False
        self._stop: signal.Signals | None = None
        self._agreed = False
        self._save_asked = False
        self._first_step = 0
        self._trained = False

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Watch over a Trainer's endings, before all its other callbacks, and make its checkpoints atomic."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of Lightning sets it
        if not any(isinstance(callback, cls) for callback in callbacks):
            callbacks.insert(0, cls())
        if type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over, in the main thread: the only one that may."""
        del pl_module
        self._first_step, self._stop, self._save_asked, self._trained = trainer.global_step, None, False, True
        self._agreed = False
        self._holds = trainer.world_size > 1  # several processes stop after the same step
        if threading.current_thread() is not threading.main_thread():
            return
        requeued = _SAVES is not None and signal.getsignal(_SAVES) is not signal.SIG_DFL
        for number in (signal.SIGINT,) if requeued else (signal.SIGINT, signal.SIGTERM, _SAVES):
            if number is not None:
                self._handlers[number] = signal.signal(number, self._on_signal)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Hold signals back: within a step there is nothing whole to save."""
        del trainer, pl_module, batch, batch_idx
        self._holds = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  (Lightning's own signature)
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Do what a signal has asked for meanwhile."""
        del pl_module, outputs, batch, batch_idx
        self._holds = trainer.world_size > 1
        process = process_of(trainer)
        if holds_anywhere(process, self._save_asked):
            self._save_asked = False
            rank_zero_info(f"SIGUSR1: step {trainer.global_step} is saved in {self.save(trainer)}; going on")
        if holds_anywhere(process, self._stop is not None):
            self._agreed = True
            self._raise()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, before what may take minutes: the closing evaluation."""
        del pl_module
        path = self.save(trainer)
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if ends and trainer.global_step < trainer.max_steps and path is not None:
            rank_zero_info(
                f"stopped at step {trainer.global_step} of {trainer.max_steps}; resume with ckpt_path {path}"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last finished step, and say how to go on."""
        del pl_module
        self._holds = True
        if trainer.global_step > self._first_step and not isinstance(exception, DivergenceError):
            try:
                if trainer.world_size == 1 or self._agreed:
                    self.save(trainer)
                elif trainer.is_global_zero:
                    self._save_alone(trainer)
            except (OSError, DistillationError) as error:
                rank_zero_info(f"step {trainer.global_step} is not saved: {error}")
        self._restore_handlers()
        if self.last_checkpoint is None:  # it diverged, or the disk is full
            written = [path for writer in self._writers(trainer) for path in Path(str(writer.dirpath)).glob("*.ckpt")]
            self.last_checkpoint = max(written, key=lambda path: path.stat().st_mtime, default=None)
        if self.last_checkpoint is not None:
            why = self._stop.name if self._stop is not None else type(exception).__name__
            rank_zero_info(f"{why} at step {trainer.global_step}; resume with ckpt_path {self.last_checkpoint}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that there were no steps left, where callbacks now complete what a finished run lacks."""
        del pl_module
        if not self._trained and trainer.global_step >= trainer.max_steps:
            rank_zero_info(
                f"the checkpoint's run has taken {trainer.global_step} steps, max_steps is {trainer.max_steps}: "
                "nothing is left to train; completing its evaluation and its set"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        del trainer, pl_module, stage
        self._restore_handlers()
        self._trained = False

    def save(self, trainer: Trainer) -> Path | None:
        """Write a checkpoint of the last finished step where the run's others are, unless there is one.

        Returns:
            Its path; None if the Trainer writes no checkpoints.
        """
        if not (writers := self._writers(trainer)):
            return None
        # One without a monitor counts the file among its own, and removes the one before.
        writer = next((each for each in writers if each.monitor is None and each.save_top_k != 0), None)
        if writer is None:
            path = Path(str(writers[0].dirpath)) / f"step={trainer.global_step}.ckpt"
            if not path.exists():
                trainer.save_checkpoint(path)
        else:
            if writer._last_global_step_saved != trainer.global_step:
                writer._save_topk_checkpoint(trainer, writer._monitor_candidates(trainer))
            path = Path(writer.best_model_path)
        self.last_checkpoint = path
        return path

    def _save_alone(self, trainer: Trainer) -> None:
        """Write a checkpoint without the other processes, of which one may be dead: all have the same state."""
        if writers := self._writers(trainer):
            path = Path(str(writers[0].dirpath)) / f"step={trainer.global_step}.ckpt"
            if not path.exists():
                content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.checkpoint_io.save_checkpoint(content, path)
            self.last_checkpoint = path

    @staticmethod
    def _writers(trainer: Trainer) -> list[ModelCheckpoint]:
        return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == _SAVES:
            self._save_asked = True
            return
        self._stop = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._holds:
            self._raise()
        with suppress(OSError, RuntimeError):  # printing may itself have been interrupted
            rank_zero_info(f"{self._stop.name}: stopping after this step; Ctrl-C stops at once")

    def _raise(self) -> None:
        raise SystemExit(128 + (self._stop or signal.SIGTERM))

    def _restore_handlers(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            if signal.getsignal(number) == self._on_signal:  # Lightning may have put back those of before the fit
                signal.signal(number, handler)
