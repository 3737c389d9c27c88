"""What every matching objective offers: score candidates cheaply, then make the winner's loss differentiable."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools.base import Candidate
from dd_lightning.real import RealSet
from dd_lightning.synthetic import SyntheticSet


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate with its matching loss on the current synthetic set.

    Attributes:
        candidate: The candidate.
        loss: Matching loss, a scalar without a graph.
        draw: The random draw it was scored with, shared by all candidates of a step.
        work: Whatever scoring computed that the gradient can reuse.
    """

    candidate: Candidate
    loss: Tensor
    draw: Any
    work: Any


class MatchingObjective(ABC):
    """Maps (S, T, candidate) to the matching loss.

    What a draw and a scoring consist of is each objective's own affair: callers pass them on unread.
    """

    @abstractmethod
    def draw(self, synthetic: SyntheticSet, real: RealSet, context: StepContext) -> Any:  # noqa: ANN401
        """Make the step's random draws, the same for every candidate of the step."""

    @abstractmethod
    def score(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        candidate: Any,  # noqa: ANN401  (the candidates of the pool that the objective goes with)
        draw: Any,  # noqa: ANN401
    ) -> ScoredCandidate:
        """Compute the matching loss without a graph, keeping what the gradient can reuse."""

    @abstractmethod
    def loss(self, synthetic: SyntheticSet, network: FunctionalNetwork, scored: ScoredCandidate) -> Tensor:
        """Return the scored candidate's loss as a scalar with a gradient by the synthetic set's parameters."""

    def skips(self, loss: Tensor) -> bool:
        """Tell whether a step with this loss leaves the synthetic set as it is; never, unless overridden."""
        del loss
        return False
