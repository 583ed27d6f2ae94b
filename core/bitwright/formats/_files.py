"""Reading and writing whole encodings files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bitwright.errors import EncodingError
from bitwright.files import write_text
from bitwright.formats import _schema_0_6_1 as schema_0_6_1
from bitwright.formats import _schema_1_0_0 as schema_1_0_0
from bitwright.formats import _schema_2_0_0 as schema_2_0_0
from bitwright.formats import _schema_2_1_0 as schema_2_1_0
from bitwright.formats._entries import VERSIONS, EncodingsFile, Entry, Version
from bitwright.formats._fields import Where, describe
from bitwright.formats._header import with_own


class Schema(Protocol):
    """What each schema's module offers."""

    VERSION: Version

    def parse(self, document: Mapping[str, Any], source: str) -> EncodingsFile:
        """A file's JSON object → entries."""

    def render(self, file: EncodingsFile) -> dict[str, Any]:
        """Entries → a file's JSON object."""

    def render_entry(self, name: str, entry: Entry) -> Any:
        """One tensor's part of it."""

    def losses(self, entry: Entry) -> list[str]:
        """What a reader of the schema won't find of an entry."""


_MODULES: tuple[Schema, ...] = (schema_0_6_1, schema_1_0_0, schema_2_0_0, schema_2_1_0)
SCHEMAS: dict[str, Schema] = {module.VERSION: module for module in _MODULES}
_SECTIONS = ("activation_encodings", "param_encodings")


def schema(version: str) -> Schema:
    """The module that reads and writes a version.

    Raises:
        EncodingError: unknown version.
    """
    if version not in SCHEMAS:
        raise EncodingError(f"unknown encodings version {version!r}; known: {', '.join(VERSIONS)}")
    return SCHEMAS[version]


def read(source: str | Path | Mapping[str, Any]) -> EncodingsFile:
    """Read an encodings file of any schema, or its JSON object.

    AIMET's files without a header (`save_encodings_to_json`, AdaRound's parameter encodings) are read too.

    Raises:
        EncodingError: the file is missing, isn't JSON or breaks its schema; names file, tensor and field.
    """
    if isinstance(source, Mapping):
        return _parse(source, "encodings")
    path = Path(source)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise EncodingError(f"can't read {path}: {error.strerror or error}") from error
    return loads(text, str(path))


def loads(text: str | bytes, source: str = "encodings") -> EncodingsFile:
    """As `read`, from a string or UTF-8 bytes; `source` names them in errors."""
    try:
        document = json.loads(
            text.decode("utf-8-sig") if isinstance(text, bytes) else text,
            object_pairs_hook=_Strict(source).pairs,
            parse_constant=_Strict(source).constant,
        )
    except EncodingError:
        raise
    except UnicodeDecodeError:
        raise EncodingError(f"{source}: not an encodings file (binary, or not UTF-8)") from None
    except json.JSONDecodeError as error:
        raise EncodingError(
            f"{source}: not valid JSON, corrupt or cut short (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from None
    except (RecursionError, ValueError):
        raise EncodingError(f"{source}: not an encodings file (nested too deeply, or a number too long)") from None
    return _parse(document, source)


class _Strict:
    """What Python's JSON reader lets pass and a file must not hold."""

    def __init__(self, source: str) -> None:
        self._source = source

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise EncodingError(f"{self._source}: {twice!r} comes twice in one object; keep one")
        return table

    def constant(self, text: str) -> float:
        raise EncodingError(f"{self._source}: {text} is not a JSON number")


def _parse(document: object, source: str) -> EncodingsFile:
    where = Where(source)
    if not isinstance(document, Mapping):
        raise where.error(f"not an encodings file: expected a JSON object, found {describe(document)}")
    if "version" in document:
        version = document["version"]
        if version in schema_0_6_1.EARLIER:
            version = schema_0_6_1.VERSION
        if not isinstance(version, str) or version not in SCHEMAS:
            raise where.error(f"{describe(version)} is none of {', '.join(VERSIONS)}", "version")
        return with_own(schema(version).parse(document, source), source)
    sections = [document[s] for s in _SECTIONS if s in document]
    if sections:
        listed = all(isinstance(section, list) for section in sections)
        headerless: Schema = schema_1_0_0 if listed else schema_0_6_1
        return headerless.parse(document, source)
    if document and all(_looks_like_entry(value) for value in document.values()):
        # AdaRound of early AIMET releases: parameter names at the top level.
        return schema_0_6_1.parse({"param_encodings": document}, source)
    raise where.error("not an encodings file: it has no version and no activation_encodings or param_encodings")


def _looks_like_entry(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) and "bitwidth" in v for v in value)


def dumps(file: EncodingsFile, version: str | None = None) -> str:
    """The file's text: deterministic JSON, one tensor a line, numbers exact.

    A scale that came from float32 is written as that very number (up to 17 digits), so that readers get the same
    value whether they parse it in single or double precision.

    Args:
        file: what to write.
        version: the schema; None takes the file's own. Nothing is converted: what another schema needs beyond
            what the entries say is an error here, and `convert` fills it in.

    Raises:
        EncodingError: unknown version, or an entry that the schema can't express.
    """
    document = schema(version or file.version).render(file)
    blocks = [f"  {json.dumps(key)}: {_block(value, key)}" for key, value in document.items()]
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _block(value: Any, key: str) -> str:
    if key in (*_SECTIONS, "encodings") and value:
        if isinstance(value, dict):
            lines = [f"    {_compact(name)}: {_compact(item)}" for name, item in value.items()]
            return "{\n" + ",\n".join(lines) + "\n  }"
        return "[\n" + ",\n".join(f"    {_compact(item)}" for item in value) + "\n  ]"
    return _compact(value)


def _compact(value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise EncodingError(f"producer, settings or names hold what JSON can't: {error}") from error


def write(file: EncodingsFile, path: str | Path, version: str | None = None) -> Path:
    """Write a file atomically, as `dumps` gives it; on failure what was at `path` stays.

    Raises:
        EncodingError: an entry that the schema can't express.
        InputError: the path can't be written.
    """
    text = dumps(file, version)
    return write_text(path, text)


def as_version(version: str) -> Version:
    """A version string, checked."""
    schema(version)
    return version  # type: ignore[return-value]
