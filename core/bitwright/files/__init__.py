"""Files: durable writes, arrays on disk, temporary folders, what killed processes left behind."""

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
from bitwright.files._messages import field_prefix, split_message, write_graph_def
from bitwright.files._pieces import StoredArray
from bitwright.files._replacing import put_in_place
from bitwright.files._scratch import Scratch, scratch_file, sweep_scratch, temporaries_in
from bitwright.files._spill import Spill, is_spilled

__all__ = [
    "DAMAGED",
    "Array",
    "HeldFile",
    "Scratch",
    "Spill",
    "StoredArray",
    "atomic_write",
    "cannot_write",
    "discard",
    "field_prefix",
    "is_file",
    "is_spilled",
    "make_directory",
    "open_npy",
    "open_npz",
    "put_in_place",
    "read_npy",
    "read_npz",
    "scratch_file",
    "split_message",
    "staging",
    "sweep",
    "sweep_beside",
    "sweep_scratch",
    "sync_directory",
    "temporaries_in",
    "write_graph_def",
    "write_text",
    "written_beside",
]
