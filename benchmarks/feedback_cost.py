"""What DynaDistill's feedback costs and brings, in full and cut short, on the digits.

    python benchmarks/feedback_cost.py --out benchmarks/results/feedback_cost_cpu.json

The settings are the quickstart's. Seconds are those of distillation steps alone, from the start of a step to the end of
its update: experts are trained before. The variants take turns of 20 steps over several rounds, and ratios are medians
over rounds of the ratio within a round, for the machine's speed drifts.

For the accuracies each variant distils once with each seed, and the images of every ``--every``-th step are put aside
and evaluated later. ``last`` is the accuracy after all steps, mean and standard deviation over seeds x fresh networks.
``equal time`` is the accuracy when the base method has finished its steps, by the ratio of seconds, and linear between
the two nearest evaluations. The gains over the base method are paired by seed, with Student's 95 % interval over seeds.

How well the cheaper losses rank is told apart: the rank correlation, over all (expert, start epoch) of the pool, of the
loss after all steps with that after the first n, and with that of another step's batches and augmentations on the same
images, as it is when a loss is remembered.

It can run in pieces: ``--part time``, ``--part distil --seeds 0``, ``--part distil --seeds 1``, ``--part evaluate``,
``--part rank``. What a call does not measure stays in ``--out`` as it is, and the table is of all that is complete.
"""

import argparse
import json
import math
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from from_config import from_config
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from scipy.stats import t as student
from step_cost import hardware
from torch import Tensor

from dd_lightning.callbacks import TrajectorySelectionCallback
from dd_lightning.callbacks.attached import as_distillation
from dd_lightning.functional.random import StepContext
from dd_lightning.functional.trajectory import trajectory_loss
from dd_lightning.module import DistillationModule
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives import Problem, TrajectoryMatching
from dd_lightning.pools import PoolSetup, TrajectoryPool
from dd_lightning.sets.synthetic import SyntheticSet
from dd_lightning.training.evaluation import evaluate_synthetic_set, get_recipe, mean_std

CONFIG = Path("configs/quickstart.yaml")
RANKED_STEPS = (1, 2, 5, 10)

VARIANTS: dict[str, dict[str, Any] | None] = {
    "base method": None,
    "3 candidates": {},
    "3 candidates, every 5th step": {"every_n_steps": 5},
    "3 candidates, 1 refreshed per step": {"refresh_per_step": 1},
    "3 candidates, scored by 5 of 20 steps": {"score_steps": 5},
    "1 refreshed, scored by 5 of 20 steps": {"refresh_per_step": 1, "score_steps": 5},
}

Row = dict[str, Any]


class Stopwatch(Callback):
    """Takes the time of distillation steps alone, and puts images aside.

    It must be the first callback: its steps begin before the selection and end before anything else is done.

    Args:
        every: Steps between two sets of images.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.seconds: list[float] = [0.0]
        self.aside: dict[str, Tensor] = {}
        self._begun = 0.0

    def _put_aside(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = as_distillation(pl_module)
        self.aside[f"images/{trainer.global_step}"] = module.synthetic_set.decoded().detach().clone().cpu()
        self.aside[f"lr/{trainer.global_step}"] = torch.tensor(module.distillation.student_lr, dtype=torch.float64)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the initial images aside."""
        self._put_aside(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Start the clock."""
        del trainer
        _finish(pl_module.device)
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Stop the clock."""
        _finish(pl_module.device)
        self.seconds.append(self.seconds[-1] + time.perf_counter() - self._begun)
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._put_aside(trainer, pl_module)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit(variant: str, seed: int, steps: int, args: argparse.Namespace) -> tuple[Stopwatch, DistillationModule]:
    """Distil once."""
    options = VARIANTS[variant]
    module, data = from_config(CONFIG, {"model.seed": seed, "model.pool.init_args.path": str(args.experts)})
    watch = Stopwatch(args.every)
    callbacks: list[Callback] = [watch]
    if options is not None:
        choice = {"temperature": args.temperature, "normalize": args.normalize} | options
        callbacks.append(TrajectorySelectionCallback(**choice))
    trainer = Trainer(
        accelerator=args.device,
        devices=1,
        max_epochs=1,
        max_steps=steps,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return watch, module


def timed(args: argparse.Namespace) -> list[dict[str, float]]:
    """Return the seconds per step of each variant, for each round."""
    first, last = 5, 25  # the first step scores all candidates whatever the variant; 20 steps are four times five
    rounds = []
    for _ in range(args.rounds):
        watches = {variant: fit(variant, 0, last, args)[0] for variant in VARIANTS}
        rounds.append(
            {v: (watch.seconds[last] - watch.seconds[first]) / (last - first) for v, watch in watches.items()}
        )
    return rounds


def distil(variant: str, seed: int, args: argparse.Namespace) -> Row:
    """Distil once; the images put aside go to a file."""
    watch, module = fit(variant, seed, args.steps, args)
    file = _file(variant, seed, args)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(watch.aside, file)
    evaluations = module.distillation.candidate_evaluations
    return {"variant": variant, "seed": seed, "steps": args.steps, "candidate_evaluations": evaluations}


def evaluate(row: Row, args: argparse.Namespace) -> Row:
    """Train fresh networks on all images that a run put aside."""
    module, data = from_config(CONFIG, {})
    network = FunctionalNetwork(module.network_spec, data.image_shape, data.num_classes)
    recipe = get_recipe("mtt", args.epochs, "color_crop_cutout_scale_rotate")
    tensors = load_file(_file(row["variant"], row["seed"], args))
    labels = torch.arange(data.num_classes).repeat_interleave(module.storage.effective_ipc)
    accuracies = {}
    for step in sorted(int(name.split("/")[1]) for name in tensors if name.startswith("images/")):
        lr = float(tensors[f"lr/{step}"])
        images = tensors[f"images/{step}"]
        result = evaluate_synthetic_set(images, labels, lr, data.test, network, recipe, args.networks, seed=row["seed"])
        accuracies[str(step)] = list(result.accuracies)
    return row | {"accuracies": accuracies, "networks": args.networks}


def ranks(seed: int, args: argparse.Namespace) -> Row:
    """Return rank correlations with the whole loss on the images that the base method put aside."""
    module, data = from_config(CONFIG, {"model.seed": seed, "model.pool.init_args.path": str(args.experts)})
    network = FunctionalNetwork(module.network_spec, data.image_shape, data.num_classes)
    objective, pool = cast(TrajectoryMatching, module.objective), cast(TrajectoryPool, module.pool)
    pool.prepare(PoolSetup(network, data.train, data.name, data.fingerprint, data.test, seed=seed))
    windows = range(pool.min_start_epoch, pool.max_start_epoch)
    segments = [pool.load((expert, epoch)) for expert in range(len(pool)) for epoch in windows]
    labels = torch.arange(data.num_classes).repeat_interleave(module.storage.effective_ipc)
    tensors, found = load_file(_file("base method", seed, args)), dict[str, list[float]]()
    for step in sorted(int(name.split("/")[1]) for name in tensors if name.startswith("images/")):
        synthetic = SyntheticSet(tensors[f"images/{step}"], labels, float(tensors[f"lr/{step}"]))
        losses: list[Tensor] = []
        for context in (StepContext(seed, step), StepContext(seed, step + 1)):
            problem = Problem(synthetic, data.train, network)
            draw = objective.draw(problem, lambda: segments[0], context)
            scored = [one for s in segments for one in objective.score(problem, [s], draw)]
            # losses after every number of steps, [n, candidates]
            losses.append(
                torch.stack(
                    [
                        torch.stack([trajectory_loss(theta, s.start, s.target) for theta in one.work])
                        for one, s in zip(scored, segments, strict=True)
                    ],
                    dim=1,
                )
            )
        whole = losses[0][-1]
        compared = {f"first {n} steps": losses[0][n] for n in RANKED_STEPS} | {"other draws": losses[1][-1]}
        for name, values in compared.items():
            found.setdefault(name, []).append(float(spearmanr(whole, values).statistic))
    return {"seed": seed, "candidates": len(segments), "correlations": found}


def _file(variant: str, seed: int, args: argparse.Namespace) -> Path:
    folder: Path = args.runs
    return folder / f"{variant.replace(' ', '_').replace(',', '')}_seed{seed}.safetensors"


def accuracy_at(row: Row, step: float) -> list[float]:
    """Return each network's accuracy after so many steps, linear between evaluations, the last one after all."""
    steps = sorted(int(evaluated) for evaluated in row["accuracies"])
    if step >= steps[-1]:
        return list(row["accuracies"][str(steps[-1])])
    after = next(i for i, evaluated in enumerate(steps) if evaluated > step)
    share = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
    earlier, later = (row["accuracies"][str(steps[i])] for i in (after - 1, after))
    return [a + share * (b - a) for a, b in zip(earlier, later, strict=True)]


def gain(own: Sequence[Row], base: Sequence[Row], step: float) -> tuple[float, float]:
    """Return the mean over seeds of the gain over the base method, and half its 95 % interval.

    Args:
        own: The variant's rows.
        base: Those of the base method, with the same seeds in the same order.
        step: The variant's step that is compared with the base method's last one.
    """
    gains = [
        statistics.mean(accuracy_at(a, step)) - statistics.mean(accuracy_at(b, math.inf))
        for a, b in zip(own, base, strict=True)
    ]
    mean = statistics.mean(gains)
    if len(gains) < 2:
        return mean, math.nan
    return mean, float(student.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / math.sqrt(len(gains))


def table(rows: Sequence[Row], rounds: Sequence[dict[str, float]]) -> dict[str, Row]:
    """Print the comparison of what is complete, and return its figures."""
    by_key = {(row["variant"], row["seed"]): row for row in rows if "accuracies" in row}
    seeds = [s for s in sorted({row["seed"] for row in rows}) if all((v, s) in by_key for v in VARIANTS)]
    if not seeds or not rounds:
        return {}
    base = [by_key["base method", seed] for seed in seeds]
    print(f"{len(rounds)} rounds; {len(seeds)} seeds ({', '.join(map(str, seeds))}) x {base[0]['networks']} networks")
    print(
        f"{'variant':38} {'evaluations':>11} {'ms/step':>8} {'/ base':>7} {'last':>13} {'gain':>13} "
        f"{'equal time':>13} {'gain':>13}"
    )
    figures = {}
    for variant in VARIANTS:
        own = [by_key[variant, seed] for seed in seeds]
        ratio = statistics.median(r[variant] / r["base method"] for r in rounds)
        end = own[0]["steps"] / ratio
        last = mean_std([a for row in own for a in accuracy_at(row, math.inf)])
        equal = mean_std([a for row in own for a in accuracy_at(row, end)])
        shown = figures[variant] = {
            "evaluations_per_step": statistics.mean(row["candidate_evaluations"] / row["steps"] for row in own),
            "seconds_per_step": statistics.median(r[variant] for r in rounds),
            "ratio": ratio,
            "last": last,
            "last_gain": gain(own, base, math.inf),
            "equal_time": equal,
            "equal_time_gain": gain(own, base, end),
        }
        print(
            f"{variant:38} {shown['evaluations_per_step']:11.2f} {1000 * shown['seconds_per_step']:8.1f} "
            f"{ratio:7.2f} {_percent(last)} {_percent(shown['last_gain'], '+')} {_percent(equal)} "
            f"{_percent(shown['equal_time_gain'], '+')}"
        )
    return figures


def _percent(figure: tuple[float, float], sign: str = "") -> str:
    mean, spread = figure
    return f"{f'{100 * mean:{sign}.1f} ± {100 * spread:.1f}':>13}"


def main() -> None:
    """Distil, evaluate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("time", "distil", "evaluate", "rank", "all"), default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=7, help="Of the timing.")
    parser.add_argument("--steps", type=int, default=120, help="Distillation steps; 120 in the quickstart.")
    parser.add_argument("--every", type=int, default=40, help="Steps between two evaluations.")
    parser.add_argument("--networks", type=int, default=5, help="Fresh networks per evaluation.")
    parser.add_argument("--epochs", type=int, default=None, help="Of an evaluation, if other than the protocol's.")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--normalize", choices=("none", "mean", "zscore"), default="none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experts", type=Path, default=Path("experts/digits_ConvNet-2-W32"))
    parser.add_argument("--runs", type=Path, default=Path("runs/feedback_cost"), help="Folder for the images.")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write, or to update, after every run.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = ("steps", "every", "networks", "epochs", "temperature", "normalize", "threads")
    settings = {name: getattr(args, name) for name in chosen}
    rows: dict[tuple[str, int], Row] = {}
    ranked: list[Row] = []
    timing: Row = {"rounds": []}
    if args.out is not None and args.out.exists():
        record = json.loads(args.out.read_text())
        if record["settings"] != settings:
            parser.error(
                f"{args.out} holds runs with the settings {record['settings']}; give the same, or another --out"
            )
        rows = {(row["variant"], row["seed"]): row for row in record["rows"]}
        ranked, timing = record["ranks"], record["timing"]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    origin = {"hardware": hardware(args.device), "torch": torch.__version__, "commit": git.stdout.strip()}

    def write() -> None:
        if args.out is not None:
            measured = {"timing": timing, "rows": [rows[key] for key in sorted(rows)], "ranks": ranked}
            args.out.write_text(json.dumps({"settings": settings} | measured, indent=1) + "\n")

    if args.part in ("time", "all"):
        fit("base method", 0, 2, args)  # experts, first calls
        timing = {"rounds": timed(args)} | origin
        write()
    if args.part in ("distil", "all"):
        for variant, seed in ((variant, seed) for seed in args.seeds for variant in VARIANTS):
            rows[variant, seed] = distil(variant, seed, args) | origin
            write()
    for key in [k for k, row in rows.items() if args.part in ("evaluate", "all") and "accuracies" not in row]:
        rows[key] = evaluate(rows[key], args)
        write()
    if args.part in ("rank", "all"):
        ranked = [ranks(seed, args) | origin for seed in args.seeds]
        write()
    for known in sorted({(row["hardware"], row["torch"], row["commit"]) for row in rows.values()}):
        print("{}; torch {}; commit {}".format(*known) + f"; {args.threads} thread(s)")
    figures = table(list(rows.values()), timing["rounds"])
    if ranked:
        print(f"rank correlation with the whole loss over {ranked[0]['candidates']} candidates, by step of the images")
        for name in ranked[0]["correlations"]:
            by_step = zip(*(row["correlations"][name] for row in ranked), strict=True)
            print(f"  {name:16}" + "".join(f"{statistics.mean(values):7.2f}" for values in by_step))
    if args.out is not None and figures:
        args.out.write_text(json.dumps(json.loads(args.out.read_text()) | {"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
