import pytest
import torch

from dd_lightning.functional.errors import InputError
from dd_lightning.sets.splits import stratified_split

LABELS = torch.tensor([0] * 10 + [1] * 25 + [2] * 5)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]


def test_every_class_gives_its_exact_share() -> None:
    kept, held = stratified_split(LABELS, 0.3, seed=0, stream="val split")
    # 0.3 of 10, 25 and 5 are 3, 7.5 and 1.5, halves up: 3, 8 and 2
    assert torch.bincount(LABELS[held]).tolist() == [3, 8, 2]
    assert torch.bincount(LABELS[kept]).tolist() == [7, 17, 3]


def test_the_two_sides_are_disjoint_complete_and_in_order() -> None:
    kept, held = stratified_split(LABELS, 0.4, seed=3, stream="val split")
    assert sorted(kept.tolist() + held.tolist()) == list(range(40))
    assert kept.tolist() == sorted(kept.tolist())
    assert held.tolist() == sorted(held.tolist())


def test_the_choice_follows_seed_and_stream_only() -> None:
    before = torch.get_rng_state()
    first = stratified_split(LABELS, 0.5, seed=0, stream="val split")[1]
    assert torch.equal(first, stratified_split(LABELS, 0.5, seed=0, stream="val split")[1])
    assert not torch.equal(first, stratified_split(LABELS, 0.5, seed=1, stream="val split")[1])
    assert not torch.equal(first, stratified_split(LABELS, 0.5, seed=0, stream="test split")[1])
    assert torch.equal(before, torch.get_rng_state())


def test_each_image_is_held_out_at_the_same_rate() -> None:
    hits = torch.zeros(40)
    for seed in range(1000):
        hits[stratified_split(LABELS, 0.2, seed, "val split")[1]] += 1
    # p = 0.2 for every image: a standard deviation of (1000 * .2 * .8) ** .5 = 12.6
    assert (hits - 200).abs().max() < 4 * 12.6


def test_errors() -> None:
    with pytest.raises(InputError, match="fraction is 1; it must be above 0 and below 1"):
        stratified_split(LABELS, 1.0, 0, "val split")
    with pytest.raises(InputError, match=r"holding out 0.01 of each class takes none of 40 images"):
        stratified_split(LABELS, 0.01, 0, "val split")


def test_a_small_class_limits_only_itself() -> None:
    labels = torch.tensor([0] * 20 + [1] * 3 + [2])
    for fraction, left in ((0.1, [18, 3, 1]), (0.9, [2, 1, 1])):
        kept, held = stratified_split(labels, fraction, 0, "val split")
        assert torch.bincount(labels[kept]).tolist() == left
        assert len(held) == 24 - sum(left)
