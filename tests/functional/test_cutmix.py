import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.cutmix import CutMixDraw, cutmix, draw_cutmix, label_logits
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.losses import classification_loss

BATCH, SIZE, CLASSES = 6, (8, 12), 4


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(count: int, size: tuple[int, int] = SIZE, batch: int = BATCH) -> list[CutMixDraw]:
    generator = seeded(1)
    draws = [draw_cutmix(generator, batch, size, 1.0) for _ in range(count)]
    return [draw for draw in draws if draw is not None]


def batch_of(soft: bool) -> tuple[Tensor, Tensor]:
    images = torch.randn(BATCH, 3, *SIZE, generator=seeded(2), dtype=torch.float64)
    logits = 3 * torch.randn(BATCH, CLASSES, generator=seeded(3), dtype=torch.float64)
    return images, logits if soft else logits.argmax(1)


def slow_box(uniforms: list[float], size: tuple[int, int]) -> tuple[int, ...]:
    """The box, axis by axis, from the description of the method."""
    own, row, column = uniforms
    limits = []
    for length, center in ((size[0], math.floor(row * size[0])), (size[1], math.floor(column * size[1]))):
        half = math.floor(math.floor(length * math.sqrt(1 - own)) / 2)
        inside = [pixel for pixel in range(length) if center - half <= pixel < center + half]
        limits.append((inside[0], inside[-1] + 1) if inside else (center, center))
    return (*limits[0], *limits[1])


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (32, 32), (1, 1)])
def test_draws_equal_the_description(size: tuple[int, int]) -> None:
    generator, by_hand = seeded(4), seeded(4)
    for _ in range(200):
        draw = draw_cutmix(generator, BATCH, size, 0.5)
        chance, *uniforms = torch.rand(4, generator=by_hand, dtype=torch.float64).tolist()
        permutation = torch.randperm(BATCH, generator=by_hand)
        assert (draw is not None) == (chance < 0.5)
        if draw is not None:
            assert draw.box == slow_box(uniforms, size)
            area = (draw.box[1] - draw.box[0]) * (draw.box[3] - draw.box[2])
            assert draw.ratio == pytest.approx(1 - area / (size[0] * size[1]), abs=1e-15)
            assert torch.equal(draw.permutation, permutation)
    assert torch.equal(generator.get_state(), by_hand.get_state())


def test_distribution() -> None:
    length, count = 64, 4000
    draws = drawn(count, (length, length))
    boxes = torch.tensor([draw.box for draw in draws])
    sides = torch.stack([boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]], 1).double()
    assert int(boxes.min()) == 0
    assert int(boxes.max()) == length
    # Side s = n sqrt(1 - lambda) about a uniform center; what is inside has the mean s - s^2 / (4 n), and
    # E sqrt(1 - lambda) = 2/3, E (1 - lambda) = 1/2. Rounding down costs a pixel on average.
    expected = length * (2 / 3 - 1 / 8) - 1
    assert sides.mean(0).tolist() == pytest.approx([expected, expected], abs=0.6)
    assert float(torch.corrcoef(sides.T)[0, 1]) > 0.5  # one lambda for both axes
    firsts = torch.bincount(torch.stack([draw.permutation for draw in draws])[:, 0], minlength=BATCH)
    assert (firsts / count).tolist() == pytest.approx([1 / BATCH] * BATCH, abs=0.02)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_probability_and_constant_consumption(probability: float) -> None:
    generator, other = seeded(5), seeded(5)
    mixed = [draw_cutmix(generator, BATCH, SIZE, probability) is not None for _ in range(2000)]
    assert sum(mixed) / len(mixed) == pytest.approx(probability, abs=0.03)
    always = [draw_cutmix(other, BATCH, SIZE, 1.0) for _ in range(2000)]
    assert torch.equal(generator.get_state(), other.get_state())
    again = seeded(5)
    for expected in always:
        found = draw_cutmix(again, BATCH, SIZE, probability)
        assert found is None or (expected is not None and found.box == expected.box)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_images_equal_the_slow_loop(soft: bool) -> None:
    images, targets = batch_of(soft)
    untouched = images.clone()
    for draw in drawn(30):
        mixed, _ = cutmix(images, targets, draw, CLASSES)
        top, bottom, left, right = draw.box
        expected = images.clone()
        for i, partner in enumerate(draw.permutation.tolist()):
            for row in range(top, bottom):
                for column in range(left, right):
                    expected[i, :, row, column] = images[partner, :, row, column]
        assert torch.equal(mixed, expected)
        assert torch.equal(images, untouched)


def edges() -> list[CutMixDraw]:
    """An empty box, and one that is the whole image: one of the two labels has no weight."""
    permutation = torch.tensor([1, 2, 3, 4, 5, 0])
    return [CutMixDraw(permutation, (3, 3, 2, 5), 1.0), CutMixDraw(permutation, (0, 8, 0, 12), 0.0)]


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_loss_is_the_weighted_sum_and_so_is_its_gradient(soft: bool) -> None:
    images, targets = batch_of(soft)
    for draw in drawn(20) + edges():
        _, labels = cutmix(images, targets, draw, CLASSES)
        logits = torch.randn(BATCH, CLASSES, generator=seeded(6), dtype=torch.float64).requires_grad_()
        found = classification_loss(logits, labels)
        own, partner = (classification_loss(logits, t) for t in (targets, targets[draw.permutation]))
        expected = draw.ratio * own + (1 - draw.ratio) * partner
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        (gradient,), (expected_gradient,) = (torch.autograd.grad(value, logits) for value in (found, expected))
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_softmax_is_the_mixture(soft: bool) -> None:
    images, targets = batch_of(soft)
    distribution = targets.softmax(1) if soft else F.one_hot(targets, CLASSES).double()
    for draw in drawn(5) + edges():
        _, labels = cutmix(images, targets, draw, CLASSES)
        expected = draw.ratio * distribution + (1 - draw.ratio) * distribution[draw.permutation]
        torch.testing.assert_close(labels.softmax(1), expected, rtol=0, atol=1e-14)
        assert torch.equal(labels == -math.inf, expected == 0)


def test_gradients_reach_images_and_soft_labels() -> None:
    images, targets = batch_of(soft=True)
    (draw,) = drawn(1)
    assert torch.autograd.gradcheck(
        lambda i, t: cutmix(i, t, draw, CLASSES), (images.requires_grad_(), targets.requires_grad_())
    )


def test_label_logits() -> None:
    _, hard = batch_of(soft=False)
    logits = torch.randn(BATCH, CLASSES, generator=seeded(7), dtype=torch.float64).requires_grad_()
    converted = label_logits(hard, CLASSES, torch.float64)
    assert torch.equal(converted.softmax(1), F.one_hot(hard, CLASSES).double())
    soft, indexed = (classification_loss(logits, targets) for targets in (converted, hard))
    torch.testing.assert_close(soft, indexed, rtol=0, atol=1e-12)
    (first,), (second,) = (torch.autograd.grad(value, logits) for value in (soft, indexed))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    assert label_logits(hard, CLASSES, torch.float32).dtype == torch.float32
    assert label_logits(logits, CLASSES, torch.float32) is logits
    with pytest.raises(RuntimeError, match="out of bounds"):
        label_logits(torch.tensor([CLASSES]), CLASSES, torch.float32)


def test_nothing_but_the_generator_is_touched() -> None:
    before, generator = torch.get_rng_state(), seeded(8)
    images, targets = batch_of(soft=False)
    for _ in range(10):
        draw = draw_cutmix(generator, BATCH, SIZE, 1.0)
        assert draw is not None
        cutmix(images, targets, draw, CLASSES)
    assert torch.equal(torch.get_rng_state(), before)


def test_errors() -> None:
    images, targets = batch_of(soft=True)
    (draw,) = drawn(1)
    with pytest.raises(InputError, match=r"probability is 1\.5; it must be at least 0 and at most 1"):
        draw_cutmix(seeded(0), BATCH, SIZE, 1.5)
    with pytest.raises(InputError, match="batch is 0; it must be at least 1"):
        draw_cutmix(seeded(0), 0, SIZE, 0.5)
    with pytest.raises(InputError, match="drawn for 6 samples, got 5"):
        cutmix(images[:5], targets[:5], draw, CLASSES)
    with pytest.raises(InputError, match=r"not drawn for images of size \(8, 11\)"):
        cutmix(images[..., :11], targets, edges()[1], CLASSES)
    with pytest.raises(InputError, match=r"label logits have shape \(6, 4\), but there are 5 classes"):
        cutmix(images, targets, draw, CLASSES + 1)
