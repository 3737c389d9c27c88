"""What a terminal and a log show of a run."""

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import rich
from rich.console import Console

from dd_lightning.callbacks import StepProgressBar
from dd_lightning.training import progress as progress_module
from dd_lightning.training.progress import epoch_bar, live_progress
from tests import small


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Stand for a terminal of 80 columns; keep what is written to it."""
    written = io.StringIO()

    monkeypatch.setattr(rich, "_console", Console(file=written, force_terminal=True, width=80))
    yield written
    assert progress_module._active is None


def lines(written: str) -> list[str]:
    """Return what was ever shown, without control codes."""
    return [line.strip() for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written))]


def test_bars_of_a_run(terminal: io.StringIO, store: Path, tmp_path: Path) -> None:
    callbacks = [small.evaluation(every_n_steps=3), StepProgressBar()]
    small.fit(tmp_path, small.module(store), *callbacks, enable_progress_bar=True)
    shown = lines(terminal.getvalue())
    assert max(map(len, shown)) <= 80
    assert any(re.match(r"step 5/6  loss [\d.]+ .*83%", line) for line in shown)
    assert any(re.match(rf"evaluation: 2 x {small.NETWORK} ", line) for line in shown)
    accuracies = [
        line for line in shown if re.fullmatch(rf"step [036]: [\d.]+ ± [\d.]+ % with 2 {small.NETWORK}", line)
    ]
    assert [line[:6] for line in accuracies] == ["step 0", "step 3", "step 6"]
    assert not any("Epoch" in line for line in shown)


def test_messages_appear_above_the_bars(terminal: io.StringIO) -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = [handler.stream for handler in logger.handlers if isinstance(handler, logging.StreamHandler)]
    with live_progress() as outer, epoch_bar("inner", 3) as show, live_progress() as again:
        assert again is outer
        show(1)
        logger.warning("a message")
        assert len(outer.tasks) == 1
    assert "a message" in lines(terminal.getvalue())
    assert [h.stream for h in logger.handlers if isinstance(h, logging.StreamHandler)] == before


def test_lines_of_a_run_in_a_file(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [small.evaluation(every_n_steps=10), StepProgressBar()]
    small.fit(tmp_path, small.module(store), *callbacks, steps=20, enable_progress_bar=True)
    shown = lines(capsys.readouterr().out)
    steps = [line for line in shown if re.fullmatch(r"step \d+/20  loss [\d.e-]+  \d+%", line)]
    assert [line.split("/")[0] for line in steps] == [f"step {step}" for step in range(2, 21, 2)]
    assert [line[:8] for line in shown if " with 2 " in line] == ["step 0: ", "step 10:", "step 20:"]


def test_long_work_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    with epoch_bar("experts", 4) as show:
        show(1)
        show(2, "expert 2 of 2")
    assert capsys.readouterr().out.splitlines() == ["experts: 25%", "expert 2 of 2: 50%"]
    with epoch_bar("nothing", 4, shown=False) as show:
        show(4)
    assert capsys.readouterr().out == ""
