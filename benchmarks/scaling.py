"""How a trajectory-matching step and the training of experts grow, one axis at a time.

From a small base setting one number is varied: the student's steps, the synthetic images per student step, the images
per class, the candidates of a step, and the experts that are trained together. Each point runs in a process of its own,
so that the memory of one cannot hide in another's; points take turns over several rounds, and the median over rounds is
reported. Memory is the peak above the level just before the step or the epoch.

    python benchmarks/scaling.py --out benchmarks/results/scaling_cpu          # writes .json and .png
    python benchmarks/scaling.py --out OUT --axes experts --rounds 1           # a part: other axes in OUT.json stay
    python benchmarks/scaling.py --out OUT --variants eager compiled           # what is compiled costs minutes more
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from step_cost import adjoint_step, hardware, peak_above_start

from dd_lightning.execution.compiled_loss import compiled_loss, compiled_order
from dd_lightning.functional.augment import DSA
from dd_lightning.functional.products import differentiated
from dd_lightning.functional.trajectory import InnerStep, permuted_batches
from dd_lightning.networks import FunctionalNetwork, training_loss
from dd_lightning.sets.real import RealSet
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
from dd_lightning.training.experts import train_experts
from dd_lightning.training.recipes import ExpertRecipe

mpl.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 10
BASE = {"steps": 10, "batch": 10, "ipc": 10, "candidates": 1, "experts": 1}
AXES = {
    "steps": (5, 10, 20, 40, 80),
    "batch": (5, 10, 20, 50, 100),
    "ipc": (1, 5, 10, 50, 100),
    "candidates": (1, 2, 3, 5, 8),
    "experts": (1, 2, 4, 8),
}
LABELS = {
    "steps": "student steps N",
    "batch": "synthetic images per student step",
    "ipc": "images per class",
    "candidates": "candidates M",
    "experts": "experts trained together",
}

Figures = dict[str, float]
Point = dict[str, Any]


def distillation_step(args: argparse.Namespace) -> Callable[[], None]:
    """Return one step of trajectory matching on noise: the candidates' scores and the gradient of the first."""
    device, shape = torch.device(args.device), (args.channels, args.size, args.size)
    network = FunctionalNetwork(args.network, shape, CLASSES).to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(CLASSES * args.ipc, *shape, generator=generator).to(device)
    labels = (torch.arange(len(images)) % CLASSES).to(device)
    policy = DSA()
    steps = [
        InnerStep(indices.to(device), policy.draw(generator, len(indices), shape[1:]))
        for indices in permuted_batches(len(images), args.batch, args.steps, generator)
    ]
    candidates = []
    for seed in range(args.candidates):
        start = network.initial(seed).to(device)
        candidates.append([start, start + 0.01 * torch.randn(start.shape, generator=generator).to(device)])
    loss, lr = training_loss(network), torch.tensor(0.01, device=device)
    student = differentiated(loss)
    if args.variant == "compiled":
        student = compiled_loss(loss, compiled_order(loss, candidates[0][0], images[:2], labels[:2]))
    return lambda: adjoint_step(student, images, lr, labels, candidates, steps)


def measure_step(args: argparse.Namespace) -> Figures:
    """Time a distillation step in this process, and take its memory."""
    device, step = torch.device(args.device), distillation_step(args)
    step()  # first use of kernels and thread pools, and compilation
    memory = peak_above_start(step, device)
    seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "peak_bytes": memory}


def measure_experts(args: argparse.Namespace) -> Figures:
    """Time the training of experts in this process: seconds of one expert's epoch, on noise."""
    device, shape = torch.device(args.device), (args.channels, args.size, args.size)
    network = FunctionalNetwork(args.network, shape, CLASSES).to(device)
    images = torch.randn(args.real, *shape, generator=torch.Generator().manual_seed(0))
    real = RealSet(images, torch.arange(args.real) % CLASSES, CLASSES).to(device)
    recipe = ExpertRecipe()
    with tempfile.TemporaryDirectory() as folder:
        store = ExpertStore(folder)
        identity = ExpertIdentity.of(network, recipe, 1 + args.repeats, fingerprint="noise", dataset="noise")

        def train(epochs: int) -> None:
            train_experts(
                network,
                real,
                store,
                identity,
                recipe,
                args.experts,
                epochs,
                progress_bar=False,
                together=args.experts,
            )

        train(1)  # first use of everything
        started = time.perf_counter()
        memory = peak_above_start(lambda: train(1 + args.repeats), device)
        seconds = time.perf_counter() - started
    return {"seconds": seconds / (args.experts * args.repeats), "peak_bytes": memory}


def in_own_process(args: argparse.Namespace, axis: str, value: int, variant: str) -> Figures:
    """Measure one point in a fresh process."""
    kept = ("network", "size", "channels", "real", "threads", "repeats", "device")
    settings = {name: getattr(args, name) for name in kept} | BASE | {axis: value, "axis": axis, "variant": variant}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{axis} {value}, {variant}: {done.stderr.strip().splitlines()[-1]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def measured(args: argparse.Namespace) -> list[Point]:
    """Measure all points that were asked for, in turns."""
    wanted = [
        (axis, value, variant)
        for axis in args.axes
        for value in AXES[axis]
        for variant in args.variants
        if (axis, variant) != ("experts", "compiled")
    ]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        rounds = [{point: in_own_process(args, *point) for point in wanted} for _ in range(args.rounds)]
    return [
        {
            "axis": axis,
            "value": value,
            "variant": variant,
            "seconds": statistics.median(figures[axis, value, variant]["seconds"] for figures in rounds),
            "peak_bytes": statistics.median(figures[axis, value, variant]["peak_bytes"] for figures in rounds),
            "rounds": [figures[axis, value, variant] for figures in rounds],
        }
        for axis, value, variant in wanted
    ]


def show(points: Sequence[Point]) -> None:
    """Print the table."""
    print(f"{'axis':12} {'value':>6} {'variant':9} {'s':>9} {'/ linear':>9} {'peak MB':>9}")
    for point in points:
        base = next(
            p
            for p in points
            if (p["axis"], p["variant"]) == (point["axis"], point["variant"]) and p["value"] == BASE[point["axis"]]
        )
        ratio = point["seconds"] / linear(point["axis"], point["value"], base["seconds"])
        print(
            f"{point['axis']:12} {point['value']:6} {point['variant']:9} {point['seconds']:9.4f} {ratio:9.2f} "
            f"{point['peak_bytes'] / 1e6:9.1f}"
        )


def linear(axis: str, value: int, base: float) -> float:
    """Return the seconds of a point if cost were proportional to the axis; an expert's epoch costs the same then."""
    return base if axis == "experts" else base * value / BASE[axis]


def draw(points: Sequence[Point], title: str, out: Path) -> None:
    """Draw a panel for each axis: seconds on the left, memory on the right, and what linear growth would be."""
    axes_of = [axis for axis in AXES if any(point["axis"] == axis for point in points)]
    rows = -(-len(axes_of) // 3)
    figure, grid = plt.subplots(rows, 3, figsize=(14, 3.8 * rows + 0.8), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes_of, grid.flat, strict=False):
        handles |= _draw_axis(axis, [point for point in points if point["axis"] == axis], panel)
    for panel in list(grid.flat)[len(axes_of) :]:
        panel.axis("off")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), fontsize=9)
    figure.savefig(out, dpi=110)


def _draw_axis(axis: str, points: Sequence[Point], panel: Any) -> dict[str, Any]:  # noqa: ANN401  (no types of its own)
    memory, handles = panel.twinx(), {}
    for variant, style in (("eager", "-"), ("compiled", "--")):
        own = sorted((p for p in points if p["variant"] == variant), key=lambda point: int(point["value"]))
        if not own:
            continue
        values = [p["value"] for p in own]
        seconds, megabytes = [p["seconds"] for p in own], [p["peak_bytes"] / 1e6 for p in own]
        (line,) = panel.plot(values, seconds, "o", linestyle=style, color="tab:blue", markersize=4)
        handles[f"seconds, {variant}"] = line
        (line,) = memory.plot(values, megabytes, "s", linestyle=style, color="tab:red", markersize=4)
        handles[f"peak memory, {variant}"] = line
        base = seconds[values.index(BASE[axis])]
        (line,) = panel.plot(values, [linear(axis, v, base) for v in values], linestyle=":", color="gray")
        handles["seconds if cost were proportional, from the base setting"] = line
    for scale in (panel, memory):
        scale.set_yscale("log")
        low, high = scale.get_ylim()
        if high / low < 10:  # a flat line is to look flat
            center = (low * high) ** 0.5
            scale.set_ylim(center / 10**0.5, center * 10**0.5)
        scale.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        scale.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        scale.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    panel.set_xscale("log")
    values = sorted({p["value"] for p in points})
    panel.set_xticks(values, [str(value) for value in values])
    panel.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    panel.set_xlabel(LABELS[axis])
    panel.set_ylabel(f"seconds per {'expert epoch' if axis == 'experts' else 'distillation step'}", color="tab:blue")
    memory.set_ylabel("peak memory above start (MB)", color="tab:red")
    panel.grid(alpha=0.3)
    return handles


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="*", choices=AXES, default=list(AXES), help="None: draw OUT.json again.")
    parser.add_argument("--variants", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--network", default="ConvNet-3-W32")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--real", type=int, default=1024, help="Real images of an expert's epoch.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="Steps, or epochs, timed in one process.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="Path of the JSON and the figure, without a suffix.")
    for axis, value in BASE.items():
        parser.add_argument(f"--{axis}", type=int, default=value, help=argparse.SUPPRESS)
    parser.add_argument("--axis", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="eager", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.axis is not None:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure_experts(args) if args.axis == "experts" else measure_step(args)))
        return
    chosen = ("network", "size", "channels", "real", "threads", "repeats", "rounds")
    settings = {name: getattr(args, name) for name in chosen} | {"base": BASE}
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    origin = {"hardware": hardware(args.device), "torch": torch.__version__, "commit": git.stdout.strip()}
    points = {}
    if args.out is not None and args.out.with_suffix(".json").exists():
        record = json.loads(args.out.with_suffix(".json").read_text())
        if record["settings"] != settings:
            parser.error(f"{args.out}.json was measured with {record['settings']}; give the same, or another --out")
        points = {(p["axis"], p["value"], p["variant"]): p for p in record["points"]}
    points |= {(p["axis"], p["value"], p["variant"]): p | origin for p in measured(args)}
    rows = sorted(points.values(), key=lambda p: (list(AXES).index(p["axis"]), p["variant"] != "eager", p["value"]))
    for known in sorted({(row["hardware"], row["torch"], row["commit"]) for row in rows}):
        print("{}; torch {}; commit {}".format(*known) + f"; {args.threads} thread(s)")
    setting = (
        f"{args.network}, {args.size}x{args.size}; base: {BASE['steps']} student steps of {BASE['batch']} images, "
        f"{BASE['ipc']} per class, {BASE['candidates']} candidate; expert epochs of {args.real} images"
    )
    print(setting)
    show(rows)
    if args.out is not None:
        text = json.dumps({"settings": settings, "points": rows}, indent=1)
        args.out.with_suffix(".json").write_text(text + "\n")
        draw(rows, f"{setting}\n{origin['hardware']}, {args.threads} thread(s)", args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
