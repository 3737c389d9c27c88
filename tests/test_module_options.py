"""Options of the module that came with matching on live networks: decoding, pixels, clusters, clamping, curves."""

import itertools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dd_lightning.datamodules import DatasetDataModule
from dd_lightning.functional.augment import augment
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation, FormationKind, pack
from dd_lightning.functional.kmeans import representatives
from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import (
    BidirectionalMatching,
    GradientMatching,
    Problem,
    ScoredCandidate,
    TrajectoryMatching,
)
from dd_lightning.objectives.classwise import ClasswiseDraw
from dd_lightning.pools import Candidate, NetworkPool, TrajectoryPool, TrajectorySegment
from dd_lightning.sets.color_spaces import ZCARecipe
from tests import small


class Watch(Callback):
    """Copies of the images after a step, and when it has begun; and of the student's learning rate."""

    def __init__(self) -> None:
        self.initial: Tensor | None = None
        self.begun: list[Tensor] = []
        self.ended: list[Tensor] = []
        self.student_lr: set[float] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        assert isinstance(pl_module, DistillationModule)
        if self.initial is None:
            self.initial = pl_module.synthetic_set.images.detach().clone()
        pl_module.distillation.begin(trainer.global_step)  # once per step, whoever is first
        self.begun.append(pl_module.synthetic_set.images.detach().clone())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        assert isinstance(pl_module, DistillationModule)
        self.ended.append(pl_module.synthetic_set.images.detach().clone())
        self.student_lr.add(float(pl_module.synthetic_set.student_lr.detach()))


def in_pixels(images: Tensor) -> Tensor:
    return small.data().space.decode(images)


@pytest.mark.parametrize(
    ("factor", "formation", "decoded"), [(1, "single", 2), (2, "single", 8), (2, "multi", 10), (3, "single", 18)]
)
@pytest.mark.parametrize("image_space", ["network", "pixels"])
def test_stored_and_decoded_sizes(
    tmp_path: Path,
    factor: int,
    formation: FormationKind,
    decoded: int,
    image_space: Literal["network", "pixels"],
) -> None:
    distilled, watch = small.network_module(factor=factor, formation=formation, image_space=image_space), Watch()
    small.fit(tmp_path, distilled, watch, steps=1)
    synthetic, real = distilled.synthetic_set, small.data().train
    assert synthetic.images.shape == (small.CLASSES * 2, *small.SHAPE)
    assert len(synthetic) == small.CLASSES * 2
    assert distilled.storage.effective_ipc == decoded
    assert synthetic.decoded().shape == (small.CLASSES * decoded, *small.SHAPE)
    assert synthetic.decoded_size == len(synthetic.decoded_targets()) == small.CLASSES * decoded
    assert synthetic.decoded_targets().tolist() == [c for c in range(small.CLASSES) for _ in range(decoded)]
    # it starts from real images, packed; in pixels these are the same images
    chosen = real.sample_per_class(2 * factor**2, step_generator(5, 0, "initial"))
    assert watch.initial is not None
    expected = pack(real.images[chosen], Formation(factor, formation))
    if image_space == "network":
        assert torch.equal(watch.initial, expected)
    else:
        assert torch.equal(watch.initial, in_pixels(expected))
        assert float(watch.initial.min()) > -1e-6
        assert float(watch.initial.max()) < 1 + 1e-6


@pytest.mark.parametrize("options", [{}, {"factor": 2, "image_space": "pixels"}])
def test_cluster_representatives_are_where_it_starts(tmp_path: Path, options: dict[str, Any]) -> None:
    pool = small.network_pool(num_networks=2, pretrain_epochs=1)
    distilled, watch = small.network_module(init="kmeans", pool=pool, **options), Watch()
    small.fit(tmp_path, distilled, watch, steps=1)
    real, factor = small.data().train, options.get("factor", 1)
    theta, generator = pool.load((0,)).theta, step_generator(5, 0, "initial")  # no update before the second step
    chosen = []
    for label in range(small.CLASSES):
        rows = (real.labels == label).nonzero().flatten()
        features = distilled.problem.network.features(theta, real.images[rows])
        chosen.append(rows[representatives(features, 2 * factor**2, generator)])
    expected = pack(real.images[torch.cat(chosen)], Formation(factor))
    assert watch.initial is not None
    assert torch.equal(watch.initial, in_pixels(expected) if "image_space" in options else expected)
    random = real.sample_per_class(2 * factor**2, step_generator(5, 0, "initial"))
    assert not torch.equal(torch.cat(chosen).sort().values, random.sort().values)


@pytest.mark.parametrize("image_space", ["network", "pixels"])
def test_clamped_at_the_start_of_outer_iterations_and_then_only(
    tmp_path: Path, image_space: Literal["network", "pixels"]
) -> None:
    watch, data = Watch(), small.data()
    distilled = small.network_module(
        init="noise", image_space=image_space, inner_loop=3, clamp=True, image_lr=0.5, student_lr_floor=0.001
    )
    small.fit(tmp_path, distilled, watch, steps=8)
    assert watch.initial is not None
    if image_space == "pixels":
        low, high = torch.tensor(0.0), torch.tensor(1.0)
    else:  # what black and white are to the network, in each channel
        mean, std = data.space.tensors()["mean"], data.space.tensors()["std"]
        low, high = (((value - mean) / std).view(-1, 1, 1) for value in (0.0, 1.0))
    outside = []
    for step, (before, begun) in enumerate(zip([watch.initial, *watch.ended], watch.begun, strict=False)):
        outside.append(bool(((before < low) | (before > high)).any()))
        if step in (0, 3, 6):
            assert torch.equal(begun, before.minimum(high).maximum(low))
            assert not torch.equal(begun, before)
        else:
            assert torch.equal(begun, before)
    assert all(outside[step] for step in (0, 2, 3, 5, 6, 7))  # and not clamped where it would matter


def test_whitened_images_have_no_range(tmp_path: Path) -> None:
    whitened = small.data(color_space="zca")
    clamped: dict[str, Any] = {"clamp": True, "inner_loop": 2}
    with pytest.raises(InputError, match=r"^clamp is true, but whitened images have no range .*image_space: pixels"):
        small.fit(tmp_path, small.network_module(**clamped), datamodule=whitened)
    distilled = small.network_module(**clamped, image_space="pixels", image_lr=0.05)
    small.fit(tmp_path, distilled, steps=2, datamodule=small.data(color_space="zca"))
    synthetic = distilled.synthetic_set
    assert torch.equal(synthetic.decoded(), whitened.space.encode(synthetic.images))


def test_the_students_rate_is_not_learned_where_it_plays_no_part(tmp_path: Path) -> None:
    groups: list[int] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            groups.extend(len(group["params"]) for group in trainer.optimizers[0].param_groups)
            held.extend(trainer.optimizers[0].param_groups[0]["params"])

    held: list[Tensor] = []
    distilled, watch = small.network_module(student_lr=0.03, student_lr_lr=1e3), Watch()
    small.fit(tmp_path, distilled, watch, Look(), steps=3)
    assert groups == [1]
    assert held[0] is distilled.synthetic_set.images
    assert watch.student_lr == {float(torch.tensor(0.03))}
    assert not distilled.synthetic_set.student_lr.requires_grad
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(watch.ended))


@pytest.mark.parametrize(("steps", "expected"), [("joint", (0.3, 0.6)), ("per_class", (0.3 * 1.96, 0.216))])
def test_rates_of_the_images(
    tmp_path: Path, steps: Literal["joint", "per_class"], expected: tuple[float, float]
) -> None:
    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            group = trainer.optimizers[0].param_groups[0]
            found.extend([group["lr"], group["momentum"]])

    found: list[float] = []  # per class: 0.3 (1 + 0.6 + 0.36) and 0.6 cubed
    small.fit(tmp_path, small.network_module(image_steps=steps, image_lr=0.3, momentum=0.6), Look(), steps=1)
    assert found == pytest.approx(list(expected))


def test_objectives_and_pools_that_do_not_fit() -> None:
    with pytest.raises(
        InputError,
        match=r"^TrajectoryMatching learns from TrajectorySegment, but NetworkPool gives LiveNetwork; use TrajectoryP",
    ):
        DistillationModule(TrajectoryMatching(), NetworkPool())
    with pytest.raises(InputError, match=r"^TrajectoryMatching learns from TrajectorySegment"):
        DistillationModule(pool=NetworkPool())


def test_default_pools() -> None:
    one = DistillationModule(GradientMatching()).pool
    assert isinstance(one, NetworkPool)
    assert (len(one), one.age_limit, one.refresh, one.pretrain_epochs) == (1, 100, "winner", 0)
    recipe = one.recipe
    assert (recipe.lr, recipe.momentum, recipe.weight_decay, recipe.batch_size) == (0.01, 0.9, 5e-4, 64)
    assert (recipe.images_per_update, recipe.augmentation, recipe.policy) == (2000, "color_crop", "idc")
    assert recipe.cutmix == 0.5
    other = DistillationModule(BidirectionalMatching()).pool
    assert isinstance(other, NetworkPool)
    assert (len(other), other.age_limit, other.refresh, other.pretrain_epochs) == (1, 100, "winner", 1)
    assert isinstance(DistillationModule().pool, TrajectoryPool)


def test_gradient_matching_on_experts_is_at_the_start_of_their_segments(store: Path, tmp_path: Path) -> None:
    watch = Watch()
    objective = GradientMatching(batch_real=8, augmentation="none")
    distilled = small.module(store, objective=objective, image_lr=0.1, momentum=0.0)
    small.fit(tmp_path, distilled, watch, steps=2)
    pool, context, real = distilled.pool, StepContext(5, 1), small.data().train
    assert isinstance(pool, TrajectoryPool)
    expert, epoch = pool.draw(1, context)[0]
    theta = pool.store.rows(expert, [epoch])[0]
    images = watch.begun[1].clone().requires_grad_()
    loss = torch.zeros(())
    for label, drawn in enumerate(
        torch.randperm(30, generator=step_generator(5, 0, f"real/{label}"))[8:16] for label in range(small.CLASSES)
    ):
        rows, own = (real.labels == label).nonzero().flatten()[drawn], slice(2 * label, 2 * label + 2)
        sides = []
        for inputs in (real.images[rows], images[own]):
            leaf = theta.clone().requires_grad_()
            outputs = distilled.problem.network(leaf, inputs)
            targets = torch.full((len(inputs),), label)
            sides.append(torch.autograd.grad(F.cross_entropy(outputs, targets), leaf, create_graph=True)[0])
        convolution = slice(0, 4 * 9)
        assert distilled.problem.network.parameter_shapes[0] == (4, 1, 3, 3)
        loss = loss + (sides[0][convolution].detach() - sides[1][convolution]).square().sum()
    gradient = torch.autograd.grad(loss, images)[0]
    torch.testing.assert_close(watch.ended[1], watch.begun[1] - 0.1 * gradient, rtol=1e-5, atol=1e-6)
    assert float(gradient.norm()) > 1e-3


@pytest.mark.parametrize("formation", ["single", "multi"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_trajectory_matching_through_decoding_is_plain_backpropagation(
    store: Path, tmp_path: Path, formation: FormationKind, labels: Literal["hard", "soft"]
) -> None:
    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})
            if labels == "hard":
                before["synthetic.targets"] = pl_module.get_buffer("synthetic.targets")

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            found.update({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    before: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    distilled = small.module(
        store,
        syn_steps=3,
        factor=2,
        formation=formation,
        labels=labels,
        label_lr=float(labels == "soft"),
        image_space="pixels",
    )
    small.fit(tmp_path, distilled, Look(), steps=1)
    learned = [before[f"synthetic.{name}"] for name in ("images", "student_lr", "targets")]
    images, rate, targets = learned
    leaves = [value.requires_grad_() for value in learned if value.is_floating_point()]
    context = StepContext(seed=5, step=0)
    segment = distilled.pool.load(distilled.pool.draw(1, context)[0])
    assert isinstance(segment, TrajectorySegment)
    tiles = [images[:, :, y : y + 4, x : x + 4] for y in (0, 4) for x in (0, 4)]
    enlarged = [F.interpolate(tile, size=(8, 8), mode="bilinear", align_corners=False) for tile in tiles]
    each = ([images] if formation == "multi" else []) + enlarged
    decoded = small.data().space.encode(torch.stack(each, dim=1).flatten(0, 1))
    decoded_targets = torch.stack([targets] * len(each), dim=1).flatten(0, 1)
    theta = segment.start.clone().requires_grad_()
    for indices, draw in distilled.objective.draw(distilled.problem, lambda: segment, context):
        outputs = distilled.problem.network(theta, augment(decoded[indices], draw))
        loss = classification_loss(outputs, decoded_targets[indices])
        theta = theta - rate * torch.autograd.grad(loss, theta, create_graph=True)[0]
    matching = (theta - segment.target).square().sum() / (segment.start - segment.target).square().sum()
    expected = torch.autograd.grad(matching, leaves)
    assert len(expected) == (2 if labels == "hard" else 3) == len(found)
    for name, gradient in zip(("images", "student_lr", "targets"), expected, strict=False):
        assert float((found[f"synthetic.{name}"] - gradient).norm() / gradient.norm()) < 1e-4


class Chooser(GradientMatching):
    """Keeps what representatives would be chosen with, and what each step learned from."""

    def __init__(self) -> None:
        super().__init__(batch_real=8)
        self.references: list[Candidate] = []
        self.winners: list[Candidate] = []

    def draw(self, problem: Problem, reference: Callable[[], Candidate], context: StepContext) -> ClasswiseDraw:
        self.references.append(reference())
        return super().draw(problem, reference, context)

    def loss(self, problem: Problem, scored: ScoredCandidate) -> Tensor:
        self.winners.append(scored.candidate)
        return super().loss(problem, scored)


@pytest.mark.parametrize("resumed", [False, True])
def test_representatives_are_chosen_with_the_previous_steps_network_as_it_is_now(tmp_path: Path, resumed: bool) -> None:
    def fit(objective: Chooser, steps: int, ckpt_path: Path | None = None) -> None:
        distilled = small.network_module({"num_networks": 3, "age_limit": None}, objective=objective)
        callbacks = small.selection(), small.checkpoints(tmp_path)
        small.fit(tmp_path, distilled, *callbacks, steps=steps, ckpt_path=ckpt_path)

    chooser = Chooser()
    fit(chooser, 4 if resumed else 6)
    references, winners = chooser.references, chooser.winners
    if resumed:
        again = Chooser()
        fit(again, 6, tmp_path / "step=4.ckpt")
        references, winners = references + again.references, winners + again.winners
    assert len(references) == len(winners) == 6
    assert references[0].key == (int(torch.randperm(3, generator=step_generator(5, 0, "candidates"))[0]), 0)
    assert [reference.key for reference in references[1:]] == [winner.key for winner in winners[:-1]]
    assert len({winner.key for winner in winners}) > 1
    for reference, before in zip(references[1:], winners, strict=False):
        assert not torch.equal(reference.theta, before.theta)  # it has been trained since
    for step, winner in enumerate(winners[1:], 1):
        if winner.key == references[step].key:
            assert torch.equal(winner.theta, references[step].theta)


def events(folder: Path, distilled: DistillationModule, *callbacks: Callback, steps: int) -> EventAccumulator:
    logger = TensorBoardLogger(str(folder), name="run", default_hp_metric=False)
    small.fit(folder, distilled, *callbacks, steps=steps, logger=logger)
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    return found


def curve(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_curves_by_outer_iteration(tmp_path: Path) -> None:
    points = small.evaluation(every_n_steps=2)
    found = events(tmp_path, small.network_module(inner_loop=3), points, steps=7)
    by_step = dict(curve(found, "distill/loss"))
    assert list(by_step) == list(range(7))
    assert curve(found, "outer/loss") == [(0, by_step[0]), (1, by_step[3]), (2, by_step[6])]
    for tag in (f"accuracy/{small.NETWORK}", *(f"evaluation/{small.NETWORK}/{name}" for name in ("std", "best"))):
        at = dict(curve(found, tag))
        assert list(at) == [0, 2, 4, 6, 7]
        assert curve(found, f"outer/{tag}") == [(0, at[0]), (2, at[6])]
    means = [value for _, value in curve(found, f"accuracy/{small.NETWORK}")]
    assert means == pytest.approx([point.result.mean for point in points.points], rel=1e-6)


def test_without_an_inner_loop_there_are_no_outer_curves(tmp_path: Path) -> None:
    found = events(tmp_path, small.network_module(), small.evaluation(), steps=2)
    assert not [tag for tag in found.Tags()["scalars"] if "outer" in tag]


def test_terms_and_ages_are_logged(tmp_path: Path) -> None:
    pool = small.network_pool(num_networks=2, age_limit=4, refresh="all")
    distilled = small.network_module(objective=BidirectionalMatching(alpha=0.5, batch_real=8), pool=pool)
    found = events(tmp_path, distilled, steps=6)
    gradients, features, losses = (
        [value for _, value in curve(found, f"distill/{name}")]
        for name in ("gradient_distance", "feature_distance", "loss")
    )
    assert len(losses) == 6
    assert [a + b for a, b in zip(gradients, features, strict=True)] == pytest.approx(losses, rel=1e-5)
    assert min(gradients) > 0
    assert min(features) > 0
    # limits 2 and 4, then 4: ages (0, 0), (1, 1), (0, 2), (1, 3), (2, 0), (3, 1)
    assert curve(found, "pool/mean_age") == list(enumerate([0.0, 1.0, 1.0, 2.0, 1.0, 2.0]))
    assert curve(found, "pool/reinitialized") == list(enumerate([0.0, 0.0, 1.0, 1.0, 2.0, 2.0]))
    plain = events(tmp_path / "plain", small.network_module(), steps=1)
    assert not [tag for tag in plain.Tags()["scalars"] if tag.endswith("_distance")]  # the loss itself


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"factor": 2, "image_space": "pixels"}, "normalized"),
        ({"factor": 2, "formation": "multi"}, "normalized"),
        ({"factor": 3, "image_space": "pixels", "image_lr": 0.01}, "zca"),
        ({"image_space": "pixels"}, "pixel"),
    ],
)
@pytest.mark.parametrize("described", [False, True])
def test_load_from_checkpoint_decodes_alike(
    tmp_path: Path, options: dict[str, Any], kind: str, described: bool
) -> None:
    distilled = small.network_module({"num_networks": 2}, **options)
    data: DatasetDataModule = small.data(color_space=kind)
    small.fit(tmp_path, distilled, small.checkpoints(tmp_path), steps=2, datamodule=data)
    # the file alone says how images decode, and pool and objective need not be named to look at them
    arguments: dict[str, Any] = {"objective": GradientMatching(), "pool": NetworkPool()} if described else {}
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "step=2.ckpt", **arguments)
    assert small.same(small.learned(loaded), small.learned(distilled))
    assert loaded.synthetic_set.formation == loaded.storage.decoding == distilled.synthetic_set.formation
    assert loaded.storage.image_space == distilled.storage.image_space
    if isinstance(loaded.synthetic_set.space, ZCARecipe):  # the checkpoint holds no matrices
        loaded.synthetic_set.use_space(data.space)
    assert torch.equal(loaded.synthetic_set.decoded(), distilled.synthetic_set.decoded())
    assert torch.equal(loaded.synthetic_set.decoded_targets(), distilled.synthetic_set.decoded_targets())


def test_checkpoint_of_another_configuration_is_refused(store: Path, tmp_path: Path) -> None:
    small.fit(tmp_path, small.network_module(factor=2), small.checkpoints(tmp_path), steps=2)
    for changed, message in (
        (small.network_module(factor=1), r"model\.factor is 1, but the checkpoint's run has 2"),
        (small.network_module(factor=2, formation="multi"), r"model\.formation is 'multi', but .* 'single'"),
        (small.network_module(factor=2, image_space="pixels"), r"model\.image_space is 'pixels', but .* 'network'"),
        (
            small.network_module({"num_networks": 2}, factor=2),
            r"model\.pool\.num_networks is 2, but the checkpoint's run has 1",
        ),
        (
            small.module(store, factor=2),
            r"model\.objective\.class is 'TrajectoryMatching', but .* has 'GradientMatching'",
        ),
        (
            small.module(store, factor=2, objective=GradientMatching(batch_real=8)),
            r"model\.pool\.class is 'TrajectoryPool', but the checkpoint's run has 'NetworkPool'",
        ),
    ):
        with pytest.raises(InputError, match=message):
            small.fit(tmp_path, changed, small.checkpoints(tmp_path), ckpt_path=tmp_path / "step=2.ckpt")


def no_features(channels: int, num_classes: int, image_size: tuple[int, int]) -> torch.nn.Module:
    """Build a network whose last layer has another name."""
    del image_size
    layers = [torch.nn.Conv2d(channels, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(2, num_classes))


@pytest.mark.parametrize(
    "options",
    [
        {"objective": BidirectionalMatching(batch_real=8, sampling="shuffled")},
        {"objective": GradientMatching(batch_real=8, sampling="representative")},
        {"init": "kmeans"},
    ],
)
def test_networks_without_features_are_refused_before_anything_is_done(tmp_path: Path, options: dict[str, Any]) -> None:
    points = small.evaluation(epochs=1)
    with pytest.raises(InputError, match=r"^network '.*no_features' has no features: name its last layer 'classifier'"):
        small.fit(tmp_path, small.network_module(network=no_features, **options), points, steps=1)
    assert points.points == []
    small.fit(tmp_path, small.network_module(network=no_features), points, steps=1)  # needs none
    assert len(points.points) == 2


@pytest.mark.parametrize("init", ["real", "noise"])
def test_a_factor_beyond_the_image_is_refused_before_experts_are_trained(
    tmp_path: Path, init: Literal["real", "noise"]
) -> None:
    distilled = small.module(tmp_path / "experts", factor=9, ipc=1, init=init)
    wide = torch.utils.data.TensorDataset(torch.rand(300, *small.SHAPE), torch.arange(300) % 3)
    with pytest.raises(InputError, match="factor is 9; it must be at least 1 and at most 8"):
        small.fit(tmp_path, distilled, datamodule=DatasetDataModule(wide, wide, name="wide"))
    assert not (tmp_path / "experts").exists()


def test_candidates_in_effect_are_told_once_with_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def told(steps: int, **options: Any) -> list[str]:  # noqa: ANN401
        caplog.clear()
        distilled = small.network_module({"num_networks": 3}, image_lr=1e-3)
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            small.fit(tmp_path, distilled, small.selection(**options), steps=steps)
        return [record.getMessage() for record in caplog.records if "in effect" in record.getMessage()]

    # sums over thousands of weights at the paper's temperature: here a temperature that is as far below the losses
    argmax = told(21, temperature=1e-4)
    assert argmax == ["selection: 1.00 of 3 candidates in effect; selection.normalize changes that"]
    (normalized,) = told(10, temperature=1.0, normalize="zscore")
    effective = re.fullmatch(r"selection: (\d\.\d\d) of 3 candidates in effect", normalized)
    assert effective is not None
    assert 1.1 < float(effective[1]) < 2.9
    (uniform,) = told(10, temperature=1e6)
    assert uniform == "selection: 3.00 of 3 candidates in effect; selection.normalize changes that"


def test_several_processes_are_for_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "world_size", 2)  # without launching them
    with pytest.raises(InputError, match=r"strategy is SingleDeviceStrategy; it must be ddp for 2 processes"):
        small.fit(tmp_path, small.network_module(), steps=1)
