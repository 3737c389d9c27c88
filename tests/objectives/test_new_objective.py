"""A new class-wise objective is a few lines, and complete: with DynaDistill on top, in pieces and compiled."""

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dd_lightning.execution.compile import compiled
from dd_lightning.execution.options import Execution
from dd_lightning.functional.random import step_generator
from dd_lightning.functional.selection import sample_index
from dd_lightning.networks import FunctionalNetwork, build_network
from dd_lightning.objectives import class_statistics
from dd_lightning.objectives.class_statistics import Statistics, Terms
from dd_lightning.objectives.classwise import ClasswiseMatching
from tests import small


@dataclass(kw_only=True, eq=False)
class LogitMatching(ClasswiseMatching):
    """The sum over classes of the squared distance between mean logits, and between their mean squares.

    Args:
        weight: Weight of the mean squares.
    """

    weight: float = 0.5
    batch_real: int = 8
    augmentation: str = "none"

    def statistics(self, network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
        """Return the first two moments of the logits, [C] each."""
        logits = network(theta, images)
        return logits.mean(0), logits.square().mean(0)

    def terms(self, synthetic: Statistics, real: Statistics) -> Terms:
        """Return both distances."""
        first, second = ((own - other).square().sum() for own, other in zip(synthetic, real, strict=True))
        return {"mean_distance": first, "square_distance": self.weight * second}


SEED, STEPS, NETWORKS, CANDIDATES, LR, MOMENTUM = 5, 2, 4, 3, 0.5, 0.5


def run(folder: Path, execution: Execution | None = None) -> tuple[Tensor, Tensor]:
    """Return the images before and after two steps with DynaDistill."""
    objective = LogitMatching(weight=2.0, execution=execution)
    pool = {"num_networks": NETWORKS, "refresh": "none"}
    distilled = small.network_module(pool, objective=objective, image_lr=LR, momentum=MOMENTUM, seed=SEED)
    start = torch.empty(0)

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            nonlocal start
            start = distilled.synthetic_set.images.detach().clone()

    small.fit(folder, distilled, Start(), small.selection(num_candidates=CANDIDATES), steps=STEPS)
    return start, distilled.synthetic_set.images.detach()


def slow_loss(theta: Tensor, images: Tensor, step: int) -> Tensor:
    """Match every class with an ordinary module, image by image."""
    module = build_network(small.NETWORK, small.SHAPE[0], small.CLASSES, small.SHAPE[1:])
    nn.utils.vector_to_parameters(theta, module.parameters())
    real, total = small.data().train, torch.zeros(())
    for label in range(small.CLASSES):
        order = torch.randperm(30, generator=step_generator(SEED, step // 3, f"real/{label}"))[8 * (step % 3) :][:8]
        rows = (real.labels == label).nonzero().flatten()[order]
        own = [module(image[None])[0] for image in images[2 * label : 2 * label + 2]]
        other = [module(image[None])[0] for image in real.images[rows]]
        for power, weight in ((1, 1.0), (2, 2.0)):
            means = [sum(logits**power for logits in side) / len(side) for side in (own, other)]
            total = total + weight * ((means[0] - means[1].detach()) ** 2).sum()
    return total


def slow_run(images: Tensor) -> Tensor:
    """Distill two steps by the equations of DynaDistill and of SGD."""
    network = FunctionalNetwork(small.NETWORK, small.SHAPE, small.CLASSES)
    velocity = torch.zeros_like(images)
    for step in range(STEPS):
        drawn = torch.randperm(NETWORKS, generator=step_generator(SEED, step, "candidates"))[:CANDIDATES].tolist()
        seeds = [step_generator(SEED, 0, f"network-{index}/initial").initial_seed() for index in drawn]
        leaf = images.clone().requires_grad_()
        losses = [slow_loss(network.initial(seed), leaf, step) for seed in seeds]
        weights = torch.stack(losses).detach().double().div(0.5).exp()
        chosen = sample_index(weights / weights.sum(), step_generator(SEED, step, "selection"))
        velocity = MOMENTUM * velocity + torch.autograd.grad(losses[chosen], leaf)[0]
        images = images - LR * velocity
    return images


def test_it_is_at_most_forty_lines() -> None:
    assert len(inspect.getsource(LogitMatching).splitlines()) <= 40


def test_with_dynadistill_it_is_the_slow_loop(tmp_path: Path) -> None:
    start, found = run(tmp_path)
    torch.testing.assert_close(found, slow_run(start), rtol=1e-4, atol=1e-5)
    assert float((found - start).norm()) > 1e-2


@pytest.mark.parametrize("execution", [{"micro_batch": 3}, {"compile": "on"}], ids=str)
def test_it_runs_in_pieces_and_compiled(
    execution: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_statistics, "compiled", partial(compiled, backend="eager"))
    whole = run(tmp_path)[1]
    torch.testing.assert_close(run(tmp_path, Execution(**execution))[1], whole, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
