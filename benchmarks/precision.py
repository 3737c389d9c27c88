"""What bfloat16 layers change in the gradient of trajectory matching by the images.

The student computes in float64, float32 and bfloat16, with the same batches and augmentations, from an expert's start
to an expert's target. For 1, 2, 5, ... student steps it prints by how much the image gradient and the matching loss
differ from those in float64, and the cosine of the angle between the gradients.

    python benchmarks/precision.py --data DIR     # DIR holds CIFAR-10 as torchvision reads it
"""

import argparse
import json
from pathlib import Path

import torch
from step_cost import commit, hardware
from torch import Tensor

from dd_lightning.datamodules import CIFAR10DataModule
from dd_lightning.execution.precision import Precision
from dd_lightning.functional.augment import DSA
from dd_lightning.functional.products import differentiated, gradient
from dd_lightning.functional.random import step_generator
from dd_lightning.functional.trajectory import (
    InnerStep,
    permuted_batches,
    trajectory_loss,
    trajectory_loss_gradient,
    unroll,
    unroll_adjoint,
)
from dd_lightning.networks import FunctionalNetwork, training_loss
from dd_lightning.sets.initial import class_labels, initial_images


def segment(network: FunctionalNetwork, images: Tensor, labels: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Train a network for some steps of 256 images at rate 0.01, and again as many: the start and the target."""
    theta, loss = network.initial(0), training_loss(network)
    ends = []
    for part in (0, 1):
        for step in range(steps):
            rows = torch.randint(len(images), (256,), generator=step_generator(0, step, f"batch-{part}"))
            theta = theta - 0.01 * gradient(loss, theta, images[rows], labels[rows])
        ends.append(theta)
    return ends[0], ends[1]


def matched(
    network: FunctionalNetwork, precision: Precision, problem: tuple[Tensor, ...], steps: list[InnerStep]
) -> tuple[Tensor, Tensor]:
    """Return the matching loss and its gradient by the images."""
    start, target, lr, images, labels = problem
    loss = differentiated(training_loss(network, precision))
    (path,) = unroll(loss, [start], lr, images, labels, steps)
    cotangent = trajectory_loss_gradient(path[-1], start, target)
    adjoint = unroll_adjoint(loss, path, lr, images, labels, steps, cotangent)
    return trajectory_loss(path[-1], start, target), adjoint.images


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--network", default="ConvNet-3")
    parser.add_argument("--expert_steps", type=int, default=50, help="Steps to the start, and from it to the target.")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=None, help="JSON file to write.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = CIFAR10DataModule(args.data, download=False)
    data.prepare_data()
    data.setup("fit")
    network = FunctionalNetwork(args.network, data.image_shape, data.num_classes)
    start, target = segment(network, data.train.images, data.train.labels, args.expert_steps)
    images = initial_images(data.train, 1, "real", step_generator(0, 0, "initial"))
    labels, lr = class_labels(data.num_classes, 1), torch.tensor(0.01)
    rows = []
    print(f"{hardware('cpu')}; torch {torch.__version__}; {args.network}, CIFAR-10, 1 image per class")
    print(f"{'steps':>5} {'precision':>10} {'loss':>10} {'gradient off by':>16} {'cosine':>8}")
    for count in args.steps:
        generator, policy = torch.Generator().manual_seed(1), DSA()
        steps = [
            InnerStep(batch, policy.draw(generator, len(batch), data.image_shape[1:]))
            for batch in permuted_batches(len(images), None, count, generator)
        ]
        problem = (start, target, lr, images)
        exact_loss, exact = matched(network, "float32", (*(t.double() for t in problem), labels), steps)
        choices: tuple[Precision, ...] = ("float32", "bfloat16")
        for precision in choices:
            loss, found = matched(network, precision, (*problem, labels), steps)
            row = {
                "steps": count,
                "precision": precision,
                "loss_off_by": float((loss - exact_loss).abs() / exact_loss),
                "gradient_off_by": float(torch.dist(found.double(), exact) / exact.norm()),
                "cosine": float(torch.cosine_similarity(found.double().flatten(), exact.flatten(), 0)),
            }
            rows.append(row)
            print(f"{count:5} {precision:>10} {row['loss_off_by']:10.1e} ", end="")
            print(f"{row['gradient_off_by']:16.1e} {row['cosine']:8.5f}", flush=True)
    if args.out:
        record = {
            "hardware": hardware("cpu"),
            "torch": torch.__version__,
            "commit": commit(),
            "settings": {name: value for name, value in vars(args).items() if name not in ("data", "out")},
            "rows": rows,
        }
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
