"""The compiled training of live networks: the same up to rounding, prepared before the first step, never in the way."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from dd_lightning.execution import compiled_loss as compiling
from dd_lightning.execution.compile import compiled
from dd_lightning.execution.compiled_loss import compiled_loss
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.products import DifferentiatedLoss, Loss
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools import NetworkPool, PoolSetup, network_pool
from dd_lightning.sets.real import RealSet
from dd_lightning.training.recipes import NetworkRecipe
from tests import small

# of 90 images: an epoch is five batches of 16 and one of 10, and an update seven batches; about half are mixed
RECIPE = NetworkRecipe(lr=0.05, batch_size=16, images_per_update=112)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compile to eager code: it takes seconds. Gives the sizes of the batches that compiled code is used for."""
    sizes: list[int] = []

    def counted(loss: Loss) -> DifferentiatedLoss:
        made = compiled_loss(loss)

        def gradient(theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
            sizes.append(len(images))
            return made.gradient(theta, images, targets)

        return made._replace(gradient=gradient)

    monkeypatch.setattr(compiling, "compiled", partial(compiled, backend="aot_eager"))
    monkeypatch.setattr(network_pool, "compiled_loss", counted)
    yield sizes
    torch.compiler.set_stance("default")


def prepared(double: bool = False, steps: int = 0, said: list[str] | None = None, **options: Any) -> NetworkPool:  # noqa: ANN401
    data, real = small.data(), small.data().train
    if double:
        real = RealSet(real.images.double(), real.labels, real.num_classes)
    network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
    pool = NetworkPool(**({"age_limit": None, "recipe": RECIPE} | options))
    say = (lambda _: None) if said is None else said.append
    pool.prepare(PoolSetup(network, real, "", "", torch.device("cpu"), lambda *_: None, 7, False, steps, say))
    return pool


def trained(pool: NetworkPool, double: bool = False, updates: int = 2) -> Tensor:
    """Return the parameters after some updates."""
    pool.draw(1, StepContext(7, 0))
    if double:
        pool._members[0].theta = pool._members[0].theta.double()
    for step in range(updates):
        pool.refresh((0,), [(0,)], StepContext(7, step + 1))
    return pool.load((0,)).theta


@pytest.mark.parametrize("cutmix", [0.0, 0.5])
def test_compiled_training_is_the_eager_one(quick: list[int], cutmix: float) -> None:
    recipe = NetworkRecipe(lr=0.05, batch_size=16, images_per_update=112, cutmix=cutmix)
    eager, said = trained(prepared(double=True, recipe=recipe), double=True), list[str]()
    pool = prepared(double=True, recipe=recipe, compile="on", said=said)
    assert quick == [16]
    assert said == ["compiling the training of the pool's networks: it may take a minute"]
    torch.compiler.set_stance("fail_on_recompile")
    found = trained(pool, double=True)
    assert quick == [16] * 13  # one to compile, and all of 14 batches but the epochs' last ones
    assert float((found - eager).norm() / eager.norm()) < 1e-13


@pytest.mark.usefixtures("quick")
def test_a_batch_may_be_all_there_is() -> None:
    recipe = NetworkRecipe(lr=0.05, batch_size=200, images_per_update=200)
    eager = trained(prepared(double=True, recipe=recipe), double=True)
    pool = prepared(double=True, recipe=recipe, compile="on")
    torch.compiler.set_stance("fail_on_recompile")
    assert float((trained(pool, double=True) - eager).norm() / eager.norm()) < 1e-13


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.usefixtures("quick")
def test_bfloat16_is_near_and_its_parameters_are_float32(compile: str) -> None:
    exact, start = trained(prepared()), trained(prepared(), updates=0)
    rounded = trained(prepared(precision="bfloat16", compile=compile))
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - exact).norm() / (exact - start).norm()) < 0.1
    assert not torch.equal(rounded, rounded.bfloat16().float())


def test_auto_compiles_long_runs_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def noted(choice: str, device: torch.device, calls: int) -> bool:
        asked.append((choice, calls))
        return False

    monkeypatch.setattr(network_pool, "compiles", noted)
    for rule in ("winner", "all", "candidates", "none"):
        prepared(steps=100, num_networks=3, compile="auto", refresh=rule)
    assert asked == [("auto", 700), ("auto", 2100), ("auto", 2100), ("auto", 0)]


def test_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: object) -> NoReturn:
        raise RuntimeError("no C++ compiler\nmore lines")

    monkeypatch.setattr(compiling, "compiled", partial(compiled, backend=backend))
    with pytest.raises(InputError, match=r"compile is 'on', .*no C\+\+ compiler.*; set pool\.compile: off") as refused:
        prepared(compile="on")
    assert "\n" not in str(refused.value)
    eager = trained(prepared())
    monkeypatch.setattr(network_pool, "compiles", lambda *_: True)
    with pytest.warns(UserWarning, match="torch.compile fails for the training of the pool's networks .*: going on wi"):
        pool = prepared(compile="auto")
    assert torch.equal(trained(pool), eager)


@pytest.mark.parametrize(("options", "said"), [({"compile": "fast"}, "compile is 'fast'"), ({"precision": "half"}, "")])
def test_unknown_choices(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said or "precision is 'half'; use one of float32, tf32, bfloat16"):
        NetworkPool(**options)
