"""Temporary folders that the next process removes where the one that made them was killed.

Their owner holds a lock (flock) on the folder itself, which the system lets go of when the owner's last fork is gone,
however it ended. So numbers of processes, which are given anew and mean nothing in another container, decide nothing;
and systemd-tmpfiles, which clears old files away, leaves locked folders alone as well.

There is no such lock on Windows and on some network file systems: there nothing is swept.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from bitwright.errors import WriteError
from bitwright.files._durable import cannot_write

_NAME = re.compile(r"bitwright-(?P<host>[0-9a-f]{8})-\d+-[a-z0-9_]+")
_ATTEMPTS = 100
"""Folders that another process sweeps away between making and locking, before something is wrong."""

_swept: set[Path] = set()


class Scratch:
    """A temporary folder; gone when it is closed, when nothing refers to it any more, or when the process ends.

    Where the process is killed, the next scratch of another process or `sweep_scratch` removes the folder. Forks may
    use it, and never remove it. As a context manager it gives the path.

    Args:
        folder: where it is made; the system's folder for temporary files if None, where what killed processes have left
            is swept before a process's first.
        prefix: what its name begins with; only the folders of the default are swept by `sweep_scratch`.

    Attributes:
        path: the folder.

    Raises:
        WriteError: it can't be made.
    """

    def __init__(self, folder: Path | None = None, prefix: str | None = None) -> None:
        prefix = f"bitwright-{_host()}-{os.getpid()}-" if prefix is None else prefix
        if folder is not None:
            self.path, handle = _made(folder, prefix)
        else:
            _sweep_once()
            self.path, handle = _made_for_the_system(prefix)
        self._end = weakref.finalize(self, _removed, self.path, handle, os.getpid())

    def close(self) -> None:
        """Remove the folder and all that is in it, as far as possible."""
        self._end()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def scratch_file() -> IO[bytes]:
    """A temporary file to write and read that has no name, so that nothing is left of it however the process ends.

    Raises:
        OSError: it can't be made.
    """
    return tempfile.TemporaryFile(prefix="bitwright-", dir=_temporary_folder())


def sweep_scratch() -> list[Path]:
    """Remove the scratch folders of this user's processes that are gone; returns what was removed.

    Only folders that are called as ours are, belong to this user, were made on this machine and aren't locked; links
    are neither removed nor followed.
    """
    removed = []
    try:
        with os.scandir(_temporary_folder()) as entries:
            found = sorted(entry.path for entry in entries if _is_scratch(entry))
    except OSError:
        return []
    for path in map(Path, found):
        try:
            handle = hold(path)
        except OSError:  # it lives, or another process sweeps it
            continue
        if handle is None:
            continue
        try:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)
        removed.append(path)
    return removed


@contextmanager
def temporaries_in(folder: Path) -> Iterator[None]:
    """What a library makes through `tempfile` meanwhile, in this thread, lies in `folder`; other threads' does not.

    For libraries that leave theirs behind when the process is killed. One block at a time: others wait.
    """
    with _moving:
        before = {name: getattr(tempfile, name) for name in _MAKERS}
        for name, make in before.items():
            setattr(tempfile, name, _moved(make, _MAKERS[name], str(folder)))
        try:
            yield
        finally:
            for name, make in before.items():
                setattr(tempfile, name, make)


def _moved(make: Callable[..., object], place: int, folder: str) -> Callable[..., object]:
    own = threading.get_ident()

    def made(*given: object, **named: object) -> object:
        if threading.get_ident() == own:
            if len(given) > place:
                given = (*given[:place], given[place] or folder, *given[place + 1 :])
            elif named.get("dir") is None:
                named["dir"] = folder
        return make(*given, **named)

    return made


_MAKERS = {"mkdtemp": 2, "NamedTemporaryFile": 6}
"""Functions of `tempfile`, and which of their arguments the folder is."""
_moving = threading.RLock()


def _forked() -> None:
    global _moving  # noqa: PLW0603
    _moving = threading.RLock()  # a thread that had it isn't there


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def hold(folder: Path) -> int | None:
    """Lock a folder without waiting, for as long as the handle that is returned, or one of its forks, is open.

    Returns:
        The handle; None where there are no such locks.

    Raises:
        BlockingIOError: it is locked.
        OSError: it is gone, or is a link or a file.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(folder.lstat(), os.fstat(handle)):
            raise FileNotFoundError(f"{folder} is another one than it was")
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def _made(folder: Path, prefix: str) -> tuple[Path, int | None]:
    """A new folder and the handle that locks it."""
    try:
        for _ in range(_ATTEMPTS):
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
            try:
                return path, hold(path)
            except (BlockingIOError, FileNotFoundError):  # for a moment it looks like one that was left
                continue
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
        raise OSError(0, "folders that are made there vanish")
    except OSError as error:
        raise cannot_write(folder, error) from error


def _made_for_the_system(prefix: str) -> tuple[Path, int | None]:
    folder = _temporary_folder()
    try:
        return _made(folder, prefix)
    except WriteError:
        other = folder
        with suppress(OSError):
            other = Path(tempfile.gettempdir())  # which tries to write, and takes another where it can't
        if other == folder:
            raise
    return _made(other, prefix)


def _removed(path: Path, handle: int | None, process: int) -> None:
    try:
        if os.getpid() == process:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        if handle is not None:
            os.close(handle)  # a fork's doesn't let go of its parent's lock


def _sweep_once() -> None:
    folder = _temporary_folder()
    if folder not in _swept:
        _swept.add(folder)
        sweep_scratch()


def _is_scratch(entry: os.DirEntry[str]) -> bool:
    named = _NAME.fullmatch(entry.name)
    if sys.platform == "win32" or named is None or named["host"] != _host():
        return False
    try:
        about = entry.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid()


def _host() -> str:
    """This machine, in names: what others lock in a folder that they share with it may not be seen here."""
    name = os.uname().nodename if sys.platform != "win32" else os.environ.get("COMPUTERNAME", "")
    return f"{zlib.crc32(name.encode(errors='replace')):08x}"


def _temporary_folder() -> Path:
    """The system's folder for temporary files, by `tempfile`'s rules but for a file that it tries whether it can write.

    Who is killed while that is there leaves it.
    """
    if tempfile.tempdir is None and sys.platform != "win32":
        for folder in (*map(os.environ.get, ("TMPDIR", "TEMP", "TMP")), "/tmp", "/var/tmp", "/usr/tmp"):
            if folder and Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK):
                return Path(folder).absolute()
    return Path(os.fsdecode(tempfile.gettempdir()))
