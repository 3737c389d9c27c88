"""Selection probabilities worked by hand, and the draw's frequencies."""

import math

import pytest
import torch

from dd_lightning.functional.selection import entropy, sample_index, selection_probabilities

LOSSES = torch.tensor([0.9, 1.0, 1.3])


def test_three_candidates_by_hand() -> None:
    # temperature 0.5: exp(1.8), exp(2.0), exp(2.6)
    weights = [math.exp(1.8), math.exp(2.0), math.exp(2.6)]
    expected = [w / sum(weights) for w in weights]
    assert selection_probabilities(LOSSES).tolist() == pytest.approx(expected, rel=1e-6)
    weights = [math.exp(-1.8), math.exp(-2.0), math.exp(-2.6)]
    expected = [w / sum(weights) for w in weights]
    assert selection_probabilities(LOSSES, favor="low_loss").tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("normalize", ["none", "mean", "zscore"])
@pytest.mark.parametrize("favor", ["high_loss", "low_loss"])
def test_sum_limits_and_order(favor: str, normalize: str) -> None:
    p = selection_probabilities(LOSSES, 0.5, favor, normalize)  # type: ignore[arg-type]
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    rising = p.tolist() == sorted(p.tolist())
    assert rising == (favor == "high_loss")
    hot = selection_probabilities(LOSSES, 1e9, favor, normalize)  # type: ignore[arg-type]
    assert hot.tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)
    cold = selection_probabilities(LOSSES, 1e-4, favor, normalize)  # type: ignore[arg-type]
    assert int(cold.argmax()) == (2 if favor == "high_loss" else 0)
    assert float(cold.max()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("normalize", ["mean", "zscore"])
def test_normalized_choices_do_not_depend_on_the_scale(normalize: str) -> None:
    small = selection_probabilities(LOSSES, normalize=normalize)  # type: ignore[arg-type]
    large = selection_probabilities(1000 * LOSSES.double(), normalize=normalize)  # type: ignore[arg-type]
    torch.testing.assert_close(small, large, rtol=1e-5, atol=0)
    equal = selection_probabilities(torch.full((4,), 3.0), normalize=normalize)  # type: ignore[arg-type]
    assert equal.tolist() == pytest.approx([0.25] * 4)


def test_draw_frequencies_match_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sample_index(p, generator) for _ in range(4000)]), minlength=4)
    assert counts[1] == 0
    kept = p > 0
    chi_squared = (((counts - 4000 * p) ** 2)[kept] / (4000 * p[kept])).sum()
    assert float(chi_squared) < 13.8  # 99.9 % quantile at 2 degrees of freedom


def test_entropy_counts_candidates() -> None:
    assert float(entropy(torch.full((8,), 1 / 8)).exp()) == pytest.approx(8, rel=1e-6)
    assert float(entropy(torch.tensor([0.0, 1.0, 0.0]))) == 0
