"""IDC's own rule, a fresh network for each outer iteration, written out as its loop of modules."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.cutmix import cutmix, draw_cutmix
from dd_lightning.functional.formation import Formation
from dd_lightning.functional.policies import AugmentationPolicy, augment_in_turn
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.networks import build_network
from dd_lightning.objectives import GradientMatching
from dd_lightning.pools import NetworkPool
from dd_lightning.sets.class_batches import shuffled_class_batches
from dd_lightning.sets.synthetic import decode_images
from dd_lightning.training.recipes import NetworkRecipe
from tests import small

SEED, INNER_LOOP, STEPS = 5, 3, 8  # two outer iterations and most of a third
LR, MOMENTUM, BATCH_REAL = 0.05, 0.5, 8
RECIPE = NetworkRecipe(batch_size=16, images_per_update=40)


class Images(Callback):
    """Copies of the images after every step."""

    def __init__(self) -> None:
        self.after: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.after.append(pl_module.get_parameter("synthetic.images").detach().clone())


def fresh_network(outer: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_generator(SEED, outer, "network-0/initial").initial_seed())
        return build_network(small.NETWORK, 1, small.CLASSES, (8, 8))


def convolutions(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.ndim == 4]


def test_a_pool_of_one_network_that_lives_an_inner_loop_is_idc_bit_for_bit(tmp_path: Path) -> None:
    images_after = Images()
    distilled = small.network_module(
        objective=GradientMatching(batch_real=BATCH_REAL),
        pool=NetworkPool(1, age_limit=INNER_LOOP, recipe=RECIPE),
        inner_loop=INNER_LOOP,
        clamp=True,
        image_space="pixels",
        image_steps="per_class",
        factor=2,
        image_lr=LR,
        momentum=MOMENTUM,
        seed=SEED,
    )
    small.fit(tmp_path, distilled, images_after, steps=STEPS)

    data = small.data()
    real, space, formation = data.train, data.space, Formation(2)
    tiles = real.sample_per_class(8, step_generator(SEED, 0, "initial"))
    shrunk = space.decode(real.images[tiles])[:, :, ::2, ::2]  # nearest pixels; four to an image, row by row
    rows = [torch.cat([shrunk[i::4], shrunk[i + 1 :: 4]], dim=3) for i in (0, 2)]
    images = torch.cat(rows, dim=2).requires_grad_()
    # Stepping once per class, C times in all, is one step of this rate and momentum.
    joint = MOMENTUM**small.CLASSES
    step_images = torch.optim.SGD([images], LR * (1 - joint) / (1 - MOMENTUM), momentum=joint)
    labels = torch.arange(small.CLASSES).repeat_interleave(8)
    matching, training = AugmentationPolicy("color_crop_cutout", "idc"), AugmentationPolicy("color_crop", "idc")
    seen, clamped, batch = [], [], 0

    for step in range(STEPS):
        if step % INNER_LOOP == 0:  # an outer iteration begins
            network = fresh_network(step // INNER_LOOP)
            step_network = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
            clamped.append(int(((images < 0) | (images > 1)).sum()))
            images.data.clamp_(0, 1)
        context = StepContext(SEED, step)
        augment = context.generator("augment")
        loss = torch.zeros(())
        for label, real_rows in enumerate(shuffled_class_batches(real, BATCH_REAL, context)):
            draw = matching.draw(augment, BATCH_REAL, (8, 8), siamese=True)
            own = labels == label
            outputs = network(augment_in_turn(real.images[real_rows], draw))
            on_real = torch.autograd.grad(
                F.cross_entropy(outputs, torch.full((BATCH_REAL,), label)), convolutions(network)
            )
            decoded = decode_images(images, formation, space)[own]
            outputs = network(augment_in_turn(decoded, draw))
            on_synthetic = torch.autograd.grad(
                F.cross_entropy(outputs, labels[own]), convolutions(network), create_graph=True
            )
            for synthetic, target in zip(on_synthetic, on_real, strict=True):
                loss = loss + (synthetic - target).square().sum()
        images.grad = torch.autograd.grad(loss, images)[0]
        step_images.step()
        seen.append(images.detach().clone())
        if (step + 1) % INNER_LOOP == 0:
            continue  # the network is thrown away: the pool does not train it once more
        for _ in range(3):  # 40 images in batches of 16
            order = torch.randperm(90, generator=step_generator(SEED, batch // 6, "pool/order"))
            chosen = order[16 * (batch % 6) :][:16]
            generator = step_generator(SEED, batch, "pool/augment")
            draws = training.draw(generator, len(chosen), (8, 8))
            inputs, targets = augment_in_turn(real.images[chosen], draws), real.labels[chosen]
            mix = draw_cutmix(generator, len(chosen), (8, 8), 0.5)
            if mix is not None:
                inputs, targets = cutmix(inputs, targets, mix, small.CLASSES)
                targets = targets.softmax(1)
            step_network.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            step_network.step()
            batch += 1

    assert len(images_after.after) == STEPS
    for found, expected in zip(images_after.after, seen, strict=True):
        assert torch.equal(found, expected)
    assert min(clamped[1:]) > 0
    assert distilled.pool.scalars() == {"pool/mean_age": 1.0, "pool/reinitialized": 2.0}
