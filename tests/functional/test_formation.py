import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation, FormationKind, decode, decode_targets, pack

KINDS: list[FormationKind] = ["single", "multi"]
SIZES = [(8, 8), (32, 32), (7, 10)]


def random_images(batch: int, channels: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def slow_decode(images: Tensor, formation: Formation, pad: float) -> Tensor:
    """Tiles cut one at a time, each put on a padded canvas of its own and enlarged by torch."""
    channels, height, width = images.shape[1:]
    enlarge = torch.nn.Upsample(size=(height, width), mode="bilinear", align_corners=False)
    factors = [formation.factor] if formation.kind == "single" else list(range(1, formation.factor + 1))
    decoded = []
    for image in images:
        for factor in factors:
            rows, columns = (height + factor - 1) // factor, (width + factor - 1) // factor
            for row in range(0, rows * factor, rows):
                for column in range(0, columns * factor, columns):
                    tile = torch.full((channels, rows, columns), pad, dtype=images.dtype)
                    part = image[:, row : row + rows, column : column + columns]
                    tile[:, : part.shape[1], : part.shape[2]] = part
                    decoded.append(enlarge(tile[None])[0])
    return torch.stack(decoded)


def test_a_4x4_image_by_hand() -> None:
    image = torch.tensor([[0.0, 4, 1, 5], [8, 12, 9, 13], [0, 0, 4, 4], [0, 0, 4, 4]], dtype=torch.float64)
    # Tiles of 2 x 2 enlarged to 4 x 4: output pixel i samples the tile at (i + 1/2) / 2 - 1/2, that is at -1/4, 1/4,
    # 3/4 and 5/4, held within [0, 1]: 0, 1/4, 3/4 and 1.
    # The first tile, [[0, 4], [8, 12]], is 8 y + 4 x: rows 0, 2, 6, 8 and columns 0, 1, 3, 4. The second is that
    # plus 1. The others are constant.
    first = [[0, 1, 3, 4], [2, 3, 5, 6], [6, 7, 9, 10], [8, 9, 11, 12]]
    second = [[pixel + 1 for pixel in row] for row in first]
    tiles = decode(image.view(1, 1, 4, 4), Formation(2))[:, 0]
    assert tiles.tolist() == [first, second, [[0] * 4] * 4, [[4] * 4] * 4]
    both = decode(image.view(1, 1, 4, 4), Formation(2, "multi"))[:, 0]
    assert both.tolist() == [image.tolist(), *tiles.tolist()]


def test_a_padded_3x3_image_by_hand() -> None:
    image = torch.arange(9.0, dtype=torch.float64).view(1, 1, 3, 3)
    # Tiles of 2 x 2; the last one is [[8, pad], [pad, pad]]. Three output pixels sample at -1/6, 1/2 and 7/6, that is
    # at 0, 1/2 and 1 within the tile.
    last = decode(image, Formation(2), pad=4.0)[3, 0]
    assert last.tolist() == [[8, 6, 4], [6, 5, 4], [4, 4, 4]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 2, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_equals_enlarging_tiles_cut_by_hand(size: tuple[int, int], factor: int, kind: FormationKind) -> None:
    images, formation = random_images(3, 2, size), Formation(factor, kind)
    decoded = decode(images, formation, pad=0.5)
    assert len(decoded) == 3 * formation.per_image
    torch.testing.assert_close(decoded, slow_decode(images, formation, 0.5), rtol=0, atol=1e-12)
    single = decode(images.float(), formation, pad=0.5)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), decoded, rtol=0, atol=2e-6)


def test_factor_1_is_the_images_themselves() -> None:
    images = random_images(2, 3, (4, 5))
    for kind in KINDS:
        assert decode(images, Formation(1, kind)) is images
        assert pack(images, Formation(1, kind)) is images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "factor"), [((4, 4), 2), ((3, 5), 2), ((5, 4), 3)])
def test_derivatives(size: tuple[int, int], factor: int, kind: FormationKind) -> None:
    formation = Formation(factor, kind)

    def curved(images: Tensor) -> Tensor:
        return decode(images, formation, pad=0.5).square()

    images = random_images(1, 2, size).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decode(x, formation, pad=0.5), images, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(curved, images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "factor"), [((8, 8), 2), ((32, 32), 3), ((7, 10), 3)])
def test_backward_is_the_adjoint(size: tuple[int, int], factor: int, kind: FormationKind) -> None:
    images, formation = random_images(2, 3, size).requires_grad_(), Formation(factor, kind)
    decoded = decode(images, formation)
    cotangent = random_images(len(decoded), 3, size, seed=1)
    (pulled,) = torch.autograd.grad(decoded, images, cotangent)
    torch.testing.assert_close((decoded * cotangent).sum(), (images * pulled).sum(), rtol=1e-12, atol=1e-12)


def test_the_graph_holds_no_interpolation() -> None:
    # The backward of a bilinear interpolation is not reproducible on CUDA.
    names, queue = set(), [decode(random_images(1, 1, (7, 7)).requires_grad_(), Formation(3, "multi")).grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            names.add(node.name())
            queue += [parent for parent, _ in node.next_functions]
    assert any("Bmm" in name or "Mm" in name for name in names)
    assert not any(word in name for name in names for word in ("Upsample", "Index", "Gather", "Scatter", "Grid"))


@pytest.mark.gpu
def test_cuda_backward_is_reproducible_and_equals_the_host() -> None:
    formation, cotangent = Formation(3, "multi"), random_images(8 * 14, 3, (32, 32), seed=1)
    gradients: list[Tensor] = []
    for device in ("cpu", "cuda", "cuda"):
        images = random_images(8, 3, (32, 32)).to(device).requires_grad_()
        gradients += torch.autograd.grad(decode(images, formation, pad=0.5), images, cotangent.to(device))
    assert torch.equal(gradients[1], gradients[2])
    torch.testing.assert_close(gradients[1].cpu(), gradients[0], rtol=0, atol=1e-12)


def test_vmap_equals_the_loop() -> None:
    stacks = torch.stack([random_images(2, 3, (7, 8), seed) for seed in range(3)])
    for kind in KINDS:
        formation = Formation(3, kind)
        mapped = torch.func.vmap(lambda images, formation=formation: decode(images, formation, pad=0.5))(stacks)
        looped = torch.stack([decode(images, formation, pad=0.5) for images in stacks])
        torch.testing.assert_close(mapped, looped, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_constant_images_stay_constant(size: tuple[int, int], factor: int, kind: FormationKind) -> None:
    images = torch.full((2, 3, *size), 0.3, dtype=torch.float64)
    decoded = decode(images, Formation(factor, kind), pad=0.3)
    torch.testing.assert_close(decoded, torch.full_like(decoded, 0.3), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "factor"), [((8, 8), 2), ((6, 12), 3), ((12, 24), 4)])
def test_affine_maps_of_pixels_commute_with_decoding(size: tuple[int, int], factor: int, kind: FormationKind) -> None:
    # So whitened and raw images may be decoded alike; where nothing is padded, `pad` plays no part.
    images, formation = random_images(2, 3, size), Formation(factor, kind)
    torch.testing.assert_close(
        decode(images * 1.7 - 0.4, formation, pad=9.0), decode(images, formation) * 1.7 - 0.4, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_pack_puts_nearest_pixels_where_decode_cuts(size: tuple[int, int], factor: int) -> None:
    images = random_images(2 * factor**2, 3, size)
    packed = pack(images, Formation(factor))
    assert packed.shape == (2, 3, *size)
    assert torch.equal(packed, pack(images, Formation(factor, "multi")))
    rows, columns = (-(-length // factor) for length in size)
    for index, shrunk in enumerate(F.interpolate(images, size=(rows, columns))):
        stored, tile = divmod(index, factor**2)
        top, left = tile // factor * rows, tile % factor * columns
        place = packed[stored, :, top : top + rows, left : left + columns]
        assert torch.equal(place, shrunk[:, : place.shape[1], : place.shape[2]])


def test_pack_by_hand() -> None:
    # Pixel 2i of every axis is the nearest that F.interpolate picks for factor 2.
    images = torch.arange(64).view(4, 1, 4, 4)
    assert pack(images.float(), Formation(2))[0, 0].tolist() == [
        [0, 2, 16, 18],
        [8, 10, 24, 26],
        [32, 34, 48, 50],
        [40, 42, 56, 58],
    ]


@pytest.mark.parametrize(("size", "factor"), [((8, 8), 2), ((32, 32), 2), ((8, 12), 4), ((6, 9), 3)])
def test_constant_images_survive_packing_and_decoding(size: tuple[int, int], factor: int) -> None:
    formation = Formation(factor)
    levels = torch.arange(2.0 * factor**2, dtype=torch.float64)
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, *size)
    decoded = decode(pack(images, formation), formation)
    # The weights for factors 2 and 4 are binary fractions, and whole numbers are then exact.
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-13 if factor == 3 else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_follow_their_images(kind: FormationKind) -> None:
    formation = Formation(2, kind)
    labels = torch.tensor([5, 2, 9])
    images = labels.double().view(3, 1, 1, 1).expand(3, 1, 4, 4)
    assert torch.equal(decode(images, formation).mean((1, 2, 3)), decode_targets(labels, formation).double())
    soft = F.one_hot(labels, 10).double()
    assert torch.equal(decode_targets(soft, formation).argmax(1), decode_targets(labels, formation))


def test_per_image() -> None:
    assert [Formation(f).per_image for f in (1, 2, 3, 4)] == [1, 4, 9, 16]
    assert [Formation(f, "multi").per_image for f in (1, 2, 3, 4)] == [1, 5, 14, 30]


def test_errors() -> None:
    with pytest.raises(InputError, match="factor is 0; it must be at least 1"):
        Formation(0)
    with pytest.raises(InputError, match="formation is 'bound'; use one of single, multi"):
        Formation(2, "bound")  # type: ignore[arg-type]
    images = random_images(9, 1, (2, 8))
    for function in (decode, pack):
        with pytest.raises(InputError, match="factor is 3; it must be at least 1 and at most 2"):
            function(images, Formation(3))
    with pytest.raises(InputError, match=r"cannot pack 9 images with factor 2: .* multiple of 4"):
        pack(images, Formation(2))
