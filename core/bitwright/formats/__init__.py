"""Encodings files: readers and writers of schemas 0.6.1, 1.0.0, 2.0.0 and 2.1.0, and tools that work on any of them.

`read` → `EncodingsFile` of `Entry` → `bind` → `Encoding`; `unbind` → `EncodingsFile` → `write`.
"""

from __future__ import annotations

from bitwright.formats._binding import TensorGeometry, bind, inverse, permute, resolve, unbind
from bitwright.formats._check import ExpectedEntry, Problem, check
from bitwright.formats._compare import Difference, diff
from bitwright.formats._convert import Conversion, convert
from bitwright.formats._entries import CAST_FORMATS, VERSIONS, EncodingsFile, Entry, ScaleLayout, Version
from bitwright.formats._files import Schema, dumps, loads, read, schema, versions, write, writes_biases

__all__ = [
    "CAST_FORMATS",
    "VERSIONS",
    "Conversion",
    "Difference",
    "EncodingsFile",
    "Entry",
    "ExpectedEntry",
    "Problem",
    "ScaleLayout",
    "Schema",
    "TensorGeometry",
    "Version",
    "bind",
    "check",
    "convert",
    "diff",
    "dumps",
    "inverse",
    "loads",
    "permute",
    "read",
    "resolve",
    "schema",
    "unbind",
    "versions",
    "write",
    "writes_biases",
]
