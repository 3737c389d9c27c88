"""MTT: after N steps on S, the student should be where the expert went on T."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dd_lightning.execution.memory import MemoryEstimate
from dd_lightning.execution.options import Execution
from dd_lightning.functional.augment import DSA
from dd_lightning.functional.errors import check_range
from dd_lightning.functional.random import StepContext
from dd_lightning.functional.trajectory import (
    InnerStep,
    permuted_batches,
    trajectory_loss,
    trajectory_loss_gradient,
)
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives.base import (
    Learnable,
    MatchingObjective,
    Problem,
    ScoredCandidate,
    Workload,
    known_loss,
    share_candidates,
)
from dd_lightning.objectives.student import Student
from dd_lightning.pools import Candidate, TrajectoryPool, TrajectorySegment


@dataclass(kw_only=True, eq=False)
class TrajectoryMatching(MatchingObjective):
    """Trajectory matching (MTT) with the exact gradient, in the memory of one student step.

    The loss is ||theta_N - target||^2 / ||start - target||^2 after ``syn_steps`` steps of plain SGD on the synthetic
    set from the expert's own start. Scored by fewer steps, theta_n takes the place of theta_N.

    Args:
        syn_steps: N, the student's steps. 50 is the published value for CIFAR-10 at ipc 1.
        batch_syn: The most synthetic images per student step; null is the whole set, as published up to ipc 10.
        augmentation: DSA strategy of the student's batches, a fresh draw at every step; "none" switches it off.
        loss_threshold: Leave S unchanged in a step whose loss is above this (DATM uses 1.0); null never does.

    Raises:
        InputError: If a number is out of range, or the strategy is unknown.

    References:
        Cazenavette et al., Dataset Distillation by Matching Training Trajectories, https://arxiv.org/abs/2203.11932.
    """

    candidate_type: ClassVar[type[Candidate]] = TrajectorySegment
    learnable: ClassVar[frozenset[Learnable]] = frozenset({"student_lr", "labels"})

    syn_steps: int = 50
    batch_syn: int | None = None
    augmentation: str = "color_crop_cutout_flip_scale_rotate"
    loss_threshold: float | None = None

    def __post_init__(self) -> None:
        check_range("syn_steps", self.syn_steps, low=1)
        check_range("loss_threshold", self.loss_threshold, low=0, exclude_low=True)
        check_range("batch_syn", self.batch_syn, low=1, hint="null for the whole synthetic set")
        self._augmentation = DSA(self.augmentation)
        self._student: Student | None = None

    @property
    def inner_steps(self) -> int:
        """The student's steps."""
        return self.syn_steps

    @staticmethod
    def default_pool() -> TrajectoryPool:
        """Return a trajectory pool with its defaults."""
        return TrajectoryPool()

    def plan_memory(self, workload: Workload, execution: Execution) -> MemoryEstimate:
        """Estimate the peak of a step, and settle how students run."""
        self._student = self._new_student(workload.network, execution)
        return self._student.plan_memory(workload, self._augmentation)

    def prepare(self, problem: Problem, steps: int, say: Callable[[str], None]) -> None:
        """Compile the student's step, if that was asked for or pays off."""
        self._student = self._student_of(problem.network)
        self._student.compile(problem.synthetic, steps, say)

    def draw(self, problem: Problem, reference: Callable[[], Candidate], context: StepContext) -> list[InnerStep]:
        """Draw the student's batches and their augmentations."""
        del reference
        synthetic, augment = problem.synthetic, context.generator("augment")
        height, width = synthetic.images.shape[-2:]
        batches = permuted_batches(synthetic.decoded_size, self.batch_syn, self.syn_steps, context.generator("batch"))
        return [
            InnerStep(batch.to(synthetic.images.device), self._augmentation.draw(augment, len(batch), (height, width)))
            for batch in batches
        ]

    def score(
        self,
        problem: Problem,
        candidates: Sequence[TrajectorySegment],
        draw: Sequence[InnerStep],
        *,
        steps: int | None = None,
        resume: Sequence[ScoredCandidate] | None = None,
        with_gradient: bool = False,
    ) -> list[ScoredCandidate]:
        """Run students forward on the same augmented batches; their paths serve the adjoint of the winner."""
        del with_gradient

        def score(places: Sequence[int]) -> list[ScoredCandidate]:
            own = [candidates[place] for place in places]
            begun = [[c.start] for c in own] if resume is None else [resume[place].work for place in places]
            taken = draw[len(begun[0]) - 1 : steps]
            further = self._student_of(problem.network).unroll(problem.synthetic, [path[-1] for path in begun], taken)
            scored = []
            for candidate, first, path in zip(own, begun, further, strict=True):
                loss = trajectory_loss(path[-1], candidate.start, candidate.target)
                skip = self.loss_threshold is not None and float(loss) > self.loss_threshold
                scored.append(ScoredCandidate(candidate, loss, draw, [*first[:-1], *path], skip=skip))
            return scored

        return share_candidates(problem, candidates, draw, resume, score)

    def loss(self, problem: Problem, scored: ScoredCandidate) -> Tensor:
        """Return the scored loss; its backward is the adjoint of the student's path."""
        candidate, path, student = scored.candidate, scored.work, self._student_of(problem.network)
        assert isinstance(candidate, TrajectorySegment)
        synthetic, start, target = problem.synthetic, candidate.start, candidate.target

        def gradients(grad: Tensor) -> tuple[Tensor | None, ...]:
            cotangent = grad * trajectory_loss_gradient(path[-1], start, target)
            return tuple(student.pull_back(synthetic, path, scored.draw, cotangent))

        return known_loss(
            scored.loss, [synthetic.decoded(), synthetic.student_lr, synthetic.decoded_targets()], gradients
        )

    def _student_of(self, network: FunctionalNetwork) -> Student:
        if self._student is None or self._student.network is not network:
            return self._new_student(network, Execution())
        return self._student

    def _new_student(self, network: FunctionalNetwork, execution: Execution) -> Student:
        return Student(network, self.execution or execution, self.syn_steps, self.batch_syn)
