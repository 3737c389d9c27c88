"""The pool of live networks: how they are trained, when they die, which of them move, and that nothing is lost."""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.cutmix import cutmix, draw_cutmix
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.policies import AugmentationPolicy, augment_in_turn
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.module import DistillationModule
from dd_lightning.networks import FunctionalNetwork, build_network
from dd_lightning.pools import NetworkPool, PoolSetup
from dd_lightning.pools.network_pool import NetworkRefresh
from dd_lightning.sets.real import RealSet
from dd_lightning.training import recipes
from dd_lightning.training.recipes import NetworkRecipe
from tests import small

SEED, COUNT, SIZE = 7, 90, (8, 8)
PLAIN = NetworkRecipe(lr=0.05, batch_size=16, images_per_update=40, cutmix=0.0)
QUICK = NetworkRecipe(batch_size=1, images_per_update=1, augmentation="none", cutmix=0.0)

Batches = Iterator[tuple[Tensor, torch.Generator]]
Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def real() -> RealSet:
    return small.data().train


def setup(images: RealSet | None = None, seed: int = SEED, **options: Any) -> PoolSetup:  # noqa: ANN401
    data = small.data()
    network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
    return PoolSetup(network, images or data.train, data.name, data.fingerprint, seed=seed, **options)


def prepared(pool: NetworkPool, images: RealSet | None = None, seed: int = SEED, size: int = 1) -> NetworkPool:
    """Bring a pool to its first generation."""
    pool.prepare(setup(images, seed, size=size))
    pool.draw(1, StepContext(seed, 0))
    return pool


def made(images: RealSet | None = None, seed: int = SEED, **options: Any) -> NetworkPool:  # noqa: ANN401
    return prepared(NetworkPool(**({"age_limit": None, "recipe": PLAIN} | options)), images, seed)


def refresh(pool: NetworkPool, winner: int = 0, drawn: Sequence[int] | None = None, seed: int = SEED) -> None:
    places = [winner] if drawn is None else drawn
    pool.update((winner,), [(place,) for place in places], StepContext(seed, 1))


def weights(pool: NetworkPool) -> list[Tensor]:
    return [pool.load((place,)).theta.clone() for place in range(len(pool))]


def first_weights(place: int, births: int = 0, seed: int = SEED) -> Tensor:
    """Return what torch initializes a network with, from the place's own stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_generator(seed, births, f"network-{place}/initial").initial_seed())
        return flat(build_network(small.NETWORK, 1, small.CLASSES, SIZE))


def flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def rebuilt(theta: Tensor) -> nn.Module:
    network = build_network(small.NETWORK, 1, small.CLASSES, SIZE).to(theta.dtype)
    nn.utils.vector_to_parameters(theta, network.parameters())
    return network


def running_batches(first: int, count: int, seed: int = SEED) -> Batches:
    """Return batches number first, first + 1, ... of 16 of one run through shuffled epochs of six."""
    for number in range(first, first + count):
        order = torch.randperm(COUNT, generator=step_generator(seed, number // 6, "pool/order"))
        yield order[16 * (number % 6) :][:16], step_generator(seed, number, "pool/augment")


def plain_loss(network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    draws = AugmentationPolicy("color_crop", "idc").draw(generator, len(images), SIZE)
    draw_cutmix(generator, len(images), SIZE, 0.0)
    return F.cross_entropy(network(augment_in_turn(images, draws)), labels)


def mixed_loss(network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return IDC's: the box of another image, and both images' losses by their shares."""
    draws = AugmentationPolicy("color_crop", "idc").draw(generator, len(images), SIZE)
    augmented = augment_in_turn(images, draws)
    mix = draw_cutmix(generator, len(images), SIZE, 1.0)
    assert mix is not None
    top, bottom, left, right = mix.box
    pasted = augmented.clone()
    for row, partner in enumerate(mix.permutation.tolist()):
        pasted[row, :, top:bottom, left:right] = augmented[partner, :, top:bottom, left:right]
    logits = network(pasted)
    ratio = 1 - (bottom - top) * (right - left) / 64
    return ratio * F.cross_entropy(logits, labels) + (1 - ratio) * F.cross_entropy(logits, labels[mix.permutation])


def slow_sgd(network: nn.Module, recipe: NetworkRecipe = PLAIN) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), recipe.lr, momentum=0.9, weight_decay=5e-4)


def train(network: nn.Module, sgd: torch.optim.SGD, batches: Batches, data: RealSet, loss: Loss = plain_loss) -> None:
    for rows, generator in batches:
        sgd.zero_grad()
        loss(network, data.images[rows], data.labels[rows], generator).backward()
        sgd.step()


def test_an_update_is_a_loop_of_modules_and_sgd_bit_for_bit() -> None:
    pool, data = made(), real()
    network = rebuilt(first_weights(0))
    sgd = slow_sgd(network)
    assert torch.equal(pool.load((0,)).theta, first_weights(0))
    for update in range(3):  # momentum goes on from one update to the next
        refresh(pool)
        train(network, sgd, running_batches(3 * update, 3), data)
        assert torch.equal(pool.load((0,)).theta, flat(network))
    forgetful = rebuilt(first_weights(0))
    for update in range(3):
        train(forgetful, slow_sgd(forgetful), running_batches(3 * update, 3), data)
    assert float((flat(forgetful) - flat(network)).norm() / flat(network).norm()) > 1e-3


def test_an_update_with_cutmix_is_the_losses_by_their_shares() -> None:
    # The pool has label logits in place of two losses, so equality is to rounding, here that of float64.
    data = real()
    data = RealSet(data.images.double(), data.labels, small.CLASSES)
    pool = made(data, recipe=NetworkRecipe(lr=0.05, batch_size=16, images_per_update=40, cutmix=1.0))
    state = pool.state_dict()
    pool.load_state_dict(state | {"thetas": [theta.double() for theta in state["thetas"]]})
    network = rebuilt(first_weights(0).double())
    sgd = slow_sgd(network)
    for update in range(2):
        refresh(pool)
        train(network, sgd, running_batches(3 * update, 3), data, mixed_loss)
    torch.testing.assert_close(pool.load((0,)).theta, flat(network), rtol=1e-12, atol=1e-13)


def test_half_of_the_batches_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = []

    def counted(*given: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        mixed.append(given)
        return cutmix(*given)

    monkeypatch.setattr(recipes, "cutmix", counted)
    pool = made(recipe=NetworkRecipe(batch_size=2, images_per_update=200, augmentation="none"))
    refresh(pool)
    drawn = [draw_cutmix(step_generator(SEED, b, "pool/augment"), 2, SIZE, 0.5) is not None for b in range(100)]
    assert len(mixed) == sum(drawn)
    assert 30 < sum(drawn) < 70


@pytest.mark.parametrize(("images", "steps"), [(1, 1), (16, 1), (17, 2), (32, 2), (40, 3), (2000, 125)])
def test_steps_of_an_update_are_rounded_up(images: int, steps: int) -> None:
    recipe = NetworkRecipe(batch_size=16, images_per_update=images, augmentation="none", cutmix=0.0)
    assert recipe.steps_per_update == steps
    pool = made(recipe=recipe)
    refresh(pool)
    assert pool.batches_drawn == steps


class Seen:
    """Which images went into which batch, told by their content."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[int]] = []
        rows = {tuple(image.flatten().tolist()): row for row, image in enumerate(real().images)}
        assert len(rows) == COUNT

        def note(images: Tensor, draws: Any) -> Tensor:  # noqa: ANN401
            self.batches.append([rows[tuple(image.flatten().tolist())] for image in images])
            return augment_in_turn(images, draws)

        monkeypatch.setattr(recipes, "augment_in_turn", note)

    def epochs(self) -> list[list[int]]:
        flattened = list(itertools.chain.from_iterable(self.batches))
        assert len(flattened) % COUNT == 0
        return [flattened[i : i + COUNT] for i in range(0, len(flattened), COUNT)]


def test_updates_go_on_through_one_epoch_after_another_whichever_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, seen = made(num_networks=3, refresh="candidates"), Seen(monkeypatch)
    for winner, drawn in ((0, [0, 2]), (1, [1]), (2, [2]), (0, [2, 0])):  # six updates of half an epoch
        refresh(pool, winner, drawn)
    assert [len(batch) for batch in seen.batches] == 3 * [16, 16, 16, 16, 16, 10]
    epochs = seen.epochs()
    assert [sorted(epoch) for epoch in epochs] == 3 * [list(range(COUNT))]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [seen.batches[b] for b in range(18)] == [rows.tolist() for rows, _ in running_batches(0, 18)]


def test_pretraining_passes_over_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    pool = made(num_networks=2, pretrain_epochs=1, age_limit=2)
    first, second = seen.epochs()
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second
    assert pool.batches_drawn == 0  # the updates' own epochs are untouched
    assert pool.scalars() == {"pool/mean_age": 0.0, "pool/reinitialized": 0.0}
    refresh(pool, 0)  # its limit is half of two
    assert sorted(seen.epochs()[2]) == list(range(COUNT))
    assert len(seen.epochs()) == 3
    assert pool.scalars() == {"pool/mean_age": 0.0, "pool/reinitialized": 1.0}
    assert pool.batches_drawn == 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_pretraining_is_a_loop_of_modules_and_sgd_whose_momentum_stays(epochs: int) -> None:
    pool, data = made(num_networks=2, pretrain_epochs=epochs), real()
    network = rebuilt(first_weights(1))
    sgd = slow_sgd(network)
    generator = step_generator(SEED, 0, "network-1/pretrain")
    for _ in range(epochs):
        rows = torch.randperm(COUNT, generator=generator).split(16)
        train(network, sgd, ((part, generator) for part in rows), data)
    assert torch.equal(pool.load((1,)).theta, flat(network))
    refresh(pool, 1)
    train(network, sgd, running_batches(0, 3), data)
    assert torch.equal(pool.load((1,)).theta, flat(network))


def test_a_network_is_used_age_limit_times() -> None:
    pool = made(age_limit=3)
    used, births = [], []
    for _ in range(8):
        used.append(pool.load((0,)).theta)
        births.append(pool.state_dict()["births"][0])
        refresh(pool)
    assert births == [0, 0, 0, 1, 1, 1, 2, 2]
    for step in (0, 3, 6):
        assert torch.equal(used[step], first_weights(0, step // 3))
    assert len({theta.sum().item() for theta in used}) == 8
    assert pool.batches_drawn == 3 * 6  # re-initialization takes the place of an update: after uses 3 and 6


def test_age_limit_one_is_a_fresh_network_at_every_use() -> None:
    pool = made(age_limit=1, refresh="all", num_networks=2)
    for births in range(3):
        assert all(torch.equal(theta, first_weights(i, births)) for i, theta in enumerate(weights(pool)))
        refresh(pool)
    assert pool.batches_drawn == 0


@pytest.mark.parametrize(
    ("size", "limit", "deaths"),
    [(10, 20, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]), (4, 3, [1, 2, 3, 3]), (1, 5, [5]), (3, None, [])],
)
def test_first_generation_is_staggered(size: int, limit: int | None, deaths: list[int]) -> None:
    pool = prepared(NetworkPool(age_limit=limit, refresh="all", recipe=QUICK), size=size)
    died: list[list[int]] = [[] for _ in range(size)]
    for update in range(1, 2 * (limit or 10) + 1):
        before = pool.state_dict()["births"]
        refresh(pool)
        for place, (old, new) in enumerate(zip(before, pool.state_dict()["births"], strict=True)):
            assert new - old in (0, 1)
            if new > old:
                died[place].append(update)
    if limit is None:
        assert died == [[], [], []]
        assert pool.scalars() == {"pool/mean_age": 20.0, "pool/reinitialized": 0.0}
        return
    assert [each[0] for each in died] == deaths
    for each, first in zip(died, deaths, strict=True):  # later generations live as long as they may
        assert each == list(range(first, 2 * limit + 1, limit))


@pytest.mark.parametrize(
    ("rule", "expected"), [("winner", {2}), ("candidates", {2, 0}), ("all", {0, 1, 2, 3}), ("none", set())]
)
def test_the_rule_says_who_moves(rule: NetworkRefresh, expected: set[int]) -> None:
    pool = made(num_networks=4, refresh=rule)
    before = weights(pool)
    refresh(pool, 2, [2, 0])
    moved = {place for place, theta in enumerate(weights(pool)) if not torch.equal(theta, before[place])}
    assert moved == expected
    state = pool.state_dict()
    assert state["ages"] == [int(place in expected) for place in range(4)]
    assert [momentum is not None for momentum in state["momenta"]] == [place in expected for place in range(4)]
    assert pool.scalars() == {"pool/mean_age": len(expected) / 4, "pool/reinitialized": 0.0}
    assert pool.batches_drawn == 3 * len(expected)


@pytest.mark.parametrize("pretrain_epochs", [0, 1])
def test_reborn_networks_depend_on_seed_place_and_births_alone(pretrain_epochs: int) -> None:
    one = made(num_networks=2, age_limit=2, pretrain_epochs=pretrain_epochs)
    refresh(one, 1)
    assert one.state_dict()["ages"] == [0, 1]
    for winner in (0, 1):
        refresh(one, winner)
    other = made(num_networks=2, age_limit=2, pretrain_epochs=pretrain_epochs, refresh="all")
    for _ in range(2):
        refresh(other, 0)
    assert (one.batches_drawn, other.batches_drawn) == (3, 6)  # they have not been trained alike
    assert one.state_dict()["births"] == [1, 1]
    assert other.state_dict()["births"] == [1, 1]
    assert torch.equal(one.load((1,)).theta, other.load((1,)).theta)
    born = [*weights(made(num_networks=2, pretrain_epochs=pretrain_epochs)), *weights(one)]
    born += weights(made(num_networks=2, pretrain_epochs=pretrain_epochs, seed=SEED + 1))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(born, 2))
    if pretrain_epochs == 0:
        assert torch.equal(one.load((1,)).theta, first_weights(1, 1))
        assert one.state_dict()["momenta"] == [None, None]


def test_momentum_is_gone_after_re_initialization() -> None:
    pool, data = made(age_limit=2), real()
    for _ in range(3):  # update, re-initialization, update
        refresh(pool)
    network = rebuilt(first_weights(0, 1))
    train(network, slow_sgd(network), running_batches(3, 3), data)
    assert torch.equal(pool.load((0,)).theta, flat(network))


def test_draws_are_distinct_uniform_and_those_of_the_stream() -> None:
    pool, steps = made(num_networks=5), 500
    counts = torch.zeros(5, dtype=torch.float64)
    for step in range(steps):
        keys = pool.draw(3, StepContext(SEED, step))
        order = torch.randperm(5, generator=step_generator(SEED, step, "candidates"))
        assert keys == [(int(place), 0) for place in order[:3]]
        assert len(set(keys)) == 3
        counts[keys[0][0]] += 1
    # the first of each draw: the 99.9 % quantile at 4 degrees of freedom
    assert float(((counts - steps / 5).square() / (steps / 5)).sum()) < 18.5
    assert pool.draw(1, StepContext(SEED, 3)) == pool.draw(3, StepContext(SEED, 3))[:1]
    assert len({tuple(pool.draw(5, StepContext(SEED, 3, rank=rank))) for rank in range(8)}) > 1


def test_what_a_step_was_handed_does_not_change() -> None:
    pool = made(age_limit=2, num_networks=1)
    for _ in range(3):  # update, re-initialization, update
        candidate = pool.load((0,))
        copy = candidate.theta.clone()
        refresh(pool)
        assert torch.equal(candidate.theta, copy)
        assert not torch.equal(pool.load((0,)).theta, copy)
        assert not pool.load((0,)).theta.requires_grad


def test_a_key_names_a_network_and_not_a_place() -> None:
    pool = made(num_networks=2, age_limit=4)
    key, other = sorted(pool.draw(2, StepContext(SEED, 0)))
    assert (key, other) == ((0, 0), (1, 0))
    refresh(pool, 0)  # its limit is half of four
    assert key in pool
    refresh(pool, 0)
    assert key not in pool
    assert other in pool
    assert pool.load(key).key == (0, 1)  # what lives there now
    assert pool.load(key).key in pool
    assert sorted(pool.draw(2, StepContext(SEED, 3))) == [(0, 1), (1, 0)]
    assert pool.draw(1, StepContext(SEED, 3), [key]) == [(1, 0)]
    assert (2, 0) not in pool
    with pytest.raises(InputError, match="a step draws 3 candidates, but the pool holds 2"):
        pool.draw(2, StepContext(SEED, 3), [key])


def test_networks_are_those_of_the_first_step() -> None:
    pool = prepared(small.network_pool(num_networks=3))
    assert all(torch.equal(a, pool.load((i,)).theta) for i, a in enumerate(pool.networks()))
    fresh = NetworkPool(num_networks=2)
    with pytest.raises(RuntimeError, match="prepare has not been called"):
        next(fresh.networks())


@pytest.mark.parametrize("options", [{}, {"refresh": "all"}, {"pretrain_epochs": 1, "refresh": "candidates"}])
def test_a_state_on_disk_goes_on_bit_for_bit(options: dict[str, Any]) -> None:
    def go_on(pool: NetworkPool, steps: range) -> None:
        for step in steps:
            keys = pool.draw(2, StepContext(SEED, step))
            pool.update(keys[0], keys, StepContext(SEED, step + 1))

    settings: dict[str, Any] = {"num_networks": 3, "age_limit": 4, "recipe": small.LIVE_RECIPE, **options}
    whole = made(**settings)
    go_on(whole, range(9))
    assert whole.scalars()["pool/reinitialized"] > 1
    for stop in (0, 1, 5):
        pool, file = made(**settings), io.BytesIO()
        go_on(pool, range(stop))
        torch.save(pool.state_dict(), file)
        file.seek(0)
        resumed = made(**settings, seed=99)  # what it made itself counts for nothing
        resumed.load_state_dict(torch.load(file, weights_only=True))
        go_on(resumed, range(stop, 9))
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
        for name in ("ages", "limits", "births", "batches_drawn"):
            assert whole.state_dict()[name] == resumed.state_dict()[name]
        for one, other in zip(whole.state_dict()["momenta"], resumed.state_dict()["momenta"], strict=True):
            assert one is other is None or torch.equal(one, other)


def test_a_state_of_another_size_is_refused() -> None:
    state = made(num_networks=3).state_dict()
    with pytest.raises(InputError, match=r"^the pool holds 2 networks, but the checkpoint's run has 3; resume[^\n]*$"):
        made(num_networks=2).load_state_dict(state)
    unprepared = NetworkPool(num_networks=2)  # only looked at: it takes what there is
    unprepared.load_state_dict(state)
    assert len(unprepared) == 3
    unprepared.prepare(setup(continues=True))
    assert all(torch.equal(a, b) for a, b in zip(unprepared.networks(), state["thetas"], strict=True))


def test_a_second_fit_goes_on_or_starts_clean() -> None:
    pool, data = made(num_networks=3), small.data(seed=5).train
    refresh(pool)
    before, drawn = weights(pool), pool.batches_drawn
    pool.prepare(setup(size=5, continues=True))
    pool.draw(1, StepContext(SEED, 1))
    assert len(pool) == 5
    assert pool.batches_drawn == drawn == 3
    assert all(torch.equal(a, b) for a, b in zip(before, weights(pool), strict=False))
    pool.prepare(setup(data))
    pool.draw(1, StepContext(SEED, 0))
    refresh(pool)
    fresh = made(data, num_networks=3)
    refresh(fresh)
    assert len(pool) == 3
    assert pool.batches_drawn == 3
    assert all(torch.equal(a, b) for a, b in zip(weights(pool), weights(fresh), strict=True))


def test_a_second_fit_of_a_module_with_a_new_trainer_starts_clean_and_with_the_same_one_goes_on(tmp_path: Path) -> None:
    def births_and_batches(module: DistillationModule) -> tuple[list[int], int]:
        state = module.pool.state_dict()
        return state["births"], state["batches_drawn"]

    module = small.network_module()
    trainer = small.fit(tmp_path, module, steps=6)
    once = births_and_batches(module)
    assert once == ([1], 4 * 3)  # the last step's refresh waits for the next one
    small.fit(tmp_path, module, steps=6)
    assert births_and_batches(module) == once
    module = small.network_module()
    trainer = small.fit(tmp_path, module, steps=3)
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(module, datamodule=small.data())
    assert module.pool.state_dict()["batches_drawn"] > 2 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft_labels": True}, "labels is 'soft' .* NetworkPool .* use labels: hard"),
    ],
)
def test_what_the_run_cannot_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NetworkPool().prepare(setup(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_networks": 0}, "num_networks is 0; it must be at least 1"),
        ({"age_limit": 0}, r"age_limit is 0; it must be at least 1 \(null for no limit\)"),
        ({"pretrain_epochs": -1}, "pretrain_epochs is -1; it must be at least 0"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NetworkPool(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"recipe\.lr is 0; it must be above 0"),
        ({"lr": float("inf")}, r"recipe\.lr is inf"),
        ({"momentum": 1.0}, r"recipe\.momentum is 1; it must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, r"recipe\.weight_decay is -1; it must be at least 0"),
        ({"batch_size": 0}, r"recipe\.batch_size is 0"),
        ({"images_per_update": 0}, r"recipe\.images_per_update is 0"),
        ({"cutmix": 1.5}, r"recipe\.cutmix is 1\.5"),
        ({"augmentation": "blur"}, "blur"),
        ({"policy": "mtt"}, "policy is 'mtt'; use one of dsa, idc"),
    ],
)
def test_bad_recipes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NetworkRecipe(**options)
