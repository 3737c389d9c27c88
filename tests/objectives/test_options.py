"""Options are stated once: a subclass inherits them with their defaults and their help."""

from dataclasses import fields
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError
from dd_lightning.objectives import (
    BidirectionalMatching,
    DistributionMatching,
    GradientMatching,
    MatchingObjective,
    TrajectoryMatching,
)

OBJECTIVES = [GradientMatching, BidirectionalMatching, DistributionMatching, TrajectoryMatching]


def parsed(*arguments: str) -> Any:  # noqa: ANN401
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MatchingObjective, "objective")
    config = parser.parse_args([f"--objective{argument}" for argument in arguments])
    return parser.instantiate(config).objective


def test_defaults_are_those_of_the_methods() -> None:
    def values(objective: MatchingObjective) -> dict[str, Any]:
        return {field.name: getattr(objective, field.name) for field in fields(objective)}

    idc = values(GradientMatching())
    assert idc == {
        "execution": None,
        "batch_real": 64,
        "batch_syn": 128,
        "augmentation": "color_crop_cutout",
        "policy": "idc",
        "sampling": "shuffled",
        "interval": 10,
        "per_cluster": 1,
        "metric": "mse",
        "include_classifier": False,
        "include_bias": False,
    }
    assert values(BidirectionalMatching()) == idc | {"alpha": 1.0, "batch_real": 128, "sampling": "representative"}
    dm = {name: value for name, value in idc.items() if not name.startswith("include")}
    strategy = "color_crop_cutout_flip_scale_rotate"
    assert values(DistributionMatching()) == dm | {"batch_real": 256, "policy": "dsa", "augmentation": strategy}
    for objective in OBJECTIVES:
        assert values(parsed(f"={objective.__name__}")) == values(objective())


def test_inherited_options_are_parsed() -> None:
    found = parsed("=BidirectionalMatching", ".alpha=2", ".batch_real=9", ".metric=cos", ".execution.compile=true")
    assert (found.alpha, found.batch_real, found.metric, found.interval) == (2.0, 9, "cos", 10)
    assert found.execution == Execution(compile="on")
    assert parsed("=GradientMatching", ".execution={micro_batch: null}").execution == Execution(micro_batch=None)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.__name__)
def test_every_option_has_help(objective: type[MatchingObjective], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(f".help={objective.__name__}")
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(objective):
        text = shown.rpartition(f"--objective.{field.name} ")[2].partition("(type: ")[0]
        described = text.removeprefix(field.name.upper()).rpartition("}")[2]
        assert len(described.split()) > 3, field.name


def test_options_are_keywords_and_how_it_is_computed_is_not_among_them() -> None:
    with pytest.raises(TypeError):
        GradientMatching("cos")  # type: ignore[arg-type, call-arg]
    for gone in ("compile", "precision", "micro_batch", "memory_gb"):
        options: dict[str, Any] = {gone: None}
        with pytest.raises(TypeError, match=gone):
            GradientMatching(**options)


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (TrajectoryMatching, {"syn_steps": 0}, "syn_steps is 0; it must be at least 1"),
        (TrajectoryMatching, {"batch_syn": 0}, "batch_syn is 0; it must be at least 1"),
        (GradientMatching, {"batch_real": 0}, "batch_real is 0; it must be at least 1"),
        (BidirectionalMatching, {"alpha": -1.0}, "alpha is -1; it must be at least 0"),
    ],
)
def test_values_out_of_range(objective: type[MatchingObjective], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective(**options)
