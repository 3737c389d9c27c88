"""Time to train the fresh networks of one evaluation together, against training one after another.

The textbook is a loop over networks, each an ordinary module with ``torch.optim.SGD``, images that lie on the device
and a vectorized augmentation. Recipe ``mtt`` with fewer epochs, for ratios are what counts; test passes apart. Variants
take turns over several rounds in one process, and ratios are medians over rounds of the ratio within a round, for the
machine's speed drifts.

    python benchmarks/evaluation_cost.py --out benchmarks/results/evaluation_cost_cpu.json
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_cost import hardware
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import vector_to_parameters

from dd_lightning.functional.augment import DSA, augment
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork, build_network
from dd_lightning.sets.real import RealSet
from dd_lightning.training import evaluation
from dd_lightning.training.evaluation import EvaluationRecipe, evaluation_passes, get_recipe, train_fresh_networks
from dd_lightning.training.parallel_networks import Passes

RATE = 0.01
CASES = {
    "ConvNet-2-W32, 10 of 8x8": ("ConvNet-2-W32", (1, 8, 8), 50),
    "ConvNet-3-W32, 10 of 8x8": ("ConvNet-3-W32", (1, 8, 8), 50),
    "ConvNet-3, 10 of 32x32": ("ConvNet-3", (3, 32, 32), 5),
}
"""Network, shape of an image and epochs."""


def textbook(
    spec: str, network: FunctionalNetwork, images: Tensor, labels: Tensor, recipe: EvaluationRecipe, count: int
) -> Tensor:
    """Train the same networks, by the same draws, one after another; return their parameters, [K, P]."""
    thetas = []
    for number in range(count):
        module = build_network(spec, network.image_shape[0], network.num_classes, network.image_shape[1:])
        seed = step_generator(0, number, "evaluation/initial").initial_seed()
        vector_to_parameters(network.initial(seed), module.parameters())
        module.to(images.device)
        order, draws = (step_generator(0, number, f"evaluation/{stream}") for stream in ("order", "augment"))
        dsa, lr = DSA(recipe.augmentation), RATE
        momentum, decay = recipe.momentum, recipe.weight_decay
        sgd = torch.optim.SGD(module.parameters(), lr, momentum=momentum, weight_decay=decay)
        for epoch in range(recipe.epochs):
            if epoch == recipe.epochs // 2:
                lr *= recipe.gamma
                sgd = torch.optim.SGD(module.parameters(), lr, momentum=momentum, weight_decay=decay)
            permutation = torch.randperm(len(images), generator=order).to(images.device)
            for rows in permutation.split(recipe.batch_size):
                batch = augment(images[rows], dsa.draw(draws, len(rows), network.image_shape[1:]))
                loss = F.cross_entropy(module(batch), labels[rows])
                sgd.zero_grad()
                loss.backward()
                sgd.step()
        thetas.append(network.flatten(module))
    return torch.stack(thetas)


def measure(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Time all variants of a case."""
    spec, shape, epochs = CASES[case]
    device = torch.device(args.device)
    images = torch.randn(10, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(10).to(device)
    network = FunctionalNetwork(spec, shape, 10).to(device)
    recipe = get_recipe("mtt", epochs)
    runs: dict[str, Callable[[], Tensor]] = {
        "one after another": lambda: textbook(spec, network, images, labels, recipe, args.networks),
        "together": lambda: trained(),
    }

    def trained(passes: Passes | None = None) -> Tensor:
        fresh = train_fresh_networks(images, labels, RATE, network, recipe, args.networks, 0, passes=passes)
        return torch.stack(fresh.thetas)

    if args.compile:
        compiled = evaluation_passes(network, images, recipe)
        compiled.compile("on", 1, images, labels, recipe.batch_size, [args.networks], case)
        runs["together, compiled"] = lambda: trained(compiled)
    noise = torch.randn(args.test_images, *shape, generator=torch.Generator().manual_seed(1)).to(device)
    held_out = RealSet(noise, torch.arange(args.test_images).to(device) % 10, 10)
    thetas, first = {}, {}
    for name, run in runs.items():  # first use of kernels and thread pools, and compilation
        started = time.perf_counter()
        thetas[name] = run()
        first[name] = time.perf_counter() - started
    base = next(iter(runs))

    def test() -> Tensor:
        return torch.tensor(evaluation.accuracies_of(thetas[base], network, held_out))

    runs["one test"] = test
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        figures = {}
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            figures[name] = time.perf_counter() - started
        rounds.append(figures)
    rows = {
        name: {
            "seconds": statistics.median(figures[name] for figures in rounds),
            "times_faster": statistics.median(figures[base] / figures[name] for figures in rounds),
            "first_seconds": first.get(name),
            "difference": float((thetas[name] - thetas[base]).norm() / thetas[base].norm()) if name in thetas else None,
        }
        for name in runs
    }
    return {"epochs": epochs, "variants": rows, "rounds": rounds}


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--test_images", type=int, default=500)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="Time compiled gradients, too.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=None, help="JSON file to write.")
    args = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    figures: dict[str, Any] = {}
    print(f"{hardware(args.device)}; torch {torch.__version__}; {args.networks} networks, recipe mtt")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for case in args.cases:
            result = measure(args, case)
            figures.setdefault(f"{threads} thread(s)", {})[case] = result
            print(f"{threads} thread(s), {case}, {result['epochs']} epochs")
            for name, row in result["variants"].items():
                once = "" if row["first_seconds"] is None else f"{row['first_seconds']:8.1f} s the first time"
                faster = f"{row['times_faster']:6.2f} times as fast" if name != "one test" else " " * 20
                print(f"  {name:20} {row['seconds']:7.3f} s {faster} {once}")
    if args.out:
        record = {
            "hardware": hardware(args.device),
            "torch": torch.__version__,
            "commit": git.stdout.strip(),
            "settings": {key: value for key, value in vars(args).items() if key != "out"},
            "figures": figures,
        }
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
