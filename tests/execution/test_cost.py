"""Distillation's seconds and memory, apart from what else a run does."""

import time
from pathlib import Path

import pytest
import torch

from dd_lightning.execution import cost
from dd_lightning.execution.cost import CostMeter
from dd_lightning.training.evaluation import Evaluation, EvaluationResult
from tests import small


def test_seconds_stop_while_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = CostMeter(torch.device("cpu"), seconds=5.0)
    now[0] += 7  # before the start
    assert meter.seconds == 5
    meter.start()
    now[0] += 2
    assert meter.seconds == 7
    with meter.paused():
        now[0] += 30
        assert meter.seconds == 7
    now[0] += 1
    assert meter.seconds == 8

    def failing() -> None:
        with meter.paused():
            now[0] += 30
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    now[0] += 1
    assert meter.seconds == 9


def test_a_cuda_peak_is_distillations_own(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [900]  # of experts, before the start

    def reset(_: object) -> None:
        peak[0] = 0

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(cost, "peak_memory_bytes", lambda _: peak[0])
    meter = CostMeter(torch.device("cuda"))
    meter.start()
    peak[0] = 100
    assert meter.peak_memory == 100
    with meter.paused():
        peak[0] = 700  # an evaluation's
        assert meter.peak_memory == 100
    assert meter.peak_memory == 100
    peak[0] = 150
    assert meter.peak_memory == 150


def test_a_runs_seconds_are_without_its_evaluations(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> EvaluationResult:
        time.sleep(1.0)
        return EvaluationResult((0.5, 0.5), 1.0)

    monkeypatch.setattr(Evaluation, "__call__", slow)
    distilled, points = small.module(store), small.evaluation(every_n_steps=1)
    started = time.perf_counter()
    small.fit(tmp_path, distilled, points, steps=2)
    assert points.seconds == 3
    assert distilled.distillation.cost.seconds < time.perf_counter() - started - 2.9
