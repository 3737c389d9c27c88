"""Evaluation: train fresh networks on a synthetic set alone, test them on real data."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dd_lightning.execution.options import Execution
from dd_lightning.execution.process import Process, SingleProcess
from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork, NetworkSpec
from dd_lightning.sets.real import RealSet
from dd_lightning.training.parallel_networks import (
    ParallelTraining,
    Passes,
    Stack,
    batching_pays,
    check_batches,
    images_per_pass,
    piece_of,
)
from dd_lightning.training.recipes import TrainingRecipe

TEST_BATCH = 512
"""The most held-out images of a forward pass: on a host fewer, if so many do not fit the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe(TrainingRecipe):
    """How a fresh network is trained on a synthetic set.

    The defaults are those of the MTT reference, which are also the recipe ``mtt``.

    Args:
        lr: Learning rate; None takes the one learned with the set.
        epochs: Passes over the synthetic set. (The MTT reference's loop makes 1,001 of its nominal 1,000.)
        milestones: Fractions of ``epochs`` after which the learning rate is multiplied by ``gamma``; rounded down to
            whole epochs, and without effect where that is 0.
        gamma: Learning-rate factor at a milestone.
        reset_momentum: Start each stretch with empty momentum, as the MTT reference does by re-creating SGD.
        validations: How often the networks are tested, evenly spaced over the epochs, the last time after the last
            epoch. Only the last is the result; the others are for the best of them, which is reported apart.
    """

    lr: float | None = None
    epochs: int = 1000
    milestones: tuple[float, ...] = (0.5,)
    gamma: float = 0.1
    reset_momentum: bool = True
    validations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("recipe.epochs", self.epochs, low=1)
        check_range("recipe.validations", self.validations, low=1)

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
    # The same with a learning rate of its own: the defaults of main_DM.py (lr_net, epoch_eval_train, batch_train) and
    # evaluate_synset of utils.py in https://github.com/VICO-UoE/DatasetCondensation at 306245d.
    "dm": EvaluationRecipe(lr=0.01),
    # DD-Ranking 0.2.0 (https://github.com/NUS-HPC-AI-Lab/DD-Ranking), as its leaderboard scores MTT, DSA and DM: a
    # StepLR of 500 epochs, and a test every 10. Its result is the best of these tests, for us the best validation.
    "ddranking": EvaluationRecipe(reset_momentum=False, validations=100),
    # The protocol of IDC for CIFAR: the defaults of argument.py, the schedule of train.py and the augmentation of
    # test.py in https://github.com/snu-mllab/Efficient-Dataset-Condensation at ceac95a. There is no cutout in it,
    # because CutMix is in its place.
    "idc": EvaluationRecipe(
        batch_size=64,
        lr=0.01,
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


def get_recipe(
    name: str | EvaluationRecipe, epochs: int | None = None, augmentation: str | None = None
) -> EvaluationRecipe:
    """Return a recipe, or one of ``RECIPES`` by its name, as it is or with other epochs or another DSA strategy.

    Raises:
        InputError: If there is none of that name.
    """
    if not isinstance(name, EvaluationRecipe):
        if name not in RECIPES:
            raise InputError(f"unknown evaluation recipe {name!r}; choose one of {', '.join(sorted(RECIPES))}")
        name = RECIPES[name]
    changes: dict[str, Any] = {"epochs": epochs, "augmentation": augmentation}
    return replace(name, **{option: value for option, value in changes.items() if value is not None})


@dataclass(frozen=True)
class EvaluationResult:
    """Held-out accuracies after the last epoch, and those on the way.

    Attributes:
        accuracies: One per network, in [0, 1], after the last epoch: the result.
        seconds: Wall-clock time of training and testing them.
        validations: The accuracies at each of the recipe's tests, ``accuracies`` last; empty if only these are known.
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


def percent(accuracies: Sequence[float]) -> str:
    """Format accuracies in [0, 1] as mean and population standard deviation; a single one has no deviation.

    Example:
        >>> percent([0.5, 0.7]), percent([0.5])
        ('60.0 ± 10.0 %', '50.0 %')
    """
    mean, std = mean_std(accuracies)
    if len(accuracies) == 1:
        return f"{100 * mean:.1f} %"
    return f"{100 * mean:.1f} ± {100 * std:.1f} %"


def train_fresh_networks(
    images: Tensor,
    targets: Tensor,
    lr: float,
    network: FunctionalNetwork,
    recipe: EvaluationRecipe,
    num_networks: int,
    seed: int,
    on_epoch: Callable[[int], None] = lambda _: None,
    on_validation: Callable[[ParallelTraining], None] = lambda _: None,
    passes: Passes | None = None,
    first: int = 0,
) -> ParallelTraining:
    """Train several networks from scratch, side by side, and return them.

    Every network has its own initialization, batch order, augmentation and CutMix draws, which depend on ``seed`` and
    its number alone.

    Args:
        images: ``[n, ch, H, W]``; read only. Or ``[K, n, ch, H, W]``: a set for each network.
        targets: Labels ``[n]`` or label logits ``[n, C]``; or ``[K, ...]``.
        lr: Initial learning rate.
        network: The architecture.
        recipe: The protocol.
        num_networks: K.
        seed: Seed of all draws.
        first: Number of the first network; those before it have been trained.
        on_epoch: Called with the number of epochs done after each one.
        on_validation: Called after each of the recipe's ``validation_epochs``; training goes on in the same memory.
        passes: How gradients are computed; None is :func:`evaluation_passes`.

    Raises:
        InputError: If ``lr`` is not a positive number, or a batch is too small for the network.
    """
    if not 0 < lr < math.inf:
        raise InputError(
            f"the evaluation's learning rate is {lr:g}, but SGD needs a positive one: the learned rate has diverged; "
            "set model.student_lr_floor, lower model.student_lr_lr, or give the evaluation recipe its own lr"
        )
    sets = [
        (part.detach(), recipe.targets(labels.detach(), network.num_classes, images.dtype))
        for part, labels in (zip(images, targets, strict=True) if images.ndim == 5 else [(images, targets)])
    ]
    sets *= 1 if images.ndim == 5 else num_networks
    images = sets[0][0]
    check_batches(network, len(images), recipe.batch_size)
    initial, orders, augments, mixes = (  # unrelated to the draws of experts
        [step_generator(seed, k, f"evaluation/{stream}") for k in range(first, first + num_networks)]
        for stream in ("initial", "order", "augment", "cutmix")
    )
    thetas = [network.initial(generator.initial_seed()).to(images) for generator in initial]
    training = ParallelTraining(passes or evaluation_passes(network, images, recipe), thetas, lr, recipe)
    milestones = [int(fraction * recipe.epochs) for fraction in recipe.milestones]
    for epoch in range(recipe.epochs):
        if epoch in milestones and epoch > 0:
            lr *= recipe.gamma ** milestones.count(epoch)  # with few epochs, two may coincide
            training.set_lr(lr, recipe.reset_momentum)
        order = torch.stack([torch.randperm(len(images), generator=g) for g in orders]).to(images.device)
        for indices in order.split(recipe.batch_size, dim=1):
            batches = [
                recipe.augment(own[rows], labels[rows], network.num_classes, augments[k], mixes[k])
                for k, (rows, (own, labels)) in enumerate(zip(indices, sets, strict=True))
            ]
            training.step(*zip(*batches, strict=True))
        if epoch + 1 in recipe.validation_epochs:
            on_validation(training)
        on_epoch(epoch + 1)
    return training


def side_by_side(network: FunctionalNetwork, images: Tensor, recipe: EvaluationRecipe) -> bool:
    """Tell whether several networks train faster at once than in turn on images ``[n, ch, H, W]``."""
    pixels = min(recipe.batch_size, len(images)) * images.shape[-2] * images.shape[-1]
    return network.vmappable and batching_pays(images.device.type, pixels)


def evaluation_passes(
    network: FunctionalNetwork,
    images: Tensor,
    recipe: EvaluationRecipe,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> Passes:
    """Return how gradients of fresh networks are computed on a set of images ``[n, ch, H, W]``, not compiled yet.

    Raises:
        InputError: If ``execution.micro_batch`` cuts the batches of a network with batch norm.
    """
    device, batch, precision = images.device.type, min(recipe.batch_size, len(images)), execution.precision
    return Passes(
        network,
        # Unless another one is asked for, TF32 is as torch has it: so are the evaluations of the field.
        precision=None if precision == "float32" else precision,
        vectorized=side_by_side(network, images, recipe),
        piece=piece_of(network, execution.micro_batch, batch, device, precision),
        running_statistics=True,
    )


def accuracies_of(
    thetas: Stack, network: FunctionalNetwork, held_out: RealSet, statistics: Stack | None = None
) -> tuple[float, ...]:
    """Return the top-1 accuracy in [0, 1] of networks ``[K, P]`` with running statistics ``[K, S]``."""
    device, (_, height, width) = held_out.images.device.type, held_out.image_shape
    vectorized = network.vmappable and batching_pays(device, TEST_BATCH * height * width)
    size = images_per_pass(network, TEST_BATCH, forward=True) if device == "cpu" else TEST_BATCH
    return tuple(Passes(network, vectorized=vectorized).accuracies(thetas, held_out, size, statistics))


class Evaluation:
    """Trains fresh networks of one architecture on synthetic sets, and tests them on held-out data.

    Args:
        network: The architecture.
        held_out: What the networks are tested on.
        recipe: The protocol.
        execution: How the networks are computed. Test passes are not compiled.
        evaluations: How many there will be in the whole run: ``compile: auto`` compiles only what repays itself.
        counts: How many networks one may train: all these are compiled for at the first one.
        process: One of several that share the networks.
    """

    def __init__(
        self,
        network: FunctionalNetwork,
        held_out: RealSet,
        recipe: EvaluationRecipe = RECIPES["mtt"],
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        evaluations: int = 1,
        counts: Sequence[int] = (),
        process: Process = SingleProcess(),  # noqa: B008  (it has no state)
    ) -> None:
        self._process = process
        self.network, self._held_out, self._recipe, self._execution = network, held_out, recipe, execution
        self._evaluations, self._counts = evaluations, counts
        self._passes: dict[int, Passes] = {}

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        student_lr: float,
        num_networks: int = 5,
        seed: int = 0,
        on_epoch: Callable[[int], None] = lambda _: None,
        first: int = 0,
    ) -> EvaluationResult:
        """Do what :func:`evaluate_synthetic_set` does, beginning at the network of number ``first``.

        With images ``[K, n, ch, H, W]`` and targets ``[K, ...]``, each network has a set of its own.
        """
        started, network, recipe, process = time.perf_counter(), self.network, self._recipe, self._process
        own = self._share(num_networks)
        if (size := images.shape[-4]) not in self._passes:
            data = (images[0], targets[0]) if images.ndim == 5 else (images, targets)
            self._passes[size] = self._compiled(data[0].detach(), data[1].detach(), num_networks)
        passes = self._passes[size]
        accuracies = torch.zeros(len(recipe.validation_epochs), num_networks, dtype=torch.float64)
        tested = iter(accuracies)

        def on_validation(training: ParallelTraining) -> None:
            found = accuracies_of(training.thetas, network, self._held_out, training.statistics)
            next(tested)[own.start : own.stop] = torch.tensor(found, dtype=torch.float64)

        lr = student_lr if recipe.lr is None else recipe.lr
        if images.ndim == 5:
            images, targets = images[own.start : own.stop], targets[own.start : own.stop]
        if own:
            given = lr, network, recipe, len(own), seed, on_epoch, on_validation, passes, first + own.start
            train_fresh_networks(images, targets, *given)
        validations = tuple(tuple(row) for row in process.sum(accuracies).tolist())
        return EvaluationResult(validations[-1], time.perf_counter() - started, validations)

    def _share(self, num_networks: int) -> range:
        """Return the numbers of the networks that this process trains."""
        rank, size = self._process.rank, self._process.size
        return range(num_networks * rank // size, num_networks * (rank + 1) // size)

    def _compiled(self, images: Tensor, targets: Tensor, num_networks: int) -> Passes:
        network, recipe = self.network, self._recipe
        passes = evaluation_passes(network, images, recipe, self._execution)
        data = images, recipe.targets(targets, network.num_classes, images.dtype)
        calls = self._evaluations * recipe.epochs * -(-len(images) // recipe.batch_size)
        counts = {len(self._share(count)) for count in (num_networks, *self._counts)} - {0}
        what = f"the evaluation of {network.name}"
        passes.compile(self._execution.compile, calls, data, recipe.batch_size, counts, what)
        return passes


def evaluate_synthetic_set(
    images: Tensor,
    targets: Tensor,
    student_lr: float,
    held_out: RealSet,
    network: FunctionalNetwork | NetworkSpec,
    recipe: EvaluationRecipe | str = "mtt",
    num_networks: int = 5,
    seed: int = 0,
    on_epoch: Callable[[int], None] = lambda _: None,
) -> EvaluationResult:
    """Train ``num_networks`` fresh networks on a synthetic set and test each one on held-out data.

    They are tested after the last epoch, and on the way if the recipe has several validations. Nothing outside is
    touched: neither the arguments nor any global random state.

    Args:
        images: ``[n, ch, H, W]``, in the color space of ``held_out``.
        targets: Labels ``[n]`` or label logits ``[n, C]``.
        student_lr: The learning rate that belongs to the set, used unless the recipe has its own.
        held_out: What the networks are tested on.
        network: The architecture, or what names it.
        recipe: The protocol, or its name.
        num_networks: 5 in the literature.
        seed: Seed of all draws.
        on_epoch: Called with the number of epochs done after each one.

    Raises:
        InputError: If the learning rate is not positive, or the images are not those of ``held_out``.
    """
    check_range("num_networks", num_networks, low=1, hint="5 in the literature")
    if tuple(images.shape[1:]) != held_out.image_shape:
        raise InputError(
            f"images are {list(images.shape)}, but those held out {list(held_out.images.shape)}: match them"
        )
    if not isinstance(network, FunctionalNetwork):
        network = FunctionalNetwork(network, held_out.image_shape, held_out.num_classes).to(held_out.images.device)
    return Evaluation(network, held_out, get_recipe(recipe))(images, targets, student_lr, num_networks, seed, on_epoch)
