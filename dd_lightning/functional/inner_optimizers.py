"""Optimizers of an unrolled student as pure functions, with their vector-Jacobian products.

A state is (theta, m, v); a step takes the batch's gradient g at theta. Its pull-back takes the cotangents of the state
after the step, and returns the cotangent of g and those of the state before it, as far as they do not come through g.
The caller adds the rest: H u, with one Hessian-vector product.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dd_lightning.functional.errors import check_range


class State(NamedTuple):
    """Parameters ``[P]`` and the optimizer's moments, each ``[P]``, or 0 where it has none; or cotangents of them."""

    theta: Tensor
    m: Tensor
    v: Tensor


class PulledBack(NamedTuple):
    """What a step's cotangents become.

    Attributes:
        gradient: u, the cotangent of the batch's gradient, ``[P]``.
        state: Cotangents of the state before the step, without what comes through the gradient.
        lr: Derivative by the learning rate, a scalar.
    """

    gradient: Tensor
    state: State
    lr: Tensor


@dataclass(frozen=True)
class InnerSGD:
    """SGD in torch's form, without dampening: g~ = g + lambda theta; m' = mu m + g~; theta' = theta - lr m'.

    Args:
        momentum: mu.
        weight_decay: lambda, an L2 term of the gradient.
        nesterov: theta' = theta - lr (g~ + mu m').
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_range("momentum", self.momentum, low=0, high=1, exclude_high=True)
        check_range("weight_decay", self.weight_decay, low=0)

    moments = 1

    def initial(self, theta: Tensor) -> State:
        """Return the state before the first step."""
        return State(theta, torch.zeros_like(theta), theta.new_zeros(()))

    def step(self, state: State, gradient: Tensor, lr: Tensor, number: int) -> State:
        """Take step ``number``, counted from 1."""
        del number
        decayed = gradient + self.weight_decay * state.theta
        m = self.momentum * state.m + decayed
        return State(state.theta - lr * (decayed + self.momentum * m if self.nesterov else m), m, state.v)

    def pull_back(self, before: State, after: State, cotangent: State, lr: Tensor, number: int) -> PulledBack:
        """Pull cotangents of ``after`` back through step ``number``."""
        del number
        mu, (a, p, q) = self.momentum, cotangent
        if self.nesterov:
            by_lr = -(a @ (after.m - mu * before.m + mu * after.m))
            p = p - lr * mu * a
            u = p - lr * a
        else:
            by_lr = -(a @ after.m)
            p = p - lr * a
            u = p
        return PulledBack(u, State(a + self.weight_decay * u, mu * p, q), by_lr)


@dataclass(frozen=True)
class InnerAdam:
    """Adam in torch's form: eps is outside the root, after the bias correction.

    With c1 = 1 - b1^t and c2 = 1 - b2^t: m' = b1 m + (1 - b1) g~; v' = b2 v + (1 - b2) g~^2; theta' = theta -
    (lr / c1) m' / (sqrt(v' / c2) + eps). A weight whose gradient has been 0 at every step has m' = v' = 0, where the
    derivative by v' is 0 / 0 and multiplied by 0: it is left out.

    Args:
        beta1: b1.
        beta2: b2.
        eps: Above 0. Where a gradient is far below it, the derivative of the step is lr / eps.
        weight_decay: lambda; an L2 term of the gradient, g~ = g + lambda theta.
        decoupled: AdamW: theta is multiplied by 1 - lr lambda instead, and g~ = g.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            check_range(name, getattr(self, name), low=0, high=1, exclude_high=True)
        check_range("eps", self.eps, low=0, exclude_low=True, hint="1e-8 is torch's")
        check_range("weight_decay", self.weight_decay, low=0)

    moments = 2

    def initial(self, theta: Tensor) -> State:
        """Return the state before the first step."""
        return State(theta, torch.zeros_like(theta), torch.zeros_like(theta))

    def step(self, state: State, gradient: Tensor, lr: Tensor, number: int) -> State:
        """Take step ``number``, counted from 1."""
        decay = 1 - lr * self.weight_decay if self.decoupled else 1.0
        if not self.decoupled:
            gradient = gradient + self.weight_decay * state.theta
        m = self.beta1 * state.m + (1 - self.beta1) * gradient
        v = self.beta2 * state.v + (1 - self.beta2) * gradient.square()
        divisor = (v / (1 - self.beta2**number)).sqrt() + self.eps
        return State(decay * state.theta - lr / (1 - self.beta1**number) * m / divisor, m, v)

    def pull_back(self, before: State, after: State, cotangent: State, lr: Tensor, number: int) -> PulledBack:
        """Pull cotangents of ``after`` back through step ``number``."""
        b1, b2, (a, p, q) = self.beta1, self.beta2, cotangent
        rate, c2 = lr / (1 - b1**number), 1 - b2**number
        root = (after.v / c2).sqrt()
        divisor = root + self.eps
        by_lr = -(a @ (after.m / divisor)) / (1 - b1**number)
        p = p - rate * a / divisor
        q = q + torch.where(root > 0, rate * a * after.m / (2 * c2 * root * divisor.square()), 0.0)
        gradient = (after.m - b1 * before.m) / (1 - b1)
        u = (1 - b1) * p + 2 * (1 - b2) * gradient * q
        if self.decoupled:
            by_lr = by_lr - self.weight_decay * (a @ before.theta)
            a = (1 - lr * self.weight_decay) * a
        else:
            a = a + self.weight_decay * u
        return PulledBack(u, State(a, b1 * p, b2 * q), by_lr)


InnerOptimizer = InnerSGD | InnerAdam
