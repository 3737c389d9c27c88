"""Bilevel unrolling: the loss on real images of a student that was trained on the synthetic set (RaT-BPTT)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dd_lightning.execution.memory import MemoryEstimate
from dd_lightning.execution.options import Execution
from dd_lightning.execution.precision import tensor_float
from dd_lightning.functional.augment import DSA
from dd_lightning.functional.bilevel import pull_back, train
from dd_lightning.functional.errors import check_choice, check_range
from dd_lightning.functional.inner_optimizers import InnerAdam, InnerOptimizer, InnerSGD, State
from dd_lightning.functional.random import StepContext
from dd_lightning.functional.trajectory import InnerStep, permuted_batches
from dd_lightning.networks import FunctionalNetwork, training_loss
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
from dd_lightning.pools import Candidate, NetworkPool
from dd_lightning.sets.real import RealSet

_REAL_BATCH = 256  # images per pass of the loss on real ones: bounds memory


class BilevelDraw(NamedTuple):
    """A step's draws.

    Attributes:
        free: Student steps before the window.
        steps: All its steps up to the window's end.
        rows: Real images of the loss, [B].
    """

    free: int
    steps: list[InnerStep]
    rows: Tensor


@dataclass(kw_only=True, eq=False)
class BilevelUnroll(MatchingObjective):
    """Backpropagation through the student's training, in the memory of one of its steps.

    A student starts from a candidate's weights, usually those of a fresh network, is trained on the synthetic set for a
    random number of steps and then for ``window`` further ones. The loss is its cross-entropy on real images. The
    gradient goes through the window, exactly; the state before it counts as a constant (truncation). The student's
    learning rate is ``student_lr``: 0.001 is RaT-BPTT's for Adam.

    Args:
        total_steps: T: the window lies anywhere within the first T steps. 200 in RaT-BPTT for CIFAR-10, 300 for
            CIFAR-100.
        window: W, steps that are differentiated; 60 and 100 there.
        batch_syn: The most synthetic images of a student's step; null is the whole set, as there for CIFAR-10.
        batch_real: Real images of the loss; 5,000 there, 1,000 in AT-BPTT.
        augmentation: DSA strategy of the student's batches, a fresh draw at every step; "none" switches it off.
        inner_optimizer: The student's: ``adam`` or ``sgd``.
        inner_momentum: Of ``sgd``.
        inner_eps: Of ``adam``.
        inner_weight_decay: Of both, as an L2 term of the gradient.

    Raises:
        InputError: If a value is out of range or unknown.

    References:
        Feng et al., Embarrassingly Simple Dataset Distillation, ICLR 2024, https://arxiv.org/abs/2311.07025.
    """

    learnable: ClassVar[frozenset[Learnable]] = frozenset({"student_lr", "labels"})

    total_steps: int = 200
    window: int = 60
    batch_syn: int | None = None
    batch_real: int = 1024
    augmentation: str = "flip_rotate"
    inner_optimizer: Literal["adam", "sgd"] = "adam"
    inner_momentum: float = 0.9
    inner_eps: float = 1e-8
    inner_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range("total_steps", self.total_steps, low=1)
        check_range("window", self.window, low=1, high=self.total_steps, hint="the window lies within total_steps")
        check_range("batch_syn", self.batch_syn, low=1, hint="null for the whole synthetic set")
        check_range("batch_real", self.batch_real, low=1)
        check_choice("inner_optimizer", self.inner_optimizer, ("adam", "sgd"))
        check_range("inner_momentum", self.inner_momentum, low=0, high=1, exclude_high=True)
        check_range("inner_eps", self.inner_eps, low=0, exclude_low=True, hint="1e-8 is torch's")
        check_range("inner_weight_decay", self.inner_weight_decay, low=0)
        self._optimizer: InnerOptimizer = InnerSGD(self.inner_momentum, self.inner_weight_decay)
        if self.inner_optimizer == "adam":
            self._optimizer = InnerAdam(eps=self.inner_eps, weight_decay=self.inner_weight_decay)
        self._augmentation = DSA(self.augmentation)
        self._student: Student | None = None

    @staticmethod
    def default_pool() -> NetworkPool:
        """Return a pool of one network, a fresh one at each step."""
        return NetworkPool(age_limit=1, refresh="candidates")

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check that there are so many real images."""
        del network
        check_range("objective.batch_real", self.batch_real, high=len(real), hint="the training images")

    def plan_memory(self, workload: Workload, execution: Execution) -> MemoryEstimate:
        """Estimate the peak of a step, and settle how students run."""
        self._student = self._new_student(workload.network, execution)
        return self._student.plan_memory(workload, self._augmentation)

    def prepare(self, problem: Problem, steps: int, say: Callable[[str], None]) -> None:
        """Compile the student's step, if that was asked for or pays off."""
        self._student = self._student_of(problem.network)
        self._student.compile(problem.synthetic, steps, say)

    def draw(self, problem: Problem, reference: Callable[[], Candidate], context: StepContext) -> BilevelDraw:
        """Draw where the window lies, the student's batches and augmentations, and the real images."""
        del reference
        synthetic, augment = problem.synthetic, context.generator("augment")
        height, width = synthetic.images.shape[-2:]
        places = self.total_steps - self.window + 1
        free = int(torch.randint(places, (1,), generator=context.generator("window")))
        batches = permuted_batches(
            synthetic.decoded_size, self.batch_syn, free + self.window, context.generator("batch")
        )
        steps = [
            InnerStep(batch.to(synthetic.images.device), self._augmentation.draw(augment, len(batch), (height, width)))
            for batch in batches
        ]
        rows = torch.randperm(len(problem.real), generator=context.generator("real"))[: self.batch_real]
        return BilevelDraw(free, steps, rows.to(synthetic.images.device))

    def score(
        self,
        problem: Problem,
        candidates: Sequence[Candidate],
        draw: BilevelDraw,
        *,
        steps: int | None = None,
        resume: Sequence[ScoredCandidate] | None = None,
        with_gradient: bool = False,
    ) -> list[ScoredCandidate]:
        """Train a student from each candidate; the states within the window serve the adjoint of the winner."""
        del steps, with_gradient

        def score(places: Sequence[int]) -> list[ScoredCandidate]:
            scored = []
            for candidate in (candidates[place] for place in places):
                states = self._trained(problem, candidate.theta, draw)
                loss, _ = self._on_real(problem, states[-1].theta, draw, wrt_theta=False)
                scored.append(ScoredCandidate(candidate, loss, draw, states))
            return scored

        return share_candidates(problem, candidates, draw, resume, score)

    def loss(self, problem: Problem, scored: ScoredCandidate) -> Tensor:
        """Return the scored loss; its backward is the adjoint of the student's window."""
        states, draw, synthetic = scored.work, scored.draw, problem.synthetic
        student = self._student_of(problem.network)

        def gradients(grad: Tensor) -> tuple[Tensor | None, ...]:
            _, gradient = self._on_real(problem, states[-1].theta, draw, wrt_theta=True)
            with torch.no_grad(), tensor_float(student.execution.precision, synthetic.images.device):
                return tuple(
                    pull_back(
                        student.loss,
                        self._optimizer,
                        states,
                        synthetic.student_lr.detach(),
                        synthetic.decoded(),
                        synthetic.decoded_targets(),
                        draw.steps[draw.free :],
                        grad * gradient,
                        first=draw.free,
                        wrt_targets=synthetic.targets.requires_grad,
                        micro_batch=student.piece,
                    )
                )

        return known_loss(
            scored.loss, [synthetic.decoded(), synthetic.student_lr, synthetic.decoded_targets()], gradients
        )

    def _trained(self, problem: Problem, theta: Tensor, draw: BilevelDraw) -> list[State]:
        """Return the student's states from the window's start to its end."""
        student, synthetic = self._student_of(problem.network), problem.synthetic
        states, before = [self._optimizer.initial(theta)], draw.steps[: draw.free]
        with torch.no_grad(), tensor_float(student.execution.precision, synthetic.images.device):
            images, targets = synthetic.decoded(), synthetic.decoded_targets()
            for steps, first, keep in ((before, 0, False), (draw.steps[draw.free :], draw.free, True)):
                states = train(
                    student.loss,
                    self._optimizer,
                    states[-1],
                    synthetic.student_lr.detach(),
                    images,
                    targets,
                    steps,
                    first=first,
                    keep=keep,
                    micro_batch=student.piece,
                )
        return states

    def _on_real(self, problem: Problem, theta: Tensor, draw: BilevelDraw, wrt_theta: bool) -> tuple[Tensor, Tensor]:
        """Return the loss on the real images, and its gradient [P], which is 0 unless it is asked for."""
        student, real = self._student_of(problem.network), problem.real
        of_batch = training_loss(problem.network, student.execution.precision)
        leaf, loss, gradient = theta.detach().requires_grad_(wrt_theta), theta.new_zeros(()), torch.zeros_like(theta)
        with torch.set_grad_enabled(wrt_theta), tensor_float(student.execution.precision, theta.device):
            for rows in draw.rows.split(_REAL_BATCH):
                value = of_batch(leaf, real.images[rows], real.labels[rows]) * (len(rows) / len(draw.rows))
                loss += value.detach()
                if wrt_theta:
                    gradient += torch.autograd.grad(value, leaf)[0]
        return loss, gradient

    def _student_of(self, network: FunctionalNetwork) -> Student:
        if self._student is None or self._student.network is not network:
            return self._new_student(network, Execution())
        return self._student

    def _new_student(self, network: FunctionalNetwork, execution: Execution) -> Student:
        vectors = (1 + self._optimizer.moments) * self.window
        return Student(network, self.execution or execution, vectors, self.batch_syn)
