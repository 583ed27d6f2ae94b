"""Recipes as users write them: ``"cle,adaround"``, a list, or a YAML or JSON file; checked before any work.

A file is a list whose items are names or one-key mappings from a name to settings::

    - fold_batch_norm
    - cross_layer_equalization
    - adaround:
        iterations: 2000
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from bitwright.errors import InputError, PluginError
from bitwright.technique import Recipe, Settings, Step

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from bitwright.plugins import Registry

FILE_SUFFIXES = (".yaml", ".yml", ".json")
_BYTES = 2**20
_ENTRIES = 10_000
"""A recipe's names and values; a few lines of nested YAML aliases stand for billions."""
_BITS = 64
"""Of a whole number; hexadecimal ones may have more digits than Python writes out."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120

RecipeLike = str | Path | Recipe | Sequence[Any] | None


def read_recipe(source: RecipeLike, registry: Registry | None = None) -> Recipe:
    """A recipe with canonical technique names and checked settings.

    Args:
        source: comma-separated names, a path of a .yaml, .yml or .json file, a list as such a file holds it,
            a `Recipe`, or None for no step.
        registry: where techniques are looked up; the default registry if None.

    Raises:
        InputError: unreadable or malformed, or settings that a technique refuses; names the step and the field.
        PluginError: a technique is unknown; names the step.
    """
    if source is None:
        return Recipe(())
    if isinstance(source, Recipe):
        return _checked(list(source), "recipe", registry)
    if isinstance(source, Path) or (isinstance(source, str) and source.lower().endswith(FILE_SUFFIXES)):
        content = _parse_file(Path(source))
        _check_size(content, str(source))
        return _checked(_steps(content, str(source)), str(source), registry)
    if isinstance(source, str):
        names = [name.strip() for name in source.split(",")]
        if any(not name for name in names):
            raise InputError(f"recipe {source!r} has an empty step; write names with single commas between them")
        return _checked([Step(name) for name in names], "recipe", registry)
    return _checked(_steps(source, "recipe"), "recipe", registry)


def check_settings(technique: str, settings: Mapping[str, Any], registry: Registry | None = None) -> Settings:
    """A technique's settings, validated.

    Raises:
        InputError: a field is unknown or its value is refused; names technique and field.
        PluginError: the technique is unknown.
    """
    model = _registry(registry).settings(technique)
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        raise InputError(f"{technique}: {'; '.join(_explain(e, model) for e in error.errors())}") from None


def _checked(steps: list[Step], where: str, registry: Registry | None) -> Recipe:
    checked = []
    for number, step in enumerate(steps, 1):
        try:
            name = _registry(registry).technique_info(step.technique).name
            check_settings(name, step.settings, registry)
        except (InputError, PluginError) as error:
            raise type(error)(f"{where}, step {number}: {error}") from None
        checked.append(Step(name, dict(step.settings)))
    return Recipe(tuple(checked))


def _registry(registry: Registry | None) -> Registry:
    from bitwright.plugins import registry as known

    return registry if registry is not None else known.default_registry()


def _parse_file(path: Path) -> object:
    try:
        if (size := path.stat().st_size) > _BYTES:
            raise InputError(f"recipe {str(path)!r} has {size:,} bytes; a recipe has at most {_BYTES:,}")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the name
        raise InputError(f"can't read recipe {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"recipe {str(path)!r} isn't JSON: {error}") from error
    import yaml

    from bitwright.simulation._bounded_yaml import load

    try:
        return load(text, str(path), _ENTRIES)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"recipe {str(path)!r} isn't YAML: {' '.join(str(error).split())[:300]}") from error


def _check_size(content: object, where: str) -> None:
    stack, count = [content], 0
    while stack:
        value = stack.pop()
        count += 1
        if count > _ENTRIES:
            raise InputError(f"{where}: a recipe has at most {_ENTRIES:,} entries, YAML aliases written out")
        if isinstance(value, int) and value.bit_length() > _BITS:
            raise InputError(f"{where}: a number has {value.bit_length():,} bits; {_BITS} are possible")
        if isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value


def _steps(content: object, where: str) -> list[Step]:
    if isinstance(content, Mapping) and set(content) == {"steps"}:
        content = content["steps"]
    if not isinstance(content, Sequence) or isinstance(content, str | bytes):
        raise InputError(f"{where}: a recipe is a list of steps, not {_word(content)}")
    if not content:
        raise InputError(f"{where}: the recipe has no step")
    return [_step(item, f"{where}, step {number}") for number, item in enumerate(content, 1)]


def _step(item: object, where: str) -> Step:
    if isinstance(item, Step):
        return item
    if isinstance(item, str):
        return Step(item)
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, settings),) = item.items()
        if isinstance(name, str) and (settings is None or isinstance(settings, Mapping)):
            return Step(name, dict(settings or {}))
        raise InputError(f"{where}: the settings of {_SHORT.repr(name)} must be a mapping, not {_word(settings)}")
    raise InputError(f"{where}: write a name, or one name with its settings, not {_word(item)}")


def _word(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with {len(value)} keys"
    return "nothing" if value is None else _SHORT.repr(value)


def _explain(error: ErrorDetails, model: type[Settings]) -> str:
    field = ".".join(str(part) for part in error["loc"]) or "settings"
    if error["type"] == "extra_forbidden":
        return f"there is no setting {field!r}; there are: {', '.join(model.model_fields) or 'none'}"
    return f"{field}: {error['msg'][0].lower()}{error['msg'][1:]}, got {_SHORT.repr(error['input'])}"
