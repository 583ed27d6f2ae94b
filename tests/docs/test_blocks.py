"""Every block of every page runs as it stands.

A page's Python and console blocks run in their order, in one namespace and one empty folder, after what `docs_given.py`
says that the page takes for granted. A block that can't run says why in a comment in front of it:
``<!-- not run: … -->``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from docs_given import GIVEN

ROOT = Path(__file__).parents[2]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples" / "plugins"
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?^```(?P<kind>python|console)\n(?P<text>.*?)^```", re.M | re.S
)
# Commands of others, which aren't run here.
FOREIGN = {"adb", "cat", "make", "pip", "python", "qairt-converter", "qairt-quantizer", "trtexec"}


class Block(NamedTuple):
    """One fenced block."""

    kind: str
    text: str
    line: int
    reason: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["kind"], m["text"], text.count("\n", 0, m.start("text")) + 1, m["reason"]) for m in FENCE.finditer(text)
    ]


def commands(text: str) -> list[list[str]]:
    """The commands of a console block; lines without a prompt are what they print."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [
        shlex.split(line.removeprefix("$ "), comments=True) for line in joined.splitlines() if line.startswith("$ ")
    ]


def quoted(text: str) -> bool:
    """Whether the block says which file of an example it is from; `test_example_plugins.py` compares the two."""
    named = re.match(r"# ([\w/]+\.py)\n", text)
    return named is not None and bool(list(EXAMPLES.glob(f"*/{named[1]}")))


PAGES = [page.relative_to(DOCS).as_posix() for page in sorted(DOCS.rglob("*.md")) if blocks(page)]


@pytest.mark.parametrize("name", PAGES)
def test_blocks_run(name, tmp_path, monkeypatch, run):
    page = DOCS / name
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "docs"}
    if name in GIVEN:
        space |= GIVEN[name]()
    for block in blocks(page):
        if block.reason or quoted(block.text):
            continue
        if block.kind == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, space)
            continue
        for words in commands(block.text):
            if words[0] in FOREIGN:
                continue
            assert words[0] == "bitwright", f"{page}:{block.line}: {words[0]} is no command that is known here"
            done = run(*words[1:])
            assert done.status == 0, f"{page}:{block.line}: {' '.join(words)}\n{done.err}"
