import torch
from sklearn.datasets import load_digits

from dd_lightning.datamodules import DigitsDataModule


def test_a_stratified_fifth_is_the_test_set() -> None:
    data = DigitsDataModule(color_space="pixel")
    totals = torch.bincount(torch.from_numpy(load_digits().target).long()).tolist()
    assert sum(totals) == 1797
    assert data.test.class_counts == tuple(int(0.2 * total + 0.5) for total in totals)
    both = zip(data.train.class_counts, data.test.class_counts, strict=True)
    assert [train + test for train, test in both] == totals
    assert (data.image_shape, data.num_classes, data.name) == ((1, 8, 8), 10, "digits")
    assert data.class_names == tuple("0123456789")


def test_the_images_are_the_published_ones_over_sixteen() -> None:
    data = DigitsDataModule(color_space="pixel", val_fraction=0.25)
    assert data.val is not None
    parts = torch.cat([data.train.images, data.val.images, data.test.images]).flatten(1) * 16
    published = torch.from_numpy(load_digits().data).float()
    assert sorted(map(tuple, parts.tolist())) == sorted(map(tuple, published.tolist()))


def test_split_seed_moves_the_split_and_nothing_else_does() -> None:
    assert torch.equal(DigitsDataModule().test.images, DigitsDataModule(root="elsewhere").test.images)
    assert not torch.equal(DigitsDataModule().test.labels, DigitsDataModule(split_seed=1).test.labels)
    with_val = DigitsDataModule(color_space="pixel", val_fraction=0.5)
    assert torch.equal(with_val.test.images, DigitsDataModule(color_space="pixel").test.images)
