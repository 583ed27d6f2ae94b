"""Temporary files beside results: their names hold the process's number, and the next run sweeps those of dead ones."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from bitwright.files._durable import cannot_write, discard, sync_directory
from bitwright.files._scratch import Scratch, hold

_NAMES = (
    re.compile(r"\.(?:.+\.)?(?P<process>\d+)\.(?:tmp|partial|old|probe)"),
    re.compile(r"\.bitwright-(?P<process>\d+)-.*"),
)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder for what is to be moved to its place in `folder` when it is whole; gone when the block ends.

    Raises:
        WriteError: it can't be made.
    """
    with Scratch(folder, prefix=f".bitwright-{os.getpid()}-") as made:
        yield made


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A hidden folder to write in: where the block ends, files and folders in it move to their places beside `path`.

    They are flushed to disk first, and `path` itself moves last, so that it points at nothing that isn't there yet.
    A folder that was at a place is gone then; where moving fails, it is back.

    Raises:
        WriteError: a file can't be written, by the block neither.
    """
    try:
        with staging(path.parent) as folder:
            yield folder
            written = sorted(folder.iterdir(), key=lambda p: (p.name == path.name, p.name))
            for file in (p for p in written if p.is_file()):
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
            for made in written:
                _put(made, path.parent / made.name, folder)
            sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def _put(made: Path, place: Path, aside: Path) -> None:
    if not (made.is_dir() and place.exists()):
        made.replace(place)
        return
    old = aside / f".{place.name}.old"  # no system replaces one folder by another
    try:
        place.rename(old)
        made.rename(place)
    except BaseException:  # Ctrl-C between the two as well
        if old.exists() and not place.exists():
            old.rename(place)
        raise


def sweep(folder: Path) -> list[Path]:
    """Remove what processes that are gone have left in a folder and in those inside it; returns what was removed.

    To be called by the holder of the folder's lock. Files of processes that live, or may live, stay.
    """
    if sys.platform == "win32":  # there is no harmless way to ask for a process
        return []
    removed = []
    for path in sorted(folder.rglob(".*")):
        process = _process(path.name)
        if process is None or _lives(process):
            continue
        if path.is_dir() and not path.is_symlink():
            if not _swept(path):
                continue
        else:
            discard(path)
        removed.append(path)
    return removed


def _swept(folder: Path) -> bool:
    """Remove a folder unless someone holds it: a process of another container, whose number isn't known here."""
    try:
        handle = hold(folder)
    except OSError:
        return False
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if handle is not None:
            os.close(handle)
    return True


def sweep_beside(path: Path) -> None:
    """Remove what processes that are gone have left beside `path`.

    That is unfinished folders, written as ``.NAME.PROCESS.partial``, and the empty files with which `make_directory`
    tries whether it can write.
    """
    if sys.platform == "win32":
        return
    for probe in path.parent.glob(".*.probe"):
        process = _process(probe.name)
        if process is not None and not _lives(process) and probe.is_file() and not probe.stat().st_size:
            discard(probe)
    for folder in path.parent.glob(f".{escape(path.name)}.*.partial"):
        process = _process(folder.name)
        if process is not None and not _lives(process):
            shutil.rmtree(folder, ignore_errors=True)


def _process(name: str) -> int | None:
    found = next((m for pattern in _NAMES if (m := pattern.fullmatch(name))), None)
    return None if found is None else int(found["process"])


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # someone else's
    return True
