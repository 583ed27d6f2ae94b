"""The notebooks hold the quickstart pages' blocks, which `test_blocks.py` runs, and were run whole when written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
spec = importlib.util.spec_from_file_location("from_pages", NOTEBOOKS / "from_pages.py")
assert spec is not None and spec.loader is not None
from_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(from_pages)


@pytest.mark.parametrize("framework", from_pages.FRAMEWORKS)
def test_a_notebook_is_its_page_and_was_run(framework):
    written = json.loads((NOTEBOOKS / f"{framework}.ipynb").read_text(encoding="utf-8"))
    wanted = from_pages.notebook(framework)
    found = [(c["cell_type"], "".join(c["source"])) for c in written["cells"]]
    assert found == [(c["cell_type"], "".join(c["source"])) for c in wanted["cells"]], "run `make notebooks`"
    code = [cell for cell in written["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]


def test_every_notebook_is_looked_at():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(from_pages.FRAMEWORKS)


def test_cells_of_a_page():
    page = "# T\n\n[a](b.md)\n\n```console\n$ pip install x\n```\n\n```python\nx = 1\n```\n\n"
    page += "```console\n$ bitwright verify out/\n```\n"
    assert from_pages.cells(page) == [
        ("markdown", "# T\n\n[a](../../docs/b.md)\n\n```console\n$ pip install x\n```"),
        ("code", "x = 1"),
        ("code", "!bitwright verify out/"),
    ]
