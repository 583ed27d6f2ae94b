"""Reading and writing whole encodings files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, ValuesView
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bitwright.catalogue import Descriptor, Fault, blamed, current, item_of, kind_of, resolved
from bitwright.errors import EncodingError, PluginError
from bitwright.files import write_text
from bitwright.formats import _schema_0_6_1 as schema_0_6_1
from bitwright.formats import _schema_1_0_0 as schema_1_0_0
from bitwright.formats._entries import EncodingsFile, Entry
from bitwright.formats._fields import Where, describe
from bitwright.formats._header import with_own
from bitwright.hookspecs import SchemaInfo


@runtime_checkable
class Schema(Protocol):
    """What reads and writes one schema of encodings files; each of the built-in ones is a module of that form."""

    VERSION: str

    def parse(self, document: Mapping[str, Any], source: str) -> EncodingsFile:
        """A file's JSON object → entries."""

    def render(self, file: EncodingsFile) -> dict[str, Any]:
        """Entries → a file's JSON object; sections of tensors may be `RenderedLater`, or its values."""

    def render_entry(self, name: str, entry: Entry) -> object:
        """One tensor's part of it."""

    def losses(self, entry: Entry) -> list[str]:
        """What a reader of the schema won't find of an entry."""


_SECTIONS = ("activation_encodings", "param_encodings")


def versions() -> tuple[str, ...]:
    """Every schema that there is: the built-in ones, and those of plugins."""
    return tuple(d.info.name for d in current().of(SchemaInfo))


def writes_biases(version: str) -> bool:
    """Whether exports in a schema have int32 bias encodings, unless they are told otherwise."""
    found = current().holder(SchemaInfo, version)
    return found is not None and found.info.biases


def schema(version: str) -> Schema:
    """What reads and writes a version.

    Raises:
        EncodingError: unknown version, or its plugin is broken.
    """
    found = _descriptor(version)
    try:
        factory = resolved(found, found.info.factory)
        with blamed(found.owner, item_of(found.info)):
            made = factory()
    except PluginError as error:
        raise EncodingError(str(error)) from error
    if not isinstance(made, Schema):
        found.owner.add_fault(Fault(item_of(found.info), "isn't a Schema"))
        raise EncodingError(
            f"{item_of(found.info)} of {found.owner.title} isn't a Schema: see bitwright.formats.Schema"
        )
    return made


def _descriptor(version: str) -> Descriptor[SchemaInfo]:
    if (found := current().holder(SchemaInfo, version)) is not None:
        return found
    lost = current().why_lost(kind_of(SchemaInfo).word, version)
    raise EncodingError(lost or f"unknown encodings version {version!r}; known: {', '.join(versions())}")


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
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
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
        if not isinstance(version, str) or version not in versions():
            raise where.error(f"{describe(version)} is none of {', '.join(versions())}", "version")
        return with_own(_read_by(version, document, source), source)
    sections = [document[s] for s in _SECTIONS if s in document]
    if sections:
        listed = all(isinstance(section, list) for section in sections)
        headerless: Schema = schema_1_0_0 if listed else schema_0_6_1
        return headerless.parse(document, source)
    if document and all(_looks_like_entry(value) for value in document.values()):
        # AdaRound of early AIMET releases: parameter names at the top level.
        return schema_0_6_1.parse({"param_encodings": document}, source)
    raise where.error("not an encodings file: it has no version and no activation_encodings or param_encodings")


def _read_by(version: str, document: Mapping[str, Any], source: str) -> EncodingsFile:
    """A document by its schema; what a plugin's does wrong is put down to it."""
    reader, found = schema(version), _descriptor(version)
    try:
        with blamed(found.owner, item_of(found.info)):
            file = reader.parse(document, source)
    except PluginError as error:
        raise EncodingError(f"{source}: {error}") from error
    if not isinstance(file, EncodingsFile):
        raise EncodingError(f"{source}: {item_of(found.info)} of {found.owner.title} gave a {type(file).__name__}")
    return file


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
    return "".join(_pieces(file, version))


def _pieces(file: EncodingsFile, version: str | None) -> Iterator[str]:
    """The text, a tensor at a time: the numbers of all blocks of a large model as Python objects are many times it."""
    version = version or file.version
    writer, found = schema(version), _descriptor(version)
    try:
        with blamed(found.owner, item_of(found.info)):
            document = writer.render(file)
    except PluginError as error:
        raise EncodingError(str(error)) from error
    for index, (key, value) in enumerate(document.items()):
        yield ("{\n" if index == 0 else ",\n") + f"  {json.dumps(key)}: "
        yield from _block(value, key)
    yield "\n}\n"


def _block(value: Any, key: str) -> Iterator[str]:
    if key not in (*_SECTIONS, "encodings") or not value:
        yield _compact([] if isinstance(value, ValuesView) else dict(value) if isinstance(value, Mapping) else value)
        return
    named = isinstance(value, Mapping)
    yield "{" if named else "["
    for index, item in enumerate(value.items() if named else value):
        text = f"{_compact(item[0])}: {_compact(item[1])}" if named else _compact(item)
        yield (",\n    " if index else "\n    ") + text
    yield "\n  }" if named else "\n  ]"


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
    return write_text(path, _pieces(file, version))


def as_version(version: str) -> str:
    """A version string, checked."""
    schema(version)
    return version
