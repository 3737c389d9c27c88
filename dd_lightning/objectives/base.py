"""What every matching objective offers: score candidates cheaply, then make the winner's loss differentiable."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools.base import Candidate
from dd_lightning.real import RealSet
from dd_lightning.synthetic import SyntheticSet

CandidateT = TypeVar("CandidateT", bound=Candidate)
DrawT = TypeVar("DrawT")
WorkT = TypeVar("WorkT")


@dataclass(frozen=True)
class ScoredCandidate(Generic[CandidateT, DrawT, WorkT]):
    """A candidate with its matching loss on the current synthetic set.

    Attributes:
        candidate: The candidate.
        loss: Matching loss, a scalar without a graph.
        draw: The random draw it was scored with, shared by all candidates of a step.
        work: Whatever scoring computed that the gradient can reuse.
    """

    candidate: CandidateT
    loss: Tensor
    draw: DrawT
    work: WorkT


class MatchingObjective(ABC, Generic[CandidateT, DrawT, WorkT]):
    """Maps (S, T, candidate) to the matching loss."""

    @abstractmethod
    def draw(self, synthetic: SyntheticSet, real: RealSet, context: StepContext) -> DrawT:
        """Make the step's random draws, the same for every candidate of the step."""

    @abstractmethod
    def score(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        candidate: CandidateT,
        draw: DrawT,
    ) -> ScoredCandidate[CandidateT, DrawT, WorkT]:
        """Compute the matching loss without a graph, keeping what the gradient can reuse."""

    @abstractmethod
    def loss(
        self,
        synthetic: SyntheticSet,
        network: FunctionalNetwork,
        scored: ScoredCandidate[CandidateT, DrawT, WorkT],
    ) -> Tensor:
        """Return the scored candidate's loss as a scalar with a gradient by the synthetic set's parameters."""

    def skips(self, loss: Tensor) -> bool:
        """Tell whether a step with this loss leaves the synthetic set as it is; never, unless overridden."""
        del loss
        return False
