"""Writing .h5 files so that the HDF5 library never sees a write fail.

It doesn't get over one: h5py raises a RuntimeError where a file is closed, or prints it where an object's end writes
and goes on, though the file lacks that; and a later call may end the process. So it writes through a file object that
takes everything and remembers what failed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _Remembering(io.RawIOBase):
    """A new file; `failed` is the first error of a write, after which nothing more is written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("w+b", buffering=0)
        self.failed: OSError | None = None

    def _try(self, does: Callable[[], object]) -> None:
        if self.failed is None:
            try:
                does()
            except OSError as error:
                self.failed = error

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)

        def whole() -> None:
            nonlocal left
            while len(left):
                left = left[self._file.write(left) :]

        self._try(whole)
        return size

    def truncate(self, size: int | None = None) -> int:
        self._try(lambda: self._file.truncate(size))
        return size or 0

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer) or 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self.failed = self.failed or error
        super().close()


def write_hdf5(path: Path, fill: Callable[[Any], object]) -> None:
    """Write a file.

    Args:
        path: of the file; one that is there is written over.
        fill: puts the content into the `h5py.File` that it is given, which `keras.Model.save` takes for a path too.

    Raises:
        OSError: the file can't be written.
    """
    import h5py

    class Named(h5py.File):  # type: ignore[misc]
        def __str__(self) -> str:  # what Keras knows the format by
            return path.name

    kept = _Remembering(path)
    try:
        with kept, Named(kept, "w") as file:
            fill(file)
    except Exception:
        if kept.failed is None:
            raise
    if kept.failed is not None:
        raise kept.failed
