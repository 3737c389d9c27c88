"""Gradient and bidirectional matching against a loop over classes written from the equation, on ordinary modules."""

import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dd_lightning.execution.options import Execution
from dd_lightning.functional.distances import Metric, step_per_iteration
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation
from dd_lightning.functional.policies import AugmentationPolicy, augment_in_turn
from dd_lightning.functional.products import gradient_products
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.networks import FunctionalNetwork, build_network, training_loss
from dd_lightning.objectives import BidirectionalMatching, GradientMatching, Workload, base
from dd_lightning.objectives.base import ScoredCandidate
from dd_lightning.objectives.class_statistics import ClassBatch, Statistics
from dd_lightning.objectives.classwise import ClasswiseDraw, Sampling
from dd_lightning.pools import Candidate, NetworkPool
from dd_lightning.sets.class_batches import class_representatives
from dd_lightning.sets.color_spaces import NormalizedSpace
from dd_lightning.sets.initial import class_labels
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import SyntheticSet
from dd_lightning.training.recipes import NetworkRecipe
from tests import small

METRICS: list[Metric] = ["mse", "l1", "l1_mean", "cos"]
NETWORKS = ["ConvNet-2-W4", "ConvNet-2-W4-BN"]
CLASSES, SHAPE, BATCH = 3, (3, 8, 8), 5
COUNTS = (11, 14, 12)
MEAN, STD = (0.5, 0.4, 0.6), (0.25, 0.2, 0.3)

# The reference


def slow_decode(synthetic: SyntheticSet, images: Tensor) -> Tensor:
    """Cut, enlarge and normalize stored images one tile at a time."""
    pixels, formation = synthetic.space is not None, synthetic.formation
    decoded = []
    for image in images:
        for factor in formation.factors:
            side = -(-SHAPE[1] // factor)
            margin = side * factor - SHAPE[1]
            padded = F.pad(image, (0, margin, 0, margin), value=0.5 if pixels else 0.0)
            for row in range(factor):
                for column in range(factor):
                    tile = padded[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                    decoded.append(F.interpolate(tile[None], SHAPE[1:], mode="bilinear", align_corners=False)[0])
    stacked = torch.stack(decoded)
    if not pixels:
        return stacked
    channels = [(stacked[:, c] - MEAN[c]) / STD[c] for c in range(SHAPE[0])]
    return torch.stack(channels, dim=1)


def slow_distance(first: Tensor, second: Tensor, metric: Metric) -> Tensor:
    """Sum over the filters of a layer; a vector is one row."""
    rows = [(first, second)] if first.ndim == 1 else list(zip(first, second, strict=True))
    total = torch.zeros((), dtype=torch.float64)
    for a, b in ((x.reshape(-1), y.reshape(-1)) for x, y in rows):
        if metric == "mse":
            total = total + ((a - b) ** 2).sum()
        elif metric == "l1":
            total = total + (a - b).abs().sum()
        elif metric == "l1_mean":
            total = total + (a - b).abs().sum() / len(a)
        elif bool(a.any()) and bool(b.any()):
            total = total + 1 - (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt() + 1e-6)
        else:
            total = total + 1
    return total


def module_of(network: FunctionalNetwork, theta: Tensor) -> nn.Module:
    """Return an ordinary module with these parameters, in training mode."""
    module = build_network(network.name, SHAPE[0], CLASSES, SHAPE[1:]).double().train()
    nn.utils.vector_to_parameters(theta, module.parameters())
    return module


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -sum_k p_k log q_k, with p one-hot for class numbers and a softmax for logits."""
    wanted = targets.softmax(1) if targets.is_floating_point() else F.one_hot(targets, CLASSES).double()
    return -(wanted * logits.log_softmax(1)).sum(1).mean()


def slow_terms(problem: "Problem", draw: ClasswiseDraw, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over classes of the gradients' and of the mean features' distances."""
    objective, module = problem.objective, module_of(problem.network, problem.theta)
    compared = [
        parameter
        for parameter in module.parameters()
        if parameter.ndim == 4
        or (parameter.ndim == 2 and objective.include_classifier)
        or (parameter.ndim == 1 and objective.include_bias)
    ]
    captured: list[Tensor] = []
    classifier = module.get_submodule("classifier")
    classifier.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))

    def backward(batch: Tensor, targets: Tensor, create_graph: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        captured.clear()
        value = cross_entropy(module(batch), targets)
        return torch.autograd.grad(value, compared, create_graph=create_graph), captured[0].mean(0)

    decoded = slow_decode(problem.synthetic, images)
    targets = problem.synthetic.targets.repeat_interleave(problem.synthetic.formation.per_image, 0)
    gradients, features = torch.zeros(2, dtype=torch.float64).unbind()
    for batch in draw.classes:
        real, real_feature = backward(batch.real, batch.real_targets, False)
        augmented = augment_in_turn(decoded[batch.rows], batch.augmentation)
        own, own_feature = backward(augmented, targets[batch.rows].detach(), True)
        for a, b in zip(own, real, strict=True):
            gradients = gradients + slow_distance(a, b, objective.metric)
        features = features + slow_distance(own_feature, real_feature.detach(), objective.metric)
    return gradients, features


# The problem


@dataclass
class Problem:
    """S, T, a network and an objective, all in float64 and from fixed seeds."""

    objective: GradientMatching
    network: FunctionalNetwork
    theta: Tensor
    real: RealSet
    synthetic: SyntheticSet

    @property
    def candidate(self) -> Candidate:
        return Candidate((0,), self.theta)

    @property
    def given(self) -> base.Problem:
        return base.Problem(self.synthetic, self.real, self.network)

    def draw(self, step: int = 0, seed: int = 7) -> ClasswiseDraw:
        return self.objective.draw(self.given, lambda: self.candidate, StepContext(seed, step))

    def score(self, draw: ClasswiseDraw, with_gradient: bool = True) -> ScoredCandidate:
        (scored,) = self.objective.score(self.given, [self.candidate], draw, with_gradient=with_gradient)
        return scored

    def loss_and_gradient(self, draw: ClasswiseDraw, with_gradient: bool = True) -> tuple[Tensor, Tensor]:
        return self.backward(self.score(draw, with_gradient))

    def backward(self, scored: ScoredCandidate) -> tuple[Tensor, Tensor]:
        """Return the loss and the gradient that its backward leaves at the stored images."""
        self.synthetic.images.grad = None
        loss = self.objective.loss(self.given, scored)
        loss.backward()
        assert self.synthetic.images.grad is not None
        assert torch.equal(loss.detach(), scored.loss)
        assert not scored.loss.requires_grad
        return loss.detach(), self.synthetic.images.grad

    def slow(self, draw: ClasswiseDraw) -> tuple[Tensor, Tensor]:
        images = self.synthetic.images.detach().clone().requires_grad_()
        gradients, features = slow_terms(self, draw, images)
        alpha = self.objective.alpha if isinstance(self.objective, BidirectionalMatching) else 0.0
        loss = gradients + alpha * features
        return loss.detach(), torch.autograd.grad(loss, images)[0]

    def slow_loss(self, draw: ClasswiseDraw, images: Tensor) -> float:
        gradients, features = slow_terms(self, draw, images)
        alpha = self.objective.alpha if isinstance(self.objective, BidirectionalMatching) else 0.0
        return float((gradients + alpha * features).detach())


def real_set(counts: tuple[int, ...] = COUNTS) -> RealSet:
    generator = torch.Generator().manual_seed(11)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    patterns = torch.randn(len(counts), *SHAPE, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), *SHAPE, generator=generator, dtype=torch.float64)
    return RealSet(patterns[labels] + 0.7 * noise, labels, len(counts))


def random_theta(network: FunctionalNetwork) -> Tensor:
    """Return parameters of which none is where it starts from: norms start as the identity, hiding mistakes."""
    theta = network.initial(3).double()
    return theta + 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def problem(
    objective: GradientMatching,
    name: str = "ConvNet-2-W4",
    formation: Formation = Formation(),  # noqa: B008  (frozen)
    pixels: bool = False,
    soft: bool = False,
    ipc: int = 2,
) -> Problem:
    network, generator = FunctionalNetwork(name, SHAPE, CLASSES), torch.Generator().manual_seed(5)
    count = CLASSES * ipc
    if pixels:
        images = torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)
        space = NormalizedSpace(torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64))
    else:
        images, space = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64), None
    targets = class_labels(CLASSES, ipc)
    if soft:
        targets = F.one_hot(targets, CLASSES) + torch.randn(count, CLASSES, generator=generator, dtype=torch.float64)
    synthetic = SyntheticSet(images, targets, 0.01, formation, space)
    return Problem(objective, network, random_theta(network), real_set(), synthetic)


def gradient_matching(**options: Any) -> GradientMatching:  # noqa: ANN401
    return GradientMatching(**({"batch_real": BATCH} | options))


def bidirectional(**options: Any) -> BidirectionalMatching:  # noqa: ANN401
    settings: dict[str, Any] = {"batch_real": BATCH, "sampling": "shuffled"}
    return BidirectionalMatching(**(settings | options))


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def assert_equals_the_loop(case: Problem, draw: ClasswiseDraw | None = None) -> None:
    draw = draw or case.draw(step=3)
    loss, gradient = case.loss_and_gradient(draw)
    slow_loss, slow_gradient = case.slow(draw)
    assert float(slow_loss) > 1e-3
    assert relative_error(loss, slow_loss) < 1e-10
    assert float(slow_gradient.norm()) > 1e-6
    assert relative_error(gradient, slow_gradient) < 1e-10


# Loss and gradient


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("classifier", "bias"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("metric", METRICS)
def test_gradient_matching_is_the_loop(metric: Metric, classifier: bool, bias: bool, name: str) -> None:
    objective = gradient_matching(metric=metric, include_classifier=classifier, include_bias=bias)
    assert_equals_the_loop(problem(objective, name))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("metric", METRICS)
def test_bidirectional_matching_is_the_loop(metric: Metric, alpha: float, name: str) -> None:
    assert_equals_the_loop(problem(bidirectional(metric=metric, alpha=alpha), name))


FORMATIONS = [Formation(), Formation(2), Formation(3), Formation(2, "multi")]


@pytest.mark.parametrize("pixels", [False, True], ids=["network", "pixels"])
@pytest.mark.parametrize("formation", FORMATIONS, ids=lambda f: f"{f.factor}-{f.kind}")
def test_through_decoding_and_color_space(formation: Formation, pixels: bool) -> None:
    case = problem(bidirectional(alpha=2.0), "ConvNet-2-W4-SIGMOID", formation, pixels)
    assert_equals_the_loop(case)
    if formation.factor > 1:  # each class matches some of its tiles only
        case.objective.batch_syn = 3
        draw = case.draw()
        assert [len(batch.rows) for batch in draw.classes] == [3] * CLASSES
        assert_equals_the_loop(case, draw)


AUGMENTATIONS = [("color_crop_cutout", "idc"), ("flip_scale", "idc"), ("color_crop_cutout_flip_scale_rotate", "dsa")]


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("augmentation", "policy"), [*AUGMENTATIONS, ("none", "idc")])
def test_through_augmentation_and_with_labels_of_both_kinds(augmentation: str, policy: str, soft: bool) -> None:
    objective = bidirectional(alpha=0.5, augmentation=augmentation, policy=policy, include_classifier=True)
    case = problem(objective, formation=Formation(2), pixels=True, soft=soft)
    for step in range(2):
        assert_equals_the_loop(case, case.draw(step))


@pytest.mark.parametrize("objective", [gradient_matching(metric="cos"), bidirectional(alpha=0.5)], ids=["cos", "both"])
def test_finite_difference_of_the_whole_loss(objective: GradientMatching) -> None:
    case = problem(objective, "ConvNet-2-W4-SIGMOID", Formation(2), pixels=True)
    images = case.synthetic.images
    _, gradient = case.loss_and_gradient(case.draw())
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    point, step, values = images.detach().clone(), 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            images.copy_(point + sign * step * direction)
        values.append(float(case.score(case.draw()).loss))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-7)


def test_gradient_is_the_mixed_product_of_trajectory_matching() -> None:
    case = problem(gradient_matching(metric="mse", augmentation="none", include_classifier=True))
    draw, loss = case.draw(), training_loss(case.network)
    _, gradient = case.loss_and_gradient(draw)
    compared = [len(shape) in (2, 4) for shape in case.network.parameter_shapes]
    for batch in draw.classes:
        images = draw.images[batch.rows]

        def gradients(batch_images: Tensor, targets: Tensor) -> Tensor:
            theta = case.theta.clone().requires_grad_()
            return torch.autograd.grad(loss(theta, batch_images, targets), theta)[0]

        own, real = gradients(images, batch.targets), gradients(batch.real, batch.real_targets)
        parts = [
            2 * (a - b) if used else torch.zeros_like(a)
            for a, b, used in zip(case.network.split(own), case.network.split(real), compared, strict=True)
        ]
        tangent = torch.cat([part.flatten() for part in parts])
        for order in ("reverse_over_reverse", "reverse_over_forward"):
            product = gradient_products(loss, case.theta, images, batch.targets, tangent, order=order)
            assert relative_error(gradient[batch.rows], product.images) < 1e-12


# What scoring keeps


class Calls:
    """Records each call of an objective's statistics: is it of real images, and with a graph?"""

    def __init__(self, objective: GradientMatching, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, bool]] = []
        original = objective.statistics

        def recorded(network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
            self.made.append(("real" if len(images) == BATCH else "synthetic", torch.is_grad_enabled()))
            return original(network, theta, images, targets)

        monkeypatch.setattr(objective, "statistics", recorded)

    @staticmethod
    def sizes_of(case: "Problem", with_gradient: bool) -> list[Tensor]:
        """Return the images of each pass through the network in a step."""
        passed: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            original = case.objective.statistics

            def noted(network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
                passed.append(images)
                return original(network, theta, images, targets)

            patch.setattr(case.objective, "_matching", None)
            patch.setattr(case.objective, "statistics", noted)
            case.loss_and_gradient(case.draw(), with_gradient)
        return passed

    def take(self) -> dict[tuple[str, bool], int]:
        counts = {call: self.made.count(call) for call in self.made}
        self.made.clear()
        return counts


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("make", [gradient_matching, bidirectional])
def test_a_gradient_costs_one_pass_of_synthetic_images_and_none_of_real_ones(
    make: Any,  # noqa: ANN401
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = problem(make(batch_syn=7), name, Formation(2), pixels=True)  # 7 of 8 decoded images, 5 real ones
    draw = case.draw()
    calls = Calls(case.objective, monkeypatch)

    scored = case.score(draw, with_gradient=True)
    assert calls.take() == {("real", False): CLASSES, ("synthetic", True): CLASSES}
    sole_loss, sole = (tensor.clone() for tensor in case.backward(scored))
    assert calls.take() == {}

    scored = case.score(draw, with_gradient=False)
    assert calls.take() == {("real", False): CLASSES, ("synthetic", False): CLASSES}
    loss, gradient = case.backward(scored)
    assert calls.take() == {("synthetic", True): CLASSES}
    # Not the same bits: without a graph, torch rounds the derivatives of group norm otherwise.
    assert relative_error(loss, sole_loss) < 1e-13
    assert relative_error(gradient, sole) < 1e-12


def test_a_graph_is_gone_before_the_next_class(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(bidirectional())
    draw, original = case.draw(), case.objective.statistics
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def recorded(network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
        alive.append(sum(reference() is not None for reference in made))
        statistics = original(network, theta, images, targets)
        made.extend(weakref.ref(statistic) for statistic in statistics if torch.is_grad_enabled())
        return statistics

    monkeypatch.setattr(case.objective, "statistics", recorded)
    case.score(draw, with_gradient=True)
    scored = case.score(draw, with_gradient=False)
    case.backward(scored)
    assert len(made) == 2 * 3 * CLASSES
    assert alive == [0] * 5 * CLASSES


def test_each_class_stands_alone() -> None:
    case = problem(bidirectional())
    draw = case.draw()
    loss, gradient = case.loss_and_gradient(draw)
    gradient = gradient.clone()
    backwards = draw._replace(classes=draw.classes[::-1])
    turned_loss, turned = case.loss_and_gradient(backwards)
    assert torch.equal(turned, gradient)
    assert relative_error(turned_loss, loss) < 1e-14
    alone = []
    for label, batch in enumerate(draw.classes):
        value, own = case.loss_and_gradient(draw._replace(classes=(batch,)))
        alone.append(value)
        mine = torch.arange(len(case.synthetic)) // 2 == label
        assert torch.equal(own[mine], gradient[mine])
        assert torch.equal(own[~mine], torch.zeros_like(own[~mine]))
    assert relative_error(torch.stack(alone).sum(), loss) < 1e-14


def test_loss_can_be_weighted() -> None:
    case = problem(gradient_matching())
    scored = case.score(case.draw())
    _, gradient = case.backward(scored)
    images = case.synthetic.images
    loss = case.objective.loss(case.given, scored)
    torch.testing.assert_close(torch.autograd.grad(-3 * loss, images)[0], -3 * gradient, rtol=1e-15, atol=0)


# Pieces


PIECEWISE: list[GradientMatching] = [
    gradient_matching(),
    gradient_matching(metric="cos", include_classifier=True, include_bias=True),
    bidirectional(alpha=0.5),
]


@pytest.mark.parametrize("size", [1, 3, 6, 7, 100])  # of 5 real images and 7 of 8 synthetic ones
@pytest.mark.parametrize("objective", PIECEWISE, ids=["mse", "cos", "both"])
def test_pieces_add_up_to_the_whole(objective: GradientMatching, size: int) -> None:
    cut = replace(objective, batch_syn=7, execution=Execution(micro_batch=size))
    for with_gradient in (True, False):
        whole, pieces = (
            problem(each, formation=Formation(2), pixels=True, soft=True)
            for each in (replace(objective, batch_syn=7), cut)
        )
        loss, gradient = whole.loss_and_gradient(whole.draw(), with_gradient)
        found_loss, found = pieces.loss_and_gradient(pieces.draw(), with_gradient)
        assert relative_error(found_loss, loss) < 1e-12
        assert relative_error(found, gradient) < 1e-12
        largest = max(map(len, Calls.sizes_of(pieces, with_gradient)))
        assert largest == min(size, 7)


def test_auto_and_null_never_cut_a_class_and_batch_norm_cannot_be_cut() -> None:
    found, choices = [], (Execution(memory_gb=1e-9), Execution(micro_batch=None))
    for execution in choices:
        objective = gradient_matching(execution=execution)
        case = problem(objective)
        objective.plan_memory(Workload(case.network, len(case.synthetic)), Execution(micro_batch=1))
        found.append(case.loss_and_gradient(case.draw())[1].clone())
        assert max(map(len, Calls.sizes_of(case, True))) == BATCH
    assert torch.equal(*found)
    name = "ConvNet-2-W4-BN"
    case = problem(gradient_matching(execution=Execution(micro_batch=4)), name)
    with pytest.raises(InputError, match=r"micro_batch is 4, but network 'ConvNet-2-W4-BN' has batch norm, .* all 5 "):
        case.objective.plan_memory(Workload(case.network, len(case.synthetic)), Execution())


# Terms


def test_terms_of_bidirectional_matching() -> None:
    found: dict[float, Mapping[str, Tensor]] = {}
    for alpha in (0.0, 1.0, 2.5):
        case = problem(bidirectional(alpha=alpha))
        draw = case.draw()
        scored = case.score(draw)
        assert list(scored.terms) == ["gradient_distance", "feature_distance"]
        assert torch.equal(torch.stack(list(scored.terms.values())).sum(), scored.loss)
        gradients, features = slow_terms(case, draw, case.synthetic.images.detach())
        assert float(scored.terms["gradient_distance"]) == pytest.approx(float(gradients.detach()), rel=1e-12)
        assert float(scored.terms["feature_distance"]) == pytest.approx(alpha * float(features.detach()), rel=1e-12)
        found[alpha] = scored.terms
    assert torch.equal(found[1.0]["gradient_distance"], found[2.5]["gradient_distance"])
    assert torch.equal(found[1.0]["gradient_distance"], found[0.0]["gradient_distance"])
    assert float(found[1.0]["feature_distance"]) > 0
    assert relative_error(found[2.5]["feature_distance"], 2.5 * found[1.0]["feature_distance"]) < 1e-14
    assert float(found[0.0]["feature_distance"]) == 0


def test_alpha_zero_is_gradient_matching_and_has_its_terms_to_itself() -> None:
    plain, both = problem(gradient_matching()), problem(bidirectional(alpha=0.0))
    scored = plain.score(plain.draw())
    assert scored.terms == {}
    for value, reference in zip(both.loss_and_gradient(both.draw()), plain.backward(scored), strict=True):
        assert relative_error(value, reference) < 1e-13


# Draws


def same_draws(first: ClasswiseDraw, second: ClasswiseDraw) -> bool:
    def numbers(batch: ClassBatch) -> list[Tensor]:
        return [batch.real, batch.real_targets, batch.rows, batch.targets, *(d.values for d in batch.augmentation)]

    def operations(draw: ClasswiseDraw) -> list[list[str]]:
        return [[d.operation for d in batch.augmentation] for batch in draw.classes]

    return operations(first) == operations(second) and all(
        torch.equal(a, b)
        for one, two in zip(first.classes, second.classes, strict=True)
        for a, b in zip(numbers(one), numbers(two), strict=True)
    )


def find(real: RealSet, images: Tensor) -> list[int]:
    """Return where these images are in the real set."""
    return [int((real.images == image).flatten(1).all(1).nonzero()) for image in images]


def test_real_images_are_of_their_class_and_once_in_an_epoch() -> None:
    case = problem(gradient_matching(batch_real=4, augmentation="none"))
    steps = [case.draw(step) for step in range(12)]
    for label, count in enumerate(COUNTS):
        whole = count // 4  # batches in an epoch: 2, 3 and 3
        used = []
        for draw in steps:
            batch = draw.classes[label]
            rows = find(case.real, batch.real)
            assert case.real.labels[rows].tolist() == [label] * 4
            assert batch.real_targets.tolist() == [label] * 4
            used.append(rows)
        epochs = [[row for rows in used[start : start + whole] for row in rows] for start in range(0, 12, whole)]
        assert all(len(set(epoch)) == 4 * whole for epoch in epochs)
        assert epochs[0] != epochs[1]
        left_out = [set(case.real.class_indices(label).tolist()) - set(epoch) for epoch in epochs]
        assert all(len(left) == count - 4 * whole for left in left_out)
    assert case.real.class_counts == COUNTS


def test_synthetic_rows_are_of_their_class_capped_and_distinct() -> None:
    case = problem(gradient_matching(batch_syn=5), formation=Formation(2), soft=True)
    seen: list[set[int]] = [set() for _ in range(CLASSES)]
    for step in range(20):
        draw = case.draw(step)
        assert torch.equal(draw.images, case.synthetic.decoded().detach())
        for label, batch in enumerate(draw.classes):
            rows = batch.rows.tolist()
            assert len(set(rows)) == len(rows) == 5
            assert {row // 8 for row in rows} == {label}
            assert torch.equal(batch.targets, case.synthetic.targets.detach()[batch.rows // 4])
            seen[label] |= set(rows)
    assert [len(rows) for rows in seen] == [8] * CLASSES  # none is never drawn
    case.objective.batch_syn = 8
    assert [batch.rows.tolist() for batch in case.draw().classes] == [
        list(range(8 * label, 8 * label + 8)) for label in range(CLASSES)
    ]


def test_tiles_and_augmentations_have_streams_of_their_own() -> None:
    case = problem(gradient_matching(batch_syn=3), formation=Formation(2))
    for step in range(3):
        tiles, augment = (step_generator(7, step, stream) for stream in ("tiles", "augment"))
        policy = AugmentationPolicy("color_crop_cutout", "idc")
        for label, batch in enumerate(case.draw(step).classes):
            assert batch.rows.tolist() == [8 * label + i for i in torch.randperm(8, generator=tiles)[:3].tolist()]
            expected = policy.draw(augment, BATCH, SHAPE[1:], siamese=True)
            for drawn, reference in zip(batch.augmentation, expected, strict=True):
                assert torch.equal(drawn.values, reference.values)


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    case = problem(gradient_matching(batch_syn=3), formation=Formation(2))
    first = case.draw(step=1)
    torch.manual_seed(5)
    assert same_draws(first, case.draw(step=1))
    assert same_draws(first, problem(gradient_matching(batch_syn=3), formation=Formation(2)).draw(step=1))
    for other in (case.draw(step=2), case.draw(step=1, seed=8)):
        for one, two in zip(first.classes, other.classes, strict=True):
            assert not torch.equal(one.real, two.real)
            assert not torch.equal(one.augmentation[0].values, two.augmentation[0].values)
        assert any(not torch.equal(a.rows, b.rows) for a, b in zip(first.classes, other.classes, strict=True))
    brightness = {float(batch.augmentation[0].values[0, 0]) for batch in first.classes}
    assert len(brightness) == CLASSES  # each class has its own


def test_representative_sampling_uses_the_features_of_the_reference() -> None:
    case = problem(bidirectional(sampling="representative", augmentation="none", interval=2))
    other = problem(bidirectional(sampling="representative", augmentation="none", interval=2))
    other.theta = other.theta.flip(0)

    def rows(taken: Problem, step: int) -> list[list[int]]:
        return [find(taken.real, batch.real) for batch in taken.draw(step).classes]

    expected = class_representatives(
        case.real,
        BATCH,
        lambda images: case.network.features(case.theta, images),
        StepContext(7, 4).generator("representatives"),
    )
    at_4 = rows(case, 4)
    assert at_4 == [chosen.tolist() for chosen in expected]
    assert rows(other, 4) != at_4
    assert_equals_the_loop(case)
    assert rows(case, 5) == at_4
    assert rows(case, 6) != at_4


def test_nothing_is_touched() -> None:
    case = problem(bidirectional(sampling="representative"), formation=Formation(2), pixels=True, soft=True)
    tensors = [case.synthetic.images, case.synthetic.targets, case.theta, case.real.images, case.real.labels]
    before, state = [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()
    draw = case.draw()
    kept = [draw.images.clone(), *(batch.real.clone() for batch in draw.classes)]
    for with_gradient in (True, False):
        scored = case.score(draw, with_gradient)
        assert all(tensor.grad is None for tensor in tensors)
        images_gradient = torch.autograd.grad(case.objective.loss(case.given, scored), case.synthetic.images)[0]
        assert float(images_gradient.norm()) > 0
    assert all(tensor.grad is None for tensor in tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip([draw.images, *(b.real for b in draw.classes)], kept, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not case.theta.requires_grad
    assert not draw.images.requires_grad


@pytest.mark.parametrize(("augmentation", "policy"), AUGMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_nothing_is_lost_when_the_synthetic_images_are_the_real_ones(
    metric: Metric, augmentation: str, policy: str
) -> None:
    objective = bidirectional(metric=metric, augmentation=augmentation, policy=policy)
    # With batch norm; instance norm is rounded otherwise where a graph is made.
    case = problem(objective, "ConvNet-2-W4-BN")
    case.objective = bidirectional(metric=metric, augmentation="none")
    own = torch.cat([batch.real for batch in case.draw().classes])
    case.objective = objective
    case.synthetic = SyntheticSet(own, class_labels(CLASSES, BATCH), 0.01)
    draw = case.draw()
    for batch in draw.classes:  # the draw is shared by all images: real ones first, synthetic ones after
        assert all(len(drawn.values) == 1 for drawn in batch.augmentation)
        augmented = augment_in_turn(draw.images[batch.rows], batch.augmentation)
        assert torch.equal(augmented, batch.real)
        assert not torch.equal(augmented, draw.images[batch.rows])
    loss, gradient = case.loss_and_gradient(draw)
    if metric != "cos":
        assert float(loss) == 0
        assert float(gradient.abs().max()) == 0
        return
    # 1 - n^2 / (n^2 + eps) for each row of norm n
    expected = 0.0
    for batch in draw.classes:
        with torch.no_grad():
            statistics = objective.statistics(case.network, case.theta, batch.real, batch.real_targets)
        for layer in statistics:
            squares = (layer.flatten(1) if layer.ndim > 1 else layer[None]).square().sum(1)
            expected += float((1e-6 / (squares + 1e-6)).sum().detach())
    assert float(loss) == pytest.approx(expected, rel=1e-9)
    assert expected < 0.1


# Bad input


def without_classifier(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 2, 3), nn.Flatten(), nn.Linear(2 * (image_size[0] - 2) * (image_size[1] - 2), num_classes)
    )


def late_norm(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Build a network that normalizes one value per channel and image."""
    del image_size
    layers = {"conv": nn.Conv2d(channels, 2, 3), "pool": nn.AdaptiveAvgPool2d(1), "norm": nn.BatchNorm2d(2)}
    return nn.Sequential(OrderedDict(layers | {"flat": nn.Flatten(), "classifier": nn.Linear(2, num_classes)}))


def perceptron(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size[0] * image_size[1], num_classes))


def refusal(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("sampling", ["shuffled", "representative"])
def test_a_small_class_limits_only_itself(sampling: Sampling) -> None:
    case = problem(bidirectional(batch_real=BATCH, sampling=sampling))
    case.real = real_set((BATCH + 3, 1, BATCH - 1))
    case.objective.check(case.network, case.real)
    draw = case.draw(step=3)
    assert [len(batch.real) for batch in draw.classes] == [BATCH, 1, BATCH - 1]
    assert_equals_the_loop(case, draw)


def test_a_batch_beyond_all_classes_is_estimated_and_compiled_as_the_largest() -> None:
    network = FunctionalNetwork("ConvNet-1-W4", SHAPE, CLASSES)
    estimates = []
    for batch_real in (14, 15, 1000):
        objective = gradient_matching(batch_real=batch_real)
        objective.check(network, real_set((14, 11, 12)))
        estimates.append(objective.plan_memory(Workload(network, 6), Execution()).total)
    assert len(set(estimates)) == 1


def test_one_image_of_a_class_is_refused_where_batch_norm_has_one_value_per_channel() -> None:
    network = FunctionalNetwork(late_norm, SHAPE, CLASSES)
    for objective in (gradient_matching(batch_real=4), bidirectional(batch_real=4)):
        with pytest.raises(InputError, match=r"a class has 1 real image, but batch norm in .*late_norm'") as raised:
            objective.check(network, real_set((14, 1, 12)))
        refusal(raised)
        objective.check(network, real_set())
        with pytest.raises(InputError, match=r"a class has 1 synthetic image, .*; raise ipc") as raised:
            objective.plan_memory(Workload(network, CLASSES), Execution())
        refusal(raised)
        objective.plan_memory(Workload(network, 2 * CLASSES), Execution())


def test_networks_that_do_not_fit() -> None:
    real = real_set()
    network = FunctionalNetwork(without_classifier, SHAPE, CLASSES)
    gradient_matching().check(network, real)
    with pytest.raises(InputError, match="has no features: name its last layer 'classifier'") as raised:
        bidirectional().check(network, real)
    assert "without_classifier" in refusal(raised)
    network = FunctionalNetwork(perceptron, SHAPE, CLASSES)
    gradient_matching(include_classifier=True).check(network, real)
    with pytest.raises(InputError, match="none of the network's 2 parameters is a convolution") as raised:
        gradient_matching().check(network, real)
    assert "set include_classifier: true" in refusal(raised)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_syn": 0}, "batch_syn is 0; it must be at least 1"),
        ({"batch_real": 0}, "batch_real is 0; it must be at least 1"),
        ({"augmentation": "blur"}, "blur"),
        ({"sampling": "representative", "interval": 0}, "interval is 0; .* at least 1"),
        ({"sampling": "representative", "per_cluster": 2}, "per_cluster is 2; it must divide .*, 5"),
        ({"sampling": "representative", "per_cluster": 0}, "per_cluster is 0"),
        ({"alpha": -0.5}, "alpha is -0.5; it must be at least 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        bidirectional(**options)
    refusal(raised)


# In a run


def distilled(folder: Path, **options: Any) -> tuple[Tensor, dict[str, Any]]:  # noqa: ANN401
    """Run four steps; return the images and their optimizer's group."""
    module = small.module(
        folder,
        objective=gradient_matching(batch_real=8),
        pool=NetworkPool(recipe=NetworkRecipe(batch_size=32, images_per_update=32)),
        ipc=2,
        **options,
    )
    runner = small.fit(folder, module, steps=4)
    (group,) = runner.optimizers[0].param_groups
    assert group["params"][0] is module.synthetic_set.images
    return small.learned(module)[0], group


def test_a_run_with_the_learning_rate_of_steps_per_class(tmp_path: Path) -> None:
    images, group = distilled(tmp_path, image_lr=0.1, momentum=0.6, image_steps="per_class")
    lr, momentum = step_per_iteration(0.1, 0.6, small.CLASSES)
    assert (group["lr"], group["momentum"]) == (lr, momentum)
    assert lr == pytest.approx(0.1 * (1 + 0.6 + 0.36), rel=1e-14)
    assert momentum == pytest.approx(0.216, rel=1e-14)
    joint, group = distilled(tmp_path, image_lr=lr, momentum=momentum)
    assert (group["lr"], group["momentum"]) == (lr, momentum)
    assert torch.equal(images, joint)
    assert not torch.equal(images, distilled(tmp_path, image_lr=0.1, momentum=0.6)[0])
