"""Evaluation: train fresh networks on a synthetic set alone, test them on real data."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from dd_lightning.ensemble import ensemble_gradients, ensemble_logits, ensemble_pays
from dd_lightning.functional.augment import DSA, augment
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.real import RealSet

TEST_BATCH = 512
"""Held-out images per forward pass: memory, not the result, depends on it."""


@dataclass(frozen=True)
class EvaluationRecipe:
    """How a fresh network is trained on a synthetic set: SGD on the cross-entropy.

    Args:
        epochs: Passes over the synthetic set. (The MTT reference's loop makes 1,001 of its nominal 1,000.)
        batch_size: Images per step.
        lr: Learning rate; None takes the one learned with the set.
        momentum: SGD momentum.
        weight_decay: SGD weight decay.
        milestones: Fractions of ``epochs`` after which the learning rate is multiplied by ``gamma``.
        gamma: Learning-rate factor at a milestone.
        reset_momentum: Start each stretch with empty momentum, as the MTT reference does by re-creating SGD.
        augmentation: DSA strategy.
    """

    epochs: int = 1000
    batch_size: int = 256
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.5,)
    gamma: float = 0.1
    reset_momentum: bool = True
    augmentation: str = "color_crop_cutout_flip_scale_rotate"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise InputError(
                f"the evaluation recipe has epochs {self.epochs} and batch_size {self.batch_size}; both must be >= 1"
            )


RECIPES: dict[str, EvaluationRecipe] = {"mtt": EvaluationRecipe()}
"""Published protocols by name."""


def get_recipe(name: str, epochs: int | None = None, augmentation: str | None = None) -> EvaluationRecipe:
    """Return a published recipe, as it is or with a change.

    Args:
        name: Its name in ``RECIPES``.
        epochs: Epochs, if other than the protocol's.
        augmentation: DSA strategy, if other than the protocol's.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in RECIPES:
        raise InputError(f"unknown evaluation recipe {name!r}; choose one of {', '.join(sorted(RECIPES))}")
    recipe = RECIPES[name]
    return replace(
        recipe,
        epochs=recipe.epochs if epochs is None else epochs,
        augmentation=recipe.augmentation if augmentation is None else augmentation,
    )


@dataclass(frozen=True)
class EvaluationResult:
    """Held-out accuracies after the last epoch.

    Attributes:
        accuracies: One per network, in [0, 1].
        seconds: Wall-clock time of training and testing them.
    """

    accuracies: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """Mean over the networks."""
        return mean_std(self.accuracies)[0]

    @property
    def std(self) -> float:
        """Population standard deviation over the networks, as the field reports it."""
        return mean_std(self.accuracies)[1]


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and population standard deviation.

    Example:
        >>> mean_std([1.0, 3.0])
        (2.0, 1.0)
    """
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def train_fresh_networks(
    images: Tensor,
    targets: Tensor,
    lr: float,
    network: FunctionalNetwork,
    recipe: EvaluationRecipe,
    num_networks: int,
    seed: int,
    on_epoch: Callable[[int], None] | None = None,
) -> Tensor:
    """Train several networks from scratch at once and return their parameters, [K, P].

    Every network has its own initialisation, batch order and augmentation draws, which depend on ``seed`` and its
    number alone.

    Args:
        images: [n, ch, H, W]; read only.
        targets: Labels [n] or label logits [n, C].
        lr: Initial learning rate.
        network: The architecture.
        recipe: The protocol.
        num_networks: K.
        seed: Seed of everything that is drawn.
        on_epoch: Called with the number of epochs done after each one.

    Raises:
        InputError: If ``lr`` is not a positive number.
    """
    if not 0 < lr < float("inf"):
        raise InputError(
            f"the evaluation's learning rate is {lr:g}, but SGD needs a positive one: the learned rate has diverged; "
            "set model.student_lr_floor, lower model.student_lr_lr, or give the evaluation recipe its own lr"
        )
    images, targets = images.detach(), targets.detach()
    size, height, width = len(images), *images.shape[-2:]
    batch_size = min(recipe.batch_size, size)
    vectorised = network.vmappable and ensemble_pays(images.device.type, batch_size * height * width)
    policy = DSA(recipe.augmentation)
    orders = [step_generator(seed, k, "evaluation/order") for k in range(num_networks)]
    draws = [step_generator(seed, k, "evaluation/augment") for k in range(num_networks)]
    thetas = torch.stack([network.initial(_initial_seed(seed, k)) for k in range(num_networks)]).to(images)
    milestones = {int(fraction * recipe.epochs) for fraction in recipe.milestones}

    def optimizer() -> torch.optim.SGD:
        return torch.optim.SGD([thetas], lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)

    sgd = optimizer()
    for epoch in range(recipe.epochs):
        if epoch in milestones and epoch > 0:
            lr *= recipe.gamma
            if recipe.reset_momentum:
                sgd = optimizer()
            else:
                sgd.param_groups[0]["lr"] = lr
        order = torch.stack([torch.randperm(size, generator=g) for g in orders]).to(images.device)
        for indices in order.split(batch_size, dim=1):
            batch = torch.stack(
                [
                    augment(images[rows], policy.draw(g, len(rows), (height, width)))
                    for rows, g in zip(indices, draws, strict=True)
                ]
            )
            thetas.grad, _ = ensemble_gradients(network, thetas, batch, targets[indices], vectorised)
            sgd.step()
        if on_epoch is not None:
            on_epoch(epoch + 1)
    return thetas.detach()


def test_accuracies(thetas: Tensor, network: FunctionalNetwork, held_out: RealSet) -> tuple[float, ...]:
    """Return the top-1 accuracy in [0, 1] of each of the networks ``thetas`` [K, P] on held-out data."""
    device = held_out.images.device
    metrics = [MulticlassAccuracy(held_out.num_classes, average="micro").to(device) for _ in thetas]
    pixels = TEST_BATCH * held_out.image_shape[-2] * held_out.image_shape[-1]
    vectorised = network.vmappable and ensemble_pays(device.type, pixels)
    for images, labels in zip(held_out.images.split(TEST_BATCH), held_out.labels.split(TEST_BATCH), strict=True):
        logits = ensemble_logits(network, thetas, images, vectorised)
        for metric, output in zip(metrics, logits, strict=True):
            metric.update(output, labels)
    return tuple(float(metric.compute()) for metric in metrics)


def evaluate_synthetic_set(
    images: Tensor,
    targets: Tensor,
    student_lr: float,
    held_out: RealSet,
    network: FunctionalNetwork,
    recipe: EvaluationRecipe = RECIPES["mtt"],
    num_networks: int = 5,
    seed: int = 0,
    on_epoch: Callable[[int], None] | None = None,
) -> EvaluationResult:
    """Train ``num_networks`` fresh networks on a synthetic set and test each one on held-out data after its last epoch.

    Nothing outside is touched: neither the arguments nor any global random state.

    Args:
        images: [n, ch, H, W], in the colour space of ``held_out``.
        targets: Labels [n] or label logits [n, C].
        student_lr: The learning rate that belongs to the set, used unless the recipe has its own.
        held_out: What the networks are tested on.
        network: The architecture.
        recipe: The protocol.
        num_networks: 5 in the literature.
        seed: Seed of initialisations, orders and augmentations.
        on_epoch: Called with the number of epochs done after each one.

    Raises:
        InputError: If the learning rate is not positive.
    """
    started = time.perf_counter()
    lr = student_lr if recipe.lr is None else recipe.lr
    thetas = train_fresh_networks(images, targets, lr, network, recipe, num_networks, seed, on_epoch)
    accuracies = test_accuracies(thetas, network, held_out)
    return EvaluationResult(accuracies, time.perf_counter() - started)


def _initial_seed(seed: int, network: int) -> int:
    """Return the seed of one network's initialisation, unrelated to the seeds of experts."""
    return step_generator(seed, network, "evaluation/initial").initial_seed()
