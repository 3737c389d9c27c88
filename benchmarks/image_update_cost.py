"""Time of one image update of gradient matching (IDC) against the textbook loop over classes.

The textbook is ordinary modules, one class after another: the real gradient by all parameters, the synthetic one with a
graph, the distance of the convolutions' gradients, ``backward``. Data lie on the device and are augmented batch-wise
there, too. Variants take turns over several rounds in one process, and ratios are medians over rounds of the ratio
within a round, for the machine's speed drifts. Memory is the peak of a process of its own above its level before the
update.

    python benchmarks/image_update_cost.py --out benchmarks/results/image_update_cost_cpu.json
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
from step_cost import hardware, peak_above_start
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import vector_to_parameters

from dd_lightning.functional.formation import Formation
from dd_lightning.functional.policies import augment_in_turn
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork, build_network
from dd_lightning.objectives import GradientMatching, Problem
from dd_lightning.objectives.classwise import ClasswiseDraw
from dd_lightning.pools import LiveNetwork
from dd_lightning.sets.initial import class_labels
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import SyntheticSet

VARIANTS = (
    "textbook loop",
    "one candidate",
    "one candidate, scored first",
    "three candidates",
    "one first-order pass",
    "real gradients alone, class by class",
    "real gradients alone, vmap over classes",
)


class Update:
    """One image update, in every variant, on noise in the shape of the data.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        device = torch.device(args.device)
        generator = torch.Generator().manual_seed(0)
        shape = (3, args.size, args.size)
        self.args = args
        images = torch.randn(args.classes * args.batch_real, *shape, generator=generator).to(device)
        self.real = RealSet(images, class_labels(args.classes, args.batch_real).to(device), args.classes)
        start = torch.randn(args.classes * args.ipc, *shape, generator=generator)
        self.synthetic = SyntheticSet(start, class_labels(args.classes, args.ipc), 0.01, Formation(args.factor))
        self.synthetic.to(device)
        self.network = FunctionalNetwork(args.network, shape, args.classes).to(device)
        self.candidates = [LiveNetwork((i,), self.network.initial(i).to(device)) for i in range(3)]
        self.problem = Problem(self.synthetic, self.real, self.network)
        self.objective = GradientMatching(batch_real=args.batch_real)
        self.module = build_network(args.network, 3, args.classes, shape[1:]).to(device)
        vector_to_parameters(self.candidates[0].theta, self.module.parameters())

    def draw(self) -> ClasswiseDraw:
        """Return a step's draws; every variant makes the same ones."""
        return self.objective.draw(self.problem, lambda: self.candidates[0], StepContext(0, 0))

    def textbook(self) -> None:
        """Loop over classes as published code does, without its detours."""
        factor, size = self.args.factor, self.args.size
        compared = [p.ndim == 4 for p in self.module.parameters()]
        parameters = list(self.module.parameters())
        images = self.synthetic.images
        for batch in self.draw().classes:
            real = torch.autograd.grad(F.cross_entropy(self.module(batch.real), batch.real_targets), parameters)
            label = int(batch.targets[0])
            stored = images[label * self.args.ipc : (label + 1) * self.args.ipc]
            tiles = [t for rows in stored.chunk(factor, 2) for t in rows.chunk(factor, 3)]
            decoded = F.interpolate(torch.cat(tiles), (size, size), mode="bilinear", align_corners=False)
            augmented = augment_in_turn(decoded, batch.augmentation)
            own = torch.autograd.grad(
                F.cross_entropy(self.module(augmented), batch.targets), parameters, create_graph=True
            )
            distances = [(a - b).square().sum() for a, b, c in zip(own, real, compared, strict=True) if c]
            torch.stack(distances).sum().backward()  # into the images and, as published, into the parameters
        self.module.zero_grad()

    def ours(self, candidates: int, with_gradient: bool) -> None:
        """Score the candidates, then differentiate the first one."""
        chosen = self.candidates[:candidates]
        scored = self.objective.score(self.problem, chosen, self.draw(), with_gradient=with_gradient)
        self.objective.loss(self.problem, scored[0]).backward()

    def first_order(self) -> None:
        """Score one candidate."""
        self.objective.score(self.problem, self.candidates[:1], self.draw())

    def real_gradients(self) -> None:
        """Take the real gradient of every class, one after another."""
        theta = self.candidates[0].theta
        for batch in self.draw().classes:
            with torch.no_grad():
                self.objective.statistics(self.network, theta, batch.real, batch.real_targets)

    def batched_real_gradients(self) -> None:
        """Take the real gradients of all classes in one batched pass."""
        parts, classes = self.network.split(self.candidates[0].theta), self.draw().classes
        compared = [index for index, part in enumerate(parts) if part.ndim == 4]

        def loss(chosen: list[Tensor], images: Tensor, targets: Tensor) -> Tensor:
            full = list(parts)
            for index, part in zip(compared, chosen, strict=True):
                full[index] = part
            return F.cross_entropy(self.network(full, images), targets)

        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
            [parts[i] for i in compared],
            torch.stack([batch.real for batch in classes]),
            torch.stack([batch.real_targets for batch in classes]),
        )

    def variants(self) -> dict[str, Callable[[], None]]:
        """Return what is compared."""
        return dict(
            zip(
                VARIANTS,
                (
                    self.textbook,
                    lambda: self.ours(1, with_gradient=True),
                    lambda: self.ours(1, with_gradient=False),
                    lambda: self.ours(3, with_gradient=False),
                    self.first_order,
                    self.real_gradients,
                    self.batched_real_gradients,
                ),
                strict=True,
            )
        )

    def gradient(self, variant: str) -> Tensor:
        """Return a variant's image gradient."""
        self.synthetic.images.grad = None
        self.variants()[variant]()
        gradient = self.synthetic.images.grad
        if gradient is None:
            raise RuntimeError(f"{variant} gave no gradient")
        return gradient.clone()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all variants in this process."""
    torch.set_num_threads(args.threads)
    update, device = Update(args), torch.device(args.device)
    exact, ours = update.gradient(VARIANTS[0]), update.gradient(VARIANTS[1])
    agreement = float((exact - ours).norm() / exact.norm())
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        figures = {}
        for name, run in update.variants().items():
            update.synthetic.images.grad = None
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            figures[name] = time.perf_counter() - started
        rounds.append(figures)
    return {"agreement": agreement, "rounds": rounds}


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Take the peak of one variant in this process."""
    torch.set_num_threads(args.threads)
    update = Update(args)
    run = update.variants()[args.variant]
    run()
    update.synthetic.images.grad = None
    return {"peak_bytes": peak_above_start(run, torch.device(args.device))}


def in_own_process(args: argparse.Namespace, **changed: object) -> dict[str, Any]:
    """Run a part in a fresh process and return its figures."""
    settings = {k: v for k, v in vars(args).items() if k not in ("widths", "out", "variant", "part")} | changed
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--variant", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", default=None, help="JSON file to write.")
    args = parser.parse_args()
    if args.part is not None:
        print(json.dumps(measure(args) if args.part == "time" else memory(args)))
        return
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    settings = {k: v for k, v in vars(args).items() if k not in ("part", "variant", "out", "network")}
    networks: dict[str, Any] = {}
    record: dict[str, Any] = {
        "hardware": hardware(args.device),
        "torch": torch.__version__,
        "commit": git.stdout.strip(),
    }
    record |= {"settings": settings, "networks": networks}
    print(f"{record['hardware']}; torch {torch.__version__}; {args.threads} thread(s)")
    print(f"{args.classes} classes, ipc {args.ipc}, factor {args.factor}, real batches of {args.batch_real}, eager")
    for width in args.widths:
        network = f"ConvNet-3-W{width}"
        timed = in_own_process(args, network=network, part="time")
        rounds = timed["rounds"]
        peaks = {
            name: in_own_process(args, network=network, part="memory", variant=name)["peak_bytes"]
            for name in VARIANTS[:4]
        }
        table = {
            name: {
                "seconds": statistics.median(r[name] for r in rounds),
                "ratio": statistics.median(r[name] / r[VARIANTS[0]] for r in rounds),
                "passes_above_one": statistics.median((r[name] - r[VARIANTS[1]]) / r[VARIANTS[4]] for r in rounds),
                "passes_above_scored": statistics.median((r[name] - r[VARIANTS[2]]) / r[VARIANTS[4]] for r in rounds),
                "peak_bytes": peaks.get(name),
            }
            for name in VARIANTS
        }
        networks[network] = {"variants": table, "rounds": rounds, "agreement": timed["agreement"]}
        print(f"{network}: gradients differ by {timed['agreement']:.1e}")
        print(
            f"  {'':40} {'s':>7} {'/ textbook':>10} {'passes above one':>17} {'above scored first':>19} {'peak MB':>8}"
        )
        for name, row in table.items():
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
            print(
                f"  {name:40} {row['seconds']:7.3f} {row['ratio']:10.2f} {row['passes_above_one']:17.2f} "
                f"{row['passes_above_scored']:19.2f} {peak:>8}"
            )
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
