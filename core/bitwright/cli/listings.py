"""``bitwright targets | techniques | plugins``: what there is."""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli import console

if TYPE_CHECKING:
    from bitwright.plugins.registry import PluginStatus, Registry

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def targets(
    name: Annotated[
        str | None, typer.Argument(help="Show one: a preset, or a configuration file.", show_default=False)
    ] = None,
    as_json: Json = False,
    config: Annotated[bool, typer.Option("--config", help="Print the whole configuration of one target.")] = False,
) -> None:
    """List the targets, or show one."""
    from bitwright.errors import TargetError
    from bitwright.targets import load_target, target_names, target_summary

    if config:
        if name is None:
            raise typer.BadParameter("--config needs the name of a target")
        sys.stdout.write(load_target(name).to_json().rstrip() + "\n")
        return
    summaries = []
    for one in (name,) if name is not None else target_names():
        try:
            summaries.append(target_summary(one))
        except TargetError as error:
            if name is not None:
                raise
            console.complain(f"warning: {error}")
    if as_json:
        _json([asdict(s) for s in summaries])
    elif name is not None:
        console.table(("", ""), ((k.replace("_", " "), _shown(v)) for k, v in asdict(summaries[0]).items()))
    else:
        console.table(
            ("target", "weights", "activations", "description"),
            ((s.name, s.weights, s.activations, s.description) for s in summaries),
        )


def techniques(
    name: Annotated[str | None, typer.Argument(help="Show one, with its settings.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the techniques, or show one with its settings."""
    from bitwright.plugins.registry import default_registry

    registry = default_registry()
    if name is not None:
        info = registry.technique_info(name)
        schema = registry.settings(name).model_json_schema()
        if as_json:
            _json({"name": info.name, "summary": info.summary, "aliases": info.aliases, "settings": schema})
            return
        console.say(f"{info.name}: {info.summary}")
        if info.aliases:
            console.say(f"Also called {', '.join(info.aliases)}.")
        if requires := registry.technique(name).requires:
            console.say(f"Needs a backend with {', '.join(sorted(requires))}.")
        if rows := setting_rows(registry, name):
            console.table(("setting", "type", "default", "what it does"), rows)
        else:
            console.say("It has no settings.")
        return
    found = registry.techniques().values()
    if as_json:
        _json([{"name": t.name, "summary": t.summary, "aliases": t.aliases} for t in found])
        return
    console.table(("technique", "aliases", "summary"), ((t.name, ", ".join(t.aliases), t.summary) for t in found))


def setting_rows(registry: Registry, technique: str) -> list[tuple[str, str, str, str]]:
    """A technique's settings: name, type, default, and what its documentation says of it."""
    model = registry.settings(technique)
    schema, notes = model.model_json_schema(), setting_notes(model)
    return [
        (k, _type(f, schema), _default(f), f.get("description") or notes.get(k, ""))
        for k, f in schema.get("properties", {}).items()
    ]


def plugins(as_json: Json = False) -> None:
    """List the plugins with their state: ok, missing framework, partial or failed (and why), or blocked."""
    from bitwright.plugins import default_registry

    states = default_registry().plugins(examined=True)
    if as_json:
        _json([asdict(p) for p in states])
        return
    console.table(
        ("plugin", "distribution", "state", "provides", "reason"),
        ((p.name, f"{p.distribution} {p.version}".strip(), p.state, _provided(p), p.reason) for p in states),
    )


def _provided(plugin: PluginStatus) -> str:
    """Names by kind: "techniques: cle, adaround; tools: auto_quantize"."""
    kinds = ("backends", "techniques", "tools", "targets", "runtimes", "schemas", "formats", "toolchains")
    return "; ".join(f"{kind}: {', '.join(names)}" for kind in kinds if (names := getattr(plugin, kind)))


def setting_notes(model: type) -> dict[str, str]:
    """What a settings class and those that it builds on say of each setting."""
    return {
        k: v
        for base in reversed(model.__mro__)
        for k, v in attribute_notes(inspect.cleandoc(base.__doc__ or "")).items()
    }


def attribute_notes(docstring: str) -> dict[str, str]:
    """What an ``Attributes:`` section says of each name."""
    _, _, section = docstring.partition("Attributes:\n")
    notes: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        if found := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = found[1].split(", ")
            notes.update(dict.fromkeys(names, found[2]))
        else:
            notes.update({name: f"{notes[name]} {line.strip()}" for name in names})
    return notes


def _json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "–" if value is None else str(value)


def _default(field: dict[str, Any]) -> str:
    return "required" if "default" not in field else json.dumps(field["default"], ensure_ascii=False)


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """A JSON schema type in a word or two."""
    if "$ref" in field:
        return _type(schema["$defs"][field["$ref"].rpartition("/")[2]], schema)
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if options := field.get("anyOf"):
        return " | ".join(dict.fromkeys(_type(option, schema) for option in options))
    names = {"number": "number", "integer": "integer", "boolean": "true or false", "array": "list", "null": "none"}
    return names.get(field.get("type", ""), str(field.get("type", "any")))
