"""``bitwright new``: a distribution with a technique, a target or a backend, whole and working, to start from."""

from __future__ import annotations

import keyword
import os
import re
import shutil
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.cli import console, templates
from bitwright.errors import InputError
from bitwright.files import cannot_write, make_directory


class Kind(StrEnum):
    """What can be begun."""

    TECHNIQUE = "technique"
    TARGET = "target"
    BACKEND = "backend"


def new(
    kind: Annotated[Kind, typer.Argument(help="What it brings.", show_default=False)],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="What it is called, such as my_rounding.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to make (default: bitwright-NAME here).", show_default=False)
    ] = None,
) -> None:
    """Write a distribution with a technique, target or backend: it installs, passes its tests and does a real thing."""
    plain = checked_name(kind, name)
    folder = out if out is not None else Path(f"bitwright-{plain.replace('_', '-')}")
    write_distribution(folder, files_of(kind, plain))
    console.say(f"{folder} is written. To try it:")
    console.say(f"  pip install -e {folder}")
    console.say(f"  pytest {folder}")
    shown = "plugins" if kind is Kind.BACKEND else f"{kind}s {templates.public_name(kind.value, plain)}"
    console.say(f"  bitwright {shown}")


def checked_name(kind: Kind, name: str) -> str:
    """The name with "_" for "-".

    Raises:
        InputError: it can't be one, or somebody has it.
    """
    plain = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", plain) or keyword.iskeyword(plain) or len(plain) > 50:
        raise InputError(f"{name!r} can't be a name: small letters, digits and _ (or -), a letter first")
    from bitwright.catalogue import current
    from bitwright.hookspecs import BackendInfo, TargetInfo, TechniqueInfo

    infos = {Kind.TECHNIQUE: TechniqueInfo, Kind.TARGET: TargetInfo, Kind.BACKEND: BackendInfo}
    info: Any = infos[kind]
    if held := current().holder(info, plain):
        raise InputError(f"{kind} {name!r} belongs to {held.owner.title}; choose another name")
    if find_spec(f"bitwright_{plain}") is not None:
        raise InputError(f"there is a package bitwright_{plain} already; choose another name")
    return plain


def files_of(kind: Kind, name: str) -> dict[str, str]:
    """Every file of a distribution: path within its folder → text."""
    return templates.filled(kind.value, name)


def write_distribution(folder: Path, files: dict[str, str]) -> None:
    """Write a folder, whole or not at all.

    Raises:
        InputError: there is one already, or it can't be written.
    """
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} is there already; choose another folder by --out")
    make_directory(folder.parent)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        for path, text in files.items():
            file = staging / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        staging.rename(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
