"""An export takes the place of an older one, and of nothing else.

What says what an export is (its report, with a hash of each file) comes first and goes last, and what says that it is
whole (its encodings) comes last and goes first. So a process that is killed in between leaves no mixture that looks
whole, and whatever it leaves is known to the next export as an older one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from bitwright import formats
from bitwright.bundle._record import hashes
from bitwright.errors import BitwrightError, InputError
from bitwright.files import cannot_write, put_in_place
from bitwright.report import PAGE, REPORT, is_page, named, read_report

ENCODINGS_SUFFIX = ".encodings"


def move_in(written: Sequence[Path], directory: Path, name: str) -> None:
    """Move an export's files to their places, and those of an older one out of the way. Where a move fails, or is
    interrupted, the older export comes back.

    Args:
        written: the files and folders.
        directory: where they belong.
        name: the export's stem.

    Raises:
        InputError: something is there that no export has written.
        WriteError: a file can't be moved.
    """
    ordered = sorted(written, key=lambda p: (p.name == f"{name}{ENCODINGS_SUFFIX}", p.name != REPORT, p.name))
    refuse_strangers(directory, name, [directory / p.name for p in ordered])
    _keep_other_report(directory, name)
    put_in_place(ordered, directory, _older(ordered, directory, name))


def refuse_strangers(directory: Path, name: str, places: Iterable[Path]) -> None:
    """Refuse to replace what isn't, to the bit, what an earlier export into this folder has written.

    Args:
        directory, name: of the export.
        places: that it is to take.

    Raises:
        InputError: something else is there: a model of the user's, who may have given it as an object, so that nothing
            tells where it came from.
    """
    contents: Mapping[str, str] | None = None
    for place in places:
        if not (place.is_symlink() or place.exists()):
            continue
        contents = _contents(directory, name) if contents is None else contents
        if reason := _foreign(place, contents):
            raise InputError(
                f"the export would overwrite {str(place)!r}, {reason}; choose another folder (--out) or another stem "
                "for the files (--name, name=), or remove it first"
            )


def _foreign(place: Path, contents: Mapping[str, str]) -> str:
    """Why something is nobody's but the user's; empty for what an earlier export has written."""
    nobodys = "which no export has written"
    if place.is_symlink():
        return "which is a link"
    if place.name == REPORT:
        return "" if named(place) is not None else nobodys
    if place.name == PAGE:
        return "" if is_page(place) else nobodys
    recorded = _of_place(place.name, contents)
    if recorded and hashes([place], place.parent) == recorded:
        return ""
    if place.name.endswith(ENCODINGS_SUFFIX) and _own_encodings(place):
        return ""
    return "which was changed after an export had written it" if recorded else nobodys


def _own_encodings(path: Path) -> bool:
    """Whether bitwright has written an encodings file; steps write some that no report knows."""
    try:
        return formats.read(path).producer.get("package") == "bitwright"
    except (BitwrightError, OSError):
        return False


def _contents(directory: Path, name: str) -> Mapping[str, str]:
    """What an earlier export of this name has written, file by file, with their hashes. That of a report that was
    changed counts: what it says of a file must be true of it all the same."""
    with suppress(InputError):
        report = read_report(directory, name).report
        if report is not None and report.record is not None:
            return report.record.contents
    return {}


def _of_place(name: str, contents: Mapping[str, str]) -> dict[str, str]:
    return {path: known for path, known in contents.items() if path.partition("/")[0] == name}


def _keep_other_report(directory: Path, name: str) -> None:
    """Give the report of another export in the folder its own name, as long as there is something of that."""
    report = directory / REPORT
    other = named(report)
    if other is None or other == name:
        return
    if any((directory / path).exists() for path in (f"{other}{ENCODINGS_SUFFIX}", *_contents(directory, other))):
        try:
            report.replace(directory / f"{other}.{REPORT}")
        except OSError as error:
            raise cannot_write(report, error) from error


def _older(written: Sequence[Path], directory: Path, name: str) -> list[Path]:
    """What there is of an older export of this name: what seals it first, then the places that are taken, then the
    files that its report names and that this export doesn't have, and what names them last."""
    places = [directory / n for n in (f"{name}{ENCODINGS_SUFFIX}", *(p.name for p in written if p.name != REPORT))]
    places += _left_behind(directory, _contents(directory, name), {p.name for p in places} | {REPORT})
    places += [directory / n for n in (PAGE, f"{name}.{REPORT}", REPORT)]
    return [p for p in dict.fromkeys(places) if p.is_symlink() or p.exists()]


def _left_behind(directory: Path, contents: Mapping[str, str], taken: Collection[str]) -> list[Path]:
    """Files and folders beside an export's report that are, to the bit, what it says was written. A report may come
    from anywhere: what it merely names, or what was changed since, is somebody else's and stays."""
    found: list[Path] = []
    for name in dict.fromkeys(path.partition("/")[0] for path in contents):
        place = directory / name
        if name in taken or name in ("", ".", "..") or Path(name).name != name or place.is_symlink():
            continue
        if place.exists() and hashes([place], directory) == _of_place(name, contents):
            found.append(place)
    return found
