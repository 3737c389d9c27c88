"""Evaluation: train fresh networks on a synthetic set alone, test them on real data."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from dd_lightning.execution.compile import Compile, compiles
from dd_lightning.functional.cutmix import cutmix, draw_cutmix, label_logits
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.policies import AugmentationPolicy, PolicyName, augment_in_turn
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.real import RealSet
from dd_lightning.training.parallel_networks import (
    Network,
    batching_pays,
    compiled_or_plain,
    images_per_pass,
    parallel_gradients,
    parallel_logits,
)

TEST_BATCH = 512
"""The most held-out images of a forward pass: on a host fewer, if so many do not fit the processor's cache."""


@dataclass(frozen=True)
class EvaluationRecipe:
    """How a fresh network is trained on a synthetic set: SGD on the cross-entropy.

    The defaults are those of the MTT reference, which are also the recipe ``mtt``.

    Args:
        epochs: Passes over the synthetic set. (The MTT reference's loop makes 1,001 of its nominal 1,000.)
        batch_size: Images per step.
        lr: Learning rate; None takes the one learned with the set.
        momentum: SGD momentum.
        weight_decay: SGD weight decay.
        milestones: Fractions of ``epochs`` after which the learning rate is multiplied by ``gamma``; rounded down to
            whole epochs, and without effect where that is 0.
        gamma: Learning-rate factor at a milestone.
        reset_momentum: Start each stretch with empty momentum, as the MTT reference does by re-creating SGD.
        augmentation: DSA strategy.
        policy: How much of the strategy each batch gets: ``dsa``, one operation; ``idc``, nearly all of it
            (:class:`~dd_lightning.functional.policies.AugmentationPolicy`). The parameters are drawn per image.
        cutmix: Probability that a batch is mixed by CutMix, after its augmentation.
        validations: How often the networks are tested, evenly spaced over the epochs, the last time after the last
            epoch. Only the last is the result; the others are for the best of them, which is reported apart.

    Raises:
        InputError: If a number is out of range, or the strategy or the policy does not exist.
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
    policy: PolicyName = "dsa"
    cutmix: float = 0.0
    validations: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise InputError(
                f"the evaluation recipe has epochs {self.epochs} and batch_size {self.batch_size}; both must be >= 1"
            )
        if not 0 <= self.cutmix <= 1 or self.validations < 1:
            raise InputError(
                f"the evaluation recipe has cutmix {self.cutmix} and validations {self.validations}; cutmix must be "
                "from 0 to 1 and validations >= 1"
            )
        AugmentationPolicy(self.augmentation, self.policy)  # refuses what does not exist

    @property
    def validation_epochs(self) -> tuple[int, ...]:
        """How many epochs are done at each test; fewer tests than ``validations`` if there are fewer epochs.

        Example:
            >>> EvaluationRecipe(epochs=1000, validations=4).validation_epochs
            (250, 500, 750, 1000)
        """
        return tuple(sorted({-(-i * self.epochs // self.validations) for i in range(1, self.validations + 1)}))


RECIPES: dict[str, EvaluationRecipe] = {
    "mtt": EvaluationRecipe(),
    # The protocol of IDC for CIFAR: the defaults of argument.py, the schedule of train.py and the augmentation of
    # test.py in https://github.com/snu-mllab/Efficient-Dataset-Condensation at ceac95a. There is no cutout in it,
    # because CutMix is in its place.
    "idc": EvaluationRecipe(
        epochs=1000,
        batch_size=64,
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        milestones=(2 / 3, 5 / 6),
        gamma=0.2,
        reset_momentum=False,
        augmentation="color_crop_flip_scale_rotate",
        policy="idc",
        cutmix=0.5,
        validations=4,
    ),
}
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
    """Held-out accuracies after the last epoch, and those on the way.

    Attributes:
        accuracies: One per network, in [0, 1], after the last epoch: the result.
        seconds: Wall-clock time of training and testing them.
        validations: The accuracies at each of the recipe's tests, the last of which is ``accuracies``; empty if only
            that one is known.
    """

    accuracies: tuple[float, ...]
    seconds: float
    validations: tuple[tuple[float, ...], ...] = ()

    @property
    def best_accuracies(self) -> tuple[float, ...]:
        """Each network's best validation: IDC's "best", chosen on the very data it is measured on, hence no result."""
        return tuple(max(each) for each in zip(self.accuracies, *self.validations, strict=True))

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
    on_validation: Callable[[Tensor], None] | None = None,
    computed: Network | None = None,
) -> Tensor:
    """Train several networks from scratch at once and return their parameters, [K, P].

    Every network has its own initialization, batch order, augmentation and CutMix draws, which depend on ``seed`` and
    its number alone.

    Args:
        images: [n, ch, H, W]; read only.
        targets: Labels [n] or label logits [n, C].
        lr: Initial learning rate.
        network: The architecture.
        recipe: The protocol.
        num_networks: K.
        seed: Seed of everything that is drawn.
        on_epoch: Called with the number of epochs done after each one.
        on_validation: Called with the parameters, [K, P], after each of the recipe's ``validation_epochs``; training
            goes on in the same memory.
        computed: What is differentiated in place of ``network``, such as :func:`compiled_for_evaluation` gives.

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
    vectorized = network.vmappable and batching_pays(images.device.type, batch_size * height * width)
    policy = AugmentationPolicy(recipe.augmentation, recipe.policy)
    orders, augments, mixes = (
        [step_generator(seed, k, f"evaluation/{stream}") for k in range(num_networks)]
        for stream in ("order", "augment", "cutmix")
    )
    if recipe.cutmix > 0:  # at any step some networks may mix and others not: labels of one shape for all
        targets = label_logits(targets, network.num_classes, images.dtype)
    thetas = torch.stack([network.initial(_initial_seed(seed, k)) for k in range(num_networks)]).to(images)
    milestones = [int(fraction * recipe.epochs) for fraction in recipe.milestones]

    def training_batch(rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
        shape = (len(rows), (height, width))
        batch, labels = augment_in_turn(images[rows], policy.draw(augments[number], *shape)), targets[rows]
        if recipe.cutmix > 0 and (mix := draw_cutmix(mixes[number], *shape, recipe.cutmix)) is not None:
            batch, labels = cutmix(batch, labels, mix, network.num_classes)
        return batch, labels

    def optimizer() -> torch.optim.SGD:
        return torch.optim.SGD([thetas], lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)

    sgd = optimizer()
    for epoch in range(recipe.epochs):
        if epoch in milestones and epoch > 0:
            lr *= recipe.gamma ** milestones.count(epoch)  # with few epochs, two may coincide
            if recipe.reset_momentum:
                sgd = optimizer()
            else:
                sgd.param_groups[0]["lr"] = lr
        order = torch.stack([torch.randperm(size, generator=g) for g in orders]).to(images.device)
        for indices in order.split(batch_size, dim=1):
            batches = [training_batch(rows, number) for number, rows in enumerate(indices)]
            batch, labels = (torch.stack(parts) for parts in zip(*batches, strict=True))
            thetas.grad, _ = parallel_gradients(computed or network, thetas, batch, labels, vectorized)
            sgd.step()
        if on_validation is not None and epoch + 1 in recipe.validation_epochs:
            on_validation(thetas.detach())
        if on_epoch is not None:
            on_epoch(epoch + 1)
    return thetas.detach()


def compiled_for_evaluation(
    images: Tensor,
    targets: Tensor,
    network: FunctionalNetwork,
    recipe: EvaluationRecipe,
    counts: Sequence[int],
    choice: Compile,
    evaluations: int,
    option: str,
) -> Network:
    """Return the network with compiled gradients for all evaluations of a run, if that was asked for or repays itself.

    The rounding is then another one. Test passes are not compiled.

    Args:
        images: A synthetic set of the size that will be evaluated, [n, ch, H, W]; read only.
        targets: Its labels [n] or label logits [n, C].
        network: The architecture.
        recipe: The protocol.
        counts: How many networks an evaluation may train.
        choice: Whether to compile; see :func:`compiles`. Steps are those of one evaluation, in
            which all networks take theirs together, times ``evaluations``.
        evaluations: How many there will be in the whole run.
        option: Name of the option, for messages.

    Raises:
        InputError: If the choice is ``on``, and the network cannot be compiled.
    """
    steps = evaluations * recipe.epochs * -(-len(images) // min(recipe.batch_size, len(images)))
    if not compiles(choice, images.device, steps):
        return network
    short = replace(recipe, epochs=1)

    def warm_up(computed: Network) -> None:
        for count in counts:
            train_fresh_networks(images, targets, 0.01, network, short, count, seed=0, computed=computed)

    return compiled_or_plain(network, warm_up, choice, f"the evaluation of {network.name}", option)


def accuracies_of(thetas: Tensor, network: FunctionalNetwork, held_out: RealSet) -> tuple[float, ...]:
    """Return the top-1 accuracy in [0, 1] of each of the networks ``thetas`` [K, P] on held-out data."""
    device = held_out.images.device
    metrics = [MulticlassAccuracy(held_out.num_classes, average="micro").to(device) for _ in thetas]
    pixels = TEST_BATCH * held_out.image_shape[-2] * held_out.image_shape[-1]
    vectorized = network.vmappable and batching_pays(device.type, pixels)
    size = TEST_BATCH
    if device.type == "cpu" and not network.uses_batch_statistics:
        size = images_per_pass(network, network.num_parameters, held_out.image_shape, TEST_BATCH, forward=True)
    for images, labels in zip(held_out.images.split(size), held_out.labels.split(size), strict=True):
        logits = parallel_logits(network, thetas, images, vectorized)
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
    computed: Network | None = None,
) -> EvaluationResult:
    """Train ``num_networks`` fresh networks on a synthetic set and test each one on held-out data.

    They are tested after the last epoch, and on the way if the recipe has several validations. Nothing outside is
    touched: neither the arguments nor any global random state.

    Args:
        images: [n, ch, H, W], in the color space of ``held_out``.
        targets: Labels [n] or label logits [n, C].
        student_lr: The learning rate that belongs to the set, used unless the recipe has its own.
        held_out: What the networks are tested on.
        network: The architecture.
        recipe: The protocol.
        num_networks: 5 in the literature.
        seed: Seed of initializations, orders, augmentations and CutMix.
        on_epoch: Called with the number of epochs done after each one.
        computed: What is differentiated in place of ``network``, such as :func:`compiled_for_evaluation` gives.

    Raises:
        InputError: If the learning rate is not positive.
    """
    started = time.perf_counter()
    lr = student_lr if recipe.lr is None else recipe.lr
    validations: list[tuple[float, ...]] = []

    def on_validation(thetas: Tensor) -> None:
        validations.append(accuracies_of(thetas, network, held_out))

    train_fresh_networks(images, targets, lr, network, recipe, num_networks, seed, on_epoch, on_validation, computed)
    return EvaluationResult(validations[-1], time.perf_counter() - started, tuple(validations))


def _initial_seed(seed: int, network: int) -> int:
    """Return the seed of one network's initialization, unrelated to the seeds of experts."""
    return step_generator(seed, network, "evaluation/initial").initial_seed()
