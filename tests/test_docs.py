"""The documentation is built without a warning, names all that is public, and loads nothing from elsewhere."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import dd_lightning

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("docs/*.md", "notebooks/*.ipynb")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in ("sphinx", "myst_nb", "furo") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_all_public_names_are_in_the_reference(site: Path) -> None:
    page = (site / "docs/api.html").read_text()
    names = set(dd_lightning.__all__) - {"__version__"}
    assert {name for name in names if f'id="dd_lightning.{name}"' not in page} == set()


@pytest.mark.slow
def test_every_page_and_notebook_is_reached_from_the_index(site: Path) -> None:
    linked = set(re.findall(r'class="reference internal" href="([^"#]+\.html)', (site / "docs/index.html").read_text()))
    found = {(site / "docs" / target).resolve().relative_to(site).with_suffix("") for target in linked}
    docs, notebooks = ([path.relative_to(ROOT).with_suffix("") for path in ROOT.glob(where)] for where in SOURCES)
    assert found >= {*docs, *notebooks, Path("README"), Path("CONTRIBUTING")} - {Path("docs/index")}


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    tags = r"""<(?:script|img|iframe|source)[^>]+src=["'](?:https?:)?//|<link[^>]+href=["'](?:https?:)?//"""
    loaded = re.compile(tags + r"|@import|url\((?:https?:)?//")
    assert {str(path): found for path in pages if (found := loaded.findall(path.read_text()))} == {}
    assert len(pages) > 10
