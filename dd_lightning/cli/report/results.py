"""What a report says, as plain values: `report.json`, which figures, tables and pages are made of."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dd_lightning.cli.report.curves import SHARE, Curves, compare, first_reach, mean_std
from dd_lightning.cli.report.runs import Arm, Comparison
from dd_lightning.version import __version__

AXES = {"steps": "distillation steps", "seconds": "distillation seconds", "evaluations": "candidate evaluations"}
"""What accuracy is drawn against."""

Values = dict[str, Any]
ByClass = Mapping[str, Sequence[float]]


def results(comparisons: Sequence[Comparison], left_out: Sequence[str], by_class: Mapping[Path, ByClass]) -> Values:
    """Return all results; accuracies are in [0, 1], and None is what is not measured or not reached.

    Args:
        comparisons: The runs.
        left_out: A line on each run that is not among them.
        by_class: Accuracies of some networks by the class's name, of each run's folder; or empty.
    """
    compared = [_comparison(each, by_class) for each in comparisons]
    found = {"version": __version__, "comparisons": compared, "left_out": left_out}
    text = json.dumps(found, default=lambda array: array.tolist())
    plain: Values = json.loads(text, parse_constant=lambda _: None)  # NaN
    return plain


def _comparison(comparison: Comparison, by_class: Mapping[Path, ByClass]) -> Values:
    run = comparison.arms[0].runs[0]
    network = next(iter(run.points))
    curves = [arm.curves(network) for arm in comparison.arms]
    bases = [each for arm, each in zip(comparison.arms, curves, strict=True) if not arm.runs[0].selects]
    peak = None
    if bases:
        mean = mean_std(bases[0].accuracy)[0]
        best = int(np.nanargmax(mean))
        peak = {"accuracy": mean[best], "step": bases[0].costs["steps"][0, best], "threshold": SHARE * mean[best]}
    return {
        "title": comparison.title,
        "method": run.method,
        "dataset": run.data[0],
        "ipc": run.options.get("model.ipc") or 1,
        "network": run.network,
        "evaluated": network,
        "split": run.options.get("evaluation.split") or "test",
        "base_peak": peak,
        "arms": [_arm(arm, each, peak, by_class) for arm, each in zip(comparison.arms, curves, strict=True)],
        "ratios": [
            {
                "base": comparison.arms[0].label,
                "other": arm.label,
                **{axis: compare(bases[0], each, axis) for axis in AXES},
            }
            for arm, each in zip(comparison.arms, curves, strict=True)
            if bases and each is not bases[0]
        ],
    }


def _arm(arm: Arm, curves: Curves, peak: Mapping[str, Any] | None, by_class: Mapping[Path, ByClass]) -> Values:
    mean, std = mean_std(curves.accuracy)
    costs = {axis: mean_std(curves.costs[axis])[0] for axis in AXES}
    reach = {}
    if peak is not None:
        reach = {
            axis: {
                "mean_curve": float(first_reach(mean, costs[axis], peak["threshold"])),
                "seeds": first_reach(curves.accuracy, curves.costs[axis], peak["threshold"]),
            }
            for axis in AXES
        }
    summaries = [run.summary for run in arm.runs if run.summary]
    random_real = [each["random_real"]["accuracies"] for each in summaries if each.get("random_real")]
    peaks = [each["peak_memory_bytes"] for each in summaries if each.get("peak_memory_bytes")]
    return {
        "label": arm.label,
        "dynadistill": arm.runs[0].selects,
        "runs": [{"folder": str(run.folder), "seed": run.seed, "state": run.state} for run in arm.runs],
        "curve": {**costs, "mean": mean, "std": std, "seeds": np.isfinite(curves.accuracy).sum(0)},
        "accuracy_of_seeds": curves.accuracy,
        "to_95": reach,
        "last": {name: _last(arm, name) for name in dict.fromkeys(name for run in arm.runs for name in run.points)},
        "per_class": {
            name: spread([by_class[run.folder][name] for run in arm.runs])
            for name in by_class.get(arm.runs[0].folder, ())
        },
        "random_real": spread(random_real) if random_real else None,
        "seconds": [each["seconds"] for each in summaries],
        "devices": sorted({str(each.get("device")) for each in summaries}),
        "peak_memory_bytes": max(peaks, default=None),
    }


def _last(arm: Arm, network: str) -> Values:
    """Return the accuracy at the last evaluated step, over the seeds that got there."""
    points = [run.points[network] for run in arm.runs if network in run.points]
    step = max(step for each in points for step in each)
    return {"step": step, **spread([each[step] for each in points if step in each])}


def spread(accuracies: Sequence[Sequence[float]]) -> Values:
    """Return mean and population standard deviations, over seeds and over networks apart.

    Args:
        accuracies: Of each seed's networks.

    Returns:
        The mean of the seeds' means, and their deviation; the root of the mean over seeds of the variance within a
        seed; and the numbers of both. A deviation of one is None.
    """
    means, stds = zip(*((np.mean(each), np.std(each)) for each in accuracies), strict=True)
    networks = min(map(len, accuracies))
    return {
        "mean": float(np.mean(means)),
        "std_seeds": float(np.std(means)) if len(means) > 1 else None,
        "std_networks": float(np.sqrt(np.mean(np.square(stds)))) if networks > 1 else None,
        "seeds": len(means),
        "networks": networks,
    }


def amount(value: float | None, missing: str = "not reached") -> str:
    """Format steps, seconds or evaluations.

    Example:
        >>> amount(40.0), amount(38.36), amount(1234.5), amount(None)
        ('40', '38.4', '1,234', 'not reached')
    """
    return missing if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
