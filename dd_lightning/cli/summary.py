"""What a command closes with: a summary as plain values, and the tables made of it."""

from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from dd_lightning.callbacks import EvalCallback, EvaluationPoint
from dd_lightning.module import DistillationModule
from dd_lightning.training.evaluation import mean_std, percent


def summary(trainer: Trainer, module: DistillationModule) -> dict[str, Any]:
    """Return what a run achieved and what it cost, as values that JSON can hold.

    Accuracies are in [0, 1], one for each network, by the name of its curve; ``last`` is the headline, ``best`` was
    chosen afterwards. Where the recipe tests the networks several times, ``best_validation`` is the best test of each
    one.
    """
    evaluations = [each for each in trainer.callbacks if isinstance(each, EvalCallback)]  # type: ignore[attr-defined]
    accuracies: dict[str, Any] = {}
    random_real: dict[str, Any] | None = None
    for evaluation in evaluations:
        for network, name in evaluation.curve_names.items():
            last, best = evaluation.last(network), evaluation.best(network)
            accuracies[name] = {
                "split": evaluation.split,
                "last": {"step": last.step, **_accuracies(last)},
                "best": {"step": best.step, **_accuracies(best)},
            }
        if random_real is None and (baseline := evaluation.random_real) is not None:
            name = evaluation.curve_names[baseline.network]
            count = sum(min(module.storage.ipc, own) for own in module.problem.real.class_counts)
            draws = {"draws": len(baseline.accuracies)}  # one network trained on each
            random_real = {"network": name, "images": count, **draws, **_accuracies(baseline)}
    pool = module.pool.summary()
    return {
        "images": len(module.synthetic_set),
        "decoded_images": module.synthetic_set.decoded_size,
        "networks": accuracies,
        "random_real": random_real,
        "full_set": pool.get("full_set"),
        "steps": trainer.global_step,
        "skipped_steps": module.distillation.skipped_steps,
        "candidate_evaluations": module.distillation.candidate_evaluations,
        "seconds": module.distillation.cost.seconds,
        "seconds_evaluating": sum((evaluation.seconds for evaluation in evaluations), 0.0),
        "seconds_training_experts": pool.get("seconds_training_experts", 0.0),
        "peak_memory_bytes": module.distillation.cost.peak_memory,
        "device": str(module.device),
        "files": str(trainer.log_dir or trainer.default_root_dir),
    }


def _accuracies(point: EvaluationPoint) -> dict[str, Any]:
    values: dict[str, Any] = {"accuracies": list(point.accuracies)}
    if len(point.validations) > 1:
        values |= {"validations": len(point.validations), "best_validation": list(point.best_accuracies)}
    return values


def closing_table(result: dict[str, Any]) -> Table:
    """Lay a :func:`summary` out for a person."""
    table = Table(title="Dataset distillation", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, network in result["networks"].items():
        last, best = network["last"], network["best"]
        how = f"step {last['step']}; {len(last['accuracies'])} fresh {name}, held-out {network['split']} data"
        if result["decoded_images"] != result["images"]:
            how += f", trained on the {result['decoded_images']} that these decode to"
        table.add_row(f"{result['images']} distilled images", f"{percent(last['accuracies'])}  ({how})")
        if "best_validation" in last:
            table.add_row(
                f"best of {last['validations']} validations",
                f"{percent(last['best_validation'])}  (step {last['step']}; chosen on the same data)",
            )
        baseline = result["random_real"]
        if baseline is not None and baseline["network"] == name:
            gain = 100 * (mean_std(last["accuracies"])[0] - mean_std(baseline["accuracies"])[0])
            table.add_row(
                f"{baseline['images']} random real images",
                f"{percent(baseline['accuracies'])}  ({baseline['draws']} draws, a network each, same recipe; "
                f"distilled is {gain:+.1f} points)",
            )
        fewer = len(best["accuracies"]) < len(last["accuracies"])
        of = f"; of {len(best['accuracies'])} {'network' if len(best['accuracies']) == 1 else 'networks'}" * fewer
        table.add_row("best step, chosen afterwards", f"{percent(best['accuracies'])}  (step {best['step']}{of})")
    if result["full_set"] is not None:
        full = result["full_set"]
        table.add_row("full training set", f"{percent(full['accuracies'])}  ({full['trained']})")
    skipped = f", {result['skipped_steps']} of them skipped" if result["skipped_steps"] else ""
    evaluated = f"{result['candidate_evaluations']:.1f}".removesuffix(".0")
    table.add_row("steps", f"{result['steps']}{skipped}; {evaluated} candidates evaluated")
    parts = {"evaluating": result["seconds_evaluating"], "training experts before": result["seconds_training_experts"]}
    spent = ", ".join(f"{seconds:.0f} {what}" for what, seconds in parts.items() if seconds > 0)
    table.add_row("seconds", f"{result['seconds']:.0f}" + (f"  ({spent})" if spent else ""))
    if result["peak_memory_bytes"] is not None:
        what = "allocator" if result["device"].startswith("cuda") else "process"
        table.add_row("peak memory", f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB ({what}, {result['device']})")
    table.add_row("files", result["files"])
    return table


def show(table: Table) -> None:
    """Print a table to the terminal."""
    Console().print(table)
