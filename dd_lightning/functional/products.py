"""First- and second-order derivatives of a training loss: the primitive of every matching method."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vmap
from torch.utils._pytree import tree_map

Other = TypeVar("Other")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(theta [P], images [B, ...], targets [B] or [B, C]) -> the batch's mean loss, a scalar."""

Order = Literal["reverse_over_reverse", "forward_over_reverse", "reverse_over_forward"]
"""How second derivatives are evaluated; the numbers are the same.

* ``"reverse_over_reverse"``, double backward, is the fastest in eager mode (``benchmarks/step_cost.py``). Never put it
  under ``vmap``, where it is silently wrong for affine instance, batch and layer norm.
* ``"forward_over_reverse"`` is jvp(grad), which torch.compile and vmap accept.
* ``"reverse_over_forward"`` is grad(jvp), the gradient of the slope a . g. It never forms g, and is the fastest when
  compiled, but torch makes it silently wrong for batch and layer norm:
  :func:`~dd_lightning.execution.compiled_loss.compiled_order` finds out.
"""


class Products(NamedTuple):
    """What :func:`gradient_products` returns; ``g`` is the gradient of the loss and ``a`` the tangent, both [P].

    Attributes:
        slope: a . g, the derivative of the loss along the tangent, a scalar.
        hessian: H a, [P].
        images: The derivative of (a . g) by the images (the mixed product), shaped like them.
        targets: The derivative of (a . g) by the targets, shaped like them; None unless it was asked for.
    """

    slope: Tensor
    hessian: Tensor
    images: Tensor
    targets: Tensor | None


class DifferentiatedLoss(NamedTuple):
    """:func:`gradient`, :func:`gradients` and :func:`gradient_products` of one training loss, eager or compiled."""

    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor], Tensor]
    products: Callable[[Tensor, Tensor, Tensor, Tensor, bool], Products]


def differentiated(loss: Loss, order: Order = "reverse_over_reverse") -> DifferentiatedLoss:
    """Return the eager derivatives of a loss, those of second order evaluated in ``order``."""
    return DifferentiatedLoss(
        partial(gradient, loss), partial(gradients, loss), partial(gradient_products, loss, order=order)
    )


def gradient(loss: Loss, theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of ``loss`` by theta, [P], without a graph."""
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, images.detach(), targets.detach()), leaf)[0]


def gradients(loss: Loss, thetas: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    """Return the gradients [M, P] of ``loss`` by several thetas [M, P] on one batch, in one vmapped pass."""
    derivatives: Tensor = vmap(grad(loss), (0, None, None))(thetas.detach(), images.detach(), targets.detach())
    return derivatives


def gradient_products(
    loss: Loss,
    theta: Tensor,
    images: Tensor,
    targets: Tensor,
    tangent: Tensor,
    wrt_targets: bool = False,
    order: Order = "reverse_over_reverse",
) -> Products:
    """Return H a and d(a . g)/d(images) at one point, in the memory of one training step.

    Args:
        loss: The training loss.
        theta: Parameters, [P].
        images: The batch, [B, ...].
        targets: Its labels, [B], or its label logits, [B, C].
        tangent: a, [P].
        wrt_targets: Also return the derivative by ``targets``, which must then be floating point.
        order: See :data:`Order`.

    Example:
        >>> theta, x = torch.tensor([3.0]), torch.tensor([2.0])
        >>> p = gradient_products(lambda t, x, y: (t**2 * x).sum(), theta, x, x, torch.ones(1))
        >>> p.slope.item(), p.hessian.item(), p.images.item()
        (12.0, 4.0, 6.0)
    """
    return SECOND_ORDER[order](loss, theta.detach(), images.detach(), targets.detach(), tangent, wrt_targets)


def partial_gradients(
    loss: Callable[[Sequence[Tensor]], Tensor], parts: Sequence[Tensor], wanted: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return the derivatives of ``loss``, a scalar function of a network's parameters, by some of them.

    Where gradients are enabled, ``torch.autograd.grad(derivatives, images, a)`` is the mixed product d(a . g)/d(images)
    of :func:`gradient_products`, without the work for the other parameters and without the Hessian-vector product.

    Args:
        loss: Takes the parameters.
        parts: The parameters, each in its own shape; read only.
        wanted: Which of them to differentiate by.

    Example:
        >>> x, parts = torch.tensor(2.0, requires_grad=True), (torch.tensor(3.0), torch.tensor(5.0))
        >>> (g,) = partial_gradients(lambda p: x * p[0] ** 2 + p[1], parts, [0])
        >>> g.item(), torch.autograd.grad(g, x, torch.tensor(10.0))[0].item()
        (12.0, 60.0)
    """
    return partial_gradients_and_other(lambda full: (loss(full), ()), parts, wanted)[0]


def partial_gradients_and_other(
    loss: Callable[[Sequence[Tensor]], tuple[Tensor, Other]], parts: Sequence[Tensor], wanted: Sequence[int]
) -> tuple[tuple[Tensor, ...], Other]:
    """Return :func:`partial_gradients`, and the tensors that the loss returns beside its value."""
    if torch.compiler.is_compiling():
        # The same numbers in the form that torch.compile can differentiate again, within what it compiles.
        def of_wanted(chosen: tuple[Tensor, ...]) -> tuple[Tensor, Other]:
            full = list(parts)
            for index, part in zip(wanted, chosen, strict=True):
                full[index] = part
            return loss(full)

        found: tuple[tuple[Tensor, ...], Other] = grad(of_wanted, has_aux=True)(tuple(parts[i] for i in wanted))
        return found
    create_graph, leaves = torch.is_grad_enabled(), [part.detach() for part in parts]
    for index in wanted:
        leaves[index].requires_grad_()
    with torch.enable_grad():
        value, other = loss(leaves)
        derivatives = torch.autograd.grad(value, [leaves[i] for i in wanted], create_graph=create_graph)
    detached: Other = tree_map(Tensor.detach, other)
    return derivatives, other if create_graph else detached


def _double_backward(
    loss: Loss, theta: Tensor, images: Tensor, targets: Tensor, tangent: Tensor, wrt_targets: bool
) -> Products:
    with torch.enable_grad():
        leaves = [theta.requires_grad_(), images.requires_grad_()]
        if wrt_targets:
            leaves.append(targets.requires_grad_())
        (g,) = torch.autograd.grad(loss(theta, images, targets), theta, create_graph=True)
        by = torch.autograd.grad(g, leaves, tangent, materialize_grads=True)
    return Products(tangent @ g.detach(), by[0], by[1], by[2] if wrt_targets else None)


def _jvp_of_grad(
    loss: Loss, theta: Tensor, images: Tensor, targets: Tensor, tangent: Tensor, wrt_targets: bool
) -> Products:
    derivative = grad_and_value(loss, argnums=(0, 1, 2) if wrt_targets else (0, 1))
    # Only theta carries a tangent: images enter as constants, so their zero tangent costs no convolution.
    by, slope = jvp(lambda t: derivative(t, images, targets), (theta,), (tangent,))[1]
    return Products(slope, by[0], by[1], by[2] if wrt_targets else None)


def _grad_of_jvp(
    loss: Loss, theta: Tensor, images: Tensor, targets: Tensor, tangent: Tensor, wrt_targets: bool
) -> Products:
    def slope(theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        along: Tensor = jvp(lambda t: loss(t, images, targets), (theta,), (tangent,))[1]
        return along

    by, value = grad_and_value(slope, argnums=(0, 1, 2) if wrt_targets else (0, 1))(theta, images, targets)
    return Products(value, by[0], by[1], by[2] if wrt_targets else None)


SECOND_ORDER: dict[Order, Callable[[Loss, Tensor, Tensor, Tensor, Tensor, bool], Products]] = {
    "reverse_over_reverse": _double_backward,
    "forward_over_reverse": _jvp_of_grad,
    "reverse_over_forward": _grad_of_jvp,
}
"""The implementation of each order. It may set ``requires_grad`` on its arguments."""
