import pytest
import torch

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import step_generator
from dd_lightning.sets.real import RealSet

LABELS = torch.tensor([2, 0, 1, 2, 2, 0, 1, 0, 2, 0, 1, 1, 1])


def make_set(labels: torch.Tensor = LABELS, num_classes: int = 3) -> RealSet:
    """Image i is filled with i, so an index can be read off an image."""
    images = torch.arange(len(labels), dtype=torch.float32)[:, None, None, None].expand(-1, 2, 4, 5).contiguous()
    return RealSet(images, labels, num_classes)


def test_class_index_matches_a_slow_loop() -> None:
    real = make_set()
    for label in range(3):
        expected = [i for i in range(len(LABELS)) if LABELS[i] == label]
        assert real.class_indices(label).tolist() == expected
        assert real.class_counts[label] == len(expected)
    assert (len(real), real.image_shape, real.num_classes) == (13, (2, 4, 5), 3)


def test_sample_per_class_is_class_major_and_without_repeats() -> None:
    real = make_set()
    for step in range(50):
        chosen = real.sample_per_class(3, step_generator(0, step, "batch"))
        assert real.labels[chosen].tolist() == [0] * 3 + [1] * 3 + [2] * 3
        assert len(set(chosen.tolist())) == 9
    beyond = real.sample_per_class(9, step_generator(0, 0, "batch"))
    assert sorted(beyond.tolist()) == list(range(len(real)))
    whole_class = real.sample_per_class(4, step_generator(0, 0, "batch"))
    assert sorted(whole_class[:4].tolist()) == [1, 5, 7, 9]  # class 0 has exactly four images


def test_sample_per_class_is_uniform() -> None:
    real = make_set()
    draws = 3000
    hits = torch.zeros(len(real))
    for step in range(draws):
        hits[real.sample_per_class(2, step_generator(1, step, "batch"))] += 1
    for label in range(3):
        indices = real.class_indices(label)
        expected = 2 * draws / len(indices)
        # Without replacement a single count has variance draws * p * (1 - p), p = 2 / class size.
        sigma = (expected * (1 - 2 / len(indices))) ** 0.5
        assert (hits[indices] - expected).abs().max() < 4 * sigma


def test_sample_per_class_is_a_function_of_the_generator() -> None:
    real = make_set()
    first, again, other = (real.sample_per_class(2, step_generator(0, step, "batch")) for step in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_leaves_the_global_rng_alone() -> None:
    before = torch.get_rng_state()
    real = make_set()
    real.sample_per_class(2, step_generator(0, 0, "batch"))
    list(real.shuffled_batches(4, step_generator(0, 0, "epoch")))
    assert torch.equal(before, torch.get_rng_state())


def test_shuffled_batches_see_every_image_once() -> None:
    real = make_set()
    batches = list(real.shuffled_batches(5, step_generator(0, 0, "epoch")))
    assert [len(batch) for batch in batches] == [5, 5, 3]
    order = torch.cat(batches).tolist()
    assert sorted(order) == list(range(13))
    assert order != list(range(13))


def test_to_the_same_device_is_the_set_itself() -> None:
    real = make_set()
    assert real.to("cpu") is real
    assert real.to(torch.device("meta")).images.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_generator_gives_the_same_indices_on_the_gpu() -> None:
    real = make_set()
    there = real.to("cuda").sample_per_class(3, step_generator(0, 0, "batch"))
    assert there.device.type == "cuda"
    assert torch.equal(there.cpu(), real.sample_per_class(3, step_generator(0, 0, "batch")))
    drawn_there = step_generator(0, 0, "batch", device=torch.device("cuda"))
    assert real.to("cuda").sample_per_class(3, drawn_there).shape == (9,)


def test_errors_name_the_value_and_the_limit() -> None:
    real = make_set()
    with pytest.raises(InputError, match="images per class is 0; it must be at least 1"):
        real.sample_per_class(0, step_generator(0, 0, "batch"))
    with pytest.raises(InputError, match=r"class 3 of 4 has no image"):
        make_set(num_classes=4)
    lacking = RealSet(real.images, real.labels, 4, complete=False)
    assert lacking.class_counts == (*real.class_counts, 0)
    with pytest.raises(InputError, match=r"labels run from 0 to 2, outside 0 \.\. 1"):
        make_set(num_classes=2)
    with pytest.raises(InputError, match=r"images are torch.uint8 \[1, 1, 2, 2\]"):
        RealSet(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 1)
    with pytest.raises(InputError, match=r"labels are torch.int64 \[3\] for 2 images"):
        RealSet(torch.zeros(2, 1, 2, 2), torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(InputError, match=r"batch_size is 0"):
        real.shuffled_batches(0, step_generator(0, 0, "epoch"))
