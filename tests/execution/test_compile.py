"""What is compiled when, what compiled code is called with, and which failures a run may survive."""

import pytest
import torch
from torch import Tensor

from dd_lightning.execution.compile import REPAYING_CALLS, Compile, compile_for_run, compiled, compiles
from dd_lightning.functional.errors import InputError

CPU = torch.device("cpu")
CHOICES: tuple[Compile, ...] = ("auto", "on")


def attempt(error: Exception, choice: Compile) -> object:
    def make() -> None:
        raise error

    return compile_for_run(make, choice, torch.device("cuda"), REPAYING_CALLS, "it", lambda _: None)


def test_only_what_the_compiler_raises_is_survived() -> None:
    for error in (RuntimeError("no compiler"), NotImplementedError("no forward mode"), InputError("another order")):
        with pytest.warns(UserWarning, match=rf"{error}\): going on without; set execution.compile: off"):
            assert attempt(error, "auto") is None
        with pytest.raises(InputError, match=r"compile is 'on', but torch\.compile fails for it"):
            attempt(error, "on")
    for bug in (TypeError("missing argument"), KeyError("name"), AttributeError("no such field")):
        for choice in CHOICES:
            with pytest.raises(type(bug)) as raised:
                attempt(bug, choice)
            assert raised.value is bug


def test_a_run_is_told_before_it_compiles() -> None:
    said: list[str] = []
    assert compile_for_run(lambda: 3, "on", CPU, 1, "the step", said.append) == 3
    assert said == ["compiling the step: the first distillation step may be minutes away"]
    for choice in ("off", False, "auto"):
        assert compile_for_run(lambda: 3, choice, CPU, 10**9, "it", said.append) is None
    assert len(said) == 1


@pytest.mark.parametrize("choice", [True, "on"])
def test_on_always_compiles(choice: bool) -> None:
    assert compiles(choice, CPU, 0)


def test_one_piece_of_code_serves_all_strides_and_gradient_modes() -> None:
    def double(first: Tensor, images: Tensor) -> Tensor:
        return 2 * first.sum() * images

    code, rows = compiled(double, "eager"), torch.arange(12.0).reshape(3, 4)
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = code(torch.arange(4.0), images)
    with torch.compiler.set_stance("fail_on_recompile"):
        for first in (rows[0], rows[:, :1].expand(3, 4)[0] + rows[0], rows[0].clone().requires_grad_()):
            for batch in (images, images.transpose(2, 3).contiguous().transpose(2, 3), images.clone().requires_grad_()):
                found = code(first, batch)
                assert torch.equal(found, expected)
                assert not found.requires_grad
    torch.compiler.set_stance("default")
