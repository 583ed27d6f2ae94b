"""Files that belong together take the place of older ones: all of them, or the older ones are back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bitwright.files._durable import cannot_write, sync_directory
from bitwright.files._leftovers import staging


def put_in_place(written: Sequence[Path], directory: Path, older: Sequence[Path]) -> None:
    """Move files and folders into a directory, and older ones out of the way first.

    Args:
        written: in the order in which they are to appear; the last is what says that all are there.
        directory: where they belong.
        older: what goes, in this order; it comes back where a move fails or is interrupted.

    Raises:
        WriteError: one can't be moved.
    """
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        try:
            source.replace(target)
        except OSError as error:
            raise cannot_write(target, error) from error
        moved.append((source, target))

    with staging(directory) as aside:
        try:
            for path in older:
                move(path, aside / path.name)
            *others, last = written
            for path in others:
                move(path, directory / path.name)
            sync_directory(directory)
            move(last, directory / last.name)
            sync_directory(directory)
        except BaseException:
            for source, target in reversed(moved):
                with suppress(OSError):
                    target.replace(source)
            raise
