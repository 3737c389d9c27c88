"""Memory of a bilevel step, by the adjoint and by one graph over the window.

Each measurement runs in a process of its own: the peak of its memory above that before the step. Two window lengths
give the line on which longer ones lie.

    python benchmarks/bilevel_memory.py --out benchmarks/results/bilevel_memory_cpu.json
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

from dd_lightning.functional.augment import DSA
from dd_lightning.functional.bilevel import pull_back, train
from dd_lightning.functional.inner_optimizers import InnerAdam
from dd_lightning.functional.products import differentiated
from dd_lightning.functional.trajectory import InnerStep
from dd_lightning.networks import FunctionalNetwork, training_loss


def measure(kind: str, window: int, images: int, network_name: str, size: int) -> float:
    """Return the MiB that a step of a window takes."""
    network = FunctionalNetwork(network_name, (3, size, size), 10)
    loss, adam = training_loss(network), InnerAdam()
    generator = torch.Generator().manual_seed(0)
    synthetic = torch.randn(images, 3, size, size, generator=generator)
    labels, lr = torch.arange(images) % 10, torch.tensor(0.001)
    draw = DSA("none").draw(generator, images, (size, size))
    steps = [InnerStep(torch.arange(images), draw)] * window
    state = adam.initial(network.initial(0))
    loss(state.theta, synthetic, labels)  # what a first pass allocates for good
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "adjoint":
        derivatives = differentiated(loss)
        states = train(derivatives, adam, state, lr, synthetic, labels, steps)
        end = torch.ones_like(state.theta)
        pull_back(derivatives, adam, states, lr, synthetic, labels, steps, end)
    else:
        leaf = synthetic.requires_grad_()
        theta = state.theta.requires_grad_()
        state = state._replace(theta=theta)
        for number in range(1, window + 1):
            gradient = torch.autograd.grad(loss(state.theta, leaf, labels), state.theta, create_graph=True)[0]
            state = adam.step(state, gradient, lr, number)
        torch.autograd.grad(state.theta.sum(), leaf)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Measure, extrapolate to the published window, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="ConvNet-3")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--windows", type=int, nargs=2, default=[4, 8])
    parser.add_argument("--published", type=int, default=60)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure[0], int(args.measure[1]), args.images, args.network, args.size))
        return
    found: dict[str, dict[str, float]] = {}
    for kind in ("adjoint", "graph"):
        values = []
        for window in args.windows:
            command = [sys.executable, __file__, "--measure", kind, str(window), "--network", args.network]
            command += ["--size", str(args.size), "--images", str(args.images)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            values.append(float(done.stdout))
        slope = (values[1] - values[0]) / (args.windows[1] - args.windows[0])
        found[kind] = {str(window): value for window, value in zip(args.windows, values, strict=True)}
        found[kind][f"{args.published}, extrapolated"] = values[1] + slope * (args.published - args.windows[1])
        print(kind, {window: f"{value:.0f} MiB" for window, value in found[kind].items()})
    if args.out:
        hardware = (
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}"
        )
        what = {"command": "python benchmarks/bilevel_memory.py", "hardware": hardware, "network": args.network}
        args.out.write_text(json.dumps(what | {"images": args.images, "MiB": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
