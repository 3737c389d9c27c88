"""The train loader of a distillation run: it hands out step numbers, not images."""

from collections.abc import Iterator

from lightning.pytorch import Trainer

from dd_lightning.functional.errors import InputError


class StepLoader:
    """Yields the distillation steps that are left: ``trainer.global_step .. trainer.max_steps - 1``.

    A distillation step draws its real images by itself, from the set on the device, so all it needs from a
    loader is its own number. The loader reads ``global_step`` each time it is iterated over; a run that was
    resumed therefore goes on with the first step that was not taken, and no loader state has to be stored.
    Its length is ``max_steps`` also then, because Lightning counts the batches before the checkpoint as
    fetched. The empty state tells Lightning, which would warn otherwise, that the loader can be resumed.

    Args:
        trainer: The trainer that runs the steps; its ``max_steps`` must be positive.

    Raises:
        InputError: If ``max_steps`` is not set, since the run would never end.
    """

    def __init__(self, trainer: Trainer) -> None:
        if trainer.max_steps < 1:
            raise InputError(
                f"trainer.max_steps is {trainer.max_steps}; a distillation run needs at least 1 step: "
                "set trainer.max_steps"
            )
        self._trainer = trainer

    def __len__(self) -> int:
        return self._trainer.max_steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._trainer.global_step, self._trainer.max_steps))

    def state_dict(self) -> dict[str, int]:
        """Return nothing: the trainer's ``global_step`` is all there is to know."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take back what :meth:`state_dict` returned."""
