"""The pictures of TensorBoard: its own pages, drawn by a real browser from the event files of two runs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from tests import small

ROOT = Path(__file__).resolve().parents[1]
RUN_COLORS = ((255, 112, 67), (0, 119, 187))  # the first two of TensorBoard's palette


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_both_runs_are_drawn_without_a_click(store: Path, tmp_path: Path) -> None:
    for name, callbacks in (("base", []), ("dynadistill", [small.selection()])):
        logger = TensorBoardLogger(str(tmp_path / "runs"), name=name, default_hp_metric=False)
        small.fit(tmp_path, small.module(store), *callbacks, small.evaluation(), logger=logger)
    script = [sys.executable, str(ROOT / "benchmarks" / "tensorboard_pictures.py")]
    subprocess.run([*script, str(tmp_path / "runs"), str(tmp_path / "board"), "--tabs", "accuracy"], check=True)
    with Image.open(tmp_path / "board_accuracy.png") as picture:
        colors = picture.convert("RGB").crop((350, 150, 700, 350)).getcolors(2**16)  # without the list of runs
    counts = {color: count for count, color in colors or ()}
    assert all(counts[color] > 100 for color in RUN_COLORS)
