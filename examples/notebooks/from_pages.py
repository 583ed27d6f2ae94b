"""Writes the notebooks of this folder from the quickstart pages of `docs/`, and runs them (`make notebooks`).

    pip install nbclient ipykernel "bitwright[torch,keras,tensorflow]" scikit-learn
    python examples/notebooks/from_pages.py              # or some: pytorch, keras, tensorflow, onnx

A page's Python blocks are the notebook's cells, a console block that calls `bitwright` is one with `!` before each
command, and all between is text. So CI runs the notebooks' code when it runs the pages' blocks, and a test compares
the two.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
FRAMEWORKS = ("pytorch", "keras", "tensorflow", "onnx")
FENCE = re.compile(r"^```(python|console)\n(.*?)^```\n?", re.M | re.S)


def cells(page: str) -> list[tuple[str, str]]:
    """A page as ("markdown" or "code", source) one after another; links lead to the pages."""
    found: list[tuple[str, str]] = []

    def text(source: str) -> None:
        linked = re.sub(r"\]\((?!https?:)([^)]+)\)", r"](../../docs/\1)", source.strip())
        if linked and found and found[-1][0] == "markdown":
            found[-1] = "markdown", f"{found[-1][1]}\n\n{linked}"
        elif linked:
            found.append(("markdown", linked))

    end = 0
    for block in FENCE.finditer(page):
        text(page[end : block.start()])
        kind, source = block.groups()
        if kind == "python":
            found.append(("code", source.rstrip()))
        elif "$ bitwright" in source:
            found.append(("code", re.sub(r"^\$ ", "!", source.rstrip(), flags=re.M)))
        else:
            text(block[0])
        end = block.end()
    text(page[end:])
    return found


def notebook(framework: str) -> dict[str, Any]:
    """The notebook of a framework's page in Jupyter's format 4.5, without outputs."""
    page = (DOCS / f"quickstart-{framework}.md").read_text(encoding="utf-8")
    page = re.sub(r"; the same is a notebook, `[^`]+`", "", page)
    made = []
    for number, (kind, source) in enumerate(cells(page)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell | {"source": source})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Write and run all, or those named."""
    import nbformat
    from nbclient import NotebookClient

    os.environ |= {"NO_COLOR": "1", "TERM": "dumb", "TF_CPP_MIN_LOG_LEVEL": "3"}
    for framework in sys.argv[1:] or FRAMEWORKS:
        node = nbformat.from_dict(notebook(framework))
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(node, timeout=600, resources={"metadata": {"path": folder}}).execute()
        for cell in node.cells:
            cell.metadata.pop("execution", None)  # when it ran: another in each run
            if "outputs" in cell:  # what frameworks log isn't of interest, and is another on each machine
                cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        nbformat.write(node, HERE / f"{framework}.ipynb")
        print(framework)


if __name__ == "__main__":
    main()
