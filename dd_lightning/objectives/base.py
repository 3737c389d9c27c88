"""What every matching objective offers: score candidates cheaply, then make the winner's loss differentiable."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dd_lightning.execution.memory import MemoryEstimate, MemoryPart
from dd_lightning.execution.options import Execution
from dd_lightning.execution.process import Process, SingleProcess
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools.base import Candidate, CandidatePool
from dd_lightning.sets.optimizer import SyntheticOptimizer
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import LabelKind, SyntheticSet

Learnable = Literal["student_lr", "labels"]


@dataclass(frozen=True)
class Problem:
    """What is distilled.

    Attributes:
        synthetic: S, with gradients required of what is learned.
        real: T.
        network: The architecture of students and candidates.
        process: This process among those that share each step.
    """

    synthetic: SyntheticSet
    real: RealSet
    network: FunctionalNetwork
    process: Process = SingleProcess()  # noqa: RUF009  (it has no state)


@dataclass(frozen=True)
class Workload:
    """What the memory of a run's steps depends on.

    Attributes:
        network: The architecture, on the CPU.
        images: Synthetic images, decoded.
        soft_labels: Whether their labels are logits.
        candidates: Candidates scored in each step.
        device_type: ``torch.device.type`` of the steps.
        resident: What is held all the time.
    """

    network: FunctionalNetwork
    images: int
    soft_labels: bool = False
    candidates: int = 1
    device_type: str = "cpu"
    resident: tuple[MemoryPart, ...] = ()

    def targets(self, count: int) -> Tensor:
        """Return labels of the right kind for ``count`` images, to probe with."""
        return (
            torch.zeros(count, self.network.num_classes) if self.soft_labels else torch.zeros(count, dtype=torch.int64)
        )


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate with its matching loss on the current synthetic set.

    Attributes:
        candidate: The candidate.
        loss: Matching loss, a scalar without a graph.
        draw: The random draw it was scored with, shared by all candidates of a step.
        work: Whatever scoring computed that the gradient can reuse.
        terms: The parts that the loss is the sum of, if it has several: scalars, logged by name.
        skip: Leave S unchanged if this candidate is selected.
        owner: The process whose gradient counts, alone; None if each process has a part of it.
    """

    candidate: Candidate
    loss: Tensor
    draw: Any
    work: Any
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    skip: bool = False
    owner: int | None = 0


@dataclass(kw_only=True, eq=False)
class MatchingObjective(ABC):
    """Maps (S, T, candidate) to the matching loss.

    Options are dataclass fields: a subclass declares its own and those whose default it changes. What a draw and the
    ``work`` of a score contain is private to an objective.

    Args:
        execution: How this objective is computed, if other than the run (``model.execution``).
    """

    candidate_type: ClassVar[type[Candidate]] = Candidate
    """Kind of candidates it can learn from."""

    learnable: ClassVar[frozenset[Learnable]] = frozenset()
    """What, besides the images, the loss has a gradient by."""

    execution: Execution | None = None

    @property
    def inner_steps(self) -> int | None:
        """Steps of a score, if it can stop after some of them and resume later; None if it cannot."""
        return None

    @staticmethod
    @abstractmethod
    def default_pool() -> CandidatePool:
        """Return the pool that goes with the objective."""

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check, before anything long begins, that the objective can work on a network and data.

        Raises:
            InputError: If it cannot.
        """
        del network, real

    def plan_memory(self, workload: Workload, execution: Execution) -> MemoryEstimate:
        """Estimate the peak of a step, and settle how steps are computed; called once, before the first step.

        Args:
            workload: The size of the steps.
            execution: How the run is computed; an ``execution`` of the objective's own replaces it.

        Raises:
            InputError: If the objective cannot be computed so.
        """
        del execution
        return MemoryEstimate(workload.resident)

    def prepare(self, problem: Problem, steps: int, say: Callable[[str], None]) -> None:
        """Do, before the first step, what pays off over a run, such as compiling.

        Args:
            problem: S, T and the network, on the device.
            steps: Steps of the whole run, those before a resumption included: a resumed run decides as the whole one.
            say: Shows a line to whoever is going to wait.

        Raises:
            InputError: If something that was asked for is impossible.
        """
        del problem, steps, say

    @abstractmethod
    def draw(self, problem: Problem, reference: Callable[[], Candidate], context: StepContext) -> Any:  # noqa: ANN401
        """Make the step's random draws, the same for all its candidates.

        Args:
            problem: S, T and the network.
            reference: Returns the candidate that the previous step learned from, as the pool has it now (at step 0 the
                first one drawn), for draws that need a network.
            context: Where the run is.
        """

    @abstractmethod
    def score(
        self,
        problem: Problem,
        candidates: Sequence[Any],
        draw: Any,  # noqa: ANN401
        *,
        steps: int | None = None,
        resume: Sequence[ScoredCandidate] | None = None,
        with_gradient: bool = False,
    ) -> list[ScoredCandidate]:
        """Compute the matching loss of candidates without a graph, keeping what the gradient can reuse.

        Args:
            problem: S, T and the network.
            candidates: What to match. They may share work, but a loss depends on its own candidate alone.
            draw: The step's draws.
            steps: Score by the first so many of the ``inner_steps``; None is all of them.
            resume: Scores of the same candidates by fewer steps, to go on from.
            with_gradient: Every candidate's gradient will be needed, so it may be computed now.

        Several processes (``problem.process``) make the same call. Each returns all losses, and may compute a share:
        :func:`share_candidates`. What ignores them is computed everywhere, and counts once.
        """

    @abstractmethod
    def loss(self, problem: Problem, scored: ScoredCandidate) -> Tensor:
        """Return a candidate's loss as a scalar with a gradient by the synthetic set's parameters."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; an empty one is that of a new run."""
        del state


def check_method(
    objective: MatchingObjective,
    pool: CandidatePool,
    optimizer: SyntheticOptimizer,
    labels: LabelKind,
    averaged: int = 1,
) -> None:
    """Check that the pool gives what the objective learns from, and that there is a gradient by all that is learned.

    Args:
        objective: What is matched.
        pool: Where candidates come from.
        optimizer: How S moves.
        labels: Kind of its labels.
        averaged: Processes that each take steps of their own.

    Raises:
        InputError: If not.
    """
    name = type(objective).__name__
    if not isinstance(pool, CandidatePool):
        raise InputError(f"pool is {pool!r}; give a {type(objective.default_pool()).__name__}, or null for the default")
    if not issubclass(pool.candidate_type, objective.candidate_type):
        raise InputError(
            f"{name} learns from {objective.candidate_type.__name__}, but {type(pool).__name__} gives "
            f"{pool.candidate_type.__name__}; use {type(objective.default_pool()).__name__}"
        )
    if optimizer.label_lr > 0 and labels == "hard":
        raise InputError(f"label_lr is {optimizer.label_lr:g}, but labels is 'hard'; set labels: soft, or label_lr: 0")
    if optimizer.label_lr > 0 and "labels" not in objective.learnable:
        raise InputError(
            f"label_lr is {optimizer.label_lr:g}, but {name} has no gradient by the labels; set label_lr: 0 to "
            "keep them fixed"
        )
    if averaged > 1 and (refresh := getattr(pool, "refresh", "none")) not in ("redraw", "none"):
        raise InputError(
            f"processes is 'average', but pool.refresh is {refresh!r}: each process would have a pool of its own, and "
            "only one is saved; set processes: shard"
        )


def share_candidates(
    problem: Problem,
    candidates: Sequence[Candidate],
    draw: Any,  # noqa: ANN401
    resume: Sequence[ScoredCandidate] | None,
    score: Callable[[Sequence[int]], list[ScoredCandidate]],
) -> list[ScoredCandidate]:
    """Score a share of the candidates in this process, and learn the losses of the others from the other ones.

    Args:
        problem: S, T, the network, and the process.
        candidates: All of them.
        draw: The step's draws.
        resume: Scores to go on from, each where it was begun.
        score: Scores the candidates of some places.
    """
    process = problem.process
    if process.size == 1:
        return score(range(len(candidates)))
    if resume is None:
        warn_of_idle(process, len(candidates), "candidates")
    places = range(len(candidates))
    owners = [place % process.size if resume is None else resume[place].owner for place in places]
    own = [place for place in places if owners[place] == process.rank]
    scored = dict(zip(own, score(own) if own else [], strict=True))
    known = candidates[0].theta.new_zeros(2, len(candidates))
    for place, each in scored.items():
        known[0, place], known[1, place] = each.loss, each.skip
    losses, skips = process.sum(known)
    theirs = (ScoredCandidate(candidates[p], losses[p], draw, None, skip=bool(skips[p])) for p in places)
    return [replace(scored.get(place, other), owner=owners[place]) for place, other in enumerate(theirs)]


def warn_of_idle(process: Process, parts: int, what: str) -> None:
    """Say that there are more processes than parts of a step; Python shows a warning from one place once."""
    if process.rank == 0 and process.size > parts:
        warnings.warn(
            f"{process.size} processes share the {parts} {what} of a step: {process.size - parts} of them are idle",
            stacklevel=2,
        )


def known_loss(
    value: Tensor, inputs: Sequence[Tensor], gradients: Callable[[Tensor], Sequence[Tensor | None]]
) -> Tensor:
    """Return a loss whose value is known, as an ordinary node of the graph.

    Args:
        value: The value, a scalar.
        inputs: What it depends on.
        gradients: Called in the backward pass with the gradient by the loss; returns the gradient by each input.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> known_loss(torch.tensor(9.0), [x], lambda grad: [grad * 6]).backward()
        >>> x.grad
        tensor(6.)
    """
    loss: Tensor = _KnownLoss.apply(value, gradients, *inputs)
    return loss


class _KnownLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Callable[[Tensor], Sequence[Tensor | None]], *_: Tensor) -> Tensor:  # noqa: ANN401
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return None, None, *ctx.gradients(grad)
