"""Time of one whole inner step of IDC: the image update of all classes, and the update of its network on real data.

The textbook is ordinary modules: the loop over classes of ``image_update_cost.py``, and as many steps of
``torch.optim.SGD`` on the real data as published (32 batches of 64 for CIFAR-10). Data lie on the device and are
augmented batch-wise there, too. Variants take turns over several rounds in one process, and ratios are medians over
rounds of the ratio within a round, for the machine's speed drifts. Compilation is timed apart.

    python benchmarks/inner_step_cost.py --out benchmarks/results/inner_step_cost_cpu.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from image_update_cost import Update
from step_cost import hardware
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dd_lightning.execution.compile import Compile
from dd_lightning.execution.options import Execution
from dd_lightning.execution.precision import Precision
from dd_lightning.functional.cutmix import cutmix, draw_cutmix
from dd_lightning.functional.policies import AugmentationPolicy, augment_in_turn
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.objectives import GradientMatching, Workload
from dd_lightning.pools import NetworkPool, PoolSetup
from dd_lightning.sets.initial import class_labels
from dd_lightning.sets.real import RealSet
from dd_lightning.training.recipes import NetworkRecipe

TEXTBOOK = "textbook loops"
VARIANTS: dict[str, tuple[Compile, Precision, int]] = {
    "eager": ("off", "float32", 1),
    "compiled": ("on", "float32", 1),
    "compiled, three candidates": ("on", "float32", 3),
    "compiled, bfloat16": ("on", "bfloat16", 1),
    "compiled, bfloat16, three candidates": ("on", "bfloat16", 3),
}
RECIPE = NetworkRecipe()


class InnerStep:
    """One inner step, in every variant, on noise in the shape of the data.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.update = Update(args)
        # of its own: the module's SGD would move the candidate that it shares its memory with
        vector_to_parameters(self.update.candidates[0].theta.clone(), self.update.module.parameters())
        generator, shape = torch.Generator().manual_seed(1), (3, args.size, args.size)
        images = torch.randn(args.classes * args.training_images, *shape, generator=generator).to(self.device)
        labels = class_labels(args.classes, args.training_images).to(self.device)
        self.training = RealSet(images, labels, args.classes)
        self.objectives: dict[str, GradientMatching] = {}
        self.pools: dict[str, NetworkPool] = {}
        self.compile_seconds: dict[str, float] = {}
        for name, (choice, precision, candidates) in VARIANTS.items():
            started = time.perf_counter()
            objective = GradientMatching(batch_real=args.batch_real)
            size = args.classes * args.ipc * args.factor**2
            workload = Workload(self.update.network, size, candidates=candidates, device_type=args.device)
            objective.plan_memory(workload, Execution(compile=choice, precision=precision))
            objective.prepare(self.update.problem, 1, lambda _: None)
            self.compile_seconds[f"{name}: images"] = time.perf_counter() - started
            self.objectives[name] = objective
            if candidates == 1:
                started = time.perf_counter()
                self.pools[name] = self._pool(choice, precision)
                self.compile_seconds[f"{name}: network"] = time.perf_counter() - started

    def _pool(self, choice: Compile, precision: Precision) -> NetworkPool:
        execution = Execution(compile=choice, precision=precision)
        pool = NetworkPool(age_limit=None, recipe=RECIPE, execution=execution)
        pool.prepare(PoolSetup(self.update.network, self.training, "noise", ""))
        pool.draw(1, StepContext(0, 0))
        return pool

    def textbook_network(self) -> Tensor:
        """Train the module for one update; return how its parameters have moved."""
        module, real = self.update.module, self.training
        before = parameters_to_vector(module.parameters()).detach().clone()
        sgd = torch.optim.SGD(module.parameters(), RECIPE.lr, RECIPE.momentum, weight_decay=RECIPE.weight_decay)
        size = (self.args.size, self.args.size)
        policy = AugmentationPolicy(RECIPE.augmentation, RECIPE.policy)
        batches = list(real.shuffled_batches(RECIPE.batch_size, step_generator(0, 0, "pool/order")))
        for number in range(RECIPE.steps_per_update):
            generator, rows = step_generator(0, number, "pool/augment"), batches[number]
            images = augment_in_turn(real.images[rows], policy.draw(generator, len(rows), size))
            labels, mix = real.labels[rows], draw_cutmix(generator, len(rows), size, RECIPE.cutmix)
            if mix is None:
                loss = F.cross_entropy(module(images), labels)
            else:
                mixed, _ = cutmix(images, labels, mix, self.args.classes)
                logits = module(mixed)
                other = F.cross_entropy(logits, labels[mix.permutation.to(labels.device)])
                loss = mix.ratio * F.cross_entropy(logits, labels) + (1 - mix.ratio) * other
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        moved = parameters_to_vector(module.parameters()).detach() - before
        vector_to_parameters(before, module.parameters())
        return moved

    def network(self, name: str) -> Tensor:
        """Update the pool's network; return how its parameters have moved."""
        pool = self.pools[name]
        pool.batches_drawn = 0
        pool._members[0].theta, pool._members[0].momentum = self.update.candidates[0].theta, None
        pool.refresh((0,), [(0,)], StepContext(0, 1))
        return pool.load((0,)).theta - self.update.candidates[0].theta

    def images(self, name: str) -> Tensor:
        """Update the images; return their gradient."""
        self.update.synthetic.images.grad = None
        if name == TEXTBOOK:
            self.update.textbook()
        else:
            self.update.objective = self.objectives[name]
            candidates = VARIANTS[name][2]
            self.update.ours(candidates, with_gradient=candidates == 1)
        gradient = self.update.synthetic.images.grad
        if gradient is None:
            raise RuntimeError(f"{name} gave no gradient")
        return gradient.clone()

    def timed(self, name: str) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return the seconds of both parts, and their results."""
        own = name if name == TEXTBOOK or name in self.pools else name.removesuffix(", three candidates")
        parts: dict[str, Callable[[], Tensor]] = {"images": lambda: self.images(name)}
        if own == name:
            parts["network"] = self.textbook_network if name == TEXTBOOK else lambda: self.network(name)
        seconds, results = {}, {}
        for part, run in parts.items():
            started = time.perf_counter()
            results[part] = run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[part] = time.perf_counter() - started
        return seconds, results


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all variants in this process."""
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    step = InnerStep(args)
    names = (TEXTBOOK, *VARIANTS)
    first = {name: step.timed(name)[1] for name in names}  # also the first use of kernels and thread pools
    distances = {
        name: {
            part: float((result - first[TEXTBOOK][part]).norm() / first[TEXTBOOK][part].norm())
            for part, result in first[name].items()
        }
        for name in VARIANTS
    }
    rounds: list[dict[str, dict[str, float]]] = []
    while not rounds or (len(rounds) < args.rounds and time.perf_counter() - started < args.seconds):
        rounds.append({name: step.timed(name)[0] for name in names})
    for figures in rounds:  # with several candidates, the network that was chosen is trained as a sole one is
        for name in VARIANTS:
            figures[name].setdefault("network", figures[name.removesuffix(", three candidates")]["network"])
        for parts in figures.values():
            parts["whole"] = parts["images"] + parts["network"]
    return {"distances": distances, "compile_seconds": step.compile_seconds, "rounds": rounds}


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128], help="Of ConvNet-3.")
    parser.add_argument("--network", default="ConvNet-3", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--batch_real", type=int, default=64)
    parser.add_argument("--training_images", type=int, default=512, help="Real images per class.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=210, help="Begin no more rounds after so many, for each width."
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", default=None, help="JSON file to write; figures of other widths in it are kept.")
    args = parser.parse_args()
    if args.part is not None:
        print(json.dumps(measure(args)))
        return
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    settings = {k: v for k, v in vars(args).items() if k not in ("widths", "part", "out", "network")}
    record = {
        "hardware": hardware(args.device),
        "torch": torch.__version__,
        "commit": git.stdout.strip(),
        "settings": settings,
    }
    kept: dict[str, Any] = {}
    if args.out and Path(args.out).exists():
        kept = json.loads(Path(args.out).read_text())["networks"]
    print(f"{record['hardware']}; torch {torch.__version__}; {args.threads} thread(s)")
    print(f"{args.classes} classes, ipc {args.ipc}, factor {args.factor}, real batches of {args.batch_real}")
    print(f"network update: {RECIPE.steps_per_update} batches of {RECIPE.batch_size}")
    for width in args.widths:
        flags = [f"--{key}={value}" for key, value in settings.items()]
        command = [sys.executable, __file__, *flags, f"--network=ConvNet-3-W{width}", "--part=time"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rounds = found["rounds"]
        table = {
            name: {
                part: {
                    "seconds": statistics.median(r[name][part] for r in rounds),
                    "times_as_fast": statistics.median(r[TEXTBOOK][part] / r[name][part] for r in rounds),
                }
                for part in ("images", "network", "whole")
            }
            for name in rounds[0]
        }
        kept[f"ConvNet-3-W{width}"] = record | {"variants": table} | found
        print(f"ConvNet-3-W{width}{'':24} {'images s':>9} {'network s':>9} {'whole s':>9}   times as fast: each, whole")
        for name, row in table.items():
            seconds = " ".join(f"{row[part]['seconds']:9.3f}" for part in row)
            ratios = " ".join(f"{row[part]['times_as_fast']:6.2f}" for part in row)
            print(f"  {name:36} {seconds}   {ratios}")
        print(f"  relative distance of gradients and of parameters' moves from the textbook: {found['distances']}")
        print(f"  seconds to compile: { ({k: round(v, 1) for k, v in found['compile_seconds'].items()}) }")
        if args.out:
            Path(args.out).write_text(json.dumps({"networks": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
