"""Images per second of expert training against a plain training loop.

The plain loop is a textbook one: an ordinary module, ``torch.optim.SGD``, data that lie on the device and a vectorized
augmentation of each batch. Ours is all that trains an expert: the steps, and the end of an epoch with its copy of the
weights. Both draw the same augmentations. Variants take turns over several rounds in one process,
and ratios are medians over rounds of the ratio within a round, for the machine's speed drifts.

    python benchmarks/expert_throughput.py --out benchmarks/results/expert_throughput_cpu.json
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_cost import hardware
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import vector_to_parameters

from dd_lightning.execution.options import Execution
from dd_lightning.functional.augment import DSA, augment
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork, build_network
from dd_lightning.sets.real import RealSet
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
from dd_lightning.training.experts import _Group, _Job
from dd_lightning.training.parallel_networks import Passes, piece_of
from dd_lightning.training.recipes import ExpertRecipe

PLAIN = "plain loop"


class Ours:
    """Our training of one expert for one epoch.

    Args:
        network: The architecture.
        real: Training data.
        recipe: Training settings.
        execution: How it is computed.
    """

    def __init__(self, network: FunctionalNetwork, real: RealSet, recipe: ExpertRecipe, execution: Execution) -> None:
        self.real, self.recipe = real, recipe
        self.piece = piece_of(
            network, execution.micro_batch, recipe.batch_size, real.images.device.type, recipe.precision
        )
        self.passes = Passes(network, precision=recipe.precision, piece=self.piece)
        size, what = recipe.batch_size, "the experts' step"
        self.passes.compile(execution.compile, 1, real.images, real.labels, size, [1], what)
        self.identity = ExpertIdentity.of(network, recipe, 1, fingerprint="noise", dataset="noise")

    def __call__(self) -> torch.Tensor:
        """Return the weights after an epoch."""
        with tempfile.TemporaryDirectory() as folder:
            store = ExpertStore(folder)
            group = _Group(
                _Job(self.passes, self.real, self.real.labels, None, store, self.identity, self.recipe, 1), [0]
            )
            group.train_epoch(lambda *_: None)
            group.flush()
            return store.rows(0, [1])[0]


def plain_loop(network: FunctionalNetwork, real: RealSet, recipe: ExpertRecipe, spec: str) -> torch.Tensor:
    """Train the same expert as a textbook does, for one epoch, and return its weights."""
    module: nn.Module = build_network(spec, real.image_shape[0], real.num_classes, real.image_shape[1:])
    seed = step_generator(recipe.seed, 0, "expert-0/initial").initial_seed()
    vector_to_parameters(network.initial(seed), module.parameters())
    module.to(real.images.device)
    sgd = torch.optim.SGD(module.parameters(), recipe.lr)
    dsa = DSA(recipe.augmentation)
    order = real.shuffled_batches(recipe.batch_size, step_generator(recipe.seed, 0, "expert-0/batches"))
    for step, rows in enumerate(order):
        draw = dsa.draw(step_generator(recipe.seed, step, "expert-0/augment"), len(rows), real.image_shape[1:])
        loss = F.cross_entropy(module(augment(real.images[rows], draw)), real.labels[rows])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return network.flatten(module).cpu()


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="ConvNet-3")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="Batches of an epoch, which is what is timed.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=None, help="JSON file to write.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, device = (args.channels, args.size, args.size), torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch * args.steps, *shape, generator=generator)
    real = RealSet(images, torch.arange(len(images)) % 10, 10).to(device)
    network = FunctionalNetwork(args.network, shape, 10).to(device)
    base = ExpertRecipe(batch_size=args.batch)
    low, compiled = replace(base, precision="bfloat16"), Execution(compile="on")
    variants = {
        "ours, whole batches": (base, Execution(micro_batch=None)),
        "ours": (base, Execution()),
        "ours, compiled": (base, compiled),
        "ours, bfloat16": (low, Execution()),
        "ours, bfloat16, compiled": (low, compiled),
    }
    runs: dict[str, Callable[[], torch.Tensor]] = {PLAIN: lambda: plain_loop(network, real, base, args.network)}
    weights, first, ours = {}, {}, {}
    for name in (PLAIN, *variants):  # first use of kernels and thread pools, and compilation
        started = time.perf_counter()
        if name in variants:
            runs[name] = ours[name] = Ours(network, real, *variants[name])
        weights[name] = runs[name]()
        first[name] = time.perf_counter() - started
    moved = weights[PLAIN] - network.initial(step_generator(base.seed, 0, "expert-0/initial").initial_seed())
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        figures = {}
        for name, run in runs.items():
            started = time.perf_counter()
            run()  # ends with the weights on the host
            figures[name] = time.perf_counter() - started
        rounds.append(figures)
    table: dict[str, dict[str, Any]] = {
        name: {
            "images_per_second": statistics.median(len(real) / figures[name] for figures in rounds),
            "times_plain": statistics.median(figures[PLAIN] / figures[name] for figures in rounds),
            "first_seconds": first[name],
            "images_per_pass": ours[name].piece if name in ours else args.batch,
            "difference": float((weights[name] - weights[PLAIN]).norm() / moved.norm()),
        }
        for name in runs
    }
    print(f"{hardware(args.device)}; torch {torch.__version__}; {args.threads} thread(s)")
    print(f"{args.network}, {args.size}x{args.size}, batches of {args.batch}, {args.steps} steps, DSA")
    print(f"{'variant':26} {'images/s':>9} {'/ plain':>8} {'a pass':>7} {'first s':>8} {'difference':>11}")
    for name, row in table.items():
        print(
            f"{name:26} {row['images_per_second']:9.0f} {row['times_plain']:8.2f} {row['images_per_pass']:7} "
            f"{row['first_seconds']:8.1f} {row['difference']:11.1e}"
        )
    if args.out:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        record = {
            "hardware": hardware(args.device),
            "torch": torch.__version__,
            "commit": git.stdout.strip(),
            "settings": {key: value for key, value in vars(args).items() if key != "out"},
            "variants": table,
            "rounds": rounds,
        }
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
