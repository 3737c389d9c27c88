"""Tables of a report: what the runs reached, and the layouts of the paper's Tables 1 and 2 beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dd_lightning.cli.report.curves import RESAMPLES
from dd_lightning.cli.report.page import Table
from dd_lightning.cli.report.results import AXES, amount

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
"""Accuracies in % that the DynaDistill paper and the methods' authors print; null is what they do not."""


def results_table(comparison: Mapping[str, Any]) -> Table:
    """Return what each arm reached, on each architecture, and what it took."""
    rows = []
    for arm in comparison["arms"]:
        label = arm["label"]
        for network, last in arm["last"].items():
            row = [label, network, f"{last['step']:,}"]
            row += [_percent(last[key]) for key in ("mean", "std_seeds", "std_networks")]
            row.append(f"{last['seeds']} x {last['networks']}")
            if network == comparison["evaluated"]:
                memory, random_real = arm["peak_memory_bytes"], arm["random_real"]
                row += [amount(arm["to_95"][axis]["mean_curve"]) if arm["to_95"] else "" for axis in AXES]
                row += [f"{memory / 2**20:,.0f} MiB" if memory else "", _with_deviation(random_real)]
            rows.append(row + [""] * (12 - len(row)))
            label = ""
    heading = ["", "network", "last step", "accuracy, %", "± over seeds", "± over networks", "seeds x networks"]
    heading += [f"{name.rpartition(' ')[2]} to 95 %" for name in AXES.values()]
    return [*heading, "peak memory", "random real, %"], rows


def ratio_table(comparison: Mapping[str, Any]) -> Table:
    """Return how many times less than the base each other arm needed to 95 %: with an interval, or seed by seed."""
    rows = []
    for each in comparison["ratios"]:
        for axis, name in AXES.items():
            found = each[axis]
            pairs = zip(found["seeds"], found["base"], found["other"], strict=True)
            spread = "; ".join(f"seed {seed}: {amount(base)} / {amount(other)}" for seed, base, other in pairs)
            if found["interval"] is not None:
                low, high = ("infinite" if end is None else f"{end:.2f}" for end in found["interval"])
                spread = f"95 % interval {low} to {high} (paired bootstrap over seeds, {RESAMPLES:,} resamples)"
            value = "" if found["ratio"] is None else f"{found['ratio']:.2f}"
            rows.append([f"{name} to 95 %, {each['base']} / {each['other']}", value, str(len(found["seeds"])), spread])
    return ["ratio", "of the mean curves", "seeds of both", "spread"], rows


def class_table(comparison: Mapping[str, Any]) -> Table:
    """Return the accuracy of each class, if it has been measured."""
    arms = comparison["arms"]
    rows = [[name, *(_with_deviation(arm["per_class"][name]) for arm in arms)] for name in arms[0]["per_class"]]
    networks = next(iter(arms[0]["per_class"].values()))["networks"]
    return [f"class, {networks} fresh networks per set", *(f"{arm['label']}, %" for arm in arms)], rows


def paper_table(table: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the paper with the published base and ours; blank is what nobody has measured.

    Our runs on other data sets have columns of their own in the first one, Table 1.
    """
    columns, others = list(table["columns"]), {(each["dataset"], each["ipc"]) for each in comparisons}
    if "full data set" in table:
        others -= {(dataset, ipc) for _, dataset, ipc, _ in columns}
        columns += [[f"{dataset}, {ipc}", dataset, ipc, ""] for dataset, ipc in sorted(others)]
    rows = []
    for method in dict.fromkeys([*table["methods"], *(each["method"] for each in comparisons)]):
        numbers = table["methods"].get(method, {})
        for dynadistill, suffix in ((False, ""), (True, " + DynaDistill")):
            ours = [_ours(comparisons, method, dynadistill, column) for column in columns]
            if "paper" in numbers or any(ours):  # a method that the paper does not have is there if it is measured
                known = {each: numbers.get(each + suffix) for each in ("published", "paper")}
                lines = [[source, *map(_number, values)] for source, values in known.items() if values]
                lines.append(["ours", *ours])
                rows += [[(method + suffix) * (line is lines[0]), *line] for line in lines]
    if "full data set" in table:
        rows.append(["full data set", "paper", *map(_number, table["full data set"])])
    width = len(columns) + 2
    return ["method", "source", *(column[0] for column in columns)], [row + [""] * (width - len(row)) for row in rows]


def _ours(comparisons: Sequence[Mapping[str, Any]], method: str, dynadistill: bool, column: Sequence[Any]) -> str:
    """Return what our runs have reached at the last step; in the paper's own columns, with its network."""
    _, dataset, ipc, network = column
    found = []
    for each in comparisons:
        if (each["method"], each["dataset"], each["ipc"]) != (method, dataset, ipc):
            continue
        for arm in each["arms"]:
            last = arm["last"].get(network or each["evaluated"])
            fits = each["network"] == PUBLISHED["network"] or not network
            if fits and arm["dynadistill"] == dynadistill and last is not None:
                found.append(f"{_with_deviation(last)} (n={last['seeds']}, step {last['step']:,})")
    return "; ".join(found)


def _with_deviation(found: Mapping[str, Any] | None) -> str:
    """Format a mean and the deviation over seeds, if there are several."""
    return "" if found is None else " ± ".join(filter(None, (_percent(found["mean"]), _percent(found["std_seeds"]))))


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
