"""Damage for files that strangers may have made: to bytes, to JSON and YAML documents, and inside of zip archives."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

WEIRD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 256, 2**31, -(2**31) - 1, 2**63, -(2**64), 10**400, 0.0, -0.0, 1e-45, 1e39,
    1e308, float("inf"), float("-inf"), float("nan"), 0.5, "", " ", "0", "1e999", "nan", "a" * 5_000, "\ud800", "\0",
    "../../x", "/dev/zero", "é\n", "true", "int8", "float16", "2026-99-99", [], {}, [[]], [None], [0, 0], {"": None},
    {"a": {"a": {"a": []}}}, [[[[[[[[]]]]]]]],
)  # fmt: skip
"""Values that are of another type, at an edge, or mean something elsewhere."""
TOKENS = (
    b"", b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"9" * 5_000, b"[" * 3_000, b"{\"a\":" * 3_000, b"NaN",
    b"-Infinity", b"1e999", b"\"\\ud800\"", b"\r\n", b"- &a [*a, *a]\n", b"!!python/object:os.system x", b"<<: *a\n",
    b"\xef\xbb\xbf", b"PK\x05\x06", b"\x93NUMPY\x01\0", b"'''", b"(((", b"|O", b"-1",
)  # fmt: skip
"""Bytes that formats know, or that they break on."""


def damaged_bytes(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of the seeds with one to four edits: a byte changed, a piece left out or doubled, a token put in."""
    edit = st.tuples(
        st.sampled_from(("flip", "set", "cut", "double", "insert", "swap", "end")),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 64),
        st.sampled_from(TOKENS),
    )
    return st.builds(_edited, st.sampled_from(seeds), st.lists(edit, min_size=1, max_size=4))


def _edited(data: bytes, edits: Sequence[tuple[str, float, int, int, bytes]]) -> bytes:
    for kind, where, byte, length, token in edits:
        at = int(where * len(data))
        piece = data[at : at + length]
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << byte % 8)]) + data[at + 1 :]
        elif kind == "set" and data:
            data = data[:at] + bytes([byte]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + length :]
        elif kind == "double":
            data = data[:at] + piece * 2 + data[at + length :]
        elif kind == "insert":
            data = data[:at] + token + data[at:]
        elif kind == "swap":
            data = data[at:] + data[:at]
        elif kind == "end":
            data = data[:at]
    return data


def damaged_documents(seeds: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of the seeds with one to three places changed: another value, another place's, a key lost or made up."""

    def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        items = (
            document.items()
            if isinstance(document, dict)
            else enumerate(document)
            if isinstance(document, list)
            else ()
        )
        for key, value in items:
            yield from places(value, (*path, key))

    edit = st.tuples(
        st.sampled_from(("value", "lost", "other", "key")),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(WEIRD),
    )

    def changed(seed: Any, edits: Sequence[tuple[str, float, float, Any]]) -> Any:
        document = copy.deepcopy(seed)
        for kind, where, source, value in edits:
            known = list(places(document))
            path = known[int(where * len(known))]
            # A copy: later edits change it in place, and what is in WEIRD would grow from input to input.
            value = copy.deepcopy(_at(document, known[int(source * len(known))]) if kind == "other" else value)
            if not path:
                document = value if kind in ("value", "other") else document
                continue
            holder, last = _at(document, path[:-1]), path[-1]
            if kind == "lost":
                del holder[last]
            elif kind == "key" and isinstance(holder, dict):
                holder[str(value)[:40]] = holder[last]
            else:
                holder[last] = value
        return document

    return st.builds(changed, st.sampled_from(list(seeds)), st.lists(edit, min_size=1, max_size=3))


def _at(document: Any, path: Sequence[Any]) -> Any:
    for key in path:
        document = document[key]
    return document


def damaged_json(seeds: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """JSON texts: documents changed as such, and their bytes."""
    texts = [json.dumps(seed, indent=1).encode() for seed in seeds]
    return st.one_of(damaged_documents(seeds).map(as_json), damaged_bytes(texts))


def as_json(document: Any) -> bytes:
    """A document's text, with what Python writes beyond JSON (NaN, Infinity)."""
    return json.dumps(document).encode("utf-8", "surrogatepass")


def damaged_zip(seeds: Sequence[bytes], *, compress: bool = False) -> st.SearchStrategy[bytes]:
    """Archives whose members are damaged and packed again, or whose bytes are."""

    def packed(seed: bytes, edits: Sequence[tuple[float, Callable[[bytes], bytes]]], again: bool) -> bytes:
        with zipfile.ZipFile(io.BytesIO(seed)) as archive:
            members = [(e.filename, archive.read(e)) for e in archive.infolist()]
        for where, damage in edits:
            at = int(where * len(members))
            members[at] = (members[at][0], damage(members[at][1]))
        if again:
            members.append(members[0])
        buffer = io.BytesIO()
        method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in dict(members).items():
                archive.writestr(name, data)
        return buffer.getvalue()

    single = st.lists(
        st.tuples(
            st.sampled_from(("flip", "set", "cut", "double", "insert", "end")),
            st.floats(0, 1, exclude_max=True),
            st.integers(0, 255),
            st.integers(1, 64),
            st.sampled_from(TOKENS),
        ),
        min_size=1,
        max_size=3,
    ).map(lambda edits: lambda data: _edited(data, edits))
    members = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), single), min_size=1, max_size=2)
    return st.one_of(st.builds(packed, st.sampled_from(seeds), members, st.booleans()), damaged_bytes(seeds))
