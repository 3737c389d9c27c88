"""What every pool of candidates offers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.real import RealSet
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
from dd_lightning.training.recipes import ExpertRecipe

CandidateKey = tuple[int, ...]
"""Which candidate of a pool; plain integers, so that it can be stored in a checkpoint."""


@dataclass(frozen=True)
class Candidate:
    """What one distillation step can learn from.

    Attributes:
        key: Where the pool keeps it.
        theta: Parameters of its network, [P], as the step finds them. They are read only.
    """

    key: CandidateKey
    theta: Tensor


TrainExperts = Callable[[ExpertStore, ExpertIdentity, ExpertRecipe, int, int], None]
"""(store, identity, recipe, number of experts, epochs): bring the store up to that many experts and epochs."""


@dataclass(frozen=True)
class PoolSetup:
    """What a pool is given once, before the first step.

    Attributes:
        network: The architecture of the candidates.
        real: The training data.
        dataset: Its name.
        fingerprint: Its fingerprint.
        device: Where candidates are wanted.
        train_experts: Trains what a store lacks; it comes from above, since training needs Lightning.
        seed: The run's seed, for what is drawn before the first step.
        progress_bar: Whether long work shows a bar.
        steps: Distillation steps of the whole run, those before a resumption included.
        say: Shows a line to the person who is going to wait.
    """

    network: FunctionalNetwork
    real: RealSet
    dataset: str
    fingerprint: str
    device: torch.device
    train_experts: TrainExperts
    seed: int = 0
    progress_bar: bool = False
    steps: int = 0
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class FullSetAccuracies:
    """What networks trained on the whole real set reach, where a pool knows it.

    Attributes:
        accuracies: Held-out accuracy of each, in [0, 1].
        description: How they were trained, in a few words.
    """

    accuracies: tuple[float, ...]
    description: str


class CandidatePool(ABC):
    """A set of candidates to draw from.

    Args:
        size: Number of candidates.
    """

    gives: ClassVar[type[Candidate]] = Candidate
    """Kind of its candidates."""

    same_in_every_process: ClassVar[bool] = True
    """Whether processes that learn from different candidates still hold the same pool."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise InputError(f"the pool holds {size} candidates; it needs at least 1")
        self.size = size

    def ensure(self, size: int) -> None:
        """Ask for at least ``size`` candidates; only before :meth:`prepare`."""
        self.size = max(self.size, size)

    @abstractmethod
    def prepare(self, setup: PoolSetup) -> None:
        """Make the candidates ready, training what is missing."""

    @abstractmethod
    def draw(self, count: int, context: StepContext, exclude: Sequence[CandidateKey] = ()) -> list[CandidateKey]:
        """Draw ``count`` distinct candidates uniformly from the stream "candidates".

        Args:
            count: How many.
            context: Where the run is.
            exclude: Candidates of earlier draws that the new ones join, and must be distinct from, too.
        """

    def generation(self, key: CandidateKey) -> int:
        """Return how often what a key names has been replaced by something else: what was known of it is void then."""
        del key
        return 0

    @property
    def shares_draw(self) -> bool:
        """Whether the candidates of a step must come from one draw, none of them kept from an earlier step."""
        return False

    @abstractmethod
    def load(self, key: CandidateKey) -> Candidate:
        """Return a candidate, on the device."""

    @abstractmethod
    def refresh(self, winner: CandidateKey, drawn: Sequence[CandidateKey], context: StepContext) -> None:
        """Update the pool after a step; called at the start of the next one, so that no checkpoint misses it."""

    @abstractmethod
    def feature_parameters(self) -> Tensor:
        """Return parameters [P] of a network whose features can cluster the real images before the first step."""

    def scalars(self) -> dict[str, float]:
        """Return what is worth a curve, by its name in the logs."""
        return {}

    def teacher_logits(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return soft labels [n, C] for images [n, ...] with hard labels [n]; a pool that cannot refuses."""
        raise InputError(
            f"labels is 'soft' for {len(images)} images of {len(labels)} labels, but {type(self).__name__} holds no "
            "trained experts to take logits from; use labels: hard"
        )

    def full_set_accuracies(self) -> FullSetAccuracies | None:
        """Return what training on the full real set reaches, if the pool knows."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        del state


def drawn_apart(size: int, count: int, generator: torch.Generator, exclude: Sequence[CandidateKey]) -> list[int]:
    """Draw ``count`` distinct numbers below ``size``, uniformly among those that no key of ``exclude`` begins with."""
    taken = {key[0] for key in exclude}
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return [number for number in order if number not in taken][:count]
