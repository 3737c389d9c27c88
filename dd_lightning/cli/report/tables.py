"""Tables of a report: what the runs reached, and the layouts of the paper's Tables 1 and 2 beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dd_lightning.cli.report.curves import RESAMPLES, SEEDS
from dd_lightning.cli.report.results import AXES, amount

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
"""Accuracies in % that the DynaDistill paper and others print; null is what nobody does."""

Table = tuple[list[str], list[list[str]]]
_ROWS = {"published base": "published", "paper": "paper", "ours": None}


def results_table(comparison: Mapping[str, Any]) -> Table:
    """Return what each arm reached, on each architecture, and what it took."""
    heading = ["", "network", "last step", "accuracy, %", "± over seeds", "± over networks", "seeds x networks"]
    heading += [*(f"{name.rpartition(' ')[2]} to 95 %" for name in AXES.values()), "peak memory, MiB", "random real, %"]
    rows = []
    for arm in comparison["arms"]:
        for network, last in arm["last"].items():
            own = network == comparison["evaluated"]
            reach = [amount(arm["to_95"][axis]["mean_curve"]) if own and arm["to_95"] else "" for axis in AXES]
            memory, random_real = arm["peak_memory_bytes"], arm["random_real"] if own else None
            rows.append(
                [
                    *(arm["label"], network, f"{last['step']:,}", _percent(last["mean"])),
                    *(_percent(last["std_seeds"]), _percent(last["std_networks"])),
                    *(f"{last['seeds']} x {last['networks']}", *reach),
                    f"{memory / 2**20:,.0f}" if memory else "",
                    f"{_percent(random_real['mean'])} ± {_percent(random_real['std_seeds'])}".rstrip(" ±")
                    if random_real
                    else "",
                ]
            )
    return heading, rows


def ratio_table(comparison: Mapping[str, Any]) -> Table:
    """Return how many times less than the base each other arm needed to 95 %, with an interval or seed by seed."""
    rows = []
    for each in comparison["ratios"]:
        for axis, name in AXES.items():
            found = each[axis]
            if found["interval"]:
                spread = " to ".join(_ratio(end) for end in found["interval"])
            else:
                pairs = zip(found["seeds"], found["base"], found["other"], strict=True)
                spread = "; ".join(f"seed {seed}: {amount(base)} / {amount(other)}" for seed, base, other in pairs)
            rows.append([name, each["base"], each["other"], _ratio(found["ratio"]), str(len(found["seeds"])), spread])
    few = any(each["steps"]["interval"] is None for each in comparison["ratios"])
    how = (
        "base / other, seed by seed" if few else f"95 % interval, paired bootstrap over seeds, {RESAMPLES:,} resamples"
    )
    return ["", "base", "other", "base / other", "seeds of both", how], rows


def table_1(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Return methods x data set and images per class: published, the paper's and ours; blank is not measured."""
    cells = [tuple(cell) for cell in PUBLISHED["cells"]]
    others = {(each["dataset"], each["ipc"]) for each in comparisons} - set(cells)
    columns = [*cells, *sorted(others)]
    methods = [name for name in PUBLISHED["methods"] if "paper" in PUBLISHED["methods"][name]]
    methods += sorted({each["method"] for each in comparisons} - set(methods))
    rows = []
    for method in methods:
        numbers = PUBLISHED["methods"].get(method, {})
        ours = [each for each in comparisons if each["method"] == method]
        if not ours and not any(numbers.get("paper", ())):
            continue
        for dynadistill in (False, True):
            name = method + " + DynaDistill" * dynadistill
            for source, key in (("published", "published"), ("paper", "paper")):
                values = numbers.get(key + ", DynaDistill" * dynadistill, [])
                if any(values):
                    rows.append([name, source, *map(_number, values), *[""] * len(others)])
            measured = [_ours(ours, cell, dynadistill, cell in cells) for cell in columns]
            rows.append([name, "ours", *measured])
    full = PUBLISHED["full dataset"]
    rows.append(["full dataset", "paper", *map(_number, full), *[""] * len(others)])
    titles = [f"{PUBLISHED['titles'].get(dataset, dataset)}, {ipc}" for dataset, ipc in columns]
    return ["method", "source", *titles], rows


def table_2(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Return methods x architecture that a set of CIFAR-100 was evaluated on: the paper's and ours."""
    layout = PUBLISHED["cross-architecture"]
    cell, networks = tuple(layout["cell"]), layout["networks"]
    rows = []
    for method, numbers in layout.items():
        if method in ("cell", "networks"):
            continue
        ours = [each for each in comparisons if each["method"] == method]
        for dynadistill in (False, True):
            name = method + " + DynaDistill" * dynadistill
            rows.append([name, "paper", *map(_number, numbers["paper" + ", DynaDistill" * dynadistill])])
            rows.append([name, "ours", *(_ours(ours, cell, dynadistill, True, network) for network in networks)])
    return ["method", "source", *networks], rows


def _ours(
    comparisons: Sequence[Mapping[str, Any]], cell: tuple[Any, ...], dynadistill: bool, papers: bool, network: str = ""
) -> str:
    """Return what runs have reached at the last step; in the paper's own cells, with its network."""
    found = []
    for each in comparisons:
        if (each["dataset"], each["ipc"]) != cell or (papers and each["network"] != PUBLISHED["network"]):
            continue
        for arm in each["arms"]:
            last = arm["last"].get(network or each["evaluated"])
            if arm["dynadistill"] == dynadistill and last is not None:
                deviation = f" ± {_percent(last['std_seeds'])}" if last["std_seeds"] is not None else ""
                seeds = f"{last['seeds']} seed{'s' * (last['seeds'] > 1)}"
                found.append(f"{_percent(last['mean'])}{deviation} ({seeds}, step {last['step']:,})")
    return "; ".join(found)


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
