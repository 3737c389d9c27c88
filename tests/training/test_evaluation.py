"""Evaluation against a slow loop of ordinary modules and optimizers."""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.augment import DSA, augment
from dd_lightning.functional.cutmix import draw_cutmix
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork, build_network
from dd_lightning.sets.real import RealSet
from dd_lightning.training import evaluation, parallel_networks
from dd_lightning.training.evaluation import (
    RECIPES,
    EvaluationRecipe,
    EvaluationResult,
    evaluate_synthetic_set,
    get_recipe,
    train_fresh_networks,
)
from dd_lightning.training.parallel_networks import ParallelTraining, Passes, images_per_pass
from tests import small

NAME = "ConvNet-2-W4-SIGMOID"  # smooth: rounding does not flip a unit
RATE, SEED, COUNT = 0.05, 4, 3
IDC = {field.name: getattr(RECIPES["idc"], field.name) for field in fields(EvaluationRecipe)} | {"epochs": 8}


@pytest.fixture(scope="module")
def network() -> FunctionalNetwork:
    return FunctionalNetwork(NAME, small.SHAPE, small.CLASSES)


def synthetic(soft: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(9, *small.SHAPE, generator=generator, dtype=dtype)
    labels = torch.arange(9) % small.CLASSES
    logits = 3 * F.one_hot(labels).to(dtype) + torch.randn(9, small.CLASSES, generator=generator, dtype=dtype)
    return images, logits if soft else labels


def trained(*arguments: Any) -> Tensor:  # noqa: ANN401
    """Return the parameters of fresh networks, [K, P]."""
    return torch.stack(train_fresh_networks(*arguments).thetas)


def slow_augment(images: Tensor, recipe: EvaluationRecipe, generator: torch.Generator) -> Tensor:
    if recipe.policy == "dsa":
        return augment(images, DSA(recipe.augmentation).draw(generator, len(images), small.SHAPE[1:]))
    named = recipe.augmentation.split("_")
    geometric = [name for name in named if name in ("crop", "scale", "rotate")]
    which = geometric[int(torch.randint(len(geometric), (1,), generator=generator))]
    for operation in ("flip", "color", which, "cutout"):
        if operation in named:
            images = augment(images, DSA().draw_operation(operation, generator, len(images), small.SHAPE[1:]))
    return images


def slow_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets.softmax(1) if targets.is_floating_point() else targets)


def slow_cutmix_loss(
    network: nn.Module, images: Tensor, targets: Tensor, probability: float, generator: torch.Generator
) -> Tensor:
    mix = draw_cutmix(generator, len(images), small.SHAPE[1:], probability)
    if mix is None:
        return slow_loss(network(images), targets)
    top, bottom, left, right = mix.box
    mixed = images.clone()
    for i, partner in enumerate(mix.permutation.tolist()):
        mixed[i, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    area = (bottom - top) * (right - left) / (small.SHAPE[1] * small.SHAPE[2])
    logits = network(mixed)
    own, others = (slow_loss(logits, t) for t in (targets, targets[mix.permutation]))
    return (1 - area) * own + area * others


def slow_reference(
    images: Tensor, targets: Tensor, lr: float, recipe: EvaluationRecipe, number: int, name: str = NAME
) -> nn.Module:
    """One network, by torch.optim.SGD on a module, from the protocol's description."""
    initial_seed = step_generator(SEED, number, "evaluation/initial").initial_seed()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(initial_seed)
        network = build_network(name, small.SHAPE[0], small.CLASSES, small.SHAPE[1:]).to(images.dtype)
    order = step_generator(SEED, number, "evaluation/order")
    draws = step_generator(SEED, number, "evaluation/augment")
    mixes = step_generator(SEED, number, "evaluation/cutmix")

    def optimizer() -> torch.optim.SGD:
        return torch.optim.SGD(network.parameters(), lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)

    sgd = optimizer()
    for epoch in range(recipe.epochs):
        if epoch in [int(fraction * recipe.epochs) for fraction in recipe.milestones]:
            lr = lr * recipe.gamma
            if recipe.reset_momentum:
                sgd = optimizer()
            else:
                for group in sgd.param_groups:
                    group["lr"] = lr
        permutation = torch.randperm(len(images), generator=order)
        for start in range(0, len(images), recipe.batch_size):
            rows = permutation[start : start + recipe.batch_size]
            batch = slow_augment(images[rows], recipe, draws)
            sgd.zero_grad()
            slow_cutmix_loss(network, batch, targets[rows], recipe.cutmix, mixes).backward()
            sgd.step()
    return network


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 4, "milestones": (0.25, 0.75), "gamma": 0.3},
        {"reset_momentum": False, "weight_decay": 0.1},
        {"augmentation": "none", "momentum": 0.0},
        IDC,
        IDC | {"batch_size": 4, "cutmix": 1.0, "augmentation": "color_crop_cutout"},
        {"cutmix": 0.5},
        {"policy": "idc"},
    ],
    ids=["protocol", "short batches", "kept momentum", "plain", "idc", "idc in matching", "cutmix", "policy"],
)
def test_equals_a_slow_loop(network: FunctionalNetwork, changes: dict[str, Any], soft: bool) -> None:
    recipe = EvaluationRecipe(**({"epochs": 8} | changes))
    images, targets = synthetic(soft)
    thetas = trained(images, targets, RATE, network, recipe, COUNT, SEED)
    assert thetas.dtype == torch.float64
    held_out = RealSet(small.data().test.images.double(), small.data().test.labels, small.CLASSES)
    accuracies = evaluation.accuracies_of(thetas, network, held_out)
    for number, theta in enumerate(thetas):
        module = slow_reference(images, targets, RATE, recipe, number)
        torch.testing.assert_close(theta, network.flatten(module), rtol=1e-9, atol=1e-11)
        right = (module(held_out.images).argmax(1) == held_out.labels).double().mean()
        assert accuracies[number] == pytest.approx(float(right), abs=1e-7)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_mtt_equals_a_plain_loop_bit_for_bit(
    network: FunctionalNetwork, monkeypatch: pytest.MonkeyPatch, soft: bool
) -> None:
    """What other recipes need costs this one nothing: its draws, its labels and its sums are what they always were."""
    monkeypatch.setattr(evaluation, "batching_pays", lambda *_: False)
    images, targets = synthetic(soft, dtype=torch.float32)
    recipe = get_recipe("mtt", epochs=20)
    found = trained(images, targets, RATE, network, recipe, COUNT, SEED)
    seeds = [step_generator(SEED, k, "evaluation/initial").initial_seed() for k in range(COUNT)]
    thetas = [network.initial(seed) for seed in seeds]
    orders, draws = (
        [step_generator(SEED, k, f"evaluation/{stream}") for k in range(COUNT)] for stream in ("order", "augment")
    )
    for rate, epochs in ((RATE, 10), (0.1 * RATE, 10)):
        sgd = torch.optim.SGD(thetas, rate, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            for theta, order, draw in zip(thetas, orders, draws, strict=True):
                rows = torch.randperm(9, generator=order)
                batch = augment(images[rows], DSA().draw(draw, 9, small.SHAPE[1:]))
                point = theta.detach().requires_grad_()
                label = targets[rows].softmax(1) if soft else targets[rows]
                (theta.grad,) = torch.autograd.grad(F.cross_entropy(network(point, batch), label), point)
            sgd.step()
    assert torch.equal(found, torch.stack(thetas))


def test_idc_protocol_at_its_full_length() -> None:
    recipe = RECIPES["idc"]
    assert [int(fraction * recipe.epochs) for fraction in recipe.milestones] == [666, 833]
    assert recipe.validation_epochs == (250, 500, 750, 1000)
    for epochs in range(1, 3000):  # the reference's integers, whatever the rounding of the fractions
        milestones = [int(fraction * epochs) for fraction in recipe.milestones]
        assert milestones == [2 * epochs // 3, 5 * epochs // 6]


@pytest.mark.parametrize("epochs", [3, 4, 9])
def test_idc_learning_rates_are_those_of_torchs_schedule(
    network: FunctionalNetwork, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    images, targets = synthetic(soft=False)
    recipe, step, rates = get_recipe("idc", epochs), torch.optim.SGD.step, []

    def recorded(self: torch.optim.SGD, *args: Any) -> Any:  # noqa: ANN401
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    train_fresh_networks(images, targets, 0.01, network, recipe, 1, SEED)
    monkeypatch.undo()
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.01)
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [2 * epochs // 3, 5 * epochs // 6], gamma=0.2)
    expected = []
    for _ in range(epochs):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("epochs", "validations", "expected"),
    [(8, 1, (8,)), (8, 4, (2, 4, 6, 8)), (10, 4, (3, 5, 8, 10)), (2, 4, (1, 2)), (1, 4, (1,)), (5, 5, (1, 2, 3, 4, 5))],
)
def test_validations_are_at_even_distances(
    network: FunctionalNetwork, epochs: int, validations: int, expected: tuple[int, ...]
) -> None:
    recipe = EvaluationRecipe(epochs=epochs, validations=validations)
    assert recipe.validation_epochs == expected
    images, targets = synthetic(soft=False, dtype=torch.float32)
    done: list[int] = []
    tested: list[tuple[int, torch.Size]] = []

    def on_validation(training: ParallelTraining) -> None:
        tested.append((len(done) + 1, torch.stack(training.thetas).shape))

    train_fresh_networks(images, targets, RATE, network, recipe, 2, SEED, done.append, on_validation)
    assert tested == [(epoch, (2, network.num_parameters)) for epoch in expected]


def test_each_validation_is_a_shorter_training(network: FunctionalNetwork) -> None:
    images, targets = synthetic(soft=False, dtype=torch.float32)
    held_out, recipe = small.data().test, replace(get_recipe("idc", epochs=12), milestones=())
    result = evaluate_synthetic_set(images, targets, RATE, held_out, network, recipe, COUNT, SEED)
    assert len(result.validations) == 4
    for epochs, accuracies in zip((3, 6, 9, 12), result.validations, strict=True):
        shorter = replace(recipe, epochs=epochs, validations=1)
        alone = evaluate_synthetic_set(images, targets, RATE, held_out, network, shorter, COUNT, SEED)
        assert accuracies == alone.accuracies == alone.best_accuracies
    assert result.accuracies == result.validations[-1]
    assert result.best_accuracies == tuple(max(v[k] for v in result.validations) for k in range(COUNT))


def test_best_of_validations_is_each_networks_own() -> None:
    result = EvaluationResult((0.3, 0.5), 1.0, ((0.2, 0.6), (0.4, 0.1), (0.3, 0.5)))
    assert result.best_accuracies == (0.4, 0.6)
    assert result.mean == pytest.approx(0.4)
    assert EvaluationResult((0.3, 0.5), 1.0).best_accuracies == (0.3, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cutmix": 1.5}, r"recipe\.cutmix is 1\.5; it must be at least 0 and at most 1"),
        ({"cutmix": float("nan")}, "cutmix is nan"),
        ({"validations": 0}, "validations is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"policy": "best"}, "policy is 'best'; use one of dsa, idc"),
        ({"augmentation": "blur"}, "names 'blur', which is none of"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        EvaluationRecipe(**changes)
    assert "\n" not in str(caught.value)


def test_momentum_reset_and_milestones_matter(network: FunctionalNetwork) -> None:
    images, targets = synthetic(soft=False)
    variants = [
        EvaluationRecipe(epochs=8),
        EvaluationRecipe(epochs=8, reset_momentum=False),
        EvaluationRecipe(epochs=8, milestones=()),
        EvaluationRecipe(epochs=8, milestones=(0.25,)),
    ]
    results = [trained(images, targets, RATE, network, recipe, 1, SEED) for recipe in variants]
    assert all(not torch.allclose(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("recipe", ["mtt", "idc"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_batched_is_one_by_one(
    network: FunctionalNetwork, monkeypatch: pytest.MonkeyPatch, soft: bool, recipe: str
) -> None:
    images, targets = synthetic(soft)
    found = []
    for pays in (True, False):
        monkeypatch.setattr(evaluation, "batching_pays", lambda *_, pays=pays: pays)
        found.append(trained(images, targets, RATE, network, get_recipe(recipe, 10), COUNT, SEED))
    assert not torch.equal(*found)  # they are computed in different orders
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["mtt", "idc"])
def test_a_network_does_not_depend_on_how_many_there_are(network: FunctionalNetwork, name: str) -> None:
    images, targets = synthetic(soft=False)
    recipe = get_recipe(name, epochs=5)
    three = trained(images, targets, RATE, network, recipe, 3, SEED)
    one = trained(images, targets, RATE, network, recipe, 1, SEED)
    torch.testing.assert_close(three[:1], one, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(three[0], three[1])


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", ["mtt", "idc"])
def test_each_network_may_have_a_set_of_its_own(
    network: FunctionalNetwork, monkeypatch: pytest.MonkeyPatch, name: str, soft: bool
) -> None:
    monkeypatch.setattr(evaluation, "batching_pays", lambda *_: False)
    images, targets = synthetic(soft)
    sets = torch.stack([images, images.flip(2), -images]), torch.stack([targets, targets.roll(1, 0), targets])
    recipe = get_recipe(name, epochs=4)
    together = trained(*sets, RATE, network, recipe, 3, SEED)
    for number in range(3):
        alone = train_fresh_networks(
            sets[0][number], sets[1][number], RATE, network, recipe, 1, SEED, first=number
        ).thetas
        assert torch.equal(together[number], alone[0])
    assert torch.equal(together[0], trained(images, targets, RATE, network, recipe, 1, SEED)[0])


@pytest.mark.parametrize("name", ["mtt", "idc"])
def test_inputs_and_global_random_state_stay(network: FunctionalNetwork, name: str) -> None:
    images, targets = synthetic(soft=True, dtype=torch.float32)
    images.requires_grad_()
    held_out = small.data().test
    before = [t.detach().clone() for t in (images, targets, held_out.images, held_out.labels)]
    state = torch.get_rng_state()
    epochs: list[int] = []
    evaluate_synthetic_set(images, targets, RATE, held_out, network, get_recipe(name, 3), 2, 0, epochs.append)
    assert torch.equal(torch.get_rng_state(), state)
    after = (images, targets, held_out.images, held_out.labels)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert images.grad is None
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize("name", ["mtt", "idc"])
def test_given_the_seed_it_is_deterministic(network: FunctionalNetwork, name: str) -> None:
    images, targets = synthetic(soft=False, dtype=torch.float32)
    recipe = get_recipe(name, epochs=4)
    first, second, third = (trained(images, targets, RATE, network, recipe, 2, seed) for seed in (SEED, SEED, SEED + 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_fresh_networks_share_no_storage(store: Path, tmp_path: Path) -> None:
    distilled = small.module(store)
    small.fit(tmp_path, distilled, steps=1)
    set_ = distilled.synthetic_set
    thetas = trained(set_.images, set_.targets, RATE, distilled.problem.network, EvaluationRecipe(epochs=1), 2, SEED)
    pointers = {t.untyped_storage().data_ptr() for t in (set_.images, set_.targets, distilled.problem.real.images)}
    pointers |= {p.untyped_storage().data_ptr() for p in distilled.problem.network._template.parameters()}
    assert thetas.untyped_storage().data_ptr() not in pointers
    assert not thetas.requires_grad


def test_the_recipes_own_rate_goes_first(network: FunctionalNetwork) -> None:
    images, targets = synthetic(soft=False, dtype=torch.float32)
    held_out = small.data().test
    own = evaluate_synthetic_set(images, targets, -1.0, held_out, network, EvaluationRecipe(epochs=3, lr=RATE), 2)
    learned = evaluate_synthetic_set(images, targets, RATE, held_out, network, EvaluationRecipe(epochs=3), 2)
    assert own.accuracies == learned.accuracies


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_refused(network: FunctionalNetwork, rate: float) -> None:
    images, targets = synthetic(soft=False, dtype=torch.float32)
    with pytest.raises(InputError, match=r"learning rate is (0|-0.1|nan|inf), but SGD needs a positive one"):
        evaluate_synthetic_set(images, targets, rate, small.data().test, network)


def test_accuracy_in_several_batches(network: FunctionalNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    thetas = torch.stack([network.initial(seed) for seed in range(2)])
    held_out = small.data().test
    whole = evaluation.accuracies_of(thetas, network, held_out)
    by_hand = [float((network(t, held_out.images).argmax(1) == held_out.labels).float().mean()) for t in thetas]
    assert list(whole) == pytest.approx(by_hand)
    monkeypatch.setattr(evaluation, "TEST_BATCH", 7)
    assert evaluation.accuracies_of(thetas, network, held_out) == whole


@pytest.mark.parametrize(("name", "sizes"), [(NAME, [16, 16, 16, 12]), (f"{NAME}-BN", [16, 16, 16, 12])])
def test_images_of_a_test_pass_fit_the_cache(monkeypatch: pytest.MonkeyPatch, name: str, sizes: list[int]) -> None:
    tested = FunctionalNetwork(name, small.SHAPE, small.CLASSES)
    thetas, statistics, held_out = tested.initial(0)[None], tested.initial_statistics()[None], small.data().test
    expected = evaluation.accuracies_of(thetas, tested, held_out, statistics)
    limited, seen, logits = partial(images_per_pass, limit=2**16), list[int](), Passes.logits

    def watched(self: Passes, thetas: Tensor, images: Tensor, statistics: Tensor | None = None) -> Tensor:
        seen.append(len(images))
        return logits(self, thetas, images, statistics)

    monkeypatch.setattr(evaluation, "images_per_pass", limited)
    monkeypatch.setattr(Passes, "logits", watched)
    assert evaluation.accuracies_of(thetas, tested, held_out, statistics) == expected
    assert seen[-len(sizes) :] == sizes
    assert sum(seen) < sum(sizes) + 10  # the others find out how many


def test_mean_and_population_deviation() -> None:
    result = EvaluationResult((0.5, 0.7), 1.0)
    assert result.mean == pytest.approx(0.6)
    assert result.std == pytest.approx(0.1)


SMOOTH_BATCH_NORM = "ConvNet-2-W4-SIGMOID-BN"


@pytest.mark.parametrize("how", ["serial", "vectorized", "compiled"])
@pytest.mark.parametrize("recipe", ["mtt", "idc"])
def test_batch_norm_is_trained_and_tested_as_an_ordinary_module(
    monkeypatch: pytest.MonkeyPatch, how: str, recipe: str
) -> None:
    tested = FunctionalNetwork(SMOOTH_BATCH_NORM, small.SHAPE, small.CLASSES)
    assert tested.vmappable
    images, targets = synthetic(soft=False)
    protocol = replace(get_recipe(recipe, epochs=12), batch_size=4, milestones=())  # batches of 4, 4 and 1
    passes = Passes(tested, vectorized=how == "vectorized", running_statistics=True)
    if how == "compiled":
        monkeypatch.setattr(parallel_networks, "BACKEND", "aot_eager")
        labels = protocol.targets(targets, small.CLASSES, images.dtype)
        passes.compile("on", 1, (images, labels), 4, [COUNT], "a test")
    training = train_fresh_networks(
        images, targets, RATE, tested, protocol, COUNT, SEED, lambda _: None, lambda _: None, passes
    )
    held_out = RealSet(small.data().test.images.double(), small.data().test.labels, small.CLASSES)
    accuracies = evaluation.accuracies_of(training.thetas, tested, held_out, training.statistics)
    logits = passes.logits(training.thetas, held_out.images, training.statistics)
    for number in range(COUNT):
        module = slow_reference(images, targets, RATE, protocol, number, SMOOTH_BATCH_NORM).eval()
        statistics = [buffer for name, buffer in module.named_buffers() if "running" in name]
        assert len(statistics) == 4
        torch.testing.assert_close(training.statistics[number], torch.cat(statistics), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(training.thetas[number], tested.flatten(module), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(logits[number], module(held_out.images).detach(), rtol=1e-9, atol=1e-11)
        right = (module(held_out.images).argmax(1) == held_out.labels).double().mean()
        assert accuracies[number] == pytest.approx(float(right), abs=1e-7)


@pytest.mark.parametrize("name", ["ConvNet-3-W8-BN", "VGG-11-W8-BN", "torchvision/resnet18"])
def test_an_images_accuracy_does_not_depend_on_its_neighbors(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    data = small.data().test
    size = (3, 32, 32) if name != "ConvNet-3-W8-BN" else small.SHAPE
    pixels = torch.nn.functional.interpolate(data.images, size[1:]).expand(-1, size[0], -1, -1).contiguous()
    tested, images = FunctionalNetwork(name, size, small.CLASSES), pixels.double()
    training = train_fresh_networks(images[:12], data.labels[:12], RATE, tested, EvaluationRecipe(epochs=2), 2, SEED)
    assert training.statistics.shape == (2, tested.num_statistics)
    assert not torch.equal(training.statistics, tested.initial_statistics().double().repeat(2, 1))
    passes = Passes(tested)
    together = passes.logits(training.thetas, images[:8], training.statistics)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    permuted = passes.logits(training.thetas, images[order], training.statistics)
    torch.testing.assert_close(permuted, together[:, order], rtol=1e-9, atol=1e-9)
    alone = torch.cat([passes.logits(training.thetas, image[None], training.statistics) for image in images[:8]], 1)
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(
        passes.logits(training.thetas, images[:4]), passes.logits(training.thetas, images[:8])[:, :4]
    )


def test_a_batch_that_leaves_one_value_per_channel_is_refused() -> None:
    pools_all = FunctionalNetwork(lambda channels, classes, _: norm_of_one_value(channels, classes), small.SHAPE, 3)
    images, targets = synthetic(soft=False, dtype=torch.float32)
    message = (
        r"^recipe\.batch_size is 4, which leaves 1 of 9 images to the last batch, [^\n]* choose another batch_size$"
    )
    with pytest.raises(InputError, match=message):
        trained(images, targets, RATE, pools_all, EvaluationRecipe(epochs=1, batch_size=4), 1, SEED)
    trained(images, targets, RATE, pools_all, EvaluationRecipe(epochs=1, batch_size=3), 1, SEED)
    several = FunctionalNetwork(SMOOTH_BATCH_NORM, small.SHAPE, small.CLASSES)  # of 8 x 8 values, and of 4 x 4
    trained(images, targets, RATE, several, EvaluationRecipe(epochs=1, batch_size=4), 1, SEED)


def norm_of_one_value(channels: int, classes: int) -> nn.Module:
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4)]
    return nn.Sequential(*pooled, nn.Flatten(), nn.Linear(4, classes))
