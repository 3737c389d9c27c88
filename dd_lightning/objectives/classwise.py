"""Matching class by class: what a network computes on the synthetic images of a class, and on real ones."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dd_lightning.execution.memory import MemoryEstimate
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import check_range
from dd_lightning.functional.policies import AugmentationPolicy, PolicyName, augment_in_turn
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives.base import MatchingObjective, Problem, ScoredCandidate, Workload, known_loss, warn_of_idle
from dd_lightning.objectives.class_statistics import ClassBatch, ClassMatching, Statistics, Terms, check_class
from dd_lightning.pools import Candidate, NetworkPool
from dd_lightning.sets.class_batches import RepresentativeBatches, shuffled_class_batches
from dd_lightning.sets.real import RealSet

Sampling = Literal["shuffled", "representative"]


class ClasswiseDraw(NamedTuple):
    """A step's draws.

    Attributes:
        images: The decoded synthetic set, without a graph.
        classes: One batch for each class; of several processes, each has every n-th one.
    """

    images: Tensor
    classes: tuple[ClassBatch, ...]


@dataclass(kw_only=True, eq=False)
class ClasswiseMatching(MatchingObjective):
    """The sum over classes of a distance between statistics of synthetic and of real images.

    A subclass defines the :meth:`statistics` and their distance (:meth:`terms`). A class's loss depends on its own
    images alone, so classes are computed one after another, in the memory of one class. On a CPU that is also the
    fastest order: one batched pass over all takes several times as long (``benchmarks/image_update_cost.py``).

    Args:
        batch_real: Real images of a class per step, all of a class that has fewer; 64 in IDC, 128 in DREAM and DREAM+,
            256 in DC, DSA and DM.
        batch_syn: The most decoded synthetic images of a class that are matched in a step, drawn anew each time; 128 in
            IDC, which takes effect at ipc 50 and factor 2.
        augmentation: Operations joined by ``_``, or ``"none"``. The real and the synthetic images of a class share one
            draw (siamese).
        policy: How the operations are combined: IDC's or DSA's.
        sampling: Real images ``shuffled``, as in IDC, or ``representative``: those nearest to the centroids of k-means
            on the features of the network that the previous step used (DREAM).
        interval: Steps between two choices of representatives; 10 in DREAM.
        per_cluster: Representatives of each cluster; 1 in DREAM.

    Raises:
        InputError: If a number is out of range or the augmentation unknown.
    """

    batch_real: int = 64
    batch_syn: int = 128
    augmentation: str = "color_crop_cutout"
    policy: PolicyName = "idc"
    sampling: Sampling = "shuffled"
    interval: int = 10
    per_cluster: int = 1

    def __post_init__(self) -> None:
        check_range("batch_real", self.batch_real, low=1)
        check_range("batch_syn", self.batch_syn, low=1)
        self._batch_real = self.batch_real
        self._augmentation = AugmentationPolicy(self.augmentation, self.policy)
        batches = RepresentativeBatches(self.batch_real, self.interval, self.per_cluster)  # checked if unused, too
        self._representatives = batches if self.sampling == "representative" else None
        self._matching: ClassMatching | None = None

    @abstractmethod
    def statistics(self, network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
        """Return what is compared of one batch of one class: means over its images, so that a batch may be cut.

        A pure function that torch.compile can read, differentiable by the images where gradients are enabled. Gradients
        as statistics come from :func:`~dd_lightning.functional.products.partial_gradients`.

        Args:
            network: The architecture, in the run's precision.
            theta: Its parameters, [P].
            images: [B, ch, H, W].
            targets: Labels [B], or label logits [B, C].
        """

    @abstractmethod
    def terms(self, synthetic: Statistics, real: Statistics) -> Terms:
        """Return the parts of a class's loss, scalars; the loss is their sum."""

    @staticmethod
    def default_pool() -> NetworkPool:
        """Return a pool with one live network, IDC's own rule."""
        return NetworkPool()

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check that the network can normalize a class, and has features to choose real images by."""
        self._batch_real = min(self.batch_real, max(real.class_counts))
        check_class(network, min(self._batch_real, *real.class_counts), "real", "add images")
        if self._representatives is not None:
            network.check_features()

    def plan_memory(self, workload: Workload, execution: Execution) -> MemoryEstimate:
        """Estimate the peak of a step, which computes one class at a time."""
        self._matching = self._computed(workload.network, execution)
        return self._matching.plan_memory(workload, self._augmentation)

    def prepare(self, problem: Problem, steps: int, say: Callable[[str], None]) -> None:
        """Compile the matching of a class, if that was asked for or pays off."""
        self._matching = self._matching_of(problem.network)
        self._matching.compile(problem.synthetic, steps, say)

    def draw(self, problem: Problem, reference: Callable[[], Candidate], context: StepContext) -> ClasswiseDraw:
        """Draw each class's real images, synthetic images and augmentation."""
        synthetic, real, process = problem.synthetic, problem.real, problem.process
        if self._representatives is None:
            batches = shuffled_class_batches(real, self.batch_real, context)
        else:
            theta, matching = (
                cache(lambda: reference().theta),
                self._matching_of(problem.network),
            )  # loaded once, if due
            batches = self._representatives.batches(
                real, lambda images: matching.features(theta(), images), context, process
            )
        images, targets = synthetic.decoded().detach(), synthetic.decoded_targets().detach()
        per_class = synthetic.decoded_size // real.num_classes
        tiles, augment = context.generator("tiles"), context.generator("augment")
        classes = []
        for label, rows in enumerate(batches):
            own = torch.arange(per_class)
            if per_class > self.batch_syn:
                own = torch.randperm(per_class, generator=tiles)[: self.batch_syn]
            own = (own + label * per_class).to(images.device)
            draw = self._augmentation.draw(augment, len(rows), real.image_shape[-2:], siamese=True)
            if label % process.size == process.rank:
                augmented = augment_in_turn(real.images[rows], draw)
                classes.append(ClassBatch(augmented, real.labels[rows], own, targets[own], draw))
        return ClasswiseDraw(images, tuple(classes))

    def score(
        self,
        problem: Problem,
        candidates: Sequence[Candidate],
        draw: ClasswiseDraw,
        *,
        steps: int | None = None,
        resume: Sequence[ScoredCandidate] | None = None,
        with_gradient: bool = False,
    ) -> list[ScoredCandidate]:
        """Compare the statistics of every class, on each candidate's network.

        The gradient is computed now, if it will be needed; or else it is prepared, so that the winner's takes one pass
        of the synthetic images and none of the real ones.
        """
        del steps, resume  # there are no inner steps
        matching, scored = self._matching_of(problem.network), []
        for candidate in candidates:
            gradient, prepared = torch.zeros_like(draw.images) if with_gradient else None, []
            parts: list[Terms] = []
            for batch in draw.classes:
                if gradient is not None:
                    gradient[batch.rows], of_class = matching.matched(candidate.theta, draw.images, batch)
                else:
                    a, of_class = matching.compared(candidate.theta, draw.images, batch)
                    prepared.append(a)
                parts.append(of_class)
            terms = _summed(parts, problem)
            loss = torch.stack(list(terms.values())).sum()
            work = prepared if gradient is None else gradient
            several = terms if len(terms) > 1 else {}
            scored.append(ScoredCandidate(candidate, loss, draw, work, several, owner=None))
        return scored

    def loss(self, problem: Problem, scored: ScoredCandidate) -> Tensor:
        """Return the scored loss; its backward gives the gradient that scoring has computed or prepared."""
        draw, gradient, matching = scored.draw, scored.work, self._matching_of(problem.network)
        if not isinstance(gradient, Tensor):
            gradient = torch.zeros_like(draw.images)
            for batch, a in zip(draw.classes, scored.work, strict=True):
                gradient[batch.rows] = matching.pulled_back(scored.candidate.theta, draw.images, batch, a)
        return known_loss(scored.loss, [problem.synthetic.decoded()], lambda grad: [grad * gradient])

    def state_dict(self) -> dict[str, Any]:
        """Return the present representatives."""
        return {} if self._representatives is None else self._representatives.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them; an empty state has none yet."""
        if self._representatives is not None:
            self._representatives.load_state_dict(state or {"chosen": None})

    def _matching_of(self, network: FunctionalNetwork) -> ClassMatching:
        if self._matching is None or self._matching.network is not network:
            return self._computed(network, Execution())
        return self._matching

    def _computed(self, network: FunctionalNetwork, execution: Execution) -> ClassMatching:
        how = self.execution or execution
        return ClassMatching(network, how, self.statistics, self.terms, self._batch_real, self.batch_syn)


def _summed(parts: list[Terms], problem: Problem) -> dict[str, Tensor]:
    """Return the sum of each part of the loss over all classes, in their order, whichever process has computed them."""
    process, classes = problem.process, problem.real.num_classes
    if process.size > 1:
        names = list(parts[0]) if parts else []
        warn_of_idle(process, classes, "classes")
        if process.size > classes:
            names = process.broadcast(names)
        every = problem.synthetic.images.new_zeros(classes, len(names))
        for label, of_class in zip(range(process.rank, classes, process.size), parts, strict=True):
            every[label] = torch.stack([of_class[name] for name in names])
        parts = [dict(zip(names, row, strict=True)) for row in process.sum(every)]
    terms: dict[str, Tensor] = {}
    for of_class in parts:
        terms = {name: terms[name] + part if terms else part for name, part in of_class.items()}
    return terms
