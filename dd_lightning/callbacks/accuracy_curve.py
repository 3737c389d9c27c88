"""An accuracy-against-step curve: its points, as CSV, as scalars and as a checkpoint holds them."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dd_lightning.training.evaluation import EvaluationResult, mean_std


@dataclass(frozen=True)
class EvaluationPoint:
    """One point of an accuracy curve.

    Attributes:
        step: Distillation step.
        network: Architecture that was trained.
        accuracies: Held-out accuracy of each fresh network, in [0, 1].
        seconds: What the evaluation took.
        validations: The accuracies at each of the recipe's tests; empty if only ``accuracies`` are known.
    """

    step: int
    network: str
    accuracies: tuple[float, ...]
    seconds: float
    validations: tuple[tuple[float, ...], ...] = ()

    @property
    def result(self) -> EvaluationResult:
        """The point's accuracies, with mean and std."""
        return EvaluationResult(self.accuracies, self.seconds, self.validations)

    @property
    def best_accuracies(self) -> tuple[float, ...]:
        """Each network's best validation; chosen on the data it is measured on, hence no result."""
        return self.result.best_accuracies


class AccuracyCurve:
    """The points of a run, of all its architectures, in the order of their steps.

    Args:
        num_networks: Fresh networks of a full point.
        counted: Whether points may have fewer, so that their number is worth a column.
        several_validations: Whether networks are tested on the way, too.
    """

    def __init__(self, num_networks: int, counted: bool, several_validations: bool) -> None:
        self.points: list[EvaluationPoint] = []
        self._num_networks = num_networks
        self._counted = counted
        self._several_validations = several_validations

    def of(self, network: str) -> list[EvaluationPoint]:
        """Return the points of an architecture."""
        return [point for point in self.points if point.network == network]

    def at(self, step: int) -> list[EvaluationPoint]:
        """Return the points of a step."""
        return [point for point in self.points if point.step == step]

    def last(self, network: str) -> EvaluationPoint:
        """Return the last point of an architecture, the headline; of full ones, if there are any."""
        mine = self.of(network)
        return ([point for point in mine if len(point.accuracies) >= self._num_networks] or mine)[-1]

    def best(self, network: str) -> EvaluationPoint:
        """Return the point of highest mean accuracy, of however many networks; on the test split it is no result."""
        return max(self.of(network), key=lambda point: point.result.mean)

    @property
    def keys(self) -> list[str]:
        """What :meth:`scalars` has of a network besides its accuracy."""
        more = ["num_networks"] * self._counted + ["best_validation"] * self._several_validations
        return ["best", "low", "high", "seconds", "std", *more]

    def scalars(self, step: int, names: Mapping[str, str]) -> dict[str, float]:
        """Return what to log of a step.

        Args:
            step: The step.
            names: Name of each network's curve.
        """
        values: dict[str, float] = {}
        for point in self.at(step):
            name, result = names[point.network], point.result
            more = {
                "best": max(p.result.mean for p in self.of(point.network) if p.step <= step),
                # TensorBoard refuses bands without ends at some steps: a single network's has no width
                "low": result.mean - result.std,
                "high": result.mean + result.std,
                "seconds": point.seconds,
            }
            if self._has_deviation(point):
                more["std"] = result.std
            if self._counted:
                more["num_networks"] = len(point.accuracies)
            if self._several_validations:
                more["best_validation"] = mean_std(point.best_accuracies)[0]
            values[f"accuracy/{name}"] = result.mean
            values |= {f"evaluation/{name}/{key}": value for key, value in more.items()}
        return values

    def csv(self) -> str:
        """Return all points as a CSV table."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        # one that is resumed may have had more networks before
        columns = max([self._num_networks, *(len(point.accuracies) for point in self.points)])
        numbers = range(columns)
        best = ["best_validation_mean", "best_validation_std", *(f"best_validation_{i}" for i in numbers)]
        headings = ["step", "network", "mean", "std", "seconds", *(f"accuracy_{i}" for i in numbers)]
        writer.writerow(headings + best * self._several_validations + ["num_networks"] * self._counted)
        for point in self.points:
            result, nothing = point.result, [""] * (columns - len(point.accuracies))
            std = result.std if self._has_deviation(point) else ""
            values = [point.step, point.network, result.mean, std, point.seconds, *point.accuracies, *nothing]
            if self._several_validations:
                mean, best_std = mean_std(point.best_accuracies)
                values += [mean, best_std if self._has_deviation(point) else "", *point.best_accuracies, *nothing]
            writer.writerow(values + [len(point.accuracies)] * self._counted)
        return text.getvalue()

    def state_dict(self) -> dict[str, Any]:
        """Return the points as plain values."""
        return {
            "points": [
                (p.step, p.network, list(p.accuracies), p.seconds, [list(each) for each in p.validations])
                for p in self.points
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.points = [
            EvaluationPoint(step, network, tuple(accuracies), seconds, tuple(tuple(each) for each in validations))
            for step, network, accuracies, seconds, validations in state["points"]
        ]

    def _has_deviation(self, point: EvaluationPoint) -> bool:
        """Tell whether a deviation says something: that of an intermediate point's only network would be no spread."""
        return not self._counted or len(point.accuracies) > 1
