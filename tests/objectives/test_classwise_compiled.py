"""Compiled matching of classes, and matching in bfloat16: near the eager one, prepared in time, never in the way."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from lightning.pytorch import Callback

from dd_lightning.execution import compile as compile_module
from dd_lightning.execution.compile import compiled, compiles
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import (
    BidirectionalMatching,
    DistributionMatching,
    GradientMatching,
    Workload,
    class_statistics,
)
from dd_lightning.objectives.classwise import ClasswiseMatching
from dd_lightning.sets.color_spaces import NormalizedSpace
from tests import small
from tests.objectives.test_classwise import BATCH, Problem, problem, relative_error

KINDS: dict[str, tuple[type[ClasswiseMatching], dict[str, Any]]] = {
    "gradients": (GradientMatching, {}),
    "cosines": (GradientMatching, {"metric": "cos", "include_classifier": True, "include_bias": True}),
    "both": (BidirectionalMatching, {"sampling": "shuffled", "alpha": 0.5}),
    "features": (DistributionMatching, {}),
}


class Compilers:
    """What the runs of a test compile with: eager code, which takes a second, and a note of what it was used for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend: Any = "eager"
        self.calls: list[str] = []

        def noted(function: Any) -> Any:  # noqa: ANN401
            code = compiled(function, self.backend)

            def call(*arguments: Any) -> Any:  # noqa: ANN401
                self.calls.append(function.__name__)
                return code(*arguments)

            return call

        monkeypatch.setattr(class_statistics, "compiled", noted)

    def take(self) -> dict[str, int]:
        counts = {call: self.calls.count(call) for call in self.calls}
        self.calls.clear()
        return counts


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compilers]:
    yield Compilers(monkeypatch)
    torch.compiler.set_stance("default")


def case_of(kind: str, name: str = "ConvNet-1-W4", **options: Any) -> Problem:  # noqa: ANN401
    make, settings = KINDS[kind]
    objective: Any = make(**({"batch_real": BATCH} | settings | options))
    return problem(objective, name, Formation(2), pixels=True, soft=kind == "cosines")


def in_float32(case: Problem) -> Problem:
    case.theta = case.theta.float()
    case.real = type(case.real)(case.real.images.float(), case.real.labels, case.real.num_classes)
    case.synthetic.float()
    assert isinstance(case.synthetic.space, NormalizedSpace)
    case.synthetic.space = NormalizedSpace(*(tensor.float() for tensor in case.synthetic.space.tensors().values()))
    return case


def prepare(case: Problem, candidates: int = 2) -> None:
    precision = (case.objective.execution or Execution()).precision
    case.objective.execution = Execution(compile="on", precision=precision)
    case.objective.plan_memory(Workload(case.network, case.synthetic.decoded_size, candidates=candidates), Execution())
    case.objective.prepare(case.given, 1, lambda _: None)
    torch.compiler.set_stance("fail_on_recompile")


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager_up_to_rounding(kind: str, compilers: Compilers) -> None:
    case = case_of(kind, batch_syn=7)  # of 8 decoded images
    draws = [case.draw(step) for step in range(2)]
    eager = [[value.clone() for value in case.loss_and_gradient(draw)] for draw in draws]
    terms = case.score(draws[0]).terms
    prepare(case)
    assert compilers.take() == {"statistics": 3, "matched": 1, "pulled_back": 1}
    for draw, (loss, gradient) in zip(draws, eager, strict=True):
        for with_gradient in (True, False):
            found_loss, found = case.loss_and_gradient(draw, with_gradient)
            assert relative_error(found_loss, loss) < 1e-12
            assert float(gradient.norm()) > 1e-6
            assert relative_error(found, gradient) < 1e-12
            wanted = {"statistics": 3, "matched": 3} if with_gradient else {"statistics": 6, "pulled_back": 3}
            assert compilers.take() == wanted
    found_terms = case.score(draws[0]).terms
    assert list(found_terms) == list(terms)
    assert all(relative_error(found_terms[name], terms[name]) < 1e-12 for name in terms)


@pytest.mark.parametrize("kind", ["both", "features"])
def test_compiled_with_batch_norm_in_float32(kind: str, compilers: Compilers) -> None:
    compilers.backend = "aot_eager"
    case = in_float32(case_of(kind, "ConvNet-2-W4-BN"))
    loss, gradient = (value.clone() for value in case.loss_and_gradient(case.draw()))
    prepare(case, candidates=1)
    assert compilers.take() == {"statistics": 1, "matched": 1}
    found_loss, found = case.loss_and_gradient(case.draw())
    assert found.dtype == torch.float32
    assert relative_error(found_loss, loss) < 1e-5
    assert relative_error(found, gradient) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str, compilers: Compilers) -> None:
    exact, rounded = in_float32(case_of(kind)), in_float32(case_of(kind, execution=Execution(precision="bfloat16")))
    loss, gradient = exact.loss_and_gradient(exact.draw())
    found_loss, found = (value.clone() for value in rounded.loss_and_gradient(rounded.draw()))
    scored = rounded.score(rounded.draw(), with_gradient=False)
    assert found_loss.dtype == found.dtype == torch.float32
    assert all(cotangent.dtype == torch.float32 for cotangents in scored.work for cotangent in cotangents)
    assert 1e-5 < relative_error(found_loss, loss) < 0.1
    assert 1e-3 < relative_error(found, gradient) < 0.3
    if kind != "features":
        return
    prepare(rounded)
    for with_gradient in (True, False):
        found_loss, found = rounded.loss_and_gradient(rounded.draw(), with_gradient)
        assert relative_error(found_loss, loss) < 0.1
        assert relative_error(found, gradient) < 0.3


# In a run


class NothingElse(Callback):
    """Let nothing be compiled once the steps have begun."""

    def on_train_batch_start(self, *_: object) -> None:
        torch.compiler.set_stance("fail_on_recompile")


def run(
    folder: Path,
    *callbacks: Callback,
    pool: dict[str, Any] | None = None,
    **execution: Any,  # noqa: ANN401
) -> DistillationModule:
    objective = GradientMatching(batch_real=8, execution=Execution(**execution))
    distilled = small.network_module({"num_networks": 2} | (pool or {}), objective=objective)
    small.fit(folder, distilled, *callbacks, steps=3)
    torch.compiler.set_stance("default")
    return distilled


@pytest.mark.parametrize("candidates", [1, 2])
def test_a_compiled_run(
    candidates: int, compilers: Compilers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # between two selections, a step scores one candidate
    selection = partial(small.selection, num_candidates=candidates, every_n_steps=2)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        found = run(tmp_path, selection(), NothingElse(), compile="on")
    assert [r.getMessage() for r in caplog.records if "compiling the matching of a class" in r.getMessage()]
    calls = compilers.take()
    if candidates == 1:
        assert calls == {"statistics": 1 + 9, "matched": 1 + 9}
    else:
        assert calls == {"statistics": 3 + 15 + 12, "matched": 1 + 3, "pulled_back": 1 + 6}
    eager = run(tmp_path, selection())
    assert compilers.take() == {}
    for value, reference in zip(small.learned(found), small.learned(eager), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-4)
    assert not small.same(small.learned(found), small.learned(eager))  # or nothing was compiled
    assert list(found.state_dict()) == list(eager.state_dict())


@pytest.mark.filterwarnings("ignore:precision is .tf32.")
def test_off_is_what_there_was(tmp_path: Path, compilers: Compilers) -> None:
    plain, off = (
        run(tmp_path),
        run(tmp_path, compile=False, precision="tf32", pool={"execution": Execution(compile="auto")}),
    )
    assert small.same(small.learned(plain), small.learned(off))  # tf32 is CUDA's
    assert compilers.take() == {}


def test_where_it_fails(compilers: Compilers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: object) -> NoReturn:
        raise RuntimeError("no C++ compiler\nmore lines")

    compilers.backend = backend
    message = r"compile is 'on', but torch\.compile fails .*no C\+\+ compiler.*; set execution\.compile: off"
    with pytest.raises(InputError, match=message) as refused:
        run(tmp_path, compile="on")
    assert "\n" not in str(refused.value)
    eager = small.learned(run(tmp_path))
    monkeypatch.setattr(compile_module, "compiles", lambda choice, *_: choice == "auto")
    with pytest.warns(UserWarning, match="torch.compile fails for the matching of a class .*: going on without"):
        fallen_back = run(tmp_path, compile="auto", pool={"execution": Execution(compile="off")})
    assert small.same(small.learned(fallen_back), eager)


def test_auto_compiles_long_runs_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [compiles("auto", cuda, calls) for calls in (49_999, 50_000)] == [False, True]
    assert not compiles("auto", cpu, 10**9)
    assert [compiles(choice, cpu, 0) for choice in ("on", "off")] == [True, False]
    torch.use_deterministic_algorithms(True)
    try:
        assert not compiles("auto", cuda, 10**9)
    finally:
        torch.use_deterministic_algorithms(False)
    case, asked = case_of("gradients"), list[tuple[Any, ...]]()
    monkeypatch.setattr(compile_module, "compiles", lambda *arguments: asked.append(arguments))
    case.objective.execution = Execution(compile="auto")
    case.objective.prepare(case.given, 100, lambda _: None)
    assert asked == [("auto", cpu, 300)]
