from collections import Counter

import pytest
import torch

from dd_lightning.functional.augment import DSA, OPERATIONS, AugmentationDraw, augment
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.policies import AugmentationPolicy, augment_in_turn

# torch compiles its forward-mode rules with its own deprecated compiler, at the first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")

ALL = "color_crop_cutout_flip_scale_rotate"
SIZE = (8, 12)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(first: AugmentationDraw, second: AugmentationDraw) -> bool:
    rest = first._replace(values=second.values) == second
    return rest and torch.equal(first.values, second.values)


@pytest.mark.parametrize("strategy", [ALL, "color_crop", "none"])
@pytest.mark.parametrize("siamese", [False, True])
def test_dsa_is_dsa_bit_for_bit(strategy: str, siamese: bool) -> None:
    ours, theirs = seeded(1), seeded(1)
    for _ in range(60):
        (draw,) = AugmentationPolicy(strategy).draw(ours, 3, SIZE, siamese)
        assert same(draw, DSA(strategy).draw(theirs, 3, SIZE, siamese))
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize(
    ("strategy", "before", "among", "after"),
    [
        (ALL, ["flip", "color"], {"crop", "scale", "rotate"}, ["cutout"]),
        ("color_crop_flip_scale_rotate", ["flip", "color"], {"crop", "scale", "rotate"}, []),
        ("color_crop_cutout", ["color"], {"crop"}, ["cutout"]),
        ("cutout_flip", ["flip"], set(), ["cutout"]),
        ("rotate_scale", [], {"scale", "rotate"}, []),
    ],
)
@pytest.mark.parametrize("siamese", [False, True])
def test_idc_applies_all_but_one_of_three(
    strategy: str, before: list[str], among: set[str], after: list[str], siamese: bool
) -> None:
    generator, policy = seeded(2), AugmentationPolicy(strategy, "idc")
    chosen: Counter[str] = Counter()
    calls = 600
    for _ in range(calls):
        draws = policy.draw(generator, 5, SIZE, siamese)
        names = [draw.operation for draw in draws]
        middle = [name for name in names if name in ("crop", "scale", "rotate")]
        assert names == before + middle + after
        assert len(middle) == min(len(among), 1)
        chosen.update(middle)
        assert all(draw.values.shape[0] == (1 if siamese else 5) for draw in draws)
    assert set(chosen) == among
    assert all(abs(count / calls - 1 / len(among)) < 0.07 for count in chosen.values())


def test_idc_draws_each_operation_as_dsa_does() -> None:
    generator, by_hand = seeded(3), seeded(3)
    for _ in range(20):
        draws = AugmentationPolicy(ALL, "idc").draw(generator, 4, SIZE)
        which = ("crop", "scale", "rotate")[int(torch.randint(3, (1,), generator=by_hand))]
        expected = [DSA().draw_operation(name, by_hand, 4, SIZE) for name in ("flip", "color", which, "cutout")]
        assert all(same(a, b) for a, b in zip(draws, expected, strict=True))
    assert torch.equal(generator.get_state(), by_hand.get_state())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_ranges_are_those_of_dsa(operation: str) -> None:
    """One operation by either policy: the same extremes."""
    values = {
        name: torch.cat([d.values for d in AugmentationPolicy(operation, name).draw(seeded(4), 4000, SIZE)])
        for name in ("dsa", "idc")
    }
    limits: dict[str, list[tuple[float, float]]] = {
        "color": [(-0.5, 0.5), (0.0, 2.0), (0.5, 1.5)],
        "crop": [(-1, 1), (-2, 2)],
        "cutout": [(0, 8), (0, 12)],
        "flip": [(0, 1)],
        "scale": [(1 / 1.2, 1.2)] * 2,
        "rotate": [(-0.2618, 0.2618)],
    }
    for drawn in values.values():
        for column, (low, high) in zip(drawn.T, limits[operation], strict=True):
            slack = 0.01 * (high - low)
            assert low - 1e-4 <= float(column.min()) <= low + slack
            assert high - slack <= float(column.max()) <= high + 1e-4


def test_siamese_samples_are_treated_alike() -> None:
    image = torch.randn(1, 3, *SIZE, generator=seeded(5))
    policy, generator = AugmentationPolicy(ALL, "idc"), seeded(6)
    shared = augment_in_turn(image.expand(6, -1, -1, -1), policy.draw(generator, 6, SIZE, siamese=True))
    torch.testing.assert_close(shared, shared[:1].expand_as(shared))
    single = augment_in_turn(image.expand(6, -1, -1, -1), policy.draw(generator, 6, SIZE))
    assert all(not torch.allclose(a, b) for i, a in enumerate(single) for b in single[:i])


def test_augment_in_turn_is_one_after_another() -> None:
    images = torch.randn(4, 3, *SIZE, generator=seeded(7), dtype=torch.float64).requires_grad_()
    draws = AugmentationPolicy(ALL, "idc").draw(seeded(8), 4, SIZE)
    first, second, third, last = draws
    expected = augment(augment(augment(augment(images, first), second), third), last)
    found = augment_in_turn(images, draws)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(result.square().sum(), images)[0] for result in (found, expected)))
    assert not torch.allclose(augment_in_turn(images, draws[::-1]), found)
    assert augment_in_turn(images, ()) is images


@pytest.mark.parametrize("operation", ["crop", "cutout"])
def test_the_empty_part_stays_zero(operation: str) -> None:
    """Color comes before the shift and before the hole, though the strategy names it last."""
    images = torch.ones(64, 1, *SIZE)
    draws = AugmentationPolicy(f"{operation}_color", "idc").draw(seeded(9), 64, SIZE)
    assert torch.equal(augment_in_turn(images, draws) == 0, augment(images, draws[-1]) == 0)
    assert not torch.equal(augment_in_turn(images, draws[::-1]) == 0, augment(images, draws[-1]) == 0)


def test_none_draws_nothing() -> None:
    generator = seeded(11)
    assert AugmentationPolicy("none", "idc").draw(generator, 2, SIZE) == ()
    assert AugmentationPolicy("none").draw(generator, 2, SIZE)[0].operation == "none"
    assert torch.equal(generator.get_state(), seeded(11).get_state())


def test_nothing_but_the_generator_is_touched() -> None:
    before = torch.get_rng_state()
    for name in ("dsa", "idc"):
        policy = AugmentationPolicy(ALL, name)
        for step in range(20):
            augment_in_turn(torch.ones(2, 3, *SIZE), policy.draw(seeded(step), 2, SIZE))
    assert torch.equal(torch.get_rng_state(), before)


def test_errors() -> None:
    with pytest.raises(InputError, match=r"policy is 'best'; use one of dsa, idc"):
        AugmentationPolicy(ALL, "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="names 'blur', which is none of"):
        AugmentationPolicy("color_blur", "idc")
    with pytest.raises(InputError, match="batch is 0"):
        AugmentationPolicy(ALL, "idc").draw(seeded(0), 0, SIZE)
    with pytest.raises(InputError, match=r"drawn for 3 samples .*, got 4"):
        augment_in_turn(torch.ones(4, 1, *SIZE), AugmentationPolicy(ALL, "idc").draw(seeded(0), 3, SIZE))


def test_equal_policies_are_equal() -> None:
    assert AugmentationPolicy(ALL, "idc") == AugmentationPolicy(ALL, "idc")
    assert AugmentationPolicy(ALL, "idc") != AugmentationPolicy(ALL, "dsa")
    assert repr(AugmentationPolicy("flip")) == "AugmentationPolicy(strategy='flip', name='dsa')"
