"""Peak memory of a trajectory-matching step for CIFAR-100, with whole batches and with pieces of them.

The cells are the published ones whose student batches are large: 10 images per class, all 1,000 at every student step;
50 images per class, batches of 125. Each variant runs in a process of its own, a whole step of one candidate: the
student's unroll, and its adjoint. Memory is the peak of the process above its level just before the step (on CUDA: of
the allocator); it holds the student's path, 4 P bytes for each student step, and beyond that does not depend on their
number, so that ``--steps`` may be small. The estimate beside it is that of a run, without what is in memory before the
step: the real data, and the synthetic set but for its gradient.

    python benchmarks/step_memory.py                      # ConvNet-3 of width 128; published are 20 and 80 steps
    python benchmarks/step_memory.py --network ConvNet-3-W32 --budgets 8 0.5
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step_cost import hardware, peak_above_start

from dd_lightning.execution.memory import GIB, MemoryPart
from dd_lightning.execution.options import Execution
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives import Problem, TrajectoryMatching, Workload
from dd_lightning.pools import TrajectorySegment
from dd_lightning.sets.initial import class_labels
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import SyntheticSet

CLASSES, SHAPE, REAL_IMAGES = 100, (3, 32, 32), 50_000


class Cell(NamedTuple):
    """A published setting.

    Attributes:
        ipc: Images per class.
        batch_syn: Images of a student step; None is all of them.
    """

    ipc: int
    batch_syn: int | None


CELLS = (Cell(10, None), Cell(50, 125))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run one variant in this process."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cell = next(cell for cell in CELLS if cell.ipc == args.ipc)
    objective = TrajectoryMatching(syn_steps=args.steps, batch_syn=cell.batch_syn, augmentation=args.augmentation)
    execution = Execution(micro_batch=None if args.budget == 0 else "auto", memory_gb=args.budget or 8.0)
    network = FunctionalNetwork(args.network, SHAPE, CLASSES)
    size, image = CLASSES * cell.ipc, 4 * SHAPE[0] * SHAPE[1] * SHAPE[2]
    # as the module counts what a run holds all the time
    data = (MemoryPart("real data", REAL_IMAGES * (image + 8)), MemoryPart("synthetic set", 5 * size * image))
    before = data[0].size + 4 * size * image
    estimate = objective.plan_memory(Workload(network, size, resident=data), execution)
    network.to(device)
    generator = torch.Generator().manual_seed(0)
    synthetic = SyntheticSet(torch.randn(size, *SHAPE, generator=generator), class_labels(CLASSES, cell.ipc), 0.01).to(
        device
    )
    real = RealSet(torch.zeros(CLASSES, *SHAPE), torch.arange(CLASSES), CLASSES)  # the step reads nothing of it
    problem = Problem(synthetic, real, network)
    start = network.initial(0)
    target = start + 0.01 * torch.randn(start.shape, generator=generator)
    segment = TrajectorySegment((0, 0), start.to(device), target.to(device))

    def step() -> None:
        synthetic.images.grad = None
        draw = objective.draw(problem, lambda: segment, StepContext(0, 0))
        (scored,) = objective.score(problem, [segment], draw, with_gradient=True)
        objective.loss(problem, scored).backward()

    step()  # first use of kernels and thread pools
    synthetic.images.grad = None
    started = time.perf_counter()
    peak = peak_above_start(step, device)
    return {
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak,
        "stored_bytes": 4 * network.num_parameters * (args.steps + 1),
        "estimated_bytes": estimate.total - before,
        "estimated_with_data_bytes": estimate.total,
        "estimate": str(estimate),
        "pieces": estimate.parts[-1].note,
    }


def in_own_process(args: argparse.Namespace, **changed: object) -> dict[str, Any]:
    """Run one variant in a fresh process and return its figures."""
    settings = {k: v for k, v in vars(args).items() if k not in ("budgets", "out", "ipc", "budget")} | changed
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="ConvNet-3")
    parser.add_argument("--steps", type=int, default=1, help="Student steps.")
    parser.add_argument("--budgets", type=float, nargs="+", default=[8.0, 2.0], help="memory_gb of micro_batch: auto.")
    parser.add_argument("--augmentation", default="color_crop_cutout_flip_scale_rotate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ipc", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", default=None, help="JSON file to write.")
    args = parser.parse_args()
    if args.ipc is not None:
        print(json.dumps(measure(args)))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(f"{hardware(args.device)}; torch {torch.__version__}; {args.threads} thread(s)")
    print(f"{args.network}, CIFAR-100, {args.steps} student steps, one candidate")
    print(f"{'cell':8} {'micro_batch':>22} {'peak MB':>9} {'less path':>10} {'estimate':>9} {'ratio':>6} {'s':>7}")
    rows = []
    for cell in CELLS:
        for budget in (0.0, *args.budgets):
            row = in_own_process(args, ipc=cell.ipc, budget=budget)
            what = "null" if budget == 0 else f"auto, memory_gb {budget:g}"
            rows.append({"ipc": cell.ipc, "batch_syn": cell.batch_syn, "micro_batch": what, **row})
            peak, stored, estimated = (row[f"{name}_bytes"] / 1e6 for name in ("peak", "stored", "estimated"))
            print(
                f"ipc {cell.ipc:<4} {what:>22} {peak:9.1f} {peak - stored:10.1f} {estimated:9.1f} "
                f"{peak / estimated:6.2f} {row['seconds']:7.1f}  {row['pieces']}",
                flush=True,
            )
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("ipc", "budget", "out")}
        record = {
            "hardware": hardware(args.device),
            "torch": torch.__version__,
            "commit": commit,
            "settings": settings,
            "largest_total_gib": max(row["estimated_with_data_bytes"] for row in rows) / GIB,
            "rows": rows,
        }
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
