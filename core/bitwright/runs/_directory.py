"""Run directories: finished work survives `kill -9`, and the same run started again goes on from there.

A run directory holds ``journal.jsonl`` (a line for each event), ``lock`` and ``steps/<fingerprint>/``, where each
result is one .npz. A step's fingerprint covers everything that its result depends on, so that stale results are
never read: other data, settings, seed or versions are another fingerprint. A damaged file counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright import _version
from bitwright.errors import InputError
from bitwright.files import DAMAGED, atomic_write, cannot_write, make_directory, sweep, sweep_scratch
from bitwright.runs import fingerprint

Arrays = Mapping[str, NDArray[Any]]

STORE_FORMAT = 1
"""Raised when the layout of stored results changes; older ones are then ignored."""

RUN_FOLDER = ".run"
"""Where a run that writes to a folder keeps its state there."""

_INDEX = "index.json"


class MemoryStore:
    """A `technique.Store` for runs without a directory: nothing outlives the process."""

    def __init__(self) -> None:
        self._results: dict[str, Arrays] = {}

    def get(self, key: str) -> Arrays | None:
        """What was stored under this key."""
        return self._results.get(key)

    def put(self, key: str, arrays: Arrays) -> None:
        """Keep the arrays."""
        self._results[key] = dict(arrays)


class FileStore:
    """A `technique.Store` in a folder, one .npz a key; created on the first `put`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def fingerprint(self) -> str:
        """The step's fingerprint, in a run directory; it names the folder."""
        return self.path.name

    def get(self, key: str) -> Arrays | None:
        """What was stored under this key; None if nothing, or if the file is damaged."""
        try:
            return _read(self._file(key), key)
        except DAMAGED:
            return None

    def put(self, key: str, arrays: Arrays) -> None:
        """Store arrays durably; an earlier result is replaced in one step.

        Raises:
            InputError: the disk is full or the folder isn't writable; what was stored before is still there.
            ValueError: an array holds Python objects.
        """
        make_directory(self.path)
        with atomic_write(self._file(key)) as file:
            _write(file, key, arrays)

    def _file(self, key: str) -> Path:
        # Keys hold op names, which may be long or have slashes; the file keeps the key itself inside.
        return self.path / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def _write(file: IO[bytes], key: str, arrays: Arrays) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_INDEX, json.dumps({"key": key, "names": list(arrays)}))
        for position, values in enumerate(arrays.values()):
            with archive.open(f"{position}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(values), allow_pickle=False)


def _read(path: Path, key: str) -> Arrays | None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            return None  # not as `_write` leaves it: a few kilobytes could unpack to gigabytes
        # Read whole, so that the archive's checksums are verified before any number is used.
        index = json.loads(archive.read(_INDEX))
        if index["key"] != key:
            return None
        contents = (io.BytesIO(archive.read(f"{i}.npy")) for i in range(len(index["names"])))
        return {
            name: np.lib.format.read_array(member, allow_pickle=False)
            for name, member in zip(index["names"], contents, strict=True)
        }


_KEPT: list[Path] = []


def kept_work() -> tuple[Path, ...]:
    """Run directories that failed or stopped work of this process has left, with results that it can go on from."""
    return tuple(_KEPT)


class RunDirectory:
    """One run's durable state. Only one process may hold it; close it, or use it in a ``with`` block.

    Args:
        path: the folder; created, with its parents, if absent.

    Raises:
        InputError: another process holds it, or the folder can't be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = make_directory(path)
        self._lock = _acquire(self.path)
        self._used: set[str] = set()
        self._mend_journal()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(InputError):
                self.record("interrupted", reason=f"{type(error).__name__}: {error}")
            if self._has_results():
                _KEPT.append(self.path)
        self.close()

    def close(self) -> None:
        """Release the lock; what is stored stays."""
        self._lock.close()

    def discard_if_empty(self) -> None:
        """Release the lock, and remove the directory if no step has stored anything that a later run could use."""
        with self._lock:
            if not self._has_results():
                shutil.rmtree(self.path, ignore_errors=True)

    def _has_results(self) -> bool:
        return any((self.path / "steps").glob("*/*.npz"))

    def step(self, name: str, depends: Mapping[str, Any]) -> FileStore:
        """The store of one step; the same step of an equal run finds what an earlier process left.

        Args:
            name: the technique, or what else the step is.
            depends: everything else that the result depends on, JSON-like: hashes of model, graph and data,
                settings, seed, the backend's versions. Those of bitwright and numpy are added here.
        """
        key = fingerprint.of_json([name, depends, STORE_FORMAT, versions()])
        self._used.add(key)
        store = FileStore(self.path / "steps" / key)
        self.record("step", name=name, fingerprint=key, resumed=store.path.is_dir(), depends=depends)
        return store

    def finish(self) -> None:
        """The run is complete: note it, and drop results of steps that it didn't use."""
        self.record("finished")
        steps = self.path / "steps"
        for folder in steps.iterdir() if steps.is_dir() else ():
            if folder.name not in self._used:
                shutil.rmtree(folder, ignore_errors=True)

    # -- journal

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.path / "journal.jsonl"

    def record(self, event: str, **fields: object) -> None:
        """Append an event to the journal, durably.

        Raises:
            InputError: the disk is full or the folder isn't writable.
        """
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        try:
            with self.journal.open("ab") as file:
                file.write(json.dumps(entry, default=str).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.journal, error) from error

    def events(self) -> Iterator[dict[str, Any]]:
        """The journal's entries, oldest first; lines that a crash cut short are passed over."""
        if not self.journal.exists():
            return
        for line in self.journal.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def _mend_journal(self) -> None:
        """End a line that a crash cut short, so that the next entry stands on its own."""
        if self.journal.exists() and not self.journal.read_bytes().endswith(b"\n"):
            with self.journal.open("ab") as file:
                file.write(b"\n")


@contextlib.contextmanager
def run_in(out: Path) -> Iterator[RunDirectory]:
    """The run directory inside an output folder; a failure that leaves nothing to resume leaves no folders either.

    What killed runs have left there, and in the system's folder for temporary files, is swept.

    Raises:
        InputError: another process holds it, or the folder can't be written.
    """
    fresh = [folder for folder in (out, *out.parents) if not folder.exists()]
    make_directory(out)
    try:
        with RunDirectory(out / RUN_FOLDER) as run:
            sweep(out)
            sweep_scratch()
            try:
                yield run
            except BaseException:
                run.discard_if_empty()
                raise
    except BaseException:
        for folder in fresh:
            try:
                folder.rmdir()
            except OSError:
                break
        raise


RESULTS = "2"
"""Raised where a statistic, a scheme or a solver comes to other numbers than before, within a version too."""


def versions(modules: Iterable[str] = ()) -> dict[str, str]:
    """Versions that results may depend on: Python, bitwright, numpy, and those of a backend's modules.

    Args:
        modules: as `BackendInfo.modules` lists them; one that isn't installed is left out.
    """
    found = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "bitwright": _version.__version__,
        "results": RESULTS,
        "numpy": np.__version__,
    }
    for module in modules:
        package = module.partition(".")[0]
        with contextlib.suppress(metadata.PackageNotFoundError, ValueError):  # a ValueError where there is no name
            found[package] = metadata.version(package.replace("_", "-"))
    return found


def _acquire(folder: Path) -> IO[str]:
    """An open, locked file; the system frees the lock however the process ends."""
    path = folder / "lock"
    try:
        file = path.open("a+")
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        _lock_file(file)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(
            f"run directory {str(folder)!r} is in use by {holder}; wait for it to end or choose another directory"
        ) from None
    try:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}")
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            file.close()
        raise cannot_write(path, error) from error
    return file


def _lock_file(file: IO[str]) -> None:
    """Take an exclusive lock without waiting.

    Raises:
        BlockingIOError: someone has it.
    """
    if sys.platform == "win32":
        import msvcrt

        # A byte far behind the text, so that the holder's name stays readable.
        file.seek(1 << 20)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
    else:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            # Some network file systems have no locks; the run then goes on without this protection.
            return
