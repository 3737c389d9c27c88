"""The synthetic set as files and as a picture in TensorBoard."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dd_lightning.callbacks.attached import RunCallback, as_distillation
from dd_lightning.callbacks.evaluation import EvalCallback
from dd_lightning.callbacks.tensorboard import log_texts, writers
from dd_lightning.functional.errors import DistillationError, DivergenceError, check_range
from dd_lightning.module import DistillationModule
from dd_lightning.sets.atomic_write import write_atomically
from dd_lightning.sets.pictures import image_grid, png_bytes
from dd_lightning.sets.synthetic_file import SyntheticFile, save_synthetic


class SyntheticSetWriter(RunCallback):
    """Write ``synthetic.safetensors`` and ``synthetic.png`` beside the logs, and the picture to TensorBoard.

    Args:
        every_n_steps: Distance between writes; the first and the last step are always written.
        max_per_class: Images per class in the picture.

    Raises:
        InputError: If a number is below 1.
    """

    FILE = "synthetic.safetensors"
    PICTURE = "synthetic.png"

    def __init__(self, every_n_steps: int = 100, max_per_class: int = 10) -> None:
        check_range("writer.every_n_steps", every_n_steps, low=1)
        check_range("writer.max_per_class", max_per_class, low=1)
        self.every_n_steps = every_n_steps
        self.max_per_class = max_per_class
        self.config: dict[str, Any] = {}
        """The run's resolved configuration, to be kept in the file; the command line sets it."""
        self.command = ""
        """What was typed, for TensorBoard's texts; the command line sets it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the initial set, and show how the run was started."""
        super().on_train_start(trainer, pl_module)
        config = yaml.safe_dump(self.config, sort_keys=False) if self.config else ""
        log_texts(trainer, command=self.command, config=config)
        self.write(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  (Lightning's own signature)
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Write every n-th step."""
        del outputs, batch, batch_idx
        if trainer.global_step % self.every_n_steps == 0:
            self.write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last set."""
        if trainer.global_step % self.every_n_steps != 0:
            self.write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the set of the last finished step; a run that diverged keeps the one it has."""
        if self._trained and not isinstance(exception, DivergenceError) and trainer.world_size == 1:
            try:
                self.write(trainer, pl_module)
            except (OSError, DistillationError) as error:
                rank_zero_warn(f"the synthetic set of step {trainer.global_step} is not written: {error}")

    def reset(self) -> None:
        """Hold nothing of a run but its configuration."""

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the current set, file and picture."""
        module = as_distillation(pl_module)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked for by all processes: it is a broadcast
        if not trainer.is_global_zero:
            return
        recipe = next((asdict(c.recipe) for c in trainer.callbacks if isinstance(c, EvalCallback)), {})  # type: ignore[attr-defined]
        file = synthetic_file(module, trainer.global_step, recipe, self.config)
        save_synthetic(folder / self.FILE, file)
        grid = image_grid(file.stored_pixels(), file.num_classes, self.max_per_class, file.class_names)
        write_atomically(folder / self.PICTURE, png_bytes(grid))
        for board in writers(trainer):
            board.add_image("synthetic", grid, trainer.global_step)


def synthetic_file(
    module: DistillationModule, step: int, recipe: dict[str, Any], config: dict[str, Any]
) -> SyntheticFile:
    """Return the module's synthetic set with all that is needed to evaluate it years later."""
    synthetic, data, run = module.synthetic_set, module.datamodule, module.distillation
    return SyntheticFile(
        images=synthetic.images.detach().cpu(),
        labels=synthetic.targets.detach().cpu(),
        num_classes=data.num_classes,
        space=data.space,
        stored_as=synthetic.image_space,
        formation=synthetic.formation,
        lr=run.student_lr if "student_lr" in module.objective.learnable else None,
        evaluation_lr=run.student_lr,
        evaluation_recipe=recipe,
        dataset=data.name,
        fingerprint=data.fingerprint,
        val_fraction=data.val_fraction,
        split_seed=data.split_seed,
        class_names=list(data.class_names),
        objective=type(module.objective).__name__,
        network=run.problem.network.name,
        step=step,
        config=config,
    )
