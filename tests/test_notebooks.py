"""Notebooks run from top to bottom, in miniature, and are stored with outputs that say nothing of a machine."""

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = {path.stem[:2]: path for path in sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))}
UNRUN = {"07"}
"""Needs a GPU, and none has run it."""

smoke = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own machinery


@cache
def stored(number: str) -> nbformat.NotebookNode:
    notebook: nbformat.NotebookNode = nbformat.read(NOTEBOOKS[number], as_version=4)
    return notebook


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_stored_with_outputs_and_without_a_machine(number: str) -> None:
    cells = [cell for cell in stored(number).cells if cell.cell_type == "code"]
    text = NOTEBOOKS[number].read_text()
    outputs = [output for cell in cells for output in cell.outputs]
    assert bool(outputs) != (number in UNRUN)
    assert not re.findall(r"(?<![\w.:/~])/(?:tmp|home|root|work|Users|mnt|var|usr|opt|private|content)\b[^\s\"]*", text)
    assert not re.findall(r"[A-Z]:\\\\|\d{4}-\d\d-\d\dT\d\d:\d\d|Error\b.*Traceback", text)
    assert set(stored(number).metadata.language_info) == {"name", "pygments_lexer"}  # not the version
    assert {key for cell in stored(number).cells for key in cell.metadata} <= {"tags"}
    assert all(cell.execution_count is None for cell in cells)
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_short(number: str) -> None:
    assert NOTEBOOKS[number].stat().st_size < 400_000
    assert len(stored(number).cells) <= 16


def run(number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """Execute a notebook's miniature; return what it printed, and how many pictures it drew."""
    monkeypatch.setenv("DD_LIGHTNING_SMOKE", "1")
    notebook = nbformat.read(NOTEBOOKS[number], as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


@smoke
def test_distill_and_inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, pictures = run("01", tmp_path, monkeypatch)
    assert pictures == 2  # the images and the curve
    assert re.search(r"distilled images: \d+\.\d% ", printed)
    assert re.search(r"random real images: \d+\.\d%", printed)
    assert re.search(r"\[\(0, [\d.]+\), \(1, [\d.]+\), \(2, [\d.]+\), \(3, [\d.]+\), \(4, [\d.]+\)\]", printed)


@smoke
@pytest.mark.slow
def test_your_data_and_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, pictures = run("03", tmp_path, monkeypatch)
    assert pictures == 1
    assert "1294 training, 143 validation and 360 test images (1, 8, 8)" in printed
    assert re.findall(r"step +(\d+), (\S+): [\d.]+% ± 0\.0%", printed) == [
        (step, network) for step in "024" for network in ("__main__:make_network", "ConvNet-2-W32")
    ]
    assert re.search(r"10 images, a plain loop: [\d.]+% of 360 test images", printed)
    assert re.search(r"10 images, the recipe: [\d.]+% ± 0\.0%", printed)


@smoke
@pytest.mark.slow
def test_a_new_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, pictures = run("05", tmp_path, monkeypatch)
    assert pictures == 2  # curves and images
    assert re.findall(r"^(.+): [\d.]+%; random real images: [\d.]+%$", printed, re.MULTILINE) == [
        "logit matching",
        "+ DynaDistill",
    ]
    objective = next(cell.source for cell in stored("05").cells if "(ClasswiseMatching)" in cell.source)
    assert len(objective.splitlines()) <= 30


@smoke
@pytest.mark.slow
def test_figure_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, pictures = run("02", tmp_path, monkeypatch)
    assert pictures == 1
    assert re.findall(r"^(.+), step 4: [\d.]+% ± [\d.]+% over 2 seeds$", printed, re.MULTILINE) == [
        "base",
        "DynaDistill",
    ]
    marks = re.findall(r"^  (\w+) to 95 %: .+ by the mean curve; by seed .+, .+$", printed, re.MULTILINE)
    assert marks == ["steps", "seconds", "evaluations"] * 2


@smoke
@pytest.mark.slow
def test_someone_elses_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, pictures = run("04", tmp_path, monkeypatch)
    assert pictures == 1
    assert "space is not in the files of format mtt" in printed
    accuracies = re.findall(r"^(\S+) +[\d.]+% ± 0\.0%, random real images [\d.]+%$", printed, re.MULTILINE)
    assert accuracies == ["ConvNet-2-W32", "ConvNet-2-W32-BN-MP", "ResNet-10-W8"]


@smoke
@pytest.mark.slow
def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, _ = run("06", tmp_path, monkeypatch)
    assert re.search(r"accuracy/ConvNet-2-W32 +5 points, last at step 4: 0\.\d+", printed)
    assert re.search(r"selection/entropy +4 points", printed)
    assert "synthetic at steps [0, 1, 2, 4]" in printed


@smoke
@pytest.mark.slow
def test_cifar10_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, pictures = run("07", tmp_path, monkeypatch)
    assert pictures == 2  # the curve and the images
    assert re.search(r"step 3: [\d.]+% ± [\d.]+% of the test images", printed)
    assert "SyntheticFile(digits: 10 classes of 2 images" in printed
    assert {"ConvNet-1-W8", "ConvNet-2-W8"} <= set(re.findall(r"ConvNet-\d-W8", printed))
