"""The user's own model is never written over: compared as files, whatever paths and links lead there."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from bitwright.backend import Backend, SourceFiles
from bitwright.errors import InputError
from bitwright.state import SimState


def refuse_overwriting(state: SimState, targets: Iterable[Path]) -> None:
    """Raise if one of the files that are to be written is the model that a simulation was opened from.

    Raises:
        InputError: one is, or it is a file that belongs to it (external weights, a checkpoint, a SavedModel's).
    """
    own = source_files(state)
    if not own:
        return
    known = {identity for path in own if (identity := _identity(path)) is not None}
    for target in targets:
        inside = [target, *(p for p in target.rglob("*") if p.is_file())] if target.is_dir() else [target]
        if hit := next((p for p in inside if _identity(p) in known), None):
            raise InputError(
                f"the export would overwrite {str(hit)!r}, which the model is read from; choose another folder "
                "(--out) or another stem for the files (--name, name=)"
            )


def source_files(state: SimState) -> list[Path]:
    """The file or folder that a simulation was opened from, with what belongs to it."""
    found: list[Path] = []
    if state.source is not None:
        found += _with_companions(state.source)
    found += _held(state.backend, state.native)
    return found


def _held(backend: Backend[Any], model: object) -> Collection[Path]:
    return backend.source_files(model) if isinstance(backend, SourceFiles) else ()


def _with_companions(source: Path) -> list[Path]:
    """The source, the files in it, and those beside it that have its stem (weights, checkpoints)."""
    plain = source if source.exists() else Path(str(source).rpartition(":")[0] or source)
    if plain.is_dir():
        return [plain, *(p for p in plain.rglob("*") if p.is_file())]
    if not plain.parent.is_dir():
        return [plain]
    # NAME.onnx.data, NAME.data-00000-of-00001 and NAME.index; a former export's files are none of them.
    beside = [plain.with_name(f"{plain.name}.data"), plain.with_suffix(".index")]
    beside += plain.parent.glob(f"{_escaped(plain.stem)}.data-*") if plain.suffix == ".meta" else []
    return [plain, *(p for p in beside if p.is_file())]


def _escaped(stem: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode: equal for links of every kind."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
