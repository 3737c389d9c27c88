"""The train loader of a distillation run: it hands out step numbers, not images."""

from collections.abc import Iterator

from lightning.pytorch import Trainer

from dd_lightning.functional.errors import check_range


class StepLoader:
    """Yields the distillation steps that are left: ``trainer.global_step .. trainer.max_steps - 1``.

    A step draws its real images itself, from the set on the device, so all it needs from a loader is its number. The
    loader reads ``global_step`` whenever it is iterated over, so a resumed run goes on with the first step that was not
    taken, and no loader state has to be stored. Its length stays ``max_steps``, because Lightning counts the batches
    before the checkpoint as fetched. The empty state tells Lightning that the loader can be resumed; it would warn.

    Args:
        trainer: The trainer that runs the steps.

    Raises:
        InputError: If its ``max_steps`` is not set, since the run would never end.
    """

    def __init__(self, trainer: Trainer) -> None:
        check_range("trainer.max_steps", trainer.max_steps, 1)
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
