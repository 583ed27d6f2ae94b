"""Files that are whole or not there: written beside, flushed to disk and renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bitwright.errors import InputError, WriteError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and vanishes when it raises.

    Raises:
        WriteError: the disk is full, the folder isn't there or isn't writable; `path` is then as it was before.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        discard(beside)
        raise cannot_write(path, error) from error
    except BaseException:
        discard(beside)
        raise


def write_text(path: str | Path, text: str | Iterable[str]) -> Path:
    """Write UTF-8 text atomically; text in pieces is written as they come.

    Raises:
        WriteError: as `atomic_write`.
        InputError: the text holds lone surrogates.
    """
    with atomic_write(path) as file:
        for piece in [text] if isinstance(text, str) else text:
            try:
                content = piece.encode()
            except UnicodeEncodeError as error:
                odd = piece[error.start : error.end]
                raise InputError(
                    f"can't write {str(path)!r}: {odd!r} is half of a character (a lone surrogate), which no file can "
                    "hold; rename the tensor or op that is called so"
                ) from None
            file.write(content)
    return Path(path)


def is_file(path: Path) -> bool:
    """Whether there is a file of that name; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def make_directory(path: str | Path) -> Path:
    """Create a folder and its parents, and check that files can be written there.

    Raises:
        WriteError: it can't be created, is a file, or isn't writable.
    """
    path = Path(path)
    probe, fresh = path / f".{os.getpid()}.probe", not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        if fresh:
            with suppress(OSError):
                path.rmdir()
        raise cannot_write(path, error) from error
    discard(probe)
    return path


def cannot_write(path: Path, error: OSError) -> WriteError:
    """The error for a failed write, with the way out where it is known."""
    remedy = {
        errno.ENOSPC: "; free some space or choose another folder",
        errno.EDQUOT: "; free some space or choose another folder",
        errno.EACCES: "; choose a folder that you may write to",
        errno.EROFS: "; choose a folder that you may write to",
        errno.ENOTDIR: "; a part of the path is a file",
        errno.EEXIST: "; it is a file, not a folder",
    }.get(error.errno or 0, "")
    return WriteError(f"can't write {str(path)!r}: {error.strerror or error}{remedy}")


def sync_directory(path: Path) -> None:
    """Make a rename in a folder durable, where the system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def discard(path: Path) -> None:
    """Remove a file if it is there and can be removed."""
    with suppress(OSError):
        path.unlink()
