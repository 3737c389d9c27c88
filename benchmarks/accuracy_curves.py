"""Draw accuracy-against-step curves of finished runs, and write their numbers beside the figure.

    python benchmarks/accuracy_curves.py OUT --commit 1234567 base=runs/a/version_0 "+ DynaDistill=runs/b/version_0"

writes OUT.png and OUT.json: curves, summaries, the commands' resolved settings, hardware and commit.
"""

import argparse
import csv
import json
import platform
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt


def read_curve(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the evaluation points of a run by network, accuracies in [0, 1]."""
    curves: dict[str, list[dict[str, Any]]] = {}
    with (run / "evaluation.csv").open() as file:
        for row in csv.DictReader(file):
            accuracies = [float(value) for key, value in row.items() if key.startswith("accuracy_") and value]
            # an early point of a single network has no deviation
            point = {"step": int(row["step"]), "mean": float(row["mean"]), "std": float(row["std"] or 0)}
            curves.setdefault(row["network"], []).append(point | {"accuracies": accuracies})
    return curves


def hardware() -> str:
    """Name the processor and the number of its cores, or the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def main() -> None:
    """Draw the figure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="Path of the figure, without its suffix.")
    parser.add_argument("runs", nargs="+", help="label=folder of a run.")
    parser.add_argument("--title", default="")
    parser.add_argument("--command", action="append", default=[], help="Command to record; once for each run.")
    parser.add_argument("--commit", required=True, help="Commit that the runs were made with, to record.")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    record: dict[str, Any] = {"hardware": hardware(), "torch": torch.__version__, "commands": args.command, "runs": {}}
    record["commit"] = args.commit
    baselines = []
    for run in args.runs:
        label, folder = run.split("=", 1)
        curves, result = read_curve(Path(folder)), json.loads((Path(folder) / "summary.json").read_text())
        record["runs"][label] = {"curves": curves, "summary": result | {"files": ""}}
        if result["random_real"] is not None:
            baselines.append(100 * sum(result["random_real"]["accuracies"]) / len(result["random_real"]["accuracies"]))
        for network, points in curves.items():
            steps = [point["step"] for point in points]
            mean, std = ([100 * point[key] for point in points] for key in ("mean", "std"))
            name = label if len(curves) == 1 else f"{label}, {network}"
            axes.plot(steps, mean, marker="o", markersize=3, label=name)
            low, high = zip(*((m - s, m + s) for m, s in zip(mean, std, strict=True)), strict=True)
            axes.fill_between(steps, low, high, alpha=0.2)
    if baselines:
        axes.axhline(sum(baselines) / len(baselines), color="gray", linestyle="--", label="random real images")
    axes.set_xlabel("distillation step")
    axes.set_ylabel("held-out accuracy (%)")
    axes.set_title(args.title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(args.out.with_suffix(".png"), dpi=150)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
