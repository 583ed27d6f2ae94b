"""Names of tensors as files have them, and as the tools of targets spell them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LONGEST = 160
"""Characters of a file's stem; file systems take 255 bytes of a name."""


def file_names(tensors: Iterable[str]) -> dict[str, str]:
    """A distinct file stem for each tensor: letters, digits, ``_`` and ``-`` only; equal ones get a number."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for tensor in tensors:
        stem = re.sub(r"[^0-9A-Za-z_-]+", "_", tensor).strip("_")[:LONGEST] or "tensor"
        name, number = stem, 1
        while name.lower() in taken:  # some file systems don't tell cases apart
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        found[tensor] = name
    return found


def plain(name: str) -> str:
    """A name without what tools change: separators, case, a leading ``_`` before digits, an ending such as ``:0``."""
    stem = re.sub(r":\d+$", "", name)
    stem = re.sub(r"(_native|\.raw|\.bin|\.npy)+$", "", stem)
    return re.sub(r"[^0-9a-z]+", "_", stem.lower()).strip("_")


def matched(wanted: Mapping[str, str], offered: Iterable[str]) -> dict[str, str]:
    """For each tensor, the offered name that means it; tensors without one are left out.

    A name is taken if it is the tensor's or its file's, then if both are equal when `plain`. A plain name that several
    tensors have, or several offers, is not a match.

    Args:
        wanted: tensor → its file's stem.
        offered: the other side's names.
    """
    names = list(offered)
    exact = set(names)
    found = {t: n for t, stem in wanted.items() for n in (t, stem) if n in exact}
    used = set(found.values())
    simple: dict[str, list[str]] = {}
    for n in names:
        if n not in used:
            simple.setdefault(plain(n), []).append(n)
    asked: dict[str, list[str]] = {}
    for t in wanted:
        if t not in found:
            for form in dict.fromkeys((plain(t), plain(wanted[t]))):
                asked.setdefault(form, []).append(t)
    for form, tensors in asked.items():
        offers = simple.get(form, [])
        if len(tensors) == 1 and len(offers) == 1:
            found.setdefault(tensors[0], offers[0])
    return found
