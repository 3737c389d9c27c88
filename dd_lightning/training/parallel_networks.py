"""The engine under experts, live networks and evaluation: K networks of one architecture, trained by SGD on tensors."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.func import grad, vmap
from torchmetrics.functional.classification import multiclass_stat_scores

from dd_lightning.execution.compile import Backend, Compile, compile_for_run, compiled, laid_out
from dd_lightning.execution.memory import memory_model
from dd_lightning.execution.options import MicroBatch
from dd_lightning.execution.precision import Precision, tensor_float
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.products import partial_gradients_and_other
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.real import RealSet
from dd_lightning.training.progress import epoch_bar
from dd_lightning.training.recipes import TrainingRecipe

Stack = Tensor | Sequence[Tensor]
"""One tensor per network: a tensor whose first axis counts them, or a sequence of tensors of one shape."""

Results = tuple[Tensor, Tensor, Tensor]
"""Gradient of the mean cross-entropy by theta, logits, and running statistics."""

Derivative = Callable[[Tensor, Tensor, Tensor, Tensor], Results]
"""Of (theta, statistics, images, targets)."""

CACHE_BYTES = 36 * 2**20
"""What a pass on a CPU may hold. Among the fastest for ConvNet-3 of widths 32 and 128 on 32 MiB of cache."""

BACKEND: Backend = "inductor"
"""What torch.compile compiles with."""

_HOST_PIXELS = 4096


def batching_pays(device_type: str, pixels: int) -> bool:
    """Tell whether one batched pass over several networks beats one pass per network.

    Always on an accelerator, which small batches leave idle. On a CPU, only while one network's work is too small to
    fill the cores: up to about 4096 ``pixels`` per network and step (64 digits of 8 x 8) on two threads, 1024 on one.

    Example:
        >>> batching_pays("cpu", 64 * 8 * 8), batching_pays("cpu", 256 * 32 * 32), batching_pays("cuda", 256 * 32 * 32)
        (True, False, True)
    """
    return device_type != "cpu" or pixels <= _HOST_PIXELS


def images_per_pass(
    network: FunctionalNetwork,
    batch: int,
    precision: Precision = "float32",
    forward: bool = False,
    limit: int = CACHE_BYTES,
) -> int:
    """Return how many images of a batch to pass through a network at once on a CPU.

    Norms, activations and pooling do next to nothing with what they read, so a batch whose tensors leave the
    processor's cache is computed at the speed of the memory. But every pass reads all weights and, unless it is
    ``forward`` only, writes their gradient: if these alone are large, pieces gain nothing.

    Returns:
        The largest power of two whose images add at most ``limit`` bytes to the peak of a pass; the whole batch if that
        is no more, or if a pass without images holds over half of the limit.
    """
    passes, thetas = Passes(network, precision=precision), [torch.zeros(network.num_parameters)]

    def probe(count: int) -> None:
        images = torch.zeros(count, *network.image_shape)
        if forward:
            passes.logits(thetas, images)
        else:
            passes.gradients(thetas, [images], [torch.zeros(count, dtype=torch.int64)])

    model = memory_model(probe)
    if 2 * model.peak(0) > limit:
        return batch
    piece = 1
    while piece < batch and model.peak(2 * piece) - model.peak(0) <= limit:
        piece *= 2
    return min(piece, batch)


def piece_of(
    network: FunctionalNetwork, micro_batch: MicroBatch, batch: int, device_type: str, precision: Precision = "float32"
) -> int:
    """Return how many images of a training batch pass through a network at once.

    ``execution.micro_batch: auto`` cuts batches on a CPU, by :func:`images_per_pass`.

    Raises:
        InputError: If ``micro_batch`` cuts the batches of a network with batch norm.
    """
    if micro_batch == "auto":
        cuts = device_type == "cpu" and not network.uses_batch_statistics
        return images_per_pass(network, batch, precision) if cuts else batch
    network.check_pieces(micro_batch, batch)
    return batch if micro_batch is None else min(micro_batch, batch)


def check_batches(network: FunctionalNetwork, images: int, batch_size: int) -> None:
    """Refuse batches that leave a batch norm one value per channel, hence no variance.

    Raises:
        InputError: If the last batch of an epoch over so many images is one.
    """
    if not network.takes(images % batch_size or min(images, batch_size)):
        raise InputError(
            f"recipe.batch_size is {batch_size}, which leaves 1 of {images} images to the last batch, but batch norm "
            f"in {network.name!r} needs more than one value per channel; choose another batch_size"
        )


class Passes:
    """Forward and backward passes of K networks, each with its own flat weights ``[P]``.

    Args:
        network: The architecture.
        precision: What its layers compute in; None leaves torch's TF32 switches alone.
        vectorized: One batched pass over all networks instead of one pass per network: the same up to rounding. The
            network must be ``vmappable``. One by one, a network's numbers do not depend on the others to the last bit,
            if the stacks are sequences: where a slice of a larger tensor begins may change how it is summed.
        piece: The most images of each network in one pass. Longer batches are computed in pieces whose gradients are
            added: the same up to rounding, in the memory of one piece, unless the network has batch norm.
        running_statistics: Collect running statistics of batch norms during training, for networks that will be tested.

    Example:
        >>> network = FunctionalNetwork("ConvNet-1-W8", (1, 8, 8), 10)
        >>> thetas, images = [network.initial(0), network.initial(1)], torch.ones(2, 5, 1, 8, 8)
        >>> gradients, logits, _ = Passes(network).gradients(thetas, images, torch.zeros(2, 5, dtype=torch.int64))
        >>> gradients.shape, logits.shape
        (torch.Size([2, 1386]), torch.Size([2, 5, 10]))
    """

    def __init__(
        self,
        network: FunctionalNetwork,
        *,
        precision: Precision | None = None,
        vectorized: bool = False,
        piece: int | None = None,
        running_statistics: bool = False,
    ) -> None:
        self.network = network.in_precision(precision or "float32")
        self.vectorized = vectorized
        self.piece = piece
        self.initial_statistics = network.initial_statistics() if running_statistics else torch.zeros(0)
        self._precision = precision
        self._eager = self._derivative()
        self._compiled: Derivative | None = None
        self._shapes: set[tuple[torch.Size, torch.dtype]] = set()

    @property
    def is_compiled(self) -> bool:
        """Whether batches of some shapes have compiled gradients."""
        return self._compiled is not None

    def compile(
        self,
        choice: Compile | bool,
        calls: int,
        data: tuple[Tensor, Tensor],
        batch_size: int,
        counts: Collection[int],
        what: str,
        progress_bar: bool = False,
    ) -> None:
        """Compile the gradients of the batches of a data set, if asked to or if it repays itself.

        That takes up to minutes. Only rounding differs. Batches of other shapes stay eager.

        Args:
            choice: See :func:`~dd_lightning.execution.compile.compile_for_run`, as for ``calls`` and ``what``.
            calls: Gradients of the whole run.
            data: Images ``[n, C, H, W]`` and targets, ``[n]`` or ``[n, classes]``.
            batch_size: Images per step.
            counts: How many networks there may be; matters if vectorized.
            what: What is compiled, for messages.
            progress_bar: Show the progress.
        """
        lengths = {len(part) for batch in data[0].split(batch_size) for part in batch.split(self.piece or batch_size)}
        sizes = [(k, n) for k in (sorted(counts) if self.vectorized else [None]) for n in sorted(lengths)]

        def make() -> Derivative:
            derivative = compiled(self._eager, BACKEND)

            def call(theta: Tensor, statistics: Tensor, images: Tensor, targets: Tensor) -> Results:
                # Compiled code is bound to strides and to gradient mode: every call has the same.
                with torch.no_grad():
                    found: Results = derivative(theta, statistics, laid_out(images), targets.contiguous())
                return found

            initial = [part.to(data[0]) for part in (self.network.initial(0), self.initial_statistics)]
            with epoch_bar(f"compiling {what}", len(sizes), progress_bar) as show, self._tensor_float(data[0].device):
                for done, (count, length) in enumerate(sizes, 1):
                    theta, statistics = (_repeated(part, count) for part in initial)
                    images, targets = (_repeated(part[:length], count) for part in data)
                    call(theta, statistics, images, targets)
                    self._shapes.add((images.shape, targets.dtype))
                    show(done)
            return call

        self._compiled = compile_for_run(make, choice, data[0].device, calls, what, lambda _: None)

    def gradients(self, thetas: Stack, images: Stack, targets: Stack, statistics: Stack | None = None) -> Results:
        """Return each network's gradient of the mean cross-entropy of its own batch, without a graph.

        Args:
            thetas: Weights, ``[K, P]``.
            images: Batches, ``[K, B, C, H, W]``.
            targets: Class indices ``[K, B]`` or label logits ``[K, B, classes]``.
            statistics: Running statistics ``[K, S]`` before the pass; None collects none.

        Returns:
            Gradients ``[K, P]``, logits ``[K, B, classes]`` and running statistics ``[K, S]`` after the pass.
        """
        stacks = (thetas, _given(statistics, thetas), images, targets)
        if self.vectorized:
            return self._in_pieces(*(_stacked(parts) for parts in stacks))
        each = [self._in_pieces(*one) for one in zip(*stacks, strict=True)]
        gradients, logits, moved = (torch.stack(parts) for parts in zip(*each, strict=True))
        return gradients, logits, moved

    @torch.no_grad()
    def logits(self, thetas: Stack, images: Tensor, statistics: Stack | None = None) -> Tensor:
        """Return the logits ``[K, B, classes]`` of every network on the same images, ``[B, C, H, W]``.

        Batch norms use the networks' running statistics ``[K, S]``; without any, those of the batch.
        """

        def logits(theta: Tensor, statistics: Tensor) -> Tensor:
            return self.network.test_pass(theta, statistics, images)

        stacks = (thetas, _given(statistics, thetas))
        with self._tensor_float(images.device):
            if self.vectorized:
                every: Tensor = vmap(logits)(*(_stacked(parts) for parts in stacks))
                return every
            return torch.stack([logits(*one) for one in zip(*stacks, strict=True)])

    def accuracies(self, thetas: Stack, held_out: RealSet, batch: int, statistics: Stack | None = None) -> list[float]:
        """Return the top-1 accuracy of every network on held-out data, in [0, 1], by passes of ``batch`` images."""
        correct, classes = torch.zeros(len(thetas), device=held_out.images.device), held_out.num_classes
        for images, labels in zip(held_out.images.split(batch), held_out.labels.split(batch), strict=True):
            for row, logits in enumerate(self.logits(thetas, images, statistics)):
                correct[row] += multiclass_stat_scores(logits, labels, classes, average="micro", validate_args=False)[0]
        accuracies: list[float] = (correct.double() / len(held_out)).tolist()
        return accuracies

    def _derivative(self) -> Derivative:
        network = self.network

        def loss(
            theta: Tensor, statistics: Tensor, images: Tensor, targets: Tensor
        ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            logits, moved = network.training_pass(theta, statistics, images)
            return classification_loss(logits, targets), (logits, moved)

        def one(theta: Tensor, statistics: Tensor, images: Tensor, targets: Tensor) -> Results:
            with torch.no_grad():  # leaves no graph
                (gradient,), (logits, moved) = partial_gradients_and_other(
                    lambda parts: loss(parts[0], statistics, images, targets), [theta], [0]
                )
            return gradient, logits, moved

        def all_at_once(theta: Tensor, statistics: Tensor, images: Tensor, targets: Tensor) -> Results:
            gradient, (logits, moved) = vmap(grad(loss, has_aux=True))(theta, statistics, images, targets)
            return gradient, logits, moved

        return all_at_once if self.vectorized else one

    def _in_pieces(self, theta: Tensor, statistics: Tensor, images: Tensor, targets: Tensor) -> Results:
        """Weigh the pieces' mean gradients by their lengths: the sum is the gradient of the whole batch's mean."""
        axis = 1 if self.vectorized else 0
        theta, images, targets, length = theta.detach(), images.detach(), targets.detach(), images.shape[axis]
        size = min(self.piece or length, length)
        total: Tensor | None = None
        outputs = []
        with self._tensor_float(images.device):
            for part, labels in zip(images.split(size, axis), targets.split(size, axis), strict=True):
                known = self._compiled if (part.shape, labels.dtype) in self._shapes else None
                gradient, logits, statistics = (known or self._eager)(theta, statistics, part, labels)
                if size == length:
                    return gradient, logits, statistics
                share = part.shape[axis] / length
                total = gradient * share if total is None else total.add_(gradient, alpha=share)
                outputs.append(logits)
        if total is None:
            raise ValueError("an empty batch has no mean")
        return total, torch.cat(outputs, axis), statistics

    def _tensor_float(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext() if self._precision is None else tensor_float(self._precision, device)


class ParallelTraining:
    """K networks that SGD trains side by side, each on its own batches.

    Args:
        passes: How their gradients are computed.
        thetas: Where they start, K vectors ``[P]``; they are copied.
        lr: Learning rate.
        recipe: Momentum and weight decay.
        momenta: What SGD has carried on from earlier steps, K vectors ``[P]``, which are copied, or None.
        statistics: Running statistics from earlier steps, K vectors ``[S]``, or None.

    Attributes:
        thetas: The networks' weights, K vectors ``[P]`` that change in place.
        statistics: Their running statistics, ``[K, S]``.
    """

    def __init__(
        self,
        passes: Passes,
        thetas: Iterable[Tensor],
        lr: float,
        recipe: TrainingRecipe,
        momenta: Iterable[Tensor | None] = (),
        statistics: Iterable[Tensor | None] = (),
    ) -> None:
        self.thetas = [theta.detach().clone() for theta in thetas]
        self.statistics = passes.initial_statistics.to(self.thetas[0]).repeat(len(self.thetas), 1)
        for row, kept in enumerate(statistics):
            if kept is not None:
                self.statistics[row] = kept
        self._passes = passes
        self._sgd = torch.optim.SGD(self.thetas, lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        for theta, momentum in zip(self.thetas, momenta, strict=False):
            if momentum is not None:
                self._sgd.state[theta]["momentum_buffer"] = momentum.to(theta, copy=True)

    @property
    def momenta(self) -> list[Tensor | None]:
        """What SGD carries on, K vectors ``[P]`` that change in place; None without momentum or before a step."""
        return [self._sgd.state[theta].get("momentum_buffer") for theta in self.thetas]

    def set_lr(self, lr: float, reset_momentum: bool = False) -> None:
        """Change the learning rate; with ``reset_momentum``, SGD starts anew."""
        self._sgd.param_groups[0]["lr"] = lr
        if reset_momentum:
            self._sgd.state.clear()

    def step(self, images: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Take one SGD step with every network on its own batch; return the logits ``[K, B, classes]`` before it."""
        gradients, logits, self.statistics = self._passes.gradients(self.thetas, images, targets, self.statistics)
        for theta, gradient in zip(self.thetas, gradients, strict=True):
            theta.grad = gradient
        self._sgd.step()
        return logits


def _given(statistics: Stack | None, thetas: Stack) -> Stack:
    return thetas[0].new_zeros(len(thetas), 0) if statistics is None else statistics


def _stacked(parts: Stack) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.stack(list(parts))


def _repeated(part: Tensor, count: int | None) -> Tensor:
    return part if count is None else part.repeat(count, *(1 for _ in part.shape))
