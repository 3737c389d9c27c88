"""What every pool of candidates offers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dd_lightning.execution.options import Execution
from dd_lightning.execution.process import Process, SingleProcess
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.real import RealSet

CandidateKey = tuple[int, ...]
"""Which candidate of a pool; plain integers, so that a checkpoint can hold it."""


@dataclass(frozen=True)
class Candidate:
    """What one distillation step can learn from.

    Attributes:
        key: Where the pool keeps it.
        theta: Parameters of its network, ``[P]``, as the step finds them. They are read only.
    """

    key: CandidateKey
    theta: Tensor


@dataclass(frozen=True)
class PoolSetup:
    """What a pool is given before the first step of a fit.

    Attributes:
        network: The architecture of the candidates.
        real: The training data, on the device where candidates are wanted.
        dataset: Its name.
        fingerprint: Its fingerprint.
        held_out: What the accuracy of experts is measured on.
        seed: The run's seed, for draws before the first step.
        steps: Distillation steps of the whole run, those before a resumption included.
        size: Candidates that the pool must at least hold.
        keeps_candidates: Whether candidates of earlier steps stand beside new ones.
        soft_labels: Whether S takes its labels from the pool's networks.
        continues: Whether the fit goes on from what the pool holds of an earlier one; else it starts clean.
        execution: How the run is computed.
        process: This process among those of the run.
        progress_bar: Whether long work shows a bar.
    """

    network: FunctionalNetwork
    real: RealSet
    dataset: str
    fingerprint: str
    held_out: RealSet | None = None
    seed: int = 0
    steps: int = 0
    size: int = 1
    keeps_candidates: bool = False
    soft_labels: bool = False
    continues: bool = False
    execution: Execution = field(default_factory=Execution)
    process: Process = field(default_factory=SingleProcess)
    progress_bar: bool = False


class CandidatePool(ABC):
    """A set of candidates to draw from.

    ``len(pool)`` is their number; before :meth:`prepare`, that of the configuration. ``key in pool`` tells whether a
    key of an earlier draw still names the same thing: if not, what was known of it is void.
    """

    candidate_type: ClassVar[type[Candidate]] = Candidate
    """Kind of its candidates."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of candidates."""

    def __contains__(self, key: CandidateKey) -> bool:
        return key[0] < len(self)

    @abstractmethod
    def prepare(self, setup: PoolSetup) -> None:
        """Make the candidates ready for a fit, training what is missing.

        Raises:
            InputError: If the pool cannot do what the run needs; before anything is trained.
        """

    @abstractmethod
    def draw(self, count: int, context: StepContext, exclude: Sequence[CandidateKey] = ()) -> list[CandidateKey]:
        """Draw ``count`` distinct candidates uniformly from the stream "candidates".

        Args:
            count: How many.
            context: Where the run is.
            exclude: Candidates of earlier draws that the new ones join, and must differ from, too.
        """

    @abstractmethod
    def load(self, key: CandidateKey) -> Candidate:
        """Return what is in a candidate's place now, on the device, under its present key."""

    @abstractmethod
    def update(self, winner: CandidateKey, drawn: Sequence[CandidateKey], context: StepContext) -> None:
        """Update the pool after a step; called at the start of the next one, so that no checkpoint misses it."""

    @abstractmethod
    def networks(self) -> Iterator[Tensor]:
        """Yield the parameters ``[P]`` of the pool's networks, as trained as they are before the first step.

        Their features cluster the real images, and their logits are soft labels.
        """

    def scalars(self) -> dict[str, float]:
        """Return what deserves a curve, by its name in the logs."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Return what a run's summary says of the pool, as plain values.

        Known entries are ``full_set``, what training on the full real set reaches (``{"accuracies": [...], "trained":
        how}``), and ``seconds_training_experts``.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        del state


def drawn_apart(size: int, count: int, generator: torch.Generator, exclude: Sequence[CandidateKey]) -> list[int]:
    """Draw ``count`` distinct numbers below ``size``, uniformly among those that no key of ``exclude`` begins with.

    Raises:
        InputError: If there are not so many.
    """
    taken = {key[0] for key in exclude}
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    drawn = [number for number in order if number not in taken][:count]
    if len(drawn) < count:
        raise InputError(f"a step draws {count + len(taken)} candidates, but the pool holds {size}; set pool_size")
    return drawn


def teacher_logits(network: FunctionalNetwork, thetas: Iterator[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Return soft labels as DATM makes them.

    Args:
        network: The architecture.
        thetas: Parameters ``[P]`` of trained networks.
        images: ``[n, ch, H, W]``.
        labels: Their classes, ``[n]``.

    Returns:
        Logits ``[n, C]``, averaged over the networks that classify an image correctly; over all if none does.
    """
    total = torch.zeros(len(images), network.num_classes, device=images.device)
    correct_total, correct_count = torch.zeros_like(total), torch.zeros(len(images), 1, device=images.device)
    count = 0
    with torch.no_grad():
        for theta in thetas:
            count += 1
            logits = network(theta, images)
            correct = (logits.argmax(1) == labels).float().unsqueeze(1)
            total += logits
            correct_total += correct * logits
            correct_count += correct
    return torch.where(correct_count > 0, correct_total / correct_count.clamp_min(1), total / count)
