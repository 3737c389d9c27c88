"""Time and memory of one trajectory-matching step against plain backpropagation through the unroll.

Each variant runs in a process of its own, so that one's memory cannot hide in another's. The variants take turns over
several rounds, and the time is the median over rounds of the ratio within a round, for the machine's speed drifts.
Memory is the peak of the process above its level just before the step (on CUDA: of the allocator); stored parameters,
4 P bytes for each student step, are counted apart. So is the first step, which compiles where a variant is compiled:
with an empty cache for one candidate in the first round, from that cache afterwards.

    python benchmarks/step_cost.py                       # ConvNet-3, 32x32, batch 10, 50 student steps
    python benchmarks/step_cost.py --size 8 --channels 1 --network ConvNet-3-W32 --steps 20
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dd_lightning.execution.compiled_loss import compiled_loss, compiled_order
from dd_lightning.functional.augment import DSA, augment
from dd_lightning.functional.products import DifferentiatedLoss, differentiated
from dd_lightning.functional.trajectory import (
    InnerStep,
    permuted_batches,
    trajectory_loss,
    trajectory_loss_gradient,
    unroll,
    unroll_adjoint,
)
from dd_lightning.networks import FunctionalNetwork, training_loss
from dd_lightning.training.parallel_networks import batching_pays

VARIANTS = (
    "plain unroll",
    "adjoint, 1 candidate",
    "adjoint, 3 candidates",
    "adjoint by grad(jvp), 1 candidate",
    "adjoint, compiled, 1 candidate",
    "adjoint, compiled, 3 candidates",
    "compiled, bfloat16, 1 candidate",
    "compiled, bfloat16, 3 candidates",
)


def plain_step(
    network: FunctionalNetwork, images: Tensor, lr: Tensor, labels: Tensor, ends: list[Tensor], steps: list[InnerStep]
) -> None:
    """Do what the published code does, without its detours: one graph over all student steps."""
    loss = training_loss(network)
    start, target = ends
    theta = start.clone().requires_grad_()
    for indices, draw in steps:
        value = loss(theta, augment(images[indices], draw), labels[indices])
        theta = theta - lr * torch.autograd.grad(value, theta, create_graph=True)[0]
    trajectory_loss(theta, start, target).backward()


def adjoint_step(
    loss: DifferentiatedLoss,
    images: Tensor,
    lr: Tensor,
    labels: Tensor,
    candidates: list[list[Tensor]],
    steps: list[InnerStep],
) -> None:
    """Score the candidates, together where that pays, then differentiate the first one."""
    starts = [start for start, _ in candidates]
    pixels = len(steps[0].indices) * images.shape[-2] * images.shape[-1]
    vectorized = len(candidates) > 1 and batching_pays(images.device.type, pixels)
    paths = unroll(loss, starts, lr.detach(), images.detach(), labels, steps, vectorized=vectorized)
    (start, target), path = candidates[0], paths[0]
    del paths
    cotangent = trajectory_loss_gradient(path[-1], start, target)
    unroll_adjoint(loss, path, lr.detach(), images.detach(), labels, steps, cotangent)


def process_memory(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_above_start(step: Callable[[], None], device: torch.device) -> int:
    """Return by how many bytes memory peaks above its level just before a step."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps freed must not serve this one unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = process_memory("VmRSS")
    step()
    return process_memory("VmHWM") - before


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Run one variant in this process."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    network = FunctionalNetwork(args.network, (args.channels, args.size, args.size), 10).to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, args.channels, args.size, args.size, generator=generator).to(device)
    images.requires_grad_()
    labels = (torch.arange(args.batch) % 10).to(device)
    lr = torch.tensor(0.01, device=device, requires_grad=True)
    policy = DSA()
    steps = [
        InnerStep(indices.to(device), policy.draw(generator, len(indices), (args.size, args.size)))
        for indices in permuted_batches(args.batch, None, args.steps, generator)
    ]
    candidates = []
    for seed in range(3):
        start = network.initial(seed).to(device)
        candidates.append([start, start + 0.01 * torch.randn(start.shape, generator=generator).to(device)])
    count = 3 if "3 cand" in args.variant else 1
    loss = training_loss(network, "bfloat16" if "bfloat16" in args.variant else "float32")
    student = differentiated(loss, "reverse_over_forward" if "jvp" in args.variant else "reverse_over_reverse")
    if "compiled" in args.variant:
        few = (candidates[0][0], images[:2], labels[:2])
        student = compiled_loss(loss, compiled_order(training_loss(network), *few))

    def step() -> None:
        if args.variant == "plain unroll":
            plain_step(network, images, lr, labels, candidates[0], steps)
        else:
            adjoint_step(student, images, lr, labels, candidates[:count], steps)

    started = time.perf_counter()
    step()  # first use of kernels and thread pools, and compilation
    first = time.perf_counter() - started
    memory = peak_above_start(step, device)
    seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    stored = 4 * network.num_parameters * args.steps * (0 if args.variant == "plain unroll" else count)
    return {"seconds": statistics.median(seconds), "first_seconds": first, "peak_bytes": memory, "stored_bytes": stored}


def in_own_process(args: argparse.Namespace, variant: str, **changed: int) -> dict[str, float]:
    """Run one variant in a fresh process and return its figures."""
    settings = {k: v for k, v in vars(args).items() if k not in ("variant", "out")} | changed | {"variant": variant}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def hardware(device: str) -> str:
    """Name the processor, or the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def commit() -> str:
    """Return the commit that is checked out."""
    git = ["git", "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="ConvNet-3")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="Steps timed in one process.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variant", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", default=None, help="JSON file to write.")
    args = parser.parse_args()
    if args.variant is not None:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        rounds = [{variant: in_own_process(args, variant) for variant in VARIANTS} for _ in range(args.rounds)]
    plain = VARIANTS[0]
    rows = {
        variant: {
            "seconds": statistics.median(figures[variant]["seconds"] for figures in rounds),
            "ratio": statistics.median(figures[variant]["seconds"] / figures[plain]["seconds"] for figures in rounds),
            "peak_bytes": statistics.median(figures[variant]["peak_bytes"] for figures in rounds),
            "stored_bytes": rounds[0][variant]["stored_bytes"],
            "first_seconds": rounds[0][variant]["first_seconds"],
        }
        for variant in VARIANTS
    }
    base = rows[plain]
    print(f"{hardware(args.device)}; torch {torch.__version__}; {args.threads} thread(s)")
    print(f"{args.network}, {args.size}x{args.size}, batch {args.batch}, {args.steps} student steps")
    print(f"{'variant':36} {'s':>8} {'time':>6} {'peak MB':>9} {'less stored':>12} {'memory':>7} {'first s':>8}")
    for variant, row in rows.items():
        own = row["peak_bytes"] - row["stored_bytes"]
        print(
            f"{variant:36} {row['seconds']:8.3f} {row['ratio']:6.2f} "
            f"{row['peak_bytes'] / 1e6:9.1f} "
            f"{own / 1e6:12.1f} {own / base['peak_bytes']:7.3f} {row['first_seconds']:8.1f}"
        )
    growth = {steps: in_own_process(args, VARIANTS[1], steps=steps, repeats=1) for steps in (10, 20, 40, 80)}
    print("adjoint, 1 candidate: peak less stored parameters by student steps (MB)")
    for steps, row in growth.items():
        print(
            f"  {steps:3}: {(row['peak_bytes'] - row['stored_bytes']) / 1e6:8.1f}   peak {row['peak_bytes'] / 1e6:8.1f}"
        )
    if args.out:
        record = {
            "hardware": hardware(args.device),
            "torch": torch.__version__,
            "commit": commit(),
            "settings": {k: v for k, v in vars(args).items() if k not in ("variant", "out")},
            "variants": rows,
            "rounds": rounds,
            "growth": growth,
        }
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
