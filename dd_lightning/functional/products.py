"""First- and second-order derivatives of a training loss at one point: the primitive of every matching method."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(theta [P], images [B, ...], targets [B] or [B, C]) -> the batch's mean loss, a scalar."""

Order = Literal["forward_over_reverse", "reverse_over_reverse"]


class Products(NamedTuple):
    """What :func:`gradient_products` returns; ``g`` is the gradient of the loss and ``a`` the tangent, both [P].

    Attributes:
        gradient: g itself, [P].
        hessian: H a, the derivative of (a . g) by theta, [P].
        images: The mixed product, the derivative of (a . g) by the images, shaped like them.
        targets: The derivative of (a . g) by the targets, shaped like them; None unless it was asked for.
    """

    gradient: Tensor
    hessian: Tensor
    images: Tensor
    targets: Tensor | None


def gradient(loss: Loss, theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of ``loss`` by theta, [P], without a graph."""
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, images.detach(), targets.detach()), leaf)[0]


def gradient_products(
    loss: Loss,
    theta: Tensor,
    images: Tensor,
    targets: Tensor,
    tangent: Tensor,
    *,
    wrt_targets: bool = False,
    order: Order = "reverse_over_reverse",
) -> Products:
    """Return H a and d(a . g)/d(images) at one point, in the memory of one training step.

    Trajectory matching uses both products at every inner step; gradient matching needs the mixed one alone.

    Args:
        loss: The training loss.
        theta: Parameters, [P].
        images: The batch, [B, ...].
        targets: Its labels, [B], or its label logits, [B, C].
        tangent: a, [P].
        wrt_targets: Also return the derivative by ``targets``, which must then be floating point.
        order: ``"forward_over_reverse"`` is jvp(grad): the form that torch.compile and vmap accept.
            ``"reverse_over_reverse"`` is double backward: the same numbers, a fifth faster run eagerly
            (``benchmarks/step_cost.py``), but never to be put under ``vmap``, where it is silently wrong for affine
            instance, batch and layer norm.

    Example:
        >>> theta, x = torch.tensor([3.0]), torch.tensor([2.0])
        >>> p = gradient_products(lambda t, x, y: (t**2 * x).sum(), theta, x, x, torch.ones(1))
        >>> p.gradient.item(), p.hessian.item(), p.images.item()
        (12.0, 4.0, 6.0)
    """
    theta, images, targets = theta.detach(), images.detach(), targets.detach()
    if order == "forward_over_reverse":
        argnums = (0, 1, 2) if wrt_targets else (0, 1)
        # Only theta carries a tangent: images enter as constants, so their zero tangent costs no convolution.
        primal, tangents = jvp(lambda t: grad(loss, argnums=argnums)(t, images, targets), (theta,), (tangent,))[:2]
        return Products(primal[0], tangents[0], tangents[1], tangents[2] if wrt_targets else None)
    with torch.enable_grad():
        theta.requires_grad_()
        images.requires_grad_()
        leaves = [theta, images]
        if wrt_targets:
            leaves.append(targets.requires_grad_())
        (g,) = torch.autograd.grad(loss(theta, images, targets), theta, create_graph=True)
        products = torch.autograd.grad(g, leaves, tangent, materialize_grads=True)
    return Products(g.detach(), products[0], products[1], products[2] if wrt_targets else None)


def partial_gradients(
    loss: Callable[[Sequence[Tensor]], Tensor], parts: Sequence[Tensor], wanted: Sequence[int], graph: bool
) -> tuple[Tensor, ...]:
    """Return the derivatives of ``loss`` by some of a network's parameters.

    With a graph, ``torch.autograd.grad(derivatives, images, a)`` is the mixed product d(a . g)/d(images) of
    :func:`gradient_products`, without the work for parameters that are not wanted: neither their gradients nor the
    second derivatives that pass through these.

    Args:
        loss: Takes the parameters and returns a scalar.
        parts: The parameters, each in its own shape; read only.
        wanted: Which of them to differentiate by.
        graph: Whether the result is to be differentiated again.

    Example:
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> parts = (torch.tensor(3.0), torch.tensor(5.0))
        >>> (g,) = partial_gradients(lambda p: x * p[0] ** 2 + p[1], parts, [0], graph=True)
        >>> g.item(), torch.autograd.grad(g, x, torch.tensor(10.0))[0].item()
        (12.0, 60.0)
    """
    leaves = [part.detach() for part in parts]
    for index in wanted:
        leaves[index].requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(loss(leaves), [leaves[i] for i in wanted], create_graph=graph)
