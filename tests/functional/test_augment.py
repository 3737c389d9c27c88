import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional import augment as module
from dd_lightning.functional.augment import CUTOUT, DSA, OPERATIONS, AugmentationDraw, augment
from dd_lightning.functional.errors import InputError

# torch compiles its forward-mode rules with its own deprecated compiler, at the first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")

SIZES = [(8, 8), (28, 28), (32, 32)]
OBLONG = [(9, 17), (40, 10), (2, 7)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(batch: int, channels: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, *size, generator=seeded(seed), dtype=torch.float64)


def bilinear(image: Tensor, channel: int, y: float, x: float) -> float:
    height, width = image.shape[-2:]
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                total += weight * float(image[channel, row, column])
    return total


def slow_augment(image: Tensor, operation: str, values: list[float]) -> Tensor:
    """One sample, one pixel at a time; written from the definitions, not from the code under test."""
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            for channel in range(channels):
                if operation == "color":
                    bright = image + values[0]
                    mean_of_pixel = bright.mean(0)
                    saturated = torch.stack([(b - mean_of_pixel) * values[1] + mean_of_pixel for b in bright])
                    level = float(saturated.mean())
                    pixel = (float(saturated[channel, row, column]) - level) * values[2] + level
                elif operation == "crop":
                    source = (row + int(values[0]), column + int(values[1]))
                    inside = 0 <= source[0] < height and 0 <= source[1] < width
                    pixel = float(image[channel, source[0], source[1]]) if inside else 0.0
                elif operation == "cutout":
                    pixel = float(image[channel, row, column])
                    sides = (int(height * CUTOUT + 0.5), int(width * CUTOUT + 0.5))
                    rows = range(int(values[0]) - sides[0] // 2, int(values[0]) - sides[0] // 2 + sides[0])
                    columns = range(int(values[1]) - sides[1] // 2, int(values[1]) - sides[1] // 2 + sides[1])
                    if row in rows and column in columns:
                        pixel = 0.0
                elif operation == "flip":
                    pixel = float(image[channel, row, width - 1 - column if values[0] == 1 else column])
                else:
                    y, x = 2 * row / (height - 1) - 1, 2 * column / (width - 1) - 1
                    if operation == "scale":
                        x, y = values[0] * x, values[1] * y
                    else:
                        cosine, sine = math.cos(values[0]), math.sin(values[0])
                        x, y = cosine * x - sine * y, sine * x + cosine * y
                    pixel = bilinear(image, channel, (y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1))
                result[channel, row, column] = pixel
    return result


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", [(8, 8), (9, 12)])
def test_each_operation_equals_the_slow_loop(operation: str, size: tuple[int, int]) -> None:
    policy = DSA(strategy=operation)
    images = random_images(5, 3, size)
    draw = policy.draw(seeded(1), 5, size)
    pairs = zip(images, draw.values.double().tolist(), strict=True)
    expected = torch.stack([slow_augment(image, operation, values) for image, values in pairs])
    torch.testing.assert_close(augment(images, draw), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(28, 28), (32, 32)])
def test_operations_at_data_set_sizes_equal_the_slow_loop(size: tuple[int, int]) -> None:
    for operation in ("crop", "cutout", "flip", "scale", "rotate"):
        policy = DSA(strategy=operation)
        images = random_images(2, 1, size)
        draw = policy.draw(seeded(2), 2, size)
        for image, values, result in zip(images, draw.values, augment(images, draw), strict=True):
            expected = slow_augment(image, operation, values.double().tolist())
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_operations_by_hand() -> None:
    row = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]] * 2]])
    crop = AugmentationDraw("crop", torch.tensor([[1.0, -1.0]]), (2, 4), (0, 0))
    assert augment(row, crop).tolist() == [[[[0, 1, 2, 3], [0, 0, 0, 0]]]]
    # A 1 x 2 hole centered one past the last column starts at column 4 - 2 // 2 = 3.
    cutout = AugmentationDraw("cutout", torch.tensor([[0.0, 4.0]]), (2, 4), (1, 2))
    assert augment(row, cutout).tolist() == [[[[1, 2, 3, 0], [1, 2, 3, 4]]]]
    # Brightness +1 makes (2, 4); factor 2 about 3 makes (1, 5); contrast 0.5 about 3 makes (2, 4).
    color = AugmentationDraw("color", torch.tensor([[1.0, 2.0, 0.5]]), (1, 1), (0, 0))
    assert augment(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), color).flatten().tolist() == [2, 4]


def torch_resample(images: Tensor, draw: AugmentationDraw) -> Tensor:
    values = draw.values.to(images.dtype)
    if draw.operation == "scale":
        matrices = torch.diag_embed(values)
    else:
        matrices = torch.stack([values.cos(), -values.sin(), values.sin(), values.cos()], -1).view(-1, 2, 2)
    theta = torch.cat([matrices, matrices.new_zeros(len(matrices), 2, 1)], 2).expand(len(images), -1, -1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


@pytest.mark.parametrize("operation", ["scale", "rotate"])
@pytest.mark.parametrize("size", SIZES + OBLONG)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("siamese", [False, True])
def test_affine_equals_torch_forward_and_backward(
    operation: str, size: tuple[int, int], wide: bool, siamese: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(module, "SCALE", 2.5)
        monkeypatch.setattr(module, "ROTATE", 100.0)
    policy = DSA(strategy=operation)
    for seed in range(3):
        draw = policy.draw(seeded(seed), 6, size, siamese)
        images = random_images(6, 2, size, seed).requires_grad_()
        cotangent = random_images(6, 2, size, seed + 100)
        result, expected = augment(images, draw), torch_resample(images, draw)
        assert torch.equal(result, expected)
        (gradient,) = torch.autograd.grad(result, images, cotangent)
        (expected_gradient,) = torch.autograd.grad(expected, images, cotangent)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", ["low", "high"])
@pytest.mark.parametrize("size", SIZES + OBLONG)
def test_gather_window_suffices_at_the_limits(limit: str, size: tuple[int, int]) -> None:
    policy = {name: DSA(strategy=name) for name in ("scale", "rotate")}
    images = random_images(1, 1, size).requires_grad_()
    for operation, values in {
        "scale": [1 / 1.2, 1 / 1.2] if limit == "low" else [1.2, 1.2],
        "rotate": [-math.radians(15.0)] if limit == "low" else [math.radians(15.0)],
    }.items():
        draw = policy[operation].draw(seeded(0), 1, size)._replace(values=torch.tensor([values]))
        cotangent = torch.ones_like(images)
        (gradient,) = torch.autograd.grad(augment(images, draw), images, cotangent)
        (expected,) = torch.autograd.grad(torch_resample(images, draw), images, cotangent)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_square_images_need_only_the_nearest_neighbors() -> None:
    for size in SIZES:
        for operation in ("scale", "rotate"):
            assert DSA(strategy=operation).draw(seeded(0), 1, size).extent == (1, 1)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("siamese", [False, True])
def test_derivatives_of_all_orders_and_modes(operation: str, siamese: bool) -> None:
    draw = DSA(strategy=operation).draw(seeded(3), 2, (4, 5), siamese)
    images = random_images(2, 2, (4, 5)).requires_grad_()

    def apply(x: Tensor) -> Tensor:
        return augment(x, draw)

    assert torch.autograd.gradcheck(apply, images, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: apply(x) ** 2, images)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_function_transforms_agree_with_autograd(operation: str) -> None:
    draw = DSA(strategy=operation).draw(seeded(4), 3, (6, 6))
    sets = random_images(12, 2, (6, 6)).view(4, 3, 2, 6, 6)

    def loss(x: Tensor) -> Tensor:
        return (augment(x, draw) ** 3).sum()

    batched = torch.func.vmap(torch.func.grad(loss))(sets)
    for one, gradient in zip(sets, batched, strict=True):
        leaf = one.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        torch.testing.assert_close(gradient, first.detach(), rtol=0, atol=1e-12)
        tangent = torch.ones_like(one)
        (second,) = torch.autograd.grad(first, leaf, tangent)
        forward_over_reverse = torch.func.jvp(torch.func.grad(loss), (one,), (tangent,))[1]
        torch.testing.assert_close(forward_over_reverse, second, rtol=0, atol=1e-11)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_replay_is_exact_and_float32_agrees_with_float64(operation: str) -> None:
    policy = DSA(strategy=operation)
    images = random_images(4, 3, (8, 8))
    before = images.clone()
    draw = policy.draw(seeded(5), 4, (8, 8))
    again = policy.draw(seeded(5), 4, (8, 8))
    assert torch.equal(draw.values, again.values)
    assert torch.equal(augment(images, draw), augment(images, again))
    assert torch.equal(images, before)
    single = augment(images.float(), draw)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), augment(images, draw), rtol=0, atol=1e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_siamese_gives_every_sample_the_same_parameters(operation: str) -> None:
    policy = DSA(strategy=operation)
    draw = policy.draw(seeded(6), 7, (8, 8), siamese=True)
    assert draw.values.shape[0] == 1
    image = random_images(1, 3, (8, 8))
    results = augment(image.expand(7, -1, -1, -1), draw)
    assert torch.equal(results, results[:1].expand_as(results))
    # Any number of images can share it, and it means the same as the parameters written out per sample.
    images = random_images(4, 3, (8, 8))
    spelt_out = draw._replace(values=draw.values.expand(4, -1))
    torch.testing.assert_close(augment(images, draw), augment(images, spelt_out), rtol=0, atol=1e-14)
    separate = policy.draw(seeded(6), 32, (8, 8)).values
    assert not torch.equal(separate, separate[:1].expand_as(separate))


def test_operations_are_drawn_uniformly() -> None:
    generator, draws = seeded(7), 6000
    counts = Counter(DSA().draw(generator, 1, (8, 8)).operation for _ in range(draws))
    assert set(counts) == set(OPERATIONS)
    chi_square = sum((count - draws / 6) ** 2 / (draws / 6) for count in counts.values())
    assert chi_square < 11.07  # the 95 % point for 5 degrees of freedom


def test_parameter_ranges() -> None:
    count = 20000
    # name, size, bounds per column, and whether the bounds themselves are reached (integers) or approached
    cases: list[tuple[str, tuple[int, int], list[tuple[float, float]]]] = [
        ("color", (32, 32), [(-0.5, 0.5), (0.0, 2.0), (0.5, 1.5)]),
        ("crop", (32, 32), [(-4, 4), (-4, 4)]),
        ("crop", (28, 28), [(-4, 4), (-4, 4)]),  # int(28 / 8 + 0.5)
        ("crop", (8, 64), [(-1, 1), (-8, 8)]),
        ("cutout", (32, 32), [(0, 32), (0, 32)]),  # an even hole, 16 x 16
        ("cutout", (6, 10), [(0, 5), (0, 9)]),  # an odd hole, 3 x 5
        ("flip", (32, 32), [(0, 1)]),
        ("scale", (32, 32), [(1 / 1.2, 1.2), (1 / 1.2, 1.2)]),
        ("rotate", (32, 32), [(-math.radians(15), math.radians(15))]),
    ]
    for operation, size, bounds in cases:
        values = DSA(strategy=operation).draw(seeded(8), count, size).values
        assert values.dtype == torch.float32
        assert values.shape == (count, len(bounds))
        for column, (low, high) in zip(values.unbind(1), bounds, strict=True):
            integral = operation in ("crop", "cutout", "flip")
            tolerance = 0.0 if integral else 1e-3 * (high - low)
            assert low - 1e-6 <= float(column.min()) <= low + tolerance
            assert high - tolerance <= float(column.max()) <= high + 1e-6
            # The mean is the center of the range, to 4 standard errors (at most half the range / sqrt(n)).
            assert abs(float(column.mean()) - (low + high) / 2) < 4 * (high - low) / 2 / math.sqrt(count)
        if len(bounds) > 1:
            assert not torch.equal(values[:, 0], values[:, 1])


def test_cutout_removes_what_the_policy_says() -> None:
    images = torch.ones(2000, 1, 32, 32)
    removed = (augment(images, DSA(strategy="cutout").draw(seeded(9), 2000, (32, 32))) == 0).sum((1, 2, 3))
    assert int(removed.max()) == 16 * 16
    assert int(removed.min()) >= 8 * 8  # centered on a corner


def test_flip_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    for probability in (0.0, 0.25, 0.5, 1.0):
        monkeypatch.setattr(module, "FLIP", probability)
        values = DSA(strategy="flip").draw(seeded(10), 4000, (8, 8)).values
        assert abs(float(values.mean()) - probability) < 0.03


def test_nothing_but_the_generator_is_touched() -> None:
    before = torch.get_rng_state()
    generator = seeded(11)
    for _ in range(50):
        draw = DSA().draw(generator, 2, (8, 8))
        augment(random_images(2, 3, (8, 8)), draw)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), seeded(11).get_state())


def test_none_is_the_identity() -> None:
    images, generator = random_images(2, 3, (8, 8)), seeded(12)
    draw = DSA(strategy="none").draw(generator, 2, (8, 8))
    assert draw.operation == "none"
    assert torch.equal(augment(images, draw), images)
    assert torch.equal(generator.get_state(), seeded(12).get_state())


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("color_blur", r"names 'blur', which is none of color, crop, cutout, flip, scale, rotate"),
        ("", r"names ''"),
        ("flip_flip", r"'flip_flip' names an operation twice: name each at most once"),
    ],
)
def test_policy_errors(strategy: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        DSA(strategy)
    assert "\n" not in str(caught.value)


def test_draw_and_augment_errors() -> None:
    with pytest.raises(InputError, match="batch is 0; it must be at least 1"):
        DSA().draw(seeded(0), 0, (8, 8))
    with pytest.raises(InputError, match="size is 1; it must be at least 2"):
        DSA().draw(seeded(0), 1, (1, 8))
    draw = DSA().draw(seeded(0), 3, (8, 8))
    with pytest.raises(InputError, match=r"size \(8, 8\), got 3 of size \(8, 9\)"):
        augment(torch.zeros(3, 1, 8, 9), draw)
    with pytest.raises(InputError, match=r"drawn for 3 samples .*, got 4"):
        augment(torch.zeros(4, 1, 8, 8), draw)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_cuda_backward_repeats_bit_for_bit(operation: str) -> None:
    draw = DSA(strategy=operation).draw(seeded(13), 64, (32, 32))
    images = random_images(64, 3, (32, 32)).float()
    cotangent = random_images(64, 3, (32, 32), seed=1).float()

    def gradient(device: str) -> Tensor:
        leaf = images.to(device).requires_grad_()
        return torch.autograd.grad(augment(leaf, draw), leaf, cotangent.to(device))[0]

    first = gradient("cuda")
    assert all(torch.equal(first, gradient("cuda")) for _ in range(20))
    torch.testing.assert_close(first.cpu(), gradient("cpu"), rtol=1e-5, atol=1e-5)
