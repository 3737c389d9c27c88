import io
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import rich
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import dd_lightning.training.experts as training
from dd_lightning.execution import compile as compile_module
from dd_lightning.execution.options import Execution
from dd_lightning.functional.augment import DSA, augment
from dd_lightning.functional.errors import DistillationError, DivergenceError, InputError
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork, build_network
from dd_lightning.sets.real import RealSet
from dd_lightning.training import parallel_networks
from dd_lightning.training.expert_store import ExpertIdentity, ExpertState, ExpertStore
from dd_lightning.training.experts import experts_together, train_experts
from dd_lightning.training.parallel_networks import ParallelTraining
from dd_lightning.training.recipes import ExpertRecipe

SHAPE, CLASSES, COUNT = (1, 8, 8), 3, 50
MOMENTUM = ExpertRecipe(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=16, seed=7)


def small_network(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 5, 3, padding=1),
        nn.GroupNorm(5, 5),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(5 * (image_size[0] // 2) * (image_size[1] // 2), num_classes),
    )


@pytest.fixture(scope="module")
def network() -> FunctionalNetwork:
    return FunctionalNetwork(small_network, SHAPE, CLASSES)


def separable(count: int, seed: int) -> RealSet:
    """Noise around one pattern per class."""
    patterns = torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, *SHAPE, generator=generator)
    return RealSet(patterns[labels] + 0.7 * noise, labels, CLASSES)


REAL, HELD_OUT = separable(COUNT, 0), separable(40, 1)

Train = Callable[..., ExpertStore]


@pytest.fixture
def train(network: FunctionalNetwork, tmp_path: Path) -> Train:
    def run(
        name: str,
        num_experts: int,
        epochs: int,
        recipe: ExpertRecipe = MOMENTUM,
        real: RealSet = REAL,
        **more: Any,  # noqa: ANN401
    ) -> ExpertStore:
        store = ExpertStore(tmp_path / name)
        identity = ExpertIdentity.of(network, recipe, epochs, fingerprint="f", dataset="patterns")
        options: dict[str, Any] = {"progress_bar": False} | more
        train_experts(network, real, store, identity, recipe, num_experts, epochs, **options)
        return store

    return run


def whole(store: ExpertStore, id: int) -> Tensor:
    return store.rows(id, range(store.epochs(id) + 1))


def reference(network: FunctionalNetwork, recipe: ExpertRecipe, id: int, epochs: int) -> tuple[Tensor, list[float]]:
    """One expert by torch.optim.SGD on an ordinary module, one batch after another."""
    module = small_network(SHAPE[0], CLASSES, SHAPE[1:])
    seed = step_generator(recipe.seed, 0, f"expert-{id}/initial").initial_seed()
    nn.utils.vector_to_parameters(network.initial(seed), module.parameters())
    optimizer = torch.optim.SGD(
        module.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    rows = [nn.utils.parameters_to_vector(module.parameters()).detach().clone()]
    accuracies = []
    step = 0
    for epoch in range(epochs):
        if recipe.lr_decay and epoch == epochs // 2 + 2:
            optimizer.param_groups[0]["lr"] = recipe.lr / 10
        order = torch.randperm(COUNT, generator=step_generator(recipe.seed, epoch, f"expert-{id}/batches"))
        right = 0
        for start in range(0, COUNT, recipe.batch_size):
            chosen = order[start : start + recipe.batch_size]
            generator = step_generator(recipe.seed, step, f"expert-{id}/augment")
            draw = DSA(strategy=recipe.augmentation).draw(generator, len(chosen), SHAPE[1:])
            logits = module(augment(REAL.images[chosen], draw))
            loss = nn.functional.cross_entropy(logits, REAL.labels[chosen])
            for weights, grad in zip(
                module.parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True
            ):
                weights.grad = grad
            optimizer.step()
            right += int((logits.argmax(1) == REAL.labels[chosen]).sum())
            step += 1
        accuracies.append(right / COUNT)
        rows.append(nn.utils.parameters_to_vector(module.parameters()).detach().clone())
    return torch.stack(rows), accuracies


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize(
    "recipe",
    [
        ExpertRecipe(batch_size=16, augmentation="none"),
        MOMENTUM,
        ExpertRecipe(lr=0.05, lr_decay=True, batch_size=64, seed=3),
    ],
    ids=["plain", "momentum", "decay"],
)
def test_trajectories_are_those_of_a_plain_training_loop(
    train: Train, network: FunctionalNetwork, recipe: ExpertRecipe, together: int
) -> None:
    store = train("a", 3, 5, recipe, together=together)
    for id in range(3):
        rows, accuracies = reference(network, recipe, id, epochs=5)
        torch.testing.assert_close(whole(store, id), rows, rtol=1e-5, atol=1e-5)
        assert torch.equal(store.rows(id, [0])[0], rows[0])
        assert store.metadata(id).accuracies.train == pytest.approx(accuracies, abs=1.5 / COUNT)
        assert store.metadata(id).accuracies.held_out == [None] * 5
        assert (store.read(id).momentum is not None) == (recipe.momentum > 0)


def test_experts_learn_and_differ(train: Train, network: FunctionalNetwork) -> None:
    store = train("a", 2, 8, ExpertRecipe(lr=0.05, batch_size=16), held_out=HELD_OUT)
    for id in store.ids():
        held_out = store.metadata(id).accuracies.held_out
        assert len(held_out) == 8
        last = held_out[-1]
        assert last is not None
        before = network(store.rows(id, [0])[0], HELD_OUT.images).argmax(1).eq(HELD_OUT.labels).double().mean().item()
        after = network(store.rows(id, [8])[0], HELD_OUT.images).argmax(1).eq(HELD_OUT.labels).double().mean().item()
        assert last == pytest.approx(after)
        assert before < 0.7 < 0.95 < after
    first, second = whole(store, 0), whole(store, 1)
    assert ((first - second).norm(dim=1) > 1).all()
    assert (first.diff(dim=0).norm(dim=1) > 0).all()  # each row is a copy, not the live weights


def test_one_after_another_neighbors_do_not_matter_to_the_last_bit(
    train: Train, network: FunctionalNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train("alone", 3, 2, together=1)
    monkeypatch.setattr(training, "batching_pays", lambda *_: False)
    beside = train("beside", 3, 2, together=3)
    for id in range(3):
        assert beside.file(id).read_bytes() == alone.file(id).read_bytes()
    (tmp_path / "alone" / "expert_00001.safetensors").unlink()
    third = alone.file(2).read_bytes()
    assert train("alone", 3, 2, together=1).file(1).read_bytes() == beside.file(1).read_bytes()
    assert alone.file(2).read_bytes() == third


class KilledError(Exception):
    pass


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("survived", [1, 3])
def test_killed_and_continued_is_uninterrupted(
    train: Train, monkeypatch: pytest.MonkeyPatch, survived: int, together: int
) -> None:
    uninterrupted = train("whole", 2, 4, together=together, held_out=HELD_OUT)
    begin = training._Group.train_epoch

    def die(self: training._Group, *arguments: Any) -> None:  # noqa: ANN401
        if self.epoch == survived:
            raise KilledError
        begin(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training._Group, "train_epoch", die)
        with pytest.raises(KilledError):
            train("killed", 2, 4, together=together, held_out=HELD_OUT)
    store = train("killed", 2, 4, together=together, held_out=HELD_OUT)
    for id in range(2):
        assert store.file(id).read_bytes() == uninterrupted.file(id).read_bytes()


def test_files_are_written_every_minute_and_at_the_end(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    written: list[int] = []
    write = ExpertStore.write

    def record(self: ExpertStore, experts: Mapping[int, ExpertState], *rest: Any) -> None:  # noqa: ANN401
        written.extend(len(expert.trajectory) - 1 for expert in experts.values())
        write(self, experts, *rest)

    begin = training._Group.train_epoch

    def tick(self: training._Group, *arguments: Any) -> None:  # noqa: ANN401
        nonlocal now
        now += 25
        begin(self, *arguments)

    monkeypatch.setattr(ExpertStore, "write", record)
    monkeypatch.setattr(training._Group, "train_epoch", tick)
    train("a", 1, 7)
    assert written == [3, 6, 7]  # 75 s, 150 s, the end


def failing_at(step: int, error: BaseException) -> Callable[..., Tensor]:
    """Return a training step that fails at its n-th call."""
    take, calls = ParallelTraining.step, 0

    def failing(self: ParallelTraining, *batches: Any) -> Tensor:  # noqa: ANN401
        nonlocal calls
        calls += 1
        if calls == step:
            raise error
        return take(self, *batches)

    return failing


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), RuntimeError("no such luck")], ids=repr)
def test_an_interruption_keeps_every_finished_epoch(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    uninterrupted = train("whole", 1, 3)
    with monkeypatch.context() as patch:
        patch.setattr(ParallelTraining, "step", failing_at(2 * 4 + 2, error))  # within the third epoch of four steps
        with pytest.raises(type(error)) as raised:
            train("stopped", 1, 3)
    assert raised.value is error
    assert ExpertStore(tmp_path / "stopped").epochs(0) == 2
    assert train("stopped", 1, 3).file(0).read_bytes() == uninterrupted.file(0).read_bytes()


def test_a_store_is_extended_and_grown(train: Train) -> None:
    uninterrupted = train("whole", 3, 4, together=1)
    store = train("grown", 2, 2, together=1)
    assert [store.epochs(id) for id in store.ids()] == [2, 2]
    train("grown", 1, 4, together=1)
    finished = store.file(0).read_bytes(), store.file(0).stat().st_mtime_ns
    train("grown", 3, 4, together=1)
    assert (store.file(0).read_bytes(), store.file(0).stat().st_mtime_ns) == finished
    for id in range(3):
        assert store.file(id).read_bytes() == uninterrupted.file(id).read_bytes()
    train("grown", 3, 3)  # fewer than stored: nothing to do
    assert [store.epochs(id) for id in store.ids()] == [4, 4, 4]


def test_a_decayed_trajectory_cannot_be_lengthened(train: Train) -> None:
    recipe = ExpertRecipe(batch_size=32, lr_decay=True)
    train("a", 1, 2, recipe)
    with pytest.raises(
        InputError, match=r"recipe\.decay_epochs = 2, this run has 3; give this run another expert path"
    ):
        train("a", 1, 3, recipe)


def test_another_recipe_is_refused_before_anything_is_trained(train: Train) -> None:
    store = train("a", 1, 1)
    before = store.file(0).read_bytes()
    with pytest.raises(InputError, match=r"expert_00000\.safetensors .*recipe\.lr = 0\.05, this run has 0\.01"):
        train("a", 2, 1, ExpertRecipe(batch_size=16))
    assert store.ids() == [0]
    assert store.file(0).read_bytes() == before


def test_an_identity_of_another_recipe_is_refused(network: FunctionalNetwork, tmp_path: Path) -> None:
    identity = ExpertIdentity.of(network, MOMENTUM, 1, fingerprint="f", dataset="patterns")
    with pytest.raises(InputError, match="make the identity from this recipe"):
        train_experts(network, REAL, ExpertStore(tmp_path), identity, ExpertRecipe(), 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"together": 0}, "together is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(train: Train, change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(**({"name": "a", "num_experts": 1, "epochs": 1} | change))


def test_divergence_names_expert_epoch_and_lr_and_keeps_what_was_finite(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step, calls = ParallelTraining.step, 0

    def spoil(self: ParallelTraining, *batches: Any) -> Tensor:  # noqa: ANN401
        nonlocal calls
        calls += 1
        if calls == 3 * 4:
            self.thetas[1][3] = torch.nan
        return step(self, *batches)

    with monkeypatch.context() as patch:
        patch.setattr(ParallelTraining, "step", spoil)
        with pytest.raises(
            DivergenceError, match=r"^expert 1 diverged in epoch 3 at lr 0\.05: [^\n]*lower recipe\.lr$"
        ):
            train("a", 2, 4, together=2)
    store = ExpertStore(tmp_path / "a")
    assert [store.epochs(id) for id in store.ids()] == [2, 2]
    uninterrupted = train("whole", 2, 4, together=2)
    train("a", 2, 4, together=2)
    assert store.file(1).read_bytes() == uninterrupted.file(1).read_bytes()


def test_a_huge_learning_rate_diverges(train: Train, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"expert 0 diverged in epoch 1 at lr 1e\+30"):
        train("a", 1, 2, ExpertRecipe(lr=1e30, batch_size=16))
    assert ExpertStore(tmp_path / "a").ids() == []


def test_global_random_states_and_modes_are_as_before(train: Train) -> None:
    numpy_before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        train("a", 1, 1)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == numpy_before  # type: ignore[index]  # noqa: NPY002


def test_the_bar_shows_experts_epochs_and_images_per_second(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    now = 0.0

    def later() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(time, "perf_counter", later)  # or updates so close together are passed over
    monkeypatch.setattr(Progress, "update", lambda *_, description, **__: titles.append(description))
    monkeypatch.setattr(rich, "_console", Console(file=io.StringIO(), force_terminal=True))
    train("a", 2, 1, together=2)
    assert not titles
    train("a", 3, 2, together=2, progress_bar=True)
    shown = [re.fullmatch(r"(experts? [\d-]+ of 3, epoch ./2), ([\d,]+) images/s", title) for title in titles]
    assert all(each and int(each[2].replace(",", "")) > 0 for each in shown)
    assert [each[1] for each in shown if each] == [
        *["experts 1-2 of 3, epoch 2/2"] * 4,
        *["expert 3 of 3, epoch 1/2"] * 4,
        *["expert 3 of 3, epoch 2/2"] * 4,
    ]


def test_the_bar_may_stand_inside_another(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=file, force_terminal=True, width=200))
    with Progress() as outer:
        outer.add_task("the Trainer's own", total=1)
        train("inside", 1, 1, progress_bar=True)
    assert "experts" in file.getvalue()
    silent = len(file.getvalue())
    alone = train("alone", 1, 1)
    assert len(file.getvalue()) == silent
    assert train("inside", 1, 1).file(0).read_bytes() == alone.file(0).read_bytes()


def test_how_many_train_at_once() -> None:
    assert experts_together("cpu", vmappable=True, pixels=4096) == 16
    assert experts_together("cpu", vmappable=True, pixels=4097) == 1
    assert experts_together("cuda", vmappable=True, pixels=10**6) == 10
    assert experts_together("cuda", vmappable=True, pixels=10**6, memory=1) == 1
    assert experts_together("cuda", vmappable=False, pixels=1) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_experts_trained_on_cuda_are_those_of_the_host(train: Train) -> None:
    recipe = ExpertRecipe(batch_size=16)
    host, cuda = train("host", 3, 1, recipe), train("cuda", 3, 1, recipe, real=REAL.to("cuda:0"), held_out=HELD_OUT)
    for id in range(3):
        torch.testing.assert_close(whole(cuda, id), whole(host, id), rtol=1e-3, atol=1e-3)


CUT = Execution(micro_batch=5)  # batches of 16, the last one of an epoch of 2


def test_pieces_of_batches_train_the_same_experts(train: Train) -> None:
    whole_batches = train("whole", 2, 3, held_out=HELD_OUT)
    for together in (1, 2):
        cut = train(f"cut {together}", 2, 3, execution=CUT, together=together, held_out=HELD_OUT)
        for id in range(2):
            assert not torch.equal(whole(cut, id), whole(whole_batches, id))  # or nothing was cut
            torch.testing.assert_close(whole(cut, id), whole(whole_batches, id), rtol=1e-5, atol=1e-5)
            found, expected = (store.metadata(id).accuracies for store in (cut, whole_batches))
            assert found.train == pytest.approx(expected.train, abs=1.5 / COUNT)
    large = train("large", 2, 3, execution=Execution(micro_batch=16), held_out=HELD_OUT)
    # and on a host, of small images, nothing is cut unasked
    null = train("null", 2, 3, execution=Execution(micro_batch=None), held_out=HELD_OUT)
    for id in range(2):
        contents = {store.file(id).read_bytes() for store in (large, null, whole_batches)}
        assert len(contents) == 1


class Compiler:
    """A backend that compiles to eager code, which takes a second, and counts."""

    def __init__(self) -> None:
        self.compilations = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compilations += 1

        def run(*args: Any) -> Any:  # noqa: ANN401
            self.calls += 1
            return graph(*args)

        return run


@pytest.mark.parametrize(
    ("together", "cut", "shapes", "passes"), [(2, None, 2, 4), (1, 5, 3, 13)], ids=["at once", "in pieces"]
)
def test_compiled_experts_are_the_same_up_to_rounding_and_interrupted_to_the_last_bit(
    train: Train, monkeypatch: pytest.MonkeyPatch, together: int, cut: int | None, shapes: int, passes: int
) -> None:
    compiler = Compiler()
    monkeypatch.setattr(parallel_networks, "BACKEND", compiler)
    off, on = Execution(micro_batch=cut), Execution(compile="on", micro_batch=cut)
    eager = train("eager", 2, 2, together=together, execution=off)
    assert compiler.calls == 0
    known: list[int] = []
    begin = training._Group.__init__

    def note(self: training._Group, *arguments: Any) -> None:  # noqa: ANN401
        known.append(compiler.compilations)
        begin(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training._Group, "__init__", note)
        store = train("compiled", 2, 2, together=together, execution=on)
    # all before the first group of experts: batches of 16 and of 2, in pieces of 5, 1 and 2
    groups = 2 // together
    assert known == [shapes] * groups
    assert compiler.compilations == shapes
    assert compiler.calls == shapes + groups * 2 * passes
    for id in range(2):
        torch.testing.assert_close(whole(store, id), whole(eager, id), rtol=1e-4, atol=1e-4)
    train("resumed", 2, 1, together=together, execution=on)
    resumed = train("resumed", 2, 2, together=together, execution=on)
    for id in range(2):
        assert resumed.file(id).read_bytes() == store.file(id).read_bytes()
    finished = store.file(0).read_bytes()
    train("compiled", 2, 2, execution=off)  # the store may hold both
    assert store.file(0).read_bytes() == finished


def test_a_compiler_that_fails_is_told_or_done_without(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: object) -> NoReturn:
        raise RuntimeError("no C++ compiler\nmore lines")

    eager = train("eager", 1, 1)
    monkeypatch.setattr(parallel_networks, "BACKEND", backend)
    message = r"^compile is 'on', but torch\.compile fails .*no C\+\+ compiler.*; set execution\.compile: off$"
    with pytest.raises(InputError, match=message):
        train("on", 1, 1, execution=Execution(compile="on"))
    monkeypatch.setattr(compile_module, "compiles", lambda *_: True)
    with pytest.warns(UserWarning, match="torch.compile fails for the experts' step .*: going on without"):
        store = train("auto", 1, 1, execution=Execution(compile="auto"))
    assert store.file(0).read_bytes() == eager.file(0).read_bytes()


def test_layers_in_bfloat16_and_the_rest_in_float32(train: Train, network: FunctionalNetwork) -> None:
    recipe = ExpertRecipe(lr=0.05, batch_size=64, augmentation="none", precision="bfloat16")
    store = train("low", 1, 2, recipe, together=1)
    for epoch in range(2):  # of one step each
        theta = store.rows(0, [epoch])[0]
        rows = torch.randperm(COUNT, generator=step_generator(recipe.seed, epoch, "expert-0/batches"))
        leaf = theta.clone().requires_grad_()
        logits = network(leaf.to(torch.bfloat16), REAL.images[rows].to(torch.bfloat16))
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits.float(), REAL.labels[rows]), leaf)
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(store.rows(0, [epoch + 1])[0], theta - 0.05 * gradient, rtol=1e-6, atol=1e-7)
    full = train("full", 1, 2, replace(recipe, precision="float32"), together=1)
    (start, low), (_, exact) = (each.rows(0, [0, 2]) for each in (store, full))
    assert 1e-4 < (low - exact).norm() / (exact - start).norm() < 0.1


def test_a_store_holds_experts_of_one_precision(train: Train) -> None:
    train("a", 1, 1)
    with pytest.raises(InputError, match=r"recipe\.precision = None, this run has 'bfloat16'"):
        train("a", 2, 1, replace(MOMENTUM, precision="bfloat16"))


@pytest.mark.parametrize(
    ("execution", "norm", "remedy"),
    [
        (Execution(), "", "set execution.micro_batch below 16, or a smaller recipe.batch_size"),
        (CUT, "", "set execution.micro_batch below 5, or a smaller recipe.batch_size"),
        (Execution(), "-BN", "set a smaller recipe.batch_size"),
    ],
)
def test_out_of_memory_is_one_line_and_loses_no_finished_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, execution: Execution, norm: str, remedy: str
) -> None:
    network = FunctionalNetwork(f"ConvNet-1-W4{norm}", SHAPE, CLASSES)
    identity = ExpertIdentity.of(network, MOMENTUM, 3, fingerprint="f", dataset="patterns")
    stores = {name: ExpertStore(tmp_path / name) for name in ("whole", "short")}
    options: dict[str, Any] = {"progress_bar": False, "together": 1, "execution": execution}
    train_experts(network, REAL, stores["whole"], identity, MOMENTUM, 1, 3, **options)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nmore lines")
    with monkeypatch.context() as patch:
        patch.setattr(ParallelTraining, "step", failing_at(2 * 4 + 2, error))
        with pytest.raises(DistillationError) as caught:
            train_experts(network, REAL, stores["short"], identity, MOMENTUM, 1, 3, **options)
    assert str(caught.value) == f"memory ran out while training 1 x {network.name} as experts; {remedy}"
    assert stores["short"].epochs(0) == 2
    train_experts(network, REAL, stores["short"], identity, MOMENTUM, 1, 3, **options)
    assert stores["short"].file(0).read_bytes() == stores["whole"].file(0).read_bytes()


@pytest.mark.parametrize("together", [1, 2])
def test_batch_norms_are_tested_with_running_statistics_that_a_continuation_carries_on(
    tmp_path: Path, together: int
) -> None:
    name, recipe = "ConvNet-1-W4-BN", replace(MOMENTUM, augmentation="none")
    network = FunctionalNetwork(name, SHAPE, CLASSES)
    stores = {name: ExpertStore(tmp_path / name) for name in ("whole", "parts")}

    def train(store: ExpertStore, epochs: int) -> None:
        identity = ExpertIdentity.of(network, recipe, epochs, fingerprint="f", dataset="patterns")
        options: dict[str, Any] = {"held_out": HELD_OUT, "progress_bar": False, "together": together}
        train_experts(network, REAL, store, identity, recipe, 2, epochs, **options)

    train(stores["whole"], 3)
    for epochs in (1, 3):
        train(stores["parts"], epochs)
    for id in range(2):
        assert stores["parts"].file(id).read_bytes() == stores["whole"].file(id).read_bytes()
        # torch's own module on the same batches
        module = build_network(name, SHAPE[0], CLASSES, SHAPE[1:]).train()
        nn.utils.vector_to_parameters(stores["whole"].rows(id, [0])[0], module.parameters())
        sgd = torch.optim.SGD(module.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
        for epoch in range(3):
            module.train()
            order = torch.randperm(COUNT, generator=step_generator(recipe.seed, epoch, f"expert-{id}/batches"))
            for rows in order.split(recipe.batch_size):
                sgd.zero_grad()
                nn.functional.cross_entropy(module(REAL.images[rows]), REAL.labels[rows]).backward()
                sgd.step()
            right = (module.eval()(HELD_OUT.images).argmax(1) == HELD_OUT.labels).double().mean()
            assert stores["whole"].metadata(id).accuracies.held_out[epoch] == pytest.approx(float(right), abs=1.5 / 40)
        state, buffers = stores["whole"].read(id), dict(module.named_buffers())
        assert state.statistics is not None
        running = torch.cat([buffer for name, buffer in buffers.items() if "running" in name])
        torch.testing.assert_close(state.statistics, running, rtol=1e-4, atol=1e-4)


def test_shards_make_all_experts_between_them(train: Train) -> None:
    whole, parts = train("whole", 5, 2), train("parts", 5, 2, shard=(1, 2))
    assert parts.ids() == [1, 3]
    train("parts", 5, 2, shard=(0, 2))
    assert parts.ids() == whole.ids()
    for id in whole.ids():
        torch.testing.assert_close(parts.read(id).trajectory, whole.read(id).trajectory)
    for shard, message in (((2, 2), "the shard is 2"), ((0, 0), "the number of shards is 0")):
        with pytest.raises(InputError, match=message):
            train("more", 5, 2, shard=shard)
