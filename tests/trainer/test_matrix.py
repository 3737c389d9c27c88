"""Every method with every economy, interrupted everywhere: the last checkpoint is that of an uninterrupted run."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dd_lightning.module import DistillationModule
from dd_lightning.objectives import BidirectionalMatching, BilevelUnroll, DistributionMatching, GradientMatching
from dd_lightning.pools import NetworkPool
from dd_lightning.training import experts
from dd_lightning.training.evaluation import Evaluation
from tests import small

pytestmark = pytest.mark.slow

Method = Callable[[Path], DistillationModule]
REPRESENTATIVE: dict[str, Any] = {"batch_real": 8, "sampling": "representative", "interval": 2}
METHODS: dict[str, Method] = {
    "MTT": small.module,
    "MTT, advance": lambda store: small.module(store, {"refresh": "advance"}),
    "MTT, Adam, equal norm": lambda store: small.module(
        store, equal_norm=True, image_optimizer="adam", student_lr_lr=1e-5
    ),
    "DATM": lambda store: small.module(
        store, {"current_max_start_epoch": 1, "expansion_steps": 4}, labels="soft", label_lr=1.0
    ),
    "IDC": lambda _: small.network_module(
        {"num_networks": 2}, factor=2, image_space="pixels", inner_loop=2, clamp=True
    ),
    "DREAM": lambda _: small.network_module({"num_networks": 3}, objective=GradientMatching(**REPRESENTATIVE)),
    "DREAM+": lambda _: small.network_module(
        {"num_networks": 3, "refresh": "all", "pretrain_epochs": 1}, objective=BidirectionalMatching(**REPRESENTATIVE)
    ),
    "RaT-BPTT": lambda _: small.network_module(
        {"num_networks": 3, "age_limit": 1, "refresh": "candidates"},
        objective=BilevelUnroll(total_steps=4, window=2, batch_real=20),
        image_optimizer="adam",
        student_lr_lr=1e-6,
    ),
    "DM": lambda _: small.network_module(
        {"num_networks": 3, "age_limit": 1}, objective=DistributionMatching(batch_real=8)
    ),
}
SELECTIONS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "selection": {"num_candidates": 2, "temperature": 0.1},
    "held": {"num_candidates": 2, "every_n_steps": 2},
    "remembered": {"num_candidates": 2, "refresh_per_step": 1, "pool_size": 3},
    "scored by one step": {"num_candidates": 2, "score_steps": 1},
}
STEPS = 5


def interrupt(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Interrupt(Callback):
    """Ends a run within its fourth step, or in its closing evaluation."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.where == "step" and trainer.global_step == 3:
            interrupt()


def callbacks(folder: Path, selection: dict[str, Any] | None) -> list[Callback]:
    chosen: list[Callback] = [] if selection is None else [small.selection(**selection)]
    saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    return [*chosen, small.evaluation(every_n_steps=2, num_networks=1, compare_random=True), saved]


def contents(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, but for times and places."""
    whole = torch.load(path, weights_only=True)
    whole["distillation"].pop("seconds")
    whole["distillation"]["settings"]["model"]["pool"].pop("path", None)
    whole["callbacks"] = {name: state for name, state in whole["callbacks"].items() if "ModelCheckpoint" not in name}
    for state in whole["callbacks"].values():
        if "points" in state:
            state["points"] = [(*point[:3], *point[4:]) for point in state["points"]]  # without its seconds
    return {key: whole[key] for key in ("distillation", "callbacks", "state_dict", "optimizer_states", "global_step")}


def differences(name: str, one: object, other: object) -> list[str]:
    """Name the values in which two nested structures differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [each for key in one | other for each in differences(f"{name}.{key}", one.get(key), other.get(key))]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [each for index, pair in pairs for each in differences(f"{name}.{index}", *pair)]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if torch.equal(one, other) else [name]
    return [] if one == other else [f"{name}: {one!r} and {other!r}"]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_interrupted_anywhere(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, selection: str
) -> None:
    if "step" in selection and isinstance(METHODS[method](store).pool, NetworkPool):
        pytest.skip("its objective has no inner steps")

    def run(folder: Path, at: Path, *extra: Callback, path: Path | None = None) -> DistillationModule:
        module = METHODS[method](at)
        small.fit(folder, module, *callbacks(folder, SELECTIONS[selection]), *extra, steps=STEPS, ckpt_path=path)
        return module

    whole = run(tmp_path / "whole", store)
    for where in ("step", "evaluation", "closing", "experts"):
        folder, at = tmp_path / where, store
        with monkeypatch.context() as patch:
            if where == "experts":
                if isinstance(METHODS[method](store).pool, NetworkPool):
                    continue  # live networks have no experts
                at = tmp_path / "new store"
                patch.setattr(experts._Group, "train_epoch", _stopped)
            elif where != "step":
                call = {"evaluation": 3, "closing": 5}[where]
                patch.setattr(Evaluation, "__call__", _at_call(Evaluation.__call__, call))
            with pytest.raises(SystemExit) as ended:
                run(folder, at, Interrupt(where))
        assert ended.value.code == 143
        saved = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
        assert [path.stem for path in saved[-1:]] == {
            "step": ["step=4"], "evaluation": ["step=4"], "closing": [f"step={STEPS}"], "experts": []
        }[where]  # fmt: skip
        resumed = run(folder, at, path=saved[-1] if saved else None)
        assert small.same(small.learned(resumed), small.learned(whole))
        last = f"step={STEPS}.ckpt"
        assert differences("", contents(folder / last), contents(tmp_path / "whole" / last)) == []


def _at_call(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        nonlocal calls
        calls += 1
        if calls == call:
            interrupt()
        return function(*arguments, **options)

    return counted


def _stopped(*_: object) -> None:
    raise SystemExit(143)
