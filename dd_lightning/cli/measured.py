"""What ``dd-lightning evaluate`` has measured: network by network in a file, and as a table."""

import csv
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import dd_lightning
from dd_lightning.cli.runs import writable
from dd_lightning.functional.errors import InputError
from dd_lightning.sets.atomic_write import write_all_atomically
from dd_lightning.training.evaluation import RECIPES, EvaluationResult, mean_std

FORMAT = "evaluation"


@dataclass(kw_only=True)
class Measured:
    """Fresh networks of one architecture, trained in one way on the same images.

    Attributes:
        trained_on: ``distilled``, ``random``, ``kmeans``, ``herding`` or ``full``, and what differs, if anything does.
        draw: Number of the draw of the images.
        images: How many they are.
        set: Checksum of the set's file.
        data: Fingerprint of the training data.
        network: Name of the architecture.
        recipe: Fields of the EvaluationRecipe.
        lr: The learning rate it began with.
        seed: Seed of all draws.
        precision: What the layers compute in.
        accuracies: Of each network, by its number; held-out, in [0, 1], after the last epoch.
        validations: All tests of each network, the last one included.
        seconds: What each took.
        devices: Where.
    """

    trained_on: str
    draw: int
    images: int
    set: str
    data: str
    network: str
    recipe: dict[str, Any]
    lr: float
    seed: int
    precision: str
    accuracies: list[float] = field(default_factory=list)
    validations: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)

    @property
    def identity(self) -> dict[str, Any]:
        """All that the networks' accuracies depend on, but for their numbers."""
        return {each.name: getattr(self, each.name) for each in fields(self)[:-4]}

    def add(self, result: EvaluationResult, device: str) -> None:
        """Add the networks that come next."""
        count = len(result.accuracies)
        self.accuracies += result.accuracies
        self.validations += [list(each) for each in zip(*result.validations, strict=True)]
        self.seconds += [result.seconds / count] * count
        self.devices += [device] * count

    @property
    def recipe_name(self) -> str:
        """The published name of the recipe, or ``custom``."""
        return next((name for name, each in RECIPES.items() if plain(each) == self.recipe), "custom")


def plain(recipe: Any) -> dict[str, Any]:  # noqa: ANN401  (a recipe)
    """Return the fields of a recipe as JSON gives them back."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return values


class Results:
    """All that an output file holds, of this and of earlier commands; written after each training.

    Args:
        out: A folder, for ``evaluate.json`` and ``evaluate.csv`` in it; or the path of the JSON, with the CSV beside
            it. None keeps nothing.
        about: What to say of the command.

    Raises:
        InputError: If there is another file, or the place cannot be written.
    """

    def __init__(self, out: str | None, about: dict[str, Any]) -> None:
        self.path = None if out is None else Path(out) if out.endswith(".json") else Path(out) / "evaluate.json"
        self.about, self.rows = about, list[Measured]()
        self.summary, self.scores = list[dict[str, Any]](), dict[str, Any]()
        if self.path is None:
            return
        if self.path.exists():
            self.rows = _read(self.path)
        writable(self.path.parent, "output folder", "--out")

    def of(self, wanted: Measured) -> Measured:
        """Return what is known of the same networks, or what was given, which is known from now on."""
        known = next((row for row in self.rows if row.identity == wanted.identity), None)
        if known is None:
            self.rows.append(known := wanted)
        return known

    def save(self) -> None:
        """Write the files."""
        if self.path is not None:
            parts = {"summary": self.summary, "scores": self.scores, "measured": [asdict(row) for row in self.rows]}
            text = json.dumps({"format": FORMAT, **self.about, **parts}, indent=1)
            write_all_atomically([(self.path, text.encode()), (self.path.with_suffix(".csv"), self._csv().encode())])

    def _csv(self) -> str:
        """Return a line for each network."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        keys = ["trained_on", "draw", "images", "set", "data", "network", "lr", "seed", "precision"]
        result = ["recipe", "augmentation", "epochs", "number", "accuracy", "best_validation", "seconds", "device"]
        writer.writerow([*keys, *result])
        for row in self.rows:
            same = [getattr(row, key) for key in keys]
            same += [row.recipe_name, row.recipe["augmentation"], row.recipe["epochs"]]
            each = zip(row.accuracies, map(max, row.validations), row.seconds, row.devices, strict=True)
            writer.writerows([*same, number, *values] for number, values in enumerate(each))
        return text.getvalue()


def _read(path: Path) -> list[Measured]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(values["format"])
        rows = [Measured(**row) for row in values["measured"]]
        if any(not len(r.accuracies) == len(r.validations) == len(r.seconds) == len(r.devices) for r in rows):
            raise ValueError("some networks lack a value")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"--out is {str(path)!r}, which is not an evaluation ({error}); give another path") from error
    return rows


def summarize(draws: Sequence[Measured], count: int) -> dict[str, Any]:
    """Return what the first ``count`` networks of each draw reach, as values that JSON can hold.

    ``std_networks`` is the spread over the networks of a draw, root mean square over the draws; ``std_draws`` that of
    the draws' means, or None of a single draw. Both are population deviations.
    """
    first = draws[0]
    each = [mean_std(row.accuracies[:count]) for row in draws]
    best = [max(tests) for row in draws for tests in row.validations[:count]]
    mean, std_draws = mean_std([mean for mean, _ in each])
    return {
        "trained_on": first.trained_on,
        "images": first.images,
        "network": first.network,
        "recipe": first.recipe_name,
        "lr": first.lr,
        "draws": len(draws),
        "networks_per_draw": count,
        "mean": mean,
        "std_networks": math.hypot(*(std for _, std in each)) / math.sqrt(len(each)),
        "std_draws": std_draws if len(draws) > 1 else None,
        "validations": len(first.validations[0]),
        "best_validation": mean_std(best)[0],
        "std_best_validation": mean_std(best)[1],
        "seconds": sum(sum(row.seconds[:count]) for row in draws),
    }


def table(title: str, summary: Sequence[dict[str, Any]]) -> Table:
    """Lay summaries out for a person; what took how long is not shown beside baselines, where 80 columns are few."""
    shown = Table(title=title, title_justify="left")
    several = any(row["trained_on"] != "distilled" for row in summary)
    draws = any(row["draws"] > 1 for row in summary)
    validations = max(row["validations"] for row in summary)
    if several:
        shown.add_column("trained on")
    best = [f"best of {validations},\nchosen on\nsame data"] * (validations > 1)
    headings = ["network", "networks\ntrained", "held-out\naccuracy", *["± over\ndraws"] * draws, *best]
    for heading in [*headings, *["seconds"] * (not several)]:
        shown.add_column(heading, no_wrap=True)
    for row in summary:
        trained = row["draws"] * row["networks_per_draw"]
        cells = [f"{row['images']} {row['trained_on']}"] * several + [row["network"], str(trained)]
        cells.append(_percent(row["mean"], row["std_networks"], row["networks_per_draw"]))
        cells += ["" if row["std_draws"] is None else f"{100 * row['std_draws']:.1f}"] * draws
        cells += [_percent(row["best_validation"], row["std_best_validation"], trained)] * (validations > 1)
        shown.add_row(*cells, *[f"{row['seconds']:.0f}"] * (not several))
    return shown


def _percent(mean: float, std: float, count: int) -> str:
    return f"{100 * mean:.1f} ± {100 * std:.1f} %" if count > 1 else f"{100 * mean:.1f} %"


def score_table(scores: dict[str, Any]) -> Table:
    """Lay scores out for a person."""
    shown = Table(title="Scores of DD-Ranking, 0 to 1, higher is better", title_justify="left")
    for heading in ("network", "label-robust", "augmentation-robust"):
        shown.add_column(heading)
    for network, each in scores.items():
        shown.add_row(network, f"{each['lrs']:.3f}", f"{each['ars']:.3f}")
    return shown


def hardware(device: torch.device) -> str:
    """Name the GPU, or the processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def commit() -> str | None:
    """Return the package's commit, with ``-dirty`` behind it if files were changed; None outside a checkout."""
    root = Path(dd_lightning.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
