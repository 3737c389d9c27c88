"""The compiled training of live networks: the same up to rounding, prepared before the first step, never in the way."""

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from dd_lightning.execution import compile as compile_module
from dd_lightning.execution.options import Execution, MicroBatch
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools import NetworkPool, PoolSetup
from dd_lightning.sets.real import RealSet
from dd_lightning.training import parallel_networks
from dd_lightning.training.recipes import NetworkRecipe
from tests import small

# of 90 images: an epoch is five batches of 16 and one of 10, and an update seven batches; about half are mixed
RECIPE = NetworkRecipe(lr=0.05, batch_size=16, images_per_update=112)
ON = Execution(compile="on")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compile to eager code: it takes seconds. Gives how often each compiled function has been called."""
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        function, number = aot_eager(graph, inputs), len(calls)
        calls.append(0)

        def run(*arguments: Any) -> Any:  # noqa: ANN401
            calls[number] += 1
            return function(*arguments)

        return run

    monkeypatch.setattr(parallel_networks, "BACKEND", backend)
    return calls


def prepared(
    double: bool = False,
    steps: int = 0,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
    **options: Any,  # noqa: ANN401
) -> NetworkPool:
    data, real = small.data(), small.data().train
    if double:
        real = RealSet(real.images.double(), real.labels, real.num_classes)
    network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
    pool = NetworkPool(**({"age_limit": None, "recipe": RECIPE} | options))
    pool.prepare(PoolSetup(network, real, "", "", seed=7, steps=steps, execution=execution))
    return pool


def trained(pool: NetworkPool, double: bool = False, updates: int = 2) -> Tensor:
    """Return the parameters after some updates."""
    pool.draw(1, StepContext(7, 0))
    if double:
        pool._members[0].theta = pool._members[0].theta.double()
    for step in range(updates):
        pool.update((0,), [(0,)], StepContext(7, step + 1))
    return pool.load((0,)).theta


@pytest.mark.parametrize("cutmix", [0.0, 0.5])
def test_compiled_training_is_the_eager_one(quick: list[int], cutmix: float) -> None:
    recipe = NetworkRecipe(lr=0.05, batch_size=16, images_per_update=112, cutmix=cutmix)
    eager = trained(prepared(double=True, recipe=recipe), double=True)
    pool = prepared(double=True, recipe=recipe, execution=ON)
    assert quick == [1]
    compiled = trained(pool, double=True)
    assert quick == [13]  # one to compile, and all of 14 batches but the epochs' last ones
    assert float((compiled - eager).norm() / eager.norm()) < 1e-13


@pytest.mark.usefixtures("quick")
def test_a_batch_may_be_all_there_is() -> None:
    recipe = NetworkRecipe(lr=0.05, batch_size=200, images_per_update=200)
    eager = trained(prepared(double=True, recipe=recipe), double=True)
    pool = prepared(double=True, recipe=recipe, execution=ON)
    assert float((trained(pool, double=True) - eager).norm() / eager.norm()) < 1e-13


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("quick")
def test_bfloat16_is_near_and_its_parameters_are_float32(compile: bool) -> None:
    exact, start = trained(prepared()), trained(prepared(), updates=0)
    rounded = trained(prepared(execution=Execution(compile=compile, precision="bfloat16")))
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - exact).norm() / (exact - start).norm()) < 0.1
    assert not torch.equal(rounded, rounded.bfloat16().float())


def test_auto_compiles_long_runs_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def noted(choice: str, device: torch.device, calls: int) -> bool:
        asked.append((choice, calls))
        return False

    monkeypatch.setattr(compile_module, "compiles", noted)
    for rule in ("winner", "all", "candidates", "none"):
        prepared(steps=100, num_networks=3, execution=Execution(compile="auto"), refresh=rule)
    assert asked == [("auto", 700), ("auto", 2100), ("auto", 2100), ("auto", 0)]


def test_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: object) -> NoReturn:
        raise RuntimeError("no C++ compiler\nmore lines")

    monkeypatch.setattr(parallel_networks, "BACKEND", backend)
    with pytest.raises(
        InputError, match=r"compile is 'on', .*no C\+\+ compiler.*; set execution\.compile: off"
    ) as refused:
        prepared(execution=ON)
    assert "\n" not in str(refused.value)
    eager = trained(prepared())
    monkeypatch.setattr(compile_module, "compiles", lambda *_: True)
    with pytest.warns(UserWarning, match="torch.compile fails for the training of the pool's networks .*: going on wi"):
        pool = prepared(execution=Execution(compile="auto"))
    assert torch.equal(trained(pool), eager)


@pytest.mark.parametrize("micro_batch", [None, 3, "auto"])
def test_pieces_of_batches_are_the_same_training(micro_batch: MicroBatch) -> None:
    whole = trained(prepared(double=True), double=True)
    cut = trained(prepared(double=True, execution=Execution(micro_batch=micro_batch)), double=True)
    assert torch.equal(cut, whole) is (micro_batch != 3)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("quick")
def test_a_pools_own_execution_goes_over_the_runs() -> None:
    low = Execution(precision="bfloat16")
    data = small.data()
    network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
    own = NetworkPool(age_limit=None, recipe=RECIPE, execution=Execution())
    own.prepare(PoolSetup(network, data.train, "", "", seed=7, execution=low))
    exact = trained(prepared())
    assert torch.equal(trained(own), exact)
    assert not torch.equal(trained(prepared(execution=low)), exact)
