"""``dd-lightning export`` and ``import``, and evaluating what comes back."""

import re
from pathlib import Path

import pytest
import torch

from dd_lightning.sets.synthetic_file import load_synthetic
from tests.small import Cli


@pytest.fixture
def run(cli: Cli) -> Path:
    cli.fit("--trainer.max_steps", "1", "--evaluation", "null")
    return cli.version()


DIGITS = ("--data", "DigitsDataModule")


def evaluated(cli: Cli, file: Path) -> str:
    cli("evaluate", str(file), *DIGITS, "--num_networks", "2", "--epochs", "3", "--recipe", "mtt")
    found = re.search(r"[\d.]+ ± [\d.]+ %", cli.out)
    assert found is not None
    return found[0]


def test_there_and_back_evaluates_bit_for_bit(cli: Cli, run: Path, tmp_path: Path) -> None:
    wanted = load_synthetic(run / "synthetic.safetensors")
    expected = evaluated(cli, run)
    for format, given in {"pt": [], "mtt": ["--space", "normalized"]}.items():
        path, back = str(tmp_path / f"{format}.out"), tmp_path / f"{format}.safetensors"
        cli("export", str(run), "--format", format, "--out", path)
        assert " kB, in " in cli.out
        network = ["--network", wanted.network]
        cli("import", path, "--format", format, "--out", str(back), *DIGITS, *given, *network)
        assert "10 images, hard labels" in cli.out
        read = load_synthetic(back)
        assert torch.equal(read.images, wanted.images)
        assert read.evaluation_lr == wanted.evaluation_lr
        assert evaluated(cli, back) == expected


def test_bad_input_is_one_line_and_leaves_no_file(cli: Cli, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.safetensors"
    cli("export", str(run), "--format", "mtt", "--out", str(tmp_path / "mtt"))
    source = str(tmp_path / "mtt")
    for arguments, message in [
        (["export", str(run), "--format", "zip", "--out", str(out)], "format is 'zip'; use one of folder"),
        (["export", str(run), "--format", "ddranking", "--out", str(out)], "the images have 1 channels"),
        (["export", str(tmp_path / "no"), "--format", "pt", "--out", str(out)], "no synthetic set"),
        (["export", str(run), "--format", "mtt", "--out", source], "exists; give a new path"),
        (["import", source, "--format", "mtt", "--out", str(out), *DIGITS], "space is not in the files"),
        (["import", source, "--format", "idc", "--out", str(out), *DIGITS], "factor is not in IDC's files"),
        (["import", source, "--format", "mtt", "--out", source, *DIGITS], "exists; give a new file"),
        (["import", source, "--format", "mtt", "--out", str(out), *DIGITS, "--recipe", "no"], "recipe"),
    ]:
        assert message in cli.refused(*arguments)
        assert not out.exists()
