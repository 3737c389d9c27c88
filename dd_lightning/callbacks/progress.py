"""The progress of a run: steps, loss and the last accuracy."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import Progress, TaskID

from dd_lightning.callbacks.evaluation import EvalCallback
from dd_lightning.training.evaluation import percent
from dd_lightning.training.progress import live_progress

_LINES = 10


class StepProgressBar(ProgressBar):
    """One bar of steps in a terminal; in a file a line every tenth of them. Each evaluation is a line in both.

    To be passed after the :class:`EvalCallback`, whose accuracies it prints.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._printed: set[tuple[int, int, str]] = set()
        self._shown: tuple[Progress, TaskID] | None = None
        self._stack = ExitStack()

    def disable(self) -> None:
        """Show nothing; Lightning asks for it in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the progress."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        del pl_module
        self._printed.clear()
        if self._enabled:
            progress = self._stack.enter_context(live_progress())
            total = trainer.max_steps
            self._shown = progress, progress.add_task("step", total=total, completed=trainer.global_step)
        self._show(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  (Lightning's own signature)
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Move the bar, or write a line."""
        del pl_module, outputs, batch, batch_idx
        title, step, total = self._show(trainer), trainer.global_step, trainer.max_steps
        tenth = step * _LINES // total > (step - 1) * _LINES // total
        if self._shown is not None and self._shown[0].disable and tenth:
            self._print(self._shown[0], f"{title}  {step / total:.0%}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last evaluation."""
        del pl_module
        self._show(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        del trainer, pl_module
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar."""
        del trainer, pl_module, exception
        self._stop()

    def _stop(self) -> None:
        self._shown = None
        self._stack.close()

    def _show(self, trainer: Trainer) -> str:
        if self._shown is None:
            return ""
        (progress, task), step, total = self._shown, trainer.global_step, trainer.max_steps
        loss = trainer.progress_bar_metrics.get("loss")
        title = f"step {step}/{total}" + ("" if loss is None else f"  loss {float(loss):.4g}")
        progress.update(task, completed=step, description=title)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of Lightning sets it
        for number, callback in enumerate(each for each in callbacks if isinstance(each, EvalCallback)):
            for point in callback.points:
                if (key := (number, point.step, point.network)) not in self._printed:
                    self._printed.add(key)
                    count = len(point.accuracies)
                    self._print(
                        progress, f"step {point.step}: {percent(point.accuracies)} with {count} {point.network}"
                    )
        return title

    @staticmethod
    def _print(progress: Progress, line: str) -> None:
        progress.console.print(line, highlight=False, soft_wrap=True)
