"""Names that nothing has yet."""

from __future__ import annotations

from collections.abc import Container


def free_name(wanted: str, taken: Container[str], first: int = 1) -> str:
    """A name, or with a number behind it where it is taken: "conv", "conv_1", "conv_2", …

    Args:
        wanted: the name.
        taken: names that are in use.
        first: the number of the first that is numbered.
    """
    found, number = wanted, first
    while found in taken:
        found, number = f"{wanted}_{number}", number + 1
    return found
