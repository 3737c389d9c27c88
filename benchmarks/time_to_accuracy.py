r"""The whole job against the clock: from the raw images to a distilled set of a given accuracy, experts included.

    python benchmarks/time_to_accuracy.py --root data --device cuda --out benchmarks/results/time_to_accuracy_cuda

runs trajectory matching on CIFAR-10 at 1 image per class at the published setting, without and with DynaDistill, until
five fresh networks reach 45 % on the test images on average. It writes OUT.json and OUT.png, and prints how many
seconds each needed to 15, 25, 30, 35 and 45 %.

The clock counts what the job needs: reading and whitening the data, training the experts (once, by the run that comes
first, and counted for each), preparing, compiling if that is asked for, and the distillation steps; not the start of
Python, nor evaluations. A target is reached at the first evaluation whose mean is at or above it, so that times are as
fine as ``--every``. Each run is a process of its own with an empty compiler's cache.

In miniature, on a CPU:

    python benchmarks/time_to_accuracy.py --root data --network ConvNet-3-W16 --num_experts 2 --candidates 2 \
        --val_fraction 0.9 --steps 20 --every 10 --networks 2 --epochs 100
    python benchmarks/time_to_accuracy.py --config configs/quickstart.yaml --steps 40 --every 10 --goal 92 \
        --targets 70 80 90 92
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import yaml
from from_config import from_config
from lightning.pytorch import Callback, LightningModule, Trainer
from step_cost import hardware

from dd_lightning.callbacks import EvalCallback, TrajectorySelectionCallback
from dd_lightning.callbacks.attached import as_distillation
from dd_lightning.execution.memory import peak_memory_bytes
from dd_lightning.training.evaluation import mean_std

mpl.use("Agg")
import matplotlib.pyplot as plt

METHODS = ("base method", "DynaDistill")

Run = dict[str, Any]


class Clock(Callback):
    """Notes the seconds of each evaluated step, and ends the run when the goal is reached.

    It must come after the evaluation, whose own seconds it leaves out.

    Args:
        evaluation: What evaluates.
        goal: Accuracy in [0, 1].
    """

    def __init__(self, evaluation: EvalCallback, goal: float) -> None:
        self.evaluation = evaluation
        self.goal = goal
        self.started = time.perf_counter()
        self.points: list[dict[str, Any]] = []

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> None:
        point = self.evaluation.last()
        if point.step != trainer.global_step or any(known["step"] == point.step for known in self.points):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        elsewhere = self.evaluation.seconds + as_distillation(pl_module).pool.summary().get(
            "seconds_training_experts", 0.0
        )
        seconds = time.perf_counter() - self.started - elsewhere
        self.points.append({"step": point.step, "seconds": seconds, "accuracies": list(point.accuracies)})
        trainer.should_stop = trainer.should_stop or mean_std(point.accuracies)[0] >= self.goal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note step 0."""
        self._note(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Note a step that was evaluated."""
        self._note(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last step."""
        self._note(trainer, pl_module)


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line changes in the configuration."""
    given = {
        "data.init_args.root": args.root,
        "data.init_args.val_fraction": args.val_fraction,
        "model.network": args.network,
        "model.pool.init_args.num_experts": args.num_experts,
        "model.pool.init_args.train_epochs": args.train_epochs,
        "model.objective.init_args.syn_steps": args.syn_steps,
        "model.objective.init_args.execution.compile": args.compile,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    return chosen | {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in args.set)}


def run(args: argparse.Namespace) -> Run:
    """Distil once, in this process; experts and fitted whitening that earlier runs have left are used."""
    torch.set_num_threads(args.threads)
    config = yaml.safe_load(args.config.read_text())
    own = {
        "model.seed": args.seed,
        "model.pool.init_args.path": f"{args.folder}/experts",
        "data.init_args.cache_dir": f"{args.folder}/cache",
    }
    started = time.perf_counter()
    module, data = from_config(args.config, changes(args) | own)
    data.prepare_data()
    data.setup()
    seconds_data = time.perf_counter() - started
    protocol = dict(config.get("evaluation") or {}) | {"every_n_steps": args.every, "compare_random": False}
    if args.networks is not None:
        protocol["num_networks"] = args.networks
    if args.epochs is not None:
        protocol["epochs"] = args.epochs
    evaluation = EvalCallback(**protocol)
    clock = Clock(evaluation, args.goal / 100)
    callbacks: list[Callback] = [evaluation, clock]
    if args.method == "DynaDistill":
        callbacks.insert(0, TrajectorySelectionCallback(num_candidates=args.candidates, temperature=args.temperature))
    trainer = Trainer(
        accelerator="gpu" if args.device == "cuda" else args.device,
        devices=1,
        max_epochs=1,
        max_steps=args.steps or config["trainer"]["max_steps"],
        num_sanity_val_steps=0,
        default_root_dir=args.folder,  # where the evaluation writes its table
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return {
        "method": args.method,
        "seed": args.seed,
        "dataset": data.name,
        "points": clock.points,
        "steps": trainer.global_step,
        "seconds_data": seconds_data,
        "seconds_training_experts": module.pool.summary().get("seconds_training_experts", 0.0),
        "seconds_evaluating": evaluation.seconds,
        "candidate_evaluations": module.distillation.candidate_evaluations,
        "peak_memory_bytes": peak_memory_bytes(module.device),
    }


def in_own_process(method: str, seed: int, folder: str) -> Run:
    """Distil once, in a fresh process; its messages go to stderr."""
    flags = [f"--method={method}", f"--seed={seed}", f"--folder={folder}"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled-{method}-{seed}"}
    command = [sys.executable, __file__, *sys.argv[1:], *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: Run = json.loads(done.stdout.splitlines()[-1])
    return result


def seconds_to(target: float, curve: Sequence[Mapping[str, Any]], before: float) -> float | None:
    """Return the seconds from the beginning of the job to the first evaluation at or above a target.

    Args:
        target: Accuracy in [0, 1].
        curve: The evaluated steps.
        before: Seconds that the job took before this run: data and experts.

    Returns:
        None if it was not reached.
    """
    return next((before + p["seconds"] for p in curve if mean_std(p["accuracies"])[0] >= target), None)


def table(record: Mapping[str, Any]) -> str:
    """Return the table, in Markdown."""
    targets, shared = record["targets"], record["seconds_data"] + record["seconds_experts"]
    lines = ["| method | seed | " + " | ".join(f"s to {target:g} %" for target in targets)]
    lines[0] += " | last accuracy | steps | s in all | of it data | experts |"
    lines.append("| --- " * (len(targets) + 7) + "|")
    for row in record["runs"]:
        reached = [seconds_to(target / 100, row["points"], shared) for target in targets]
        shown = ["not reached" if seconds is None else f"{seconds:.1f}" for seconds in reached]
        mean, std = mean_std(row["points"][-1]["accuracies"])
        lines.append(
            f"| {row['method']} | {row['seed']} | {' | '.join(shown)} | {100 * mean:.1f} ± {100 * std:.1f} % "
            f"| {row['steps']} | {shared + row['points'][-1]['seconds']:.1f} | {record['seconds_data']:.1f} "
            f"| {record['seconds_experts']:.1f} |"
        )
    return "\n".join(lines)


def draw(record: Mapping[str, Any], title: str, out: Path) -> None:
    """Draw accuracy against the clock."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    shared = record["seconds_data"] + record["seconds_experts"]
    for row in record["runs"]:
        seconds = [shared + point["seconds"] for point in row["points"]]
        mean, std = zip(*(mean_std(point["accuracies"]) for point in row["points"]), strict=True)
        color = f"C{METHODS.index(row['method'])}"
        first = next(other for other in record["runs"] if other["method"] == row["method"]) is row
        label = row["method"] if first else None
        axes.plot(seconds, [100 * m for m in mean], marker="o", markersize=3, color=color, label=label)
        low, high = zip(*((100 * (m - s), 100 * (m + s)) for m, s in zip(mean, std, strict=True)), strict=True)
        axes.fill_between(seconds, low, high, color=color, alpha=0.15)
    axes.axvspan(0, record["seconds_data"], color="gray", alpha=0.3, label="reading and preparing the data")
    axes.axvspan(record["seconds_data"], shared, color="gray", alpha=0.12, label="training experts")
    axes.axhline(record["goal"], color="gray", linestyle="--", label=f"goal: {record['goal']:g} %")
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds from the raw images, without evaluations")
    axes.set_ylabel("held-out accuracy (%)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=150)


def main() -> None:
    """Run, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/mtt/cifar10_ipc1.yaml"))
    parser.add_argument("--root", default=None, help="Folder of the data files.")
    parser.add_argument("--network", default=None, help="Architecture, if other than the configuration's.")
    parser.add_argument("--num_experts", type=int, default=None)
    parser.add_argument("--train_epochs", type=int, default=None, help="Epochs of an expert; what is used by default.")
    parser.add_argument("--val_fraction", type=float, default=None, help="Share of the training images to leave out.")
    parser.add_argument("--syn_steps", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None, help="The most distillation steps.")
    parser.add_argument("--every", type=int, default=100, help="Steps between two evaluations.")
    parser.add_argument("--networks", type=int, default=None, help="Fresh networks per evaluation.")
    parser.add_argument("--epochs", type=int, default=None, help="Of an evaluation, if other than the protocol's.")
    parser.add_argument("--candidates", type=int, default=3, help="Of DynaDistill; the paper's 3 by default.")
    parser.add_argument("--temperature", type=float, default=0.5, help="Of DynaDistill; the paper's by default.")
    parser.add_argument("--goal", type=float, default=45.0, help="Accuracy in percent at which a run ends.")
    parser.add_argument("--targets", type=float, nargs="+", default=[15.0, 25.0, 30.0, 35.0, 45.0], help="In percent.")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default=None)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="More of the configuration, by dotted names."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="Path of the JSON and the figure, without a suffix.")
    parser.add_argument("--method", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method is not None:
        print(json.dumps(run(args)))
        return
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    record: dict[str, Any] = {
        "hardware": hardware(args.device),
        "torch": torch.__version__,
        "commit": git.stdout.strip(),
        "threads": args.threads,
    }
    changed = {name: value for name, value in changes(args).items() if name != "data.init_args.root"}
    record |= {"config": str(args.config), "changes": changed, "goal": args.goal, "targets": args.targets}
    record["options"] = {
        name: getattr(args, name) for name in ("steps", "every", "networks", "epochs", "candidates", "temperature")
    }
    record |= {"seconds_data": 0.0, "seconds_experts": 0.0, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        for method, seed in ((method, seed) for seed in args.seeds for method in args.methods):
            row = in_own_process(method, seed, folder)
            if not record["runs"]:  # later runs find the whitening done, as they find the experts
                record["seconds_data"] = row["seconds_data"]
            record["seconds_experts"] += row["seconds_training_experts"]
            record["runs"].append(row)
            if args.out is not None:
                args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['hardware']}; torch {record['torch']}; {args.threads} thread(s); commit {record['commit']}")
    print(table(record))
    if args.out is not None:
        told = "".join(f", {name.split('.')[-1]} {value}" for name, value in changed.items())
        title = f"{args.config}{told}\n{record['hardware']}, {args.threads} thread(s)"
        draw(record, title, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
