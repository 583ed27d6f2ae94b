"""Files: durable writes, arrays on disk, what killed processes left behind."""

from __future__ import annotations

from bitwright.files._arrays import DAMAGED, Array, read_npy, read_npz
from bitwright.files._durable import (
    atomic_write,
    cannot_write,
    discard,
    is_file,
    make_directory,
    sync_directory,
    write_text,
)
from bitwright.files._leftovers import staging, sweep, sweep_beside

__all__ = [
    "DAMAGED",
    "Array",
    "atomic_write",
    "cannot_write",
    "discard",
    "is_file",
    "make_directory",
    "read_npy",
    "read_npz",
    "staging",
    "sweep",
    "sweep_beside",
    "sync_directory",
    "write_text",
]
