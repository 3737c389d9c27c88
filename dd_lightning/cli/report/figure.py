"""Figure 2 of the paper: accuracy against what it cost."""

import importlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from dd_lightning.cli.report.results import AXES, amount
from dd_lightning.functional.errors import InputError

_STYLES = (  # line, marker, its face, hatch, color: without colors, too, no two are alike
    ("-", "o", "full", "", "#1f4e8c"),
    ("--", "s", "none", "////", "#d1600a"),
    ("-.", "^", "full", "....", "#2b7a4b"),
    (":", "D", "none", "\\\\\\\\", "#7a3b96"),
)
_RC = {"svg.hashsalt": "dd_lightning", "hatch.linewidth": 0.4, "font.size": 9, "axes.axisbelow": True}


def require_matplotlib() -> tuple[Any, Any]:
    """Return matplotlib and its figures.

    Raises:
        InputError: If it is not installed.
    """
    try:
        return importlib.import_module("matplotlib"), importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise InputError('figures need matplotlib: pip install "dd_lightning[report]"') from error


def draw(comparison: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the curves of a comparison, and return the figure by its suffix."""
    matplotlib, figures = require_matplotlib()
    with matplotlib.rc_context(_RC):
        figure = figures.Figure(figsize=(11, 4), layout="constrained")
        panels = figure.subplots(1, len(AXES), sharey=True)
        for panel, (axis, name) in zip(panels, AXES.items(), strict=True):
            _draw_panel(panel, comparison, axis)
            panel.set_xlabel(name)
        panels[0].set_ylabel(f"{comparison['split']} accuracy (%), {comparison['evaluated']}")
        figure.suptitle(comparison["title"], fontsize=11, fontweight="bold")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        files = {}
        for suffix in ("png", "svg"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=160, metadata={"Date": None} if suffix == "svg" else None)
            files[suffix] = buffer.getvalue()
    return files


def _draw_panel(panel: Any, comparison: Mapping[str, Any], axis: str) -> None:  # noqa: ANN401  (of matplotlib)
    peak, arms, told = comparison["base_peak"], comparison["arms"], ["first at 95 %:"]
    for number, arm in enumerate(arms):
        line, marker, face, hatch, color = _STYLES[number % len(_STYLES)]
        curve = {name: np.array(arm["curve"][name], float) for name in (axis, "mean", "std")}
        x, mean, std = curve[axis], 100 * curve["mean"], 100 * curve["std"]
        seeds = len(arm["runs"])
        style = {"color": color, "marker": marker, "fillstyle": face, "markersize": 5, "linewidth": 1.6}
        style["markevery"] = max(1, len(x) // 10)
        panel.plot(x, mean, line, label=f"{arm['label']}, {seeds} seed{'s' * (seeds > 1)}", zorder=3, **style)
        if seeds > 1:
            panel.fill_between(x, mean - std, mean + std, facecolor=color, alpha=0.15, linewidth=0)
            panel.fill_between(x, mean - std, mean + std, facecolor="none", edgecolor=color, hatch=hatch, linewidth=0)
        at = arm["to_95"][axis]["mean_curve"] if peak is not None else None
        told.append(f"{arm['label']} {'not reached' if at is None else amount(at)}")
        if at is not None:
            panel.axvline(at, color=color, linewidth=1, linestyle=line, zorder=1)
            ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 1.4}
            panel.plot([at], [mean[np.flatnonzero(x == at)[0]]], marker=marker, zorder=4, **ring)
    if peak is not None:
        label = f"95 % of the base's best-on-{comparison['split']} mean: {100 * peak['threshold']:.1f} %"
        panel.axhline(100 * peak["threshold"], color="black", linewidth=0.8, linestyle=(0, (8, 4)), label=label)
        box = {"facecolor": "white", "edgecolor": "0.7", "boxstyle": "round,pad=0.35"}
        place = {"transform": panel.transAxes, "ha": "right", "va": "bottom", "zorder": 5}
        panel.text(0.98, 0.05, "\n".join(told), bbox=box, linespacing=1.4, **place)
    if random_real := next((arm["random_real"] for arm in arms if arm["random_real"]), None):
        label = f"random real images: {100 * random_real['mean']:.1f} %"
        panel.axhline(100 * random_real["mean"], color="dimgray", linewidth=1.2, linestyle=(0, (1, 2)), label=label)
    if not any(value is not None for arm in arms for value in arm["curve"][axis]):
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center")
    panel.grid(color="0.92")
    panel.spines[["top", "right"]].set_visible(False)
