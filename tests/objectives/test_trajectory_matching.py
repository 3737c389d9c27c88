"""The compiled student in a run: the same images up to rounding, visibly prepared, and never in the way."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from lightning.pytorch import Callback

from dd_lightning.execution import compile as compile_module
from dd_lightning.execution import compiled_loss
from dd_lightning.execution.compile import compiled
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import TrajectoryMatching
from tests import small


def objective(**execution: Any) -> TrajectoryMatching:  # noqa: ANN401
    return TrajectoryMatching(syn_steps=3, batch_syn=4, execution=Execution(**execution))  # of 6 images: a remainder


def run(folder: Path, store: Path, matching: TrajectoryMatching, *callbacks: Callback) -> DistillationModule:
    distilled = small.module(store, objective=matching)
    small.fit(folder, distilled, *callbacks, steps=2)
    return distilled


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile to eager code: it takes seconds."""
    monkeypatch.setattr(compiled_loss, "compiled", partial(compiled, backend="aot_eager"))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for a machine without a compiler."""

    def backend(*_: object) -> NoReturn:
        raise RuntimeError("no C++ compiler\nmore lines")

    monkeypatch.setattr(compiled_loss, "compiled", partial(compiled, backend=backend))


class Compiled(Callback):
    """Let nothing be compiled once the steps have begun."""

    def on_train_batch_start(self, *_: object) -> None:
        torch.compiler.set_stance("fail_on_recompile")

    def on_train_end(self, *_: object) -> None:
        torch.compiler.set_stance("default")

    def on_exception(self, *_: object) -> None:
        torch.compiler.set_stance("default")


@pytest.mark.usefixtures("quick")
def test_a_compiled_run_learns_the_same_up_to_rounding(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    selection = partial(small.selection, num_candidates=2)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        found = run(tmp_path, store, objective(compile="on"), selection(), Compiled())
    assert [r.getMessage() for r in caplog.records if "compiling the student's step" in r.getMessage()]
    eager = run(tmp_path, store, objective(compile="off"), selection())
    for value, reference in zip(small.learned(found), small.learned(eager), strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-4)
    assert not small.same(small.learned(found), small.learned(eager))  # or nothing was compiled
    assert list(found.state_dict()) == list(eager.state_dict())


@pytest.mark.usefixtures("broken")
def test_compile_on_says_in_one_line_why_it_cannot(store: Path, tmp_path: Path) -> None:
    message = r"compile is 'on', but torch\.compile fails .*no C\+\+ compiler.*; set execution\.compile: off"
    with pytest.raises(InputError, match=message) as refused:
        run(tmp_path, store, objective(compile="on"))
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("broken")
def test_compile_auto_goes_on_without(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = small.learned(run(tmp_path, store, objective(compile="off")))
    monkeypatch.setattr(compile_module, "compiles", lambda *_: True)
    with pytest.warns(UserWarning, match="torch.compile fails for the student's step .*: going on without"):
        assert small.same(small.learned(run(tmp_path, store, objective(compile="auto"))), eager)
