"""Execute notebooks in order, in a scratch outputs folder, and write them back normalised.

    python tools/execute_notebooks.py [notebooks/03_generation.ipynb ...]     (default: all)

Normalised means: outputs and execution counts kept; papermill and widget metadata and time stamps
removed; stable cell ids; cells tagged ``folded`` or ``solution`` are folded. Re-running on
the same machine leaves a small diff.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
# Tags of cells that JupyterLab folds: plumbing, drawings and assertions; and solutions with their output.
FOLDED = {"folded", "solution"}
KERNEL_ENV = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": notebook.metadata.language_info,  # the kernel's, as JupyterLab writes it
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        if FOLDED & set(tags):  # JupyterLab shows a bar to open it
            cell.metadata["jupyter"] = {"source_hidden": True}
            if "solution" in tags:
                cell.metadata["jupyter"]["outputs_hidden"] = True
        if cell.cell_type == "code":
            cell.outputs = [_merge(o) for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def _merge(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    output.pop("transient", None)
    if "metadata" in output:
        output.metadata = {}
    return output


def execute(path: Path, outputs: Path) -> None:
    os.environ.update(KERNEL_ENV, NBHELPERS_OUTPUTS=str(outputs))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    nbformat.write(normalise(notebook), path)
    print(f"{path.name}: {sum(c.cell_type == 'code' for c in notebook.cells)} code cells", flush=True)


if __name__ == "__main__":
    chosen = [Path(p).resolve() for p in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    with tempfile.TemporaryDirectory() as scratch:
        for notebook_path in chosen:
            execute(notebook_path, Path(scratch))
