"""README and its siblings say what works: commands parse, the example runs, links lead somewhere."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from dd_lightning.cli.main import COMMANDS, main
from dd_lightning.sets.synthetic_file import load_synthetic

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += [ROOT / name for name in ("configs/README.md", "benchmarks/README.md")] + sorted((ROOT / "docs").glob("*.md"))
README = PAGES[0].read_text()


def blocks(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Return the arguments of every ``dd-lightning`` command."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line.split("dd-lightning ", 1)[1], comments=True) for line in lines if "dd-lightning " in line]
    return [words for words in found if words[0] in COMMANDS and "$" not in "".join(words)]


def test_readme_fits_on_a_screen_or_two() -> None:
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize(
    "words", [words for page in PAGES for words in commands(page.read_text())], ids=lambda words: " ".join(words[:3])
)
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the command sets it; this restores it
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    assert stop.value.code == 0
    assert {"fit": "model:", "report": "runs:"}.get(words[0], "data:") in capsys.readouterr().out


def test_ci_finds_the_test_command() -> None:
    lines = [line for line in README.splitlines() if re.match("python3 -m venv .*pytest", line)]
    assert len(lines) == 1
    assert '-m "not slow"' in lines[0]


@pytest.mark.filterwarnings("ignore:.*will not be saved")
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(README, "python")
    small = {
        "max_steps=120": "max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False",
        "num_experts=10": "num_experts=3",
        "max_start_epoch=5": "max_start_epoch=1",
        "every_n_steps=40": "every_n_steps=40, num_networks=1, epochs=1",
    }
    for value, smaller in small.items():
        assert value in code
        code = code.replace(value, smaller)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert [tuple(names[name].shape) for name in ("images", "labels")] == [(10, 1, 8, 8), (10,)]  # type: ignore[attr-defined]


def test_training_on_a_set_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks((ROOT / "docs/formats.md").read_text(), "python")
    shutil.copy(ROOT / "tests/fixtures/synthetic_v2_pixels.safetensors", tmp_path / "synthetic.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/formats.md", "exec"), names)
    ((images, labels),) = names["loader"]
    assert images.shape == (len(labels), *images.shape[1:])
    assert len(labels) == load_synthetic(tmp_path / "synthetic.safetensors").effective_ipc * int(labels.max() + 1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, target
