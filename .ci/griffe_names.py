"""For the reference (`make docs`): docstrings that describe several arguments in one entry, ``low, high: the ends.``.

Griffe reads such an entry as one argument of that name. Here each gets its own, with the same text.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Warns|Yields|Examples?):\s*$")
ENTRY = re.compile(r"^(    )(\w+(?:, \w+)+): (.*)$")


def split(text: str) -> str:
    """A docstring with one entry for each name."""
    lines, listing, open_entry, out = text.splitlines(), False, [], []

    def close() -> None:
        """Write the entry that is being read, once for each of its names."""
        nonlocal open_entry
        if open_entry:
            match = ENTRY.match(open_entry[0])
            assert match is not None
            for name in match[2].split(", "):
                out.extend([f"{match[1]}{name}: {match[3]}", *open_entry[1:]])
        open_entry = []

    for line in lines:
        if open_entry and line.startswith("     "):
            open_entry.append(line)
            continue
        close()
        if section := SECTION.match(line):
            listing = section[1] in ("Args", "Attributes")
        elif line and not line.startswith(" "):
            listing = False
        if listing and ENTRY.match(line):
            open_entry = [line]
        else:
            out.append(line)
    close()
    return "\n".join(out)


class Names(griffe.Extension):
    """Splits them in everything that is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """One function, class or module."""
        if obj.docstring is not None:
            obj.docstring.value = split(obj.docstring.value)
