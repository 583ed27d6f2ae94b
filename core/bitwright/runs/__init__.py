"""Run directories: finished work survives `kill -9`, and an equal run started again goes on from there."""

from __future__ import annotations

from bitwright.runs._directory import MemoryStore, RunDirectory, kept_work, run_in, versions
from bitwright.runs._evaluation_identity import identity
from bitwright.runs.fingerprint import of_arrays, of_file, of_json

__all__ = [
    "MemoryStore",
    "RunDirectory",
    "identity",
    "kept_work",
    "of_arrays",
    "of_file",
    "of_json",
    "run_in",
    "versions",
]
