"""Several networks of one architecture at once: gradients and logits of a stack of flat weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dd_lightning.execution.compile import Backend, Compile, compiled, try_compile
from dd_lightning.execution.memory import memory_model
from dd_lightning.functional.losses import classification_loss

Network = Callable[[Tensor, Tensor], Tensor]
"""``network(theta [P], images [B, C, H, W]) -> logits [B, classes]``."""

Stack = Tensor | Sequence[Tensor]
"""One tensor per network: a tensor whose first axis counts them, or a sequence of equal shapes."""

Derivative = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(theta, images, labels) -> the gradient of the mean cross-entropy by theta, and the logits."""

CACHE_BYTES = 36 * 2**20
"""What one pass may hold so that a processor with tens of MiB of cache need not wait for its memory: the limit was
among the fastest for ConvNet-3 of widths 32 and 128 on 32 MiB of cache."""

_HOST_PIXELS = 4096


def batching_pays(device_type: str, pixels: int) -> bool:
    """Tell whether one batched pass over several networks beats one pass per network.

    On an accelerator small batches leave the chip idle, so batching always pays. On a host it pays only while
    the work of one network is too small to fill the cores: measured on two threads, up to about 4096 pixels per
    network and step (64 digits of 8 x 8), beyond which the batched convolutions are the slower ones. (On a single
    thread that is already so from about 1024.)

    Args:
        device_type: ``tensor.device.type``.
        pixels: Batch size times height times width, for one network.

    Example:
        >>> (
        ...     batching_pays("cpu", 64 * 8 * 8),
        ...     batching_pays("cpu", 256 * 32 * 32),
        ...     batching_pays("cuda", 256 * 32 * 32),
        ... )
        (True, False, True)
    """
    return device_type != "cpu" or pixels <= _HOST_PIXELS


def images_per_pass(
    network: Network,
    num_parameters: int,
    image_shape: tuple[int, int, int],
    batch: int,
    limit: int = CACHE_BYTES,
    forward: bool = False,
) -> int:
    """Return how many images of a batch to pass through a network at once on a host.

    Norms, activations and pooling do next to nothing with what they read, so a batch whose tensors do not stay in the
    processor's cache is computed at the speed of the memory. But every pass reads all weights and writes their
    gradient: where these alone are large, nothing is gained. The number follows from the shapes of the tensors alone.

    Args:
        network: The architecture, as a function of flat weights and images.
        num_parameters: P.
        image_shape: ``(C, H, W)``.
        batch: Images of a batch.
        limit: Bytes that the images of one pass may add to its peak.
        forward: Whether a pass gives logits alone, without a gradient.

    Returns:
        A power of two, so that usual batches make equal pieces; or the whole batch, if that is no more, or if a pass
        over no images would hold more than half of the limit.

    Example:
        >>> def linear(theta, images):
        ...     return images.flatten(1) @ theta.reshape(4, 2)
        >>> images_per_pass(linear, 8, (1, 2, 2), 256), images_per_pass(linear, 8, (1, 2, 2), 256, limit=4096)
        (256, 64)
    """

    def probe(count: int) -> None:
        images, labels = torch.zeros(count, *image_shape), torch.zeros(count, dtype=torch.int64)
        thetas = [torch.zeros(num_parameters)]
        if forward:
            parallel_logits(network, thetas, images, vectorized=False)
        else:
            parallel_gradients(network, thetas, [images], [labels], vectorized=False)

    model = memory_model(probe)
    if 2 * model.peak(0) > limit:
        return batch
    piece = 1
    while piece < batch and model.peak(2 * piece) - model.peak(0) <= limit:
        piece *= 2
    return min(piece, batch)


class CompiledNetwork:
    """A network whose gradients torch.compile has compiled, for each shape of its batches at its first use.

    :func:`parallel_gradients` takes it in place of the network, and then differs from the eager one by rounding. Called
    itself, it is the network. All networks that are computed one after another share one piece of code.

    Compiling takes up to minutes.

    Args:
        network: The architecture, as a function of flat weights and images.
        backend: Of torch.compile.

    Example:
        >>> network = CompiledNetwork(lambda theta, x: x.flatten(1) @ theta.reshape(4, 2), backend="eager")
        >>> thetas, images, labels = torch.zeros(1, 8), torch.ones(1, 1, 1, 2, 2), torch.ones(1, 1, dtype=torch.int64)
        >>> parallel_gradients(network, thetas, images, labels, False)[0][0, :2].tolist()
        [0.5, -0.5]
    """

    def __init__(self, network: Network, backend: Backend = "inductor") -> None:
        derivative = torch.func.grad(_loss_and_logits(network), has_aux=True)

        def one(theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            both: tuple[Tensor, Tensor] = derivative(theta, images, labels)
            return both

        def all_at_once(thetas: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            both: tuple[Tensor, Tensor] = torch.func.vmap(derivative)(thetas, images, labels)
            return both

        self._network = network
        self._compiled = {False: compiled(one, backend), True: compiled(all_at_once, backend)}

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return the logits."""
        return self._network(theta, images)

    def derivative(self, vectorized: bool) -> Derivative:
        """Return the function of one network, or of a stack of them, that gives gradient and logits."""
        function = self._compiled[vectorized]

        def derivative(theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            # Compiled code is bound to the properties of what it was compiled for, gradient mode and strides included:
            # these are made the same in every call.
            with torch.no_grad():
                both: tuple[Tensor, Tensor] = function(theta.detach(), images.detach().contiguous(), labels.detach())
            return both

        return derivative


def compiled_or_plain(
    network: Network, warm_up: Callable[[Network], None], choice: Compile | bool, what: str, option: str
) -> Network:
    """Return a network compiled; or as it is, where the compiler fails and need not succeed.

    Args:
        network: The architecture, as a function of flat weights and images.
        warm_up: Uses the compiled network once for every shape that will come.
        choice: If it is ``on``, a failure is an error; else it is a warning.
        what: What is compiled, for messages, such as ``"the experts' step"``.
        option: Name of the option, for messages.

    Raises:
        InputError: If the choice is ``on``, and it cannot be compiled.
    """

    def make() -> CompiledNetwork:
        ensemble = CompiledNetwork(network)
        warm_up(ensemble)
        return ensemble

    return try_compile(make, choice, what, option) or network


def parallel_gradients(
    network: Network, thetas: Stack, images: Stack, labels: Stack, vectorized: bool, piece: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return each network's gradient of its mean cross-entropy on its own batch.

    Both modes compute the same numbers up to rounding. One after another, a network's numbers do not depend
    on the others to the last bit, if the stacks are sequences: where a slice of a larger tensor begins may
    change how it is summed. Neither leaves a graph, and both work where gradients are switched off around
    them.

    Args:
        network: The architecture, as a function of flat weights and images; or a :class:`CompiledNetwork`.
        thetas: Weights, ``[K, P]``.
        images: Batches, ``[K, B, C, H, W]``.
        labels: Class indices ``[K, B]``, or label logits ``[K, B, classes]``.
        vectorized: One batched pass over all networks, rather than one pass after another. The network must
            allow ``torch.func.vmap`` over its weights.
        piece: The most images of each network in one pass. A longer batch is computed in pieces whose gradients are
            added: the same up to rounding, in the memory of one piece, unless what the network computes of an image
            depends on the others. None for whole batches.

    Returns:
        Gradients ``[K, P]`` and logits ``[K, B, classes]``.

    Example:
        >>> def linear(theta, images):
        ...     return images.flatten(1) @ theta.reshape(4, 2)
        >>> thetas, images = torch.zeros(3, 8), torch.ones(3, 1, 1, 2, 2)
        >>> grads, logits = parallel_gradients(linear, thetas, images, torch.ones(3, 1, dtype=torch.int64), True)
        >>> grads[0].tolist(), logits.shape
        ([0.5, -0.5, 0.5, -0.5, 0.5, -0.5, 0.5, -0.5], torch.Size([3, 1, 2]))
    """
    compute = network.derivative(vectorized) if isinstance(network, CompiledNetwork) else _eager(network, vectorized)
    if vectorized:
        return _in_pieces(compute, _stacked(thetas), _stacked(images), _stacked(labels), piece, batch_axis=1)
    each_grad, each_logits = [], []
    for theta, batch, target in zip(thetas, images, labels, strict=True):
        gradient, logits = _in_pieces(compute, theta, batch, target, piece, batch_axis=0)
        each_grad.append(gradient)
        each_logits.append(logits)
    return torch.stack(each_grad), torch.stack(each_logits)


@torch.no_grad()
def parallel_logits(network: Network, thetas: Stack, images: Tensor, vectorized: bool) -> Tensor:
    """Return the logits of every network on the same images, without a graph.

    Args:
        network: The architecture, as a function of flat weights and images.
        thetas: Weights, ``[K, P]``.
        images: One batch for all, ``[B, C, H, W]``.
        vectorized: As in :func:`parallel_gradients`.

    Returns:
        Logits ``[K, B, classes]``.
    """
    if vectorized:
        logits: Tensor = torch.func.vmap(network, in_dims=(0, None))(_stacked(thetas), images)
        return logits
    return torch.stack([network(theta, images) for theta in thetas])


def _stacked(parts: Stack) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.stack(list(parts))


def _loss_and_logits(network: Network) -> Derivative:
    """Return the mean cross-entropy of a batch with the logits beside it."""

    def loss(theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(theta, images)
        return classification_loss(logits, labels), logits

    return loss


def _eager(network: Network, vectorized: bool) -> Derivative:
    loss = _loss_and_logits(network)
    if vectorized:
        batched = torch.func.vmap(torch.func.grad(loss, has_aux=True))

        def all_at_once(thetas: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            both: tuple[Tensor, Tensor] = batched(thetas.detach(), images.detach(), labels)
            return both

        return all_at_once

    def one(theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        point = theta.detach().requires_grad_()
        with torch.enable_grad():
            value, logits = loss(point, images.detach(), labels)
            return torch.autograd.grad(value, point)[0], logits.detach()

    return one


def _in_pieces(
    compute: Derivative, theta: Tensor, images: Tensor, labels: Tensor, piece: int | None, batch_axis: int
) -> tuple[Tensor, Tensor]:
    """Weigh the pieces' mean gradients by their lengths: that is the gradient of the whole batch's mean."""
    length = images.shape[batch_axis]
    if piece is None or piece >= length:
        return compute(theta, images, labels)
    total: Tensor | None = None
    outputs = []
    for part, targets in zip(images.split(piece, batch_axis), labels.split(piece, batch_axis), strict=True):
        gradient, logits = compute(theta, part, targets)
        weight = part.shape[batch_axis] / length
        total = gradient * weight if total is None else total.add_(gradient, alpha=weight)
        outputs.append(logits)
    if total is None:
        raise ValueError("an empty batch has no mean")
    return total, torch.cat(outputs, batch_axis)
