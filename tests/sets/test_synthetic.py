"""What the synthetic set's own state says."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation
from dd_lightning.functional.whitening import fit_zca
from dd_lightning.sets.color_spaces import ColorSpace, NormalizedSpace, PixelSpace, ZCARecipe, ZCASpace
from dd_lightning.sets.initial import class_labels
from dd_lightning.sets.synthetic import SyntheticSet


def images(seed: int = 0) -> Tensor:
    return torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


HARD, SOFT = class_labels(3, 2), torch.eye(3).repeat_interleave(2, 0)
SPACES: list[ColorSpace | None] = [
    None,
    PixelSpace(),
    NormalizedSpace(torch.tensor([0.5]), torch.tensor([0.25])),
    ZCASpace(fit_zca(images(9))),
]


def through_a_checkpoint(synthetic: SyntheticSet) -> Any:  # noqa: ANN401
    file = io.BytesIO()
    torch.save(synthetic.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("space", SPACES, ids=lambda space: "none" if space is None else space.kind)
@pytest.mark.parametrize("targets", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("formation", [Formation(), Formation(2, "multi")], ids=["whole", "tiles"])
def test_a_state_is_loaded_and_rebuilds_the_set(
    space: ColorSpace | None, targets: Tensor, formation: Formation
) -> None:
    first = SyntheticSet(images(), targets, 0.03, formation, space)
    state = through_a_checkpoint(first)
    other = SyntheticSet(images(1), targets, 0.5, formation, space)
    other.load_state_dict(state)
    rebuilt = SyntheticSet.from_state(state)
    for again in (other, rebuilt):
        assert {name for name, _ in again.named_parameters()} | {"targets"} == {"images", "targets", "student_lr"}
        assert torch.equal(again.images, first.images)
        assert torch.equal(again.targets, targets)
        assert torch.equal(again.student_lr, first.student_lr)
        assert (again.formation, again.label_kind, again.image_space) == (
            formation,
            first.label_kind,
            first.image_space,
        )
    if isinstance(space, ZCASpace):
        assert isinstance(rebuilt.space, ZCARecipe)
        with pytest.raises(InputError, match="without its whitening matrices"):
            rebuilt.decoded()
        rebuilt.use_space(space)
    for again in (other, rebuilt):
        assert torch.equal(again.decoded(), first.decoded())
        assert torch.equal(again.decoded_targets(), first.decoded_targets())


def test_the_state_of_a_whitened_set_holds_no_matrices() -> None:
    state = through_a_checkpoint(SyntheticSet(images(), HARD, 0.1, space=SPACES[3]))
    assert {name: len(value.flatten()) for name, value in state["_extra_state"]["color_space_tensors"].items()} == {
        "mean": 16,
        "eps": 1,
    }


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (SyntheticSet(images()[:3], class_labels(3, 1), 0.1), r"images is \[6, 1, 4, 4\] .* \[3, 1, 4, 4\]"),
        (SyntheticSet(images(), SOFT, 0.1), "labels is 'hard' .* 'soft'"),
        (SyntheticSet(images(), HARD, 0.1, Formation(2)), "factor is 1 .* 2 in the checkpoint"),
        (SyntheticSet(images(), HARD, 0.1, Formation(1, "multi")), "formation is 'single' .* 'multi'"),
        (SyntheticSet(images(), HARD, 0.1, space=PixelSpace()), "image_space is 'network' .* 'pixels'"),
    ],
)
def test_another_kind_of_set_is_refused(other: SyntheticSet, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SyntheticSet(images(), HARD, 0.1).load_state_dict(other.state_dict())


def test_another_color_space_is_refused() -> None:
    whitened = SyntheticSet(images(), HARD, 0.1, space=SPACES[3])
    others: list[ColorSpace] = [ZCASpace(fit_zca(images(8))), ZCASpace(fit_zca(images(9), 0.2), 0.2)]
    for other in others:
        with pytest.raises(InputError, match="zca color space and a zca one differ"):
            whitened.load_state_dict(SyntheticSet(images(), HARD, 0.1, space=other).state_dict())
        with pytest.raises(InputError, match="zca color space and a zca one differ"):
            whitened.use_space(other)
    with pytest.raises(InputError, match=r"color_space is 'zca' .* 'normalized'"):
        whitened.load_state_dict(SyntheticSet(images(), HARD, 0.1, space=SPACES[2]).state_dict())
    network = SyntheticSet(images(), HARD, 0.1)
    network.use_space(others[0])  # its images live in the networks' space, whichever that is
    assert network.space is None


def test_repr_says_what_it_is() -> None:
    stored = "SyntheticSet(6 images (1, 4, 4), {} labels, stored as {}{})"
    assert repr(SyntheticSet(images(), HARD, 0.1)) == stored.format("hard", "networks see them", "")
    assert repr(SyntheticSet(images(), SOFT, 0.1, Formation(2), SPACES[2])) == stored.format(
        "soft", "pixels, for normalized networks", ", decoded to 24 (single, factor 2)"
    )
