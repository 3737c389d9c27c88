"""The adjoint of the unrolled student against plain backpropagation through the unroll."""

from functools import partial

import pytest
import torch
from torch import Tensor

from dd_lightning.execution import compiled_loss as compiling
from dd_lightning.execution.compile import compiled
from dd_lightning.execution.compiled_loss import compiled_loss
from dd_lightning.functional import trajectory
from dd_lightning.functional.augment import DSA, AugmentationDraw, augment
from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.products import DifferentiatedLoss, Loss, Order, differentiated
from dd_lightning.functional.trajectory import (
    InnerStep,
    images_augmented_together,
    permuted_batches,
    trajectory_loss,
    trajectory_loss_gradient,
    unroll,
    unroll_adjoint,
)
from dd_lightning.networks import FunctionalNetwork

STRATEGY = "color_crop_cutout_flip_scale_rotate"
CLASSES, STEPS = 4, 12


class Problem:
    """A student to unroll, with everything drawn from one seed."""

    def __init__(self, name: str, dtype: torch.dtype, batch: int | None, soft: bool, strategy: str) -> None:
        network = FunctionalNetwork(name, (3, 8, 8), CLASSES)
        generator = torch.Generator().manual_seed(3)
        self.loss: Loss = lambda theta, x, y: classification_loss(network(theta, x), y)
        self.images = torch.randn(8, 3, 8, 8, generator=generator).to(dtype)
        self.targets = torch.randn(8, CLASSES, generator=generator).to(dtype) if soft else torch.arange(8) % CLASSES
        self.lr = torch.tensor(0.05, dtype=dtype)
        self.start = network.initial(0).to(dtype)
        self.target = self.start + 0.05 * torch.randn(self.start.shape, generator=generator).to(dtype)
        policy = DSA(strategy)
        self.steps = [
            InnerStep(indices, policy.draw(generator, len(indices), (8, 8)))
            for indices in permuted_batches(8, batch, STEPS, generator)
        ]

    def plain_gradients(self) -> tuple[Tensor, ...]:
        """Backpropagate through the whole unroll, written from the update rule alone."""
        images, lr = self.images.clone().requires_grad_(), self.lr.clone().requires_grad_()
        targets = self.targets.clone()
        leaves = [images, lr]
        if targets.is_floating_point():
            leaves.append(targets.requires_grad_())
        theta = self.start.clone().requires_grad_()
        for indices, draw in self.steps:
            value = self.loss(theta, augment(images[indices], draw), targets[indices])
            theta = theta - lr * torch.autograd.grad(value, theta, create_graph=True)[0]
        loss = ((theta - self.target) ** 2).sum() / ((self.start - self.target) ** 2).sum()
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    def adjoint_gradients(
        self,
        order: Order = "reverse_over_reverse",
        micro_batch: int | None = None,
        student: DifferentiatedLoss | None = None,
    ) -> tuple[Tensor, ...]:
        loss = student or differentiated(self.loss, order)
        problem = (self.lr, self.images, self.targets, self.steps)
        (path,) = unroll(loss, [self.start], *problem, micro_batch=micro_batch)
        cotangent, soft = trajectory_loss_gradient(path[-1], self.start, self.target), self.targets.is_floating_point()
        adjoint = unroll_adjoint(loss, path, *problem, cotangent, wrt_targets=soft, micro_batch=micro_batch)
        found = (trajectory_loss(path[-1], self.start, self.target), adjoint.images, adjoint.lr)
        return found if adjoint.targets is None else (*found, adjoint.targets)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("order", ["reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize("batch", [None, 8, 3], ids=["whole", "exact", "with remainder"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("strategy", [STRATEGY, "none"])
def test_adjoint_is_exact_in_float64(order: Order, batch: int | None, soft: bool, strategy: str) -> None:
    problem = Problem("ConvNet-2-W6", torch.float64, batch, soft, strategy)
    for value, reference in zip(problem.adjoint_gradients(order), problem.plain_gradients(), strict=True):
        assert relative_error(value, reference) < 1e-10


@pytest.mark.parametrize("name", ["ConvNet-2-W6-LN", "ConvNet-2-W6-BN", "ConvNet-2-W6-NN", "ConvNet-1-W6-GN-MP"])
def test_adjoint_is_exact_for_every_norm(name: str) -> None:
    if "GN" in name:
        name = name.replace("W6", "W8")  # GroupNorm(4, C)
    problem = Problem(name, torch.float64, 5, True, STRATEGY)
    for value, reference in zip(problem.adjoint_gradients(), problem.plain_gradients(), strict=True):
        assert relative_error(value, reference) < 1e-10


@pytest.mark.parametrize("order", ["reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"])
def test_one_inner_step_in_float32_at_equal_theta(order: Order) -> None:
    # Longer float32 unrolls drift apart through ReLU flips whatever the method: compare at one theta_i.
    problem = Problem("ConvNet-3-W32", torch.float32, 5, True, STRATEGY)
    problem.steps = problem.steps[:1]
    for value, reference in zip(problem.adjoint_gradients(order), problem.plain_gradients(), strict=True):
        assert relative_error(value, reference) < 1e-5


@pytest.mark.slow
def test_the_compiled_student_is_exact_in_float64() -> None:
    problem = Problem("ConvNet-1-W4", torch.float64, None, True, STRATEGY)
    reference = problem.plain_gradients()
    student, steps = compiled_loss(problem.loss), problem.steps
    problem.steps = steps[:1]
    problem.adjoint_gradients(student=student)
    problem.steps = steps
    with torch.compiler.set_stance("fail_on_recompile"):  # what the first step needed serves all
        found = problem.adjoint_gradients(student=student)
    for value, expected in zip(found, reference, strict=True):
        assert relative_error(value, expected) < 1e-9


@pytest.mark.slow
def test_compiled_products_in_float32_at_equal_theta() -> None:
    problem = Problem("ConvNet-1-W4", torch.float32, None, False, "none")
    tangent = problem.target - problem.start
    point = (problem.start, problem.images, problem.targets, tangent, False)
    found, exact = compiled_loss(problem.loss).products(*point), differentiated(problem.loss).products(*point)
    for value, expected in zip(found[:3], exact[:3], strict=True):
        assert value is not None
        assert expected is not None
        assert relative_error(value, expected) < 1e-4


@pytest.mark.parametrize(
    ("batch", "soft"), [(3, True), (5, False)], ids=["soft, with remainder", "hard, with remainder"]
)
def test_the_student_is_compiled_once_for_each_shape(batch: int, soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # All that compiling does but the making of machine code, which takes most of the time.
    monkeypatch.setattr(compiling, "compiled", partial(compiled, backend="aot_eager"))
    problem = Problem("ConvNet-1-W4", torch.float64, batch, soft, STRATEGY)
    reference = problem.plain_gradients()
    student, steps = compiled_loss(problem.loss), problem.steps
    problem.steps = list({len(step.indices): step for step in steps}.values())
    assert len(problem.steps) == 2
    problem.adjoint_gradients(student=student)
    problem.steps = steps
    with torch.compiler.set_stance("fail_on_recompile"):
        found = problem.adjoint_gradients(student=student)
    for value, expected in zip(found, reference, strict=True):
        assert relative_error(value, expected) < 1e-9


def test_any_number_of_losses_may_be_compiled_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compiled", partial(compiled, backend="eager"))
    point = (torch.tensor([3.0]), torch.tensor([2.0]), torch.zeros(1))
    for factor in range(10):
        loss = compiled_loss(lambda t, x, y, factor=factor: factor * (t**2 * x).sum())  # type: ignore[misc]
        assert loss.products(*point, torch.ones(1), False).hessian.item() == 4 * factor


def test_finite_difference_of_the_whole_matching_loss() -> None:
    problem = Problem("ConvNet-2-W6-SIGMOID", torch.float64, 3, True, STRATEGY)
    _, by_images, by_lr, by_targets = problem.adjoint_gradients()
    generator = torch.Generator().manual_seed(9)

    def loss_at(images: Tensor, lr: Tensor, targets: Tensor) -> float:
        (path,) = unroll(differentiated(problem.loss), [problem.start], lr, images, targets, problem.steps)
        return float(trajectory_loss(path[-1], problem.start, problem.target))

    direction = [torch.randn(t.shape, generator=generator).double() for t in (by_images, by_lr, by_targets)]
    point, step = (problem.images, problem.lr, problem.targets), 1e-6
    up = loss_at(*(p + step * d for p, d in zip(point, direction, strict=True)))
    down = loss_at(*(p - step * d for p, d in zip(point, direction, strict=True)))
    slope = sum(float((g * d).sum()) for g, d in zip((by_images, by_lr, by_targets), direction, strict=True))
    assert (up - down) / (2 * step) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("order", ["reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize(("batch", "micro_batch"), [(None, 4), (None, 3), (5, 1), (5, 2)])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("strategy", [STRATEGY, "none"])
def test_pieces_add_up_to_the_whole(
    order: Order, batch: int | None, micro_batch: int, soft: bool, strategy: str
) -> None:
    problem = Problem("ConvNet-2-W6", torch.float64, batch, soft, strategy)
    whole, pieces = problem.adjoint_gradients(order), problem.adjoint_gradients(order, micro_batch)
    assert len(whole) == 3 + soft
    for value, reference in zip(pieces, whole, strict=True):
        assert relative_error(value, reference) < 1e-12


@pytest.mark.parametrize(("batch", "micro_batch"), [(None, None), (5, None), (None, 3)])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", ["ConvNet-2-W6", "ConvNet-2-W6-LN", "ConvNet-1-W6-BN"])
def test_students_together_are_those_one_by_one(
    name: str, batch: int | None, micro_batch: int | None, soft: bool
) -> None:
    problem = Problem(name, torch.float64, batch, soft, STRATEGY)
    arguments = (problem.lr, problem.images, problem.targets, problem.steps)
    thetas = [problem.start, problem.target, problem.start + problem.target]
    loss = differentiated(problem.loss)
    single = [unroll(loss, [theta], *arguments, micro_batch=micro_batch)[0] for theta in thetas]
    for vectorized in (False, True):
        paths = unroll(loss, thetas, *arguments, micro_batch=micro_batch, vectorized=vectorized)
        for path, reference in zip(paths, single, strict=True):
            assert len(path) == STEPS + 1
            for theta, expected in zip(path, reference, strict=True):
                assert theta.shape == expected.shape
                assert torch.equal(theta, expected) or (vectorized and relative_error(theta, expected) < 1e-12)
    # a loser's path is freed when it is let go
    assert len({path[0].untyped_storage().data_ptr() for path in paths}) == 3


def test_batches_are_augmented_in_a_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(images: Tensor, draw: AugmentationDraw) -> Tensor:
        calls.append(draw.operation)
        return augment(images, draw)

    monkeypatch.setattr(trajectory, "augment", counted)
    problem = Problem("ConvNet-2-W6", torch.float64, 5, True, STRATEGY)
    image = problem.images[0].nbytes
    found = {}
    # all at once; 10 images, which are two batches, or three where a short one is among them; none but single ones
    for together, most in ((2**20, 2 * 6), (10 * image, 2 * STEPS), (0, 2 * STEPS)):
        calls.clear()
        monkeypatch.setattr(trajectory, "AUGMENTED_TOGETHER", together)
        found[together] = problem.adjoint_gradients()
        assert len(calls) <= most
        assert len(calls) == 2 * STEPS or together
        assert images_augmented_together(5, STEPS, image) == {2**20: 5 * STEPS, 10 * image: 10, 0: 5}[together]
    for several in found.values():
        for value, reference in zip(several, problem.plain_gradients(), strict=True):
            assert relative_error(value, reference) < 1e-10


def test_every_operation_is_replayed_in_pieces() -> None:
    problem = Problem("ConvNet-2-W6", torch.float64, None, True, STRATEGY)
    assert {step.augmentation.operation for step in problem.steps} == set(STRATEGY.split("_"))
    siamese = [step._replace(augmentation=step.augmentation.part(0, 1)) for step in problem.steps]
    for steps in (problem.steps, siamese):
        problem.steps = steps
        whole = problem.adjoint_gradients()
        for value, reference in zip(problem.adjoint_gradients(micro_batch=3), whole, strict=True):
            assert relative_error(value, reference) < 1e-12


@pytest.mark.parametrize("micro_batch", [8, 100])
def test_one_piece_is_the_whole_bit_for_bit(micro_batch: int) -> None:
    problem = Problem("ConvNet-2-W6", torch.float32, 5, True, STRATEGY)
    whole, pieces = (problem.adjoint_gradients(micro_batch=micro) for micro in (None, micro_batch))
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_pieces_of_a_batch_norm_are_not_the_whole() -> None:
    # which is why FunctionalNetwork tells them apart, and TrajectoryMatching refuses
    problem = Problem("ConvNet-2-W6-BN", torch.float64, None, False, "none")
    whole, pieces = (problem.adjoint_gradients(micro_batch=micro)[1] for micro in (None, 4))
    assert relative_error(pieces, whole) > 1e-3


def test_a_batch_is_cut_into_pieces_with_their_shares() -> None:
    draw = DSA("crop").draw(torch.Generator().manual_seed(0), 7, (8, 8))
    step = InnerStep(torch.tensor([4, 2, 9, 1, 0, 3, 6]), draw)
    shares, parts = zip(*step.pieces(3), strict=True)
    assert shares == (3 / 7, 3 / 7, 1 / 7)
    assert [part.indices.tolist() for part in parts] == [[4, 2, 9], [1, 0, 3], [6]]
    assert torch.equal(torch.cat([part.augmentation.values for part in parts]), draw.values)
    for micro_batch in (None, 7, 8):
        assert step.pieces(micro_batch) == [(1.0, step)]


def test_images_outside_every_batch_have_zero_gradient() -> None:
    problem = Problem("ConvNet-2-W6", torch.float64, 3, False, "none")
    problem.steps = problem.steps[:1]
    _, by_images, _ = problem.adjoint_gradients()
    used = problem.steps[0].indices.tolist()
    assert all((by_images[i].norm() > 0) == (i in used) for i in range(8))


def test_unroll_is_plain_sgd() -> None:
    problem = Problem("ConvNet-2-W6", torch.float64, 3, False, STRATEGY)
    arguments = (problem.lr, problem.images, problem.targets, problem.steps)
    (path,) = unroll(differentiated(problem.loss), [problem.start], *arguments)
    theta = problem.start.clone().requires_grad_()
    sgd = torch.optim.SGD([theta], lr=0.05)
    for here, (indices, draw) in zip(path, problem.steps, strict=False):
        torch.testing.assert_close(here, theta.detach(), rtol=1e-12, atol=1e-14)
        sgd.zero_grad()
        problem.loss(theta, augment(problem.images[indices], draw), problem.targets[indices]).backward()
        sgd.step()
    assert len(path) == STEPS + 1
    assert len({tensor.data_ptr() for tensor in path}) == STEPS + 1


def test_loss_is_one_at_the_start_zero_at_the_target_and_scale_free() -> None:
    start, target, theta = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).double()
    assert float(trajectory_loss(start, start, target)) == 1
    assert float(trajectory_loss(target, start, target)) == 0
    scaled = trajectory_loss(7 * theta, 7 * start, 7 * target)
    torch.testing.assert_close(scaled, trajectory_loss(theta, start, target))
    assert torch.autograd.gradcheck(lambda t: trajectory_loss(t, start, target), theta.requires_grad_())
    (grad,) = torch.autograd.grad(trajectory_loss(theta, start, target), theta)
    torch.testing.assert_close(trajectory_loss_gradient(theta, start, target), grad)


def test_permuted_batches_use_the_last_chunk_first() -> None:
    # 7 images in batches of 3: chunks (3, 3, 1) are used from the back, so the remainder comes first
    generator = torch.Generator().manual_seed(0)
    batches = permuted_batches(7, 3, 5, generator)
    replay = torch.Generator().manual_seed(0)
    first, second = torch.randperm(7, generator=replay), torch.randperm(7, generator=replay)
    expected = [first[6:], first[3:6], first[:3], second[6:], second[3:6]]
    assert [b.tolist() for b in batches] == [e.tolist() for e in expected]


@pytest.mark.parametrize("batch", [None, 7, 100])
def test_permuted_batches_of_the_whole_set_are_permutations(batch: int | None) -> None:
    batches = permuted_batches(7, batch, 4, torch.Generator().manual_seed(0))
    assert [sorted(b.tolist()) for b in batches] == [list(range(7))] * 4
    assert len({tuple(b.tolist()) for b in batches}) == 4
