"""Files: durable writes, arrays on disk, what killed processes left behind."""

from __future__ import annotations

from bitwright.files._arrays import DAMAGED, Array, open_npy, open_npz, read_npy, read_npz
from bitwright.files._durable import (
    atomic_write,
    cannot_write,
    discard,
    is_file,
    make_directory,
    sync_directory,
    write_text,
)
from bitwright.files._held import HeldFile
from bitwright.files._leftovers import staging, sweep, sweep_beside, written_beside
from bitwright.files._pieces import StoredArray
from bitwright.files._spill import Spill, is_spilled

__all__ = [
    "DAMAGED",
    "Array",
    "HeldFile",
    "Spill",
    "StoredArray",
    "atomic_write",
    "cannot_write",
    "discard",
    "is_file",
    "is_spilled",
    "make_directory",
    "open_npy",
    "open_npz",
    "read_npy",
    "read_npz",
    "staging",
    "sweep",
    "sweep_beside",
    "sync_directory",
    "write_text",
    "written_beside",
]
