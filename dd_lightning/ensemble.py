"""Several networks of one architecture at once: gradients and logits of a stack of flat weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dd_lightning.functional.losses import classification_loss

Network = Callable[[Tensor, Tensor], Tensor]
"""``network(theta [P], images [B, C, H, W]) -> logits [B, classes]``."""

Stack = Tensor | Sequence[Tensor]
"""One tensor per network: a tensor whose first axis counts them, or a sequence of equal shapes."""

_HOST_PIXELS = 4096


def ensemble_pays(device_type: str, pixels: int) -> bool:
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
        ...     ensemble_pays("cpu", 64 * 8 * 8),
        ...     ensemble_pays("cpu", 256 * 32 * 32),
        ...     ensemble_pays("cuda", 256 * 32 * 32),
        ... )
        (True, False, True)
    """
    return device_type != "cpu" or pixels <= _HOST_PIXELS


def ensemble_gradients(
    network: Network, thetas: Stack, images: Stack, labels: Stack, vectorised: bool
) -> tuple[Tensor, Tensor]:
    """Return each network's gradient of its mean cross-entropy on its own batch.

    Both modes compute the same numbers up to rounding. One after another, a network's numbers do not depend
    on the others to the last bit, if the stacks are sequences: where a slice of a larger tensor begins may
    change how it is summed. Neither leaves a graph, and both work where gradients are switched off around
    them.

    Args:
        network: The architecture, as a function of flat weights and images.
        thetas: Weights, ``[K, P]``.
        images: Batches, ``[K, B, C, H, W]``.
        labels: Class indices ``[K, B]``, or label logits ``[K, B, classes]``.
        vectorised: One batched pass over all networks, rather than one pass after another. The network must
            allow ``torch.func.vmap`` over its weights.

    Returns:
        Gradients ``[K, P]`` and logits ``[K, B, classes]``.

    Example:
        >>> def linear(theta, images):
        ...     return images.flatten(1) @ theta.reshape(4, 2)
        >>> thetas, images = torch.zeros(3, 8), torch.ones(3, 1, 1, 2, 2)
        >>> grads, logits = ensemble_gradients(linear, thetas, images, torch.ones(3, 1, dtype=torch.int64), True)
        >>> grads[0].tolist(), logits.shape
        ([0.5, -0.5, 0.5, -0.5, 0.5, -0.5, 0.5, -0.5], torch.Size([3, 1, 2]))
    """

    def loss(theta: Tensor, batch: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(theta, batch)
        return classification_loss(logits, target), logits

    if vectorised:
        both: tuple[Tensor, Tensor] = torch.func.vmap(torch.func.grad(loss, has_aux=True))(
            _stacked(thetas).detach(), _stacked(images).detach(), _stacked(labels)
        )
        return both
    each_grad, each_logits = [], []
    with torch.enable_grad():
        for theta, batch, target in zip(thetas, images, labels, strict=True):
            point = theta.detach().requires_grad_()
            value, logits = loss(point, batch.detach(), target)
            each_grad.append(torch.autograd.grad(value, point)[0])
            each_logits.append(logits.detach())
    return torch.stack(each_grad), torch.stack(each_logits)


@torch.no_grad()
def ensemble_logits(network: Network, thetas: Stack, images: Tensor, vectorised: bool) -> Tensor:
    """Return the logits of every network on the same images, without a graph.

    Args:
        network: The architecture, as a function of flat weights and images.
        thetas: Weights, ``[K, P]``.
        images: One batch for all, ``[B, C, H, W]``.
        vectorised: As in :func:`ensemble_gradients`.

    Returns:
        Logits ``[K, B, classes]``.
    """
    if vectorised:
        logits: Tensor = torch.func.vmap(network, in_dims=(0, None))(_stacked(thetas), images)
        return logits
    return torch.stack([network(theta, images) for theta in thetas])


def _stacked(parts: Stack) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.stack(list(parts))
