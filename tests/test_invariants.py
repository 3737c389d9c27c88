"""What must not change the images, bit for bit, and what must."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from dd_lightning.callbacks import SyntheticSetWriter
from tests import small

Learned = tuple[Tensor, ...]

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "base": ({}, None),
    "base, advance": ({"refresh": "advance"}, None),
    "redraw": ({}, {"temperature": 0.1}),
    "advance": ({"refresh": "advance"}, {"temperature": 0.1}),
    "every 3": ({}, {"temperature": 0.1, "every_n_steps": 3}),
    "every 3, advance": ({"refresh": "advance"}, {"every_n_steps": 3}),
    "reuse": ({}, {"temperature": 0.1, "refresh_per_step": 1}),
    "reuse, advance": ({"refresh": "advance"}, {"temperature": 0.1, "refresh_per_step": 2}),
    "first step": ({}, {"temperature": 0.01, "score_steps": 1}),
    "reuse, first step, every 2": (
        {},
        {"temperature": 0.1, "refresh_per_step": 1, "score_steps": 1, "every_n_steps": 2},
    ),
    "low loss, growing window": (
        {"current_max_start_epoch": 1, "expansion_steps": 4},
        {"favor": "low_loss", "normalize": "zscore"},
    ),
}


def run(
    store: Path,
    folder: Path,
    variant: str,
    *extra: Callback,
    ckpt_path: Path | None = None,
    **options: Any,  # noqa: ANN401
) -> Learned:
    pool_options, choice = VARIANTS[variant]
    distilled = small.module(store, pool_options, **options)
    callbacks = [small.selection(**choice)] if choice is not None else []
    small.fit(folder, distilled, *callbacks, *extra, ckpt_path=ckpt_path)
    return small.learned(distilled)


@pytest.fixture(scope="module")
def uninterrupted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Learned]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {name: run(store, folder, name) for name in VARIANTS}


def test_variants_differ(uninterrupted: dict[str, Learned]) -> None:
    # Otherwise the equalities below would show nothing.
    images = [learned[0] for learned in uninterrupted.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_one_candidate_is_the_base_method(store: Path, tmp_path: Path, uninterrupted: dict[str, Learned]) -> None:
    for variant in ("base", "base, advance"):
        distilled = small.module(store, VARIANTS[variant][0])
        small.fit(tmp_path, distilled, small.selection(num_candidates=1))
        assert small.same(small.learned(distilled), uninterrupted[variant])


@pytest.mark.parametrize("feedback", [{"refresh_per_step": 1}, {"score_steps": 1}])
def test_one_candidate_is_the_base_method_with_any_feedback(
    store: Path, tmp_path: Path, uninterrupted: dict[str, Learned], feedback: dict[str, int]
) -> None:
    distilled = small.module(store)
    small.fit(tmp_path, distilled, small.selection(num_candidates=1, **feedback))
    assert small.same(small.learned(distilled), uninterrupted["base"])
    assert distilled.distillation.candidate_evaluations == 6


@pytest.mark.parametrize(
    "feedback", [{"refresh_per_step": 3}, {"score_steps": 2}, {"refresh_per_step": 3, "score_steps": 2}]
)
def test_all_of_the_feedback_is_the_method_itself(
    store: Path, tmp_path: Path, uninterrupted: dict[str, Learned], feedback: dict[str, int]
) -> None:
    distilled = small.module(store)
    small.fit(tmp_path, distilled, small.selection(temperature=0.1, **feedback))
    assert small.same(small.learned(distilled), uninterrupted["redraw"])
    assert distilled.distillation.candidate_evaluations == 18


@pytest.mark.parametrize("variant", ["base", "redraw"])
def test_evaluation_changes_nothing(
    store: Path, tmp_path: Path, uninterrupted: dict[str, Learned], variant: str
) -> None:
    for callback in (
        small.evaluation(every_n_steps=1),
        small.evaluation(every_n_steps=4, networks=["ConvNet-2-W4", "ConvNet-1-W4"], num_networks=1),
        small.evaluation(compare_random=True, epochs=1),
        SyntheticSetWriter(every_n_steps=1),
    ):
        assert small.same(run(store, tmp_path, variant, callback), uninterrupted[variant])


@pytest.mark.parametrize("variant", ["base", "advance"])
def test_seed_decides(store: Path, tmp_path: Path, uninterrupted: dict[str, Learned], variant: str) -> None:
    torch.manual_seed(1234)  # the global random state plays no part
    assert small.same(run(store, tmp_path, variant), uninterrupted[variant])
    images, student_lr = run(store, tmp_path, variant, seed=6)
    assert not torch.equal(images, uninterrupted[variant][0])
    assert not torch.equal(student_lr, uninterrupted[variant][1])


@pytest.mark.parametrize("killed_at", [2, 3, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_uninterrupted(
    store: Path, tmp_path: Path, uninterrupted: dict[str, Learned], variant: str, killed_at: int
) -> None:
    with pytest.raises(small.KilledError):
        run(store, tmp_path, variant, small.checkpoints(tmp_path), small.Kill(killed_at))
    last = tmp_path / f"step={killed_at - 1}.ckpt"
    assert not (tmp_path / f"step={killed_at}.ckpt").exists()
    assert small.same(
        run(store, tmp_path, variant, small.checkpoints(tmp_path), ckpt_path=last), uninterrupted[variant]
    )


def test_resumed_in_the_same_objects(store: Path, tmp_path: Path, uninterrupted: dict[str, Learned]) -> None:
    distilled, choice = small.module(store, {"refresh": "advance"}), small.selection(temperature=0.1)
    with pytest.raises(small.KilledError):
        small.fit(tmp_path, distilled, choice, small.checkpoints(tmp_path), small.Kill(4))
    small.fit(tmp_path, distilled, choice, small.checkpoints(tmp_path), ckpt_path=tmp_path / "step=3.ckpt")
    assert small.same(small.learned(distilled), uninterrupted["advance"])


def test_a_finished_run_can_be_extended(store: Path, tmp_path: Path, uninterrupted: dict[str, Learned]) -> None:
    distilled = small.module(store)
    small.fit(tmp_path, distilled, small.checkpoints(tmp_path), steps=4, max_epochs=1)
    for max_epochs in (1, None):  # the command line's, Lightning's
        extended = small.module(store)
        trainer = small.fit(
            tmp_path,
            extended,
            small.checkpoints(tmp_path),
            ckpt_path=tmp_path / "step=4.ckpt",
            steps=6,
            max_epochs=max_epochs,
        )
        assert trainer.global_step == 6
        assert small.same(small.learned(extended), uninterrupted["base"])
