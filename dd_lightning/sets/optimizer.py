"""How the synthetic set moves: its optimizer, and what its images' gradient goes through before."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dd_lightning.functional.distances import step_per_iteration
from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.sets.synthetic import SyntheticSet


@dataclass(frozen=True)
class SyntheticOptimizer:
    """How S moves: one optimizer with a parameter group each for images, student learning rate and soft labels.

    Args:
        image_optimizer: ``sgd``, as in the references, or ``adam`` (betas 0.9 and 0.999), for the images.
        image_lr: Learning rate of the images; 100 is MTT's for CIFAR-10 at ipc 1.
        momentum: Of the images' and the learning rate's SGD; 0.5 in the references.
        image_steps: ``joint`` or ``per_class``, see :func:`~dd_lightning.functional.distances.step_per_iteration`.
        equal_norm: Scale each step's image gradient to the running mean of its norm.
        processes: ``shard``: several processes share the work of each step, which is that of one process. ``average``:
            each takes a step of its own, with its own candidate and draws, and their mean gradient moves S.
        student_lr: Where the student's learning rate starts; 0.01 in MTT.
        student_lr_lr: Learning rate of the student's learning rate; 0 keeps it fixed.
        student_lr_floor: Least student learning rate; null is none, as in the reference.
        label_lr: Learning rate of soft labels; 0 keeps them fixed.
        label_momentum: Of the soft labels' SGD; 0.9 in DATM.

    Raises:
        InputError: If a number is out of range.
    """

    image_optimizer: Literal["sgd", "adam"] = "sgd"
    image_lr: float = 100.0
    momentum: float = 0.5
    image_steps: Literal["joint", "per_class"] = "joint"
    equal_norm: bool = False
    processes: Literal["shard", "average"] = "shard"
    student_lr: float = 0.01
    student_lr_lr: float = 1e-7
    student_lr_floor: float | None = None
    label_lr: float = 0.0
    label_momentum: float = 0.9

    def __post_init__(self) -> None:
        for name in ("image_lr", "student_lr_lr", "label_lr"):
            check_range(name, getattr(self, name), low=0)
        for name in ("student_lr", "student_lr_floor"):
            check_range(name, getattr(self, name), low=0, exclude_low=True, hint="0.01 is usual")
        for name in ("momentum", "label_momentum"):
            check_range(name, getattr(self, name), low=0, high=1, exclude_high=True)
        if self.image_optimizer == "adam" and self.image_steps == "per_class":
            raise InputError("image_steps is 'per_class', which is about SGD's momentum; use joint with Adam")

    def require_gradients(self, synthetic: SyntheticSet, learnable: frozenset[str]) -> None:
        """Require gradients of what moves, and of nothing else: DDP would wait for them."""
        synthetic.student_lr.requires_grad_(self.student_lr_lr > 0 and "student_lr" in learnable)
        if synthetic.label_kind == "soft":
            synthetic.targets.requires_grad_(self.label_lr > 0)

    def build(self, synthetic: SyntheticSet, learnable: frozenset[str], num_classes: int) -> torch.optim.SGD:
        """Return the optimizer of S, and require gradients of what it moves.

        Adam's direction replaces the images' gradient (:class:`ImageGradient`): their SGD then has no momentum.
        """
        image_lr, momentum = self.image_lr, self.momentum
        if self.image_steps == "per_class":
            image_lr, momentum = step_per_iteration(image_lr, momentum, num_classes)
        if self.image_optimizer == "adam":
            momentum = 0.0
        groups: list[tuple[str, Tensor, float, float]] = [("images", synthetic.images, image_lr, momentum)]
        self.require_gradients(synthetic, learnable)
        if synthetic.student_lr.requires_grad:
            groups.append(("student_lr", synthetic.student_lr, self.student_lr_lr, self.momentum))
        if synthetic.targets.requires_grad:
            groups.append(("labels", synthetic.targets, self.label_lr, self.label_momentum))
        return torch.optim.SGD([{"name": n, "params": [p], "lr": rate, "momentum": m} for n, p, rate, m in groups])


class ImageGradient:
    """Turns the images' gradient into the one that SGD is to follow: ``equal_norm`` and Adam, with their states."""

    def __init__(self, options: SyntheticOptimizer) -> None:
        self._options = options
        self._count = 0
        self._mean_norm = 0.0
        self._adam: torch.optim.Adam | None = None
        self._adam_state: dict[str, Any] | None = None

    def adjust(self, gradient: Tensor) -> None:
        """Change a gradient in place."""
        if self._options.equal_norm:
            norm = float(gradient.norm())
            self._count += 1
            self._mean_norm += (norm - self._mean_norm) / self._count
            gradient.mul_(self._mean_norm / norm if norm > 0 else 1.0)
        if self._options.image_optimizer == "sgd":
            return
        # Adam: the negative of the step that it takes at rate 1.
        if self._adam is None:
            self._adam = torch.optim.Adam([torch.zeros_like(gradient)], lr=1.0)
            if self._adam_state is not None:
                self._adam.load_state_dict(self._adam_state)
        (position,) = self._adam.param_groups[0]["params"]
        position.zero_()
        position.grad = gradient.clone()
        self._adam.step()
        gradient.copy_(-position)

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean of the norm and Adam's moments."""
        adam = self._adam_state if self._adam is None else self._adam.state_dict()
        return {"count": self._count, "mean_norm": self._mean_norm, "adam": adam}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._count, self._mean_norm = state["count"], state["mean_norm"]
        self._adam, self._adam_state = None, state["adam"]
