"""Folders of runs as `fit` writes them: found, read, and grouped by what they differ in."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dd_lightning.cli.report.curves import Curves, common_steps, cost_at
from dd_lightning.functional.errors import InputError
from dd_lightning.sets.synthetic_file import load_synthetic

_FILES = ("config.yaml", "metrics.csv", "evaluation.csv", "summary.json")
_COSTS = {"seconds": "seconds", "evaluations": "candidate_evaluations"}  # as the run's files call them
_NEUTRAL = {  # options, or groups of them, that accuracies do not depend on: seeds, names, places, how it is computed
    *("seed_everything", "model.seed", "name", "runs", "ckpt_path", "weights_only", "writer", "checkpoint"),
    *("root", "cache_dir", "path", "download", "verify", "train_missing", "compile", "micro_batch", "memory_gb"),
    *("evaluation.every_n_steps", "evaluation.compare_random", "evaluation.num_networks_intermediate"),
}
_OF_TRAINER = {"trainer.max_steps", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm"}  # not the others
_METHODS = {  # by the objective
    **dict.fromkeys(("TrajectoryMatching", "mtt", "None"), "MTT"),
    **dict.fromkeys(("GradientMatching", "idc"), "IDC"),
    **dict.fromkeys(("BidirectionalMatching", "dream_plus"), "DREAM+"),
    **dict.fromkeys(("DistributionMatching", "dm"), "DM"),
}

Options = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        folder: The folder.
        options: The resolved configuration, by the options' keys.
        points: Accuracies of the networks at each step, by the name of the curve.
        costs: Steps and what had been spent by them, by what it is.
        summary: Of a finished run; else empty.
        data: Name and fingerprint of the data set.
        network: What it was distilled with.
    """

    folder: Path
    options: Options
    points: Mapping[str, Mapping[int, tuple[float, ...]]]
    costs: Mapping[str, tuple[list[float], list[float]]]
    summary: Options
    data: tuple[str, str]
    network: str

    @property
    def seed(self) -> int:
        """The run's seed."""
        own = self.options.get("model.seed")
        return int(self.options.get("seed_everything") or 0) if own is None else int(own)

    @property
    def last_step(self) -> int:
        """The last evaluated step."""
        return max(step for points in self.points.values() for step in points)

    @property
    def state(self) -> str:
        """Whether the run is finished, and where it is otherwise."""
        steps, done = self.options.get("trainer.max_steps") or 0, self.summary.get("steps", self.last_step)
        if self.summary and done >= steps:
            return "finished"
        return f"{'ended early' if self.summary else 'unfinished'}: step {done} of {steps}"

    @property
    def method(self) -> str:
        """What the literature calls the base method."""
        objective = str(self.options.get("model.objective"))
        method = _METHODS.get(objective, objective)
        return "DATM" if method == "MTT" and self.options.get("model.labels") == "soft" else method

    @property
    def title(self) -> str:
        """What is distilled how."""
        ipc = self.options.get("model.ipc") or 1
        return f"{self.method}, {self.data[0]}, {ipc} image{'s' * (ipc != 1)} per class, {self.network}"

    @property
    def selects(self) -> bool:
        """Whether it is DynaDistill, not the base method."""
        return self.options.get("selection") is not None

    @cached_property
    def essence(self) -> Options:
        """The options that accuracies depend on."""
        return {key: value for key, value in self.options.items() if not _is_neutral(key)}

    @cached_property
    def shared(self) -> Options:
        """Those of them that the arms of a comparison share."""
        own = ("selection", "trainer.max_steps")
        return {key: value for key, value in self.essence.items() if not key.startswith(own)}


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone, in its order, and what to call them."""

    label: str
    runs: list[Run]

    def curves(self, network: str) -> Curves:
        """Return the curves of an architecture."""
        points = [run.points[network] for run in self.runs]
        steps = common_steps(points)
        accuracy = np.array([[np.mean(each.get(step, np.nan)) for step in steps] for each in points])
        costs = {name: np.array([cost_at(steps, *run.costs[name]) for run in self.runs]) for name in _COSTS}
        costs["steps"] = np.array([steps] * len(points), float)
        # a mean is over those that got there
        costs = {name: np.where(np.isnan(accuracy), np.nan, cost) for name, cost in costs.items()}
        return Curves([run.seed for run in self.runs], accuracy, costs)


@dataclass(frozen=True)
class Comparison:
    """A method on a data set: the base, if there are runs of it, and then what selects."""

    title: str
    arms: list[Arm]


def find_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Read the runs in some folders and below them; also return a line on each one that is left out.

    Raises:
        InputError: If a folder does not exist or holds no run, a file of a run is damaged, or no run is left.
    """
    runs: dict[Path, Run] = {}
    left_out: list[str] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path} is {'a file' if path.exists() else 'no folder'}; give folders of runs")
        folders = sorted({file.parent for name in _FILES for file in path.rglob(name)})
        if not folders:
            raise InputError(f"{path} holds no run; give the folder of a run, or one with runs below it")
        for folder in folders:
            if any(folder.glob("evaluation*.csv")) or folders == [path]:
                runs[folder.resolve()] = read_run(folder)
            else:
                left_out.append(f"{folder} is left out: it has no evaluated step")
    if not runs:
        raise InputError(f"no run in {', '.join(map(str, paths))} has an evaluated step; run it with an evaluation")
    return list(runs.values()), left_out


def read_run(folder: Path) -> Run:
    """Read the files of a run.

    Raises:
        InputError: If one that a finished step leaves is missing, or one is damaged.
    """
    points: dict[str, dict[int, tuple[float, ...]]] = {}
    for file in sorted(folder.glob("evaluation*.csv"), key=lambda path: (len(path.name), path.name)):
        taken = set(points)  # by another evaluation
        for row in _rows(file, "step", "network", "accuracy_0"):
            name = row["network"] + f" ({file.stem.removeprefix('evaluation_')})" * (row["network"] in taken)
            accuracies = tuple(value for key, value in row.items() if key.startswith("accuracy_"))
            points.setdefault(name, {})[int(row["step"])] = accuracies
    if not points:
        raise InputError(f"{folder} has no evaluated step; leave it out, or run it with an evaluation")
    if (file := folder / "evaluate.json").exists():  # of dd-lightning evaluate, with other networks
        try:
            known = _mapping(file, json.loads)
            others = [row for row in known["measured"] if row["trained_on"] == "distilled"]
            for network, accuracies in {row["network"]: row["accuracies"] for row in others}.items():
                points.setdefault(network, {known["set"]["step"]: tuple(map(float, accuracies))})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"cannot read {file}: {error!r}; let dd-lightning evaluate write it anew") from error
    options = dict(_flat(_mapping(folder / "config.yaml", yaml.safe_load)))
    file = folder / "summary.json"
    summary = _mapping(file, json.loads, "steps", *_COSTS.values()) if file.exists() else {}
    data, network = (str(options.get("data")).removesuffix("DataModule"), ""), str(options.get("model.network"))
    if (file := folder / "synthetic.safetensors").exists():
        stored = load_synthetic(file)
        data, network = (stored.dataset, stored.fingerprint), stored.network
    return Run(folder, options, points, _costs(folder / "metrics.csv", summary), summary, data, network)


def compare_runs(runs: Sequence[Run], left_out: list[str]) -> list[Comparison]:
    """Group runs: those of an arm differ in their seed alone, the arms of a comparison in selection and `max_steps`.

    Of runs of one seed, such as one that was resumed in a folder of its own, the one that got furthest counts; a line
    on each other one is added to ``left_out``.

    Raises:
        InputError: If runs of one comparison have read different data.
    """
    arms: dict[str, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: (run.last_step, bool(run.summary), len(str(run.folder)), str(run.folder))):
        same = arms.setdefault(_key(run.essence), {})
        if (other := same.get(run.seed)) is not None:
            left_out.append(f"{other.folder} is left out: {run.folder}, of the same options and seed, got further")
        same[run.seed] = run
    found: dict[str, list[dict[int, Run]]] = {}
    for same in arms.values():
        found.setdefault(_key(next(iter(same.values())).shared), []).append(same)
    comparisons: list[list[Arm]] = []
    for each in found.values():
        groups = [[same[seed] for seed in sorted(same)] for same in each]
        _check_data([run for group in groups for run in group])
        names = ["DynaDistill" if group[0].selects else "base" for group in groups]
        labels = _told_apart(names, [group[0].essence for group in groups])
        alike = map(Arm, labels, groups)
        comparisons.append(sorted(alike, key=lambda arm: (arm.runs[0].selects, arm.label)))
    firsts = [each[0].runs[0] for each in comparisons]
    titles = _told_apart([run.title for run in firsts], [run.shared for run in firsts])
    return sorted(map(Comparison, titles, comparisons), key=lambda comparison: comparison.title)


def _check_data(runs: Sequence[Run]) -> None:
    """Refuse runs of one figure whose data sets have other names or fingerprints, where these are known."""
    for run in runs:
        for name, one, other in zip(("name", "fingerprint"), run.data, runs[-1].data, strict=True):
            if one and other and one != other:
                raise InputError(
                    f"{run.folder} and {runs[-1].folder} would share a figure, but differ in their data: {name} {one} "
                    f"and {other}; report them apart"
                )


def _told_apart(names: Sequence[str], options: Sequence[Options]) -> list[str]:
    """Add to equal names by what options they differ."""
    told = []
    for name, own in zip(names, options, strict=True):
        namesakes = [each for other, each in zip(names, options, strict=True) if other == name]
        keys = sorted({key for each in namesakes for key in each})
        keys = [key for key in keys if len({_key(each.get(key)) for each in namesakes}) > 1]
        differences = ", ".join(f"{key.rpartition('.')[2]} {own.get(key)}" for key in keys)
        told.append(name + f" ({differences})" * bool(keys))
    return told


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _is_neutral(key: str) -> bool:
    first, last = key.partition(".")[0], key.rpartition(".")[2]
    return not _NEUTRAL.isdisjoint((key, first, last)) or (first == "trainer" and key not in _OF_TRAINER)


def _flat(value: object, key: str = "") -> Iterator[tuple[str, Any]]:
    """Return options by their keys; the value of one that takes a class is the class's name."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, each in value.items():
        if name == "class_path":
            yield key, str(each).rpartition(".")[2]
        else:
            yield from _flat(each, key if name == "init_args" else f"{key}.{name}".lstrip("."))


def _mapping(file: Path, parse: Callable[[str], Any], *numbers: str) -> Options:
    """Read a file that holds a mapping, with numbers of these names."""
    try:
        values = parse(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not all(isinstance(values.get(name), int | float) for name in numbers):
            raise ValueError(f"it is no mapping with {', '.join(numbers) or 'options'}")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"cannot read {file}: {str(error)[:200]}; give runs of dd-lightning fit") from error
    return values


def _rows(file: Path, *required: str) -> list[dict[str, Any]]:
    """Read a table of numbers and the column `network`; empty cells are left out."""
    try:
        text = file.read_text(encoding="utf-8")
        heading, *lines = list(csv.reader(io.StringIO(text), strict=True)) or [list(required)]
        if missing := set(required) - set(heading):
            raise ValueError(f"it has no column {min(missing)}")
        rows = []
        for number, line in enumerate(lines, start=2):
            if len(line) != len(heading) or (number > len(lines) and not text.endswith("\n")):
                raise ValueError(f"line {number} is torn; delete it")
            cells = zip(heading, line, strict=True)
            rows.append({key: value if key == "network" else float(value) for key, value in cells if value})
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"cannot read {file}: {str(error)[:200]}") from error
    return rows


def _costs(file: Path, summary: Options) -> dict[str, tuple[list[float], list[float]]]:
    """Return steps and what had been spent by them."""
    rows, costs = _rows(file, "step") if file.exists() else [], {}
    for name, column in _COSTS.items():
        # a row is written when its step has its candidates, and before it is taken
        steps, key = ([row["step"] + (name == "evaluations") for row in rows], f"cost/{column}")
        known = {step: row[key] for step, row in zip(steps, rows, strict=True) if key in row and step > 0}
        known |= {summary["steps"]: summary[column]} if summary else {}
        costs[name] = (sorted(known), [known[step] for step in sorted(known)])
    return costs
