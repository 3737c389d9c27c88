import pytest
import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import step_generator
from dd_lightning.functional.whitening import fit_zca
from dd_lightning.sets.color_spaces import (
    ColorSpace,
    NormalizedSpace,
    PixelSpace,
    ZCARecipe,
    ZCASpace,
    color_space_from_tensors,
    recipe,
    same_space,
)


def pixels(count: int = 64) -> Tensor:
    return torch.rand(count, 3, 4, 4, generator=step_generator(0, 0, "pixels"))


def spaces() -> list[ColorSpace]:
    return [
        PixelSpace(),
        NormalizedSpace(torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.2, 0.1])),
        ZCASpace(fit_zca(pixels())),
    ]


@pytest.mark.parametrize("space", spaces(), ids=lambda space: space.kind)
def test_decode_undoes_encode(space: ColorSpace) -> None:
    images = pixels()
    torch.testing.assert_close(space.decode(space.encode(images)), images, atol=2e-5, rtol=0)
    beyond = torch.full_like(images, 3.0)
    torch.testing.assert_close(space.decode(space.encode(beyond)), beyond, atol=2e-5, rtol=2e-5)  # not clamped


@pytest.mark.parametrize("space", spaces(), ids=lambda space: space.kind)
def test_tensors_rebuild_the_space(space: ColorSpace) -> None:
    rebuilt = color_space_from_tensors(space.kind, space.tensors())
    assert type(rebuilt) is type(space)
    assert torch.equal(rebuilt.encode(pixels()), space.encode(pixels()))
    assert torch.equal(rebuilt.decode(pixels()), space.decode(pixels()))


def test_normalized_by_hand() -> None:
    space = NormalizedSpace(torch.tensor([0.5, 0.0]), torch.tensor([0.25, 2.0]))
    images = torch.tensor([1.0, 1.0])[None, :, None, None]
    assert space.encode(images).flatten().tolist() == [2.0, 0.5]  # (1 - .5) / .25 and (1 - 0) / 2
    assert space.encode(images.double()).dtype == torch.float64


@pytest.mark.parametrize("space", spaces(), ids=lambda space: space.kind)
def test_a_recipe_names_its_space_and_no_other(space: ColorSpace) -> None:
    described = color_space_from_tensors(space.kind, recipe(space))
    assert same_space(described, space)
    assert same_space(space, described)
    assert sum(same_space(described, other) for other in spaces()) == 1
    for name, tensor in recipe(space).items():
        for change, same in ((1e-7, True), (1e-2, False)):  # rounding; another data set
            other = color_space_from_tensors(space.kind, recipe(space) | {name: tensor + change})
            assert same_space(other, space) == same


def test_a_whitening_without_matrices_is_small_and_cannot_whiten() -> None:
    space = ZCASpace(fit_zca(pixels(), eps=0.25), eps=0.25)
    described = color_space_from_tensors("zca", recipe(space))
    assert isinstance(described, ZCARecipe)
    assert {name: tuple(tensor.shape) for name, tensor in described.tensors().items()} == {"mean": (48,), "eps": ()}
    assert described.eps == 0.25
    for function in (described.encode, described.decode):
        with pytest.raises(InputError, match=r"2 images .* without its whitening matrices"):
            function(torch.zeros(2, 3, 4, 4))


def test_errors() -> None:
    with pytest.raises(InputError, match=r"'hsv'; use one of pixel, normalized, zca"):
        color_space_from_tensors("hsv", {})
    with pytest.raises(InputError, match=r"'zca' needs mean, whiten, unwhiten; add unwhiten"):
        color_space_from_tensors("zca", {"mean": torch.zeros(1), "whiten": torch.eye(1)})
    with pytest.raises(InputError, match=r"must be positive: use 1 for a constant channel"):
        NormalizedSpace(torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(InputError, match=r"mean \[2\] and std \[3\]"):
        NormalizedSpace(torch.zeros(2), torch.ones(3))
    with pytest.raises(InputError, match=r"shapes \[\[4\], \[4, 4\], \[2, 8\]\], not \[D\], \[D, D\], \[D, D\]"):
        color_space_from_tensors("zca", {"mean": torch.zeros(4), "whiten": torch.eye(4), "unwhiten": torch.ones(2, 8)})
