"""What every matching objective offers: score candidates cheaply, then make the winner's loss differentiable."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from dd_lightning.execution.memory import MemoryEstimate, MemoryPart
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools.base import Candidate, CandidatePool
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import SyntheticSet


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate with its matching loss on the current synthetic set.

    Attributes:
        candidate: The candidate.
        loss: Matching loss, a scalar without a graph.
        draw: The random draw it was scored with, shared by all candidates of a step.
        work: Whatever scoring computed that the gradient can reuse.
        terms: The parts that the loss is the sum of, if it has several: scalars to be logged by their names.
    """

    candidate: Candidate
    loss: Tensor
    draw: Any
    work: Any
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class MatchingObjective(ABC):
    """Maps (S, T, candidate) to the matching loss.

    What a draw and a scoring consist of is each objective's own affair: callers pass them on unread.
    """

    candidates: ClassVar[type[Candidate]] = Candidate
    """Kind of candidates that it can learn from."""

    uses_student_lr: ClassVar[bool] = False
    """Whether the student's learning rate enters the loss, and so can be learned."""

    learns_labels: ClassVar[bool] = False
    """Whether the loss has a gradient by soft labels."""

    memory_remedy: ClassVar[str] = "use a smaller network, or fewer images per class"
    """What a person can do where a step needs more memory than there is."""

    @property
    def inner_steps(self) -> int | None:
        """Steps that a scoring consists of, if it can stop after some of them and go on later; None: it cannot."""
        return None

    @staticmethod
    @abstractmethod
    def default_pool() -> CandidatePool:
        """Return a pool that goes with the objective."""

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check, before anything long begins, that the objective can work on a network and data.

        Raises:
            InputError: If it cannot.
        """
        del network, real

    def plan_memory(
        self,
        network: FunctionalNetwork,
        size: int,
        soft: bool,
        candidates: int,
        resident: Sequence[MemoryPart],
        device_type: str,
    ) -> MemoryEstimate:
        """Estimate the peak of a step, and settle what depends on it; called once before the first step.

        Args:
            network: The architecture, on the host.
            size: Synthetic images, decoded.
            soft: Whether their labels are soft.
            candidates: Candidates that are scored in each step.
            resident: What is held all the time.
            device_type: Where the steps will be computed: ``torch.device.type``.

        Raises:
            InputError: If the objective cannot work in the way that it was told to.
        """
        del network, size, soft, candidates, device_type
        return MemoryEstimate(tuple(resident))

    def prepare(
        self, network: FunctionalNetwork, synthetic: SyntheticSet, steps: int, say: Callable[[str], None]
    ) -> None:
        """Do, before the first step of a run, what repays itself over its steps; nothing, unless overridden.

        Args:
            network: The architecture.
            synthetic: S, with gradients required of what is learned.
            steps: Distillation steps of the whole run, those before a resumption included: a resumed run then decides
                as the uninterrupted one.
            say: Shows a line to the person who is going to wait.

        Raises:
            InputError: If something that was asked for is impossible.
        """
        del network, synthetic, steps, say

    @abstractmethod
    def draw(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        reference: Callable[[], Candidate],
        context: StepContext,
    ) -> Any:  # noqa: ANN401
        """Make the step's random draws, the same for every candidate of the step.

        Args:
            synthetic: S.
            real: T.
            network: The architecture.
            reference: Gives the candidate that the previous step learned from, as the pool has it now; at step 0 the
                first one that is drawn. For draws that depend on a network, since the step's own is not chosen yet.
            context: Where the run is.
        """

    @abstractmethod
    def score(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        candidate: Any,  # noqa: ANN401  (the candidates of the pool that the objective goes with)
        draw: Any,  # noqa: ANN401
        sole: bool,
    ) -> ScoredCandidate:
        """Compute the matching loss without a graph, keeping what the gradient can reuse.

        Args:
            synthetic: S.
            real: T.
            network: The architecture.
            candidate: What to match.
            draw: The step's draws.
            sole: It is the step's only candidate, so its gradient is certain to be wanted.
        """

    def score_all(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        candidates: Sequence[Any],
        draw: Any,  # noqa: ANN401
        sole: bool,
    ) -> list[ScoredCandidate]:
        """Score several candidates, each as :meth:`score` does; to be overridden where they can share work."""
        return [self.score(synthetic, real, network, candidate, draw, sole) for candidate in candidates]

    def score_begun(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        candidates: Sequence[Any],
        draw: Any,  # noqa: ANN401
        steps: int,
    ) -> list[ScoredCandidate]:
        """Score candidates by the first of their ``inner_steps`` alone, so that :meth:`completed` can go on from there.

        Args:
            synthetic: S.
            real: T.
            network: The architecture.
            candidates: What to match.
            draw: The step's draws.
            steps: How many inner steps.
        """
        raise NotImplementedError(f"{type(self).__name__} has no inner steps")

    def completed(
        self, synthetic: SyntheticSet, real: RealSet, network: FunctionalNetwork, begun: ScoredCandidate
    ) -> ScoredCandidate:
        """Return what :meth:`score` would have, going on from where :meth:`score_begun` stopped."""
        raise NotImplementedError(f"{type(self).__name__} has no inner steps")

    @abstractmethod
    def loss(self, synthetic: SyntheticSet, network: FunctionalNetwork, scored: ScoredCandidate) -> Tensor:
        """Return the scored candidate's loss as a scalar with a gradient by the synthetic set's parameters."""

    def skips(self, loss: Tensor) -> bool:
        """Tell whether a step with this loss leaves the synthetic set as it is; never, unless overridden."""
        del loss
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        del state
