"""Run notebooks and store them with their outputs, without paths, times or versions of this machine.

``python notebooks/store.py`` runs all of them, ``python notebooks/store.py 01 03`` some. Cells tagged `skip-execution`,
and the notebook that needs a GPU, are stored without outputs.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
UNRUN = ("07",)


def main() -> None:
    """Run the notebooks whose names begin with an argument."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if path.name.startswith(tuple(sys.argv[1:]) or ""):
            notebook = nbformat.read(path, as_version=4)
            if not path.name.startswith(UNRUN):
                NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(FOLDER)}}).execute()
            clean(notebook)
            nbformat.write(notebook, path)
            print(path.name, path.stat().st_size // 1000, "kB")


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave of a notebook its cells, their tags, and what they printed and drew; not the hints on stderr."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = {"name": "python", "pygments_lexer": "ipython3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": language})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in cell.metadata if key == "tags"})
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
            for output in cell.outputs:
                output.update({"execution_count": None} if output.output_type == "execute_result" else {})
                output.update({"metadata": {}} if "metadata" in output else {})


if __name__ == "__main__":
    main()
