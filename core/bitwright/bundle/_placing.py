"""An export takes the place of an older one: whole, or the older one is back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from bitwright.bundle._record import hashes
from bitwright.errors import InputError
from bitwright.files import cannot_write, staging, sync_directory
from bitwright.report import REPORT, named, read_report


def move_in(written: Sequence[Path], directory: Path, name: str) -> None:
    """Move an export's files to their places. The older export's go out of the way first, what says that it is whole
    before all others; so a process that is killed in between leaves no mixture that looks whole. Where a move fails, or
    is interrupted, the older export comes back.

    Args:
        written: the files and folders, in the order in which they are to appear; the last is the encodings file.
        directory: where they belong.
        name: the export's stem.

    Raises:
        WriteError: a file can't be moved.
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
            _keep_other_report(directory, name)
            for path in _older(written, directory, name):
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


def _keep_other_report(directory: Path, name: str) -> None:
    """Give the report of another export in the folder its own name."""
    report = directory / REPORT
    other = named(report)
    if other is not None and other != name and (directory / f"{other}.encodings").exists():
        try:
            report.replace(directory / f"{other}.{REPORT}")
        except OSError as error:
            raise cannot_write(report, error) from error


def _older(written: Sequence[Path], directory: Path, name: str) -> list[Path]:
    """What there is of an older export of this name: what seals it first, then the places that are taken, then the
    files that its report names and that this export doesn't have."""
    seals = [f"{name}.encodings", REPORT, f"{name}.{REPORT}", "report.html"]
    places = [directory / n for n in (*seals, *(p.name for p in written))]
    with suppress(InputError):
        report = read_report(directory, name).report
        if report is not None and report.record is not None:
            places += _left_behind(directory, report.record.contents, {p.name for p in places})
    return [p for p in dict.fromkeys(places) if p.is_symlink() or p.exists()]


def _left_behind(directory: Path, contents: Mapping[str, str], taken: Collection[str]) -> list[Path]:
    """Files and folders beside an export's report that are, to the bit, what it says was written. A report may come
    from anywhere: what it merely names, or what was changed since, is somebody else's and stays."""
    found: list[Path] = []
    for name in dict.fromkeys(path.partition("/")[0] for path in contents):
        place = directory / name
        if name in taken or name in ("", ".", "..") or Path(name).name != name or place.is_symlink():
            continue
        recorded = {path: known for path, known in contents.items() if path.partition("/")[0] == name}
        if place.exists() and hashes([place], directory) == recorded:
            found.append(place)
    return found
