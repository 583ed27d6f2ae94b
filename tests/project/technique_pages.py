"""What the pages of techniques have from the code: the list of them, and each one's settings.

`python tests/project/technique_pages.py` writes it between the comments that mark it.
"""

from __future__ import annotations

import re
from pathlib import Path

from bitwright.cli.listings import setting_rows
from bitwright.plugins import Registry

DOCS = Path(__file__).parents[2] / "docs"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """As Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def filled(text: str, mark: str, content: str) -> str:
    """A page with what stands between the comments of this mark replaced."""
    pattern = rf"(<!-- {mark}: [^>]*-->\n).*?(<!-- /{mark} -->)"
    assert re.search(pattern, text, re.S), mark
    return re.sub(pattern, lambda m: f"{m[1]}\n{content}\n\n{m[2]}", text, flags=re.S)


def pages() -> dict[Path, str]:
    """Each page as it should be."""
    registry = Registry(entry_points=False)
    made: dict[Path, str] = {}
    found = []
    for info in registry.techniques().values():
        page = DOCS / "techniques" / f"{info.name}.md"
        rows = [(f"`{k}`", kind, f"`{default}`", note) for k, kind, default, note in setting_rows(registry, info.name)]
        content = table(("setting", "type", "default", "what it does"), rows) if rows else "It has none."
        made[page] = filled(page.read_text(encoding="utf-8"), "settings", content)
        also = ", ".join(f"`{alias}`" for alias in info.aliases)
        found.append((f"[`{info.name}`](techniques/{info.name}.md)", also, info.summary))
    index = DOCS / "techniques.md"
    made[index] = filled(
        index.read_text(encoding="utf-8"), "techniques", table(("technique", "also", "what it does"), found)
    )
    return made


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
