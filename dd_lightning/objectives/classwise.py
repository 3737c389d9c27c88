"""Matching class by class: what a network computes on the synthetic images of a class, and on real ones."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dd_lightning.execution.compile import Compile, compile_choice, compiles, try_compile
from dd_lightning.execution.memory import MemoryEstimate, MemoryPart, memory_model
from dd_lightning.execution.precision import Precision, precision_choice, tensor_float
from dd_lightning.functional.augment import AugmentationDraw
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.policies import AugmentationPolicy, PolicyName, augment_in_turn
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives.base import MatchingObjective, ScoredCandidate
from dd_lightning.objectives.class_statistics import CompiledMatching, Statistics
from dd_lightning.pools import Candidate, NetworkPool
from dd_lightning.sets.class_batches import RepresentativeBatches, shuffled_class_batches
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import SyntheticSet

Sampling = Literal["shuffled", "representative"]


class ClassBatch(NamedTuple):
    """What one class contributes to a step.

    Attributes:
        real: Augmented real images, [B, ch, H, W].
        real_targets: Their labels, [B].
        rows: Which images of the decoded synthetic set are matched, [b], each at most once.
        targets: Their labels [b], or label logits [b, C].
        augmentation: Its draw, the same for real and synthetic images.
    """

    real: Tensor
    real_targets: Tensor
    rows: Tensor
    targets: Tensor
    augmentation: tuple[AugmentationDraw, ...]


class ClasswiseDraw(NamedTuple):
    """A step's draws.

    Attributes:
        images: The decoded synthetic set, without a graph.
        classes: One batch for each class.
    """

    images: Tensor
    classes: tuple[ClassBatch, ...]


class ClasswiseMatching(MatchingObjective):
    """The sum over classes of a distance between statistics of synthetic and of real images.

    A subclass says what the :meth:`statistics` are and how far apart two of them are (:meth:`terms`). Networks are held
    fixed within a step and a class's loss depends on its own images alone, so classes are computed one after another,
    in the memory of one class. On a host that is the fastest order, too: one batched pass over all takes several
    times as long (``benchmarks/image_update_cost.py``).

    The gradient by the images is d(a . s)/dx, with s the synthetic statistics and a the derivative of the distance by
    them, both known once a candidate is scored: for gradients as statistics it is the mixed product that trajectory
    matching's adjoint takes at each step. A sole candidate's is computed together with its loss. Of several, only the
    winner's is, from the cotangents a that scoring has left: real images are not passed through the network again.

    NOTE: Keeping the synthetic graphs of all candidates would save the winner's first-order pass of synthetic images,
    at the price of that memory. In the one trial, on a busy host, it was slower altogether.

    Args:
        batch_real: Real images of a class per step; 64 in IDC, 128 in DREAM and DREAM+, 256 in DC, DSA and DM.
        batch_syn: The most decoded synthetic images of a class that are matched in a step, drawn anew each time; 128 in
            IDC, which takes effect at ipc 50 and factor 2.
        augmentation: Operations, joined by ``_``, or ``"none"``. The real and the synthetic images of a class share one
            draw (siamese).
        policy: How the operations are combined: IDC's or DSA's.
        sampling: Real images ``shuffled``, as in IDC, or ``representative``: those nearest to the centroids of k-means
            on the features of the network that the previous step used (DREAM).
        interval: Steps between two choices of representatives; 10 in DREAM.
        per_cluster: Representatives of each cluster; 1 in DREAM.
        compile: Compile the statistics, their comparison and its gradient by the images. It takes up to minutes before
            the first step, and the rounding is another one. ``auto`` does so on CUDA alone, in runs that match at least
            50,000 classes (``max_steps`` x classes), unless the Trainer is ``deterministic`` (the compiler may choose
            other kernels in another process); where it is impossible, the run goes on without. ``off`` is the default
            because the gain has been measured on a host alone.
        precision: What the network's layers compute in: ``float32``; ``tf32``, on CUDA alone; or ``bfloat16``.
            Parameters, images, distances and representatives' features stay in float32.

    Raises:
        InputError: If a number is out of range, or the augmentation, ``compile`` or ``precision`` unknown.
    """

    candidates: ClassVar[type[Candidate]] = Candidate
    memory_remedy: ClassVar[str] = "set a smaller objective.batch_real or objective.batch_syn"

    def __init__(
        self,
        batch_real: int = 64,
        batch_syn: int = 128,
        augmentation: str = "color_crop_cutout",
        policy: PolicyName = "idc",
        sampling: Sampling = "shuffled",
        interval: int = 10,
        per_cluster: int = 1,
        compile: Compile | bool = "off",
        precision: Precision = "float32",
    ) -> None:
        if batch_real < 1 or batch_syn < 1:
            raise InputError(f"batch_real is {batch_real} and batch_syn is {batch_syn}; both must be at least 1 image")
        self.batch_real = batch_real
        self.batch_syn = batch_syn
        self.augmentation = AugmentationPolicy(augmentation, policy)
        self.representatives = (
            RepresentativeBatches(batch_real, interval, per_cluster) if sampling == "representative" else None
        )
        self.compile = compile_choice(compile)
        self.precision = precision_choice(precision)
        self._candidates = 1  # that a step scores
        self._compiled: tuple[FunctionalNetwork, CompiledMatching] | None = None

    @abstractmethod
    def statistics(
        self, network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor, graph: bool
    ) -> Statistics:
        """Return what is compared, for one batch of one class, computed in the objective's precision.

        A pure function, which torch.compile must be able to read.

        Args:
            network: The architecture.
            theta: Its parameters, [P].
            images: [B, ch, H, W].
            targets: Labels [B], or label logits [B, C].
            graph: Whether the result is to be differentiated by the images.
        """

    @abstractmethod
    def terms(self, synthetic: Statistics, real: Statistics) -> Mapping[str, Tensor]:
        """Return the parts of a class's loss, scalars; the loss is their sum."""

    @staticmethod
    def default_pool() -> NetworkPool:
        """Return a pool with one live network, IDC's own rule."""
        return NetworkPool()

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check that every class has a batch of real images, and that there are features to choose them by."""
        smallest = min(real.class_counts)
        if self.batch_real > smallest:
            what = "k-means would have more clusters than images" if self.representatives else "no image is used twice"
            raise InputError(
                f"batch_real is {self.batch_real}, but class {real.class_counts.index(smallest)}, the smallest, has "
                f"{smallest} images ({what}); lower objective.batch_real"
            )
        if self.representatives is not None:
            network.check_features()

    def plan_memory(
        self,
        network: FunctionalNetwork,
        size: int,
        soft: bool,
        candidates: int,
        resident: Sequence[MemoryPart],
        device_type: str,
    ) -> MemoryEstimate:
        """Estimate the peak of a step; it computes one class at a time.

        NOTE: What the pool does between two steps and the choice of representatives are not in it. It is that of the
        eager code, whatever is compiled.
        """
        del device_type  # the same everywhere
        self._candidates = candidates
        classes = network.num_classes
        count = min(self.batch_syn, size // classes)
        step = memory_model(lambda real, synthetic: self._probe(network, real, synthetic, soft), kinds=2)
        image = torch.zeros(1, *network.image_shape).nbytes
        parts = [*resident, MemoryPart("augmented real images", classes * self.batch_real * image, "of all classes")]
        if candidates > 1:
            theta, images = torch.zeros(network.num_parameters), torch.zeros(2, *network.image_shape)
            kept = self.statistics(network, theta, images, self._probe_targets(network, 2, soft), graph=False)
            each = classes * sum(statistic.nbytes for statistic in kept)
            parts.append(MemoryPart("statistics of all classes", candidates * each, f"{candidates} candidates"))
        note = f"{self.batch_real} real and {count} synthetic images"
        return MemoryEstimate((*parts, MemoryPart("one class", step.peak(self.batch_real, count), note)))

    def _probe(self, network: FunctionalNetwork, real: int, synthetic: int, soft: bool) -> None:
        """Match one class with a few images, with the augmentation that needs most."""
        images = torch.zeros(synthetic, *network.image_shape)
        augmentation = self.augmentation.most_memory_intensive().draw(
            step_generator(0, 0, "probe"), real, network.image_shape[1:], siamese=True
        )
        batch = ClassBatch(
            torch.zeros(real, *network.image_shape),
            torch.zeros(real, dtype=torch.int64),
            torch.arange(synthetic),
            self._probe_targets(network, synthetic, soft),
            augmentation,
        )
        self._score(
            network, Candidate((0,), torch.zeros(network.num_parameters)), ClasswiseDraw(images, (batch,)), True
        )

    @staticmethod
    def _probe_targets(network: FunctionalNetwork, count: int, soft: bool) -> Tensor:
        return torch.zeros(count, network.num_classes) if soft else torch.zeros(count, dtype=torch.int64)

    def prepare(
        self, network: FunctionalNetwork, synthetic: SyntheticSet, steps: int, say: Callable[[str], None]
    ) -> None:
        """Compile the matching of a class, if that was asked for or repays itself."""
        self._compiled = None
        if not compiles(self.compile, synthetic.images.device, steps * network.num_classes):
            return
        say("compiling the matching of a class: the first distillation step may be minutes away")
        matching = try_compile(
            lambda: self._warmed_up(network, synthetic), self.compile, "the matching of a class", "objective.compile"
        )
        self._compiled = None if matching is None else (network, matching)

    def _warmed_up(self, network: FunctionalNetwork, synthetic: SyntheticSet) -> CompiledMatching:
        """Match a class in every way that the run will: batches of all classes have the same shapes."""

        def statistics(theta: Tensor, images: Tensor, targets: Tensor, graph: bool) -> Statistics:
            return self.statistics(network, theta, images, targets, graph)

        matching = CompiledMatching(statistics, self.terms)
        decoded, targets = synthetic.decoded().detach(), synthetic.decoded_targets().detach()
        count = min(self.batch_syn, len(decoded) // network.num_classes)
        theta = network.initial(0).to(decoded)
        real_images = decoded.new_zeros(self.batch_real, *decoded.shape[1:])
        real_targets = torch.zeros(self.batch_real, dtype=torch.int64, device=decoded.device)
        with tensor_float(self.precision, decoded.device):
            real = matching.real(theta, real_images, real_targets)
            matching.matched(theta, decoded[:count], targets[:count], real)
            if self._candidates > 1:
                _, cotangents = matching.compared(theta, decoded[:count], targets[:count], real)
                matching.pulled_back(theta, decoded[:count], targets[:count], cotangents)
        return matching

    def draw(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        reference: Callable[[], Candidate],
        context: StepContext,
    ) -> ClasswiseDraw:
        """Draw each class's real images, synthetic images and augmentation."""
        if self.representatives is None:
            batches = shuffled_class_batches(real, self.batch_real, context)
        else:
            theta = cache(lambda: reference().theta)  # loaded once, if it is time to choose
            with tensor_float(self.precision, real.images.device):
                batches = self.representatives.batches(real, lambda images: network.features(theta(), images), context)
        images, targets = synthetic.decoded().detach(), synthetic.decoded_targets().detach()
        per_class = synthetic.decoded_size // real.num_classes
        tiles, augment = context.generator("tiles"), context.generator("augment")
        classes = []
        for label, rows in enumerate(batches):
            own = torch.arange(per_class)
            if per_class > self.batch_syn:
                own = torch.randperm(per_class, generator=tiles)[: self.batch_syn]
            own = (own + label * per_class).to(images.device)
            draw = self.augmentation.draw(augment, len(rows), real.image_shape[-2:], siamese=True)
            augmented = augment_in_turn(real.images[rows], draw)
            classes.append(ClassBatch(augmented, real.labels[rows], own, targets[own], draw))
        return ClasswiseDraw(images, tuple(classes))

    def score(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        candidate: Candidate,
        draw: ClasswiseDraw,
        sole: bool,
    ) -> ScoredCandidate:
        """Compare the statistics of every class."""
        del synthetic, real  # the draw holds what is needed of them
        return self._score(network, candidate, draw, sole)

    def _score(
        self, network: FunctionalNetwork, candidate: Candidate, draw: ClasswiseDraw, sole: bool
    ) -> ScoredCandidate:
        theta = candidate.theta
        totals: dict[str, Tensor] = {}
        work: list[Statistics] = []
        gradient = torch.zeros_like(draw.images) if sole else None
        with tensor_float(self.precision, draw.images.device):
            for batch in draw.classes:
                real_statistics = self._real_statistics(network, theta, batch)
                if gradient is not None:
                    terms, gradient[batch.rows] = self._matched(network, theta, draw.images, batch, real_statistics)
                else:
                    terms, cotangents = self._compared(network, theta, draw.images, batch, real_statistics)
                    work.append(cotangents)
                for name, value in terms.items():
                    totals[name] = totals[name] + value if name in totals else value
        loss = torch.stack(list(totals.values())).sum()
        return ScoredCandidate(
            candidate, loss, draw, work if gradient is None else gradient, totals if len(totals) > 1 else {}
        )

    def loss(self, synthetic: SyntheticSet, network: FunctionalNetwork, scored: ScoredCandidate) -> Tensor:
        """Return the scored loss; its backward gives the gradient that scoring has computed or prepared."""
        gradient = scored.work if isinstance(scored.work, Tensor) else self._gradient(network, scored)
        value: Tensor = _KnownGradient.apply(synthetic.decoded(), gradient, scored.loss)
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return the present representatives."""
        return {} if self.representatives is None else self.representatives.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        if self.representatives is not None and state:
            self.representatives.load_state_dict(state)

    # One class: with a graph that is gone on return, or by compiled code

    def _code(self, network: FunctionalNetwork) -> CompiledMatching | None:
        return self._compiled[1] if self._compiled is not None and self._compiled[0] is network else None

    def _real_statistics(self, network: FunctionalNetwork, theta: Tensor, batch: ClassBatch) -> Statistics:
        code = self._code(network)
        if code is not None:
            return code.real(theta, batch.real, batch.real_targets)
        return self.statistics(network, theta, batch.real, batch.real_targets, graph=False)

    def _matched(
        self, network: FunctionalNetwork, theta: Tensor, images: Tensor, batch: ClassBatch, real: Statistics
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return a class's terms, and the gradient of their sum by its synthetic images."""
        code, (leaf, augmented) = self._code(network), self._augmented(images, batch, graph=True)
        if code is not None:
            terms, gradient = code.matched(theta, augmented, batch.targets, real)
            return terms, torch.autograd.grad(augmented, leaf, gradient)[0]
        statistics = self.statistics(network, theta, augmented, batch.targets, graph=True)
        terms, cotangents = self._compare(statistics, real)
        return terms, torch.autograd.grad(statistics, leaf, cotangents)[0]

    def _compared(
        self, network: FunctionalNetwork, theta: Tensor, images: Tensor, batch: ClassBatch, real: Statistics
    ) -> tuple[dict[str, Tensor], Statistics]:
        """Return a class's terms, and a, the derivatives of their sum by its synthetic statistics."""
        code, (_, augmented) = self._code(network), self._augmented(images, batch, graph=False)
        if code is not None:
            return code.compared(theta, augmented, batch.targets, real)
        return self._compare(self.statistics(network, theta, augmented, batch.targets, graph=False), real)

    def _pulled_back(
        self, network: FunctionalNetwork, theta: Tensor, images: Tensor, batch: ClassBatch, cotangents: Statistics
    ) -> Tensor:
        """Return d(a . s)/dx of a class's synthetic images."""
        code, (leaf, augmented) = self._code(network), self._augmented(images, batch, graph=True)
        if code is not None:
            gradient = code.pulled_back(theta, augmented, batch.targets, cotangents)
            return torch.autograd.grad(augmented, leaf, gradient)[0]
        statistics = self.statistics(network, theta, augmented, batch.targets, graph=True)
        return torch.autograd.grad(statistics, leaf, cotangents)[0]

    @staticmethod
    def _augmented(images: Tensor, batch: ClassBatch, graph: bool) -> tuple[Tensor, Tensor]:
        """Return the synthetic images of a class as a leaf, and augmented, with a graph from it if wanted."""
        leaf = images[batch.rows].requires_grad_(graph)
        with torch.set_grad_enabled(graph):
            return leaf, augment_in_turn(leaf, batch.augmentation)

    def _compare(self, synthetic: Statistics, real: Statistics) -> tuple[dict[str, Tensor], Statistics]:
        """Return the terms without a graph, and a, the derivatives of their sum by the synthetic statistics."""
        with torch.enable_grad():
            leaves = [statistic.detach().requires_grad_() for statistic in synthetic]
            terms = self.terms(tuple(leaves), real)
            cotangents = torch.autograd.grad(torch.stack(list(terms.values())).sum(), leaves)
        return {name: value.detach() for name, value in terms.items()}, cotangents

    def _gradient(self, network: FunctionalNetwork, scored: ScoredCandidate) -> Tensor:
        draw: ClasswiseDraw = scored.draw
        work: Sequence[Statistics] = scored.work
        theta, gradient = scored.candidate.theta, torch.zeros_like(draw.images)
        with tensor_float(self.precision, draw.images.device):
            for batch, cotangents in zip(draw.classes, work, strict=True):
                gradient[batch.rows] = self._pulled_back(network, theta, draw.images, batch, cotangents)
        return gradient


class _KnownGradient(torch.autograd.Function):
    """A loss whose value and gradient by the decoded images are known."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, gradient: Tensor, value: Tensor) -> Tensor:  # noqa: ANN401
        del images
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None
