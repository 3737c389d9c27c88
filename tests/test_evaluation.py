"""Evaluation against a slow loop of ordinary modules and optimisers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dd_lightning import evaluation
from dd_lightning.evaluation import EvaluationRecipe, EvaluationResult, evaluate_synthetic_set, train_fresh_networks
from dd_lightning.functional.augment import DSA, augment
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork, build_network
from dd_lightning.real import RealSet
from tests import small

NAME = "ConvNet-2-W4-SIGMOID"  # smooth: rounding does not flip a unit
RATE, SEED, COUNT = 0.05, 4, 3


@pytest.fixture(scope="module")
def network() -> FunctionalNetwork:
    return FunctionalNetwork(NAME, small.SHAPE, small.CLASSES)


def synthetic(soft: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(9, *small.SHAPE, generator=generator, dtype=dtype)
    labels = torch.arange(9) % small.CLASSES
    logits = 3 * F.one_hot(labels).to(dtype) + torch.randn(9, small.CLASSES, generator=generator, dtype=dtype)
    return images, logits if soft else labels


def slow_reference(images: Tensor, targets: Tensor, lr: float, recipe: EvaluationRecipe, number: int) -> nn.Module:
    """One network, by torch.optim.SGD on a module, from the protocol's description."""
    initial_seed = step_generator(SEED, number, "evaluation/initial").initial_seed()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(initial_seed)
        network = build_network(NAME, small.SHAPE[0], small.CLASSES, small.SHAPE[1:]).to(images.dtype)
    order = step_generator(SEED, number, "evaluation/order")
    draws = step_generator(SEED, number, "evaluation/augment")

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
            batch = augment(images[rows], DSA(recipe.augmentation).draw(draws, len(rows), small.SHAPE[1:]))
            target = targets[rows].softmax(1) if targets.is_floating_point() else targets[rows]
            sgd.zero_grad()
            F.cross_entropy(network(batch), target).backward()
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
    ],
    ids=["protocol", "short batches", "kept momentum", "plain"],
)
def test_equals_a_slow_loop(network: FunctionalNetwork, changes: dict[str, Any], soft: bool) -> None:
    recipe = EvaluationRecipe(**({"epochs": 8} | changes))
    images, targets = synthetic(soft)
    thetas = train_fresh_networks(images, targets, RATE, network, recipe, COUNT, SEED)
    assert thetas.dtype == torch.float64
    held_out = RealSet(small.data().test.images.double(), small.data().test.labels, small.CLASSES)
    accuracies = evaluation.test_accuracies(thetas, network, held_out)
    for number, theta in enumerate(thetas):
        module = slow_reference(images, targets, RATE, recipe, number)
        torch.testing.assert_close(theta, network.flatten(module), rtol=1e-9, atol=1e-11)
        right = (module(held_out.images).argmax(1) == held_out.labels).double().mean()
        assert accuracies[number] == pytest.approx(float(right), abs=1e-7)


def test_momentum_reset_and_milestones_matter(network: FunctionalNetwork) -> None:
    images, targets = synthetic(soft=False)
    variants = [
        EvaluationRecipe(epochs=8),
        EvaluationRecipe(epochs=8, reset_momentum=False),
        EvaluationRecipe(epochs=8, milestones=()),
        EvaluationRecipe(epochs=8, milestones=(0.25,)),
    ]
    results = [train_fresh_networks(images, targets, RATE, network, recipe, 1, SEED) for recipe in variants]
    assert all(not torch.allclose(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_batched_is_one_by_one(network: FunctionalNetwork, monkeypatch: pytest.MonkeyPatch, soft: bool) -> None:
    images, targets = synthetic(soft)
    found = []
    for pays in (True, False):
        monkeypatch.setattr(evaluation, "ensemble_pays", lambda *_, pays=pays: pays)
        found.append(train_fresh_networks(images, targets, RATE, network, EvaluationRecipe(epochs=10), COUNT, SEED))
    assert not torch.equal(*found)  # they are computed in different orders
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


def test_a_network_does_not_depend_on_how_many_there_are(network: FunctionalNetwork) -> None:
    images, targets = synthetic(soft=False)
    recipe = EvaluationRecipe(epochs=5)
    three = train_fresh_networks(images, targets, RATE, network, recipe, 3, SEED)
    one = train_fresh_networks(images, targets, RATE, network, recipe, 1, SEED)
    torch.testing.assert_close(three[:1], one, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(three[0], three[1])


def test_inputs_and_global_random_state_stay(network: FunctionalNetwork) -> None:
    images, targets = synthetic(soft=True, dtype=torch.float32)
    images.requires_grad_()
    held_out = small.data().test
    before = [t.detach().clone() for t in (images, targets, held_out.images, held_out.labels)]
    state = torch.get_rng_state()
    epochs: list[int] = []
    evaluate_synthetic_set(images, targets, RATE, held_out, network, EvaluationRecipe(epochs=3), 2, 0, epochs.append)
    assert torch.equal(torch.get_rng_state(), state)
    after = (images, targets, held_out.images, held_out.labels)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert images.grad is None
    assert epochs == [1, 2, 3]


def test_given_the_seed_it_is_deterministic(network: FunctionalNetwork) -> None:
    images, targets = synthetic(soft=False, dtype=torch.float32)
    recipe = EvaluationRecipe(epochs=4)
    first, second, third = (
        train_fresh_networks(images, targets, RATE, network, recipe, 2, seed) for seed in (SEED, SEED, SEED + 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_fresh_networks_share_no_storage(store: Path, tmp_path: Path) -> None:
    distilled = small.module(store)
    small.fit(tmp_path, distilled, steps=1)
    set_ = distilled.synthetic_set
    thetas = train_fresh_networks(
        set_.images, set_.targets, RATE, distilled.network, EvaluationRecipe(epochs=1), 2, SEED
    )
    pointers = {t.untyped_storage().data_ptr() for t in (set_.images, set_.targets, distilled.real.images)}
    pointers |= {p.untyped_storage().data_ptr() for p in distilled.network._template.parameters()}
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
    whole = evaluation.test_accuracies(thetas, network, held_out)
    by_hand = [float((network(t, held_out.images).argmax(1) == held_out.labels).float().mean()) for t in thetas]
    assert list(whole) == pytest.approx(by_hand)
    monkeypatch.setattr(evaluation, "TEST_BATCH", 7)
    assert evaluation.test_accuracies(thetas, network, held_out) == whole


def test_mean_and_population_deviation() -> None:
    result = EvaluationResult((0.5, 0.7), 1.0)
    assert result.mean == pytest.approx(0.6)
    assert result.std == pytest.approx(0.1)
